"""Patch embedding: out = [prefix | conv(images, weight, stride) + bias + pos_embed], an implicit GEMM.

images [B, in, H, W], any strides, uint8 or any float dtype; weight [C, in, P, Q]; bias [C]; pos_embed [1, N, C] (patch
rows only); prefix_tokens [1 or B, K, C], written as they stand; out [B, K + N, C] contiguous, in the weight's dtype,
N = gh·gw, gh = (H − P) // stride[0] + 1. Pixels are cast to the weight's dtype; products are accumulated in float32
(float64 for float64, interpreted only), bias and pos_embed are added there, and the sum is rounded once.
mean and std: a pixel x becomes (x − mean)/std, of uint8 (x/255 − mean)/std, in float32 before that cast. Folding them
into the weight instead would cost a pass over the weight per call, and rounds raw pixels where they are wider than the
weight; a caller that has folded them already passes uint8 pixels with std = 1/255, and pixels are only cast.

Row m of the GEMM is a patch (b, gy, gx), column k of its left side the pixel (c, i, j) of that patch, found by index
arithmetic: no im2col in memory, patches may overlap (stride < P) or leave gaps. Images whose channels lie innermost are
walked as (i, j, c), so that neighbouring k are neighbouring bytes.
One program computes a BLOCK_M × BLOCK_N tile of patch rows over all of k; tiles of the same images follow each other.
Programs after the last tile copy BLOCK_M × BLOCK_N tiles of the prefix rows.
Grid: ceil(B·N / BLOCK_M)·ceil(C / BLOCK_N) + ceil(B·K / BLOCK_M)·ceil(C / BLOCK_N).
2·B·N·C·in·P·Q FLOP; reads the images (once from memory, C / BLOCK_N times from L2), writes B·(K + N)·C elements.

The weight is copied where its k axis is not contiguous in the order of the walk, and images are converted first where
a float32 weight meets other pixels: for sm_100 Triton compiles an IEEE float32 dot to TF32 if it sees that an operand
was widened from fewer bits.
Limits: float64 weights in the interpreter only.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .arguments import check_rows


@triton.jit(do_not_specialize=["rows", "tokens", "grid_w", "prefix_rows"])
def _patch_embed_fwd_kernel(
    out_ptr,  # [B, K + N, C] contiguous
    images_ptr,  # [B, in, H, W]
    weight_ptr,  # [C, in·P·Q], k contiguous
    bias_ptr,  # [C] or None
    pos_ptr,  # [1, N, C] or None
    prefix_ptr,  # [1 or B, K, C] or None
    pixel_ptr,  # [2, in]: what is subtracted from a channel and what multiplies it then, or None
    rows,  # B·N
    tokens,  # N
    grid_w,
    prefix_rows,  # B·K
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_bias,
    stride_pn,
    stride_pc,
    stride_xb,  # 0 where one prefix serves every image
    stride_xn,
    stride_xc,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SIZE: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_M).to(tl.int64) * COLUMN_TILES
    n = program % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = n < WIDTH

    if program < tiles:
        m = program // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = m < rows
        image = m // tokens
        token = m - image * tokens
        grid_y = token // grid_w
        grid_x = token - grid_y * grid_w
        corner = images_ptr + (image * stride_ib + grid_y * STEP_H * stride_ih + grid_x * STEP_W * stride_iw)[:, None]
        filters = weight_ptr + (n * STRIDE_WN)[None, :]

        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for start in range(0, SIZE, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            if CHANNELS_INNER:
                channel = k % CHANNELS
                pixel = k // (CHANNELS * PATCH_W) * stride_ih + k % (CHANNELS * PATCH_W)
            else:
                channel = k // (PATCH_H * PATCH_W)
                pixel = channel * stride_ic + k // PATCH_W % PATCH_H * stride_ih + k % PATCH_W * stride_iw
            if SIZE % BLOCK_K == 0:
                x = tl.load(corner + pixel[None, :], mask=in_rows[:, None], other=0)
                w = tl.load(filters + k[:, None], mask=in_width[None, :], other=0.0)
            else:
                in_size = k < SIZE
                x = tl.load(corner + pixel[None, :], mask=in_rows[:, None] & in_size[None, :], other=0)
                w = tl.load(filters + k[:, None], mask=in_width[None, :] & in_size[:, None], other=0.0)
            if pixel_ptr is not None:
                shift = tl.load(pixel_ptr + channel, mask=k < SIZE, other=0.0)
                scale = tl.load(pixel_ptr + CHANNELS + channel, mask=k < SIZE, other=0.0)
                x = (x.to(ACC) - shift[None, :]) * scale[None, :]
            x = x.to(DTYPE)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)

        mask = in_rows[:, None] & in_width[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n * stride_bias, mask=in_width, other=0.0).to(ACC)[None, :]
        if pos_ptr is not None:
            pos = pos_ptr + (token * stride_pn)[:, None] + (n * stride_pc)[None, :]
            acc += tl.load(pos, mask=mask, other=0.0).to(ACC)
        out = out_ptr + ((image * (PREFIX + tokens) + PREFIX + token) * WIDTH)[:, None] + n[None, :]
        tl.store(out, acc.to(DTYPE), mask=mask)
    elif PREFIX > 0:
        m = (program - tiles) // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        image = m // PREFIX
        token = m - image * PREFIX
        mask = (m < prefix_rows)[:, None] & in_width[None, :]
        prefix = prefix_ptr + (image * stride_xb + token * stride_xn)[:, None] + (n * stride_xc)[None, :]
        out = out_ptr + ((image * (PREFIX + tokens) + token) * WIDTH)[:, None] + n[None, :]
        tl.store(out, tl.load(prefix, mask=mask, other=0.0).to(DTYPE), mask=mask)


def not_supported_reasons(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[str]:
    """Why the kernel cannot take the arguments; an empty list where it can. The batch size plays no part."""
    return launch.device_reasons(weight)


@functools.lru_cache(maxsize=64)
def _pixel_table(channels, mean, std, unit, dtype, device):
    """[2, in]: shift and scale with (x/unit − mean)/std = (x − shift)·scale; None for the identity. Cached,
    because a copy from the host cannot be captured in a CUDA graph."""
    shift = [value * unit for value in mean or [0.0] * channels]
    scale = [1.0 / (value * unit) for value in std or [1.0] * channels]
    if set(shift) == {0.0} and set(scale) == {1.0}:
        return None
    return torch.tensor([shift, scale], dtype=dtype, device=device)


def _flat_weight(weight, channels_inner):
    """weight as [C, in·P·Q] with its k axis contiguous, a view where its strides allow it."""
    flat = (weight.permute(0, 2, 3, 1) if channels_inner else weight).reshape(weight.shape[0], -1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    config: configs.PatchEmbedConfig | None = None,
) -> Tensor:
    """[B, in, H, W] to [B, K + N, C] in the weight's dtype; ``stride`` is a pair, ``config`` forces the tiles."""
    batch, channels, height, width = images.shape
    dim, _, patch_h, patch_w = weight.shape
    grid_w = (width - patch_w) // stride[1] + 1
    tokens = ((height - patch_h) // stride[0] + 1) * grid_w
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    check_rows("patch_embed", batch * tokens)
    out = torch.empty(batch, prefix + tokens, dim, dtype=weight.dtype, device=images.device)
    if out.numel() == 0:
        return out
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    mean, std = (None if values is None else tuple(map(float, values)) for values in (mean, std))
    table = _pixel_table(channels, mean, std, unit, launch.stat_dtype(weight.dtype), images.device)
    if weight.dtype == torch.float32:
        images = images.to(torch.float32)
    channels_inner = channels > 1 and images.stride(1) == 1 and images.stride(3) == channels
    weight = _flat_weight(weight, channels_inner)
    rows, precision = batch * tokens, launch.dot_precision()
    if config is None:
        config = configs.pick_patch_embed_config(rows, dim, weight.dtype, precision)
    row_tiles = configs.cdiv(rows, config.block_m) + configs.cdiv(batch * prefix, config.block_m)
    pos_strides = (0, 0) if pos_embed is None else pos_embed.stride()[1:]
    prefix_strides = (0, 0, 0)
    if prefix:
        prefix_strides = prefix_tokens.stride() if prefix_tokens.shape[0] > 1 else (0, *prefix_tokens.stride()[1:])
    with launch.device_guard(images):
        _patch_embed_fwd_kernel[(row_tiles * configs.cdiv(dim, config.block_n),)](
            out,
            images,
            weight,
            bias,
            pos_embed,
            prefix_tokens if prefix else None,
            table,
            rows,
            tokens,
            grid_w,
            batch * prefix,
            *images.stride(),
            0 if bias is None else bias.stride(0),
            *pos_strides,
            *prefix_strides,
            WIDTH=dim,
            PREFIX=prefix,
            CHANNELS=channels,
            PATCH_H=patch_h,
            PATCH_W=patch_w,
            STEP_H=stride[0],
            STEP_W=stride[1],
            STRIDE_WN=weight.stride(0),
            CHANNELS_INNER=channels_inner,
            ACC=launch.accumulator(weight.dtype),
            PRECISION=precision,
            UPCAST=launch.INTERPRETED and weight.dtype == torch.bfloat16,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
