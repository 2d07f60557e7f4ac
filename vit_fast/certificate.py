"""check(model, example): a parity certificate. Does a model, as it is now, compute what plain PyTorch computes?

Three forms of the same weights take the same input: the model as it stands (prepared, graphed, optimized), plain
PyTorch in the same dtype ("eager"), and plain PyTorch in float64, the truth. ``parity`` holds the rule. The plain
forms use a copy of the current parameters, so that stale folded weights show up as an error. In the copy every module
carries a hook, so that nothing in it is fused and every module runs in its own call: a hook, an adapter or a quantised
weight that the fused form skips shows up as an error or is named in ``ignored``.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import backends
from .class_swap import restore
from .cuda_graphs import Graphed
from .explanation import call, map_tensors, own_input
from .layer_args import library
from .parity import Parity, compare
from .plain import Fusible, why_not_plain
from .precisions import of_operation
from .prepared import unprepare

_Outputs = dict[str, torch.Tensor]  # of a model or of its layers, by name


@dataclass(frozen=True)
class Layer:
    """The errors of one output of the model, or of one of its modules, which include those of all modules before it."""

    name: str
    parity: Parity


@dataclass(frozen=True)
class Certificate:
    """What ``check`` found; its text is the table.

    ``outputs`` decide whether the model passed. ``layers``, in the order of execution, tell where an error comes from;
    modules whose own call a fused operation replaces are not among them. ``ignored`` names modules with hooks, adapters
    or changed weights that plain PyTorch calls and the model does not; a model with any of them does not pass.
    """

    model: str
    device: str
    device_name: str
    dtype: str
    batch: int
    torch: str
    triton: str | None
    operations: dict[str, int]
    outputs: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    ignored: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output keeps the parity rule and no module is ignored."""
        return not self.ignored and all(output.parity.passed for output in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """All findings as numbers and strings, for JSON."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        verdict = "holds" if self.passed else "FAILS"
        where = f"{self.device} ({self.device_name}), torch {self.torch}, triton {self.triton or 'not installed'}"
        lines = [f"{self.model}, {self.dtype}, batch {self.batch}, on {where}: parity {verdict}"]
        rows = (*self.layers, *self.outputs)
        width = max(len(row.name) for row in rows) + 2
        titles = ("error", "eager's", "allowed", "rms error", "eager's", "cosine")
        lines.append(f"{'':<{width}}" + "".join(f"{title:>11}" for title in titles))
        for row in rows:
            its = row.parity
            figures = (its.error, its.reference_error, its.allowed, its.relative_error, its.reference_relative_error)
            cells = "".join(f"{figure:>11.2e}" for figure in figures) + f"{its.cosine:>11.7f}"
            lines.append(f"{row.name:<{width}}{cells}" + ("" if its.passed else "  beyond what is allowed"))
        lines.append("Errors are against float64, rms ones relative to its values; cosine is with eager, worst image.")
        its = rows[-1].parity
        if its.reference_relative_error != its.eager_relative_error:
            used = (of_operation(words.split()[-1]) for words in self.operations)  # "triton fp8_blocks" → its precision
            precisions = [precision for precision in used if precision is not None and precision.budget]
            products = " and ".join(precision.products for precision in precisions if precision.products)
            named = " and ".join(str(precision.name) for precision in precisions)
            held = f"Products are {products}" if products else f"Prepared for {named}"
            lines.append(
                f"{held}: eager is here the plain PyTorch form of the same quantised model; in {self.dtype} eager's "
                f"rms error is {its.eager_relative_error:.2e}."
            )
        if all(output.parity.max_abs == 0 for output in self.outputs):
            lines.append("Every output has the very bits of plain PyTorch.")
        lines += [f"Passed over: {name}, which plain PyTorch calls" for name in self.ignored]
        ran = ", ".join(f"{name} ×{count}" for name, count in self.operations.items())
        lines.append(f"Ran: {ran or 'no operation of vit_fast'}")
        return "\n".join(lines)


def _tensors(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of the comparable tensors in an output: floating, with a batch axis and at least one more."""
    if isinstance(value, torch.Tensor):
        return [(name, value)] if value.is_floating_point() and value.dim() > 1 else []
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _tensors(part, f"{name}.{key}")]
    if isinstance(value, (tuple, list)):
        return [found for index, part in enumerate(value) for found in _tensors(part, f"{name}.{index}")]
    return []


