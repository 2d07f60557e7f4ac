"""One linear layer on a weight that is prepared, for blocks that no stack of prepared blocks describes; inference only.

    prepared_linear    act(LN(x) Wᵀ + b), or residual + gamma · (x Wᵀ + b)     W [N, K] in the dtype of x
    fp8_linear         the same with W in float8 e4m3, and LN(x) rounded to it

x [..., K] with any strides, residual [..., N], out [..., N] contiguous, in the dtype of x; for a gated activation W has
2N rows. LayerNorm, RMSNorm or none. Each is one launch of the GEMM (``gemm``), whose epilogue has bias, activation,
gamma and residual, behind at most one more:

    prepared_linear    with a norm: LN(x) in the dtype of x (``layer_norm``)
    fp8_linear         LN(x), or x, rounded to e4m3 by a step of each token: rows·K elements of x read, rows·K bytes
                       and 8·rows bytes written

A weight has a scale for each output, a power of two; a token the step that takes its largest value to 448, so that
nothing saturates, no data is needed and no token depends on another. The GEMM multiplies by both: the step is the rstd
of its folded LayerNorm, the mean of which is 0.
quantise_tokens: one program normalises and rounds ROWS rows, which it holds in registers; grid ceil(rows / ROWS); all
between load and store is float32.
On capability 9.0 and later, with few rows, the launches use PDL (``configs.use_pdl``).
Limits: fp8_linear has K ≤ 16384, capability 8.9 and no float64; prepared_linear float64 in the interpreter only.
Source: e4m3 after Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from . import layer_norm as ln
from .folding import E4M3, E4M3_MAX
from .gemm import gemm
from .prepared_layer import PreparedLayer

MAX_WIDTH = 16384
_LARGEST = tl.constexpr(E4M3_MAX)


@triton.jit(do_not_specialize=["rows", "inner"])
def _quantise_tokens_fwd_kernel(
    y_ptr,  # [rows, width] contiguous, e4m3
    statistics_ptr,  # [2, rows] contiguous: 0, step
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
    NORM: tl.constexpr,  # "layer", "rms" or None
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
    y = tl.load(x_ptr + x_row[:, None] + (column * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
    if NORM is not None:
        y, _, rstd = ln.normal_factors(y, in_width, width, eps, NORM, ROWS, ACC)
        y = ln.scale_and_shift(y * rstd[:, None], weight_ptr, bias_ptr, column, in_width, ACC)
    largest = tl.max(tl.abs(y), axis=1)
    step = tl.where(largest > 1e-30, largest / _LARGEST, 1.0)
    tl.store(statistics_ptr + row, tl.zeros([ROWS], ACC), mask=in_rows)
    tl.store(statistics_ptr + rows + row, step, mask=in_rows)
    y *= (1.0 / step)[:, None]
    tl.store(y_ptr + (row * width)[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def quantise_tokens(
    x: Tensor,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float | None = None,
    norm: str = "layer",
    pdl: bool = False,
    config: configs.LayerNormConfig | None = None,
) -> tuple[Tensor, ln.RowStatistics]:
    """(e4m3 [..., C], its steps as the rstd of ``RowStatistics``) of LN(x), or of x where eps is None."""
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty(x.shape, dtype=E4M3, device=x.device)
    statistics = torch.empty(2, rows, dtype=launch.stat_dtype(x.dtype), device=x.device)
    if rows == 0:
        return y, ln.RowStatistics(statistics)
    config = config or configs.pick_layer_norm_config(width)
    x, two_strides, inner, stride_xo, stride_xi = launch.row_layout(x)
    with launch.device_guard(x):
        _quantise_tokens_fwd_kernel[(configs.cdiv(rows, config.rows),)](
            y, statistics, x, launch.vector(ln_weight), launch.vector(ln_bias),
            rows, inner, width, eps or 0.0, stride_xo, stride_xi, x.stride(-1),
            NORM=None if eps is None else norm,
            TWO_STRIDES=two_strides, ACC=launch.accumulator(x.dtype), ROWS=config.rows, BLOCK=config.block,
            **launch.options(pdl, config.num_warps),
        )  # fmt: skip
    return y, ln.RowStatistics(statistics)


def prepared_linear(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> Tensor:
    """out [..., features]; the tensors of the weight: W."""
    pdl, dtype = _pdl(x), x.dtype
    if layer.eps is not None:
        x = ln.layer_norm(x, layer.ln_weight, layer.ln_bias, layer.eps, norm=layer.norm, pdl=pdl)
    residual = None if residual is None else residual.to(dtype)
    (matrix,) = layer.weight
    return gemm(x, matrix, layer.bias, layer.activation, gamma=layer.gamma, residual=residual, pdl=pdl)[0]


def fp8_linear(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> Tensor:
    """out [..., features]; the tensors of the weight: W in e4m3, and the scale of its rows."""
    pdl, dtype = _pdl(x), x.dtype
    tokens, statistics = quantise_tokens(x, layer.ln_weight, layer.ln_bias, layer.eps, layer.norm, pdl)
    residual = None if residual is None else residual.to(dtype)
    matrix, scale = layer.weight
    # The mean of the statistics is 0, so that it does not matter what the column sums are.
    return gemm(
        tokens, matrix, layer.bias, layer.activation, weight_scale=scale, gamma=layer.gamma, residual=residual,
        out_dtype=dtype, norm=(statistics, 0.0, scale), pdl=pdl,
    )[0]  # fmt: skip


def _pdl(x: Tensor) -> bool:
    return configs.use_pdl(x.numel() // max(x.shape[-1], 1), configs.arch_of(x.device))


def prepared_linear_not_supported_reasons(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> list[str]:
    reasons = launch.device_reasons(x, *layer.tensors(), residual)
    if layer.eps is not None and x.shape[-1] > ln.MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is above {ln.MAX_WIDTH}")
    return reasons


def fp8_linear_not_supported_reasons(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> list[str]:
    reasons = launch.device_reasons(x, *layer.tensors(), residual)
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is above {MAX_WIDTH}")
    if x.device.type == "cuda" and configs.arch_of(x.device) < 89:
        reasons.append(f"float8 needs capability 8.9, the device has {configs.arch_of(x.device) / 10}")
    return reasons
