"""kernels/layer_norm.py against a float64 formula of its own on the same rounded inputs.

Eager is ``reference.layer_norm_fwd`` at the kernel's dtype; tolerances: ``support.budget``. Widths: those of real ViTs,
none of which but 48's neighbours fills its block (768 in 1024: padding lanes would leak into the variance), one that
is a power of two, 1, and widths above one block, which take the kernel that loops. Rows with a mean far from zero and
constant rows, where a one-pass or an uncorrected mean fails.
"""

import mmap

import pytest
import torch
from support.budget import assert_within_budget
from support.layer_norm import formula
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LayerNormConfig, pick_layer_norm_config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.layer_norm", reason="Triton is not installed")


def problem(shape, dtype, weight=True, bias=True, side_dtype=None, mean=0.0, spread=1.0, device="cpu"):
    width = shape[-1]
    x = (torch.randn(shape, device=device) * spread + mean).to(dtype)
    return (
        x,
        (1 + 0.3 * torch.randn(width, device=device)).to(side_dtype or dtype) if weight else None,
        torch.randn(width, device=device).to(side_dtype or dtype) if bias else None,
    )


def check(kernels, x, weight, bias, eps=1e-6, out_dtype=None, config=None, expected_zeros=0.1, norm="layer"):
    y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps, out_dtype=out_dtype, config=config, norm=norm)
    eager, eager_mean, _ = reference.layer_norm_fwd(x, weight, bias, eps, norm=norm)
    golden, golden_mean, golden_rstd = formula(x, weight, bias, eps, norm)
    assert y.is_contiguous() and y.dtype == (out_dtype or x.dtype)
    assert mean.dtype == rstd.dtype == eager_mean.dtype and mean.shape == rstd.shape == eager_mean.shape
    assert_within_budget(y, eager.to(y.dtype), golden, expected_zeros=expected_zeros)
    # The mean cancels: what counts is its error beside the row's largest element.
    epsilon = torch.finfo(mean.dtype).eps
    size = x.detach().cpu().double().abs().amax(-1).flatten()
    assert ((mean.cpu() - golden_mean).abs() <= 2 * epsilon * size).all()
    assert ((rstd.cpu() - golden_rstd).abs() <= 4 * epsilon * golden_rstd).all()
    assert torch.equal(y, kernels.layer_norm(x, weight, bias, eps, out_dtype=out_dtype, config=config, norm=norm))
    return y, mean, rstd


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("weight,bias", ((True, True), (True, False), (False, True), (False, False)))
def test_reference_is_the_formula(weight, bias, norm):
    x, weight, bias = problem((2, 5, 48), torch.float64, weight, bias, mean=3.0)
    golden = formula(x, weight, bias, 1e-5, norm)
    for actual, wanted in zip(reference.layer_norm_fwd(x, weight, bias, 1e-5, norm=norm), golden):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_reference_with_parameters_of_another_dtype():
    x, weight, bias = problem((2, 5, 48), torch.bfloat16, side_dtype=torch.float32)
    assert_within_budget(
        reference.layer_norm(x, weight, bias, 1e-6),
        torch.nn.functional.layer_norm(x, (48,), weight.bfloat16(), bias.bfloat16(), 1e-6),
        formula(x, weight, bias, 1e-6)[0],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_the_reference_of_rms_rounds_no_more_than_torch(dtype):
    """Its parameters, a bias among them, in float32 beside a 16-bit x too."""
    x, weight, bias = problem((2, 50, 192), dtype, mean=0.5)
    eager = torch.nn.functional.rms_norm(x, (192,), weight, 1e-6) + bias
    for parameters in ((weight, bias), (weight.float(), bias.float())):
        actual = reference.layer_norm(x, *parameters, 1e-6, norm="rms")
        assert_within_budget(actual, eager, formula(x, *parameters, 1e-6, "rms")[0])


def test_every_width_has_a_config():
    for width in (*range(1, 5000), 16384, 16385, 65536):
        tiles = pick_layer_norm_config(width)
        assert tiles.block & (tiles.block - 1) == 0 and tiles.rows >= 1
        assert tiles.block * tiles.rows <= 1024 * tiles.num_warps
        assert tiles.block >= width or tiles.rows == 1


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "shape",
    (
        (1, 1, 48), (2, 2, 192), (1, 17, 384), (2, 50, 588), (1, 197, 768), (1, 257, 48), (3, 64), (2, 3, 1152),
        (7, 1024), (2, 3, 4, 80), (2, 5000),
    ),
)  # fmt: skip
def test_vit_shapes(kernels, shape, dtype):
    check(kernels, *problem(shape, dtype))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("width", (16385, 20000, 65536))
