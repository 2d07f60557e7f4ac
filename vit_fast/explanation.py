"""explain(model): which backend runs each operation of each module, or the reason why not.

The model is run once on fake tensors (no memory, no kernels) and every choice of a backend (``select.choose``) is noted
with the innermost module in whose forward it was made. Every block that runs its library's own
forward is noted too: a fast class gives the reason (``backends.note``), a block without a fast class is found by
``class_swap.survey``.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from . import backends
from .backends.base import backward_key
from .block import PREPARED
from .class_swap import survey
from .fake_tensors import fake_mode
from .input_size import input_size
from .precisions import of_operation

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
NOT_OPTIMISED = "vit_fast.optimize(model) fuses it"

_NOT_HERE = "in eval mode under torch.inference_mode() or torch.no_grad() alone; here the blocks run one by one"


@dataclass(frozen=True)
class OperationRow:
    """One operation of one module."""

    module: str
    operation: str
    backend: str
    reasons: tuple[str, ...]
    backward: str | None = None  # the backend of the backward pass; None in inference and where there is none


class Explanation(list[OperationRow]):
    """Rows in the order of execution; its text is a table, equal blocks folded into one line."""

    def __init__(self, model: str = "") -> None:
        super().__init__()
        self.model = model  # the name of its class

    def __str__(self) -> str:
        if not self:
            return f"no operation of vit_fast runs in {self.model}, and no transformer block"
        head = []
        if all(row.backend == "library" for row in self):
            can = sum(row.reasons == (NOT_OPTIMISED,) for row in self)
            advice = f"; vit_fast.optimize(model) fuses {can} of its modules" if can else ""
            head = [f"no operation of vit_fast runs in {self.model}{advice}"]
        folded: Counter[tuple[str, str, str, str]] = Counter()
        for row in self:
            name = ".".join("*" if part.isdigit() else part for part in row.module.split("."))
            folded[name or "(model)", row.operation, row.backend, "; ".join(row.reasons)] += 1
        width = max([12, *(len(name) for name, *_ in folded)]) + 2
        lines = [*head, f"{'module':<{width}}{'operation':<20}{'calls':>5}  {'backend':<8}why"]
        for (name, operation, chosen, why), calls in folded.items():
            lines.append(f"{name:<{width}}{operation:<20}{calls:>5}  {chosen:<8}{why}".rstrip())
        return "\n".join([*lines, *self._backward_lines()])

    def _backward_lines(self) -> list[str]:
        """A line for each backend whose operations run their backward on another backend."""
        elsewhere: dict[tuple[str, str], dict[str, None]] = {}
        for row in self:
            if row.backward not in (None, row.backend):
                elsewhere.setdefault((row.backend, row.backward), {})[row.operation] = None
        return [
            f"backward of {', '.join(operations)}: {backward} ({chosen} has none)"
            for (chosen, backward), operations in elsewhere.items()
        ]


def own_input(model: nn.Module, caller: str, batch: int = 1) -> torch.Tensor:
    """An empty batch of the images that a model was built for, in its own dtype; ``caller`` is named in the error."""
    size = input_size(model)
    if size is None:
        raise ValueError(f"{caller}: example is None, expected an input, as the model does not tell its input size")
    parameter = next(model.parameters())
    return torch.empty(batch, *size, device=parameter.device, dtype=parameter.dtype)


def call(model: nn.Module, example: Any) -> Any:
    """The output of a model for an example: a tuple or list holds its arguments, a dict its keyword arguments. A dict
    whose keys ``forward`` does not have (timm's NaFlexVit) is the input itself."""
    if isinstance(example, Mapping):
        try:
            inspect.signature(model.forward).bind(**example)
        except TypeError:
            return model(example)
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], example: Any) -> Any:
    """An example with a function applied to each of its tensors."""
    if isinstance(example, torch.Tensor):
        return function(example)
    if isinstance(example, Mapping):
        return {key: map_tensors(function, part) for key, part in example.items()}
    if isinstance(example, (tuple, list)):
        parts = [map_tensors(function, part) for part in example]
        return parts if isinstance(example, list) else tuple(parts)
    return example


