"""kernels/linear_hopper.py, as far as it can be shown without a GPU, and on one.

The protocol: the kernel's own text runs on ``gluon_model`` under random schedules and yields exact products; each of a
list of small changes to it fails. Epilogue, tile walk and launch: the same text without its layouts runs in Triton's
interpreter, the ring replaced by a plain product, and is held to the budget (``support.budget``) by the formulas of
``test_linear``. What neither runs is the generated code: layouts, wgmma, TMA, memory ordering. That is for a GPU, where
every group of runs has a child process, which a run that hangs ends.
"""

import faulthandler
import functools
import itertools
import random
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from support import gluon_model, sanitizer
from support.budget import assert_within_budget
from support.large_tensors import last_programs_alone, reserved
from support.linear import centred, formula, problem, stream, wide
from vit_fast.kernels import configs, reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from vit_fast.kernels import linear_hopper as kernels  # noqa: E402
from vit_fast.kernels.layer_norm import RowPartials, row_partials  # noqa: E402
from vit_fast.kernels.linear import folded_linear, linear_with_partials  # noqa: E402
from vit_fast.kernels.linear_hopper import (  # noqa: E402
    LinearHopperConfig,
    linear_hopper,
    linear_hopper_not_supported_reasons,
)

BOTH = torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", BOTH, ids=("float16", "bfloat16"))
ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "relu")
SCHEDULES = 150
SECONDS = 20  # of the first run on a GPU


# The protocol


