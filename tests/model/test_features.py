"""timm's ways into a VisionTransformer on the same weights: feature maps, pruning, masks, another patch size."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import SMALL, assert_equal, images_for, perturb
from torch import nn

import vit_fast
from vit_fast.patch_resize import resize_patch_embed

DEEP = SMALL | dict(depth=4, reg_tokens=2)


def both(**words):
    words = DEEP | words
    theirs = perturb(timm.models.vision_transformer.VisionTransformer(**words)).eval()
    ours = vit_fast.VisionTransformer(**words).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_all_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_all_equal(a, b)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_all_equal(ours[key], theirs[key])
    else:
        assert ours.shape == theirs.shape
        assert_equal(ours, theirs)


# features_only


def test_no_layer_asked_for_is_told():
    words = dict(img_size=56, depth=2, embed_dim=48, num_heads=4)
    with pytest.raises(ValueError, match=r"indices is \[\], expected one layer or more"):
        vit_fast.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[], **words)
    model = vit_fast.create_model("vit_tiny_patch16_224", **words)
    with pytest.raises(ValueError, match=r"indices is \(\), expected one layer or more"):
        model.forward_intermediates(torch.zeros(1, 3, 56, 56), indices=())


@torch.no_grad()
@pytest.mark.parametrize("out_indices", [None, 1, 2, [0, 2], (-4, -2), [3, 0]])
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"])
def test_features_only(name, out_indices):
    words = dict(img_size=56, depth=4, embed_dim=48, num_heads=4, features_only=True)
    words |= {} if out_indices is None else dict(out_indices=out_indices)
    theirs, ours = perturb(timm.create_model(name, **words)).eval(), vit_fast.create_model(name, **words).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 56, 56)
    assert_all_equal(ours(x), theirs(x))
    assert ours.pretrained_cfg == theirs.pretrained_cfg and ours.in_chans == theirs.in_chans
    info, wanted = ours.feature_info, theirs.feature_info
    assert list(info.out_indices) == list(wanted.out_indices) and len(info) == len(wanted)
    for method in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(info, method)() == getattr(wanted, method)()
        keyed = ("num_chs",) if method == "get_dicts" else ()
        for idx in (0, [0, 1]):
            words = dict(idx=idx, keys=["num_chs", "index"]) if keyed else dict(idx=idx)
            assert getattr(info, method)(**words) == getattr(wanted, method)(**words)
    assert info.get("index") == wanted.get("index") and info[0] == wanted[0]


def test_features_are_explained_checked_and_loaded(tmp_path):
    words = dict(img_size=32, depth=3, embed_dim=48, num_heads=4)
    whole = perturb(vit_fast.create_model("vit_tiny_patch16_224", **words))
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    features = vit_fast.create_model(
        "vit_tiny_patch16_224", checkpoint_path=tmp_path / "whole.pt", features_only=True, out_indices=[0, 1], **words
    ).eval()
    assert len(features.model.blocks) == 2 and isinstance(features.model.head, nn.Identity)
    rows = vit_fast.explain(features)
    assert [row.operation for row in rows].count("attention") == 2 and {row.module[:12] for row in rows} > {
        "model.blocks"
    }
    x = images_for(whole)
    assert_all_equal(features(x), whole.eval().forward_intermediates(x, [0, 1], intermediates_only=True))


# prune_intermediate_layers, get_intermediate_layers


@torch.no_grad()
def test_patches_that_are_dropped_leave_no_map():
    model = vit_fast.VisionTransformer(**DEEP, patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"'NCHW' in training with patch_drop_rate 0.5, expected 'NLC'"):
        model.forward_intermediates(images_for(model))
    _, features = model.forward_intermediates(images_for(model), output_fmt="NLC")
    assert [feature.shape for feature in features] == [(2, 8, 48)] * 4
    assert model.eval().forward_intermediates(images_for(model))[1][0].shape == (2, 48, 4, 4)


@pytest.mark.parametrize("prune_norm, prune_head", [(False, True), (True, False)])
@pytest.mark.parametrize("indices", [1, [0, -3], [2]])
@pytest.mark.parametrize("pool", ["avg", "map"])
def test_prune_intermediate_layers(indices, prune_norm, prune_head, pool):
    ours, theirs = both(global_pool=pool)
    assert ours.prune_intermediate_layers(indices, prune_norm, prune_head) == theirs.prune_intermediate_layers(
        indices, prune_norm, prune_head
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.num_classes == theirs.num_classes
    x = images_for(ours)
    assert_equal(ours(x), theirs(x))


@torch.no_grad()
def test_prune_of_a_prepared_model_drops_the_folded_weights():
    model = both(reg_tokens=0)[0].bfloat16()
    x = images_for(model).bfloat16()
    wanted = model.forward_intermediates(x, [1], intermediates_only=True)
    vit_fast.prepare(model)
    model.prune_intermediate_layers([1])
    assert_all_equal(model.forward_intermediates(x, [1], intermediates_only=True), wanted)


@torch.no_grad()
@pytest.mark.parametrize("reshape", [False, True])
def test_return_class_token(reshape):
    model, theirs = both()
    x = images_for(model)
    layers = model.get_intermediate_layers(x, [1, 3], reshape=reshape, return_class_token=True, norm=True)
    wanted = theirs.get_intermediate_layers(x, [1, 3], reshape=reshape, return_prefix_tokens=True, norm=True)
    assert_all_equal(layers, [(patches, prefix[:, 0]) for patches, prefix in wanted])


# attn_mask, is_causal


def masks(tokens):
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(2, 1, tokens, tokens, generator=generator) > 0.4
    keep[..., 0] = True  # a key for every query
    return {
        "bool": dict(attn_mask=keep),
        "bool, of all": dict(attn_mask=keep[0, 0]),
        "of a head": dict(attn_mask=keep | (torch.rand(2, 4, 1, tokens, generator=generator) > 0.9)),
        "keys": dict(attn_mask=keep[:, :, :1]),
        "additive": dict(attn_mask=torch.randn(4, tokens, tokens, generator=generator)),
        "-inf": dict(attn_mask=torch.zeros(1, 1, tokens, tokens).masked_fill(~keep[:1], -math.inf)),
        "causal": dict(is_causal=True),
    }


TOKENS = 16 + 3
KINDS = list(masks(TOKENS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [{}, dict(qk_norm=True, init_values=0.3, global_pool="avg")], ids=["plain", "norms"])
def test_masks(kind, words):
    ours, theirs = both(**words)
    chosen, x = masks(TOKENS)[kind], images_for(ours)
    assert_equal(ours(x, **chosen), theirs(x, **chosen))
    assert not torch.allclose(ours(x, **chosen), ours(x), atol=1e-3)
    assert_equal(ours.forward_features(x, **chosen), theirs.forward_features(x, **chosen))
    words = dict(indices=[0, 2], norm=True, return_prefix_tokens=True, **chosen)
    assert_all_equal(ours.forward_intermediates(x, **words), theirs.forward_intermediates(x, **words))
    tokens = torch.randn(2, TOKENS, 48)
    assert_equal(ours.blocks[0](tokens, **chosen), theirs.blocks[0](tokens, **chosen))
    assert_equal(ours.blocks[0].attn(tokens, **chosen), theirs.blocks[0].attn(tokens, **chosen))
    if "attn_mask" in chosen:
        assert_all_equal(ours.get_intermediate_layers(x, 2, **chosen), theirs.get_intermediate_layers(x, 2, **chosen))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_masks_in_training_and_where_a_block_is_not_fused(checkpointing):
    ours, theirs = both()
    calls = []
    ours.blocks[1].attn.register_forward_hook(lambda *arguments: calls.append(1))
    ours.set_grad_checkpointing(checkpointing)
    grads = []
    for model in (ours.train(), theirs.train()):
        out = model(images_for(ours), attn_mask=masks(TOKENS)["bool"]["attn_mask"])
        out.square().mean().backward()
        grads.append([out, *(parameter.grad for parameter in model.parameters())])
    assert_all_equal(*grads)
    assert len(calls) == 1 + checkpointing


@torch.no_grad()
def test_masks_of_a_prepared_model():
    model = both()[0].bfloat16()
    x, chosen = images_for(model).bfloat16(), masks(TOKENS)["bool"]
    wanted = model(x, **chosen)
    with vit_fast.backends.recording() as choices:
        masked = vit_fast.prepare(model)(x, **chosen)
    assert [operation for operation, *_ in choices].count("prepared_blocks") == len(model.blocks)
    torch.testing.assert_close(masked, wanted, rtol=0.05, atol=0.05)
    assert not torch.allclose(masked, model(x), rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_masks_of_deit(distilled):
    words = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7)
    ours = perturb(vit_fast.systems.deit.build(**words, distilled=distilled)).eval()
    theirs = (
        timm.models.deit.VisionTransformerDistilled if distilled else timm.models.vision_transformer.VisionTransformer
    )
    theirs = theirs(**words).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images_for(ours)
    keep = masks(17 + distilled)["bool"]["attn_mask"]
    tokens = ours.forward_tokens(x, attn_mask=keep)
    assert_equal(tokens, theirs.forward_intermediates(x, 1, attn_mask=keep)[0])
    assert not torch.allclose(ours(x, attn_mask=keep), ours(x), atol=1e-3)
    assert_equal(ours(x, attn_mask=keep), ours.forward_head(ours.forward_features(x, attn_mask=keep)))


@pytest.mark.interp
@torch.no_grad()
def test_masks_run_in_the_kernel():
    ours, theirs = both(depth=1)
    x, chosen = images_for(ours), masks(TOKENS)["bool"]
    with vit_fast.backends.recording() as choices:
        out = ours(x, **chosen)
    assert {choice[1] for choice in choices} == {"triton"}
    torch.testing.assert_close(out, theirs(x, **chosen), rtol=1e-4, atol=1e-5)


# set_input_size


def test_a_float64_projection_is_resized_in_float64():
    weight = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    one = torch.eye(16, dtype=torch.float64).unflatten(1, (1, 4, 4))
    matrix = F.interpolate(one, size=(8, 8), mode="bicubic", antialias=True).flatten(1).T
    wanted = weight.flatten(2) @ torch.linalg.pinv(matrix)
    torch.testing.assert_close(resize_patch_embed(weight, (8, 8)).flatten(2), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new_size", [(4, 4), (16, 16), (12, 6), (8, 8)])
def test_resize_patch_embed(new_size, dtype):
    weight = torch.randn(5, 3, 8, 8).to(dtype)
    resized = resize_patch_embed(weight, new_size)
    wanted = timm.layers.resample_patch_embed(weight, new_size)
    assert resized.dtype == dtype
    torch.testing.assert_close(resized, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "words, option",
    [
        (dict(patch_size=16), {}),
        (dict(patch_size=(4, 8)), dict(no_embed_class=True)),
        (dict(img_size=64, patch_size=16), {}),
        (dict(img_size=(48, 64), patch_size=(4, 16)), dict(pre_norm=True)),
        (dict(img_size=(48, 32)), {}),
        (dict(patch_size=8), {}),
        (dict(patch_size=16), dict(pos_embed="none")),
        ({}, {}),
    ],
)
def test_set_input_size(words, option):
    ours, theirs = both(**option)
    pair = {key: value if isinstance(value, tuple) else (value, value) for key, value in words.items()}
    ours.patch_embed.proj.weight.requires_grad_(False)
    ours.set_input_size(**words), theirs.set_input_size(**pair)
    embed, wanted = ours.patch_embed, theirs.patch_embed
    for key in ("img_size", "patch_size", "grid_size", "num_patches"):
        assert getattr(embed, key) == getattr(wanted, key)
    assert embed.feat_ratio() == wanted.feat_ratio() == ours.feature_info[0]["reduction"]
    assert embed.feat_ratio(as_scalar=False) == wanted.feat_ratio(as_scalar=False)
    assert embed.dynamic_feat_size((96, 64)) == wanted.dynamic_feat_size((96, 64))
    assert not embed.proj.weight.requires_grad
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *embed.img_size)
    assert_equal(ours(x), theirs(x))
    hooked = []
    embed.proj.register_forward_hook(lambda *arguments: hooked.append(1))
    assert_equal(ours(x), theirs(x))  # the projection's own forward knows its new patch
    assert hooked


def test_a_projection_that_is_no_plain_parameter_is_refused():
    model = both()[0]
    nn.utils.parametrizations.weight_norm(model.patch_embed.proj)
    with pytest.raises(vit_fast.UnsupportedError, match=r"patch_size is 16, expected .* weight of patch_embed\.proj"):
        model.set_input_size(patch_size=16)
    model.set_input_size(48)
    assert model.patch_embed.patch_size == (8, 8) and model(torch.randn(1, 3, 48, 48)).shape == (1, 7)
