"""Attention forward: per head out = softmax(scale · q kᵀ) v, and the natural-log LSE of every row.

q [B, Nq, C], k and v [B, Nk, C], C = H·D, D = 1 … 256: one packed projection [B, N, 3C] (channels q | k | v, heads
contiguous) or three tensors, any strides, read in place. out [B, Nq, C] contiguous, in the dtype of the input or e4m3;
lse [B, H, Nq]. Scores, softmax, LSE and accumulators are fp32 (float64 for float64, interpreted only); the weights are
rounded to the dtype of v before they meet v. The scale, times log2(e), is applied in fp32 after the dot, and after the
row's largest score is subtracted: 2^(s·scale − m_i·scale) would lose the last digits of large scores.

Options, all in the streaming kernel, each compiled in only where it is given:
  q_norm, k_norm     LayerNorm or RMSNorm of each head as it is loaded, statistics in fp32
  rope               rotary embedding after them: x·cos + rotate(x)·sin, the partner of each channel loaded beside it,
                     in fp32, rounded to the dtype of q after it. A query block turns every key block again.
  bias, rel_pos      added to the scaled scores in fp32; tables are read at any strides, 0 where they broadcast
  key_lengths        the keys of an image end there, and so does its loop; a query without keys gives zeros
  cu_seqlens         packed sequences: a program is a query block of one (sequence, head), found by a search over
                     cu_seqlens, so that the bits of a sequence do not depend on the others
  v of another head size than q

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

import math
from functools import cache
from typing import Any, NamedTuple

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


class Dropout(NamedTuple):
    """Dropout of the probabilities: those whose number is p or less are dropped, the others scaled by 1/(1 − p)."""

    seed_ptr: Any  # int64 [1]
    p: float
    scale: float
    first_image: int  # of the launch


def dropout_of(p: float, seed: Tensor | None, first_image: int = 0) -> Dropout | None:
    return Dropout(seed, p, 1.0 / (1.0 - p), first_image) if p else None


class Table(NamedTuple):
    """A tensor broadcast to [B, H, rows, columns]."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_n: int
    stride_c: int


class HeadNorm(NamedTuple):
    """The norm of each head of q or k: vectors [D], contiguous or None. There is none where eps is None."""

    weight_ptr: Any = None
    bias_ptr: Any = None
    eps: float | None = None


@triton.jit
def _kept(dropout, image, head, query, key, num_heads, num_queries, num_keys):
    """The mask of ``reference.dropout_mask``: Philox of the linear index in [B, H, Nq, Nk]; image is int64."""
    index = ((image + dropout.first_image) * num_heads + head) * num_queries + query
    return tl.rand(tl.load(dropout.seed_ptr), index * num_keys + key) > dropout.p


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
def _normal(pointers, columns, inside, mean, rstd, norm, D: tl.constexpr):
    """Columns of a head at ``pointers`` in fp32, normalised; zero outside."""
    tile = tl.load(pointers, mask=inside, other=0.0).to(mean.dtype)
    if norm.eps is not None:
        tile = (tile - mean[:, None]) * rstd[:, None]
        if norm.weight_ptr is not None:
            tile *= tl.load(norm.weight_ptr + columns, mask=columns < D, other=0.0).to(mean.dtype)[None, :]
        if norm.bias_ptr is not None:
            tile += tl.load(norm.bias_ptr + columns, mask=columns < D, other=0.0).to(mean.dtype)[None, :]
        tile = tl.where(inside, tile, 0.0)
    return tile


@triton.jit
def _table(table, image, head, rows, columns, mask, other: tl.constexpr, ACC: tl.constexpr):
    """A tile of a ``Table``; rows and columns are int64 tiles that broadcast against each other."""
    pointers = table.ptr + image * table.stride_b + head * table.stride_h
    pointers += rows * table.stride_n + columns * table.stride_c
    return tl.load(pointers, mask=mask, other=other).to(ACC)


