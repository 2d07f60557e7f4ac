"""LayerNorm over the last axis: y = (x − mean) · rstd · weight + bias, rstd = 1/sqrt(var + eps).

x [..., C] with any strides, float32, float16 or bfloat16 (float64 interpreted); weight and bias [C] or None, each of
any of these dtypes; y [..., C] contiguous, in x's dtype or in the one asked for, float8 e4m3 among them (the weight is
then its scale: values beyond 448 saturate); mean and rstd [rows], float32.
Everything between load and store is float32. The variance is taken around the mean in a second pass, and the mean is
first corrected by the mean of what is left: a row whose mean is 1e6 times its spread keeps its variance, and a
constant row normalises to zero.

One program normalises ROWS rows that it holds in registers; rows above MAX_BLOCK elements get one program each, which
reads the row four times (from L2 after the first). Grid: ceil(rows / ROWS).
A row r of x begins at (r // inner)·stride_xo + (r % inner)·stride_xi, so that x[:, 1:] of a [B, N, C] tensor is read
in place; an x whose leading axes need three strides is copied first, as are weight and bias that are not contiguous.
Moves rows·C·(bytes of x + bytes of y); fuses the cast to the dtype that the next GEMM multiplies in.
``row_moments`` yields what a GEMM needs that folds a LayerNorm in (``linear``): ``Moments``, the mean and the centred
sum of squares of the parts of each row, here of one part, C ≤ 16384.
Limits: C ≤ 65536; float64 in the interpreter only.
Source: Ba, Kiros, Hinton, "Layer Normalization" (2016).
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import configs

MAX_WIDTH = 65536


class Moments(NamedTuple):
    """Of every row, cut in parts of ``width`` elements, the last perhaps shorter: mean and Σ(x − mean)² of each part.

    values: [2, parts, rows] float32 (float64 for float64).
    """

    values: torch.Tensor
    width: int


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """First in a kernel: one that was launched before the kernel in front of it had ended allows the next one the same,
    and waits for the end of the one in front, whose writes it then sees."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _centre(x, mask, width):
    """The mean of each row, corrected by the mean of the rest, and the rest, 0 where masked out."""
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    shift = tl.sum(centred, axis=1) / width
    return mean + shift, tl.where(mask, centred - shift[:, None], 0.0)


@triton.jit(do_not_specialize=["rows", "inner"])
def _layer_norm_fwd_kernel(
    y_ptr,  # [rows, width] contiguous
    mean_ptr,  # [rows] or None
    rstd_ptr,  # [rows] or None
    x_ptr,  # rows at two strides
    weight_ptr,  # [width] contiguous or None
    bias_ptr,  # [width] contiguous or None
    rows,
    inner,
    width,
    eps,
    stride_xo,
    stride_xi,
    stride_xc,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    in_rows, in_width = row < rows, column < width
    mask = in_rows[:, None] & in_width[None, :]

    x_row = row_offset(row, inner, stride_xo, stride_xi, SPLIT)
    x = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
    mean, centred = _centre(x, in_width[None, :], width)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=in_rows)
        tl.store(rstd_ptr + row, rstd, mask=in_rows)

    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=in_width, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_width, other=0.0).to(ACC)[None, :]
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
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row_offset(row, inner, stride_xo, stride_xi, SPLIT)
    lane = tl.arange(0, BLOCK).to(tl.int64)

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
        centred = tl.where(column < width, x - mean - shift, 0.0)
        total += centred * centred
    rstd = tl.rsqrt(tl.sum(total, axis=0) / width + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean + shift)
        tl.store(rstd_ptr + row, rstd)

    for start in range(0, width, BLOCK):
        column = start + lane
        mask = column < width
        y = (tl.load(x_ptr + column * stride_xc, mask=mask, other=0.0).to(ACC) - mean - shift) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "inner"])
def _row_moments_kernel(
    moments_ptr,  # [2, rows] contiguous
    x_ptr,  # rows at two strides
    rows,
    inner,
    width,
    stride_xo,
    stride_xi,
    stride_xc,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    in_rows, in_width = row < rows, column < width
    mask = in_rows[:, None] & in_width[None, :]
    x_row = row_offset(row, inner, stride_xo, stride_xi, SPLIT)
    x = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
    mean, centred = _centre(x, in_width[None, :], width)
    tl.store(moments_ptr + row, mean, mask=in_rows)
    tl.store(moments_ptr + rows + row, tl.sum(centred * centred, axis=1), mask=in_rows)


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, SPLIT: tl.constexpr):
    """Element offset of a row (int64) under ``row_layout``."""
    if SPLIT:
        outer = row // inner
        return outer * stride_outer + (row - outer * inner) * stride_inner
    return row * stride_inner


INTERPRETED = not isinstance(_layer_norm_fwd_kernel, triton.JITFunction)


