"""What was derived from a model, and what the model computes now: folded weights, graphs, position tables.

Every change that decides what the blocks compute drops prepared weights, once, with a warning that names it, in our own
ViT, in the families and in optimised models of other libraries; ``graphed`` captures anew. Plain models keep nothing
that a change could make stale. ``check`` fails a model whose fast path passes over what its modules do.
"""

import copy
import gc
import inspect
import logging
import pickle
import weakref
from functools import partial

import pytest
import torch
from support.graphs import CAPTURES, OnCpu, Reruns
from support.library_models import CASES, PREPARABLE, output
from torch import nn
from vit_fast.kernels.reference import activate

import vit_fast
from vit_fast import parity, systems
from vit_fast.block import PREPARED

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
_HYBRID = dict(
    patches=dict(size=(8, 8)), hidden_size=48, classifier="token",
    transformer=dict(mlp_dim=96, num_heads=3, num_layers=2),
)  # fmt: skip


def vit(**words):
    return vit_fast.VisionTransformer(**SMALL | words)


MODELS = {
    "vit": lambda: vit(init_values=0.5),
    "deit": lambda: systems.deit.build(**SMALL, distilled=True),
    "clip": lambda: systems.clip.build(
        "open_clip", patch_size=8, width=48, layers=2, heads=3, output_dim=16, image_size=32, ls_init_value=0.5
    ),
    "hybrid": lambda: systems.hybrid.build(config=_HYBRID, img_size=32, num_classes=7),
    "scratch": lambda: systems.scratch.build(
        image_h=32, image_w=32, patch_size=8, model_dim=48, nhead=3, num_layers=2, dim_feedforward=96, pre_norm=True,
        max_num_token=17,
    ),
    "t2t": lambda: systems.t2t.build(
        img_size=32, num_classes=5, embed_dim=48, depth=2, num_heads=3, mlp_ratio=1.5, token_dim=16
    ),
} | {name: lambda name=name: vit_fast.optimize(CASES[name].build()) for name in PREPARABLE}  # fmt: skip


@pytest.fixture
def model(request, peer):
    if request.param == "open_clip":
        peer("open_clip")
    return made(request.param)


def made(name, dtype=torch.bfloat16):
    model = MODELS[name]()
    parity.perturb(model)
    return model.eval().to(dtype)


def each(names=tuple(MODELS)):
    return pytest.mark.parametrize("model", names, indirect=True)


def images(size=32, dtype=torch.bfloat16):
    return torch.randn(2, 3, size, size).to(dtype)


def result(model, x):
    out = output(model, x) if not isinstance(model, systems.hybrid.VisionTransformer) else model(x)[0]
    return out[0] if isinstance(out, tuple) else out


def serves(model, x):
    with vit_fast.backends.recording() as choices:
        result(model, x)
    return "prepared_blocks" in [operation for operation, *_ in choices]


def stack_of(model):
    """The stack of blocks that is prepared."""
    return next(module for module in model.modules() if PREPARED in vars(module))


def holders(block, attribute, kind):
    return [module for module in block.modules() if isinstance(vars(module).get(attribute), kind)]


def norms(block):
    return [module for module in block.modules() if isinstance(module, nn.LayerNorm)]


def linear(block):
    return [module for module in block.modules() if isinstance(module, nn.Linear)][-1]


def _append(stack):
    stack.append(copy.deepcopy(stack[0]))


def _insert(stack):
    first, *others = stack
    stack._modules.clear()
    for index, block in enumerate((first, copy.deepcopy(first), *others)):
        stack.add_module(str(index), block)


def _remove(stack):
    del stack[1]


def _swap(stack):
    first = stack[0]
    stack[0] = stack[1]
    stack[1] = first


def _reorder(stack):
    first = next(iter(stack._modules))
    stack._modules[first] = stack._modules.pop(first)


def _replace_block(stack):
    stack[1] = copy.deepcopy(stack[0])


def _drop_bias(stack):
    linear(stack[1]).bias = None


def _replace_parameter(stack):
    linear(stack[1]).weight = nn.Parameter(2 * linear(stack[1]).weight.detach())


def _replace_data(stack):
    linear(stack[1]).weight.data = 2 * linear(stack[1]).weight.detach()


def _write(stack):
    linear(stack[1]).weight.mul_(2)


def _write_in_inference_mode(stack):
    with torch.inference_mode():
        stack[1].load_state_dict({key: 2 * tensor for key, tensor in stack[1].state_dict().items()})


def _assign(stack):
    stack.load_state_dict({key: 2 * tensor for key, tensor in stack.state_dict().items()}, assign=True)


