"""Shared by the benchmarks of single operations: shapes, a timer that waits for the device, the check before timing.

GB/s counts compulsory traffic (every input read once, every output written once), so that it can be compared with the
memory's copy speed; TFLOP/s counts matrix products. On a GPU the inputs rotate through copies that together exceed
the L2 cache twice, and the timer synchronises before it reads the clock, so that a round is whole launches.
"""

import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from vit_fast.kernels.folding import E4M3

from vit_fast import backends, parity
from vit_fast.bench import machine, measure
from vit_fast.precisions import FP8

sys.path.append(str(Path(__file__).parent))  # benchmarks of a backward import those of the forward

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    """One transformer at one batch size: B batch, N tokens, C width, H heads, F hidden width, P patch, side pixels."""

    name: str
    B: int
    N: int
    C: int
    H: int
    F: int
    P: int
    side: int

    def __str__(self):
        return f"{self.name}-b{self.B}"

    def random(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """Random numbers of the benchmark's dtype on its device."""
        return (torch.randn(size, device=DEVICE) * scale).to(DTYPE)

    def block(self):
        """The parts of a transformer block, as ``folding.prepare_block`` takes them, without LayerScale."""

        def linear(rows, columns):
            return self.random(rows, columns, scale=columns**-0.5), self.random(rows)

        def norm():
            return 1 + self.random(self.C, scale=0.3), self.random(self.C)

        attention = (norm(), linear(3 * self.C, self.C), linear(self.C, self.C), None)
        return *attention, norm(), linear(self.F, self.C), linear(self.C, self.F), None

    @property
    def block_arguments(self):
        """Heads, scale, activation and eps, as ``ops.prepared_blocks`` takes them."""
        return self.H, (self.C // self.H) ** -0.5, "gelu", 1e-6, 1e-6

    @property
    def block_flops(self):
        return 2 * self.B * self.N * self.C * (4 * self.C + 2 * self.F) + 4 * self.B * self.N**2 * self.C


def _shapes():
    towers = {
        "vit_small_16": (197, 384, 6, 1536, 16, 224),
        "vit_base_16": (197, 768, 12, 3072, 16, 224),
        "vit_large_16": (197, 1024, 16, 4096, 16, 224),
        "vit_huge_14": (257, 1280, 16, 5120, 14, 224),
    }
    if not ON_GPU:
        return [Shape(name, 1, *towers[name]) for name in ("vit_small_16", "vit_base_16")]
    return [Shape(name, batch, *tower) for name, tower in towers.items() for batch in (1, 8, 64, 256)]


def pytest_report_header(config):
    if ON_GPU:
        return f"benchmarks: {machine.name(DEVICE)}, {DTYPE}"
    return f"benchmarks: CPU {machine.name(DEVICE)}, {DTYPE}, the torch backend; these say nothing about a GPU"


def _waiting_clock():
    measure.synchronize(DEVICE)
    return time.perf_counter()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_waiting_clock))


@pytest.fixture(params=_shapes(), ids=str)
def shape(request):
    return request.param


@pytest.fixture(scope="session")
def peak():
    """A function of a dtype: TFLOP/s of a matrix product, measured once in this run, or None without a peak."""

    @functools.cache
    def run(dtype):
        if dtype != E4M3:
            return measure.matmul_peak(dtype, DEVICE)
        return None if FP8.why_emulated(DEVICE) else measure.matmul_peak(dtype, DEVICE, FP8.product)

    return run


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _bytes(values):
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def _rotation(make):
    first = make()
    if not ON_GPU:
        return [first]
    wanted = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return [first, *(make() for _ in range(min(16, math.ceil(wanted / max(_bytes(first), 1)))))]


@pytest.fixture
def compare(benchmark, peak):
    """``compare(title, providers, provider, make, flops)``: checks one provider against float64, then times it.

    ``providers`` maps names to functions of the same arguments, "eager" among them; ``make`` draws those arguments.
    ``dtype`` is that of the matrix products; in float8 providers are compared with eager by the rule of float8 models.
    """

    def run(title, providers, provider, make, flops, dtype=DTYPE):
        call = providers[provider]
        with torch.inference_mode():
            torch.manual_seed(0)
            inputs = _rotation(make)
            with backends.recording() as choices:
                output = call(*inputs[0])
            golden = providers["eager"](*map(_double, inputs[0]))
            eager = providers["eager"](*inputs[0])
            plain = eager if dtype == E4M3 else None
            verdict = parity.compare(output, eager, golden, output.dtype, plain, FP8.budget)
            assert verdict.passed, f"{provider} is out of budget, so it is not timed: {verdict}"
            turn = itertools.cycle(inputs)
            benchmark.group = title
            benchmark(lambda: call(*next(turn)))
        moved = _bytes(inputs[0]) + _bytes([output])
        facts = {
            "provider": provider,
            "backend": "+".join(sorted({chosen for _, chosen, _ in choices})) or None,
            "device": machine.name(DEVICE),
            "dtype": str(dtype),
            "bytes": moved,
            "flops": flops,
            "max_error": verdict.error,
            "max_error_eager": verdict.eager_error,
            "torch": torch.__version__,
            "triton": backends.status(DEVICE).versions.get("triton"),
            "commit": machine.commit(),
            **machine.gpu_state(DEVICE),
        }
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            facts |= {"gb_per_s": moved / seconds / 1e9, "tflops": flops / seconds / 1e12}
            facts["percent_of_matmul_peak"] = peak(dtype) and 100 * facts["tflops"] / peak(dtype)
        benchmark.extra_info.update(facts)

    return run
