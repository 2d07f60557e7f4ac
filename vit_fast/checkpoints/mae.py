"""MAE's own pre-training files: timm's keys, and the decoder that rebuilds masked patches.

Source: mae/models_mae.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Translation
from .dinov2 import MASK

DECODER = "the decoder rebuilds masked patches in pre-training"


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of MAE's own files, decoder included."""
    return "blocks.0.attn.qkv.weight" in state and "decoder_embed.weight" in state


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys; the decoder and the mask token are left out."""
    dropped = [(key, DECODER) for key in state if key.startswith("decoder_")]
    dropped += [("mask_token", MASK)] if "mask_token" in state else []
    names = {key for key, _ in dropped}
    out = {key: value for key, value in state.items() if key not in names}
    return Translation(out, [((key,), key) for key in out], dropped)


FORMAT = Format(
    name="mae",
    recognise=recognise,
    to_timm=to_timm,
    facts=dict(pre_norm=True, value_skip=False),
    variant_of="timm",
)
