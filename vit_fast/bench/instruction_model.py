"""The time of one launch by a model of instructions; never a measurement.

A program of a matrix product alternates between the tensor cores, which the programs of one multiprocessor share, and
the rest (latencies, prologue, epilogue), which it does alone:

    S   clocks on the tensor cores, or of shared memory at 128 bytes a clock where that takes longer
    D   clocks of the rest: instructions of a warp at 0.6 a clock, and latencies that nothing hides

With n programs on a multiprocessor a program takes cycle(n) = D + S·(1 + queue(n − 1)) clocks: the mean-value analysis
of a closed queue (Reiser and Lavenberg, 1980). A multiprocessor that runs m programs, P at once, takes m/P·cycle(P), or
cycle(m) where m < P; the launch takes as long as the fullest one, m = ceil(programs / multiprocessors). Memory runs
beside that: (compute⁴ + memory⁴)^¼. No estimate is below the roofline bound.

The counts were read from compiled sm_90 kernels of this project and fitted to five launches of ViT-B/16 at batch 256;
tests/bench/test_predict.py holds the model to them. Loads from L2 are not modelled beyond their latency. For other
architectures the same counts stand in.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .gpus import Gpu
from .launches import Launch
from .operations import Operation
from .resources import Resources

# What large products and copies reach of the stated rates, seen on H100 and H200: 0.79 in 16 bits (780 of 989 TFLOP/s),
# 0.66 in float8 (1,300 of 1,979), 0.90 of memory (4.3 of 4.8 TB/s).
SHARES = {"float8": 0.66}
FLOP_SHARE, BYTE_SHARE = 0.79, 0.90
GAP, PDL_GAP = 1.0e-6, 0.3e-6  # seconds between dependent launches of one stream
SHARED_BYTES = 128  # a clock
WARP_RATE, ISSUE_RATE = 0.6, 4.0  # instructions a clock: of one warp, of a multiprocessor
LATENCY = 1000  # clocks from asking memory for a tile to having it
START = 700  # clocks of a program before its first load has come

# Instructions of a thread for each element of a tile.
BASE, FOLD, RESIDUAL, STORE_STATISTICS, SPLIT = 17, 2, 3, 8, 2
ACTIVATIONS = {"gelu": 15, "gelu_tanh": 11, "quick_gelu": 8, "silu": 8, "relu": 1}
SHORT_GELU = 9  # rounded to bfloat16 or e4m3
READ_STATISTICS, READ_PARTIAL = 140, 35  # for each program that merges partials, and for each that it merges at once
STATISTICS_LATENCY = 600  # clocks of mean and rstd of each row, asked from L2 behind the loop
RESIDUAL_LATENCY = 520  # clocks of each batch of 32 elements, one after the other
POINTER_LOAD = 8  # for each piece of 16 bytes that a thread loads through pointers
SOFTMAX, ONLINE = 14, 3  # for each score; more where the softmax is online
ROUND, OF_NORM = 7, {None: 0, "rms": 9, "layer": 16}  # for each element of a token that is rounded; more for its norm
KERNEL = 1.05  # how much longer a pass over memory takes than its bytes
LIBRARY = 1.15  # how much longer an operation of PyTorch takes than its roofline bound


@dataclass(frozen=True)
class Estimate:
    """Seconds of one launch: of the model, and of the roofline bound; ``waves``: programs / programs held at once."""

    seconds: float
    roofline: float
    waves: float | None = None
    programs_per_multiprocessor: int | None = None


def rate_of(dtype: torch.dtype, tf32: bool) -> str:
    """The name under which a GPU lists the rate of products in a dtype."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "float32"
    return str(dtype).removeprefix("torch.").replace("float8_e4m3fn", "float8")


def flop_rate(gpu: Gpu, rate: str) -> float:
    """FLOP a second that a large product is taken to reach."""
    return 1e12 * gpu.tflops[rate] * SHARES.get(rate, FLOP_SHARE)


def byte_rate(gpu: Gpu) -> float:
    """Bytes a second that a copy is taken to reach."""
    return 1e12 * gpu.tb_per_s * BYTE_SHARE


