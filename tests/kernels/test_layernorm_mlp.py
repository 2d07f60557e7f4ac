"""kernels/layernorm_mlp.py against a float64 formula of its own on the same rounded inputs.

Eager is ``reference.layernorm_mlp_fwd`` at the kernel's dtype; tolerances: ``support.budget``. The parts have
their own tests (``test_layer_norm``, ``test_linear``); here it is their composition: every activation and option, a
float32 residual stream beside 16-bit weights, the layouts of a residual stream, and the bits of one launch against
the three parts called one by one.
"""

import math

import pytest
import torch
from support.budget import assert_within_budget
from support.layernorm_mlp import formula, inner_norm, problem
from vit_fast.kernels import reference
from vit_fast.kernels.activation_names import ACTIVATIONS
from vit_fast.kernels.configs import LinearConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")
TILES = (LinearConfig(64, 64, 64, 8, 4, 2, True), LinearConfig(64, 32, 64, 8, 4, 2, False))


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.layernorm_mlp", reason="Triton is not installed")


def check(kernels, args, row_scale=None, config=TILES, norm="layer", inner=None):
    options = dict(row_scale=row_scale, norm=norm, inner_norm=inner)
    out, mean, rstd, z = kernels.layernorm_mlp_fwd(*args, **options, config=config)
    again, *_, nothing = kernels.layernorm_mlp_fwd(*args, **options, recompute=True, config=config)
    assert z.dtype == args[4].dtype and z.shape == (*args[0].shape[:-1], len(args[4])) and nothing.numel() == 0
    assert torch.equal(again, out)
    golden, golden_mean, golden_rstd, golden_z = formula(*args, **options)
    assert out.dtype == args[0].dtype and out.is_contiguous()
    assert_within_budget(out, reference.layernorm_mlp(*args, **options), golden)
    assert_within_budget(z, reference.layernorm_mlp_fwd(*args, **options)[3], golden_z)
    *_, none = kernels.layernorm_mlp_fwd(*args, **options, config=config, recompute=True)
    assert none.numel() == 0
    torch.testing.assert_close(mean.cpu().double(), golden_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.cpu().double(), golden_rstd, rtol=1e-5, atol=0)
    assert torch.equal(out, kernels.layernorm_mlp(*args, **options, config=config))
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optional", (True, False))
def test_reference_is_the_formula(activation, optional):
    args = problem((3, 5, 48), 64, torch.float64, activation, optional=optional)
    row_scale, inner = torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64), inner_norm(64, torch.float64)
    for options in (
        {}, dict(row_scale=row_scale), dict(norm="rms"), dict(inner_norm=inner), dict(norm="rms", inner_norm=inner),
    ):  # fmt: skip
        for actual, wanted in zip(
            reference.layernorm_mlp_fwd(*args, **options), formula(*args, **options), strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels, activation, dtype):
    check(kernels, problem((2, 17, 48), 80, dtype, activation))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape,hidden", (((1, 1, 48), 192), ((2, 50, 192), 96), ((1, 197, 48), 147), ((40, 96), 64)))
def test_vit_shapes(kernels, shape, hidden, dtype):
    check(kernels, problem(shape, hidden, dtype))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("optional", (True, False))
def test_options(kernels, optional, dtype):
    args = problem((4, 9, 64), 96, dtype, optional=optional)
    row_scale = torch.tensor([1.25, 0.0, 1.25, 1.25]).to(dtype)
    out = check(kernels, args, row_scale)
    assert torch.equal(out[1], args[0][1])


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_norms(kernels, norm, dtype):
    for activation, side in (("swiglu", dtype), ("gelu", torch.promote_types(dtype, torch.float32))):
        args = problem((2, 17, 64), 96, dtype, activation)
        check(kernels, args, norm=norm)
        check(kernels, args, norm=norm, inner=inner_norm(96, side))
        check(kernels, args, norm=norm, inner=(None, None, 1e-6), row_scale=torch.tensor([1.25, 0.0]).to(dtype))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
def test_a_float32_stream_beside_16_bit_weights(kernels, activation, dtype):
    check(kernels, problem((2, 17, 64), 96, dtype, activation, x_dtype=torch.float32, side_dtype=torch.float32))
    check(kernels, problem((2, 17, 64), 96, dtype, activation, side_dtype=torch.float32))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bfloat16", "float32"))
def test_shipped_configs(kernels, dtype):
    check(kernels, problem((2, 17, 64), 96, dtype, "swiglu"), config=None)


