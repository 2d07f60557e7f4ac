"""The custom blocks of open_clip's image towers: each of their options on the fused operations, and all of them."""

import copy

import pytest
import torch
from support.budget import assert_within_budget
from support.library_models import fused, open_clip_tower, operations

import vit_fast

OPTIONS = {
    "qk_norm": dict(qk_norm=True),
    "scale_heads": dict(scale_heads=True),
    "scale_attn_inner": dict(scale_attn_inner=True),
    "scale_attn": dict(scale_attn=True),
    "scale_fc": dict(scale_fc=True),
    "all": dict(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
    "all, without LayerScale": dict(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True, ls_init_value=None
    ),
    "none": dict(block_type="custom"),
}


@pytest.fixture(autouse=True)
def library(peer):
    return peer("open_clip")


@pytest.mark.parametrize("options", OPTIONS)
def test_custom_blocks(options):
    model, x = open_clip_tower(**OPTIONS[options]), torch.randn(2, 3, 32, 32)
    expected = model(x)
    vit_fast.optimize(model, strict=True)
    actual, ran = operations(model, x)
    assert ran.count("attention") == 2
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    block, tokens = model.transformer.resblocks[0], torch.randn(2, 5, 48)
    mask = torch.zeros(5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    with vit_fast.backends.recording() as choices:
        masked = block(tokens, attn_mask=mask)
    assert not fused(choices)
    vit_fast.restore(model)
    assert torch.equal(model(x), expected) and torch.equal(block(tokens, attn_mask=mask), masked)


@pytest.mark.parametrize("options", ("qk_norm", "all"))
def test_bfloat16_is_within_the_budget_of_a_model(options):
    model, x = open_clip_tower(**OPTIONS[options]).bfloat16(), torch.randn(8, 3, 32, 32).bfloat16()
    with torch.inference_mode():
        golden, eager = copy.deepcopy(model).double()(x.double()), model(x)
        actual, ran = operations(vit_fast.optimize(model), x)
    assert ran
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


def test_gradients():
    plain, x = open_clip_tower(**OPTIONS["all"]).double().train(), torch.randn(2, 3, 32, 32).double()
    model = vit_fast.optimize(copy.deepcopy(plain))
    for one in (plain, model):
        one(x).square().sum().backward()
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_a_part_of_another_class_or_with_a_hook_runs_as_it_did():
    model, x = vit_fast.optimize(open_clip_tower(**OPTIONS["all"])), torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.transformer.resblocks[1].attn.ln_inner.register_forward_hook(lambda module, args, result: 2 * result)
    with vit_fast.backends.recording() as choices:
        assert not torch.allclose(model(x), expected)
    assert [reasons for _, name, reasons in choices if name == "library"] == [("attn.ln_inner carries a hook",)]


@pytest.mark.parametrize("options", ("qk_norm", "all"))
@pytest.mark.parametrize("part", ("attn_drop", "out_drop"))
def test_dropout_in_training_draws_as_without(options, part):
    plain, x = open_clip_tower(**OPTIONS[options]).double().train(), torch.randn(2, 3, 32, 32).double()
    for block in plain.transformer.resblocks:
        getattr(block.attn, part).p = 0.5
    model, results = vit_fast.optimize(copy.deepcopy(plain)), []
    for one in (plain, model):
        torch.manual_seed(5)
        results.append(operations(one, x))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=1e-12)
    assert results[1][1].count("attention") == 2
    torch.manual_seed(6)
    assert not torch.allclose(model(x), results[1][0])


def test_scaled_cosine_attention_stays_as_it_is():
    with pytest.raises(vit_fast.UnsupportedError, match=r"resblocks\.0–1: its attention is scaled-cosine"):
        vit_fast.optimize(open_clip_tower(scaled_cosine_attn=True))


def test_custom_blocks_are_prepared_by_parts():
    model = vit_fast.optimize(open_clip_tower(**OPTIONS["qk_norm"])).eval().bfloat16()
    x = torch.randn(2, 3, 32, 32).bfloat16()
    with torch.no_grad():
        before = model(x)
        with vit_fast.backends.recording() as choices:
            after = vit_fast.prepare(model)(x)
    assert [operation for operation, *_ in choices].count("prepared_linear") == 8
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


NO_VITS = ("RN", "convnext", "swin", "fastvit")


def test_every_vit_tower_of_open_clip_is_fused(library):
    """The towers of all its configurations, without memory for their weights; those of timm too."""
    towers = {}
    for name in library.list_models():
        config = library.get_model_config(name)
        vision = dict(config["vision_cfg"], timm_model_pretrained=False)
        if isinstance(vision.get("layers"), int):
            vision["layers"] = 1
        trunk = vision.get("timm_model_name", name)
        if trunk not in towers:
            with torch.device("meta"):
                towers[trunk] = library.model._build_vision_tower(
                    config["embed_dim"], library.model.CLIPVisionCfg(**vision)
                )
    left = []
    for name, tower in towers.items():
        try:
            vit_fast.optimize(tower, strict=True)
        except (ValueError, vit_fast.UnsupportedError):
            left.append(name)
    assert [name for name in left if not name.startswith(NO_VITS)] == [] and len(towers) > 4 * len(left)
