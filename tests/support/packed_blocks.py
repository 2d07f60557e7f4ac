"""Blocks on packed weights and in int8: inputs, their arithmetic without rounding, and random cases.

A case runs the reference; tests/support/cpu_cases.py makes cases of the backend ``cpu`` of them.
"""

from dataclasses import dataclass

import torch
from support.linear import exact_activation
from support.prepared_blocks import PreparedBlocksCase, normalised
from vit_fast.kernels import folding, packing, reference


def packed(blocks, activation):
    return folding.flatten(packing.packed_block(*parts, activation) for parts in blocks)


def quantised(blocks, activation):
    return folding.flatten(packing.int8_block(*parts, activation) for parts in blocks)


def stacked(x, linears, num_heads, scale, activation, eps1, eps2):
    """Blocks in float64; linears: of each block (weight [out, in], bias [out]) of qkv, proj, fc1 and fc2."""

    def affine(x, weight, bias):
        return torch.einsum("...k,nk->...n", x, weight) + bias

    x = x.double()
    for qkv, proj, fc1, fc2 in linears:
        q, k, v = affine(normalised(x, None, None, eps1), *qkv).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) * scale).softmax(-1)
        x = x + affine(torch.einsum("bhnm,bhmd->bnhd", weights, v).flatten(2), *proj)
        x = x + affine(exact_activation(affine(normalised(x, None, None, eps2), *fc1), activation), *fc2)
    return x


def unrounded(x, weights, num_heads, scale, activation, eps1, eps2, record):
    """The blocks on packed or int8 weights in float64: activations are not rounded."""
    linears = []
    for block in folding.unflatten(record, weights):
        parts = packing.unpacked_linears(block, x.shape[2], activation)
        if record is packing.Int8Block:
            parts = [
                (weight.double() * its_scale.double()[:, None] * gain.double(), bias)
                for weight, gain, its_scale, _, bias in parts
            ]
        linears.append([(weight.double(), bias.double()) for weight, bias in parts])
    return stacked(x, linears, num_heads, scale, activation, eps1, eps2)


@dataclass(frozen=True)
class PackedBlocksCase(PreparedBlocksCase):
    def fold(self, blocks):
        return packed(blocks, self.activation)

    def kernel(self, x, *weights):
        return self.eager(x, *weights)

    def eager(self, x, *weights):
        return [reference.packed_blocks(x, weights, *self.arguments)]

    def golden(self, x, *weights):
        return [unrounded(x, weights, *self.arguments, packing.PackedBlock)]

    def relation_halves_of_the_stack(self, inputs, results):
        """Two calls on half the blocks each give the result of one call, but for the rounding of x between them."""
        x, first, second = self.halves(inputs, packing.PackedBlock)
        if first:
            out = self.kernel(*self.kernel(x, *first), *second)
            allowed = self.order(*inputs)[0] if x.dtype.itemsize == 2 else 0.0
            assert (out[0] - results[0]).abs().max() <= allowed, f"relation '{self.relation}'"


@dataclass(frozen=True)
class Int8BlocksCase(PreparedBlocksCase):
    def fold(self, blocks):
        return quantised(blocks, self.activation)

    def kernel(self, x, *weights):
        return self.eager(x, *weights)

    def eager(self, x, *weights):
        return [reference.int8_blocks(x, weights, *self.arguments)]

    def golden(self, x, *weights):
        return [unrounded(x, weights, *self.arguments, packing.Int8Block)]

    def within_budget(self, inputs, results):
        """The kernels round to uint8 where eager does, but a value near a tie may round the other way; so their error
        is compared with eager's over several draws."""
        errors = []
        for i in range(8):
            draw = inputs if i == 0 else self.inputs(self.seed + i)
            errors.append((self.eager(*draw)[0].double() - self.golden(*draw)[0]).square().mean().item())
        golden = self.golden(*inputs)[0]
        assert results[0].is_contiguous() and results[0].shape == golden.shape and results[0].dtype == inputs[0].dtype
        error = (results[0].double() - golden).square().mean().item()
        slack = (torch.finfo(inputs[0].dtype).eps * golden.abs().max().item()) ** 2
        assert error <= 2 * max(errors[0], sum(errors) / len(errors)) + slack, f"{error:.3g} against {errors}"

    def relation_halves_of_the_stack(self, inputs, results):
        """In float32 x passes from one call to the next as it is."""
        x, first, second = self.halves(inputs, packing.Int8Block)
        if first and x.dtype == torch.float32:
            self.same_bits(self.kernel(*self.kernel(x, *first), *second), results)
