"""Random LayerNorm problems and partials of rows: the error budget and metamorphic properties."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.layer_norm import LayerNormCase


@st.composite
def cases(draw):
    dtype = draw(properties.dtypes)
    width = draw(st.one_of(st.integers(1, 300), st.sampled_from((48, 64, 192, 255, 256, 257, 384, 768, 1024))))
    whole = max(16, 1 << (width - 1).bit_length())
    looped = draw(st.booleans()) and width > 16
    return LayerNormCase(
        dtype=dtype,
        side_dtype=draw(st.sampled_from((dtype, "float32"))) if dtype != "float64" else dtype,
        out_dtype=draw(st.sampled_from((dtype, dtype, "bfloat16", "float16", "float32"))),
        batch=draw(st.integers(1, 4)),
        tokens=draw(st.integers(1, 20)),
        width=width,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 1e-5, 1e-12))),
        norm=draw(st.sampled_from(("layer", "rms"))),
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0) if dtype == "float16" else (0.0, 0.0, -3.0, 1e4, 1e6))),
        rows=draw(st.sampled_from((1, 2, 4, 16))) if not looped else 1,
        block=draw(st.sampled_from([b for b in (16, 32, 64, 128, 256, 512) if b < width])) if looped else whole,
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(LayerNormCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_layer_norm(shard, count):
    properties.explore(cases(), quick=120, full=2400, shard=shard, count=count)
