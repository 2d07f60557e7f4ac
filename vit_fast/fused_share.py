"""coverage(model): the share of a model's transformer blocks and patch embedding that runs on the fused operations.

The model is run once on fake tensors (no memory, no kernels), as ``explain`` does it. Each block and the patch
embedding count with the FLOPs of their matrix products. Where a block runs its library's own forward in that call, the
reason is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import backends
from .block import PREPARED
from .class_swap import survey
from .explanation import NEEDS_VALUES, NOT_OPTIMISED, call, map_tensors, own_input
from .fake_tensors import fake_mode
from .integrations import Fused, patch_projection
from .plain import CONVOLUTION, Fusible, why_not_plain
from .structure import transformer_blocks

# The FLOPs of an operator; torch has no formula for the attention of its CPU backend.
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    **flop_registry,
}

_BESIDE = "what {} computes beside the projection of patches is not fused"


@dataclass(frozen=True)
class CoverageRow:
    """A transformer block or a patch embedding."""

    module: str
    kind: str  # "block" or "patch_embed"
    flops: int
    reason: str | None  # why it does not run on the fused operations, or None


@dataclass(frozen=True)
class Coverage:
    """What of a model runs on the fused operations; its text is a table of what does not."""

    model: str  # the name of its class
    rows: tuple[CoverageRow, ...]

    @property
    def share(self) -> float:
        """0…1, by the FLOPs of the blocks and of the patch embedding."""
        total = sum(row.flops for row in self.rows)
        return sum(row.flops for row in self.rows if row.reason is None) / total if total else 0.0

    @property
    def blocks(self) -> int:
        """How many transformer blocks the model has."""
        return sum(row.kind == "block" for row in self.rows)

    @property
    def fused_blocks(self) -> int:
        """How many of them run fused."""
        return sum(row.kind == "block" and row.reason is None for row in self.rows)

    @property
    def fully_fused(self) -> bool:
        """Whether every transformer block runs fused."""
        return self.blocks > 0 and self.fused_blocks == self.blocks

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Reason → names of the modules that it keeps from running fused."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason is not None:
                found.setdefault(row.reason, []).append(row.module)
        return found

    def __str__(self) -> str:
        head = (
            f"{self.model}: {self.share:.1%} of the FLOPs of blocks and patch embedding run fused, "
            f"{self.fused_blocks} of {self.blocks} blocks"
        )
        lines = [f"  {names[0]}{_more(names)}: {reason}" for reason, names in self.reasons.items()]
        return "\n".join([head, *lines])


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _counted(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str | None]]:
    """(name, module, kind, reason known ahead of the call) of each block and patch embedding, and of the projection
    inside of a patch embedding whose class is not fused as a whole."""
    swaps, left, *_ = survey(model)
    found: dict[str, tuple[str, str | None]] = {name: ("block", None) for name in transformer_blocks(model)}
    found |= left
    found |= {name: (fast.OPERATION, NOT_OPTIMISED) for name, (_, fast) in swaps.items()}
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in outer):
            continue
        own: tuple[str, str | None] = ("", None)
        if isinstance(module, Fused):
            own = module.OPERATION, None
        elif patch_projection.embeds_patches(name, module):
            own = "patch_embed", _why_not_fused(module)
        elif isinstance(module, Fusible):
            own = module.OPERATION, None
        operation, reason = found.get(name, own)
        if operation in ("block", "patch_embed"):
            parts = _projections(name, module, found) if operation == "patch_embed" and reason is not None else []
            yield name, module, operation, _BESIDE.format(type(module).__qualname__) if parts else reason
            yield from parts
            outer.append(name)


def _projections(name: str, module: nn.Module, found: dict[str, Any]) -> list[tuple[str, nn.Module, str, str | None]]:
    """The rows of the convolutions of a patch embedding that are, or can be, fused by themselves."""
    inside = {f"{name}.{key}".removeprefix("."): child for key, child in module.named_children()}
    return [
        (part, child, "patch_embed", found[part][1] if part in found else None)
        for part, child in inside.items()
        if part in found or isinstance(child, Fused)
    ]


def _why_not_fused(module: nn.Module) -> str | None:
    """Why a patch embedding that no integration knows does not run fused, or None for one of vit_fast's own."""
    if isinstance(module, Fusible) or type(module).__module__.startswith(f"{__package__}."):
        conv = module._modules.get("proj")
        reason = why_not_plain(conv, CONVOLUTION) if isinstance(conv, nn.Conv2d) else None
        return f"proj {reason}" if reason else None
    return patch_projection.why_not(module)


