"""timm's ``PatchEmbed`` in one operation, and its normalisation where it has one.

Source: timm/layers/patch_embed.py.
"""

from typing import Any

import timm.layers as layers
import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn

from vit_fast import ops
from vit_fast.integrations import Fused, not_dense
from vit_fast.kernels.tracing import autocasts
from vit_fast.plain import submodules

from .parts import NORM_OR_NONE, normalise


class FastPatchEmbed(Fused, PatchEmbed):
    """timm's PatchEmbed in one operation: [B, in_chans, H, W] → [B, N, C] or [B, rows, columns, C]."""

    OPERATION = "patch_embed"
    SUBMODULES = submodules(proj=(nn.Conv2d,), norm=NORM_OR_NONE)
    proj: Any
    norm: Any

    def not_covered(self) -> str | None:
        proj = self.proj
        if not self.flatten and self.output_fmt != layers.Format.NHWC:
            return "its output has the channels in front"
        if proj.stride != tuple(self.patch_size) or proj.kernel_size != proj.stride:
            return "proj does not go in steps of patch_size"
        return None

    def _not_taken(self, x):
        """Why timm would refuse, pad or cast images of this size or dtype, or None."""
        if reason := not_dense(x, 4):
            return reason
        if autocasts(x.device.type):
            return "autocast is on"
        if x.dtype != self.proj.weight.dtype:
            return f"the images are {x.dtype}, the weights are {self.proj.weight.dtype}"
        size = tuple(x.shape[2:])
        if self.img_size is not None and self.strict_img_size and size != tuple(self.img_size):
            return f"the images are {size[0]}×{size[1]}, not {self.img_size[0]}×{self.img_size[1]}"
        whole = size[0] % self.patch_size[0] == size[1] % self.patch_size[1] == 0
        if not whole and (getattr(self, "dynamic_img_pad", False) or not self.strict_img_size):
            return f"images of {size[0]}×{size[1]} are no whole number of patches"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if reason := self.not_fused() or self._not_taken(x):
            return self.run_library(reason, x)
        proj = self.proj
        tokens = normalise(ops.patch_embed(x, proj.weight, proj.bias, None, None, proj.stride), self.norm)
        return tokens if self.flatten else tokens.unflatten(1, (-1, x.shape[3] // proj.stride[1]))


FAST: dict[type[nn.Module], type[Fused]] = {PatchEmbed: FastPatchEmbed}
