"""The MLP branch of a transformer block: out = x + row_scale[b] · gamma · (act(LN(x) W1ᵀ + b1) W2ᵀ + b2).

x [B, ..., C] with any strides; ln_weight, ln_bias, gamma [C] or None; w1 [hidden, C] ([2·hidden, C] for swiglu, rows
[gate | value]), w2 [C, hidden], b1, b2 or None; row_scale [B] or None; out [B, ..., C] contiguous in x's dtype;
mean, rstd [rows] float32. float32, float16, bfloat16 (float64 interpreted); x and the LayerNorm parameters may be
float32 beside 16-bit weights. Statistics, accumulators and epilogues are float32.

Three launches: LayerNorm into the weights' dtype (``layer_norm``), fc1 + bias + activation, and fc2 + bias +
LayerScale + drop-path + residual (``linear``). 4·rows·C·hidden FLOP (6 for swiglu); moves, in elements, 2·rows·C for
LayerNorm, rows·(C + hidden) for fc1, rows·(hidden + 2·C) for fc2, and the weights.
LN and fc1 stay two launches: normalising tiles of x inside the GEMM repeats the work for every column of tiles and
serialises wgmma, and folding LayerNorm into w1 rounds the weight a second time.
Limits: those of the two parts.
Source: pre-norm MLP branch of Dosovitskiy et al. (2021), LayerScale of Touvron et al. (2021).
"""

from torch import Tensor

from . import configs, launch
from .linear import layer_norm_linear, layer_norm_linear_fwd, layer_norm_linear_not_supported_reasons, linear_residual


def not_supported_reasons(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
) -> list[str]:
    reasons = layer_norm_linear_not_supported_reasons(x, ln_weight, ln_bias, eps, w1, b1, activation)
    return reasons + [r for r in launch.device_reasons(x, w2, b2, gamma, row_scale) if r not in reasons]


def layernorm_mlp_fwd(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    config: tuple[configs.LinearConfig, configs.LinearConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, ..., C], mean [rows], rstd [rows]); config is a pair of configs.LinearConfig, for fc1 and fc2."""
    fc1, fc2 = config or (None, None)
    hidden, mean, rstd = layer_norm_linear_fwd(x, ln_weight, ln_bias, eps, w1, b1, activation, config=fc1)
    return linear_residual(hidden, w2, b2, gamma, x, row_scale=row_scale, config=fc2), mean, rstd


def layernorm_mlp(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    config: tuple[configs.LinearConfig, configs.LinearConfig] | None = None,
) -> Tensor:
    """out [B, ..., C] alone; the statistics are not stored."""
    fc1, fc2 = config or (None, None)
    hidden = layer_norm_linear(x, ln_weight, ln_bias, eps, w1, b1, activation, config=fc1)
    return linear_residual(hidden, w2, b2, gamma, x, row_scale=row_scale, config=fc2)
