"""timm's VisionTransformer and NaFlexVit: ``Block``, ``ResPostBlock``, and blocks whose branches run in parallel.

    ParallelScalingBlock    x = x + drop_path(ls(out_proj([attn | act(mlp)]))), both parts of one in_proj(norm(x))
    ParallelThingsBlock     x = x + Σ drop_path(ls(attn_i(norm_i(x)))), then the same with MLPs

Source: timm/models/vision_transformer.py.
"""

from typing import Any

import timm.models.vision_transformer as vit
import torch
from torch import nn

from vit_fast import ops
from vit_fast.block import drop_rate, drops_not_covered, prepared_for
from vit_fast.integrations import Fused, given, norm_kind, not_taken
from vit_fast.plain import submodules

from .parts import (
    ACTIVATIONS,
    DROP_PATHS,
    DROPOUTS,
    MLP,
    NO_PATH,
    NORM_OR_NONE,
    NORMS,
    OPTIONAL,
    SCALES,
    Path,
    PostNormBlock,
    PreNormBlock,
    attend,
    attention_branch,
    attention_drop,
    attention_submodules,
    differential,
    head_norms,
    head_norms_not_covered,
    known_norm,
    layer_scales,
    mlp_branch,
)

_ATTENTION = (vit.Attention, *((vit.DiffAttention,) if hasattr(vit, "DiffAttention") else ()))
_ATTENTION_PARTS = attention_submodules(*_ATTENTION, norm=NORM_OR_NONE, gate=OPTIONAL, sub_norm=NORM_OR_NONE)


class FastBlock(PreNormBlock, vit.Block):
    """timm's pre-norm block with any of its attentions, MLPs and norms."""

    STACKABLE = True
    SUBMODULES = submodules(
        norm1=NORMS,
        **_ATTENTION_PARTS,
        ls1=SCALES,
        drop_path1=DROP_PATHS,
        norm2=NORMS,
        **MLP,
        ls2=SCALES,
        drop_path2=DROP_PATHS,
    )

    def gammas(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return layer_scales(self)


class FastResPostBlock(PostNormBlock, vit.ResPostBlock):
    """timm's post-norm block, whose norms start as LayerScale."""

    SUBMODULES = submodules(
        **_ATTENTION_PARTS, norm1=NORMS, drop_path1=DROP_PATHS, **MLP, norm2=NORMS, drop_path2=DROP_PATHS
    )


class _ParallelScaling(Fused):
    """Attention and MLP read one projection of norm(x), and end in one projection or in one each."""

    RUNS_PARTS = True
    in_norm: Any
    in_proj: Any
    in_split: Any
    mlp_bias: Any
    mlp_act: Any
    mlp_drop: Any
    attn_drop: Any
    out_proj: Any
    attn_out_proj: Any
    mlp_out_proj: Any
    ls: Any
    drop_path: Any

    def not_covered(self) -> str | None:
        return head_norms_not_covered(self)

    def attention(self, qkv: torch.Tensor, drop: float) -> torch.Tensor:
        return attend(self, qkv, None, None, drop)

    def refuses(self, drop: float) -> str | None:
        """Why the attention cannot drop at this rate, or None."""
        return None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if reason := given(args, kwargs) or self.not_fused():
            return self.run_library(reason, x, *args, **kwargs)
        gamma, path, drop = getattr(self.ls, "gamma", None), Path.of(self.drop_path), attention_drop(self)
        reason = not_taken(x, self.in_proj.weight, gamma) or self.refuses(drop)
        if reason := reason or drops_not_covered(path.rate, drop, drop_rate(self.mlp_drop)):
            return self.run_library(reason, x, *args, **kwargs)
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x)
        return self.branches(x, drop, path)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        return self.branches(inputs[0], 0.0, Path.of(self.drop_path))

    def branches(self, x: torch.Tensor, drop: float, path: Path) -> torch.Tensor:
        """Both branches; ``drop`` is the rate of dropout of the probabilities."""
        norm, proj, gamma = self.in_norm, self.in_proj, getattr(self.ls, "gamma", None)
        y = ops.layer_norm_linear(x, *known_norm(norm), proj.weight, proj.bias, norm=norm_kind(norm))
        mlp, qkv = y.split((self.in_split[0], sum(self.in_split[1:])), dim=-1)
        mlp = mlp if self.mlp_bias is None else mlp + self.mlp_bias
        attn, mlp = self.attention(qkv, drop), self.mlp_drop(self.mlp_act(mlp))
        row_scale = path.row_scale(x)
        if (out := self.out_proj) is not None:
            attn = torch.cat((attn, mlp), dim=-1)
            return ops.linear_residual(attn, out.weight, out.bias, gamma, x, row_scale=row_scale)
        for part, out in ((attn, self.attn_out_proj), (mlp, self.mlp_out_proj)):
            x = ops.linear_residual(part, out.weight, out.bias, gamma, x, row_scale=row_scale)
        return x


