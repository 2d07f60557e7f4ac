"""Linear layers on prepared weights: the exact formula, random cases and their metamorphic properties."""

from dataclasses import dataclass

import torch
from support import layer_norm, linear, properties
from vit_fast.kernels import packing, reference
from vit_fast.kernels.activation_names import GATED
from vit_fast.kernels.prepared_layer import PreparedLayer

PACK = {False: packing.prepared_weight, True: packing.fp8_weight}  # by whether it is float8


def kernel_of(fp8):
    from vit_fast.kernels import prepared_linear

    return prepared_linear.fp8_linear if fp8 else prepared_linear.prepared_linear


def formula(x, layer, residual=None):
    """In float64: tokens are not rounded, a float8 weight is what it stands for."""
    matrix, *scale = (t.double() for t in layer.weight)
    matrix = matrix * scale[0][:, None] if scale else matrix
    x, ln_weight, ln_bias, bias, gamma, residual = (
        None if t is None else t.double()
        for t in (x, layer.ln_weight, layer.ln_bias, layer.bias, layer.gamma, residual)
    )
    if layer.eps is not None:
        x = layer_norm.formula(x, ln_weight, ln_bias, layer.eps, layer.norm)[0]
    return linear.formula(x, matrix, bias, layer.activation, gamma, residual)


def problem(shape, features, dtype, fp8, activation=None, norm=None, ends=False, bias=True):
    """Arguments of an operation; ``ends``: the layer ends a branch, with LayerScale and a residual."""
    width, rows = shape[-1], 2 * features if activation in GATED else features
    x = torch.randn(shape).to(dtype)
    weight = PACK[fp8]((torch.randn(rows, width) * width**-0.5).to(dtype))
    b = (torch.randn(rows) * 0.5).to(dtype) if bias else None
    ln = [(1 + 0.2 * torch.randn(width)).to(dtype), (0.2 * torch.randn(width)).to(dtype), 1e-6]
    gamma, residual = None, None
    if ends:
        gamma, residual = (0.5 + torch.rand(features)).to(dtype), torch.randn(*shape[:-1], features).to(dtype)
    ln = ln if norm else (None, None, None)
    return x, PreparedLayer(weight.tensors, b, features, *ln, norm or "layer", activation, gamma), residual


@dataclass(frozen=True)
class PreparedLinearCase(properties.Case):
    dtype: str
    fp8: bool
    batch: int
    tokens: int
    width: int
    features: int
    activation: str | None
    norm: str | None
    ends: bool
    bias: bool
    values: str
    layout: str
    relation: str
    seed: int

    def inputs(self, seed):
        torch.manual_seed(seed)
        shape, dtype = (self.batch, self.tokens, self.width), properties.DTYPES[self.dtype]
        _, *rest = problem(shape, self.features, dtype, self.fp8, self.activation, self.norm, self.ends, self.bias)
        return properties.filled(shape, self.values, properties.generator_of(seed)).to(dtype), *rest

    def kernel(self, *inputs):
        return [kernel_of(self.fp8)(*inputs)]

    def eager(self, *inputs):
        return [reference.packed_linear(*inputs)]

    def golden(self, *inputs):
        return [formula(*inputs)]

    def order(self, x, *_):
        return [2.0**-22 * 4 * self.width**0.5 * (1 if self.norm else x.abs().max().item())]

    def within_budget(self, inputs, results):
        """In float8 the kernel rounds to e4m3 where eager does, but for what lies near a tie: their errors are compared
        over several draws."""
        if not self.fp8:
            return super().within_budget(inputs, results)
        errors = []
        for i in range(8):
            draw = inputs if i == 0 else self.inputs(self.seed + i)
            errors.append((self.eager(*draw)[0].double() - self.golden(*draw)[0]).square().mean().item())
        golden = self.golden(*inputs)[0]
        assert results[0].is_contiguous() and results[0].shape == golden.shape and results[0].dtype == inputs[0].dtype
        error = (results[0].double() - golden).square().mean().item()
        slack = (torch.finfo(inputs[0].dtype).eps * golden.abs().max().item()) ** 2
        assert error <= 1.5 * max(errors[0], sum(errors) / len(errors)) + slack, f"{error:.3g} against {errors}"

    def relation_layout(self, inputs, results):
        x, layer, residual = inputs
        x, residual = (properties.laid_out(t, self.layout) for t in (x, residual))
        self.same_bits(self.kernel(x, layer, residual), results)

    def relation_one_image_alone(self, inputs, results):
        x, layer, residual = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        alone = self.kernel(x[image], layer, None if residual is None else residual[image])
        self.same_but_for_order(inputs, alone, [results[0][image]])

    def relation_a_broken_token_stays_alone(self, inputs, results):
        x, *rest = inputs
        x, broken = x.clone(), self.seed % self.tokens
        x[0, broken, 0] = float("nan")
        out = self.kernel(x, *rest)[0]
        others = torch.ones(self.batch, self.tokens, dtype=torch.bool)
        others[0, broken] = False
        self.same_bits([out[others]], [results[0][others]])
        if self.fp8:  # whose row cannot be scaled
            assert out[0, broken].isnan().any(), f"relation '{self.relation}'"
