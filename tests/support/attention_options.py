"""Attention with options of a random case, its exact formula and its metamorphic properties."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from support import properties
from vit_fast.kernels import configs, reference

IMAGE_TABLES = ("bias", "height", "width", "cos", "sin", "key_lengths")


def _normalised(x, norm, kind):
    weight, bias, eps = norm
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def _turned(x, rope, layout, num_prefix):
    """Pair by pair: (a, b) at channels (i, j) becomes (a·cos_i − b·sin_i, b·cos_j + a·sin_j)."""
    size, out = x.shape[-1], x.clone()
    cos, sin = (table.double() for table in rope)
    for pair in range(size // 2):
        i, j = (pair, pair + size // 2) if layout == "half" else (2 * pair, 2 * pair + 1)
        a, b = x[:, :, num_prefix:, i], x[:, :, num_prefix:, j]
        out[:, :, num_prefix:, i] = a * cos[..., i] - b * sin[..., i]
        out[:, :, num_prefix:, j] = b * cos[..., j] + a * sin[..., j]
    return out


def heads(qkv, num_heads, k=None, v=None, *, rope=None, rope_layout="half", num_prefix=0, q_norm=None, k_norm=None,
          norm="layer", **_):  # fmt: skip
    """q, k, v [B, H, N, D] in float64, as the scores see them."""
    q, k, v = qkv.chunk(3, dim=2) if k is None else (qkv, k, v)
    q, k, v = (t.double().unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    q, k = (x if of is None else _normalised(x, of, norm) for x, of in ((q, q_norm), (k, k_norm)))
    if rope is not None:
        q, k = (_turned(x, rope, rope_layout, num_prefix) for x in (q, k))
    return q, k, v


def formula(qkv, num_heads, scale, k=None, v=None, *, bias=None, rel_pos=None, key_lengths=None, cu_seqlens=None,
            **options):  # fmt: skip
    """(out, lse) in float64; a query without keys has the output 0 and the LSE −∞."""
    q, k, v = heads(qkv, num_heads, k, v, **options)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if bias is not None:
        scores = scores + bias.double()
    if rel_pos is not None:
        height, width = (part.double() for part in rel_pos)
        for key in range(k.shape[2]):
            row, column = divmod(key, width.shape[3])
            scores[..., key] += height[..., row] + width[..., column]
    for image, length in enumerate([] if key_lengths is None else key_lengths.tolist()):
        scores[image, :, :, max(length, 0) :] = -math.inf
    if cu_seqlens is not None:
        own = torch.full(scores.shape[-2:], -math.inf, dtype=torch.float64)
        for first, end in itertools.pairwise(cu_seqlens.tolist()):
            own[first:end, first:end] = 0.0
        scores = scores + own
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhij,bhjd->bhid", weights / total.masked_fill(total == 0, 1.0), v)
    return out.transpose(1, 2).flatten(2), (top + total.log()).squeeze(-1)


@dataclass(frozen=True)
class AttentionOptionsCase(properties.Case):
    dtype: str
    batch: int
    rows: int  # of a grid of tokens
    columns: int
    num_heads: int
    pairs: int  # of channels of a head
    value_size: int  # of a head of v; 0: packed qkv
    rope: str  # "", or a layout
    tables: str  # of rope: "shared", "image" or "head", by what there is one of
    num_prefix: int
    norm: str  # "", "layer" or "rms"
    bias: str  # "", "full", "key" (one row for all queries) or "masked"
    rel_pos: bool
    lengths: str  # "", "keys" or "sequences"
    block_m: int
    block_n: int
    scale: float
    values: str
    layout: str
    relation: str
    seed: int

    def inputs(self, seed):
        """{qkv, k, v, and the options by name}."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        tokens, size, wide = self.rows * self.columns, 2 * self.pairs, torch.promote_types(dtype, torch.float32)
        batch = 1 if self.lengths == "sequences" else self.batch

        def normal(*shape, dtype=wide):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        x = properties.filled((batch, tokens, 3 * self.num_heads * size), self.values, generator).to(dtype)
        given = dict(qkv=x)
        if self.value_size:
            q, k, _ = x.chunk(3, dim=2)
            v = properties.filled((batch, tokens, self.num_heads * self.value_size), self.values, generator)
            given = dict(qkv=q, k=k, v=v.to(dtype))
        if self.rope:
            shape = {"shared": (), "image": (batch, 1), "head": (1, self.num_heads)}[self.tables]
            of = dtype if seed % 2 else wide
            angle = normal(*shape, tokens - self.num_prefix, size, dtype=torch.float64)
            given |= dict(rope=(angle.cos().to(of), angle.sin().to(of)), rope_layout=self.rope)
            given |= dict(num_prefix=self.num_prefix)
        if self.norm:
            given |= dict(q_norm=(normal(size), normal(size), 1e-5), k_norm=(normal(size), None, 1e-6), norm=self.norm)
        if self.bias and self.lengths != "sequences":
            bias = normal(1, self.num_heads, 1 if self.bias == "key" else tokens, tokens, dtype=dtype)
            if self.bias == "masked":
                bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.5, -math.inf)
            given |= dict(bias=bias)
        if self.rel_pos and self.lengths != "sequences":
            shape = (batch, self.num_heads, tokens)
            given |= dict(rel_pos=(normal(*shape, self.rows, dtype=dtype), normal(*shape, self.columns, dtype=dtype)))
        if self.lengths == "keys":
            given |= dict(key_lengths=torch.randint(-1, tokens + 3, (batch,), generator=generator))
        if self.lengths == "sequences":
            cuts = torch.randint(0, tokens + 1, (self.batch,), generator=generator).sort().values
            given |= dict(cu_seqlens=torch.tensor([0, *cuts.tolist(), tokens], dtype=torch.int32))
        return (given,)

    def arguments(self, given):
        options = dict(given)
        return (options.pop("qkv"), self.num_heads, self.scale, options.pop("k", None), options.pop("v", None)), options

    def kernel(self, given):
        from vit_fast.kernels import attention

        arguments, options = self.arguments(given)
        tiles = configs.AttentionConfig(self.block_m, self.block_n, 4, 2, True)
        return self.comparable(attention._forward(*arguments, tiles, True, **options))

    def eager(self, given):
        (qkv, num_heads, scale, k, v), options = self.arguments(given)
        return self.comparable(reference.attention_fwd(qkv, num_heads, scale, k=k, v=v, **options))

    def golden(self, given):
        arguments, options = self.arguments(given)
        return self.comparable(formula(*arguments, **options))

    @staticmethod
    def comparable(results):
        """The LSE of a query without keys, −∞, as a number that no other LSE has."""
        out, lse = results
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    def order(self, given):
        (qkv, num_heads, scale, k, v), options = self.arguments(given)
        q, k, v = (t.abs() for t in heads(qkv, num_heads, k, v, **options))
        change = 2.0**-21 * (abs(scale) * torch.einsum("bhid,bhjd->bhij", q, k).max().item() + 8)
        return change * v.max().item(), change

    def relation_layout(self, inputs, results):
        (given,) = inputs
        names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
        moved = dict(zip(names, properties.all_laid_out(self.layout, *(given[name] for name in names))))
        for name in ("rope", "rel_pos"):
            if name in given:
                moved[name] = tuple(properties.all_laid_out(self.layout, *given[name]))
        for name in ("q_norm", "k_norm"):
            if name in given:
                *vectors, eps = given[name]
                moved[name] = (*properties.each(lambda t: properties.laid_out(t, "every other"), *vectors), eps)
        self.same_bits(self.kernel(given | moved), results)

    def of_images(self, given, index):
        """The case of some of the images."""
        batch = given["qkv"].shape[0]

        def picked(t):
            return t[index] if isinstance(t, torch.Tensor) and t.shape[0] == batch else t

        some = {name: picked(value) for name, value in given.items() if name not in ("rope", "rel_pos", "bias")}
        for name in ("rope", "rel_pos"):
            if name in given:
                some[name] = tuple(picked(t) if t.dim() == 4 else t for t in given[name])
        return some | ({"bias": given["bias"]} if "bias" in given else {})

    def relation_images_permuted(self, inputs, results):
        (given,) = inputs
        if self.lengths != "sequences" and self.tables != "head":
            order = properties.permutation(self.batch, self.seed)
            self.same_bits(self.kernel(self.of_images(given, order)), [t[order] for t in results])

    def relation_sequences_alone(self, inputs, results):
        """Each sequence in a call of its own, without the others: no bit changes."""
        (given,) = inputs
        if self.lengths != "sequences" or self.num_prefix:
            return
        bounds = given["cu_seqlens"].tolist()
        for first, end in itertools.pairwise(bounds):
            if first == end:
                continue
            alone = {name: value for name, value in given.items() if name != "cu_seqlens"}
            for name in ("qkv", "k", "v"):
                if name in given:
                    alone[name] = given[name][:, first:end]
            if "rope" in given:
                alone["rope"] = tuple(table[..., first:end, :] for table in given["rope"])
            out, lse = self.kernel(alone)
            self.same_bits((out, lse), (results[0][:, first:end], results[1][:, :, first:end]))

    def relation_all_keys(self, inputs, results):
        """Lengths that leave out no key, and one sequence of all tokens, change no bit."""
        (given,) = inputs
        if self.lengths:
            return
        tokens = self.rows * self.columns
        self.same_bits(self.kernel(given | dict(key_lengths=torch.full((self.batch,), tokens))), results)
        if self.batch == 1 and "bias" not in given and "rel_pos" not in given:
            one = torch.tensor([0, tokens], dtype=torch.int32)
            self.same_bits(self.kernel(given | dict(cu_seqlens=one)), results)

    def relation_tables_of_no_turn(self, inputs, results):
        (given,) = inputs
        if not self.rope:
            tables = torch.ones(1, 2 * self.pairs), torch.zeros(1, 2 * self.pairs)
            dtype = torch.promote_types(given["qkv"].dtype, torch.float32)
            tables = tuple(t.expand(self.rows * self.columns, -1).to(dtype) for t in tables)
            for layout in ("half", "interleaved"):
                self.same_bits(self.kernel(given | dict(rope=tables, rope_layout=layout)), results)

    def relation_bias_of_zero(self, inputs, results):
        (given,) = inputs
        if "bias" not in given and self.lengths != "sequences":
            zero = torch.zeros(1, 1, 1, 1, dtype=given["qkv"].dtype)
            actual = self.kernel(given | dict(bias=zero.expand(1, 1, 1, self.rows * self.columns)))
            for one, other, order in zip(actual, results, self.order(given), strict=True):
                allowed = 2 * torch.finfo(other.dtype).eps * (other.abs().max() + 8) + order
                assert (one - other).abs().max() <= allowed

    def relation_what_lies_behind_the_keys(self, inputs, results):
        """NaN in keys and values that an image does not have reaches nothing, if its queries are its own."""
        (given,) = inputs
        if self.lengths == "keys" and self.value_size:
            k, v = given["k"].clone(), given["v"].clone()
            for image, length in enumerate(given["key_lengths"].tolist()):
                k[image, max(length, 0) :], v[image, max(length, 0) :] = math.nan, math.nan
            self.same_bits(self.kernel(given | dict(k=k, v=v)), results)

    def relation_tiles(self, inputs, results):
        """Another number of queries in a program changes rounding alone."""
        (given,) = inputs
        actual = replace(self, block_m=32 if self.block_m == 16 else 16).kernel(given)
        for one, other, order in zip(actual, results, self.order(given), strict=True):
            allowed = 2 * torch.finfo(other.dtype).eps * (other.abs().max() + 8) + order
            assert (one - other).abs().max() <= allowed
