"""Shared by the fast classes of all libraries: when a block may run fused, and the stack that holds such blocks.

Each file or package of this folder is for one library and is imported only if that library is loaded.
``vit_fast.optimize`` swaps ``module.__class__`` for a fast class, a subclass of the library's own without fields. The
fast class decides before each call whether it may run fused; if not, the library's own forward runs, so that every hook
of an inner module fires, and the reason is noted for ``explain``. A fast class has

    OPERATION          its name in the rows of ``explain``
    SUBMODULES         path of each sub-module → the classes it may have (``vit_fast.plain``)
    not_covered(self)  why the fused form does not cover it, or None; also called on the library's instance, before the
                       swap
    CALLED             paths of sub-modules that it calls, so that they may be of any class
    params(self)       its weights (``BlockParams``), where it can be prepared; not_folded(self): why they do not
                       describe the block, or None

and the file has ``FAST``, class → fast class; ``find(model)``, which yields (name, module, class of the library) of the
modules that may be swapped, instances of subclasses too; and optionally ``STACKS``, class → fast class of the modules
that hold a stack of blocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from vit_fast import backends
from vit_fast.block import pass_over_prepared, run_blocks
from vit_fast.kernels.activation_names import GATED
from vit_fast.kernels.arguments import UnsupportedError
from vit_fast.kernels.tracing import autocasts, is_fx_symbolic_tracing, untraced
from vit_fast.key_masks import key_lengths
from vit_fast.plain import TENSORS, Fusible

from .feature_graphs import called_in_feature_graph

Found = tuple[str, nn.Module, type]  # name, module, class of the library

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by the argument ``approximate`` of nn.GELU
GATED_BY = {gate: word for word, gate in GATED.items()}  # activation of a gate → the gated activation


class Swapped(nn.Module):
    """Base of every class that ``vit_fast.optimize`` gives a module; it precedes the library's class in the MRO.

    Its ``__name__`` is that of the library's class, by which accelerate, Trainer and others choose the modules that
    they load or shard as a whole; ``__qualname__`` stays its own, by which pickle finds it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        library = next(base for base in cls.__mro__ if base.__module__.partition(".")[0] != "vit_fast")
        if library is not nn.Module:
            cls.__name__ = library.__name__

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
        """The container of the blocks in a module that may be swapped to this class."""
        return module


class Fused(Swapped, Fusible):
    """Base of the fast classes of blocks and patch embeddings."""

    RUNS_PREPARED = False  # whether a block looks for prepared weights of its own
    STACKABLE = True  # whether ``params`` is all that a block computes with, so that a stack can be prepared as a whole
    RUNS_PARTS = False  # whether it runs ``fused_parts`` of its twin where ``prepare`` prepares its linear layers alone
    CALLED: tuple[str, ...] = ()  # paths of sub-modules that the fused form calls, whatever they are

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        """The fused form, in eval mode and without a look at whether it may run: what ``prepare`` calls on the block's
        twin (``vit_fast.twin``)."""
        raise NotImplementedError

    def layers_of_one_input(self) -> Sequence[Sequence[nn.Linear]]:
        """Linear layers that the fused form applies to the same tokens by ``twin.linears``, group by group."""
        return ()

    def settle_twin(self) -> None:
        """Called once on the twin: computes what each call would compute of parameters alone."""

    def not_folded(self) -> str | None:
        """Why ``params`` does not describe the block, so that ``vit_fast.prepare`` leaves it, or None."""
        return None

    def run_library(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The library's own forward; the reason is noted for ``explain``."""
        pass_over_prepared(self, reason)
        backends.note(self.OPERATION, "library", (reason,))
        output = super().forward(*args, **kwargs)
        return called_in_feature_graph(self, output, args, kwargs) if is_fx_symbolic_tracing() else output

    def is_fused(self) -> bool:
        """Whether the block may run fused; ``run_library`` notes the reason where it does not."""
        return self.not_fused() is None


def norm_kind(module: Any) -> str:
    """The argument ``norm`` of an operation for a LayerNorm or RMSNorm."""
    return "layer" if isinstance(module, nn.LayerNorm) else "rms"


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as ``ops.attention`` adds it to the scores, with four dimensions. In a mask of bools True stands for the
    keys that take part."""
    mask = mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def mask_options(block: nn.Module, mask: torch.Tensor, dtype: torch.dtype, scores: Sequence[int]) -> dict[str, Any]:
    """The options of ``ops.attention`` for a mask that a block is given with tokens of a dtype: lengths of keys where
    it is one of padding, else what is added to the scores.

    Args:
        scores: their sizes [B, H, Nq, Nk]. A mask that does not spread over them is added, and refused by ``ops``.
    """
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    spreads = mask.dim() <= 4 and all(size in (1, whole) for size, whole in sizes)
    lengths = key_lengths(block, mask, scores[0]) if spreads else None
    return {"bias": additive(mask, dtype)} if lengths is None else dict(lengths)


def stacks_of(module: nn.Module) -> list[nn.Module]:
    """The stacks of blocks that a module of an optimised model runs as a whole."""
    stack: Any = getattr(type(module), "stack", None)
    return [stack(module)] if isinstance(module, Swapped) and stack is not None else []


def unknown_submodules(module: nn.Module, fast: type[Fused]) -> list[str]:
    """Sub-modules that a fast class does not list; a newer version of the library may have added them."""
    unknown = {name for name, _ in module.named_modules()} - {name for name, *_ in fast.SUBMODULES} - {""}
    return sorted(name for name in unknown if not f"{name}.".startswith(tuple(f"{part}." for part in fast.CALLED)))


def given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Names an optional argument (usually a mask) that is given and is neither None nor False; None without one."""
    for name, value in kwargs.items():
        if value is not None and value is not False:
            return f"{name} is given"
    for value in args:
        if value is not None and value is not False:
            return "a mask or another argument beside the input is given"
    return None


def not_dense(x: torch.Tensor, dims: int) -> str | None:
    """Why x is no plain tensor of ``dims`` dimensions (but a torch.fx proxy, a subclass, nested, ...), or None."""
    if type(x) not in TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.is_nested:
        return "the input is a nested tensor"
    return f"the input has {x.dim()} dimensions, not {dims}" if x.dim() != dims else None


@untraced
def is_empty(x: torch.Tensor, dim: int) -> bool:
    """Whether a tensor has nothing along a dimension."""
    return x.shape[dim] == 0


def not_taken(x: torch.Tensor, weight: torch.Tensor, *gammas: torch.Tensor | None, dims: int = 3) -> str | None:
    """Why x is not a plain [B, N, C] in the dtype that the library's own forward would return, or None. The fused
    branches return the dtype of the residual x. ``dims``: the dimensions of x, where these are not 3."""
    if reason := not_dense(x, dims):
        return reason
    if is_empty(x, 1):
        return "the input has no tokens"
    if autocasts(x.device.type):
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
