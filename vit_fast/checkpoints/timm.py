"""timm's own keys, which DeiT and T2T-ViT share: what all other formats are translated to.

Source: timm/models/vision_transformer.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Translation

_BLOCK = re.compile(r"blocks\.\d+\.attn\.qkv\.weight$")


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of timm's blocks."""
    return any(_BLOCK.match(key) for key in state)


def unchanged(state: Mapping[str, torch.Tensor]) -> Translation:
    """The state_dict as it is."""
    return Translation(dict(state), [((key,), key) for key in state])


def of_model(own: Mapping[str, Any]) -> bool:
    """Whether a model has timm's keys."""
    return "blocks.0.attn.qkv.weight" in own


FORMAT = Format(
    name="timm", recognise=recognise, to_timm=unchanged, from_timm=unchanged, of_model=of_model, is_target=True
)
