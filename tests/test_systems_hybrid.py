"""The config-driven ViT and its hybrids, against formulas written here and against timm's own .npz loader.

The formulas below are written from the specification in float64 and share nothing with the library but the names of
the parameters; SAME padding is spelled out as the definition (zeros around a canvas), GELU, LayerNorm and GroupNorm as
sums. Every parameter is moved away from its initial value first. JAX itself is not run. timm's hybrids have the same
layout as "google" but other epsilons (1e-8 under the root): the comparison scales the filters by 1000, where neither
epsilon is seen.
"""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

import vit_fast
from vit_fast import WeightsError
from vit_fast.systems import hybrid

STEM = "transformer.embeddings.hybrid_model"


def config(resnet=None, representation_size=None, classifier="token", attention_dropout=0.0, dropout=0.1, **patches):
    result = {
        "patches": patches or {"size": (8, 8)},
        "hidden_size": 24,
        "transformer": {
            "mlp_dim": 40,
            "num_heads": 3,
            "num_layers": 2,
            "attention_dropout_rate": attention_dropout,
            "dropout_rate": dropout,
        },
        "classifier": classifier,
        "representation_size": representation_size,
    }
    if resnet is not None:
        result["resnet"] = {"num_layers": resnet, "width_factor": 0.5}
    return result


