"""Attention backward: dq, dk and dv from the gradient of the output, q, k, v, the output and the LSE of every row.

P = exp(scale · q kᵀ − lse) are the probabilities, computed again; M is the mask of dropout, 0 or 1/(1 − p):
    dv = (P ∘ M)ᵀ dout        dP = (dout vᵀ) ∘ M        delta = rowsum(dout ∘ out) = rowsum(P ∘ dP)
    dS = P ∘ (dP − delta)     dq = scale · dS k         dk = scale · dSᵀ q
Shapes and strides are those of ``attention``: q [B, Nq, C], k [B, Nk, C]; v, out and dout with heads of their own size
DV. Gradients of a packed projection are written into one tensor [B, N, 3C], without a stack or a concatenation. Scores,
probabilities, delta and accumulators are fp32 (float64 for float64, interpreted only); P and dS are rounded to the
dtype of the input before a product. A row whose LSE is −∞ has no keys, and adds nothing.

Two kernels, one-dimensional grids, no atomics, so that a result has the same bits in every run:
  _attention_bwd_kernel     a program holds BLOCK_N keys and values of one (image, head) on chip, with the accumulators
                            of dk and dv, and takes BLOCK_M queries a step. Scores are computed transposed, keys along
                            the rows, so that P and dS are operands out of registers. Where one program holds all
                            keys, dqᵀ = kᵀ dSᵀ is complete after each step and stored: q, k, v, dout and out are read
                            once, for 10·B·H·Nq·Nk·D FLOP.
  _attention_bwd_dq_kernel  more keys than that: dq by a program for each BLOCK_M queries, which takes BLOCK_N keys a
                            step. Both kernels compute scores and dP then, 14·B·H·Nq·Nk·D FLOP in all.
The head dimension is cut into the slices of ``attention``, so that 72, 80 or 96 are not padded to 128. With TMA q, dout
and out are loaded by tensor descriptors, after a copy where their layout does not allow it; the bits are the same.

key_lengths and dropout are compiled in where they are given. Norms of q and k and rotary embedding are applied in
PyTorch before the kernels, which then give fp32 gradients of what the scores saw, and differentiated behind them by the
closed formulas of ``reference``. bias, rel_pos and cu_seqlens: ``backward_not_supported_reasons``.
Source: the backward of FlashAttention-2 (Dao 2023, arXiv:2307.08691), by keys.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch, reference
from .attention import (
    _MAX_PROGRAMS,
    _TL_DTYPE,
    _accumulate,
    _descriptor,
    _head_slices,
    _kept,
    _load,
    _scaled,
    _scores,
    _tma_compatible,
    _zeros,
    dropout_of,
)


@triton.jit
def _probabilities(s, lse, inside, scale):
    """exp(scale · s − lse), zero outside. The difference is taken before log2(e), which would round large scores."""
    return tl.where(inside, tl.exp2((s * scale - lse) * 1.4426950408889634), 0.0)


@triton.jit
def _row_statistics(lse_ptr, dout, out, first, count, ROWS: tl.constexpr, ACC: tl.constexpr):
    """(LSE, delta) of rows of one head; the LSE of a row that gives nothing is +∞."""
    rows = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + rows, mask=rows < count, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.sum(dout[0].to(ACC) * out[0].to(ACC), 1)
    for i in tl.static_range(1, len(dout)):
        delta += tl.sum(dout[i].to(ACC) * out[i].to(ACC), 1)
    return lse, delta


@triton.jit
def _store_rows(
    x_ptr, tiles, image, head, first, count, stride_b, stride_n, stride_c,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_SLICES: tl.constexpr,
):  # fmt: skip
    """Stores a [ROWS, width] tile for each head-dim slice to rows of one head."""
    rows = first + tl.arange(0, ROWS)
    for i in tl.static_range(len(HEAD_SLICES)):
        columns = HEAD_SLICES[i][0] + tl.arange(0, HEAD_SLICES[i][1])
        pointers = x_ptr + image * stride_b + head * D * stride_c + rows.to(tl.int64)[:, None] * stride_n
        pointers += columns.to(tl.int64)[None, :] * stride_c
        tl.store(pointers, tiles[i].to(x_ptr.dtype.element_ty), mask=(rows < count)[:, None] & (columns < D)[None, :])


@triton.jit
def _attention_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr,  # [B, Nq, H·D], [B, Nk, H·D], [B, Nk, H·DV], or None; dq where a program has all keys
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # dout, out [B, Nq, H·DV]; descriptors dout, q, out with TMA
    key_lengths_ptr, dropout,  # [B], Dropout, or None
    num_heads, num_queries, num_keys, scale,
    stride_dqb, stride_dqn, stride_dqc, stride_dkb, stride_dkn, stride_dkc, stride_dvb, stride_dvn, stride_dvc,
    stride_gb, stride_gn, stride_gc, stride_qb, stride_qn, stride_qc,
    stride_kb, stride_kn, stride_kc, stride_vb, stride_vn, stride_vc, stride_ob, stride_on, stride_oc,
    D: tl.constexpr, DV: tl.constexpr, HEAD_SLICES: tl.constexpr, VALUE_SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_keys, BLOCK_N)
    pid = tl.program_id(0)
    pair = pid // blocks
    first_key = (pid - pair * blocks) * BLOCK_N
    image = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    lse_ptr += (image * num_heads + head) * num_queries
    length = num_keys
    if key_lengths_ptr is not None:
        length = tl.maximum(tl.minimum(tl.load(key_lengths_ptr + image), num_keys), 0).to(tl.int32)
    k = _load(
        k_ptr, image, head, first_key, length, stride_kb, stride_kn, stride_kc,
        BLOCK_N, D, HEAD_SLICES, True, False, UPCAST,
    )  # fmt: skip
    v = _load(
        v_ptr, image, head, first_key, length, stride_vb, stride_vn, stride_vc,
        BLOCK_N, DV, VALUE_SLICES, True, False, UPCAST,
    )  # fmt: skip
    dk = _zeros(BLOCK_N, HEAD_SLICES, ACC)
    dv = _zeros(BLOCK_N, VALUE_SLICES, ACC)
    key = (first_key + tl.arange(0, BLOCK_N))[:, None]
    for first_query in range(0, num_queries, BLOCK_M):
        q = _load(
            q_ptr, image, head, first_query, num_queries, stride_qb, stride_qn, stride_qc,
            BLOCK_M, D, HEAD_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        dout = _load(
            dout_ptr, image, head, first_query, num_queries, stride_gb, stride_gn, stride_gc,
            BLOCK_M, DV, VALUE_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        out = _load(
            out_ptr, image, head, first_query, num_queries, stride_ob, stride_on, stride_oc,
            BLOCK_M, DV, VALUE_SLICES, True, TMA, UPCAST,
        )  # fmt: skip
        lse, delta = _row_statistics(lse_ptr, dout, out, first_query, num_queries, BLOCK_M, ACC)
        query = (first_query + tl.arange(0, BLOCK_M))[None, :]
        p = _probabilities(_scores(k, q, False, ACC, PRECISION), lse[None, :], key < length, scale)
        dropped = p
        if dropout is not None:
            keep = _kept(dropout, image, head, query, key, num_heads, num_queries, num_keys)
            dropped = tl.where(keep, p, 0.0)
        if dv_ptr is not None:
            dv = _accumulate(dv, dropped, dout, DTYPE, ACC, PRECISION)
        dp = _scores(v, dout, False, ACC, PRECISION)  # after dv, which ends the life of the rounded p
        if dropout is not None:
            dp = tl.where(keep, dp * dropout.scale, 0.0)
        ds = p * (dp - delta[None, :])
        if dk_ptr is not None:
            dk = _accumulate(dk, ds, q, DTYPE, ACC, PRECISION)
        if dq_ptr is not None:
            ds = ds.to(DTYPE).to(k[0].dtype)
            dq = ()
            for i in tl.static_range(len(HEAD_SLICES)):
                dq = dq + ((tl.dot(k[i].T, ds, input_precision=PRECISION, out_dtype=ACC) * scale).T,)
            _store_rows(
                dq_ptr, dq, image, head, first_query, num_queries, stride_dqb, stride_dqn, stride_dqc,
                BLOCK_M, D, HEAD_SLICES,
            )  # fmt: skip
    if dk_ptr is not None:
        _store_rows(
            dk_ptr, _scaled(dk, scale), image, head, first_key, num_keys, stride_dkb, stride_dkn, stride_dkc,
            BLOCK_N, D, HEAD_SLICES,
        )  # fmt: skip
    if dv_ptr is not None:
        if dropout is not None:
            dv = _scaled(dv, dropout.scale)
        _store_rows(
            dv_ptr, dv, image, head, first_key, num_keys, stride_dvb, stride_dvn, stride_dvc,
            BLOCK_N, DV, VALUE_SLICES,
        )  # fmt: skip


@triton.jit
def _attention_bwd_dq_kernel(
    dq_ptr,  # [B, Nq, H·D]
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # as in _attention_bwd_kernel
    key_lengths_ptr, dropout,
    num_heads, num_queries, num_keys, scale,
    stride_dqb, stride_dqn, stride_dqc, stride_gb, stride_gn, stride_gc, stride_qb, stride_qn, stride_qc,
    stride_kb, stride_kn, stride_kc, stride_vb, stride_vn, stride_vc, stride_ob, stride_on, stride_oc,
    D: tl.constexpr, DV: tl.constexpr, HEAD_SLICES: tl.constexpr, VALUE_SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    pair = pid // blocks
    first_query = (pid - pair * blocks) * BLOCK_M
    image = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    lse_ptr += (image * num_heads + head) * num_queries
    length = num_keys
    if key_lengths_ptr is not None:
        length = tl.maximum(tl.minimum(tl.load(key_lengths_ptr + image), num_keys), 0).to(tl.int32)
    dout = _load(
        dout_ptr, image, head, first_query, num_queries, stride_gb, stride_gn, stride_gc,
        BLOCK_M, DV, VALUE_SLICES, True, False, UPCAST,
    )  # fmt: skip
    out = _load(
        out_ptr, image, head, first_query, num_queries, stride_ob, stride_on, stride_oc,
        BLOCK_M, DV, VALUE_SLICES, True, False, UPCAST,
    )  # fmt: skip
    lse, delta = _row_statistics(lse_ptr, dout, out, first_query, num_queries, BLOCK_M, ACC)
    q = _load(
        q_ptr, image, head, first_query, num_queries, stride_qb, stride_qn, stride_qc,
        BLOCK_M, D, HEAD_SLICES, True, False, UPCAST,
    )  # fmt: skip
    query = (first_query + tl.arange(0, BLOCK_M))[:, None]
    dq = _zeros(BLOCK_M, HEAD_SLICES, ACC)
    for first_key in range(0, length, BLOCK_N):
        k = _load(
            k_ptr, image, head, first_key, length, stride_kb, stride_kn, stride_kc,
            BLOCK_N, D, HEAD_SLICES, True, False, UPCAST,
        )  # fmt: skip
        v = _load(
            v_ptr, image, head, first_key, length, stride_vb, stride_vn, stride_vc,
            BLOCK_N, DV, VALUE_SLICES, True, False, UPCAST,
        )  # fmt: skip
        key = (first_key + tl.arange(0, BLOCK_N))[None, :]
        inside = (key < length) & (query < num_queries)
        p = _probabilities(_scores(q, k, False, ACC, PRECISION), lse[:, None], inside, scale)
        dp = _scores(dout, v, False, ACC, PRECISION)
        if dropout is not None:
            keep = _kept(dropout, image, head, query, key, num_heads, num_queries, num_keys)
            dp = tl.where(keep, dp * dropout.scale, 0.0)
        dq = _accumulate(dq, p * (dp - delta[:, None]), k, DTYPE, ACC, PRECISION)
    _store_rows(
        dq_ptr, _scaled(dq, scale), image, head, first_query, num_queries, stride_dqb, stride_dqn, stride_dqc,
        BLOCK_M, D, HEAD_SLICES,
    )  # fmt: skip


def _strides(*tensors):
    """Three strides of each tensor, of one that is not there zeros."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride())]


