"""What prepared blocks have beside weights, heads, scale, activation, and the eps of the norms before qkv and fc1."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

HeadNorm = tuple[Tensor | None, Tensor | None, float]  # weight [D], bias [D], eps


class BlockOptions(NamedTuple):
    """The options of a stack of prepared blocks; those of attention are the same for every block.

    Attributes:
        norm: the kind of every norm, "layer" or "rms".
        out_eps: the eps of a norm of what attention puts out, whose parameters are folded into proj; None without one.
        hidden_eps: the eps of a norm of the hidden activations, folded into fc2; None without one. hidden_features: how
            many there are, as packed weights pad them.
        q_norm, k_norm, rope, rope_layout, num_prefix, bias, key_lengths: as ``attention`` takes them.
    """

    norm: str = "layer"
    out_eps: float | None = None
    hidden_eps: float | None = None
    hidden_features: int = 0
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    rope: tuple[Tensor, Tensor] | None = None
    rope_layout: str = "half"
    num_prefix: int = 0
    bias: Tensor | None = None
    key_lengths: Tensor | None = None

    def of_attention(self) -> dict[str, Any]:
        """The keyword arguments of ``attention``; empty for attention without options."""
        given: dict[str, Any] = {}
        if self.q_norm is not None or self.k_norm is not None:
            given |= dict(q_norm=self.q_norm, k_norm=self.k_norm, norm=self.norm)
        if self.rope is not None:
            given |= dict(rope=self.rope, rope_layout=self.rope_layout, num_prefix=self.num_prefix)
        if self.bias is not None:
            given["bias"] = self.bias
        if self.key_lengths is not None:
            given["key_lengths"] = self.key_lengths
        return given

    def flatten(self) -> list[Any]:
        """The values as the operators take them (``SCHEMA``): tuples of tensors apart."""
        norms = (*(self.q_norm or _NO_NORM), *(self.k_norm or _NO_NORM))
        cos, sin = self.rope or (None, None)
        return [
            self.norm, self.out_eps, self.hidden_eps, self.hidden_features, *norms, cos, sin, self.rope_layout,
            self.num_prefix, self.bias, self.key_lengths,
        ]  # fmt: skip

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> "BlockOptions":
        """The inverse of ``flatten``; ``PLAIN`` itself where there are no options."""
        norm, out_eps, hidden_eps, hidden_features, *rest = values
        norms = [None if head_norm[2] is None else tuple(head_norm) for head_norm in (rest[:3], rest[3:6])]
        cos, sin, rope_layout, num_prefix, bias, key_lengths = rest[6:]
        rope = None if cos is None else (cos, sin)
        options = cls(
            norm, out_eps, hidden_eps, hidden_features, *norms, rope, rope_layout, num_prefix, bias, key_lengths
        )
        return PLAIN if options == PLAIN else options


_NO_NORM = (None, None, None)
SCHEMA = (
    "str norm, float? out_eps, float? hidden_eps, int hidden_features, Tensor? q_weight, Tensor? q_bias, float? q_eps, "
    "Tensor? k_weight, Tensor? k_bias, float? k_eps, Tensor? cos, Tensor? sin, str rope_layout, int num_prefix, "
    "Tensor? bias, Tensor? key_lengths"
)
PLAIN = BlockOptions()
