"""Attention forward: per head out = softmax(scale · q kᵀ) v, and the natural-log LSE of every row.

q [B, Nq, C], k and v [B, Nk, C], C = H·D, D = 1 … 256: one packed projection [B, N, 3C] (channels q | k | v, heads
contiguous) or three tensors, any strides, read in place. out [B, Nq, C] contiguous, in the dtype of the input or e4m3;
lse [B, H, Nq]. Scores, softmax, LSE and accumulators are fp32 (float64 for float64, interpreted only); the weights are
rounded to the dtype of v before they meet v. The scale, times log2(e), is applied in fp32 after the dot, and after the
row's largest score is subtracted: 2^(s·scale − m_i·scale) would lose the last digits of large scores.

Two kernels, one-dimensional grids:
  resident   single-pass softmax, for short sequences: a program holds the whole K and V of one (image, head) on chip,
             in power-of-two key chunks (197 keys = 128 + 64 + 16 columns), and takes query blocks in turn. Small
             batches give every head several programs; a row's bits do not depend on how many.
  streaming  online softmax (running maximum m_i, denominator l_i, rescaling by alpha): a program is one query block of
             one (image, head) and takes BLOCK_N keys per step.
The head dimension is cut in power-of-two slices as well (80 = 64 + 16, 112 = 64 + 32 + 16), with one dot and one
accumulator per slice, so that it is padded to the next multiple of 16 only (225 … 240 to 256).

Fuses: split of heads, scale, softmax, merge of heads. Moves 2·B·(Nq + Nk)·C elements and does 4·B·H·Nq·Nk·D FLOP; the
streaming kernel reads K and V once per query block, mostly out of the L2 cache.
On sm_90 and sm_100 heads that are one slice, unpadded, go by TMA where pointers and strides allow it: out and q, and in
the streaming kernel k and v too. The resident kernel loads k and v through pointers, because these loads are all in
flight at once, while descriptor loads outside a loop wait for one another. The arithmetic is the same.
Without LSE (inference) the resident kernel needs 168 registers, not 206 (197 tokens of 64): 3 CTAs per SM, not 2.
Source: softmax over blocks of keys after FlashAttention (Dao et al. 2022, arXiv:2205.14135; 2023, arXiv:2307.08691).
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, launch

_LOG2E = 1.4426950408889634
_MAX_PROGRAMS = 2**31 - 1
_TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_OUT_DTYPE = _TL_DTYPE | {torch.float8_e4m3fn: tl.float8e4nv}


@triton.jit
def _load(
    x, image, head, first, count, stride_b, stride_n, stride_c,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_SLICES: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows first … first + ROWS of one head as one [ROWS, width] tile per head-dim slice, zero outside [count, D]."""
    tiles = ()
    for i in tl.static_range(len(HEAD_SLICES)):
        if TMA:
            tile = x.load([image.to(tl.int32), first, head.to(tl.int32) * D]).reshape(ROWS, D)
        else:
            rows = first + tl.arange(0, ROWS)
            columns = HEAD_SLICES[i][0] + tl.arange(0, HEAD_SLICES[i][1])
            pointers = x + image * stride_b + head * D * stride_c + rows.to(tl.int64)[:, None] * stride_n
            pointers += columns.to(tl.int64)[None, :] * stride_c
            if MASKED:
                tile = tl.load(pointers, mask=(rows < count)[:, None] & (columns < D)[None, :], other=0.0)
            elif HEAD_SLICES[i][0] + HEAD_SLICES[i][1] > D:
                tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
            else:
                tile = tl.load(pointers)
        if UPCAST:
            tile = tile.to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store(
    out, lse_ptr, acc, l_i, m_i, image, head, num_heads, first, count, stride_b, stride_n, stride_c,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_SLICES: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Divides acc by the softmax denominator l_i and stores ROWS rows of one head, and their LSE.

    m_i is the largest score of each row times the scale and log2(e); the natural logarithm is taken here.
    """
    rows = first + tl.arange(0, ROWS)
    inverse = 1.0 / l_i
    for i in tl.static_range(len(HEAD_SLICES)):
        tile = (acc[i] * inverse[:, None]).to(OUT)
        if TMA:
            out.store([image.to(tl.int32), first, head.to(tl.int32) * D], tile.reshape(1, ROWS, D))
        else:
            columns = HEAD_SLICES[i][0] + tl.arange(0, HEAD_SLICES[i][1])
            pointers = out + image * stride_b + head * D * stride_c + rows.to(tl.int64)[:, None] * stride_n
            pointers += columns.to(tl.int64)[None, :] * stride_c
            tl.store(pointers, tile, mask=(rows < count)[:, None] & (columns < D)[None, :])
    if LSE:
        lse = (m_i + tl.log2(l_i)) * 0.6931471805599453
        row_ptr = lse_ptr + (image * num_heads + head) * count
        tl.store(row_ptr + rows, lse, mask=rows < count)


@triton.jit
def _scores(q, k, NEGATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """q kᵀ over all head-dim slices, negated where the scale is negative."""
    s = tl.dot(q[0], k[0].T, input_precision=PRECISION, out_dtype=ACC)
    for i in tl.static_range(1, len(q)):
        s = tl.dot(q[i], k[i].T, s, input_precision=PRECISION, out_dtype=ACC)
    if NEGATIVE:
        s = -s
    return s


@triton.jit
def _accumulate(acc, p, v, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p v for every head-dim slice, p rounded to the dtype of the input."""
    p = p.to(DTYPE).to(v[0].dtype)
    new = ()
    for i in tl.static_range(len(v)):
        new = new + (tl.dot(p, v[i], acc[i], input_precision=PRECISION, out_dtype=ACC),)
    return new


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD_SLICES: tl.constexpr, ACC: tl.constexpr):
    acc = ()
    for i in tl.static_range(len(HEAD_SLICES)):
        acc = acc + (tl.full((ROWS, HEAD_SLICES[i][1]), 0.0, ACC),)
    return acc