def product(functions, seed):
    """An exact product of random integers by the kernel on a model of the machine, in pieces of 2 × 2."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    m, n, k = draw.randint(1, 20), draw.randint(1, 20), draw.randint(1, 12)
    stages, group = draw.randint(2, 4), draw.choice((1, 2, 8))
    per_tile, height, width = draw.choice(((1, 4, 4), (2, 2, 8), (2, 4, 4)))  # what a consumer computes at a time
    programs = min(draw.choice((1, 1, 2, 3)), -(-m // (per_tile * height)) * -(-n // width))
    with_residual, early = draw.random() < 0.5, draw.random() < 0.5
    x, weight, residual = (numbers.integers(-3, 4, shape).astype(float) for shape in ((m, k), (n, k), (m, n)))
    out = np.full((m, n), np.nan)
    for program in range(programs):
        gluon_model.Machine(8 * seed + program, program, programs, early)
        weights = gluon_model.Matrix(weight, (width, 2), constant=True, readers=per_tile)
        functions["_linear_hopper_fwd_kernel"](
            out, gluon_model.Matrix(x, (height, 2)), weights,
            gluon_model.Matrix(residual, (2, 2)) if with_residual else None,
            None, None, None, None, m, n, k, 0.0,
            ACTIVATION=None, ALIGN_N=16, PARTIAL_WIDTH=1, PARTIALS_PER_STEP=1, GROUP_M=group, STAGES=stages,
            PER_TILE=per_tile, PDL=early,
        )  # fmt: skip
    assert np.array_equal(out, x @ weight.T + residual * with_residual)


def test_the_protocol_keeps_every_schedule():
    functions = gluon_model.functions(kernels)
    for seed in range(SCHEDULES):
        product(functions, seed)


FAULTS = (
    (
        "_produce",
        "                mbarrier.wait(empty.index(slot), _empty_parity(step, STAGES))\n",
        "",
        "still read|too many",
    ),
    ("_empty_parity", " ^ 1", "", "every partition waits"),
    ("_full_parity", "& 1", "& 1 ^ 1", ""),
    ("_full_parity", "// STAGES", "// (STAGES - 1)", ""),
    ("_consume", "mbarrier.wait(turn.index(CONSUMER), _turn_parity(turns, CONSUMER))", "pass", ""),
    ("_turn_parity", " ^ (1 - CONSUMER)", "", "every partition waits"),
    ("_turn_parity", "(1 - CONSUMER)", "CONSUMER", ""),
    ("_consume", "arrive(turn.index(1 - CONSUMER)", "arrive(turn.index(CONSUMER)", ""),
    ("_consume", "mbarrier.arrive(turn.index(1 - CONSUMER), count=1)", "pass", "every partition waits"),
    ("_consume", "        turns += 1\n", "", ""),
    ("_consume", "first += TURNS * steps", "first += steps", ""),
    ("_consume", "first = TURN * steps", "first = 0", ""),
    ("_multiply", "mbarrier.wait(full.index(slot), _full_parity(step, STAGES))", "pass", "before it is written"),
    ("_multiply", "warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,", "still read"),
    ("_multiply", "    acc = warpgroup_mma_wait(0, deps=(acc,))\n", "", "before its products are done"),
    ("_multiply", "    mbarrier.arrive(empty.index((first + steps - 1) % STAGES), count=1)\n", "", ""),
    ("_multiply", "if step > first:", "if step > 0:", ""),
    ("_multiply", "index((step - 1) % STAGES)", "index(step % STAGES)", ""),
    ("_open", " + weight_desc.block_type.nbytes", "", "before it is written|every partition waits"),
    ("_produce", "            step += 1\n", "            step += k > 0\n", ""),
    ("_open", "[left, k]", "[k, left]", ""),
    ("_produce", "full, slot, tile_n * BLOCK_N, slot", "full, slot, tile_m * BLOCK_N, slot", ""),
    ("_produce", "        gdc_wait()\n", "", "before the kernel before has ended"),
    ("_consume", "        gdc_wait()\n", "        pass\n", "before the kernel before has ended"),
    ("_produce", "step >= opened", "step > opened", ""),
    ("_produce", "if step >= opened:", "if True:", ""),
    ("_produce", "STAGES)\n        for slot", "STAGES + 1)\n        for slot", ""),
    ("_produce", "tl.minimum(gl.cdiv(depth, BLOCK_K), STAGES)", "STAGES", ""),
    (
        "_produce",
        "mbarrier.wait(residual_empty.index(consumer), _residual_parity(turns // 2) ^ 1)",
        "pass",
        "still read",
    ),
    ("_produce", "_residual_parity(turns // 2) ^ 1", "_residual_parity(turns // 2)", "every partition waits"),
    ("_produce", "consumer = turns % 2", "consumer = 0", ""),
    ("_load_residual", "4 * residual_desc", "3 * residual_desc", ""),
    ("_load_residual", "piece // ACROSS", "piece % 2", ""),
    ("_consume", "mbarrier.wait(residual_full.index(CONSUMER), _residual_parity(turns))", "pass", ""),
    ("_consume", "            mbarrier.arrive(residual_empty.index(CONSUMER), count=1)\n", "", "every partition waits"),
    ("_consume", "_slots.index(4 * CONSUMER + 2", "_slots.index(2", ""),
    ("tile_position", "GROUP_M)\n    tile -=", "GROUP_M + 1)\n    tile -=", ""),
    ("_linear_hopper_fwd_kernel", "count=PER_TILE", "count=2", "every partition waits"),
    ("_linear_hopper_fwd_kernel", "count=PER_TILE", "count=1", "still read|too many"),
    ("_open", "PER_TILE * x_desc", "x_desc", "before it is written|every partition waits"),
    ("_produce", "[(tile_m * PER_TILE + i) * BLOCK_M, k]", "[tile_m * PER_TILE * BLOCK_M, k]", ""),
    ("_produce", "slot * PER_TILE + i)", "slot * PER_TILE)", "still read"),
    ("_produce", "consumer, (tile_m * PER_TILE + i) * BLOCK_M", "consumer, tile_m * PER_TILE * BLOCK_M", ""),
    ("_multiply", "slot * PER_TILE + PART", "slot * PER_TILE", ""),
    ("_consume", "* PER_TILE + PART) * BLOCK_M", "* PER_TILE) * BLOCK_M", "stored twice"),
    ("_consume", "gl.constexpr = CONSUMER % TURNS", "gl.constexpr = CONSUMER", ""),
    ("_consume", "// ACROSS * PIECE_M", "% 2 * PIECE_M", ""),
    (
        "_linear_hopper_fwd_kernel",
        'gl.static_assert(STAGES > 1, "a slot is given back one step late")',
        "STAGES = 1",
        "",
    ),
)


@pytest.mark.parametrize("name,old,new,words", FAULTS, ids=range(len(FAULTS)))
def test_a_faulty_protocol_is_caught(name, old, new, words):
    functions = gluon_model.functions(kernels, (name, old, new))
    with pytest.raises(AssertionError, match=words or None):
        for seed in range(SCHEDULES):
            product(functions, seed)


# Epilogue, tile walk and launch, interpreted


class Operand:
    """A matrix where the kernel has slots with tiles of it."""

    def __init__(self, pointer, stride, rows, depth, shape):
        self.pointer, self.stride, self.rows, self.depth, self.shape = pointer, stride, rows, depth, shape

    def tile(self, number, step):
        row = number.to(tl.int64) * self.shape[1] + tl.arange(0, self.shape[1])
        column = step * self.shape[2] + tl.arange(0, self.shape[2])
        mask = (row < self.rows)[:, None] & (column < self.depth)[None, :]
        pointers = self.pointer + row[:, None] * self.stride + column[None, :]
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


here = {}  # "tile": tile row and column of the tile that an interpreted program computes


class Residual:
    """The residual where the kernel has slots with pieces of its tile."""

    def __init__(self, pointer, rows, columns, per_tile, height, width):
        self.pointer, self.rows, self.columns = pointer, rows, columns
        self.per_tile, self.height, self.width = per_tile, height, width

    def index(self, number):
        self.number = number
        return self

    def load(self, layout):
        (tile_m, tile_n), (consumer, piece) = here["tile"], divmod(self.number, 4)
        across = 256 // self.height
        width = self.width // across
        top = (tile_m.to(tl.int64) * self.per_tile + consumer % self.per_tile) * self.height
        row = top + piece // across * 64 + tl.arange(0, 64)
        column = tile_n.to(tl.int64) * self.width + piece % across * width + tl.arange(0, width)
        mask = (row < self.rows)[:, None] & (column < self.columns)[None, :]
        return tl.load(self.pointer + row[:, None] * self.columns + column[None, :], mask=mask, other=0.0)


class Nobody:
    """A barrier that nobody waits at."""

    def index(self, i):
        return self


@functools.cache
def work_without_layouts():
    """The kernel's ``_consume`` over Triton's language; the product of a tile is read from where the operands lie."""

    def place(*arguments):
        here["tile"] = kernels.tile_position(*arguments)
        return here["tile"]

    def multiply(x, weight, full, empty, first, steps, part, layout):
        sums = tl.zeros([x.shape[1], weight.shape[1]], tl.float32)
        tile_m, tile_n = here["tile"]
        for step in range(steps):
            left = x.tile(tile_m * (x.shape[0] // weight.shape[0]) + part, step)
            sums = tl.dot(left, weight.tile(tile_n, step).T, sums, input_precision="ieee")
        return sums

    def nothing(*arguments, **options):
        return None

    def late(name):  # the interpreter puts its own functions into tl, launch by launch
        return lambda *arguments, **options: getattr(tl, name)(*arguments, **options)

    names = ("load", "store", "cdiv", "program_id", "num_programs")
    language = types.SimpleNamespace(
        **{name: late(name) for name in names}, int64=tl.int64, float32=tl.float32, static_range=range,
        arange=lambda first, end, layout: tl.arange(first, end), convert_layout=lambda t, *_, **__: t,
        SliceLayout=nothing, BlockedLayout=nothing, NVMMADistributedLayout=nothing,
    )  # fmt: skip
    barriers = types.SimpleNamespace(wait=nothing, arrive=nothing)
    space = dict(vars(kernels), gl=language, mbarrier=barriers, _multiply=multiply, tile_position=place, PIECE_M=64)
    space["tl"] = types.SimpleNamespace(debug_barrier=nothing)
    for name in ("_halves", "_finish", "_emit", "_consume"):
        space[name] = types.FunctionType(getattr(kernels, name).fn.__code__, space)
    return space["_consume"]


def work(x, weight, residual, *arguments):
    work_without_layouts()(x, weight, residual, None, None, *[Nobody()] * 3, *arguments)


@triton.jit
def twin(
    out_ptr, x_ptr, weight_ptr, stride_x, stride_w, residual_ptr, partials_ptr, partials_out_ptr, column_sum_ptr,
    bias_ptr, rows, out_features, in_features, eps, ACTIVATION: tl.constexpr, ALIGN_N: tl.constexpr,
    PARTIAL_WIDTH: tl.constexpr, PARTIALS_PER_STEP: tl.constexpr, GROUP_M: tl.constexpr, PER_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for consumer in tl.static_range(2):
        work(
            Operand(x_ptr, stride_x, rows, in_features, (4 * PER_TILE, BLOCK_M, 64)),
            Operand(weight_ptr, stride_w, out_features, in_features, (4, BLOCK_N, 64)),
            None if residual_ptr is None else Residual(residual_ptr, rows, out_features, PER_TILE, BLOCK_M, BLOCK_N),
            out_ptr, partials_ptr, partials_out_ptr, column_sum_ptr, bias_ptr,
            tl.cdiv(rows, PER_TILE * BLOCK_M), tl.cdiv(out_features, BLOCK_N), rows, out_features, in_features, eps,
            consumer, ACTIVATION, ALIGN_N, PARTIAL_WIDTH, PARTIALS_PER_STEP, GROUP_M, False,
        )  # fmt: skip


class Launcher:
    """Launches the twin in the place of the kernel."""

    def __getitem__(self, grid):
        def launch(out, x, weight, residual, *rest, STAGES, PDL, num_warps, maxnreg, **constants):
            assert x.block_shape[1] == weight.block_shape[1] == 64 and not PDL
            strides, height, width = (x.strides[0], weight.strides[0]), x.block_shape[0], weight.block_shape[0]
            if residual is not None:
                assert residual.block_shape == [64, width * height // 256]
                assert residual.shape == list(out.flatten(0, -2).shape) and residual.strides[0] == out.shape[-1]
                residual = residual.base
            twin[grid](
                out, x.base, weight.base, *strides, residual, *rest, **constants, BLOCK_M=height, BLOCK_N=width
            )  # fmt: skip

        return launch


@pytest.fixture
def interpreted(monkeypatch):
    """Three programs share the tiles."""
    monkeypatch.setattr(kernels, "_linear_hopper_fwd_kernel", Launcher())
    monkeypatch.setattr(configs, "multiprocessors_of", lambda device: 3)


NARROW = LinearHopperConfig(block_n=64, group_m=2)
WIDE = LinearHopperConfig(block_m=128, block_n=256, num_stages=3, cooperative=True)
TALL = LinearHopperConfig(block_m=256, block_n=128, group_m=2, num_stages=3, cooperative=True)
TILES = {"ping-pong": None, "narrow": NARROW, "wide": WIDE, "tall": TALL}
CONFIGS = (*TILES.values(), *(LinearHopperConfig(group_m=1, num_stages=stages) for stages in (2, 6)))
each_tile = pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)


def check(x, weight, bias, activation=None, residual=None, with_partials=False, config=None):
    out, partials = launch(
        x, weight, bias, activation, residual=residual, with_partials=with_partials, config=config
    )  # fmt: skip
    golden = formula(x, weight, bias, activation, residual=residual)
    assert out.is_contiguous() and out.shape == golden.shape and out.dtype == weight.dtype
    bias = bias if bias is None else bias.to(weight.dtype)
    expected = reference.activate(torch.nn.functional.linear(x, weight, bias), activation)
    expected = expected if residual is None else residual + expected
    assert_within_budget(out, expected, golden, expected_zeros=0.7 if activation == "relu" else 0.1)
    if with_partials:
        check_partials(out, partials, (config or LinearHopperConfig()).block_n)
    return out, partials


def check_partials(out, partials, width):
    stored = wide(out).reshape(-1, out.shape[-1])
    assert partials.width == width and partials.values.shape == (2, -(-out.shape[-1] // width), len(stored))
    epsilon = torch.finfo(torch.float32).eps
    for part, columns in enumerate(stored.split(width, dim=1)):
        mean, squares = (wide(partials.values[i, part]) for i in range(2))
        rest = columns - columns.mean(1, keepdim=True)
        assert ((mean - columns.mean(1)).abs() <= 4 * epsilon * columns.abs().amax(1)).all()
        slack = 16 * epsilon * rest.square().sum(1) + columns.shape[1] * (4 * epsilon * columns.abs().amax(1)) ** 2
        assert ((squares - rest.square().sum(1)).abs() <= slack).all()


def check_folded(x, partials, weight, bias, activation=None, eps=1e-6, config=None):
    norm = partials, eps, weight.double().sum(1).float()
    out, none = launch(x, weight, bias, activation, norm=norm, config=config)
    golden_x = wide(x) - wide(x).mean(-1, keepdim=True)
    golden_x = golden_x * (golden_x.square().mean(-1, keepdim=True) + eps) ** -0.5
    golden = formula(golden_x, weight, bias, activation)
    expected = reference.layer_norm_linear(x, None, None, eps, weight, bias.to(weight.dtype), activation)
    assert none is None and out.is_contiguous() and out.shape == golden.shape and out.dtype == weight.dtype
    assert_within_budget(out, expected, golden, expected_zeros=0.7 if activation == "relu" else 0.1)
    return out


def partials_of(x, width):
    """The partials of the rows of x in parts of ``width``, from float64."""
    parts = wide(x).reshape(-1, x.shape[-1]).split(width, dim=1)
    mean = torch.stack([part.mean(1) for part in parts])
    squares = torch.stack([(part - part.mean(1, keepdim=True)).square().sum(1) for part in parts])
    return RowPartials(torch.stack([mean, squares]).float().to(x.device), width)


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(interpreted, activation, dtype):
    check(*problem((3, 67, 72), 200, dtype), activation)


@pytest.mark.interp
@DTYPES
@each_tile
def test_tiles(interpreted, tiles, dtype):
    """Whole tiles, and some of which one consumer has no row or only columns beyond the edge."""
    for shape, out_features in (((1, 256, 64), 256), ((2, 130, 136), 520), ((3, 20, 8), 40)):
        check(*problem(shape, out_features, dtype), "gelu", config=tiles)


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize(
    "shape,out_features",
    (((1, 1, 8), 1), ((1, 128, 64), 128), ((2, 50, 768), 33), ((5, 197, 48), 16), ((1, 9, 136), 520)),
)
def test_shapes(interpreted, shape, out_features, dtype):
    x, weight, bias = problem(shape, out_features, dtype)
    check(x, weight, bias)
    check(x, weight, None)
    check(x, weight, bias.float())


@pytest.mark.interp
@DTYPES
@each_tile
@pytest.mark.parametrize("out_features", (8, 136, 200))
def test_a_residual_and_partials(interpreted, out_features, dtype, tiles):
    x, weight, bias = problem((3, 67, 72), out_features, dtype)
    residual = (torch.randn(3, 67, out_features) + 30 * torch.randn(3, 67, 1).sign()).to(dtype)
    out, _ = check(x, weight, bias, residual=residual, config=tiles)
    assert torch.equal(check(x, weight, bias, residual=residual, with_partials=True, config=tiles)[0], out)
    check(x, weight, bias, "gelu", with_partials=True, config=tiles)


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_a_folded_layer_norm(interpreted, activation, dtype):
    x, partials = linear_hopper(*(problem := stream((3, 67, 136), dtype))[:3], residual=problem[3], with_partials=True)
    weight, bias = centred(200, 136, dtype), torch.randn(200).to(dtype).float()
    for given in (partials, row_partials(x)):
        for tiles in TILES.values():
            check_folded(x, given, weight, bias, activation, config=tiles)


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("mean", (0.0, 30.0, 300.0))
@pytest.mark.parametrize("width,part,tiles", ((768, 64, WIDE), (1040, 16, None), (600, 32, TALL), (40, 64, NARROW)))
def test_folded_rows_far_from_zero(interpreted, width, part, tiles, mean, dtype):
    """1040 columns in parts of 16 are 65: more than are merged at a time."""
    x = stream((2, 20, width), dtype, mean)[3]
    weight, bias = centred(72, width, dtype), torch.randn(72).to(dtype).float()
    check_folded(x, partials_of(x, part), weight, bias, config=tiles)


@pytest.mark.interp
def test_rows_at_a_stride(interpreted):
    x, weight, bias = problem((40, 2, 72), 96, torch.bfloat16)
    out = check(x[:, 1], torch.nn.functional.pad(weight, (0, 8))[:, :72], bias)[0]
    assert torch.equal(out, check(x[:, 1].contiguous(), weight, torch.stack([bias, bias], 1)[:, 0])[0])


@pytest.mark.interp
def test_a_bad_row_stays_alone(interpreted):
    x, weight, bias = problem((150, 72), 136, torch.float16)
    norm = row_partials(x), 1e-6, weight.float().sum(1)
    for options in ({"residual": torch.randn(150, 136).half(), "with_partials": True}, {"norm": norm}):
        good = linear_hopper(x, weight, bias, **options)
        for bad in (0, 127, 149):
            broken = x.clone()
            broken[bad] = float("nan")
            out, partials = linear_hopper(broken, weight, bias, **options)
            others = torch.arange(150) != bad
            assert out[bad].isnan().all() and torch.equal(out[others], good[0][others])
            assert partials is None or torch.equal(partials.values[..., others], good[1].values[..., others])


@pytest.mark.interp
def test_offsets_beyond_two_to_the_31(interpreted, monkeypatch):
    """Of out and residual, and of partials written and read; the last program computes the last tile."""
    monkeypatch.setattr(configs, "multiprocessors_of", lambda device: 2**30)
    with last_programs_alone():
        rows = 2**31 // 32 + 65
        residual = reserved(rows, 32, dtype=torch.float16)
        residual[-1].copy_(torch.randn(32))
        x, weight = torch.randn(1, 8).half(), torch.randn(32, 8).half()
        out, _ = linear_hopper(x.expand(rows, 8), weight, None, residual=residual, config=NARROW)
        torch.testing.assert_close(out[-1], (residual[-1] + (x @ weight.T)[0]), rtol=2e-3, atol=4e-3)
        del out, residual
        rows, bias = 2**30 + 65, torch.randn(65)
        zeros = torch.zeros(65, 8).half()
        x = zeros[:1].expand(rows, 8)
        with sanitizer.only_programs(lambda count: range(count - 2, count)):  # a tile of 64 columns and one of 1
            out, (values, part) = linear_hopper(x, zeros, bias, with_partials=True, config=NARROW)
        assert torch.equal(out[-1], bias.half()) and values.shape == (2, 2, rows) and part == 64
        expected = partials_of(out[-1:], 64).values[..., 0]
        torch.testing.assert_close(values[..., -1], expected, rtol=1e-5, atol=1e-6)
        del out
        row, weight = torch.randn(1, 72).half(), centred(8, 72, torch.float16)
        values[..., -1:] = partials_of(row, 64).values
        norm = RowPartials(values, 64), 1e-6, weight.float().sum(1)
        out, _ = linear_hopper(row.expand(rows, 72), weight, None, norm=norm, config=NARROW)
        expected = reference.layer_norm_linear(row, None, None, 1e-6, weight, None)
        torch.testing.assert_close(out[-1:], expected, rtol=2e-3, atol=4e-3)


# What the caller sees


def test_no_rows():
    weight = torch.zeros(64, 48, dtype=torch.float16)
    out, partials = linear_hopper(torch.zeros(2, 0, 48, dtype=torch.float16), weight, None, with_partials=True)
    assert out.shape == (2, 0, 64) and partials.values.shape == (2, 1, 0)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def test_reasons(monkeypatch):
    def make(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype).as_subclass(Elsewhere)

    def reasons(x=None, weight=None, activation=None, **options):
        x, weight = make(2, 5, 48) if x is None else x, make(64, 48) if weight is None else weight
        return linear_hopper_not_supported_reasons(x, weight, None, activation, **options)

    here = linear_hopper_not_supported_reasons(torch.zeros(2, 8), torch.zeros(8, 8), None)
    assert len(here) == 1 and ("no Gluon" in here[0] if kernels.launch.INTERPRETED else "need a CUDA device" in here[0])
    if kernels.launch.INTERPRETED:
        return
    monkeypatch.setattr(configs, "arch_of", lambda device: 90)
    assert reasons() == reasons(residual=make(2, 5, 64), with_partials=True) == reasons(activation="gelu") == []
    assert reasons(make(3, 2, 5, 48)[:, 1]) != [] and reasons(make(5, 2, 48)[:, 1]) == []
    half = torch.float16
    for words, arguments in {
        "swiglu": dict(activation="swiglu"),
        "weight has dtype torch.float32": dict(weight=make(8, 48, dtype=torch.float32)),
        "x has dtype torch.float16, expected torch.bfloat16": dict(x=make(2, 48, dtype=half)),
        "residual has dtype torch.float16": dict(residual=make(2, 5, 64, dtype=half)),
        "residual is not contiguous": dict(residual=make(2, 64, 5).transpose(1, 2)),
        "residual has rows that do not begin": dict(weight=make(60, 48), residual=make(2, 5, 60)),
        "folded LayerNorm": dict(norm=(None, 1e-6, None), with_partials=True),
        "x has strides (1, 2)": dict(x=make(48, 2).t()),
        "x has rows of 48 elements at a stride of 0: they overlap": dict(x=make(1, 48).expand(5, 48)),
        "weight has rows that do not begin": dict(weight=make(64 * 48 + 1)[1:].view(64, 48)),
        "x has rows that do not begin": dict(x=make(5, 52)[:, :48]),
        "weight has strides (1, 64)": dict(weight=make(48, 64).t()),
    }.items():
        assert any(words in reason for reason in reasons(**arguments)), words
    monkeypatch.setattr(configs, "arch_of", lambda device: 100)
    assert reasons() == ["the device is sm_100, expected sm_90"]


def test_vit_fast_does_not_import_it():
    code = "import sys, vit_fast.ops, vit_fast.kernels.linear; print('vit_fast.kernels.linear_hopper' in sys.modules)"
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert child.stdout == "False\n", child.stdout + child.stderr


# On a GPU, each group in a child process


class Compiler:
    """Compiles what would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return functools.partial(self.kernel.warmup, grid=grid)


