"""The canonical keys: timm's, with the block spelled ln1, qkv, out, ln2, fc1, fc2, gamma1, gamma2.

They stand straight under ``blocks.<i>.`` and hold any program's block. What the block does with them (eps, activation,
pre-norm, value skip) is in the metadata of a converted file, as far as its source tells.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Translation
from .key_rules import compile_rules, renamed

_PAIRS = (
    ("blocks.{}.ln1.", "blocks.{}.norm1."),
    ("blocks.{}.qkv.", "blocks.{}.attn.qkv."),
    ("blocks.{}.out.", "blocks.{}.attn.proj."),
    ("blocks.{}.ln2.", "blocks.{}.norm2."),
    ("blocks.{}.fc1.", "blocks.{}.mlp.fc1."),
    ("blocks.{}.fc2.", "blocks.{}.mlp.fc2."),
    ("blocks.{}.gamma1", "blocks.{}.ls1.gamma"),
    ("blocks.{}.gamma2", "blocks.{}.ls2.gamma"),
)
_FROM, _TO = compile_rules(_PAIRS), compile_rules(_PAIRS, reverse=True)


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has canonical keys."""
    return "blocks.0.ln1.weight" in state and "blocks.0.qkv.weight" in state


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys."""
    return renamed(state, _FROM)


def from_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Canonical keys of timm's."""
    return renamed(state, _TO)


FORMAT = Format(
    name="canonical", recognise=recognise, to_timm=to_timm, from_timm=from_timm, is_target=True, any_block=True
)
