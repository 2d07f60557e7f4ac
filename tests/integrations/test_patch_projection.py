"""Convolutions that project patches, swapped by vit_fast.optimize wherever a library keeps them."""

import copy
import pickle

import pytest
import torch
from support.budget import assert_within_budget
from support.library_models import fused
from torch import nn

import vit_fast
from vit_fast.integrations import patch_projection
from vit_fast.integrations.patch_projection import FAST

# (convolution, images)
CASES = {
    "patches": (lambda: nn.Conv2d(3, 8, 4, 4), (2, 3, 12, 8)),
    "no bias, rows cut off": (lambda: nn.Conv2d(3, 8, (2, 4), (2, 4), bias=False), (2, 3, 7, 9)),
    "overlapping": (lambda: nn.Conv2d(1, 8, 4, (3, 2), padding="valid"), (2, 1, 11, 8)),
    "features of a stem": (lambda: nn.Conv2d(16, 8, 1), (2, 16, 3, 5)),
    "no images": (lambda: nn.Conv2d(3, 8, 4, 4), (0, 3, 8, 8)),
    "tubelets": (lambda: nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 6, 8, 12)),
    "one patch each": (lambda: nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
}


class Block(nn.Module):
    """A transformer block of torch beside a convolution of a known name."""

    def __init__(self, conv, name="patch_embedding"):
        super().__init__()
        self.name = name
        self.add_module(name, conv)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)])

    def forward(self, x):
        tokens = self.get_submodule(self.name)(x).flatten(2).transpose(1, 2)
        return self.layers[0](tokens)


def swapped(conv):
    conv = copy.deepcopy(conv)
    conv.__class__ = FAST[type(conv)]
    return conv


def run(model, x):
    """(result, operations that ran fused, reasons of what did not)."""
    with vit_fast.backends.recording() as choices:
        result = model(x)
    return result, fused(choices), [reasons[0] for _, backend, reasons in choices if backend == "library"]


@pytest.mark.parametrize("name", CASES)
def test_a_convolution(name):
    build, shape = CASES[name]
    plain = build().double()
    model, x = swapped(plain), torch.randn(shape, dtype=torch.float64)
    grads = []
    for one in (plain, model):
        pixels = x.clone().requires_grad_()
        y, _, reasons = run(one, pixels.flip(2))
        assert not reasons
        y = y.flatten(2).transpose(1, 2)
        y.add_(1)  # as timm's NaFlexVit does
        (y.square() / 2).sum().backward()
        grads.append((y.detach(), pixels.grad, *(p.grad for p in one.parameters())))
    for actual, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert type(copied) is type(model) and torch.equal(copied(x), model(x))
        half = copy.deepcopy(plain).bfloat16()
        eager = half(x.bfloat16())
        if eager.numel():
            golden = copy.deepcopy(half).double()(x.bfloat16().double())
            assert_within_budget(swapped(half)(x.bfloat16()), eager, golden, kind="model", replicas=[])


def test_what_runs_as_it_did():
    plain = nn.Conv2d(3, 8, 4, 4)
    model, x = swapped(plain), torch.randn(2, 3, 8, 8)
    assert run(model, x)[1] == ["patch_embed"]
    assert run(model, x[0])[2] == ["the input has 3 dimensions, not 4"] and torch.equal(model(x[0]), plain(x[0]))
    with torch.autocast("cpu", torch.bfloat16):
        y, _, reasons = run(model, x)
    assert reasons == ["autocast is on"] and y.dtype == torch.bfloat16
    for wrong in (x.double(), x[:, :2], x[..., :3]):
        with pytest.raises(RuntimeError):
            plain(wrong)
        with pytest.raises(RuntimeError):
            model(wrong)
    model.padding = (2, 2)
    assert run(model, x)[2] == ["it is padded"]
    video = swapped(nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)))
    assert run(video, torch.randn(1, 3, 3, 8, 8))[2] == ["3 frames are no whole number of 2"]


@pytest.mark.parametrize("name", ("patch_embedding", "conv_proj", "conv1"))
def test_hooks_restore_and_a_second_time(name):
    model, x = Block(nn.Conv2d(3, 8, 4, 4), name), torch.randn(2, 3, 8, 8)
    expected = model(x)
    for _ in range(2):
        vit_fast.optimize(model, strict=True)
        y, ran, reasons = run(model, x)
        assert ran[0] == "patch_embed" and not reasons
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert vit_fast.coverage(model, x).share == 1
    calls = []
    handle = getattr(model, name).register_forward_hook(lambda module, inputs, result: calls.append(result.shape))
    assert run(model, x)[1][0] == "patch_embed" and calls == [(2, 8, 2, 2)]
    handle.remove()
    vit_fast.restore(model)
    assert type(getattr(model, name)) is nn.Conv2d and torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ("patches", "tubelets"))
def test_compiles_in_one_graph(name):
    build, shape = CASES[name]
    model, x = swapped(build()), torch.randn(shape)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_stays():
    for conv, reason in (
        (nn.Conv2d(3, 8, 4, 4, padding=2), "its convolution stays: it is padded"),
        (nn.Conv2d(3, 9, 4, 4, groups=3), "its convolution stays: it is dilated or grouped"),
        (nn.Linear(3, 8), "its projection of patches is a linear layer of PyTorch"),
        (nn.Identity(), "torch.nn.modules.linear.Identity is not a class that vit_fast fuses"),
    ):
        model = Block(conv)
        assert type(vit_fast.optimize(model, strict=True).patch_embedding) is type(conv)
        assert patch_projection.why_not(conv) == reason
    own = vit_fast.create_model("vit_tiny_patch16_224", depth=1)
    model = vit_fast.optimize(nn.ModuleList([own, nn.TransformerEncoderLayer(8, 2, 16)]))
    assert type(model[0].patch_embed.proj) is nn.Conv2d
    lonely = nn.ModuleDict(dict(patch_embed=nn.Conv2d(3, 8, 4, 4)))
    with pytest.raises(ValueError, match="without transformer blocks"):
        vit_fast.optimize(lonely)