@pytest.mark.interp
@pytest.mark.parametrize(
    "view",
    (
        lambda x: x[:, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:, :1].expand(-1, 6, -1),
        lambda x: x.unflatten(1, (2, 4)),
    ),
    ids=("without the class token", "transposed batch", "transposed channels", "expanded rows", "windows"),
)
def test_layouts(kernels, view):
    x, *rest = problem((3, 8, 48), 64, torch.float16)
    x = view(x)
    row_scale = torch.rand(x.shape[0]).half()
    out = check(kernels, (x, *rest), row_scale)
    assert torch.equal(out, kernels.layernorm_mlp(x.contiguous(), *rest, row_scale=row_scale, config=TILES))


@pytest.mark.interp
def test_it_is_its_three_parts(kernels):
    layer_norm, linear = (
        pytest.importorskip(f"vit_fast.kernels.{name}", reason="Triton is not installed")
        for name in ("layer_norm", "linear")
    )
    args = problem((2, 17, 48), 64, torch.bfloat16)
    x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma = args
    normal = layer_norm.layer_norm(x, ln_weight, ln_bias, eps)
    hidden = linear.linear(normal, w1, b1, activation, config=TILES[0])
    out = linear.linear_residual(hidden, w2, b2, gamma, x, config=TILES[1])
    assert torch.equal(out, kernels.layernorm_mlp(*args, config=TILES))


@pytest.mark.interp
def test_batch_mates_do_not_matter(kernels):
    args = problem((3, 17, 48), 64, torch.float16)
    whole = kernels.layernorm_mlp(*args)
    for image in range(3):
        assert torch.equal(whole[image : image + 1], kernels.layernorm_mlp(args[0][image : image + 1], *args[1:]))
    x = args[0].clone()
    x[1, 4, 7] = math.nan
    spoilt = kernels.layernorm_mlp(x, *args[1:])
    keep = torch.arange(51) != 21
    assert torch.equal(spoilt.flatten(0, 1)[keep], whole.flatten(0, 1)[keep])
    assert spoilt[1, 4].isnan().all()


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bfloat16", "float32"))
def test_massive_activations(kernels, dtype):
    args = problem((2, 17, 96), 64, dtype)
    args[0][:, :, 7] *= 2500
    args[0][0, 3] *= 100
    check(kernels, args)


@pytest.mark.interp
@pytest.mark.parametrize("shape", ((0, 5, 48), (2, 0, 48)))
def test_nothing_to_do(kernels, shape):
    out, mean, rstd, z = kernels.layernorm_mlp_fwd(*problem(shape, 64, torch.float16))
    assert z.shape == (*shape[:-1], 64)
    assert out.shape == shape and mean.shape == rstd.shape == (0,)


def test_reasons(kernels):
    args = problem((2, 5, 48), 64, torch.float32)
    reasons = kernels.not_supported_reasons(*args)
    interpreted = not reasons
    assert interpreted or (len(reasons) == 1 and "cpu" in reasons[0])
    double = kernels.not_supported_reasons(*problem((2, 5, 48), 64, torch.float64))
    assert any("float64" in reason for reason in double) != interpreted
    wide = tuple(None if t is None else t.to("meta") for t in problem((2, 65537), 8, torch.float16)[:3])
    reasons = kernels.not_supported_reasons(*wide, *problem((2, 65537), 8, torch.float16)[3:])
    assert any("65537" in reason for reason in reasons)
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in problem((2, 8), 65537, torch.float16)]
    assert not any("65537" in reason for reason in kernels.not_supported_reasons(*args))
    reasons = kernels.not_supported_reasons(*args, inner_norm=(None, None, 1e-6))
    assert any("65537" in reason for reason in reasons)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape,hidden", (((64, 197, 768), 3072), ((1, 197, 768), 3072), ((3, 257, 384), 1536)))
def test_gpu_vit_shapes(kernels, shape, hidden, activation, dtype):
    args = problem(shape, hidden, dtype, activation, device="cuda")
    row_scale = (torch.arange(shape[0], device="cuda") % 4 != 1).to(dtype) / 0.75
    first = check(kernels, args, row_scale, config=None)
    assert torch.equal(first, kernels.layernorm_mlp(*args, row_scale=row_scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_gpu_float32_stream(kernels, dtype):
    args = problem((16, 198, 768), 3072, dtype, x_dtype=torch.float32, side_dtype=torch.float32, device="cuda")
    check(kernels, args, config=None)
    check(kernels, (args[0][:, 1:], *args[1:]), config=None)
    inner = inner_norm(3072, dtype, device="cuda")
    check(kernels, args, config=None, norm="rms", inner=inner)
