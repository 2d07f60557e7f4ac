"""Random gradients of every operation but attention: the error budget against float64, and metamorphic properties."""

import pytest
from hypothesis import strategies as st
from support import backward, properties
from vit_fast.kernels.activation_names import GATED

# Gradients of rows that are all equal, or of a single channel that outweighs all others, cancel to nothing.
values = st.sampled_from(("normal", "normal", "small", "large", "one-sided", "sparse"))
norms = st.sampled_from(("layer", "layer", "rms"))
probabilities = st.sampled_from((0.0, 0.0, 0.3))


def common(draw, case):
    """The fields of every operation."""
    dtype = draw(properties.dtypes)
    return dict(
        dtype=dtype,
        stream=draw(st.sampled_from((dtype, dtype, "float32"))) if dtype != "float64" else dtype,
        batch=draw(st.integers(1, 3)),
        values=draw(values),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(case)),
        seed=draw(properties.seeds),
    )


@st.composite
def layer_norm(draw):
    width = draw(st.one_of(st.integers(4, 300), st.sampled_from((48, 64, 192, 255, 256, 257, 384, 768))))
    looped = draw(st.booleans()) and width > 16
    fields = common(draw, backward.LayerNormBwdCase)
    return backward.LayerNormBwdCase(
        **fields,
        tokens=draw(st.integers(1, 20)),
        width=width,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        norm=draw(norms),
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0))),
        rows=1 if looped else draw(st.sampled_from((1, 2, 4, 16))),
        block=draw(st.sampled_from([b for b in (16, 32, 64, 128, 256) if b < width]))
        if looped
        else max(16, 1 << (width - 1).bit_length()),
        chunk=draw(st.sampled_from((1, 4, 64))),
        programs=draw(st.sampled_from((1, 2, 5, 512))),
    )


@st.composite
def layer_norm_linear(draw):
    return backward.LayerNormLinearBwdCase(
        **common(draw, backward.LayerNormLinearBwdCase),
        tokens=draw(st.integers(1, 20)),
        width=draw(st.integers(4, 100)),
        features=draw(st.integers(1, 80)),
        activation=draw(st.sampled_from((None, None, "gelu", "gelu_tanh", "quick_gelu", "silu", *GATED))),
        optional=draw(st.booleans()),
        bias=draw(st.booleans()),
        norm=draw(norms),
    )


@st.composite
def linear_residual(draw):
    return backward.LinearResidualBwdCase(
        **common(draw, backward.LinearResidualBwdCase),
        tokens=draw(st.one_of(st.integers(1, 20), st.sampled_from((130, 257)))),
        width=draw(st.integers(4, 100)),
        features=draw(st.integers(1, 80)),
        bias=draw(st.booleans()),
        gamma=draw(st.booleans()),
        scaled=draw(st.booleans()),
        inner=draw(st.sampled_from((False, False, True))),
        norm=draw(norms),
        p=draw(probabilities),
    )


@st.composite
def layernorm_mlp(draw):
    return backward.LayerNormMlpBwdCase(
        **common(draw, backward.LayerNormMlpBwdCase),
        tokens=draw(st.integers(1, 20)),
        width=draw(st.integers(4, 70)),
        hidden=draw(st.integers(4, 100)),
        activation=draw(st.sampled_from(("gelu", "gelu_tanh", "quick_gelu", "silu", *GATED))),
        optional=draw(st.booleans()),
        biases=draw(st.booleans()),
        gamma=draw(st.booleans()),
        scaled=draw(st.booleans()),
        inner=draw(st.sampled_from((False, False, True))),
        recompute=draw(st.booleans()),
        norm=draw(norms),
        p=draw(probabilities),
        out_p=draw(probabilities),
        block_m=draw(st.sampled_from((16, 32, 64))),
        block_n=draw(st.sampled_from((32, 64))),
        block_k=draw(st.sampled_from((16, 32))),
        tma=draw(st.booleans()),
    )


@st.composite
def patch_embed(draw):
    patch = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.sampled_from((patch, patch, tuple(max(1, p - 1) for p in patch), tuple(p + 2 for p in patch))))
    extra = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return backward.PatchEmbedBwdCase(
        **common(draw, backward.PatchEmbedBwdCase),
        channels=draw(st.integers(1, 4)),
        size=tuple(p + (g - 1) * s + e for p, g, s, e in zip(patch, grid, stride, extra, strict=True)),
        patch=patch,
        stride=stride,
        features=draw(st.integers(1, 80)),
        prefix=draw(st.sampled_from((-1, 1, 2, 3))),
        per_image=draw(st.booleans()),
        bias=draw(st.booleans()),
        pos=draw(st.booleans()),
        channels_last=draw(st.booleans()),
    )


OPERATIONS = (layer_norm, layer_norm_linear, linear_residual, layernorm_mlp, patch_embed)


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_backward(operation, shard, count):
    properties.explore(operation(), quick=8, full=400, shard=shard, count=count)
