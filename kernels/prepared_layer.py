"""What a linear layer on a prepared weight has beside its tokens and the residual."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class PreparedLayer(NamedTuple):
    """act(LN(x) Wᵀ + b), or residual + gamma · (x Wᵀ + b), of tokens x [..., in], as every backend takes it.

    Attributes:
        weight: the tensors of a ``packing.PackedWeight``; bias: [out], of the CPU library's weights padded and never
            None (``PackedWeight.bias``).
        features: how many the output has; half the rows of W under a gated activation.
        ln_weight, ln_bias, eps: of the norm in front, [in] or None; eps None: no norm.
        norm: its kind, "layer" or "rms".
        activation: its name or None. gamma: LayerScale, [features] or None.
    """

    weight: Sequence[Tensor]
    bias: Tensor | None
    features: int
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    eps: float | None = None
    norm: str = "layer"
    activation: str | None = None
    gamma: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them; None for one that is absent."""
        return *self.weight, self.bias, self.ln_weight, self.ln_bias, self.gamma


# The fields as the operators take them, which have no argument of a tuple of tensors and others.
SCHEMA = (
    "Tensor[] weight, Tensor? bias, int features, Tensor? ln_weight, Tensor? ln_bias, float? eps, str norm, "
    "str? activation, Tensor? gamma"
)
