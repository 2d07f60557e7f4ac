"""nn.TransformerEncoderLayer on the fused operations: pre-norm and post-norm, its masks, its own fast path.

``test_optimize.py`` runs a pre-norm model through everything that holds for all libraries.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.budget import assert_within_budget
from support.library_models import PACKED, encoder_vit, fused
from torch import nn

import vit_fast

ORDERS = {
    "pre-norm": dict(norm_first=True, batch_first=True),
    "post-norm": dict(norm_first=False, batch_first=True),
    "pre-norm, sequence first": dict(norm_first=True, batch_first=False),
    "post-norm, sequence first": dict(norm_first=False, batch_first=False),
}


def build(order="pre-norm", dtype=torch.float32, heads=3, **arguments):
    layer = nn.TransformerEncoderLayer(
        48, heads, 96, **dict(dropout=0.0, activation="gelu") | ORDERS[order] | arguments
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer.eval().to(dtype)


def run(layer, *inputs, **masks):
    """(output, operations that ran fused, reasons where none did)."""
    with vit_fast.backends.recording() as choices:
        result = layer(*inputs, **masks)
    return result, fused(choices), [reasons for _, backend, reasons in choices if backend == "library"]


def close(actual, expected):
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grad", (True, False))  # without gradients, torch has a fast path of its own
@pytest.mark.parametrize("heads", (3, 4))  # which is for even numbers of heads
@pytest.mark.parametrize("order", ORDERS)
def test_a_layer(order, heads, grad):
    layer, x = build(order, heads=heads), torch.randn(2, 7, 48)
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        vit_fast.optimize(layer, strict=True)
        actual, ran, _ = run(layer, x)
        assert "attention" in ran
        close(actual, expected)
        assert torch.equal(vit_fast.restore(layer)(x), expected)


OPTIONS = (
    dict(bias=False),
    dict(activation="relu"),
    dict(activation=F.gelu),
    dict(activation=nn.ReLU()),
    dict(activation=F.silu),
    dict(layer_norm_eps=0.1),
)


@pytest.mark.parametrize("arguments", OPTIONS)
@pytest.mark.parametrize("order", ("pre-norm", "post-norm"))
def test_options_of_a_layer(order, arguments):
    layer, x = build(order, **arguments), torch.randn(2, 7, 48)
    expected = layer(x)
    actual, ran, _ = run(vit_fast.optimize(layer, strict=True), x)
    assert "attention" in ran
    close(actual, expected)


def _padding(kind):
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    if kind == "gaps":
        mask[1, 2] = True
    return mask if kind != "float" else torch.zeros(2, 7).masked_fill_(mask, -torch.inf)


MASKS = {
    "padding": lambda: dict(src_key_padding_mask=_padding("bool")),
    "padding with gaps": lambda: dict(src_key_padding_mask=_padding("gaps")),
    "float padding": lambda: dict(src_key_padding_mask=_padding("float")),
    "mask": lambda: dict(src_mask=torch.ones(7, 7).triu(1).bool()),
    "float mask": lambda: dict(src_mask=torch.randn(7, 7)),
    "causal": lambda: dict(src_mask=nn.Transformer.generate_square_subsequent_mask(7), is_causal=True),
    "a mask for each head": lambda: dict(src_mask=torch.randn(2 * 3, 7, 7)),
    "both": lambda: dict(src_mask=torch.ones(7, 7).triu(1).bool(), src_key_padding_mask=_padding("bool")),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("order", ORDERS)
def test_masks(order, masks):
    layer, masks = build(order), MASKS[masks]()
    x = torch.randn(2, 7, 48) if "sequence" not in order else torch.randn(7, 2, 48)
    expected, free = layer(x, **masks), layer(x)
    actual, ran, reasons = run(vit_fast.optimize(layer), x, **masks)
    assert "attention" in ran and not reasons
    close(actual, expected)
    assert not torch.allclose(actual, free)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_and_dropout_in_training(order):
    plain = build(order, torch.float64, dropout=0.3).train()
    x = torch.randn(1, 7, 48).double() if "sequence" not in order else torch.randn(7, 1, 48).double()
    model = vit_fast.optimize(copy.deepcopy(plain))
    results = []
    for one in (plain, model):
        torch.manual_seed(2)
        result, ran, _ = run(one, x)
        result.square().sum().backward()
        results.append([result, *(parameter.grad for parameter in one.parameters())])
    assert "attention" in ran
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ("pre-norm", "post-norm"))
def test_bfloat16_is_within_the_budget_of_a_model(order):
    layer, x = build(order).bfloat16(), torch.randn(8, 17, 48).bfloat16()
    with torch.inference_mode():
        golden, eager = copy.deepcopy(layer).double()(x.double()), layer(x)
        actual, ran, _ = run(vit_fast.optimize(layer), x)
    assert ran
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("order", ORDERS)
def test_an_encoder_with_padded_images(order, grad, nested):
    plain = nn.TransformerEncoder(build(order, heads=4), 2, nn.LayerNorm(48), enable_nested_tensor=nested).eval()
    x = torch.randn(2, 7, 48) if "sequence" not in order else torch.randn(7, 2, 48)
    model = vit_fast.optimize(copy.deepcopy(plain), strict=True)
    with torch.set_grad_enabled(grad):
        for masks in ({}, dict(src_key_padding_mask=_padding("bool"))):
            actual, ran, reasons = run(model, x, **masks)
            close(actual, plain(x, **masks))
            if reasons:  # torch makes a nested tensor of what is padded, for its own fast path
                assert nested and masks and not grad and reasons == 2 * [("the input is a nested tensor",)]
            else:
                assert ran.count("attention") == 2


def test_autocast_half_copies_and_pickles():
    plain, x = encoder_vit(norm_first=False), torch.randn(2, 3, 32, 32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, ran, _ = run(model, x)
        torch.testing.assert_close(actual, plain(x), rtol=0.05, atol=0.05)
    assert ran.count("attention") == 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and type(other.encoder.layers[0]) is type(model.encoder.layers[0])
    actual, ran, _ = run(model.half(), x.half())
    torch.testing.assert_close(actual, plain.half()(x.half()), rtol=0.02, atol=0.02)
    assert ran.count("attention") == 2


@pytest.mark.parametrize("order", ("pre-norm", "post-norm"))
def test_compiles_in_one_graph(order):
    layer, x = build(order), torch.randn(2, 7, 48)
    expected = layer(x)
    vit_fast.optimize(layer)
    close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)


def test_what_a_layer_does_not_cover():
    def reason(layer):
        with pytest.raises(vit_fast.UnsupportedError) as raised:
            vit_fast.optimize(layer)
        return str(raised.value).rpartition("TransformerEncoderLayer: ")[2]

    assert reason(build(activation=nn.GELU(approximate="tanh"))) == "its activation is GELU(approximate='tanh')"
    assert reason(build(activation=torch.tanh)).startswith("its activation is <built-in method tanh")
    layer = build()
    layer.self_attn = nn.MultiheadAttention(48, 3, add_zero_attn=True, batch_first=True)
    assert reason(layer) == "its attention adds keys"
    layer = vit_fast.optimize(build())
    for x, masks, told in (
        (torch.randn(7, 48), {}, "the input has 2 dimensions, not 3"),
        (torch.randn(2, 7, 48).double(), {}, "the input is torch.float64, the weights are torch.float32"),
        (torch.randn(2, 7, 48), dict(is_causal=True), "is_causal is given without src_mask"),
    ):
        with vit_fast.backends.recording() as choices:
            try:
                layer(x, **masks)
            except RuntimeError:
                pass  # torch's own
        assert choices[0] == ("block", "library", (told,))


def test_prepared_layers(caplog):
    model, x = encoder_vit().bfloat16(), torch.randn(8, 3, 32, 32).bfloat16()
    with torch.inference_mode():
        vit_fast.prepare(vit_fast.optimize(model))
        assert run(model, x)[1] == ["prepared_blocks"]
        tokens, mask = torch.randn(2, 7, 48).bfloat16(), _padding("bool")
        assert run(model.encoder, tokens, src_key_padding_mask=mask)[1] == 2 * PACKED
    assert caplog.messages == [
        "prepared weights of encoder.layers are not used: a mask or another argument beside the input is given"
    ]
    post_norm = vit_fast.optimize(encoder_vit(norm_first=False).bfloat16())
    with torch.inference_mode():
        before, *_ = run(post_norm, x)
        after, ran, _ = run(vit_fast.prepare(post_norm), x)
    assert ran.count("prepared_linear") == 8 and "linear_residual" not in ran
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


def test_the_layers_of_our_own_models_stay():
    """They are subclasses of torch's."""
    model = vit_fast.create_model("vit_from_scratch")
    assert any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    with pytest.raises(ValueError, match="whose blocks are vit_fast's own and fused already"):
        vit_fast.optimize(model)
