"""Which modules are plain, so that their weights may be read past their ``__call__``.

A fused operation reads the weights of several modules and calls none of them. That computes the same only while each
module computes what its class says: a LoRA wrapper, a hook, pruning, a parametrization, a quantised weight or an
offloaded one act in the module's own call, or in the tensor itself. A module is plain where

    its class is exactly the one expected at its place, and its forward that of the class;
    no hook of its own runs around its forward or its backward (global hooks do not count);
    its weights are its registered parameters, and these are no tensor subclass (DTensor, torchao, ...).

Where a module is not plain the caller runs the modules one by one; for our own models ``explain`` shows the reason. Our
own blocks, ``systems`` and ``integrations`` all use these checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import backends, ops
from .kernels.reference import normalise_pixels
from .kernels.tracing import is_fx_symbolic_tracing, is_recording
from .remembered import has_hooks, recall, remember

# For each sub-module that a fused operation reads: its path, the path's keys, allowed classes, children (or None).
Submodules = tuple[tuple[str, tuple[str, ...], tuple[type, ...], tuple[str, ...] | None], ...]
Ignores = Callable[[Any], bool]  # takes a forward hook: whether it may be skipped

LINEAR = (nn.Linear,)
CONVOLUTION = (nn.Conv2d,)
NOTHING = (nn.Identity, NoneType)
NORM = (nn.LayerNorm, nn.Identity)
TENSORS = frozenset((torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
_PARAMETERS = TENSORS | {NoneType}
_TRACED = "is a node of the graph that torch.fx traces"
# Instance attributes that shadow the forward of the class or registered parameters.
_SHADOWS = frozenset(("forward", "weight", "bias", "in_proj_weight", "in_proj_bias", "gamma", "lambda1"))


def submodules(**classes: tuple[type, ...]) -> Submodules:
    """The sub-modules that a fused operation reads: (path, its keys, the classes that each may have, its children).

    ``__`` in a keyword stands for the dot of a path; ``NoneType`` among the classes means that the module may be
    absent. Children are listed for an ``nn.Sequential``, which runs all that it holds; None for other classes.
    """
    paths = {name: tuple(name.split("__")) for name in classes}

    def children(name):
        if any(issubclass(cls, nn.Sequential) for cls in classes[name]):
            return tuple(path[-1] for path in paths.values() if path[:-1] == paths[name])

    return tuple((name.replace("__", "."), path, classes[name], children(name)) for name, path in paths.items())


def multihead_submodules(name: str) -> dict[str, tuple[type, ...]]:
    """The arguments of ``submodules`` for an ``nn.MultiheadAttention``."""
    return {name: (nn.MultiheadAttention,), f"{name}__out_proj": (nn.modules.linear.NonDynamicallyQuantizableLinear,)}


def multihead_not_covered(attn: nn.MultiheadAttention, widths: bool = False) -> str | None:
    """What the fused operations do not cover of an ``nn.MultiheadAttention``, or None; ``widths``: whether q may be of
    another width than k and v."""
    if attn.in_proj_weight is None and not widths:
        return "q, k and v differ in width"
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        return "its attention adds keys"
    if not attn.batch_first:
        return "its attention is not batch_first"
    return None


def _never(hook: Any) -> bool:
    return False


def own_forward(module: nn.Module) -> str | None:
    """That a module is called through a forward that is not its class's, as the rest of a sentence about it, or None.
    accelerate sets one where it offloads or dispatches a module."""
    fields = module.__dict__
    if "forward" not in fields:
        return None
    return "carries a hook of accelerate" if "_hf_hook" in fields else "has a forward of its own"


def why_not_plain(module: nn.Module | None, classes: tuple[type, ...], ignores: Ignores = _never) -> str | None:
    """Why a module may not be read past its ``__call__``, as the rest of a sentence about it, or None.

    Args:
        classes: the exact classes that it may have.
        ignores: function of a forward hook: whether it may be skipped.
    """
    if is_fx_symbolic_tracing() and module is not None:
        return _TRACED
    return _why_not_plain(module, classes, ignores)


def _only_moves_inputs(module, around):
    """Whether the one thing that accelerate's hook of a module does is to move inputs to the device to which the hook
    around it has moved them: ``dispatch_model`` gives such hooks to each layer of a block."""
    fields = module.__dict__
    hook = fields.get("_hf_hook")
    return (
        around is not None
        and type(hook) is type(around)
        and type(hook).__module__ == "accelerate.hooks"
        and type(hook).__name__ == "AlignDevicesHook"
        and hook.execution_device == around.execution_device
        and not (hook.offload or hook.io_same_device or hook.no_grad)
        and getattr(fields["_old_forward"], "__func__", None) is type(module).forward
        and _SHADOWS.isdisjoint(fields.keys() - {"forward"})
    )


def _why_not_plain(module, classes, ignores, around=None):
    """``why_not_plain`` without the check for torch.fx; called in every forward for every module. ``around``:
    accelerate's hook of the module that reads it."""
    if type(module) not in classes:
        return f"is {type(module).__module__}.{type(module).__qualname__}"
    if module is None:
        return None
    hooks, fields = module._forward_hooks, module.__dict__
    if hooks and not all(ignores(hook) for hook in hooks.values()):
        return "carries a hook"
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "carries a hook"
    if not _SHADOWS.isdisjoint(fields) and not _only_moves_inputs(module, around):
        return own_forward(module) or "has a weight that is no parameter"
    for tensor in module._parameters.values():
        if type(tensor) not in _PARAMETERS:
            return f"holds a {type(tensor).__name__}"
    if "normalized_shape" in fields and len(module.normalized_shape) != 1:
        return "normalises more than the last axis"
    if "padding_mode" in fields and (
        module.padding not in ((0, 0), "valid") or module.dilation != (1, 1) or module.groups != 1
    ):
        return "is padded, dilated or grouped"
    return None