def cycle(n: int, shared: float, own: float) -> float:
    """Clocks from one program's end to its successor's, n at once: ``shared`` of one resource, ``own`` alone."""
    queue, took = 0.0, shared + own
    for programs in range(1, n + 1):
        wait = shared * (1 + queue)
        took = own + wait
        queue = programs * wait / took if took else 0.0
    return took


def busy_clocks(programs: int, multiprocessors: int, held: int, shared: float, own: float, issue: float) -> float:
    """Clocks of the fullest multiprocessor; ``issue``: those in which a program keeps all its schedulers."""
    most = -(-programs // multiprocessors)
    at_once = min(most, held)
    return max(most / at_once * cycle(at_once, shared, own), most * max(shared, issue))


def _own_clocks(instructions, warps):
    """(clocks of instructions of one warp, those that keep the schedulers), of a program of so many warps."""
    return instructions / min(WARP_RATE, ISSUE_RATE / warps), instructions * warps / ISSUE_RATE


def _tile_clocks(a, depth, itemsize, flop_per_clock, arch):
    """Clocks of the tensor cores, or of shared memory where they are more, for a tile over so much depth."""
    m, n, warps = a["BLOCK_M"], a["BLOCK_N"] * (2 if a.get("GATED") else 1), a["num_warps"]
    tensor = 2 * m * n * depth / flop_per_clock
    if 90 <= arch < 100:  # wgmma: both operands of 64 rows come from shared memory
        read = m + n * -(-m // 64)
    elif 100 <= arch < 120:  # tcgen05: 128 rows
        read = m + n * -(-m // 128)
    else:  # mma.sync: every warp of a grid of warps loads its own
        down = 2 if warps <= 4 else 4
        read = m * max(1, warps // down) + n * down
    return max(tensor, (read + m + n) * depth * itemsize / SHARED_BYTES)


def _gemm(a, dtype, gpu, rate, resources, programs, depth):
    """Clocks of a GEMM; ``depth``: of the sums of one program."""
    itemsize, warps = dtype.itemsize, a["num_warps"]
    elements = a["BLOCK_M"] * a["BLOCK_N"] / (32 * warps)
    steps, stages = -(-depth // a["BLOCK_K"]), a["num_stages"]
    shared = _tile_clocks(a, steps * a["BLOCK_K"], itemsize, gpu.flop_per_clock(rate), gpu.arch)
    each = BASE + ACTIVATIONS.get(a.get("ACTIVATION"), 0)
    if a.get("ACTIVATION") == "gelu" and dtype in (torch.bfloat16, torch.float8_e4m3fn):
        each += SHORT_GELU - ACTIVATIONS["gelu"]
    fixed, latency = 0.0, float(START)
    if a.get("norm") is not None:
        each += FOLD
        if a.get("PARTIAL_WIDTH", 1) > 0:
            fixed += READ_STATISTICS + READ_PARTIAL * a.get("PARTIALS_PER_STEP", 16)
        else:
            latency += STATISTICS_LATENCY
    if a.get("GATED"):
        each += BASE // 2
    if a.get("residual") is not None:
        each += RESIDUAL
        latency += RESIDUAL_LATENCY * -(-elements // 32)
    if a.get("partials_out_ptr") is not None:
        each += STORE_STATISTICS
    if a.get("SPLIT_K", 1) > 1:
        each += SPLIT * (1 + a["SPLIT_K"])
        latency += 2 * LATENCY
    if not a.get("DESCRIPTORS", False):
        pieces = (a["BLOCK_M"] + a["BLOCK_N"]) * a["BLOCK_K"] * itemsize / 16 / (32 * warps)
        fixed += POINTER_LOAD * pieces * steps
    round_trips = -(-steps // max(1, stages - 1)) * LATENCY
    own, issue = _own_clocks(fixed + each * elements, warps)
    own += latency + max(0.0, round_trips - shared)
    held = resources.programs(gpu, warps)
    return busy_clocks(programs, gpu.multiprocessors, held, shared, own, issue)


def _attention(a, dtype, gpu, rate, resources, programs):
    """Clocks of attention: the scores of BLOCK_M queries are computed, exponentiated and multiplied with v."""
    warps, rows = a["num_warps"], a["BLOCK_M"]
    keys, size = a["num_keys"], 16 * -(-a["D"] // 16)
    online = "CHUNKS" not in a
    if online:
        blocks, step = 1, a["BLOCK_N"]
        keys = step * -(-keys // step)
        latency = START + LATENCY + LATENCY * -(-keys // step) / max(1, a["num_stages"])
    else:
        blocks, keys, latency = a["blocks_per_program"], 16 * -(-keys // 16), START + 1300
    of_values = 16 * -(-a.get("DV", a["D"]) // 16)
    shared = blocks * 2 * rows * keys * (size + of_values) / gpu.flop_per_clock(rate)
    each = SOFTMAX + (ONLINE if online else 0)
    instructions = blocks * (each * rows * keys + 4 * rows * of_values) / (32 * warps)
    own, issue = _own_clocks(instructions, warps)
    held = resources.programs(gpu, warps)
    # The schedulers are kept by two thirds of it: the others are exponentials and waits.
    return busy_clocks(programs, gpu.multiprocessors, held, shared, own + latency, issue * 2 / 3)


def _rounded_tokens(a, gpu, resources, programs):
    """Clocks of the rounding of tokens, whose elements stay in registers between one load and one store."""
    warps = a["num_warps"]
    each = ROUND + OF_NORM[a["NORM"]]
    own, issue = _own_clocks(each * a["ROWS"] * a["BLOCK"] / (32 * warps), warps)
    held = resources.programs(gpu, warps)
    return busy_clocks(programs, gpu.multiprocessors, held, 0.0, own + START + LATENCY, issue)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def estimate(
    launch: Launch, operation: Operation | None, dtype: torch.dtype, gpu: Gpu, resources: Resources
) -> Estimate:
    """The time of one launch of a Triton kernel; ``dtype``: that of the model."""
    a = {name: _plain(value) for name, value in launch.arguments.items()}
    tf32 = a.get("PRECISION") == "tf32"
    product = torch.float8_e4m3fn if operation is not None and operation.narrow else dtype
    rate = rate_of(product, tf32)
    flop = operation.flop if operation else 0
    moved = operation.bytes if operation else sum(t.numel() * t.element_size() for t in launch.tensors())
    memory = moved / byte_rate(gpu)
    roofline = max(flop / flop_rate(gpu, rate), memory)
    held = resources.programs(gpu, a["num_warps"])
    if "patch_embed" in launch.name:
        depth = next(t for name, t in launch.arguments.items() if name == "weight_ptr")[0].numel()
        clocks = _gemm(a, product, gpu, rate, resources, launch.programs, depth)
    elif "BLOCK_K" in a:
        depth = -(-a["in_features"] // a.get("SPLIT_K", 1))
        clocks = _gemm(a, product, gpu, rate, resources, launch.programs, depth)
    elif "BLOCK_M" in a:
        clocks = _attention(a, product, gpu, rate, resources, launch.programs)
    elif "quantise_tokens" in launch.name:
        memory *= KERNEL
        clocks = _rounded_tokens(a, gpu, resources, launch.programs)
    else:
        memory *= KERNEL
        clocks = 2 * LATENCY * math.ceil(launch.programs / (gpu.multiprocessors * held))
    compute = clocks / (1e9 * gpu.sustained_ghz)
    seconds = (compute**4 + memory**4) ** 0.25
    waves = launch.programs / (gpu.multiprocessors * held)
    return Estimate(max(seconds, roofline), roofline, waves, held)


def library(operation: Operation, dtype: torch.dtype, gpu: Gpu, tf32: bool) -> Estimate:
    """The time of an operation of PyTorch, of which no launch is known."""
    rate = rate_of(dtype, tf32)
    roofline = max(operation.flop / flop_rate(gpu, rate), operation.bytes / byte_rate(gpu))
    return Estimate(LIBRARY * roofline + 2 * LATENCY / (1e9 * gpu.sustained_ghz), roofline)
