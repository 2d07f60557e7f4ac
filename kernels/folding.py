"""Weights prepared for inference: LayerNorm and LayerScale folded into the projections, and e4m3 quantisation.

``prepared_blocks`` and ``fp8_blocks`` take a fixed number of tensors for each block, in the order in which
``prepare_block`` and ``fp8_block`` return them. All of it is computed in float64 and rounded once; no Triton is needed.
"""

import math

import torch

TENSORS_PER_BLOCK = 10
TENSORS_PER_FP8_BLOCK = 14
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# What rounding adds to a bound: x̂ and the softmax's weights are rounded (2^-4, 2^-8), float32 sums are inexact.
_SLACK = 1.07


def _without_layer_norm(weight, bias, ln_weight, ln_bias):
    """(weight, bias) in float64 such that LN(x) weightᵀ + bias becomes that of an LN without parameters.

    Each row of weight · ln_weight is centred, which a normalised x does not see.
    """
    wide = weight.double()
    folded = wide if ln_weight is None else wide * ln_weight.double()
    shift = wide.new_zeros(wide.shape[0]) if ln_bias is None else wide @ ln_bias.double()
    return folded - folded.mean(1, keepdim=True), shift if bias is None else shift + bias.double()


def _without_layer_scale(weight, bias, gamma):
    """(weight, bias) in float64 such that gamma · (x weightᵀ + bias) needs no gamma."""
    wide = weight.double()
    shift = wide.new_zeros(wide.shape[0]) if bias is None else bias.double()
    return (wide, shift) if gamma is None else (wide * gamma.double()[:, None], shift * gamma.double())


def fold_layer_norm(weight, bias, ln_weight, ln_bias):
    """(weight, its row sums [out], bias [out]) that take an LN without parameters.

    The weight is rounded to its dtype after its rows are centred, the sums are those of the rounded weight. Sums and
    bias are float32 (float64 for float64), computed in float64.
    """
    folded, shift = _without_layer_norm(weight, bias, ln_weight, ln_bias)
    rounded, wide = folded.to(weight.dtype), torch.promote_types(weight.dtype, torch.float32)
    return rounded, rounded.double().sum(1).to(wide), shift.to(wide)


def fold_layer_scale(weight, bias, gamma):
    """(weight, bias) that need no gamma; the bias is float32 (float64 for float64)."""
    folded, shift = _without_layer_scale(weight, bias, gamma)
    return folded.to(weight.dtype), shift.to(torch.promote_types(weight.dtype, torch.float32))


def prepare_block(norm1, qkv, proj, gamma1, norm2, fc1, fc2, gamma2):
    """The ten tensors of a block. norm: (weight, bias) of a LayerNorm; the others (weight, bias); gamma or None."""
    return (
        *fold_layer_norm(*qkv, *norm1),
        *fold_layer_scale(*proj, gamma1),
        *fold_layer_norm(*fc1, *norm2),
        *fold_layer_scale(*fc2, gamma2),
    )


def power_of_two_scale(bound):
    """The largest power of two that keeps bound · scale ≤ 448; 1 where the bound is 0, NaN where it is not finite."""
    exponent = torch.frexp(E4M3_MAX / bound.double()).exponent
    scale = torch.exp2((exponent - 1).clamp(-100, 100).double())
    return torch.where(bound.isfinite(), torch.where(bound > 0, scale, 1.0), math.nan)


def quantise_rows(weight):
    """(e4m3 [N, K], float64 [N]): weight ≈ e4m3 · scale, each row by a power of two, so that nothing else rounds."""
    scale = power_of_two_scale(weight.abs().amax(1))
    return (weight * scale[:, None]).to(torch.float32).to(E4M3), 1 / scale


def fp8_block(norm1, qkv, proj, gamma1, norm2, fc1, fc2, gamma2, activation):
    """The fourteen tensors of a block; arguments as in ``prepare_block``.

        norm_scale [C]     what x̂, the normalised x, is multiplied with before it is rounded to e4m3
        weight, weight_scale, bias of qkv, proj, fc1, fc2;  hidden_scale, likewise of act(fc1)

    No scale needs data. A row of x̂ has the norm √C at most, hence |x̂| < √C and |x̂ · w + b| ≤ √C·‖w‖ + |b|; what
    attention puts out is a mean of values v; no activation exceeds its argument. e4m3 keeps its relative precision
    over 2^15, so that a scale that lets the bound just reach 448 still rounds everyday values, √C below it, as the
    best scale would, and no value saturates. Channels of v and of the hidden layer have a power of two of their own;
    the columns of the next weight take it back.
    """
    width = qkv[0].shape[1]
    longest = _SLACK * math.sqrt(width)
    norm_scale = power_of_two_scale(qkv[0].new_tensor(math.sqrt(max(width - 1, 1)), dtype=torch.float64))

    def project(linear, norm):
        """Quantised weight, its scale without that of x̂, the bias, and what bounds each output."""
        folded, shift = _without_layer_norm(*linear, *norm)
        weight, scale = quantise_rows(folded)
        bound = longest * (weight.double() * scale[:, None]).norm(dim=1) + shift.abs()
        return weight, scale / norm_scale, shift, bound

    def end(linear, gamma, scale):
        folded, shift = _without_layer_scale(*linear, gamma)
        return *quantise_rows(folded / scale), shift

    qkv_weight, qkv_scale, qkv_bias, bound = project(qkv, norm1)
    value_scale = power_of_two_scale(bound[2 * width :])
    channel_scale = torch.cat([torch.ones_like(bound[: 2 * width]), value_scale])
    fc1_weight, fc1_scale, fc1_bias, bound = project(fc1, norm2)
    if activation == "swiglu":
        gate, value = bound.chunk(2)
        bound = gate * value
    hidden_scale = power_of_two_scale(bound)
    tensors = (
        norm_scale.expand(width),
        qkv_weight, qkv_scale * channel_scale, qkv_bias * channel_scale,
        *end(proj, gamma1, value_scale),
        fc1_weight, fc1_scale, fc1_bias, hidden_scale,
        *end(fc2, gamma2, hidden_scale),
    )  # fmt: skip
    return tuple((t if t.dtype == E4M3 else t.to(torch.float32)).contiguous() for t in tensors)
