"""DeiT and its relatives against a float64 formula, timm, torch's encoder layers (literal mode) and npz files."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from family_formulas import assert_kernels_agree
from torch import nn

import vit_fast
from vit_fast import WeightsError
from vit_fast.systems import deit

TABLE = {
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit_base_384": 86_859_496,
    "deit_tiny_distilled": 5_910_800,
    "deit_small_distilled": 22_436_432,
    "deit_base_distilled": 87_338_192,
    "deit_base_distilled_384": 87_630_032,
    "vit_base_patch16_224_in21k": 103_186_515,
    "vit_base_patch32_224_in21k": 104_843_091,
    "vit_large_patch16_224_in21k": 326_740_307,
    "vit_large_patch32_224_in21k": 328_949_075,
}
ACTIVATIONS = {
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "relu": lambda z: z.clamp(min=0),
    "tanh": torch.tanh,
}


def formula_norm(x, state, name, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    normal = (x - mean) / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    return normal * state[f"{name}.weight"] + state[f"{name}.bias"]


def formula_linear(x, state, name):
    y = x @ state[f"{name}.weight"].t()
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def formula_attention(qkv, heads, scale):
    """[B, N, 3C] → [B, N, C], over axis 1."""
    q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in qkv.chunk(3, -1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def formula_embed(state, images, weight, bias):
    patch = weight.shape[2:]
    x = F.unfold(images.to(weight.dtype), patch, stride=patch).transpose(1, 2) @ weight.flatten(1).t() + bias
    prefix = [state[name] for name in ("cls_token", "dist_token") if name in state]
    return torch.cat([token.expand(len(x), -1, -1) for token in prefix] + [x], dim=1) + state["pos_embed"]


def formula_heads(state, x):
    """(head output, dist head output or None) of normalised tokens."""
    first = x[:, 0]
    for name in ("pre_logits.fc", "pre_logits.0"):
        if f"{name}.weight" in state:
            first = torch.tanh(formula_linear(first, state, name))
    a = formula_linear(first, state, "head") if "head.weight" in state else first
    if "dist_token" not in state:
        return a, None
    return a, formula_linear(x[:, 1], state, "head_dist") if "head_dist.weight" in state else x[:, 1]


def formula(state, images, heads, scale=None, act="gelu", eps=1e-6, factors=None):
    """Both heads; ``factors[i]`` are what the attention and the MLP branch of block i are multiplied by."""
    s = state
    x = formula_embed(s, images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"])
    for i in range(1 + max(int(key.split(".")[1]) for key in s if key.startswith("blocks"))):
        b, (first, second) = f"blocks.{i}.", factors[i] if factors else (1.0, 1.0)
        qkv = formula_linear(formula_norm(x, s, f"{b}norm1", eps), s, f"{b}attn.qkv")
        x = x + first * formula_linear(formula_attention(qkv, heads, scale), s, f"{b}attn.proj")
        hidden = ACTIVATIONS[act](formula_linear(formula_norm(x, s, f"{b}norm2", eps), s, f"{b}mlp.fc1"))
        x = x + second * formula_linear(hidden, s, f"{b}mlp.fc2")
    return formula_heads(s, formula_norm(x, s, "norm", eps))


def formula_literal(state, images, heads, eps=1e-5):
    """Both heads of the page's class: attention over the batch."""
    s = state
    x = formula_embed(s, images, s["patch_embed.weight"], s["patch_embed.bias"])
    for i in range(1 + max(int(key.split(".")[1]) for key in s if key.startswith("blocks"))):
        b = f"blocks.{i}."
        qkv = x.transpose(0, 1) @ s[f"{b}self_attn.in_proj_weight"].t() + s[f"{b}self_attn.in_proj_bias"]
        out = formula_attention(qkv, heads, None).transpose(0, 1)
        x = formula_norm(x + formula_linear(out, s, f"{b}self_attn.out_proj"), s, f"{b}norm1", 1e-5)
        hidden = formula_linear(x, s, f"{b}linear1").clamp(min=0)
        x = formula_norm(x + formula_linear(hidden, s, f"{b}linear2"), s, f"{b}norm2", 1e-5)
    return formula_heads(s, formula_norm(x, s, "norm", eps))


