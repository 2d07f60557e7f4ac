"""Optimised models in training: gradients, what drops and how often, seeds, checkpointing; one model of each library.

``seeded`` runs the registered operators, whose masks are Philox's, as a kernel would; without it, the backend ``torch``
leaves dropout to PyTorch.
"""

import copy
import functools

import pytest
import torch
from support import seeded
from support.library_models import CASES, moved
from torch.utils.checkpoint import checkpoint

import vit_fast
from vit_fast import ops
from vit_fast.backends import select


def _open_clip(attention=0.0, **_):
    model = CASES["open_clip"].build()
    for block in model.transformer.resblocks:
        block.attn.dropout = attention
    return model


# Library → (model that drops attention weights, hidden activations, outputs and paths; rate → draws of a block)
LIBRARIES = {
    "timm": (
        lambda attention=0.0, hidden=0.0, path=0.0: CASES["timm"].build(
            attn_drop_rate=attention, proj_drop_rate=hidden, drop_path_rate=path
        ),
        {0.1: 1, 0.2: 3},
    ),
    "torchvision": (
        lambda attention=0.0, hidden=0.0, path=0.0: CASES["torchvision"].build(
            attention_dropout=attention, dropout=hidden
        ),
        {0.1: 1, 0.2: 3},
    ),
    "open_clip": (_open_clip, {0.1: 1}),
    "ViT": (
        lambda attention=0.0, hidden=0.0, path=0.0: CASES["ViT"].build(
            attention_probs_dropout_prob=attention, hidden_dropout_prob=hidden
        ),
        {0.1: 1, 0.2: 2},
    ),
    "Dinov2": (
        lambda attention=0.0, hidden=0.0, path=0.0: CASES["Dinov2"].build(
            attention_probs_dropout_prob=attention, drop_path_rate=path
        ),
        {0.1: 1},
    ),
}
DROPS = dict(attention=0.1, hidden=0.2, path=0.3)
each = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture(autouse=True)
def library_is_there(request, peer):
    if request.node.callspec.params.get("library") == "open_clip":
        peer("open_clip")


@pytest.fixture
def through_operators(monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", seeded.BACKENDS)


def built(library, **drops):
    torch.manual_seed(0)
    return moved(LIBRARIES[library][0](**drops)).double().train()


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model, seed=5):
    """(output, gradients by name) of a step whose dropout starts from a seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(images())
    out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
    out.sin().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(first, second):
    grads = zip(first[1].items(), second[1].items(), strict=True)
    return torch.equal(first[0], second[0]) and all(a == b and torch.equal(g, h) for (a, g), (b, h) in grads)


def blocks(model, library):
    return CASES[library].row(model)


@each
@pytest.mark.usefixtures("through_operators")
def test_gradients_are_the_library_s(library):
    plain = built(library)
    model = vit_fast.optimize(copy.deepcopy(plain), strict=True)
    (expected, wanted), (actual, grads) = step(plain), step(model)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-7, atol=1e-9, msg=lambda told, name=name: f"{name}: {told}"
        )


@each
@pytest.mark.usefixtures("through_operators")
def test_every_mask_is_drawn_at_its_rate(library, monkeypatch):
    """By the operators, none by the library's own forward; as often as the library drops."""
    model, rates, draw = vit_fast.optimize(built(library, **DROPS)), [], ops._seeded

    def noted(x, p, seed):
        rates.extend([p] if p else [])
        return draw(x, p, seed)

    monkeypatch.setattr(ops, "_seeded", noted)
    with vit_fast.backends.recording() as choices:
        step(model)
    assert not [reasons for _, backend, reasons in choices if backend == "library"]
    wanted = {rate: 2 * count for rate, count in LIBRARIES[library][1].items()}
    paths = [rate for rate in rates if rate not in wanted]
    assert {rate: rates.count(rate) for rate in wanted} == wanted
    count = {"timm": 2, "Dinov2": 4}.get(library, 0)  # two branches a block; timm's first block drops no path
    assert paths == pytest.approx([0.3] * count)


@each
@pytest.mark.parametrize("operators", [False, True])
def test_a_seed_is_a_step(library, operators, request):
    if operators:
        request.getfixturevalue("through_operators")
    model = vit_fast.optimize(built(library, **DROPS))
    first = step(model)
    assert equal(first, step(model)) and not torch.allclose(first[0], step(model, seed=6)[0])
    without = step(vit_fast.optimize(built(library)))
    assert not torch.allclose(first[0], without[0])
    model.eval()
    torch.testing.assert_close(step(model)[0], without[0], rtol=1e-9, atol=1e-9)


@each
@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_bit_equal(library, operators, reentrant, request):
    if operators:
        request.getfixturevalue("through_operators")
    model = vit_fast.optimize(built(library, **DROPS))
    whole = step(model)
    for block in blocks(model, library):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    assert equal(step(model), whole)