@triton.jit
def _load_changed(
    x, image, head, first, count, stride_b, stride_n, stride_c, norm, cos, sin, num_prefix, origin,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_SLICES: tl.constexpr, UPCAST: tl.constexpr,
    INTERLEAVED: tl.constexpr, RMS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of a head normalised, then turned by rope. Row 0 is token ``origin`` of the tables."""
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    live = (rows < count)[:, None]
    base = x + image * stride_b + head * D * stride_c + rows[:, None] * stride_n
    mean = tl.full((ROWS,), 0.0, ACC)
    rstd = mean
    if norm.eps is not None:
        if not RMS:
            for i in tl.static_range(len(HEAD_SLICES)):
                columns = (HEAD_SLICES[i][0] + tl.arange(0, HEAD_SLICES[i][1])).to(tl.int64)[None, :]
                mean += tl.sum(tl.load(base + columns * stride_c, mask=live & (columns < D), other=0.0).to(ACC), 1)
            mean = mean / D
        for i in tl.static_range(len(HEAD_SLICES)):
            columns = (HEAD_SLICES[i][0] + tl.arange(0, HEAD_SLICES[i][1])).to(tl.int64)[None, :]
            inside = live & (columns < D)
            centred = tl.load(base + columns * stride_c, mask=inside, other=0.0).to(ACC) - mean[:, None]
            centred = tl.where(inside, centred, 0.0)
            rstd += tl.sum(centred * centred, 1)
        rstd = tl.rsqrt(rstd / D + norm.eps)
    tiles = ()
    for i in tl.static_range(len(HEAD_SLICES)):
        columns = (HEAD_SLICES[i][0] + tl.arange(0, HEAD_SLICES[i][1])).to(tl.int64)
        inside = live & (columns < D)[None, :]
        tile = _normal(base + columns[None, :] * stride_c, columns, inside, mean, rstd, norm, D)
        if cos is not None:
            if INTERLEAVED:
                second = columns % 2 == 1
                partner = tl.where(second, columns - 1, columns + 1)
            else:
                second = columns >= D // 2
                partner = tl.where(second, columns - D // 2, columns + D // 2)
            other = _normal(base + partner[None, :] * stride_c, partner, inside, mean, rstd, norm, D)
            row = (rows + origin - num_prefix)[:, None]
            turned = inside & (row >= 0)
            sine = _table(sin, image, head, row, columns[None, :], turned, 0.0, ACC)
            cosine = _table(cos, image, head, row, columns[None, :], turned, 1.0, ACC)
            tile = tile * cosine + other * tl.where(second[None, :], sine, -sine)
        tile = tile.to(DTYPE)
        if UPCAST:
            tile = tile.to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _load_head(
    x, image, head, first, count, stride_b, stride_n, stride_c, norm, cos, sin, num_prefix, origin,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_SLICES: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    INTERLEAVED: tl.constexpr, RMS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_load`` of q or k, with the options that act on them."""
    if norm.eps is None and cos is None:
        tiles = _load(
            x, image, head, first, count, stride_b, stride_n, stride_c, ROWS, D, HEAD_SLICES, True, TMA, UPCAST
        )
    else:
        tiles = _load_changed(
            x, image, head, first, count, stride_b, stride_n, stride_c, norm, cos, sin, num_prefix, origin,
            ROWS, D, HEAD_SLICES, UPCAST, INTERLEAVED, RMS, DTYPE, ACC,
        )  # fmt: skip
    return tiles


@triton.jit
def _add_to_scores(
    s, image, head, query, key, num_queries, num_keys, scale, bias, height, width, key_columns, ACC: tl.constexpr
):
    """scale · s + bias + height + width for the tile of scores of some queries and keys."""
    s = s * scale
    query, key = query.to(tl.int64)[:, None], key.to(tl.int64)[None, :]
    inside = (query < num_queries) & (key < num_keys)
    if bias is not None:
        s += _table(bias, image, head, query, key, inside, 0.0, ACC)
    if height is not None:
        s += _table(height, image, head, query, key // key_columns, inside, 0.0, ACC)
        s += _table(width, image, head, query, key % key_columns, inside, 0.0, ACC)
    return s


@triton.jit
def _sequence_of_slot(cu_seqlens_ptr, slot, num_sequences, BLOCK_M: tl.constexpr):
    """The sequence whose query block has a number, and that of its first block.

    Sequence s has the numbers from cu_seqlens[s] // BLOCK_M + s on, one or more than it needs.
    """
    low = slot * 0
    high = low + num_sequences
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + middle) // BLOCK_M + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, tl.load(cu_seqlens_ptr + low) // BLOCK_M + low


@triton.jit
def _store(
    out, lse_ptr, acc, l_i, m_i, image, head, first, count, stride_b, stride_n, stride_c,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_SLICES: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    LSE: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """Divides acc by the softmax denominator l_i and stores ROWS rows of one head, and their LSE.

    lse_ptr leads to the first row of the head. m_i is the largest score of each row times the scale and log2(e); the
    natural logarithm is taken here. With MASKS a row may have no key: its denominator is zero, and so is its output.
    """
    rows = first + tl.arange(0, ROWS)
    denominator = l_i
    if MASKS:
        denominator = tl.where(l_i == 0.0, 1.0, l_i)
    inverse = 1.0 / denominator
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
        tl.store(lse_ptr + rows, lse, mask=rows < count)


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
def _scaled(tiles, factor):
    new = ()
    for i in tl.static_range(len(tiles)):
        new = new + (tiles[i] * factor,)
    return new


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD_SLICES: tl.constexpr, ACC: tl.constexpr):
    acc = ()
    for i in tl.static_range(len(HEAD_SLICES)):
        acc = acc + (tl.full((ROWS, HEAD_SLICES[i][1]), 0.0, ACC),)
    return acc


@triton.jit
def _attention_fwd_streaming_kernel(
    out_ptr, lse_ptr,  # [B, Nq, H·DV], [B, H, Nq]
    q_ptr, k_ptr, v_ptr,  # [B, Nq, H·D], [B, Nk, H·D], [B, Nk, H·DV]; pointers, or tensor descriptors with TMA
    q_norm, k_norm, cos, sin, bias, height, width,  # HeadNorm twice; Table, or None, five times
    key_lengths_ptr, cu_seqlens_ptr, dropout,  # [B], [sequences + 1], Dropout, or None
    num_heads, num_queries, num_keys, scale_log2, scale, num_prefix, key_columns, num_sequences,  # last four: or None
    stride_ob, stride_on, stride_oc, stride_qb, stride_qn, stride_qc,
    stride_kb, stride_kn, stride_kc, stride_vb, stride_vn, stride_vc,
    D: tl.constexpr, DV: tl.constexpr, HEAD_SLICES: tl.constexpr, VALUE_SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NEGATIVE: tl.constexpr, INTERLEAVED: tl.constexpr, RMS: tl.constexpr, MASKS: tl.constexpr,
    DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch.pdl_wait(PDL)
    blocks = tl.cdiv(num_queries, BLOCK_M)
    if cu_seqlens_ptr is not None:
        blocks = num_queries // BLOCK_M + num_sequences
    pid = tl.program_id(0)
    pair = pid // blocks
    first_query = (pid - pair * blocks) * BLOCK_M
    image = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    if LSE:
        lse_ptr += (image * num_heads + head) * num_queries
    origin = 0
    all_queries, all_keys = num_queries, num_keys
    if cu_seqlens_ptr is not None:
        slot = pid - pair * blocks
        sequence, first_slot = _sequence_of_slot(cu_seqlens_ptr, slot, num_sequences, BLOCK_M)
        origin = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_keys)
        num_queries = (end - origin).to(tl.int32)
        first_query = (slot - first_slot) * BLOCK_M
        num_keys = tl.where(first_query < num_queries, num_queries, 0)
        out_ptr += origin * stride_on
        q_ptr += origin * stride_qn
        k_ptr += origin * stride_kn
        v_ptr += origin * stride_vn
        if LSE:
            lse_ptr += origin
    if key_lengths_ptr is not None:
        length = tl.load(key_lengths_ptr + image)
        num_keys = tl.maximum(tl.minimum(length, num_keys), 0).to(tl.int32)
    q = _load_head(
        q_ptr, image, head, first_query, num_queries, stride_qb, stride_qn, stride_qc, q_norm, cos, sin, num_prefix,
        origin, BLOCK_M, D, HEAD_SLICES, TMA, UPCAST, INTERLEAVED, RMS, DTYPE, ACC,
    )  # fmt: skip
    acc = _zeros(BLOCK_M, VALUE_SLICES, ACC)
    l_i = tl.full((BLOCK_M,), 0.0, ACC)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    for first in range(0, num_keys, BLOCK_N):
        k = _load_head(
            k_ptr, image, head, first, num_keys, stride_kb, stride_kn, stride_kc, k_norm, cos, sin, num_prefix,
            origin, BLOCK_N, D, HEAD_SLICES, TMA, UPCAST, INTERLEAVED, RMS, DTYPE, ACC,
        )  # fmt: skip
        s = _scores(q, k, NEGATIVE, ACC, PRECISION)
        if scale is not None:
            query, key = first_query + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
            s = _add_to_scores(
                s, image, head, query, key, num_queries, num_keys, scale, bias, height, width, key_columns, ACC
            )
        s = tl.where((first + tl.arange(0, BLOCK_N) < num_keys)[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - shift[:, None]) * scale_log2)
        alpha = tl.exp2((m_i - shift) * scale_log2)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        rescaled = ()
        for i in tl.static_range(len(VALUE_SLICES)):
            rescaled = rescaled + (acc[i] * alpha[:, None],)
        v = _load(
            v_ptr, image, head, first, num_keys, stride_vb, stride_vn, stride_vc,
            BLOCK_N, DV, VALUE_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        if dropout is not None:
            query = (origin + first_query + tl.arange(0, BLOCK_M))[:, None]
            key = (origin + first + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where(_kept(dropout, image, head, query, key, num_heads, all_queries, all_keys), p, 0.0)
        acc = _accumulate(rescaled, p, v, DTYPE, ACC, PRECISION)
    if dropout is not None:
        acc = _scaled(acc, dropout.scale)
    _store(
        out_ptr, lse_ptr, acc, l_i, m_i * scale_log2, image, head, first_query, num_queries,
        stride_ob, stride_on, stride_oc, BLOCK_M, DV, VALUE_SLICES, TMA, OUT, LSE, MASKS,
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
    if LSE:
        lse_ptr += (image * num_heads + head) * num_queries
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
            out_ptr, lse_ptr, acc, l_i, m_i * scale_log2, image, head, first_query, num_queries,
            stride_ob, stride_on, stride_oc, BLOCK_M, D, HEAD_SLICES, TMA, OUT, LSE, False,
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
    reasons = []
    head_size = qkv.shape[2] // (num_heads * 3 if k is None else num_heads)
    value_size = head_size if v is None else v.shape[2] // num_heads
    if max(head_size, value_size) > 256:
        reasons.append(f"head size {max(head_size, value_size)} is above 256")
    if qkv.dtype not in _TL_DTYPE:
        reasons.append(f"dtype {qkv.dtype} is not a floating-point type the kernel knows")
    return reasons + launch.device_reasons(qkv)


class _Options(NamedTuple):
    """The options of a call as its launches take them; what is shared is broadcast."""

    bias: Tensor | None = None  # [B, H, Nq, Nk]
    height: Tensor | None = None  # [B, H, Nq, h]
    width: Tensor | None = None  # [B, H, Nq, w]
    cos: Tensor | None = None  # [B, H, N − num_prefix, D]
    sin: Tensor | None = None
    key_lengths: Tensor | None = None  # [B]
    cu_seqlens: Tensor | None = None
    q_norm: HeadNorm = HeadNorm()
    k_norm: HeadNorm = HeadNorm()
    num_prefix: int = 0
    interleaved: bool = False
    rms: bool = False
    dropout: Dropout | None = None

    def loads_by_pointer(self) -> bool:
        """Whether q, k and v must be loaded through pointers: descriptors load neither partners nor up to a length."""
        given = (self.cos, self.key_lengths, self.cu_seqlens, self.q_norm.eps, self.k_norm.eps)
        return any(option is not None for option in given)

    def of_images(self, part: slice) -> "_Options":
        tensors = {
            name: getattr(self, name)[part]
            for name in ("bias", "height", "width", "cos", "sin", "key_lengths")
            if getattr(self, name) is not None
        }
        dropout = None if self.dropout is None else self.dropout._replace(first_image=part.start)
        return self._replace(**tensors, dropout=dropout)


_NO_OPTIONS = _Options()


def _read_options(
    q, num_heads, num_keys, *, bias=None, rel_pos=None, key_lengths=None, cu_seqlens=None, rope=None,
    rope_layout="half", num_prefix=0, q_norm=None, k_norm=None, norm="layer",
):  # fmt: skip
    batch, num_queries, width = q.shape
    heads, head_size = (batch, num_heads), width // num_heads
    cos = sin = rows = columns = None
    if rel_pos is not None:
        rows, columns = rel_pos
    if rope is not None:
        cos, sin = (table.expand(*heads, num_queries - num_prefix, head_size) for table in rope)
    q_norm, k_norm = (
        HeadNorm() if of is None else HeadNorm(launch.vector(of[0]), launch.vector(of[1]), of[2])
        for of in (q_norm, k_norm)
    )
    return _Options(
        None if bias is None else bias.expand(*heads, num_queries, num_keys), rows, columns, cos, sin,
        launch.vector(key_lengths), launch.vector(cu_seqlens), q_norm, k_norm, num_prefix,
        rope_layout == "interleaved", norm == "rms",
    )  # fmt: skip


def _as_table(t):
    return None if t is None else Table(t, *t.stride())


def _descriptor(x, rows, head_size):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, head_size])


def _launch(out, lse, q, k, v, num_heads, scale, precision, config, pdl, options):
    batch, num_queries, width = q.shape
    num_keys, head_size, value_size = k.shape[1], width // num_heads, v.shape[2] // num_heads
    resident, slices, value_slices = config.block_n == 0, _head_slices(head_size), _head_slices(value_size)
    tensors = (out, q) if resident else (out, q, k, v)
    tma = config.tma and value_size == head_size and not options.loads_by_pointer()
    tma = tma and all(_tma_compatible(x, slices, head_size) for x in tensors)
    if tma:
        rows = (config.block_m, config.block_m, config.block_n, config.block_n)
        tensors = tuple(_descriptor(x, count, head_size) for x, count in zip(tensors, rows))
    # Zero would make NaN of the −inf of masked keys; the smallest normal number leaves finite scores at zero.
    scale_log2 = max(abs(scale) * _LOG2E, 2.0**-126)
    strides = [stride for x in (out, q, k, v) for stride in x.stride()]
    constants = dict(
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
                out_arg, lse, q_arg, k, v, num_heads, num_queries, num_keys, scale_log2, programs, blocks_per_program,
                *strides, CHUNKS=_key_chunks(num_keys), **constants,
            )  # fmt: skip
        else:
            out_arg, q_arg, k_arg, v_arg = tensors
            o, factor, key_columns, num_sequences = options, None, None, None
            if o.bias is not None or o.height is not None:
                scale_log2, factor = _LOG2E, abs(scale)
            if o.height is not None:
                key_columns = o.width.shape[3]
            if o.cu_seqlens is not None:
                num_sequences = o.cu_seqlens.shape[0] - 1
                blocks = num_queries // config.block_m + num_sequences
            _attention_fwd_streaming_kernel[(pairs * blocks,)](
                out_arg, lse, q_arg, k_arg, v_arg, o.q_norm, o.k_norm, _as_table(o.cos), _as_table(o.sin),
                _as_table(o.bias), _as_table(o.height), _as_table(o.width), o.key_lengths, o.cu_seqlens, o.dropout,
                num_heads, num_queries, num_keys, scale_log2, factor, None if o.cos is None else o.num_prefix,
                key_columns, num_sequences, *strides, DV=value_size, VALUE_SLICES=value_slices, BLOCK_N=config.block_n,
                INTERLEAVED=o.interleaved, RMS=o.rms, **constants,
                MASKS=any(option is not None for option in (o.bias, o.key_lengths, o.cu_seqlens)),
            )  # fmt: skip


def _forward(qkv, num_heads, scale, k, v, config, with_lse, out_dtype=None, pdl=False, dropout_p=0.0, seed=None,
             **given):  # fmt: skip
    q, k, v = qkv.chunk(3, dim=2) if k is None else (qkv, k, v)
    batch, num_queries, width = q.shape
    options = _NO_OPTIONS
    if given or dropout_p:
        options = _read_options(q, num_heads, k.shape[1], **given)._replace(dropout=dropout_of(dropout_p, seed))
    out = torch.empty(batch, num_queries, v.shape[2], dtype=out_dtype or q.dtype, device=q.device)
    lse = None
    if with_lse:
        lse = torch.empty(batch, num_heads, num_queries, dtype=launch.stat_dtype(q.dtype), device=q.device)
    if out.numel() == 0:
        return out, lse
    if options.cu_seqlens is not None:  # tokens of no sequence
        out.zero_()
        lse = lse if lse is None else lse.fill_(-math.inf)
    precision = launch.dot_precision()
    if config is None:
        arch, head_size = configs.arch_of(q.device), max(width, v.shape[2]) // num_heads
        tf32, fp8_out = precision == "tf32", out.dtype != q.dtype
        streaming = options is not _NO_OPTIONS or v.shape[2] != width
        config = configs.pick_attention_config(
            num_queries, k.shape[1], head_size, q.dtype, tf32, arch, fp8_out, streaming, with_lse
        )
    images = max(1, _MAX_PROGRAMS // (num_heads * configs.cdiv(num_queries, config.block_m)))
    if batch <= images:
        _launch(out, lse, q, k, v, num_heads, scale, precision, config, pdl, options)
    else:
        for first in range(0, batch, images):
            part = slice(first, first + images)
            lse_part = lse[part] if with_lse else None
            parts = (out[part], lse_part, q[part], k[part], v[part])
            _launch(*parts, num_heads, scale, precision, config, pdl, options.of_images(part))
    return out, lse


def attention_fwd(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    config: configs.AttentionConfig | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out [B, Nq, C], lse [B, H, Nq]); ``config`` forces an ``AttentionConfig``; options as of ``attention``."""
    return _forward(qkv, num_heads, scale, k, v, config, with_lse=True, **options)


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    pdl: bool = False,
    **options: Any,
) -> Tensor:
    """softmax(scale · q kᵀ) v per head: packed [B, N, 3C], or q [B, Nq, C] with k, v [B, Nk, C], to [B, Nq, C].

    ``out_dtype``: the input's, or float8 e4m3, whose largest number is 448 (v is scaled to it, see ``fp8_blocks``).
    ``options``: those of ``vit_fast.ops.attention``.
    """
    return _forward(qkv, num_heads, scale, k, v, None, False, out_dtype, pdl, **options)[0]