def test_rows_wider_than_a_block(kernels, width, dtype):
    check(kernels, *problem((2, 1, width), dtype, mean=3.0))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("shape", ((1, 1, 48), (2, 9, 588), (1, 17, 768), (3, 64), (5, 1), (2, 5000), (2, 20000)))
def test_rms(kernels, shape, dtype):
    x, weight, bias = problem(shape, dtype, mean=0.5)
    check(kernels, x, weight, None, norm="rms")
    check(kernels, x, weight, bias, norm="rms")
    check(kernels, x, None, None, norm="rms", out_dtype=torch.float16)
    config = LayerNormConfig(rows=1, block=16, num_warps=4)
    check(kernels, x[..., : min(x.shape[-1], 100)], None, None, norm="rms", config=config)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("mean", (0.0, 1000.0))
@pytest.mark.parametrize("shape", ((1, 1, 48), (2, 50, 588), (1, 197, 768), (3, 64), (5, 1), (2, 5000), (1, 16384)))
def test_row_partials(kernels, shape, mean, dtype):
    x = problem(shape, dtype, mean=mean)[0]
    values, width = kernels.row_partials(x)
    rows = x.double().reshape(-1, shape[-1])
    assert width >= shape[-1] and values.shape == (2, 1, len(rows))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rest = rows - rows.mean(1, keepdim=True)
    epsilon = torch.finfo(values.dtype).eps
    slack = 2 * epsilon * rows.abs().amax(1)
    assert ((values[0, 0] - rows.mean(1)).abs() <= slack).all()
    squares = rest.square().sum(1)
    assert ((values[1, 0] - squares).abs() <= 8 * epsilon * squares + shape[-1] * slack.square()).all()


@pytest.mark.interp
@pytest.mark.parametrize("layout", ("class token", "axes swapped", "channels first", "three strides"))
def test_row_partials_of_any_layout(kernels, layout):
    x = torch.randn(4, 6, 48).half()
    x = {
        "class token": lambda: x[:, 1:],
        "axes swapped": lambda: x.transpose(0, 1),
        "channels first": lambda: x.transpose(1, 2),
        "three strides": lambda: x.unflatten(1, (2, 3)).permute(1, 0, 2, 3),
    }[layout]()
    assert torch.equal(kernels.row_partials(x).values, kernels.row_partials(x.contiguous()).values)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("mean,spread", ((0.0, 1.0), (1000.0, 1.0), (1e5, 0.1)))
@pytest.mark.parametrize("width,part", ((147, 16), (600, 600), (1040, 16), (33, 32)))
def test_row_statistics(kernels, width, part, mean, spread, dtype):
    """1040 columns in parts of 16 are 65: more than are merged at a time."""
    x = (spread * torch.randn(200, width, dtype=torch.float64) + mean * torch.randn(200, 1)).to(dtype)
    values = torch.stack(
        [torch.stack([m.mean(1), m.var(1, correction=0) * m.shape[1]]) for m in x.double().split(part, 1)], 1
    )
    found = kernels.row_statistics(kernels.RowPartials(values.to(dtype).contiguous(), part), width, 1e-5).values
    wanted = x.double().mean(1), (x.double().var(1, correction=0) + 1e-5).rsqrt()
    epsilon, largest = torch.finfo(dtype).eps, x.double().abs().amax(1)
    assert found.shape == (2, 200) and found.dtype == dtype
    assert ((found[0] - wanted[0]).abs() <= 2 * epsilon * largest).all()
    # M2 errs by that of the means of the parts, each rounded once
    slack = 8 * epsilon + 2 * epsilon * largest * wanted[1] + (2 * epsilon * largest * wanted[1]) ** 2
    assert ((found[1] / wanted[1] - 1).abs() <= slack).all()


