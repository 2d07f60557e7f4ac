"""Linear layers: inputs, the exact formula, eager, random cases and their metamorphic properties."""

import math
from dataclasses import dataclass, replace

import torch
from support import properties
from vit_fast.kernels import activation_names, reference
from vit_fast.kernels.activation_names import GATED
from vit_fast.kernels.configs import LayerNormConfig, LinearConfig

ACTIVATIONS = (None, *activation_names.ACTIVATIONS)


def exact_activation(z, activation):
    """The activation in float64; Φ by erfc, which is exact in the negative tail."""
    if activation == "gelu":
        return z * 0.5 * torch.special.erfc(-z / math.sqrt(2))
    if activation == "gelu_tanh":
        return z / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if activation == "quick_gelu":
        return z / (1 + torch.exp(-1.702 * z))
    if activation == "relu":
        return torch.where(z > 0, z, 0.0)
    if activation == "silu":
        return z / (1 + torch.exp(-z))
    if activation in GATED:
        half = z.shape[-1] // 2
        return exact_activation(z[..., :half], GATED[activation]) * z[..., half:]
    return z


def wide(t):
    return t.detach().cpu().double()


def formula(x, weight, bias, activation=None, gamma=None, residual=None, row_scale=None):
    z = torch.einsum("...k,nk->...n", wide(x), wide(weight))
    if bias is not None:
        z = z + wide(bias)
    z = exact_activation(z, activation)
    if gamma is not None:
        z = z * wide(gamma)
    if row_scale is not None:
        z = torch.stack([image * scale for image, scale in zip(z, wide(row_scale))])
    return z if residual is None else wide(residual) + z


def eager(x, weight, bias, activation=None, gamma=None, residual=None, row_scale=None):
    if residual is None:
        return reference.activate(torch.nn.functional.linear(x.to(weight.dtype), weight, bias), activation)
    return reference.linear_residual(x, weight, bias, gamma, residual, row_scale=row_scale)


def problem(shape, out_features, dtype, bias=True, device="cpu", x_dtype=None):
    """x, weight, bias with pre-activations of about 1.4."""
    x = torch.randn(shape, device=device).to(x_dtype or dtype)
    weight = (torch.randn(out_features, shape[-1], device=device) * shape[-1] ** -0.5).to(dtype)
    return x, weight, torch.randn(out_features, device=device).to(dtype) if bias else None


def stream(shape, dtype, mean=0.0, device="cpu"):
    """hidden, weight, bias, residual of a projection before a LayerNorm; residual rows have the mean ±``mean``."""
    signs = torch.randn(*shape[:-1], 1, device=device).sign()
    residual = (torch.randn(shape, device=device) + mean * signs).to(dtype)
    return *problem(shape, shape[-1], dtype, device=device), residual


def centred(out_features, width, dtype, device="cpu"):
    weight = torch.randn(out_features, width, device=device) * width**-0.5
    return (weight - weight.mean(1, keepdim=True)).to(dtype)


