"""What the fast classes of the libraries share: when a block may run fused, and the stack that holds such blocks.

A file of this folder serves one library and is imported only where that library is. ``vit_fast.optimize`` swaps
``module.__class__`` for a fast class, a subclass of the library's own without fields. It decides ahead of each call:
where something is in the way, the library's own forward runs, so that every hook of an inner module fires, and the
reason is noted for ``explain``. It has

    OPERATION          what it is in the rows of ``explain``
    SUBMODULES         path of each sub-module → the classes it may have (``vit_fast.plain``)
    not_covered(self)  what its formula does not cover, or None; asked of the library's instance too, before the swap
    params(self)       its weights (``BlockParams``), where its stack can be prepared

and the file has ``FAST``, class → fast class, ``find(model)``: (name, module, class of the library) of what it may
serve, instances of subclasses too, and perhaps ``STACKS``, class → fast class of what holds a stack of blocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from vit_fast import backends
from vit_fast.block import run_blocks
from vit_fast.kernels.arguments import UnsupportedError
from vit_fast.plain import TENSORS, Fusible

Found = tuple[str, nn.Module, type]  # name, module, class of the library

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by the word of nn.GELU


class Swapped(nn.Module):
    """Base of every class that ``vit_fast.optimize`` gives a module, in front of the library's class."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise UnsupportedError(
            "torch.jit.script: the model is optimised, and its fast classes cannot be scripted; call "
            "vit_fast.restore(model) first, or use torch.jit.trace, torch.export or torch.compile"
        )


class BlockStack(Swapped, nn.Sequential):
    """A stack of fast blocks: the blocks one by one, or all at once where ``vit_fast.prepare`` has prepared them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return run_blocks(self, input)

    @staticmethod
    def stack(module: nn.Module) -> nn.Module:
        """The blocks of a module that may become this class."""
        return module


class Fused(Swapped, Fusible):
    """Base of the fast classes of blocks and patch embeddings."""

    def run_library(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The library's own forward; the reason is noted for ``explain``."""
        backends.note(self.OPERATION, "library", (reason,))
        return super().forward(*args, **kwargs)

    def is_fused(self) -> bool:
        """Whether the block may run fused; ``run_library`` notes the reason where it does not."""
        return self.not_fused() is None


def unknown_submodules(module: nn.Module, fast: type[Fusible]) -> list[str]:
    """Sub-modules that a fast class does not know: a library's newer version may run them."""
    return sorted({name for name, _ in module.named_modules()} - {name for name, *_ in fast.SUBMODULES} - {""})


def given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Which optional argument, a mask above all, is neither left out nor None nor False, or None."""
    for name, value in kwargs.items():
        if value is not None and value is not False:
            return f"{name} is given"
    for value in args:
        if value is not None and value is not False:
            return "a mask or another argument beside the input is given"
    return None


def not_dense(x: torch.Tensor, dims: int) -> str | None:
    """Why x is no plain tensor of so many dimensions, or None; a tracer of torch.fx watches others."""
    if type(x) not in TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.is_nested:
        return "the input is a nested tensor"
    return f"the input has {x.dim()} dimensions, not {dims}" if x.dim() != dims else None


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def not_taken(x: torch.Tensor, weight: torch.Tensor, *gammas: torch.Tensor | None) -> str | None:
    """Why x is not a plain [B, N, C] in the dtype that the library's own forward would return, or None: the fused
    branches return that of the residual."""
    if reason := not_dense(x, 3):
        return reason
    if autocasts(x):
        low = torch.get_autocast_dtype(x.device.type)
        if x.dtype == torch.float32 or (x.dtype == low and all(gamma is None for gamma in gammas)):
            return None
        return f"the input is {x.dtype} under autocast to {low}"
    if x.dtype != weight.dtype:
        return f"the input is {x.dtype}, the weights are {weight.dtype}"
    for gamma in gammas:
        if gamma is not None and gamma.dtype != x.dtype:
            return f"the input is {x.dtype}, LayerScale is {gamma.dtype}"
    return None


def instances(model: nn.Module, classes: Iterable[type]) -> Iterator[Found]:
    """(name, module, class) of every module of the classes, of subclasses too."""
    module: nn.Module
    for name, module in model.named_modules():
        yield from ((name, module, cls) for cls in classes if isinstance(module, cls))
