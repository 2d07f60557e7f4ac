"""The MLP branch of a transformer block: out = x + row_scale[b] · gamma · drop(drop(act(LN(x) W1ᵀ + b1)) W2ᵀ + b2).

With inner_norm, the hidden activations are normalised before W2. Both norms are LayerNorm, or RMSNorm (norm="rms").
x [B, ..., C] with any strides; ln_weight, ln_bias, gamma [C] or None; w1 [hidden, C] ([2·hidden, C] for a gated
activation, rows [gate | value]), w2 [C, hidden], b1, b2 or None; row_scale [B] or None; out [B, ..., C] contiguous in
x's dtype; mean, rstd [rows] float32. float32, float16, bfloat16 (float64 interpreted); x and the norms' parameters may
be float32 beside 16-bit weights. Statistics, accumulators and epilogues are float32.

Dropout of the hidden activations and of fc2's output, and the pre-activation z = LN(x) W1ᵀ + b1 that a backward reads
([B, ..., rows of w1] in its dtype), are the epilogues' of ``gemm_train``.

Three launches: LayerNorm into the weights' dtype (``layer_norm``), fc1 + bias + activation, and fc2 + bias +
LayerScale + drop-path + residual (``linear``); a fourth for inner_norm, which moves 2·rows·hidden elements.
4·rows·C·hidden FLOP (6 for a gated activation); moves, in elements, 2·rows·C for
LayerNorm, rows·(C + hidden) for fc1 (2·hidden with z, 3 for a gated one), rows·(hidden + 2·C) for fc2, and the weights.
LN and fc1 stay two launches: normalising tiles of x inside the GEMM repeats the work for every column of tiles and
serialises wgmma, and folding LayerNorm into w1 rounds the weight a second time.
Limits: those of the two parts.
Source: pre-norm MLP branch of Dosovitskiy et al. (2021), LayerScale of Touvron et al. (2021).
"""

from torch import Tensor

from . import configs, launch
from . import layer_norm as ln
from .gemm_train import linear_train
from .linear import Norm, layer_norm_linear_not_supported_reasons, linear, linear_residual


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
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: Tensor | None = None,
) -> list[str]:
    reasons = layer_norm_linear_not_supported_reasons(x, ln_weight, ln_bias, eps, w1, b1, activation, norm=norm)
    more = launch.device_reasons(x, w2, b2, gamma, row_scale, seed, out_seed, *(inner_norm or ())[:2])
    if inner_norm is not None and w2.shape[1] > ln.MAX_WIDTH:
        more.append(f"hidden width {w2.shape[1]} is above {ln.MAX_WIDTH}")
    return list(dict.fromkeys(reasons + more))


def _fc1(normal, w1, b1, activation, dropout_p, seed, with_z, config):
    """(drop(act(normal W1ᵀ + b1)), z or None); the kernel of inference where neither needs that of training."""
    if not (dropout_p or with_z):
        return linear(normal, w1, b1, activation, config=config), None
    return linear_train(normal, w1, b1, activation, dropout_p=dropout_p, seed=seed, with_z=with_z, config=config)


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
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: Tensor | None = None,
    recompute: bool = False,
    config: tuple[configs.LinearConfig, configs.LinearConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, ..., C], mean [rows], rstd [rows], z [B, ..., rows of w1]); with ``recompute`` z has no elements: the
    backward computes it again. config is a pair of configs.LinearConfig, for fc1 and fc2."""
    fc1, fc2 = config or (None, None)
    normal, mean, rstd = ln.layer_norm_fwd(x, ln_weight, ln_bias, eps, out_dtype=w1.dtype, norm=norm)
    hidden, z = _fc1(normal, w1, b1, activation, dropout_p, seed, not recompute, fc1)
    out = linear_residual(
        hidden, w2, b2, gamma, x, row_scale=row_scale, norm=norm, inner_norm=inner_norm,
        dropout_p=out_dropout_p, seed=out_seed, config=fc2,
    )  # fmt: skip
    return out, mean, rstd, w1.new_empty(0) if z is None else z


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
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: Tensor | None = None,
    config: tuple[configs.LinearConfig, configs.LinearConfig] | None = None,
) -> Tensor:
    """out [B, ..., C] alone; neither statistics nor z are stored."""
    fc1, fc2 = config or (None, None)
    normal = ln.layer_norm(x, ln_weight, ln_bias, eps, out_dtype=w1.dtype, norm=norm)
    hidden, _ = _fc1(normal, w1, b1, activation, dropout_p, seed, False, fc1)
    return linear_residual(
        hidden, w2, b2, gamma, x, row_scale=row_scale, norm=norm, inner_norm=inner_norm,
        dropout_p=out_dropout_p, seed=out_seed, config=fc2,
    )  # fmt: skip