def _launch(grads, tensors, num_heads, scale, precision, config, key_lengths, dropout):
    (dq, dk, dv), (dout, q, k, v, out, lse) = grads, tensors
    batch, num_queries, width = q.shape
    num_keys, head_size, value_size = k.shape[1], width // num_heads, v.shape[2] // num_heads
    scalars = (key_lengths, dropout, num_heads, num_queries, num_keys, float(scale))
    constants = dict(
        D=head_size, DV=value_size, HEAD_SLICES=_head_slices(head_size), VALUE_SLICES=_head_slices(value_size),
        DTYPE=_TL_DTYPE[q.dtype], ACC=launch.accumulator(q.dtype), PRECISION=precision,
        UPCAST=launch.INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    pairs, by_keys, by_queries = batch * num_heads, config.by_keys, config.by_queries
    whole = num_keys <= by_keys.block_n
    with launch.device_guard(q):
        if whole or dk is not None or dv is not None:
            first = dq if whole else None
            by_step = (dout, q, out)
            if by_keys.tma:
                by_step = tuple(_descriptor(x, by_keys.block_m, x.shape[2] // num_heads) for x in by_step)
            _attention_bwd_kernel[(pairs * configs.cdiv(num_keys, by_keys.block_n),)](
                first, dk, dv, *by_step[:2], k, v, by_step[2], lse, *scalars,
                *_strides(first, dk, dv, dout, q, k, v, out), **constants, TMA=by_keys.tma,
                BLOCK_M=by_keys.block_m, BLOCK_N=by_keys.block_n,
                num_warps=by_keys.num_warps, num_stages=by_keys.num_stages,
            )  # fmt: skip
        if dq is not None and not whole:
            _attention_bwd_dq_kernel[(pairs * configs.cdiv(num_queries, by_queries.block_m),)](
                dq, dout, q, k, v, out, lse, *scalars, *_strides(dq, dout, q, k, v, out), **constants,
                BLOCK_M=by_queries.block_m, BLOCK_N=by_queries.block_n,
                num_warps=by_queries.num_warps, num_stages=by_queries.num_stages,
            )  # fmt: skip


def _gradients(dout, q, k, v, out, lse, *, grads, num_heads, scale, config, key_lengths, dropout_p, seed):
    """Writes dq, dk and dv into ``grads``, those that are not None."""
    if all(grad is None for grad in grads):
        return
    batch, num_queries, width = q.shape
    if num_queries == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    precision = launch.dot_precision()
    if config is None:
        head_size = max(width, v.shape[2]) // num_heads
        special = dropout_p > 0 or key_lengths is not None or v.shape[2] != width or _spills(q.dtype)
        arch = configs.arch_of(q.device)
        config = configs.pick_attention_bwd_config(k.shape[1], head_size, q.dtype, arch, special)
    blocks = max(configs.cdiv(k.shape[1], config.by_keys.block_n), configs.cdiv(num_queries, config.by_queries.block_m))
    if config.by_keys.tma:
        dout, q, out = (
            x
            if _tma_compatible(x, _head_slices(size := x.shape[2] // num_heads), size)
            else x.clone(memory_format=torch.contiguous_format)
            for x in (dout, q, out)
        )
    images = max(1, _MAX_PROGRAMS // (num_heads * blocks))
    for first in range(0, batch, images):
        part = slice(first, first + images)
        lengths = None if key_lengths is None else key_lengths[part]
        _launch(
            [grad if grad is None else grad[part] for grad in grads], [t[part] for t in (dout, q, k, v, out, lse)],
            num_heads, scale, precision, config, lengths, dropout_of(dropout_p, seed, first),
        )  # fmt: skip


def _through_head_options(
    kernels, grad, q, k, v, out, lse, num_heads, grads, needs, *, q_norm=None, k_norm=None, norm="layer", rope=None,
    rope_layout="half", num_prefix=0, **_,
):  # fmt: skip
    """Fills ``grads`` where the scores saw q and k normalised and turned.

    Returns: the gradients of bias, height and width (None), cos, sin, and of weight and bias of q_norm and of k_norm.
    """
    stat = lse.dtype
    wide = [t.unflatten(2, (num_heads, -1)).transpose(1, 2).to(stat) for t in (q, k)]
    normal = [reference.head_norm(x, of, norm) for x, of in zip(wide, (q_norm, k_norm), strict=True)]
    turned = [reference.rotary(x, rope, rope_layout, num_prefix).transpose(1, 2).flatten(2) for x in normal]
    seen = [torch.empty_like(x) for x in turned]
    kernels(grad, *(x.to(q.dtype) for x in turned), v, out, lse, grads=[*seen, grads[2]])
    changes = [x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in seen]
    dcos = dsin = None
    if rope is not None:
        if any(needs[3:5]):
            dcos, dsin = reference.rotary_tables_bwd(changes, normal, rope, rope_layout, num_prefix)
        changes = [reference.rotary_bwd(x, rope, rope_layout, num_prefix) for x in changes]
    vectors = []
    for into, change, x, of in zip(grads[:2], changes, wide, (q_norm, k_norm), strict=True):
        change, *of_norm = reference.head_norm_bwd(change, x, of, norm)
        vectors += of_norm
        if into is not None:
            into.copy_(change.transpose(1, 2).flatten(2))
    return None, None, None, dcos, dsin, *vectors


def _spills(dtype):
    """Whether a tile of 256 keys spills, 48 bytes on sm_90."""
    return dtype == torch.bfloat16 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def backward_not_supported_reasons(qkv: Tensor, num_heads: int, **options: Any) -> list[str]:
    """Why the gradients of a call are those of the reference; an empty list where these kernels compute them."""
    names = [name for name in ("bias", "rel_pos", "cu_seqlens") if options.get(name) is not None]
    return [f"the backward of attention has no {name}" for name in names]


def attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    scale: float,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] | None = None,
    config: configs.AttentionBwdConfig | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(dqkv, None, None) for packed qkv [B, N, 3C], else (dq, dk, dv), from grad, the gradient of ``out`` [B, Nq, C].

    ``out`` and ``lse`` [B, H, Nq] are the results of ``attention_fwd`` with the same options, which are those of
    ``vit_fast.ops.attention``. With options more gradients follow, as ``reference.attention_bwd`` orders them.
    ``needs``: for each result whether it is wanted; what is not may be None. ``config`` forces an
    ``AttentionBwdConfig``.
    """
    packed = k is None
    q, k, v = qkv.chunk(3, dim=2) if packed else (qkv, k, v)
    of_q, of_k, of_v, *of_options = needs or [True] * 12
    if packed:
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format) if of_q else None
        grads = [None] * 3 if dqkv is None else list(dqkv.chunk(3, dim=2))
    else:
        wanted = zip((q, k, v), (of_q, of_k, of_v), strict=True)
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) if want else None for t, want in wanted]
    kernels = functools.partial(
        _gradients, num_heads=num_heads, scale=scale, config=config, dropout_p=dropout_p, seed=seed,
        key_lengths=launch.vector(options.get("key_lengths")),
    )  # fmt: skip
    lse = lse.contiguous()  # aten's attention on a CPU gives it transposed
    more: tuple[Tensor | None, ...] = (None,) * 9 if options else ()
    if any(options.get(name) is not None for name in ("rope", "q_norm", "k_norm")):
        more = _through_head_options(kernels, grad, q, k, v, out, lse, num_heads, grads, of_options, **options)
    else:
        kernels(grad, q, k, v, out, lse, grads=grads)
    return (dqkv, None, None, *more) if packed else (*grads, *more)
