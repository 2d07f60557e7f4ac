"""Pooling by latent queries on the fused operations: timm's AttentionPoolLatent, the heads of transformers' SigLIPs,
open_clip's AttentionalPooler."""

import copy
import pickle

import pytest
import torch
from support.budget import assert_within_budget
from support.library_models import fused, moved
from support.transformers_models import CASES
from timm.layers import AttentionPoolLatent, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vit_fast

TIMM = {
    "SigLIP's": dict(norm_layer=nn.LayerNorm),
    "no norm": dict(),
    "no projection of the query": dict(q_proj=False, norm_layer=nn.LayerNorm),
    "norms of heads": dict(qk_norm=True, norm_layer=nn.LayerNorm),
    "RMSNorms": dict(qk_norm=True, norm_layer=RmsNorm),
    "queries, mean": dict(latent_len=3, pool_type="avg", norm_layer=nn.LayerNorm),
    "queries": dict(latent_len=3, pool_type="", latent_dim=16, norm_layer=nn.LayerNorm),
    "positions": dict(pos_embed="abs", feat_size=7, qkv_bias=False),
    "no output": dict(out_features=0),
    "another width": dict(out_features=24, norm_layer=nn.LayerNorm),
    "quick": dict(act_layer=nn.SiLU, norm_layer=nn.LayerNorm),
}
MASK = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None]


def timm_pool(name):
    return moved(AttentionPoolLatent(48, num_heads=3, mlp_ratio=2.0, **TIMM[name]))


def run(model, *args, **kwargs):
    """(result, operations that ran fused, reasons of what did not)."""
    with vit_fast.backends.recording() as choices:
        result = model(*args, **kwargs)
    return result, fused(choices), [reasons[0] for _, backend, reasons in choices if backend == "library"]


def optimised(pool):
    """A copy of a pooling alone with its fast class."""
    holder = vit_fast.optimize(nn.Sequential(copy.deepcopy(pool)), strict=True)
    return holder[0]


def assert_same_gradients(plain, model, call):
    results = []
    for one in (plain, model):
        results.append(call(one))
        results[-1].square().sum().backward()
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    plain, x = timm_pool(name), torch.randn(2, 7, 48)
    model = optimised(plain)
    for kwargs in ({}, dict(attn_mask=torch.zeros(2, 1, 1, 7).masked_fill(~MASK, -torch.inf)), dict(attn_mask=MASK)):
        actual, ran, reasons = run(model, x, **kwargs)
        torch.testing.assert_close(actual, plain(x, **kwargs), rtol=1e-5, atol=5e-6)
        assert ran.count("attention") == 1 and not reasons
    assert model(x[:0]).shape == plain(x[:0]).shape
    assert_same_gradients(plain.double(), model.double(), lambda one: one(x.double(), attn_mask=MASK))


def test_timm_in_16_bits_and_under_autocast():
    for name in ("SigLIP's", "no projection of the query", "queries, mean"):
        plain = timm_pool(name)
        for dtype in (torch.bfloat16, torch.float16):
            pool, x = copy.deepcopy(plain).to(dtype), torch.randn(64, 7, 48).to(dtype)
            with torch.no_grad():
                golden, eager = copy.deepcopy(pool).double()(x.double()), pool(x)
                assert_within_budget(optimised(pool)(x), eager, golden, kind="model", replicas=[])
        x = torch.randn(2, 7, 48)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            actual, expected = optimised(plain)(x), plain(x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_what_runs_as_it_did():
    plain, x = timm_pool("SigLIP's"), torch.randn(2, 7, 48)
    model = optimised(plain)
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model) and torch.equal(copied(x), model(x))
    handle = model.mlp.register_forward_hook(lambda module, args, result: 2 * result)
    actual, ran, reasons = run(model, x)
    assert not ran and reasons == ["mlp carries a hook"] and not torch.allclose(actual, plain(x))
    handle.remove()
    plain.train(), model.train()
    for one in (plain, model):
        one.proj_drop.p, one.mlp.drop1.p = 0.5, 0.25
    results = []
    for one in (plain, model):
        torch.manual_seed(3)
        results.append(run(one, x)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=5e-6)
    assert not torch.allclose(results[0], run(model, x)[0])
    model.mlp.drop1.p = 1.0
    assert run(model, x)[2] == ["a drop rate is 1"]
    assert type(vit_fast.restore(nn.Sequential(model))[0]) is AttentionPoolLatent


