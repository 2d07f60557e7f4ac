"""The backend ``cpu`` at every instruction-set level of the processor: random cases, sizes around every tail, what is
not finite, strides, threads, and gradients.

Random cases are those of the other suites (tests/support/cpu_cases.py): the error budget against float64, and
metamorphic properties that hold bit for bit.
"""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from support import cpu_cases, packed_blocks, properties
from support.attention import formula as attention_formula
from support.cpu_cases import (
    EPSILON,
    CpuAttentionCase,
    CpuInt8BlocksCase,
    CpuLayerNormCase,
    CpuLayerNormLinearCase,
    CpuLayerNormMlpCase,
    CpuLinearResidualCase,
    CpuPackedBlocksCase,
    CpuPatchEmbedCase,
)
from support.layer_norm import formula as layer_norm_formula
from support.linear import ACTIVATIONS
from support.linear import formula as linear_formula
from support.prepared_blocks import block as folded_block
from support.prepared_blocks import cases as stacks
from vit_fast.kernels import reference
from vit_fast.kernels.activation_names import GATED

import vit_fast
from vit_fast import ops
from vit_fast.backends.cpu import CPU

pytestmark = [pytest.mark.extension, pytest.mark.usefixtures("cpu_extension")]

CASES = (
    CpuAttentionCase, CpuInt8BlocksCase, CpuLayerNormCase, CpuLayerNormLinearCase, CpuLayerNormMlpCase,
    CpuLinearResidualCase, CpuPackedBlocksCase, CpuPatchEmbedCase,
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
dtypes = st.sampled_from(DTYPES)
SCALES = (0.125, 0.25, 0.1, 1.0, -0.3, 0.0)


def not_flushed(dtype, level, kind):
    """AVX512-BF16 takes numbers below the smallest normal one for zero: there is no budget for them."""
    return "small" if (dtype, level, kind) == ("bfloat16", "avx512_bf16", "subnormal") else kind


@st.composite
def attention_cases(draw, level):
    dtype = draw(dtypes)
    packed = draw(st.booleans())
    keys = draw(st.one_of(st.integers(1, 70), st.integers(1, 70), st.sampled_from((197, 257, 511, 512, 513, 1025))))
    small = keys <= 70
    return CpuAttentionCase(
        dtype=dtype,
        batch=draw(st.integers(1, 3)) if small else 1,
        queries=keys if packed else draw(st.integers(1, 40)),
        keys=keys,
        num_heads=draw(st.integers(1, 4)) if small else 1,
        head_size=draw(st.one_of(st.integers(1, 130), st.sampled_from((16, 32, 48, 64, 72, 80, 88)))),
        packed=packed,
        block_m=0,
        block_n=0,
        tma=False,
        scale=draw(st.sampled_from(SCALES)),
        values=not_flushed(dtype, level, draw(properties.values_to_the_limit)),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(CpuAttentionCase)),
        seed=draw(properties.seeds),
        level=level,
    )


@st.composite
def layer_norm_cases(draw, level):
    dtype = draw(dtypes)
    return CpuLayerNormCase(
        dtype=dtype,
        side_dtype=draw(st.sampled_from((dtype, "float32"))),
        out_dtype=dtype,
        batch=draw(st.integers(1, 4)),
        tokens=draw(st.integers(1, 20)),
        width=draw(st.one_of(st.integers(1, 70), st.integers(1, 300), st.sampled_from((384, 768, 1024)))),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 1e-5, 1e-12))),
        norm=draw(st.sampled_from(("layer", "rms"))),
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0) if dtype == "float16" else (0.0, 0.0, -3.0, 1e4, 1e6))),
        rows=0,
        block=0,
        values=not_flushed(dtype, level, draw(properties.values_to_the_limit)),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(CpuLayerNormCase)),
        seed=draw(properties.seeds),
        level=level,
    )


def linear_fields(draw, case_type, dtype, activation, values):
    out_features = draw(st.integers(1, 100))
    return dict(
        dtype=dtype,
        x_dtype=draw(st.sampled_from((dtype, dtype, dtype, "float32"))),
        batch=draw(st.integers(1, 4)),
        tokens=draw(st.integers(1, 40)),
        in_features=draw(st.one_of(st.integers(1, 150), st.sampled_from((147, 192, 255, 256, 257, 588, 800)))),
        out_features=out_features * 2 if activation in GATED else out_features,
        activation=activation,
        bias=draw(st.booleans()),
        gamma=draw(st.booleans()),
        row_scale=draw(st.booleans()),
        block_m=0,
        block_n=0,
        block_k=0,
        tma=False,
        split_k=1,
        values=values,
        layout=draw(properties.layouts),
        relation=draw(properties.relations(case_type)),
        seed=draw(properties.seeds),
    )


