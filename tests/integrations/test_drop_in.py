"""Models that are changed, or called in unusual ways, after ``vit_fast.optimize``: what the library alone returns.

``test_lifecycle.py`` and ``test_optimize.py`` have the usual ones.
"""

import copy
import re

import pytest
import torch
from support.library_models import encoder_vit, moved, timm_vit
from support.timm_models import MODELS, OPTIONS, build
from timm import layers
from torch import nn

import vit_fast
from vit_fast.integrations.timm.pool import FastAttentionPoolLatent
from vit_fast.integrations.transformers import attention_interface

LIMITS = dict(rtol=1e-5, atol=5e-6)


def images():
    return torch.randn(2, 3, 32, 32)


HEAD_NORMS = ("qk-norm with RMSNorm", "Sapiens2", "RelPosBlock", "SAM with RoPE", "DINOv3", "attention pool", "Gemma4")


@pytest.mark.parametrize("first", ("q_norm", "k_norm"))
@pytest.mark.parametrize("name", [*HEAD_NORMS, "one output projection", "DiffParallelScalingBlock", "differential"])
def test_q_and_k_may_be_normalised_in_two_ways(name, first):
    """One of the two gets a norm of another kind than it had: an RMSNorm in place of a LayerNorm, and so on."""
    plain = moved(build(name))
    model = vit_fast.optimize(copy.deepcopy(plain))
    for one in (plain, model):
        torch.manual_seed(1)
        for attn in [module for module in one.modules() if hasattr(module, first)]:
            size = attn.k_norm.weight.numel() if hasattr(attn.k_norm, "weight") else attn.head_dim
            other = layers.RmsNorm if isinstance(getattr(attn, first), nn.LayerNorm) else nn.LayerNorm
            setattr(attn, first, other(size))
            nn.init.normal_(getattr(attn, first).weight)
    x = images()
    torch.testing.assert_close(model(x), plain(x), **LIMITS)


@pytest.mark.parametrize("name", [name for name in (*MODELS, *OPTIONS) if name.startswith("differential")])
@pytest.mark.parametrize("batch", (1, 2))
def test_differential_attention_takes_a_mask_for_each_head(name, batch):
    plain, x = moved(build(name)), images()
    model = vit_fast.optimize(copy.deepcopy(plain))
    mask = torch.rand(batch, 3, 17, 17) > 0.3
    mask[..., 0] = True
    with vit_fast.backends.recording() as choices:
        actual = model(x, attn_mask=mask)
    assert {backend for operation, backend, _ in choices if operation == "attention"} == {"torch"}
    torch.testing.assert_close(actual, plain(x, attn_mask=mask), **LIMITS)
    with pytest.raises(ValueError, match="bias has shape"):
        model(x, attn_mask=torch.randn(1, 6, 17, 17))


@pytest.mark.parametrize("name", ("ResPostBlock", "Gemma4", "EvaBlockPostNorm", "differential", "BEiT", "torch.nn"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast_with_gradients_returns_the_dtype_of_the_library(name, dtype):
    """Weights of 16 bits too: on a CPU a LayerNorm keeps the dtype of its input under autocast."""
    plain = (encoder_vit(norm_first=False) if name == "torch.nn" else moved(build(name))).to(dtype)
    model, x = vit_fast.optimize(copy.deepcopy(plain)), images().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), plain(x)
    assert actual.dtype == expected.dtype and actual.requires_grad
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("gradients", (True, False))
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_layer_norm_keeps_the_dtype_under_autocast_of_a_cpu(norm, gradients):
    x, weight = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        expected = nn.functional.layer_norm(x, (8,), weight)
        actual = vit_fast.ops.layer_norm(x, weight, None, norm=norm)
    assert actual.dtype == expected.dtype == torch.bfloat16 and actual.requires_grad == gradients


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("shape", ((2, 0, 48), (0, 5, 48)))
def test_torch_s_encoder_takes_no_tokens_or_images_where_torch_does(batch_first, shape):
    layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=batch_first, norm_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model, x = vit_fast.optimize(copy.deepcopy(encoder)), torch.zeros(shape)
    assert model(x).shape == encoder(x).shape == shape


@pytest.mark.parametrize("shape", ((20, 20), (3, 1, 17, 17), (1, 6, 17, 17), (2, 1, 1, 20), (2, 17), (2, 17, 17)))
def test_masks_of_another_shape_are_refused_though_all_keys_take_part(shape):
    model = vit_fast.optimize(timm_vit())
    for mask in (torch.zeros(shape), torch.ones(shape, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"bias has shape .*, expected \[2, 3, 17, 17\]"):
            model(images(), attn_mask=mask)


def test_other_modules_refuse_such_masks_too():
    pool, x = layers.AttentionPoolLatent(48, num_heads=3, embed_dim=48, feat_size=17), torch.randn(2, 17, 48)
    pool.__class__ = FastAttentionPoolLatent
    gemma = vit_fast.optimize(moved(build("Gemma4"))).blocks[0]
    turns = torch.ones(2, 17, 16)
    heads = torch.randn(2, 3, 17, 16)
    calls = (
        (lambda mask: pool(x, attn_mask=mask), (2, 3, 1, 17)),
        (lambda mask: gemma(x, turns, turns, attn_mask=mask), (2, 3, 17, 17)),
        (lambda mask: attention_interface.attention_forward(pool, heads, heads, heads, mask), (2, 3, 17, 17)),
    )
    for call, expected in calls:
        for shape in ((2, 1, 1, 20), (3, 1, 1, 17)):
            with pytest.raises(ValueError, match=re.escape(f"expected {[*expected]}")):
                call(torch.ones(shape, dtype=torch.bool))