@pytest.mark.interp
def test_row_statistics_of_constant_rows(kernels):
    """Means of a million and a third, equal in all parts, have no spread."""
    values = torch.zeros(2, 19, 130)
    values[0] = 1e6 + 1 / 3 + torch.arange(130)
    mean, rstd = kernels.row_statistics(kernels.RowPartials(values, 16), 300, 1e-4).values
    assert torch.equal(mean, values[0, 0])
    torch.testing.assert_close(rstd, torch.full((130,), 100.0), rtol=1e-6, atol=0)


def test_row_partials_tell_what_they_cannot(kernels):
    wide = torch.empty(1, 16385, device="meta")
    assert kernels.row_partials_not_supported_reasons(wide)[-1] == "width 16385 is above 16384"


@pytest.mark.interp
def test_a_short_block_takes_the_loop(kernels):
    x, weight, bias = problem((2, 3, 100), torch.float32, mean=50.0)
    check(kernels, x, weight, bias, config=LayerNormConfig(rows=1, block=16, num_warps=4))
    check(kernels, x[:, 1:], None, bias, config=LayerNormConfig(rows=1, block=64, num_warps=4))


@pytest.mark.interp
@pytest.mark.parametrize("width", (1, 2, 3))
def test_tiny_widths(kernels, width):
    """One channel normalises to zero whatever it is; eager agrees to the bit."""
    x, weight, bias = problem((2, 9, width), torch.float32)
    y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, 1e-5)
    golden, golden_mean, golden_rstd = formula(x, weight, bias, 1e-5)
    torch.testing.assert_close(y.double(), golden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), golden_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), golden_rstd, rtol=1e-5, atol=1e-6)
    if width == 1:
        assert torch.equal(y, bias.expand_as(y))


@pytest.mark.interp
@pytest.mark.parametrize("weight,bias", ((True, False), (False, True), (False, False)))
def test_without_parameters(kernels, weight, bias):
    check(kernels, *problem((2, 17, 192), torch.float16, weight, bias))


@pytest.mark.interp
@pytest.mark.parametrize(
    "dtype,side_dtype,out_dtype",
    (
        (torch.bfloat16, torch.float32, None),
        (torch.float16, torch.float32, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ),
)
def test_mixed_dtypes(kernels, dtype, side_dtype, out_dtype):
    x, weight, bias = problem((2, 17, 192), dtype, side_dtype=side_dtype)
    check(kernels, x, weight, bias, out_dtype=out_dtype)


@pytest.mark.interp
def test_float64(kernels):
    y, mean, rstd = check(kernels, *problem((2, 5, 96), torch.float64, mean=3.0))
    assert y.dtype == mean.dtype == rstd.dtype == torch.float64


LAYOUTS = {
    "without the class token": lambda x: x[:, 1:],
    "one token": lambda x: x[:, 3],
    "one token, axis kept": lambda x: x[:, 3:4],
    "transposed batch": lambda x: x.transpose(0, 1),
    "transposed channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other channel": lambda x: x[..., ::2],
    "offset by one element": lambda x: x.flatten()[1:-47].view(-1, 48),
    "a third of a packed tensor": lambda x: x.unflatten(2, (3, 16))[:, :, 1],
    "expanded rows": lambda x: x[:, :1].expand(-1, 5, -1),
    "expanded batch": lambda x: x[:1].expand(4, -1, -1),
    "one row": lambda x: x[1:2, 4:5],
    "one image": lambda x: x[1:2, 1:],
    "part of every channel vector": lambda x: x[..., 1:41],
    "overlapping rows": lambda x: x.as_strided((3, 4, 48), (24, 24, 1)),
    "three strides": lambda x: x.unflatten(1, (2, 4)).permute(1, 0, 2, 3),
    "four axes, two strides": lambda x: x.unflatten(1, (2, 4))[:, 1:],
}


@pytest.mark.interp
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernels, layout):
    x, _, _ = problem((3, 8, 48), torch.float32, mean=2.0)
    x = LAYOUTS[layout](x)
    weight, bias = torch.randn(2, x.shape[-1]).t().contiguous().unbind(1)
    assert weight.stride(0) == 2
    y, mean, rstd = check(kernels, x, weight, bias)
    for actual, wanted in zip((y, mean, rstd), kernels.layer_norm_fwd(x.contiguous(), weight, bias, 1e-6)):
        assert torch.equal(actual, wanted)
    wide = LayerNormConfig(rows=1, block=16, num_warps=4)
    check(kernels, x, weight, bias, config=wide)


