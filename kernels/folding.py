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
from torch._subclasses.fake_tensor import FakeTensor

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

    ``norm_scale`` [C] multiplies x̂, the normalised x of both LayerNorms (and what a norm before proj returns), and
    ``hidden_scale`` [hidden] multiplies act(fc1) (or what a norm before fc2 returns), before they are rounded to e4m3.
    The other scales [out] turn a product into its true value; biases [out].
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
BLOCK = 2**17  # elements of a weight that are folded at once on a CPU, 1 MiB in float64
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


def _without_norm(weight, bias, pair, norm):
    """(weight, bias) in float64 such that norm(x) weightᵀ + bias becomes that of a norm without parameters.

    Behind a LayerNorm the rows of the folded weight are centred, which does not change its product with a normalised x.
    """
    wide, (norm_weight, norm_bias) = weight.double(), pair
    folded = wide if norm_weight is None else wide * norm_weight.double()
    shift = wide.new_zeros(wide.shape[0]) if norm_bias is None else wide @ norm_bias.double()
    centred = folded - folded.mean(1, keepdim=True) if norm == "layer" else folded
    return centred, shift if bias is None else shift + bias.double()


def _without_layer_scale(weight, bias, gamma):
    """(weight, bias) in float64 such that gamma · (x weightᵀ + bias) needs no gamma."""
    wide = weight.double()
    shift = wide.new_zeros(wide.shape[0]) if bias is None else bias.double()
    return (wide, shift) if gamma is None else (wide * gamma.double()[:, None], shift * gamma.double())


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """The rows of a weight in the parts that are folded one after the other. On a CPU these are few, because a whole
    weight in float64, several times over, would be the peak of the memory; elsewhere, and of a fake one, all."""
    rows, inputs = weight.shape
    small = weight.device.type == "cpu" and not isinstance(weight, FakeTensor)
    step = max(1, BLOCK // max(inputs, 1)) if small else max(rows, 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def rows_of(linear: Pair, part: slice) -> Pair:
    """Some rows of a linear layer."""
    weight, bias = linear
    assert weight is not None
    return weight[part], None if bias is None else bias[part]


def fold_norm(linear: Pair, pair: Pair, norm: str = "layer") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, its row sums [out], bias [out]) of a linear layer for an x normalised by a norm without parameters.

    The weight is rounded to its dtype after its rows are centred (behind a LayerNorm; an RMSNorm subtracts no mean, and
    its sums are 0), the sums are those of the rounded weight. Sums and bias are float32 (float64 for float64), computed
    in float64.
    """
    weight, bias = _empty_like(linear)
    sums = torch.zeros_like(bias)
    for part in row_blocks(weight):
        weight[part], bias[part] = _without_norm(*rows_of(linear, part), pair, norm)
        if norm == "layer":
            sums[part] = weight[part].double().sum(1)
    return weight, sums, bias


def fold_branch_end(
    linear: Pair, gamma: torch.Tensor | None, inner: Pair | None = None, norm: str = "layer"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) of a linear layer that need no gamma and, where its input is normalised, no parameters of that
    norm (``inner``); the bias is float32 (float64 for float64)."""
    weight, bias = _empty_like(linear)
    for part in row_blocks(weight):
        rows = rows_of(linear, part)
        if inner is not None:
            rows = _without_norm(*rows, inner, norm)
        weight[part], bias[part] = _without_layer_scale(*rows, None if gamma is None else gamma[part])
    return weight, bias


def _empty_like(linear):
    """Memory for a folded weight, and for its bias or row sums."""
    weight = linear[0].new_empty(linear[0].shape)
    return weight, weight.new_empty(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))


def prepare_block(
    norm1: Pair,
    qkv: Pair,
    proj: Pair,
    gamma1: torch.Tensor | None,
    norm2: Pair,
    fc1: Pair,
    fc2: Pair,
    gamma2: torch.Tensor | None,
    *,
    out_norm: Pair | None = None,
    inner_norm: Pair | None = None,
    norm: str = "layer",
) -> FoldedBlock:
    """A block, folded.

    norm1, norm2: (weight, bias) of a norm, each or None; qkv, proj, fc1, fc2: (weight, bias or None) of a linear layer;
    gamma1, gamma2: LayerScale or None; out_norm, inner_norm: the norms before proj and fc2, where there are any; norm:
    the kind of all, "layer" or "rms".
    """
    return FoldedBlock(
        *fold_norm(qkv, norm1, norm),
        *fold_branch_end(proj, gamma1, out_norm, norm),
        *fold_norm(fc1, norm2, norm),
        *fold_branch_end(fc2, gamma2, inner_norm, norm),
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
    *,
    out_norm: Pair | None = None,
    inner_norm: Pair | None = None,
    norm: str = "layer",
) -> Float8Block:
    """A block, folded and quantised; arguments as in ``prepare_block``.

    No scale needs data. A row of x̂ has the norm √C at most, hence |x̂| < √C and |x̂ · w + b| ≤ √C·‖w‖ + |b|; what
    attention puts out is a mean of values v; no activation exceeds its argument. e4m3 keeps its relative precision
    over 2^15, so that a scale that lets the bound just reach 448 still rounds everyday values, √C below it, as the
    best scale would, and no value saturates. Channels of v and of the hidden layer have a power of two of their own;
    the columns of the next weight take it back. Where these are normalised before the next weight, they stay in the
    dtype of x until then, and the scale is that of a normalised row.
    """
    width = qkv[0].shape[1]
    longest = _SLACK * math.sqrt(width)
    norm_scale = power_of_two_scale(qkv[0].new_tensor(math.sqrt(max(width - 1, 1)), dtype=torch.float64))

    def after_norm(linear, pair):
        """Quantised weight, its scale without that of x̂, the bias, and a bound of each output."""
        folded, shift = _without_norm(*linear, pair, norm)
        weight, scale = quantise_rows(folded)
        bound = longest * (weight.double() * scale[:, None]).norm(dim=1) + shift.abs()
        return weight, scale / norm_scale, shift, bound

    def before_residual(linear, gamma, scale, inner):
        """Quantised weight, its scale, the bias, of a layer whose input channels carry ``scale``."""
        if inner is not None:
            linear = _without_norm(*linear, inner, norm)
        folded, shift = _without_layer_scale(*linear, gamma)
        return *quantise_rows(folded / scale), shift

    qkv_weight, qkv_scale, qkv_bias, bound = after_norm(qkv, norm1)
    value_scale = power_of_two_scale(bound[2 * width :]) if out_norm is None else torch.ones_like(bound[2 * width :])
    channel_scale = torch.cat([torch.ones_like(bound[: 2 * width]), value_scale])
    fc1_weight, fc1_scale, fc1_bias, bound = after_norm(fc1, norm2)
    if activation in GATED:
        gate, value = bound.chunk(2)
        bound = gate * value
    hidden_scale = power_of_two_scale(bound)
    if inner_norm is not None:
        hidden_scale = power_of_two_scale(torch.full_like(bound, math.sqrt(len(bound))))
    tensors = (
        norm_scale.expand(width),
        qkv_weight, qkv_scale * channel_scale, qkv_bias * channel_scale,
        *before_residual(proj, gamma1, value_scale if out_norm is None else norm_scale, out_norm),
        fc1_weight, fc1_scale, fc1_bias, hidden_scale,
        *before_residual(fc2, gamma2, hidden_scale, inner_norm),
    )  # fmt: skip
    return Float8Block._make((t if t.dtype == E4M3 else t.to(torch.float32)).contiguous() for t in tensors)
