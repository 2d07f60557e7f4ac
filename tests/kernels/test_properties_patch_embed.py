"""Random patch embeddings: the error budget against float64, and metamorphic properties that hold bit for bit."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.patch_embed import PatchEmbedCase


@st.composite
def cases(draw):
    dtype = draw(properties.dtypes)
    patch = draw(st.tuples(st.integers(1, 16), st.integers(1, 16)))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.sampled_from((patch, tuple(max(1, p - 1) for p in patch), tuple(p + 2 for p in patch), (1, 3))))
    extra = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return PatchEmbedCase(
        dtype=dtype,
        pixels=draw(st.sampled_from((dtype, dtype, "uint8", "float32"))),
        side_dtype=draw(st.sampled_from((dtype, "float32"))) if dtype != "float64" else dtype,
        batch=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 4)),
        size=tuple(p + (g - 1) * s + e for p, g, s, e in zip(patch, grid, stride, extra, strict=True)),
        patch=patch,
        stride=stride,
        dim=draw(st.integers(1, 80)),
        prefix=draw(st.integers(-1, 4)),
        per_image=draw(st.booleans()),
        bias=draw(st.booleans()),
        pos=draw(st.booleans()),
        normalised=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        block_m=draw(st.sampled_from((16, 32, 64))),
        block_n=draw(st.sampled_from((16, 32, 64))),
        block_k=draw(st.sampled_from((16, 32, 64))),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(PatchEmbedCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_patch_embed(shard, count):
    properties.explore(cases(), quick=100, full=1600, shard=shard, count=count)
