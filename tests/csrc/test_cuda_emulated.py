"""The device code of ``csrc/cuda`` on a CPU: numbers within the error budget of float64, and no fault of memory or order.

``tests/emulator`` runs each CUDA thread as a fibre; its head comment has what it finds and what it cannot show. The cases
are the random ones of the Triton kernels, where the CUDA kernels take them, and shapes at the edges of tiles. Mutants of
the sources, one for each kind of fault, show that the emulator sees it.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import cuda_emulator, properties
from support.budget import assert_within_budget
from support.cuda_emulator import EmulatorFault, build, reads, type_of, writes
from support.layer_norm import LayerNormCase

EXAMPLES = 400 if properties.FULL else 40


def explore(cases, check, count, examples=EXAMPLES):
    @hypothesis.seed(properties.SEED)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def run(case):
        count("cases", 1)
        try:
            case.check()
        except Exception as error:
            error.add_note(repr(case))
            raise

    run()


def run_layer_norm(x, weight, bias, eps, out_dtype=None, library=None, statistics=True, **options):
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype)
    rows = x.numel() // x.shape[-1]
    mean, rstd = (torch.empty(rows) if statistics else None for _ in range(2))
    (library or build("layer_norm")).call(
        "emulated_layer_norm",
        writes(y, "y"), writes(mean, "mean"), writes(rstd, "rstd"),
        reads(x, "x"), reads(weight, "weight"), reads(bias, "bias"),
        x.dim(), tuple(x.shape), x.stride(), type_of(x), type_of(weight, bias), type_of(y), eps, **options,
    )  # fmt: skip
    return y, mean, rstd


class EmulatedLayerNorm(LayerNormCase):
    def kernel(self, x, weight, bias, eps=None):
        eps = self.eps if eps is None else eps
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            x = x.contiguous()
        out_dtype = properties.DTYPES[self.out_dtype]
        return run_layer_norm(x, weight, bias, eps, out_dtype, schedule=self.seed % 3)

    def eager(self, *inputs):
        return super().eager(*inputs)[:3]

    def golden(self, *inputs):
        return super().golden(*inputs)[:3]

    def order(self, x, weight, bias):
        _, _, rstd = self.golden(x, weight, bias)
        change = 2.0**-22 * x.double().abs().mean(-1).flatten()
        slope = 1.0 if weight is None else weight.double().abs().max().item()
        return [order.max().item() for order in (change * rstd * slope, change, 2.0**-22 * rstd)]

    def check(self):
        inputs = self.inputs(self.seed)
        results = self.kernel(*inputs)
        self.within_budget(inputs, results)
        x, *sides = inputs
        image = self.seed % self.batch
        alone = self.kernel(x[image], *sides)
        self.same_bits([alone[0]], [results[0][image]])
        self.within_budget(inputs, self.kernel(properties.laid_out(x, self.layout), *sides))


@st.composite
def layer_norm_cases(draw):
    dtype = draw(st.sampled_from(("bfloat16", "float16", "float32")))
    width = draw(st.one_of(st.integers(1, 300), st.sampled_from((48, 384, 768, 1024, 1152, 2048, 2056, 3072))))
    out_dtype = draw(st.sampled_from(("float32", "float16", "bfloat16"))) if dtype == "float32" else dtype
    return EmulatedLayerNorm(
        dtype=dtype,
        side_dtype=draw(st.sampled_from((out_dtype, "float32"))),
        out_dtype=out_dtype,
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 5)),
        width=width,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 1e-5, 1e-12))),
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0) if dtype == "float16" else (0.0, 0.0, -3.0, 1e4, 1e6))),
        rows=1,
        block=0,
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        relation="",
        seed=draw(properties.seeds),
    )


def test_layer_norm(count):
    explore(layer_norm_cases(), None, count)


def test_layer_norm_without_statistics_and_rows():
    x, weight = torch.randn(3, 5, 64), torch.randn(64)
    y, mean, rstd = run_layer_norm(x, weight, None, 1e-6, statistics=False)
    assert mean is None and rstd is None
    assert torch.equal(y, run_layer_norm(x, weight, None, 1e-6)[0])
    assert torch.equal(run_layer_norm(x[:, 1:], weight, None, 1e-6)[0], y[:, 1:])
    assert run_layer_norm(x[:0], weight, None, 1e-6)[0].shape == (0, 5, 64)


# Mutants: (stem, old, new, what runs it, the words that tell the fault).
MUTANTS = {
    "no barrier before shared memory is read": (
        "layer_norm", "    __syncthreads();\n    float sum", "    float sum", "wide", "data race|never written"
    ),
    "no barrier before shared memory is used again": (
        "layer_norm", "    __syncthreads();\n    return sum", "    return sum", "wide", "data race"
    ),
    "a barrier that some threads do not reach": (
        "layer_norm", "    if (p.mean && threadIdx.x == 0)",
        "    if (threadIdx.x < 40) __syncthreads();\n    if (p.mean && threadIdx.x == 0)", "wide", "divergent barrier",
    ),
    "shared memory beyond its end": (
        "layer_norm", "shared_store(shared + threadIdx.x / 32, x)", "shared_store(shared + threadIdx.x / 32 + 1, x)",
        "wide", "shared memory at byte 32, it has 32",
    ),
    "a row too many": ("layer_norm", "if (row >= p.rows) return", "if (row > p.rows) return", "rows", "outside of all views|beyond"),
    "a column too many": (
        "layer_norm", "column < p.width; column +=", "column <= p.width; column +=", "wide", "x outside|of x|beyond|outside of all views"
    ),
    "an element that is not written": (
        "layer_norm", "if (column < p.width) write_normal", "if (column + VEC < p.width) write_normal", "rows", "not written"
    ),
    "a shuffle in a part of a warp": (
        "layer_norm", "const float mean = warp_sum(sum) / p.width", "const float mean = (lane < 31 ? warp_sum(sum) : 0) / p.width",
        "rows", "divergent",
    ),
    "two threads that write one element": (
        "layer_norm", "if (p.mean && lane == 0)", "if (p.mean && lane < 2)", "rows", "another thread wrote to mean"
    ),
}  # fmt: skip


def run_wide(library):
    x = torch.randn(2, 3000)
    run_layer_norm(x, torch.randn(3000), None, 1e-6, library=library)


def run_rows(library):
    x = torch.randn(3, 64)
    run_layer_norm(x, torch.randn(64), None, 1e-6, library=library)


RUNS = {"wide": run_wide, "rows": run_rows}


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(name):
    stem, old, new, run, words = MUTANTS[name]
    with pytest.raises(EmulatorFault, match=words):
        RUNS[run](build(stem, ((old, new),)))
    RUNS[run](build(stem))


def test_sanitizers():
    """The kernels under ASan and UBSan, which see what does not go through the emulator's words: arrays of a thread."""
    run_rows(build("layer_norm", sanitized=True))
    run_wide(build("layer_norm", sanitized=True))
    bad = (("values[j][i];\n        }", "values[j + PIECES][i];\n        }"),)
    with pytest.raises(EmulatorFault, match="index|overflow"):
        run_rows(build("layer_norm", bad, sanitized=True))
