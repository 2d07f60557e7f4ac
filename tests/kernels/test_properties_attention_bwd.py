"""Random gradients of attention: the error budget against float64, and metamorphic properties that hold bit for bit."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.attention_bwd import AttentionBwdCase

# Not equal rows, whose dq and dk are sums that cancel to nothing.
values = properties.values.filter(lambda kind: kind != "equal rows")


@st.composite
def cases(draw):
    dropout = draw(st.sampled_from((False, False, True)))
    packed, keys = draw(st.booleans()), draw(st.one_of(st.integers(1, 33), st.sampled_from((17, 49, 65))))
    head_size = draw(st.one_of(st.integers(1, 64), st.sampled_from((16, 32, 64, 72, 80, 88, 104, 128))))
    value_size = 0 if packed else draw(st.sampled_from((head_size, head_size, 16, 24, 40)))
    return AttentionBwdCase(
        dtype=draw(properties.dtypes),
        batch=draw(st.integers(1, 3)),
        queries=keys if packed else draw(st.integers(1, 33)),
        keys=keys,
        num_heads=draw(st.integers(1, 3)) if keys <= 33 else 1,
        head_size=head_size,
        value_size=value_size,
        block_m=draw(st.sampled_from((16, 32))),
        block_n=draw(st.sampled_from((16, 32, 64) if keys <= 33 else (32, 64, 128))),
        tma=head_size in (16, 32, 64, 128) and value_size in (0, 16, head_size) and draw(st.booleans()),
        lengths=draw(st.sampled_from((False, False, True))),
        dropout=dropout,
        scale=draw(st.sampled_from((0.125, 0.25, 0.1, 1.0, -0.3))),
        values=draw(st.sampled_from(("normal", "small", "one-sided", "sparse"))) if dropout else draw(values),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(AttentionBwdCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_attention_bwd(shard, count):
    properties.explore(cases(), quick=20, full=1200, shard=shard, count=count)
