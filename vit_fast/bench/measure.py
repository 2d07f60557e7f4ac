"""Time, memory, FLOPs and bandwidth: how each figure of a benchmark is taken.

On a GPU a step is timed by a pair of CUDA events, with the L2 cache overwritten before each, and all steps of a round
are queued before one synchronisation; latency is wall-clock time from the call to the synchronisation after it. On a
CPU a step is wall-clock time, and so is latency.
"""

import copy
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vit_fast import heap

_flush: dict[torch.device, torch.Tensor] = {}


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall-clock seconds of one call, to its end on the device, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def _cache_flusher(device):
    if device not in _flush:
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        _flush[device] = torch.empty(size, dtype=torch.int8, device=device)
    return _flush[device]


def step_times(call: Callable[[], Any], count: int, device: torch.device, pause: int = 0) -> list[float]:
    """``count`` step times in seconds.

    Args:
        pause: clock cycles for which a GPU waits before each step. If longer than the host takes to queue a step,
            the step time contains no host time.
    """
    if device.type != "cuda":
        return [seconds(call, device)[0] for _ in range(count)]
    flusher = _cache_flusher(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    with torch.cuda.device(device):
        for start, end in events:
            flusher.zero_()
            if pause:
                torch.cuda._sleep(pause)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in events]


def host_seconds(call: Callable[[], Any], count: int, device: torch.device) -> Iterator[float]:
    """Seconds until a call returns; the device is idle before it. On a GPU its work is then still running."""
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter()
        call()
        yield time.perf_counter() - start


def summary(times: list[float], batch: int) -> dict[str, float]:
    """Images per second (median, p20, p80) and milliseconds per step (median) of step times in seconds."""
    median = statistics.median(times)
    slow, fast = (_quantile(times, q) for q in (0.8, 0.2))
    return {
        "infer_samples_per_sec": batch / median,
        "infer_samples_per_sec_p20": batch / slow,
        "infer_samples_per_sec_p80": batch / fast,
        "infer_step_time": 1000 * median,
    }


def _quantile(values, q):
    values = sorted(values)
    position = q * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def resident(field: str) -> int:
    """Bytes in a field of Linux' /proc/self/status, "VmRSS:" say.

    Raises:
        OSError: there is no such file.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def resident_growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which the peak of the resident memory grows in a call; None, after the call, where only Linux tells."""
    gc.collect()
    heap.trim()
    try:
        with open("/proc/self/clear_refs", "w") as references:
            references.write("5")
        before = resident("VmRSS:")
        call()
        return max(resident("VmHWM:") - before, 0)
    except (OSError, StopIteration):
        call()
        return None


def peak_memory(call: Callable[[], Any], weights: int, device: torch.device) -> tuple[int | None, str]:
    """Peak bytes of one call, the model's own weights included, and the method.

    Args:
        weights: bytes of the model's parameters and buffers.

    Returns:
        (bytes, or None where it cannot be measured, and the method as text).
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        method = "weights + growth of torch.cuda.max_memory_allocated in the call after the first"
        return torch.cuda.max_memory_allocated(device) - before + weights, method
    growth = resident_growth(call)
    if growth is None:
        return None, "not measured: this system does not tell the peak resident memory of a call"
    return weights + growth, "weights + growth of peak resident memory (VmHWM) in the call after the first"


def _product(a, b):
    return partial(F.linear, a, b)


def matmul_peaks(
    dtype: torch.dtype,
    device: torch.device,
    product: Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]] = _product,
    budget: float = 1.0,
    sustained: float = 0.5,
) -> tuple[float, float]:
    """(peak, sustained) TFLOP/s of square matrix products of this dtype, on random numbers.

    product: function that makes the call computing a bᵀ; each precision has one (``vit_fast.precisions``).
    sustained: products of the fastest size one after the other for that many seconds, at the clock that the chip then
    keeps. peak: the fastest single product seen in about ``budget`` s, or the sustained figure where that is higher.
    The second factor is stored transposed, as in a linear layer: some libraries are slow on the other layout.
    """
    best = 0.0
    for size in (8192, 4096) if device.type == "cuda" else (1024, 2048):
        call = product(*(torch.randn(size, size, device=device).to(dtype) for _ in range(2)))
        first, _ = seconds(call, device)
        again, _ = seconds(call, device)
        count = max(3, min(20, int(budget / 2 / max(min(first, again), 1e-6))))
        fastest = min(step_times(call, count, device))
        if 2 * size**3 / fastest > best:
            best, best_size, shortest, best_call = 2 * size**3 / fastest, size, fastest, call
        if again > budget:
            break
    count = max(1, math.ceil(sustained / shortest))

    def work():
        for _ in range(count):
            best_call()

    lasting = count * 2 * best_size**3 / seconds(work, device)[0]
    return max(best, lasting) / 1e12, lasting / 1e12


def matmul_peak(
    dtype: torch.dtype,
    device: torch.device,
    product: Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]] = _product,
) -> float:
    """The peak of ``matmul_peaks`` alone."""
    return matmul_peaks(dtype, device, product)[0]


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that a copy reads and writes together, the best of 10; ``size`` bytes, far beyond the caches."""
    size = size or (1 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.zeros_like(source)
    return 2 * size / min(step_times(lambda: target.copy_(source), 10, device))


def kernel_cache() -> Path:
    """The folder in which Triton keeps compiled kernels. torch.compile changes it, so call this before."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def compile_cache() -> Path:
    """The folder in which torch.compile keeps what it has compiled."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())


def is_cold(folder: Path, pattern: str = "*") -> bool:
    """Whether a folder, which need not exist, holds no file of that pattern at any depth."""
    return not any(path.is_file() for path in folder.rglob(pattern))


def flops_per_image(model: torch.nn.Module, pixels: torch.Tensor) -> int:
    """Floating-point operations (2 per multiply-add) of one image: matrix products, convolutions and attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model).requires_grad_(False)  # requires_grad fails in the counter under inference mode
    # MATH computes attention by matrix products: the counter has no formula for the CPU's fused attention (counts 0).
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels[:1])
    return counter.get_total_flops()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
