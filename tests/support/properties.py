"""Shared by the property tests: number and seed of random cases, replaying a case, memory layouts, values, and the
checks of a result.

A case is a frozen dataclass of a few strings and numbers; its repr is an expression that builds it again, and
hypothesis shrinks it. ``check()`` builds its tensors from ``seed`` and raises on any violation. Cases that once failed
are kept in kept_cases.txt, one a line, and run in every test run (test_properties_kept.py).

VIT_FAST_DEPTH=full runs the large numbers (``make test-full``); VIT_FAST_SEED=n explores other cases.
"""

import os
from dataclasses import dataclass
from typing import ClassVar

import hypothesis
import torch
from hypothesis import strategies as st
from support import sanitizer
from support.budget import assert_within_budget

FULL = os.environ.get("VIT_FAST_DEPTH") == "full"
SEED = int(os.environ.get("VIT_FAST_SEED", "0"))
BIASES = []  # mean(sign(g)·(k − g)) / rms(k − g) of each 16-bit result; 0.7 if rounding truncates
SHARDS = range(4)  # shards of a search, for several processes
ENOUGH, REPLICAS = 4096, 32  # elements enough to estimate eager's error; most draws to reach them

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
dtypes = st.sampled_from(("bfloat16", "float16", "float32", "bfloat16", "float16", "float32", "float64"))
seeds = st.integers(0, 2**31 - 1)
LAYOUTS = ("contiguous", "padded rows", "every other", "tail of a longer axis", "axes swapped", "columns first")
layouts = st.sampled_from(LAYOUTS)


