"""Blocks on folded weights: inputs, the exact formula, random cases and their metamorphic properties."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from support import properties
from support.linear import ACTIVATIONS, exact_activation
from vit_fast.kernels import folding, reference
from vit_fast.kernels.activation_names import GATED

HEADS, SCALE, EPS = 2, 0.3, (1e-6, 1e-5)


def block(width, hidden, activation, dtype=torch.float64, optional=True, device="cpu"):
    """norm1, qkv, proj, gamma1, norm2, fc1, fc2, gamma2, as ``folding.prepare_block`` takes them."""

    def linear(rows, columns):
        weight = torch.randn(rows, columns, device=device) * columns**-0.5
        return weight.to(dtype), torch.randn(rows, device=device).to(dtype) if optional else None

    def norm():
        weight, bias = (1 + 0.3 * torch.randn(width, device=device)).to(dtype), torch.randn(width, device=device)
        return (weight, bias.to(dtype)) if optional else (None, None)

    def gamma():
        return (0.5 + torch.rand(width, device=device)).to(dtype) if optional else None

    half = hidden // 2 if activation in GATED else hidden
    return (
        norm(), linear(3 * width, width), linear(width, width), gamma(),
        norm(), linear(hidden, width), linear(width, half), gamma(),
    )  # fmt: skip


def normalised(x, weight, bias, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())


def affine(x, weight, bias):
    return torch.einsum("...k,nk->...n", x, weight.double()) + (0 if bias is None else bias.double())


def formula(x, blocks, activation):
    """The blocks before folding, in float64."""
    x = x.double()
    for norm1, qkv, proj, gamma1, norm2, fc1, fc2, gamma2 in blocks:
        q, k, v = affine(normalised(x, *norm1, EPS[0]), *qkv).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) * SCALE).softmax(-1)
        out = torch.einsum("bhnm,bhmd->bnhd", weights, v).flatten(2)
        x = x + affine(out, *proj) * (1 if gamma1 is None else gamma1.double())
        hidden = exact_activation(affine(normalised(x, *norm2, EPS[1]), *fc1), activation)
        x = x + affine(hidden, *fc2) * (1 if gamma2 is None else gamma2.double())
    return x


def prepared(blocks):
    return folding.flatten(folding.prepare_block(*parts) for parts in blocks)


@dataclass(frozen=True)
class PreparedBlocksCase(properties.Case):
    dtype: str
    batch: int
    tokens: int
    num_heads: int
    head_size: int
    hidden: int  # rows of the first weight of the MLP; a gated activation halves them
    activation: str
    optional: bool  # LayerNorm parameters, biases, gammas
    depth: int
    values: str
    layout: str
    relation: str
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
    def arguments(self):
        return self.num_heads, self.head_size**-0.5, self.activation, 1e-6, 1e-5

    def kernel(self, x, *weights):
        from vit_fast.kernels import prepared_blocks

        return [prepared_blocks.prepared_blocks(x, weights, *self.arguments)]

    def eager(self, x, *weights):
        return [reference.prepared_blocks(x, weights, *self.arguments)]

    def golden(self, x, *weights):
        return [reference.prepared_blocks(x.double(), [weight.double() for weight in weights], *self.arguments)]

    def order(self, x, *weights):
        return [3 * torch.finfo(x.dtype).eps * self.golden(x, *weights)[0].abs().max().item()]

    def relation_layout(self, inputs, results):
        x, *weights = inputs
        self.same_bits(self.kernel(properties.laid_out(x, self.layout), *weights), results)

    def relation_images_permuted(self, inputs, results):
        x, *weights = inputs
        order = properties.permutation(self.batch, self.seed)
        self.same_but_for_order(inputs, self.kernel(x[order], *weights), [results[0][order]])

    def relation_one_image_alone(self, inputs, results):
        x, *weights = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        self.same_but_for_order(inputs, self.kernel(x[image], *weights), [results[0][image]])

    def halves(self, inputs, record):
        """x, and the weights of the first and of the second half of the blocks."""
        x, *weights = inputs
        blocks = folding.unflatten(record, weights)
        return x, *map(folding.flatten, (blocks[: self.depth // 2], blocks[self.depth // 2 :]))

    def relation_halves_of_the_stack(self, inputs, results):
        """Two calls on half the blocks each give the result of one call. In the second, ``row_partials`` computes the
        partials of x, one per row."""
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
        hidden=hidden * 2 if activation in GATED else hidden,
        activation=activation,
        optional=draw(st.booleans()),
        depth=draw(st.integers(1, 2)),
        values=draw(properties.values),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(case_type)),
        seed=draw(properties.seeds),
    )
