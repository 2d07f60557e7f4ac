"""Whether the result of a config keeps the error budget, and how long a step takes."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vit_fast import parity
from vit_fast.bench import measure

from .candidates import calling
from .problems import Problem, Work

CHECKED_IMAGES = 8  # images compared with float64, the first and last of a batch: float64 takes memory
PAUSE = 600_000  # clock cycles, some 300 µs: longer than the host takes to queue a step
NO_TIME = "no time left"
Timer = Callable[[Callable[[], Any], int, torch.device], list[float]]


def kernel_seconds(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """``count`` step times in seconds, without the host's time to launch: the device pauses before each step."""
    return measure.step_times(call, count, device, pause=PAUSE)


def few_images(tensors: tuple[Any, ...], batched: int) -> tuple[tuple[Any, ...], list[int]]:
    """The tensors cut to the first and last images of the batch, and the indices of these images."""
    batch = len(tensors[0])
    images = sorted({*range(min(batch, CHECKED_IMAGES // 2)), *range(max(0, batch - CHECKED_IMAGES // 2), batch)})
    return tuple(t[images] if i < batched else t for i, t in enumerate(tensors)), images


def out_of_budget(verdict: parity.Parity) -> str | None:
    """The error of a result beside the one allowed, where it is larger."""
    return None if verdict.passed else f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"


def median_us(call: Callable[[], Any], steps: int, device: torch.device, timer: Timer) -> float:
    """Median microseconds of a step."""
    return 1e6 * statistics.median(timer(call, steps, device))


class Reference(NamedTuple):
    """The expected result for some images: from eager in the kernel's dtype and in float64."""

    images: list[int]
    eager: torch.Tensor
    golden: torch.Tensor

    @classmethod
    def of(cls, work: Work) -> "Reference":
        """Computes it."""
        few, images = few_images(work.tensors, work.batched)
        return cls(images, work.eager(*few), work.eager(*(t if t is None else t.double() for t in few)))


def check_and_time(
    problem: Problem,
    work: Work,
    reference: Reference,
    config: Any,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
) -> tuple[float | None, str | None]:
    """(µs, None), or (None, why not)."""
    with calling(problem, work, config) as call:
        out = call()
        measure.synchronize(device)
        verdict = parity.compare(out[reference.images], reference.eager, reference.golden, dtype)
        del out
        if fault := out_of_budget(verdict):
            return None, fault
        return median_us(call, steps, device, timer), None
