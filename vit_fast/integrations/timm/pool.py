"""timm's ``AttentionPoolLatent``: latent queries, of the model itself, attend to the tokens [B, N, C].

    y = proj(attention(q_norm(q(latent)), k_norm(k), v))    k, v of kv(x + pos_embed)
    y = y + mlp(norm(y)), of which the first token or the mean is returned, [B, C]

The queries are the same for each image, so that they are projected once.
Source: timm/layers/attention_pool.py; Zhai et al., "Scaling Vision Transformers", 2021.
"""

from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import nn

from vit_fast import ops
from vit_fast.block import drop_rate, drops_not_covered
from vit_fast.integrations import Fused, given, mask_options, not_taken
from vit_fast.plain import LINEAR, submodules

from .parts import MLP, NO_PATH, NORM_OR_NONE, OPTIONAL, head_norms, head_norms_not_covered, mlp_branch, mlp_drops


class FastAttentionPoolLatent(Fused, AttentionPoolLatent):
    """[B, N, C] → [B, C], or [B, queries, C] where timm keeps them."""

    OPERATION = "pool"
    SUBMODULES = submodules(
        q=OPTIONAL,
        kv=LINEAR,
        q_norm=NORM_OR_NONE,
        k_norm=NORM_OR_NONE,
        proj=OPTIONAL,
        proj_drop=(nn.Dropout,),
        norm=NORM_OR_NONE,
        **{part: (*classes, NoneType) for part, classes in MLP.items()},
    )
    q: Any
    kv: Any
    proj: Any
    proj_drop: Any
    norm: Any
    mlp: Any

    def not_covered(self) -> str | None:
        return head_norms_not_covered(self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(("attn_mask",), args, strict=False)) | kwargs
        mask = options.pop("attn_mask", None)
        reason = given(args[1:], options) or self.not_fused() or not_taken(x, self.kv.weight)
        of_mlp = (0.0, 0.0) if self.mlp is None else mlp_drops(self.mlp)
        proj_drop = drop_rate(self.proj_drop)
        if reason := reason or drops_not_covered(proj_drop, *of_mlp):
            return self.run_library(reason, x, *args, **kwargs)
        scores = x.shape[0], self.num_heads, self.latent.shape[1], x.shape[1]
        masked = {} if mask is None else mask_options(self, mask, x.dtype, scores)
        x = x if self.pos_embed is None else x + self.pos_embed.to(x.dtype)
        k, v = _linear(x, self.kv).chunk(2, dim=-1)
        q = _linear(self.latent, self.q).to(k.dtype).expand(x.shape[0], -1, -1)
        scale = self.head_dim**-0.5 if self.fused_attn else self.scale
        y = _linear(ops.attention(q, self.num_heads, scale, k=k, v=v, **masked, **head_norms(self)), self.proj)
        y = ops.dropout(y, proj_drop)
        if self.mlp is not None:
            norm = None if isinstance(self.norm, nn.Identity) else self.norm
            y = mlp_branch(self.mlp, y, norm, None, NO_PATH, of_mlp, y if norm is None else None)
        if self.pool == "token":
            return y[:, 0]
        return y.mean(1) if self.pool == "avg" else y


def _linear(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """A linear layer, or nothing where it is an Identity."""
    return x if isinstance(layer, nn.Identity) else F.linear(x, layer.weight, layer.bias)


FAST: dict[type[nn.Module], type[Fused]] = {AttentionPoolLatent: FastAttentionPoolLatent}
