"""The from-scratch ViT: against formulas in float64 and against torch's own TransformerEncoder, which it imitates.

Tolerances: 2e-6·(1 + max|y|) in float32 (the path is eager's), 1e-12 in float64, 16 bits by the error budget.
"""

import re

import family_formulas as formulas
import pytest
import torch
from budget import assert_within_budget
from torch import nn

import vit_fast
from vit_fast import WeightsError
from vit_fast.systems import scratch

SMALL = dict(
    image_h=16, image_w=24, ic=3, patch_size=8, model_dim=24, max_num_token=9, num_classes=7, nhead=3, num_layers=2,
    dim_feedforward=40,
)  # fmt: skip


def _layer(x, state, heads, act, pre_norm):
    def attend(y):
        q, k, v = (
            y @ w.T + b
            for w, b in zip(state["self_attn.in_proj_weight"].chunk(3), state["self_attn.in_proj_bias"].chunk(3))
        )
        out = formulas.attention(q, k, v, heads, (x.shape[-1] // heads) ** -0.5)
        return formulas.linear(out, state, "self_attn.out_proj")

    def feed(y):
        return formulas.linear(act(formulas.linear(y, state, "linear1")), state, "linear2")

    if pre_norm:
        x = x + attend(formulas.layer_norm(x, state, "norm1", 1e-5))
        return x + feed(formulas.layer_norm(x, state, "norm2", 1e-5))
    x = formulas.layer_norm(x + attend(x), state, "norm1", 1e-5)
    return formulas.layer_norm(x + feed(x), state, "norm2", 1e-5)


def formula(heads=3, patch=8, layers=2, act=torch.relu, pre_norm=False, literal=False):
    def run(state, images):
        x = formulas.windows(images, patch, patch, 0) @ state["weight"]
        if "bias" in state:
            x = x + state["bias"]
        cls = state["cls_token_embedding"]
        x = torch.cat([cls.expand(images.shape[0], -1, -1), x], dim=1)
        x = x + state["position_embedding_table"][: x.shape[1]]
        if literal:
            x = x.transpose(0, 1)
        for i in range(layers):
            x = _layer(x, formulas.under(state, f"transformer_encoder.layers.{i}."), heads, act, pre_norm)
        if "transformer_encoder.norm.weight" in state:
            x = formulas.layer_norm(x, state, "transformer_encoder.norm", 1e-5)
        if literal:
            x = x.transpose(0, 1)
        return formulas.linear(x[:, 0], state, "linear_layer")

    return run


@pytest.mark.parametrize("embed", ["conv", "naive"])
@pytest.mark.parametrize("options", [{}, dict(pre_norm=True, patch_bias=True, final_norm=True, activation="gelu")])
def test_formula(embed, options):
    act = formulas.gelu if options else torch.relu
    model = scratch.build(**SMALL, embed=embed, **options)
    run = formula(act=act, pre_norm=bool(options))
    images = torch.randn(3, 3, 16, 24)
    if options:
        formulas.assert_model_matches(model, run, images)
        return
    # Rows of the table beyond the tokens take no part.
    formulas.perturb(model).eval()
    formulas.assert_close(model(images), run(formulas.weights(model), images.double()), 2e-6)
    model(images).sum().backward()
    assert not model.position_embedding_table.grad[7:].any()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_document_numbers():
    """8×8, P 4, width 8, head size 1, 6 layers, table of 16 rows; torch's defaults inside the layers."""
    model = scratch.build()
    assert model.weight.shape == (48, 8) and model.position_embedding_table.shape == (16, 8)
    layer = model.transformer_encoder.layers[0]
    assert (layer.linear1.out_features, layer.dropout.p, layer.norm1.eps) == (2048, 0.1, 1e-5)
    first, last = (model.transformer_encoder.layers[i].state_dict() for i in (0, 5))
    assert all(torch.equal(first[key], last[key]) for key in first)
    formulas.perturb(model).eval()
    images = torch.randn(2, 3, 8, 8)
    run = formula(heads=8, patch=4, layers=6)
    formulas.assert_close(model(images), run(formulas.weights(model), images.double()), 2e-6)


@pytest.mark.parametrize("literal", [False, True])
def test_torch_encoder_is_the_oracle(literal):
    """Same keys as nn.TransformerEncoder; batch-first by intent, sequence-first (over the batch) literally."""
    words = dict(SMALL, compat="literal", bs=3) if literal else SMALL
    model = formulas.perturb(scratch.build(**words)).eval()
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=not literal)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    encoder.load_state_dict(formulas.under(model.state_dict(), "transformer_encoder."))
    images = torch.randn(3, 3, 16, 24)
    x = nn.functional.unfold(images, 8, stride=8).transpose(1, 2) @ model.weight
    x = torch.cat([model.cls_token_embedding.expand(3, -1, -1), x], 1) + model.position_embedding_table[:7]
    formulas.assert_close(model(images), model.linear_layer(encoder(x)[:, 0]), 2e-6)


def test_literal_ignores_the_image_and_the_default_does_not():
    literal = formulas.perturb(scratch.build(**SMALL, compat="literal", bs=3)).eval()
    assert literal.cls_token_embedding.shape == (3, 1, 24)
    images = torch.randn(3, 3, 16, 24)
    assert torch.equal(literal(images), literal(torch.randn(3, 3, 16, 24)))
    golden = formula(literal=True)(formulas.weights(literal), images.double())
    formulas.assert_close(literal(images), golden, 2e-6)
    formulas.assert_batch_laws(formulas.perturb(scratch.build(**SMALL)).eval(), images)
    with pytest.raises(ValueError, match="batch size 2, expected 3"):
        literal(images[:2])


def test_loss_alone_with_labels():
    model = scratch.build(**SMALL).eval()
    images, label = torch.randn(3, 3, 16, 24), torch.tensor([[6], [0], [3]])
    log = model(images).double().log_softmax(-1)
    wanted = -(log[0, 6] + log[1, 0] + log[2, 3]) / 3
    loss = model(images, label)
    assert loss.shape == () and abs(loss.item() - wanted.item()) < 1e-6
    with pytest.raises(ValueError, match=r"label is \[2\], expected a tensor \[3\]"):
        model(images, label[:2, 0])


def test_embeddings_agree():
    images, weight = torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.randn(48, 5, dtype=torch.float64)
    naive = scratch.image2emb_naive(images, 4, weight)
    kernel = weight.T.reshape(5, 3, 4, 4)
    formulas.assert_close(scratch.image2emb_conv(images, kernel, 4), naive, 1e-14)
    formulas.assert_close(naive, formulas.windows(images, 4, 4, 0) @ weight, 1e-14)


def test_dropout_only_in_training():
    model = scratch.build(**SMALL, dropout=0.0).train()
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(model(images), model.eval()(images))
    model = scratch.build(**SMALL).train()
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_dropout_places(monkeypatch):
    """As torch's layer: probabilities, after out_proj, after the activation, after linear2."""
    calls, shipped = [], nn.functional.scaled_dot_product_attention

    def attention(*args, dropout_p=0.0, **kwargs):
        calls.append(("probabilities", dropout_p))
        return shipped(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p=0.5, *_: calls.append((tuple(x.shape), p)) or x)
    words = dict(SMALL, num_layers=1, dropout=0.25)
    with vit_fast.backend("torch"):
        scratch.build(**words).train()(torch.randn(2, 3, 16, 24))
    assert calls == [("probabilities", 0.25), ((2, 7, 24), 0.25), ((2, 7, 40), 0.25), ((2, 7, 24), 0.25)]


def test_other_image_sizes():
    model = formulas.perturb(scratch.build(**SMALL, dynamic_img_size=True, pos_embed_policy="R2")).eval()
    images = torch.randn(2, 3, 32, 40)
    table = model.position_embedding_table.detach()
    grid = table[1:7].T.reshape(1, 24, 2, 3)
    grid = nn.functional.interpolate(grid, size=(4, 5), mode="bilinear", align_corners=False)
    state = formulas.weights(model)
    state["position_embedding_table"] = torch.cat([table[:1], grid.reshape(24, 20).T]).double()
    formulas.assert_close(model(images), formula()(state, images.double()), 2e-6)


def test_load(tmp_path):
    source = formulas.perturb(scratch.build(**SMALL))
    images = torch.randn(2, 3, 16, 24)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}
    torch.save(wrapped, tmp_path / "weights.pth")
    for given in (wrapped, tmp_path / "weights.pth", str(tmp_path / "weights.pth")):
        model = scratch.load(scratch.build(**SMALL), given)
        assert torch.equal(model.eval()(images), source.eval()(images))
    larger = scratch.build(**dict(SMALL, image_h=32, image_w=32, max_num_token=20))
    initial = larger.position_embedding_table.detach().clone()
    scratch.load(larger, wrapped, old_grid=(2, 3))
    table = source.position_embedding_table.detach()
    resized = vit_fast.resize_pos_embed(table[:7], (2, 3), (4, 4), "R4", 1)
    assert torch.equal(larger.position_embedding_table[:17], resized)
    assert torch.equal(larger.position_embedding_table[17:], initial[17:])
    with pytest.raises(WeightsError, match="9 rows, expected 20, or pass old_grid"):
        scratch.load(scratch.build(**dict(SMALL, max_num_token=20)), wrapped, old_grid=(3, 4))
    with pytest.raises(WeightsError, match=r"missing linear_layer\.bias"):
        scratch.load(model, {k: v for k, v in source.state_dict().items() if k != "linear_layer.bias"})


