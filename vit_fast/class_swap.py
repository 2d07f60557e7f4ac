"""optimize(model), restore(model): a library's ViT on the fused operations, in place and reversibly.

Each block's class is swapped for a subclass that computes the same with the weights where they are
(``integrations/``, a file for each library). Nothing else changes: no parameter, no key, no class of a library.
"""

import importlib
import logging
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from . import integrations
from .block import PREPARED
from .integrations import patch_projection
from .kernels.arguments import UnsupportedError
from .plain import not_fused_reason, own_forward
from .structure import transformer_blocks

_logger = logging.getLogger("vit_fast")

# library → the module that defines its blocks, and which of its models are optimised
_LIBRARIES = {
    "timm": ("timm.models.vision_transformer", "the blocks of its ViTs and PatchEmbed"),
    "torchvision": ("torchvision.models.vision_transformer", "EncoderBlock"),
    "transformers": ("transformers.modeling_layers", "vision layers of ViT, DINO, CLIP, SigLIP, BEiT, SAM, ..."),
    "open_clip": ("open_clip.transformer", "ResidualAttentionBlock of the image tower, custom ones too"),
    "torch_nn": ("torch.nn.modules.transformer", "TransformerEncoderLayer"),
}


def _integrations() -> tuple[list[ModuleType], list[str]]:
    """The integrations of the libraries that this process has loaded, and why a library's version has none."""
    loaded: list[ModuleType] = []
    unknown: list[str] = []
    for name, (module, _) in _LIBRARIES.items():
        if module in sys.modules:
            try:
                loaded.append(importlib.import_module(f".integrations.{name}", __package__))
            except ImportError as error:
                unknown.append(_unknown(name, error))
    return loaded, unknown


def _unknown(library: str, error: ImportError) -> str:
    return f"{library} is of a version that is not known: {error}"


def _stacks(loaded: Iterable[ModuleType]) -> dict[type[nn.Module], Any]:
    """Class of a container of blocks → its fast class."""
    stacks: dict[type[nn.Module], Any] = {nn.Sequential: integrations.BlockStack}
    for integration in loaded:
        stacks |= getattr(integration, "STACKS", {})
    return stacks


def _why_not(module: nn.Module, cls: type[nn.Module], fast: type[integrations.Fused]) -> str | None:
    """Why a module stays as it is, or None."""
    if type(module) is not cls:
        return f"it is a {type(module).__name__}, a subclass of {cls.__name__}"
    if own := own_forward(module):
        return f"it {own}"
    reason = not_fused_reason(module, fast)
    if reason is None and (unknown := integrations.unknown_submodules(module, fast)):
        return f"it has parts that are not known: {', '.join(unknown)}"
    return reason


class Survey(NamedTuple):
    """What ``optimize`` finds in a model; the names are those of ``named_modules``."""

    swaps: dict[str, tuple[nn.Module, type[integrations.Fused]]]  # name → (module, fast class) of what can be fused
    left: dict[str, tuple[str, str]]  # name → (operation, reason) of what stays
    done: int  # how many modules are optimised already
    own: int  # how many blocks are those of vit_fast's own models
    unknown: list[str]  # why a version of a library is passed over


