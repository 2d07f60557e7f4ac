"""The linear layers of ``linear`` for Hopper: warp-specialised GEMMs in Gluon, ping-pong or cooperative, fp16 or bf16.

    out = residual + act(x Wᵀ + bias)                      every part but x Wᵀ optional

    out = act((LN(x) without weight and bias) Wᵀ + bias)   the LayerNorm folded, as in ``linear``

x [..., K] and weight [N, K] in rows of adjacent elements at one stride, which begin at multiples of 16 bytes, for TMA;
bias [N] of any float dtype; residual [..., N] contiguous, N then a multiple of 8; out [..., N] contiguous.
x, weight, residual and out have one dtype; the product is accumulated in float32, and the epilogue is float32.
act: as in ``gemm``, not gated. Row-statistics partials of x and out as in ``gemm``; a folded LayerNorm emits none.
M, N and K are any: TMA reads zeros beyond the edges, stores are masked.

A program has three partitions. The producer, one warp, fills by TMA a ring of STAGES slots, each a tile of x and one of
W, BLOCK_K deep. Two consumer warp groups multiply, each BLOCK_M rows × BLOCK_N columns at a time:
  ping-pong (PER_TILE = 1)    they take turns at the tiles of out: while one multiplies, the other runs its epilogue.
  cooperative (PER_TILE = 2)  they share a tile of 2 · BLOCK_M rows, one above the other, and its tile of W: less is
                              loaded and read from shared memory for each product, but nothing hides an epilogue.
Programs are persistent: each takes every tile whose number (``gemm.tile_position``) is its own modulo the number of
programs.

The steps of a program, BLOCK_K of one tile each, are numbered through all its tiles, by producer and consumers alike;
a step uses the slot step mod STAGES. The partitions wait for each other at mbarriers. A phase of an mbarrier ends with
one arrival (of ``full``, with the bytes of both tiles); a waiting thread sees only the parity of the phase:
  full[slot]      producer → consumers: the tiles of the step have been loaded.
  empty[slot]     consumers → producer: the products that read the slot are done, with an arrival of each consumer of
                  the tile. One product stays in flight, so a slot is given back a step late; in the first round the
                  producer does not wait.
  turn[consumer]  ping-pong, other consumer → consumer: the K loop of its tile is done. Without it, a consumer that
                  went ahead could take an earlier phase, of the same parity, for its own.
With a residual, the producer loads the residual's tile behind the K loop's of the same tile, for each of its consumers
in four pieces of PIECE_M rows, into memory of the consumer that will add it:
  residual_full[consumer]   producer → consumer: its residual has been loaded.
  residual_empty[consumer]  consumer → producer: it has been read.
The epilogue converts through shared memory from the layout of wgmma to that of 16-byte stores.

With PDL the program may start while the kernel before still runs (``launch``). The producer then asks for the first
tiles of W before it waits for that kernel, which must not write W; everything else is read and written after the wait.

2·rows·N·K FLOP; moves what ``gemm`` moves.
Shared memory: STAGES · (PER_TILE · BLOCK_M + BLOCK_N) · 128 bytes, and 4 · BLOCK_M · BLOCK_N for a residual; at most
227 KiB.
Limits: sm_90 only, no interpreter (it has no Gluon), no gamma, row_scale, gated activations or split-K.
Source: the schedules of CUTLASS; ping-pong also after Shah et al., "FlashAttention-3" (2024).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import configs, launch
from .activation_names import GATED
from .activations import activate_to
from .arguments import check_rows
from .gemm import partials_per_step, tile_position
from .layer_norm import RowPartials

BLOCK_K = 64
PIECE_M = gl.constexpr(64)  # rows of the four pieces in which a consumer finishes its part of a tile: one of wgmma
# Registers a thread: 168 in each of the launch's 12 warps, which setmaxnreg then redistributes among the partitions.
REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 168, gl.constexpr(240), gl.constexpr(24)


@dataclass(frozen=True)
class LinearHopperConfig:
    """A tile of block_m × block_n: one consumer's, or where ``cooperative`` that of both, 64 or 128 rows each.

    Compiled without spills: 128 × 128, 128 × 64 and, for widths of out that are multiples of 16, cooperative 128 × 256
    and 256 × 128.
    """

    block_m: int = 128
    block_n: int = 128
    group_m: int = 8
    num_stages: int = 4
    cooperative: bool = False

    @property
    def consumer_rows(self) -> int:
        """Rows of a tile that one consumer computes."""
        return self.block_m // 2 if self.cooperative else self.block_m

    def shared_bytes(self, residual: bool) -> int:
        """Shared memory of a program: the ring, the tiles of a residual, the epilogue's scratch and the barriers."""
        ring = 2 * self.num_stages * (self.block_m + self.block_n) * BLOCK_K
        return ring + (4 * self.consumer_rows * self.block_n if residual else 0) + 16640


