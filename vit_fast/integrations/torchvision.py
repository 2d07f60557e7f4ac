"""torchvision: the ``EncoderBlock`` of its ViT on the fused operations.

    x = input + dropout(self_attention(ln_1(input)))
    y = x + dropout(fc2(dropout(gelu(fc1(ln_2(x))))))

Source: torchvision/models/vision_transformer.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock

from vit_fast.block import attention_branch, drop_rate, drops_not_covered, mlp_branch
from vit_fast.block_params import BlockParams, Norm
from vit_fast.plain import LINEAR, multihead_not_covered, multihead_submodules, submodules

from . import GELU, Found, Fused, instances, not_taken

_DROPOUT = (nn.Dropout,)


class FastEncoderBlock(Fused, EncoderBlock):
    """torchvision's EncoderBlock as two fused branches: [B, N, C] → [B, N, C]."""

    SUBMODULES = submodules(
        ln_1=(nn.LayerNorm,),
        **multihead_submodules("self_attention"),
        dropout=_DROPOUT,
        ln_2=(nn.LayerNorm,),
        mlp=(MLPBlock,),
        mlp__0=LINEAR,
        mlp__1=(nn.GELU,),
        mlp__2=_DROPOUT,
        mlp__3=LINEAR,
        mlp__4=_DROPOUT,
    )
    ln_1: nn.LayerNorm
    self_attention: nn.MultiheadAttention
    dropout: nn.Dropout
    ln_2: nn.LayerNorm
    mlp: Any  # an nn.Sequential of Linear, GELU, Dropout, Linear, Dropout

    def not_covered(self) -> str | None:
        return multihead_not_covered(self.self_attention)

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, (fc1, act, _, fc2, _) = self.self_attention, self.mlp
        return BlockParams(
            norm1=Norm.of(self.ln_1),
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=Norm.of(self.ln_2),
            fc1_weight=fc1.weight,
            fc1_bias=fc1.bias,
            fc2_weight=fc2.weight,
            fc2_bias=fc2.bias,
            num_heads=attn.num_heads,
            scale=attn.head_dim**-0.5,
            activation=GELU[act.approximate],
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if reason := self.not_fused():
            return self.run_library(reason, input)
        p, attn, (_, _, drop1, _, drop2) = self.params(), self.self_attention, self.mlp
        attn_drop = attn.dropout if attn.training else 0.0
        drops = attn_drop, *map(drop_rate, (self.dropout, drop1, drop2))
        if reason := not_taken(input, p.qkv_weight) or drops_not_covered(*drops):
            return self.run_library(reason, input)
        x = attention_branch(input, p, attn_drop=attn_drop, proj_drop=drops[1])
        return mlp_branch(x, p, hidden_drop=drops[2], out_drop=drops[3])


FAST = {EncoderBlock: FastEncoderBlock}


def find(model: nn.Module) -> Iterator[Found]:
    return instances(model, FAST)
