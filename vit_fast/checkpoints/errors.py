"""Errors of weight files, and what their texts share."""

from collections.abc import Iterable


class WeightsError(ValueError):
    """A weight file that cannot be had, cannot be read, or does not fit the model."""


class MissingKeyError(WeightsError, KeyError):
    """A key that a checkpoint of a known format lacks."""

    __str__ = Exception.__str__  # KeyError's own puts the text in quotes


def listed(keys: Iterable[str]) -> str:
    """The first eight of some keys, sorted, and how many more there are."""
    keys = sorted(keys)
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def prefix_remedy(prefix: str) -> str:
    """What to do where the keys of a state_dict stand under a prefix, as the end of an error's text."""
    return (
        f"; its keys stand under {prefix!r}: pass "
        f"{{k.removeprefix({prefix!r}): v for k, v in state.items() if k.startswith({prefix!r})}}"
    )
