"""The convolution that projects patches, where a library keeps it outside of a class of its own for patch embedding.

transformers, torchvision and open_clip hold an ``nn.Conv2d`` (``nn.Conv3d`` for videos) under one of a few names and
flatten what it returns. Its fast class runs ``ops.patch_embed``, whose tokens are returned as the convolution returns
them, [B, C, rows, columns]; the library's flattening then is a view. A linear layer that projects patches stays: it is
one product by PyTorch, with nothing to fuse.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vit_fast import ops
from vit_fast.kernels.tracing import autocasts
from vit_fast.plain import TENSORS

from . import Found, Fused, not_dense

# What the libraries call a patch embedding, and the projection inside of one.
_EMBEDDINGS = (
    "patch_embed", "embeds", "patch_embedding", "patch_embeddings", "patch_conv", "patch_projection",
    "video_patch_projection", "conv_proj",
)  # fmt: skip
_PROJECTIONS = ("proj", "projection")


def embeds_patches(name: str, module: nn.Module) -> bool:
    """Whether a module of this name is a patch embedding; conv1 may also be a convolution behind the blocks."""
    key = name.rpartition(".")[2]
    if key == "conv1":
        return isinstance(module, nn.Conv2d) and module.stride[0] > 1
    return key in _EMBEDDINGS


def why_not(module: nn.Module) -> str:
    """Why a patch embedding, or the projection inside of one, stays PyTorch's."""
    parts = [module._modules[key] for key in _PROJECTIONS if key in module._modules] or [module]
    for part in parts:
        if isinstance(part, nn.Linear):
            return "its projection of patches is a linear layer of PyTorch"
        if type(part) in FAST and (reason := _not_covered(part)):
            return f"its convolution stays: {reason}"
    return f"{type(module).__module__}.{type(module).__qualname__} is not a class that vit_fast fuses"


def _not_covered(conv: Any) -> str | None:
    if conv.dilation != (1,) * len(conv.dilation) or conv.groups != 1:
        return "it is dilated or grouped"
    if conv.padding not in ("valid", (0,) * len(conv.stride)):
        return "it is padded"
    if conv.stride != conv.kernel_size and min(conv.stride) == 1:
        return "its patches overlap at every step"
    for tensor in (conv.weight, conv.bias):
        if tensor is not None and type(tensor) not in TENSORS:
            return f"it holds a {type(tensor).__name__}"
    return None


def _not_taken(conv: Any, x: torch.Tensor) -> str | None:
    """Why PyTorch would refuse or cast these images, or the operation does not take them, or None."""
    if reason := not_dense(x, conv.weight.dim()):
        return reason
    if autocasts(x.device.type):
        return "autocast is on"
    if x.dtype != conv.weight.dtype:
        return f"the images are {x.dtype}, the weights are {conv.weight.dtype}"
    if x.shape[1] != conv.in_channels:
        return f"the images have {x.shape[1]} channels, not {conv.in_channels}"
    if any(size < kernel for size, kernel in zip(x.shape[2:], conv.kernel_size, strict=True)):
        return "the images are smaller than a patch"
    return None


class FastPatchConv2d(Fused, nn.Conv2d):
    """[B, in, H, W] → [B, C, rows, columns], whose channels are the last in memory."""

    OPERATION = "patch_embed"

    def not_covered(self) -> str | None:
        return _not_covered(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if reason := self.not_fused() or _not_taken(self, input):
            return self.run_library(reason, input)
        return _images_of(input, self.weight, self.bias, self.stride)


def _images_of(images, weight, bias, stride):
    """``F.conv2d`` by ``ops.patch_embed``."""
    grid = [(size - kernel) // step + 1 for size, kernel, step in zip(images.shape[2:], weight.shape[2:], stride)]
    return ops.patch_embed(images, weight, bias, None, None, stride).transpose(1, 2).unflatten(2, grid)


class FastPatchConv3d(Fused, nn.Conv3d):
    """[B, in, T, H, W] → [B, C, frames, rows, columns]: the frames that a patch has are as many channels of an image.
    Patches that come as a batch of their own are rows of a linear layer."""

    OPERATION = "patch_embed"

    def not_covered(self) -> str | None:
        reason = _not_covered(self)
        return reason or (None if self.stride == self.kernel_size else "its patches overlap")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        reason = self.not_fused() or _not_taken(self, input)
        frames = self.kernel_size[0]
        if reason is None and input.shape[2] % frames:
            reason = f"{input.shape[2]} frames are no whole number of {frames}"
        if reason is not None:
            return self.run_library(reason, input)
        if input.shape[2:] == self.kernel_size:
            y = ops.linear(input.flatten(1), self.weight.flatten(1), self.bias)
            return y[:, :, None, None, None]
        images = input.transpose(1, 2).unflatten(1, (-1, frames)).flatten(2, 3).flatten(0, 1)
        y = _images_of(images, self.weight.transpose(1, 2).flatten(1, 2), self.bias, self.stride[1:])
        return y.unflatten(0, (input.shape[0], -1)).transpose(1, 2)


FAST: dict[type[nn.Module], type[Fused]] = {nn.Conv2d: FastPatchConv2d, nn.Conv3d: FastPatchConv3d}


def find(model: nn.Module) -> Iterator[Found]:
    """(name, module, class of PyTorch) of each convolution that projects patches, but for those that the forward of one
    of vit_fast's own classes reads."""
    for name, module in model.named_modules():
        for part, owner in _candidates(model, name, module):
            conv = model.get_submodule(part)
            cls = next((cls for cls, fast in FAST.items() if type(conv) in (cls, fast)), None)
            if cls is not None and not owner.__module__.startswith("vit_fast."):
                yield part, conv, cls


def _candidates(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[str, type]]:
    """(name, class of the module that holds it) of what may project the patches of a patch embedding."""
    if name and embeds_patches(name, module):
        yield name, type(model.get_submodule(name.rpartition(".")[0]))
        yield from ((f"{name}.{key}", type(module)) for key in _PROJECTIONS if key in module._modules)
