"""LayerNorm of a random case, its exact formula and its metamorphic properties."""

from dataclasses import dataclass

import torch
from support import properties
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LayerNormConfig


def formula(x, weight, bias, eps, norm="layer"):
    """(y, mean [rows], rstd [rows]) in float64."""
    x = x.detach().cpu().double()
    mean = (x if norm == "layer" else 0 * x).sum(-1, keepdim=True) / x.shape[-1]
    rstd = 1 / (((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight.cpu().double()
    if bias is not None:
        y = y + bias.cpu().double()
    return y, mean.flatten(), rstd.flatten()


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
    norm: str
    mean: float
    rows: int
    block: int  # below the width, the kernel for wide rows runs
    values: str
    layout: str
    relation: str
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
        return *layer_norm.layer_norm_fwd(x, weight, bias, eps, out_dtype, tiles, norm=self.norm), row_mean, squares

    def eager(self, x, weight, bias):
        y, mean, rstd = reference.layer_norm_fwd(x, weight, bias, self.eps, norm=self.norm)
        row_mean, _ = reference.layer_norm_stats(x, self.eps)
        rest = x.flatten(0, 1).to(mean.dtype) - row_mean[:, None]
        return y.to(properties.DTYPES[self.out_dtype]), mean, rstd, row_mean, rest.square().sum(1)

    def golden(self, x, weight, bias):
        row_mean = formula(x, None, None, self.eps)[1]
        squares = (x.flatten(0, 1).double() - row_mean[:, None]).square().sum(1)
        return *formula(x, weight, bias, self.eps, self.norm), row_mean, squares

    def order(self, x, weight, bias):
        """The mean may change by some ulps of the mean of |x|, and x − mean with it."""
        _, _, rstd, _, squares = self.golden(x, weight, bias)
        change = 2.0**-22 * x.double().abs().mean(-1).flatten()
        slope = 1.0 if weight is None else weight.double().abs().max().item()
        orders = change * rstd * slope, change, 2.0**-22 * rstd, change
        squared = 2.0**-22 * squares + self.width * change.square() + 2 * change * (self.width * squares).sqrt()
        return [order.max().item() for order in (*orders, squared)]

    def relation_layout(self, inputs, results):
        self.same_bits(self.kernel(*properties.all_laid_out(self.layout, *inputs)), results)

    def relation_one_image_alone(self, inputs, results):
        x, *sides = inputs
        image = self.seed % self.batch
        rows = slice(image * self.tokens, (image + 1) * self.tokens)
        y, *statistics = results
        self.same_bits(self.kernel(x[image], *sides), (y[image], *(s[rows] for s in statistics)))

    def relation_rows_permuted(self, inputs, results):
        x, *sides = inputs
        order = properties.permutation(self.batch * self.tokens, self.seed)
        y, *statistics = results
        wanted = (y.flatten(0, 1)[order], *(s[order] for s in statistics))
        self.same_bits(self.kernel(x.flatten(0, 1)[order], *sides), wanted)

    def relation_rows_per_program(self, inputs, results):
        self.same_bits(self.kernel(*inputs, rows=self.rows + 1 if self.rows == 1 else 1), results)

    def relation_powers_of_two(self, inputs, results):
        x, *sides = inputs
        y, mean, rstd, row_mean, squares = results
        if self.values != "subnormal" and (x * 4).isfinite().all():
            wanted = (y, mean * 4, rstd / 4, row_mean * 4, squares * 16)
            self.same_bits(self.kernel(x * 4, *sides, eps=self.eps * 16), wanted)

    def relation_without_statistics(self, inputs, results):
        from vit_fast.kernels import layer_norm

        tiles, out_dtype = LayerNormConfig(self.rows, self.block, 4), properties.DTYPES[self.out_dtype]
        self.same_bits([layer_norm.layer_norm(*inputs, self.eps, out_dtype, tiles, norm=self.norm)], results[:1])

    def relation_flat_rows(self, inputs, results):
        x, *sides = inputs
        y, *statistics = self.kernel(x.flatten(0, 1), *sides)
        self.same_bits((y.reshape(x.shape), *statistics), results)
