"""Sums over the rows of a matrix in two stages, without atomics: the gradients of biases and position embeddings.

    sums[c] = Σ_r g[r, c]        g = row_scale[b] · gamma[c] · mask[r, c] / (1 − p) · x[r, c]      all but x optional

x [B, ..., C] with any strides (``launch.row_layout``), float32, float16, bfloat16 (float64 interpreted). g can be
stored on the way, [rows, C] in a dtype asked for: the gradient of a branch behind dropout and drop path, which the
products of a backward need anyway. Sums and factors are float32, and what is summed has not been rounded to that dtype.

First kernel: a program sums CHUNK rows of COLUMNS columns, a tile of ROWS × COLUMNS at a time, into
partials [chunks, C]. Grid: ceil(rows / CHUNK) · ceil(C / COLUMNS). Second kernel: a program adds up all partials of
COLUMNS columns, for one or two lists of partials. The order of the sums depends on the shape alone.
Moves rows·C elements, twice that where g is stored.
Limits: float64 in the interpreter only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import dropout_of, dropped

CHUNK, ROWS, COLUMNS = 256, 16, 64
PARTIAL_ROWS, PARTIAL_COLUMNS = 128, 32


@triton.jit(do_not_specialize=["rows", "inner", "rows_per_sample"])
def _column_sums_kernel(
    partials_ptr,  # [chunks, width] contiguous, or None
    scaled_ptr,  # [rows, width] contiguous, or None
    x_ptr,  # rows at one or two strides
    row_scale_ptr,  # [rows / rows_per_sample] contiguous, or None
    gamma_ptr,  # [width] contiguous, or None
    dropout,  # Dropout, or None
    rows,
    width,
    inner,
    rows_per_sample,
    stride_xo,
    stride_xi,
    stride_xc,
    TWO_STRIDES: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    chunk = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < width
    total = tl.zeros([ROWS, COLUMNS], ACC)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + column, mask=in_width, other=0.0).to(ACC)[None, :]
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_width[None, :]
        x_row = launch.row_offset(row, inner, stride_xo, stride_xi, TWO_STRIDES)
        value = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
        if dropout is not None:
            value = dropped(value, dropout, (row * width)[:, None] + column[None, :])
        if row_scale_ptr is not None:
            value *= tl.load(row_scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(ACC)[:, None]
        if gamma_ptr is not None:
            value *= gamma
        if scaled_ptr is not None:
            scaled_ptrs = scaled_ptr + (row * width)[:, None] + column[None, :]
            tl.store(scaled_ptrs, value.to(scaled_ptr.dtype.element_ty), mask=mask)
        total += value
    if partials_ptr is not None:
        tl.store(partials_ptr + chunk * width + column, tl.sum(total, axis=0), mask=in_width)


@triton.jit
def _add_partials(out_ptr, partials_ptr, partials, width, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([ROWS, COLUMNS], partials_ptr.dtype.element_ty)
    for start in range(0, partials, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < partials)[:, None] & (column < width)[None, :]
        total += tl.load(partials_ptr + (row * width)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["partials"])
def _partial_sums_kernel(
    first_out_ptr,  # [width], or None
    second_out_ptr,  # [width], or None
    first_ptr,  # [partials, width] contiguous, or None
    second_ptr,  # [partials, width] contiguous, or None
    partials,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    if first_out_ptr is not None:
        _add_partials(first_out_ptr, first_ptr, partials, width, column, ROWS, COLUMNS)
    if second_out_ptr is not None:
        _add_partials(second_out_ptr, second_ptr, partials, width, column, ROWS, COLUMNS)


def add_partials(
    first: Tensor | None, second: Tensor | None, first_dtype: torch.dtype, second_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The sums over the rows of two matrices of partials [partials, C], each [C] in its dtype; None for None."""
    given = first if first is not None else second
    if given is None:
        return None, None
    partials, width = given.shape
    one = None if first is None else torch.empty(width, dtype=first_dtype, device=given.device)
    two = None if second is None else torch.empty(width, dtype=second_dtype, device=given.device)
    with launch.device_guard(given):
        _partial_sums_kernel[(configs.cdiv(width, PARTIAL_COLUMNS),)](
            one, two, first, second, partials, width, ROWS=PARTIAL_ROWS, COLUMNS=PARTIAL_COLUMNS, num_warps=4
        )
    return one, two


def _run(x, row_scale, gamma, dropout_p, seed, scaled_dtype, with_sums):
    """(partials or None, g or None)"""
    width = x.shape[-1]
    rows = x.numel() // width
    chunks = configs.cdiv(rows, CHUNK)
    stat = launch.stat_dtype(x.dtype)
    partials = torch.empty((chunks, width), dtype=stat, device=x.device) if with_sums else None
    scaled = None if scaled_dtype is None else torch.empty(x.shape, dtype=scaled_dtype, device=x.device)
    acc = launch.accumulator(x.dtype, scaled_dtype)
    x, two_strides, inner, stride_xo, stride_xi = launch.row_layout(x)
    with launch.device_guard(x):
        _column_sums_kernel[(chunks * configs.cdiv(width, COLUMNS),)](
            partials, scaled, x, launch.vector(row_scale), launch.vector(gamma), dropout_of(dropout_p, seed),
            rows, width, inner, rows // len(x), stride_xo, stride_xi, x.stride(-1),
            TWO_STRIDES=two_strides, ACC=acc, CHUNK=CHUNK, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return partials, scaled


def column_sums(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Σ over all axes of x [..., C] but the last: [C] in ``dtype``, by default float32 (float64 for float64)."""
    dtype = dtype or launch.stat_dtype(x.dtype)
    if x.numel() == 0:
        return torch.zeros(x.shape[-1], dtype=dtype, device=x.device)
    partials, _ = _run(x, None, None, 0.0, None, None, with_sums=True)
    sums, _ = add_partials(partials, None, dtype, dtype)
    assert sums is not None
    return sums


def branch_gradient(
    grad: Tensor,
    dtype: torch.dtype,
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    with_sums: bool,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(g [B, ..., C] in ``dtype``, its column sums [C] in float32 where asked for): the gradient behind drop path and
    dropout, and behind LayerScale where gamma is given. A gradient that none of them changes is not copied."""
    if grad.numel() == 0:
        return grad.to(dtype), column_sums(grad) if with_sums else None
    if row_scale is None and gamma is None and dropout_p == 0.0 and grad.dtype == dtype:
        return grad, column_sums(grad) if with_sums else None
    partials, scaled = _run(grad, row_scale, gamma, dropout_p, seed, dtype, with_sums)
    stat = launch.stat_dtype(grad.dtype)
    return scaled, add_partials(partials, None, stat, stat)[0]