@dataclass(frozen=True)
class LinearCase(properties.Case):
    dtype: str
    x_dtype: str
    residual_dtype: str  # "": no residual
    batch: int
    tokens: int
    in_features: int
    out_features: int  # rows of the weight; a gated activation halves them
    activation: str | None
    bias: bool
    gamma: bool
    row_scale: bool
    block_m: int
    block_n: int
    block_k: int
    tma: bool
    split_k: int
    values: str
    layout: str
    relation: str
    seed: int

    def inputs(self, seed, draw=properties.filled):
        """x, weight, bias, gamma, residual, row_scale."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        features = self.out_features // 2 if self.activation in GATED else self.out_features
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

    @property
    def tiles(self):
        return LinearConfig(self.block_m, self.block_n, self.block_k, 2, 4, 2, self.tma, self.split_k)

    def kernel(self, x, weight, bias, *rest):
        from vit_fast.kernels import linear

        return [linear.linear(x, weight, bias, self.activation, config=self.tiles, **self.options(*rest))]

    def eager(self, x, weight, bias, gamma, residual, row_scale):
        if residual is not None:
            return [eager(x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale)]
        out = eager(x, weight, bias, self.activation)
        out = out if gamma is None else out * gamma
        return [out if row_scale is None else out * row_scale[:, None, None]]

    def golden(self, x, weight, bias, *rest):
        return [formula(x.to(weight.dtype), weight, bias, self.activation, **self.options(*rest))]

    def order(self, x, weight, bias, gamma, residual, row_scale):
        """Some ulps of the sum of |products|, times the activation's slope (at most 1.13), and the epilogue."""
        size = (x.double().abs() @ weight.double().abs().T).max().item() + (1.0 if bias is None else 5.0)
        slope = size if self.activation in GATED else 1.13
        gain = (1.0 if gamma is None else gamma.abs().max().item()) * (1.0 if row_scale is None else 2.0)
        return [2.0**-22 * size * slope * gain]

    def relation_layout_of_rows(self, inputs, results):
        x, weight, bias, gamma, residual, row_scale = inputs
        x, residual = properties.all_laid_out(self.layout, x, residual)
        self.same_bits(self.kernel(x, weight, bias, gamma, residual, row_scale), results)

    def relation_layout_of_weights(self, inputs, results):
        x, weight, bias, gamma, residual, row_scale = inputs
        weight, bias, gamma, row_scale = properties.all_laid_out(self.layout, weight, bias, gamma, row_scale)
        self.same_bits(self.kernel(x, weight, bias, gamma, residual, row_scale), results)

    def relation_descriptors(self, inputs, results):
        self.same_bits(replace(self, tma=not self.tma).kernel(*inputs), results)

    def relation_split_k(self, inputs, results):
        other = replace(self, split_k=1 if self.split_k > 1 or self.activation in GATED else 4)
        self.same_but_for_order(inputs, other.kernel(*inputs), results)

    def relation_one_image_alone(self, inputs, results):
        x, weight, bias, gamma, *rest = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        rest = properties.each(lambda t: t[image], *rest)
        self.same_but_for_order(inputs, self.kernel(x[image], weight, bias, gamma, *rest), [results[0][image]])

    def relation_images_permuted(self, inputs, results):
        x, weight, bias, gamma, *rest = inputs
        order = properties.permutation(self.batch, self.seed)
        rest = properties.each(lambda t: t[order], *rest)
        actual = self.kernel(x[order], weight, bias, gamma, *rest)
        self.same_but_for_order(inputs, actual, [results[0][order]])

    def relation_powers_of_two(self, inputs, results):
        x, weight, *rest = inputs
        if self.values != "subnormal" and properties.can_shrink(weight) and (x * 4).isfinite().all():
            self.same_bits(self.kernel(x * 4, weight / 4, *rest), results)

    def relation_partials(self, inputs, results):
        """Emitting partials does not change the result, and they are those of the stored, rounded result."""
        from vit_fast.kernels import linear

        x, weight, bias, _, residual, _ = inputs
        plain = replace(self, activation=None)
        out, (values, part) = linear.linear_with_partials(x, weight, bias, residual, config=self.tiles)
        self.same_bits([out], plain.kernel(x, weight, bias, None, residual, None))
        assert part == self.block_n
        rows = out.flatten(0, 1).double()
        for actual, wanted, slack in zip(values, partials_of(rows, part), partials_order(rows, part), strict=True):
            precision = torch.finfo(actual.dtype).eps * 2.0**23
            assert ((actual - wanted).abs() <= precision * slack).all()

    def relation_integers(self, inputs, results):
        """Small integers have exact sums: only the rounding to the result's dtype is left."""
        plain = replace(self, activation=None if self.activation != "relu" else "relu")
        integers = plain.inputs(self.seed, lambda shape, _, generator: properties.integers(shape, 4, generator))
        out, golden = plain.kernel(*integers)[0], plain.golden(*integers)[0]
        assert torch.equal(out, golden.to(out.dtype))


def parts_of(rows, part):
    """([parts, rows, part], mask of its elements): rows [rows, width] cut in parts, the last filled up with zeros."""
    fill = -rows.shape[1] % part
    cut = [torch.nn.functional.pad(t, (0, fill)).unflatten(1, (-1, part)) for t in (rows, torch.ones_like(rows))]
    return [t.transpose(0, 1) for t in cut]


def partials_of(rows, part):
    """Mean and centred sum of squares, each [parts, rows], in the dtype of the rows."""
    values, inside = parts_of(rows, part)
    mean = values.sum(-1) / inside.sum(-1)
    return mean, ((values - mean[..., None]) * inside).square().sum(-1)


def partials_order(rows, part):
    """How much the order of float32 sums may change mean and M2: the mean by some ulps of the largest element."""
    largest = parts_of(rows.double().abs(), part)[0].amax(-1)
    change, squares = 2.0**-22 * largest, partials_of(rows.double(), part)[1]
    return change, 2.0**-20 * squares + part * change.square() + 2 * change * (part * squares).sqrt()


