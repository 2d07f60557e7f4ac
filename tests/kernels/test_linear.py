"""kernels/linear.py against a float64 formula of its own on the same rounded inputs.

Eager is ``reference`` at the kernel dtype; tolerances: ``support.budget``. Shapes: tokens and widths of ViTs that fill
no tile (1, 17, 50, 197, 257; 48, 147, 588), K that is no multiple of 8 (no TMA, no wide loads), one tile and
several in both directions. Tiles are forced to 32 … 64 rows so that a few interpreted programs have inner edges; the
shipped tiles of each architecture run on small shapes. Exactly representable integers must come out exactly.
"""

import dataclasses
import itertools
import math
import mmap

import pytest
import torch
from support import sanitizer
from support.budget import assert_within_budget
from support.linear import ACTIVATIONS, centred, eager, exact_activation, formula, problem, stream, wide
from vit_fast.kernels import configs, reference
from vit_fast.kernels.configs import LinearConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")
POINTERS = LinearConfig(32, 32, 32, 2, 4, 2, False)
TMA = LinearConfig(64, 32, 64, 8, 4, 2, True)
SHORT = LinearConfig(16, 32, 16, 2, 4, 2, False)
CURVE = LinearConfig(2048, 32, 16, 1, 4, 1, False)  # a column of pre-activations in few programs
BOTH = pytest.mark.parametrize("tiles", (POINTERS, TMA), ids=("pointers", "tma"))


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.linear", reason="Triton is not installed")


def branch(shape, out_features, dtype, residual_dtype=None, device="cpu"):
    """gamma, residual, row_scale."""
    keep = (torch.arange(shape[0], device=device) % 3 != 1).to(dtype) / 0.75
    residual = torch.randn(*shape[:-1], out_features, device=device).to(residual_dtype or dtype)
    return (0.5 + torch.rand(out_features, device=device)).to(dtype), residual, keep


def check(kernels, x, weight, bias, activation=None, config=None, **options):
    out = kernels.linear(x, weight, bias, activation, config=config, **options)
    golden = formula(x, weight, bias, activation, **options)
    assert out.is_contiguous() and out.shape == golden.shape
    assert out.dtype == (options["residual"].dtype if "residual" in options else weight.dtype)
    expected = eager(x, weight, bias, activation, **options)
    assert_within_budget(out, expected, golden, expected_zeros=0.7 if activation == "relu" else 0.1)
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_layer_norm_linear_is_the_formula(activation):
    x, weight, bias = problem((2, 5, 48), 64, torch.float64)
    ln_weight, ln_bias = torch.randn(2, 48, dtype=torch.float64)
    out, mean, rstd = reference.layer_norm_linear_fwd(x, ln_weight, ln_bias, 1e-6, weight, bias, activation)
    golden_mean = x.mean(-1, keepdim=True)
    golden_rstd = ((x - golden_mean).square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    normal = (x - golden_mean) * golden_rstd * ln_weight + ln_bias
    torch.testing.assert_close(out, formula(normal, weight, bias, activation), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mean, golden_mean.flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rstd, golden_rstd.flatten(), rtol=1e-12, atol=1e-12)


def test_reference_linear_residual_is_the_formula():
    x, weight, bias = problem((3, 5, 48), 64, torch.float64)
    gamma, residual, row_scale = branch(x.shape, 64, torch.float64)
    for options in ({}, {"row_scale": row_scale}):
        for scale in (gamma, None):
            out = reference.linear_residual(x, weight, bias, scale, residual, **options)
            golden = formula(x, weight, bias, gamma=scale, residual=residual, **options)
            torch.testing.assert_close(out, golden, rtol=1e-11, atol=1e-11)


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels, activation, dtype, tiles):
    check(kernels, *problem((2, 25, 48), 64, dtype), activation, config=tiles)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "tokens,in_features,out_features",
    ((1, 48, 48), (2, 192, 96), (17, 588, 40), (50, 147, 50), (197, 384, 33), (257, 48, 72), (65, 768, 64), (9, 1, 1)),
)
def test_vit_shapes(kernels, tokens, in_features, out_features, dtype):
    large = LinearConfig(128, 64, 128, 8, 4, 2, True)
    x, weight, bias = problem((1 if tokens > 60 else 2, tokens, in_features), out_features, dtype)
    check(kernels, x, weight, bias if in_features > 1 else None, config=large)


@pytest.mark.interp
@pytest.mark.parametrize("arch", (80, 90, 100, 120))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_shipped_configs(kernels, monkeypatch, dtype, arch):
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    check(kernels, *problem((3, 65, 96), 72, dtype), "gelu")
    check(kernels, *problem((1, 50, 64), 64, dtype), "swiglu")
    x, weight, bias = problem((3, 50, 35), 72, dtype)
    gamma, residual, row_scale = branch(x.shape, 72, dtype)
    check(kernels, x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale)