@triton.jit
def _attention_fwd_streaming_kernel(
    out_ptr, lse_ptr,  # [B, Nq, H·D], [B, H, Nq]
    q_ptr, k_ptr, v_ptr,  # [B, Nq, H·D], [B, Nk, H·D] twice; pointers, or tensor descriptors with TMA
    num_heads, num_queries, num_keys, scale_log2,
    stride_ob, stride_on, stride_oc, stride_qb, stride_qn, stride_qc,
    stride_kb, stride_kn, stride_kc, stride_vb, stride_vn, stride_vc,
    D: tl.constexpr, HEAD_SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEGATIVE: tl.constexpr, DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch.pdl_wait(PDL)
    blocks = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    pair = pid // blocks
    first_query = (pid - pair * blocks) * BLOCK_M
    image = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    q = _load(
        q_ptr, image, head, first_query, num_queries, stride_qb, stride_qn, stride_qc,
        BLOCK_M, D, HEAD_SLICES, True, TMA, UPCAST,
    )  # fmt: skip
    acc = _zeros(BLOCK_M, HEAD_SLICES, ACC)
    l_i = tl.full((BLOCK_M,), 0.0, ACC)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    for first in range(0, num_keys, BLOCK_N):
        k = _load(
            k_ptr, image, head, first, num_keys, stride_kb, stride_kn, stride_kc,
            BLOCK_N, D, HEAD_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        s = _scores(q, k, NEGATIVE, ACC, PRECISION)
        s = tl.where((first + tl.arange(0, BLOCK_N) < num_keys)[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - shift[:, None]) * scale_log2)
        alpha = tl.exp2((m_i - shift) * scale_log2)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        rescaled = ()
        for i in tl.static_range(len(HEAD_SLICES)):
            rescaled = rescaled + (acc[i] * alpha[:, None],)
        v = _load(
            v_ptr, image, head, first, num_keys, stride_vb, stride_vn, stride_vc,
            BLOCK_N, D, HEAD_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        acc = _accumulate(rescaled, p, v, DTYPE, ACC, PRECISION)
    _store(
        out_ptr, lse_ptr, acc, l_i, m_i * scale_log2, image, head, num_heads, first_query, num_queries,
        stride_ob, stride_on, stride_oc, BLOCK_M, D, HEAD_SLICES, TMA, OUT, LSE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs_per_head", "blocks_per_program"])
def _attention_fwd_resident_kernel(
    out_ptr, lse_ptr,  # [B, Nq, H·D], [B, H, Nq]
    q_ptr, k_ptr, v_ptr,  # [B, Nq, H·D], [B, Nk, H·D] twice; with TMA out and q are tensor descriptors
    num_heads, num_queries, num_keys, scale_log2, programs_per_head, blocks_per_program,
    stride_ob, stride_on, stride_oc, stride_qb, stride_qn, stride_qc,
    stride_kb, stride_kn, stride_kc, stride_vb, stride_vn, stride_vc,
    D: tl.constexpr, HEAD_SLICES: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
    NEGATIVE: tl.constexpr, DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch.pdl_wait(PDL)
    LAST: tl.constexpr = len(CHUNKS) - 1
    pid = tl.program_id(0)
    pair = pid // programs_per_head
    begin = (pid - pair * programs_per_head) * blocks_per_program * BLOCK_M
    end = tl.minimum(begin + blocks_per_program * BLOCK_M, num_queries)
    image = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    k = ()
    v = ()
    for j in tl.static_range(len(CHUNKS)):
        keys = _load(
            k_ptr, image, head, CHUNKS[j][0], num_keys, stride_kb, stride_kn, stride_kc,
            CHUNKS[j][1], D, HEAD_SLICES, j == LAST, False, UPCAST,
        )  # fmt: skip
        values = _load(
            v_ptr, image, head, CHUNKS[j][0], num_keys, stride_vb, stride_vn, stride_vc,
            CHUNKS[j][1], D, HEAD_SLICES, j == LAST, False, UPCAST,
        )  # fmt: skip
        k = k + (keys,)
        v = v + (values,)
    live = (CHUNKS[LAST][0] + tl.arange(0, CHUNKS[LAST][1]) < num_keys)[None, :]
    for first_query in range(begin, end, BLOCK_M):
        q = _load(
            q_ptr, image, head, first_query, num_queries, stride_qb, stride_qn, stride_qc,
            BLOCK_M, D, HEAD_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        s = ()
        m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
        for j in tl.static_range(len(CHUNKS)):
            chunk = _scores(q, k[j], NEGATIVE, ACC, PRECISION)
            if j == LAST:
                chunk = tl.where(live, chunk, float("-inf"))
            s = s + (chunk,)
            m_i = tl.maximum(m_i, tl.max(chunk, 1))
        shift = tl.where(m_i == float("-inf"), 0.0, m_i)
        acc = _zeros(BLOCK_M, HEAD_SLICES, ACC)
        l_i = tl.full((BLOCK_M,), 0.0, ACC)
        for j in tl.static_range(len(CHUNKS)):
            p = tl.exp2((s[j] - shift[:, None]) * scale_log2)
            l_i += tl.sum(p, 1)
            acc = _accumulate(acc, p, v[j], DTYPE, ACC, PRECISION)
        _store(
            out_ptr, lse_ptr, acc, l_i, m_i * scale_log2, image, head, num_heads, first_query, num_queries,
            stride_ob, stride_on, stride_oc, BLOCK_M, D, HEAD_SLICES, TMA, OUT, LSE,
        )  # fmt: skip


@cache
def _head_slices(head_size):
    """The head-dim slices as (first column, width), powers of two from 16 up, at most three: 80 → (0, 64), (64, 16)."""
    width = max(16, configs.cdiv(head_size, 16) * 16)
    width = 256 if width == 240 else width
    slices, first = [], 0
    for size in (256, 128, 64, 32, 16):
        if width & size:
            slices.append((first, size))
            first += size
    return tuple(slices)


@cache
def _key_chunks(num_keys):
    """The keys as (first, width) of powers of two, at most 128 wide: 197 → (0, 128), (128, 64), (192, 16)."""
    chunks, first = [], 0
    while first < num_keys:
        left = configs.cdiv(num_keys - first, 16) * 16
        width = min(128, 1 << (left.bit_length() - 1))
        if len(chunks) == 2:
            width = configs.power_of_two(left)
        chunks.append((first, width))
        first += width
    return tuple(chunks)


def _tma_compatible(x, slices, head_size):
    """Can [B, N, C] be a tensor descriptor: the head in one slice without padding, 16-byte steps, no overlap?"""
    image, row, column = x.stride()
    aligned = launch.vector_bytes(x, image, row) == 16
    return slices == ((0, head_size),) and column == 1 and aligned and min(image, row) > 0


def not_supported_reasons(
    qkv: Tensor, num_heads: int, *, k: Tensor | None = None, v: Tensor | None = None, **options: Any
) -> list[str]:
    """Why these kernels cannot take the arguments; an empty list where they can. The batch size plays no part."""
    reasons = [f"{name} is not fused" for name in options]
    head_size = qkv.shape[2] // (num_heads * 3 if k is None else num_heads)
    if head_size > 256:
        reasons.append(f"head size {head_size} is above 256")
    if qkv.dtype not in _TL_DTYPE:
        reasons.append(f"dtype {qkv.dtype} is not a floating-point type the kernel knows")
    return reasons + launch.device_reasons(qkv)


def _descriptor(x, rows, head_size):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, head_size])


def _launch(out, lse, q, k, v, num_heads, scale, precision, config, pdl):
    batch, num_queries, width = q.shape
    num_keys, head_size = k.shape[1], width // num_heads
    resident, slices = config.block_n == 0, _head_slices(head_size)
    tensors = (out, q) if resident else (out, q, k, v)
    tma = config.tma and all(_tma_compatible(x, slices, head_size) for x in tensors)
    if tma:
        rows = (config.block_m, config.block_m, config.block_n, config.block_n)
        tensors = tuple(_descriptor(x, count, head_size) for x, count in zip(tensors, rows))
    # Zero would make NaN of the −inf of masked keys; the smallest normal number leaves finite scores at zero.
    scale_log2 = max(abs(scale) * _LOG2E, 2.0**-126)
    sizes = (num_heads, num_queries, num_keys, scale_log2)
    strides = [stride for x in (out, q, k, v) for stride in x.stride()]
    options = dict(
        D=head_size, HEAD_SLICES=slices, BLOCK_M=config.block_m, NEGATIVE=scale < 0, DTYPE=_TL_DTYPE[q.dtype],
        OUT=_OUT_DTYPE[out.dtype], ACC=launch.accumulator(q.dtype), PRECISION=precision,
        UPCAST=launch.INTERPRETED and q.dtype == torch.bfloat16, TMA=tma, LSE=lse is not None,
        **launch.options(pdl, config.num_warps, num_stages=config.num_stages),
    )  # fmt: skip
    blocks, pairs = configs.cdiv(num_queries, config.block_m), batch * num_heads
    with launch.device_guard(q):
        if resident:
            out_arg, q_arg = tensors
            wanted = configs.cdiv(2 * configs.multiprocessors_of(q.device), pairs)
            blocks_per_program = configs.cdiv(blocks, min(wanted, blocks))
            programs = configs.cdiv(blocks, blocks_per_program)
            _attention_fwd_resident_kernel[(pairs * programs,)](
                out_arg, lse, q_arg, k, v, *sizes, programs, blocks_per_program, *strides,
                CHUNKS=_key_chunks(num_keys), **options,
            )  # fmt: skip
        else:
            out_arg, q_arg, k_arg, v_arg = tensors
            _attention_fwd_streaming_kernel[(pairs * blocks,)](
                out_arg, lse, q_arg, k_arg, v_arg, *sizes, *strides, BLOCK_N=config.block_n, **options
            )


def _forward(qkv, num_heads, scale, k, v, config, with_lse, out_dtype=None, pdl=False):
    q, k, v = qkv.chunk(3, dim=2) if k is None else (qkv, k, v)
    batch, num_queries, width = q.shape
    out = torch.empty(batch, num_queries, width, dtype=out_dtype or q.dtype, device=q.device)
    lse = None
    if with_lse:
        lse = torch.empty(batch, num_heads, num_queries, dtype=launch.stat_dtype(q.dtype), device=q.device)
    if out.numel() == 0:
        return out, lse
    precision = launch.dot_precision()
    if config is None:
        arch, head_size = configs.arch_of(q.device), width // num_heads
        tf32, fp8_out = precision == "tf32", out.dtype != q.dtype
        config = configs.pick_attention_config(num_queries, k.shape[1], head_size, q.dtype, tf32, arch, fp8_out)
    images = max(1, _MAX_PROGRAMS // (num_heads * configs.cdiv(num_queries, config.block_m)))
    if batch <= images:
        _launch(out, lse, q, k, v, num_heads, scale, precision, config, pdl)
    else:
        for first in range(0, batch, images):
            part = slice(first, first + images)
            lse_part = lse[part] if with_lse else None
            parts = (out[part], lse_part, q[part], k[part], v[part])
            _launch(*parts, num_heads, scale, precision, config, pdl)
    return out, lse


def attention_fwd(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    config: configs.AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Nq, C], lse [B, H, Nq]); ``config`` forces an ``AttentionConfig``."""
    return _forward(qkv, num_heads, scale, k, v, config, with_lse=True)


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ) v per head: packed [B, N, 3C], or q [B, Nq, C] with k, v [B, Nk, C], to [B, Nq, C].

    ``out_dtype``: the input's, or float8 e4m3, whose largest number is 448 (v is scaled to it, see ``fp8_blocks``).
    """
    return _forward(qkv, num_heads, scale, k, v, None, False, out_dtype, pdl)[0]
