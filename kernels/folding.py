"""Weights prepared for inference: LayerNorm and LayerScale folded into the projections, and e4m3 quantisation.

A prepared block is a record of tensors: ``FoldedBlock`` (made by ``prepare_block``, read by ``prepared_blocks``) or
``Float8Block`` (made by ``fp8_block``, read by ``fp8_blocks``). An operator of torch takes a flat list of tensors, so a
stack of blocks travels as the tensors of its records, one block after the other: ``flatten`` and ``unflatten``.
All of it is computed in float64 and rounded once; no Triton is needed.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch

from .activation_names import GATED


class FoldedBlock(NamedTuple):
    """A transformer block with LayerNorm and LayerScale folded in: weights [out, in] in their own dtype.

    Biases, and the sums of the rows of a weight that follows a LayerNorm, are [out], float32 (float64 for float64).
    """

    qkv_weight: torch.Tensor
    qkv_sums: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_sums: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


class Float8Block(NamedTuple):
    """A transformer block with LayerNorm and LayerScale folded in: weights [out, in] in float8 e4m3, all else float32.

    ``norm_scale`` [C] multiplies x̂, the normalised x of both LayerNorms, and ``hidden_scale`` [hidden] multiplies
    act(fc1), before they are rounded to e4m3. The other scales [out] turn a product into its true value; biases [out].
    """

    norm_scale: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_scale: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_scale: torch.Tensor
    proj_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_scale: torch.Tensor
    fc1_bias: torch.Tensor
    hidden_scale: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_scale: torch.Tensor
    fc2_bias: torch.Tensor


Block = TypeVar("Block", bound=NamedTuple)
Pair = tuple[torch.Tensor | None, torch.Tensor | None]  # weight and bias of a layer
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# What rounding adds to a bound: x̂ and the softmax's weights are rounded (2^-4, 2^-8), float32 sums are inexact.
_SLACK = 1.07


def flatten(blocks: Iterable[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """The tensors of records, one block after the other."""
    return [tensor for block in blocks for tensor in block]


def unflatten(record: type[Block], tensors: Sequence[torch.Tensor]) -> list[Block]:
    """The records of a flat list of tensors, one for each block of the stack."""
    size = len(record._fields)
    return [record._make(tensors[start : start + size]) for start in range(0, len(tensors), size)]


def first_block(record: type[Block], tensors: Sequence[torch.Tensor]) -> Block:
    """The record of the first block in a flat list of tensors; all blocks of a stack have the same sizes."""
    return record._make(tensors[: len(record._fields)])


def _without_layer_norm(weight, bias, ln_weight, ln_bias):
    """(weight, bias) in float64 such that LN(x) weightᵀ + bias becomes that of an LN without parameters.

    Each row of weight · ln_weight is centred, which does not change its product with a normalised x.
    """
    wide = weight.double()
    folded = wide if ln_weight is None else wide * ln_weight.double()
    shift = wide.new_zeros(wide.shape[0]) if ln_bias is None else wide @ ln_bias.double()
    return folded - folded.mean(1, keepdim=True), shift if bias is None else shift + bias.double()


def _without_layer_scale(weight, bias, gamma):
    """(weight, bias) in float64 such that gamma · (x weightᵀ + bias) needs no gamma."""
    wide = weight.double()
    shift = wide.new_zeros(wide.shape[0]) if bias is None else bias.double()
    return (wide, shift) if gamma is None else (wide * gamma.double()[:, None], shift * gamma.double())


def fold_layer_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, ln_weight: torch.Tensor | None, ln_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, its row sums [out], bias [out]) for an x normalised by an LN without parameters.

    The weight is rounded to its dtype after its rows are centred, the sums are those of the rounded weight. Sums and
    bias are float32 (float64 for float64), computed in float64.
    """
    folded, shift = _without_layer_norm(weight, bias, ln_weight, ln_bias)
    rounded, wide = folded.to(weight.dtype), torch.promote_types(weight.dtype, torch.float32)
    return rounded, rounded.double().sum(1).to(wide), shift.to(wide)