@pytest.mark.parametrize("arch", (80, 86, 90, 100, 120))
def test_every_shape_has_a_config_that_fits(arch):
    limit = 227 * 1024 if arch in (90, 100) else 99 * 1024
    types = ((torch.float16, False), (torch.float32, False), (torch.float32, True), (torch.float8_e4m3fn, False))
    flags = (False, True)
    for rows, out_features, swiglu, (dtype, tf32), out_dtype, unaligned in itertools.product(
        (1, 197, 50432, 10**7), (1, 768, 4304), flags, types, DTYPES, flags
    ):
        tiles = configs.pick_linear_config(rows, out_features, swiglu, dtype, out_dtype, tf32, unaligned, arch)
        stage = (tiles.block_m + tiles.block_n * (2 if swiglu else 1)) * tiles.block_k * dtype.itemsize
        assert stage * tiles.num_stages <= limit
        assert min(tiles.block_m, tiles.block_k) >= 16 and tiles.block_n >= 32
        assert not tiles.tma or arch in (90, 100)


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("parts", ((), ("gamma",), ("row_scale",), ("gamma", "row_scale")), ids="+".join)
def test_residual(kernels, parts, dtype, tiles):
    x, weight, bias = problem((4, 17, 64), 48, dtype, bias="gamma" not in parts)
    gamma, residual, row_scale = branch(x.shape, 48, dtype)
    options = {name: value for name, value in (("gamma", gamma), ("row_scale", row_scale)) if name in parts}
    out = check(kernels, x, weight, bias, config=tiles, residual=residual, **options)
    again = kernels.linear_residual(
        x, weight, bias, options.get("gamma"), residual, row_scale=options.get("row_scale"), config=tiles
    )
    assert torch.equal(out, again)
    if "row_scale" in parts:
        assert torch.equal(out[1], residual[1])


@pytest.mark.interp
@pytest.mark.parametrize(
    "x_dtype,dtype,residual_dtype,side_dtype",
    (
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16, torch.bfloat16),
    ),
)
def test_mixed_dtypes(kernels, x_dtype, dtype, residual_dtype, side_dtype):
    x, weight, bias = problem((4, 17, 64), 48, dtype, x_dtype=x_dtype)
    x = x.to(dtype).to(x_dtype)  # what counts is the product of the cast x
    gamma, residual, row_scale = branch(x.shape, 48, side_dtype, residual_dtype)
    check(kernels, x, weight, bias, config=TMA, gamma=gamma, residual=residual, row_scale=row_scale)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_float64_residual(kernels, dtype):
    x, weight, bias = problem((4, 17, 64), 48, dtype)
    gamma, residual, row_scale = branch(x.shape, 48, dtype, torch.float64)
    check(kernels, x, weight, bias, config=TMA, gamma=gamma, residual=residual, row_scale=row_scale)


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bfloat16", "float32"))
def test_a_2d_x_has_one_row_per_sample(kernels, dtype, tiles):
    x, weight, bias = problem((40, 64), 48, dtype)
    gamma, residual, row_scale = branch(x.shape, 48, dtype)
    check(kernels, x, weight, bias, config=tiles, gamma=gamma, residual=residual, row_scale=row_scale)


