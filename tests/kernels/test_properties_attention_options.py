"""Random attention problems with options: the error budget against float64, and metamorphic properties."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.attention_options import AttentionOptionsCase


@st.composite
def cases(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    return AttentionOptionsCase(
        dtype=draw(properties.dtypes),
        batch=draw(st.integers(1, 3)),
        rows=rows,
        columns=columns,
        num_heads=draw(st.integers(1, 3)),
        pairs=draw(st.one_of(st.integers(1, 64), st.sampled_from((8, 16, 32, 36, 40, 44, 64)))),
        value_size=draw(st.sampled_from((0, 0, 0, 16, 24, 33, 72))),
        rope=draw(st.sampled_from(("", "half", "interleaved"))),
        tables=draw(st.sampled_from(("shared", "image", "head"))),
        num_prefix=draw(st.sampled_from((0, 0, 1, rows * columns))),
        norm=draw(st.sampled_from(("", "", "layer", "rms"))),
        bias=draw(st.sampled_from(("", "", "full", "key", "masked"))),
        rel_pos=draw(st.booleans()),
        lengths=draw(st.sampled_from(("", "keys", "sequences"))),
        block_m=draw(st.sampled_from((16, 32, 64))),
        block_n=draw(st.sampled_from((16, 32, 64))),
        scale=draw(st.sampled_from((0.125, 0.25, 0.1, 1.0, -0.3))),
        values=draw(properties.values),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(AttentionOptionsCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_attention_options(shard, count):
    properties.explore(cases(), quick=48, full=1200, shard=shard, count=count)
