"""open_clip: the blocks of its image tower, ``ResidualAttentionBlock`` and its custom kind, and its
``AttentionalPooler`` on the fused operations.

    x = q_x + ls_1(attn(ln_1(q_x)))
    x = x + ls_2(mlp.c_proj(act(mlp.c_fc(ln_2(x)))))

``CustomResidualAttentionBlock`` has further norms: of q and k, of what attention puts out before and after its
projection, and before c_proj; and a factor for each head. Its scaled-cosine attention is not covered: open_clip 3.3
raises there. Text towers, whose attention is causal, are not touched; ``integrations/timm`` handles image towers of
timm.
Source: open_clip/transformer.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import nn

from vit_fast import ops
from vit_fast.block import (
    attend,
    attention_branch,
    drop_rate,
    drops_not_covered,
    latent_attention,
    mlp_branch,
    pass_over_stack,
    prepared_for,
    project_qkv,
    run_blocks,
)
from vit_fast.block_params import BlockParams, Norm
from vit_fast.plain import LINEAR, NOTHING, multihead_not_covered, multihead_submodules, submodules

from . import GELU, Found, Fused, Swapped, given, instances, not_taken

_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)


def _activation(act):
    if type(act) is nn.GELU:
        return GELU.get(act.approximate)
    return {QuickGELU: "quick_gelu", nn.ReLU: "relu"}.get(type(act))


class FastResidualAttentionBlock(Fused, ResidualAttentionBlock):
    """open_clip's ResidualAttentionBlock as two fused branches: [B, N, C] → [B, N, C]."""

    SUBMODULES = submodules(
        ln_1=_NORMS,
        **multihead_submodules("attn"),
        ls_1=(LayerScale, *NOTHING),
        ln_2=_NORMS,
        mlp=(nn.Sequential,),
        mlp__c_fc=LINEAR,
        mlp__gelu=(nn.GELU, QuickGELU, nn.ReLU),
        mlp__c_proj=LINEAR,
        ls_2=(LayerScale, *NOTHING),
    )
    ln_1: nn.LayerNorm
    attn: nn.MultiheadAttention
    ln_2: nn.LayerNorm
    mlp: Any  # an nn.Sequential of c_fc, gelu, c_proj

    def not_covered(self) -> str | None:
        return multihead_not_covered(self.attn)

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, mlp = self.attn, self.mlp
        return BlockParams(
            norm1=Norm.of(self.ln_1),
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=Norm.of(self.ln_2),
            fc1_weight=mlp.c_fc.weight,
            fc1_bias=mlp.c_fc.bias,
            fc2_weight=mlp.c_proj.weight,
            fc2_bias=mlp.c_proj.bias,
            num_heads=attn.num_heads,
            scale=attn.head_dim**-0.5,
            activation=_activation(mlp.gelu),
            gamma1=getattr(self.ls_1, "gamma", None),
            gamma2=getattr(self.ls_2, "gamma", None),
        )

    def forward(self, q_x: torch.Tensor, *others: Any, **named: Any) -> Any:
        if reason := given(others, named) or self.not_fused():
            return self.run_library(reason, q_x, *others, **named)
        p = self.params()
        drop = self.attn.dropout if self.attn.training else 0.0
        if reason := not_taken(q_x, p.qkv_weight, p.gamma1, p.gamma2) or drops_not_covered(drop):
            return self.run_library(reason, q_x, *others, **named)
        return mlp_branch(attention_branch(q_x, p, attn_drop=drop), p)


