"""timm's VisionTransformerSAM: blocks on [B, H, W, C] with attention in windows and decomposed relative position.

A window that reaches over the edge of the image is filled up with zeros behind norm1, so that these tokens have the
biases of the projection as keys and values. Windows are put together again before the projection of the attention,
which takes tokens one by one.
Source: timm/models/vision_transformer_sam.py; Li et al., "Exploring Plain Vision Transformer Backbones for Object
Detection", 2022.
"""

from typing import Any

import timm.models.vision_transformer_sam as sam
import torch
from torch import nn

from vit_fast import ops
from vit_fast.integrations import Fused
from vit_fast.plain import submodules

from .parts import (
    DROP_PATHS,
    MLP,
    NORMS,
    SCALES,
    TimmBlock,
    attend,
    attention_submodules,
    head_norms,
    layer_scales,
    mlp_branch,
    normalise,
    project,
    rotation,
)


def decomposed(attn: Any, qkv: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``rel_pos`` of ``ops.attention``: the queries times the tables of both axes, [B, H, N, height] and
    [B, H, N, width]."""
    q = qkv.chunk(3, dim=-1)[0].unflatten(2, (attn.num_heads, -1)).unflatten(1, (height, width))
    rows = sam.get_rel_pos(height, height, attn.rel_pos_h)
    columns = sam.get_rel_pos(width, width, attn.rel_pos_w)
    return (
        torch.einsum("byxhc,ykc->bhyxk", q, rows).flatten(2, 3),
        torch.einsum("byxhc,xkc->bhyxk", q, columns).flatten(2, 3),
    )


class FastSAMBlock(TimmBlock, sam.Block):
    """[B, H, W, C] → [B, H, W, C]."""

    ARGUMENTS = ()
    DIMS = 4
    CALLED = ("attn.rope",)
    SUBMODULES = submodules(
        norm1=NORMS,
        **attention_submodules(sam.Attention),
        ls1=SCALES,
        drop_path1=DROP_PATHS,
        norm2=NORMS,
        **MLP,
        ls2=SCALES,
        drop_path2=DROP_PATHS,
    )
    ls1: Any
    ls2: Any
    window_size: int

    def not_covered(self) -> str | None:
        if self.attn.use_rel_pos and head_norms(self.attn):
            return "it normalises q and k and has decomposed relative position"
        return TimmBlock.not_covered(self)

    def gammas(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return layer_scales(self)

    def drops_not_covered(self, path: float, attn_drop: float, proj_drop: float) -> str | None:
        if self.window_size > 0 and (path or proj_drop):
            return "it drops windows, or tokens of windows"
        return None

    def fused(self, x: torch.Tensor, gammas: Any, settings: Any, options: dict[str, Any]) -> torch.Tensor:
        paths, drops = settings.paths, settings.drops
        attn, proj, window, (height, width) = self.attn, self.attn.proj, self.window_size, x.shape[1:3]
        row_scale = paths[0].row_scale(x)
        tokens = x.flatten(1, 2)
        if window > 0:
            windows, padded = sam.window_partition(normalise(x, self.norm1), window)
            qkv = ops.linear(windows.flatten(1, 2), attn.qkv.weight, attn.qkv.bias)
        else:
            qkv = project(attn, tokens, self.norm1)[0]
        if attn.use_rel_pos:
            options["rel_pos"] = decomposed(attn, qkv, *((window, window) if window > 0 else (height, width)))
        elif attn.rope is not None:
            options |= rotation(attn, attn.rope.get_embed())
        y = attend(attn, qkv, None, None, drops[0], **options)
        if window > 0:
            y = sam.window_unpartition(y.unflatten(1, (window, window)), window, (height, width), padded).flatten(1, 2)
        tokens = ops.linear_residual(
            y, proj.weight, proj.bias, gammas[0], tokens, row_scale=row_scale, dropout_p=drops[1]
        )
        tokens = mlp_branch(self.mlp, tokens, self.norm2, gammas[1], paths[1], settings.mlp_drops)
        return tokens.unflatten(1, (height, width))


FAST: dict[type[nn.Module], type[Fused]] = {sam.Block: FastSAMBlock}