@st.composite
def linear_residual_cases(draw, level):
    dtype = draw(dtypes)
    values = not_flushed(dtype, level, draw(properties.values))
    fields = linear_fields(draw, CpuLinearResidualCase, dtype, None, values)
    residual = draw(st.sampled_from((dtype, "float32")))
    return CpuLinearResidualCase(**fields, residual_dtype=residual, level=level)


@st.composite
def layer_norm_linear_cases(draw, level):
    dtype, activation = draw(dtypes), draw(st.sampled_from(ACTIVATIONS))
    values = not_flushed(dtype, level, draw(properties.values))
    fields = linear_fields(draw, CpuLayerNormLinearCase, dtype, activation, values)
    norm = draw(st.sampled_from(("layer", "rms")))
    return CpuLayerNormLinearCase(**fields, residual_dtype="", norm=norm, level=level)


@st.composite
def layernorm_mlp_cases(draw, level):
    dtype = draw(dtypes)
    return CpuLayerNormMlpCase(
        dtype=dtype,
        x_dtype=draw(st.sampled_from((dtype, "float32"))),
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 40)),
        width=draw(st.integers(4, 100)),
        hidden=draw(st.integers(4, 100)),
        activation=draw(st.sampled_from([word for word in ACTIVATIONS if word])),
        optional=draw(st.booleans()),
        row_scale=draw(st.booleans()),
        norm=draw(st.sampled_from(("layer", "rms"))),
        inner_norm=draw(st.booleans()),
        tma=False,
        layout=draw(properties.layouts),
        relation=draw(properties.relations(CpuLayerNormMlpCase)),
        seed=draw(properties.seeds),
        level=level,
    )


@st.composite
def patch_embed_cases(draw, level):
    dtype = draw(dtypes)
    patch = draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    step = draw(st.sampled_from((patch, tuple(max(1, p - 1) for p in patch), tuple(p + 2 for p in patch), (1, 3))))
    extra = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return CpuPatchEmbedCase(
        dtype=dtype,
        pixels=draw(st.sampled_from((dtype, dtype, "uint8", "float32"))),
        side_dtype=draw(st.sampled_from((dtype, "float32"))),
        batch=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 4)),
        size=tuple(p + (g - 1) * s + e for p, g, s, e in zip(patch, grid, step, extra, strict=True)),
        patch=patch,
        stride=step,
        dim=draw(st.integers(1, 80)),
        prefix=draw(st.integers(-1, 4)),
        per_image=draw(st.booleans()),
        bias=draw(st.booleans()),
        pos=draw(st.booleans()),
        normalised=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        block_m=0,
        block_n=0,
        block_k=0,
        layout=draw(properties.layouts),
        relation=draw(properties.relations(CpuPatchEmbedCase)),
        seed=draw(properties.seeds),
        level=level,
    )


def stack_cases(case_type):
    def at(level):
        return stacks(case_type, DTYPES).map(
            lambda case: replace(case, level=level, values=not_flushed(case.dtype, level, case.values))
        )

    return at


RANDOM = {
    "attention": attention_cases,
    "layer_norm": layer_norm_cases,
    "layer_norm_linear": layer_norm_linear_cases,
    "linear_residual": linear_residual_cases,
    "layernorm_mlp": layernorm_mlp_cases,
    "patch_embed": patch_embed_cases,
    "packed_blocks": stack_cases(CpuPackedBlocksCase),
    "int8_blocks": stack_cases(CpuInt8BlocksCase),
}


@pytest.mark.parametrize("operation", RANDOM)
def test_random_cases(operation, count):
    for shard, level in enumerate(CPU.levels()):
        properties.explore(RANDOM[operation](level), quick=80, full=800, shard=shard, count=count)