def _assign_inference_tensors(stack):
    with torch.inference_mode():
        _assign(stack)


def _eps(stack):
    norms(stack[1])[0].eps = 0.5


def _heads(stack):
    holders(stack[1], "num_heads", int)[0].num_heads = 1


def _scale(stack):
    for word in ("scale", "head_dim"):
        for module in holders(stack[1], word, (int, float)):
            setattr(module, word, 4 * getattr(module, word))


def _activation(stack):
    changed = (
        ("activation", "quick_gelu"),
        ("word", "quick_gelu"),
        ("activation", partial(activate, activation="quick_gelu")),
        ("activation", torch.relu),
    )
    for word, value in changed:
        for module in holders(stack[1], word, type(value)):
            setattr(module, word, value)
    for module in [*stack[1].modules()]:
        for name, child in [*module.named_children()]:
            if "GELU" in type(child).__name__:
                setattr(module, name, nn.ReLU().eval())


def _class(stack):
    class Twice(type(norms(stack[1])[0])):
        def forward(self, x):
            return 2 * super().forward(x)

    norms(stack[1])[0].__class__ = Twice


CHANGES = (
    _append, _insert, _remove, _swap, _reorder, _replace_block, _drop_bias, _replace_parameter, _replace_data, _write,
    _write_in_inference_mode, _assign, _assign_inference_tensors, _eps, _heads, _scale, _activation, _class,
)  # fmt: skip


def assert_dropped(model, change, x, caplog):
    with torch.no_grad():
        assert serves(vit_fast.prepare(model), x)
        stack = stack_of(model)
        change(stack)
        plain = vit_fast.unprepare(copy.deepcopy(model))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vit_fast"):
            assert not serves(model, x), change
            assert torch.equal(result(model, x), result(plain, x)), change
        assert caplog.text.count("prepared weights are dropped; vit_fast.refresh(model)") == 1, change
    assert len(caplog.records) == 1 and not hasattr(vars(stack)[PREPARED], "weights")


@each()
def test_every_change_of_the_blocks_drops_prepared_weights(model, caplog):
    for change in CHANGES:
        assert_dropped(copy.deepcopy(model), change, images(), caplog)


def _layer_scale(stack):
    stack[1].ls1 = nn.Identity()


def _gamma(stack):
    stack[1].ls2.gamma = nn.Parameter(torch.full((48,), 2.0).bfloat16())


def _parametrize(stack):
    nn.utils.parametrizations.weight_norm(stack[0].attn.proj)


def _fused(stack):
    stack[1].params = lambda: stack[0].params()


@pytest.mark.parametrize("change", (_layer_scale, _gamma, _parametrize, _fused))
def test_changes_of_our_own_blocks(change, caplog):
    assert_dropped(made("vit"), change, images(), caplog)


def test_added_biases_and_layer_scales(caplog):
    def bias(stack):
        stack[0].attn.qkv.bias = nn.Parameter(torch.randn(144).bfloat16())

    def scale(stack):
        stack[1].ls1 = vit_fast.layers.LayerScale(48, 0.5).bfloat16().eval()

    for change in (bias, scale):
        assert_dropped(vit(qkv_bias=False).eval().bfloat16(), change, images(), caplog)


@pytest.mark.parametrize("words", ({}, dict(fused=True)), ids=("foreach", "fused"))
def test_a_step_of_an_optimizer_drops_them(words, caplog):
    """Fused optimizers of torch write without a version; a step of another model's changes nothing."""
    model, other = made("vit"), made("vit")
    optimizers = [torch.optim.AdamW(trained.parameters(), 0.1, **words) for trained in (other, model)]

    def step(model, optimizer):
        with torch.enable_grad():
            model(images()).sum().backward()
        optimizer.step()

    def train(stack):
        step(other, optimizers[0])
        assert serves(model, images())
        step(model, optimizers[1])
        caplog.clear()

    assert_dropped(model, train, images(), caplog)


def test_the_change_is_named(caplog):
    for change, path in (
        (lambda blocks: setattr(blocks[1].norm2, "eps", 0.1), "blocks.1.norm2.eps"),
        (lambda blocks: blocks[0].attn.qkv.bias.add_(1), "blocks.0.attn.qkv.bias"),
        (lambda blocks: setattr(blocks[0].attn, "note", "mine"), "blocks.0.attn"),
        (_append, "blocks"),
    ):
        assert_dropped(made("vit"), change, images(), caplog)
        assert f"not used: {path} changed, so" in caplog.text


