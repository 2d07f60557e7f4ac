"""Random LayerNorm problems and partials of rows: the error budget against float64, and laws that hold bit for bit."""

from dataclasses import dataclass

import properties
import pytest
import torch
from hypothesis import strategies as st
from test_layer_norm import formula
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LayerNormConfig


@dataclass(frozen=True)
class LayerNormCase(properties.Case):
    dtype: str
    side_dtype: str
    out_dtype: str
    batch: int
    tokens: int
    width: int
    weight: bool
    bias: bool
    eps: float
    mean: float
    rows: int
    block: int  # below the width: the kernel that loops
    values: str
    layout: str
    law: str
    seed: int

    def inputs(self, seed):
        generator, side = properties.generator_of(seed), properties.DTYPES[self.side_dtype]
        x = properties.filled((self.batch, self.tokens, self.width), self.values, generator) + self.mean
        weight, bias = properties.filled((2, self.width), "normal", generator).to(side)
        largest = torch.finfo(properties.DTYPES[self.dtype]).max
        return (
            x.clamp(-largest, largest).to(properties.DTYPES[self.dtype]),
            weight if self.weight else None,
            bias if self.bias else None,
        )

    def kernel(self, x, weight, bias, rows=None, eps=None):
        from vit_fast.kernels import layer_norm

        tiles = LayerNormConfig(rows or self.rows, self.block, 4)
        whole = LayerNormConfig(rows or self.rows, max(16, 1 << (self.width - 1).bit_length()), 4)
        out_dtype, eps = properties.DTYPES[self.out_dtype], self.eps if eps is None else eps
        ((row_mean,), (squares,)), _ = layer_norm.row_partials(x, whole)
        return *layer_norm.layer_norm_fwd(x, weight, bias, eps, out_dtype, tiles), row_mean, squares

    def eager(self, x, weight, bias):
        y, mean, rstd = reference.layer_norm_fwd(x, weight, bias, self.eps)
        rest = x.flatten(0, 1).to(mean.dtype) - mean[:, None]
        return y.to(properties.DTYPES[self.out_dtype]), mean, rstd, mean, rest.square().sum(1)

    def golden(self, x, weight, bias):
        y, mean, rstd = formula(x, weight, bias, self.eps)
        return y, mean, rstd, mean, (x.flatten(0, 1).double() - mean[:, None]).square().sum(1)

    def order(self, x, weight, bias):
        """The mean may change by some ulps of the mean size, and every difference to it with it."""
        _, _, rstd, _, squares = self.golden(x, weight, bias)
        change = 2.0**-22 * x.double().abs().mean(-1).flatten()
        slope = 1.0 if weight is None else weight.double().abs().max().item()
        orders = change * rstd * slope, change, 2.0**-22 * rstd, change
        squared = 2.0**-22 * squares + self.width * change.square() + 2 * change * (self.width * squares).sqrt()
        return [order.max().item() for order in (*orders, squared)]

    def law_layout(self, inputs, results):
        self.same_bits(self.kernel(*properties.all_laid_out(self.layout, *inputs)), results)

    def law_one_image_alone(self, inputs, results):
        x, *sides = inputs
        image = self.seed % self.batch
        rows = slice(image * self.tokens, (image + 1) * self.tokens)
        y, *statistics = results
        self.same_bits(self.kernel(x[image], *sides), (y[image], *(s[rows] for s in statistics)))

    def law_rows_permuted(self, inputs, results):
        x, *sides = inputs
        order = properties.permutation(self.batch * self.tokens, self.seed)
        y, *statistics = results
        wanted = (y.flatten(0, 1)[order], *(s[order] for s in statistics))
        self.same_bits(self.kernel(x.flatten(0, 1)[order], *sides), wanted)

    def law_rows_per_program(self, inputs, results):
        self.same_bits(self.kernel(*inputs, rows=self.rows + 1 if self.rows == 1 else 1), results)

    def law_powers_of_two(self, inputs, results):
        x, *sides = inputs
        y, mean, rstd, row_mean, squares = results
        if self.values != "subnormal" and (x * 4).isfinite().all():
            wanted = (y, mean * 4, rstd / 4, row_mean * 4, squares * 16)
            self.same_bits(self.kernel(x * 4, *sides, eps=self.eps * 16), wanted)

    def law_without_statistics(self, inputs, results):
        from vit_fast.kernels import layer_norm

        tiles, out_dtype = LayerNormConfig(self.rows, self.block, 4), properties.DTYPES[self.out_dtype]
        self.same_bits([layer_norm.layer_norm(*inputs, self.eps, out_dtype, tiles)], results[:1])

    def law_flat_rows(self, inputs, results):
        x, *sides = inputs
        y, *statistics = self.kernel(x.flatten(0, 1), *sides)
        self.same_bits((y.reshape(x.shape), *statistics), results)


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
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0) if dtype == "float16" else (0.0, 0.0, -3.0, 1e4, 1e6))),
        rows=draw(st.sampled_from((1, 2, 4, 16))) if not looped else 1,
        block=draw(st.sampled_from([b for b in (16, 32, 64, 128, 256, 512) if b < width])) if looped else whole,
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        law=draw(properties.laws(LayerNormCase)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_layer_norm(shard, count):
    properties.explore(cases(), quick=240, full=2400, shard=shard, count=count)
