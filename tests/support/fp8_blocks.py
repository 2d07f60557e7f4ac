"""Blocks in float8: their arithmetic without rounding, random cases and their metamorphic properties."""

from dataclasses import dataclass

import torch
from support.linear import exact_activation
from support.prepared_blocks import PreparedBlocksCase, normalised
from vit_fast.kernels import folding, reference

E4M3 = torch.float8_e4m3fn


def quantised(blocks, activation):
    return folding.flatten(folding.fp8_block(*parts, activation) for parts in blocks)


def unrounded(x, weights, num_heads, scale, activation, eps1, eps2):
    """The blocks on quantised weights in float64, without any other rounding."""

    def linear(x, weight, scale, bias):
        return torch.einsum("...k,nk->...n", x, weight) * scale + bias

    x = x.double()
    for b in folding.unflatten(folding.Float8Block, [tensor.double() for tensor in weights]):
        packed = linear(normalised(x, None, None, eps1) * b.norm_scale, b.qkv_weight, b.qkv_scale, b.qkv_bias)
        x = x + linear(reference.attention(packed, num_heads, scale), b.proj_weight, b.proj_scale, b.proj_bias)
        z = linear(normalised(x, None, None, eps2) * b.norm_scale, b.fc1_weight, b.fc1_scale, b.fc1_bias)
        x = x + linear(exact_activation(z, activation) * b.hidden_scale, b.fc2_weight, b.fc2_scale, b.fc2_bias)
    return x


@dataclass(frozen=True)
class Fp8BlocksCase(PreparedBlocksCase):
    def fold(self, blocks):
        return quantised(blocks, self.activation)

    def kernel(self, x, *weights):
        from vit_fast.kernels import fp8_blocks

        return [fp8_blocks.fp8_blocks(x, weights, *self.arguments)]

    def eager(self, x, *weights):
        return [reference.fp8_blocks(x, weights, *self.arguments)]

    def golden(self, x, *weights):
        return [unrounded(x, weights, *self.arguments)]

    def within_budget(self, inputs, results):
        """The kernels round to e4m3 where eager does, but a sum near a tie may round the other way; so their error is
        compared with eager's over several draws."""
        errors = []
        for i in range(8):
            draw = inputs if i == 0 else self.inputs(self.seed + i)
            errors.append((self.eager(*draw)[0].double() - self.golden(*draw)[0]).square().mean().item())
        golden = self.golden(*inputs)[0]
        assert results[0].is_contiguous() and results[0].shape == golden.shape and results[0].dtype == inputs[0].dtype
        error = (results[0].double() - golden).square().mean().item()
        slack = (torch.finfo(inputs[0].dtype).eps * golden.abs().max().item()) ** 2
        assert error <= 2 * max(errors[0], sum(errors) / len(errors)) + slack, f"{error:.3g} against {errors}"

    def order(self, x, *weights):
        """Two e4m3 spacings of what the branches add, and three ulps of x itself."""
        golden = self.golden(x, *weights)[0]
        added = (golden - x.double()).abs().max().item()
        return [added / 4 + 3 * torch.finfo(x.dtype).eps * golden.abs().max().item()]

    def relation_halves_of_the_stack(self, inputs, results):
        x, first, second = self.halves(inputs, folding.Float8Block)
        self.same_bits(self.kernel(*self.kernel(x, *first), *second), results)

    def relation_a_broken_image_stays_alone(self, inputs, results):
        x, *weights = inputs
        broken = self.seed % self.batch
        x = x.clone()
        x[broken, 0, 0] = float("nan")
        out = self.kernel(x, *weights)[0]
        others = torch.arange(self.batch) != broken
        if self.batch > 1:
            self.same_but_for_order(inputs, [out[others]], [results[0][others]])
        assert out[broken, 0].isnan().all(), f"relation '{self.relation}'"
