"""Linear layer as one GEMM with fused epilogue, and LayerNorm + linear.

    out = residual + row_scale[b] · gamma · act(x Wᵀ + bias)        every part but x Wᵀ optional

    out = act((LN(x) without weight and bias) Wᵀ + bias)            the LayerNorm folded into the epilogue

    out = residual + gamma · act(weight_scale · (x Wᵀ) + bias)      x and W in float8 e4m3

x [B, ..., K] and residual [B, ..., N] with any strides, weight [N, K] also as a transposed view, bias [N], gamma [N],
row_scale [B], out [B, ..., N] contiguous. float32, float16, bfloat16 (float64 interpreted). The product is taken in the
weight's dtype and accumulated in float32; the epilogue is float32; out has the residual's dtype, else the weight's.
An x of another dtype is cast in a launch of its own (inside the GEMM, wgmma would serialise and Triton would multiply
float32 weights as TF32 on sm_100); LayerNorm + linear and the branches of a block never need it.
act: gelu (erf), gelu_tanh, quick_gelu, relu, or swiglu: the weight's rows are [gate | value], N/2 of each, and
out = silu(gate) · value is N/2 wide, from two accumulators of one launch.
Folded: rstd · (x Wᵀ − mean · colsum(W)) + bias, mean and rstd of each row merged (Chan) from the ``Moments`` of its
parts. Whoever wrote x has left them: ``linear_moments`` emits those of out, as it is stored, a part per half tile. The
rows of W shall be centred, so that what is subtracted stays small: x Wᵀ loses 2^-22 · |mean|/spread of its digits.
e4m3: weight_scale [N] takes back the scales of x and of the rows of W, and gamma can be the scale of an out in e4m3;
capability 8.9 and later. On sm_90 the tensor cores then add with less than float32 has: about 2^-13 of a long sum.

One program computes one tile of out, BLOCK_M × BLOCK_N, over all of K. Grid: ceil(rows/BLOCK_M) · ceil(N/BLOCK_N), in
panels of GROUP_M tile rows, so that tiles which run together share their operands in L2. In ``linear_moments``, where
tiles are few, SPLITS programs share the sum over K of one (so in ``fp8_linear``): each stores what it has, and the last
to arrive adds up, in the order of K, and finishes the tile. No program waits for another.
Tiles of x and W come through host tensor descriptors (TMA) where the config asks for it and base addresses and row
strides are multiples of 16 bytes; through masked pointers, at any strides, otherwise. Rows at two strides (x[:, 1:])
are read in place; a tensor whose leading axes need three is copied first, as are vectors that are not contiguous.
2·rows·N·K FLOP; moves rows·K + N·K + rows·N elements, and rows·N more for a residual.

In fp16 and bf16, gelu takes Φ(−|z|) = exp(−z²/2)·p(t), t = 1/(1 + c·|z|), with p fitted to a relative error of 3e-5:
the error stays relative in the negative tail, and it costs one exp2 and one rsqrt where erf costs 33 instructions.
Limits: float64 in the interpreter only; dropout is not fused; loads narrower than 16 bytes (K not a multiple of 8 in
16-bit types, x transposed) are slow.
Source: tile order after the Triton matmul tutorial; form of t after Abramowitz and Stegun 7.1.26, coefficients ours;
merged moments: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance" (1983).
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from . import layer_norm as ln
from .arguments import check_rows


@triton.jit
def sigmoid(z, EXACT: tl.constexpr):
    e = tl.exp2(z * -1.4426950408889634)
    return 1.0 / (1.0 + e) if EXACT else reciprocal(1.0 + e)


@triton.jit
def reciprocal(d):
    """1/d of d ≥ 1 in two instructions, where a division takes six; 0 from 2^64 up."""
    return tl.rsqrt(d * d)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """An elementwise activation, with the precision of float32 where EXACT, of fp16 otherwise. NaN stays NaN."""
    if ACTIVATION == "gelu":
        if EXACT:
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            size = tl.minimum(tl.abs(z), 32.0)
            t = reciprocal(1.0 + 0.375705 * size)
            p = -0.0911806684 * t + 0.2000518714
            p = p * t + 0.0837157211
            p = p * t + 0.1580672795
            p = (p * t + 0.1493327026) * (t * size)
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - p * tl.exp2(size * (-0.7213475204444817 * size))
    elif ACTIVATION == "gelu_tanh":
        z = z * sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z), EXACT)
    elif ACTIVATION == "quick_gelu":
        z = z * sigmoid(1.702 * z, EXACT)
    elif ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def _row_statistics(moments_ptr, row, rows, width, eps, PART: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """mean and rstd of rows of ``width`` elements from the moments of their parts of PART, PARTS of them at a time."""
    parts = tl.full([], 1, tl.int64) * tl.cdiv(width, PART)
    mean = tl.zeros(row.shape, ACC)
    squares = tl.zeros(row.shape, ACC)
    for first in tl.range(0, parts, PARTS, num_stages=1):
        part = first + tl.arange(0, PARTS)
        size = tl.minimum(width - part * PART, PART).to(ACC)[:, None]
        pointers = moments_ptr + part[:, None] * rows + row[None, :]
        mask = (part < parts)[:, None] & (row < rows)[None, :]
        part_mean = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        part_squares = tl.load(pointers + parts * rows, mask=mask, other=0.0).to(ACC)
        before = tl.full([], PART, ACC) * first
        count = tl.minimum(tl.full([], 1, ACC) * width - before, PARTS * PART)
        centre = tl.sum(part_mean * size, axis=0) / count
        centred = tl.where(mask, part_mean - centre[None, :], 0.0)
        shift = tl.sum(centred * size, axis=0) / count
        centred = tl.where(mask, centred - shift[None, :], 0.0)
        step = centre + shift - mean
        mean += step * (count / (before + count))
        squares += tl.sum(part_squares + size * centred * centred, axis=0)
        squares += step * step * (before * count / (before + count))
    return mean, tl.rsqrt(squares / width + eps)


@triton.jit
def _unfold(acc, mean, rstd, column_sum_ptr, column, in_columns, ACC: tl.constexpr):
    """x Wᵀ as it would be had x been normalised."""
    column_sum = tl.load(column_sum_ptr + column, mask=in_columns, other=0.0).to(ACC)
    return (acc - mean[:, None] * column_sum[None, :]) * rstd[:, None]


@triton.jit
def _store_moments(value, moments_ptr, row, rows, first, width, mask, PART: tl.constexpr):
    """Mean and centred sum of squares of the columns ``first`` … ``first`` + PART of the rows; value is 0 off mask."""
    size = tl.maximum(tl.minimum(width - first, PART), 1).to(value.dtype)
    mean = tl.sum(value, axis=1) / size
    centred = tl.where(mask, value - mean[:, None], 0.0)
    pointers = moments_ptr + first // PART * rows + row
    in_matrix = (row < rows) & (first < width)
    tl.store(pointers, mean, mask=in_matrix)
    parts = tl.full([], 1, tl.int64) * tl.cdiv(width, PART)
    tl.store(pointers + parts * rows, tl.sum(centred * centred, axis=1), mask=in_matrix)


@triton.jit
def _store_tile(
    acc,
    value,
    mean,
    rstd,
    out_ptr,
    moments_out_ptr,
    column_sum_ptr,
    weight_scale_ptr,
    bias_ptr,
    gamma_ptr,
    row_scale_ptr,
    residual_ptr,
    row,
    first,
    rows,
    out_features,
    residual_inner,
    rows_per_sample,
    stride_ro,
    stride_ri,
    stride_rn,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """The epilogue of acc [M, WIDTH], the columns from ``first`` on of the rows ``row``; value: swiglu's other half."""
    column = first + tl.arange(0, WIDTH)
    in_rows, in_columns = row < rows, column < out_features
    mask = in_rows[:, None] & in_columns[None, :]
    if column_sum_ptr is not None:
        acc = _unfold(acc, mean, rstd, column_sum_ptr, column, in_columns, ACC)
    if weight_scale_ptr is not None:
        acc *= tl.load(weight_scale_ptr + column, mask=in_columns, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(ACC)[None, :]
    if value is None:
        acc = activate(acc, ACTIVATION, EXACT)
    else:
        if column_sum_ptr is not None:
            value = _unfold(value, mean, rstd, column_sum_ptr + out_features, column, in_columns, ACC)
        if weight_scale_ptr is not None:
            value *= tl.load(weight_scale_ptr + out_features + column, mask=in_columns, other=0.0)[None, :]
        if bias_ptr is not None:
            value += tl.load(bias_ptr + out_features + column, mask=in_columns, other=0.0).to(ACC)[None, :]
        acc = acc * sigmoid(acc, EXACT) * value
    if gamma_ptr is not None:
        acc *= tl.load(gamma_ptr + column, mask=in_columns, other=0.0).to(ACC)[None, :]
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(ACC)[:, None]
    if residual_ptr is not None:
        residual_row = ln.row_offset(row, residual_inner, stride_ro, stride_ri, SPLIT_RESIDUAL)
        residual_ptrs = residual_ptr + residual_row[:, None] + (column * stride_rn)[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    out_ptrs = out_ptr + (row * out_features)[:, None] + column[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask)
    if moments_out_ptr is not None:
        _store_moments(
            tl.where(mask, out.to(ACC), 0.0), moments_out_ptr, row, rows, first, out_features, mask, WIDTH
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner", "rows_per_sample"])
def _linear_fwd_kernel(
    out_ptr,  # [rows, out_features] contiguous
    x_src,  # pointer to rows at two strides, or descriptor of [rows, in_features]
    weight_src,  # pointer, or descriptor, of [out_features or 2·out_features, in_features]
    moments_ptr,  # [2, parts of x, rows] contiguous, or None
    moments_out_ptr,  # [2, parts of out, rows] contiguous, or None
    column_sum_ptr,  # vectors contiguous, or None
    weight_scale_ptr,
    bias_ptr,
    gamma_ptr,
    row_scale_ptr,  # [rows / rows_per_sample]
    residual_ptr,  # rows at two strides, or None
    partial_ptr,  # [tiles, SPLITS, BLOCK_M, BLOCK_N], or None
    arrivals_ptr,  # [tiles] int32, zero, or None
    rows,
    out_features,
    in_features,
    x_inner,
    residual_inner,
    rows_per_sample,
    eps,
    stride_xo,
    stride_xi,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ro,
    stride_ri,
    stride_rn,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT_X: tl.constexpr,
    SPLIT_RESIDUAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_N: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    ln.wait_for_previous(DEPENDENT)
    # Triton itself sees only whether a size or stride is a multiple of 16; this tells it of 2, 4 and 8.
    if ALIGN_K > 1 and ALIGN_K < 16:
        in_features = in_features // ALIGN_K * ALIGN_K
        stride_xo, stride_xi = stride_xo // ALIGN_K * ALIGN_K, stride_xi // ALIGN_K * ALIGN_K
        stride_wn = stride_wn // ALIGN_K * ALIGN_K
    if ALIGN_N > 1 and ALIGN_N < 16:
        out_features = out_features // ALIGN_N * ALIGN_N
        stride_ro, stride_ri = stride_ro // ALIGN_N * ALIGN_N, stride_ri // ALIGN_N * ALIGN_N

    tile, split = tl.program_id(0), 0
    first_k, end_k = 0, in_features
    if SPLITS > 1:
        split, tile = tile % SPLITS, tile // SPLITS
        share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
        first_k = split * share
        end_k = tl.minimum(first_k + share, in_features)
    number = tile
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    panel = tile // (GROUP_M * tiles_n)
    panel_height = tl.minimum(tiles_m - panel * GROUP_M, GROUP_M)
    tile -= panel * GROUP_M * tiles_n
    tile_n = tile // panel_height
    tile_m = panel * GROUP_M + tile - tile_n * panel_height

    SWIGLU: tl.constexpr = ACTIVATION == "swiglu"
    tl.static_assert(SPLITS == 1 or not SWIGLU, "swiglu has no split sums")
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = row < rows, column < out_features
    mean, rstd = None, None
    if moments_ptr is not None:
        mean, rstd = _row_statistics(moments_ptr, row, rows, in_features, eps, PART, PARTS, ACC)
    if not DESCRIPTORS:
        lane = tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = (
            x_src + ln.row_offset(row, x_inner, stride_xo, stride_xi, SPLIT_X)[:, None] + (lane * stride_xk)[None, :]
        )
        weight_ptrs = weight_src + (column * stride_wn)[None, :] + (lane * stride_wk)[:, None]
        if SPLITS > 1:
            x_ptrs += tl.full([], 1, tl.int64) * first_k * stride_xk
            weight_ptrs += tl.full([], 1, tl.int64) * first_k * stride_wk
        x_step = tl.full([], BLOCK_K, tl.int64) * stride_xk
        weight_step = tl.full([], BLOCK_K, tl.int64) * stride_wk
        value_offset = tl.full([], 1, tl.int64) * out_features * stride_wn

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if SWIGLU:
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
        if SWIGLU:
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
    if SPLITS > 1:
        at = (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        at += tl.full([], SPLITS, tl.int64) * number * (BLOCK_M * BLOCK_N)
        tl.store(partial_ptr + at + split * (BLOCK_M * BLOCK_N), acc)
        tl.debug_barrier()  # all threads have stored before one of them tells it
        last = tl.atomic_add(arrivals_ptr + number, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for part in range(SPLITS):
                acc += tl.load(partial_ptr + at + part * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    if last:
        # In two halves: the whole tile and its addresses do not fit in the registers of four warps.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        left_value, right_value = None, None
        if SWIGLU:
            left_value, right_value = value_acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        first = tile_n.to(tl.int64) * BLOCK_N
        for half in tl.static_range(2):
            _store_tile(
                left if half == 0 else right, left_value if half == 0 else right_value, mean, rstd,
                out_ptr, moments_out_ptr, column_sum_ptr, weight_scale_ptr, bias_ptr, gamma_ptr, row_scale_ptr,
                residual_ptr, row, first + half * HALF, rows, out_features, residual_inner, rows_per_sample,
                stride_ro, stride_ri, stride_rn, ACTIVATION, EXACT, SPLIT_RESIDUAL, HALF, ACC,
            )  # fmt: skip


INTERPRETED = not isinstance(_linear_fwd_kernel, triton.JITFunction)


def _vector_bytes(t, contiguous_size, row_strides):
    """Widest aligned piece of a row that one load can take, at most 16 bytes."""
    if t.data_ptr() % 16:
        return t.element_size()
    return min(16, t.element_size() * math.gcd(16, contiguous_size, *row_strides))


def _layout(x, stride_xo, stride_xi, weight, out_features):
    """(describable, scattered): can TMA read both operands; do pointers load them in pieces under 16 bytes?"""
    in_features = weight.shape[1]
    x_bytes = _vector_bytes(x, in_features, (stride_xo, stride_xi)) if x.stride(-1) == 1 else 0
    weight_bytes = _vector_bytes(weight, in_features, (weight.stride(0),)) if weight.stride(1) == 1 else 0
    # In a descriptor's eyes rows must not overlap.
    describable = x_bytes == weight_bytes == 16 and stride_xi >= in_features and weight.stride(0) >= in_features
    if weight.stride(0) == 1:
        weight_bytes = _vector_bytes(weight, out_features, (weight.stride(1),))
    return describable, min(x_bytes, weight_bytes) < 16


def _upcast(weight_dtype, out_dtype):
    """The interpreter multiplies the bit patterns of bf16; a float64 residual wants float64 products."""
    if not INTERPRETED or weight_dtype == torch.float64:
        return None
    if out_dtype == torch.float64:
        return tl.float64
    return tl.float32 if weight_dtype in (torch.bfloat16, torch.float8_e4m3fn) else None


def _linear(
    x, weight, bias, activation=None, *, weight_scale=None, gamma=None, residual=None, row_scale=None, norm=None,
    with_moments=False, out_dtype=None, arrivals=None, dependent=False, config=None,
):  # fmt: skip
    """(out, its ``Moments`` or None); ``norm``: (Moments of x, eps, column sums of weight) of a folded LayerNorm;
    ``arrivals``: int32 zeros for split sums to count in, allowed where they are given or moments are asked for."""
    swiglu = activation == "swiglu"
    out_features = weight.shape[0] // 2 if swiglu else weight.shape[0]
    in_features = weight.shape[1]
    if residual is not None:
        out_dtype = residual.dtype
    out_dtype = out_dtype or weight.dtype
    rows = x.numel() // in_features
    check_rows("linear", rows)
    out = torch.empty((*x.shape[:-1], out_features), dtype=out_dtype, device=x.device)
    if rows == 0:
        return out, ln.Moments(out.new_empty(2, 1, 0, dtype=torch.float32), out_features) if with_moments else None

    rows_per_sample = rows // x.shape[0] if row_scale is not None else 0
    x, split_x, x_inner, stride_xo, stride_xi = ln.row_layout(x.to(weight.dtype))
    split_residual, residual_inner, stride_ro, stride_ri, stride_rn = False, 0, 0, 0, 0
    if residual is not None:
        residual, split_residual, residual_inner, stride_ro, stride_ri = ln.row_layout(residual)
        stride_rn = residual.stride(-1)
    bias, gamma, row_scale = ln.vector(bias), ln.vector(gamma), ln.vector(row_scale)

    tf32 = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    describable, scattered = _layout(x, stride_xo, stride_xi, weight, out_features)
    if config is None:
        arch = configs.arch_of(x.device)
        config = configs.pick_linear_config(rows, out_features, swiglu, weight.dtype, out_dtype, tf32, scattered, arch)
        if with_moments or arrivals is not None:
            processors = configs.multiprocessors_of(x.device)
            config = configs.split_linear_config(config, rows, out_features, in_features, processors)
    (moments, part), eps, column_sum = norm or ((None, 1), 0.0, None)
    moments_out = None
    if with_moments:
        part_out = config.block_n // 2
        stat_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
        shape = (2, configs.cdiv(out_features, part_out), rows)
        moments_out = ln.Moments(torch.empty(shape, dtype=stat_dtype, device=x.device), part_out)
    x_src, weight_src = x, weight
    descriptors = config.tma and describable and not split_x
    if descriptors:
        x_src = TensorDescriptor(x, [rows, in_features], [stride_xi, 1], [config.block_m, config.block_k])
        weight_src = TensorDescriptor(
            weight, list(weight.shape), list(weight.stride()), [config.block_n, config.block_k]
        )
    tiles = configs.cdiv(rows, config.block_m) * configs.cdiv(out_features, config.block_n)
    partial = None
    if config.splits > 1:
        shape = (tiles, config.splits, config.block_m, config.block_n)
        partial = torch.empty(shape, dtype=torch.promote_types(out_dtype, torch.float32), device=x.device)
        if arrivals is None or arrivals.numel() < tiles:
            arrivals = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    with ln.launch_guard(x):
        _linear_fwd_kernel[(tiles * config.splits,)](
            out, x_src, weight_src, moments, moments_out and moments_out.values, column_sum, weight_scale,
            bias, gamma, row_scale, residual, partial, arrivals if config.splits > 1 else None,
            rows, out_features, in_features, x_inner, residual_inner, rows_per_sample, eps,
            stride_xo, stride_xi, x.stride(-1), weight.stride(0), weight.stride(1), stride_ro, stride_ri, stride_rn,
            ACTIVATION=activation,
            EXACT=weight.dtype in (torch.float32, torch.float64),
            SPLIT_X=split_x,
            SPLIT_RESIDUAL=split_residual,
            DESCRIPTORS=descriptors,
            EVEN_K=descriptors or in_features % config.block_k == 0,
            ALIGN_K=16 if descriptors else math.gcd(16, in_features, stride_xo, stride_xi, weight.stride(0)),
            ALIGN_N=math.gcd(16, out_features, stride_ro, stride_ri),
            PART=part,
            PARTS=1 if norm is None else min(32, configs.power_of_two(configs.cdiv(in_features, part))),
            SPLITS=config.splits,
            UPCAST=_upcast(weight.dtype, out_dtype),
            ACC=ln.accumulator(weight.dtype, out_dtype),
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            **ln.launch_options(dependent, config.num_warps, num_stages=config.num_stages),
        )  # fmt: skip
    return out, moments_out


def linear(x, weight, bias, activation=None, *, gamma=None, residual=None, row_scale=None, config=None):
    """out [B, ..., N] (N/2 for swiglu), in the residual's dtype or, without one, in the weight's."""
    return _linear(x, weight, bias, activation, gamma=gamma, residual=residual, row_scale=row_scale, config=config)[0]


def linear_moments(x, weight, bias, residual, *, arrivals=None, dependent=False, config=None):
    """(residual + x Wᵀ + bias in the residual's dtype, the ``Moments`` of its rows).

    ``arrivals``: int32 zeros that this call alone may count in; where they are None or too few, some are made.
    """
    return _linear(
        x, weight, bias, residual=residual, with_moments=True, arrivals=arrivals, dependent=dependent, config=config
    )


def folded_linear(x, moments, eps, weight, column_sum, bias, activation=None, *, dependent=False, config=None):
    """act(LN(x) Wᵀ + bias), LN without weight and bias: ``moments`` are those of x, ``column_sum`` [N] is weight.sum(1)
    in float32 (float64 for float64), which is small where the rows of weight are centred."""
    norm = (moments, eps, ln.vector(column_sum))
    return _linear(x, weight, bias, activation, norm=norm, dependent=dependent, config=config)[0]


def fp8_linear(
    x, weight, weight_scale, bias, activation=None, *, out_scale=None, residual=None, out_dtype=None, arrivals=None,
    dependent=False, config=None,
):  # fmt: skip
    """residual + out_scale · act(weight_scale · (x Wᵀ) + bias) in the residual's dtype, else in ``out_dtype``.

    x [..., K] and weight [N, K] float8 e4m3; weight_scale [N], bias [N] or None, out_scale [width of out] or None,
    float32. ``arrivals``: int32 zeros that this call alone may count in; with them the sums over K may be split.
    """
    return _linear(
        x, weight, bias, activation, weight_scale=ln.vector(weight_scale), gamma=out_scale, residual=residual,
        out_dtype=out_dtype, arrivals=arrivals, dependent=dependent, config=config,
    )[0]  # fmt: skip


def linear_not_supported_reasons(x, weight, bias, activation=None, *, gamma=None, residual=None, row_scale=None):
    return ln.device_reasons(x, weight, bias, gamma, residual, row_scale)


def linear_residual(x, weight, bias, gamma, residual, *, row_scale=None, config=None):
    """residual + row_scale · gamma · (x Wᵀ + bias), in the residual's dtype."""
    return linear(x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale, config=config)


def linear_residual_not_supported_reasons(x, weight, bias, gamma, residual, *, row_scale=None):
    return ln.device_reasons(x, weight, bias, gamma, residual, row_scale)


def layer_norm_linear_fwd(x, ln_weight, ln_bias, eps, weight, bias, activation=None, config=None):
    """(act(LN(x) Wᵀ + bias) in the weight's dtype, mean [rows], rstd [rows]); LN(x) is stored in the weight's dtype."""
    normal, mean, rstd = ln.layer_norm_fwd(x, ln_weight, ln_bias, eps, out_dtype=weight.dtype)
    return linear(normal, weight, bias, activation, config=config), mean, rstd


def layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation=None, config=None):
    normal = ln.layer_norm(x, ln_weight, ln_bias, eps, out_dtype=weight.dtype)
    return linear(normal, weight, bias, activation, config=config)


def layer_norm_linear_not_supported_reasons(x, ln_weight, ln_bias, eps, weight, bias, activation=None):
    reasons = ln.not_supported_reasons(x, ln_weight, ln_bias, eps)
    return reasons + [reason for reason in ln.device_reasons(x, weight, bias) if reason not in reasons]