# Cases that once failed, and those with which planted faults were found; VIT_FAST_CASE holds another.
KEPT = [
    "CpuAttentionCase(dtype='float32', batch=1, queries=40, keys=1025, num_heads=1, head_size=33, packed=False, "
    "block_m=0, block_n=0, tma=False, scale=0.25, values='one-sided', layout='axes swapped', relation='threads', "
    "seed=3, level='generic')",
    "CpuInt8BlocksCase(dtype='float32', batch=1, tokens=1, num_heads=1, head_size=2, hidden=4, activation='gelu', "
    "optional=False, depth=1, values='normal', layout='contiguous', relation='threads', seed=0, level='generic')",
]
if given := os.environ.get("VIT_FAST_CASE"):
    KEPT = [given]


@pytest.mark.parametrize("text", KEPT)
def test_kept_cases(text, count):
    case = eval(text, {case.__name__: case for case in CASES})
    for level in (case.level,) if given else CPU.levels():
        count("cases", 1)
        properties.run_case(replace(case, level=level))


@pytest.fixture(params=cpu_cases.LEVELS)
def level(request):
    """Runs the test at a level; one that the processor has not got is run as the highest that it has."""
    with cpu_cases.at_level(request.param) as level:
        yield level


def linear_problem(rows, inputs, outputs, dtype):
    """x, weight, bias, residual."""
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    return x, weight, torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)


def near(actual, golden, tolerance):
    assert actual.isfinite().all()
    assert (actual.double() - golden).abs().max() <= tolerance * (1 + golden.abs().max())


each_dtype = pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: str(dtype).removeprefix("torch."))


# Sizes around every tail: NR = 32 columns, VL = 4, 8 or 16 lanes, MR = 6 or 12 rows, 512 keys, 256 summed groups.


@each_dtype
def test_every_width_of_a_layer_norm(level, dtype):
    for width in (*range(1, 71), 127, 128, 129, 768):
        x, weight, bias = (torch.randn(3, width) + 2).to(dtype), torch.randn(width), torch.randn(width)
        y, mean, rstd = CPU.forward["layer_norm"](x, weight, bias, 1e-6)
        golden, golden_mean, golden_rstd = layer_norm_formula(x, weight, bias, 1e-6)
        if width > 3:
            near(y, golden, EPSILON[dtype])
            assert ((rstd - golden_rstd).abs() <= 1e-5 * golden_rstd).all()
        near(mean, golden_mean, 1e-6)
        out = torch.full((3, width + 8), 7.0).to(dtype)[:, :width].copy_(x)
        assert torch.equal(CPU.inference["layer_norm"](out, weight, bias, 1e-6), y)


@each_dtype
def test_every_size_of_a_product(level, dtype):
    """Rows, inputs and outputs from 1 to 70, each with random sizes of the others."""
    generator = torch.Generator().manual_seed(7)
    random = lambda: int(torch.randint(1, 71, (1,), generator=generator))  # noqa: E731
    for size in range(1, 71):
        for rows, inputs, outputs in (
            (size, random(), random()),
            (random(), size, random()),
            (random(), random(), size),
        ):
            x, weight, bias, residual = linear_problem(rows, inputs, outputs, dtype)
            out = CPU.forward["linear_residual"](x, weight, bias, None, residual)
            near(out, linear_formula(x, weight, bias, residual=residual), EPSILON[dtype])


def test_long_sums(level):
    for inputs in (255, 256, 257, 511, 512, 513, 1025, 3072):
        x, weight, bias, residual = linear_problem(13, inputs, 33, torch.float32)
        out = CPU.forward["linear_residual"](x, weight, bias, None, residual)
        near(out, linear_formula(x, weight, bias, residual=residual), 1e-6)


@each_dtype
def test_every_head_size(level, dtype):
    for size in range(1, 131):
        qkv = torch.randn(1, 7, 3 * size).to(dtype)
        out, lse = CPU.forward["attention"](qkv, 1, size**-0.5)
        golden, golden_lse = attention_formula(qkv, 1, size**-0.5)
        near(out, golden, EPSILON[dtype])
        near(lse, golden_lse, 1e-6)


