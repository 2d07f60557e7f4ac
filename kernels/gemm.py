"""The GEMM kernel: a tile of x Wᵀ and its epilogue. ``linear`` has the public functions that launch it.

    out = residual + row_scale[b] · gamma · act(weight_scale · LN(x Wᵀ) + bias)      every part but x Wᵀ optional

where LN(x Wᵀ) = rstd · (x Wᵀ − mean · colsum(W)) is the product with the normalised x, LayerNorm without parameters.

x [rows, K] at one or two row strides; weight [N, K], also as a transposed view; all vectors contiguous; residual
[rows, N] at one or two row strides; out [rows, N] contiguous. float32, float16, bfloat16, float8 e4m3 (float64
interpreted). The product is accumulated in float32, and the epilogue is float32 until out is stored.
act: gelu (by erf), gelu_tanh, quick_gelu, relu, silu, or a gated one by silu (swiglu), gelu (geglu) or gelu_tanh
(geglu_tanh): the weight's rows are [gate | value], N of each, and act(gate) · value is computed from two accumulators
of one program.

One program computes one tile of out, BLOCK_M × BLOCK_N, over all of K. Grid: ceil(rows/BLOCK_M) · ceil(N/BLOCK_N),
grouped in panels of GROUP_M tile rows (``tile_position``), so that programs which run together share operands in L2.
With REVERSED the programs take the tiles from the last to the first: those that start first then read the rows which
a kernel in the other order has written last, and which L2 still holds.
Split-K: SPLIT_K programs share the K loop of one tile. Each stores its sums in the workspace and adds one to the tile's
counter in the semaphore; the last to arrive adds them up in the order of K and runs the epilogue. No program waits for
another. The counters must be zero before the launch, and are not zero after it.
Row-statistics partials: the epilogue can emit mean and M2 of every row of its tile as it is stored (``RowPartials``).
A later GEMM that folds a LayerNorm in takes these, and each of its programs merges those of its rows before the K loop
(Chan); or it takes mean and rstd (``RowStatistics``), which ``layer_norm.row_statistics`` has merged from them once.

Tiles of x and W come through host tensor descriptors (TMA) where the config asks for it and both operands are
TMA-compatible: base addresses and row strides are multiples of 16 bytes, rows do not overlap. Otherwise they come
through masked pointers, at any strides; unaligned ones, in pieces narrower than 16 bytes, are slow.
2·rows·N·K FLOP; moves rows·K + N·K + rows·N elements, and rows·N more for a residual.

Source: tile order after the Triton matmul tutorial; merged statistics: Chan, Golub, LeVeque, "Algorithms for Computing
the Sample Variance" (1983).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, launch
from .activation_names import GATED
from .activations import activate_to
from .arguments import check_rows
from .layer_norm import RowPartials, merge_partials, partials_per_step


class FoldedNorm(NamedTuple):
    """The LayerNorm that the epilogue applies to the product."""

    statistics_ptr: Any  # [2, partials of x, rows] contiguous: mean, M2; or [2, rows] contiguous: mean, rstd
    column_sum_ptr: Any  # [rows of weight] contiguous
    eps: float


class Vectors(NamedTuple):
    """What the epilogue adds or multiplies by row or column, each contiguous or None."""

    weight_scale_ptr: Any  # [rows of weight]
    bias_ptr: Any  # [rows of weight]
    gamma_ptr: Any  # [out_features]
    row_scale_ptr: Any  # [rows / rows_per_sample]


class Residual(NamedTuple):
    """What the epilogue adds element by element: [rows, out_features], rows at one or two strides."""

    residual_ptr: Any
    stride_outer: int
    stride_inner: int
    stride_column: int


class SplitK(NamedTuple):
    """What the programs of one tile share."""

    workspace_ptr: Any  # [tiles, SPLIT_K, BLOCK_M, BLOCK_N]
    semaphore_ptr: Any  # [tiles] int32, zeros


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column) of a tile's number: column by column within panels of GROUP_M tile rows."""
    panel = tile // (GROUP_M * tiles_n)
    panel_height = tl.minimum(tiles_m - panel * GROUP_M, GROUP_M)
    tile -= panel * GROUP_M * tiles_n
    tile_n = tile // panel_height
    return panel * GROUP_M + tile - tile_n * panel_height, tile_n


