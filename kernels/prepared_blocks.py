"""A stack of pre-norm transformer blocks on prepared weights, for inference: five launches a block.

    x = x + proj(attention(qkv(LN1(x))))
    x = x + fc2(act(fc1(LN2(x))))

x [B, N, C] with any strides, out [B, N, C] contiguous, both in the weights' dtype: float16 or bfloat16 (float64
interpreted; in float32 a folded LayerNorm keeps no budget where the mean of a row is large against its spread). The
weights are those of ``reference.prepare_block``, ten tensors a block: the weight and bias of each LayerNorm are folded
into the projection that follows it, LayerScale into the one that ends the branch; biases are float32.

    launch                                          reads, writes (elements, rows = B·N, weights aside)
    qkv: GEMM, LN1 in its epilogue (``linear``)     rows·C, rows·3C
    attention                                       rows·3C, rows·C
    proj: GEMM + residual, moments of x             rows·2C, rows·C
    fc1: GEMM, LN2 and activation in the epilogue   rows·C, rows·F
    fc2: GEMM + residual, moments of x              rows·(F + C), rows·C

and two more in front: zeros for split sums over K to count arrivals in (``linear``), and the moments of the first x.
On capability 9.0 and later, with few rows, each of these kernels is launched before the one in front has ended.
A separate LayerNorm costs a launch and 2·rows·C elements, twice a block: that is what is saved.
Limits: those of the parts; C ≤ 16384; no dropout, no drop path.
Source: folding of LayerNorm after FlashNorm (arXiv:2407.09577), with the mean as a rank-one correction.
"""

import torch

from . import attention as attn
from . import configs
from . import layer_norm as ln
from .linear import folded_linear, linear_moments
from .reference import TENSORS_PER_BLOCK

ARRIVALS = 256  # tiles; sums over K are split where there are no more of them than multiprocessors


def not_supported_reasons(x, weights, num_heads):
    packed = weights[0].t()[None]  # has width, dtype and device of qkv
    reasons = ln.row_moments_not_supported_reasons(x) + attn.not_supported_reasons(packed, num_heads)
    return list(dict.fromkeys(reasons))


def prepared_blocks(x, weights, num_heads, scale, activation, eps1, eps2):
    """x [B, N, C] through len(weights)/10 blocks; out [B, N, C]."""
    depth = len(weights) // TENSORS_PER_BLOCK
    arrivals = iter(torch.zeros(2 * depth, ARRIVALS, dtype=torch.int32, device=x.device).unbind())
    dependent = configs.dependent_launch(x.shape[0] * x.shape[1], configs.arch_of(x.device))
    moments = ln.row_moments(x, dependent=dependent)
    for i in range(depth):
        block = weights[i * TENSORS_PER_BLOCK : (i + 1) * TENSORS_PER_BLOCK]
        qkv, qkv_sums, qkv_bias, proj, proj_bias, fc1, fc1_sums, fc1_bias, fc2, fc2_bias = block
        packed = folded_linear(x, moments, eps1, qkv, qkv_sums, qkv_bias, dependent=dependent)
        out = attn.attention(packed, num_heads, scale, dependent=dependent)
        x, moments = linear_moments(out, proj, proj_bias, x, arrivals=next(arrivals), dependent=dependent)
        hidden = folded_linear(x, moments, eps2, fc1, fc1_sums, fc1_bias, activation, dependent=dependent)
        x, moments = linear_moments(hidden, fc2, fc2_bias, x, arrivals=next(arrivals), dependent=dependent)
    return x
