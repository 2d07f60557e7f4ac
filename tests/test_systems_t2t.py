"""T2T-ViT against formulas in float64: soft splits, token transformer, performer, sinusoid table, backbone, weights.

Tolerances: 2e-6·(1 + max|y|) in float32 (the path is eager's), 1e-12 in float64, 16 bits by the error budget.
"""

import math
import re
from functools import partial

import family_formulas as formulas
import pytest
import torch
from budget import assert_within_budget
from torch import nn

import vit_fast
from vit_fast import WeightsError
from vit_fast.systems import t2t
from vit_fast.systems.soft_split import soft_split

SMALL = dict(
    img_size=(32, 48), in_chans=2, num_classes=5, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5, token_dim=16
)
COUNTS = {
    "t2t_vit_7": (4_310_222, 4_255_694),
    "t2t_vit_10": (5_889_230, 5_834_702),
    "t2t_vit_12": (6_941_902, 6_887_374),
    "t2t_vit_14": (21_545_550, 21_465_806),
    "t2t_vit_19": (39_177_422, 39_085_070),
    "t2t_vit_24": (64_105_934, 64_000_974),
    "t2t_vit_t_14": (21_541_070, 21_465_422),
    "t2t_vit_t_19": (39_172_942, 39_084_686),
    "t2t_vit_t_24": (64_101_454, 64_000_590),
    "t2t_vit_14_resnext": (21_545_550, 21_465_806),
    "t2t_vit_14_wide": (25_156_302, 25_000_910),
}


def performer(x, state, epsilon=1e-8, order="kqv"):
    split = dict(zip(order, formulas.linear(formulas.layer_norm(x, state, "norm1", 1e-5), state, "kqv").chunk(3, -1)))
    k, q, v = (split[name] if x.dtype == torch.float64 else split[name].float() for name in "kqv")
    w = state["w"].to(k.dtype)

    def phi(u):
        return torch.exp(torch.einsum("bti,mi->btm", u, w) - (u * u).sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])

    kp, qp = phi(k), phi(q)
    denominator = torch.einsum("btm,bm->bt", qp, kp.sum(1))[..., None]
    y = torch.einsum("btm,bmc->btc", qp, torch.einsum("bsm,bsc->bmc", kp, v)) / (denominator + epsilon)
    y = split["v"] + formulas.linear(y.to(x.dtype), state, "proj")
    hidden = formulas.gelu(formulas.linear(formulas.layer_norm(y, state, "norm2", 1e-5), state, "mlp.0"))
    return y + formulas.linear(hidden, state, "mlp.2")


def mlp(x, state):
    return formulas.linear(formulas.gelu(formulas.linear(x, state, "mlp.fc1")), state, "mlp.fc2")


def transformer(x, state, scale=None, skip=True):
    q, k, v = formulas.linear(formulas.layer_norm(x, state, "norm1", 1e-5), state, "attn.qkv").chunk(3, dim=-1)
    y = formulas.linear(formulas.attention(q, k, v, 1, scale or x.shape[-1] ** -0.5), state, "attn.proj")
    y = v + y if skip else y
    return y + mlp(formulas.layer_norm(y, state, "norm2", 1e-5), state)


def block(x, state, heads, scale=None, eps=1e-5):
    q, k, v = formulas.linear(formulas.layer_norm(x, state, "norm1", eps), state, "attn.qkv").chunk(3, dim=-1)
    scale = scale or (x.shape[-1] // heads) ** -0.5
    x = x + formulas.linear(formulas.attention(q, k, v, heads, scale), state, "attn.proj")
    return x + mlp(formulas.layer_norm(x, state, "norm2", eps), state)


def module(tokens_layer, images, state, rows=(8, 4)):
    x = tokens_layer(formulas.windows(images, 7, 4, 2), formulas.under(state, "attention1."))
    x = tokens_layer(formulas.windows(formulas.to_image(x, rows[0]), 3, 2, 1), formulas.under(state, "attention2."))
    return formulas.linear(formulas.windows(formulas.to_image(x, rows[1]), 3, 2, 1), state, "project")


def vit(tokens_layer, heads=3, depth=2, rows=(8, 4), **options):
    def run(state, images):
        x = module(tokens_layer, images, formulas.under(state, "tokens_to_token."), rows)
        x = torch.cat([state["cls_token"].expand(x.shape[0], -1, -1), x], dim=1) + state["pos_embed"]
        for i in range(depth):
            x = block(x, formulas.under(state, f"blocks.{i}."), heads, **options)
        x = formulas.layer_norm(x, state, "norm", options.get("eps", 1e-5))[:, 0]
        return formulas.linear(x, state, "head") if "head.weight" in state else x

    return run


def prepare(model, scale=0.1):
    """Perturbed, with short keys and queries (|u|² about 1): φ of long ones vanishes, and the performer with it."""
    formulas.perturb(model, scale)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, t2t.Token_performer):
                rows = layer.kqv.weight[: 2 * layer.emb]
                rows.div_(rows.norm(dim=1, keepdim=True) * layer.emb**0.5)
                layer.kqv.bias[: 2 * layer.emb].mul_(0.3)
    return model


