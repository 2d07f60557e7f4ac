"""Blocks in float8: their arithmetic without rounding, random cases and their metamorphic properties."""

from dataclasses import dataclass

import torch
from support.linear import exact_activation
from support.prepared_blocks import PreparedBlocksCase, normalised
from vit_fast.kernels import folding, reference

E4M3, SIZE = torch.float8_e4m3fn, folding.TENSORS_PER_FP8_BLOCK


def quantised(blocks, activation):
    return [tensor for parts in blocks for tensor in folding.fp8_block(*parts, activation)]


def unrounded(x, weights, num_heads, scale, activation, eps1, eps2):
    """What quantised weights compute where nothing else is rounded, in float64."""

    def linear(x, weight, scale, bias):
        return torch.einsum("...k,nk->...n", x, weight) * scale + bias

    x = x.double()
    for start in range(0, len(weights), SIZE):
        norm_scale, *rest = (tensor.double() for tensor in weights[start : start + SIZE])
        qkv, proj, fc1, hidden_scale, fc2 = rest[:3], rest[3:6], rest[6:9], rest[9], rest[10:]
        packed = linear(normalised(x, None, None, eps1) * norm_scale, *qkv)
        x = x + linear(reference.attention(packed, num_heads, scale), *proj)
        hidden = exact_activation(linear(normalised(x, None, None, eps2) * norm_scale, *fc1), activation)
        x = x + linear(hidden * hidden_scale, *fc2)
    return x


@dataclass(frozen=True)
class Fp8BlocksCase(PreparedBlocksCase):
    def fold(self, blocks):
        return quantised(blocks, self.activation)

    def kernel(self, x, *weights):
        from vit_fast.kernels import fp8_blocks

        return [fp8_blocks.fp8_blocks(x, weights, *self.words)]

    def eager(self, x, *weights):
        return [reference.fp8_blocks(x, weights, *self.words)]

    def golden(self, x, *weights):
        return [unrounded(x, weights, *self.words)]

    def within_budget(self, inputs, results):
        """The kernels round to e4m3 where the formula does, and differ where a sum falls on the other side of it."""
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
        """Two steps of e4m3 in what the branches add, and three of x itself."""
        golden = self.golden(x, *weights)[0]
        added = (golden - x.double()).abs().max().item()
        return [added / 4 + 3 * torch.finfo(x.dtype).eps * golden.abs().max().item()]

    def relation_halves_of_the_stack(self, inputs, results):
        x, *weights = inputs
        half = self.depth // 2 * SIZE
        self.same_bits(self.kernel(*self.kernel(x, *weights[:half]), *weights[half:]), results)

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
