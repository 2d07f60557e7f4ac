"""The backend ``cpu`` at every instruction-set level of the processor: random cases, sizes around every tail, what is
not finite, strides, threads, and gradients.

Random cases are those of the other suites (tests/support/cpu_cases.py): the error budget against float64, and
metamorphic properties that hold bit for bit.
"""

import os

import pytest
import torch
from hypothesis import strategies as st
from support import cpu_cases, packed_blocks, properties
from support.attention import formula as attention_formula
from support.cpu_cases import (
    CpuAttentionCase,
    CpuInt8BlocksCase,
    CpuLayerNormCase,
    CpuLayerNormLinearCase,
    CpuLayerNormMlpCase,
    CpuLinearResidualCase,
    CpuPackedBlocksCase,
    CpuPatchEmbedCase,
)
from support.linear import ACTIVATIONS
from support.prepared_blocks import cases as stacks

from vit_fast.backends.cpu import CPU

pytestmark = [pytest.mark.extension, pytest.mark.usefixtures("cpu_extension")]

CASES = (
    CpuAttentionCase, CpuInt8BlocksCase, CpuLayerNormCase, CpuLayerNormLinearCase, CpuLayerNormMlpCase,
    CpuLinearResidualCase, CpuPackedBlocksCase, CpuPatchEmbedCase,
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
dtypes = st.sampled_from(DTYPES)
SCALES = (0.125, 0.25, 0.1, 1.0, -0.3, 0.0)


@st.composite
def attention_cases(draw, level):
    packed = draw(st.booleans())
    keys = draw(st.one_of(st.integers(1, 70), st.integers(1, 70), st.sampled_from((197, 257, 511, 512, 513, 1025))))
    small = keys <= 70
    return CpuAttentionCase(
        dtype=draw(dtypes),
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
        values=draw(properties.values_to_the_limit),
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
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0) if dtype == "float16" else (0.0, 0.0, -3.0, 1e4, 1e6))),
        rows=0,
        block=0,
        values=draw(properties.values_to_the_limit),
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
        out_features=out_features * 2 if activation == "swiglu" else out_features,
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
    fields = linear_fields(draw, CpuLinearResidualCase, dtype, None, draw(properties.values))
    residual = draw(st.sampled_from((dtype, "float32")))
    return CpuLinearResidualCase(**fields, residual_dtype=residual, level=level)


@st.composite
def layer_norm_linear_cases(draw, level):
    dtype, activation, values = draw(dtypes), draw(st.sampled_from(ACTIVATIONS)), draw(properties.values)
    fields = linear_fields(draw, CpuLayerNormLinearCase, dtype, activation, values)
    return CpuLayerNormLinearCase(**fields, residual_dtype="", level=level)


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
        return stacks(case_type, DTYPES).map(lambda case: case_type(**vars(case) | {"level": level}))

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
        properties.explore(RANDOM[operation](level), quick=80, full=3200, shard=shard, count=count)


KEPT = ()
if given := os.environ.get("VIT_FAST_CASE"):
    KEPT = (given,)
