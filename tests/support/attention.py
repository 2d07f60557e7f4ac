"""Attention of a random case, its exact formula and its metamorphic properties."""

from dataclasses import dataclass, replace

import torch
from support import properties
from vit_fast.kernels import configs, reference


def formula(qkv, num_heads, scale, k=None, v=None):
    """(out, lse) in float64."""
    q, k, v = qkv.chunk(3, dim=2) if k is None else (qkv, k, v)
    q, k, v = (t.to(torch.float64).reshape(*t.shape[:2], num_heads, -1) for t in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhij,bjhd->bihd", weights / total, v)
    return out.flatten(2), (top + total.log()).squeeze(-1)


@dataclass(frozen=True)
class AttentionCase(properties.Case):
    dtype: str
    batch: int
    queries: int
    keys: int
    num_heads: int
    head_size: int
    packed: bool
    block_m: int
    block_n: int  # 0: resident
    tma: bool
    scale: float
    values: str
    layout: str
    relation: str
    seed: int

    def inputs(self, seed):
        """q, k, v; where packed the packed tensor, None, None."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        width = self.num_heads * self.head_size
        if self.packed:
            return properties.filled((self.batch, self.keys, 3 * width), self.values, generator).to(dtype), None, None
        sizes = (self.queries, self.keys, self.keys)
        return tuple(properties.filled((self.batch, n, width), self.values, generator).to(dtype) for n in sizes)

    def kernel(self, q, k, v, block_m=None, with_lse=True):
        from vit_fast.kernels import attention

        tiles = configs.AttentionConfig(block_m or self.block_m, self.block_n, 4, 2, self.tma)
        return attention._forward(q, self.num_heads, self.scale, k, v, tiles, with_lse)

    def eager(self, q, k, v):
        return reference.attention_fwd(q, self.num_heads, self.scale, k=k, v=v)

    def golden(self, q, k, v):
        return formula(q, self.num_heads, self.scale, k, v)

    def order(self, *inputs):
        """A score, and so the LSE, may change by some ulps of the sum of |products|; the softmax weights follow."""
        q, k, v = (t.double().unflatten(2, (self.num_heads, -1)).abs() for t in self.separate(inputs))
        change = 2.0**-22 * abs(self.scale) * torch.einsum("bihd,bjhd->bhij", q, k).max().item()
        return change * v.max().item(), change

    def separate(self, inputs):
        return inputs[0].chunk(3, 2) if self.packed else inputs

    def heads(self, t):
        return t.unflatten(2, (-1, self.num_heads, self.head_size))

    def relation_layout(self, inputs, results):
        self.same_bits(self.kernel(*properties.all_laid_out(self.layout, *inputs)), results)

    def relation_one_image_alone(self, inputs, results):
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        self.same_bits(self.kernel(*properties.each(lambda t: t[image], *inputs)), [t[image] for t in results])

    def relation_images_permuted(self, inputs, results):
        order = properties.permutation(self.batch, self.seed)
        self.same_bits(self.kernel(*properties.each(lambda t: t[order], *inputs)), [t[order] for t in results])

    def relation_heads_permuted(self, inputs, results):
        order = properties.permutation(self.num_heads, self.seed)

        def permuted(t):
            return self.heads(t)[:, :, :, order].flatten(2)

        out, lse = results
        self.same_bits(self.kernel(*properties.each(permuted, *inputs)), (permuted(out), lse[:, order]))

    def relation_queries_permuted(self, inputs, results):
        q, k, v = self.separate(inputs)
        order = properties.permutation(q.shape[1], self.seed)
        self.same_rows(inputs, self.kernel(q[:, order], k, v), (results[0][:, order], results[1][:, :, order]))

    def relation_rows_per_program(self, inputs, results):
        """The sums of a row do not depend on the number of rows of a program."""
        self.same_rows(inputs, self.kernel(*inputs, block_m=32 if self.block_m == 16 else 16), results)

    def same_rows(self, inputs, actual, expected):
        """Equal up to rounding: numpy's products, exp2 and log2 depend on a row's place in its tile, a GPU's do not."""
        sizes = self.separate(inputs)[2].abs().max(), expected[1].abs().max() + 8
        for one, other, size, change in zip(actual, expected, sizes, self.order(*inputs), strict=True):
            assert (one - other).abs().max() <= 2 * torch.finfo(one.dtype).eps * size + change

    def relation_powers_of_two(self, inputs, results):
        q, k, v = self.separate(inputs)
        if properties.can_shrink(k, v, results[0]) and (q * 4).isfinite().all():
            out, lse = self.kernel(q * 4, k / 4, v / 4)
            self.same_bits((out * 4, lse), results)

    def relation_zero_channels(self, inputs, results):
        """Zero channels appended to each head, up to the next multiple of 16 (the kernel's padding), change nothing."""
        size = -(-self.head_size // 16) * 16

        def padded(t):
            return torch.nn.functional.pad(self.heads(t), (0, size - self.head_size)).flatten(2)

        wide = replace(self, head_size=size)
        out, lse = wide.kernel(*properties.each(padded, *inputs))
        out = wide.heads(out)
        assert not out[..., self.head_size :].any()
        self.same_bits((out[..., : self.head_size].flatten(2), lse), results)

    def relation_without_lse(self, inputs, results):
        out, lse = self.kernel(*inputs, with_lse=False)
        assert lse is None
        self.same_bits([out], results[:1])
