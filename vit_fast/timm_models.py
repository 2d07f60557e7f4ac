"""Models of timm's ViT family that are not built here: timm builds them, ``optimize`` lets their blocks run fused.

EVA-02, DINOv3, BEiT, SAM, NaFlexViT, ViTamin, hybrids and others. The parameters, their keys, the arguments and the
outputs are timm's.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .checkpoints import WeightsError, hub
from .class_swap import optimize


def build(
    name: str,
    asked_for: str,
    pretrained: bool,
    checkpoint_path: str | None,
    cfg: Mapping[str, Any],
    cache_dir: str | None,
    features: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> nn.Module:
    """A model of timm's, optimised.

    Args:
        name: timm's name, without a tag; asked_for: what the user wrote, for errors.
        cfg: its ``pretrained_cfg``.
        features: features_only and out_indices, or nothing.
        arguments: what timm's constructor is given.
    Raises:
        ImportError: timm is not installed.
        TypeError: an argument that timm's class does not take.
        WeightsError: weights that cannot be had or do not fit.
        UnsupportedError: none of its blocks can run fused.
    """
    timm = hub.import_timm(f"{asked_for!r}")
    try:
        model = timm.create_model(
            name, pretrained, cfg or None, checkpoint_path=checkpoint_path, cache_dir=cache_dir, **features, **arguments
        )
    except TypeError as error:
        raise TypeError(f"vit_fast.create_model: timm's {name!r} does not take these arguments: {error}") from error
    except Exception as error:
        # As in ``hub``: what timm and huggingface_hub raise about weights has no common class.
        if not (pretrained or checkpoint_path):
            raise
        raise WeightsError(
            f"vit_fast.create_model: weights of {asked_for!r} cannot be had through timm: {error}"
        ) from error
    return optimize(model)
