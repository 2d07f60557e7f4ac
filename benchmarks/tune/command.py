"""The command line of the tuner: its flags, and the run from the plan to the table."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import child
import torch
import typer
from rich.console import Console

from vit_fast.bench import machine

from .candidates import KINDS, Chip, own_kernel, plan
from .compilers import Compilers
from .guarded import Guarded
from .problems import BATCHES, OPERATIONS, VITS, Maker, Problem, problems
from .ranking import run
from .report import config_dict, one_line, table
from .timing import NO_TIME, kernel_seconds


def _listed(option, text, known):
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"got {unknown[0]!r}, wanted any of {', '.join(known)}", param_hint=option)
    return names


def compile_only(
    wanted: list[Problem], chip: Chip, compilers: Compilers, end: float, kind: str = "all"
) -> tuple[list[dict[str, Any]], int]:
    """(error of each candidate that failed to compile, number of candidates that compiled)."""
    refused, taken = [], 0
    for problem in wanted:
        for config in plan(problem, chip, kind):
            if own_kernel(config) == "cutlass":
                continue
            left = end - time.monotonic()
            said = NO_TIME if left <= 0 else compilers.result(problem, config, left)
            taken += said is None
            if said is not None:
                refused.append({"problem": str(problem), "config": config_dict(config), "why": said})
    return refused, taken


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("out/tune.json"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for all together.")] = 240.0,
    only: Annotated[str, typer.Option(help="Operations.")] = ",".join(OPERATIONS),
    models: Annotated[str, typer.Option(help="ViTs, the first first.")] = ",".join(VITS),
    batches: Annotated[str, typer.Option(help="Batch sizes, the first first.")] = ",".join(map(str, BATCHES)),
    jobs: Annotated[
        int, typer.Option(min=0, help="Processes that compile ahead; 0 for none.", show_default="processors − 2")
    ] = max(1, (os.cpu_count() or 1) - 2),
    kind: Annotated[
        str, typer.Option("--candidates", help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}: see candidates.py.")
    ] = "all",
    arch: Annotated[int, typer.Option(help="10·major + minor of the GPU, for --dry-run and --compile-only.")] = 90,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List problems and candidates.")] = False,
    compile_: Annotated[bool, typer.Option("--compile-only", help="Compile the candidates, time nothing.")] = False,
) -> None:
    """Time launch configurations on this GPU; see the head of benchmarks/tune/__init__.py."""
    end = time.monotonic() + seconds
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("got 1, wanted a process that compiles: unset it", param_hint="TRITON_INTERPRET")
    if kind not in KINDS:
        raise typer.BadParameter(f"got {kind!r}, wanted any of {', '.join(KINDS)}", param_hint="--candidates")
    sizes = batches.split(",")
    if unknown := [size for size in sizes if not size.isdecimal() or int(size) == 0]:
        raise typer.BadParameter(f"got {unknown[0]!r}, wanted positive ints", param_hint="--batches")
    wanted = problems(
        _listed("--only", only, OPERATIONS), _listed("--models", models, tuple(VITS)), tuple(map(int, sizes))
    )
    if dry_run:
        for problem in wanted:
            configs_ = plan(problem, Chip.named(arch), kind)
            print(f"{problem}: {len(configs_)} candidates, the rule's first")
            for config in configs_:
                print(f"  {config}")
        return
    if compile_:
        chip = Chip.named(arch)
        with Compilers(max(jobs, 1), chip) as compilers:
            for problem in wanted:
                compilers.submit(problem, plan(problem, chip, kind))
            refused, taken = compile_only(wanted, chip, compilers, end, kind)
        child.save(out, {"arch": arch, "torch": torch.__version__, "compiled": taken, "refused": refused})
        print(f"{taken} candidates compile for sm_{arch}, {len(refused)} do not; {out} names these")
        return
    known = machine.gpu_facts()
    if "missing" in known:
        child.save(out, known | {"rows": []})
        print(f"not measured: {known['missing']}; {out} says so")
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    chip, make = Chip.of(device), Maker(device, torch.bfloat16, filled=True)
    content = known | {"dtype": "bfloat16", "rows": [], "errors": [], "not_reached": list(map(str, wanted))}

    def keep(rows, errors, not_reached):
        content.update(rows=list(rows), errors=list(errors), not_reached=list(map(str, not_reached)))
        child.save(out, content)

    with Compilers(jobs, chip) as compilers, Guarded(device, make.dtype) as guarded:
        for problem in wanted:
            with contextlib.suppress(Exception):  # tuning reports the same error
                compilers.submit(problem, plan(problem, chip, kind))
        try:
            run(wanted, chip, make, compilers, kernel_seconds, end, keep, guarded, kind)
        except Exception as error:  # the device is lost; times measured before are kept
            content["lost"] = one_line(error)
            child.save(out, content)
    rows = content["rows"]
    title = f"{known['gpu']}, bfloat16, {len(rows)} of {len(wanted)} problems, in {out}"
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, title))
    if "lost" in content:
        print(f"the device is lost: {content['lost']}")
    raise typer.Exit(int("lost" in content or bool(content["errors"]) or not rows))
