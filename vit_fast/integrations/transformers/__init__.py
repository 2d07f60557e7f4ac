"""Hugging Face transformers: the layers of its vision models on the fused operations.

``layer.py`` has a layer as two fused branches, the files beside it its forms, ``families.py`` the classes of each form,
``pooling.py`` SigLIP's head, ``attention_interface.py`` the attention alone, for models whose layers have no such form,
``small_models.py`` a model of each family. Text towers are not touched.
A fast class is made when a model with layers of its class is met, so that no file of transformers is imported for it.
The encoders of CLIP, SigLIP and their kind hold stacks that can be prepared; other models loop over their layers in
their own forward, so their stacks cannot.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from vit_fast.integrations import Found

from .attention_interface import register_attention as register_attention
from .families import Form, family_of, fast_class, layer_class
from .layer import Layer

FAST: dict[type[nn.Module], type[Form]] = {}  # class of a layer → its fast class, of the models that were met
STACKS: dict[type[nn.Module], Any] = {}  # class of a stack of layers → its fast class


def _met(cls: type[nn.Module]) -> bool:
    """Whether a class has a fast class, which is made where it is met for the first time."""
    if cls not in FAST:
        if family_of(cls) is None:
            return False
        fast, stacks = fast_class(cls)
        FAST.setdefault(cls, fast)  # another thread may have met it too
        for stack, fast_stack in stacks.items():
            STACKS.setdefault(stack, fast_stack)
    return True


def __getattr__(name: str) -> Any:
    """The fast class of that name, where pickle asks for one in a process that has not met it."""
    try:
        _met(layer_class(name.removeprefix("Fast")))
    except KeyError:
        pass
    for fast in (*FAST.values(), *STACKS.values()):
        if fast.__qualname__ == name:
            return fast
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> Iterator[Found]:
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if _met(cls):
                if not _reads_text(module, FAST[cls]):
                    yield name, module, cls
                break


def _reads_text(module: Any, fast: type[Form]) -> bool:
    """Whether a layer belongs to a text tower, which may have the same class as the vision tower's."""
    if not issubclass(fast, Layer):
        return False
    try:
        config = fast.parts(module).attention.config
    except AttributeError:  # parts that are no longer those of the library
        return False
    return "Text" in type(config).__name__
