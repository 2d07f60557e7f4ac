"""check(model, example): a parity certificate. Does a model compute, here and now, what plain PyTorch computes?

Three forms of the same weights take the same input: the model as it stands (prepared, graphed, optimized), plain
PyTorch in the same dtype ("eager"), and plain PyTorch in float64, the truth. ``parity`` holds the rule. The plain forms
are made of a copy of the model as it is now and run module by module, so that folded weights that are out of date show,
and what a fused path passes over.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from . import backends
from .explain import own_input
from .graphed import Graphed
from .optimize import restore
from .parity import Parity, compare
from .prepare import unprepare


@dataclass(frozen=True)
class Layer:
    """What is compared: an output of the model, or of one of its modules after all that ran before it."""

    name: str
    parity: Parity


@dataclass(frozen=True)
class Certificate:
    """What ``check`` found; its text is the table.

    ``outputs`` decide whether the model passed. ``layers``, in the order of execution, tell where an error comes from;
    modules that a fused stretch passes over are not among them.
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

    @property
    def passed(self) -> bool:
        """Whether every output keeps the rule."""
        return all(output.parity.passed for output in self.outputs)

    def as_dict(self) -> dict:
        """All of it in numbers and words, for JSON."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self):
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
            lines.append(
                "Products are float8: eager is here the plain PyTorch form of the same quantised model; in "
                f"{self.dtype} eager's rms error is {its.eager_relative_error:.2e}."
            )
        if all(output.parity.max_abs == 0 for output in self.outputs):
            lines.append("Every output has the very bits of plain PyTorch.")
        ran = ", ".join(f"{name} ×{count}" for name, count in self.operations.items())
        lines.append(f"Ran: {ran or 'no operation of vit_fast'}")
        return "\n".join(lines)


def _tensors(value, name):
    """(name, tensor) of what can be compared in an output: floating, with a batch axis and more."""
    if isinstance(value, torch.Tensor):
        return [(name, value)] if value.is_floating_point() and value.dim() > 1 else []
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _tensors(part, f"{name}.{key}")]
    if isinstance(value, (tuple, list)):
        return [found for index, part in enumerate(value) for found in _tensors(part, f"{name}.{index}")]
    return []


def _is_layer(name, module, model):
    """Whether a module is a child of the model or of a row of modules, no part of a layer, and computes something."""
    if not name or isinstance(module, (nn.Identity, nn.Dropout)):
        return False
    parent = name.rpartition(".")[0]
    return not parent or isinstance(model.get_submodule(parent), (nn.Sequential, nn.ModuleList))


def _run(model, example):
    """(outputs, layers) of a call, each {name: tensor}. The hook is global: a module that carries one is not fused."""
    names = {module: name for name, module in model.named_modules() if _is_layer(name, module, model)}
    layers = {}

    def note(module, inputs, output):
        if module in names:
            layers.update((name, t.detach().clone()) for name, t in _tensors(output, names[module])[:1])

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                output = model(**example)
            else:
                output = model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        handle.remove()
    return {name: t.clone() for name, t in _tensors(output, "output")}, layers


def _no_change(module, inputs, output):
    """A hook that only stands in the way of fused paths, which read no weights of a module that carries one: the plain
    form calls every module, so that whatever a fused path would pass over takes effect in it."""


def _doubled(example):
    if isinstance(example, torch.Tensor):
        return example.double() if example.is_floating_point() else example
    if isinstance(example, Mapping):
        return {key: _doubled(part) for key, part in example.items()}
    return type(example)(map(_doubled, example)) if isinstance(example, (tuple, list)) else example


def _shapes(outputs):
    return {name: tuple(t.shape) for name, t in outputs.items()}


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check(model: nn.Module, example=None) -> Certificate:
    """Compares a model with its plain PyTorch form in its own dtype and in float64, output by output, layer by layer.

    An output passes if its largest error against float64 is at most 1.25 times eager's plus half a unit in the last
    place (float32: 2 times plus 4 units; products in float8: the head of ``vit_fast.parity``). Takes the memory of a
    copy of the model in its dtype, then in float64, and of the outputs of all layers, on its device.

    Args:
        model: any module in ``eval`` mode, as it is used: plain, ``prepare``d, ``graphed``, ``optimize``d.
        example: an input [B, in_chans, H, W], or a tuple or a dict of what the model is called with; default two images
            of uniform noise of the model's own size and dtype. Real images are a better example.
    Returns:
        ``Certificate``: print it, ask ``passed``, or write ``as_dict()`` as JSON.
    Raises:
        TypeError: model is no module.
        ValueError: a model in training mode; no example for a model that does not tell its input size; an output
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
        outputs, layers = _run(inner, example)
    if inner is not model:
        outputs, _ = _run(model, example)
    if not outputs:
        raise ValueError(
            f"vit_fast.check: model is {type(model).__name__} without a floating output of two or more axes, expected "
            "one to compare"
        )
    plain_outputs, plain_layers = {}, {}
    with backends.backend("torch"):
        if any(operation == "fp8_blocks" for operation, *_ in choices):
            plain_outputs, plain_layers = _run(inner, example)
        eager = unprepare(restore(copy.deepcopy(inner)))
        for module in eager.modules():
            module.register_forward_hook(_no_change)
        eager_outputs, eager_layers = _run(eager, example)
        first = next(iter(outputs.values()))
        device = first.device
        with torch.autocast(device.type, enabled=False):
            golden_outputs, golden_layers = _run(eager.double(), _doubled(example))
    if _shapes(outputs) != _shapes(golden_outputs):
        raise RuntimeError(
            f"vit_fast.check: model puts out {_shapes(outputs)}, expected {_shapes(golden_outputs)} as in plain PyTorch"
        )

    def compared(ours, eager, golden, plain):
        return tuple(
            Layer(name, compare(ours[name], eager[name], truth, ours[name].dtype, plain.get(name)))
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
    )
