"""Patch embedding of a random case, its exact result and its metamorphic properties."""

from dataclasses import dataclass, replace

import torch
from support import properties
from vit_fast.kernels import reference
from vit_fast.kernels.configs import PatchEmbedConfig


def golden(images, weight, bias, pos_embed, prefix_tokens, stride, mean=None, std=None):
    pixels = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    channels = images.shape[1]
    if mean is not None:
        pixels = pixels - torch.tensor(mean, dtype=torch.float64).reshape(1, channels, 1, 1)
    if std is not None:
        pixels = pixels / torch.tensor(std, dtype=torch.float64).reshape(1, channels, 1, 1)
    rows = []
    for y in range(0, images.shape[2] - weight.shape[2] + 1, stride[0]):
        for x in range(0, images.shape[3] - weight.shape[3] + 1, stride[1]):
            rows.append(pixels[:, :, y : y + weight.shape[2], x : x + weight.shape[3]].flatten(1))
    tokens = torch.stack(rows, 1) @ weight.double().flatten(1).T
    if bias is not None:
        tokens = tokens + bias.double()
    if pos_embed is not None:
        tokens = tokens + pos_embed.double()
    if prefix_tokens is not None:
        prefix = prefix_tokens.to(weight.dtype).double().expand(images.shape[0], -1, -1)
        tokens = torch.cat([prefix, tokens], 1)
    return tokens


@dataclass(frozen=True)
class PatchEmbedCase(properties.Case):
    dtype: str
    pixels: str
    side_dtype: str
    batch: int
    channels: int
    size: tuple
    patch: tuple
    stride: tuple
    dim: int
    prefix: int  # -1: None
    per_image: bool
    bias: bool
    pos: bool
    normalised: bool
    channels_last: bool
    block_m: int
    block_n: int
    block_k: int
    layout: str
    relation: str
    seed: int

    def inputs(self, seed, draw=properties.filled):
        """images, weight, bias, pos_embed, prefix_tokens."""
        generator, dtype = properties.generator_of(seed), properties.DTYPES[self.dtype]
        side = properties.DTYPES[self.side_dtype]
        shape = (self.batch, self.channels, *self.size)
        if self.pixels == "uint8":
            images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        else:
            images = draw(shape, "normal", generator).to(properties.DTYPES[self.pixels])
        weight = draw((self.dim, self.channels, *self.patch), "normal", generator)
        if draw is properties.filled:
            weight = weight * (self.channels * self.patch[0] * self.patch[1]) ** -0.5
        rows, columns = ((n - p) // s + 1 for n, p, s in zip(self.size, self.patch, self.stride, strict=True))
        bias = draw((1, self.dim), "normal", generator)[0].to(dtype)
        pos = draw((1, rows * columns, self.dim), "normal", generator).to(side)
        prefix = draw((self.batch if self.per_image else 1, max(self.prefix, 0), self.dim), "normal", generator)
        return (
            images.contiguous(memory_format=torch.channels_last) if self.channels_last else images,
            weight.to(dtype),
            bias if self.bias else None,
            pos if self.pos else None,
            prefix.to(side) if self.prefix >= 0 else None,
        )

    def options(self):
        """stride, mean, std."""
        if not self.normalised:
            return self.stride, None, None
        return self.stride, (0.485, 0.456, 0.406, 0.5)[: self.channels], (0.229, 0.224, 0.225, 0.5)[: self.channels]

    def kernel(self, *inputs):
        from vit_fast.kernels import patch_embed

        tiles = PatchEmbedConfig(self.block_m, self.block_n, self.block_k, 4, 2)
        return [patch_embed.patch_embed(*inputs, *self.options(), config=tiles)]

    def eager(self, *inputs):
        return [reference.patch_embed(*inputs, *self.options())]

    def golden(self, *inputs):
        return [golden(*inputs, *self.options())]

    def order(self, images, weight, *_):
        """Some ulps of the sum of |products|; normalised pixels are at most 5 in absolute value here."""
        largest = 12.0 if self.normalised else images.double().abs().max().item()
        return [2.0**-22 * largest * weight.double().abs().sum((1, 2, 3)).max().item()]

    def relation_layout_of_images(self, inputs, results):
        """Another memory layout may change the order in which k is walked, and so the rounding of the sums."""
        images, *rest = inputs
        if self.channels_last or self.channels == 1:
            return self.relation_program_order(inputs, results)
        view = properties.laid_out(images, self.layout)
        if not (view.stride(1) == 1 and view.stride(3) == self.channels):
            self.same_bits(self.kernel(view, *rest), results)

    def relation_layout_of_the_rest(self, inputs, results):
        images, *rest = inputs
        self.same_bits(self.kernel(images, *properties.all_laid_out(self.layout, *rest)), results)

    def relation_one_image_alone(self, inputs, results):
        images, *rest, prefix = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        prefix = prefix[image] if prefix is not None and self.per_image else prefix
        self.same_but_for_order(inputs, self.kernel(images[image], *rest, prefix), [results[0][image]])

    def relation_prefix_as_it_stands(self, inputs, results):
        prefix = inputs[-1]
        if prefix is not None:
            wanted = prefix.to(results[0].dtype).expand(self.batch, -1, -1)
            self.same_bits([results[0][:, : prefix.shape[1]]], [wanted])

    def relation_integers(self, inputs, results):
        """Small integers have exact sums: only the rounding to the result's dtype is left."""
        plain = replace(self, pixels=self.dtype, normalised=False)
        integers = plain.inputs(self.seed, lambda shape, _, generator: properties.integers(shape, 3, generator))
        out, wanted = plain.kernel(*integers)[0], plain.golden(*integers)[0]
        assert torch.equal(out, wanted.to(out.dtype))
