"""Random attention problems: the error budget against float64, and metamorphic properties that hold bit for bit."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.attention import AttentionCase


@st.composite
def cases(draw):
    packed = draw(st.booleans())
    keys = draw(st.one_of(st.integers(1, 40), st.sampled_from((17, 49, 50, 65, 128, 129, 144, 197, 208, 257, 272))))
    return AttentionCase(
        dtype=draw(properties.dtypes),
        batch=draw(st.integers(1, 3)) if keys <= 65 else 1,
        queries=keys if packed else draw(st.integers(1, 40)),
        keys=keys,
        num_heads=draw(st.integers(1, 4)) if keys <= 65 else 1,
        head_size=draw(st.one_of(st.integers(1, 128), st.sampled_from((16, 32, 48, 64, 72, 80, 88, 160, 256)))),
        packed=packed,
        block_m=draw(st.sampled_from((16, 32, 64) if keys <= 65 else (64, 128))),
        block_n=draw(st.sampled_from((0, 0, 16, 32, 64) if keys <= 65 else (0, 64, 128))),
        tma=draw(st.booleans()),
        scale=draw(st.sampled_from((0.125, 0.25, 0.1, 1.0, -0.3))),
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(AttentionCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_attention(shard, count):
    properties.explore(cases(), quick=72, full=1600, shard=shard, count=count)
