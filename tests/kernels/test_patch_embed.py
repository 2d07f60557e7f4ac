"""kernels/patch_embed.py against a float64 formula of its own: patches cut out by unfold, one matrix product.

Eager is ``reference.patch_embed`` at the kernel's dtype. Tolerances: ``support.budget``, "forward" everywhere.
Shapes: the patch sizes of real ViTs (4 … 50, 14 with its K = 588 above all), images that are no multiple of the patch,
more and fewer channels than three, widths that are no multiple of a tile.
"""

import pytest
import torch
import torch.nn.functional as F
from support.budget import assert_within_budget
from support.patch_embed import golden
from vit_fast.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")
from vit_fast.kernels.configs import PatchEmbedConfig
from vit_fast.kernels.patch_embed import not_supported_reasons, patch_embed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def problem(
    dtype, batch=2, channels=3, size=(32, 48), dim=48, patch=(16, 16), stride=None, prefix=1, per_image=False,
    bias=True, pos=True, pixels=None, side_dtype=None,
):  # fmt: skip
    """Arguments of patch_embed."""
    stride = stride or patch
    grid = ((size[0] - patch[0]) // stride[0] + 1) * ((size[1] - patch[1]) // stride[1] + 1)
    if pixels == torch.uint8:
        images = torch.randint(0, 256, (batch, channels, *size)).to(torch.uint8)
    else:
        images = torch.randn(batch, channels, *size).to(pixels or dtype)
    fan_in = channels * patch[0] * patch[1]
    side_dtype = side_dtype or dtype
    return (
        images,
        (torch.randn(dim, channels, *patch) * fan_in**-0.5).to(dtype),
        torch.randn(dim).to(dtype) if bias else None,
        torch.randn(1, grid, dim).to(side_dtype) if pos else None,
        torch.randn(batch if per_image else 1, prefix, dim).to(side_dtype) if prefix is not None else None,
        stride,
    )


def check(arguments, mean=None, std=None, config=None, repro=None):
    out = patch_embed(*arguments, mean=mean, std=std, config=config)
    eager = reference.patch_embed(*arguments, mean=mean, std=std)
    assert out.is_contiguous() and out.dtype == arguments[1].dtype
    prefix = 0 if arguments[4] is None else arguments[4].shape[1]
    assert torch.equal(out[:, :prefix], eager[:, :prefix])
    if repro is None:
        repro = f"images {tuple(arguments[0].shape)} {arguments[0].stride()} weight {tuple(arguments[1].shape)}"
    gold = golden(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments), mean=mean, std=std)
    assert_within_budget(out[:, prefix:], eager[:, prefix:], gold[:, prefix:], repro=repro)
    return out


