"""The backward of LayerNorm and RMSNorm (``layer_norm``), from the saved statistics:

    x̂ = (x − mean) · rstd,  n = dy · weight
    dx = residual_grad + rstd · (n − x̂ · mean(n · x̂) − mean(n))     RMSNorm: without mean(n)
    dweight = Σ over rows of dy · x̂,  dbias = Σ over rows of dy

dy, x and residual_grad [..., C] with any strides (``launch.row_layout``), weight [C] contiguous or None, mean and rstd
[rows] float32; dx [..., C] contiguous in x's dtype, dweight and dbias [C] in the dtype of the parameter. float32,
float16, bfloat16 (float64 interpreted), each tensor of any of them. Everything between load and store is float32.
x − mean is corrected by its own mean, as in the forward: the saved mean of a row far from zero is rounded. dweight of
wide rows is not, and errs less than eager's, which takes the saved mean too (docs/measured_facts.md).
residual_grad, the gradient that reaches x past the norm, is added before dx is rounded.

Rows of at most 8192 elements: a program takes every P-th tile of ROWS rows, P programs in all (at most 512), and holds
its sums of dweight and dbias in registers until it stores them as partials [P, C]; a second kernel adds those up
(``column_sums``). Wider rows: a program computes dx of one row in blocks, and the sums are taken by a kernel of their
own. A result that is not wanted is neither computed nor stored, and what only it needs is not read.
Moves rows·C·(bytes of dy, x, dx, and residual_grad); fused: the sums of the parameters, the addition of residual_grad.
Limits: C ≤ 65536; float64 in the interpreter only.
Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .column_sums import add_partials


@triton.jit
def _normal(x, mean, rstd, in_width, width, RMS: tl.constexpr):
    """x̂ of whole rows, 0 where masked out."""
    if RMS:
        return x * rstd[:, None]
    centred = tl.where(in_width[None, :], x - mean[:, None], 0.0)
    shift = tl.sum(centred, axis=1) / width
    return tl.where(in_width[None, :], centred - shift[:, None], 0.0) * rstd[:, None]


@triton.jit(do_not_specialize=["rows", "dy_inner", "x_inner", "residual_inner"])
def _layer_norm_bwd_kernel(
    dx_ptr,  # [rows, width] contiguous, or None
    dweight_ptr,  # [programs, width] contiguous, or None
    dbias_ptr,  # [programs, width] contiguous, or None
    dy_ptr,  # rows at one or two strides, as x and residual
    x_ptr,
    residual_ptr,  # or None
    weight_ptr,  # [width] contiguous, or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    rows,
    width,
    dy_inner,
    x_inner,
    residual_inner,
    stride_go,
    stride_gi,
    stride_gc,
    stride_xo,
    stride_xi,
    stride_xc,
    stride_ro,
    stride_ri,
    stride_rc,
    RMS: tl.constexpr,
    DY_TWO_STRIDES: tl.constexpr,
    X_TWO_STRIDES: tl.constexpr,
    RESIDUAL_TWO_STRIDES: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK).to(tl.int64)
    in_width = column < width
    program = tl.program_id(0).to(tl.int64)
    if dx_ptr is not None and weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(ACC)
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, BLOCK], ACC)
    if dbias_ptr is not None:
        dbias = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + first
        in_rows = row < rows
        mask = in_rows[:, None] & in_width[None, :]
        dy_row = launch.row_offset(row, dy_inner, stride_go, stride_gi, DY_TWO_STRIDES)
        dy = tl.load(dy_ptr + dy_row[:, None] + (column * stride_gc)[None, :], mask=mask, other=0.0).to(ACC)
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None or dweight_ptr is not None:
            x_row = launch.row_offset(row, x_inner, stride_xo, stride_xi, X_TWO_STRIDES)
            x = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
            mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0).to(ACC)
            rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0).to(ACC)
            normal = _normal(x, mean, rstd, in_width, width, RMS)
            if dweight_ptr is not None:
                dweight += dy * normal
            if dx_ptr is not None:
                dnormal = dy
                if weight_ptr is not None:
                    dnormal = dy * weight[None, :]
                dx = dnormal - normal * (tl.sum(dnormal * normal, axis=1) / width)[:, None]
                if not RMS:
                    dx -= (tl.sum(dnormal, axis=1) / width)[:, None]
                dx *= rstd[:, None]
                if residual_ptr is not None:
                    residual_row = launch.row_offset(row, residual_inner, stride_ro, stride_ri, RESIDUAL_TWO_STRIDES)
                    residual_ptrs = residual_ptr + residual_row[:, None] + (column * stride_rc)[None, :]
                    dx += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
                dx_ptrs = dx_ptr + (row * width)[:, None] + column[None, :]
                tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=in_width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * width + column, tl.sum(dbias, axis=0), mask=in_width)


@triton.jit(do_not_specialize=["dy_inner", "x_inner", "residual_inner"])
def _layer_norm_wide_bwd_kernel(
    dx_ptr,
    dy_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    dy_inner,
    x_inner,
    residual_inner,
    stride_go,
    stride_gi,
    stride_gc,
    stride_xo,
    stride_xi,
    stride_xc,
    stride_ro,
    stride_ri,
    stride_rc,
    RMS: tl.constexpr,
    DY_TWO_STRIDES: tl.constexpr,
    X_TWO_STRIDES: tl.constexpr,
    RESIDUAL_TWO_STRIDES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += launch.row_offset(row, dy_inner, stride_go, stride_gi, DY_TWO_STRIDES)
    x_ptr += launch.row_offset(row, x_inner, stride_xo, stride_xi, X_TWO_STRIDES)
    mean, rstd = tl.load(mean_ptr + row).to(ACC), tl.load(rstd_ptr + row).to(ACC)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if not RMS:
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, width, BLOCK):
            column = start + lane
            x = tl.load(x_ptr + column * stride_xc, mask=column < width, other=0.0).to(ACC)
            total += tl.where(column < width, x - mean, 0.0)
        mean_shift = tl.sum(total, axis=0) / width
    products, total = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for start in range(0, width, BLOCK):
        column = start + lane
        mask = column < width
        normal = tl.load(x_ptr + column * stride_xc, mask=mask, other=0.0).to(ACC)
        if not RMS:
            normal = normal - mean - mean_shift
        dnormal = tl.load(dy_ptr + column * stride_gc, mask=mask, other=0.0).to(ACC)
        if weight_ptr is not None:
            dnormal *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(ACC)
        products += dnormal * (normal * rstd)
        total += dnormal
    product = tl.sum(products, axis=0) / width
    shift = tl.sum(total, axis=0) / width
    for start in range(0, width, BLOCK):
        column = start + lane
        mask = column < width
        normal = tl.load(x_ptr + column * stride_xc, mask=mask, other=0.0).to(ACC)
        if not RMS:
            normal = normal - mean - mean_shift
        dnormal = tl.load(dy_ptr + column * stride_gc, mask=mask, other=0.0).to(ACC)
        if weight_ptr is not None:
            dnormal *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(ACC)
        dx = dnormal - normal * rstd * product
        if not RMS:
            dx -= shift
        dx *= rstd
        if residual_ptr is not None:
            residual_row = launch.row_offset(row, residual_inner, stride_ro, stride_ri, RESIDUAL_TWO_STRIDES)
            dx += tl.load(residual_ptr + residual_row + column * stride_rc, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "dy_inner", "x_inner"])
def _layer_norm_sums_kernel(
    dweight_ptr,  # [chunks, width] contiguous, or None
    dbias_ptr,  # [chunks, width] contiguous, or None
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    dy_inner,
    x_inner,
    stride_go,
    stride_gi,
    stride_gc,
    stride_xo,
    stride_xi,
    stride_xc,
    DY_TWO_STRIDES: tl.constexpr,
    X_TWO_STRIDES: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    chunk = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_width = column < width
    dweight, dbias = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for i in range(0, tl.minimum(rows - chunk * CHUNK, CHUNK)):
        row = chunk * CHUNK + i
        dy_row = launch.row_offset(row, dy_inner, stride_go, stride_gi, DY_TWO_STRIDES)
        dy = tl.load(dy_ptr + dy_row + column * stride_gc, mask=in_width, other=0.0).to(ACC)
        if dweight_ptr is not None:
            x_row = launch.row_offset(row, x_inner, stride_xo, stride_xi, X_TWO_STRIDES)
            x = tl.load(x_ptr + x_row + column * stride_xc, mask=in_width, other=0.0).to(ACC)
            dweight += dy * ((x - tl.load(mean_ptr + row).to(ACC)) * tl.load(rstd_ptr + row).to(ACC))
        if dbias_ptr is not None:
            dbias += dy
    if dweight_ptr is not None:
        tl.store(dweight_ptr + chunk * width + column, dweight, mask=in_width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + chunk * width + column, dbias, mask=in_width)


def layer_norm_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    norm: str = "layer",
    needs: Sequence[bool] | None = None,
    residual_grad: Tensor | None = None,
    config: configs.LayerNormBwdConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias): None where ``needs`` says so, and for parameters that are None.

    grad and residual_grad [..., C] with any strides; residual_grad is added to dx.
    """
    needs_dx, needs_dweight, needs_dbias = needs or (True, True, True)
    needs_dweight, needs_dbias = needs_dweight and weight is not None, needs_dbias and bias is not None
    width = x.shape[-1]
    rows = x.numel() // width
    if not needs_dx:
        residual_grad = None
    weight_dtype, bias_dtype = (x.dtype if p is None else p.dtype for p in (weight, bias))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
    if rows == 0:
        return (
            dx,
            torch.zeros(width, dtype=weight_dtype, device=x.device) if needs_dweight else None,
            torch.zeros(width, dtype=bias_dtype, device=x.device) if needs_dbias else None,
        )
    if not (needs_dx or needs_dweight or needs_dbias):
        return None, None, None
    config = config or configs.pick_layer_norm_bwd_config(width)
    whole = width <= config.block
    count = configs.cdiv(rows, config.rows) if whole else configs.cdiv(rows, config.chunk)
    count = min(count, config.programs) if whole else count
    dweight, dbias = (
        torch.empty((count, width), dtype=mean.dtype, device=x.device) if needed else None
        for needed in (needs_dweight, needs_dbias)
    )
    given = [t for t in (grad, x, weight, residual_grad, mean) if t is not None]
    acc = launch.accumulator(*(t.dtype for t in given))
    grad, grad_two_strides, grad_inner, *grad_strides = launch.row_layout(grad)
    x, x_two_strides, x_inner, *x_strides = launch.row_layout(x)
    grad_strides, x_strides = (*grad_strides, grad.stride(-1)), (*x_strides, x.stride(-1))
    residual_two_strides, residual_inner, residual_strides = False, 0, (0, 0, 0)
    if residual_grad is not None:
        residual_grad, residual_two_strides, residual_inner, *strides = launch.row_layout(residual_grad)
        residual_strides = (*strides, residual_grad.stride(-1))
    weight, rms = launch.vector(weight), norm == "rms"
    with launch.device_guard(x):
        if whole:
            _layer_norm_bwd_kernel[(count,)](
                dx, dweight, dbias, grad, x, residual_grad, weight, mean, rstd,
                rows, width, grad_inner, x_inner, residual_inner, *grad_strides, *x_strides, *residual_strides,
                RMS=rms, DY_TWO_STRIDES=grad_two_strides, X_TWO_STRIDES=x_two_strides,
                RESIDUAL_TWO_STRIDES=residual_two_strides, ACC=acc, ROWS=config.rows, BLOCK=config.block,
                num_warps=config.num_warps,
            )  # fmt: skip
        else:
            if needs_dx:
                _layer_norm_wide_bwd_kernel[(rows,)](
                    dx, grad, x, residual_grad, weight, mean, rstd,
                    width, grad_inner, x_inner, residual_inner, *grad_strides, *x_strides, *residual_strides,
                    RMS=rms, DY_TWO_STRIDES=grad_two_strides, X_TWO_STRIDES=x_two_strides,
                    RESIDUAL_TWO_STRIDES=residual_two_strides, ACC=acc, BLOCK=config.block,
                    num_warps=config.num_warps,
                )  # fmt: skip
            if needs_dweight or needs_dbias:
                _layer_norm_sums_kernel[(count * configs.cdiv(width, config.block),)](
                    dweight, dbias, grad, x, mean, rstd,
                    rows, width, grad_inner, x_inner, *grad_strides, *x_strides,
                    DY_TWO_STRIDES=grad_two_strides, X_TWO_STRIDES=x_two_strides, ACC=acc, CHUNK=config.chunk,
                    BLOCK=config.block, num_warps=config.num_warps,
                )  # fmt: skip
    return dx, *add_partials(dweight, dbias, weight_dtype, bias_dtype)