def perturbed(model, scale=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def small(resnet=None, img_size=32, num_classes=7, cfg=None, **words):
    cfg = cfg or (config(resnet=resnet, size=(1, 1)) if resnet is not None else config())
    return perturbed(hybrid.build(config=cfg, img_size=img_size, num_classes=num_classes, **words)).eval()


# The formulas.


def formula_norm(x, weight, bias, axes, eps):
    if x.dtype != torch.float64 and axes == (-1,):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight + bias


def formula_group_norm(x, weight, bias, groups, eps):
    b, c, h, w = x.shape
    grouped = x.reshape(b, groups, c // groups, h, w)
    mean = grouped.mean((2, 3, 4), keepdim=True)
    var = ((grouped - mean) ** 2).mean((2, 3, 4), keepdim=True)
    normal = ((grouped - mean) / (var + eps).sqrt()).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def formula_gelu(x, tanh):
    if tanh:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def same_canvas(x, k, s, fill):
    """x on a canvas that SAME reads: ⌈n/s⌉ windows of k every s, the odd row and column below and to the right."""
    b, c, h, w = x.shape
    total = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n in (h, w)]
    canvas = x.new_full((b, c, h + total[0], w + total[1]), fill)
    canvas[:, :, total[0] // 2 : total[0] // 2 + h, total[1] // 2 : total[1] // 2 + w] = x
    return canvas


def formula_std_conv(x, weight, stride, mode):
    flat = weight.flatten(1)
    mean = flat.mean(1, keepdim=True)
    var = ((flat - mean) ** 2).mean(1, keepdim=True)
    flat = (flat - mean) / (var.sqrt() + 1e-5) if mode == "google" else (flat - mean) / (var + 1e-5).sqrt()
    k = weight.shape[-1]
    padding = {7: 3, 3: 1, 1: 0}[k]
    if mode == "google":
        x, padding = same_canvas(x, k, stride, 0.0), 0
    return F.conv2d(x, flat.reshape(weight.shape), stride=stride, padding=padding)


def formula_resnet(p, x, num_layers, mode):
    gn = lambda y, name: formula_group_norm(y, p[f"{name}.weight"], p[f"{name}.bias"], 32, 1e-6)  # noqa: E731
    x = gn(formula_std_conv(x, p["root.conv.weight"], 2, mode), "root.gn").clamp(min=0)
    x = F.max_pool2d(same_canvas(x, 3, 2, -math.inf) if mode == "google" else x, 3, 2)
    for i, units in enumerate(num_layers):
        for j in range(units):
            name = f"body.block{i + 1}.unit{j + 1}"
            stride, skip = (2 if i and not j else 1), x
            assert (f"{name}.downsample.weight" in p) == (j == 0)
            if j == 0:
                skip = formula_std_conv(x, p[f"{name}.downsample.weight"], stride, mode)
                if mode == "google":
                    skip = gn(skip, f"{name}.gn_proj")
                else:
                    weight, bias = p[f"{name}.gn_proj.weight"], p[f"{name}.gn_proj.bias"]
                    skip = formula_norm(skip, weight[:, None, None], bias[:, None, None], (2, 3), 1e-5)
            x = gn(formula_std_conv(x, p[f"{name}.conv1.weight"], 1, mode), f"{name}.gn1").clamp(min=0)
            x = gn(formula_std_conv(x, p[f"{name}.conv2.weight"], stride, mode), f"{name}.gn2").clamp(min=0)
            x = gn(formula_std_conv(x, p[f"{name}.conv3.weight"], 1, mode), f"{name}.gn3")
            x = (skip + x).clamp(min=0)
    return x


def formula(state, images, heads=3, layers=2, tanh=False, num_layers=None, mode="jeonsworld", classifier="token"):
    """(logits, list of probabilities)."""
    p = state
    e = "transformer.embeddings"
    x = images
    if num_layers is not None:
        stem = {key.removeprefix(f"{STEM}."): v for key, v in p.items() if key.startswith(STEM)}
        x = formula_resnet(stem, x, num_layers, mode)
    kernel = p[f"{e}.patch_embeddings.weight"]
    d, c, ph, pw = kernel.shape
    gh, gw = x.shape[2] // ph, x.shape[3] // pw
    x = x[:, :, : gh * ph, : gw * pw].reshape(-1, c, gh, ph, gw, pw).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = x @ kernel.flatten(1).T + p[f"{e}.patch_embeddings.bias"]
    if "token" in classifier:
        x = torch.cat([p[f"{e}.cls_token"].expand(len(x), 1, d), x], dim=1)
    x = x + p[f"{e}.position_embeddings"]
    maps = []
    for i in range(layers):
        name = f"transformer.encoder.layer.{i}"
        linear = lambda y, key: y @ p[f"{key}.weight"].T + p[f"{key}.bias"]  # noqa: E731
        norm = lambda y, key: formula_norm(y, p[f"{key}.weight"], p[f"{key}.bias"], (-1,), 1e-6)  # noqa: E731
        y = norm(x, f"{name}.attention_norm")
        q, k, v = (
            linear(y, f"{name}.attn.{word}").reshape(len(x), -1, heads, d // heads).transpose(1, 2)
            for word in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        maps.append(scores / scores.sum(-1, keepdim=True))
        x = x + linear((maps[-1] @ v).transpose(1, 2).flatten(2), f"{name}.attn.out")
        y = formula_gelu(linear(norm(x, f"{name}.ffn_norm"), f"{name}.ffn.fc1"), tanh)
        x = x + linear(y, f"{name}.ffn.fc2")
    name = "transformer.encoder.encoder_norm"
    x = formula_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], (-1,), 1e-6)
    x = x[:, 0] if classifier == "token" else x.mean(1) if classifier == "gap" else x
    if "pre_logits.fc.weight" in p:
        x = torch.tanh(x @ p["pre_logits.fc.weight"].T + p["pre_logits.fc.bias"])
    return x @ p["head.weight"].T + p["head.bias"], maps


def golden(model, images, **words):
    return formula({key: value.double() for key, value in model.state_dict().items()}, images.double(), **words)


def assert_same(actual, expected, limit=1e-5):
    assert actual.shape == expected.shape
    assert expected.isfinite().all() and expected.std() > 0
    difference = (actual.double() - expected).abs().max().item()
    assert difference <= limit * (1 + expected.abs().max().item()), difference


# Arithmetic.


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize(
    "words, tanh",
    [
        ({}, False),
        ({"variant": "google"}, True),
        ({"activation": "gelu_tanh"}, True),
        ({"variant": "jeonsworld"}, False),
    ],
)
def test_plain_model_is_the_formula(words, tanh, vis):
    model, images = small(vis=vis, **words), torch.randn(2, 3, 32, 32)
    logits, maps = model(images)
    expected, probabilities = golden(model, images, tanh=tanh)
    assert_same(logits, expected)
    assert isinstance(maps, list) and len(maps) == (2 if vis else 0)
    for one, other in zip(maps, probabilities):
        assert_same(one, other)
    exact, _ = model.double()(images.double())
    assert_same(exact, expected, 1e-12)


def test_the_two_gelus_differ_and_so_the_test_can_fail():
    model, images = small(), torch.randn(2, 3, 32, 32)
    expected, _ = golden(model, images, tanh=True)
    assert (model.double()(images.double())[0] - expected).abs().max() > 1e-7


@pytest.mark.parametrize("mode", ["jeonsworld", "google"])
@pytest.mark.parametrize("img_size, num_layers", [(64, (1, 2, 1)), ((64, 48), (1, 1)), ((70, 53), (1, 1)), (64, ())])
def test_hybrid_is_the_formula(mode, img_size, num_layers):
    model = small(resnet=num_layers, img_size=img_size, hybrid_mode=mode)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    images = torch.randn(2, 3, *size)
    assert_same(model(images)[0], golden(model, images, num_layers=num_layers, mode=mode)[0], 3e-5)
    assert_same(model.double()(images.double())[0], golden(model, images, num_layers=num_layers, mode=mode)[0], 1e-10)


@pytest.mark.parametrize("mode, other", [("jeonsworld", "google"), ("google", "jeonsworld")])
def test_the_modes_of_the_hybrid_differ(mode, other):
    model, images = small(resnet=(1, 1), img_size=32, hybrid_mode=mode), torch.randn(2, 3, 32, 32)
    expected, _ = golden(model, images, num_layers=(1, 1), mode=other)
    assert (model(images)[0] - expected).abs().max() > 0.05
    model.set_hybrid_mode(other)
    assert_same(model(images)[0], expected, 3e-5)


@pytest.mark.parametrize("classifier", ["token", "gap", "unpooled", "token_unpooled"])
def test_classifiers_and_pre_logits_of_google(classifier):
    cfg = config(classifier=classifier, representation_size=16)
    model, images = small(cfg=cfg, variant="google"), torch.randn(2, 3, 32, 32)
    assert model.pre_logits.fc.weight.shape == (16, 24)
    assert ("transformer.embeddings.cls_token" in model.state_dict()) == ("token" in classifier)
    assert_same(model(images)[0], golden(model, images, tanh=True, classifier=classifier)[0])


def test_representation_size_is_ignored_by_the_document():
    assert not any("pre_logits" in key for key in small(cfg=config(representation_size=16)).state_dict())


@pytest.mark.parametrize(
    "grid, img_size, patch, tokens",
    [
        ((4, 4), 64, (1, 1), (4, 4)),
        ((2, 2), 64, (2, 2), (2, 2)),
        ((14, 14), 64, (1, 1), (4, 4)),
        ((2, 1), (64, 96), (2, 6), (2, 1)),
    ],
)
def test_grid_asks_for_patches_of_the_feature_map(grid, img_size, patch, tokens):
    model = small(cfg=config(resnet=(1, 1, 1), grid=grid), img_size=img_size)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert model.patch_size == patch and model.grid_size == tokens
    assert model.transformer.embeddings.position_embeddings.shape[1] == tokens[0] * tokens[1] + 1
    images = torch.randn(1, 3, *size)
    assert_same(model(images)[0], golden(model, images, num_layers=(1, 1, 1))[0], 3e-5)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 30, 16), (4, 9, 11)])