def test_names():
    assert "vit_from_scratch" in vit_fast.list_models()
    assert vit_fast.create_model("vit_from_scratch", num_classes=4)(torch.randn(1, 3, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    model = formulas.perturb(scratch.build(**dict(SMALL, num_classes=64), pre_norm=True)).eval().to(dtype)
    images = torch.randn(8, 3, 16, 24).to(dtype)
    run = formula(pre_norm=True)
    eager = run(formulas.weights(model, dtype), images)
    assert_within_budget(model(images), eager, run(formulas.weights(model), images.double()), kind="model")


@pytest.mark.parametrize("compat", [None, "literal"])
def test_compile(compat):
    model = scratch.build(**SMALL, compat=compat, bs=2).eval()
    images = torch.randn(2, 3, 16, 24)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    formulas.assert_close(compiled(images), model(images), 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_h=20), "image_h is 20, expected a multiple of patch_size 8"),
        (dict(nhead=5), "nhead is 5, expected a divisor of model_dim 24"),
        (dict(max_num_token=6), "max_num_token is 6, expected 7 or more: one class token and 2×3 patches"),
        (dict(embed="linear"), "embed is 'linear', expected one of 'conv', 'naive'"),
        (dict(compat="exact"), "compat is 'exact', expected one of None, 'literal'"),
        (dict(dropout=1.0), "dropout is 1.0, expected 0 ≤ rate < 1"),
        (dict(activation="swiglu"), "activation is 'swiglu'"),
        (dict(num_layers=0), "num_layers is 0, expected a whole number, 1 or more"),
    ],
)
def test_bad_words(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scratch.build(**{**SMALL, **change})


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 16, 16), "images are 16×16, expected 16×24"),
        ((1, 1, 16, 24), "images have 1 channels, expected 3"),
        ((3, 16, 24), "images have 3 dimensions, expected 4"),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        scratch.build(**SMALL)(torch.randn(shape))


def test_bad_types():
    with pytest.raises(TypeError, match="patch_size is '8', expected an int"):
        scratch.build(**{**SMALL, "patch_size": "8"})
    with pytest.raises(ValueError, match="images are 20×24, expected multiples of the patch 8×8"):
        scratch.build(**SMALL, dynamic_img_size=True)(torch.randn(1, 3, 20, 24))


@pytest.mark.interp
@pytest.mark.parametrize("pre_norm", [False, True])
def test_interpreted(pre_norm):
    model = formulas.perturb(scratch.build(**SMALL, pre_norm=pre_norm)).eval()
    formulas.assert_backends_agree(model, torch.randn(2, 3, 16, 24))