@each_dtype
@pytest.mark.parametrize("keys", (1, 2, 31, 32, 33, 63, 65, 511, 512, 513, 1023, 1024, 1025))
def test_keys_around_a_block(level, dtype, keys):
    """The largest score comes in the first, the last or a middle block: every branch of the online softmax."""
    for peak in {0, keys // 2, keys - 1}:
        q, k, v = (torch.randn(1, n, 6).to(dtype) for n in (13, keys, keys))
        k[:, peak] = 4 * q[:, 0]
        out, lse = CPU.forward["attention"](q, 2, 1.0, k=k, v=v)
        golden, golden_lse = attention_formula(q, 2, 1.0, k, v)
        near(out, golden, EPSILON[dtype])
        near(lse, golden_lse, 2e-6)


@pytest.mark.parametrize("scale", (0.0, -0.5, -3.0, 1e-30, 30.0))
def test_scales(level, scale):
    qkv = torch.randn(2, 40, 3 * 24)
    out, lse = CPU.forward["attention"](qkv, 3, scale)
    golden, golden_lse = attention_formula(qkv, 3, scale)
    near(out, golden, 3e-5)
    near(lse, golden_lse, 3e-6)


# What is not finite, or large, stays in its row or image; a row of equal values is no division by zero.


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@each_dtype
def test_one_bad_row_stays_alone(level, dtype, value):
    x, weight, bias, residual = linear_problem(30, 37, 45, dtype)
    for row in (0, 11, 29):
        bad = x.clone()
        bad[row, 36] = value
        others = torch.arange(30) != row
        for call in (
            lambda x: CPU.forward["linear_residual"](x, weight, bias, None, residual),
            lambda x: CPU.forward["layer_norm_linear"](x, None, None, 1e-6, weight, bias, "gelu")[0],
            lambda x: CPU.forward["layer_norm"](x, None, None, 1e-6)[0],
        ):
            wanted, out = call(x), call(bad)
            assert torch.equal(out[others], wanted[others]) and not out[row].isfinite().any()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("keys", (9, 600))
@each_dtype
def test_one_bad_token_of_attention(level, dtype, keys, value):
    """In a query it spoils the query, in v the queries' channel, in k (or where the scores are NaN) its head."""
    q, k, v = (torch.randn(2, n, 8).to(dtype) for n in (14, keys, keys))
    wanted, wanted_lse = CPU.forward["attention"](q, 2, 0.5, k=k, v=v)
    bad = q.clone()
    bad[1, 13, 0] = float("nan")
    out, lse = CPU.forward["attention"](bad, 2, 0.5, k=k, v=v)
    assert out[1, 13, :4].isnan().all() and lse[1, 0, 13].isnan()
    out[1, 13, :4], lse[1, 0, 13] = wanted[1, 13, :4], wanted_lse[1, 0, 13]
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    bad = v.clone()
    bad[0, keys - 1, 5] = value
    out, lse = CPU.forward["attention"](q, 2, 0.5, k=k, v=bad)
    assert not out[0, :, 5].isfinite().any() and torch.equal(lse, wanted_lse)
    out[0, :, 5] = wanted[0, :, 5]
    assert torch.equal(out, wanted)
    bad = k.clone()
    bad[0, keys - 1, 7] = float("nan")
    out, lse = CPU.forward["attention"](q, 2, 0.5, k=bad, v=v)
    assert out[0, :, 4:].isnan().all() and lse[0, 1].isnan().all()
    out[0, :, 4:], lse[0, 1] = wanted[0, :, 4:], wanted_lse[0, 1]
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_large_values_overflow_only_where_they_must(level):
    qkv = torch.full((1, 33, 12), 1e18)
    out, lse = CPU.forward["attention"](qkv, 1, 1e-30)
    near(out / 1e18, torch.ones(1, 33, 4).double(), 1e-6)
    assert lse.isfinite().all()
    x = torch.full((2, 33), 3e38)
    y, mean, rstd = CPU.forward["layer_norm"](torch.randn(2, 33) * 1e15, None, None, 1e-6)
    assert y.isfinite().all() and mean.isfinite().all() and (rstd > 0).all()
    assert CPU.forward["layer_norm"](x * 0 + 5, None, torch.ones(33), 1e-6)[0].eq(1).all()  # equal values: the bias


@each_dtype
def test_equal_rows_and_zeros(level, dtype):
    """Every row of 0, or of one value: what an image of one colour gives."""
    for value in (0.0, 3.0):
        qkv = torch.full((2, 35, 24), value).to(dtype)
        out, lse = CPU.forward["attention"](qkv, 2, 0.5)
        near(out, torch.full((2, 35, 8), value).double(), EPSILON[dtype])
        near(lse, torch.full((2, 2, 35), 0.5 * 4 * value**2 + math.log(35)).double(), 1e-6)
        block = folded_block(8, 12, "gelu", dtype)
        for operation, make in (("packed_blocks", packed_blocks.packed), ("int8_blocks", packed_blocks.quantised)):
            out = CPU.forward[operation](
                torch.full((1, 5, 8), value).to(dtype), make([block], "gelu"), 2, 0.5, "gelu", 1e-6, 1e-6
            )
            assert out.isfinite().all() and (out == out[:, :1]).all()


@each_dtype
def test_nothing_to_do(level, dtype):
    x, weight, bias, _ = linear_problem(3, 8, 8, dtype)
    assert CPU.forward["attention"](torch.empty(0, 5, 24).to(dtype), 2, 0.5)[0].shape == (0, 5, 8)
    assert CPU.forward["layer_norm"](x[:0], None, None, 1e-6)[0].shape == (0, 8)
    assert CPU.forward["linear_residual"](x[:0], weight, bias, None, x[:0]).shape == (0, 8)
    assert CPU.forward["layer_norm_linear"](x[:0], None, None, 1e-6, weight, bias)[0].shape == (0, 8)
    for rows in (x.new_empty(0, 5, 8), x.new_empty(2, 0, 8)):
        out, mean, rstd, z = CPU.forward["layernorm_mlp"](
            rows, None, None, 1e-6, weight, bias, weight, bias, "gelu", None
        )
        assert out.shape == z.shape == rows.shape and mean.numel() == rstd.numel() == 0
    images = torch.empty(0, 3, 8, 8).to(dtype)
    prefix = torch.zeros(1, 1, 8).to(dtype)
    out = CPU.forward["patch_embed"](images, torch.ones(8, 3, 4, 4).to(dtype), bias, None, prefix, (4, 4))
    assert out.shape == (0, 5, 8) and out.dtype == dtype
    block = folded_block(8, 12, "gelu", dtype)
    for operation, make in (("packed_blocks", packed_blocks.packed), ("int8_blocks", packed_blocks.quantised)):
        for shape in ((0, 5, 8), (2, 0, 8)):
            empty = torch.empty(shape).to(dtype)
            out = CPU.forward[operation](empty, make([block], "gelu"), 2, 0.5, "gelu", 1e-6, 1e-6)
            assert out.shape == shape and out.dtype == dtype


@each_dtype
def test_keys_without_queries_get_no_gradient(level, dtype):
    q, k = torch.empty(2, 0, 24).to(dtype), torch.ones(2, 37, 24).to(dtype)
    out, lse = CPU.forward["attention"](q, 3, 0.5, k=k, v=k)
    CPU.backward["attention"](k, k, 3, 0.5, k, k, k, torch.zeros(2, 3, 37))  # leaves numbers in the workspace
    dq, dk, dv = CPU.backward["attention"](out, q, 3, 0.5, k, k, out, lse)
    assert dq.shape == q.shape
    for grad in (dk, dv):
        assert grad.shape == k.shape and (grad == 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_every_number_of_16_bits(level, dtype):
    """Loaded and stored as PyTorch converts it, and numbers between two of them rounded as it rounds. AVX512-BF16 takes
    numbers below the smallest normal one for zero (Intel's manual, VCVTNEPS2BF16)."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = every[every.isfinite()]
    if level == "avx512_bf16" and dtype == torch.bfloat16:
        numbers = numbers[(numbers == 0) | (numbers.abs() >= torch.finfo(dtype).smallest_normal)]
    nothing = torch.zeros(len(numbers), 1, dtype=dtype)
    out = CPU.forward["linear_residual"](nothing, nothing[:1], None, None, numbers[:, None])
    assert torch.equal(out[:, 0], numbers)
    wide = numbers.float()
    for between in ((wide[1:] + wide[:-1]) / 2, wide * 1.001, wide * 0.9991):
        zeros = torch.zeros(len(between), 4, dtype=dtype)
        out = CPU.forward["layer_norm_linear"](zeros[:1], None, None, 1e-6, zeros, between)[0]
        wanted = between.to(dtype)
        small = torch.zeros_like(wanted, dtype=torch.bool)
        if level == "avx512_bf16" and dtype == torch.bfloat16:
            small = between.abs() < torch.finfo(dtype).smallest_normal
        assert torch.equal(out[0, ~small], wanted[~small]) and not out[0, small].any()


# Threads: no result depends on their number, nor on which of them ran a task.


@each_dtype
def test_threads_and_repeats_give_the_same_bits(level, dtype):
    qkv, images = torch.randn(3, 50, 72).to(dtype), torch.randn(3, 3, 20, 24).to(dtype)
    block = [folded_block(24, 40, "swiglu", dtype) for _ in range(2)]
    x, weight, bias, residual = linear_problem(200, 70, 90, dtype)
    patch = torch.randn(40, 3, 4, 4).to(dtype)
    arguments = 3, 0.3, "swiglu", 1e-6, 1e-6
    packed, quantised = packed_blocks.packed(block, "swiglu"), packed_blocks.quantised(block, "swiglu")
    calls = (
        lambda: CPU.forward["attention"](qkv, 3, 0.3),
        lambda: CPU.forward["layer_norm"](x, None, None, 1e-6),
        lambda: [CPU.forward["linear_residual"](x, weight, bias, None, residual)],
        lambda: CPU.forward["layer_norm_linear"](x, None, None, 1e-6, weight, bias, "swiglu"),
        lambda: [CPU.forward["patch_embed"](images, patch, None, None, None, (4, 4))],
        lambda: [CPU.forward["packed_blocks"](qkv[..., :24], packed, *arguments)],
        lambda: [CPU.forward["int8_blocks"](qkv[..., :24], quantised, *arguments)],
    )
    for call in calls:
        wanted = cpu_cases.with_threads(1, call)
        for threads in (1, 2, 3, 5):
            for _ in range(3):
                for one, other in zip(cpu_cases.with_threads(threads, call), wanted, strict=True):
                    assert torch.equal(one, other)


# Registered operators and gradients.


def gradient_problems(dtype):
    """name → (call of the operation, its leaves)."""

    def t(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype).requires_grad_()

    return {
        "attention": (lambda m, qkv: m.attention(qkv, 3, 0.3), [t(2, 17, 72)]),
        "attention_pooled": (
            lambda m, q, k, v: m.attention(q, 2, 0.3, k=k, v=v),
            [t(2, 1, 16), t(2, 9, 16), t(2, 9, 16)],
        ),
        "layer_norm": (lambda m, x, w, b: m.layer_norm(x, w, b, 1e-6), [t(2, 5, 40), t(40), t(40)]),
        "layer_norm_rms": (lambda m, x, w, b: m.layer_norm(x, w, b, 1e-6, norm="rms"), [t(2, 5, 40), t(40), t(40)]),
        "layer_norm_linear": (
            lambda m, x, w, b, *rest: m.layer_norm_linear(x, w, b, 1e-6, *rest, "gelu"),
            [t(2, 5, 40), t(40), t(40), t(33, 40, scale=0.2), t(33)],
        ),
        "linear_residual": (
            lambda m, x, w, b, gamma, r, scale: m.linear_residual(x, w, b, gamma, r, row_scale=scale),
            [t(2, 5, 40), t(33, 40, scale=0.2), t(33), t(33), t(2, 5, 33), t(2)],
        ),
        "layernorm_mlp": (
            lambda m, x, w, b, w1, b1, w2, b2, gamma: m.layernorm_mlp(x, w, b, 1e-6, w1, b1, w2, b2, "swiglu", gamma),
            [t(2, 5, 40), t(40), t(40), t(66, 40, scale=0.2), t(66), t(40, 33, scale=0.2), t(40), t(40)],
        ),
        "patch_embed": (
            lambda m, *a: m.patch_embed(*a, (4, 4)),
            [t(2, 3, 12, 16), t(40, 3, 4, 4, scale=0.2), t(40), t(1, 12, 40), t(1, 2, 40)],
        ),
    }  # fmt: skip


@each_dtype
@pytest.mark.parametrize("name", gradient_problems(torch.float32))
def test_gradients(level, dtype, name):
    """The backward is the reference's, fed with what the forward has stored; truth is autograd in float64."""
    call, leaves = gradient_problems(dtype)[name]
    with vit_fast.backend("cpu"), vit_fast.backends.recording() as choices:
        out = call(ops, *leaves)
    assert {chosen for _, chosen, _ in choices} == {"cpu"}
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    golden = torch.autograd.grad(call(reference, *wide), wide, grad.double())
    for one, other in zip(actual, golden, strict=True):
        assert one.isfinite().all() and other.any()
        assert (one.double() - other).norm() <= 2 * EPSILON[dtype] * other.norm()
