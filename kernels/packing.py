"""Weights packed for the CPU extension, and quantised to int8: what ``csrc/cpu/gemm.h`` reads; and the weight of one
linear layer as prepared for any backend (``PackedWeight``).

A packed weight [out, in] is [panels, groups, 32, group]: panels of 32 outputs, and for every group of inputs (1 of
float32 and float16, 2 of bfloat16, 4 of int8), the groups of the panel's outputs side by side. Outputs and
inputs are padded with zeros. Under a gated activation each panel of fc1 holds 16 gates and then the 16 values that
they gate.

A prepared block is a ``PackedBlock`` or, quantised, an ``Int8Block``: LayerNorm and LayerScale are folded in
(``folding``), biases are float32. All of it is computed in float64 and rounded once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activation_names import GATED
from .folding import Pair, fold_branch_end, fold_norm, quantise_rows, row_blocks, rows_of

PANEL = 32  # NR of csrc/cpu/gemm.h
GROUP = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}  # inputs that one instruction takes
INT8_MAX = 127


class PackedBlock(NamedTuple):
    """A transformer block with LayerNorm and LayerScale folded in: packed weights in their own dtype, and biases
    [panels·32], float32."""

    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


class Int8Block(NamedTuple):
    """A transformer block with LayerNorm and LayerScale folded in: packed int8 weights; for each input, [groups·4], its
    gain before it is quantised; for each output, [panels·32], the scale of its row, the sum of its integers (int32),
    and the bias; gain, scale and bias float32."""

    qkv_weight: torch.Tensor
    qkv_gain: torch.Tensor
    qkv_scale: torch.Tensor
    qkv_sums: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_gain: torch.Tensor
    proj_scale: torch.Tensor
    proj_sums: torch.Tensor
    proj_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_gain: torch.Tensor
    fc1_scale: torch.Tensor
    fc1_sums: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_gain: torch.Tensor
    fc2_scale: torch.Tensor
    fc2_sums: torch.Tensor
    fc2_bias: torch.Tensor


def _padded(t: torch.Tensor, axis: int, multiple: int) -> torch.Tensor:
    missing = -t.shape[axis] % multiple
    return F.pad(t, [0, 0] * (t.dim() - 1 - axis) + [0, missing]) if missing else t


def interleave(t: torch.Tensor) -> torch.Tensor:
    """[2F, ...] gates, then values → panels of 16 gates and their 16 values, F padded to a multiple of 16."""
    half = PANEL // 2
    pair = torch.stack([_padded(part, 0, half).unflatten(0, (-1, half)) for part in t.chunk(2)], dim=1)
    return pair.flatten(0, 2)


def deinterleave(t: torch.Tensor) -> torch.Tensor:
    """The inverse of ``interleave``, with its padding."""
    return t.unflatten(0, (-1, 2, PANEL // 2)).transpose(0, 1).flatten(0, 2)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] → [panels, groups, 32, group], padded with zeros."""
    group = GROUP[weight.dtype]
    padded = _padded(_padded(weight, 0, PANEL), 1, group)
    return padded.unflatten(1, (-1, group)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[panels, groups, 32, group] → [out, in], with the padding."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)


def pack_row(values: torch.Tensor) -> torch.Tensor:
    """[out] → [panels·32], padded with zeros."""
    return _padded(values, 0, PANEL).contiguous()


class PackedWeight:
    """The weight of a linear layer as prepared for one operation: those of ``ops`` take it in the place of the tensor.

    Attributes:
        operation: its name: "packed_linear", "int8_linear", "prepared_linear" or "fp8_linear".
        tensors: (weight,), float8 (weight, scale), int8 (weight, gain, scale, sums); the bias comes with each call.
        shape: (outputs, inputs). dtype: of the tokens that it takes.
    """

    def __init__(self, operation: str, tensors: tuple[torch.Tensor, ...], weight: torch.Tensor) -> None:
        self.operation, self.tensors = operation, tensors
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.in_panels = tensors[0].dim() == 4  # packed for the CPU library, whose rows and biases are padded
        self._zero = pack_row(weight.new_zeros(weight.shape[0], dtype=torch.float32)) if self.in_panels else None

    def bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """A bias [out] as the operation takes it: that of the CPU library is padded, and zero without one."""
        if not self.in_panels:
            return bias
        return self._zero if bias is None else pack_row(bias.float())


def packed_weight(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in], packed in its dtype."""
    return PackedWeight("packed_linear", (pack(weight),), weight)


def int8_weight(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in], quantised by its rows and packed."""
    linear = weight, weight.new_zeros(weight.shape[0])
    *tensors, _ = _int8_linear(weight, lambda part: _wide(linear, part))
    return PackedWeight("int8_linear", tuple(tensors), weight)


def is_tiny(weight: torch.Tensor) -> bool:
    """Whether a weight has fewer inputs or outputs than a tile of any kernel, as those of CaiT that mix heads: PyTorch
    multiplies it."""
    return min(weight.shape) < 16


def prepared_weight(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in] as it is, in rows that follow each other."""
    return PackedWeight("prepared_linear", (weight.contiguous(),), weight)


def fp8_weight(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in] in float8 e4m3, each row by a power of two (``folding.quantise_rows``)."""
    rows, scale = quantise_rows(weight.double())
    return PackedWeight("fp8_linear", (rows.contiguous(), scale.float()), weight)


def packed_block(
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
) -> PackedBlock:
    """A block, folded and packed; arguments as in ``folding.prepare_block``."""
    order = interleave if activation in GATED else _as_it_is
    return PackedBlock(
        *_packed_linear(*fold_norm(qkv, norm1, norm)[::2]),
        *_packed_linear(*fold_branch_end(proj, gamma1, out_norm, norm)),
        *_packed_linear(*map(order, fold_norm(fc1, norm2, norm)[::2])),
        *_packed_linear(*fold_branch_end(fc2, gamma2, inner_norm, norm)),
    )


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pack(weight), pack_row(bias.float())


def _as_it_is(t: torch.Tensor) -> torch.Tensor:
    return t


def input_gain(weight: torch.Tensor) -> torch.Tensor:
    """[in], float32, at most 1: what inputs are multiplied by, and columns divided by, before both are quantised.

    A row has one scale, so that a column far above the others costs these their precision. With a gain of √‖column‖
    half of that moves into the inputs, whose scale is another (SmoothQuant, Xiao et al. 2023, whose factors need data).
    """
    norms = weight.double().norm(dim=0)
    gain = (norms / norms.amax()).sqrt().float()
    return torch.where(gain > 0, gain, 1.0)  # a column of zeros, or NaN


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], float64 [out]): weight ≈ int8 · scale, symmetric, a scale for each row."""
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest / INT8_MAX, 1.0)
    return (weight / scale[:, None]).round().nan_to_num(0.0).to(torch.int8), scale


def _int8_linear(
    original: torch.Tensor, fold: Callable[[slice], Pair], order: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
) -> tuple[torch.Tensor, ...]:
    """(weight, gain, scale, sums, bias) of a linear layer, packed. ``fold`` gives some rows of weight and bias, folded,
    in float64; it is called twice for each, because the whole is never held in float64. ``order``: of the rows."""
    parts = row_blocks(original)
    gain = input_gain(torch.stack([fold(part)[0].norm(dim=0) for part in parts]))
    quantised = []
    for part in parts:
        weight, bias = fold(part)
        integers, scale = quantise_int8(weight / gain)
        quantised.append((integers, scale.float(), integers.sum(1, dtype=torch.int32), bias.float()))
    integers, *rows = (order(torch.cat(tensors)) for tensors in zip(*quantised))
    return pack(integers), _padded(gain, 0, GROUP[torch.int8]).contiguous(), *map(pack_row, rows)


def int8_block(
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
) -> Int8Block:
    """A block, folded, quantised and packed; arguments as in ``folding.prepare_block``. No data is needed."""
    order = interleave if activation in GATED else _as_it_is

    def after_norm(linear, pair):
        return lambda part: fold_norm(_wide(linear, part), pair, norm)[::2]

    def before_residual(linear, gamma, inner):
        return lambda part: fold_branch_end(_wide(linear, part), None if gamma is None else gamma[part], inner, norm)

    return Int8Block(
        *_int8_linear(qkv[0], after_norm(qkv, norm1)),
        *_int8_linear(proj[0], before_residual(proj, gamma1, out_norm)),
        *_int8_linear(fc1[0], after_norm(fc1, norm2), order),
        *_int8_linear(fc2[0], before_residual(fc2, gamma2, inner_norm)),
    )


def _wide(linear: Pair, part: slice) -> Pair:
    """Some rows in float64, so that folding does not round before quantisation does."""
    weight, bias = rows_of(linear, part)
    return weight.double(), None if bias is None else bias.double()


def unpacked_linears(
    block: Sequence[torch.Tensor], width: int, activation: str | None
) -> list[tuple[torch.Tensor, ...]]:
    """(weight [out, in], int8 its gain [in], then values of its rows [out]) of qkv, proj, fc1 and fc2: unpadded, gates
    before values."""
    size = len(block) // 4
    hidden = block[3 * size].shape[1] * block[3 * size].shape[3]  # the inputs of fc2, padded to a group
    outputs = (3 * width, width, 2 * hidden if activation in GATED else hidden, width)
    inputs = (width, width, width, hidden)
    linears = []
    for i, (rows, columns) in enumerate(zip(outputs, inputs)):
        weight, *values = block[i * size : (i + 1) * size]
        gain = [values.pop(0)[:columns]] if weight.dtype == torch.int8 else []
        parts = [unpack(weight)[:, :columns], *values]
        if i == 2 and activation in GATED:
            gates, its = zip(*(deinterleave(part).chunk(2) for part in parts))
            parts = [torch.cat([_to_rows(g, hidden), _to_rows(v, hidden)]) for g, v in zip(gates, its)]
        weight, *values = (_to_rows(part, rows) for part in parts)
        linears.append((weight, *gain, *values))
    return linears


def _to_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows, or all and zeros: fc1 has fewer outputs than fc2 inputs where these are padded to a group."""
    return t[:rows] if t.shape[0] >= rows else _padded(t, 0, rows)