def check_folded(kernels, x, partials, weight, bias, activation=None, eps=1e-6, config=None):
    """A folded LayerNorm is held to eager with a LayerNorm of its own."""
    column_sum = weight.double().sum(1).to(partials.values.dtype)
    out = kernels.folded_linear(x, partials, eps, weight, column_sum, bias, activation, config=config)
    finalised = kernels.ln.row_statistics(partials, x.shape[-1], eps)
    same = kernels.folded_linear(x, finalised, 0.0, weight, column_sum, bias, activation, config=config)
    assert torch.equal(same, out)  # the same arithmetic, done once
    golden_x = wide(x) - wide(x).mean(-1, keepdim=True)
    golden_x = golden_x * (golden_x.square().mean(-1, keepdim=True) + eps) ** -0.5
    golden = formula(golden_x, weight, bias, activation)
    expected = reference.layer_norm_linear(x, None, None, eps, weight, bias.to(weight.dtype), activation)
    assert out.is_contiguous() and out.shape == golden.shape and out.dtype == weight.dtype
    assert_within_budget(out, expected, golden, expected_zeros=0.7 if activation == "relu" else 0.1)
    return out


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize(
    "shape,block_n", (((2, 17, 48), 32), ((3, 5, 147), 64), ((1, 33, 768), 32), ((1, 3, 1), 32), ((2, 9, 64), 128))
)
def test_partials_are_those_of_what_is_stored(kernels, shape, block_n, dtype, tiles):
    width = shape[-1]
    tiles = LinearConfig(tiles.block_m, block_n, 16 if width < 256 else 128, tiles.group_m, 4, 2, tiles.tma)
    hidden, weight, bias, residual = stream(shape, dtype, mean=30.0)
    out, partials = kernels.linear_with_partials(hidden, weight, bias, residual, config=tiles)
    assert torch.equal(out, kernels.linear_residual(hidden, weight, bias, None, residual, config=tiles))
    stored = wide(out).reshape(-1, width)
    assert partials.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert partials.width == block_n and partials.values.shape == (2, -(-width // partials.width), len(stored))
    epsilon = torch.finfo(partials.values.dtype).eps
    for part, columns in enumerate(stored.split(partials.width, dim=1)):
        mean, squares = (partials.values[i, part].double() for i in range(2))
        rest = columns - columns.mean(1, keepdim=True)
        assert ((mean - columns.mean(1)).abs() <= 4 * epsilon * columns.abs().amax(1)).all()
        slack = 16 * epsilon * rest.square().sum(1) + columns.shape[1] * (4 * epsilon * columns.abs().amax(1)) ** 2
        assert ((squares - rest.square().sum(1)).abs() <= slack).all()


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float64), ids=("float16", "bfloat16", "float64")
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_folded_layer_norm(kernels, activation, dtype, tiles):
    x, partials = kernels.linear_with_partials(*stream((2, 25, 80), dtype), config=tiles)
    weight, bias = centred(96, 80, dtype), torch.randn(96).to(dtype).float()
    out = check_folded(kernels, x, partials, weight, bias, activation, config=tiles)
    strided = torch.stack([weight.double().sum(1), torch.full((96,), 100.0)], 1).to(partials.values.dtype)[:, 0]
    assert torch.equal(kernels.folded_linear(x, partials, 1e-6, weight, strided, bias, activation, config=tiles), out)
    whole = kernels.ln.row_partials(x)
    assert whole.values.shape == (2, 1, 50) and whole.width == 128
    torch.testing.assert_close(
        check_folded(kernels, x, whole, weight, bias, activation, config=tiles), out, rtol=2e-2, atol=2e-2
    )


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("mean", (0.0, 30.0, 300.0))
@pytest.mark.parametrize("width,block_n", ((147, 32), (768, 32), (1040, 32), (600, 64), (33, 128)))
def test_folded_rows_far_from_zero(kernels, width, block_n, mean, dtype):
    """1040 columns in parts of 32 are 33: more than are merged at a time."""
    tiles = LinearConfig(32, block_n, 64, 2, 4, 2, True)
    x, partials = kernels.linear_with_partials(*stream((2, 20, width), dtype, mean), config=tiles)
    check_folded(kernels, x, partials, centred(64, width, dtype), torch.randn(64).to(dtype).float(), config=tiles)


@pytest.mark.interp
def test_a_folded_layer_norm_of_constant_rows_is_the_bias(kernels):
    x = torch.full((2, 20, 96), 7.0, dtype=torch.bfloat16)
    weight, bias = centred(64, 96, torch.bfloat16), torch.randn(64)
    for partials in (
        kernels.ln.row_partials(x),
        kernels.linear_with_partials(0 * x, 0 * weight[:1, :1].expand(96, 96), None, x)[1],
    ):
        out = kernels.folded_linear(x, partials, 1e-6, weight, weight.double().sum(1).float(), bias)
        torch.testing.assert_close(out.float(), bias.bfloat16().float().expand_as(out), rtol=0, atol=0.02)


@pytest.mark.interp
@pytest.mark.parametrize("arch", (80, 90, 100, 120))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_shipped_configs_with_partials(kernels, monkeypatch, dtype, arch):
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    x, partials = kernels.linear_with_partials(*stream((3, 65, 200), dtype))
    check_folded(kernels, x, partials, centred(72, 200, dtype), torch.randn(72).to(dtype).float(), "gelu")
    check_folded(kernels, x, partials, centred(64, 200, dtype), torch.randn(64).to(dtype).float(), "swiglu")


POINTERS_SPLIT_K = LinearConfig(32, 32, 16, 2, 4, 2, False, 3)
TMA_SPLIT_K = LinearConfig(16, 32, 32, 1, 4, 2, True, 4)


@pytest.mark.interp
@pytest.mark.parametrize("tiles", (POINTERS_SPLIT_K, TMA_SPLIT_K), ids=("pointers", "tma"))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("tokens,in_features,out_features", ((17, 147, 72), (9, 208, 40), (1, 16, 33), (40, 256, 64)))
def test_split_k(kernels, tokens, in_features, out_features, dtype, tiles):
    """Also where a program has no share of K, and whatever the order of arrival."""
    x, weight, bias = problem((2, tokens, in_features), out_features, dtype)
    gamma, residual, row_scale = branch(x.shape, out_features, dtype)
    check(kernels, x, weight, bias, "gelu", config=tiles)
    out = check(kernels, x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale, config=tiles)
    options = {"gamma": gamma, "residual": residual, "row_scale": row_scale, "config": tiles}
    for order in (-1, 1, 2) if dtype == torch.float16 else (-1,):
        with sanitizer.program_order(order):
            assert torch.equal(kernels.linear(x, weight, bias, **options), out)


@pytest.mark.interp
def test_swiglu_has_no_split_k(kernels):
    with pytest.raises(Exception, match="gated activations have no split-K"):
        kernels.linear(*problem((2, 5, 48), 64, torch.float16), "swiglu", config=POINTERS_SPLIT_K)


@pytest.mark.interp
def test_split_integers_come_out_exactly(kernels):
    x, weight = (torch.randint(-4, 5, shape).half() for shape in ((2, 40, 208), (72, 208)))
    residual = torch.randint(-4, 5, (2, 40, 72)).float()
    for tiles in (POINTERS_SPLIT_K, TMA_SPLIT_K):
        out, partials = kernels.linear_with_partials(x, weight, None, residual, config=tiles)
        assert torch.equal(out.double(), formula(x, weight, None, residual=residual))
        whole = LinearConfig(32, 32, 16, 2, 4, 2, False)
        same = kernels.linear_with_partials(x, weight, None, residual, config=whole)[1]
        assert torch.equal(partials.values, same.values) and partials.width == same.width


@pytest.mark.interp
def test_the_semaphore_is_the_callers(kernels):
    x, weight, bias, residual = stream((2, 40, 96), torch.float16)
    expected = kernels.linear_with_partials(x, weight, bias, residual, config=POINTERS_SPLIT_K)[0]
    room = torch.zeros(20, dtype=torch.int32)
    out = kernels.linear_with_partials(x, weight, bias, residual, semaphore=room, config=POINTERS_SPLIT_K)[0]
    assert torch.equal(out, expected) and room.tolist() == [3] * 9 + [0] * 11
    room = torch.zeros(8, dtype=torch.int32)
    out = kernels.linear_with_partials(x, weight, bias, residual, semaphore=room, config=POINTERS_SPLIT_K)[0]
    assert torch.equal(out, expected) and not room.any()


FEW_TILES = (  # rows, out_features, in_features, multiprocessors, splits
    (197, 768, 3072, 132, 4), (197, 768, 768, 132, 2), (197, 384, 1536, 132, 4), (197, 384, 384, 132, 1),
    (197, 1024, 4096, 132, 4), (257, 1280, 5120, 132, 2), (1576, 768, 3072, 132, 1), (1, 64, 8192, 132, 8),
    (1, 64, 8192, 1, 2), (197, 768, 3072, 1, 1), (64, 64, 64 * 12, 8, 2), (64, 64, 64 * 11, 8, 1),
    (64, 64, 64 * 11 + 1, 8, 2), (64, 128, 8192, 2, 2), (65, 64, 8192, 2, 2), (65, 65, 8192, 2, 1),
    (128, 64, 8192, 3, 2),
)  # fmt: skip


@pytest.mark.parametrize("rows,out_features,in_features,processors,splits", FEW_TILES)
def test_few_tiles_split_their_sums(rows, out_features, in_features, processors, splits):
    shipped = configs.pick_linear_config(rows, out_features, False, torch.float16, torch.float16, False, False, 90)
    tiles = configs.split_k_config(shipped, rows, out_features, in_features, processors)
    assert tiles == dataclasses.replace(shipped, split_k=splits)
    programs = -(-rows // tiles.block_m) * -(-out_features // tiles.block_n) * splits
    assert splits == 1 or (programs <= 2 * processors and -(-in_features // tiles.block_k) >= 6 * splits)


@pytest.mark.interp
def test_the_shipped_rule_splits_partials_alone(kernels, monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors_of", lambda device: 132)
    x, weight, bias = problem((2, 9, 1024), 64, torch.float16)
    residual, grids = torch.randn(2, 9, 64).half(), []
    monkeypatch.setattr(sanitizer._Launch, "finish", lambda launch: grids.append(launch.grid[0]))
    kernels.linear_residual(x, weight, bias, None, residual)
    out = kernels.linear_with_partials(x, weight, bias, residual)[0]
    assert grids == [1, 2]
    expected = reference.linear_residual(x, weight, bias, None, residual)
    assert_within_budget(out, expected, formula(x, weight, bias, residual=residual))


@pytest.mark.interp
def test_no_rows_have_no_partials(kernels):
    x, weight = torch.zeros(0, 5, 48), torch.randn(48, 48)
    out, partials = kernels.linear_with_partials(x, weight, None, x)
    assert out.shape == x.shape and partials.values.shape[2] == 0
    assert kernels.ln.row_partials(x).values.shape == (2, 1, 0)
    assert kernels.folded_linear(x, partials, 1e-6, weight, weight.sum(1), None).shape == x.shape


X_LAYOUTS = {
    "without the class token": lambda x: x[:, 1:],
    "transposed batch": lambda x: x.transpose(0, 1),
    "transposed channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other channel": lambda x: x[..., ::2],
    "offset by one element": lambda x: x.flatten()[1:-47].view(-1, 48),
    "part of a packed tensor": lambda x: x.unflatten(2, (3, 16))[:, :, 1],
    "expanded rows": lambda x: x[:, :1].expand(-1, 5, -1),
    "three strides": lambda x: x.unflatten(1, (2, 4)).permute(1, 0, 2, 3),
}


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("layout", X_LAYOUTS)
def test_layouts_of_x_and_residual(kernels, layout, tiles):
    x = X_LAYOUTS[layout](problem((3, 8, 48), 1, torch.float16)[0])
    weight, bias = problem(x.shape, 64, torch.float16)[1:]
    check(kernels, x, weight, bias, "gelu", config=tiles)
    y, weight, bias = problem((*x.shape[:-1], 32), x.shape[-1], torch.float16)
    gamma, _, row_scale = branch(y.shape, x.shape[-1], torch.float16)
    out = check(kernels, y, weight, bias, config=tiles, gamma=gamma, residual=x, row_scale=row_scale)
    same = kernels.linear_residual(y, weight, bias, gamma, x.contiguous(), row_scale=row_scale, config=tiles)
    assert torch.equal(out, same)


W_LAYOUTS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "every other column": lambda w: torch.repeat_interleave(w, 2, 1)[:, ::2],
    "every other row": lambda w: torch.repeat_interleave(w, 2, 0)[::2],
    "offset by one element": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w),
    "expanded row": lambda w: w[:1].expand_as(w),
}


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("activation", (None, "swiglu"))
@pytest.mark.parametrize("layout", W_LAYOUTS)
def test_layouts_of_the_weight(kernels, layout, activation, tiles):
    x, weight, bias = problem((2, 17, 48), 64, torch.float16)
    strided = W_LAYOUTS[layout](weight)
    assert not strided.is_contiguous() or strided.data_ptr() % 16
    out = check(kernels, x, strided, torch.stack([bias, bias], 1)[:, 0], activation, config=tiles)
    assert torch.equal(out, kernels.linear(x, strided.clone().contiguous(), bias, activation, config=tiles))


@pytest.mark.interp
def test_tma_only_where_it_may(kernels, monkeypatch):
    from vit_fast.kernels import gemm

    made, shipped = [], gemm.TensorDescriptor
    monkeypatch.setattr(gemm, "TensorDescriptor", lambda *args: made.append(1) or shipped(*args))
    x, weight, bias = problem((2, 9, 64), 64, torch.float16)
    padded = torch.zeros(64, 65, dtype=torch.float16)[:, :64]
    for arguments, descriptors in (
        ((x, weight, bias, None), 2),
        ((x[:, 0], weight, bias, None), 2),
        ((x[:, 1:], weight, bias, None), 0),
        ((x[:, :1].expand(-1, 9, -1), weight, bias, None), 0),
        ((x[0, :1].expand(9, -1), weight, bias, None), 0),
        ((x, weight.t(), bias, None), 0),
        ((x, padded, bias, None), 0),
        ((x.float(), weight, bias, None), 2),
        ((x[..., :56], weight[:, :56], bias, None), 2),
        ((x[..., :63], weight[:, :63], bias, None), 0),
        ((x[..., 1:], weight[:, 1:], bias, None), 0),
        ((x[..., :63].contiguous(), weight[:, :63].contiguous(), bias, None), 0),
    ):
        made.clear()
        kernels.linear(*arguments, config=TMA)
        assert len(made) == descriptors
    made.clear()
    kernels.linear(x, weight, bias, None, config=POINTERS)
    assert not made


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_integers_come_out_exactly(kernels, dtype):
    """Every tile and every path gives the same, true bits."""
    generator = torch.Generator().manual_seed(1)
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=generator).to(dtype)  # noqa: E731
    x, weight, bias, gamma = integers(2, 45, 40), integers(48, 40), integers(48), integers(48)
    residual, row_scale = integers(2, 45, 48).float(), integers(2)
    golden = formula(x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale)
    assert golden.abs().max() < 2**24 and golden.abs().max() > 100
    for tiles in (
        POINTERS, TMA, LinearConfig(16, 32, 16, 1, 4, 2, False), LinearConfig(16, 64, 16, 3, 4, 2, True),
        LinearConfig(128, 128, 64, 8, 4, 3, False),
    ):  # fmt: skip
        out = kernels.linear_residual(x, weight, bias, gamma, residual, row_scale=row_scale, config=tiles)
        assert torch.equal(out.double(), golden)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "quick_gelu", "relu"))
