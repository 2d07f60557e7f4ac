"""Random linear layers on prepared weights: the error against float64 of the same weights, metamorphic properties."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.linear import ACTIVATIONS
from support.prepared_linear import PreparedLinearCase


@st.composite
def cases(draw):
    ends, fp8 = draw(st.booleans()), draw(st.booleans())
    return PreparedLinearCase(
        dtype=draw(st.sampled_from(("bfloat16", "float16", "float32"))),
        fp8=fp8,
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 20)),
        width=draw(st.integers(1, 100)),
        features=draw(st.integers(1, 80)),
        activation=None if ends else draw(st.sampled_from(ACTIVATIONS)),
        norm=draw(st.sampled_from((None, "layer", "rms"))),
        ends=ends,
        bias=draw(st.booleans()),
        values=draw(properties.values),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(PreparedLinearCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_prepared_linear(shard, count):
    properties.explore(cases(), quick=40, full=800, shard=shard, count=count)
