"""The linear layer of ``linear`` for Hopper: a warp-specialised ping-pong GEMM in Gluon, for fp16 and bf16.

    out = residual + act(x Wᵀ + bias)                      every part but x Wᵀ optional

    out = act((LN(x) without weight and bias) Wᵀ + bias)   the LayerNorm folded, as in ``linear``

x [..., K] and weight [N, K] in rows of adjacent elements at one stride, which begin at multiples of 16 bytes, for TMA;
bias [N] of any float dtype; residual [..., N] contiguous, N then a multiple of 8; out [..., N] contiguous.
x, weight, residual and out have one dtype; the product is accumulated in float32, and the epilogue is float32.
act: those of ``linear`` without swiglu. ``Moments`` of x and out are those of ``linear``, out's a part per half tile; a
folded LayerNorm leaves none of out.
M, N and K are any: TMA reads zeros beyond the edges, stores are masked.

A program is three partitions. One warp, the producer, has TMA fill a ring of STAGES slots, each a tile of x and one of
W, BLOCK_K deep. Two warpgroups, the workers, take turns at the tiles of out, BLOCK_M × BLOCK_N: while one multiplies,
the other runs its epilogue. Programs are persistent: of the tiles in the order of ``linear`` (panels of GROUP_M tile
rows) each takes every tile whose number is its own modulo the number of programs.

Steps, BLOCK_K of one tile each, are numbered through all tiles of a program, by producer and workers alike; a step uses
the slot step mod STAGES. The partitions wait for each other at mbarriers, whose phases end with one arrival (those of
``filled`` with the bytes of both tiles), and of which a waiting thread sees the parity of the phase alone:
  filled[slot]   producer → worker: the tiles of the step are there.
  emptied[slot]  worker → producer: the product that read the slot is done. One product stays in flight, so a slot is
                 given back a step late; in the first round the producer waits for nobody.
  turn[worker]   other worker → worker: the loop over K of its tile is done. A worker that went ahead without its turn
                 would take the parity of an earlier phase for that of its own.
The epilogue passes through shared memory between the layout of wgmma and loads and stores of 16 bytes.

2·rows·N·K FLOP; moves what ``linear`` moves. The activations, and how moments are merged: see ``linear``.
Limits: sm_90 only, no interpreter (it has no Gluon), no gamma, row_scale, swiglu or split sums.
Source: the ping-pong schedule after Shah et al., "FlashAttention-3" (2024), and CUTLASS.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import configs
from . import layer_norm as ln
from .arguments import check_rows
from .linear import activate

BLOCK_M, BLOCK_K = 128, 64
# Of a thread: the launch's 12 warps have 168 each, which the partitions share out again.
REGISTERS, WORKER_REGISTERS, PRODUCER_REGISTERS = 168, gl.constexpr(240), gl.constexpr(24)


@dataclass(frozen=True)
class LinearHopperConfig:
    block_n: int = 128
    group_m: int = 8
    num_stages: int = 4


# The protocol's arithmetic, and what is done to a tile: they know of no layouts, and the interpreter runs them


@triton.jit
def _filled_parity(step, STAGES: tl.constexpr):
    return (step // STAGES) & 1


@triton.jit
def _emptied_parity(step, STAGES: tl.constexpr):
    return ((step // STAGES) & 1) ^ 1


@triton.jit
def _turn_parity(turns, WORKER: tl.constexpr):
    return (turns & 1) ^ (1 - WORKER)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column)."""
    panel = tile // (GROUP_M * tiles_n)
    height = min(tiles_m - panel * GROUP_M, GROUP_M)
    tile -= panel * GROUP_M * tiles_n
    tile_n = tile // height
    return panel * GROUP_M + tile - tile_n * height, tile_n


@triton.jit
def _row_statistics(means_ptr, squares_ptr, row, lane, rows, width, eps, PART: tl.constexpr):
    """mean and rstd of rows of ``width`` elements from the moments of their parts of PART, one to a lane at a time.

    As in ``linear``, but that rows of 16-bit elements lie near enough to zero for their mean to be taken once.
    """
    PARTS: tl.constexpr = lane.shape[0]
    parts = tl.cdiv(width, PART)
    before = (row * 0).to(tl.float32)
    mean, squares = before, before
    for first in tl.range(0, parts, PARTS, num_stages=1):
        part = first + lane
        size = tl.minimum(width - part * PART, PART).to(tl.float32)[:, None]
        offset = part[:, None] * rows + row[None, :]
        mask = (part < parts)[:, None] & (row < rows)[None, :]
        part_mean = tl.load(means_ptr + offset, mask=mask, other=0.0)
        part_squares = tl.load(squares_ptr + offset, mask=mask, other=0.0)
        count = tl.minimum(width - first * PART, PARTS * PART).to(tl.float32)
        centre = tl.sum(part_mean * size, axis=0) / count
        centred = tl.where(mask, part_mean - centre[None, :], 0.0)
        step = centre - mean
        mean += step * (count / (before + count))
        squares += tl.sum(part_squares + size * centred * centred, axis=0)
        squares += step * step * (before * count / (before + count))
        before += count
    return mean, tl.rsqrt(squares / width + eps)