SHAPES = {
    "base": dict(size=(64, 48), dim=96),
    "patch14": dict(size=(42, 28), patch=(14, 14), dim=80, prefix=5),
    "patch14 not a multiple": dict(size=(45, 41), patch=(14, 14), dim=80, prefix=None),
    "patch4": dict(size=(12, 20), patch=(4, 4), dim=33),
    "patch8 one channel": dict(channels=1, size=(24, 24), patch=(8, 8)),
    "patch32": dict(size=(64, 32), patch=(32, 32), dim=20, prefix=2, per_image=True),
    "patch50": dict(size=(50, 100), patch=(50, 50), dim=24, batch=1),
    "wide patch": dict(size=(20, 48), patch=(4, 16), dim=130),
    "tall patch": dict(size=(33, 21), patch=(11, 5), dim=40, prefix=0),
    "overlap": dict(size=(23, 26), patch=(7, 7), stride=(4, 3), dim=64),
    "gaps": dict(size=(24, 24), patch=(4, 4), stride=(9, 6), dim=64),
    "ten channels": dict(channels=10, size=(16, 24), patch=(8, 8), dim=48),
    "one pixel": dict(size=(3, 5), patch=(1, 1), dim=48),
    "one patch one image": dict(batch=1, size=(16, 16), dim=48),
    "no bias": dict(bias=False, dim=40),
    "no pos": dict(pos=False, dim=40),
    "bare": dict(bias=False, pos=False, prefix=None, dim=40),
    "fp32 pos and prefix": dict(side_dtype=torch.float32, prefix=3, per_image=True),
    "many rows": dict(batch=5, size=(48, 48), patch=(8, 8), dim=136, prefix=30, per_image=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape):
    arguments = problem(torch.float64, **SHAPES[shape])
    torch.testing.assert_close(reference.patch_embed(*arguments), golden(*arguments), rtol=1e-12, atol=1e-12)


def fold_pixel_normalisation(weight, bias, mean, std, from_uint8):
    """weight and bias that take raw pixels: conv((pixel/255 − mean)/std) for uint8, conv((pixel − mean)/std) else."""
    if mean is None and std is None and not from_uint8:
        return weight, bias
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    channels = weight.shape[1]
    scale = wide.new_tensor(std or [1.0] * channels).view(1, -1, 1, 1) * (255.0 if from_uint8 else 1.0)
    folded = (wide / scale).to(weight.dtype)
    if mean is not None:
        offset = wide.new_tensor(mean).view(1, -1, 1, 1) * (255.0 if from_uint8 else 1.0)
        shift = (folded.to(wide.dtype) * offset).sum((1, 2, 3))
        bias = -shift if bias is None else bias.to(wide.dtype) - shift
    return folded, bias


@pytest.mark.parametrize("pixels", (torch.uint8, torch.float64))
def test_folded_weights_are_the_formula(pixels):
    images, weight, bias, *rest = problem(torch.float64, pixels=pixels)
    expected = golden(images, weight, bias, *rest, mean=MEAN, std=STD)
    folded = fold_pixel_normalisation(weight, bias, MEAN, STD, pixels == torch.uint8)
    actual = reference.patch_embed(images.double(), *folded, *rest)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_reasons():
    cpu = problem(torch.float64)
    reasons = not_supported_reasons(*cpu)
    assert reasons == [] or len(reasons) == 2


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_golden(shape, dtype):
    check(problem(dtype, **SHAPES[shape]))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", (14, 16))
def test_real_token_counts(dtype, patch):
    """196 or 256 patches and a prefix, one image, all the width of a tile."""
    check(problem(dtype, batch=1, size=(224, 224), patch=(patch, patch), dim=128))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("pixels", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_images_of_another_dtype(dtype, pixels):
    check(problem(dtype, pixels=pixels))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("mean,std", ((MEAN, STD), (None, None), (MEAN, None), (None, STD)))
def test_uint8_pixels(dtype, bias, mean, std):
    check(problem(dtype, batch=4, pixels=torch.uint8, bias=bias, dim=64), mean=mean, std=std)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_normalised_float_pixels(dtype):
    images, *rest = problem(dtype, batch=4, dim=64)
    check((images.float().sigmoid().to(images.dtype), *rest), mean=MEAN, std=STD)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_folded_by_the_caller(dtype):
    """uint8 pixels with std = 1/255 go in as they are: the fold is the whole normalisation."""
    images, weight, bias, *rest = problem(dtype, batch=4, pixels=torch.uint8, dim=64)
    eager = reference.patch_embed(images, weight, bias, *rest, mean=MEAN, std=STD)
    folded = fold_pixel_normalisation(weight, bias, MEAN, STD, True)
    out = patch_embed(images, *folded, *rest, std=(1 / 255,) * 3)
    expected = golden(images, weight, bias, *rest, mean=MEAN, std=STD)
    assert_within_budget(out[:, 1:], eager[:, 1:], expected[:, 1:], kind="model")


VIEWS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "channels_last slice": lambda x: F.pad(x, (3, 5, 2, 1)).to(memory_format=torch.channels_last)[:, :, 2:-1, 3:-5],
    "more channels last": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)).to(memory_format=torch.channels_last)[:, 1:-2],
    "slice": lambda x: F.pad(x, (3, 5, 2, 1), value=torch.nan)[:, :, 2:-1, 3:-5],
    "every second": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.interp
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("pixels", (torch.float16, torch.uint8))
def test_views_of_images_give_the_same_bits(view, pixels):
    if pixels == torch.uint8 and view == "slice":
        pad = lambda x: F.pad(x, (3, 5, 2, 1), value=255)[:, :, 2:-1, 3:-5]  # noqa: E731
    else:
        pad = VIEWS[view]
    images, *rest = problem(torch.float16, pixels=pixels, size=(32, 40))
    moved = pad(images)
    assert torch.equal(moved, images) and moved.stride() != images.stride()
    config = PatchEmbedConfig(64, 64, 1024, 4, 2)  # one step over k: the order of the sums is numpy's alone
    plain = check((images, *rest), config=config)
    if "channels" in view:
        check((moved, *rest), config=config)
    else:
        assert torch.equal(patch_embed(moved, *rest, config=config), plain)


