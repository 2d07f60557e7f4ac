"""Image towers of OpenAI's CLIP, open_clip and CLIP-ReID, alone or in a whole CLIP.

The projection becomes the weight of a head with a bias of zeros; what is not of the image tower is left out.
Source: openai/CLIP, clip/model.py; open_clip/transformer.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Log, Translation
from .key_rules import compile_rules, rename

CLIP_SCALARS = ("input_resolution", "context_length", "vocab_size")  # buffers of OpenAI's archives
_TOWERS = ("visual.", "image_encoder.", "")  # what stands before the keys of the tower
_PAIRS = (
    ("conv1.weight", "patch_embed.proj.weight"),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("proj", "head.weight"),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.{}.ln_1.", "blocks.{}.norm1."),
    ("transformer.resblocks.{}.ln_2.", "blocks.{}.norm2."),
    ("transformer.resblocks.{}.ls_1.gamma", "blocks.{}.ls1.gamma"),
    ("transformer.resblocks.{}.ls_2.gamma", "blocks.{}.ls2.gamma"),
    ("transformer.resblocks.{}.attn.in_proj_weight", "blocks.{}.attn.qkv.weight"),
    ("transformer.resblocks.{}.attn.in_proj_bias", "blocks.{}.attn.qkv.bias"),
    ("transformer.resblocks.{}.attn.out_proj.", "blocks.{}.attn.proj."),
    ("transformer.resblocks.{}.mlp.c_fc.", "blocks.{}.mlp.fc1."),
    ("transformer.resblocks.{}.mlp.c_proj.", "blocks.{}.mlp.fc2."),
)
_FROM, _TO = compile_rules(_PAIRS), compile_rules(_PAIRS, reverse=True)


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of a CLIP's image tower, alone or in a whole CLIP."""
    return any(f"{prefix}conv1.weight" in state and f"{prefix}class_embedding" in state for prefix in _TOWERS)


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys of the image tower alone; the projection becomes the head's weight, with a bias of zeros."""
    prefix = next(prefix for prefix in _TOWERS if f"{prefix}conv1.weight" in state)
    out: dict[str, torch.Tensor] = {}
    log: Log = []
    dropped = []
    for key, value in state.items():
        if not key.startswith(prefix) or key in CLIP_SCALARS:
            dropped.append((key, "not of the image tower"))
            continue
        name = key.removeprefix(prefix)
        new = rename(name, _FROM) or name
        if name == "proj":
            value = value.t().contiguous()
        elif new in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        out[new] = value
        log.append(((key,), new))
    if "head.weight" in out:
        out["head.bias"] = out["head.weight"].new_zeros(out["head.weight"].shape[0])
        log.append(((), "head.bias"))
    return Translation(out, log, dropped)


def from_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """The tower's keys; the head's weight becomes the projection, which has no bias: one of zeros is left out."""
    out: dict[str, torch.Tensor] = {}
    log: Log = []
    for key, value in state.items():
        if key == "head.bias" and not value.any():
            continue
        new = rename(key, _TO) or key
        if key == "head.weight":
            value = value.t().contiguous()
        elif key in ("cls_token", "pos_embed"):
            value = value[0, 0] if key == "cls_token" else value[0]
        out[new] = value
        log.append(((key,), new))
    return Translation(out, log)


def of_model(own: Mapping[str, Any]) -> bool:
    """Whether a model is such a tower itself, not one around it."""
    return "class_embedding" in own


FORMAT = Format(
    name="clip",
    recognise=recognise,
    to_timm=to_timm,
    from_timm=from_timm,
    of_model=of_model,
    facts=dict(pre_norm=True, value_skip=False),
    always_recognised=True,
)
