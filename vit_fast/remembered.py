"""What was found in the parts of a module, remembered until one of them changes.

A block looks in every call whether its parts are plain (``plain``) and reads their settings. Both stay the same from
call to call, so they are kept with what they were made of, and the comparison is a few passes of C code over flat
lists. No tensor is kept: parameters are read anew in each call, here their types alone are compared.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_values = dict.values


class Remembered:
    """Something that was found in a module and its parts, and whether these are as they were.

    Compared are classes, sub-modules and all attributes of the parts (by identity, else by ``==``), that there are no
    hooks, and the types of parameters. Changes inside attributes that are lists, dicts or other objects are not seen.

    Attributes:
        found: what was found; holds neither the module nor a tensor.
    """

    def __init__(self, module: nn.Module, parts: Iterable[nn.Module], found: Any) -> None:
        own = vars(module)
        self.found, self._class, self._parts = found, type(module), tuple(parts)
        self._classes = [*map(type, self._parts)]
        # Not vars(module) itself, which would keep the module alive.
        self._keys, self._own = [*own], [*own.values()]
        every = [*map(vars, self._parts)]
        self._hooks = [attributes[name] for attributes in every for name in _HOOKS]
        self._dicts = [*every, *(attributes["_modules"] for attributes in (own, *every) if attributes["_modules"])]
        self._flat = [*chain.from_iterable(map(_values, self._dicts))]
        self._parameters = [attributes["_parameters"] for attributes in (own, *every) if attributes["_parameters"]]
        self._types = [*map(type, chain.from_iterable(map(_values, self._parameters)))]

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed."""
        own = module.__dict__
        try:
            return (
                type(module) is self._class
                and not any(self._hooks)
                and [*map(own.get, self._keys)] == self._own
                and len(own) == len(self._own)
                and [*chain.from_iterable(map(_values, self._dicts))] == self._flat
                and [*map(type, self._parts)] == self._classes
                and [*map(type, chain.from_iterable(map(_values, self._parameters)))] == self._types
            )
        except (RuntimeError, ValueError):  # an attribute is another tensor or array, without a truth value
            return False


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules carries a hook."""
    return any(vars(module)[name] for module in modules for name in _HOOKS)


_kept: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()


def recall(module: nn.Module) -> Remembered | None:
    """What is remembered of a module, if nothing has changed."""
    kept = _kept.get(module)
    return kept if kept is not None and kept.holds(module) else None


def remember(module: nn.Module, parts: Iterable[nn.Module], found: Any) -> None:
    _kept[module] = Remembered(module, parts, found)