class FastCustomResidualAttentionBlock(Fused, CustomResidualAttentionBlock):
    """open_clip's CustomResidualAttentionBlock as two fused branches: [B, N, C] → [B, N, C]."""

    RUNS_PARTS = True
    SUBMODULES = submodules(
        ln_1=_NORMS,
        attn=(Attention,),
        attn__ln_q=(*_NORMS, nn.Identity),
        attn__ln_k=(*_NORMS, nn.Identity),
        attn__attn_drop=(nn.Dropout,),
        attn__ln_inner=(*_NORMS, nn.Identity),
        attn__out_proj=LINEAR,
        attn__out_drop=(nn.Dropout,),
        ln_attn=(*_NORMS, nn.Identity),
        ls_1=(LayerScale, *NOTHING),
        ln_2=_NORMS,
        mlp=(nn.Sequential,),
        mlp__c_fc=LINEAR,
        mlp__gelu=(nn.GELU, QuickGELU, nn.ReLU),
        mlp__ln=(*_NORMS, nn.Identity),
        mlp__c_proj=LINEAR,
        ls_2=(LayerScale, *NOTHING),
    )
    ln_1: nn.LayerNorm
    attn: Attention
    ln_attn: Any
    ls_1: Any
    ln_2: nn.LayerNorm
    mlp: Any  # an nn.Sequential of c_fc, gelu, ln, c_proj

    def not_covered(self) -> str | None:
        return "its attention is scaled-cosine" if self.attn.logit_scale is not None else None

    def _weights(self) -> BlockParams:
        """The weights as the fused branches take them; ``params`` would tell ``prepare`` that there is nothing else."""
        attn, mlp = self.attn, self.mlp
        return BlockParams(
            norm1=Norm.of(self.ln_1),
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=Norm.of(self.ln_2),
            fc1_weight=mlp.c_fc.weight,
            fc1_bias=mlp.c_fc.bias,
            fc2_weight=mlp.c_proj.weight,
            fc2_bias=mlp.c_proj.bias,
            num_heads=attn.num_heads,
            scale=attn.scale,
            activation=_activation(mlp.gelu),
            gamma1=getattr(self.ls_1, "gamma", None),
            gamma2=getattr(self.ls_2, "gamma", None),
            q_norm=Norm.of(attn.ln_q),
            k_norm=Norm.of(attn.ln_k),
            inner_norm=Norm.of(mlp.ln),
            out_norm=Norm.of(attn.ln_inner),
        )

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> Any:
        if reason := given(others, named) or self.not_fused():
            return self.run_library(reason, x, *others, **named)
        p, attn = self._weights(), self.attn
        attn_drop, out_drop = attn.attn_drop.p if attn.training else 0.0, drop_rate(attn.out_drop)
        if reason := not_taken(x, p.qkv_weight, p.gamma1, p.gamma2) or drops_not_covered(attn_drop, out_drop):
            return self.run_library(reason, x, *others, **named)
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x)
        return self.branches(x, p, attn_drop, out_drop)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        return self.branches(inputs[0], self._weights(), 0.0, 0.0)

    def branches(self, x: torch.Tensor, p: BlockParams, attn_drop: float, out_drop: float) -> torch.Tensor:
        """Both branches, with the rates of dropout of the probabilities and behind the attention."""
        attn = self.attn
        y = attend(project_qkv(x, p), p, attn_drop)
        if attn.head_scale is not None:
            y = (y.unflatten(2, (p.num_heads, -1)) * attn.head_scale.flatten(1)).flatten(2)
        if isinstance(self.ln_attn, nn.Identity):
            x = ops.linear_residual(
                y, p.proj_weight, p.proj_bias, p.gamma1, x, inner_norm=p.out_norm, dropout_p=out_drop
            )
        else:
            y = y if p.out_norm is None else ops.layer_norm(y, *p.out_norm)
            y = ops.dropout(ops.linear(y, p.proj_weight, p.proj_bias), out_drop)
            y = self.ls_1(ops.layer_norm(y, *Norm.of(self.ln_attn)))
            x = x + y
        return mlp_branch(x, p)


class FastAttentionalPooler(Fused, AttentionalPooler):
    """open_clip's AttentionalPooler, whose queries are the model's own: [B, N, D] → [B, queries, C]."""

    OPERATION = "pool"
    SUBMODULES = submodules(**multihead_submodules("attn"), ln_q=_NORMS, ln_k=_NORMS)
    query: nn.Parameter
    attn: nn.MultiheadAttention
    ln_q: nn.LayerNorm
    ln_k: nn.LayerNorm

    def not_covered(self) -> str | None:
        return multihead_not_covered(self.attn, widths=True)

    def forward(self, x: torch.Tensor) -> Any:
        reason = self.not_fused() or not_taken(x, self.attn.out_proj.weight)
        if self.attn.training and self.attn.dropout:
            reason = reason or "its attention drops weights"
        if reason is not None:
            return self.run_library(reason, x)
        queries = ops.layer_norm(self.query[None], *Norm.of(self.ln_q))
        return latent_attention(self.attn, queries, x, Norm.of(self.ln_k))


class FastTransformer(Swapped, Transformer):
    """open_clip's Transformer, whose blocks run all at once where ``vit_fast.prepare`` has prepared them."""

    resblocks: nn.ModuleList

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            reason = "grad_checkpointing recomputes the blocks"
        elif attn_mask is not None:
            reason = "attn_mask is given"
        elif not self.batch_first:
            reason = "batch_first is False"
        else:
            return run_blocks(self.resblocks, x)
        pass_over_stack(self.resblocks, reason)
        return super().forward(x, attn_mask=attn_mask)

    @staticmethod
    def stack(module: nn.Module) -> nn.Module:
        """The container of the blocks in a module that may be swapped to this class."""
        return module.get_submodule("resblocks")


FAST = {
    ResidualAttentionBlock: FastResidualAttentionBlock,
    CustomResidualAttentionBlock: FastCustomResidualAttentionBlock,
    AttentionalPooler: FastAttentionalPooler,
}
STACKS = {Transformer: FastTransformer}


def find(model: nn.Module) -> Iterator[Found]:
    for name, tower in model.named_modules():
        if isinstance(tower, VisionTransformer):
            for inner, module, cls in instances(tower, FAST):
                yield f"{name}.{inner}".removeprefix("."), module, cls
