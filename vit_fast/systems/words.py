"""Constructor words that come in several forms: two spellings, an activation or a LayerNorm as a word or as a class."""

import math
from numbers import Real

from torch import nn

from . import checks

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu"}


def one_spelling(family, name, value, other_name, other_value, default):
    """The value of a word with two spellings; None is not given, two different values are an error."""
    if value is not None and other_value is not None and value != other_value:
        checks.fail(family, other_name, other_value, f"{value!r} (as {name}, the same word)")
    chosen = other_value if value is None else value
    return default if chosen is None else chosen


def positive(family, name, value):
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"vit_fast.systems.{family}: {name} is {value!r}, expected a number")
    if not 0.0 < value < math.inf:
        checks.fail(family, name, value, "a finite number above 0")
    return value


def activation_word(family, name, value):
    """The library's word for an activation word, class or partial; None for the class of another activation."""
    if isinstance(value, str):
        return checks.one_of(family, name, value, tuple(_ACTIVATIONS.values()))
    module = value() if callable(value) else None
    if not isinstance(module, nn.Module):
        checks.fail(family, name, value, "the word or the class of an activation")
    word = _ACTIVATIONS.get(type(module).__name__)
    return "gelu_tanh" if word == "gelu" and getattr(module, "approximate", "none") == "tanh" else word


def norm_eps(family, name, norm_layer, default):
    """eps of a LayerNorm class or partial; the default where there is none."""
    if norm_layer is None:
        return default
    norm = norm_layer(1) if callable(norm_layer) else None
    if not isinstance(norm, nn.LayerNorm):
        checks.fail(family, name, norm_layer, "a LayerNorm class")
    return norm.eps