def not_plain_reason(module: nn.Module, known: Submodules, ignores: Ignores = _never) -> str | None:
    """Why the sub-modules of a module (those of ``known``) may not be read past their ``__call__``, or None."""
    if is_fx_symbolic_tracing():
        return f"it {_TRACED}"
    around = module.__dict__.get("_hf_hook")
    for name, path, classes, children in known:
        part: Any = module
        for key in path:
            if (part := part._modules.get(key)) is None:
                break
        if part is None and NoneType in classes:
            continue
        reason = _why_not_plain(part, classes, ignores, around)
        if reason is not None:
            return f"{name} {reason}"
        if children is not None and tuple(part._modules) != children:
            return f"{name} holds {', '.join(part._modules)}"
    return None


def not_fused_reason(module: nn.Module, cls: type[Fusible]) -> str | None:
    """Why a module cannot run as ``cls``, a ``Fusible``, runs fused, or None."""
    reason = not_plain_reason(module, cls.SUBMODULES, cls.ignores)
    return reason or cls.not_covered(module)  # type: ignore[arg-type]  # possibly the library's class


def _parts(module: Fusible) -> list[nn.Module]:
    """The sub-modules on the paths of ``SUBMODULES``."""
    found: dict[nn.Module, None] = {}
    for _, path, _, _ in module.SUBMODULES:
        part: Any = module
        for key in path:
            if (part := part._modules.get(key)) is None:
                break
            found[part] = None
    return list(found)


class Fusible(nn.Module):
    """Base of modules that run fused while their sub-modules are plain, and module by module otherwise."""

    OPERATION = "block"  # name of the fused form in ``explain``
    SUBMODULES: Submodules = ()  # every sub-module whose weights or arithmetic the fused form takes over

    def not_covered(self) -> str | None:
        """Any further reason why the fused form does not cover this module, or None."""
        return None

    @staticmethod
    def ignores(hook: Any) -> bool:
        """Whether a forward hook of a sub-module may be skipped."""
        return False

    def settings(self) -> Any:
        """What ``forward`` reads of the parts beside their tensors; remembered, so no tensor and not the module."""
        return None

    def look(self) -> tuple[str | None, Any]:
        """Why the module cannot run fused, or None and its ``settings``."""
        if torch.compiler.is_compiling() or is_recording():
            reason = not_fused_reason(self, type(self))
            return reason, None if reason else self.settings()
        kept = recall(self)
        if kept is not None:
            return None, kept.found
        reason = not_fused_reason(self, type(self))
        if reason is not None:
            return reason, None
        settings, parts = self.settings(), _parts(self)
        if not has_hooks(parts):
            remember(self, parts, settings)
        return None, settings

    def not_fused(self) -> str | None:
        """Why the module cannot run fused, or None."""
        return self.look()[0]

    def is_fused(self) -> bool:
        """Whether the module runs fused; where not, ``explain`` shows why."""
        reason = self.not_fused()
        if reason is not None:
            backends.note(self.OPERATION, "torch", (reason,))
        return reason is None


def may_read(operation: str, module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether a module is plain; where not, ``explain`` shows why this operation does not run on its weights."""
    reason = why_not_plain(module, classes)
    if reason is not None:
        backends.note(operation, "torch", (f"{type(module).__name__} {reason}",))
    return reason is None


def dtype_of(module: nn.Module, default: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype in which a module computes: that of its first floating parameter; ``default`` where it has none."""
    return next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), default)


def layer_norm(module: nn.Module, x: torch.Tensor, tokens: slice | int | None = None) -> torch.Tensor:
    """``module(x)``, or its ``[:, tokens]``: a plain ``nn.LayerNorm`` normalises the chosen tokens alone."""
    if not may_read("layer_norm", module, NORM):
        y = module(x.to(dtype_of(module, x.dtype))).to(x.dtype)  # a float32 LayerNorm may follow 16-bit layers
        return y if tokens is None else y[:, tokens]
    x = x if tokens is None else x[:, tokens]
    norm: Any = module
    return x if type(module) is nn.Identity else ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def patch_embed(
    module: nn.Module,
    images: torch.Tensor,
    table: torch.Tensor | None,
    prefix: torch.Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cls: type[nn.Module] = nn.Conv2d,
) -> torch.Tensor:
    """Patch tokens with positions, prefix tokens in front: one operation where the module is plain, else by its call.

    Args:
        module: the patch projection.
        images, table, prefix, mean, std: as in ``ops.patch_embed``.
        cls: its class, ``nn.Conv2d`` or one that returns the tokens of an ``nn.Conv2d`` named ``proj``.
    """
    conv: Any = module if cls is nn.Conv2d else module._modules.get("proj")
    if may_read("patch_embed", module, (cls,)) and (conv is module or may_read("patch_embed", conv, CONVOLUTION)):
        return ops.patch_embed(images, conv.weight, conv.bias, table, prefix, conv.stride, mean, std)
    dtype = dtype_of(module)
    x = module(images.to(dtype) if mean is None else normalise_pixels(images, mean, std, dtype))
    x = x.flatten(2).transpose(1, 2) if cls is nn.Conv2d else x
    x = x if table is None else x + table
    return x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