def test_other_channels_and_rectangles(shape):
    channels, height, width = shape
    cfg = config(size=(8, 5))
    model, images = small(cfg=cfg, img_size=(height, width), in_chans=channels), torch.randn(2, *shape)
    assert_same(model(images)[0], golden(model, images)[0])


def test_the_original_testing_config_has_width_one():
    model = perturbed(vit_fast.create_model("testing", img_size=32, num_classes=3)).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_same(model(images)[0], golden(model, images, heads=1, layers=1)[0])


# Parameters, configs, presets.


def test_keys_are_the_originals():
    keys = set(small(resnet=(2, 1, 1), img_size=64).state_dict())
    unit = ["conv1.weight", "conv2.weight", "conv3.weight"] + [
        f"gn{r}.{w}" for r in (1, 2, 3) for w in ("weight", "bias")
    ]
    first = unit + ["downsample.weight", "gn_proj.weight", "gn_proj.bias"]
    expected = {f"{STEM}.root.{key}" for key in ("conv.weight", "gn.weight", "gn.bias")}
    expected |= {f"{STEM}.body.block1.unit2.{key}" for key in unit}
    expected |= {f"{STEM}.body.block{b}.unit1.{key}" for b in (1, 2, 3) for key in first}
    names = ["position_embeddings", "cls_token", "patch_embeddings.weight", "patch_embeddings.bias"]
    expected |= {f"transformer.embeddings.{name}" for name in names}
    linears = [f"attn.{word}" for word in ("query", "key", "value", "out")] + ["ffn.fc1", "ffn.fc2"]
    for name in [f"layer.{i}.{m}" for i in (0, 1) for m in (*linears, "attention_norm", "ffn_norm")] + ["encoder_norm"]:
        expected |= {f"transformer.encoder.{name}.{kind}" for kind in ("weight", "bias")}
    assert keys == expected | {"head.weight", "head.bias"}


COUNTS = {
    "ViT-Ti_16": 5_717_416,
    "ViT-S_16": 22_050_664,
    "ViT-S_32": 22_878_952,
    "ViT-B_16": 86_567_656,
    "ViT-B_32": 88_224_232,
    "ViT-B_8": 86_576_872,
    "ViT-L_16": 304_326_632,
    "ViT-L_32": 306_535_400,
    "ViT-H_14": 632_045_800,
    "R50-ViT-B_16": 98_659_112,
}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = vit_fast.create_model(name, num_classes=1000)
        default = vit_fast.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert default.head.weight.shape[0] == 21843
    assert name in vit_fast.list_models() and name in hybrid.PRESETS
    rates = default.config.transformer
    assert (rates["attention_dropout_rate"], rates["dropout_rate"]) == (0.0, 0.1)


@pytest.mark.parametrize(
    "name, count",
    [("ViT-B_16", 103_186_515), ("ViT-B_32", 104_843_091), ("ViT-L_16", 326_740_307), ("ViT-L_32", 328_949_075)],
)
def test_in21k_counts_with_pre_logits(name, count):
    cfg = hybrid.Config(hybrid.CONFIGS[name])
    cfg.representation_size = cfg.hidden_size
    with torch.device("meta"):
        model = hybrid.build(config=cfg, variant="google")
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("R+ViT-Ti_16", "vit_tiny_r_s16_p8_224"),
        ("R26+ViT-S_32", "vit_small_r26_s32_224"),
        ("R26+ViT-B_32", "vit_base_r26_s32_224"),
        ("R50+ViT-B_16", "vit_base_r50_s16_224"),
        ("R50+ViT-L_32", "vit_large_r50_s32_224"),
    ],
)
def test_googles_hybrids_have_as_many_parameters_as_timms(name, theirs):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = vit_fast.create_model(name, num_classes=1000)
        other = timm.create_model(theirs, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())
    assert model.grid_size == other.patch_embed.grid_size


class Both:
    """A config with both kinds of access and none of dict, as ml_collections.ConfigDict."""

    def __init__(self, entries):
        self._entries = {key: Both(value) if isinstance(value, dict) else value for key, value in entries.items()}

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._entries:
            raise AttributeError(name)
        return self._entries[name]

    def __getitem__(self, name):
        return self._entries[name]

    def keys(self):
        return self._entries.keys()

    def get(self, name, default=None):
        return self._entries.get(name, default)