def survey(model: nn.Module) -> Survey:
    """Looks at every transformer block and patch embedding of a model, and changes nothing."""
    (loaded, unknown), swaps, left, own = _integrations(), {}, {}, 0
    done: set[str] = set()
    for integration in loaded:
        found: list[integrations.Found] = []
        try:
            found.extend(integration.find(model))
        except ImportError as error:
            unknown.append(_unknown(integration.__name__.rpartition(".")[2], error))
        for name, module, cls in found:
            fast = integration.FAST[cls]
            if isinstance(module, fast):
                done.add(name)
            elif reason := _why_not(module, cls, fast):
                left[name] = fast.OPERATION, reason
            else:
                swaps[name] = module, fast
    known = tuple(cls for integration in loaded for cls in integration.FAST)
    wrapped = {parent for name in (*swaps, *left) for parent in _parents(name)}
    for name, block in transformer_blocks(model).items():
        cls = type(block)
        if cls.forward.__module__.startswith(f"{__package__}.") and not isinstance(block, integrations.Fused):
            own += 1
        elif not isinstance(block, known) and name not in wrapped:  # else found above, or part of a text tower
            left[name] = "block", f"{cls.__module__}.{cls.__qualname__} is not a class that vit_fast fuses"
    if any(fast.OPERATION == "block" for _, fast in swaps.values()) or done:
        whole = {*swaps, *left, *done}
        for name, module, cls in patch_projection.find(model):
            fast = patch_projection.FAST[cls]
            if isinstance(module, fast):
                done.add(name)
            elif whole.isdisjoint(_parents(name)) and _why_not(module, cls, fast) is None:
                swaps[name] = module, fast
    return Survey(swaps, left, len(done), own, unknown)


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def grouped(left: dict[str, str], unnamed: str) -> list[tuple[str, str]]:
    """(names, reason) of what stays as it is (name → reason): names with the same reason together, consecutive ones as
    first–last; ``unnamed`` stands for a name that is empty."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name or unnamed)
    return [(", ".join(_ranges(group)), reason) for reason, group in names.items()]


def _told(model: nn.Module, left: dict[str, tuple[str, str]]) -> str:
    """Text about the modules that stay (name → operation and reason)."""
    reasons = {name: reason for name, (_, reason) in left.items()}
    return "; ".join(f"{names}: {reason}" for names, reason in grouped(reasons, type(model).__name__))


def _ranges(names: Iterable[str]) -> list[str]:
    ranges: list[list[str]] = []
    for name in names:
        stack, _, index = name.rpartition(".")
        if ranges and index.isdigit() and ranges[-1][1] == f"{stack}.{int(index) - 1}".removeprefix("."):
            ranges[-1][1] = name
        else:
            ranges.append([name, name])
    return [first if first == last else f"{first}–{last.rpartition('.')[2]}" for first, last in ranges]


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.{function}: model is {type(model).__name__}, expected an nn.Module")


def optimize(model: nn.Module, strict: bool = False) -> nn.Module:
    """Lets the ViT blocks of a timm, torchvision, transformers, open_clip or torch.nn model run fused, in place.

    Parameters, ``state_dict`` and class relations (``isinstance``) stay as they are; deepcopy, pickle, hooks,
    training, checkpointing and ``torch.compile`` go on working. Outputs differ by rounding. A block runs the library's
    own forward in every call that the fused operations do not cover: with a causal mask, with attention weights
    in the output, and where one of its modules carries a hook, a parametrization or an adapter or is of an unexpected
    class. ``explain(model, example)`` shows what runs where, ``restore`` undoes all of it. ``prepare`` folds the
    weights of optimised pre-norm blocks. Text towers are not touched. Pooling by latent queries, and the convolution
    that projects patches, run fused as well.

    Call it before FSDP2's ``fully_shard``, which makes classes of its own, and before accelerate's ``cpu_offload``,
    ``disk_offload`` and ``dispatch_model``, whose hooks keep a module as it is. Blocks then run fused where accelerate
    loads their weights as a whole: name their class in ``preload_module_classes``, as the library names it.
    ``torch.jit.script`` cannot read the fast classes: restore first.

    Args:
        model: a model of these libraries, or a module that holds one.
        strict: raise where any of its transformer blocks, of whatever class, its patch embedding or its pooling by
            latent queries has to stay as it is, before anything is changed. Otherwise the logger "vit_fast" lists at
            level INFO which stay, and why.
    Returns:
        the model itself.
    Raises:
        TypeError: no module, or strict is no bool.
        ValueError: a model without transformer blocks, or one of vit_fast's own.
        UnsupportedError: nothing of it can be optimised, or with ``strict`` not all; blocks and reasons are named.
    """
    _check("optimize", model)
    if not isinstance(strict, bool):
        raise TypeError(f"vit_fast.optimize: strict is {strict!r}, expected a bool")
    swaps, left, done, own, unknown = survey(model)
    if not (swaps or left or done):
        came = ", whose blocks are vit_fast's own and fused already" if own else " without transformer blocks"
        known = "; ".join(f"{name} ({what})" for name, (_, what) in _LIBRARIES.items())
        raise ValueError(f"vit_fast.optimize: model is {type(model).__name__}{came}, expected a model of {known}")
    if left and (strict or not (swaps or done or own)):
        which = "these blocks stay" if swaps or done or own else "no block can be optimised, they stay"
        told = "; ".join([_told(model, left), *unknown])
        raise UnsupportedError(f"vit_fast.optimize: {which} as they are: {told}")
    for why in unknown:
        _logger.info("optimize: %s", why)
    for name, (_, reason) in left.items():
        _logger.info("optimize leaves %s as it is: %s", name or type(model).__name__, reason)
    before: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, fast in swaps.values():
            before.append((module, type(module)))
            module.__class__ = fast
        stacks = _stacks(_integrations()[0])
        for module in model.modules():
            holder = stacks.get(type(module))
            if holder and len(row := holder.stack(module)) and all(isinstance(b, integrations.Fused) for b in row):
                before.append((module, type(module)))
                module.__class__ = holder
    except BaseException:  # never half of a model
        for module, cls in before:
            module.__class__ = cls
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives every optimised module of a model its own class back; prepared weights go with it.

    Args:
        model: any module; what ``optimize`` has not changed stays as it is.
    Returns:
        the model itself.
    Raises:
        TypeError: no module.
        UnsupportedError: an optimised module was given a further class, by FSDP2's ``fully_shard`` or a
            parametrization; nothing is changed.
    """
    _check("restore", model)
    loaded, _ = _integrations()
    classes = {fast: cls for cls, fast in _stacks(loaded).items()}
    for integration in (*loaded, patch_projection):
        classes |= {fast: cls for cls, fast in integration.FAST.items()}
    further = {
        name: f"it is a {type(module).__name__} made of an optimised class; restore before that"
        for name, module in model.named_modules()
        if isinstance(module, integrations.Swapped) and type(module) not in classes
    }
    if further:
        told = "; ".join(f"{names}: {why}" for names, why in grouped(further, type(model).__name__))
        raise UnsupportedError(f"vit_fast.restore: {told}")
    for module in model.modules():
        cls: Any = type(module)
        if cls in classes:
            for holder in (module, *integrations.stacks_of(module)):
                holder.__dict__.pop(PREPARED, None)
            module.__class__ = classes[cls]
    return model