def watched(call, seconds, synchronize):
    """The result of ``call``; a call that does not end in time ends the process."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    result = call()
    synchronize()
    faulthandler.cancel_dump_traceback_later()
    return result


def launch(*arguments, **options):
    """``linear_hopper`` on a GPU: compiled first, then run within the time a run may take, its memory full of NaN."""
    if arguments[0].device.type == "cpu":
        return linear_hopper(*arguments, **options)
    assert (
        linear_hopper_not_supported_reasons(*arguments[:4], **{k: v for k, v in options.items() if k != "config"}) == []
    )
    empty = torch.empty

    def poisoned(*shape, **kind):
        return empty(*shape, **kind).fill_(float("nan"))

    call = functools.partial(linear_hopper, *arguments, **options)
    with mock.patch.object(torch, "empty", poisoned):
        with mock.patch.object(kernels, "_linear_hopper_fwd_kernel", Compiler(kernels._linear_hopper_fwd_kernel)):
            call()
        return watched(call, SECONDS, torch.cuda.synchronize)


LARGE = dict(
    shapes=(((1, 3, 8), 5), ((2, 50, 768), 33), ((5, 197, 200), 136), ((64, 197, 768), 2304)),
    wide=(((2, 50, 768), 768), ((5, 197, 200), 136), ((64, 197, 768), 768)),
    runs=1000,
)
SMALL = dict(shapes=(((1, 3, 8), 5), ((2, 70, 72), 33)), wide=(((2, 70, 72), 136),), runs=2)


def activations_on(device, shapes, wide, runs):
    for shape, out_features in shapes:
        for activation in ACTIVATIONS if out_features in (33, 2304) else ACTIVATIONS[:2]:
            check(*problem(shape, out_features, torch.bfloat16, device=device), activation)
        check(*problem(shape, out_features, torch.float16, bias=False, device=device), "gelu")


def residuals_on(device, shapes, wide, runs):
    for (shape, out_features), dtype in itertools.product(wide, BOTH):
        x, weight, bias = problem(shape, out_features, dtype, device=device)
        residual = (torch.randn(*shape[:2], out_features, device=device) + 30).to(dtype)
        out, partials = check(x, weight, bias, residual=residual, with_partials=True)
        other, others = linear_with_partials(x, weight, bias, residual)
        agree(out, other)
        if partials.width == others.width:
            torch.testing.assert_close(partials.values[0], others.values[0], rtol=1e-2, atol=1e-2)
        check(x, weight, bias, residual=residual)


def folds_on(device, shapes, wide, runs):
    for (shape, out_features), dtype in itertools.product(wide, BOTH):
        *arguments, residual = stream(shape, dtype, 30.0, device=device)
        x, partials = launch(*arguments, residual=residual, with_partials=True)
        bias = torch.randn(out_features, device=device).to(dtype).float()
        for activation, given in ((None, partials), ("gelu", partials), ("gelu", row_partials(x))):
            weight = centred(out_features, shape[-1], dtype, device=device)
            out = check_folded(x, given, weight, bias, activation)
            agree(out, folded_linear(x, given, 1e-6, weight, weight.double().sum(1).float(), bias, activation))


def exact_on(device, shapes, wide, runs):
    """Integers, of which one that comes too early or too late shows; under every config."""
    for (shape, out_features), tiles in itertools.product(shapes, CONFIGS):
        x, weight = (torch.randint(-2, 3, size, device=device).half() for size in (shape, (out_features, shape[-1])))
        golden = formula(x, weight, None).half().to(device)
        for _ in range(max(1, runs // 50)):
            assert torch.equal(launch(x, weight, None, config=tiles)[0], golden)


def repeats_on(device, shapes, wide, runs):
    """The same bits in a thousand runs."""
    shape, out_features = wide[0]
    for dtype in BOTH:
        *arguments, residual = stream(shape, dtype, device=device)
        x, partials = launch(*arguments, residual=residual, with_partials=True)
        weight = centred(out_features, shape[-1], dtype, device=device)
        norm = partials, 1e-6, weight.float().sum(1)
        first = launch(x, weight, None, "gelu", norm=norm)[0]
        assert first.isfinite().all() and x.isfinite().all() and partials.values.isfinite().all()
        for _ in range(runs):
            again, same = launch(*arguments, residual=residual, with_partials=True)
            assert torch.equal(again, x) and torch.equal(same.values, partials.values)
            assert torch.equal(launch(x, weight, None, "gelu", norm=norm)[0], first)


GROUPS = {
    "activations": activations_on, "residuals": residuals_on, "folds": folds_on, "exact": exact_on,
    "repeats": repeats_on,
}  # fmt: skip


def agree(actual, expected):
    """Sums in another order."""
    allowed = 4 * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert actual.shape == expected.shape and (actual - expected).abs().max() <= allowed


@pytest.mark.interp
@pytest.mark.parametrize("group", GROUPS)
def test_what_the_gpu_tests_do(interpreted, group):
    GROUPS[group]("cpu", **SMALL)


def test_a_run_that_hangs_ends_its_process():
    child = _child("watched(lambda: time.sleep(60), 1, print)")
    assert child.returncode == 1 and "Timeout" in child.stderr and "in watched" in child.stderr
    done = _child("print(watched(lambda: 7, 1, lambda: None)); time.sleep(2)")
    assert done.returncode == 0 and done.stdout == "7\n", done.stderr


def _child(code):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = f"import sys, time; sys.path[:0] = {folders}; from test_linear_hopper import *; "
    return subprocess.run([sys.executable, "-P", "-c", path + code], capture_output=True, text=True, timeout=250)


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_gpu(group):
    if torch.cuda.get_device_capability() != (9, 0):
        weight = torch.zeros(8, 8, dtype=torch.float16, device="cuda")
        assert any("expected sm_90" in reason for reason in linear_hopper_not_supported_reasons(weight, weight, None))
        return
    child = _child(f"GROUPS[{group!r}]('cuda', **LARGE); print('done')")
    assert child.returncode == 0 and child.stdout.endswith("done\n"), child.stderr[-3000:]