def test_an_equal_value_is_no_change(caplog):
    model, x = made("vit"), images()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        vit_fast.prepare(model)
        model.blocks[0].attn.scale = float(str(model.blocks[0].attn.scale))
        assert serves(model, x) and serves(model, x) and not caplog.text


def test_weights_whose_changes_are_not_counted_are_refused():
    model = vit().eval()
    with torch.inference_mode():
        model.bfloat16()
        with pytest.raises(vit_fast.UnsupportedError, match="blocks: the weights are inference tensors"):
            vit_fast.prepare(model)


class _Twice(vit_fast.layers.Block):
    def forward(self, x, **masks):
        return 2 * super().forward(x, **masks)


def _subclass(stack):
    stack[1].__class__ = _Twice


@pytest.mark.parametrize("change", (lambda stack: _hook(stack), lambda stack: _forward(stack), _subclass))
def test_blocks_with_a_call_of_their_own_are_refused(change):
    """Folded weights would compute what a hook or another forward of a whole block passes over."""
    model = made("vit")
    change(model.blocks)
    with pytest.raises(vit_fast.UnsupportedError, match="blocks: a block carries a hook or has a forward of its own"):
        vit_fast.prepare(model)


def test_a_part_in_training_mode_is_refused():
    model = made("vit")
    model.blocks[1].mlp.train()
    with pytest.raises(vit_fast.UnsupportedError, match="blocks: a part of the blocks is in training mode"):
        vit_fast.prepare(model)


# Calls that prepared weights do not serve: one warning each, and explain tells.


def told(caplog):
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


def unused(model, x):
    return [row for row in vit_fast.explain(model, x) if row.operation == "prepared weights"]


def test_a_call_that_they_do_not_serve_is_told_once(caplog):
    model, x = vit_fast.prepare(made("vit")), images()
    start = "prepared weights of blocks are not used: "
    with caplog.at_level(logging.WARNING, "vit_fast"):
        for _ in range(2):
            assert not serves(model, x)
        wanted = "gradients are enabled; they serve under torch.inference_mode() or torch.no_grad()"
        assert told(caplog) == [start + wanted]
        with torch.no_grad():
            assert serves(model, x) and not told(caplog)
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    assert not serves(model, x)
                    (row,) = unused(model, x)
            assert told(caplog) == [f"{start}{row.reasons[0]}"] and "autocast is enabled" in row.reasons[0]
            handle = model.blocks[1].attn.register_forward_hook(lambda *arguments: None)
            for _ in range(2):
                assert not serves(model, x)
            assert told(caplog) == [f"{start}blocks.1.attn carries a hook"]
            (row,) = unused(model, x)
            assert (row.module, row.backend, row.reasons) == ("blocks", "unused", ("blocks.1.attn carries a hook",))
            handle.remove()
            model.train()
            for _ in range(2):
                assert not serves(model, x)
            assert told(caplog) == [f"{start}blocks.0 is in training mode; they serve after model.eval()"]
            model.eval()
            assert serves(model, x) and not unused(model, x) and not told(caplog)


def _not_batch_first(model):
    model.transformer.batch_first = False


CALLS = (("open_clip", {}, _not_batch_first, "batch_first is False"),)


