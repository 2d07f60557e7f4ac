"""Models that are changed, or called in unusual ways, after ``vit_fast.optimize``: what the library alone returns.

``test_lifecycle.py`` and ``test_optimize.py`` have the usual ones.
"""

import copy

import pytest
import torch
from support.library_models import moved
from support.timm_models import MODELS, OPTIONS, build
from timm import layers
from torch import nn

import vit_fast

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
