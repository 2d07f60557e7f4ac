"""Models of vit_fast and of timm by name; an unknown name or a bad argument becomes a one-line error."""

import difflib
from typing import Any

import torch
from torch import nn

import vit_fast

from .errors import BenchError, reason


def _cannot_make(owner, name, error):
    return BenchError(f"{owner} cannot make the model {name!r}: {reason(error)}")


def vit_fast_model(name: str, pretrained: bool = False, /, **kwargs: Any) -> nn.Module:
    """A model of vit_fast, in ``eval``."""
    try:
        return vit_fast.create_model(name, pretrained=pretrained, **kwargs).eval()
    except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
        raise _cannot_make("vit_fast", name, error) from error


def check_buildable(name: str, /, **kwargs: Any) -> None:
    """Raises BenchError for a model that vit_fast cannot make. Cheap: the model is built on the meta device."""
    with torch.device("meta"):
        vit_fast_model(name, **kwargs)


def timm_model(name: str, pretrained: bool = False, /, **kwargs: Any) -> nn.Module:
    """A model of timm, in ``eval``; the error of an unknown name lists similar ones."""
    import timm

    if not timm.is_model(name) and ":" not in name:
        near = ", ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5))
        raise _cannot_make("timm", name, f"unknown model{near and '; near: ' + near}")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except Exception as error:  # timm, torch and huggingface_hub raise classes of their own; the text is what counts
        raise _cannot_make("timm", name, error) from error