@pytest.mark.interp
def test_expanded_images():
    images, *rest = problem(torch.float32, batch=3)
    check((images[:1].expand(3, -1, -1, -1), *rest))
    check((images[:, :1].expand(-1, 3, -1, -1), *rest))


@pytest.mark.interp
@pytest.mark.parametrize(
    "view",
    (
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: torch.cat([w, w])[: w.shape[0]],
        lambda w: w.repeat_interleave(2, 0)[::2],
        lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda w: w.repeat_interleave(2, 3)[..., ::2],
        lambda w: F.pad(w, (0, 0, 0, 0, 1, 0))[:, 1:],
    ),
)
@pytest.mark.parametrize("channels_last", (False, True))
def test_views_of_weight_and_the_rest(view, channels_last):
    images, weight, bias, pos_embed, prefix, stride = problem(torch.float32, prefix=3, per_image=True)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    expected = patch_embed(images, weight, bias, pos_embed, prefix, stride)
    moved = (
        view(weight),
        bias.repeat_interleave(2)[::2],
        pos_embed.transpose(1, 2).contiguous().transpose(1, 2),
        F.pad(prefix, (1, 2, 1, 1, 1, 1))[1:-1, 1:-1, 1:-2],
    )
    assert all(torch.equal(a, b) for a, b in zip(moved, (weight, bias, pos_embed, prefix)))
    assert torch.equal(patch_embed(images, *moved, stride), expected)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype):
    """Products of small integers have no rounding: not one bit may differ, whatever the tiles."""
    images = torch.randint(-4, 5, (2, 3, 28, 42)).to(dtype)
    weight = torch.randint(-1, 2, (70, 3, 14, 14)).to(dtype)
    bias, pos_embed = torch.randint(-8, 9, (70,)).to(dtype), torch.randint(-8, 9, (1, 6, 70)).to(dtype)
    expected = golden(images, weight, bias, pos_embed, None, (14, 14))
    assert 50 < expected.abs().max() < 2000
    for config in (None, PatchEmbedConfig(16, 16, 128, 4, 2), PatchEmbedConfig(32, 128, 256, 4, 2)):
        out = patch_embed(images, weight, bias, pos_embed, None, (14, 14), config=config)
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.interp
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_not_finite_pixels_stay_in_their_patch(value):
    """In the image [2, …, 32, 32] of patch 16 the pixel (1, 20, 3) belongs to patch 2 of its image alone."""
    images, *rest = problem(torch.float32, size=(40, 33), prefix=2)
    clean = patch_embed(images, *rest)
    spoilt = images.clone()
    spoilt[1, 0, 20, 3] = value
    spoilt[0, 1, 33:, :] = value  # below and right of the last patch: read by nobody
    spoilt[0, 1, :, 32:] = value
    out = patch_embed(spoilt, *rest)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[1, 2 + 2] = True
    assert not out[touched].isfinite().any()
    assert torch.equal(out[~touched], clean[~touched])


