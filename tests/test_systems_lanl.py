"""The LANL ViT and T2T-ViT against formulas in float64: value skip, scale, soft splits, sinusoid table, key names.

Tolerances: 2e-6·(1 + max|y|) in float32 (the path is eager's), 1e-12 in float64, 16 bits by the error budget.
"""

import re
from functools import partial

import family_formulas as formulas
import pytest
import torch
from budget import assert_within_budget
from torch import nn

import vit_fast
from vit_fast import WeightsError
from vit_fast.systems import lanl

VIT = dict(
    img_size=(2, 12, 20), patch_size=4, token_len=24, preds=3, num_heads=3, Encoding_hidden_chan_mul=1.5, depth=2
)
T2T = dict(
    variant="T2T_ViT", img_size=(2, 30, 44), softsplit_kernels=[7, 3, 3], preds=3, token_len=24, token_chan=12,
    num_heads=2, T2T_hidden_chan_mul=1.5, Encoding_hidden_chan_mul=2.0, depth=2,
)  # fmt: skip

GELU_TANH = partial(nn.functional.gelu, approximate="tanh")


def attention(x, state, heads, scale=None, skip=True):
    """qkv from the input width to three times chan; v + proj(...)."""
    q, k, v = formulas.linear(x, state, "qkv").chunk(3, dim=-1)
    out = formulas.attention(q, k, v, heads, scale or (v.shape[-1] // heads) ** -0.5)
    out = formulas.linear(out, state, "proj")
    return v + out if skip else out


def net(x, state, act=formulas.gelu):
    return formulas.linear(act(formulas.linear(x, state, "fc1")), state, "fc2")


def layer(x, state, heads, encoding, act=formulas.gelu, eps=1e-5, **traps):
    y = attention(formulas.layer_norm(x, state, "norm1", eps), formulas.under(state, "attn."), heads, **traps)
    x = x + y if encoding else y
    return x + net(formulas.layer_norm(x, state, "norm2", eps), formulas.under(state, "neuralnet."), act)


def backbone(x, state, heads, depth, eps=1e-5, **options):
    cls = state["cls_token"].expand(x.shape[0], -1, -1)
    x = torch.cat([cls, x], dim=1) + state["pos_embed"]
    for i in range(depth):
        x = layer(x, formulas.under(state, f"blocks.{i}."), heads, True, eps=eps, **options)
    return formulas.linear(formulas.layer_norm(x, state, "norm", eps)[:, 0], state, "head")


def vit(heads=3, depth=2, patch=4, **options):
    def run(state, images):
        x = formulas.linear(formulas.windows(images, patch, patch, 0), state, "patch_tokens.project")
        return backbone(x, formulas.under(state, "backbone."), heads, depth, **options)

    return run


def t2t(state, images):
    part = formulas.under(state, "tokens_to_token.")
    x = formulas.windows(images, 7, 4, 2)
    x = layer(x, formulas.under(part, "transformer1."), 2, False)
    x = formulas.windows(formulas.to_image(x, 7), 3, 2, 1)
    x = layer(x, formulas.under(part, "transformer2."), 2, False)
    x = formulas.linear(formulas.windows(formulas.to_image(x, 4), 3, 2, 1), part, "project")
    return backbone(x, formulas.under(state, "vit_backbone."), 2, 2)


@pytest.mark.parametrize("options", [{}, dict(qkv_bias=True, qk_scale=0.3)])
def test_vit(options):
    model = lanl.build(**VIT, **options)
    assert ("backbone.blocks.0.attn.qkv.bias" in model.state_dict()) == bool(options)
    run = vit(scale=options.get("qk_scale"))
    formulas.assert_model_matches(model, run, torch.randn(3, 2, 12, 20))
    # The formula can tell a library without the value skip.
    model.float()
    images = torch.randn(3, 2, 12, 20)
    wrong = vit(scale=options.get("qk_scale"), skip=False)(formulas.weights(model), images.double())
    assert (model(images) - wrong).abs().max() > 1e-2


def test_t2t():
    """30×44: 7×11, 4×6, 2×3 tokens."""
    model = lanl.build(**T2T)
    assert model.tokens_to_token.grids == [(7, 11), (4, 6), (2, 3)]
    formulas.assert_model_matches(model, t2t, torch.randn(2, 2, 30, 44))


@pytest.mark.parametrize("dim, chan, heads", [(24, 24, 1), (10, 24, 3), (147, 64, 1)])
def test_attention(dim, chan, heads):
    model = lanl.build("Attention", dim=dim, chan=chan, num_heads=heads, qkv_bias=True)
    formulas.assert_model_matches(model, partial(lambda s, x: attention(x, s, heads)), torch.randn(2, 9, dim))


def test_parts():
    x = torch.randn(2, 9, 24)
    model = lanl.build("NeuralNet", in_chan=24, hidden_chan=36.0, out_chan=5)
    formulas.assert_model_matches(model, lambda state, x: net(x, state), x)
    assert lanl.NeuralNet(6).fc1.weight.shape == lanl.NeuralNet(6).fc2.weight.shape == (6, 6)
    formulas.assert_model_matches(lanl.Encoding(24, 3, 1.5), lambda state, x: layer(x, state, 3, True), x)
    formulas.assert_model_matches(lanl.TokenTransformer(24, 10, 2), lambda state, x: layer(x, state, 2, False), x)
    model = lanl.ViT_Backbone(5, 24, 9.0, 3, 1.5, 1)
    formulas.assert_model_matches(model, lambda state, x: backbone(x, state, 3, 1), x)


def test_tutorial_shapes():
    """60×100 in patches of 20: 15 tokens of length 400, 768 after the projection; an Encoding of 4 heads on 176."""
    tokens = lanl.Patch_Tokenization((1, 60, 100), 20, 768)
    images = torch.randn(13, 1, 60, 100)
    split = tokens.split(images)
    assert split.shape == (13, 400, 15) and tokens.num_tokens == 15 and isinstance(tokens.num_tokens, int)
    assert torch.equal(split.transpose(1, 2), formulas.windows(images, 20, 20, 0))
    formulas.assert_close(tokens(images), tokens.project(split.transpose(1, 2)), 2e-6)
    block = lanl.Encoding(dim=768, num_heads=4, hidden_chan_mul=1.5)
    assert block.neuralnet.fc1.out_features == 1152
    assert block(torch.randn(1, 176, 768)).shape == (1, 176, 768)


def test_soft_split_arguments():
    assert [lanl.split_arguments(kernel) for kernel in (7, 3, 31)] == [(7, 4, 2), (3, 2, 1), (31, 16, 8)]
    assert lanl.count_tokens(1700, 500, 31, 16, 8) == (106, 31, 3286)
    with torch.device("meta"):
        small = lanl.Tokens2Token((1, 60, 100), (7, 3, 3))
        assert small.grids == [(15, 25), (8, 13), (4, 7)] and small.num_tokens == 28
        assert lanl.T2T_ViT().tokens_to_token.num_tokens == 216


@pytest.mark.parametrize(
    "name, count",
    [("lanl_vit", 86_963_713), ("lanl_vit_60x100", 85_350_145), ("lanl_t2t_vit", 85_963_075)],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = vit_fast.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("tokens, width", [(16, 768), (7, 9), (1, 1)])
def test_sinusoid_table(tokens, width):
    """Bit for bit, odd widths too; frozen and in the state_dict."""
    model = lanl.ViT_Backbone(1, width, tokens, depth=1)
    assert torch.equal(model.pos_embed, formulas.sinusoid(tokens + 1, width))
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    assert torch.equal(model.pos_embed[0, 0], torch.tensor([0.0, 1.0] * width)[:width])


def test_initialisation():
    model = lanl.build(**dict(VIT, token_len=96))
    assert 0.015 < model.backbone.cls_token.std() < 0.025
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < module.weight.std() < 0.025 and (module.bias is None or not module.bias.any())
    assert model.no_weight_decay() == {"cls_token"}


@pytest.mark.parametrize(
    "act_layer, act, norm_layer, eps, fused",
    [
        (nn.ReLU, torch.relu, partial(nn.LayerNorm, eps=1e-3), 1e-3, True),
        (partial(nn.GELU, approximate="tanh"), GELU_TANH, nn.LayerNorm, 1e-5, True),
        (nn.SiLU, nn.functional.silu, nn.LayerNorm, 1e-5, False),
    ],
)  # fmt: skip
def test_injected_classes(act_layer, act, norm_layer, eps, fused):
    model = lanl.build(**VIT, act_layer=act_layer, norm_layer=norm_layer)
    assert all(block.is_fused() == fused for block in model.backbone.blocks)
    formulas.assert_model_matches(model, vit(act=act, eps=eps), torch.randn(3, 2, 12, 20))


def test_injected_norm_of_another_kind():
    class Scale(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x * self.weight

    model = formulas.perturb(lanl.build(**VIT, norm_layer=Scale)).eval()
    block = model.backbone.blocks[0]
    x = torch.randn(2, 5, 24)
    y = x + block.attn(x * block.norm1.weight)
    assert torch.equal(block(x), y + block.neuralnet(y * block.norm2.weight))
    assert model(torch.randn(1, 2, 12, 20)).shape == (1, 3)


def test_unfused_path_agrees():
    """A hook on a sub-module, or on the patch layer or backbone, fires, and the numbers stay."""
    model = formulas.perturb(lanl.build(**VIT)).eval()
    images = torch.randn(2, 2, 12, 20)
    wanted, fired = model(images), []
    for module in (
        model.backbone, model.patch_tokens, model.patch_tokens.project, model.backbone.norm,
        model.backbone.blocks[0].attn.proj, model.backbone.blocks[1].neuralnet.act,
    ):  # fmt: skip
        module.register_forward_hook(lambda module, *_: fired.append(module))
    formulas.assert_close(model(images), wanted, 2e-6)
    assert len(fired) == 6


@pytest.mark.parametrize("words", [VIT, T2T])
def test_laws(words):
    model = formulas.perturb(lanl.build(**words)).eval()
    images = torch.randn(3, *words["img_size"])
    formulas.assert_batch_laws(model, images)
    assert torch.equal(model.train()(images), model.eval()(images))


def test_load(tmp_path):
    source = formulas.perturb(lanl.build(**VIT)).eval()
    images = torch.randn(2, 2, 12, 20)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pt")
    for given in (source.state_dict(), tmp_path / "weights.pt"):
        assert torch.equal(lanl.load(lanl.build(**VIT), given).eval()(images), source(images))
    other = lanl.build(**dict(VIT, img_size=[2, 16, 20]))
    with pytest.raises(WeightsError, match=r"wrong shape backbone\.pos_embed"):
        lanl.load(other, source.state_dict())
    lanl.load(other, source.state_dict(), pos_embed="recompute")
    assert torch.equal(other.backbone.pos_embed, formulas.sinusoid(21, 24))
    assert torch.equal(other.backbone.head.weight, source.backbone.head.weight)
    with pytest.raises(WeightsError, match=r"unexpected backbone\.blocks\.0\.attn\.qkv\.bias"):
        lanl.load(source, lanl.build(**VIT, qkv_bias=True).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_layers_round_where_their_parts_do(dtype, monkeypatch):
    """On the backend torch a fused layer has the bits of its parts called one by one: v + proj(…) first, then x."""
    model = formulas.perturb(lanl.build(**VIT), 0.1).eval().to(dtype)
    images = torch.randn(6, *VIT["img_size"]).to(dtype)
    with torch.no_grad():
        fused = model(images)
        monkeypatch.setattr(lanl._Layer, "is_fused", lambda layer: False)
        assert torch.equal(fused, model(images)) and not torch.equal(fused, model(images.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("words, run", [(VIT, vit()), (T2T, t2t)])
def test_16_bits(dtype, words, run):
    model = formulas.perturb(lanl.build(**dict(words, preds=64)), 0.05).eval().to(dtype)
    images = torch.randn(6, *words["img_size"]).to(dtype)
    eager = run(formulas.weights(model, dtype), images)
    assert_within_budget(model(images), eager, run(formulas.weights(model), images.double()), kind="model")


@pytest.mark.parametrize("words", [VIT, T2T])
def test_compile(words):
    model = lanl.build(**dict(words, depth=1)).eval()
    images = torch.randn(2, *words["img_size"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    formulas.assert_close(compiled(images), model(images), 1e-6)


@pytest.mark.parametrize(
    "words, message",
    [
        ({}, "img_size's height is 60, expected evenly divisible by patch_size 50"),
        (dict(img_size=(1, 100, 60)), "img_size's width is 60, expected evenly divisible by patch_size 50"),
        (dict(img_size=(60, 100)), "img_size is (60, 100), expected 3 ints (C, H, W)"),
        (dict(img_size=(0, 100, 50)), "img_size is 0, expected a whole number, 1 or more"),
    ],
)
def test_bad_patches(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lanl.build("Patch_Tokenization", **words)


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(variant="ViT"), "variant is 'ViT', expected one of 'ViT_Model', 'T2T_ViT', 'Attention'"),
        (dict(variant="Attention", dim=8, chan=10, num_heads=3), "num_heads is 3, expected a divisor of chan 10"),
        (dict(VIT, depth=0), "depth is 0, expected"),
        (dict(VIT, preds=1.5), "preds is 1.5, expected a whole number"),
        (dict(T2T, softsplit_kernels=(7, 3)), "softsplit_kernels is (7, 3), expected 3 ints"),
        (dict(T2T, softsplit_kernels=(3, 99, 3)), "softsplit_kernels is (3, 99, 3), expected windows that fit"),
    ],
)  # fmt: skip
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lanl.build(**words)


def test_bad_inputs():
    model = lanl.build(**VIT)
    for shape, message in (
        ((1, 2, 20, 12), "images are 20×12, expected 12×20"),
        ((1, 3, 12, 20), "images have 3 channels, expected 2"),
        ((2, 12, 20), "images have 3 dimensions, expected 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(shape))
    with pytest.raises(ValueError, match=r"tokens have shape \[1, 4, 24\], expected \[B, 15, 24\]"):
        model.backbone(torch.randn(1, 4, 24))
    with pytest.raises(ValueError, match=r"tokens have shape \[1, 4, 8\], expected \[B, N, 24\]"):
        lanl.Attention(24, 24)(torch.randn(1, 4, 8))
    with pytest.raises(TypeError, match="img_size is 12, expected"):
        lanl.build(**dict(VIT, img_size=12))


@pytest.mark.interp
@pytest.mark.parametrize(
    "words",
    [
        dict(VIT, depth=1),
        dict(T2T, depth=1, img_size=(1, 16, 20)),
        dict(VIT, depth=1, token_len=264, num_heads=1, img_size=(1, 4, 8)),
    ],
)
def test_interpreted(words):
    """The last one has a head size that the attention kernel does not take."""
    model = formulas.perturb(lanl.build(**words)).eval()
    formulas.assert_backends_agree(model, torch.randn(1, *words["img_size"]))
