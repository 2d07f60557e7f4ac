"""The image size that a model was built for, read from models of vit_fast, timm, torchvision and transformers."""

from typing import Any

from torch import nn


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width), or None for a model that does not hold its image size."""
    config, default = getattr(model, "config", None), getattr(model, "default_cfg", None)
    embed, channels = getattr(model, "patch_embed", None), getattr(model, "in_chans", 3)
    if size := getattr(embed, "img_size", None):  # timm's set_input_size updates this and not default_cfg
        return (channels, *_pair(size))
    if isinstance(default, dict) and "input_size" in default:
        return tuple(default["input_size"])
    for owner, its_channels in ((model, channels), (config, getattr(config, "num_channels", 3))):
        if size := getattr(owner, "img_size", None) or getattr(owner, "image_size", None):
            return (its_channels, *_pair(size))
    return None


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height, width
