"""timm's CaiT: blocks of talking-heads attention, and class attention.

Talking-heads attention mixes the heads' scores and probabilities, so that all heads of a token are needed at once: it
runs in plain PyTorch between the fused projections.
Source: timm/models/cait.py; Touvron et al., "Going deeper with Image Transformers", 2021.
"""

from collections.abc import Sequence
from typing import Any

import timm.models.cait as cait
import torch
from torch import nn

from vit_fast import ops
from vit_fast.block import drop_rate, drops_not_covered, prepared_for
from vit_fast.integrations import Fused, given, not_taken
from vit_fast.plain import LINEAR, submodules
from vit_fast.twin import linears

from .parts import (
    DROP_PATHS,
    DROPOUTS,
    MLP,
    NORMS,
    Path,
    attention_drop,
    mlp_branch,
    mlp_drops,
    normalise,
    project,
)


class _CaitBlock(Fused):
    RUNS_PARTS = True
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    gamma_1: Any
    gamma_2: Any
    drop_path: Any

    def attend(self, *tokens: torch.Tensor) -> torch.Tensor:
        """The output of the attention, before its projection."""
        raise NotImplementedError

    def forward(self, *tokens: torch.Tensor, **kwargs: Any) -> Any:
        if reason := given((), kwargs) or self.not_fused():
            return self.run_library(reason, *tokens, **kwargs)
        x, attn, path, of_mlp = tokens[-1], self.attn, Path.of(self.drop_path), mlp_drops(self.mlp)
        drops = drop_rate(attn.proj_drop), drop_rate(attn.attn_drop)
        reason = not_taken(x, attn.proj.weight, self.gamma_1, self.gamma_2)
        if reason := reason or drops_not_covered(path.rate, *drops, *of_mlp):
            return self.run_library(reason, *tokens, **kwargs)
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(*tokens)
        return self.branches(tokens, path, of_mlp, drops[0])

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        return self.branches(inputs, Path.of(self.drop_path), mlp_drops(self.mlp), 0.0)

    def branches(
        self, tokens: tuple[torch.Tensor, ...], path: Path, of_mlp: tuple[float, float], proj_drop: float
    ) -> torch.Tensor:
        """Both branches, with DropPath and the rates of dropout in the MLP and behind the attention."""
        x, attn = tokens[-1], self.attn
        y, row_scale = self.attend(*tokens), path.row_scale(x)
        x = ops.linear_residual(
            y, attn.proj.weight, attn.proj.bias, self.gamma_1, x, row_scale=row_scale, dropout_p=proj_drop
        )
        return mlp_branch(self.mlp, x, self.norm2, self.gamma_2, path, of_mlp)


class FastLayerScaleBlock(_CaitBlock, cait.LayerScaleBlock):
    """[B, N, C] → [B, N, C]."""

    SUBMODULES = submodules(
        norm1=NORMS,
        attn=(cait.TalkingHeadAttn,),
        attn__qkv=LINEAR,
        attn__attn_drop=DROPOUTS,
        attn__proj=LINEAR,
        attn__proj_l=LINEAR,
        attn__proj_w=LINEAR,
        attn__proj_drop=DROPOUTS,
        drop_path=DROP_PATHS,
        norm2=NORMS,
        **MLP,
    )

    def attend(self, *tokens: torch.Tensor) -> torch.Tensor:
        attn, (x,) = self.attn, tokens
        qkv = project(attn, x, self.norm1)[0].unflatten(2, (3, attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = attn.proj_l((q * attn.scale @ k.mT).permute(0, 2, 3, 1))
        weights = attn.proj_w(scores.softmax(dim=2)).permute(0, 3, 1, 2)
        return (attn.attn_drop(weights) @ v).transpose(1, 2).flatten(2)


class FastLayerScaleBlockClassAttn(_CaitBlock, cait.LayerScaleBlockClassAttn):
    """x [B, N, C] and the class token x_cls [B, 1, C] → x_cls."""

    SUBMODULES = submodules(
        norm1=NORMS,
        attn=(cait.ClassAttn,),
        attn__q=LINEAR,
        attn__k=LINEAR,
        attn__v=LINEAR,
        attn__attn_drop=DROPOUTS,
        attn__proj=LINEAR,
        attn__proj_drop=DROPOUTS,
        drop_path=DROP_PATHS,
        norm2=NORMS,
        **MLP,
    )

    def layers_of_one_input(self) -> Sequence[Sequence[nn.Linear]]:
        return [(self.attn.k, self.attn.v)]

    def attend(self, *tokens: torch.Tensor) -> torch.Tensor:
        attn, (x, x_cls) = self.attn, tokens
        y = normalise(torch.cat((x_cls, x), dim=1), self.norm1)
        q, (k, v) = ops.linear(y[:, :1], attn.q.weight, attn.q.bias), linears(y, (attn.k, attn.v))
        scale = (q.shape[-1] // attn.num_heads) ** -0.5 if attn.fused_attn else attn.scale
        return ops.attention(q, attn.num_heads, scale, k=k, v=v, dropout_p=attention_drop(attn))


FAST: dict[type[nn.Module], type[Fused]] = {
    cait.LayerScaleBlock: FastLayerScaleBlock,
    cait.LayerScaleBlockClassAttn: FastLayerScaleBlockClassAttn,
}