def test_configs_by_key_by_attribute_and_by_name():
    entries = config(resnet=(1, 1), grid=(4, 4))
    mixed = SimpleNamespace(**entries)
    objects = SimpleNamespace(
        **{key: SimpleNamespace(**value) if isinstance(value, dict) else value for key, value in entries.items()}
    )
    images, outputs = torch.randn(1, 3, 32, 32), []
    for cfg in (entries, hybrid.Config(entries), Both(entries), mixed, objects):
        torch.manual_seed(1)
        outputs.append(small(cfg=cfg, img_size=32)(images)[0])
    assert all(torch.equal(outputs[0], output) for output in outputs)
    entries["transformer"]["num_layers"] = 1
    assert len(small(cfg=entries, img_size=32).transformer.encoder.layer) == 1
    with torch.device("meta"):
        assert hybrid.build("ViT-S_32").embed_dim == 384
        assert hybrid.build(hybrid.CONFIGS["ViT-S_32"], 64, 5, True, True).num_classes == 5


def test_initial_values():
    model = hybrid.build(config=config(resnet=(1, 1, 1), size=(1, 1)), img_size=64, num_classes=4)
    e, block = model.transformer.embeddings, model.transformer.encoder.layer[0]
    assert not e.cls_token.any() and not e.position_embeddings.any() and model.head.weight.std() > 0
    bound = math.sqrt(6 / (24 + 40))
    assert 0.9 * bound < block.ffn.fc1.weight.abs().max() <= bound
    assert 0 < block.ffn.fc1.bias.abs().max() < 1e-5 < block.attn.query.bias.abs().max()
    assert e.hybrid_model.body.block1.unit1.gn3.weight.min() == 1
    google = hybrid.build(config=config(resnet=(1, 1, 1), size=(1, 1)), img_size=64, num_classes=4, variant="google")
    e, block = google.transformer.embeddings, google.transformer.encoder.layer[0]
    assert not e.cls_token.any() and 0.015 < e.position_embeddings.std() < 0.025
    assert not google.head.weight.any() and not google.head.bias.any()
    assert not e.hybrid_model.body.block1.unit1.gn3.weight.any() and e.hybrid_model.body.block1.unit1.gn2.weight.all()
    assert 0.8 * math.sqrt(6 / 48) < block.attn.query.weight.abs().max() <= math.sqrt(6 / 48)


# Outputs and training.


def test_labels_give_the_mean_cross_entropy_alone():
    model, images = small(vis=True), torch.randn(4, 3, 32, 32)
    labels = torch.tensor([0, 3, 6, 3])
    expected, _ = golden(model, images)
    expected = -(expected - expected.logsumexp(1, keepdim=True))[torch.arange(4), labels].mean()
    loss = model(images, labels)
    assert loss.dim() == 0
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images, labels.reshape(4, 1)), loss)
    unpooled = small(cfg=config(classifier="unpooled"), variant="google")
    assert unpooled(images, torch.zeros(4, 16, dtype=torch.long)).dim() == 0


@pytest.mark.parametrize("words", [{}, {"resnet": (1, 1)}])
def test_train_without_rates_equals_eval_and_every_gradient_arrives(words):
    size = words.get("img_size", 32)
    cfg = config(resnet=words.get("resnet"), dropout=0.0, **({"size": (1, 1)} if words else {"size": (8, 8)}))
    model, images = small(cfg=cfg, img_size=size).double(), torch.randn(3, 3, size, size).double()
    expected = model(images)[0]
    loss = model.train()(images, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(model(images)[0], expected)
    loss.backward()
    for name, parameter in model.named_parameters():
        # The bias of the keys shifts all scores of a row alike: its gradient is zero but for rounding.
        assert parameter.grad is not None and (parameter.grad.any() or name.endswith("key.bias")), name
    state = {key: value.clone().requires_grad_() for key, value in model.state_dict().items()}
    logits, _ = formula(state, images, num_layers=words.get("resnet"))
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-7, atol=1e-9)


def test_dropout_after_the_projection_follows_the_variant():
    x = torch.randn(2, 5, 24)
    for variant, deterministic in (("jeonsworld", True), ("google", False)):
        model = small(cfg=config(dropout=0.5), variant=variant)
        block = model.transformer.encoder.layer[0]
        with torch.no_grad():
            block.ffn.fc2.weight.zero_()
            block.ffn.fc2.bias.zero_()
        expected = block(x)[0]
        assert torch.allclose(block.train()(x)[0], expected) == deterministic
    model = small(cfg=config(attention_dropout=0.5, dropout=0.0), vis=True)
    images = torch.randn(2, 3, 32, 32)
    expected, maps = model(images)
    dropped, dropped_maps = model.train()(images)
    assert not torch.allclose(dropped, expected)
    torch.testing.assert_close(dropped_maps[0], maps[0])


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    model = small(cfg=config(dropout=0.5))
    block, x = model.transformer.encoder.layer[0], torch.randn(1, 5, 24)
    with torch.no_grad():
        expected = block(x)[0]
        mean = block.train()(x.expand(20000, -1, -1))[0].mean(0, keepdim=True)
    assert (mean - expected).abs().max() < 0.1 * (expected - x).abs().max()


