"""DINOv2's own files (torch.hub): timm's keys but for the registers, the mask token and a SwiGLU MLP's layers.

With registers, the position table has a row for the class token and none for the registers; timm's models have neither,
so the row goes into the class token, and the sum that reaches the blocks is the same.
Source: dinov2/models/vision_transformer.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Log, Translation
from .key_rules import compile_rules, renamed

_RULES = compile_rules(
    (
        ("register_tokens", "reg_token"),
        ("blocks.{}.mlp.w12.", "blocks.{}.mlp.fc1."),
        ("blocks.{}.mlp.w3.", "blocks.{}.mlp.fc2."),
    )
)
MASK = "it stands for masked patches in pre-training"


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of DINOv2's own files."""
    return "blocks.0.attn.qkv.weight" in state and ("register_tokens" in state or "mask_token" in state)


def fold_class_row(state: dict[str, torch.Tensor], log: Log) -> None:
    """Adds the first row of pos_embed to cls_token where there are registers; in place, in timm's keys."""
    if not {"reg_token", "cls_token", "pos_embed"} <= state.keys():
        return
    row, state["pos_embed"] = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    state["cls_token"] = state["cls_token"] + row
    origin = {target: sources for sources, target in log}
    log[log.index((origin["cls_token"], "cls_token"))] = (origin["cls_token"] + origin["pos_embed"], "cls_token")


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys; the mask token is left out."""
    out, log, _ = renamed({key: value for key, value in state.items() if key != "mask_token"}, _RULES)
    fold_class_row(out, log)
    return Translation(out, log, [("mask_token", MASK)] if "mask_token" in state else [])


FORMAT = Format(
    name="dinov2",
    recognise=recognise,
    to_timm=to_timm,
    facts=dict(eps=1e-6, pre_norm=True, value_skip=False),
    variant_of="timm",
)
