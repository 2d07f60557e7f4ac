"""What a forward pass of a model of vit_fast would take on a GPU that is not here; a model, never a measurement.

``launches`` finds what would be launched, ``resources`` what a program needs, ``instruction_model`` how long a launch
takes; ``gpus`` has the facts. The time of a step is the sum of the estimates and of the gaps between launches: what the
GPU needs. Where the host launches more slowly (small batches without CUDA graphs) a step takes longer, and where a
power limit holds the clock down too.

Uncertainty of a step: 40 % with the 197 token rows of ViT-B/16 at batch 1 or fewer, 10 % with the 50,432 of batch 256
or more, linear in the logarithm of the rows between; twice that on GPUs other than those of capability 9.0, whose
machine code was not read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vit_fast.precisions import FOLDED, FP8, Precision

from . import attribution, instruction_model, resources
from .errors import BenchError
from .gpus import GPUS, Gpu
from .instruction_model import Estimate
from .launches import Launch, Launched, forward_launches
from .operations import Operation
from .resources import Resources

FEW_ROWS, MANY_ROWS = 197, 256 * 197
AT_FEW, AT_MANY, OTHER_ARCHITECTURE = 0.40, 0.10, 2.0
# By name in --provider. None: not prepared.
PROVIDERS: dict[str, Precision | None] = {"vit_fast": None, FOLDED.variant: FOLDED, FP8.variant: FP8}
SENTENCE = "This is a model, not a measurement: nothing ran."


@dataclass(frozen=True)
class Settings:
    """What is predicted; ``provider`` is one of ``PROVIDERS``, ``gpu`` one of ``gpus.GPUS``."""

    model: str
    provider: str
    batch: int
    gpu: str
    precision: str
    model_kwargs: dict[str, Any]


def uncertainty(rows: int, gpu: Gpu) -> float:
    """The stated uncertainty of a step whose largest product has so many rows, as a share of its time."""
    share = math.log(max(rows, 1) / FEW_ROWS) / math.log(MANY_ROWS / FEW_ROWS)
    found = AT_FEW + (AT_MANY - AT_FEW) * min(max(share, 0.0), 1.0)
    return found if gpu.arch == 90 else found * OTHER_ARCHITECTURE


def _parts(
    launched: list[Launched], dtype: torch.dtype, gpu: Gpu, tf32: bool
) -> Iterator[tuple[Launch | None, Operation | None, Estimate, Resources | None]]:
    """(launch or None, operation or None, estimate, resources or None) of each launch, in order."""
    for each in launched:
        if not each.launches:
            for operation in each.call.operations:
                yield None, operation, instruction_model.library(operation, dtype, gpu, tf32), None
        for launch, owner in attribution.share_out(each.launches, each.call.operations):
            held = resources.of(launch, dtype, gpu)
            yield launch, owner, instruction_model.estimate(launch, owner, dtype, gpu, held), held


def _key(launch: Launch | None, operation: Operation | None):
    kernel = launch.name if launch else ""
    return (operation.name, operation.module, kernel) if operation else (kernel, "", kernel)


def _row(operation, module, calls, seconds, step, **more):
    names = ("kernel", "programs", "programs_per_multiprocessor", "waves", "registers", "shared_kib", "resources")
    row = {"operation": operation, "module": module, "calls": calls}
    row |= {"us_per_call": calls and 1e6 * seconds / calls, "us": 1e6 * seconds}
    row["percent_of_step"] = 100 * seconds / step if step else 0.0
    roofline = more.get("roofline")
    row |= {name: more[name] / unit if name in more else None for name, unit in (("gflop", 1e9), ("mb", 1e6))}
    row["roofline_us"] = None if roofline is None else 1e6 * roofline
    row["percent_of_roofline"] = 100 * roofline / seconds if roofline and seconds else None
    return row | {name: more.get(name) for name in names}


def run(settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts, rows): a row for each operation, as ``vit-fast profile`` has them, then the sum, the gaps and the step.

    Raises:
        BenchError: a model that cannot be predicted; products that the GPU does not have; no Triton.
    """
    gpu, dtype = GPUS[settings.gpu], getattr(torch, settings.precision)
    precision = PROVIDERS[settings.provider]
    if precision is not None and precision.products and "float8" not in gpu.tflops:
        raise BenchError(f"--provider {settings.provider}: {gpu.title} has no products in {precision.products}")
    size, launched = forward_launches(settings.model, settings.model_kwargs, settings.batch, dtype, precision, gpu)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    parts = list(_parts(launched, dtype, gpu, tf32))
    gaps = sum(_gap(launch) for launch, *_ in parts)
    busy = sum(estimate.seconds for _, _, estimate, _ in parts)
    rows = _rows(parts, busy, gaps)
    widest = max((launch.arguments.get("rows", 0) for launch, *_ in parts if launch), default=settings.batch)
    share = uncertainty(int(widest), gpu)
    step = busy + gaps
    facts = {
        "predicted": True,
        "statement": SENTENCE,
        "model": settings.model,
        "provider": settings.provider,
        "batch_size": settings.batch,
        "img_size": "×".join(map(str, size[1:])),
        "precision": settings.precision,
        "gpu": gpu.title,
        "step_ms": 1e3 * step,
        "images_per_second": settings.batch / step,
        "uncertainty_percent": 100 * share,
        "images_per_second_low": settings.batch / step / (1 + share),
        "images_per_second_high": settings.batch / step / (1 - share),
        "launches": len(parts),
        "rows": int(widest),
        "tflops_assumed": instruction_model.flop_rate(gpu, instruction_model.rate_of(dtype, tf32)) / 1e12,
        "tb_per_s_assumed": instruction_model.byte_rate(gpu) / 1e12,
        "clock_ghz_assumed": gpu.sustained_ghz,
    }
    return facts, rows


def _gap(launch):
    early = launch is not None and getattr(launch.arguments.get("PDL"), "value", launch.arguments.get("PDL"))
    return instruction_model.PDL_GAP if early else instruction_model.GAP


def _rows(parts, busy, gaps):
    step, table = busy + gaps, {}
    for launch, operation, estimate, held in parts:
        key = _key(launch, operation)
        found = table.setdefault(key, {"calls": 0, "seconds": 0.0, "roofline": 0.0, "gflop": 0, "mb": 0})
        found["calls"] += 1
        found["seconds"] += estimate.seconds
        found["roofline"] += estimate.roofline
        if operation:
            found["gflop"] += operation.flop
            found["mb"] += operation.bytes
        if launch:
            found |= {
                "kernel": launch.name,
                "programs": launch.programs,
                "programs_per_multiprocessor": estimate.programs_per_multiprocessor,
                "waves": estimate.waves,
                "registers": held.registers,
                "shared_kib": held.shared / 1024,
                "resources": held.source,
            }
    rows = [
        _row(operation, module, found.pop("calls"), found.pop("seconds"), step, **found)
        for (operation, module, _), found in table.items()
    ]
    totals = {name: sum(found[name] for found in table.values()) for name in ("gflop", "mb", "roofline")}
    rows.append(_row("sum", "", None, busy, step, **totals))
    rows.append(_row("gaps between launches", "", None, gaps, step))
    rows.append(_row("step", "", None, step, step))
    return rows
