"""LayerNorm over the last axis: y = (x − mean) · rstd · weight + bias, rstd = 1/sqrt(var + eps).

RMSNorm, norm="rms": mean is 0, so that y = x · rstd · weight + bias with rstd = 1/sqrt(mean(x²) + eps).

x [..., C] with any strides, float32, float16 or bfloat16 (float64 interpreted); weight and bias [C] or None, each of
any of these dtypes; y [..., C] contiguous, in x's dtype or in the one asked for, float8 e4m3 among them (the weight is
then its scale: values beyond 448 saturate); mean and rstd [rows], float32.
Everything between load and store is float32. The variance is taken around the mean in a second pass, and the mean is
first corrected by the mean of what is left: a row whose mean is 1e6 times its spread keeps its variance, and a
constant row normalises to zero. RMSNorm takes one pass.

Two kernels. Rows of at most 16384 elements: a program normalises ROWS rows, which it holds in registers. Wider rows: a
program normalises one row in blocks, and reads it four times (RMSNorm: twice), from L2 after the first. Grid:
ceil(rows / ROWS).
x may have rows at two strides (``launch.row_layout``), as x[:, 1:] of a [B, N, C] tensor has, and is read in place; an
x whose leading axes need three strides is copied first, as are weight and bias that are not contiguous.
Moves rows·C·(bytes of x + bytes of y); fuses the cast to the dtype that the next GEMM multiplies in.
For a LayerNorm that is folded into a GEMM (``linear.folded_linear``): ``row_partials`` computes the ``RowPartials`` of
an x that no GEMM epilogue has written, one partial per row, C ≤ 16384; ``row_statistics`` merges the partials of each
row to mean and rstd, once for all programs of that GEMM, and moves 2·rows·(partials + 1) numbers of 4 bytes.
Limits: C ≤ 65536; float64 in the interpreter only.
Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019);
merged statistics: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance" (1983).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch

MAX_WIDTH = 65536


class RowPartials(NamedTuple):
    """Row-statistics partials: mean and M2 = Σ(x − mean)² of slices of each row, ``width`` elements each (or fewer).

    values: [2, partials of a row, rows], means first, float32 (float64 for float64). Chan's formula merges them.
    """

    values: torch.Tensor
    width: int


class RowStatistics(NamedTuple):
    """mean and rstd = 1/sqrt(M2/C + eps) of each row. values: [2, rows], means first, float32 (float64 for float64)."""

    values: torch.Tensor


@triton.jit
def merge_partials(
    partials_ptr, row, rows, width, eps, PARTIAL_WIDTH: tl.constexpr, PARTIALS_PER_STEP: tl.constexpr, ACC: tl.constexpr
):
    """mean and rstd of rows of ``width`` elements, merged from their partials, PARTIALS_PER_STEP at a time."""
    partials = tl.full([], 1, tl.int64) * tl.cdiv(width, PARTIAL_WIDTH)
    mean = tl.zeros(row.shape, ACC)
    m2 = tl.zeros(row.shape, ACC)
    for first in tl.range(0, partials, PARTIALS_PER_STEP, num_stages=1):
        partial = first + tl.arange(0, PARTIALS_PER_STEP)
        size = tl.minimum(width - partial * PARTIAL_WIDTH, PARTIAL_WIDTH).to(ACC)[:, None]
        pointers = partials_ptr + partial[:, None] * rows + row[None, :]
        mask = (partial < partials)[:, None] & (row < rows)[None, :]
        partial_mean = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        partial_m2 = tl.load(pointers + partials * rows, mask=mask, other=0.0).to(ACC)
        before = tl.full([], PARTIAL_WIDTH, ACC) * first
        count = tl.minimum(tl.full([], 1, ACC) * width - before, PARTIALS_PER_STEP * PARTIAL_WIDTH)
        centre = tl.sum(partial_mean * size, axis=0) / count
        centred = tl.where(mask, partial_mean - centre[None, :], 0.0)
        shift = tl.sum(centred * size, axis=0) / count
        centred = tl.where(mask, centred - shift[None, :], 0.0)
        step = centre + shift - mean
        mean += step * (count / (before + count))
        m2 += tl.sum(partial_m2 + size * centred * centred, axis=0)
        m2 += step * step * (before * count / (before + count))
    return mean, tl.rsqrt(m2 / width + eps)


@triton.jit
def centre(x, mask, width):
    """The mean of each row, corrected by the mean of x − mean, and x minus that mean, 0 where masked out."""
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    shift = tl.sum(centred, axis=1) / width
    return mean + shift, tl.where(mask, centred - shift[:, None], 0.0)


@triton.jit
def normal_factors(x, in_width, width, eps, NORM: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """(x − mean, mean, rstd) of rows [ROWS, BLOCK], 0 outside of ``in_width`` [BLOCK]; the mean of "rms" is 0."""
    mean = tl.zeros([ROWS], ACC)
    if NORM == "layer":
        mean, x = centre(x, in_width[None, :], width)
    return x, mean, tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)


@triton.jit
def scale_and_shift(y, weight_ptr, bias_ptr, column, in_width, ACC: tl.constexpr):
    """y · weight + bias of rows [ROWS, BLOCK]; a pointer may be None."""
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=in_width, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_width, other=0.0).to(ACC)[None, :]
    return y


@triton.jit(do_not_specialize=["rows", "inner"])
def _layer_norm_fwd_kernel(
    y_ptr,  # [rows, width] contiguous
    mean_ptr,  # [rows] or None
    rstd_ptr,  # [rows] or None
    x_ptr,  # rows at one or two strides
    weight_ptr,  # [width] contiguous or None
    bias_ptr,  # [width] contiguous or None
    rows,
    inner,
    width,
    eps,
    stride_xo,
    stride_xi,
    stride_xc,
    RMS: tl.constexpr,
    TWO_STRIDES: tl.constexpr,
    PDL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    launch.pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    in_rows, in_width = row < rows, column < width
    mask = in_rows[:, None] & in_width[None, :]

    x_row = launch.row_offset(row, inner, stride_xo, stride_xi, TWO_STRIDES)
    x = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
    centred, mean, rstd = normal_factors(x, in_width, width, eps, "rms" if RMS else "layer", ROWS, ACC)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=in_rows)
        tl.store(rstd_ptr + row, rstd, mask=in_rows)

    y = scale_and_shift(centred * rstd[:, None], weight_ptr, bias_ptr, column, in_width, ACC)
    tl.store(y_ptr + (row * width)[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["inner"])
def _layer_norm_wide_fwd_kernel(
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    inner,
    width,
    eps,
    stride_xo,
    stride_xi,
    stride_xc,
    RMS: tl.constexpr,
    TWO_STRIDES: tl.constexpr,
    PDL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    launch.pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += launch.row_offset(row, inner, stride_xo, stride_xi, TWO_STRIDES)
    lane = tl.arange(0, BLOCK).to(tl.int64)

    if RMS:
        mean = tl.zeros([], ACC)
        shift = mean
    else:
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, width, BLOCK):
            column = start + lane
            total += tl.load(x_ptr + column * stride_xc, mask=column < width, other=0.0).to(ACC)
        mean = tl.sum(total, axis=0) / width
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, width, BLOCK):
            column = start + lane
            x = tl.load(x_ptr + column * stride_xc, mask=column < width, other=0.0).to(ACC)
            total += tl.where(column < width, x - mean, 0.0)
        shift = tl.sum(total, axis=0) / width
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, width, BLOCK):
        column = start + lane
        x = tl.load(x_ptr + column * stride_xc, mask=column < width, other=0.0).to(ACC)
        if not RMS:
            x = tl.where(column < width, x - mean - shift, 0.0)
        total += x * x
    rstd = tl.rsqrt(tl.sum(total, axis=0) / width + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean + shift)
        tl.store(rstd_ptr + row, rstd)

    for start in range(0, width, BLOCK):
        column = start + lane
        mask = column < width
        y = tl.load(x_ptr + column * stride_xc, mask=mask, other=0.0).to(ACC)
        if not RMS:
            y = y - mean - shift
        y *= rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "inner"])
def _row_partials_kernel(
    partials_ptr,  # [2, rows] contiguous
    x_ptr,  # rows at one or two strides
    rows,
    inner,
    width,
    stride_xo,
    stride_xi,
    stride_xc,
    TWO_STRIDES: tl.constexpr,
    PDL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    launch.pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    in_rows, in_width = row < rows, column < width
    mask = in_rows[:, None] & in_width[None, :]
    x_row = launch.row_offset(row, inner, stride_xo, stride_xi, TWO_STRIDES)
    x = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
    mean, centred = centre(x, in_width[None, :], width)
    tl.store(partials_ptr + row, mean, mask=in_rows)
    tl.store(partials_ptr + rows + row, tl.sum(centred * centred, axis=1), mask=in_rows)


@triton.jit(do_not_specialize=["rows"])
def _row_statistics_kernel(
    statistics_ptr,  # [2, rows] contiguous
    partials_ptr,  # [2, partials of a row, rows] contiguous
    rows,
    width,
    eps,
    PARTIAL_WIDTH: tl.constexpr,
    PARTIALS_PER_STEP: tl.constexpr,
    PDL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
):
    launch.pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean, rstd = merge_partials(partials_ptr, row, rows, width, eps, PARTIAL_WIDTH, PARTIALS_PER_STEP, ACC)
    tl.store(statistics_ptr + row, mean, mask=row < rows)
    tl.store(statistics_ptr + rows + row, rstd, mask=row < rows)


def not_supported_reasons(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: str = "layer"
) -> list[str]:
    reasons = launch.device_reasons(x, weight, bias)
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is above {MAX_WIDTH}")
    return reasons


def _launch(x, weight, bias, eps, norm, out_dtype, config, statistics, pdl=False):
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width
    mean = rstd = None
    if statistics:
        mean, rstd = (torch.empty(rows, dtype=launch.stat_dtype(x.dtype), device=x.device) for _ in range(2))
    if rows == 0:
        return y, mean, rstd
    config = config or configs.pick_layer_norm_config(width)
    x, two_strides, inner, stride_xo, stride_xi = launch.row_layout(x)
    weight, bias = launch.vector(weight), launch.vector(bias)
    acc = launch.accumulator(x.dtype, y.dtype, *(t.dtype for t in (weight, bias) if t is not None))
    with launch.device_guard(x):
        if width <= config.block:
            _layer_norm_fwd_kernel[(configs.cdiv(rows, config.rows),)](
                y, mean, rstd, x, weight, bias,
                rows, inner, width, eps,
                stride_xo, stride_xi, x.stride(-1),
                RMS=norm == "rms", TWO_STRIDES=two_strides, ACC=acc, ROWS=config.rows, BLOCK=config.block,
                **launch.options(pdl, config.num_warps),
            )  # fmt: skip
        else:
            _layer_norm_wide_fwd_kernel[(rows,)](
                y, mean, rstd, x, weight, bias,
                inner, width, eps,
                stride_xo, stride_xi, x.stride(-1),
                RMS=norm == "rms", TWO_STRIDES=two_strides, ACC=acc, BLOCK=config.block,
                **launch.options(pdl, config.num_warps),
            )  # fmt: skip
    return y, mean, rstd


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    config: configs.LayerNormConfig | None = None,
    *,
    norm: str = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., C] in out_dtype or x's dtype, mean [rows], rstd [rows])."""
    return _launch(x, weight, bias, eps, norm, out_dtype, config, statistics=True)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    config: configs.LayerNormConfig | None = None,
    pdl: bool = False,
    *,
    norm: str = "layer",
) -> Tensor:
    """y [..., C] alone; the statistics are not stored."""
    return _launch(x, weight, bias, eps, norm, out_dtype, config, statistics=False, pdl=pdl)[0]


