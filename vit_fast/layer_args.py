"""Arguments that are classes: what a ``norm_layer`` builds, and which activation an ``act_layer`` computes.

A given class is built, replaced by a layer of this library that computes the same, or refused with its name.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .kernels.reference import activate

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu")
_LAYER_NORMS = {  # compute the same as nn.LayerNorm, in 16 bits too because its statistics are float32
    ("timm", "LayerNorm"), ("timm", "LayerNormFp32"), ("open_clip", "LayerNorm"), ("open_clip", "LayerNormFp32"),
}  # fmt: skip


def library(cls: type) -> str:
    """The package that defines a class."""
    return cls.__module__.partition(".")[0]


def built(layer: Any, *args: Any) -> nn.Module | None:
    """What a class, a partial or a function of a module builds; None where it builds no module."""
    if not isinstance(layer, (type, partial, FunctionType)):
        return None
    try:
        module = layer(*args)
    except TypeError:
        return None
    return module if isinstance(module, nn.Module) else None


def norm_maker(
    message: str,
    norm_layer: Any,
    eps: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[int], nn.Module]:
    """A function that makes the LayerNorms of a model from their width.

    Args:
        message: beginning of the error, as "vit_fast.VisionTransformer: norm_layer".
        norm_layer: a class, partial or function whose module is an ``nn.LayerNorm``, or None. timm's and open_clip's
            LayerNorms become torch's, of which they are copies; a subclass with a forward of its own stays what it is.
        eps: where norm_layer is None.
    Raises:
        ValueError: another layer.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    if norm_layer is None:
        return partial(nn.LayerNorm, eps=eps, **dd)
    norm = built(norm_layer, 1)
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"{message} is {norm_layer!r}, expected a LayerNorm class")
    if type(norm) is nn.LayerNorm or (library(type(norm)), type(norm).__name__) in _LAYER_NORMS:
        options = dict(elementwise_affine=norm.elementwise_affine, bias=norm.bias is not None)
        return partial(nn.LayerNorm, eps=norm.eps, **options, **dd)
    return lambda width: norm_layer(width).to(**dd)


def activation_of(act_layer: Any) -> str | None:
    """The name of the activation that a class, partial or function builds, found from its values, or None."""
    module = built(act_layer)
    if module is None or module.state_dict():
        return None
    with _disable_current_modes():  # values are compared, so no fake tensors
        x = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64, device="cpu")
        x = torch.cat([x, 10 * x, 1000 * x])
        y, wanted = module(x.clone()), {word: activate(x, word) for word in _ACTIVATIONS} | {"silu": F.silu(x)}
        return next((word for word, z in wanted.items() if y.shape == z.shape and torch.allclose(y, z, 0, 1e-12)), None)
