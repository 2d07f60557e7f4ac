"""A stack of pre-norm transformer blocks on folded weights, for inference: five launches a block.

    x = x + proj(attention(qkv(LN1(x))))
    x = x + fc2(act(fc1(LN2(x))))

x [B, N, C] with any strides, out [B, N, C] contiguous, both in the weights' dtype: float16 or bfloat16 (float64
interpreted; in float32 a folded LayerNorm keeps no budget where the mean of a row is large against its spread). The
weights are the tensors of a ``folding.FoldedBlock`` for each block: the weight and bias of each LayerNorm are folded
into the projection that follows it, LayerScale into the one that ends the branch; biases are float32.

    launch ("partials")                             reads, writes (elements, rows = B·N, weights aside)
    qkv: GEMM, LN1 in its epilogue (``linear``)     rows·C, rows·3C
    attention                                       rows·3C, rows·C
    proj: GEMM + residual, partials of x            rows·2C, rows·C
    fc1: GEMM, LN2 and activation in the epilogue   rows·C, rows·F
    fc2: GEMM + residual, partials of x             rows·(F + C), rows·C

and two more before the first block: zeros for the split-K semaphores (``gemm``), and the row-statistics partials of x.
On capability 9.0 and later, with few rows, all these kernels are launched with PDL (``configs.use_pdl``); with many,
proj and fc2 compute their last tiles first (``configs.alternate_tile_order``).
This saves a separate LayerNorm twice a block: a launch and 2·rows·C elements each.
The statistics of the rows have three forms, of which ``configs.pick_stack_config`` chooses one:
    "partials"    each program of qkv and fc1 merges the partials of its rows, before its first load of a tile
    "finalised"   a launch in front of qkv and fc1 merges them once a row, and the programs read mean and rstd: seven
                  launches a block, 8·rows·(partials + 1) bytes more
    "plain"       LayerNorm is not folded: a launch in front of qkv and fc1 normalises the rows, seven launches a block
From the second call with the same weights and shape on the launches are repeated by a plan (``launch_plan``).
RMSNorm is always "plain", and the rows before a norm inside a branch (``BlockOptions.out_eps``, ``hidden_eps``) are
normalised by a launch of their own; the parameters are folded all the same.
Limits: those of the parts; C ≤ 16384; no dropout, no drop path.
Source: folding of LayerNorm after FlashNorm (arXiv:2407.09577), with the mean as a rank-one correction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention as attn
from . import configs, launch_plan
from . import layer_norm as ln
from .block_options import PLAIN, BlockOptions
from .folding import FoldedBlock, first_block, unflatten
from .linear import folded_linear, linear, linear_with_partials

SEMAPHORE_TILES = 256  # counters a GEMM; split-K is for fewer tiles than there are multiprocessors


def not_supported_reasons(
    x: Tensor, weights: Sequence[Tensor], num_heads: int, options: BlockOptions = PLAIN
) -> list[str]:
    packed = first_block(FoldedBlock, weights).qkv_weight.t()[None]  # has width, dtype and device of qkv
    reasons = ln.row_partials_not_supported_reasons(x)
    reasons += attn.not_supported_reasons(packed, num_heads, **options.of_attention())
    return list(dict.fromkeys(reasons))


def prepared_blocks(
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
    rows, arch = x.shape[0] * x.shape[1], configs.arch_of(x.device)
    form = configs.pick_stack_config(rows, x.shape[2], arch).statistics if options.norm == "layer" else "plain"
    chosen = configs.use_pdl(rows, arch), configs.alternate_tile_order(rows), form
    return launch_plan.planned(_run, x, weights, num_heads, scale, activation, eps1, eps2, options, *chosen)


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
    reverse_tiles: bool,
    form: str,
) -> Tensor:
    blocks = unflatten(FoldedBlock, weights)
    semaphores = iter(torch.zeros(2 * len(blocks), SEMAPHORE_TILES, dtype=torch.int32, device=x.device).unbind())
    partials = ln.row_partials(x, pdl=pdl) if form != "plain" else None

    def after_norm(eps, weight, sums, bias, activation=None):
        if form == "plain":
            normal = ln.layer_norm(x, None, None, eps, norm=options.norm, pdl=pdl)
            return linear(normal, weight, bias, activation, pdl=pdl)
        merged = form == "finalised"
        statistics = ln.row_statistics(partials, x.shape[2], eps, pdl=pdl) if merged else partials
        return folded_linear(x, statistics, eps, weight, sums, bias, activation, pdl=pdl)

    def before_residual(y, eps, weight, bias):
        y = y if eps is None else ln.layer_norm(y, None, None, eps, norm=options.norm, pdl=pdl)
        if form == "plain":
            return linear(y, weight, bias, residual=x, semaphore=next(semaphores), pdl=pdl), None
        return linear_with_partials(
            y, weight, bias, x, semaphore=next(semaphores), reverse_tiles=reverse_tiles, pdl=pdl
        )

    for block in blocks:
        packed = after_norm(eps1, block.qkv_weight, block.qkv_sums, block.qkv_bias)
        out = attn.attention(packed, num_heads, scale, pdl=pdl, **options.of_attention())
        x, partials = before_residual(out, options.out_eps, block.proj_weight, block.proj_bias)
        hidden = after_norm(eps2, block.fc1_weight, block.fc1_sums, block.fc1_bias, activation)
        x, partials = before_residual(hidden, options.hidden_eps, block.fc2_weight, block.fc2_bias)
    return x