def _is_layer(name: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether a module counts as a layer: a child of the model or of a stack of modules that computes something."""
    if not name or isinstance(module, (nn.Identity, nn.Dropout)):
        return False
    parent = name.rpartition(".")[0]
    return not parent or isinstance(model.get_submodule(parent), (nn.Sequential, nn.ModuleList))


def _run(model: nn.Module, example: Any) -> tuple[_Outputs, _Outputs, set[str | None]]:
    """(outputs, layers, called) of a call: {name: tensor} twice, and the names of the modules whose ``__call__`` ran.

    The hook is global: a module that carries one is not fused.
    """
    names = {module: name for name, module in model.named_modules()}
    layers: _Outputs = {}
    called: set[str | None] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        name = names.get(module)
        called.add(name)
        if name is not None and _is_layer(name, module, model):
            layers.update((name, t.detach().clone()) for name, t in _tensors(output, name)[:1])

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        with torch.no_grad():
            output = call(model, example)
    finally:
        handle.remove()
    return {name: t.clone() for name, t in _tensors(output, "output")}, layers, called


def _plain_form(model: nn.Module) -> nn.Module:
    """A copy of a model in which nothing is fused: each of its modules carries a hook, and so runs in its own call."""
    plain = unprepare(restore(copy.deepcopy(model)))
    for module in plain.modules():
        module.register_forward_hook(_look)
    return plain


def _look(module: nn.Module, inputs: Any, output: Any) -> None:
    """A hook that changes nothing."""


def _chain(model: nn.Module, name: str) -> list[nn.Module]:
    """The model and its modules down to the one of a name."""
    return [model, *(model.get_submodule(name[: m.start()]) for m in re.finditer(r"\.|$", name) if name)]


def _carries(model: nn.Module, name: str) -> bool:
    """Whether a module carries something that its library did not put there: a hook, a forward or weight of the
    instance, an adapter."""
    *above, module = _chain(model, name)
    # A fast class precedes the library's own class in the MRO.
    wrote = {library(cls) for block in above for cls in type(block).__mro__ if issubclass(cls, nn.Module)}
    if library(type(module)) not in wrote | {"torch"}:
        return True

    def ignores(hook: Any) -> bool:
        return any(block.ignores(hook) for block in above if isinstance(block, Fusible))

    return why_not_plain(module, (type(module),), ignores) is not None


def _read_past(plain: nn.Module, called: set[str | None], example: Any) -> tuple[str, ...]:
    """Names of modules of the plain form that were not called although its output depends on their weights.

    Only modules inside this library's own count: where other libraries read a weight without calling its module, eager
    PyTorch does the same. ``plain`` cannot be used afterwards.
    """

    def owner(name: str) -> nn.Module:
        return next(m for m in reversed(_chain(plain, name)) if m in ran)

    ran = {plain.get_submodule(name) for name in called if name is not None}
    silent = {
        name: module
        for name, module in plain.named_modules()
        if module._parameters and module not in ran and library(type(owner(name))) == __package__
    }
    with torch.no_grad():
        for module in silent.values():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(math.nan)
    if not silent or all(t.isfinite().all() for t in _run(plain, example)[0].values()):
        return ()
    return tuple(silent)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _shapes(outputs: _Outputs) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in outputs.items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check(model: nn.Module, example: Any = None) -> Certificate:
    """Compares a model with its plain PyTorch form in its own dtype and in float64, output by output, layer by layer.

    An output passes if its largest error against float64 is at most 1.25 times eager's plus half a unit in the last
    place (float32, float64 and products in float8: the head of ``vit_fast.parity``). A module that carries a
    hook, an adapter or a changed weight must run in its own call wherever it does in plain PyTorch. Takes the memory of
    a copy of the model in its dtype, then in float64, and of the outputs of all layers, on its device.

    Args:
        model: any module in ``eval`` mode, as it is used: plain, ``prepare``d, ``graphed``, ``optimize``d.
        example: an input [B, in_chans, H, W], or a tuple or a dict of what the model is called with; default two images
            of uniform noise of the model's own size and dtype. Real images are a better example.
    Returns:
        ``Certificate``: print it, ask ``passed``, or write ``as_dict()`` as JSON.
    Raises:
        TypeError: model is no module.
        ValueError: a model in training mode; no example for a model whose input size is unknown; an output
            without a floating tensor of two or more axes.
        RuntimeError: outputs of another shape than plain PyTorch's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.check: model is {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError("vit_fast.check: model is in training mode, expected model.eval()")
    inner = model.model if isinstance(model, Graphed) else model
    if example is None:
        example = own_input(inner, "vit_fast.check", batch=2)
        example = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    with backends.recording() as choices:
        outputs, layers, called = _run(inner, example)
    if inner is not model:
        outputs, _, _ = _run(model, example)
    if not outputs:
        raise ValueError(
            f"vit_fast.check: model is {type(model).__name__} without a floating output of two or more axes, expected "
            "one to compare"
        )
    used = {operation for operation, *_ in choices}
    budgets = [form.budget for form in map(of_operation, used) if form is not None and form.budget is not None]
    budget = max(budgets, key=lambda budget: budget.roundoff, default=None)  # that of the widest errors
    plain_outputs: _Outputs = {}
    plain_layers: _Outputs = {}
    with backends.backend("torch"):
        if budget is not None:
            plain_outputs, plain_layers, _ = _run(inner, example)
        eager = _plain_form(inner)
        eager_outputs, eager_layers, eager_called = _run(eager, example)
        first = next(iter(outputs.values()))
        device = first.device
        with torch.autocast(device.type, enabled=False):
            doubled = map_tensors(_double, example)
            golden_outputs, golden_layers, _ = _run(eager.double(), doubled)
            ignored = _read_past(eager, eager_called, doubled)
    unasked = {name for name in eager_called - called if name is not None}
    ignored += tuple(sorted(name for name in unasked if _carries(inner, name)))
    if _shapes(outputs) != _shapes(golden_outputs):
        raise RuntimeError(
            f"vit_fast.check: model puts out {_shapes(outputs)}, expected {_shapes(golden_outputs)} as in plain PyTorch"
        )

    def compared(ours: _Outputs, eager: _Outputs, golden: _Outputs, plain: _Outputs) -> tuple[Layer, ...]:
        return tuple(
            Layer(name, compare(ours[name], eager[name], truth, ours[name].dtype, plain.get(name), budget))
            for name, truth in golden.items()
            if name in ours and name in eager and ours[name].shape == truth.shape
        )

    return Certificate(
        model=type(inner).__name__,
        device=str(device),
        device_name=_device_name(device),
        dtype=str(first.dtype).removeprefix("torch."),
        batch=first.shape[0],
        torch=torch.__version__,
        triton=backends.status(device).versions.get("triton"),
        operations=dict(Counter(f"{chosen} {operation}" for operation, chosen, _ in choices)),
        outputs=compared(outputs, eager_outputs, golden_outputs, plain_outputs),
        layers=compared(layers, eager_layers, golden_layers, plain_layers),
        ignored=ignored,
    )