@pytest.mark.interp
def test_not_finite_prefix_pos_and_bias_stay_in_their_place():
    images, weight, bias, pos_embed, prefix, stride = problem(torch.float32, prefix=2, per_image=True)
    clean = patch_embed(images, weight, bias, pos_embed, prefix, stride)
    prefix[1, 0, 5] = float("nan")
    pos_embed[0, 3, 7] = float("nan")
    out = patch_embed(images, weight, bias, pos_embed, prefix, stride)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[1, 0, 5] = touched[:, 2 + 3, 7] = True
    assert torch.equal(out.isnan(), touched) and torch.equal(out[~touched], clean[~touched])


@pytest.mark.interp
def test_large_fp16_values_do_not_overflow_on_the_way():
    """Partial sums above 65504 are fine where the result is below."""
    images = torch.full((1, 2, 16, 16), 60000.0, dtype=torch.float16)
    weight = torch.full((48, 2, 16, 16), 0.5, dtype=torch.float16)
    weight[:, 1] = -0.5
    weight[:, 1, 0, 0] += torch.linspace(-0.25, 0.25, 48).half()
    out = patch_embed(images, weight, None, None, None, (16, 16))
    torch.testing.assert_close(out.double(), golden(images, weight, None, None, None, (16, 16)), rtol=1e-3, atol=0)


@pytest.mark.interp
@pytest.mark.parametrize("pixels", (torch.float32, torch.uint8))
def test_empty_batch(pixels):
    images, *rest = problem(torch.float32, pixels=pixels)
    assert patch_embed(images[:0], *rest).shape == (0, 7, 48)
    images, *rest = problem(torch.float32, prefix=2, per_image=True)
    rest[3] = rest[3][:0]
    assert patch_embed(images[:0], *rest).shape == (0, 8, 48)


GPU_SHAPES = {
    "ViT-S/16": dict(batch=64, size=(224, 224), dim=384),
    "ViT-B/16": dict(batch=64, size=(224, 224), dim=768),
    "ViT-B/16 one image": dict(batch=1, size=(224, 224), dim=768),
    "ViT-B/32": dict(batch=3, size=(224, 224), patch=(32, 32), dim=768, prefix=5),
    "ViT-H/14": dict(batch=16, size=(224, 224), patch=(14, 14), dim=1280, prefix=5),
    "ViT-L/14 518": dict(batch=2, size=(518, 518), patch=(14, 14), dim=1024),
    "overlap": dict(batch=8, size=(224, 224), stride=(10, 12), dim=768),
}


def to_device(arguments):
    return tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_gpu_matches_golden(shape, dtype, layout):
    images, *rest = to_device(problem(dtype, **GPU_SHAPES[shape]))
    images = images.to(memory_format=layout)
    out = check((images, *rest))
    assert torch.equal(patch_embed(images, *rest), out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_gpu_uint8_pixels(dtype, layout):
    images, *rest = to_device(problem(dtype, batch=16, size=(224, 224), dim=768, pixels=torch.uint8))
    check((images.to(memory_format=layout), *rest), mean=MEAN, std=STD)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_tiles_and_batch_mates_do_not_change_the_bits(dtype):
    images, *rest = to_device(problem(dtype, batch=64, size=(224, 224), dim=768))
    whole = patch_embed(images, *rest)
    for b in (0, 63):
        assert torch.equal(patch_embed(images[b : b + 1], *rest), whole[b : b + 1])


@pytest.mark.gpu
def test_gpu_graph_capture():
    """One call beforehand puts the pixel table on the device; nothing else comes from the host."""
    images, *rest = to_device(problem(torch.bfloat16, size=(224, 224), dim=768, pixels=torch.uint8))
    expected = patch_embed(images, *rest, mean=MEAN, std=STD)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = patch_embed(images, *rest, mean=MEAN, std=STD)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
