"""PyTorch's time over the CPU library's for each operation: makes the table of ``vit_fast/backends/cpu_choice.py``.

    python -P benchmarks/cpu_choice.py [--json FILE] [--level LEVEL] [--rows N …] [--width C] [--turns N] [--seconds S]

Both backends run by turns on one thread, and the fastest turn of each counts, in seconds of the processor, so that a
busy machine changes little. The sizes are those of ViT-B; rows are those of a product, or tokens of attention.
``chosen from`` are the rows from which the library was the faster here, up to the largest that was measured; ``table``
is what ``cpu_choice.py`` has. An older instruction set than the processor's is measured with ``--level``: PyTorch keeps
using what the processor has. At most 3 minutes; with a smaller ``--seconds`` slow sizes take fewer turns, at least 3.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from vit_fast.backends import cpu_choice
from vit_fast.backends.cpu import CPU
from vit_fast.backends.torch import TORCH
from vit_fast.bench import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_SIZE, PATCH = 64, 16


class Row(NamedTuple):
    """Milliseconds of an operation at a size, fastest turn of each backend."""

    operation: str
    dtype: str
    rows: int
    torch_ms: float
    cpu_ms: float

    @property
    def ratio(self) -> float:
        """PyTorch's time over the library's: above 1 the library is the faster."""
        return self.torch_ms / self.cpu_ms


def arguments(operation: str, rows: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What an operation takes at a number of rows (patch embedding: a multiple of 8, images of 8 patches in a row)."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul_(shape[-1] ** -0.5 if len(shape) > 1 else 1).to(dtype)

    x, weight, bias = torch.randn(1, rows, width).to(dtype), tensor(width), tensor(width)
    norm = (weight, bias, 1e-6)
    if operation == "layer_norm":
        return x, *norm
    if operation == "layer_norm_linear":
        return x, *norm, tensor(3 * width, width), tensor(3 * width)
    if operation == "linear_residual":
        return x, tensor(width, width), bias, None, x
    if operation == "layernorm_mlp":
        first, second = tensor(4 * width, width), tensor(width, 4 * width)
        return x, *norm, first, tensor(4 * width), second, bias, "gelu", None
    if operation == "attention":
        return torch.randn(1, rows, 3 * width).to(dtype), max(1, width // HEAD_SIZE), HEAD_SIZE**-0.5
    images = torch.randn(1, 3, PATCH * max(1, rows // 8), PATCH * min(rows, 8)).to(dtype)
    return images, tensor(width, 3, PATCH, PATCH), bias, None, None, (PATCH, PATCH)


def measure(operation: str, dtype: str, rows: int, width: int, turns: int, seconds: float) -> Row:
    """Both backends by turns, after a call of each; at least three turns, and no more once ``seconds`` have passed."""
    given = arguments(operation, rows, width, DTYPES[dtype])
    functions = [backend.inference.get(operation, backend.forward[operation]) for backend in (TORCH, CPU)]
    took: list[list[float]] = []
    with torch.inference_mode():
        for function in functions:
            function(*given)
        begin = time.monotonic()
        while len(took) < 3 or (len(took) < turns and time.monotonic() - begin < seconds):
            took.append([_turn(function, given) for function in functions])
    return Row(operation, dtype, rows, *(1e3 * min(times) for times in zip(*took, strict=True)))


def _turn(function: Callable[..., Any], given: tuple[Any, ...]) -> float:
    start = time.thread_time()
    function(*given)
    return time.thread_time() - start


def chosen_from(rows: list[Row]) -> int | None:
    """The fewest rows from which the library was never the slower; None without any."""
    fewest = None
    for row in sorted(rows, key=lambda row: -row.rows):
        if row.ratio < 1:
            break
        fewest = row.rows
    return fewest


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    level: Annotated[str, typer.Option(help="An instruction-set level of the library. [default: the highest]")] = "",
    rows: Annotated[list[int], typer.Option(help="Rows; may be given again.")] = [16, 64, 200, 1576],  # noqa: B006
    width: Annotated[int, typer.Option(help="Width of the model, a multiple of 64.")] = 768,
    turns: Annotated[int, typer.Option(help="Turns of each backend.")] = 9,
    seconds: Annotated[float, typer.Option(help="For one operation at one size, beyond three turns.")] = 2.0,
) -> None:
    """Measure where the CPU library is the faster; see the head of benchmarks/cpu_choice.py."""
    if reasons := CPU.load():
        raise typer.BadParameter("; ".join(reasons), param_hint="the CPU library")
    if level and level not in CPU.levels():
        raise typer.BadParameter(f"{level!r}, expected one of {', '.join(CPU.levels())}", param_hint="--level")
    if min(rows) < 1 or width < HEAD_SIZE or width % HEAD_SIZE:
        raise typer.BadParameter(f"rows {rows}, width {width}: expected 1 or more, and a multiple of {HEAD_SIZE}")
    if level:
        CPU.use_level(level)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    used, capabilities = str(CPU.version()), torch.cpu.get_capabilities()
    table = Table("operation", "dtype", *(f"{n} rows" for n in rows), "chosen from", "table", title=f"level {used}")
    measured: list[Row] = []
    for dtype, torch_dtype in DTYPES.items():
        for operation in cpu_choice.NATIVE_FLOAT32:
            found = [measure(operation, dtype, n, width, turns, seconds) for n in rows]
            measured += found
            known = cpu_choice.fewest_rows(operation, torch_dtype, used, capabilities)
            ratios = (f"{row.ratio:.2f}" for row in found)
            table.add_row(operation, dtype, *ratios, str(chosen_from(found) or "never"), str(known or "never"))
    Console().print(table)
    if json_file is not None:
        facts = {"cpu": machine.cpu_name(), "commit": machine.commit(), "torch": torch.__version__, "level": used}
        facts |= {"width": width, "threads": 1}  # type: ignore[operator]
        lines = [row._asdict() | {"ratio": round(row.ratio, 3)} for row in measured]
        json_file.write_text(json.dumps(facts | {"rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