def fold_layer_scale(
    weight: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) that need no gamma; the bias is float32 (float64 for float64)."""
    folded, shift = _without_layer_scale(weight, bias, gamma)
    return folded.to(weight.dtype), shift.to(torch.promote_types(weight.dtype, torch.float32))


def prepare_block(
    norm1: Pair,
    qkv: Pair,
    proj: Pair,
    gamma1: torch.Tensor | None,
    norm2: Pair,
    fc1: Pair,
    fc2: Pair,
    gamma2: torch.Tensor | None,
) -> FoldedBlock:
    """A block, folded. norm1, norm2: (weight, bias) of a LayerNorm, each or None; qkv, proj, fc1, fc2: (weight, bias or
    None) of a linear layer; gamma1, gamma2: LayerScale or None."""
    return FoldedBlock(
        *fold_layer_norm(*qkv, *norm1),
        *fold_layer_scale(*proj, gamma1),
        *fold_layer_norm(*fc1, *norm2),
        *fold_layer_scale(*fc2, gamma2),
    )


def power_of_two_scale(bound: torch.Tensor) -> torch.Tensor:
    """The largest power of two that keeps bound · scale ≤ 448; 1 where the bound is 0, NaN where it is not finite."""
    exponent = torch.frexp(E4M3_MAX / bound.double()).exponent
    scale = torch.exp2((exponent - 1).clamp(-100, 100).double())
    return torch.where(bound.isfinite(), torch.where(bound > 0, scale, 1.0), math.nan)


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [N, K], float64 [N]): weight ≈ e4m3 · scale, each row by a power of two, so that nothing else rounds."""
    scale = power_of_two_scale(weight.abs().amax(1))
    return (weight * scale[:, None]).to(torch.float32).to(E4M3), 1 / scale


def fp8_block(
    norm1: Pair,
    qkv: Pair,
    proj: Pair,
    gamma1: torch.Tensor | None,
    norm2: Pair,
    fc1: Pair,
    fc2: Pair,
    gamma2: torch.Tensor | None,
    activation: str,
) -> Float8Block:
    """A block, folded and quantised; arguments as in ``prepare_block``.

    No scale needs data. A row of x̂ has the norm √C at most, hence |x̂| < √C and |x̂ · w + b| ≤ √C·‖w‖ + |b|; what
    attention puts out is a mean of values v; no activation exceeds its argument. e4m3 keeps its relative precision
    over 2^15, so that a scale that lets the bound just reach 448 still rounds everyday values, √C below it, as the
    best scale would, and no value saturates. Channels of v and of the hidden layer have a power of two of their own;
    the columns of the next weight take it back.
    """
    width = qkv[0].shape[1]
    longest = _SLACK * math.sqrt(width)
    norm_scale = power_of_two_scale(qkv[0].new_tensor(math.sqrt(max(width - 1, 1)), dtype=torch.float64))

    def after_norm(linear, norm):
        """Quantised weight, its scale without that of x̂, the bias, and a bound of each output."""
        folded, shift = _without_layer_norm(*linear, *norm)
        weight, scale = quantise_rows(folded)
        bound = longest * (weight.double() * scale[:, None]).norm(dim=1) + shift.abs()
        return weight, scale / norm_scale, shift, bound

    def before_residual(linear, gamma, scale):
        """Quantised weight, its scale, the bias, of a layer whose input channels carry ``scale``."""
        folded, shift = _without_layer_scale(*linear, gamma)
        return *quantise_rows(folded / scale), shift

    qkv_weight, qkv_scale, qkv_bias, bound = after_norm(qkv, norm1)
    value_scale = power_of_two_scale(bound[2 * width :])
    channel_scale = torch.cat([torch.ones_like(bound[: 2 * width]), value_scale])
    fc1_weight, fc1_scale, fc1_bias, bound = after_norm(fc1, norm2)
    if activation in GATED:
        gate, value = bound.chunk(2)
        bound = gate * value
    hidden_scale = power_of_two_scale(bound)
    tensors = (
        norm_scale.expand(width),
        qkv_weight, qkv_scale * channel_scale, qkv_bias * channel_scale,
        *before_residual(proj, gamma1, value_scale),
        fc1_weight, fc1_scale, fc1_bias, hidden_scale,
        *before_residual(fc2, gamma2, hidden_scale),
    )  # fmt: skip
    return Float8Block._make((t if t.dtype == E4M3 else t.to(torch.float32)).contiguous() for t in tensors)
