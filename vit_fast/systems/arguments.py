"""Shared by the families, beside the block: checks of arguments and images, and reading of state_dicts.

Messages are ``vit_fast.systems.<family>: <argument> is <what came>, expected <what is wanted>``.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import nn

from vit_fast import layer_args
from vit_fast.checkpoints.files import read_state_dict, unwrap
from vit_fast.kernels.arguments import UnsupportedError
from vit_fast.kernels.tracing import untraced
from vit_fast.layer_args import activation_of, built

Size = int | Sequence[int]  # of a square, or (height, width)
Layer = Callable[..., nn.Module]  # a class, partial or function that makes a layer
Source = Mapping[str, Any] | str | os.PathLike[str]  # a state_dict, a checkpoint around one, or a file

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu")


def fail(family: str, name: str, value: Any, wanted: str) -> NoReturn:
    """Raises ``ValueError`` for an argument."""
    raise ValueError(f"vit_fast.systems.{family}: {name} is {value!r}, expected {wanted}")


def integer(family: str, name: str, value: Any, minimum: int = 1) -> int:
    """An int; a float that holds a whole number passes, as several originals compute sizes with ``/``."""
    if isinstance(value, bool) or not isinstance(value, (Integral, float)):
        raise TypeError(f"vit_fast.systems.{family}: {name} is {value!r}, expected an int")
    if not float(value).is_integer() or value < minimum:
        fail(family, name, value, f"a whole number, {minimum} or more")
    return int(value)


def pair(family: str, name: str, value: Any, minimum: int = 1) -> tuple[int, int]:
    """An int or a pair (list or tuple) of ints as a pair."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        fail(family, name, value, "an int or a pair of ints")
    first, second = (integer(family, name, size, minimum) for size in values)
    return first, second


def rate(family: str, name: str, value: Any) -> float:
    """A drop rate, 0 ≤ rate < 1."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"vit_fast.systems.{family}: {name} is {value!r}, expected a float")
    number: Any = value
    if not 0.0 <= number < 1.0:
        fail(family, name, value, "0 ≤ rate < 1")
    return float(number)


def positive(family: str, name: str, value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"vit_fast.systems.{family}: {name} is {value!r}, expected a number")
    number: Any = value
    if not 0.0 < number < math.inf:
        fail(family, name, value, "a finite number above 0")
    return number


def one_of(family: str, name: str, value: Any, choices: Sequence[Any]) -> Any:
    """The value itself where it is among the choices."""
    if value not in choices:
        fail(family, name, value, f"one of {', '.join(repr(choice) for choice in choices)}")
    return value


def one_of_two(family: str, name: str, value: Any, other_name: str, other_value: Any, default: Any) -> Any:
    """The value of an argument that has two names. None counts as not given; two different values are an error."""
    if value is not None and other_value is not None and value != other_value:
        fail(family, other_name, other_value, f"{value!r} (as {name}, the same argument)")
    chosen = other_value if value is None else value
    return default if chosen is None else chosen


def activation_name(family: str, name: str, value: Any) -> str | None:
    """This library's name of an activation given as a name, class or partial; None for a class it does not know."""
    if isinstance(value, str):
        return one_of(family, name, value, _ACTIVATIONS)
    if built(value) is None:
        fail(family, name, value, "the name or the class of an activation")
    activation = activation_of(value)
    return activation if activation in _ACTIVATIONS else None


def norm_maker(family: str, norm_layer: Layer | None, eps: float, **dd: Any) -> Callable[..., nn.Module]:
    """A function that makes a family's LayerNorms from their width; ``eps`` applies where norm_layer is None."""
    return layer_args.norm_maker(f"vit_fast.systems.{family}: norm_layer", norm_layer, eps, **dd)


def check_heads(family: str, heads_name: str, heads: int, width_name: str, width: int) -> None:
    """``ValueError`` unless the heads divide the width."""
    if width % heads:
        fail(family, heads_name, heads, f"a divisor of {width_name} {width}")


def check_traceable(family: str, images: Any) -> None:
    """``UnsupportedError`` where torch.fx traces the model: these forwards read the sizes of images."""
    if isinstance(images, torch.fx.Proxy):
        raise UnsupportedError(
            f"vit_fast.systems.{family}: torch.fx cannot trace this model; "
            "take features with forward hooks, or a graph with torch.export"
        )


@untraced
def check_images(family: str, images: Any, in_chans: int) -> None:
    """``TypeError`` or ``ValueError`` unless images are a tensor [B, in_chans, H, W]."""
    check_traceable(family, images)
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"vit_fast.systems.{family}: images are {type(images).__name__}, expected a torch.Tensor")
    if images.dim() != 4:
        raise ValueError(
            f"vit_fast.systems.{family}: images have {images.dim()} dimensions, expected 4 [B, {in_chans}, H, W]"
        )
    if images.shape[1] != in_chans:
        raise ValueError(f"vit_fast.systems.{family}: images have {images.shape[1]} channels, expected {in_chans}")


def check_float(family: str, images: Any) -> None:
    """``ValueError`` unless the images are of a floating dtype."""
    if not images.is_floating_point():
        raise ValueError(f"vit_fast.systems.{family}: images have dtype {images.dtype}, expected floating point")


def fail_images(family: str, images: Any, wanted: str) -> NoReturn:
    """Raises ``ValueError`` for an image size."""
    raise ValueError(f"vit_fast.systems.{family}: images are {images.shape[2]}×{images.shape[3]}, expected {wanted}")


def state_of(family: str, source: Source, torchscript: bool = False) -> dict[str, torch.Tensor]:
    """A new dict of tensors from a state_dict, a checkpoint that wraps one, or a file that ``read_state_dict`` reads.

    Raises:
        TypeError: neither a mapping nor a path.
        WeightsError: unreadable file, or something else than tensors inside.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_state_dict(source, torchscript=torchscript)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"vit_fast.systems.{family}: weights are {type(source).__name__}, expected a state_dict or a path"
        )
    return unwrap(source, f"vit_fast.systems.{family}: a checkpoint")