def explore(cases, quick, full, shard, count):
    """Runs ``check`` on one shard of the ``quick`` or ``full`` number of random cases; ``count`` is the fixture."""
    examples = -(-(full if FULL else quick) // len(SHARDS))

    @hypothesis.seed(SEED * len(SHARDS) + shard)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def run(case):
        count("cases", 1)
        run_case(case)

    BIASES.clear()
    run()
    bias = sum(BIASES) / max(1, len(BIASES))
    assert abs(bias) <= 0.1 + 2 / max(1, len(BIASES)) ** 0.5, (
        f"results of 16 bits are rounded with a bias of {bias:.3f}"
    )


def run_case(case):
    try:
        case.check()
    except Exception as error:
        error.add_note(f"repro: {repro(case)}")
        raise


def repro(case):
    """One shell line that runs the case again."""
    return f'VIT_FAST_CASE="{case!r}" {case.command}'


def laid_out(tensor, layout):
    """A view with the values of ``tensor`` in another memory layout; floating ones are surrounded by NaN."""
    if not isinstance(tensor, torch.Tensor) or layout == "contiguous":
        return tensor
    fence = float("nan") if tensor.is_floating_point() else 77
    shape, dims = list(tensor.shape), tensor.dim()
    if layout == "padded rows":
        view = torch.full([*shape[:-1], shape[-1] + 5], fence, dtype=tensor.dtype)[..., 2 : 2 + shape[-1]]
    elif layout == "every other":
        view = torch.full([*shape[:-1], 2 * shape[-1] + 1], fence, dtype=tensor.dtype)[..., 1::2]
    elif layout == "tail of a longer axis":
        axis = min(1, dims - 1)
        shape[axis] += 3
        view = torch.full(shape, fence, dtype=tensor.dtype).narrow(axis, 3, tensor.shape[axis])
    elif layout == "axes swapped" and dims >= 3:
        view = torch.full([shape[1], shape[0], *shape[2:]], fence, dtype=tensor.dtype).transpose(0, 1)
    else:
        view = torch.full(shape[::-1], fence, dtype=tensor.dtype).permute(*range(dims)[::-1])
    return view.copy_(tensor)


def all_laid_out(layout, *tensors):
    """Each tensor in a layout of its own, the first in ``layout``."""
    first = LAYOUTS.index(layout)
    return [laid_out(t, LAYOUTS[(first + i) % len(LAYOUTS)]) for i, t in enumerate(tensors)]


VALUES = ("normal", "small", "large", "outlier channels", "outlier token", "one-sided", "equal rows", "sparse")
values = st.sampled_from(("normal", "normal", *VALUES, "subnormal"))
values_to_the_limit = st.sampled_from(("normal", "normal", *VALUES, "subnormal", "huge"))


def filled(shape, kind, generator):
    """float64 values of one kind; axis -1 is channels, axis -2 tokens."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "small":
        x = x * 1e-3
    elif kind == "large":
        x = x * 8
    elif kind == "outlier channels":  # massive activations: a few channels far above the rest
        x[..., :: max(1, shape[-1] // 3)] *= 200
    elif kind == "outlier token":
        x[..., -1, :] *= 100
    elif kind == "one-sided":
        x = x.abs() + 3
    elif kind == "equal rows":
        x = x[..., :1, :].expand(shape).clone()
    elif kind == "subnormal":  # half of the draws subnormal in float16, the others in bfloat16 and float32
        x = x * (2e-5 if generator.initial_seed() % 2 else 1e-39)
    elif kind == "huge":  # up to the largest float16
        x = (x * 2e4).clamp(-65504, 65504)
    elif kind == "sparse":
        x = x * (torch.rand(shape, generator=generator) < 0.3)
    return x


def integers(shape, largest, generator):
    """Small integers as float64."""
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def permutation(count, seed):
    return torch.randperm(count, generator=generator_of(seed + 1))


def can_shrink(*tensors):
    """Whether every element divided by 4 is exact in its dtype."""
    return all(torch.equal(t / 4 * 4, t) for t in tensors)


@dataclass(frozen=True)
class Case:
    """A problem, the kernel's results for it, eager's and the truth (lists of tensors), and one metamorphic property.

    Such a property relates two runs of a kernel: an image alone, images permuted, another layout in memory, …
    A subclass has its fields, ``inputs(seed)``, ``kernel(*inputs)``, ``eager(*inputs)``, ``golden(*inputs)``, how much
    another ``order(*inputs)`` of float32 sums may change each result, and the properties, methods
    ``relation_<words>(inputs, results)``, one of which the field ``relation`` names. A subclass sets a property that
    does not apply to None. ``kind`` is that of the error budget. ``command`` runs the case that VIT_FAST_CASE holds.
    """

    kind: ClassVar[str] = "forward"
    command: ClassVar[str] = "TRITON_INTERPRET=1 python -P -m pytest -m interp tests/kernels/test_properties_kept.py"

    def check(self):
        inputs = self.inputs(self.seed)
        results = self.kernel(*inputs)
        self.within_budget(inputs, results)
        getattr(self, "relation_" + self.relation.replace(" ", "_"))(inputs, results)

    def within_budget(self, inputs, results):
        pairs = [list(zip(self.eager(*inputs), self.golden(*inputs), strict=True))]
        for i in range(1, REPLICAS):
            if sum(golden.numel() for _, golden in pairs[0]) * i > ENOUGH:
                break
            other = self.inputs(self.seed + i)
            pairs.append(list(zip(self.eager(*other), self.golden(*other), strict=True)))
        for result, order, (eager, golden), *replicas in zip(results, self.order(*inputs), *pairs, strict=True):
            assert result.is_contiguous() and result.shape == golden.shape
            if result.dtype == torch.float64:  # float64 runs in the interpreter only, to test the logic
                assert (result - golden).abs().max() <= 1e-11 * golden.abs().max() + order * 2.0**-26
            elif golden.any():
                self.note_bias(result, golden)
                options = dict(repro=repro(self), expected_zeros=1.0, replicas=replicas, order=order)
                assert_within_budget(result, eager, golden, self.kind, **options)
            else:
                assert result.abs().max() <= (order if self.kind == "gradient" else 0.0)

    def note_bias(self, result, golden):
        error = result.double() - golden
        if result.dtype.itemsize == 2 and (rms := error.square().mean().sqrt()) > 0:
            BIASES.append((golden.sign() * error / rms).mean().item())

    def relation_program_order(self, inputs, results):
        for order in (-1, self.seed):
            with sanitizer.program_order(order):
                self.same_bits(self.kernel(*inputs), results)

    def same_bits(self, actual, expected):
        for one, other in zip(actual, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            different = (one != other) & ~(one.isnan() & other.isnan())
            assert not different.any(), (
                f"relation '{self.relation}': {int(different.sum())} of {one.numel()} values differ"
            )

    def same_but_for_order(self, inputs, actual, expected):
        """Equal up to one ulp, and to what another order of sums changes."""
        for one, other, order in zip(actual, expected, self.order(*inputs), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            allowed = torch.finfo(other.dtype).eps * other.abs().max() + order
            assert (one - other).abs().max() <= allowed, f"relation '{self.relation}'"


def each(change, *tensors):
    return [change(t) if isinstance(t, torch.Tensor) else t for t in tensors]


def relations(case_type):
    names = [name for name in dir(case_type) if name.startswith("relation_") and getattr(case_type, name)]
    return st.sampled_from(sorted(name.removeprefix("relation_").replace("_", " ") for name in names))
