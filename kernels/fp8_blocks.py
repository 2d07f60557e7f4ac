"""A stack of pre-norm transformer blocks whose matrix products are taken in float8 e4m3, for inference.

    x = x + proj(attention(qkv(LN1(x))))
    x = x + fc2(act(fc1(LN2(x))))

x [B, N, C] with any strides, out [B, N, C] contiguous, float16 or bfloat16. The weights are the
tensors of a ``folding.Float8Block`` for each block; LayerNorm's parameters and LayerScale are folded into them. What a
product reads is rounded to e4m3 by the kernel that makes it, with scales that come from the weights alone (bounds that
no input exceeds), so that nothing saturates, nothing is calibrated, and no image's scale depends on its batch mates.

    launch                                          reads, writes (bytes, rows = B·N, weights aside)
    LN1, rounded                                    rows·2C, rows·C
    qkv: GEMM                                       rows·C, rows·6C
    attention in 16 bits, rounded                   rows·6C, rows·C
    proj: GEMM + residual                           rows·3C, rows·2C
    LN2, rounded                                    rows·2C, rows·C
    fc1: GEMM, activation, rounded                  rows·C, rows·F
    fc2: GEMM + residual                            rows·(F + 2C), rows·2C

A norm inside a branch (``BlockOptions.out_eps``, ``hidden_eps``) takes a launch more: what it reads stays in 16 bits.
Unlike in ``prepared_blocks``, LayerNorm is not folded into the products: x would be rounded to e4m3 with its mean still
in it. Every product errs by about 2^-5 of its spread, ten times as much as in bfloat16; attention and the residual stay
as they are. Limits: those of the parts; capability 8.9 and later; no dropout, no drop path.
Source: e4m3 after Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433); the bounds are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention as attn
from . import configs, launch_plan
from . import layer_norm as ln
from .block_options import PLAIN, BlockOptions
from .folding import E4M3, Float8Block, first_block, unflatten
from .linear import fp8_linear
from .prepared_blocks import SEMAPHORE_TILES


def not_supported_reasons(
    x: Tensor, weights: Sequence[Tensor], num_heads: int, options: BlockOptions = PLAIN
) -> list[str]:
    packed = x.new_empty(0, 0, first_block(Float8Block, weights).qkv_weight.shape[0])
    reasons = ln.not_supported_reasons(x, None, None, 0.0) + attn.not_supported_reasons(
        packed, num_heads, **options.of_attention()
    )
    if x.device.type == "cuda" and configs.arch_of(x.device) < 89:
        reasons.append(f"float8 needs capability 8.9, the device has {configs.arch_of(x.device) / 10}")
    return list(dict.fromkeys(reasons))


def fp8_blocks(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> Tensor:
    """x [B, N, C] through the blocks; out [B, N, C]."""
    pdl = configs.use_pdl(x.shape[0] * x.shape[1], configs.arch_of(x.device))
    return launch_plan.planned(_run, x, weights, num_heads, scale, activation, eps1, eps2, options, pdl)


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions,
    pdl: bool,
) -> Tensor:
    blocks = unflatten(Float8Block, weights)
    semaphores = iter(torch.zeros(2 * len(blocks), SEMAPHORE_TILES, dtype=torch.int32, device=x.device).unbind())
    for b in blocks:
        normal = ln.layer_norm(x, b.norm_scale, None, eps1, E4M3, norm=options.norm, pdl=pdl)
        packed = fp8_linear(normal, b.qkv_weight, b.qkv_scale, b.qkv_bias, out_dtype=x.dtype, pdl=pdl)
        out_dtype = E4M3 if options.out_eps is None else x.dtype
        out = attn.attention(packed, num_heads, scale, out_dtype=out_dtype, pdl=pdl, **options.of_attention())
        if options.out_eps is not None:
            out = ln.layer_norm(out, b.norm_scale, None, options.out_eps, E4M3, norm=options.norm, pdl=pdl)
        x = fp8_linear(out, b.proj_weight, b.proj_scale, b.proj_bias, residual=x, semaphore=next(semaphores), pdl=pdl)
        normal = ln.layer_norm(x, b.norm_scale, None, eps2, E4M3, norm=options.norm, pdl=pdl)
        fc1 = (normal, b.fc1_weight, b.fc1_scale, b.fc1_bias, activation)
        if options.hidden_eps is None:
            hidden = fp8_linear(*fc1, out_scale=b.hidden_scale, out_dtype=E4M3, pdl=pdl)
        else:
            hidden = fp8_linear(*fc1, out_dtype=x.dtype, pdl=pdl)
            hidden = ln.layer_norm(hidden, b.hidden_scale, None, options.hidden_eps, E4M3, norm=options.norm, pdl=pdl)
        x = fp8_linear(hidden, b.fc2_weight, b.fc2_scale, b.fc2_bias, residual=x, semaphore=next(semaphores), pdl=pdl)
    return x
