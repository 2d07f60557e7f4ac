"""Host time of a forward pass through the Triton kernels, without a GPU: Python's time until all kernels are launched.

    python -P benchmarks/host_time.py [--model NAME --batch-size 1 --json FILE]

A stand-in for Triton's driver reports capability 9.0; the kernels are compiled, and a launch ends where Triton would
call its C launcher. So the figures contain our own Python and Triton's, and neither the launcher, nor the driver, nor
the time of a kernel. At small batches this time limits the latency, unless the model is replayed as CUDA graphs.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.compiler import CompiledKernel

import vit_fast
from vit_fast.backends import select
from vit_fast.backends.triton import TRITON
from vit_fast.bench import machine
from vit_fast.bench.errors import WrongValueError
from vit_fast.bench.results import check_writable
from vit_fast.precisions import PRECISIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "aot"))

import harness

LAUNCHES = []


def pretend() -> None:
    """Sends CPU tensors to the Triton backend, whose launches are only counted."""
    harness._set_arch(90)
    select.unavailable = lambda name, device: ()
    TRITON.load()
    TRITON.not_supported = dict.fromkeys(TRITON.not_supported, lambda *arguments, **options: [])
    CompiledKernel._init_handles = lambda kernel: setattr(kernel, "function", 0)
    CompiledKernel.launch_metadata = lambda kernel, *launch: None
    CompiledKernel.run = property(lambda kernel: lambda *launch: LAUNCHES.append(kernel))


def host_time(call: Callable[[], Any], calls: int) -> tuple[float, float, int]:
    """(fastest and median milliseconds of a call, its launches)."""
    call()
    LAUNCHES.clear()
    call()
    launches, times = len(LAUNCHES), []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), statistics.median(times), launches


def main(
    model: Annotated[str, typer.Option("--model", "-m", help="timm's name of the model.")] = "vit_base_patch16_224",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images.")] = 1,
    calls: Annotated[int, typer.Option(help="Timed calls.")] = 50,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure the host time of a forward pass; see the head of benchmarks/host_time.py."""
    for flag, count in (("--batch-size", batch_size), ("--calls", calls)):
        if count < 1:
            raise typer.BadParameter(f"got {count}, wanted a whole number of 1 or more", param_hint=flag)
    if json_file is not None:
        try:
            check_writable(json_file)
        except WrongValueError as error:
            raise typer.BadParameter(str(error), param_hint="--json") from error
    torch.set_num_threads(1)
    pretend()
    module = vit_fast.create_model(model).eval().bfloat16()
    images, rows = torch.randn(batch_size, *module.default_cfg["input_size"]).bfloat16(), []
    on_triton = (precision for precision in PRECISIONS.values() if precision.kernels())
    for form, precision in (("plain", None), *((precision.variant, precision) for precision in on_triton)):
        with vit_fast.backend("triton"):
            if precision is not None:
                vit_fast.prepare(module, precision=precision.name)
            with torch.inference_mode():
                fastest, median, launches = host_time(lambda: module(images), calls)
        rows.append({"form": form, "launches": launches, "fastest_ms": fastest, "median_ms": median})
    table = Table("form", "launches", "fastest ms", "median ms", title=f"{model}, batch {batch_size}, host time")
    for row in rows:
        table.add_row(row["form"], str(row["launches"]), f"{row['fastest_ms']:.2f}", f"{row['median_ms']:.2f}")
    Console().print(table)
    if json_file is not None:
        facts = {"model": model, "batch_size": batch_size, "cpu": machine.cpu_name(), "commit": machine.commit()}
        versions = {"torch": torch.__version__, "triton": triton.__version__, "vit_fast": vit_fast.__version__}
        json_file.write_text(json.dumps(facts | versions | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
