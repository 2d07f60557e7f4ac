"""The LayerNorm+MLP operation: inputs, the exact formula, random cases and their metamorphic properties."""

from dataclasses import dataclass

import torch
from support import layer_norm, properties
from support.linear import exact_activation
from vit_fast.kernels import reference
from vit_fast.kernels.activation_names import GATED
from vit_fast.kernels.configs import LinearConfig


def formula(
    x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma, row_scale=None, norm="layer", inner_norm=None
):
    """(out, mean, rstd, z) in float64."""
    x, ln_weight, ln_bias, w1, b1, w2, b2, gamma, row_scale = (
        None if t is None else t.detach().cpu().double()
        for t in (x, ln_weight, ln_bias, w1, b1, w2, b2, gamma, row_scale)
    )
    y, mean, rstd = layer_norm.formula(x, ln_weight, ln_bias, eps, norm)
    z = torch.einsum("...c,hc->...h", y, w1) + (0.0 if b1 is None else b1)
    hidden = exact_activation(z, activation)
    if inner_norm is not None:
        hidden = layer_norm.formula(hidden, *inner_norm, norm)[0]
    branch = torch.einsum("...h,ch->...c", hidden, w2) + (0.0 if b2 is None else b2)
    branch = branch if gamma is None else branch * gamma
    if row_scale is not None:
        branch = torch.stack([image * scale for image, scale in zip(branch, row_scale)])
    return x + branch, mean, rstd, z


def problem(shape, hidden, dtype, activation="gelu", x_dtype=None, side_dtype=None, optional=True, device="cpu"):
    """Arguments of layernorm_mlp up to gamma."""
    width, side = shape[-1], side_dtype or dtype
    random = lambda *size, scale=1.0: torch.randn(*size, device=device) * scale  # noqa: E731
    rows = 2 * hidden if activation in GATED else hidden
    return (
        random(*shape).to(x_dtype or dtype),
        (1 + random(width, scale=0.2)).to(side) if optional else None,
        random(width, scale=0.2).to(side) if optional else None,
        1e-6,
        random(rows, width, scale=width**-0.5).to(dtype),
        random(rows, scale=0.2).to(dtype) if optional else None,
        random(width, hidden, scale=hidden**-0.5).to(dtype),
        random(width, scale=0.2).to(dtype) if optional else None,
        activation,
        (0.5 + torch.rand(width, device=device)).to(side) if optional else None,
    )


def inner_norm(hidden, dtype, device="cpu"):
    """(weight, bias, eps) of a norm of the hidden activations."""
    weight, bias = 1 + 0.2 * torch.randn(hidden, device=device), 0.2 * torch.randn(hidden, device=device)
    return weight.to(dtype), bias.to(dtype), 1e-5


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
    norm: str
    inner_norm: bool
    tma: bool
    layout: str
    relation: str
    seed: int

    def inputs(self, seed):
        torch.manual_seed(seed)
        dtype, x_dtype = properties.DTYPES[self.dtype], properties.DTYPES[self.x_dtype]
        shape = (self.batch, self.tokens, self.width)
        args = problem(shape, self.hidden, dtype, self.activation, x_dtype, x_dtype, self.optional)
        row_scale = (torch.arange(self.batch) % 3 != 1).to(dtype) * 1.25 if self.row_scale else None
        return *args, row_scale, *(inner_norm(self.hidden, x_dtype) if self.inner_norm else (None, None, None))

    def options(self, row_scale, weight, bias, eps):
        return dict(row_scale=row_scale, norm=self.norm, inner_norm=None if eps is None else (weight, bias, eps))

    def kernel(self, *inputs):
        from vit_fast.kernels import layernorm_mlp

        tiles = (LinearConfig(32, 64, 32, 2, 4, 2, self.tma), LinearConfig(32, 32, 32, 2, 4, 2, self.tma))
        return layernorm_mlp.layernorm_mlp_fwd(*inputs[:10], **self.options(*inputs[10:]), config=tiles)

    def eager(self, *inputs):
        return reference.layernorm_mlp_fwd(*inputs[:10], **self.options(*inputs[10:]))

    def golden(self, *inputs):
        return formula(*inputs[:10], **self.options(*inputs[10:]))

    def order(self, x, *_):
        change = 2.0**-22
        products = change * 4 * self.hidden**0.5, change * 4 * self.width**0.5
        return products[0], change * x.abs().max().item(), change * 1e3, products[1]

    def relation_layout(self, inputs, results):
        self.same_bits(self.kernel(*properties.all_laid_out(self.layout, *inputs)), results)

    def relation_one_image_alone(self, inputs, results):
        x, *rest, row_scale = inputs[:11]
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        rows = slice(image.start * self.tokens, image.stop * self.tokens)
        out, mean, rstd, *z = results
        actual = self.kernel(x[image], *rest, None if row_scale is None else row_scale[image], *inputs[11:])
        self.same_but_for_order(inputs, actual, (out[image], mean[rows], rstd[rows], *(t[image] for t in z)))

    def relation_dropped_images(self, inputs, results):
        """Drop path: an image whose scale is 0 stays unchanged."""
        zeros = torch.zeros(self.batch, dtype=properties.DTYPES[self.dtype])
        out = self.kernel(*inputs[:10], zeros, *inputs[11:])[0]
        self.same_bits([out], inputs[:1])

    def relation_zero_gamma(self, inputs, results):
        zeros = torch.zeros(self.width, dtype=inputs[0].dtype)
        out = self.kernel(*inputs[:9], zeros, *inputs[10:])[0]
        self.same_bits([out], inputs[:1])
