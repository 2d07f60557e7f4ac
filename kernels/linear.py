"""Linear layers on the GEMM of ``gemm``, with what surrounds them in a transformer block, and LayerNorm + linear.

    linear                    residual + row_scale[b] · gamma · act(x Wᵀ + bias)       every part but x Wᵀ optional
    linear_residual           residual + row_scale[b] · gamma · drop(x Wᵀ + bias), LN(x) in x's place with inner_norm
    layer_norm_linear         act(LN(x) Wᵀ + bias), in two launches
    linear_with_partials      residual + x Wᵀ + bias, and the row-statistics partials of that
    folded_linear             act((LN(x) without weight and bias) Wᵀ + bias), LN in the epilogue, from statistics of x
    fp8_linear                residual + out_scale · act(weight_scale · (x Wᵀ) + bias), x and W in float8 e4m3

x [B, ..., K] and residual [B, ..., N] with any strides, weight [N, K] also as a transposed view, bias [N], gamma [N],
row_scale [B], out [B, ..., N] contiguous; for a gated activation W has 2N rows. float32, float16, bfloat16 (float64
interpreted). The product is taken in the weight's dtype; out has the residual's dtype, else the weight's.
An x of another dtype is cast in a launch of its own (inside the GEMM, wgmma would serialise and Triton would multiply
float32 weights as TF32 on sm_100); LayerNorm + linear and the branches of a block never need it. Rows at two strides,
as of x[:, 1:], are read in place; a tensor whose leading axes need three is copied first, as are vectors that are not
contiguous.
folded_linear: x Wᵀ − mean · colsum(W) cancels where a row is far from zero, and loses 2^-22 · |mean|/spread of its
digits; the rows of W should be centred, which keeps colsum(W) small.
e4m3: weight_scale [N] undoes the scales of x and of the rows of W; out may be e4m3 too, with out_scale its scale;
capability 8.9 and later. On sm_90 the tensor cores accumulate e4m3 only to about 2^-13 of a long sum.
Dropout, of a call in training, takes the kernel of ``gemm_train``.
Limits: float64 in the interpreter only; loads narrower than 16 bytes (K not a multiple of 8 in
16-bit types, x transposed) are slow.
"""

import torch
from torch import Tensor

from . import configs, launch
from . import layer_norm as ln
from .gemm import gemm
from .gemm_train import linear_train

Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    semaphore: Tensor | None = None,
    pdl: bool = False,
    config: configs.LinearConfig | None = None,
) -> Tensor:
    """out [B, ..., N] (N/2 for a gated activation), in the residual's dtype or, without one, in the weight's.

    semaphore: int32 zeros that only this call uses as split-K counters; None: no split-K.
    """
    return gemm(
        x, weight, bias, activation, gamma=gamma, residual=residual, row_scale=row_scale, semaphore=semaphore, pdl=pdl,
        config=config,
    )[0]  # fmt: skip


def linear_with_partials(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    semaphore: Tensor | None = None,
    reverse_tiles: bool = False,
    pdl: bool = False,
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor, ln.RowPartials]:
    """(residual + x Wᵀ + bias in the residual's dtype, the ``RowPartials`` of its rows).

    semaphore: int32 zeros that only this call uses as split-K counters; allocated where None or too few.
    reverse_tiles: whether the last tiles are computed first (``gemm``); the bits do not depend on it.
    """
    return gemm(
        x, weight, bias, residual=residual, with_partials=True, semaphore=semaphore, reverse_tiles=reverse_tiles,
        pdl=pdl, config=config,
    )  # fmt: skip


def folded_linear(
    x: Tensor,
    statistics: ln.RowPartials | ln.RowStatistics,
    eps: float,
    weight: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    pdl: bool = False,
    config: configs.LinearConfig | None = None,
) -> Tensor:
    """act(LN(x) Wᵀ + bias), LN without weight and bias.

    statistics: those of x, to which eps has been added where they are ``RowStatistics``; column_sum: weight.sum(1),
    float32 (float64 for float64), small where the rows of weight are centred.
    """
    norm = (statistics, eps, column_sum)
    return gemm(x, weight, bias, activation, norm=norm, pdl=pdl, config=config)[0]


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: str | None = None,
    *,
    out_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    semaphore: Tensor | None = None,
    pdl: bool = False,
    config: configs.LinearConfig | None = None,
) -> Tensor:
    """residual + out_scale · act(weight_scale · (x Wᵀ) + bias) in the residual's dtype, else in ``out_dtype``.

    x [..., K] and weight [N, K] float8 e4m3; weight_scale [N], bias [N] or None, out_scale [width of out] or None,
    float32. semaphore: int32 zeros that only this call uses as split-K counters; None: no split-K.
    """
    return gemm(
        x, weight, bias, activation, weight_scale=weight_scale, gamma=out_scale, residual=residual,
        out_dtype=out_dtype, semaphore=semaphore, pdl=pdl, config=config,
    )[0]  # fmt: skip


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.LinearConfig | None = None,
) -> Tensor:
    """residual + row_scale · gamma · dropout(LN(x) Wᵀ + bias), in the residual's dtype; LN only with an ``inner_norm``,
    in a launch of its own that casts to the weight's dtype. seed: int64, one element, where dropout_p > 0."""
    if inner_norm is not None:
        x = ln.layer_norm(x, *inner_norm, out_dtype=weight.dtype, norm=norm)
    if dropout_p:
        return linear_train(
            x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale, dropout_p=dropout_p, seed=seed,
            config=config,
        )[0]  # fmt: skip
    return linear(x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale, config=config)


def linear_residual_not_supported_reasons(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[str]:
    reasons = launch.device_reasons(x, weight, bias, gamma, residual, row_scale, seed)
    if inner_norm is not None:
        reasons += [r for r in ln.not_supported_reasons(x, *inner_norm, norm=norm) if r not in reasons]
    return reasons


def layer_norm_linear_fwd(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(LN(x) Wᵀ + bias) in the weight's dtype, mean [rows], rstd [rows]); LN(x) is stored in the weight's dtype."""
    normal, mean, rstd = ln.layer_norm_fwd(x, ln_weight, ln_bias, eps, out_dtype=weight.dtype, norm=norm)
    return linear(normal, weight, bias, activation, config=config), mean, rstd


def layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
    config: configs.LinearConfig | None = None,
) -> Tensor:
    normal = ln.layer_norm(x, ln_weight, ln_bias, eps, out_dtype=weight.dtype, norm=norm)
    return linear(normal, weight, bias, activation, config=config)


def layer_norm_linear_not_supported_reasons(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> list[str]:
    reasons = ln.not_supported_reasons(x, ln_weight, ln_bias, eps)
    return reasons + [reason for reason in launch.device_reasons(x, weight, bias) if reason not in reasons]
