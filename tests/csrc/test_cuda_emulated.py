"""The device code of ``csrc/cuda`` on a CPU: numbers within the error budget of float64, and no fault of memory or order.

``tests/emulator`` runs each CUDA thread as a fibre; its head comment has what it finds and what it cannot show. The cases
are the random ones of the Triton kernels, where the CUDA kernels take them, and shapes at the edges of tiles. Mutants of
the sources, one for each kind of fault, show that the emulator sees it.
"""

from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import properties
from support.attention import AttentionCase
from support.cuda_emulator import EmulatorFault, build, reads, type_of, writes
from support.layer_norm import LayerNormCase

EXAMPLES = 400 if properties.FULL else 40


def explore(cases, count, examples=EXAMPLES):
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
    explore(layer_norm_cases(), count)


def test_layer_norm_without_statistics_and_rows():
    x, weight = torch.randn(3, 5, 64), torch.randn(64)
    y, mean, rstd = run_layer_norm(x, weight, None, 1e-6, statistics=False)
    assert mean is None and rstd is None
    assert torch.equal(y, run_layer_norm(x, weight, None, 1e-6)[0])
    assert torch.equal(run_layer_norm(x[:, 1:], weight, None, 1e-6)[0], y[:, 1:])
    assert run_layer_norm(x[:0], weight, None, 1e-6)[0].shape == (0, 5, 64)


def run_attention(q, num_heads, scale, k=None, v=None, library=None, with_lse=True, **options):
    if k is None:
        q, k, v = q.chunk(3, 2)
    batch, queries, size = q.shape
    out = torch.empty(batch, queries, size, dtype=q.dtype)
    lse = torch.empty(batch, num_heads, queries) if with_lse else None
    strides = [stride for t in (q, k, v) for stride in t.stride()[:2]]
    (library or build("attention")).call(
        "emulated_attention", writes(out, "out"), writes(lse, "lse"), reads(q, "q"), reads(k, "k"), reads(v, "v"),
        batch, num_heads, queries, k.shape[1], size // num_heads, strides, type_of(q), scale, **options,
    )  # fmt: skip
    return out, lse


def in_pieces(t):
    """t where the kernel takes it: heads contiguous, images and rows in pieces of 16 bytes; else a copy."""
    aligned = t is None or (t.stride(2) == 1 and not any(n % 8 for n in t.stride()[:2]) and t.data_ptr() % 16 == 0)
    return t if aligned else t.contiguous()


@dataclass(frozen=True)
class EmulatedAttention(AttentionCase):
    shared_limit: int = 232448

    def kernel(self, q, k, v, with_lse=True, schedule=0):
        return run_attention(
            *(in_pieces(q), self.num_heads, self.scale, in_pieces(k), in_pieces(v)),
            with_lse=with_lse, schedule=schedule, shared_limit=self.shared_limit,
        )  # fmt: skip

    def check(self):
        inputs = self.inputs(self.seed)
        results = self.kernel(*inputs)
        self.within_budget(inputs, results)
        self.same_bits(self.kernel(*inputs, schedule=self.seed), results)
        views = properties.each(lambda t: properties.laid_out(t, self.layout), *inputs)
        self.same_bits(self.kernel(*views, with_lse=False)[:1], results[:1])
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        self.same_bits(self.kernel(*properties.each(lambda t: t[image], *inputs)), [t[image] for t in results])


@st.composite
def attention_cases(draw):
    packed = draw(st.booleans())
    keys = draw(st.one_of(st.integers(1, 40), st.sampled_from((17, 63, 64, 65, 80, 128, 130, 197))))
    head_size = draw(st.sampled_from(range(16, 136, 8)))
    return EmulatedAttention(
        dtype=draw(st.sampled_from(("bfloat16", "float16"))),
        batch=draw(st.integers(1, 2)),
        queries=keys if packed else draw(st.integers(1, 70)),
        keys=keys,
        num_heads=draw(st.integers(1, 3)) if keys <= 65 else 1,
        head_size=head_size,
        packed=packed,
        block_m=0,
        block_n=0,
        tma=False,
        scale=draw(st.sampled_from((0.125, 0.25, 0.1, 1.0, -0.3))),
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        relation="",
        seed=draw(properties.seeds),
        shared_limit=draw(st.sampled_from((232448, 4 * 64 * (head_size + 23) * 2))),  # resident, streaming
    )


def test_attention(count):
    explore(attention_cases(), count)


def test_attention_with_half_steps(count):
    """fp16 as sm_75 has it, by m16n8k8: the same sums."""
    qkv = torch.randn(1, 50, 3 * 2 * 72).half()
    older = run_attention(qkv, 2, 0.125, library=build("attention", flags=("-DVF_EMULATED_ARCH=750",)))
    for one, other in zip(older, run_attention(qkv, 2, 0.125), strict=True):
        assert torch.equal(one, other)


def test_attention_has_no_bank_conflicts():
    library = build("attention")
    run_attention(torch.randn(1, 197, 3 * 64).bfloat16(), 1, 0.125, library=library)
    phases, conflicts = library.counts[4:]
    assert phases > 1000 and conflicts == 0


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
