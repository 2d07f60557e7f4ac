"""Gradients of attention of a random case, their exact formula and metamorphic properties."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from support import properties
from support.attention_options import formula
from vit_fast.kernels import configs, reference


def tiles(block_m, block_n, tma=False, queries=None):
    """A config of few warps: keys in blocks of ``block_n``, and dq by blocks of ``queries`` (default ``block_m``)."""
    by_keys = configs.AttentionConfig(block_m, block_n, 4, 1, tma)
    return configs.AttentionBwdConfig(by_keys, configs.AttentionConfig(queries or block_m, block_n, 4, 1))


def autograd(run, grad, tensors, *arguments, **options):
    """The gradients of ``run(q, k, v, …)`` (of packed qkv where k is None) with respect to the tensors, as a list."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    qkv, k, v = leaves
    out = run(qkv, *arguments, k=k, v=v, **options)
    out.backward(grad.to(out.dtype))
    return [leaf.grad for leaf in leaves if leaf is not None]


def _dropped(qkv, num_heads, scale, k, v, dropout_p, seed, key_lengths=None):
    """The output with dropout, in float64, whose scale the reference rounds to float32."""
    q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (qkv.chunk(3, 2) if k is None else (qkv, k, v)))
    mask = reference.score_mask(q, k, None, None, key_lengths, None)
    p = reference.attention_weights(q, k, scale, mask)
    kept = reference.dropout_mask(seed, p.shape, dropout_p, p.device) > 0
    return ((p * kept / (1 - dropout_p)) @ v).transpose(1, 2).flatten(2)


def exact(grad, tensors, num_heads, scale, **options):
    """The gradients in float64."""

    def run(qkv, num_heads, scale, k, v, **options):
        return formula(qkv, num_heads, scale, k, v, **options)[0]

    tensors = [t if t is None else t.double() for t in tensors]
    return autograd(_dropped if "seed" in options else run, grad, tensors, num_heads, scale, **options)


