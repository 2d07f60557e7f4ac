"""explain(model): which backend runs each operation of each module, or the reason why not.

The model is run once on fake tensors (no memory, no kernels) and every choice that ``backends.select`` makes is noted
with the innermost module in whose forward it was made.
"""

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import backends
from .block import PREPARED
from .input_size import input_size

_NOT_HERE = "in eval mode under torch.inference_mode() or torch.no_grad() alone; here the blocks run one by one"


@dataclass(frozen=True)
class Row:
    """One operation of one module."""

    module: str
    operation: str
    backend: str
    reasons: tuple[str, ...]


class Explanation(list):
    """Rows in the order of execution; its text is a table, equal blocks folded into one line."""

    def __str__(self):
        folded = Counter()
        for row in self:
            name = ".".join("*" if part.isdigit() else part for part in row.module.split("."))
            folded[name or "(model)", row.operation, row.backend, "; ".join(row.reasons)] += 1
        width = max([12, *(len(name) for name, *_ in folded)]) + 2
        lines = [f"{'module':<{width}}{'operation':<20}{'calls':>5}  {'backend':<8}why"]
        for (name, operation, chosen, why), calls in folded.items():
            lines.append(f"{name:<{width}}{operation:<20}{calls:>5}  {chosen:<8}{why}".rstrip())
        return "\n".join(lines)


def own_input(model, caller, batch=1):
    """An empty batch of the images that a model was built for, in its own dtype; ``caller`` is named in the error."""
    size = input_size(model)
    if size is None:
        raise ValueError(f"{caller}: example is None, expected an input, as the model does not tell its input size")
    parameter = next(model.parameters())
    return torch.empty(batch, *size, device=parameter.device, dtype=parameter.dtype)


def explain(model: nn.Module, example: torch.Tensor | None = None) -> Explanation:
    """Which backend runs each operation of a model, with the reasons where it is not the fastest one.

    The run is one of inference: in eval mode and without gradients. Where the caller's model trains or gradients are
    enabled, rows of prepared weights (``vit_fast.prepare``) say that they serve in inference alone; where such weights
    are not used, a row of the operation "prepared weights" says why.

    Args:
        model: any module that calls ``vit_fast.ops``.
        example: an input [B, in_chans, H, W]; default one image of the model's own size and dtype.
    Returns:
        ``Explanation``: rows (module, operation, backend, reasons); print it for a table.
    """
    example = own_input(model, "vit_fast.explain") if example is None else example
    names = {module: name for name, module in model.named_modules()}
    stack, rows = [""], Explanation()
    handles = []
    modes = {module: module.training for module in names}
    inference = not torch.is_grad_enabled() and not any(modes.values())
    with backends.recording() as choices:

        def enter(module, inputs):
            stack.append(names.get(module, stack[-1]))

        def leave(module, inputs, output):
            flush()
            stack.pop()

        def flush():
            for operation, chosen, reasons in choices:
                if not inference and operation in ("prepared_blocks", "fp8_blocks"):
                    reasons = (*reasons, _NOT_HERE)
                rows.append(Row(stack[-1], operation, chosen, reasons))
            choices.clear()

        def enter_flushed(module, inputs):
            flush()
            enter(module, inputs)

        # Global hooks, not the modules' own: a module that carries a hook is not fused.
        handles.append(nn.modules.module.register_module_forward_pre_hook(enter_flushed))
        handles.append(nn.modules.module.register_module_forward_hook(leave))
        try:
            model.eval()
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
                model(mode.from_tensor(example))
            flush()
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training
    for name, module in model.named_modules():
        prepared = module.__dict__.get(PREPARED)
        if prepared is not None and prepared.unused is not None:
            rows.append(Row(name, "prepared weights", "unused", (prepared.unused,)))
    logging.getLogger("vit_fast").debug("explained %d operations", len(rows))
    return rows