@pytest.mark.parametrize("model, words, change, reason", CALLS, indirect=["model"])
def test_calls_that_never_ask_for_them_are_told(model, words, change, reason, caplog):
    x = images()
    if words.get("output_hidden_states"):
        model(x, **words)  # leaves its hooks on the layers, asleep
    vit_fast.prepare(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        assert serves(model, x) and not told(caplog)
        if change is not None:
            change(model)
        for _ in range(2):
            model(x, **words)
        (message,) = told(caplog)
        assert message.endswith(f"are not used: {reason}")
        (row,) = unused(model, {next(iter(inspect.signature(model.forward).parameters)): x} | words)
        assert row.reasons == (reason,)
        if change is None:
            assert serves(model, x)


@pytest.mark.parametrize(
    "model, words, change",
    (
        ("vit", dict(is_causal=True), None),
        ("vit", {}, lambda model: model.blocks.register_forward_hook(lambda *arguments: None)),
        ("CLIPVision", dict(output_hidden_states=True), None),
    ),
    indirect=["model"],
)
def test_blocks_that_are_called_alone_use_what_the_stack_has(model, words, change, caplog):
    x = images()
    if words.get("output_hidden_states"):
        model(x, **words)  # leaves its hooks on the layers, asleep
    vit_fast.prepare(model)
    if change is not None:
        change(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        with vit_fast.backends.recording() as choices:
            model(x, **words)
        blocks = len(stack_of(model))
        assert [operation for operation, *_ in choices].count("prepared_blocks") == blocks > 1 and not told(caplog)
        assert not unused(model, {next(iter(inspect.signature(model.forward).parameters)): x} | words)


def test_a_mask_does_not_hide_why_they_are_gone(caplog):
    model, x = vit_fast.prepare(made("vit")), images()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        _write(model.blocks)
        for words in ({}, dict(is_causal=True), {}):
            model(x, **words)
        assert ["dropped" in message for message in told(caplog)] == [True]
        assert "dropped" in unused(model, x)[0].reasons[0]


def test_attention_probabilities_are_computed_block_by_block(caplog):
    model, x = systems.hybrid.build(config=_HYBRID, img_size=32, num_classes=7, vis=True).eval().bfloat16(), images()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        _, maps = vit_fast.prepare(model)(x)
        assert len(maps) == 2 and "attention probabilities are asked for (vis)" in told(caplog)[0]
        assert unused(model, x)


@each(("vit", "clip", "timm"))
def test_moved_models_are_told_and_explained(model, caplog):
    vit_fast.prepare(model)
    x = images(dtype=torch.float16)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        model.to(torch.float16)
        for _ in range(2):
            assert not serves(model, x)
        (message,) = told(caplog)
        assert "changed, so the prepared weights are dropped; vit_fast.refresh(model) folds anew" in message
        (row,) = unused(model, x)
        assert row.reasons[0] in message and "prepared_blocks" not in str(vit_fast.explain(model, x))
        assert serves(vit_fast.refresh(model), x) and not unused(model, x) and not told(caplog)


@each(("vit", "clip", "timm"))
def test_copies_and_pickles_are_told_and_explained(model, caplog):
    vit_fast.prepare(model)
    x, plain = images(), vit_fast.unprepare(copy.deepcopy(model))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vit_fast"):
        for other in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model))):
            for _ in range(2):
                assert not serves(other, x) and torch.equal(result(other, x), result(plain, x))
            (message,) = told(caplog)
            assert message.endswith(
                "a copy or pickle of a model does not hold them; vit_fast.refresh(model) folds anew"
            )
            (row,) = unused(other, x)
            assert row.reasons[0] in message and "prepared_blocks" not in str(vit_fast.explain(other, x))
            assert serves(vit_fast.refresh(other), x)
        assert serves(model, x) and not told(caplog)


def test_a_copy_is_folded_anew_to_the_same_precision():
    other = vit_fast.refresh(copy.deepcopy(vit_fast.prepare(made("vit"), precision="fp8")))
    with torch.no_grad(), vit_fast.backends.recording() as choices:
        other(images())
    assert "fp8_blocks" in [operation for operation, *_ in choices]


def test_explain_tells_where_they_serve():
    model, x = vit_fast.prepare(made("vit")), images()
    model.norm.train()
    modes = [module.training for module in model.modules()]

    def reasons():
        (row,) = [row for row in vit_fast.explain(model, x) if row.operation == "prepared_blocks"]
        return row.reasons[-1]

    alone = "in eval mode under torch.inference_mode() or torch.no_grad() alone; here the blocks run one by one"
    assert reasons() == alone
    with torch.no_grad():
        assert reasons() == alone and [module.training for module in model.modules()] == modes
        model.eval()
        assert reasons() != alone


@each()
def test_unprepare(model):
    x = images()
    with torch.no_grad():
        expected = result(model, x)
        fields = [set(vars(module)) for module in model.modules()]
        vit_fast.prepare(model)
        folded = [weakref.ref(tensor) for tensor in vars(stack_of(model))[PREPARED].weights]
        assert not torch.equal(result(model, x), expected)
        assert vit_fast.unprepare(model) is model
        assert torch.equal(result(model, x), expected) and not serves(model, x) and not unused(model, x)
        gc.collect()
        assert not any(tensor() is not None for tensor in folded)
        assert [set(vars(module)) for module in model.modules()] == fields and vit_fast.unprepare(model) is model
        assert serves(vit_fast.prepare(model), x)


def test_unprepare_takes_modules():
    with pytest.raises(TypeError, match=r"vit_fast\.unprepare: model is str, expected an nn\.Module"):
        vit_fast.unprepare("vit")


# Graphs.


def _hook(stack):
    stack[1].register_forward_hook(lambda module, inputs, out: 2 * out)


def _forward(stack):
    stack[1].forward = lambda x: 2 * x


