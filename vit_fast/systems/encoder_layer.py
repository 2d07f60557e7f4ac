"""torch's TransformerEncoderLayer, its parameters and initialisation, run through the fused branches of ``block.py``.

Post-norm (torch's default):
    x = LN(x + drop(out_proj(attention(in_proj(x)))))
    x = LN(x + drop(linear2(drop(act(linear1(x))))))
Pre-norm: LN in front of each branch instead. Attention is over axis 1 of [B, N, C].
Source: Vaswani et al., "Attention Is All You Need", 2017.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from vit_fast import plain
from vit_fast.block import attention_branch, drop_rate, drops_not_covered, mlp_branch, run_blocks
from vit_fast.block_params import BlockParams, Norm
from vit_fast.kernels.reference import activate


class EncoderLayer(plain.Fusible, nn.TransformerEncoderLayer):
    """[B, N, C] → [B, N, C]; activation is one of those of ``ops.layernorm_mlp``, not gated."""

    SUBMODULES = plain.submodules(
        **plain.multihead_submodules("self_attn"),
        norm1=(nn.LayerNorm,),
        dropout1=(nn.Dropout,),
        linear1=plain.LINEAR,
        dropout=(nn.Dropout,),
        linear2=plain.LINEAR,
        norm2=(nn.LayerNorm,),
        dropout2=(nn.Dropout,),
    )
    activation: Any  # a partial of ``activate``, unless replaced by the user

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        dropout: float = 0.1,
        activation: str = "relu",
        eps: float = 1e-5,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(
            dim, num_heads, hidden, dropout, partial(activate, activation=activation), eps,
            batch_first=True, norm_first=pre_norm,
        )  # fmt: skip

    def _drops(self) -> Any:
        """The current dropout rates: attention weights, attention output, hidden MLP, output."""
        attn = self.self_attn.dropout if self.self_attn.training else 0.0
        return attn, *map(drop_rate, (self.dropout1, self.dropout, self.dropout2))

    def not_covered(self) -> str | None:
        if getattr(self.activation, "func", None) is not activate:
            return f"its activation is {self.activation}"
        return plain.multihead_not_covered(self.self_attn) or drops_not_covered(*self._drops())

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn = self.self_attn
        norms = [Norm.of(m) if self.norm_first else None for m in (self.norm1, self.norm2)]
        return BlockParams(
            norm1=norms[0],
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=norms[1],
            fc1_weight=self.linear1.weight,
            fc1_bias=self.linear1.bias,
            fc2_weight=self.linear2.weight,
            fc2_bias=self.linear2.bias,
            num_heads=attn.num_heads,
            scale=attn.head_dim**-0.5,
            activation=self.activation.keywords["activation"],
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # takes no masks
        if not self.is_fused():
            # Not super().forward: in eval mode torch's own fast path reads weights without calling adapters.
            if self.norm_first:
                x = x + self._sa_block(plain.layer_norm(self.norm1, x), None, None)
                return x + self._ff_block(plain.layer_norm(self.norm2, x))
            x = plain.layer_norm(self.norm1, x + self._sa_block(x, None, None))
            return plain.layer_norm(self.norm2, x + self._ff_block(x))
        p, (attn_drop, proj_drop, hidden_drop, out_drop) = self.params(), self._drops()
        x = attention_branch(x, p, attn_drop=attn_drop, proj_drop=proj_drop)
        if not self.norm_first:
            x = plain.layer_norm(self.norm1, x)
        x = mlp_branch(x, p, hidden_drop=hidden_drop, out_drop=out_drop)
        if not self.norm_first:
            x = plain.layer_norm(self.norm2, x)
        return x


class Encoder(nn.Module):
    """Layers and an optional final LayerNorm under the names of ``nn.TransformerEncoder``: [B, N, C] → [B, N, C]."""

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = run_blocks(self.layers, x)
        return x if self.norm is None else plain.layer_norm(self.norm, x)
