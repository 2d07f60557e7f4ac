"""All that only a GPU can show, in one command: correctness on the chip first, then the numbers.

    make gpu [ARGS="--out FOLDER --minutes 28 --only tests,models --dry-run"]

A stage is a child process with its own log; one that fails, hangs or runs out of time keeps what it had written, and
the next one runs. summary.json tells the machine, the commit, and what became of every stage. Without a CUDA device of
capability 8.0 nothing is measured, summary.json says why, and the exit status is 1.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from vit_fast.cli import machine

ROOT = Path(__file__).resolve().parents[1]
MODELS = (  # timm's name, pixels, batch sizes; the most telling first
    ("vit_base_patch16_224", 224, "1,8,64,256"),
    ("vit_small_patch16_224", 224, "1,8,64,256"),
    ("vit_large_patch16_224", 224, "1,8,64,256"),
    ("vit_base_patch16_384", 384, "1,8,64,256"),
    ("vit_huge_patch14_224", 224, "1,8,64,256"),
    ("vit_so400m_patch14_siglip_224", 224, "1,8,64,256"),
    ("vit_base_patch16_224", 512, "16,64"),
    ("vit_base_patch16_224", 1024, "4,16"),
)


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple  # after the interpreter
    seconds: float  # at most


def stages(out, only):
    """The stages of the chosen groups, in order."""
    pytest = ("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    tests = [
        Stage("tests", (*pytest, "tests", "-m", "gpu", "-n", "4", f"--junitxml={out}/tests.xml"), 540),
    ]
    checked = "test_gpu_bits or test_gpu_layouts_and_mixed_dtypes or test_gpu_integers_come_out_exactly"
    memcheck = ("-c", _under("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"))
    sanitizer = [Stage("sanitizer", (*memcheck, *pytest, "tests", "-m", "gpu", "-k", checked), 300)]
    operations = [Stage("operations", (*pytest, "benchmarks", f"--benchmark-json={out}/operations.json"), 300)]
    bench = ("-P", "-m", "vit_fast", "bench", "--precision", "bfloat16")
    models = []
    for model, size, batches in MODELS:
        words = ("--model", model, "--img-size", str(size), "--batch-size", batches)
        file = ("--results-file", f"{out}/{model}-{size}.json")
        models.append(Stage(f"models {model} {size}", (*bench, *words, *file), 420))
    families = [
        Stage("families", (*bench, "--family", "all", "--results-file", f"{out}/families.json"), 300),
    ]
    groups = {
        "tests": tests,
        "sanitizer": sanitizer,
        "operations": operations,
        "models": models,
        "families": families,
    }
    wanted = only.split(",")
    if unknown := [word for word in wanted if word not in groups]:
        raise typer.BadParameter(f"got {unknown[0]!r}, wanted any of {', '.join(groups)}", param_hint="--only")
    return [stage for word in groups if word in wanted for stage in groups[word]]


def _under(*tool):
    """Python text that runs this very interpreter, with the arguments that follow, under a tool."""
    return f"import os, sys; os.execvp({tool[0]!r}, [*{list(tool)!r}, sys.executable, *sys.argv[1:]])"


def run(stage, out, seconds):
    """What became of one stage: "passed", "failed (exit status)" or "out of time", and its seconds."""
    begun = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with open(out / f"{stage.name.replace(' ', '-')}.log", "w") as log:
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


def facts():
    """Machine, versions and commit; "missing" says why nothing can be measured, if so."""
    known = {"commit": machine.commit(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    known["torch"] = torch.__version__
    if not torch.cuda.is_available():
        return known | {"missing": "torch finds no CUDA device"}
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    known |= {"gpu": machine.name(device), "capability": list(capability), **machine.gpu_state(device)}
    known["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    if capability < (8, 0):
        known["missing"] = f"the GPU has capability {capability[0]}.{capability[1]}, wanted 8.0 or more"
    return known


def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: benchmarks/results/GPU/DATE]")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for all stages together.")] = 60.0,
    only: Annotated[str, typer.Option(help="Groups of stages.")] = "tests,sanitizer,operations,models,families",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, run nothing.")] = False,
):
    """Test and measure on this GPU; see the head of benchmarks/gpu.py."""
    known = facts()
    folder = ROOT / "out" / "gpu"  # where nothing is measured there is no result to keep
    if "missing" not in known:
        slug = known["gpu"].lower().removeprefix("nvidia ").replace(" ", "-")
        folder = ROOT / "benchmarks" / "results" / slug / known["time"][:16].replace(":", "")
    out = (out or folder).resolve()
    plan = stages(out, only)
    if dry_run:
        for stage in plan:
            print(f"{stage.name}: python {' '.join(stage.command)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    summary = known | {"stages": []}

    def save():
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    save()
    if "missing" in known:
        print(f"not measured: {known['missing']}; {out / 'summary.json'} says so")
        raise typer.Exit(1)
    end = time.monotonic() + 60 * minutes
    for stage in plan:
        left = end - time.monotonic()
        result = run(stage, out, left) if left > 5 else {"stage": stage.name, "verdict": "no time left", "seconds": 0.0}
        summary["stages"].append(result)
        save()
        print(f"{result['stage']}: {result['verdict']}, {result['seconds']:.0f} s", flush=True)
    table = Table("stage", "verdict", "seconds", title=f"{known['gpu']}, results in {out}")
    for result in summary["stages"]:
        table.add_row(result["stage"], result["verdict"], f"{result['seconds']:.0f}")
    Console().print(table)
    raise typer.Exit(int(any(result["verdict"] != "passed" for result in summary["stages"])))


if __name__ == "__main__":
    typer.run(main)
