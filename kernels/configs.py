"""Launch configurations as data: a frozen dataclass per kernel and the rule that picks one.

``arch`` is 10·major + minor of the compute capability (80, 90, 100). Tiles come from ahead-of-time
compiles (no spills, wgmma not serialised, shared memory within the limit), not from timings:
where a figure was measured on a GPU, its machine, date and commit stand beside the entry. A file of kernels/tuned/
(``tuned``) may replace what the rule of the linear layers picks on a device.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from . import tuned


# Triton's own helpers also run in device code, so each call unwraps constexprs; a launch makes several such calls.
def cdiv(a: int, b: int) -> int:
    """⌈a/b⌉."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


@cache
@tuned.reads_tables
def arch_of(device: torch.device) -> int:
    """10·major + minor of a CUDA device; tensors elsewhere (interpreter) take the tiles of sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class LayerNormConfig:
    rows: int  # rows per program, while a row fits in one block
    block: int
    num_warps: int


def pick_layer_norm_config(width: int) -> LayerNormConfig:
    """Depends on the width alone, so that the sums of a row are taken in one order at every batch size."""
    block = max(16, power_of_two(width))
    if block > 16384:
        return LayerNormConfig(rows=1, block=4096, num_warps=8)
    return LayerNormConfig(rows=max(1, 4096 // block), block=block, num_warps=4 if block <= 4096 else block // 1024)


@dataclass(frozen=True)
class RowStatisticsConfig:
    rows: int  # per program
    num_warps: int


ROW_STATISTICS = RowStatisticsConfig(rows=128, num_warps=4)


@dataclass(frozen=True)
class LayerNormBwdConfig:
    rows: int  # rows of a tile, while a row fits in one block
    block: int
    num_warps: int
    programs: int = 512  # at most, while a row fits: each leaves a row of partial sums
    chunk: int = 64  # rows whose sums one program takes, of wider rows


def pick_layer_norm_bwd_config(width: int) -> LayerNormBwdConfig:
    """About 8 elements of each tensor a thread; with 16 ptxas spills on sm_100. Depends on the width alone, as in the
    forward."""
    block = max(16, power_of_two(width))
    if block > 8192:
        return LayerNormBwdConfig(rows=1, block=1024, num_warps=4)
    return LayerNormBwdConfig(rows=max(1, 1024 // block), block=block, num_warps=4 if block <= 2048 else block // 512)


@dataclass(frozen=True)
class LinearConfig:
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool  # where addresses and strides allow it
    split_k: int = 1  # programs that share the K loop of one tile
    maxnreg: int | None = None  # the most registers a thread; None leaves them to ptxas


@tuned.overrides
def pick_linear_config(
    rows: int,
    out_features: int,
    gated: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    tf32: bool,
    unaligned: bool,
    arch: int,
) -> LinearConfig:
    """``dtype`` is that of x and weight. A gated activation has two accumulators, hence tiles half as wide;
    ``unaligned``: pointers load in pieces under 16 bytes.

    128 large tiles are about one per SM; below that, smaller ones keep more SMs busy. ``block_k`` does not change the
    bits: the sums over K run in one order.
    """
    columns = out_features * 2 if gated else out_features
    few = cdiv(rows, 128) * cdiv(columns, 128) < 128
    hopper, blackwell = 90 <= arch < 100, 100 <= arch < 120  # sm_86, sm_89, sm_120: 99 KB of shared memory, mma.sync
    small = few and not blackwell  # tcgen05 works on 128 rows
    tma = hopper or blackwell
    if dtype == torch.float8_e4m3fn and unaligned:
        tile = (64, 64, 32, 4, 3) if small else (128, 64, 32, 8, 3)
    elif dtype == torch.float8_e4m3fn:
        depth = 128 if tma else 64
        tile = ((64 if small else 128), 64, depth, 4, 4) if few else (128, 128, depth, 4 if hopper else 8, 3)
    elif dtype not in (torch.float16, torch.bfloat16) and not tf32:
        tile = (64, 64, 16, 4, 3) if few else (128, 64, 16, 8, 3)
        tma = False
    elif unaligned:
        tile = (64, 64, 32, 4, 3) if small else (128, 128, 32, 8, 3)
    elif tf32:
        tile = (64, 64, 32, 4, 3) if small else (128, 64, 32, 4, 3)
    elif few:
        tile = (64, 64, 64, 4, 4) if small else (128, 64, 64, 4, 4)
    elif tma:
        tile = (128, 128, 64, 4, 3)
    else:
        tile = (128, 128, 32, 8 if out_dtype.itemsize > dtype.itemsize else 4, 4)
    block_m, block_n, block_k, num_warps, num_stages = tile
    return LinearConfig(block_m, block_n // 2 if gated else block_n, block_k, 8, num_warps, num_stages, tma)


def pick_linear_train_config(
    rows: int,
    out_features: int,
    two_products: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    tf32: bool,
    unaligned: bool,
    arch: int,
    heavy: bool,
) -> LinearConfig:
    """Of the GEMM of training; ``heavy``: its epilogue draws a dropout mask, or reads one tile and writes two, for
    which four warps have too few registers."""
    config = pick_linear_config(rows, out_features, two_products, dtype, out_dtype, tf32, unaligned, arch)
    return replace(config, num_warps=8) if heavy and config.block_m == 128 else config


def split_k_config(
    config: LinearConfig, rows: int, out_features: int, in_features: int, processors: int
) -> LinearConfig:
    """``config`` with split-K, where there are too few tiles for two on each multiprocessor.

    Each program keeps at least 6 steps of the K loop. The bits then depend on the number of rows.
    """
    tiles = cdiv(rows, config.block_m) * cdiv(out_features, config.block_n)
    most = min(2 * processors // tiles, cdiv(in_features, config.block_k) // 6, 8)
    return config if most < 2 else replace(config, split_k=1 << (most.bit_length() - 1))


STATISTICS = ("partials", "finalised", "plain")  # forms of the row statistics of a stack (``prepared_blocks``)


@dataclass(frozen=True)
class StackConfig:
    statistics: str  # one of STATISTICS


@tuned.overrides
def pick_stack_config(rows: int, width: int, arch: int) -> StackConfig:
    """Of a stack of prepared blocks."""
    return StackConfig("partials")


def use_pdl(rows: int, arch: int) -> bool:
    """Whether the kernels of a stack of blocks are launched with PDL (``launch``), which needs capability 9.0.

    Expected to help where kernels are short; not measured.
    """
    return arch >= 90 and rows <= 8192


def alternate_tile_order(rows: int) -> bool:
    """Whether the products that end a branch of prepared blocks compute their last tiles first, and so begin with what
    the kernel before has written last: where activations are larger than L2, they find it there.

    Expected to help; not measured.
    """
    return rows > 8192


@dataclass(frozen=True)
class PatchEmbedConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def pick_patch_embed_config(rows: int, width: int, dtype: torch.dtype, precision: str) -> PatchEmbedConfig:
    """``rows`` is batch · patches. All tiles of a dtype share ``block_k``, which orders the sums."""
    large = cdiv(rows, 128) * cdiv(width, 128) >= 120  # a wave of 128 × 128 tiles on an A100 or H200
    if dtype in (torch.float32, torch.float64):
        if precision == "tf32" and large:
            return PatchEmbedConfig(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3)
        stages = 3 if precision == "tf32" else 2
        return PatchEmbedConfig(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=stages)
    block = 128 if large else 64
    return PatchEmbedConfig(block_m=block, block_n=block, block_k=64, num_warps=8, num_stages=3)


@dataclass(frozen=True)
class AttentionConfig:
    block_m: int  # queries per step
    block_n: int  # keys per step of the streaming kernel; 0: the resident kernel
    num_warps: int
    num_stages: int
    tma: bool = False  # tensor descriptors, where the layout allows them


# sm_90, sm_100, 64 queries by 4 warps: the most keys that stay on chip without a spill, by padded head size.
_RESIDENT_KEYS = {16: 272, 32: 272, 48: 208, 64: 272, 80: 208}


@cache
def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pick_attention_config(
    num_queries: int,
    num_keys: int,
    head_size: int,
    dtype: torch.dtype,
    tf32: bool,
    arch: int,
    fp8_out: bool = False,
    options: bool = False,
    lse: bool = True,
) -> AttentionConfig:
    """Ignores the batch size, so that the bits of an image cannot depend on its batch mates.

    ``lse``: whether the LSE is stored. ``options``: whether the call has any, which the streaming kernel alone knows.
    On sm_90 two stages make ptxas serialise wgmma, whose operands then come out of arithmetic.

    An e4m3 out gets no tiles of 128 queries: for a head of two slices (72 = 64 + 16) ptxas serialises their wgmma.
    """
    width = cdiv(head_size, 16) * 16
    if dtype in (torch.float32, torch.float64):
        if width > 128:
            warps, stages = (8, 2) if tf32 else (4, 1)
            return AttentionConfig(block_m=16, block_n=16, num_warps=warps, num_stages=stages)
        if options:
            return AttentionConfig(block_m=64, block_n=16, num_warps=8, num_stages=1)
        if width > 64:
            return AttentionConfig(block_m=32, block_n=32, num_warps=8, num_stages=1)
        return AttentionConfig(block_m=64, block_n=32, num_warps=8, num_stages=2)
    # Consumer Blackwell (120) has the MMA and the shared memory of sm_80 and sm_86.
    wgmma = 90 <= arch < 120
    if num_queries <= 16:
        return AttentionConfig(block_m=16, block_n=32 if width <= 128 else 16, num_warps=4, num_stages=2)
    if options and (wgmma or width > 64):
        block_n = 64 if width <= 128 else 16
        return AttentionConfig(block_m=128 if wgmma else 64, block_n=block_n, num_warps=8, num_stages=1)
    most = _RESIDENT_KEYS.get(width, 128) if wgmma else 128
    if head_size == 72 and 90 <= arch < 100 and not (lse or fp8_out):  # So400m: 240 registers, two programs an SM
        most = 256
    if not options and width <= 128 and num_keys <= most:
        return AttentionConfig(block_m=64, block_n=0, num_warps=4, num_stages=1, tma=wgmma)
    if wgmma:
        if width > 160:
            return AttentionConfig(block_m=128, block_n=32, num_warps=8, num_stages=2, tma=True)
        if num_queries > 512 and not fp8_out:
            return AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True)
        return AttentionConfig(block_m=64, block_n=64, num_warps=4, num_stages=2, tma=True)
    if width > 128:
        return AttentionConfig(block_m=32, block_n=16, num_warps=4, num_stages=2)
    return AttentionConfig(block_m=64, block_n=64 if width <= 96 else 32, num_warps=4, num_stages=2)


@dataclass(frozen=True)
class AttentionBwdConfig:
    by_keys: AttentionConfig  # dk and dv, with dq too where block_n holds all keys
    by_queries: AttentionConfig  # dq


def pick_attention_bwd_config(
    num_keys: int, head_size: int, dtype: torch.dtype, arch: int, special: bool
) -> AttentionBwdConfig:
    """Ignores the batch size and the number of queries, so that bits depend on neither. ``special``: lengths of keys,
    dropout, heads of v of another size, or a compiler that spills without these.

    On sm_90 and sm_100 a program holds up to 256 keys of a head of one slice, at 255 registers; TMA saves those of the
    pointers. Wider heads have smaller tiles, where ptxas otherwise spills or serialises wgmma. On sm_100 the compiler
    drops the products of a tile of 128 queries for heads of three slices (104 = 64 + 32 + 16).
    """
    width, wgmma = cdiv(head_size, 16) * 16, 90 <= arch < 120
    if dtype in (torch.float32, torch.float64):
        if width > 64:
            tile = AttentionConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
            return AttentionBwdConfig(tile, tile)
        by_keys = AttentionConfig(block_m=16, block_n=32, num_warps=8, num_stages=1)
        return AttentionBwdConfig(by_keys, AttentionConfig(block_m=32, block_n=16, num_warps=8, num_stages=1))
    if width > 128:
        by_keys = AttentionConfig(block_m=16, block_n=32, num_warps=8, num_stages=1)
        return AttentionBwdConfig(by_keys, AttentionConfig(block_m=64, block_n=16, num_warps=8, num_stages=1))
    if width > 80:
        by_keys = AttentionConfig(block_m=32 if wgmma and not special else 16, block_n=64, num_warps=8, num_stages=1)
        stages = 2 if wgmma else 1
        return AttentionBwdConfig(by_keys, AttentionConfig(block_m=64, block_n=32, num_warps=4, num_stages=stages))
    if wgmma or width <= 64:
        by_queries = AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=2)
    else:
        by_queries = AttentionConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    if num_keys <= 64 or not wgmma:
        by_keys = AttentionConfig(block_m=32, block_n=64, num_warps=8, num_stages=1)
    elif 128 < num_keys <= 256 and head_size in (16, 32, 64) and not special:
        by_keys = AttentionConfig(block_m=32, block_n=256, num_warps=8, num_stages=1, tma=True)
    else:
        by_keys = AttentionConfig(block_m=32, block_n=128, num_warps=8, num_stages=1 if width < 64 else 2)
    return AttentionBwdConfig(by_keys, by_queries)
