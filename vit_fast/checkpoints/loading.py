"""State_dicts and files into models, always strict: nothing is dropped or left out silently."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from . import registry
from .conversion import for_model
from .errors import WeightsError, listed, prefix_remedy
from .files import read_state_dict, why_unusable
from .fitting import resized_table

Model = TypeVar("Model", bound=nn.Module)
Loader = TypeVar("Loader", bound=Callable[..., Any])

_LOADERS: dict[type[nn.Module], Callable[..., Any]] = {}  # what ``loads`` declared, by class of model

# What a file may lack and a model may be built without, by the beginning of its keys: how to build one.
_ABSENT = {
    "head.": "it holds no classifier: num_classes=0 builds a model without one",
    "pre_logits.": "it holds no pre_logits: representation_size=0 builds a model without them",
}


def _prefix_hint(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """``prefix_remedy`` where most of the model's keys stand under a prefix in the file; the head may be another."""
    first = next(iter(own))
    for key in state:
        prefix = key.removesuffix(first)
        if prefix and prefix != key and 2 * sum(prefix + name in state for name in own) > len(own):
            return prefix_remedy(prefix)
    return ""


def load_state_dict(
    model: Model,
    state: Mapping[str, torch.Tensor],
    fit: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
) -> Model:
    """Strict load; mismatches of keys, shapes and dtypes are listed in one ``WeightsError`` and nothing is changed.

    A floating dtype may differ from the model's; integers for floats are a mismatch.

    Args:
        state: a state_dict; names of the formats of ``registry.FORMATS`` are translated first, and the log tells of
            every key.
        fit: a function of the state_dict under the model's names, which returns the one to load (position tables).
    Returns:
        the model.
    Raises:
        TypeError: no state_dict of tensors.
        WeightsError: tensors that cannot be loaded or do not fit.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"vit_fast: state is {type(state).__name__}, expected a state_dict of tensors")
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"vit_fast: {key} of the state is {type(value).__name__}, expected a torch.Tensor")
        if not on_meta and (why := why_unusable(value)):
            raise WeightsError(f"vit_fast: {key} of the state is {why}, expected a dense tensor with values")
    source = registry.recognised(state)
    state = for_model(model, state, source)
    if fit is not None:
        state = fit(dict(state))
    own = model.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    dtypes = [
        f"{key} {state[key].dtype} instead of {own[key].dtype}"
        for key in own.keys() & state.keys()
        if state[key].is_floating_point() != own[key].is_floating_point()
    ]
    problems = []
    if missing:
        absent = {part: {key for key in own if key.startswith(part)} for part in _ABSENT}
        hints = [hint for part, hint in _ABSENT.items() if absent[part] and absent[part] <= missing]
        told = hints and missing <= set().union(*absent.values())
        problems.append(f"missing {listed(missing)}" + (f" ({'; '.join(hints)})" if told else ""))
    if unexpected:
        problems.append(f"unexpected {listed(unexpected)}")
    if shapes:
        tables = [key for key in ("pos_embed", "positional_embedding") if key in own and key in state]
        rows = any(state[key].shape[-2] != own[key].shape[-2] for key in tables if state[key].dim() == own[key].dim())
        hint = " (old_grid=(rows, columns) says which grid the file's table has)" if rows else ""
        problems.append(f"wrong shape {listed(shapes)}{hint}")
    if dtypes:
        problems.append(f"wrong dtype {listed(dtypes)}")
    if problems:
        raise WeightsError(
            f"vit_fast: weights do not fit {type(model).__name__}: {'; '.join(problems)}{_prefix_hint(state, own)}"
        )
    model.load_state_dict(state)
    if source is not None and source.loaded is not None:
        source.loaded(model)
    return model


def loads(*classes: type[nn.Module]) -> Callable[[Loader], Loader]:
    """Declares the decorated function to be what ``load_checkpoint`` loads models of these classes with.

    It is called as load(model, path), with old_grid=(rows, columns) where that was given.
    """

    def declare(load: Loader) -> Loader:
        _LOADERS.update(dict.fromkeys(classes, load))
        return load

    return declare


def load_checkpoint(model: Model, path: str | os.PathLike[str], old_grid: tuple[int, int] | None = None) -> Model:
    """Loads a file into a model; a position embedding of another grid is resized.

    Args:
        model: a ``VisionTransformer``, or a model of ``vit_fast.systems``, which its family's ``load`` loads.
        path: a file of ``read_state_dict``: timm's keys, or those of another format of ``registry.FORMATS``. The log
            says at level INFO what became of every key, and as a warning what was left out.
        old_grid: (rows, columns) of the file's position embedding; default the model's own grid where the count is the
            same, else a square.
    Returns:
        the model.
    Raises:
        WeightsError: unreadable file, or keys or shapes that do not fit (listed).
    """
    load = next((_LOADERS[cls] for cls in type(model).__mro__ if cls in _LOADERS), None)
    if load is not None:
        return load(model, path, **({} if old_grid is None else {"old_grid": old_grid}))

    vit: Any = model

    def fit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table, own = state.get("pos_embed"), vit.pos_embed
        if table is None or own is None or table.dim() != 3 or (old_grid is None and table.shape == own.shape):
            return state
        grid, subject = vit.patch_embed.grid_size, f"vit_fast: pos_embed of {str(path)!r}"
        table = resized_table(subject, table, old_grid, grid, vit.pos_embed_policy, vit._pos_prefix)
        return {**state, "pos_embed": table}

    return load_state_dict(model, read_state_dict(path), fit)
