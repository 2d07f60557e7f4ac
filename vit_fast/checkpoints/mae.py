"""MAE's own pre-training files: timm's keys, and the decoder that rebuilds masked patches.

Source: mae/models_mae.py.
"""

from .dinov2 import MASK

DECODER = "the decoder rebuilds masked patches in pre-training"


def is_mae(state) -> bool:
    """Whether a mapping has the names of MAE's own files, decoder included."""
    return "blocks.0.attn.qkv.weight" in state and "decoder_embed.weight" in state


def to_timm(state):
    """(state, log, dropped)."""
    dropped = [(key, DECODER) for key in state if key.startswith("decoder_")]
    dropped += [("mask_token", MASK)] if "mask_token" in state else []
    names = {key for key, _ in dropped}
    out = {key: value for key, value in state.items() if key not in names}
    return out, [((key,), key) for key in out], dropped