@each(("vit", "deit", "clip", "timm", "torchvision"))
def test_graphs_see_every_change(model, monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", Reruns)
    for name, change in ((change.__name__, change) for change in (*CHANGES, _hook, _forward)):
        other, x = copy.deepcopy(model), images()
        stack = stack_of(vit_fast.prepare(other))
        vit_fast.unprepare(other)
        CAPTURES.clear()
        module = OnCpu(other, (2,), x, True)
        with torch.no_grad():
            assert torch.equal(result(module, x), result(other, x)) and len(CAPTURES) == 1
            change(stack)
            assert torch.equal(result(module, x), result(other, x))
            assert len(CAPTURES) == (1 if change in (_write, _write_in_inference_mode) else 2), name
            module(x)
            assert len(CAPTURES) <= 2


def test_graphs_see_prepare_refresh_unprepare_and_optimize(monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", Reruns)
    model, x = CASES["timm"].build().bfloat16(), images()
    CAPTURES.clear()
    module = OnCpu(model, (2,), x, True)
    for count, change in enumerate(
        (vit_fast.optimize, vit_fast.prepare, vit_fast.refresh, vit_fast.unprepare, vit_fast.restore), start=2
    ):
        change(model)
        for _ in range(2):
            with torch.no_grad():
                module(x)
            assert len(CAPTURES) == count, change


def test_a_part_in_training_mode_is_seen_by_graphs():
    module = OnCpu(made("vit"), (2,), None, True)
    module.model.blocks[1].train()
    with torch.no_grad(), pytest.raises(vit_fast.UnsupportedError, match=r"blocks\.1 is in training mode"):
        module(images())


# Plain models keep nothing.


def _dynamic(name):
    if name == "vit":
        return vit(dynamic_img_size=True)
    if name == "deit":
        return systems.deit.build(**SMALL, dynamic_img_size=True)
    if name == "clip":
        return systems.clip.build(
            "openai", patch_size=8, width=48, layers=2, heads=3, output_dim=16, image_size=32, dynamic_img_size=True
        )
    return systems.scratch.build(
        image_h=32, image_w=32, patch_size=8, model_dim=48, nhead=3, num_layers=2, dim_feedforward=96,
        max_num_token=17, dynamic_img_size=True,
    )  # fmt: skip


TABLES = ("pos_embed", "positional_embedding", "position_embedding_table")


@pytest.mark.parametrize("graphed", (False, True), ids=("plain", "graphed"))
@pytest.mark.parametrize("name", ("vit", "deit", "clip", "scratch"))
def test_a_position_table_acts_at_once(name, graphed):
    model, x = _dynamic(name).eval(), images(48, torch.float32)
    run = OnCpu(model, (2,), x, True) if graphed else model
    table = next(getattr(model, word) for word in TABLES if hasattr(model, word))
    with torch.no_grad():
        results = [run(x)]
        for write in (table.data.add_, table.add_, lambda move: table.data.lerp_(move, 0.5)):
            write(torch.randn(table.shape))
            fresh = _dynamic(name).eval()
            fresh.load_state_dict(model.state_dict())
            results.append(run(x))
            torch.testing.assert_close(results[-1], fresh(x))
            assert not torch.allclose(results[-1], results[-2], atol=1e-3)


def _size(value):
    if isinstance(value, (list, tuple, set, dict)):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return 1 + sum(_size(part) for part in parts)
    return 1


@pytest.mark.parametrize("name", ("vit", "deit", "clip", "scratch"))
def test_nothing_grows_with_the_sizes_of_images(name):
    model = _dynamic(name).eval()

    def state():
        return [(key, _size(value)) for module in model.modules() for key, value in vars(module).items()]

    before = state()
    with torch.no_grad():
        for rows in range(1, 9):
            model(torch.randn(1, 3, 8 * rows, 16))
    assert state() == before


# The certificate.


@each(("vit", "deit", "hybrid", "t2t", *PREPARABLE))
def test_check_fails_where_a_fast_path_passes_over_a_call(model, monkeypatch):
    """Of a forward that is replaced in the class itself no fused block takes notice; the plain form calls it."""
    x, forward = images(), nn.Linear.forward
    assert vit_fast.check(model, x).passed
    monkeypatch.setattr(nn.Linear, "forward", lambda linear, x: forward(linear, x) * 1.5)
    assert not vit_fast.check(model, x).passed


@pytest.mark.parametrize("change", (_append, _drop_bias, _eps, lambda stack: linear(stack[1]).weight.data.mul_(2)))
def test_check_fails_where_prepared_weights_serve_all_the_same(change, monkeypatch):
    model = vit_fast.prepare(made("vit"))
    assert vit_fast.check(model).passed
    change(model.blocks)
    monkeypatch.setattr(type(vars(model.blocks)[PREPARED]), "serves", lambda prepared, x, blocks: True)
    assert not vit_fast.check(model).passed
