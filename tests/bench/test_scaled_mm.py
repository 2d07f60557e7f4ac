"""vit_fast/bench/scaled_mm.py: that the float8 baseline computes what timm's model does, rounded to e4m3 and no more.

torch._scaled_mm runs on a CPU as on a GPU (torch 2.11: with one scale for all alone); whether a GPU takes these
layouts, torch's own checks tell on fake tensors.
"""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vit_fast.bench import scaled_mm

E4M3 = torch.float8_e4m3fn


def test_rows_reach_the_largest_number_and_are_rounded_once():
    x = torch.randn(6, 80, dtype=torch.float64) * torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None]
    x[2] = 0
    rows, scale = scaled_mm.quantise_rows(x.bfloat16())
    assert rows.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == (6, 1)
    largest = rows.double().abs().amax(1)
    assert largest.tolist() == [448, 448, 0, 448, 448, 448]
    wanted = (x.bfloat16().double() / scale.double()).float().to(E4M3)
    assert torch.equal(rows.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("product", [scaled_mm._scaled_product, scaled_mm._plain_product], ids=["torch", "plain"])
def test_a_layer_is_its_formula(product, bias, dtype, request):
    """Against float64 on the quantised numbers, of rows and columns of very different lengths."""
    if product is scaled_mm._scaled_product:
        request.getfixturevalue("row_scales")
    linear = torch.nn.Linear(96, 48, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-1, 1, 48)[:, None])
    linear.to(dtype)
    layer = scaled_mm.ScaledLinear(linear)
    layer.product = product
    x = (torch.randn(2, 5, 96) * torch.logspace(-1, 1, 10).view(2, 5, 1)).to(dtype)
    with torch.inference_mode():
        out = layer(x)
    assert out.dtype == dtype and out.shape == (2, 5, 48)
    rows, scale = (t.double() for t in scaled_mm.quantise_rows(x))
    weight = layer.weight.double() * layer.scale.double().t()
    golden = torch.einsum("...k,nk->...n", rows * scale, weight) + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(out.double(), golden, rtol=2**-8, atol=2e-3)
    exact = torch.einsum("...k,nk->...n", x.double(), linear.weight.double()) + (linear.bias.double() if bias else 0)
    assert 0.005 < ((out.double() - exact).norm() / exact.norm()).item() < 0.06


def test_a_gpu_takes_the_layouts():
    place = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    with FakeTensorMode():
        linear = SimpleNamespace(weight=torch.empty(2304, 768, **place), bias=torch.empty(2304, **place))
        out = scaled_mm.ScaledLinear(linear)(torch.empty(256, 197, 768, **place))
    assert out.shape == (256, 197, 2304) and out.dtype == torch.bfloat16 and out.device.type == "cuda"


def test_block_linears_alone_are_quantised_and_the_model_stays_as_it_was(row_scales):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, init_values=0.1).eval().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantised = scaled_mm.quantised(model)
    layers = [name for name, module in quantised.named_modules() if isinstance(module, scaled_mm.ScaledLinear)]
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers == [f"blocks.{block}.{name}" for block in range(2) for name in names]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    plain = scaled_mm.plain(quantised)
    assert quantised.blocks[0].attn.qkv.product is scaled_mm._scaled_product
    assert plain.blocks[1].mlp.fc2.product is scaled_mm._plain_product
    x = torch.randn(2, 3, 32, 32).bfloat16()
    with torch.inference_mode():
        exact, ours, its = (m(x).double() for m in (model, quantised, plain))
    off = ((t - exact).norm() / exact.norm() for t in (ours, its))
    assert all(0.005 < one.item() < 0.15 for one in off)
    assert ((ours - its).norm() / exact.norm()).item() < 0.05
    with pytest.raises(ValueError, match="no block linears"):
        scaled_mm.quantised(torch.nn.Linear(16, 16))
