"""Random stacks of blocks in float8: the error against float64 of the same weights, and laws of a stack.

Where a sum falls on the other side of a rounding to e4m3, what follows moves by a step of it: ``order``.
"""

from dataclasses import dataclass

import properties
import pytest
import torch
from test_fp8_blocks import quantised, unrounded
from test_properties_prepared_blocks import PreparedBlocksCase, cases
from vit_fast.kernels import folding, reference


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

    def law_halves_of_the_stack(self, inputs, results):
        x, first, second = self.halves(inputs, folding.Float8Block)
        self.same_bits(self.kernel(*self.kernel(x, *first), *second), results)

    def law_a_broken_image_stays_alone(self, inputs, results):
        x, *weights = inputs
        broken = self.seed % self.batch
        x = x.clone()
        x[broken, 0, 0] = float("nan")
        out = self.kernel(x, *weights)[0]
        others = torch.arange(self.batch) != broken
        if self.batch > 1:
            self.same_but_for_order(inputs, [out[others]], [results[0][others]])
        assert out[broken, 0].isnan().all(), f"law '{self.law}'"


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_fp8_blocks(shard, count):
    properties.explore(cases(Fp8BlocksCase, ("bfloat16", "float16")), quick=40, full=400, shard=shard, count=count)
