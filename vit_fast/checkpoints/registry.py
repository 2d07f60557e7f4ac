"""The formats that checkpoints may have. A new one is a file of this folder and an entry of ``FORMATS``."""

from collections.abc import Iterable, Mapping
from typing import Any

from . import canonical, clip, dinov2, google_npz, huggingface, jeonsworld, lanl, mae, timm, torch_layers
from .base import Format
from .errors import WeightsError, prefix_remedy

# In the order in which errors list them. They are recognised from the last to the first: a format that has the keys of
# another and some more has to come after it.
FORMATS: list[Format] = [
    timm.FORMAT,
    canonical.FORMAT,
    clip.FORMAT,
    huggingface.FORMAT,
    dinov2.FORMAT,
    mae.FORMAT,
    jeonsworld.FORMAT,
    google_npz.FORMAT,
    lanl.FORMAT,
    torch_layers.FORMAT,
]


def names() -> list[str]:
    """The names of all formats."""
    return [known.name for known in FORMATS]


def targets() -> list[str]:
    """The names of the formats that ``convert_state_dict`` writes."""
    return [known.name for known in FORMATS if known.is_target]


def by_name(name: str) -> Format | None:
    """The format of a name, or None."""
    return next((known for known in FORMATS if known.name == name), None)


def recognised(state: Mapping[str, Any]) -> Format | None:
    """The format whose keys a state_dict has, or None."""
    return next((known for known in reversed(FORMATS) if known.recognise(state)), None)


def of_model(own: Mapping[str, Any]) -> Format | None:
    """The format whose keys a model's own state_dict has, or None of a model that takes its own keys alone."""
    return next((known for known in reversed(FORMATS) if known.of_model and known.of_model(own)), None)


def format_of(state: Mapping[str, Any], name: str | None = None) -> Format:
    """The format of a state_dict: the named one, which the keys must not contradict, or the one that has these keys.

    Raises:
        ValueError: an unknown name, or one that the keys contradict.
        WeightsError: keys of no known format.
    """
    known = recognised(state)
    if name is not None:
        given = by_name(name)
        if given is None:
            raise ValueError(f"vit_fast.checkpoints: family is {name!r}, expected one of {', '.join(names())}")
        if known is None and not given.always_recognised:
            return given
        if known is not None and (known.variant_of or known.name) == (given.variant_of or given.name):
            return given
        if known is not None:
            raise ValueError(f"vit_fast.checkpoints: family is {name!r}, expected {known.name!r}, whose keys these are")
    if known is None:
        raise WeightsError(
            f"vit_fast.checkpoints: keys such as {', '.join(sorted(state)[:4])} belong to no known family, "
            f"expected one of {', '.join(names())}{_prefix_hint(state)}"
        )
    return known


def family_of(state: Mapping[str, Any]) -> str:
    """The name of the program whose keys a state_dict has.

    Raises:
        WeightsError: keys of no known program.
    """
    return format_of(state).name


def _prefix_hint(state: Iterable[str]) -> str:
    """``prefix_remedy`` where keys of a known format stand under a prefix of at most three names."""
    parts = [key.split(".") for key in state]
    for count in (1, 2, 3):
        for prefix in dict.fromkeys(".".join(part[:count]) + "." for part in parts if len(part) > count):
            if recognised({key.removeprefix(prefix): None for key in state if key.startswith(prefix)}):
                return prefix_remedy(prefix)
    return ""
