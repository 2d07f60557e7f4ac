"""Stacks of torch's ``nn.TransformerEncoderLayer``, as from-scratch ViTs and the literal DeiT have them.

Such a layer may be post-norm, which its keys do not show: only the canonical keys can hold it.
Source: torch/nn/modules/transformer.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Translation
from .key_rules import compile_rules, renamed

_RULES = compile_rules(
    (
        *(
            (f"{stack}.{{}}.{theirs}", f"blocks.{{}}.{ours}")
            for stack in ("transformer_encoder.layers", "blocks")
            for theirs, ours in (
                ("self_attn.in_proj_weight", "attn.qkv.weight"),
                ("self_attn.in_proj_bias", "attn.qkv.bias"),
                ("self_attn.out_proj.", "attn.proj."),
                ("linear1.", "mlp.fc1."),
                ("linear2.", "mlp.fc2."),
                ("norm1.", "norm1."),
                ("norm2.", "norm2."),
            )
        ),
        ("cls_token_embedding", "cls_token"),
        ("position_embedding_table", "pos_embed"),
        ("linear_layer.", "head."),
        ("patch_embed.weight", "patch_embed.proj.weight"),
        ("patch_embed.bias", "patch_embed.proj.bias"),
        ("pre_logits.0.", "pre_logits.fc."),
    )
)
_BLOCK = re.compile(r"(transformer_encoder\.layers|blocks)\.\d+\.self_attn\.in_proj_weight$")


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of such a stack."""
    return any(_BLOCK.match(key) for key in state)


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys."""
    out, log, _ = renamed(state, _RULES)
    if out.get("pos_embed", torch.empty(1, 1, 1)).dim() == 2:
        out["pos_embed"] = out["pos_embed"][None]
    return Translation(out, log)


FORMAT = Format(
    name="torch",
    recognise=recognise,
    to_timm=to_timm,
    policy="R4",
    facts=dict(value_skip=False),
    unlike_timm="may be post-norm",
)
