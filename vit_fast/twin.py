"""The twin of a block: the same modules, whose linear layers hold prepared weights.

A block that no stack of prepared blocks describes (post-norm, parallel branches, windows, attention of other kinds) is
prepared part by part: its fused form runs on the twin, and the operations (``ops``) take a ``PackedWeight`` in the
place of a weight. All other tensors are the block's own. A twin is never called, only its ``fused_parts``; it is no
part of the model, and gone when the block changes (``prepared``).
"""

from typing import Any

import torch
from torch import nn

from . import ops
from .kernels.packing import PackedWeight, is_tiny
from .precisions import Precision

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_PACKED = "in_proj_weight"  # of torch's and open_clip's attention


def _prepared(weight: torch.Tensor, precision: Precision) -> PackedWeight | torch.Tensor:
    """A weight for the operation of the precision, or as it is where PyTorch runs it."""
    weight = weight.detach()
    return weight if is_tiny(weight) else precision.pack(weight)


class PackedLinear(nn.Module):
    """A linear layer on a prepared weight: x [..., in] → [..., out]."""

    def __init__(self, linear: nn.Linear, precision: Precision) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parameters: dict[str, Any] = {"weight": _prepared(linear.weight, precision), "bias": linear.bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


def linear_weights(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, weight) of every linear layer in a block; the packed projection of an attention too."""
    return [
        (module, name, weight)
        for module in block.modules()
        if (name := "weight" if type(module) in _LINEAR else _PACKED) in module._parameters
        and (weight := module._parameters[name]) is not None
    ]


def _part(child: nn.Module | None, precision: Precision) -> nn.Module | None:
    if isinstance(child, nn.Linear) and type(child) in _LINEAR:
        return PackedLinear(child, precision)
    return None if child is None else twin(child, precision)


def twin(module: nn.Module, precision: Precision) -> Any:
    """A shallow copy of a module and its parts with prepared weights; tensors that are no weights are shared."""
    copy: Any = object.__new__(type(module))
    attributes = dict(vars(module))
    attributes["_parameters"] = dict(module._parameters)
    if (weight := module._parameters.get(_PACKED)) is not None:
        attributes["_parameters"][_PACKED] = _prepared(weight, precision)
    attributes["_modules"] = {name: _part(child, precision) for name, child in module._modules.items()}
    vars(copy).update(attributes)
    return copy


def packed_weights(twin: nn.Module) -> list[tuple[str, PackedWeight]]:
    """(name of its module, weight) of every prepared weight of a twin."""
    return [
        (name, weight)
        for name, module in twin.named_modules()
        for weight in module._parameters.values()
        if isinstance(weight, PackedWeight)
    ]