def test_rows_need_no_more_strides_than_they_have(kernels):
    x = torch.zeros(3, 8, 48)
    split = {
        "without the class token", "transposed batch", "transposed channels", "expanded rows", "expanded batch",
        "four axes, two strides", "overlapping rows",
    }  # fmt: skip
    for name, layout in LAYOUTS.items():
        view = layout(x)
        rows = kernels.launch.row_layout(view)
        assert (rows[0] is view) == (name != "three strides"), name
        assert rows[1] == (name in split), name


@pytest.mark.interp
@pytest.mark.parametrize("shape", ((0, 5, 48), (2, 0, 48), (0, 48)))
def test_nothing_to_do(kernels, shape):
    y, mean, rstd = kernels.layer_norm_fwd(torch.empty(shape), torch.ones(48), None, 1e-6)
    assert y.shape == shape and mean.shape == rstd.shape == (0,)
    assert kernels.layer_norm(torch.empty(shape), None, None, 1e-6).shape == shape


@pytest.mark.interp
@pytest.mark.parametrize("block", (1024, 128), ids=("one block", "loop"))
@pytest.mark.parametrize("mean,spread", ((1e2, 1e-2), (1e4, 1.0), (1e6, 1.0), (-1000.0, 1.0), (0.0, 1e-4), (0.0, 1e4)))
def test_far_means(kernels, mean, spread, block):
    x, weight, bias = problem((1, 9, 768), torch.float32, mean=mean, spread=spread)
    check(kernels, x, weight, bias, config=LayerNormConfig(rows=2 if block > 768 else 1, block=block, num_warps=4))


@pytest.mark.interp
@pytest.mark.parametrize("block", (1024, 128), ids=("one block", "loop"))
@pytest.mark.parametrize("value", (0.0, 0.1, 1e6 + 1 / 3, -3e7))
def test_constant_rows_give_the_bias(kernels, value, block):
    x, bias = torch.full((3, 768), value), torch.randn(768)
    config = LayerNormConfig(rows=2 if block > 768 else 1, block=block, num_warps=4)
    y, mean, rstd = kernels.layer_norm_fwd(x, None, bias, 1e-6, config=config)
    torch.testing.assert_close(y, bias.expand_as(y), rtol=0, atol=1e-6)
    assert torch.equal(mean, x[:, 0])
    torch.testing.assert_close(rstd, torch.full((3,), 1e3), rtol=1e-6, atol=0)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_massive_activations(kernels, dtype):
    x, weight, bias = problem((2, 9, 384), dtype)
    x[:, :, 7] *= 2500
    x[:, 3] *= 20
    check(kernels, x.clamp(-6e4, 6e4), weight, bias)


