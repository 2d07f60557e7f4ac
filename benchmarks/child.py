"""Stages of a run on a GPU: child processes with a log and a time limit, none of which can hang or end the others."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import torch
import vit_fast
x, weight, bias = (torch.randn(*size, device="cuda").bfloat16() for size in ((64, 768), (768,), (768,)))
with vit_fast.backend("triton"), torch.inference_mode():
    out = vit_fast.ops.layer_norm(x, weight, bias)
torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (768,), weight, bias, 1e-6), atol=0.1, rtol=0.1)
"""


@dataclass(frozen=True)
class Stage:
    """A child process of the run."""

    name: str
    command: tuple[str, ...]  # after the interpreter
    seconds: float  # at most
    cold: bool = False  # has its own kernel caches, empty at the start
    float8: bool = False  # needs capability 8.9


def run(stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    """Runs one stage; returns its outcome: "passed", "failed (exit status)" or "out of time", and its seconds."""
    begun = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    log_path = out / f"{stage.name.replace(' ', '-')}.log"
    with open(log_path, "w") as log, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        if stage.cold:
            environment |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        child = subprocess.Popen(
            [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = child.wait(min(stage.seconds, seconds))
            verdict = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            verdict = "out of time"
    return {"stage": stage.name, "verdict": verdict, "seconds": round(time.monotonic() - begun, 1)}


def triton_error(seconds: float = 180) -> str | None:
    """Why a small kernel of ours cannot be compiled, loaded and run here, or None; tried in a child process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-P", "-c", PROBE]
    try:
        child = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"a small kernel did not end within {seconds} s"
    if child.returncode == 0:
        return None
    return child.stderr.strip()[-2000:] or f"exit status {child.returncode} without a word"


def under(*tool: str) -> str:
    """Python code that runs this interpreter, with the arguments that follow, under a tool."""
    return f"import os, sys; os.execvp({tool[0]!r}, [*{list(tool)!r}, sys.executable, *sys.argv[1:]])"


def save(path: Path, content: object) -> None:
    """Writes a JSON file atomically: a killed run leaves the old file or the new one. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder, which is made where it is not there; None where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
