"""The GEMM of training: the forward that keeps its pre-activation, dropout, and the gradient at a pre-activation.

Forward, as ``gemm`` with fewer options, and with z stored in the weight's dtype where a backward will want it:

    z = x Wᵀ + bias        out = residual + row_scale[b] · gamma · mask / (1 − p) · act(z)

Backward, for y = h Wᵀ with h = mask / (1 − p) · act(z), from the gradient g of y:

    dz = (g W) · mask / (1 − p) · act′(z)        and h again, for the weight's gradient gᵀ h

x and g [rows, K] at one or two row strides; W [N, K] of the forward, [K, N] of the backward, at any strides; z, dz
[rows, N] contiguous ([rows, 2N], gate | value, for a gated activation, whose forward has 2N rows in W), out and h
[rows, N] contiguous; vectors contiguous; residual [rows, N] at one or two row strides. float32, float16, bfloat16
(float64 interpreted). The product is accumulated in float32, and the epilogue is float32 until it stores.
mask: Philox of the linear index in the whole [rows, N] tensor (``dropout``).

One program computes one tile, BLOCK_M × BLOCK_N, over all of K; grid and order of tiles as in ``gemm``, whose kernel
stays as it is for inference: its registers are full. Operands come through tensor descriptors (TMA) or masked pointers.
2·rows·N·K FLOP (twice that in a gated forward). Forward: moves rows·K + N·K + rows·N elements, and rows·N more for z;
backward: rows·K + N·K + 3·rows·N (5 for a gated one).
Limits: float64 in the interpreter only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, launch
from .activation_names import GATED
from .activations import activate_and_derive, activate_to
from .arguments import check_rows
from .dropout import dropout_of, dropped
from .gemm import Residual, Vectors, tile_position


@triton.jit
def _store_forward(
    acc,
    value,
    out_ptr,
    z_ptr,
    vectors,
    residual,
    dropout,
    row,
    first,
    rows,
    out_features,
    residual_inner,
    rows_per_sample,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDUAL_TWO_STRIDES: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Finishes and stores acc [BLOCK_M, WIDTH], the columns from ``first`` on; value: the second accumulator of a gated
    activation, acc being its gate."""
    column = first + tl.arange(0, WIDTH)
    in_rows, in_columns = row < rows, column < out_features
    mask = in_rows[:, None] & in_columns[None, :]
    index = (row * out_features)[:, None] + column[None, :]
    if vectors.bias_ptr is not None:
        acc += tl.load(vectors.bias_ptr + column, mask=in_columns, other=0.0).to(ACC)[None, :]
        if value is not None:
            value += tl.load(vectors.bias_ptr + out_features + column, mask=in_columns, other=0.0).to(ACC)[None, :]
    if z_ptr is not None:
        if value is None:
            tl.store(z_ptr + index, acc.to(z_ptr.dtype.element_ty), mask=mask)
        else:
            z_ptrs = z_ptr + (row * out_features * 2)[:, None] + column[None, :]
            tl.store(z_ptrs, acc.to(z_ptr.dtype.element_ty), mask=mask)
            tl.store(z_ptrs + out_features, value.to(z_ptr.dtype.element_ty), mask=mask)
    acc = activate_to(acc, ACTIVATION, EXACT, out_ptr.dtype.element_ty)
    if value is not None:
        acc *= value
    if dropout is not None:
        acc = dropped(acc, dropout, index)
    if vectors.gamma_ptr is not None:
        acc *= tl.load(vectors.gamma_ptr + column, mask=in_columns, other=0.0).to(ACC)[None, :]
    if vectors.row_scale_ptr is not None:
        acc *= tl.load(vectors.row_scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(ACC)[:, None]
    if residual is not None:
        residual_row = launch.row_offset(
            row, residual_inner, residual.stride_outer, residual.stride_inner, RESIDUAL_TWO_STRIDES
        )
        residual_ptrs = residual.residual_ptr + residual_row[:, None] + (column * residual.stride_column)[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_backward(
    acc,
    dz_ptr,
    hidden_ptr,
    z_ptr,
    dropout,
    row,
    first,
    rows,
    out_features,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Stores dz, and h where wanted, of acc = g W [BLOCK_M, WIDTH], the columns from ``first`` on."""
    column = first + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < out_features)[None, :]
    index = (row * out_features)[:, None] + column[None, :]
    wide = index
    if GATED:
        wide = (row * out_features * 2)[:, None] + column[None, :]
    z = tl.load(z_ptr + wide, mask=mask, other=0.0).to(ACC)
    hidden, slope = activate_and_derive(z, ACTIVATION, EXACT)
    if dropout is not None:
        acc = dropped(acc, dropout, index)
    if GATED:
        value = tl.load(z_ptr + wide + out_features, mask=mask, other=0.0).to(ACC)
        tl.store(dz_ptr + wide + out_features, (acc * hidden).to(dz_ptr.dtype.element_ty), mask=mask)
        slope *= value
        hidden *= value
    tl.store(dz_ptr + wide, (acc * slope).to(dz_ptr.dtype.element_ty), mask=mask)
    if hidden_ptr is not None:
        if dropout is not None:
            hidden = dropped(hidden, dropout, index)
        tl.store(hidden_ptr + index, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of a tile."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _slices(tile, SLICES: tl.constexpr):
    """A tile cut into 2 or 4 groups of columns, as a tuple."""
    left, right = _halves(tile)
    if SLICES == 2:
        return left, right
    else:
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner", "rows_per_sample"])
def _linear_train_kernel(
    out_ptr,  # [rows, out_features] contiguous: out, or in the backward dz, [rows, 2·out_features] of a gated one
    hidden_ptr,  # [rows, out_features] contiguous: h of the backward, or None
    z_ptr,  # as wide as dz, contiguous: what the forward stores, or None, and the backward reads
    x_src,  # pointer to rows at one or two strides, or descriptor, of [rows, in_features]
    weight_src,  # pointer, or descriptor, of [out_features or 2·out_features, in_features]; backward: its transpose
    vectors,  # Vectors, without weight_scale
    residual,  # Residual, or None
    dropout,  # Dropout, or None
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
    BACKWARD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    X_TWO_STRIDES: tl.constexpr,
    RESIDUAL_TWO_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    # Triton specialises on sizes and strides that are multiples of 16; this tells it of multiples of 2, 4 and 8.
    if ALIGN_K > 1 and ALIGN_K < 16:
        in_features = in_features // ALIGN_K * ALIGN_K
        stride_xo, stride_xi = stride_xo // ALIGN_K * ALIGN_K, stride_xi // ALIGN_K * ALIGN_K
        if not BACKWARD:
            stride_wn = stride_wn // ALIGN_K * ALIGN_K
    if ALIGN_N > 1 and ALIGN_N < 16:
        out_features = out_features // ALIGN_N * ALIGN_N
        if BACKWARD:
            stride_wk = stride_wk // ALIGN_N * ALIGN_N

    TWO_PRODUCTS: tl.constexpr = GATED and not BACKWARD
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP_M)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = row < rows, column < out_features
    if not DESCRIPTORS:
        lane = tl.arange(0, BLOCK_K).to(tl.int64)
        x_row = launch.row_offset(row, x_inner, stride_xo, stride_xi, X_TWO_STRIDES)
        x_ptrs = x_src + x_row[:, None] + (lane * stride_xk)[None, :]
        weight_ptrs = weight_src + (column * stride_wn)[None, :] + (lane * stride_wk)[:, None]
        x_step = tl.full([], BLOCK_K, tl.int64) * stride_xk
        weight_step = tl.full([], BLOCK_K, tl.int64) * stride_wk
        value_offset = tl.full([], 1, tl.int64) * out_features * stride_wn

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if TWO_PRODUCTS:
        value_acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(0, in_features, BLOCK_K):
        if DESCRIPTORS:
            x = x_src.load([tile_m * BLOCK_M, k])
            if BACKWARD:
                weight = weight_src.load([k, tile_n * BLOCK_N])
            else:
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
        if TWO_PRODUCTS:
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

    # In slices: the whole tile and its addresses do not fit in the registers, less so beside the words of Philox.
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    slices = _slices(acc, SLICES)
    values = slices
    if TWO_PRODUCTS:
        values = _slices(value_acc, SLICES)
    first = tile_n.to(tl.int64) * BLOCK_N
    for i in tl.static_range(SLICES):
        if BACKWARD:
            _store_backward(
                slices[i], out_ptr, hidden_ptr, z_ptr, dropout, row, first + i * WIDTH, rows, out_features,
                ACTIVATION, GATED, EXACT, WIDTH, ACC,
            )  # fmt: skip
        else:
            _store_forward(
                slices[i], values[i] if TWO_PRODUCTS else None, out_ptr, z_ptr, vectors, residual, dropout, row,
                first + i * WIDTH, rows, out_features, residual_inner, rows_per_sample,
                ACTIVATION, EXACT, RESIDUAL_TWO_STRIDES, WIDTH, ACC,
            )  # fmt: skip


def _upcast(dtype, out_dtype):
    """The dtype to which an interpreted kernel widens its operands: the interpreter multiplies the bits of bf16."""
    if not launch.INTERPRETED or dtype == torch.float64:
        return None
    if out_dtype == torch.float64:
        return tl.float64
    return tl.float32 if dtype == torch.bfloat16 else None


def _launch(
    x, weight, activation, backward, out, hidden, z, vectors, residual, row_inner, rows_per_sample, dropout, config
):
    """One launch; weight [N, K] (2N rows of a gated activation), or in the backward [K, N]. ``row_inner``: what
    ``row_layout`` says of the residual."""
    gated = activation in GATED
    in_features = x.shape[-1]
    out_features = weight.shape[1] if backward else weight.shape[0] // 2 if gated else weight.shape[0]
    rows = x.numel() // in_features
    x, x_two_strides, x_inner, stride_xo, stride_xi = launch.row_layout(x)
    stride_xk = x.stride(-1)
    stride_wn, stride_wk = reversed(weight.stride()) if backward else weight.stride()
    weight_step = weight.stride(0)  # for TMA the other axis must be contiguous
    x_bytes = launch.vector_bytes(x, in_features, stride_xo, stride_xi) if stride_xk == 1 else 0
    weight_bytes = launch.vector_bytes(weight, weight.shape[1], weight_step) if weight.stride(1) == 1 else 0
    unaligned = min(x_bytes, weight_bytes) < 16
    precision = launch.dot_precision() if weight.dtype == torch.float32 else "ieee"
    if config is None:
        arch, tf32 = configs.arch_of(x.device), precision == "tf32"
        config = configs.pick_linear_train_config(
            rows, out_features, gated and not backward, weight.dtype, out.dtype, tf32, unaligned, arch,
            backward or dropout is not None,
        )  # fmt: skip
    descriptors = (
        config.tma
        and not unaligned
        and not x_two_strides
        and stride_xi >= in_features
        and weight_step >= weight.shape[1]
    )
    x_src, weight_src = x, weight
    if descriptors:
        x_src = TensorDescriptor(x, [rows, in_features], [stride_xi, 1], [config.block_m, config.block_k])
        block = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
        weight_src = TensorDescriptor(weight, list(weight.shape), [weight_step, 1], block)
    align_k = math.gcd(16, in_features, stride_xo, stride_xi, 0 if backward else stride_wn)
    two_strides, residual_inner = row_inner
    tiles = configs.cdiv(rows, config.block_m) * configs.cdiv(out_features, config.block_n)
    with launch.device_guard(x):
        _linear_train_kernel[(tiles,)](
            out, hidden, z, x_src, weight_src, vectors, residual, dropout,
            rows, out_features, in_features, x_inner, residual_inner, rows_per_sample,
            stride_xo, stride_xi, stride_xk, stride_wn, stride_wk,
            BACKWARD=backward,
            ACTIVATION=GATED.get(activation, activation),
            GATED=gated,
            EXACT=weight.dtype in (torch.float32, torch.float64),
            X_TWO_STRIDES=x_two_strides,
            RESIDUAL_TWO_STRIDES=two_strides,
            DESCRIPTORS=descriptors,
            EVEN_K=descriptors or in_features % config.block_k == 0,
            ALIGN_K=16 if descriptors else align_k,
            ALIGN_N=math.gcd(16, out_features, stride_wk if backward else 0),
            UPCAST=_upcast(weight.dtype, out.dtype),
            ACC=launch.accumulator(weight.dtype, out.dtype),
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            SLICES=4 if dropout is not None or (gated and backward) else 2,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip


def linear_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    with_z: bool = False,
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out [B, ..., N] in the residual's dtype, else the weight's; z [B, ..., rows of weight] or None)."""
    gated = activation in GATED
    out_features = weight.shape[0] // 2 if gated else weight.shape[0]
    rows = x.numel() // weight.shape[1]
    check_rows("linear", rows)
    out_dtype = weight.dtype if residual is None else residual.dtype
    out = torch.empty((*x.shape[:-1], out_features), dtype=out_dtype, device=x.device)
    z = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype, device=x.device) if with_z else None
    if rows == 0:
        return out, z
    rows_per_sample = rows // x.shape[0] if row_scale is not None else 0
    where, rest = (False, 0), None
    if residual is not None:
        residual, two_strides, residual_inner, stride_ro, stride_ri = launch.row_layout(residual)
        rest, where = Residual(residual, stride_ro, stride_ri, residual.stride(-1)), (two_strides, residual_inner)
    vectors = Vectors(None, launch.vector(bias), launch.vector(gamma), launch.vector(row_scale))
    _launch(
        x.to(weight.dtype), weight, activation, False, out, None, z, vectors, rest, where, rows_per_sample,
        dropout_of(dropout_p, seed), config,
    )  # fmt: skip
    return out, z


def pre_activation_gradient(
    grad: Tensor,
    weight: Tensor,
    z: Tensor,
    activation: str | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    with_hidden: bool = True,
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dz, h [B, ..., N] or None) for y = h weightᵀ, h = dropout(act(z)), from the gradient [B, ..., K] of y.

    weight [K, N] in the dtype of grad; z [B, ..., N], or [B, ..., 2N] before a gated activation, contiguous; dz like z.
    """
    rows = grad.numel() // grad.shape[-1]
    check_rows("linear", rows)
    dz = torch.empty_like(z)
    shape = (*z.shape[:-1], weight.shape[1])
    hidden = torch.empty(shape, dtype=z.dtype, device=z.device) if with_hidden else None
    if rows:
        nothing = Vectors(None, None, None, None)
        _launch(
            grad, weight, activation, True, dz, hidden, z, nothing, None, (False, 0), 0, dropout_of(dropout_p, seed),
            config,
        )  # fmt: skip
    return dz, hidden