def row_layout(x):
    """How the rows [..., C] of x lie: (x, split, inner, stride_outer, stride_inner).

    Without ``split``, row r begins at r·stride_inner; with it, as in the head comment. x is copied where its leading
    axes need more than two strides.
    """
    width = x.shape[-1]
    if x.is_contiguous():
        return x, False, 0, 0, width
    levels = []  # (size, stride), innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return x.contiguous(), False, 0, 0, width
    if len(levels) == 2:
        return x, True, levels[0][0], levels[1][1], levels[0][1]
    return x, False, 0, 0, levels[0][1] if levels else 0


def vector(v):
    """A parameter vector [C] as the kernels read it."""
    return v if v is None or v.is_contiguous() else v.contiguous()


def accumulator(*dtypes):
    return tl.float64 if torch.float64 in dtypes else tl.float32


def launch_guard(x):
    """Makes the device of x current, whatever the caller's is."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def launch_options(dependent, num_warps, **options):
    """Of a launch; ``dependent``: before the kernel in front of it has ended (see ``wait_for_previous``)."""
    options.update(DEPENDENT=dependent, num_warps=num_warps)
    return options | {"launch_pdl": True} if dependent else options


def device_reasons(*tensors):
    """Why these tensors cannot go to a Triton kernel at all."""
    if INTERPRETED:
        return []
    reasons = []
    devices = {t.device.type for t in tensors if t is not None}
    if devices != {"cuda"}:
        reasons.append(f"tensors on {', '.join(sorted(devices))}, Triton kernels need a CUDA device")
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        reasons.append("float64 runs in the interpreter only")
    return reasons


def not_supported_reasons(x, weight, bias, eps):
    reasons = device_reasons(x, weight, bias)
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is above {MAX_WIDTH}")
    return reasons


def _launch(x, weight, bias, eps, out_dtype, config, statistics, dependent=False):
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width
    mean = rstd = None
    if statistics:
        stat_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, rstd = (torch.empty(rows, dtype=stat_dtype, device=x.device) for _ in range(2))
    if rows == 0:
        return y, mean, rstd
    config = config or configs.pick_layer_norm_config(width)
    x, split, inner, stride_xo, stride_xi = row_layout(x)
    weight, bias = vector(weight), vector(bias)
    acc = accumulator(x.dtype, y.dtype, *(t.dtype for t in (weight, bias) if t is not None))
    with launch_guard(x):
        if width <= config.block:
            _layer_norm_fwd_kernel[(configs.cdiv(rows, config.rows),)](
                y, mean, rstd, x, weight, bias,
                rows, inner, width, eps,
                stride_xo, stride_xi, x.stride(-1),
                SPLIT=split, ACC=acc, ROWS=config.rows, BLOCK=config.block,
                **launch_options(dependent, config.num_warps),
            )  # fmt: skip
        else:
            _layer_norm_wide_fwd_kernel[(rows,)](
                y, mean, rstd, x, weight, bias,
                inner, width, eps,
                stride_xo, stride_xi, x.stride(-1),
                SPLIT=split, ACC=acc, BLOCK=config.block, **launch_options(dependent, config.num_warps),
            )  # fmt: skip
    return y, mean, rstd


def layer_norm_fwd(x, weight, bias, eps, out_dtype=None, config=None):
    """(y [..., C] in out_dtype or x's dtype, mean [rows], rstd [rows])."""
    return _launch(x, weight, bias, eps, out_dtype, config, statistics=True)


def layer_norm(x, weight, bias, eps, out_dtype=None, config=None, dependent=False):
    """y [..., C] alone; the statistics are not stored."""
    return _launch(x, weight, bias, eps, out_dtype, config, statistics=False, dependent=dependent)[0]


def row_moments(x, config=None, dependent=False):
    """``Moments`` of the rows of x [..., C], one part a row."""
    width = x.shape[-1]
    rows = x.numel() // width
    config = config or configs.pick_layer_norm_config(width)
    stat_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = torch.empty(2, 1, rows, dtype=stat_dtype, device=x.device)
    if rows == 0:
        return Moments(values, config.block)
    x, split, inner, stride_xo, stride_xi = row_layout(x)
    with launch_guard(x):
        _row_moments_kernel[(configs.cdiv(rows, config.rows),)](
            values, x, rows, inner, width, stride_xo, stride_xi, x.stride(-1),
            SPLIT=split, ACC=accumulator(x.dtype), ROWS=config.rows, BLOCK=config.block,
            **launch_options(dependent, config.num_warps),
        )  # fmt: skip
    return Moments(values, config.block)


def row_moments_not_supported_reasons(x):
    reasons = device_reasons(x)
    if x.shape[-1] > 16384:
        reasons.append(f"width {x.shape[-1]} is above 16384")
    return reasons