@dataclass(frozen=True)
class FoldedCase(properties.Case):
    """The partials of x, from ``row_partials`` or the GEMM that wrote x, and the linear layer after a LayerNorm."""

    dtype: str
    batch: int
    tokens: int
    width: int
    out_features: int  # rows of the weight; a gated activation halves them
    activation: str | None
    bias: bool
    centred: bool  # whether the rows of the weight are
    eps: float
    mean: float
    part: int  # width of the partials: that of the tile of the GEMM that wrote x; 0: from row_partials
    block_m: int
    block_n: int
    block_k: int
    tma: bool
    values: str
    layout: str
    relation: str
    seed: int

    def inputs(self, seed, draw=properties.filled):
        """x, weight, its column sums, bias."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        x = draw((self.batch, self.tokens, self.width), self.values, generator)
        weight = draw((self.out_features, self.width), "normal", generator)
        bias = draw((self.out_features,), "normal", generator).to(dtype)
        if draw is properties.filled:
            x = x + self.mean * draw((self.batch, self.tokens, 1), "normal", generator).sign()
            weight = weight * self.width**-0.5
            weight = weight - weight.mean(1, keepdim=True) if self.centred else weight
        weight = weight.to(dtype)
        column_sum = weight.double().sum(1).to(stat)
        return x.to(dtype), weight, column_sum, bias.to(stat) if self.bias else None

    def partials(self, x):
        from vit_fast.kernels import layer_norm, linear

        if not self.part:
            return layer_norm.row_partials(x, LayerNormConfig(4, self.whole, 4))
        tiles = LinearConfig(self.block_m, self.part, 16, 2, 4, 2, self.tma)
        nothing = torch.zeros(self.width, 1, dtype=x.dtype)
        out, partials = linear.linear_with_partials(0 * x[..., :1], nothing, None, x, config=tiles)
        assert torch.equal(out, x) and partials.width == self.part
        return partials

    @property
    def whole(self):
        return max(16, 1 << (self.width - 1).bit_length())

    def kernel(self, x, weight, column_sum, bias, eps=None, partials=None):
        from vit_fast.kernels import linear

        tiles = LinearConfig(self.block_m, self.block_n, self.block_k, 2, 4, 2, self.tma)
        partials = partials or self.partials(x)
        eps = self.eps if eps is None else eps
        out = linear.folded_linear(x, partials, eps, weight, column_sum, bias, self.activation, config=tiles)
        return [out, *partials.values]

    def eager(self, x, weight, column_sum, bias):
        bias = None if bias is None else bias.to(weight.dtype)
        rows = x.flatten(0, 1).to(column_sum.dtype)
        return [
            reference.layer_norm_linear(x, None, None, self.eps, weight, bias, self.activation),
            *partials_of(rows, self.part or self.whole),
        ]

    def golden(self, x, weight, column_sum, bias):
        x = x.double()
        rest = x - x.mean(-1, keepdim=True)
        normal = rest * (rest.square().mean(-1, keepdim=True) + self.eps) ** -0.5
        partials = partials_of(x.flatten(0, 1), self.part or self.whole)
        return [formula(normal, weight, bias, self.activation), *(m.contiguous() for m in partials)]

    def order(self, x, weight, column_sum, bias):
        """Some ulps of the sum of |products|, before the mean is subtracted, and of the partials."""
        rows, weight = x.flatten(0, 1).double(), weight.double()
        rstd = (rows.var(1, correction=0) + self.eps) ** -0.5
        size = (rows.abs() @ weight.abs().T + rows.mean(1, keepdim=True).abs() * column_sum.double().abs()).amax(1)
        size = (size * rstd).max().item() + (1.0 if bias is None else 5.0)
        slope = size if self.activation in GATED else 1.13
        partials = partials_order(rows, self.part or self.whole)
        return [2.0**-22 * size * slope, *(change.max().item() for change in partials)]

    def relation_layout_of_rows(self, inputs, results):
        x, *rest = inputs
        self.same_bits(self.kernel(properties.laid_out(x, self.layout), *rest), results)

    def relation_layout_of_weights(self, inputs, results):
        x, weight, column_sum, bias = inputs
        weight, bias = properties.all_laid_out(self.layout, weight, bias)
        self.same_bits(self.kernel(x, weight, column_sum, bias), results)

    def relation_descriptors(self, inputs, results):
        self.same_bits(replace(self, tma=not self.tma).kernel(*inputs), results)

    def relation_one_image_alone(self, inputs, results):
        x, *rest = inputs
        image = self.seed % self.batch
        rows = slice(image * self.tokens, (image + 1) * self.tokens)
        wanted = [results[0][image : image + 1], *(m[:, rows] for m in results[1:])]
        self.same_but_for_order(inputs, self.kernel(x[image : image + 1], *rest), wanted)

    def relation_rows_permuted(self, inputs, results):
        x, *rest = inputs
        order = properties.permutation(self.batch * self.tokens, self.seed)
        wanted = [results[0].flatten(0, 1)[order], *(m[:, order] for m in results[1:])]
        self.same_but_for_order(inputs, self.kernel(x.flatten(0, 1)[order], *rest), wanted)

    def relation_parts(self, inputs, results):
        """The result does not depend on the number of partials per row."""
        other = replace(self, part=0 if self.part else 16)
        out = self.kernel(*inputs, partials=other.partials(inputs[0]))[0]
        self.same_but_for_order(inputs, [out, *results[1:]], results)

    def relation_powers_of_two(self, inputs, results):
        x, *rest = inputs
        if self.values != "subnormal" and (x * 4).isfinite().all():
            out, mean, squares = results
            self.same_bits(self.kernel(x * 4, *rest, eps=self.eps * 16), (out, mean * 4, squares * 16))

    def relation_constant_added(self, inputs, results):
        """A constant added to x changes only its mean; exact for small integers and a width that is a power of two."""
        even = replace(self, width=64, values="normal")
        x, *rest = even.inputs(self.seed, lambda shape, _, generator: properties.integers(shape, 4, generator))
        out, mean, squares = even.kernel(x, *rest)
        self.same_bits(even.kernel(x + 5, *rest), (out, mean + 5, squares))