def perturbed(model):
    """Every parameter away from its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny(**words):
    base = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=10)
    return perturbed(deit.build(**{**base, **words}))


def double(model):
    return {key: value.detach().double() for key, value in model.state_dict().items()}


def close(actual, expected, factor=2e-6):
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= factor * (1 + expected.abs().max().item())


def assert_outputs(model, images, expected):
    """The output semantics of 2.3 in both modes."""
    a, b = expected
    for training in (False, True):
        out = model.train(training)(images)
        if b is None:
            close(out, a)
        elif training:
            assert isinstance(out, tuple)
            close(out[0], a)
            close(out[1], b)
        else:
            close(out, (a + b) / 2)


CASES = {
    "plain": {},
    "distilled": dict(distilled=True),
    "pre-logits": dict(representation_size=7),
    "pre-logits ignored": dict(representation_size=7, distilled=True),
    "headless": dict(num_classes=0),
    "headless distilled": dict(num_classes=0, distilled=True),
    "no qkv bias": dict(qkv_bias=False),
    "qk_scale": dict(qk_scale=0.7),
    "rectangle": dict(img_size=[24, 40], patch_size=(8, 10)),
    "channels": dict(in_c=5),
    "head size 1": dict(num_heads=24),
    "hidden 31": dict(mlp_ratio=1.3),
    "relu": dict(act_layer=nn.ReLU),
    "tanh gelu": dict(act_layer=partial(nn.GELU, approximate="tanh")),
    "quick gelu": dict(act_layer="quick_gelu"),
    "an activation without a kernel": dict(act_layer=nn.Tanh),
    "eps": dict(norm_layer=partial(nn.LayerNorm, eps=1e-3)),
    "depth 1": dict(depth=1),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_formula(name):
    words = CASES[name]
    model = tiny(**words)
    size = words.get("img_size", (32, 32))
    images = torch.randn(3, words.get("in_c", 3), *size)
    act = {"relu": "relu", "tanh gelu": "gelu_tanh", "quick gelu": "quick_gelu"}.get(name, "gelu")
    act = "tanh" if words.get("act_layer") is nn.Tanh else act
    eps = 1e-3 if name == "eps" else 1e-6
    expected = formula(double(model), images.double(), words.get("num_heads", 3), words.get("qk_scale"), act, eps)
    assert_outputs(model, images, expected)
    out = model.eval().double()(images.double())
    exact = expected[0] if expected[1] is None else (expected[0] + expected[1]) / 2
    assert (out - exact).abs().max() < 1e-12 * (1 + exact.abs().max())


def test_attributes_and_features():
    images = torch.randn(2, 3, 32, 32)
    plain, both, rep = tiny(), tiny(distilled=True), tiny(representation_size=7)
    assert (plain.num_tokens, both.num_tokens) == (1, 2)
    assert (plain.num_features, both.num_features, rep.num_features) == (24, 24, 7)
    assert (plain.has_logits, rep.has_logits, tiny(representation_size=7, distilled=True).has_logits) == (0, 1, 0)
    assert plain.embed_dim == 24 and plain.num_classes == 10
    assert plain.forward_features(images).shape == (2, 24) and rep.forward_features(images).shape == (2, 7)
    tokens = both.forward_tokens(images)
    assert tokens.shape == (2, 18, 24)
    for actual, expected in zip(both.forward_features(images), (tokens[:, 0], tokens[:, 1])):
        close(actual, expected)
    close(plain.forward_head(plain.forward_features(images)), plain(images))
    assert plain.no_weight_decay() == {"pos_embed", "cls_token", "dist_token"}
    assert tiny(qk_scale=0.0).blocks[0].attn.scale == 8**-0.5
    maps = both.get_attention_maps(images)
    assert maps[0].shape == (2, 3, 18, 18) and torch.allclose(maps[0].sum(-1), torch.ones(2, 3, 18), atol=1e-5)


def test_distilled_training_switch():
    model = tiny(distilled=True).train()
    images = torch.randn(2, 3, 32, 32)
    a, b = model(images)
    model.set_distilled_training(False)
    close(model(images), (a + b) / 2)


def test_both_spellings():
    ours = tiny(in_c=4, drop_ratio=0.1, attn_drop_ratio=0.2, drop_path_ratio=0.3)
    timms = tiny(in_chans=4, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
    for model in (ours, timms):
        assert model.in_chans == 4 and model.pos_drop_rate == 0.1 and model.drop_rate == 0.0
        assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.3])
        assert {(block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop) for block in model.blocks} == {
            (0.2, 0.1, 0.1)
        }
    positional = deit.build(32, 8, 4, 10, 24, 2, 3, 4.0, True, None, None, True, 0.1, 0.2, 0.3)
    assert positional.state_dict().keys() == tiny(distilled=True).state_dict().keys()
    with pytest.raises(ValueError, match=r"drop_rate is 0\.2, expected 0\.1"):
        tiny(drop_ratio=0.1, drop_rate=0.2)


@pytest.mark.parametrize("compat", [None, "literal"])
def test_dropout_sits_where_the_original_has_it(monkeypatch, compat):
    calls, attention = [], []
    shipped, shipped_attention = F.dropout, F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p:
            calls.append((p, tuple(x.shape)))
        return shipped(x, p, training, inplace)

    def scaled(*args, dropout_p=0.0, **words):
        attention.append(dropout_p)
        return shipped_attention(*args, dropout_p=dropout_p, **words)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled)
    model = tiny(drop_ratio=0.1, attn_drop_ratio=0.2, compat=compat)
    images = torch.randn(2, 3, 32, 32)
    out = model.train()(images)
    shape, hidden = ((2, 17, 24), (2, 17, 96)) if compat is None else ((17, 2, 24), (17, 2, 96))
    assert calls == [(0.1, (2, 17, 24))] + 2 * [(0.1, shape), (0.1, hidden), (0.1, shape)]
    assert attention == 2 * [0.2 if compat is None else 0.1]
    assert not torch.equal(out, model(images))
    calls.clear(), attention.clear()
    assert torch.equal(model.eval()(images), model(images)) and not calls and not any(attention)


def test_drop_path_is_drawn_per_sample_and_branch():
    model = tiny(drop_path_ratio=0.5).train()
    images = torch.randn(1, 3, 32, 32)
    state = double(model)
    with torch.no_grad():
        candidates = [
            formula(state, images.double(), 3, factors=[(1.0, 1.0), (first, second)])[0]
            for first in (0.0, 2.0)
            for second in (0.0, 2.0)
        ]
        out = model(images.expand(64, -1, -1, -1))
    distance = torch.stack([(out.double() - candidate).abs().amax(1) for candidate in candidates])
    assert distance.min(0).values.max() < 1e-5
    assert set(distance.argmin(0).tolist()) == {0, 1, 2, 3}


def timm_pair(**words):
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    words = dict(dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=10), **words)
    distilled = words.pop("distilled", False)
    theirs = perturbed((VisionTransformerDistilled if distilled else VisionTransformer)(**words)).eval()
    ours = deit.load(deit.build(distilled=distilled, **words), theirs.state_dict()).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


@pytest.mark.parametrize(
    "words",
    [
        {},
        dict(distilled=True),
        dict(distilled=True, num_classes=0),
        dict(qkv_bias=False, img_size=(32, 24), norm_layer=partial(nn.LayerNorm, eps=1e-4)),
        dict(norm_layer=nn.RMSNorm),
    ],
)
def test_timm_agrees(words):
    ours, theirs = timm_pair(**words)
    images = torch.randn(2, 3, *words.get("img_size", (32, 32)))
    with torch.no_grad():
        close(ours(images), theirs(images))
        if words.get("distilled"):
            theirs.set_distilled_training(True)
            for a, e in zip(ours.train()(images), theirs.train()(images)):
                close(a, e)


def test_a_callers_own_patch_embedding():
    from timm.layers import PatchEmbed

    class Pages(nn.Module):
        def __init__(self, img_size, patch_size, in_c, embed_dim):
            super().__init__()
            self.num_patches = (img_size[0] // patch_size[0]) * (img_size[1] // patch_size[1])
            self.proj = nn.Conv2d(in_c, embed_dim, patch_size, patch_size)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    images = torch.randn(2, 3, 32, 32)
    for layer in (Pages, PatchEmbed, deit.PatchEmbed):
        model = tiny(embed_layer=layer, distilled=True)
        assert_outputs(model, images, formula(double(model), images.double(), 3))
    with pytest.raises(ValueError, match="num_patches"):
        tiny(embed_layer=lambda img_size, patch_size, in_c, embed_dim: nn.Identity())


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        for name, parameters in TABLE.items():
            assert count(deit.build(**deit.PRESETS[name])) == parameters
            assert count(vit_fast.create_model(name)) == parameters
        for size in ("tiny", "small", "base"):
            for kind in ("", "_distilled"):
                model = vit_fast.create_model(f"deit_{size}{kind}_patch16_224")
                assert count(model) == TABLE[f"deit_{size}{kind}"]
        model = vit_fast.create_model("deit_base_distilled_patch16_384", num_classes=7, in_chans=1)
    assert model.head_dist.out_features == 7 and model.patch_embed.proj.in_channels == 1
    assert model.default_cfg["input_size"] == (1, 384, 384)


def test_presets_have_timms_shapes():
    import timm

    names = [name for name in deit.PRESETS if "patch16" in name and name.startswith("deit")]
    assert len(names) == 8
    with torch.device("meta"):
        for name in names:
            ours, theirs = vit_fast.create_model(name).state_dict(), timm.create_model(name).state_dict()
            assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_initialisation():
    words = dict(embed_dim=192, num_heads=3, depth=1, distilled=True, num_classes=50)
    model = deit.build(32, 8, **words)
    for tensor in (model.pos_embed, model.cls_token, model.dist_token, model.head.weight, model.head_dist.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
    block = model.blocks[0]
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()
    assert model.patch_embed.proj.weight.abs().max() <= 1 / math.sqrt(192)
    wz = deit.build(32, 8, weight_init="wz", **words)
    assert wz.head.weight.std().item() == pytest.approx(0.01, rel=0.1) and not wz.patch_embed.proj.bias.any()
    assert wz.patch_embed.proj.weight.std().item() == pytest.approx(math.sqrt(2 / (192 * 64)), rel=0.1)
    words |= dict(distilled=False, representation_size=40)
    jax = deit.build(32, 8, weight_init="jax_nlhb", **words)
    assert not jax.cls_token.any() and not jax.head.weight.any()
    assert torch.allclose(jax.head.bias, torch.full((50,), -math.log(50)))
    for weight in (jax.pre_logits.fc.weight, jax.patch_embed.proj.weight):
        assert weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
        assert weight.abs().max() <= 2 * 192**-0.5 / 0.8796
    assert jax.blocks[0].mlp.fc1.weight.abs().max() <= math.sqrt(6 / (192 * 5)) * 1.001
    assert 0 < jax.blocks[0].mlp.fc1.bias.abs().max() < 1e-5
    literal = deit.build(32, 8, compat="literal", **words)
    layer = literal.blocks[0]
    assert layer.linear1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.self_attn.in_proj_weight.std().item() == pytest.approx(
        math.sqrt(6 / (192 * 4)) / math.sqrt(3), rel=0.1
    )


def test_classifier_can_be_replaced():
    model = tiny(distilled=True)
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(4)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    rep = tiny(representation_size=7)
    rep.reset_classifier(4)
    assert rep(torch.randn(2, 3, 32, 32)).shape == (2, 4) and rep.get_classifier() is rep.head


def test_metamorphic():
    for words in ({}, dict(distilled=True)):
        model = tiny(**words).eval()
        images = torch.randn(4, 3, 32, 32)
        out = model(images)
        order = torch.tensor([2, 0, 3, 1])
        close(model(images[order]), out[order])
        close(model(images[1:2]), out[1:2])
        assert (model(images + torch.randn(1, 3, 32, 32)) - out).abs().max() > 1e-2


@pytest.mark.parametrize(
    "words", [dict(representation_size=5), dict(distilled=True), dict(compat="literal"), dict(act_layer=nn.Tanh)]
)
def test_every_parameter_gets_the_formulas_gradient(words):
    model = tiny(**words).double().train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images)
    sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    if "compat" in words:
        expected = formula_literal(state, images, 3)
    else:
        expected = formula(state, images, 3, act="tanh" if "act_layer" in words else "gelu")
    sum(part.square().sum() for part in expected if part is not None).backward()
    for name, parameter in model.named_parameters():
        grad = state[name].grad
        assert (parameter.grad - grad).abs().max() <= 1e-9 * (1 + grad.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compat", [None, "literal"])
def test_16_bits_within_budget(dtype, compat):
    model = tiny(embed_dim=64, num_heads=4, compat=compat).eval().to(dtype)
    images = torch.randn(8, 3, 32, 32).to(dtype)
    function = formula if compat is None else formula_literal
    with torch.no_grad():
        out = model(images)
        eager, golden = (function(s, images, 4)[0] for s in (model.state_dict(), double(model)))
    assert out.dtype == dtype
    error, allowed = (out.double() - golden).abs().max(), (eager.double() - golden).abs().max()
    assert error <= 1.25 * allowed + torch.finfo(dtype).eps * golden.abs().max()


@pytest.mark.parametrize(
    "words", [dict(distilled=True), dict(compat="literal", distilled=True), dict(act_layer=nn.Tanh)]
)
def test_compiles(words):
    model = tiny(**words)
    images = torch.randn(2, 3, 32, 32)
    for training in (False, True):
        model.train(training)
        actual, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images)
        for a, e in zip(actual, expected) if isinstance(expected, tuple) else ((actual, expected),):
            close(a, e)


def test_autocast_and_checkpointing():
    model = tiny(embed_dim=48).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert (out - expected).abs().max() < 0.1 * (1 + expected.abs().max())
    model.set_grad_checkpointing()
    close(model(images), expected)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("words", [dict(distilled=True), dict(compat="literal"), dict(act_layer=nn.Tanh)])
def test_copies(words):
    model = tiny(**words).eval()
    images = torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))


def test_uint8_images_are_normalised():
    model = tiny(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    close(model(pixels), model((pixels / 255 - mean) / std), 1e-5)


def test_explain_names_the_operations():
    for words in (dict(distilled=True), dict(compat="literal")):
        names = [row.operation for row in vit_fast.explain(tiny(**words))]
        assert names.count("attention") == 2 and names[0] == "patch_embed"


# literal mode


class Page(nn.Module):
    """The page's class as its text has it, over torch's own layers."""

    def __init__(self, dim, depth, heads, drop, distilled, representation_size, num_classes):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 16 + 1 + distilled, dim))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(dim, heads, dim * 4, drop) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.pre_logits = nn.Identity()
        if representation_size and not distilled:
            self.pre_logits = nn.Sequential(nn.Linear(dim, representation_size), nn.Tanh())
        self.head = nn.Linear(representation_size if representation_size and not distilled else dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes) if distilled else None

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = self.norm(self.blocks(torch.cat([*tokens, x], 1) + self.pos_embed))
        if self.dist_token is None:
            return self.head(self.pre_logits(x[:, 0]))
        a, b = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return (a, b) if self.training else (a + b) / 2


@pytest.mark.parametrize("words", [{}, dict(distilled=True), dict(representation_size=7)])
def test_literal_is_the_page(words):
    ignored = dict(attn_drop_ratio=0.5, drop_path_ratio=0.5, qkv_bias=False, qk_scale=9.0, act_layer=nn.Tanh)
    page = perturbed(Page(24, 2, 3, 0.0, words.get("distilled", False), words.get("representation_size"), 10))
    model = deit.load(tiny(compat="literal", **ignored, **words), page.state_dict())
    assert model.state_dict().keys() == page.state_dict().keys()
    images = torch.randn(3, 3, 32, 32)
    expected = formula_literal(double(model), images.double(), 3)
    assert_outputs(model, images, expected)
    with torch.no_grad():
        close(model.eval()(images), page.eval()(images))
    nested = {key.replace("blocks.", "blocks.layers."): value for key, value in page.state_dict().items()}
    close(deit.load(tiny(compat="literal", **words), nested).eval()(images), page(images))


def test_literal_ignores_the_image_and_the_default_does_not():
    images, others = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    literal = tiny(compat="literal", distilled=True).eval()
    assert torch.equal(literal(images), literal(others))
    model = tiny(distilled=True).eval()
    assert (model(images) - model(others)).abs().max() > 1e-2


def test_literal_headless_distilled_and_own_final_norm():
    model = tiny(compat="literal", distilled=True, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=0.1))
    images = torch.randn(2, 3, 32, 32)
    assert_outputs(model, images, formula_literal(double(model), images.double(), 3, eps=0.1))
    with pytest.raises(ValueError, match=r"images are 40×32, expected 32×32"):
        model(torch.randn(1, 3, 40, 32))


# weights


def test_load_files_wrappers_and_older_keys(tmp_path):
    from safetensors.torch import save_file

    source = tiny(representation_size=6)
    state = source.state_dict()
    torch.save({"model": state, "epoch": 1}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    older = {f"module.{key.replace('pre_logits.fc', 'pre_logits.0')}": value for key, value in state.items()}
    older["module.patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    for weights in (state, {"state_dict_ema": older}, tmp_path / "a.pth", str(tmp_path / "a.safetensors")):
        model = deit.load(tiny(representation_size=6), weights)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    tiny(representation_size=6).load_state_dict(state)


@pytest.mark.parametrize("distilled", [False, True])
def test_load_resizes_by_r4_and_keeps_the_prefix(distilled):
    source, model = tiny(distilled=distilled), tiny(distilled=distilled, img_size=(48, 24))
    deit.load(model, source.state_dict())
    k, table = 1 + distilled, source.pos_embed.detach()
    grid = table[:, k:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (6, 3), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 18, 24)
    assert torch.equal(model.pos_embed[:, :k], table[:, :k])
    assert torch.allclose(model.pos_embed[:, k:], expected, atol=1e-6)
    again = deit.load(tiny(distilled=distilled, img_size=32), model.state_dict(), old_grid=(6, 3))
    assert again.pos_embed.shape == table.shape


def test_fine_tuning_keeps_other_heads():
    source = tiny(distilled=True, num_classes=10).state_dict()
    model = tiny(distilled=True, num_classes=4)
    head = model.head.weight.clone()
    with pytest.raises(WeightsError, match=r"head\.weight \(10, 24\) instead of \(4, 24\)"):
        deit.load(model, source)
    deit.load(model, source, fine_tune=True)
    assert torch.equal(model.head.weight, head) and torch.equal(model.norm.weight, source["norm.weight"])
    assert deit.load(tiny(distilled=True, num_classes=0), source, fine_tune=True).num_classes == 0
    same = deit.load(tiny(distilled=True), source, fine_tune=True)
    assert torch.equal(same.head_dist.weight, source["head_dist.weight"])


def test_load_reports_what_does_not_fit(tmp_path):
    model = tiny()
    with pytest.raises(WeightsError, match=r"missing .*dist_token"):
        deit.load(tiny(distilled=True), model.state_dict())
    with pytest.raises(WeightsError, match="unexpected"):
        deit.load(tiny(compat="literal"), model.state_dict())
    with pytest.raises(WeightsError, match="wrong shape pos_embed"):
        deit.load(model, dict(model.state_dict(), pos_embed=torch.ones(1, 13, 24)))
    with pytest.raises(WeightsError, match="expected 1 prefix rows and a grid of 3×4"):
        deit.load(model, model.state_dict(), old_grid=(3, 4))
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        deit.load(model, tmp_path / "a.pth")


def google_arrays(state, heads, newer=False):
    """A state in timm's keys as Google's arrays."""
    attention, norm, mlp = (
        ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
        if newer
        else ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    )
    s = {key: value.numpy() for key, value in state.items()}
    width = s["cls_token"].shape[-1]
    arrays = {
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"], "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"], "Transformer/encoder_norm/bias": s["norm.bias"],
    }  # fmt: skip
    for i in range(1 + max(int(key.split(".")[1]) for key in s if key.startswith("blocks"))):
        a, b = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for theirs, ours in (("LayerNorm_0", "norm1"), (norm, "norm2")):
            arrays |= {f"{a}{theirs}/scale": s[f"{b}{ours}.weight"], f"{a}{theirs}/bias": s[f"{b}{ours}.bias"]}
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            arrays[f"{a}{attention}/{name}/kernel"] = s[f"{b}attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            arrays[f"{a}{attention}/{name}/bias"] = s[f"{b}attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[f"{a}{attention}/out/kernel"] = s[f"{b}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{a}{attention}/out/bias"] = s[f"{b}attn.proj.bias"]
        for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            arrays[f"{a}{mlp}/{theirs}/kernel"] = s[f"{b}mlp.{ours}.weight"].T
            arrays[f"{a}{mlp}/{theirs}/bias"] = s[f"{b}mlp.{ours}.bias"]
    for theirs, ours in (("pre_logits", "pre_logits.fc"), ("head", "head")):
        if f"{ours}.weight" in s:
            arrays |= {f"{theirs}/kernel": s[f"{ours}.weight"].T, f"{theirs}/bias": s[f"{ours}.bias"]}
    return arrays


@pytest.mark.parametrize("words", [{}, dict(representation_size=24), dict(num_heads=6)])
@pytest.mark.parametrize("newer, prefix", [(False, ""), (False, "opt/target/"), (True, "")])
def test_load_google_npz(tmp_path, words, newer, prefix):
    import numpy as np

    source = tiny(**words)
    arrays = google_arrays(source.state_dict(), words.get("num_heads", 3), newer)
    np.savez(tmp_path / "a.npz", **{prefix + key: value for key, value in arrays.items()})
    model = deit.load(tiny(**words), tmp_path / "a.npz")
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_google_npz_is_resized_by_r2_and_names_missing_keys(tmp_path):
    import numpy as np

    source = tiny()
    arrays = google_arrays(source.state_dict(), 3)
    np.savez(tmp_path / "a.npz", **arrays)
    model = deit.load(tiny(img_size=48), tmp_path / "a.npz")
    grid = source.pos_embed[:, 1:].detach().reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (6, 6), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).reshape(1, 36, 24)
    assert torch.allclose(model.pos_embed[:, 1:], expected, atol=1e-6)
    del arrays["Transformer/encoderblock_1/LayerNorm_2/bias"]
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises((WeightsError, KeyError), match="LayerNorm_2/bias"):
        deit.load(model, tmp_path / "b.npz")


# bad input


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(num_heads=5), "num_heads is 5, expected a divisor of embed_dim 24"),
        (dict(img_size=6), r"img_size is \(6, 6\), expected at least one patch of \(8, 8\)"),
        (dict(img_size=(32, 32, 32)), "img_size"),
        (dict(in_c=0), "in_c is 0"),
        (dict(depth=0), "depth is 0"),
        (dict(num_classes=-1), "num_classes is -1"),
        (dict(drop_ratio=1.5), "drop_ratio is 1.5"),
        (dict(mlp_ratio=0.0), "mlp_ratio is 0.0"),
        (dict(mlp_ratio=0.01), "hidden width"),
        (dict(qk_scale=math.inf), "qk_scale is inf"),
        (dict(compat="letter"), "compat is 'letter'"),
        (dict(act_layer="swish"), "act_layer is 'swish'"),
        (dict(norm_layer="rms"), "norm_layer is 'rms'"),
        (dict(weight_init="xavier"), "weight_init is 'xavier'"),
        (dict(pos_embed_policy="R6"), "R6"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=message):
        tiny(**words)


def test_bad_words_of_a_wrong_type():
    for words in (dict(depth="2"), dict(num_heads=True), dict(img_size="32"), dict(colour=1), dict(drop_ratio="0.1")):
        with pytest.raises(TypeError):
            tiny(**words)


@pytest.mark.parametrize("compat", [None, "literal"])
@pytest.mark.parametrize(
    "images, message",
    [
        (torch.randn(1, 3, 35, 32), r"vit_fast\.systems\.deit: images are 35×32, expected 32×32"),
        (torch.randn(1, 3, 16, 64), "images are 16×64, expected 32×32"),
        (torch.randn(1, 1, 32, 32), "1 channels, expected 3"),
        (torch.randn(3, 32, 32), "3 dimensions, expected 4"),
    ],
)
def test_bad_images(compat, images, message):
    with pytest.raises(ValueError, match=message):
        tiny(compat=compat)(images)


def test_dynamic_image_size():
    model, images = tiny(dynamic_img_size=True, distilled=True).eval(), torch.randn(2, 3, 48, 24)
    fixed = deit.load(tiny(img_size=(48, 24), distilled=True), model.state_dict()).eval()
    close(model(images), fixed(images))
    with pytest.raises(ValueError, match="multiples of the patch"):
        model(torch.randn(1, 3, 48, 25))


@pytest.mark.interp
@pytest.mark.parametrize("words", [dict(distilled=True), dict(representation_size=5), dict(compat="literal")])
def test_interpreted_kernels_agree(words):
    model = tiny(**words).train()
    assert_kernels_agree(model, torch.randn(2, 3, 32, 32))