def row_partials(x: Tensor, config: configs.LayerNormConfig | None = None, pdl: bool = False) -> RowPartials:
    """``RowPartials`` of the rows of x [..., C], one partial per row."""
    width = x.shape[-1]
    rows = x.numel() // width
    config = config or configs.pick_layer_norm_config(width)
    values = torch.empty(2, 1, rows, dtype=launch.stat_dtype(x.dtype), device=x.device)
    if rows == 0:
        return RowPartials(values, config.block)
    x, two_strides, inner, stride_xo, stride_xi = launch.row_layout(x)
    with launch.device_guard(x):
        _row_partials_kernel[(configs.cdiv(rows, config.rows),)](
            values, x, rows, inner, width, stride_xo, stride_xi, x.stride(-1),
            TWO_STRIDES=two_strides, ACC=launch.accumulator(x.dtype), ROWS=config.rows, BLOCK=config.block,
            **launch.options(pdl, config.num_warps),
        )  # fmt: skip
    return RowPartials(values, config.block)


def partials_per_step(width: int, partial_width: int) -> int:
    """How many partials of a row are merged at once: all of them, 32 at most, as a power of two."""
    return min(32, configs.power_of_two(configs.cdiv(width, partial_width)))


def row_statistics(partials: RowPartials, width: int, eps: float, pdl: bool = False) -> RowStatistics:
    """``RowStatistics`` of rows of ``width`` elements, from their partials."""
    values = partials.values
    rows = values.shape[2]
    statistics = torch.empty(2, rows, dtype=values.dtype, device=values.device)
    if rows == 0:
        return RowStatistics(statistics)
    config = configs.ROW_STATISTICS
    with launch.device_guard(values):
        _row_statistics_kernel[(configs.cdiv(rows, config.rows),)](
            statistics, values, rows, width, eps,
            PARTIAL_WIDTH=partials.width,
            PARTIALS_PER_STEP=partials_per_step(width, partials.width),
            ACC=launch.accumulator(values.dtype),
            ROWS=config.rows,
            **launch.options(pdl, config.num_warps),
        )  # fmt: skip
    return RowStatistics(statistics)


def row_partials_not_supported_reasons(x: Tensor) -> list[str]:
    reasons = launch.device_reasons(x)
    if x.shape[-1] > 16384:
        reasons.append(f"width {x.shape[-1]} is above 16384")
    return reasons