# Parities and the arithmetic of the epilogue: ordinary Triton without layouts, which the interpreter can run


@triton.jit
def _full_parity(step, STAGES: tl.constexpr):
    return (step // STAGES) & 1


@triton.jit
def _empty_parity(step, STAGES: tl.constexpr):
    return ((step // STAGES) & 1) ^ 1


@triton.jit
def _residual_parity(turns):
    return turns & 1


@triton.jit
def _turn_parity(turns, CONSUMER: tl.constexpr):
    return (turns & 1) ^ (1 - CONSUMER)


@triton.jit
def _row_statistics(means_ptr, m2_ptr, row, lane, rows, width, eps, PARTIAL_WIDTH: tl.constexpr):
    """mean and rstd of rows of ``width`` elements, merged from their partials, as many at a time as ``lane`` has.

    As in ``gemm``, but the mean is not corrected a second time: rows of 16-bit elements are not far enough from zero.
    """
    PARTIALS_PER_STEP: tl.constexpr = lane.shape[0]
    partials = tl.cdiv(width, PARTIAL_WIDTH)
    before = (row * 0).to(tl.float32)
    mean, m2 = before, before
    for first in tl.range(0, partials, PARTIALS_PER_STEP, num_stages=1):
        partial = first + lane
        size = tl.minimum(width - partial * PARTIAL_WIDTH, PARTIAL_WIDTH).to(tl.float32)[:, None]
        offset = partial[:, None] * rows + row[None, :]
        mask = (partial < partials)[:, None] & (row < rows)[None, :]
        partial_mean = tl.load(means_ptr + offset, mask=mask, other=0.0)
        partial_m2 = tl.load(m2_ptr + offset, mask=mask, other=0.0)
        count = tl.minimum(width - first * PARTIAL_WIDTH, PARTIALS_PER_STEP * PARTIAL_WIDTH).to(tl.float32)
        centre = tl.sum(partial_mean * size, axis=0) / count
        centred = tl.where(mask, partial_mean - centre[None, :], 0.0)
        step = centre - mean
        mean += step * (count / (before + count))
        m2 += tl.sum(partial_m2 + size * centred * centred, axis=0)
        m2 += step * step * (before * count / (before + count))
        before += count
    return mean, tl.rsqrt(m2 / width + eps)


@triton.jit
def _transform(
    acc, mean, rstd, column_sum_ptr, bias_ptr, column, out_features, ACTIVATION: tl.constexpr, OUT: tl.constexpr
):
    """The elementwise part of the epilogue."""
    in_columns = column < out_features
    if column_sum_ptr is not None:
        column_sum = tl.load(column_sum_ptr + column, mask=in_columns, other=0.0)
        acc = (acc - mean[:, None] * column_sum[None, :]) * rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return activate_to(acc, ACTIVATION, False, OUT)


@triton.jit
def _add_columns(mean, m2, value, column, first, width, BEFORE: tl.constexpr):
    """mean and M2 of BEFORE elements of each row and of those of ``value`` together (Chan). value holds the columns
    ``column``, whose first is ``first``; it is 0 from ``width`` on, and these do not count."""
    size = tl.minimum(tl.maximum(width - first, 0), value.shape[1])
    own = tl.sum(value, axis=1) / tl.maximum(size, 1).to(tl.float32)
    value = tl.where((column < width)[None, :], value - own[:, None], 0.0)
    squares = tl.sum(value * value, axis=1)
    if BEFORE > 0:
        share = size.to(tl.float32) / (BEFORE + size).to(tl.float32)
        shift = own - mean
        squares += m2 + shift * shift * (BEFORE * share)
        own = mean + shift * share
    return own, squares


# The partitions


@gluon.jit
def _open(x_desc, weight_desc, weight_slots, full, slot, left, k, PER_TILE: gl.constexpr):
    """Begins to fill a slot: says how much will come, and asks for the tile of W at (left, k)."""
    mbarrier.expect(full.index(slot), PER_TILE * x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(weight_desc, [left, k], full.index(slot), weight_slots.index(slot))


@gluon.jit
def _load_residual(residual_desc, slots, full, consumer, top, left, ACROSS: gl.constexpr):
    """Asks for the four pieces of the residual of a consumer's part of a tile, which begins at (top, left)."""
    HEIGHT: gl.constexpr = residual_desc.block_type.shape[0]
    WIDTH: gl.constexpr = residual_desc.block_type.shape[1]
    mbarrier.expect(full.index(consumer), 4 * residual_desc.block_type.nbytes)
    for piece in gl.static_range(4):
        tma.async_copy_global_to_shared(
            residual_desc, [top + piece // ACROSS * HEIGHT, left + piece % ACROSS * WIDTH], full.index(consumer),
            slots.index(4 * consumer + piece),
        )  # fmt: skip


@gluon.jit
def _produce(
    x_desc, weight_desc, residual_desc, x_slots, weight_slots, residual_slots, full, empty, residual_full,
    residual_empty, tiles_m, tiles_n, depth, GROUP_M: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The producer warp: fills the slots in the order in which the consumers take them."""
    STAGES: gl.constexpr = weight_slots.shape[0]
    PER_TILE: gl.constexpr = x_slots.shape[0] // STAGES
    BLOCK_M: gl.constexpr = x_slots.shape[1]
    BLOCK_N: gl.constexpr = weight_slots.shape[1]
    BLOCK_K: gl.constexpr = x_slots.shape[2]
    opened = 0  # slots of the first round that have been opened before the wait
    if PDL:
        tile_m, tile_n = tile_position(gl.program_id(0), tiles_m, tiles_n, GROUP_M)
        opened = tl.minimum(gl.cdiv(depth, BLOCK_K), STAGES)
        for slot in range(opened):
            _open(x_desc, weight_desc, weight_slots, full, slot, tile_n * BLOCK_N, slot * BLOCK_K, PER_TILE)
        gdc_wait()
    step, turns = 0, 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        for k in range(0, depth, BLOCK_K):
            slot = step % STAGES
            if step >= opened:
                mbarrier.wait(empty.index(slot), _empty_parity(step, STAGES))
                _open(x_desc, weight_desc, weight_slots, full, slot, tile_n * BLOCK_N, k, PER_TILE)
            for i in gl.static_range(PER_TILE):
                tma.async_copy_global_to_shared(
                    x_desc, [(tile_m * PER_TILE + i) * BLOCK_M, k], full.index(slot), x_slots.index(slot * PER_TILE + i)
                )
            step += 1
        if residual_desc is not None:
            for i in gl.static_range(PER_TILE):
                consumer = turns % 2
                mbarrier.wait(residual_empty.index(consumer), _residual_parity(turns // 2) ^ 1)
                _load_residual(
                    residual_desc, residual_slots, residual_full, consumer, (tile_m * PER_TILE + i) * BLOCK_M,
                    tile_n * BLOCK_N, 4 * PIECE_M // BLOCK_M,
                )  # fmt: skip
                turns += 1


@gluon.jit
def _multiply(x_slots, weight_slots, full, empty, first, steps, PART: gl.constexpr, LAYOUT: gl.constexpr):
    """The K loop of one tile, whose first step has the number ``first``; PART: which of its parts, from the top."""
    STAGES: gl.constexpr = weight_slots.shape[0]
    PER_TILE: gl.constexpr = x_slots.shape[0] // STAGES
    BLOCK_M: gl.constexpr = x_slots.shape[1]
    BLOCK_N: gl.constexpr = weight_slots.shape[1]
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=LAYOUT)
    for step in range(first, first + steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), _full_parity(step, STAGES))
        weight = weight_slots.index(slot).permute((1, 0))
        acc = warpgroup_mma(x_slots.index(slot * PER_TILE + PART), weight, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if step > first:
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((first + steps - 1) % STAGES), count=1)
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
    acc, mean, rstd, out_ptr, column_sum_ptr, bias_ptr, residual, top, left, rows, out_features,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """The epilogue of acc, whose first element is (top, left); residual: the slot of that piece, or None. Returns what
    it stores, as it stores it."""
    HEIGHT: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    value = gl.convert_layout(acc, MMA, assert_trivial=True)
    column = left + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, MMA))
    wide_row = top + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, WIDE))
    wide_column = left + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, WIDE))
    mask = (wide_row < rows)[:, None] & (wide_column < out_features)[None, :]
    if mean is not None:
        mean = gl.convert_layout(mean, gl.SliceLayout(1, MMA), assert_trivial=True)
        rstd = gl.convert_layout(rstd, gl.SliceLayout(1, MMA), assert_trivial=True)
    value = _transform(value, mean, rstd, column_sum_ptr, bias_ptr, column, out_features, ACTIVATION, OUT)
    offset = (wide_row * out_features)[:, None] + wide_column[None, :]
    if residual is not None:
        value += residual.load(MMA).to(gl.float32)
    out = value.to(OUT)
    gl.store(out_ptr + offset, gl.convert_layout(out, WIDE), mask=mask)
    return out


@gluon.jit
def _emit(mean, m2, out, partials_ptr, top, left, rows, out_features, BEFORE: gl.constexpr, BLOCK_N: gl.constexpr):
    """The row statistics of a tile's first columns, of which mean and m2 hold BEFORE and ``out``, a piece whose first
    element is (top, left), the next; stores them once all BLOCK_N are in."""
    HEIGHT: gl.constexpr = out.shape[0]
    WIDTH: gl.constexpr = out.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    row = top + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, MMA))
    column = left + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, MMA))
    mean, m2 = _add_columns(mean, m2, out.to(gl.float32), column, left, out_features, BEFORE)
    if BEFORE + WIDTH == BLOCK_N:
        means_ptr = partials_ptr + left // BLOCK_N * rows + row
        gl.store(means_ptr, mean, mask=row < rows)
        gl.store(means_ptr + rows.to(gl.int64) * gl.cdiv(out_features, BLOCK_N), m2, mask=row < rows)
    return mean, m2


@gluon.jit
def _consume(
    x_slots, weight_slots, residual_slots, full, empty, turn, residual_full, residual_empty, out_ptr, partials_ptr,
    partials_out_ptr, column_sum_ptr, bias_ptr, tiles_m, tiles_n, rows, out_features, in_features, eps,
    CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, ALIGN_N: gl.constexpr, PARTIAL_WIDTH: gl.constexpr,
    PARTIALS_PER_STEP: gl.constexpr, GROUP_M: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: computes every other tile of the program, or its part of every tile."""
    PER_TILE: gl.constexpr = x_slots.shape[0] // weight_slots.shape[0]
    BLOCK_M: gl.constexpr = x_slots.shape[1]
    BLOCK_N: gl.constexpr = weight_slots.shape[1]
    BLOCK_K: gl.constexpr = x_slots.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([PARTIALS_PER_STEP, 1], [1, 32], [1, 4], [1, 0])
    TURNS: gl.constexpr = 2 // PER_TILE  # consumers that take turns
    TURN: gl.constexpr = CONSUMER % TURNS
    PART: gl.constexpr = CONSUMER % PER_TILE
    PIECES_M: gl.constexpr = BLOCK_M // PIECE_M
    ACROSS: gl.constexpr = 4 // PIECES_M  # pieces beside each other
    WIDTH: gl.constexpr = BLOCK_N // ACROSS
    if ALIGN_N > 1 and ALIGN_N < 16:
        out_features = out_features // ALIGN_N * ALIGN_N
    if PDL:
        gdc_wait()
    steps = gl.cdiv(in_features, BLOCK_K)
    first = TURN * steps
    turns = 0
    for tile in range(gl.program_id(0) + TURN * gl.num_programs(0), tiles_m * tiles_n, TURNS * gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        top, left = (tile_m.to(gl.int64) * PER_TILE + PART) * BLOCK_M, tile_n.to(gl.int64) * BLOCK_N
        means, rstds = (None, None), (None, None)
        if partials_ptr is not None:
            row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ROWS))
            lane = gl.arange(0, PARTIALS_PER_STEP, layout=gl.SliceLayout(1, ROWS)).to(gl.int64)
            m2_ptr = partials_ptr + rows.to(gl.int64) * gl.cdiv(in_features, PARTIAL_WIDTH)
            mean, rstd = _row_statistics(partials_ptr, m2_ptr, row, lane, rows, in_features, eps, PARTIAL_WIDTH)
            mean = gl.convert_layout(mean, gl.SliceLayout(1, LAYOUT))
            rstd = gl.convert_layout(rstd, gl.SliceLayout(1, LAYOUT))
            if PIECES_M == 2:
                means, rstds = _halves(mean, 0), _halves(rstd, 0)
            else:
                means, rstds = (mean, mean), (rstd, rstd)
        if PER_TILE == 1:
            mbarrier.wait(turn.index(CONSUMER), _turn_parity(turns, CONSUMER))
        acc = _multiply(x_slots, weight_slots, full, empty, first, steps, PART, LAYOUT)
        if PER_TILE == 1:
            mbarrier.arrive(turn.index(1 - CONSUMER), count=1)
        first += TURNS * steps
        if residual_slots is not None:
            mbarrier.wait(residual_full.index(CONSUMER), _residual_parity(turns))
        turns += 1
        # In pieces: a residual beside the tile, and the addresses of both, do not fit in the registers of four warps.
        halves = _halves(acc, 2 - PIECES_M)
        mean_out, m2_out = None, None
        for i in gl.static_range(2):
            quarters = _halves(halves[i], 1)
            for j in gl.static_range(2):
                residual = None
                if residual_slots is not None:
                    residual = residual_slots.index(4 * CONSUMER + 2 * i + j)
                piece_top, piece_left = top + (2 * i + j) // ACROSS * PIECE_M, left + (2 * i + j) % ACROSS * WIDTH
                out = _finish(
                    quarters[j], means[i], rstds[i], out_ptr, column_sum_ptr, bias_ptr, residual, piece_top, piece_left,
                    rows, out_features, ACTIVATION,
                )  # fmt: skip
                if partials_out_ptr is not None:
                    mean_out, m2_out = _emit(
                        mean_out, m2_out, out, partials_out_ptr, piece_top, piece_left, rows, out_features,
                        (2 * i + j) % ACROSS * WIDTH, BLOCK_N,
                    )  # fmt: skip
        if residual_slots is not None:
            tl.debug_barrier()  # all threads have read it
            mbarrier.arrive(residual_empty.index(CONSUMER), count=1)


@gluon.jit(do_not_specialize=["rows"])
def _linear_hopper_fwd_kernel(
    out_ptr,  # [rows, out_features] contiguous
    x_desc,  # descriptor of [rows, in_features]
    weight_desc,  # descriptor of [out_features, in_features]
    residual_desc,  # descriptor of [rows, out_features], a piece of a consumer's part of a tile a block, or None
    partials_ptr,  # [2, partials of x, rows] contiguous, or None
    partials_out_ptr,  # [2, partials of out, rows] contiguous, or None
    column_sum_ptr,  # vectors contiguous, or None
    bias_ptr,
    rows,
    out_features,
    in_features,
    eps,
    ACTIVATION: gl.constexpr,
    ALIGN_N: gl.constexpr,
    PARTIAL_WIDTH: gl.constexpr,
    PARTIALS_PER_STEP: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PER_TILE: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    gl.static_assert(STAGES > 1, "a slot is given back one step late")
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PER_TILE, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_slots = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PER_TILE)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    residual_slots, residual_full, residual_empty = None, None, None
    if residual_desc is not None:
        HEIGHT: gl.constexpr = residual_desc.block_type.shape[0]
        WIDTH: gl.constexpr = residual_desc.block_type.shape[1]
        residual_slots = gl.allocate_shared_memory(residual_desc.dtype, [8, HEIGHT, WIDTH], residual_desc.layout)
        residual_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        residual_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(residual_full.index(i), count=1)
            mbarrier.init(residual_empty.index(i), count=1)
    fence_async_shared()  # makes the initialised barriers visible to TMA
    tiles_m, tiles_n = gl.cdiv(rows, PER_TILE * BLOCK_M), gl.cdiv(out_features, BLOCK_N)
    # Constexprs and None stay constexprs only where they are written in the call itself.
    gl.warp_specialize(
        [
            (_consume, (
                x_slots, weight_slots, residual_slots, full, empty, turn, residual_full, residual_empty, out_ptr,
                partials_ptr, partials_out_ptr, column_sum_ptr, bias_ptr, tiles_m, tiles_n, rows, out_features,
                in_features, eps, 0, ACTIVATION, ALIGN_N, PARTIAL_WIDTH, PARTIALS_PER_STEP, GROUP_M, PDL,
            )),
            (_consume, (
                x_slots, weight_slots, residual_slots, full, empty, turn, residual_full, residual_empty, out_ptr,
                partials_ptr, partials_out_ptr, column_sum_ptr, bias_ptr, tiles_m, tiles_n, rows, out_features,
                in_features, eps, 1, ACTIVATION, ALIGN_N, PARTIAL_WIDTH, PARTIALS_PER_STEP, GROUP_M, PDL,
            )),
            (_produce, (
                x_desc, weight_desc, residual_desc, x_slots, weight_slots, residual_slots, full, empty, residual_full,
                residual_empty, tiles_m, tiles_n, in_features, GROUP_M, PDL,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _row_reasons(name, t):
    """Why the rows of t [..., K] cannot be read, by TMA or 16 bytes at a time."""
    stride = launch.row_stride(t)
    if stride is None or t.stride(-1) != 1:
        return [f"{name} has strides {tuple(t.stride())}, expected rows of adjacent elements at one stride"]
    if stride < t.shape[-1]:
        return [f"{name} has rows of {t.shape[-1]} elements at a stride of {stride}: they overlap"]
    if launch.vector_bytes(t, stride) < 16:
        return [f"{name} has rows that do not begin at multiples of 16 bytes"]
    return []


def linear_hopper_not_supported_reasons(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
    norm: Any = None,
    with_partials: bool = False,
) -> list[str]:
    """Why ``linear_hopper`` cannot take these arguments, which ``linear`` can."""
    if launch.INTERPRETED:
        return ["Triton's interpreter has no Gluon"]
    reasons = launch.device_reasons(x, weight, bias, residual)
    if reasons:
        return reasons
    arch = configs.arch_of(x.device)
    if arch != 90:
        reasons.append(f"the device is sm_{arch}, expected sm_90")
    if activation in GATED:
        reasons.append(f"{activation} takes two accumulators")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"weight has dtype {weight.dtype}, expected torch.float16 or torch.bfloat16")
    for name, t in (("x", x), ("residual", residual)):
        if t is not None and t.dtype != weight.dtype:
            reasons.append(f"{name} has dtype {t.dtype}, expected {weight.dtype} (as weight)")
    reasons += _row_reasons("x", x) + _row_reasons("weight", weight)
    if residual is not None:
        reasons += _row_reasons("residual", residual) if residual.is_contiguous() else ["residual is not contiguous"]
    if norm is not None and (residual is not None or with_partials):
        reasons.append("a folded LayerNorm takes no residual and emits no partials")
    return reasons


def linear_hopper(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
    norm: Any = None,
    with_partials: bool = False,
    pdl: bool = False,
    config: LinearHopperConfig | None = None,
) -> tuple[Tensor, RowPartials | None]:
    """(out, its ``RowPartials`` or None).

    ``norm``: (RowPartials of x, eps, column sums of weight) of a folded LayerNorm. ``pdl``: launched with PDL, behind a
    kernel that does not write weight.
    Only for arguments for which ``linear_hopper_not_supported_reasons`` is empty.
    """
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    check_rows("linear", rows)
    config = config or LinearHopperConfig()
    out = torch.empty((*x.shape[:-1], out_features), dtype=weight.dtype, device=x.device)
    partials_out = None
    if with_partials:
        parts = configs.cdiv(out_features, config.block_n)
        values = torch.empty(2, parts, rows, dtype=torch.float32, device=x.device)
        partials_out = RowPartials(values, config.block_n)
    if rows == 0:
        return out, partials_out

    (partials, partial_width), eps, column_sum = norm or ((None, 1), 0.0, None)
    element = gl.float16 if weight.dtype == torch.float16 else gl.bfloat16

    def descriptor(t, size, block):
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return TensorDescriptor(t, [size, t.shape[-1]], [launch.row_stride(t), 1], block, layout)

    tiles = configs.cdiv(rows, config.block_m) * configs.cdiv(out_features, config.block_n)
    block_m, piece_m = config.consumer_rows, PIECE_M.value
    piece = [piece_m, block_m * config.block_n // (4 * piece_m)]
    with launch.device_guard(x):
        _linear_hopper_fwd_kernel[(min(tiles, configs.multiprocessors_of(x.device)),)](
            out,
            descriptor(x, rows, [block_m, BLOCK_K]),
            descriptor(weight, out_features, [config.block_n, BLOCK_K]),
            residual if residual is None else descriptor(residual, rows, piece),
            partials, partials_out and partials_out.values, launch.vector(column_sum), launch.vector(bias),
            rows, out_features, in_features, eps,
            ACTIVATION=activation,
            ALIGN_N=math.gcd(16, out_features),
            PARTIAL_WIDTH=partial_width,
            PARTIALS_PER_STEP=1 if norm is None else partials_per_step(in_features, partial_width),
            GROUP_M=config.group_m,
            STAGES=config.num_stages,
            PER_TILE=2 if config.cooperative else 1,
            **launch.options(pdl, 4, maxnreg=REGISTERS),
        )  # fmt: skip
    return out, partials_out
