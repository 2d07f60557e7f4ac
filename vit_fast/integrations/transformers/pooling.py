"""Heads of transformers that pool: one query of the model itself attends to the tokens.

    SigLIP, Phi-4    y = attention(probe, x, x)
                     y = y + mlp(layernorm(y)), of which the one token is returned, [B, C]
    AIMv2            y = output_proj(attention(cls_token, k_proj(x), v_proj(x)))

Source: transformers/models/siglip/modeling_siglip.py, aimv2/modeling_aimv2.py; Zhai et al., "Scaling Vision
Transformers", 2021.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from vit_fast import ops
from vit_fast.block import latent_attention
from vit_fast.block_params import Norm
from vit_fast.integrations import Fused, given, mask_options, not_taken
from vit_fast.kernels.tracing import autocasts
from vit_fast.plain import LINEAR, multihead_not_covered, multihead_submodules

from .layer import MLP, NORM, Modules, activation_of, linear


class PoolingHead(Fused):
    """[B, N, C] → [B, C]; those of SigLIP2 and Phi-4 take a mask [B, N] of the tokens too."""

    OPERATION = "pool"
    MODULES: ClassVar[Modules] = dict(**multihead_submodules("attention"), layernorm=NORM, **MLP)
    probe: Any
    attention: Any
    layernorm: nn.LayerNorm
    mlp: Any

    @classmethod  # also called on the library's instance
    def not_covered(cls, self: Any) -> str | None:  # type: ignore[override]
        if activation_of(self.mlp.activation_fn) is None:
            return f"its activation is {self.mlp.activation_fn}"
        return multihead_not_covered(self.attention)

    def forward(self, hidden_state: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(("attention_mask",), args, strict=False)) | kwargs
        mask = options.pop("attention_mask", None)
        reason = given(args[1:], options) or self.not_fused()
        reason = reason or not_taken(hidden_state, self.attention.in_proj_weight)
        if self.attention.training and self.attention.dropout:
            reason = reason or "its attention drops weights"
        if mask is not None and mask.dim() != 2:
            reason = reason or f"attention_mask has {mask.dim()} dimensions, not 2"
        if reason is not None:
            return self.run_library(reason, hidden_state, *args, **kwargs)
        batch, tokens, _ = hidden_state.shape
        masked: dict[str, Any] = {}
        if mask is not None:
            scores = batch, self.attention.num_heads, self.probe.shape[1], tokens
            masked = mask_options(self, mask.bool()[:, None, None], hidden_state.dtype, scores)
        y = latent_attention(self.attention, self.probe, hidden_state, **masked)
        norm, fc1, fc2, act = Norm.of(self.layernorm), self.mlp.fc1, self.mlp.fc2, activation_of(self.mlp.activation_fn)
        return ops.layernorm_mlp(y, *norm, fc1.weight, fc1.bias, fc2.weight, fc2.bias, str(act), None)[:, 0]


class Aimv2Head(Fused):
    """[B, N, C] → [B, C]; the query is not projected."""

    OPERATION = "pool"
    MODULES: ClassVar[Modules] = dict(k_proj=LINEAR, v_proj=LINEAR, output_proj=LINEAR)
    k_proj: Any
    v_proj: Any
    output_proj: Any
    cls_token: Any
    num_heads: int
    hidden_size: int

    def forward(self, hidden_states: torch.Tensor) -> Any:
        reason = self.not_fused() or not_taken(hidden_states, self.k_proj.weight)
        if autocasts(hidden_states.device.type):
            reason = reason or "autocast is on"
        if reason is not None:
            return self.run_library(reason, hidden_states)
        query = self.cls_token.expand(hidden_states.shape[0], -1, -1)
        k, v = (linear(hidden_states, layer) for layer in (self.k_proj, self.v_proj))
        scale = (self.hidden_size // self.num_heads) ** -0.5
        return linear(ops.attention(query, self.num_heads, scale, k=k, v=v), self.output_proj)[:, 0]
