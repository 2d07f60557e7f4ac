"""Random MLP branches: the error budget against float64, and laws that hold bit for bit."""

from dataclasses import dataclass

import properties
import pytest
import torch
from hypothesis import strategies as st
from test_layernorm_mlp import formula, problem
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LinearConfig

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu")


@dataclass(frozen=True)
class LayerNormMlpCase(properties.Case):
    dtype: str
    x_dtype: str
    batch: int
    tokens: int
    width: int
    hidden: int
    activation: str
    optional: bool  # LayerNorm parameters, biases, gamma
    row_scale: bool
    tma: bool
    layout: str
    law: str
    seed: int

    def inputs(self, seed):
        torch.manual_seed(seed)
        dtype, x_dtype = properties.DTYPES[self.dtype], properties.DTYPES[self.x_dtype]
        shape = (self.batch, self.tokens, self.width)
        args = problem(shape, self.hidden, dtype, self.activation, x_dtype, x_dtype, self.optional)
        row_scale = (torch.arange(self.batch) % 3 != 1).to(dtype) * 1.25 if self.row_scale else None
        return *args, row_scale

    def kernel(self, *inputs):
        from vit_fast.kernels import layernorm_mlp

        tiles = (LinearConfig(32, 64, 32, 2, 4, 2, self.tma), LinearConfig(32, 32, 32, 2, 4, 2, self.tma))
        return layernorm_mlp.layernorm_mlp_fwd(*inputs[:-1], row_scale=inputs[-1], config=tiles)

    def eager(self, *inputs):
        return reference.layernorm_mlp_fwd(*inputs[:-1], row_scale=inputs[-1])

    def golden(self, *inputs):
        return formula(*inputs)

    def order(self, x, *_):
        return 2.0**-22 * 4 * self.hidden**0.5, 2.0**-22 * x.abs().max().item(), 2.0**-22 * 1e3

    def law_layout(self, inputs, results):
        self.same_bits(self.kernel(*properties.all_laid_out(self.layout, *inputs)), results)

    def law_one_image_alone(self, inputs, results):
        x, *rest, row_scale = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        rows = slice(image.start * self.tokens, image.stop * self.tokens)
        out, mean, rstd = results
        actual = self.kernel(x[image], *rest, None if row_scale is None else row_scale[image])
        self.same_but_for_order(inputs, actual, (out[image], mean[rows], rstd[rows]))

    def law_dropped_images(self, inputs, results):
        """Drop path: an image whose scale is 0 passes as it is."""
        x, *rest, _ = inputs
        out = self.kernel(x, *rest, torch.zeros(self.batch, dtype=properties.DTYPES[self.dtype]))[0]
        self.same_bits([out], [x])

    def law_zero_gamma(self, inputs, results):
        x, *rest, _, row_scale = inputs
        out = self.kernel(x, *rest, torch.zeros(self.width, dtype=x.dtype), row_scale)[0]
        self.same_bits([out], [x])


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
        tma=draw(st.booleans()),
        layout=draw(properties.layouts),
        law=draw(properties.laws(LayerNormMlpCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_layernorm_mlp(shard, count):
    properties.explore(cases(), quick=80, full=800, shard=shard, count=count)