_PARALLEL_SCALING: dict[str, tuple[type, ...]] = dict(
    in_norm=NORMS,
    in_proj=(nn.Linear,),
    q_norm=NORM_OR_NONE,
    k_norm=NORM_OR_NONE,
    attn_drop=DROPOUTS,
    mlp_drop=(nn.Dropout,),
    mlp_act=(nn.GELU, *ACTIVATIONS),
    out_proj=OPTIONAL,
    ls=SCALES,
    drop_path=DROP_PATHS,
)


class FastParallelScalingBlock(_ParallelScaling, vit.ParallelScalingBlock):
    SUBMODULES = submodules(**_PARALLEL_SCALING, attn_out_proj=OPTIONAL, mlp_out_proj=OPTIONAL)


FAST: dict[type[nn.Module], type[Fused]] = {
    vit.Block: FastBlock,
    vit.ResPostBlock: FastResPostBlock,
    vit.ParallelScalingBlock: FastParallelScalingBlock,
}

if hasattr(vit, "DiffParallelScalingBlock"):  # older timm has none

    class FastDiffParallelScalingBlock(_ParallelScaling, vit.DiffParallelScalingBlock):
        SUBMODULES = submodules(**_PARALLEL_SCALING, sub_norm=NORMS)

        def attention(self, qkv: torch.Tensor, drop: float) -> torch.Tensor:
            return differential(self, *qkv.chunk(3, dim=-1), **head_norms(self))

        def refuses(self, drop: float) -> str | None:
            return "its attention drops weights" if drop else None

    FAST[vit.DiffParallelScalingBlock] = FastDiffParallelScalingBlock


def _pair(name: str, prefix: str, parts: dict[str, tuple[type, ...]]) -> dict[str, tuple[type, ...]]:
    """The arguments of ``submodules`` for two branches, each an nn.Sequential of norm, ``name``, ls and drop_path."""
    found: dict[str, tuple[type, ...]] = {prefix: (nn.ModuleList,)}
    for index in range(2):
        branch = f"{prefix}__{index}"
        found |= {branch: (nn.Sequential,), f"{branch}__norm": NORMS}
        found |= {f"{branch}__{path}": classes for path, classes in parts.items()}
        found |= {f"{branch}__ls": SCALES, f"{branch}__drop_path": DROP_PATHS}
    return found


class FastParallelThingsBlock(Fused, vit.ParallelThingsBlock):
    """Two attentions side by side, then two MLPs."""

    RUNS_PARTS = True
    SUBMODULES = submodules(**_pair("attn", "attns", _ATTENTION_PARTS), **_pair("mlp", "ffns", MLP))
    attns: Any
    ffns: Any

    def not_covered(self) -> str | None:
        if any(type(branch.attn) is not vit.Attention for branch in self.attns):
            return "its attention is not the standard one"
        return next(filter(None, (head_norms_not_covered(branch.attn) for branch in self.attns)), None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reason = given(args, kwargs) or self.not_fused()
        if reason is None and self.training:
            reason = "it is in training mode"
        if reason is None:
            gammas = [getattr(branch.ls, "gamma", None) for branch in (*self.attns, *self.ffns)]
            reason = not_taken(x, self.attns[0].attn.qkv.weight, *gammas)
        if reason is not None:
            return self.run_library(reason, x, *args, **kwargs)
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x)
        return self.fused_parts(x)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        x = y = inputs[0]
        gammas = [getattr(branch.ls, "gamma", None) for branch in (*self.attns, *self.ffns)]
        for branch, gamma in zip(self.attns, gammas[:2], strict=True):
            y = attention_branch(branch.attn, x, branch.norm, gamma, NO_PATH, 0.0, 0.0, y)
        x = y
        for branch, gamma in zip(self.ffns, gammas[2:], strict=True):
            y = mlp_branch(branch.mlp, x, branch.norm, gamma, NO_PATH, (0.0, 0.0), y)
        return y


FAST[vit.ParallelThingsBlock] = FastParallelThingsBlock
