"""Random MLP branches: the error budget against float64, and metamorphic properties that hold bit for bit."""

import pytest
from hypothesis import strategies as st
from support import properties
from support.layernorm_mlp import LayerNormMlpCase
from vit_fast.kernels.activation_names import ACTIVATIONS


@st.composite
def cases(draw):
    dtype = draw(properties.dtypes)
    return LayerNormMlpCase(
        dtype=dtype,
        x_dtype=draw(st.sampled_from((dtype, "float32"))) if dtype != "float64" else dtype,
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 20)),
        width=draw(st.integers(4, 100)),
        hidden=draw(st.integers(4, 100)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        optional=draw(st.booleans()),
        row_scale=draw(st.booleans()),
        norm=draw(st.sampled_from(("layer", "rms"))),
        inner_norm=draw(st.booleans()),
        tma=draw(st.booleans()),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(LayerNormMlpCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_layernorm_mlp(shard, count):
    properties.explore(cases(), quick=80, full=800, shard=shard, count=count)