assert_model_matches = partial(formulas.assert_model_matches, prepare=prepare)
LAYERS = {"performer": performer, "transformer": transformer}


@pytest.mark.parametrize("tokens_type", LAYERS)
@pytest.mark.parametrize(
    "options", [{}, dict(qkv_bias=True, qk_scale=0.4, norm_layer=partial(nn.LayerNorm, eps=1e-3)), dict(num_classes=0)]
)
def test_model(tokens_type, options):
    model = t2t.build(**{**SMALL, **options}, tokens_type=tokens_type)
    traits = dict(scale=0.4, eps=1e-3) if "qk_scale" in options else {}
    assert_model_matches(model, vit(LAYERS[tokens_type], **traits), torch.randn(2, 2, 32, 48))


def test_size_that_is_no_multiple_of_16():
    """35×54: 9×13, 5×7, 3×4 tokens; the table is sized from them."""
    model = t2t.build(**dict(SMALL, img_size=[35, 54]))
    assert model.tokens_to_token.grids == [(9, 13), (5, 7), (3, 4)] and model.pos_embed.shape == (1, 13, 24)
    assert_model_matches(model, vit(performer, rows=(9, 5)), torch.randn(2, 2, 35, 54))


def test_grids():
    with torch.device("meta"):
        for size, sides in ((224, (56, 28, 14)), (384, (96, 48, 24)), (200, (50, 25, 13))):
            assert t2t.T2T_module(size).grids == [(side, side) for side in sides]


@pytest.mark.parametrize("dim, in_dim", [(147, 64), (10, 6)])
def test_token_layers(dim, in_dim):
    x = torch.randn(2, 30, dim)
    assert_model_matches(t2t.Token_transformer(dim, in_dim), lambda s, x: transformer(x, s), x)
    assert_model_matches(t2t.Token_performer(dim, in_dim), lambda s, x: performer(x, s), x)
    model = t2t.Token_transformer(dim, in_dim, mlp_ratio=1.5, qkv_bias=True, qk_scale=0.2)
    assert_model_matches(model, lambda s, x: transformer(x, s, 0.2), x)
    model = t2t.Token_performer(dim, in_dim, head_cnt=2, kernel_ratio=0.75)
    assert model.w.shape == (int(in_dim * 2 * 0.75), in_dim * 2)
    assert_model_matches(model, lambda s, x: performer(x, s), x)


@pytest.mark.parametrize(
    "layer, trap",
    [
        (t2t.Token_transformer, partial(transformer, scale=64**-0.5)),
        (t2t.Token_transformer, partial(transformer, skip=False)),
        (t2t.Token_performer, partial(performer, order="qkv")),
        (t2t.Token_performer, partial(performer, epsilon=0.1)),
    ],
)
def test_formulas_can_fail(layer, trap):
    """What is easily got wrong changes the output by far more than the tolerance."""
    model = prepare(layer(147, 64)).eval()
    x = torch.randn(1, 30, 147)
    right = LAYERS["transformer" if layer is t2t.Token_transformer else "performer"](
        x.double(), formulas.weights(model)
    )
    formulas.assert_close(model(x), right, 5e-6)
    assert (trap(x.double(), formulas.weights(model)) - right).abs().max() > 1e-3