@triton.jit
def _affine(acc, mean, rstd, norm, vectors, offset, column, in_columns, ACC: tl.constexpr):
    """weight_scale · rstd · (acc − mean · colsum(W)) + bias, for the rows ``offset`` + ``column`` of the weight."""
    if norm is not None:
        column_sum = tl.load(norm.column_sum_ptr + offset + column, mask=in_columns, other=0.0).to(ACC)
        acc = (acc - mean[:, None] * column_sum[None, :]) * rstd[:, None]
    if vectors.weight_scale_ptr is not None:
        acc *= tl.load(vectors.weight_scale_ptr + offset + column, mask=in_columns, other=0.0)[None, :]
    if vectors.bias_ptr is not None:
        acc += tl.load(vectors.bias_ptr + offset + column, mask=in_columns, other=0.0).to(ACC)[None, :]
    return acc


@triton.jit
def _add_columns(mean, m2, stored, size, BEFORE: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """mean and M2 of BEFORE elements of each row and the first ``size`` of ``stored`` together (Chan)."""
    stored = stored.to(ACC)
    mask = (tl.arange(0, WIDTH) < size)[None, :]
    if BEFORE > 0:
        stored -= mean[:, None]
    stored = tl.where(mask, stored, 0.0)
    shift = tl.sum(stored, axis=1) / tl.maximum(size, 1).to(ACC)
    stored = tl.where(mask, stored - shift[:, None], 0.0)
    squares = tl.sum(stored * stored, axis=1)
    if BEFORE > 0:
        share = size.to(ACC) / (BEFORE + size).to(ACC)
        squares += m2 + shift * shift * (BEFORE * share)
        shift = mean + shift * share
    return shift, squares


@triton.jit
def _store_tile(
    acc,
    value,
    mean,
    rstd,
    out_ptr,
    norm,
    vectors,
    residual,
    row,
    first,
    rows,
    out_features,
    residual_inner,
    rows_per_sample,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDUAL_TWO_STRIDES: tl.constexpr,
    ALIGN_N: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """The epilogue: finishes and stores acc [BLOCK_M, WIDTH], the columns from ``first`` on of the rows ``row``.

    value: the second accumulator of a gated activation, acc being its gate; None otherwise.
    Returns what it stores, as it stores it.
    """
    column = first + tl.arange(0, WIDTH)
    in_rows, in_columns = row < rows, column < out_features
    mask = in_rows[:, None] & in_columns[None, :]
    acc = _affine(acc, mean, rstd, norm, vectors, 0, column, in_columns, ACC)
    if value is None:
        acc = activate_to(acc, ACTIVATION, EXACT, out_ptr.dtype.element_ty)
    else:
        value = _affine(value, mean, rstd, norm, vectors, out_features, column, in_columns, ACC)
        acc = activate_to(acc, ACTIVATION, EXACT, out_ptr.dtype.element_ty) * value
    if vectors.gamma_ptr is not None:
        acc *= tl.load(vectors.gamma_ptr + column, mask=in_columns, other=0.0).to(ACC)[None, :]
    if vectors.row_scale_ptr is not None:
        acc *= tl.load(vectors.row_scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(ACC)[:, None]
    if residual is not None:
        stride_outer, stride_inner = residual.stride_outer, residual.stride_inner
        if ALIGN_N > 1 and ALIGN_N < 16:
            stride_outer, stride_inner = stride_outer // ALIGN_N * ALIGN_N, stride_inner // ALIGN_N * ALIGN_N
        residual_row = launch.row_offset(row, residual_inner, stride_outer, stride_inner, RESIDUAL_TWO_STRIDES)
        residual_ptrs = residual.residual_ptr + residual_row[:, None] + (column * residual.stride_column)[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    out_ptrs = out_ptr + (row * out_features)[:, None] + column[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask)
    return out


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner", "rows_per_sample"])
def _linear_fwd_kernel(
    out_ptr,  # [rows, out_features] contiguous
    x_src,  # pointer to rows at one or two strides, or descriptor of [rows, in_features]
    weight_src,  # pointer, or descriptor, of [out_features or 2·out_features, in_features]
    norm,  # FoldedNorm, or None
    vectors,  # Vectors
    residual,  # Residual, or None
    partials_out_ptr,  # [2, partials of out, rows] contiguous, or None
    split_k,  # SplitK, or None
    rows,
    out_features,
    in_features,
    x_inner,
    residual_inner,
    rows_per_sample,
    stride_xo,
    stride_xi,
    stride_xk,
    stride_wn,
    stride_wk,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    X_TWO_STRIDES: tl.constexpr,
    RESIDUAL_TWO_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_N: tl.constexpr,
    PARTIAL_WIDTH: tl.constexpr,
    PARTIALS_PER_STEP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    REVERSED: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    launch.pdl_wait(PDL)
    # Triton specialises on sizes and strides that are multiples of 16; this tells it of multiples of 2, 4 and 8.
    if ALIGN_K > 1 and ALIGN_K < 16:
        in_features = in_features // ALIGN_K * ALIGN_K
        stride_xo, stride_xi = stride_xo // ALIGN_K * ALIGN_K, stride_xi // ALIGN_K * ALIGN_K
        stride_wn = stride_wn // ALIGN_K * ALIGN_K
    if ALIGN_N > 1 and ALIGN_N < 16:
        out_features = out_features // ALIGN_N * ALIGN_N

    tile, split = tl.program_id(0), 0  # split: which part of the K loop
    first_k, end_k = 0, in_features
    if SPLIT_K > 1:
        split, tile = tile % SPLIT_K, tile // SPLIT_K
        share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLIT_K) * BLOCK_K
        first_k = split * share
        end_k = tl.minimum(first_k + share, in_features)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    place = tile
    if REVERSED:
        place = tl.num_programs(0) // SPLIT_K - 1 - tile
    tile_m, tile_n = tile_position(place, tiles_m, tiles_n, GROUP_M)

    tl.static_assert(SPLIT_K == 1 or not GATED, "gated activations have no split-K")
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = row < rows, column < out_features
    mean, rstd = None, None
    if norm is not None and PARTIAL_WIDTH > 0:
        mean, rstd = merge_partials(
            norm.statistics_ptr, row, rows, in_features, norm.eps, PARTIAL_WIDTH, PARTIALS_PER_STEP, ACC
        )
    if not DESCRIPTORS:
        lane = tl.arange(0, BLOCK_K).to(tl.int64)
        x_row = launch.row_offset(row, x_inner, stride_xo, stride_xi, X_TWO_STRIDES)
        x_ptrs = x_src + x_row[:, None] + (lane * stride_xk)[None, :]
        weight_ptrs = weight_src + (column * stride_wn)[None, :] + (lane * stride_wk)[:, None]
        if SPLIT_K > 1:
            x_ptrs += tl.full([], 1, tl.int64) * first_k * stride_xk
            weight_ptrs += tl.full([], 1, tl.int64) * first_k * stride_wk
        x_step = tl.full([], BLOCK_K, tl.int64) * stride_xk
        weight_step = tl.full([], BLOCK_K, tl.int64) * stride_wk
        value_offset = tl.full([], 1, tl.int64) * out_features * stride_wn

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if GATED:
        value_acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(first_k, end_k, BLOCK_K):
        if DESCRIPTORS:
            x = x_src.load([tile_m * BLOCK_M, k])
            weight = weight_src.load([tile_n * BLOCK_N, k]).T
        else:
            x_mask, weight_mask = in_rows[:, None], in_columns[None, :]
            if not EVEN_K:
                x_mask = x_mask & (lane < in_features - k)[None, :]
                weight_mask = weight_mask & (lane < in_features - k)[:, None]
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        if UPCAST is not None:
            x, weight = x.to(UPCAST), weight.to(UPCAST)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACC)
        if GATED:
            if DESCRIPTORS:
                value = weight_src.load([out_features + tile_n * BLOCK_N, k]).T
            else:
                value = tl.load(weight_ptrs + value_offset, mask=weight_mask, other=0.0)
            if UPCAST is not None:
                value = value.to(UPCAST)
            value_acc = tl.dot(x, value, value_acc, input_precision=PRECISION, out_dtype=ACC)
        if not DESCRIPTORS:
            x_ptrs += x_step
            weight_ptrs += weight_step

    last = True
    if SPLIT_K > 1:
        slot = (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        slot += tl.full([], SPLIT_K, tl.int64) * tile * (BLOCK_M * BLOCK_N)
        tl.store(split_k.workspace_ptr + slot + split * (BLOCK_M * BLOCK_N), acc)
        tl.debug_barrier()  # every thread has stored before one of them releases the tile
        last = tl.atomic_add(split_k.semaphore_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for other in range(SPLIT_K):
                acc += tl.load(split_k.workspace_ptr + slot + other * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    if last:
        row_mean, row_rstd = mean, rstd
        if norm is not None and PARTIAL_WIDTH == 0:  # here, so that nothing stands before the first loads of the loop
            row_mean = tl.load(norm.statistics_ptr + row, mask=in_rows, other=0.0).to(ACC)
            row_rstd = tl.load(norm.statistics_ptr + rows + row, mask=in_rows, other=0.0).to(ACC)
        # In two halves: the whole tile and its addresses do not fit in the registers of four warps.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        left_value, right_value = None, None
        if GATED:
            left_value, right_value = value_acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        first = tile_n.to(tl.int64) * BLOCK_N
        out = _store_tile(
            left, left_value, row_mean, row_rstd, out_ptr, norm, vectors, residual, row, first, rows, out_features,
            residual_inner, rows_per_sample, ACTIVATION, EXACT, RESIDUAL_TWO_STRIDES, ALIGN_N, HALF, ACC,
        )  # fmt: skip
        if partials_out_ptr is not None:
            size = tl.minimum(out_features - first, HALF)
            tile_mean, tile_m2 = _add_columns(0.0, 0.0, out, size, 0, HALF, ACC)
        out = _store_tile(
            right, right_value, row_mean, row_rstd, out_ptr, norm, vectors, residual, row, first + HALF, rows,
            out_features, residual_inner, rows_per_sample, ACTIVATION, EXACT, RESIDUAL_TWO_STRIDES, ALIGN_N, HALF, ACC,
        )  # fmt: skip
        if partials_out_ptr is not None:
            size = tl.maximum(tl.minimum(out_features - first - HALF, HALF), 0)
            tile_mean, tile_m2 = _add_columns(tile_mean, tile_m2, out, size, HALF, HALF, ACC)
            pointers = partials_out_ptr + tile_n.to(tl.int64) * rows + row
            partials = tl.full([], 1, tl.int64) * tl.cdiv(out_features, BLOCK_N)
            tl.store(pointers, tile_mean, mask=in_rows)
            tl.store(pointers + partials * rows, tile_m2, mask=in_rows)


def _alignment(x, stride_xo, stride_xi, stride_xk, weight, out_features):
    """(tma_compatible, unaligned): can TMA read both operands; would pointers load them in pieces under 16 bytes?"""
    in_features = weight.shape[1]
    stride_wn, stride_wk = weight.stride()
    x_bytes = launch.vector_bytes(x, in_features, stride_xo, stride_xi) if stride_xk == 1 else 0
    weight_bytes = launch.vector_bytes(weight, in_features, stride_wn) if stride_wk == 1 else 0
    # A descriptor's rows must not overlap.
    tma_compatible = x_bytes == weight_bytes == 16 and stride_xi >= in_features and stride_wn >= in_features
    if stride_wn == 1:
        weight_bytes = launch.vector_bytes(weight, out_features, stride_wk)
    return tma_compatible, min(x_bytes, weight_bytes) < 16


def _upcast(weight_dtype, out_dtype):
    """The dtype to which an interpreted kernel widens its operands, or None.

    The interpreter multiplies the bit patterns of bf16 and float8; a float64 residual asks for float64 products.
    """
    if not launch.INTERPRETED or weight_dtype == torch.float64:
        return None
    if out_dtype == torch.float64:
        return tl.float64
    return tl.float32 if weight_dtype in (torch.bfloat16, torch.float8_e4m3fn) else None


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    norm: Any = None,
    with_partials: bool = False,
    out_dtype: torch.dtype | None = None,
    semaphore: Tensor | None = None,
    reverse_tiles: bool = False,
    pdl: bool = False,
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor, RowPartials | None]:
    """(out, its ``RowPartials`` or None): the formula of the head comment for x [B, ..., K] and residual [B, ..., N].

    ``norm``: (RowPartials or RowStatistics of x, eps, column sums of weight) of a folded LayerNorm; ``out_dtype``: that
    of out without a residual, the weight's by default; ``semaphore``: int32 zeros that only this call uses as counters,
    allocated where None or too few; ``reverse_tiles``: whether the last tiles come first. Split-K, which makes the bits
    depend on the number of rows, is allowed where a semaphore is given or partials are requested.
    """
    gated = activation in GATED
    out_features = weight.shape[0] // 2 if gated else weight.shape[0]
    in_features = weight.shape[1]
    if residual is not None:
        out_dtype = residual.dtype
    out_dtype = out_dtype or weight.dtype
    rows = x.numel() // in_features
    check_rows("linear", rows)
    out = torch.empty((*x.shape[:-1], out_features), dtype=out_dtype, device=x.device)
    if rows == 0:
        return out, RowPartials(out.new_empty(2, 1, 0, dtype=torch.float32), out_features) if with_partials else None

    rows_per_sample = rows // x.shape[0] if row_scale is not None else 0
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    x, x_two_strides, x_inner, stride_xo, stride_xi = launch.row_layout(x)
    stride_xk, (stride_wn, stride_wk) = x.stride(-1), weight.stride()
    residual_two_strides, residual_inner, stride_ro, stride_ri = False, 0, 0, 0
    if residual is not None:
        residual, residual_two_strides, residual_inner, stride_ro, stride_ri = launch.row_layout(residual)
        residual = Residual(residual, stride_ro, stride_ri, residual.stride(-1))
    vector = launch.vector
    vectors = Vectors(vector(weight_scale), vector(bias), vector(gamma), vector(row_scale))

    precision = launch.dot_precision() if weight.dtype == torch.float32 else "ieee"
    tma_compatible, unaligned = _alignment(x, stride_xo, stride_xi, stride_xk, weight, out_features)
    if config is None:
        arch, tf32 = configs.arch_of(x.device), precision == "tf32"
        config = configs.pick_linear_config(rows, out_features, gated, weight.dtype, out_dtype, tf32, unaligned, arch)
        if with_partials or semaphore is not None:
            processors = configs.multiprocessors_of(x.device)
            config = configs.split_k_config(config, rows, out_features, in_features, processors)
    partial_width, partials_merged = 1, 1  # width 0: mean and rstd
    if norm is not None:
        statistics, eps, column_sum = norm
        partial_width = statistics.width if isinstance(statistics, RowPartials) else 0
        if partial_width:
            partials_merged = partials_per_step(in_features, partial_width)
        norm = FoldedNorm(statistics.values, launch.vector(column_sum), eps)
    partials_out = None
    if with_partials:
        shape = (2, configs.cdiv(out_features, config.block_n), rows)
        values = torch.empty(shape, dtype=launch.stat_dtype(out_dtype), device=x.device)
        partials_out = RowPartials(values, config.block_n)
    x_src, weight_src = x, weight
    descriptors = config.tma and tma_compatible and not x_two_strides
    if descriptors:
        x_src = TensorDescriptor(x, [rows, in_features], [stride_xi, 1], [config.block_m, config.block_k])
        weight_src = TensorDescriptor(
            weight, list(weight.shape), [stride_wn, stride_wk], [config.block_n, config.block_k]
        )
    tiles = configs.cdiv(rows, config.block_m) * configs.cdiv(out_features, config.block_n)
    split_k = None
    if config.split_k > 1:
        shape = (tiles, config.split_k, config.block_m, config.block_n)
        workspace = torch.empty(shape, dtype=torch.promote_types(out_dtype, torch.float32), device=x.device)
        if semaphore is None or semaphore.numel() < tiles:
            semaphore = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        split_k = SplitK(workspace, semaphore)
    with launch.device_guard(x):
        _linear_fwd_kernel[(tiles * config.split_k,)](
            out, x_src, weight_src, norm, vectors, residual, partials_out and partials_out.values, split_k,
            rows, out_features, in_features, x_inner, residual_inner, rows_per_sample,
            stride_xo, stride_xi, stride_xk, stride_wn, stride_wk,
            ACTIVATION=GATED.get(activation, activation),
            GATED=gated,
            EXACT=weight.dtype in (torch.float32, torch.float64),
            X_TWO_STRIDES=x_two_strides,
            RESIDUAL_TWO_STRIDES=residual_two_strides,
            DESCRIPTORS=descriptors,
            EVEN_K=descriptors or in_features % config.block_k == 0,
            ALIGN_K=16 if descriptors else math.gcd(16, in_features, stride_xo, stride_xi, stride_wn),
            ALIGN_N=math.gcd(16, out_features, stride_ro, stride_ri),
            PARTIAL_WIDTH=partial_width,
            PARTIALS_PER_STEP=partials_merged,
            SPLIT_K=config.split_k,
            REVERSED=reverse_tiles,
            UPCAST=_upcast(weight.dtype, out_dtype),
            ACC=launch.accumulator(weight.dtype, out_dtype),
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            **launch.options(pdl, config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg),
        )  # fmt: skip
    return out, partials_out