def test_activation_curves(kernels, activation, dtype):
    """Over all of the dtype's range: half an ulp of the true value, and 5e-5 of it for the approximation; gelu to
    bfloat16 may err by 3e-8 more, a tenth of what erf in float32 does in its negative tail."""
    ladder = torch.logspace(-6, math.log10(torch.finfo(dtype).max), 3000, dtype=torch.float64)
    near = torch.linspace(-14, 14, 5001, dtype=torch.float64)
    z = torch.cat([-ladder, near, ladder]).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    out = kernels.linear(z[:, None], torch.ones(1, 1, dtype=dtype), None, activation, config=CURVE).double()[:, 0]
    golden = exact_activation(z.double(), activation)
    golden = torch.where(golden.isnan(), z.double().clamp(min=0), golden)  # exp overflows: the limit
    spacing = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(golden.abs().clamp(min=1e-300)))
    spacing = spacing.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    # Under 2^-64 the reciprocal of the cheap sigmoid is zero.
    excess = (out - golden).abs() - spacing / 2 - 5e-5 * golden.abs() - 2.0**-64 * z.double().abs()
    excess -= 3e-8 * (activation == "gelu" and dtype == torch.bfloat16)
    assert (excess <= 0).all(), (z[excess.argmax()], out[excess.argmax()], golden[excess.argmax()])