def coverage(model: nn.Module, example: Any = None) -> Coverage:
    """The share of a model that runs on the fused operations, with the reasons for the rest.

    Args:
        model: any module: one of vit_fast, or one that ``optimize`` has changed; of others nothing runs fused.
        example: an input [B, in_chans, H, W], or a tuple or a dict of what the model is called with; default one image
            of the model's own size and dtype.
    Returns:
        ``Coverage``: ``share`` 0…1 by FLOPs, ``fully_fused``, ``reasons``; print it for a table.
    Raises:
        TypeError: model is no module.
        ValueError: a model without transformer blocks; no example for a model whose input size is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.coverage: model is {type(model).__name__}, expected an nn.Module")
    counted = {module: (name, kind, reason) for name, module, kind, reason in _counted(model)}
    if not any(kind == "block" for _, kind, _ in counted.values()):
        raise ValueError(f"vit_fast.coverage: model is {type(model).__name__} without transformer blocks")
    example = own_input(model, "vit_fast.coverage") if example is None else example
    was_training = {module: module.training for module in model.modules()}
    prepared = {module: vars(module).pop(PREPARED) for module in model.modules() if PREPARED in vars(module)}
    try:
        model.eval()
        with torch.no_grad():
            if all(parameter.is_meta for parameter in model.parameters()):
                rows = _measured(model, counted, map_tensors(lambda tensor: tensor.to("meta"), example))
            else:
                try:
                    with fake_mode() as mode:
                        rows = _measured(model, counted, map_tensors(mode.from_tensor, example))
                except NEEDS_VALUES:
                    rows = _measured(model, counted, example)
    finally:
        for module, training in was_training.items():
            module.training = training
        for module, weights in prepared.items():
            vars(module)[PREPARED] = weights
    return Coverage(type(model).__name__, rows)


class _FlopCount(TorchDispatchMode):
    """Sums the FLOPs of the matrix products of the calls inside; torch's own FlopCounterMode wants gradients of
    parameters that are inputs of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _measured(model: nn.Module, counted: dict[nn.Module, Any], example: Any) -> tuple[CoverageRow, ...]:
    """The rows of one call, in the order of execution."""
    flops: dict[nn.Module, int] = {}
    told: dict[nn.Module, str] = {}
    running: list[tuple[nn.Module, int]] = []  # the modules whose call has begun, and the count at that time
    counter = _FlopCount()
    with backends.recording() as choices:

        def enter(module: nn.Module, inputs: Any) -> None:
            if module in counted:
                choices.clear()
                flops.setdefault(module, 0)
                running.append((module, counter.total))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if module in counted:
                spent = counter.total - running.pop()[1]
                flops[module] += spent
                if running:  # each FLOP counts once, with the innermost
                    flops[running[-1][0]] -= spent
                for name, backend, reasons in choices:
                    if reasons and (backend == "library" or name == "block"):
                        told[module] = reasons[0]

        # Global hooks, not the modules' own: a module that carries a hook is not fused.
        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            with counter:
                call(model, example)
        finally:
            for handle in handles:
                handle.remove()
    return tuple(
        CoverageRow(name, kind, flops[module], reason or told.get(module))
        for module, (name, kind, reason) in ((module, counted[module]) for module in flops)
        if kind == "block" or flops[module]
    )