def explain(model: nn.Module, example: Any = None) -> Explanation:
    """Which backend runs each operation of a model, with the reasons where it is not the fastest one.

    A transformer block or patch embedding that runs its library's own forward has a row too, of the backend "library".
    A model whose steps depend on values, as timm's NaFlexVit on the coordinates of its patches, is run for real.
    The model is run in eval mode and without gradients. If the caller's model is in training mode or gradients are
    enabled, rows also have the backend of the backward pass, which the text names where it differs from that of the
    forward, and rows of prepared weights (``vit_fast.prepare``) say that these are used in inference only. Where
    prepared weights are not used, a row of the operation "prepared weights" says why.

    Args:
        model: any module: one of vit_fast, one that ``optimize`` has changed or may change, one that calls
            ``vit_fast.ops``.
        example: an input [B, in_chans, H, W], or a tuple or a dict of what the model is called with; default one image
            of the model's own size and dtype.
    Returns:
        ``Explanation``: rows (module, operation, backend, reasons, backward); print it for a table.
    Raises:
        TypeError: model is no module, or example nothing that it can be called with.
        ValueError: no example for a model whose input size is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.explain: model is {type(model).__name__}, expected an nn.Module")
    example = own_input(model, "vit_fast.explain") if example is None else example
    if not isinstance(example, (torch.Tensor, Mapping, tuple, list)):
        raise TypeError(
            f"vit_fast.explain: example is {type(example).__name__}, expected a tensor, or a tuple or a dict of what "
            "the model is called with"
        )
    was_training = {module: module.training for module in model.modules()}
    inference = not torch.is_grad_enabled() and not any(was_training.values())
    try:
        model.eval()
        with torch.no_grad():
            try:
                with fake_mode() as mode:
                    rows = _explain(model, map_tensors(mode.from_tensor, example), inference)
            except NEEDS_VALUES:
                rows = _explain(model, example, inference)
    finally:
        for module, training in was_training.items():
            module.training = training
    logging.getLogger("vit_fast").debug("explained %d operations", len(rows))
    return rows


def _with_backward(row: OperationRow, backward: str, reasons: Sequence[str]) -> OperationRow:
    """A row whose backward another backend runs, for the reasons given."""
    return replace(row, backward=backward, reasons=(*row.reasons, *(f"backward: {reason}" for reason in reasons)))


def _explain(model: nn.Module, example: Any, inference: bool) -> Explanation:
    """The rows of one call; ``inference``: whether the caller's own calls are inference (eval mode, no gradients)."""
    names = {module: name for name, module in model.named_modules()}
    swaps, library, *_ = survey(model)
    library = library | {name: (fast.OPERATION, NOT_OPTIMISED) for name, (_, fast) in swaps.items()}
    stack, rows = [""], Explanation(type(model).__name__)
    with backends.recording(backward=True) as choices:

        def flush() -> None:
            for operation, chosen, reasons in choices:
                if operation.endswith(backward_key("")):  # of the call before it
                    if not inference:
                        rows[-1] = _with_backward(rows[-1], chosen, reasons)
                    continue
                if not inference and of_operation(operation) is not None:
                    reasons = (*reasons, _NOT_HERE)
                backward = None if inference else backends.backward_name(chosen, operation)
                rows.append(OperationRow(stack[-1], operation, chosen, reasons, backward))
            choices.clear()

        def enter(module: nn.Module, inputs: Any) -> None:
            flush()
            stack.append(names.get(module, stack[-1]))
            if module in names and stack[-1] in library:
                operation, reason = library[stack[-1]]
                rows.append(OperationRow(stack[-1], operation, "library", (reason,)))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            flush()
            stack.pop()

        # Global hooks, not the modules' own: a module that carries a hook is not fused.
        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            call(model, example)
            flush()
        finally:
            for handle in handles:
                handle.remove()
    for name, module in model.named_modules():
        prepared = module.__dict__.get(PREPARED)
        if prepared is not None and prepared.unused is not None:
            rows.append(OperationRow(name, "prepared weights", "unused", (prepared.unused,)))
    return rows
