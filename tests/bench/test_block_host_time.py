"""Host time that ``optimize`` adds to a block (``benchmarks/block_host_time.py``), and what blocks remember for it."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import timm
import torch
from support.scripts import loaded
from torch import nn
from torch.nn.utils import parametrize, prune

import vit_fast
from vit_fast.backends import select
from vit_fast.remembered import recall

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "block_host_time.py"
X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))


def test_blocks_add_little_host_time():
    """Before blocks remembered what they read, the ratio was 2.0 to 2.6."""
    with loaded(SCRIPT) as script, vit_fast.backend("torch"):
        for pair in script.pairs():
            times = [script.measure(pair, turns=10, calls=30) for _ in range(3)]
            eager, fast = min(times, key=lambda t: t.fast / t.eager)
            assert fast < 1.7 * eager, f"{pair.name}: {fast:.0f} µs, eager {eager:.0f} µs"


@pytest.fixture
def models():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=1, init_values=0.5)
    model.eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    fast = vit_fast.optimize(copy.deepcopy(model))
    with torch.inference_mode():
        fast.blocks[0](X)
    assert recall(fast.blocks[0]) is not None
    return model.blocks[0], fast.blocks[0]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _replace(block):
    block.mlp.fc1 = nn.Sequential(nn.Linear(48, 192), nn.Tanh())
    for parameter in block.mlp.fc1.parameters():
        nn.init.constant_(parameter, 0.01)


def _set(path, **values):
    def change(block):
        for name, value in values.items():
            setattr(block.get_submodule(path), name, value)

    return change


def _new_hooks(block):
    block.attn.proj._forward_hooks = type(block.attn.proj._forward_hooks)()
    block.attn.proj.register_forward_hook(lambda module, args, out: out + 1)


CHANGES = {
    "hook": lambda block: block.attn.qkv.register_forward_hook(lambda module, args, out: 2 * out),
    "hooks in a new dict": _new_hooks,
    "pre-hook": lambda block: block.attn.proj.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "forward of an instance": _set("mlp.fc2", forward=lambda x: x.new_zeros(*x.shape[:-1], 48)),
    "another module": _replace,
    "another class": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "parametrization": lambda block: parametrize.register_parametrization(block.mlp.fc2, "weight", Doubled()),
    "pruning": lambda block: prune.ln_structured(block.attn.proj, "weight", 0.5, n=2, dim=0),
    "another parameter": lambda block: setattr(block.ls1, "gamma", nn.Parameter(torch.full((48,), 3.0))),
    "no bias": lambda block: setattr(block.attn.proj, "bias", None),
    "written weights": lambda block: block.mlp.fc1.weight.data.mul_(2),
    "eps": _set("norm1", eps=0.5),
    "heads": _set("attn", num_heads=4, head_dim=12),
    "scale": _set("attn", scale=1.0, fused_attn=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_part_is_seen(models, change):
    eager, fast = models
    with torch.no_grad():
        before = fast(X)
        for block in models:
            CHANGES[change](block)
        expected = eager(X)
        assert not torch.allclose(before, expected)
        for _ in range(2):
            torch.testing.assert_close(fast(X), expected)


def test_training_and_drop_rates_are_seen(models):
    _, fast = models
    with torch.no_grad():
        fast.mlp.drop1.p, fast.mlp.drop2.p = 0.5, 0.5
        evaluated = fast(X)
        fast.train()
        assert not torch.equal(fast(X), evaluated)
        fast.eval()
        assert torch.equal(fast(X), evaluated)


def test_memory_keeps_nothing_alive(models):
    """Neither the block nor its weights, without the garbage collector."""
    block = copy.deepcopy(models[1])
    with torch.inference_mode():
        block(X)
    gc.disable()
    try:
        weight = weakref.ref(block.mlp.fc1.weight)
        block.mlp.fc1.weight = nn.Parameter(torch.zeros(192, 48))
        assert weight() is None
        gone = weakref.ref(block)
        del block
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", ["width", "heads", "eps"])
def test_direct_calls_raise_the_same_errors(models, wrong):
    """The reference is called without a check for each operation; where it fails, the checks tell why."""
    _, fast = models
    x = X[..., :40] if wrong == "width" else X
    if wrong == "heads":
        fast.attn.num_heads = 5
    if wrong == "eps":
        fast.norm1.eps = -1.0
    told = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"vit_fast\.") as error:
            fast(x)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert not select.is_direct()


def test_direct_calls_are_those_without_gradients(models, monkeypatch):
    _, fast = models
    checked = []
    check = vit_fast.ops.arguments.check_layernorm_mlp
    monkeypatch.setattr(vit_fast.ops.arguments, "check_layernorm_mlp", lambda *a: checked.append(1) or check(*a))
    with torch.no_grad(), vit_fast.backend("torch"):
        direct = fast(X)
    assert not checked
    with vit_fast.backend("torch"):
        assert torch.equal(fast(X), direct) and checked


def test_options_are_checked_again_where_they_are_others():
    """A bias or a table that fits is checked once; one of another shape is refused, and new values are taken."""
    qkv, bias = torch.randn(1, 5, 48), torch.randn(1, 2, 5, 5)
    rope = torch.randn(5, 8).cos(), torch.randn(5, 8).sin()

    def attention(qkv, **options):
        return vit_fast.ops.attention(qkv, 2, 0.3, **options)

    with torch.inference_mode(), vit_fast.backend("torch"):
        for options in (dict(bias=bias), dict(rope=rope)):
            for _ in range(2):
                assert torch.equal(
                    select.run_block(lambda x, o=options: attention(x, **o), qkv), attention(qkv, **options)
                )
        doubled = select.run_block(lambda x: attention(x, bias=2 * bias), qkv)
        assert torch.equal(doubled, attention(qkv, bias=2 * bias)) and not torch.equal(doubled, attention(qkv))
        for wrong in (dict(bias=bias[:, :, :1, :4]), dict(rope=(rope[0][:1], rope[1])), dict(bias=bias.long())):
            with pytest.raises(ValueError, match=r"vit_fast\.attention: (bias|rope cos) has"):
                select.run_block(lambda x, o=wrong: attention(x, **o), qkv)