def eager(grad, tensors, num_heads, scale, **options):
    """The gradients by autograd of the reference. Heads of v of another size are filled up with zeros, because PyTorch
    computes those in float32."""
    qkv, k, v = tensors
    if k is None or v.shape == k.shape:
        return autograd(reference.attention, grad, tensors, num_heads, scale, **options)
    sizes = [t.shape[2] // num_heads for t in (qkv, k, v)]

    def padded(t, size):
        return torch.nn.functional.pad(t.unflatten(2, (num_heads, -1)), (0, max(sizes) - size)).flatten(2)

    wide = [padded(t, size) for t, size in zip(tensors, sizes, strict=True)]
    grads = autograd(reference.attention, padded(grad, sizes[2]), wide, num_heads, scale, **options)
    return [t.unflatten(2, (num_heads, -1))[..., :size].flatten(2) for t, size in zip(grads, sizes, strict=True)]


def kernel_gradients(grad, tensors, num_heads, scale, config=None, forward=None, **options):
    """(out, the gradients as a list) of the kernels."""
    from vit_fast.kernels import attention, attention_bwd

    qkv, k, v = tensors
    forward = forward or configs.AttentionConfig(16, 16, 4, 1)
    out, lse = attention.attention_fwd(qkv, num_heads, scale, k=k, v=v, config=forward, **options)
    grads = attention_bwd.attention_bwd(grad, qkv, num_heads, scale, k, v, out, lse, config=config, **options)
    return out, list(grads[: 1 if k is None else 3])


@dataclass(frozen=True)
class AttentionBwdCase(properties.Case):
    kind: ClassVar[str] = "gradient"

    dtype: str
    batch: int
    queries: int
    keys: int
    num_heads: int
    head_size: int
    value_size: int  # 0: packed, of as many queries as keys
    block_m: int
    block_n: int
    tma: bool
    lengths: bool  # whether images have lengths of keys
    dropout: bool
    scale: float
    values: str
    layout: str
    relation: str
    seed: int

    def inputs(self, seed):
        """grad, q, k, v (packed: qkv, None, None), key lengths or None."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        value_size = self.value_size or self.head_size

        def filled(tokens, size, values):
            return properties.filled((self.batch, tokens, self.num_heads * size), values, generator).to(dtype)

        lengths = None
        if self.lengths:  # with dropout the reference's own gradients of a query without keys are NaN
            lengths = torch.randint(1 if self.dropout else -1, self.keys + 3, (self.batch,), generator=generator)
        if not self.value_size:
            x = filled(self.keys, 3 * self.head_size, self.values)
            return filled(self.keys, self.head_size, "normal"), x, None, None, lengths
        q, k = (filled(n, self.head_size, self.values) for n in (self.queries, self.keys))
        return filled(self.queries, value_size, "normal"), q, k, filled(self.keys, value_size, self.values), lengths

    def options(self, lengths):
        options = {} if lengths is None else dict(key_lengths=lengths)
        return options | (dict(dropout_p=0.3, seed=torch.tensor([self.seed - 2**30])) if self.dropout else {})

    def kernel(self, grad, q, k, v, lengths):
        config = tiles(self.block_m, self.block_n, self.tma)
        options = self.options(lengths)
        return kernel_gradients(grad, (q, k, v), self.num_heads, self.scale, config, **options)[1]

    def eager(self, grad, q, k, v, lengths):
        return eager(grad, (q, k, v), self.num_heads, self.scale, **self.options(lengths))

    def golden(self, grad, q, k, v, lengths):
        return exact(grad, (q, k, v), self.num_heads, self.scale, **self.options(lengths))

    def order(self, grad, q, k, v, lengths):
        """A score may change by some ulps of its sum of |products|, and so may dP and delta; what follows adds up. With
        dropout delta and the sum of P∘dP differ by the rounding of out, also where they cancel, as of a single key."""
        q, k, v = q.chunk(3, 2) if k is None else (q, k, v)
        q, k, v, dout = (t.double().unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v, grad))
        mask = reference.score_mask(q, k, None, None, lengths, None)
        p, ulp, scale = reference.attention_weights(q, k, self.scale, mask), 2.0**-22, abs(self.scale)
        q, k, v, dout = (t.abs() for t in (q, k, v, dout))
        dp, p_change = dout @ v.transpose(2, 3), p * 2 * ulp * (scale * (q @ k.transpose(2, 3)).amax(3, True) + 4)
        ds_change = (p_change + ulp * p) * (dp + (p * dp).sum(3, True))
        if self.dropout:
            ds_change = ds_change + p * torch.finfo(grad.dtype).eps * (dout * (p @ v)).sum(3, True)
        changes = ds_change @ k * scale, ds_change.transpose(2, 3) @ q * scale, p_change.transpose(2, 3) @ dout
        changes = [change.max().item() * (2 if self.dropout else 1) for change in changes]
        return changes if self.value_size else [max(changes)]

    def relation_layout(self, inputs, results):
        *tensors, lengths = inputs
        laid = properties.all_laid_out(self.layout, *tensors)
        self.same_bits(self.kernel(*laid, properties.laid_out(lengths, "every other")), results)

    def relation_images_permuted(self, inputs, results):
        if not self.dropout:
            order = properties.permutation(self.batch, self.seed)
            permuted = properties.each(lambda t: t[order], *inputs)
            self.same_bits(self.kernel(*permuted), [t[order] for t in results])

    def relation_one_image_alone(self, inputs, results):
        """Of the first image also with dropout, whose mask begins with it."""
        image = 0 if self.dropout else self.seed % self.batch
        alone = properties.each(lambda t: t[image : image + 1], *inputs)
        self.same_bits(self.kernel(*alone), [t[image : image + 1] for t in results])

    def relation_heads_permuted(self, inputs, results):
        if self.dropout:
            return
        order = properties.permutation(self.num_heads, self.seed)
        parts = 1 if self.value_size else 3

        def permuted(t, parts=1):
            return t.unflatten(2, (parts, self.num_heads, -1))[:, :, :, order].flatten(2)

        grad, q, k, v, lengths = inputs
        moved = permuted(grad), permuted(q, parts), *properties.each(permuted, k, v), lengths
        self.same_bits(self.kernel(*moved), [permuted(t, parts) for t in results])

    def relation_separate_tensors(self, inputs, results):
        grad, qkv, k, _, lengths = inputs
        if k is None:
            grads = replace(self, value_size=self.head_size).kernel(grad, *qkv.chunk(3, 2), lengths)
            self.same_bits([torch.cat(grads, 2)], results)

    def relation_zero_channels(self, inputs, results):
        """Zero channels appended to each head, up to the next multiple of 16 (the kernel's padding), change nothing."""
        grad, q, k, v, lengths = inputs
        parts, size = 1 if self.value_size else 3, -(-self.head_size // 16) * 16

        def padded(t, parts=1):
            heads = t.unflatten(2, (parts, self.num_heads, -1))
            return torch.nn.functional.pad(heads, (0, size - self.head_size)).flatten(2)

        wide = replace(self, head_size=size)
        if self.value_size:
            results, moved = results[:2], (grad, padded(q), padded(k), v, lengths)
        else:
            moved = padded(grad), padded(q, 3), None, None, lengths
        expected = [padded(t, parts) for t in results]
        self.same_bits(wide.kernel(*moved)[: len(expected)], expected)

    def relation_grad_doubled(self, inputs, results):
        grad, *rest = inputs
        if all(t.isfinite().all() and properties.can_shrink(t) for t in results) and properties.can_shrink(grad):
            self.same_bits([t * 4 for t in self.kernel(grad / 4, *rest)], results)

    def relation_key_blocks(self, inputs, results):
        """dk and dv of a key do not depend on the keys beside it in a program."""
        if not self.value_size:
            return
        other = replace(self, block_n=32 if self.block_n == 16 else 16).kernel(*inputs)
        for one, result, order in zip(other[1:], results[1:], self.order(*inputs)[1:], strict=True):
            assert (one - result).abs().max() <= 4 * torch.finfo(result.dtype).eps * result.abs().max() + order

    def relation_all_keys(self, inputs, results):
        *tensors, lengths = inputs
        if lengths is None:
            self.same_bits(self.kernel(*tensors, torch.full((self.batch,), self.keys)), results)

    def relation_what_lies_behind_the_keys(self, inputs, results):
        """NaN in keys and values that an image does not have reaches nothing, if its queries are its own."""
        grad, q, k, v, lengths = inputs
        if self.lengths and self.value_size:
            k, v = k.clone(), v.clone()
            for image, length in enumerate(lengths.tolist()):
                k[image, max(length, 0) :], v[image, max(length, 0) :] = float("nan"), float("nan")
            self.same_bits(self.kernel(grad, q, k, v, lengths), results)