@pytest.mark.interp
def test_power_of_two_scaling_is_exact(kernels):
    x, weight, bias = problem((2, 9, 192), torch.float32)
    y = kernels.layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(y, kernels.layer_norm(x * 4, weight, bias, 16e-5))


@pytest.mark.interp
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_bad_row_stays_alone(kernels, bad):
    x, weight, bias = problem((2, 9, 48), torch.float32)
    clean = kernels.layer_norm_fwd(x, weight, bias, 1e-6)
    x[1, 4, 5] = bad
    spoilt = kernels.layer_norm_fwd(x, weight, bias, 1e-6)
    keep = torch.arange(18) != 13
    assert torch.equal(spoilt[0].view(18, 48)[keep], clean[0].view(18, 48)[keep])
    assert torch.equal(spoilt[1][keep], clean[1][keep]) and torch.equal(spoilt[2][keep], clean[2][keep])
    assert spoilt[0][1, 4].isnan().all() and spoilt[2][13].isnan()


@pytest.mark.interp
@pytest.mark.parametrize("block", (64, 16), ids=("one block", "loop"))
def test_offsets_beyond_two_to_the_31(kernels, block):
    """The memory is reserved, not used: only the pages that are touched exist."""
    step = 2**31 + 64
    config = LayerNormConfig(rows=2 if block == 64 else 1, block=block, num_warps=4)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    with mmap.mmap(-1, (2 * step + 4096) * 2, flags=flags) as memory:
        storage = torch.frombuffer(memory, dtype=torch.float16)
        small = problem((2, 3, 48), torch.float16)[0]
        expected = kernels.layer_norm_fwd(small, None, None, 1e-6, config=config)
        third = step // 3  # the batch stride that continues it makes all rows lie at one stride
        for strides in ((step, 48, 1), (64, step // 2, 1), (64, 1, step // 32), (3 * third, third, 1)):
            far = torch.as_strided(storage, small.shape, strides).copy_(small)
            for actual, wanted in zip(kernels.layer_norm_fwd(far, None, None, 1e-6, config=config), expected):
                assert torch.equal(actual, wanted)
        del storage, far


def test_reasons(kernels):
    x = torch.zeros(2, 5, 48)
    assert bool(kernels.not_supported_reasons(x, None, None, 1e-6)) != kernels.launch.INTERPRETED
    reasons = kernels.not_supported_reasons(torch.zeros(2, 65537, device="meta"), None, None, 1e-6)
    assert any("width 65537" in reason for reason in reasons)
    double = kernels.not_supported_reasons(x.double(), None, None, 1e-6)
    assert any("float64" in reason for reason in double) != kernels.launch.INTERPRETED


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", ((64, 197, 768), (3, 257, 1280), (8, 197, 192), (5, 577, 1024), (1, 50, 384)))
def test_gpu_vit_shapes(kernels, shape, dtype):
    args = problem(shape, dtype, device="cuda")
    first = check(kernels, *args)
    for actual, wanted in zip(kernels.layer_norm_fwd(*args, 1e-6), first):
        assert torch.equal(actual, wanted)


@pytest.mark.gpu
def test_gpu_layouts_and_mixed_dtypes(kernels):
    x, weight, bias = problem((16, 197, 768), torch.bfloat16, side_dtype=torch.float32, device="cuda")
    check(kernels, x[:, 1:], weight, bias)
    check(kernels, x.transpose(0, 1), weight, bias)
    check(kernels, x.float(), weight, bias, out_dtype=torch.bfloat16)
    check(kernels, x, weight, None, norm="rms")
    check(kernels, *problem((4, 65536), torch.float32, device="cuda"), norm="rms")
    check(kernels, *problem((4, 65536), torch.float32, mean=100.0, device="cuda"))
    x = torch.full((300, 768), 1e6 + 1 / 3, device="cuda")
    assert kernels.layer_norm(x, None, None, 1e-6).abs().max() < 1e-6
