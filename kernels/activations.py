"""Elementwise activations on a tile, for the epilogues of ``gemm`` and ``linear_hopper``.

EXACT: float32 precision (float64 for float64); otherwise fp16 precision in fewer instructions. Without EXACT,
gelu uses Φ(−|z|) = exp(−z²/2)·p(t), t = 1/(1 + c·|z|), with p fitted to a relative error of 3e-5: the error stays
relative in the negative tail, and it costs one exp2 and one rsqrt where erf costs 33 instructions. What is rounded to
bf16 or e4m3 takes gelu in nine instructions (``activate_to``): Φ(−|z|) = exp2(p(|z|)), p of degree 5 fitted to
log2 Φ(−|z|). It errs by at most 5e-5 of gelu plus 3e-8, and erf in float32 by ten times that where z < −4.
Source: form of t after Abramowitz and Stegun 7.1.26; the coefficients are our own fits.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z, EXACT: tl.constexpr):
    e = tl.exp2(z * -1.4426950408889634)
    return 1.0 / (1.0 + e) if EXACT else reciprocal(1.0 + e)


@triton.jit
def reciprocal(d):
    """1/d of d ≥ 1 in two instructions, where a division takes six; 0 from 2^64 up."""
    return tl.rsqrt(d * d)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """gelu (by erf), gelu_tanh, quick_gelu, relu or silu of z; z itself for None. NaN stays NaN."""
    if ACTIVATION == "gelu":
        if EXACT:
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            size = tl.minimum(tl.abs(z), 32.0)
            t = reciprocal(1.0 + 0.375705 * size)
            p = -0.0911806684 * t + 0.2000518714
            p = p * t + 0.0837157211
            p = p * t + 0.1580672795
            p = (p * t + 0.1493327026) * (t * size)
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - p * tl.exp2(size * (-0.7213475204444817 * size))
    elif ACTIVATION == "gelu_tanh":
        z = z * sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z), EXACT)
    elif ACTIVATION == "quick_gelu":
        z = z * sigmoid(1.702 * z, EXACT)
    elif ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        z = z * sigmoid(z, EXACT)
    return z


@triton.jit
def activate_to(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, OUT: tl.constexpr):
    """``activate``, as precise as what is then rounded to the dtype OUT needs."""
    COARSE: tl.constexpr = OUT == tl.bfloat16 or OUT == tl.float8e4nv
    if ACTIVATION == "gelu" and COARSE and not EXACT:
        size = tl.minimum(tl.abs(z), 32.0)
        p = -0.0003671997 * size + 0.0062626236
        p = p * size - 0.0496396976
        p = p * size - 0.4623069215
        p = p * size - 1.1499792429
        p = p * size - 1.0000661279
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * tl.exp2(p)
    else:
        z = activate(z, ACTIVATION, EXACT)
    return z


@triton.jit
def activate_and_derive(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(activation of z, its derivative at z), which share their exponentials; (z, 1) for None. NaN stays NaN."""
    if ACTIVATION == "gelu":
        if EXACT:
            cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            slope = cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
            value = z * cdf
        else:
            size = tl.minimum(tl.abs(z), 32.0)
            t = reciprocal(1.0 + 0.375705 * size)
            p = -0.0911806684 * t + 0.2000518714
            p = p * t + 0.0837157211
            p = p * t + 0.1580672795
            p = (p * t + 0.1493327026) * t
            e = tl.exp2(size * (-0.7213475204444817 * size))
            value = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * (p * e)
            # of −|z|: Φ(−|z|) − |z|·φ(z), and 1 minus that of |z|
            tail = e * (p - 0.3989422804014327 * size)
            slope = tl.where(z < 0.0, tail, 1.0 - tail)
            slope = tl.where(z == z, slope, z)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z), EXACT)
        value = z * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * z * z)
    elif ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * z, EXACT)
        value = z * s
        slope = s + 1.702 * value * (1.0 - s)
    elif ACTIVATION == "relu":
        value = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = sigmoid(z, EXACT)
        value = z * s
        slope = s + value * (1.0 - s)
    else:
        value, slope = z, tl.full(z.shape, 1.0, z.dtype)
    return value, slope