@pytest.mark.parametrize("kernel, stride, padding", [(7, 4, 2), (3, 2, 1), (4, 4, 0), (31, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_soft_split(kernel, stride, padding, dtype):
    images = torch.randn(2, 3, 34, 45).to(dtype)
    tokens = soft_split(images, kernel, stride, padding)
    assert tokens.is_contiguous() and torch.equal(tokens, formulas.windows(images, kernel, stride, padding))
    unfolded = nn.functional.unfold(images, kernel, stride=stride, padding=padding).transpose(1, 2)
    assert torch.equal(tokens, unfolded)


def test_performer_weight():
    """Rows orthogonal, of length √m: w wᵀ = m·I; frozen, in the state_dict, not reinitialised by the model."""
    model = t2t.build(**SMALL)
    for w in (model.tokens_to_token.attention1.w, model.tokens_to_token.attention2.w):
        assert w.shape == (8, 16) and not w.requires_grad
        assert (w @ w.T - 8 * torch.eye(8)).abs().max() < 1e-5
    assert "tokens_to_token.attention1.w" in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_performer_sums_are_float32(dtype):
    """Tokens along a row of w: φ reaches e^(m/2)/√m = 1.6e6 and D 8e15, far above float16's 65504."""
    w = torch.linalg.qr(torch.randn(64, 64))[0][:32] * math.sqrt(32)
    k = w[:1].repeat(1, 3136, 1).view(1, 3136, 64) + torch.randn(1, 3136, 64) * 0.05
    q, v = k[:, :50], torch.randn(1, 3136, 64)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    actual = t2t.performer_attention(q, k, v, w.to(dtype))
    wanted = t2t.performer_attention(*(t.double() for t in (q, k, v)), w.to(dtype).double())
    assert actual.dtype == dtype and actual.isfinite().all()
    assert (actual.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = t2t.performer_attention(q.float(), k.float(), v.float(), w.to(dtype).float())
    assert torch.equal(again, t2t.performer_attention(q.float(), k.float(), v.float(), w.to(dtype).float()))


def test_performer_underflow():
    """φ vanishes for long keys and queries: D → 0 and y → 0, through the place of the 1e-8."""
    w = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0][:8] * math.sqrt(8)
    k, q, v = (torch.randn(1, 5, 16, dtype=torch.float64) for _ in range(3))
    assert t2t.performer_attention(q * 100, k * 100, v, w).abs().max() == 0
    for q, k in [(q * size, k * size) for size in (1.0, 2.2)]:
        phi = [[math.exp((w[r] @ u).item() - 0.5 * (u @ u).item()) / math.sqrt(8) for r in range(8)] for u in k[0]]
        psi = [math.exp((w[r] @ q[0, 3]).item() - 0.5 * (q[0, 3] @ q[0, 3]).item()) / math.sqrt(8) for r in range(8)]
        share = torch.tensor([sum(a * b for a, b in zip(psi, row)) for row in phi], dtype=torch.float64)
        wanted = (share @ v[0]) / (share.sum() + 1e-8)
        actual = t2t.performer_attention(q, k, v, w)[0, 3]
        assert (actual - wanted).abs().max() <= 1e-12 * (1 + wanted.abs().max())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert name in vit_fast.list_models("t2t*")
    with torch.device("meta"):
        model = vit_fast.create_model(name)
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert (sum(p.numel() for p in parameters), trainable) == COUNTS[name]
    assert set(COUNTS) == set(t2t.PRESETS)


def test_keys():
    keys = set(t2t.build(**SMALL).state_dict())
    norms, linear = ("weight", "bias"), ("weight", "bias")
    token = {f"{layer}.{leaf}" for layer in ("norm1", "norm2", "kqv", "proj", "mlp.0", "mlp.2") for leaf in linear} | {
        "w"
    }
    blocks = {f"{norm}.{leaf}" for norm in ("norm1", "norm2") for leaf in norms} | {"attn.qkv.weight"}
    blocks |= {f"{layer}.{leaf}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2") for leaf in linear}
    wanted = {f"tokens_to_token.attention{i}.{key}" for i in (1, 2) for key in token}
    wanted |= {f"blocks.{i}.{key}" for i in (0, 1) for key in blocks}
    wanted |= {f"{layer}.{leaf}" for layer in ("tokens_to_token.project", "norm", "head") for leaf in linear}
    assert keys == wanted | {"cls_token", "pos_embed"}
    token = {f"{layer}.{leaf}" for layer in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for leaf in linear}
    layer = t2t.build(**SMALL, tokens_type="transformer").tokens_to_token.attention1
    assert set(layer.state_dict()) == token | {"attn.qkv.weight"}


def test_table_and_initialisation():
    model = t2t.build(**dict(SMALL, embed_dim=96))
    assert torch.equal(model.pos_embed, formulas.sinusoid(7, 96)) and not model.pos_embed.requires_grad
    assert 0.01 < model.cls_token.std() < 0.03
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.013 < module.weight.std() < 0.027 and (module.bias is None or not module.bias.any())
    assert model.no_weight_decay() == {"cls_token"}
    assert model.get_classifier() is model.head
    model.reset_classifier(11)
    assert model(torch.randn(1, 2, 32, 48)).shape == (1, 11)
    model.reset_classifier(0)
    images = torch.randn(1, 2, 32, 48)
    assert torch.equal(model.eval()(images), model.forward_features(images))


def test_train_mode():
    """Without drop rates the token transformer's model is the same in train mode; the performer's dropouts stay."""
    images = torch.randn(2, 2, 32, 48)
    model = prepare(t2t.build(**SMALL, tokens_type="transformer"))
    assert torch.equal(model.train()(images), model.eval()(images))
    model = prepare(t2t.build(**SMALL))
    assert not torch.equal(model.train()(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    rates = [block.drop_path for block in t2t.build(**dict(SMALL, depth=3), drop_path_rate=0.2).blocks]
    assert rates == [0.0, 0.1, 0.2]
    assert t2t.build(**dict(SMALL, depth=1), drop_path_rate=0.2).blocks[0].drop_path == 0.0


def test_dropout_places(monkeypatch):
    calls, shipped = [], nn.functional.scaled_dot_product_attention

    def attention(*args, dropout_p=0.0, **kwargs):
        calls.append(("probabilities", dropout_p))
        return shipped(*args, dropout_p=dropout_p, **kwargs)

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p:
            calls.append((tuple(x.shape[1:]), p))
        return x

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nn.functional, "dropout", dropout)
    images = torch.randn(2, 2, 32, 48)
    with vit_fast.backend("torch"):
        t2t.build(**dict(SMALL, depth=1), drop_rate=0.2, attn_drop_rate=0.3).train()(images)
        backbone = [((7, 24), 0.2), ("probabilities", 0.3), ((7, 24), 0.2), ((7, 36), 0.2), ((7, 24), 0.2)]
        assert calls == [((96, 16), 0.1)] * 2 + [((24, 16), 0.1)] * 2 + backbone
        calls.clear()
        t2t.Token_transformer(10, 6, drop=0.2, attn_drop=0.3).train()(torch.randn(2, 9, 10))
        assert calls == [("probabilities", 0.3), ((9, 6), 0.2), ((9, 6), 0.2), ((9, 6), 0.2)]


def test_drop_path_spares_the_token_attention():
    """y = v + proj(...) always; only the MLP branch is dropped, a whole sample at once, kept ones scaled."""
    model = prepare(t2t.Token_transformer(10, 6, drop_path=0.5))
    x = torch.randn(64, 9, 10)
    state = formulas.weights(model)
    q, k, v = formulas.linear(formulas.layer_norm(x.double(), state, "norm1", 1e-5), state, "attn.qkv").chunk(3, -1)
    y = v + formulas.linear(formulas.attention(q, k, v, 1, 10**-0.5), state, "attn.proj")
    branch = mlp(formulas.layer_norm(y, state, "norm2", 1e-5), state)
    with torch.no_grad():
        out = model.train()(x).double()
    kept = ((out - y - 2 * branch).abs().amax((1, 2)) < 1e-5).sum()
    dropped = ((out - y).abs().amax((1, 2)) < 1e-5).sum()
    assert kept + dropped == 64 and 16 < kept < 48


@pytest.mark.parametrize("tokens_type", LAYERS)
def test_laws(tokens_type):
    model = prepare(t2t.build(**SMALL, tokens_type=tokens_type)).eval()
    formulas.assert_batch_laws(model, torch.randn(3, 2, 32, 48))


def test_load(tmp_path, caplog):
    source = prepare(t2t.build(**SMALL)).eval()
    images = torch.randn(2, 2, 32, 48)
    state = source.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    ema = {"epoch": 3, "state_dict": other, "state_dict_ema": {f"module.{key}": value for key, value in state.items()}}
    torch.save(ema, tmp_path / "checkpoint.pth.tar")
    for given in (state, ema, tmp_path / "checkpoint.pth.tar"):
        assert torch.equal(t2t.load(t2t.build(**SMALL), given).eval()(images), source(images))
    assert not caplog.records

    for classes in (9, 0):
        model = t2t.build(**dict(SMALL, num_classes=classes)).eval()
        head = {key: value.clone() for key, value in model.head.state_dict().items()}
        t2t.load(model, state)
        assert f"the file's head has 5 classes, the model {classes}" in caplog.text
        assert all(torch.equal(value, head[key]) for key, value in model.head.state_dict().items())
        assert torch.equal(model.forward_features(images), source.forward_features(images))

    with pytest.raises(WeightsError, match="missing cls_token"):
        t2t.load(model, {key: value for key, value in state.items() if key != "cls_token"})
    with pytest.raises(WeightsError, match=r"wrong shape blocks\.0"):
        t2t.load(t2t.build(**dict(SMALL, mlp_ratio=2.0)), state)
    with pytest.raises(WeightsError, match="does not exist"):
        t2t.load(model, tmp_path / "nothing.pth")


def test_load_other_grid():
    """R4: bicubic, corners not aligned, one prefix row; or the table of the new grid."""
    state = prepare(t2t.build(**dict(SMALL, img_size=64))).state_dict()
    table = state["pos_embed"]
    grid = table[:, 1:].transpose(1, 2).reshape(1, 24, 4, 4)
    grid = nn.functional.interpolate(grid, size=(2, 3), mode="bicubic", align_corners=False)
    model = t2t.load(t2t.build(**SMALL), state)
    wanted = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(model.pos_embed, wanted) and not model.pos_embed.requires_grad
    assert torch.equal(t2t.load(model, state, pos_embed="recompute").pos_embed, formulas.sinusoid(7, 24))
    # 2×8 holds as many rows as 4×4 and is another grid.
    wide = t2t.build(**dict(SMALL, img_size=(32, 128)))
    assert torch.equal(t2t.load(wide, state).pos_embed, table)
    assert not torch.equal(t2t.load(wide, state, old_grid=(4, 4)).pos_embed, table)
    with pytest.raises(WeightsError, match="expected 1 prefix rows and a grid of 3×4"):
        t2t.load(model, state, old_grid=(3, 4))
    with pytest.raises(ValueError, match="policy is 'R9'"):
        t2t.load(model, state, pos_embed="R9")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens_type", LAYERS)
def test_16_bits(dtype, tokens_type):
    model = t2t.build(**dict(SMALL, num_classes=64), tokens_type=tokens_type)
    model = prepare(model, 0.05).eval().to(dtype)
    images = torch.randn(6, 2, 32, 48).to(dtype)
    run = vit(LAYERS[tokens_type])
    eager = run(formulas.weights(model, dtype), images)
    assert_within_budget(model(images), eager, run(formulas.weights(model), images.double()), kind="model")


@pytest.mark.parametrize("tokens_type", LAYERS)
def test_autocast(tokens_type):
    model = prepare(t2t.build(**SMALL, tokens_type=tokens_type), 0.05).eval()
    images = torch.randn(2, 2, 32, 48)
    wanted = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(images)
    assert (actual.float() - wanted).abs().max() <= 0.03 * wanted.abs().max()


@pytest.mark.parametrize("tokens_type", LAYERS)
def test_compile(tokens_type):
    model = t2t.build(**dict(SMALL, depth=1), tokens_type=tokens_type).eval()
    images = torch.randn(2, 2, 32, 48)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    formulas.assert_close(compiled(images), model(images), 1e-6)


def test_explain():
    rows = vit_fast.explain(t2t.build(**SMALL))
    assert {row.operation for row in rows if row.module.startswith("tokens_to_token")} == {
        "layer_norm_linear", "linear_residual", "layernorm_mlp"
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens_type="convolution"), "tokens_type is 'convolution', expected one of 'performer', 'transformer'"),
        (dict(num_heads=5), "num_heads is 5, expected a divisor of embed_dim 24"),
        (dict(img_size=2), "img_size is 2, expected 3 pixels a side or more"),
        (dict(img_size=(32, 48, 64)), "img_size is (32, 48, 64), expected an int or a pair of ints"),
        (dict(norm_layer=nn.BatchNorm1d), "expected a LayerNorm class"),
        (dict(drop_path_rate=1.0), "drop_path_rate is 1.0, expected 0 ≤ rate < 1"),
        (dict(depth=0), "depth is 0, expected"),
        (dict(token_dim=1), "kernel_ratio is 0.5, expected 1 or more: one feature of 1"),
    ],
)
def test_bad_words(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        t2t.build(**{**SMALL, **change})


def test_bad_inputs():
    with pytest.raises(ValueError, match="num_heads is 2, expected 1: a token transformer has one head"):
        t2t.Token_transformer(8, 8, num_heads=2)
    model = t2t.build(**SMALL)
    for shape, message in (
        ((1, 2, 48, 32), "images are 48×32, expected 32×48"),
        ((1, 3, 32, 48), "images have 3 channels, expected 2"),
        ((2, 32, 48), "images have 3 dimensions, expected 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(shape))
    with pytest.raises(ValueError, match=r"images have dtype torch\.uint8"):
        model(torch.zeros(1, 2, 32, 48, dtype=torch.uint8))


@pytest.mark.interp
@pytest.mark.parametrize("tokens_type", LAYERS)
def test_interpreted(tokens_type):
    words = dict(SMALL, depth=1, img_size=(16, 20), tokens_type=tokens_type)
    model = prepare(t2t.build(**words)).eval()
    formulas.assert_backends_agree(model, torch.randn(1, 2, 16, 20))