@pytest.mark.interp
def test_gelu_in_bfloat16_errs_no_more_than_eager(kernels):
    """Of float32 sums, of which eager rounds each to bfloat16 before gelu: in each quarter of a unit. Of all bfloat16
    numbers, which both see alike: at none by more than 1e-8 and a 30th of an ulp, at few by more at all."""

    def errors(columns):
        x, weight = torch.stack(columns, 1).bfloat16(), torch.ones(1, len(columns), dtype=torch.bfloat16)
        z = x.double().sum(1)
        golden = exact_activation(z, "gelu")
        out = kernels.linear(x, weight, None, "gelu", config=CURVE).double()[:, 0]
        expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight)).double()[:, 0]
        spacing = 2.0 ** (torch.floor(torch.log2(golden.abs().clamp(min=1e-38))) - 7)
        return z, (out - golden).abs(), (expected - golden).abs(), spacing

    z = torch.linspace(-7, 7, 14 * 2048 + 1)
    parts = [z]  # z as the sum of three bfloat16 numbers
    for _ in range(2):
        parts.append(parts[-1] - parts[-1].bfloat16().float())
    z, ours, eagers, _ = errors(parts)
    for quarter in torch.floor(4 * z).unique():
        here = torch.floor(4 * z) == quarter
        assert ours[here].max() <= eagers[here].max(), quarter / 4
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    z, ours, eagers, spacing = errors([every[every.abs() < 2.0**10]])
    worse = ours - eagers
    assert (worse <= spacing / 30 + 1e-8).all() and (worse > 0).sum() < 100


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", (None, "gelu", "gelu_tanh", "quick_gelu", "relu"))
def test_not_a_number_and_infinity(kernels, activation, dtype):
    z = torch.tensor([math.nan, math.inf, 0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    out = kernels.linear(z[:, None], torch.ones(1, 1, dtype=dtype), None, activation, config=CURVE)[:, 0]
    assert out[0].isnan() and out[1] == math.inf and (out[2:4] == 0).all()
    assert out[4] == z[4] and (out[5] == (z[5] if activation is None else 0))


@pytest.mark.interp
@BOTH
def test_a_bad_row_stays_alone(kernels, tiles):
    x, weight, bias = problem((2, 20, 48), 64, torch.float16)
    clean = kernels.linear(x, weight, bias, "gelu", config=tiles)
    x[1, 7, 3] = math.nan
    spoilt = kernels.linear(x, weight, bias, "gelu", config=tiles)
    keep = torch.arange(40) != 27
    assert torch.equal(spoilt.view(40, 64)[keep], clean.view(40, 64)[keep])
    assert spoilt[1, 7].isnan().all()


@pytest.mark.interp
@pytest.mark.parametrize("shape", ((0, 5, 48), (2, 0, 48), (0, 48)))
def test_nothing_to_do(kernels, shape):
    x, weight, bias = problem(shape, 64, torch.float16)
    assert kernels.linear(x, weight, bias, "swiglu").shape == (*shape[:-1], 32)
    out = kernels.linear_residual(x, weight, bias, None, torch.zeros(*shape[:-1], 64))
    assert out.shape == (*shape[:-1], 64) and out.dtype == torch.float32
    y, mean, rstd = kernels.layer_norm_linear_fwd(x, None, None, 1e-6, weight, bias)
    assert y.shape == (*shape[:-1], 64) and mean.shape == rstd.shape == (0,)


@pytest.mark.interp
def test_offsets_beyond_two_to_the_31(kernels):
    """The memory is reserved, not used: only the pages that are touched exist."""
    step = 2**31 + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    with mmap.mmap(-1, (4 * step + 4096) * 2, flags=flags) as memory:
        storage = torch.frombuffer(memory, dtype=torch.float16)
        x, weight, bias = problem((2, 3, 40), 4, torch.float16)
        residual = torch.randn(2, 3, 4).half()
        glu = kernels.linear(x, weight, bias, "swiglu", config=SHORT)
        for tiles in (SHORT, dataclasses.replace(SHORT, split_k=2)):
            expected = kernels.linear_residual(x, weight, bias, None, residual, config=tiles)
            for strides in ((step, 48, 1), (64, step // 2, 1), (64, 1, step // 16), (3 * (step // 3), step // 3, 1)):
                far = torch.as_strided(storage, x.shape, strides).copy_(x)
                assert torch.equal(kernels.linear_residual(far, weight, bias, None, residual, config=tiles), expected)
            for strides in ((step, 48, 1), (64, step // 2, 1), (64, 1, step // 2), (3 * (step // 3), step // 3, 1)):
                far = torch.as_strided(storage, residual.shape, strides).copy_(residual)
                assert torch.equal(kernels.linear_residual(x, weight, bias, None, far, config=tiles), expected)
            for strides in ((step, 1), (step // 2, 1), (1, step // 16)):
                far = torch.as_strided(storage, weight.shape, strides).copy_(weight)
                assert torch.equal(kernels.linear_residual(x, far, bias, None, residual, config=tiles), expected)
                assert torch.equal(kernels.linear(x, far, bias, "swiglu", config=SHORT), glu)
        del storage, far


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", (None, "gelu", "swiglu"))
def test_layer_norm_linear(kernels, activation, dtype):
    x, weight, bias = problem((2, 17, 96), 64, dtype)
    args = (x, torch.randn(96).to(dtype), torch.randn(96).to(dtype), 1e-6, weight, bias, activation)
    out, mean, rstd = kernels.layer_norm_linear_fwd(*args, config=TMA)
    golden, golden_mean, golden_rstd = reference.layer_norm_linear_fwd(
        *(wide(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
    )
    assert_within_budget(out, reference.layer_norm_linear(*args), golden)
    torch.testing.assert_close(mean.double(), golden_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), golden_rstd, rtol=1e-5, atol=0)
    assert torch.equal(out, kernels.layer_norm_linear(*args, config=TMA))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_layer_norm_linear_of_a_float32_stream(kernels, dtype):
    x, weight, bias = problem((2, 18, 96), 64, dtype, x_dtype=torch.float32)
    args = (x[:, 1:], torch.randn(96), torch.randn(96), 1e-6, weight, bias)
    out = kernels.layer_norm_linear(*args, config=POINTERS)
    golden = reference.layer_norm_linear(*(wide(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
    assert out.dtype == dtype
    assert_within_budget(out, reference.layer_norm_linear(*args), golden)


def test_reasons(kernels):
    x, weight, bias = problem((2, 5, 48), 64, torch.float32)
    residual = torch.zeros(2, 5, 64)
    for reasons in (
        kernels.linear_residual_not_supported_reasons(x, weight, bias, None, residual),
        kernels.layer_norm_linear_not_supported_reasons(x, None, None, 1e-6, weight, bias),
    ):
        assert bool(reasons) != kernels.launch.INTERPRETED and len(reasons) <= 1
    reasons = kernels.linear_residual_not_supported_reasons(x, weight, bias, None, residual.double())
    assert any("float64" in reason for reason in reasons) != kernels.launch.INTERPRETED
    meta = torch.zeros(2, 65537, device="meta"), None, None, 1e-6, torch.zeros(8, 65537, device="meta"), None
    assert any("65537" in reason for reason in kernels.layer_norm_linear_not_supported_reasons(*meta))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ((64, 197, 768), (1, 197, 768), (3, 257, 1280), (2, 50, 147)))
def test_gpu_activations(kernels, shape, activation, dtype):
    args = problem(shape, 1024, dtype, device="cuda")
    first = check(kernels, *args, activation)
    assert torch.equal(first, kernels.linear(*args, activation))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", ((64, 197, 3072), (1, 197, 3072), (4, 50, 2730)))
def test_gpu_residual(kernels, shape, dtype):
    x, weight, bias = problem(shape, 768, dtype, device="cuda")
    for residual_dtype in (dtype, torch.float32):
        gamma, residual, row_scale = branch(shape, 768, dtype, residual_dtype, device="cuda")
        options = {"gamma": gamma, "residual": residual, "row_scale": row_scale}
        first = check(kernels, x, weight, bias, **options)
        assert torch.equal(first, kernels.linear(x, weight, bias, **options))
        check(kernels, x[:, 1:], weight.t().contiguous().t(), bias, gamma=gamma, residual=residual[:, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("mean", (0.0, 100.0))
@pytest.mark.parametrize("shape", ((64, 197, 768), (1, 197, 768), (3, 257, 1280), (1, 729, 1152), (2, 50, 147)))
def test_gpu_folded_layer_norm(kernels, shape, mean, dtype):
    problem = stream(shape, dtype, mean, device="cuda")
    x, partials = kernels.linear_with_partials(*problem)
    again, same_partials = kernels.linear_with_partials(*problem)
    assert torch.equal(x, again) and torch.equal(partials.values, same_partials.values)
    bias = torch.randn(1024, device="cuda").to(dtype).float()
    for activation in ACTIVATIONS:
        weight = centred(1024, shape[-1], dtype, device="cuda")
        check_folded(kernels, x, partials, weight, bias, activation)
        check_folded(kernels, x, kernels.ln.row_partials(x), weight, bias, activation)


@pytest.mark.gpu
def test_gpu_split_sums_are_complete_in_every_run(kernels):
    """Integers, so that a partial sum that comes too late shows in any run."""
    x, weight = (torch.randint(-4, 5, shape, device="cuda").half() for shape in ((1, 197, 3072), (768, 3072)))
    residual = torch.zeros(1, 197, 768, device="cuda")
    golden = formula(x, weight, None).float().cuda()
    for splits in (2, 4, 8):
        for tiles in (
            LinearConfig(64, 64, 64, 8, 4, 4, True, splits),
            LinearConfig(64, 64, 64, 8, 4, 4, False, splits),
        ):
            for _ in range(300):
                assert torch.equal(kernels.linear_with_partials(x, weight, None, residual, config=tiles)[0], golden)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_gpu_integers_come_out_exactly(kernels, dtype):
    x, weight = (torch.randint(-4, 5, shape, device="cuda").to(dtype) for shape in ((8, 197, 768), (640, 768)))
    residual = torch.zeros(8, 197, 640, device="cuda")
    golden = formula(x, weight, None)
    for tiles in (None, LinearConfig(64, 64, 64, 8, 4, 4, False), LinearConfig(128, 64, 32, 8, 4, 3, True)):
        out = kernels.linear_residual(x, weight, None, None, residual, config=tiles)
        assert torch.equal(out.cpu().double(), golden)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", (None, "gelu", "gelu_tanh", "quick_gelu", "relu"))
def test_gpu_not_a_number_and_infinity(kernels, activation, dtype):
    """The interpreter's min and max pass NaN on where the chip's need to be told to."""
    z = torch.tensor([math.nan, math.inf, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    out = kernels.linear(z[:, None].cuda(), torch.ones(1, 1, dtype=dtype, device="cuda"), None, activation)[:, 0].cpu()
    assert out[0].isnan() and out[1] == math.inf and out[2] == 0
    assert out[3] == z[3] and (out[4] == (z[4] if activation is None else 0))


@pytest.mark.gpu
def test_gpu_tf32_only_when_asked(kernels):
    x, weight, bias = problem((4, 197, 768), 768, torch.float32, device="cuda")
    golden = formula(x, weight, bias)
    exact = (kernels.linear(x, weight, bias).cpu() - golden).abs().max()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rough = (kernels.linear(x, weight, bias).cpu() - golden).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact < 1e-5 < rough < 1e-2
