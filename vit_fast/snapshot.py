"""Snapshot: the state of modules when something was derived from them, and whether it has changed since.

``prepare`` derives folded weights and ``graphed`` derives CUDA graphs. Both check for changes in every call, so the
comparison is a few passes of C code over flat lists.
"""

from collections.abc import Iterable
from itertools import chain, compress, count
from operator import attrgetter, is_, is_not, ne
from types import NoneType
from typing import Any

import torch
from torch import nn

from .block import PREPARED

_CONSTANTS = (NoneType, bool, int, float, complex, str, torch.dtype, torch.device)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DICTS = ("_parameters", "_buffers", *HOOKS)
_TORCHS = vars(nn.Module()).keys() - {"training"}  # every module has these; only _DICTS are compared
_pointer, _version = torch.Tensor.data_ptr, attrgetter("_version")


def _is_constant(value):
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


def _is_seen(key, attribute):
    """Whether an attribute is compared: it decides what its module computes and is no state that forward updates."""
    return key not in _TORCHS and (_is_constant(attribute) or callable(attribute) or key == PREPARED)


class Snapshot:
    """Classes, sub-modules, parameters, buffers, hooks, training mode and constant attributes of modules.

    A tensor counts as changed when it is another object, lies elsewhere or, with ``versions``, has a new version. Not
    detected: writes that raise no version (through ``parameter.data``, into inference tensors), and changes inside
    attributes that are lists, dicts or other objects.

    Args:
        modules: name → module; sub-modules of these count only where they are named themselves.
        versions: whether writes in place count.
    """

    def __init__(self, modules: dict[str, nn.Module], versions: bool = True) -> None:
        self._names, self._modules = list(modules), list(modules.values())
        self._classes = [*map(type, self._modules)]
        # The dicts that hold entries, and the name of the module of each.
        self._owners: list[str] = []
        self._dicts: list[dict[str, Any]] = []
        # The entries: their path, the dict that holds them, their key there, their value.
        self._paths: list[str] = []
        self._holders: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        for name, module in modules.items():
            attributes = vars(module)
            constants = ((key, value) for key, value in attributes.items() if _is_seen(key, value))
            self._add(name, attributes, constants)
            for word in _DICTS:
                self._add(name, attributes[word], attributes[word].items())
            self._add(name, attributes["_modules"], ())
        self._sizes = [*map(len, self._dicts)]
        self._size = sum(self._sizes)
        self._children = [vars(module)["_modules"] for module in self._modules]
        self._order = [*chain.from_iterable(map(dict.values, self._children))]
        self._parents = [name for name, children in zip(modules, self._children) for _ in children]
        held = {path: value for path, value in zip(self._paths, self._values) if isinstance(value, torch.Tensor)}
        self._held, self.tensors = list(held), list(held.values())
        self._pointers = [*map(_pointer, self.tensors)]
        self._counted = [path for path in held if versions and not held[path].is_inference()]
        self._versioned = [held[path] for path in self._counted]
        self._versions = [*map(_version, self._versioned)]

    def _add(self, name, holder, entries):
        self._owners.append(name)
        self._dicts.append(holder)
        for key, value in entries:
            self._paths.append(f"{name}.{key}".removeprefix("."))
            self._holders.append(holder)
            self._keys.append(key)
            self._values.append(value)

    def changed(self) -> str | None:
        """The path of the first change found, or None."""
        if not all(map(is_, self._values, map(dict.get, self._holders, self._keys))):
            now = [*map(dict.get, self._holders, self._keys)]
            for index in compress(count(), map(is_not, self._values, now)):
                was, value = self._values[index], now[index]
                if type(was) is not type(value) or not _is_constant(was) or was != value:
                    return self._paths[index]
                self._values[index] = value  # a new object with an equal value
        if sum(map(len, self._dicts)) != self._size:
            return next(compress(self._owners, map(ne, self._sizes, map(len, self._dicts)))) or "the model"
        compared: tuple[tuple[list[str], list[Any], Iterable[Any]], ...] = (
            (self._parents, self._order, chain.from_iterable(map(dict.values, self._children))),
            (self._names, self._classes, map(type, self._modules)),
            (self._held, self._pointers, map(_pointer, self.tensors)),
            (self._counted, self._versions, map(_version, self._versioned)),
        )
        for names, was, values in compared:
            now = [*values]
            if was != now:
                return next(compress(names, map(ne, was, now))) or "the model"
        return None
