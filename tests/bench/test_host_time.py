"""benchmarks/host_time.py, run as its user would: launches counted, times told, on a CPU with Triton alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host_time.py"


def run(*words):
    return subprocess.run([sys.executable, "-P", SCRIPT, *words], capture_output=True, text=True, timeout=500)


@pytest.mark.aot
def test_launches_are_counted_and_timed(tmp_path):
    path = tmp_path / "new" / "host.json"
    done = run("--model", "vit_tiny_patch16_224", "--calls", "3", "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(path.read_text())
    assert told["model"] == "vit_tiny_patch16_224" and told["triton"] and told["cpu"] and told["batch_size"] == 1
    # Patch embedding and last norm; seven a block, or five and the partials of the first rows; seven in float8.
    assert {row["form"]: row["launches"] for row in told["rows"]} == {"plain": 86, "prepared": 63, "fp8": 86}
    assert all(0.1 < row["fastest_ms"] <= row["median_ms"] for row in told["rows"])
    assert "prepared" in done.stdout and "63" in done.stdout


def test_bad_words_are_told():
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run("--calls", "0")
    assert done.returncode != 0 and "got 0, wanted a whole number of 1 or more" in " ".join(done.stderr.split())
