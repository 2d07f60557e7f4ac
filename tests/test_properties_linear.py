"""Random linear layers with every epilogue: the error budget against float64, and laws that hold bit for bit."""

from dataclasses import dataclass, replace

import properties
import pytest
import torch
from hypothesis import strategies as st
from test_linear import ACTIVATIONS, eager, formula
from vit_fast.kernels.configs import LinearConfig


@dataclass(frozen=True)
class LinearCase(properties.Case):
    dtype: str
    x_dtype: str
    residual_dtype: str  # "": no residual
    batch: int
    tokens: int
    in_features: int
    out_features: int  # rows of the weight; swiglu halves them
    activation: str | None
    bias: bool
    gamma: bool
    row_scale: bool
    block_m: int
    block_n: int
    block_k: int
    tma: bool
    values: str
    layout: str
    law: str
    seed: int

    def inputs(self, seed, draw=properties.filled):
        """x, weight, bias, gamma, residual, row_scale."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        features = self.out_features // 2 if self.activation == "swiglu" else self.out_features
        x = draw((self.batch, self.tokens, self.in_features), self.values, generator)
        weight = draw((self.out_features, self.in_features), "normal", generator)
        bias, gamma = draw((2, self.out_features), "normal", generator).to(dtype)
        residual = draw((self.batch, self.tokens, features), "normal", generator)
        if draw is properties.filled:
            weight = weight * self.in_features**-0.5
        return (
            x.to(properties.DTYPES[self.x_dtype]),
            weight.to(dtype),
            bias if self.bias else None,
            gamma[:features] if self.gamma else None,
            residual.to(properties.DTYPES[self.residual_dtype]) if self.residual_dtype else None,
            (torch.arange(self.batch) % 3 != 1).to(dtype) * 2 if self.row_scale else None,
        )

    def options(self, gamma, residual, row_scale):
        given = {"gamma": gamma, "residual": residual, "row_scale": row_scale}
        return {name: value for name, value in given.items() if value is not None}

    def kernel(self, x, weight, bias, *rest):
        from vit_fast.kernels import linear

        tiles = LinearConfig(self.block_m, self.block_n, self.block_k, 2, 4, 2, self.tma)
        return [linear.linear(x, weight, bias, self.activation, config=tiles, **self.options(*rest))]

    def eager(self, x, weight, bias, gamma, residual, row_scale):
        if residual is not None:
            return [eager(x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale)]
        out = eager(x, weight, bias, self.activation)
        out = out if gamma is None else out * gamma
        return [out if row_scale is None else out * row_scale[:, None, None]]

    def golden(self, x, weight, bias, *rest):
        return [formula(x.to(weight.dtype), weight, bias, self.activation, **self.options(*rest))]

    def order(self, x, weight, bias, gamma, residual, row_scale):
        """Some ulps of the sum of the products' sizes, through a slope of 1.13 at most and the epilogue."""
        size = (x.double().abs() @ weight.double().abs().T).max().item() + (1.0 if bias is None else 5.0)
        slope = size if self.activation == "swiglu" else 1.13
        gain = (1.0 if gamma is None else gamma.abs().max().item()) * (1.0 if row_scale is None else 2.0)
        return [2.0**-22 * size * slope * gain]

    def law_layout_of_rows(self, inputs, results):
        x, weight, bias, gamma, residual, row_scale = inputs
        x, residual = properties.all_laid_out(self.layout, x, residual)
        self.same_bits(self.kernel(x, weight, bias, gamma, residual, row_scale), results)

    def law_layout_of_weights(self, inputs, results):
        x, weight, bias, gamma, residual, row_scale = inputs
        weight, bias, gamma, row_scale = properties.all_laid_out(self.layout, weight, bias, gamma, row_scale)
        self.same_bits(self.kernel(x, weight, bias, gamma, residual, row_scale), results)

    def law_descriptors(self, inputs, results):
        self.same_bits(replace(self, tma=not self.tma).kernel(*inputs), results)

    def law_one_image_alone(self, inputs, results):
        x, weight, bias, gamma, *rest = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        rest = properties.each(lambda t: t[image], *rest)
        self.same_but_for_order(inputs, self.kernel(x[image], weight, bias, gamma, *rest), [results[0][image]])

    def law_images_permuted(self, inputs, results):
        x, weight, bias, gamma, *rest = inputs
        order = properties.permutation(self.batch, self.seed)
        rest = properties.each(lambda t: t[order], *rest)
        actual = self.kernel(x[order], weight, bias, gamma, *rest)
        self.same_but_for_order(inputs, actual, [results[0][order]])

    def law_powers_of_two(self, inputs, results):
        x, weight, *rest = inputs
        if self.values != "subnormal" and properties.can_shrink(weight) and (x * 4).isfinite().all():
            self.same_bits(self.kernel(x * 4, weight / 4, *rest), results)

    def law_integers(self, inputs, results):
        """Small integers have exact sums: only the rounding to the result's dtype is left."""
        plain = replace(self, activation=None if self.activation != "relu" else "relu")
        integers = plain.inputs(self.seed, lambda shape, _, generator: properties.integers(shape, 4, generator))
        out, golden = plain.kernel(*integers)[0], plain.golden(*integers)[0]
        assert torch.equal(out, golden.to(out.dtype))


@st.composite
def cases(draw):
    dtype = draw(properties.dtypes)
    residual = draw(st.booleans())
    activation = None if residual else draw(st.sampled_from(ACTIVATIONS))
    out_features = draw(st.integers(1, 80))
    return LinearCase(
        dtype=dtype,
        x_dtype=draw(st.sampled_from((dtype, dtype, dtype, "float32"))) if dtype != "float64" else dtype,
        residual_dtype=draw(st.sampled_from((dtype, "float32" if dtype != "float64" else dtype))) if residual else "",
        batch=draw(st.integers(1, 4)),
        tokens=draw(st.integers(1, 30)),
        in_features=draw(st.one_of(st.integers(1, 150), st.sampled_from((8, 16, 64, 96, 147, 192, 588)))),
        out_features=out_features * 2 if activation == "swiglu" else out_features,
        activation=activation,
        bias=draw(st.booleans()),
        gamma=residual and draw(st.booleans()),
        row_scale=residual and draw(st.booleans()),
        block_m=draw(st.sampled_from((16, 32, 64, 128))),
        block_n=draw(st.sampled_from((32, 64, 128))),
        block_k=draw(st.sampled_from((16, 32, 64))),
        tma=draw(st.booleans()),
        values=draw(properties.values),
        layout=draw(properties.layouts),
        law=draw(properties.laws(LinearCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_linear(shard, count):
    properties.explore(cases(), quick=200, full=2000, shard=shard, count=count)