def test_images_decide_and_batch_mates_do_not():
    model, images = small(resnet=(1, 1), img_size=32).double(), torch.randn(3, 3, 32, 32).double()
    logits = model(images)[0]
    torch.testing.assert_close(model(images[[2, 0, 1]])[0], logits[[2, 0, 1]])
    torch.testing.assert_close(model(images[:1])[0], logits[:1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_hooks_run_and_leave_the_numbers():
    model, images = small(vis=True).double(), torch.randn(2, 3, 32, 32).double()
    expected, maps = model(images)
    seen = []
    model.transformer.encoder.layer[0].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    model.transformer.encoder.layer[1].attn.query.register_forward_hook(lambda module, args, out: seen.append(out))
    logits, hooked = model(images)
    assert len(seen) == 2 and seen[0][0].shape == (2, 17, 24)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(hooked, maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_the_budget(dtype):
    model, images = small().to(dtype), torch.randn(8, 3, 32, 32).to(dtype)
    eager, _ = formula(model.state_dict(), images)
    assert_within_budget(model(images)[0], eager, golden(model, images)[0], kind="model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["jeonsworld", "google"])
def test_low_precision_hybrids_stay_near(dtype, mode):
    model = small(resnet=(1, 1), img_size=32, hybrid_mode=mode).to(dtype)
    images = torch.randn(2, 3, 32, 32).to(dtype)
    expected, _ = golden(model, images, num_layers=(1, 1), mode=mode)
    assert_same(model(images)[0], expected, 0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize("words", [{"vis": True}, {"resnet": (1,), "variant": "google"}])
def test_compiles_without_breaks(words):
    size = words.get("img_size", 32)
    model, images = small(**words), torch.randn(2, 3, size, size)
    labels = torch.tensor([0, 1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images)[0], model(images)[0])
    compiled(images, labels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Google's files.


def google_arrays(model, heads=3, linen=False, stacked=False, table="Transformer/posembed_input/pos_embedding"):
    """The arrays that JAX would have written, from a model in this library's names."""
    state = {key: value.detach().numpy().astype(np.float32) for key, value in model.state_dict().items()}
    attention, norm2, mlp = (
        ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
        if linen
        else ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    )
    arrays = {
        "embedding/kernel": state["transformer.embeddings.patch_embeddings.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["transformer.embeddings.patch_embeddings.bias"],
        table: state["transformer.embeddings.position_embeddings"],
        "Transformer/encoder_norm/scale": state["transformer.encoder.encoder_norm.weight"],
        "Transformer/encoder_norm/bias": state["transformer.encoder.encoder_norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if "transformer.embeddings.cls_token" in state:
        arrays["cls"] = state["transformer.embeddings.cls_token"]
    if "pre_logits.fc.weight" in state:
        arrays |= {"pre_logits/kernel": state["pre_logits.fc.weight"].T, "pre_logits/bias": state["pre_logits.fc.bias"]}
    blocks = []
    for i in range(len(model.transformer.encoder.layer)):
        name, block = f"transformer.encoder.layer.{i}", {}
        width = state[f"{name}.attn.out.weight"].shape[0]
        for word in ("query", "key", "value"):
            weight, bias = state[f"{name}.attn.{word}.weight"], state[f"{name}.attn.{word}.bias"]
            block[f"{attention}/{word}/kernel"] = weight.T.reshape(width, heads, width // heads)
            block[f"{attention}/{word}/bias"] = bias.reshape(heads, width // heads)
        out = state[f"{name}.attn.out.weight"].T.reshape(heads, width // heads, width)
        block |= {f"{attention}/out/kernel": out, f"{attention}/out/bias": state[f"{name}.attn.out.bias"]}
        for theirs, ours in (("LayerNorm_0", "attention_norm"), (norm2, "ffn_norm")):
            block[f"{theirs}/scale"] = state[f"{name}.{ours}.weight"]
            block[f"{theirs}/bias"] = state[f"{name}.{ours}.bias"]
        for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            block[f"{mlp}/{theirs}/kernel"] = state[f"{name}.ffn.{ours}.weight"].T
            block[f"{mlp}/{theirs}/bias"] = state[f"{name}.ffn.{ours}.bias"]
        blocks.append(block)
    if stacked:
        arrays |= {f"Transformer/encoderblock/{k}": np.stack([block[k] for block in blocks]) for k in blocks[0]}
    else:
        for i, block in enumerate(blocks):
            arrays |= {f"Transformer/encoderblock_{i}/{key}": value for key, value in block.items()}
    for key, value in state.items():
        if key.startswith(STEM):
            key = key.removeprefix(f"{STEM}.").removeprefix("body.").replace("root.conv", "conv_root")
            key = key.replace("root.gn", "gn_root").replace("downsample", "conv_proj").replace(".", "/")
            if value.ndim == 4:
                arrays[key.replace("weight", "kernel")] = value.transpose(2, 3, 1, 0)
            else:
                arrays[key.replace("weight", "scale")] = value.reshape(1, 1, 1, -1) if "gn2" in key else value
    return arrays


def write(path, arrays, prefix=""):
    np.savez(path, **{prefix + key: value for key, value in arrays.items()})
    return path


LAYOUTS = {
    "old": ({}, ""),
    "opt": ({}, "opt/target/"),
    "linen": ({"linen": True}, ""),
    "big_vision": ({"linen": True, "table": "pos_embedding"}, "params/"),
    "big_vision_stacked": ({"linen": True, "table": "pos_embedding", "stacked": True}, "params/"),
    "siglip": ({"linen": True, "table": "pos_embedding"}, "params/img/"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_npz_round_trip_of_every_layout(layout, tmp_path):
    words, prefix = LAYOUTS[layout]
    source = small()
    path = write(tmp_path / "x.npz", google_arrays(source, **words), prefix)
    model = hybrid.load(small(), path)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_npz_of_a_hybrid_switches_the_mode_unless_it_was_chosen(tmp_path):
    source = small(resnet=(2, 1), img_size=32, hybrid_mode="google")
    path = write(tmp_path / "x.npz", google_arrays(source))
    images = torch.randn(2, 3, 32, 32)
    follows = small(resnet=(2, 1), img_size=32)
    assert follows.hybrid_mode == "jeonsworld"
    hybrid.load(follows, path)
    assert follows.hybrid_mode == "google"
    assert_same(follows(images)[0], golden(source, images, num_layers=(2, 1), mode="google")[0], 3e-5)
    other_map = small(resnet=(2,))
    before = {key: value.clone() for key, value in other_map.state_dict().items()}
    with pytest.raises(WeightsError, match="expected a model built with hybrid_mode='google'"):
        hybrid.load(other_map, path)
    assert all(torch.equal(value, before[key]) for key, value in other_map.state_dict().items())
    for words in ({"variant": "jeonsworld"}, {"hybrid_mode": "jeonsworld"}):
        stays = small(resnet=(2, 1), img_size=32, **words)
        with np.load(path) as arrays:
            stays.load_from(arrays)
        assert stays.hybrid_mode == "jeonsworld"
        assert_same(stays(images)[0], golden(source, images, num_layers=(2, 1))[0], 3e-5)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "x.pth")
    trained = hybrid.load(small(resnet=(2, 1), img_size=32), tmp_path / "x.pth")
    assert trained.hybrid_mode == "jeonsworld"


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (2, 8)])
def test_position_tables_are_resized_with_corners_aligned(grid, tmp_path, peer):
    zoom = peer("scipy.ndimage").zoom
    source = small()
    path = write(tmp_path / "x.npz", google_arrays(source))
    model = small(img_size=(8 * grid[0], 8 * grid[1]))
    hybrid.load(model, path)
    table = source.transformer.embeddings.position_embeddings.detach().numpy()
    expected = zoom(table[0, 1:].reshape(4, 4, 24), (grid[0] / 4, grid[1] / 4, 1), order=1).reshape(-1, 24)
    actual = model.transformer.embeddings.position_embeddings.detach().numpy()
    np.testing.assert_allclose(actual[0, 1:], expected, atol=5e-6)
    np.testing.assert_array_equal(actual[0, :1], table[0, :1])
    torch.save(source.state_dict(), tmp_path / "x.pth")
    hybrid.load(model, tmp_path / "x.pth", old_grid=(4, 4))
    np.testing.assert_allclose(model.transformer.embeddings.position_embeddings.detach().numpy(), actual, atol=1e-6)


def test_pre_logits_zero_head_and_missing_keys(tmp_path):
    source = small(cfg=config(representation_size=24), variant="google")
    arrays = google_arrays(source)
    path = write(tmp_path / "x.npz", arrays)
    model = hybrid.load(small(cfg=config(representation_size=24), variant="google"), path)
    images = torch.randn(2, 3, 32, 32)
    assert_same(model(images)[0], golden(source, images, tanh=True)[0])
    document = hybrid.load(small(), path)
    assert torch.equal(document.head.weight, source.head.weight)
    zeroed = hybrid.load(small(zero_head=True, num_classes=11), path)
    assert zeroed.head.weight.shape[0] == 11 and not zeroed.head.weight.any() and not zeroed.head.bias.any()
    with pytest.raises(WeightsError, match=r"head\.weight \(7, 24\) instead of \(11, 24\)"):
        hybrid.load(small(num_classes=11), path)
    for key in ("cls", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias", "embedding/bias"):
        lacking = {name: value for name, value in arrays.items() if name != key}
        before = small()
        state = {name: value.clone() for name, value in before.state_dict().items()}
        with pytest.raises((KeyError, WeightsError), match=key.replace("cls", "cls_token")):
            hybrid.load(before, lacking)
        assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())
    with pytest.raises(KeyError, match="'Transformer/encoder_norm/bias'"):
        hybrid.load(small(), {name: value for name, value in arrays.items() if name != "Transformer/encoder_norm/bias"})


def test_bfloat16_arrays_are_read(tmp_path):
    source = small().bfloat16()
    arrays = {key: value.astype(np.float32) for key, value in google_arrays(source.float()).items()}
    raw = {key: (value.view(np.uint32) >> 16).astype(np.uint16).view("V2") for key, value in arrays.items()}
    model = hybrid.load(small(), write(tmp_path / "x.npz", raw))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_first_convolution_for_other_channels(channels, tmp_path):
    timm = pytest.importorskip("timm")
    for words in ({}, {"resnet": (1,), "hybrid_mode": "google"}):
        source = small(**words)
        model = hybrid.load(small(in_chans=channels, **words), write(tmp_path / "x.npz", google_arrays(source)))
        key = f"{STEM}.root.conv.weight" if words else "transformer.embeddings.patch_embeddings.weight"
        expected = timm.models.adapt_input_conv(channels, source.state_dict()[key])
        torch.testing.assert_close(model.state_dict()[key], expected)


# timm as the oracle.

TIMM = dict(patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=40 / 24 + 1e-6, num_classes=7)


def timm_model(**words):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return perturbed(vision_transformer.VisionTransformer(**{**TIMM, "img_size": 32, **words})).eval()


def timm_load(model, path):
    from timm.models.vision_transformer import _load_weights

    with torch.no_grad():
        _load_weights(model, str(path))
    return model


@pytest.mark.parametrize("layout", ["old", "opt", "big_vision", "big_vision_stacked", "siglip"])
@pytest.mark.parametrize("words", [{}, {"img_size": 48}, {"img_size": (24, 40)}, {"in_chans": 1}, {"in_chans": 5}])
def test_vision_transformer_takes_npz_as_timm_does(layout, words, tmp_path):
    spelling, prefix = LAYOUTS[layout]
    path = write(tmp_path / "x.npz", google_arrays(small(), **spelling), prefix)
    theirs = timm_load(timm_model(**words), path)
    ours = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **{**TIMM, "img_size": 32, **words})
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    images = torch.randn(2, theirs.patch_embed.proj.in_channels, *theirs.patch_embed.img_size)
    assert_same(ours.eval()(images), theirs.double()(images.double()))


def test_npz_without_class_token_and_without_head(tmp_path, caplog):
    gap = small(cfg=config(classifier="gap"), variant="google")
    path = write(tmp_path / "x.npz", google_arrays(gap, linen=True, table="pos_embedding"), "params/")
    words = dict(class_token=False, global_pool="avg", fc_norm=False)
    ours = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **{**TIMM, "img_size": 32, **words})
    theirs = timm_load(timm_model(**words), path)
    images = torch.randn(2, 3, 32, 32)
    assert_same(ours.eval()(images), theirs.double()(images.double()))
    assert not caplog.records
    path = write(tmp_path / "y.npz", google_arrays(small()))
    words = {**TIMM, "img_size": 32, "num_classes": 0}
    headless = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **words)
    assert_same(headless.eval()(images), timm_load(timm_model(num_classes=0), path).double()(images.double()))
    assert "head.weight" in caplog.text


def test_class_row_of_the_table_is_folded_or_added(tmp_path):
    """big_vision's tables have no class row; timm's no_embed_class models have no place for one."""
    source, images = small(), torch.randn(2, 3, 32, 32)
    path = write(tmp_path / "x.npz", google_arrays(source))
    folded = vit_fast.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(path), no_embed_class=True, **TIMM, img_size=32
    )
    assert folded.pos_embed.shape[1] == 16
    assert_same(folded.eval()(images), golden(source, images)[0])
    arrays = google_arrays(source, linen=True, table="pos_embedding")
    arrays["cls"] = arrays["cls"] + arrays["pos_embedding"][:, :1]
    arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
    added = hybrid.load(small(), write(tmp_path / "y.npz", arrays, "params/"))
    assert_same(added(images)[0], golden(source, images)[0])


def test_map_head_of_siglip_as_timm_reads_it(tmp_path):
    gap = small(cfg=config(classifier="gap"), variant="google")
    arrays = google_arrays(gap, linen=True, table="pos_embedding")
    generator = np.random.default_rng(0)
    shapes = {"probe": (1, 1, 24), "LayerNorm_0/scale": (24,), "LayerNorm_0/bias": (24,)}
    for word in ("query", "key", "value"):
        shapes |= {f"MultiHeadDotProductAttention_0/{word}/kernel": (24, 3, 8)}
        shapes |= {f"MultiHeadDotProductAttention_0/{word}/bias": (3, 8)}
    shapes |= {
        "MultiHeadDotProductAttention_0/out/kernel": (3, 8, 24),
        "MultiHeadDotProductAttention_0/out/bias": (24,),
    }
    shapes |= {"MlpBlock_0/Dense_0/kernel": (24, 40), "MlpBlock_0/Dense_0/bias": (40,)}
    shapes |= {"MlpBlock_0/Dense_1/kernel": (40, 24), "MlpBlock_0/Dense_1/bias": (24,)}
    arrays |= {f"MAPHead_0/{key}": generator.normal(size=s).astype(np.float32) for key, s in shapes.items()}
    path = write(tmp_path / "x.npz", arrays, "params/img/")
    words = dict(class_token=False, global_pool="map", img_size=32)
    ours = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **{**TIMM, **words})
    theirs, images = timm_load(timm_model(**words), path), torch.randn(2, 3, 32, 32)
    assert_same(ours.eval()(images), theirs.double()(images.double()))


@pytest.mark.parametrize("layers", [(2, 1, 1), ()])
def test_google_hybrid_is_timms(layers, tmp_path):
    timm = pytest.importorskip("timm")
    from timm.layers import HybridEmbed, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem

    cfg = config(resnet=layers, size=(2, 2))
    source = small(cfg=cfg, img_size=64, variant="google")
    with torch.no_grad():
        for key, value in source.state_dict().items():
            if key.startswith(STEM) and value.dim() == 4:
                value.normal_(std=1000)
    path = write(tmp_path / "x.npz", google_arrays(source))
    conv = partial(StdConv2dSame, eps=1e-8)
    if layers:
        stem = dict(num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=conv, stem_chs=32)
        backbone = ResNetV2(layers, channels=(128, 256, 512), **stem)
    else:
        backbone = create_resnetv2_stem(3, 32, stem_type="same", preact=False, conv_layer=conv)
    theirs = timm.models.vision_transformer.VisionTransformer(
        **{**TIMM, "patch_size": 2, "img_size": 64, "act_layer": "gelu_tanh"},
        embed_layer=partial(HybridEmbed, backbone=backbone),
    ).eval()
    timm_load(theirs, path)
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
    ours = hybrid.load(small(cfg=cfg, img_size=64, variant="google"), path).double()
    images = torch.randn(2, 3, 64, 64).double()
    expected = theirs.double()(images)
    assert_same(ours(images)[0], expected, 1e-6)


def test_other_families_refuse_google_files(tmp_path):
    path = write(tmp_path / "x.npz", google_arrays(small()))
    with pytest.raises(WeightsError, match="Linear takes no Google checkpoint"):
        vit_fast.checkpoints.load_state_dict(torch.nn.Linear(2, 2), vit_fast.checkpoints.read_state_dict(path))
    (tmp_path / "broken.npz").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"broken\.npz.*cannot be read"):
        hybrid.load(small(), tmp_path / "broken.npz")
    with pytest.raises(WeightsError, match=r"missing.*unexpected nonsense"):
        hybrid.load(small(), {"nonsense": torch.zeros(1)})


def test_strict_state_dict_round_trip(tmp_path):
    source, model = small(resnet=(1, 1), img_size=32), small(resnet=(1, 1), img_size=32)
    model.load_state_dict(source.state_dict(), strict=True)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(source.state_dict(), tmp_path / "x.safetensors")
    model = hybrid.load(small(resnet=(1, 1), img_size=32), tmp_path / "x.safetensors")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images)[0], source(images)[0])


def test_create_model_resizes_the_table_of_its_own_family(tmp_path):
    words = dict(num_classes=5, config=config())
    torch.save(hybrid.build(img_size=32, **words).state_dict(), tmp_path / "x.pth")
    model = vit_fast.create_model("ViT-B_16", checkpoint_path=str(tmp_path / "x.pth"), img_size=48, **words)
    assert model.grid_size == (6, 6)


# Bad input.


@pytest.mark.parametrize(
    "change, words, message",
    [
        ({"hidden_size": 25}, {}, "num_heads is 3, expected a divisor of hidden_size 25"),
        ({"classifier": "gap"}, {}, "classifier is 'gap', expected 'token'"),
        ({"classifier": "none"}, {"variant": "google"}, "classifier is 'none', expected one of"),
        ({"patches": {}}, {}, "patches has neither size nor grid"),
        ({"patches": {"size": (8, 8, 8)}}, {}, r"patches.size is \(8, 8, 8\), expected"),
        ({"patches": {"size": (64, 64)}}, {}, "img_size is 32×32, expected at least one patch of 64×64"),
        ({"transformer": {"num_heads": 3, "num_layers": 2}}, {}, "config has no transformer.mlp_dim"),
        ({"resnet": {"num_layers": (1, 0), "width_factor": 1}}, {}, r"resnet.num_layers is \(1, 0\)"),
        ({"resnet": {"num_layers": (1,), "width_factor": 0.3}}, {}, "width_factor is 0.3"),
        ({}, {"variant": "torch"}, "variant is 'torch', expected one of"),
        ({}, {"hybrid_mode": "torch"}, "hybrid_mode is 'torch', expected one of"),
        ({}, {"activation": "relu"}, "activation is 'relu', expected one of"),
        ({}, {"img_size": 0}, "img_size is 0, expected"),
        ({}, {"num_classes": -1}, "num_classes is -1, expected"),
        ({}, {"config": "ViT-X"}, "config is 'ViT-X', expected one of"),
    ],
)
def test_bad_words(change, words, message):
    words = {"config": config() | change, "img_size": 32, **words}
    with pytest.raises(ValueError, match=f"vit_fast.systems.hybrid: .*{message}"):
        hybrid.build(**words)


@pytest.mark.parametrize("shape", [(2, 3, 35, 35), (2, 3, 16, 64), (2, 1, 32, 32), (3, 32, 32)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"vit_fast.systems.hybrid: images (are|have) .*expected"):
        small()(torch.randn(shape))


def test_bad_dtypes_and_labels():
    model, images = small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match="images are ndarray"):
        model(images.numpy())
    with pytest.raises(ValueError, match=r"images have dtype torch\.uint8"):
        model(images.to(torch.uint8))
    with pytest.raises(ValueError, match=r"labels have shape \[3\] .*expected 2 integers"):
        model(images, torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="labels are list"):
        model(images, [0, 1])
    with pytest.raises(ValueError, match="num_classes is 0"):
        small(num_classes=0)(images, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a config with a resnet"):
        model.set_hybrid_mode("google")


@pytest.mark.interp
def test_interpreted_kernels_give_what_torch_gives():
    model, images = small(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        logits, _ = model(images)
        with vit_fast.backend("torch"):
            eager, _ = model(images)
    assert any(row.backend == "triton" for row in vit_fast.explain(model))
    assert_within_budget(logits, eager, golden(model, images)[0], kind="model")
