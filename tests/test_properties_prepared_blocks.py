"""Random stacks of prepared blocks: the error budget against float64, and laws of a stack.

A rounding of the stream that falls the other way (the sums of an image depend a little on its place in a tile) moves
what follows by some ulps: ``order``.
"""

from dataclasses import dataclass

import properties
import pytest
import torch
from hypothesis import strategies as st
from test_linear import ACTIVATIONS
from test_prepared_blocks import block, prepared
from vit_fast.kernels import folding, reference


@dataclass(frozen=True)
class PreparedBlocksCase(properties.Case):
    dtype: str
    batch: int
    tokens: int
    num_heads: int
    head_size: int
    hidden: int  # rows of the first weight of the MLP; swiglu halves them
    activation: str
    optional: bool  # LayerNorm parameters, biases, gammas
    depth: int
    values: str
    layout: str
    law: str
    seed: int

    def inputs(self, seed):
        """x, then the weights of all blocks."""
        torch.manual_seed(seed)
        dtype, width = properties.DTYPES[self.dtype], self.num_heads * self.head_size
        x = properties.filled((self.batch, self.tokens, width), self.values, properties.generator_of(seed)).to(dtype)
        return x, *self.fold(
            [block(width, self.hidden, self.activation, dtype, self.optional) for _ in range(self.depth)]
        )

    def fold(self, blocks):
        return prepared(blocks)

    @property
    def words(self):
        return self.num_heads, self.head_size**-0.5, self.activation, 1e-6, 1e-5

    def kernel(self, x, *weights):
        from vit_fast.kernels import prepared_blocks

        return [prepared_blocks.prepared_blocks(x, weights, *self.words)]

    def eager(self, x, *weights):
        return [reference.prepared_blocks(x, weights, *self.words)]

    def golden(self, x, *weights):
        return [reference.prepared_blocks(x.double(), [weight.double() for weight in weights], *self.words)]

    def order(self, x, *weights):
        return [3 * torch.finfo(x.dtype).eps * self.golden(x, *weights)[0].abs().max().item()]

    def law_layout(self, inputs, results):
        x, *weights = inputs
        self.same_bits(self.kernel(properties.laid_out(x, self.layout), *weights), results)

    def law_images_permuted(self, inputs, results):
        x, *weights = inputs
        order = properties.permutation(self.batch, self.seed)
        self.same_but_for_order(inputs, self.kernel(x[order], *weights), [results[0][order]])

    def law_one_image_alone(self, inputs, results):
        x, *weights = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        self.same_but_for_order(inputs, self.kernel(x[image], *weights), [results[0][image]])

    def halves(self, inputs, record):
        """x, and the weights of the first and of the second half of the blocks."""
        x, *weights = inputs
        blocks = folding.unflatten(record, weights)
        return x, *map(folding.flatten, (blocks[: self.depth // 2], blocks[self.depth // 2 :]))

    def law_halves_of_the_stack(self, inputs, results):
        """The second half takes the partials of its x from a kernel of its own, in one part."""
        x, first, second = self.halves(inputs, folding.FoldedBlock)
        if first:
            out = self.kernel(*self.kernel(x, *first), *second)
            self.within_budget(inputs, out)
            self.same_but_for_order(inputs, out, results)


@st.composite
def cases(draw, case_type=PreparedBlocksCase, dtypes=("bfloat16", "float16", "bfloat16", "float16", "float64")):
    activation = draw(st.sampled_from([word for word in ACTIVATIONS if word]))
    hidden = draw(st.integers(4, 100))
    return case_type(
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 20)),
        num_heads=draw(st.integers(1, 3)),
        head_size=draw(st.one_of(st.integers(2, 40), st.sampled_from((16, 32)))),
        hidden=hidden * 2 if activation == "swiglu" else hidden,
        activation=activation,
        optional=draw(st.booleans()),
        depth=draw(st.integers(1, 2)),
        values=draw(properties.values),
        layout=draw(properties.layouts),
        law=draw(properties.laws(case_type)),
        seed=draw(properties.seeds),
    )


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_prepared_blocks(shard, count):
    properties.explore(cases(), quick=40, full=400, shard=shard, count=count)
