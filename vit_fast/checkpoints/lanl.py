"""LANL's ViT and T2T-ViT: timm's keys but for the MLP and a prefix of the backbone.

Their attention adds the values to its output, which timm's blocks do not: the canonical keys alone can hold them.
Source: S. Callis, "Vision Transformers Explained", Los Alamos National Laboratory.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Translation
from .key_rules import compile_rules, renamed

_RULES = compile_rules(
    (
        ("backbone.blocks.{}.neuralnet.", "blocks.{}.mlp."),
        ("vit_backbone.blocks.{}.neuralnet.", "blocks.{}.mlp."),
        ("backbone.", ""),
        ("vit_backbone.", ""),
    )
)
_BLOCK = re.compile(r"(vit_)?backbone\.blocks\.\d+\.neuralnet\.")


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of these models."""
    return any(_BLOCK.match(key) for key in state)


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys."""
    return renamed(state, _RULES)


FORMAT = Format(
    name="lanl",
    recognise=recognise,
    to_timm=to_timm,
    policy="R4",
    facts=dict(pre_norm=True, value_skip=True),
    unlike_timm="add the values to their output",
)
