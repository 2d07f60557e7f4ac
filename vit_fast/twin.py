"""The twin of a block: the same modules, whose linear layers hold prepared weights.

A block that no stack of prepared blocks describes (post-norm, parallel branches, windows, attention of other kinds) is
prepared part by part: its fused form runs on the twin, and the operations (``ops``) take a ``PackedWeight`` in the
place of a weight. Layers that multiply the same tokens (``Fused.layers_of_one_input``) are one product there, for which
the tokens are rounded once, and what a block computes of its parameters alone is computed once
(``Fused.settle_twin``). All other tensors are the block's own. A twin is never called, only its ``fused_parts``; it is
no part of the model, and gone when the block changes (``prepared``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import ops
from .block import pack
from .kernels.packing import PackedWeight, is_tiny
from .precisions import Precision

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_PACKED = "in_proj_weight"  # of torch's and open_clip's attention


def _prepared(weight: torch.Tensor, precision: Precision) -> PackedWeight | torch.Tensor:
    """A weight for the operation of the precision, or as it is where PyTorch runs it."""
    weight = weight.detach()
    return weight if is_tiny(weight) else precision.pack(weight)


class PackedLinear(nn.Module):
    """A linear layer on a prepared weight: x [..., in] → [..., out].

    Attributes:
        sizes: the outputs of each of the layers that it was made of: one, or several of one input.
    """

    def __init__(self, layers: Sequence[nn.Linear], precision: Precision) -> None:
        super().__init__()
        weight, bias = (layers[0].weight, layers[0].bias) if len(layers) == 1 else pack(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.in_features, self.out_features = layers[0].in_features, sum(self.sizes)
        self._parameters: dict[str, Any] = {"weight": _prepared(weight, precision), "bias": bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self._parameters["weight"], self._parameters["bias"])


def linears(x: torch.Tensor, layers: Sequence[nn.Module]) -> Sequence[torch.Tensor]:
    """x [..., in] through each of several linear layers, [..., out] each; by one product where a twin has made them
    one."""
    first = layers[0]
    if isinstance(first, PackedLinear) and len(first.sizes) > 1:
        return first(x).split(first.sizes, -1)
    parameters: list[dict[str, Any]] = [layer._parameters for layer in layers]
    return [ops.linear(x, of_layer["weight"], of_layer["bias"]) for of_layer in parameters]


def linear_weights(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, weight) of every linear layer in a block; the packed projection of an attention too."""
    return [
        (module, name, weight)
        for module in block.modules()
        if (name := "weight" if type(module) in _LINEAR else _PACKED) in module._parameters
        and (weight := module._parameters[name]) is not None
    ]


def _joined(module: nn.Module, precision: Precision) -> dict[nn.Module, PackedLinear]:
    """Layer → the one that takes its place, for the layers of a block that become one product."""
    found: Any = module
    groups = found.layers_of_one_input() if hasattr(found, "layers_of_one_input") else ()
    return {
        layer: joined
        for layers in groups
        if all(type(layer) in _LINEAR and not is_tiny(layer.weight) for layer in layers)
        for joined in [PackedLinear(layers, precision)]
        for layer in layers
    }


def _copied(module: nn.Module, precision: Precision, joined: dict[nn.Module, PackedLinear]) -> Any:
    if module in joined:
        return joined[module]
    if isinstance(module, nn.Linear) and type(module) in _LINEAR:
        return PackedLinear([module], precision)
    joined = joined | _joined(module, precision)
    copy: Any = object.__new__(type(module))
    attributes = dict(vars(module))
    attributes["_parameters"] = dict(module._parameters)
    if (weight := module._parameters.get(_PACKED)) is not None:
        attributes["_parameters"][_PACKED] = _prepared(weight, precision)
    attributes["_modules"] = {
        name: None if child is None else _copied(child, precision, joined) for name, child in module._modules.items()
    }
    vars(copy).update(attributes)
    if hasattr(copy, "settle_twin"):
        copy.settle_twin()
    return copy


def twin(block: nn.Module, precision: Precision) -> Any:
    """A shallow copy of a block and its parts with prepared weights; tensors that are no weights are shared."""
    return _copied(block, precision, {})


def packed_weights(twin: nn.Module) -> list[tuple[str, PackedWeight]]:
    """(name of its module, weight) of every prepared weight of a twin."""
    return [
        (name, weight)
        for name, module in twin.named_modules()
        for weight in module._parameters.values()
        if isinstance(weight, PackedWeight)
    ]