def test_a_whole_model_explains_its_pooling():
    kwargs = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10)
    plain, x = moved(VisionTransformer(**kwargs, global_pool="map", class_token=False)), torch.randn(2, 3, 32, 32)
    model = vit_fast.optimize(copy.deepcopy(plain), strict=True)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=5e-6)
    rows = [(row.operation, row.backend) for row in vit_fast.explain(model) if row.module == "attn_pool"]
    assert rows == [("attention", "torch"), ("layernorm_mlp", "torch")]
    assert ("pool", "library") in [(row.operation, row.backend) for row in vit_fast.explain(plain)]
    assert vit_fast.coverage(model).blocks == 1 and vit_fast.coverage(model).fully_fused


@pytest.mark.parametrize("name", ("Siglip", "Siglip2", "Phi-4"))
def test_heads_of_transformers(name):
    case = CASES[name]
    plain = case.build().double()
    inputs = case.inputs(torch.float64)
    model = vit_fast.optimize(copy.deepcopy(plain), strict=True)
    actual, ran, reasons = run(model, **inputs)
    assert ran.count("attention") == case.attentions and not reasons
    torch.testing.assert_close(actual.pooler_output, plain(**inputs).pooler_output, rtol=1e-10, atol=1e-10)
    assert_same_gradients(plain, model, lambda one: one(**inputs).pooler_output)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(**inputs).pooler_output, actual.pooler_output)
    model.head.mlp.fc1.register_forward_hook(lambda module, args, result: 2 * result)
    assert run(model, **inputs)[2] == ["mlp.fc1 carries a hook"]
    bf16 = case.build().bfloat16()
    inputs = case.inputs(torch.bfloat16)
    exact = inputs | dict(pixel_values=inputs["pixel_values"].double())
    with torch.no_grad():
        golden = copy.deepcopy(bf16).double()(**exact).pooler_output
        eager = bf16(**inputs).pooler_output
        actual = vit_fast.optimize(bf16)(**inputs).pooler_output
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


def test_the_head_of_aimv2():
    plain, x = CASES["Aimv2"].build().head, torch.randn(2, 7, 48)
    holder = vit_fast.optimize(CASES["Aimv2"].build(), strict=True)
    model = holder.head
    model.load_state_dict(plain.state_dict())
    actual, ran, reasons = run(model, x)
    torch.testing.assert_close(actual, plain(x), rtol=1e-5, atol=5e-6)
    assert ran == ["attention"] and not reasons
    assert_same_gradients(plain.double(), model.double(), lambda one: one(x.double()))
    model.k_proj.register_forward_hook(lambda module, args, result: 2 * result)
    assert run(model, x.double())[2] == ["k_proj carries a hook"]
    assert type(vit_fast.restore(holder).head) is type(plain)


def open_clip_tower(library, output_dim, **kwargs):
    kwargs = dict(heads=3, mlp_ratio=2.0, attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5) | kwargs
    return moved(library.transformer.VisionTransformer(32, 8, 48, layers=1, output_dim=output_dim, **kwargs))


@pytest.mark.parametrize("width", (48, 32))
def test_open_clip(width, peer):
    tower, x = open_clip_tower(peer("open_clip"), width), torch.randn(2, 7, 48)
    plain, model = tower.attn_pool, vit_fast.optimize(copy.deepcopy(tower)).attn_pool
    actual, ran, reasons = run(model, x)
    torch.testing.assert_close(actual, plain(x), rtol=1e-5, atol=5e-6)
    assert ran.count("attention") == 1 and not reasons
    assert_same_gradients(plain.double(), model.double(), lambda one: one(x.double()))
    model.attn.dropout = 0.5
    assert run(model.train(), x.double())[2] == ["its attention drops weights"]


def test_coca(peer):
    plain = open_clip_tower(peer("open_clip"), 32, output_tokens=True)
    model, x = vit_fast.optimize(copy.deepcopy(plain), strict=True), torch.randn(2, 3, 32, 32)
    actual, ran, reasons = run(model, x)
    torch.testing.assert_close(actual, plain(x), rtol=1e-5, atol=5e-6)
    assert ran.count("attention") == 2 and not reasons


@pytest.mark.interp
def test_interpreted_kernels_keep_the_budget():
    pool, x = timm_pool("SigLIP's").bfloat16(), torch.randn(4, 7, 48).bfloat16()
    with torch.no_grad(), vit_fast.backend("triton"):
        for kwargs in ({}, dict(attn_mask=MASK.repeat(2, 1, 1, 1))):
            golden, eager = copy.deepcopy(pool).double()(x.double(), **kwargs), pool(x, **kwargs)
            assert_within_budget(optimised(pool)(x, **kwargs), eager, golden, kind="model", replicas=[])