@triton.jit
def _transform(acc, mean, rstd, column_sum_ptr, bias_ptr, column, out_features, ACTIVATION: tl.constexpr):
    """The elementwise part of the epilogue."""
    in_columns = column < out_features
    if column_sum_ptr is not None:
        column_sum = tl.load(column_sum_ptr + column, mask=in_columns, other=0.0)
        acc = (acc - mean[:, None] * column_sum[None, :]) * rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return activate(acc, ACTIVATION, False)


@triton.jit
def _store_moments(value, means_ptr, squares_ptr, row, column, rows, first, width, PART: tl.constexpr):
    """Mean and centred sum of squares of the columns ``first`` … ``first`` + PART; value is 0 beyond ``width``."""
    size = tl.maximum(tl.minimum(width - first, PART), 1).to(tl.float32)
    mean = tl.sum(value, axis=1) / size
    centred = tl.where((column < width)[None, :], value - mean[:, None], 0.0)
    offset = first // PART * rows + row
    in_matrix = (row < rows) & (first < width)
    tl.store(means_ptr + offset, mean, mask=in_matrix)
    tl.store(squares_ptr + offset, tl.sum(centred * centred, axis=1), mask=in_matrix)


# The partitions


@gluon.jit
def _produce(
    x_desc, weight_desc, x_slots, weight_slots, filled, emptied, tiles_m, tiles_n, depth, GROUP_M: gl.constexpr
):
    """The TMA warp: fills the slots in the order in which the workers take them."""
    STAGES: gl.constexpr = x_slots.shape[0]
    BLOCK_M: gl.constexpr = x_slots.shape[1]
    BLOCK_N: gl.constexpr = weight_slots.shape[1]
    BLOCK_K: gl.constexpr = x_slots.shape[2]
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        for k in range(0, depth, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(emptied.index(slot), _emptied_parity(step, STAGES))
            mbarrier.expect(filled.index(slot), x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [tile_m * BLOCK_M, k], filled.index(slot), x_slots.index(slot))
            tma.async_copy_global_to_shared(
                weight_desc, [tile_n * BLOCK_N, k], filled.index(slot), weight_slots.index(slot)
            )
            step += 1


@gluon.jit
def _multiply(x_slots, weight_slots, filled, emptied, first, steps, LAYOUT: gl.constexpr):
    """The loop over K of one tile, whose first step is ``first``."""
    STAGES: gl.constexpr = x_slots.shape[0]
    BLOCK_M: gl.constexpr = x_slots.shape[1]
    BLOCK_N: gl.constexpr = weight_slots.shape[1]
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=LAYOUT)
    for step in range(first, first + steps):
        slot = step % STAGES
        mbarrier.wait(filled.index(slot), _filled_parity(step, STAGES))
        acc = warpgroup_mma(x_slots.index(slot), weight_slots.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if step > first:
            mbarrier.arrive(emptied.index((step - 1) % STAGES), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(emptied.index((first + steps - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _halves(t, DIM: gl.constexpr):
    """The upper and lower half of a vector, or of a tile its left and right half (1) or upper and lower half (0)."""
    if len(t.shape) == 1:
        return t.reshape([2, t.shape[0] // 2]).permute((1, 0)).split()
    elif DIM == 0:
        return t.reshape([2, t.shape[0] // 2, t.shape[1]]).permute((1, 2, 0)).split()
    else:
        return t.reshape([t.shape[0], 2, t.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _finish(
    acc, mean, rstd, out_ptr, moments_out_ptr, column_sum_ptr, bias_ptr, residual_ptr, top, left, rows, out_features,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """The epilogue of acc, whose first element is (top, left)."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    value = gl.convert_layout(acc, MMA, assert_trivial=True)
    row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, MMA))
    column = left + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
    wide_row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, WIDE))
    wide_column = left + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, WIDE))
    mask = (wide_row < rows)[:, None] & (wide_column < out_features)[None, :]
    if mean is not None:
        mean = gl.convert_layout(mean, gl.SliceLayout(1, MMA), assert_trivial=True)
        rstd = gl.convert_layout(rstd, gl.SliceLayout(1, MMA), assert_trivial=True)
    value = _transform(value, mean, rstd, column_sum_ptr, bias_ptr, column, out_features, ACTIVATION)
    offset = (wide_row * out_features)[:, None] + wide_column[None, :]
    if residual_ptr is not None:
        residual = gl.load(residual_ptr + offset, mask=mask, other=0.0)
        value += gl.convert_layout(residual, MMA).to(gl.float32)
    out = value.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + offset, gl.convert_layout(out, WIDE), mask=mask)
    if moments_out_ptr is not None:
        squares_ptr = moments_out_ptr + rows.to(gl.int64) * gl.cdiv(out_features, BLOCK_N)
        _store_moments(
            out.to(gl.float32), moments_out_ptr, squares_ptr, row, column, rows, left, out_features, BLOCK_N
        )  # fmt: skip


@gluon.jit
def _work(
    x_slots, weight_slots, filled, emptied, turn, out_ptr, moments_ptr, moments_out_ptr, column_sum_ptr, bias_ptr,
    residual_ptr, tiles_m, tiles_n, rows, out_features, in_features, eps, WORKER: gl.constexpr,
    ACTIVATION: gl.constexpr, ALIGN_N: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """A warpgroup: every other tile of the program."""
    BLOCK_M: gl.constexpr = x_slots.shape[1]
    BLOCK_N: gl.constexpr = weight_slots.shape[1]
    BLOCK_K: gl.constexpr = x_slots.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([PARTS, 1], [1, 32], [1, 4], [1, 0])
    if ALIGN_N > 1 and ALIGN_N < 16:
        out_features = out_features // ALIGN_N * ALIGN_N
    steps = gl.cdiv(in_features, BLOCK_K)
    first = WORKER * steps
    turns = 0
    for tile in range(gl.program_id(0) + WORKER * gl.num_programs(0), tiles_m * tiles_n, 2 * gl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        top, left = tile_m.to(gl.int64) * BLOCK_M, tile_n.to(gl.int64) * BLOCK_N
        means, rstds = (None, None), (None, None)
        if moments_ptr is not None:
            row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ROWS))
            lane = gl.arange(0, PARTS, layout=gl.SliceLayout(1, ROWS)).to(gl.int64)
            squares_ptr = moments_ptr + rows.to(gl.int64) * gl.cdiv(in_features, PART)
            mean, rstd = _row_statistics(moments_ptr, squares_ptr, row, lane, rows, in_features, eps, PART)
            means = _halves(gl.convert_layout(mean, gl.SliceLayout(1, LAYOUT)), 0)
            rstds = _halves(gl.convert_layout(rstd, gl.SliceLayout(1, LAYOUT)), 0)
        mbarrier.wait(turn.index(WORKER), _turn_parity(turns, WORKER))
        acc = _multiply(x_slots, weight_slots, filled, emptied, first, steps, LAYOUT)
        mbarrier.arrive(turn.index(1 - WORKER), count=1)
        first += 2 * steps
        turns += 1
        # In quarters: a residual beside the tile, and the addresses of both, do not fit in the registers of four warps.
        halves = _halves(acc, 1)
        for j in gl.static_range(2):
            quarters = _halves(halves[j], 0)
            for i in gl.static_range(2):
                _finish(
                    quarters[i], means[i], rstds[i], out_ptr, moments_out_ptr, column_sum_ptr, bias_ptr, residual_ptr,
                    top + i * (BLOCK_M // 2), left + j * (BLOCK_N // 2), rows, out_features, ACTIVATION,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["rows"])
def _linear_hopper_fwd_kernel(
    out_ptr,  # [rows, out_features] contiguous
    x_desc,  # descriptor of [rows, in_features]
    weight_desc,  # descriptor of [out_features, in_features]
    moments_ptr,  # [2, parts of x, rows] contiguous, or None
    moments_out_ptr,  # [2, parts of out, rows] contiguous, or None
    column_sum_ptr,  # vectors contiguous, or None
    bias_ptr,
    residual_ptr,  # [rows, out_features] contiguous, or None
    rows,
    out_features,
    in_features,
    eps,
    ACTIVATION: gl.constexpr,
    ALIGN_N: gl.constexpr,
    PART: gl.constexpr,
    PARTS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(STAGES > 1, "a slot is given back a step late")
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_slots = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()  # TMA sees the barriers as they are now
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(out_features, BLOCK_N)
    # The constants, and a None, keep being constants only in the call itself.
    gl.warp_specialize(
        [
            (_work, (
                x_slots, weight_slots, filled, emptied, turn, out_ptr, moments_ptr, moments_out_ptr, column_sum_ptr,
                bias_ptr, residual_ptr, tiles_m, tiles_n, rows, out_features, in_features, eps,
                0, ACTIVATION, ALIGN_N, PART, PARTS, GROUP_M,
            )),
            (_work, (
                x_slots, weight_slots, filled, emptied, turn, out_ptr, moments_ptr, moments_out_ptr, column_sum_ptr,
                bias_ptr, residual_ptr, tiles_m, tiles_n, rows, out_features, in_features, eps,
                1, ACTIVATION, ALIGN_N, PART, PARTS, GROUP_M,
            )),
            (_produce, (
                x_desc, weight_desc, x_slots, weight_slots, filled, emptied, tiles_m, tiles_n, in_features, GROUP_M,
            )),
        ],
        [4, 1],
        [WORKER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


INTERPRETED = not isinstance(activate, triton.JITFunction)


def _row_stride(t):
    """The stride between the rows of t [..., K]; None where they lie at several."""
    stride, rows = None, 1
    for size, step in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1])):
        if size > 1 and stride is not None and step != stride * rows:
            return None
        if size > 1:
            stride, rows = step if stride is None else stride, rows * size
    return t.shape[-1] if stride is None else stride


def _row_reasons(name, t):
    """Why the rows of t [..., K] cannot be read, by TMA or 16 bytes at a time."""
    stride = _row_stride(t)
    if stride is None or t.stride(-1) != 1:
        return [f"{name} has strides {tuple(t.stride())}, expected rows of adjacent elements at one stride"]
    if stride < t.shape[-1]:
        return [f"{name} has rows of {t.shape[-1]} elements at a stride of {stride}: they overlap"]
    if t.data_ptr() % 16 or stride * t.element_size() % 16:
        return [f"{name} has rows that do not begin at multiples of 16 bytes"]
    return []


def linear_hopper_not_supported_reasons(
    x, weight, bias, activation=None, *, residual=None, norm=None, with_moments=False
):
    """Why these arguments cannot go to ``linear_hopper``; ``linear`` takes them."""
    if INTERPRETED:
        return ["Triton's interpreter has no Gluon"]
    reasons = ln.device_reasons(x, weight, bias, residual)
    if reasons:
        return reasons
    arch = configs.arch_of(x.device)
    if arch != 90:
        reasons.append(f"the device is sm_{arch}, expected sm_90")
    if activation == "swiglu":
        reasons.append("swiglu takes two accumulators")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"weight has dtype {weight.dtype}, expected torch.float16 or torch.bfloat16")
    for name, t in (("x", x), ("residual", residual)):
        if t is not None and t.dtype != weight.dtype:
            reasons.append(f"{name} has dtype {t.dtype}, expected {weight.dtype} (as weight)")
    reasons += _row_reasons("x", x) + _row_reasons("weight", weight)
    if residual is not None:
        reasons += _row_reasons("residual", residual) if residual.is_contiguous() else ["residual is not contiguous"]
    if norm is not None and (residual is not None or with_moments):
        reasons.append("a folded LayerNorm takes no residual and leaves no moments")
    return reasons


def linear_hopper(x, weight, bias, activation=None, *, residual=None, norm=None, with_moments=False, config=None):
    """(out, its ``Moments`` or None); ``norm``: (Moments of x, eps, column sums of weight) of a folded LayerNorm.

    For arguments that ``linear_hopper_not_supported_reasons`` does not refuse.
    """
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    check_rows("linear", rows)
    config = config or LinearHopperConfig()
    out = torch.empty((*x.shape[:-1], out_features), dtype=weight.dtype, device=x.device)
    moments_out = None
    if with_moments:
        part_out = config.block_n // 2
        values = torch.empty(2, configs.cdiv(out_features, part_out), rows, dtype=torch.float32, device=x.device)
        moments_out = ln.Moments(values, part_out)
    if rows == 0:
        return out, moments_out

    (moments, part), eps, column_sum = norm or ((None, 1), 0.0, None)
    element = gl.float16 if weight.dtype == torch.float16 else gl.bfloat16

    def descriptor(t, size, block):
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return TensorDescriptor(t, [size, in_features], [_row_stride(t), 1], block, layout)

    tiles = configs.cdiv(rows, BLOCK_M) * configs.cdiv(out_features, config.block_n)
    with ln.launch_guard(x):
        _linear_hopper_fwd_kernel[(min(tiles, configs.multiprocessors_of(x.device)),)](
            out,
            descriptor(x, rows, [BLOCK_M, BLOCK_K]),
            descriptor(weight, out_features, [config.block_n, BLOCK_K]),
            moments, moments_out and moments_out.values, ln.vector(column_sum), ln.vector(bias), residual,
            rows, out_features, in_features, eps,
            ACTIVATION=activation,
            ALIGN_N=math.gcd(16, out_features),
            PART=part,
            PARTS=1 if norm is None else min(32, configs.power_of_two(configs.cdiv(in_features, part))),
            GROUP_M=config.group_m,
            STAGES=config.num_stages,
            num_warps=4,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return out, moments_out
