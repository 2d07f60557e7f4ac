"""The patch embedding of timm's NaFlexVit, on images.

    x = [class and register tokens | norm(projection of the patches) + position embedding]

The projection is a convolution, or a linear layer on the pixels of a patch, which is the same with its weight seen as
filters. Source: timm/models/naflexvit.py.
"""

from typing import Any

import torch
from timm.models.naflexvit import NaFlexEmbeds
from torch import nn

from vit_fast import ops
from vit_fast.integrations import Fused, not_taken
from vit_fast.kernels.tracing import autocasts
from vit_fast.plain import submodules

from .parts import DROPOUTS, NORM_OR_NONE, normalise


class FastNaFlexEmbeds(Fused, NaFlexEmbeds):
    """timm's NaFlexEmbeds on images: [B, in_chans, H, W] → ([B, prefix + N, C], grid). Patches that come with their
    coordinates are projected by a linear layer, and run as timm has it."""

    OPERATION = "patch_embed"
    SUBMODULES = submodules(proj=(nn.Conv2d, nn.Linear), norm=NORM_OR_NONE, pos_drop=DROPOUTS)
    CALLED = ("norm_input", "patch_interpolator")
    proj: Any
    norm: Any

    def not_covered(self) -> str | None:
        if self.norm_input is not None:
            return "it normalises the pixels of a patch"
        proj: Any = self.proj
        if not isinstance(proj, nn.Conv2d):
            return None
        return None if proj.stride == proj.kernel_size == tuple(self.patch_size) else "proj is no patch projection"

    def _not_taken(self, x, patch_coord):
        """Why these are no images that one operation projects, or None."""
        if patch_coord is not None:
            return "the patches are given, and their projection is a linear layer of PyTorch"
        if reason := not_taken(x, self.proj.weight, dims=4):
            return reason
        if autocasts(x.device.type):
            return "autocast is on"
        if any(size % patch or size < patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)):
            return f"images of {x.shape[2]}×{x.shape[3]} are no whole number of patches"
        return None if x.shape[1] == self.in_chans else f"the images have {x.shape[1]} channels, not {self.in_chans}"

    def forward(
        self,
        x: torch.Tensor,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
    ) -> Any:
        if reason := self.not_fused() or self._not_taken(x, patch_coord):
            return self.run_library(reason, x, patch_coord, patch_valid)
        weight, (height, width) = self.proj.weight, self.patch_size
        if self.is_linear and self.channels_last:
            weight = weight.unflatten(1, (height, width, self.in_chans)).permute(0, 3, 1, 2)
        elif self.is_linear:
            weight = weight.unflatten(1, (self.in_chans, height, width))
        tokens = normalise(ops.patch_embed(x, weight, self.proj.bias, None, None, (height, width)), self.norm)
        grid = [x.shape[2] // height, x.shape[3] // width]
        if self.pos_embed_type == "learned":
            self._apply_learned_pos_embed(tokens, grid_size=grid)  # in place
        elif self.pos_embed_type == "factorized":
            self._apply_factorized_pos_embed(tokens, grid_size=grid)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        return self.pos_drop(torch.cat([*prefix, tokens], dim=1) if prefix else tokens), tuple(grid)


FAST: dict[type[nn.Module], type[Fused]] = {NaFlexEmbeds: FastNaFlexEmbeds}
