"""vit_fast.optimize and restore: models of timm, torchvision, transformers and open_clip on the fused operations.

Models are small and random, every parameter moved away from its initial value, so that a forgotten one shows. On a CPU
the fused path runs the reference, so that each comparison also asks which operations ran; the interpreted kernels have
tests of their own below.
"""

import copy
import io
import logging
import pickle
import subprocess
import sys

import pytest
import timm.layers
import torch
import transformers
from support.budget import assert_within_budget
from support.drop_path import philox_drop_path  # noqa: F401 a fixture
from support.library_models import (
    CASES,
    CONFIG,
    PACKED,
    POOLED,
    PREPARABLE,
    SEPARATE,
    fused,
    moved,
    open_clip_tower,
    operations,
    output,
    timm_vit,
    torchvision_vit,
)
from timm.models.vision_transformer import Block
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

import vit_fast
from vit_fast.block import PREPARED

ONE_EACH = ("timm", "torchvision", "open_clip", "ViT")
KERNELS = (*ONE_EACH, "timm EVA-02", "timm DINOv3", "timm BEiT", "timm SAM", "timm AIMv2")


@pytest.fixture
def case(request, peer):
    if request.param == "open_clip":
        peer("open_clip")
    return CASES[request.param]


def each(names=tuple(CASES)):
    return pytest.mark.parametrize("case", names, indirect=True)


def images(batch=2, dtype=torch.float32, size=32):
    return torch.randn(batch, 3, size, size).to(dtype)


def unfused(choices):
    """(operation, reason) of what ran its library's own forward."""
    return [(operation, *reasons) for operation, backend, reasons in choices if backend == "library"]


def in_blocks(ran):
    return [operation for operation in ran if operation != "patch_embed"]


def classes(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@each()
def test_a_model_runs_fused_and_is_restored(case):
    model, x = case.build(), images()
    before, tensors = classes(model), {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    fields = [set(vars(module)) for module in model.modules()]
    expected = output(model, x)
    assert vit_fast.optimize(model, strict=True) is model
    actual, ran = operations(model, x)
    assert in_blocks(ran) == 2 * case.operations
    same(actual, expected)
    assert all(issubclass(cls, was) for (_, cls), (_, was) in zip(classes(model), before))
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == tensors
    assert [set(vars(module)) for module in model.modules()] == fields
    now = classes(model)
    assert vit_fast.optimize(model, strict=True) is model and classes(model) == now != before
    assert vit_fast.restore(model) is model
    assert classes(model) == before and vit_fast.restore(model) is model and classes(model) == before
    again, ran = operations(model, x)
    assert torch.equal(again, expected) and not ran


@each()
def test_bfloat16_is_within_the_budget_of_a_model(case):
    model, x = case.build().bfloat16(), images(8, torch.bfloat16)
    with torch.inference_mode():
        golden, eager = output(copy.deepcopy(model).double(), x.double()), output(model, x)
        actual, ran = operations(vit_fast.optimize(model), x)
    assert in_blocks(ran) == 2 * case.operations
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


@each()
def test_copies_and_pickles(case):
    model, x = vit_fast.optimize(case.build()), images()
    expected, stored = output(model, x), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)):
        assert classes(other) == classes(model)
        actual, ran = operations(other, x)
        assert torch.equal(actual, expected) and in_blocks(ran) == 2 * case.operations
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert not torch.allclose(output(other, x), expected) and torch.equal(output(model, x), expected)
    fresh = case.build()
    fresh.load_state_dict(model.state_dict())
    same(output(fresh, x), expected)
    other = vit_fast.optimize(case.build())
    other.load_state_dict(fresh.state_dict())
    assert torch.equal(output(other, x), expected)


def gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    with vit_fast.backends.recording() as choices:
        result = output(model, x).double()
        (result.square() / 2 + result).sum().backward()
    ran = fused(choices)
    named = {
        name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return named | {"x": x.grad.double()}, ran


def assert_same_gradients(actual, expected, tolerance):
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * (gradient.norm() + 0.01), name  # a bias of k has none


@each()
def test_gradients_in_training(case):
    model, x = case.build().double().train(), images(dtype=torch.float64)
    expected, _ = gradients(model, x)
    actual, ran = gradients(vit_fast.optimize(model), x)
    assert in_blocks(ran) == 2 * case.operations
    assert_same_gradients(actual, expected, 1e-9)


def doubled(module, inputs, result):
    return 2 * result


class Wrapped(nn.Module):
    """An adapter around a Linear, as LoRA makes them."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.added = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.added(x)


class LinearSubclass(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Quantised(torch.Tensor):
    """A weight of another tensor class."""


def _hook(block, name):
    block.get_submodule(name).register_forward_hook(doubled)


def _pre_hook(block, name):
    block.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def _backward_hook(block, name):
    block.get_submodule(name).register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))


def _parametrization(block, name):
    torch.manual_seed(3)
    nn.utils.parametrizations.weight_norm(block.get_submodule(name))
    with torch.no_grad():
        block.get_submodule(name).parametrizations.weight.original0.mul_(3)


def _adapter(block, name):
    torch.manual_seed(3)
    linear = block.get_submodule(name)
    block.set_submodule(name, Wrapped(linear).to(linear.weight))


def _subclass(block, name):
    block.get_submodule(name).__class__ = LinearSubclass


def _own_forward(block, name):
    linear = block.get_submodule(name)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight * 2, linear.bias)


def _tensor_class(block, name):
    linear = block.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))


CHANGES = (
    _hook, _pre_hook, _backward_hook, _parametrization, _adapter, _subclass, _own_forward, _tensor_class
)  # fmt: skip


def check_a_changed_part(case, change):
    """What a user does to a part of a block counts, before and after; the other block runs fused."""
    plain, x = case.build().double(), images(dtype=torch.float64)
    model = vit_fast.optimize(copy.deepcopy(plain))
    unchanged = output(plain, x)
    for one in (plain, model):
        change(case.row(one)[1], case.linear)
    expected, _ = gradients(plain, x)
    actual, ran = gradients(model, x)
    assert in_blocks(ran) == case.operations
    assert_same_gradients(actual, expected, 1e-9)
    if change not in (_backward_hook, _tensor_class):
        assert not torch.allclose(output(model, x), unchanged)
    _, ran = operations(vit_fast.optimize(plain), x)
    assert in_blocks(ran) == case.operations
    vit_fast.restore(model)
    assert not operations(model, x)[1]


@each()
def test_a_hook_on_a_part_fires_and_its_output_counts(case):
    check_a_changed_part(case, _hook)


@pytest.mark.parametrize("change", CHANGES[1:])
@each(ONE_EACH)
def test_other_changes_of_a_part_count(case, change):
    check_a_changed_part(case, change)


class Delegate(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **words):
        return self.inner(*arguments, **words)


@each()
def test_parts_of_other_classes_may_lack_every_attribute(case):
    names = [name for name, _ in case.row(case.build())[1].named_children()]
    names = [name for name in names if name != "attn_drop"]  # the rate of which timm reads
    for name in names:
        plain, x = case.build().double().train(), images(dtype=torch.float64)
        model = vit_fast.optimize(copy.deepcopy(plain))
        for one in (plain, model):
            block = case.row(one)[1]
            setattr(block, name, Delegate(getattr(block, name)))
        actual, ran = operations(model, x)
        called = name in getattr(type(case.row(model)[1]), "CALLED", ())  # so that it may be of any class
        assert in_blocks(ran) == (2 if called else 1) * case.operations, name
        torch.testing.assert_close(actual, output(plain, x), rtol=1e-9, atol=1e-9)


@each(ONE_EACH)
def test_hooks_on_every_part_fire_as_they_do_in_the_library(case):
    plain, x = case.build(), images()
    model = vit_fast.optimize(copy.deepcopy(plain))
    for name, part in case.row(model)[0].named_modules():
        seen = []
        handles = [
            module.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
            for module in (part, case.row(plain)[0].get_submodule(name))
        ]
        output(model, x), output(plain, x)
        assert len(seen) in (0, 2, 4), name  # none of the two models, or both
        for handle in handles:
            handle.remove()
    assert in_blocks(operations(model, x)[1]) == 2 * case.operations


def check_draws(plain, x, fused=True):
    """The same seed gives what the library gives."""
    model, results = vit_fast.optimize(copy.deepcopy(plain)), []
    for one in (plain, model):
        torch.manual_seed(5)
        results.append(operations(one, x))
    (expected, _), (actual, ran) = results
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert bool(in_blocks(ran)) is fused
    torch.manual_seed(6)
    assert not torch.allclose(output(model, x), actual)


@pytest.mark.usefixtures("philox_drop_path")
@pytest.mark.parametrize("words", (dict(drop_path_rate=0.5), dict(proj_drop_rate=0.3), dict(attn_drop_rate=0.4)))
def test_timm_draws_as_without(words):
    model, x = timm_vit(**words, init_values=0.5).double().train(), images(16, torch.float64)
    if "drop_path_rate" in words:
        model.blocks[1].drop_path1 = timm.layers.DropPath(0.2)
    check_draws(model, x)
    for module in model.eval().modules():  # dropout alone in training
        module.training = isinstance(module, nn.Dropout | timm.layers.DropPath)
    if "attn_drop_rate" in words:
        check_no_draws(model, x)  # timm's fused attention looks at the flag of the attention
    else:
        check_draws(model, x)


def check_no_draws(model, x):
    expected = output(model, x)
    actual, ran = operations(vit_fast.optimize(model), x)
    assert in_blocks(ran) == 2 * PACKED
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_timm_attention_without_fused_attention():
    """It looks at its own scale, and its Dropout's flag, which fused attention does not."""
    model, x = timm_vit(attn_drop_rate=0.4).double().train(), images(16, torch.float64)
    for block in model.blocks:
        block.attn.scale = 0.7
    check_no_draws(copy.deepcopy(model).eval(), x)
    for block in model.blocks:
        block.attn.fused_attn = False
    check_no_draws(copy.deepcopy(model).eval(), x)
    vit_fast.optimize(model.eval())
    expected = output(model, x)
    for block in model.blocks:
        block.attn.attn_drop.train()
    actual, ran = operations(model, x)
    assert in_blocks(ran) == 2 * PACKED and not torch.allclose(actual, expected)


def _no_scale(model):
    for block in model.blocks:
        block.drop_path1.scale_by_keep = False


def _unequal(model):
    for block in model.blocks:
        block.mlp.drop2.p = 0.5


def _certain(model):
    for block in model.blocks:
        block.mlp.drop1.p = block.mlp.drop2.p = 1.0


@pytest.mark.usefixtures("philox_drop_path")
@pytest.mark.parametrize(
    ("change", "words"), ((_no_scale, dict(drop_path_rate=0.5)), (_unequal, dict(proj_drop_rate=0.3)))
)
def test_timm_drops_as_their_modules_say(change, words):
    """Without the scale of the kept samples; at two rates in an MLP."""
    model = timm_vit(**words).double().train()
    change(model)
    check_draws(model, images(16, torch.float64))


def test_timm_drops_that_do_not_fuse_run_as_they_did():
    plain, x = timm_vit(drop_path_rate=0.5, proj_drop_rate=0.3).double().train(), images(16, torch.float64)
    plain.blocks[0].drop_path1 = timm.layers.DropPath(0.2)
    plain.blocks[1].drop_path2 = nn.Identity()
    model = vit_fast.optimize(copy.deepcopy(plain))
    for one in (plain, model):
        _certain(one)
    results = []
    for one in (plain, model):
        torch.manual_seed(5)
        results.append(operations(one, x))
    assert torch.equal(results[0][0], results[1][0]) and not in_blocks(results[1][1])


@pytest.mark.parametrize(
    "words", (dict(dropout=0.3), dict(attention_dropout=0.4), dict(dropout=0.3, attention_dropout=0.4))
)
def test_torchvision_draws_as_without(words):
    """For one image: torchvision's attention lays images out side by side, and draws in that order."""
    check_draws(torchvision_vit(**words).double().train(), images(1, torch.float64))


def _unequal_drops(block):
    block.mlp[2].p, block.mlp[4].p = 0.2, 0.5


def _certain_drops(block):
    block.mlp[2].p = block.mlp[4].p = 1.0


@pytest.mark.parametrize(("change", "fuse"), ((_unequal_drops, True), (_certain_drops, False)))
def test_torchvision_drops_as_its_modules_say(change, fuse):
    plain, x = torchvision_vit(dropout=0.3).double().train(), images(1, torch.float64)
    for block in plain.encoder.layers:
        change(block)
    check_draws(plain, x, fused=fuse)


def test_open_clip_attention_dropout_draws_as_without(peer):
    """For one image, as torchvision."""
    peer("open_clip")
    plain = open_clip_tower().double().train()
    for block in plain.transformer.resblocks:
        block.attn.dropout = 0.3
    check_draws(plain, images(1, torch.float64))


@pytest.mark.parametrize("name", ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"))
def test_hugging_face_attention_dropout_draws_as_without(name):
    model = CASES[name].build(attention_probs_dropout_prob=0.4).double().train()
    check_draws(model, images(16, torch.float64))


@pytest.mark.parametrize("name", ("CLIPVision", "SiglipVision"))
def test_hugging_face_clip_attention_dropout_draws_as_without(name):
    check_draws(CASES[name].build(attention_dropout=0.4).double().train(), images(16, torch.float64))


@pytest.mark.parametrize("name", ("ViT", "DeiT"))
def test_hugging_face_hidden_dropout_draws_as_without(name):
    check_draws(CASES[name].build(hidden_dropout_prob=0.3).double().train(), images(16, torch.float64))


@pytest.mark.parametrize("name", ("Dinov2", "Dinov2WithRegisters"))
def test_hugging_face_drop_path_drops_as_often(name):
    """Two branches kept or dropped give four outputs, each as often as its chance says."""
    model = CASES[name].build(drop_path_rate=0.3, num_hidden_layers=1).double().train()
    x = images(1, torch.float64).expand(2000, -1, -1, -1)

    def outcomes(model):
        result, ran = operations(model, x)
        values, counts = torch.unique((result[:, 0, 0] * 1e9).round(), return_counts=True)
        return values, counts / 2000, ran

    values, chances, _ = outcomes(model)
    actual, frequencies, ran = outcomes(vit_fast.optimize(model))
    assert in_blocks(ran) == SEPARATE and len(values) == len(actual) == 4
    torch.testing.assert_close(actual, values, rtol=0, atol=2)
    assert (frequencies - chances).abs().max() < 0.06
    assert sorted(frequencies.tolist())[0] < 0.14 and sorted(frequencies.tolist())[-1] > 0.43  # 0.09 and 0.49


VARIANTS = {
    "LayerScale": dict(init_values=0.5),
    "qk_norm": dict(qk_norm=True),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "registers, pooled": dict(reg_tokens=4, global_pool="avg", class_token=False),
    "pre_norm": dict(pre_norm=True),
    "swiglu": dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU),
    "GELU of torch": dict(act_layer=nn.GELU),
    "tanh GELU of torch": dict(act_layer=lambda: nn.GELU(approximate="tanh")),
    "GELUTanh": dict(act_layer="gelu_tanh"),
    "QuickGELU": dict(act_layer="quick_gelu"),
    "ReLU": dict(act_layer="relu"),
    "LayerNorm of torch": dict(norm_layer=nn.LayerNorm),
    "LayerNormFp32": dict(norm_layer=getattr(timm.layers, "LayerNormFp32", None)),
    "attention pool": dict(global_pool="map", class_token=False),
    "any image size": dict(dynamic_img_size=True),
    "padded images": dict(dynamic_img_size=True, dynamic_img_pad=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_variants(variant):
    model, x = timm_vit(**VARIANTS[variant]), images()
    expected = output(model, x)
    actual, ran = operations(vit_fast.optimize(model, strict=True), x)
    assert ran == ["patch_embed", *2 * PACKED, *(POOLED if variant == "attention pool" else ())]
    same(actual, expected)


def test_timm_patch_embedding_falls_back_where_it_pads_casts_or_complains():
    model = timm_vit(dynamic_img_size=True, dynamic_img_pad=True)
    for size, taken in ((48, True), (44, False)):
        x = images(size=size)
        expected = output(vit_fast.restore(model), x)
        actual, ran = operations(vit_fast.optimize(model), x)
        same(actual, expected)
        assert ("patch_embed" in ran) is taken and in_blocks(ran) == 2 * PACKED
    model = vit_fast.optimize(timm_vit())
    with pytest.raises(AssertionError, match=r"Input height \(40\) doesn't match model \(32\)"):
        model(images(size=40))
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, ran = operations(model.patch_embed, images())
    assert tokens.dtype == torch.bfloat16 and not ran  # the operation returns float32


def test_timm_masks_and_checkpointing():
    plain, x = timm_vit().double(), images(dtype=torch.float64)
    model = vit_fast.optimize(copy.deepcopy(plain))
    mask = torch.rand(17, 17) > 0.3
    mask[:, 0] = True
    added = torch.zeros(17, 17).double().masked_fill_(~mask, -torch.inf)
    for words in (dict(attn_mask=mask), dict(attn_mask=added), dict(attn_mask=mask[:1]), dict(is_causal=True)):
        expected = plain.forward_features(x, **words)
        with vit_fast.backends.recording() as choices:
            actual = model.forward_features(x, **words)
        causal = "is_causal" in words
        assert fused(choices) == ["patch_embed", *([] if causal else 2 * PACKED)]
        assert unfused(choices) == (2 * [("block", "is_causal is given")] if causal else [])
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(actual, plain.forward_features(x))
    tokens = torch.randn(2, 5, 48).double()
    with vit_fast.backends.recording() as choices:
        same(model.blocks[0](tokens, None, is_causal=False), plain.blocks[0](tokens))
    assert fused(choices) == PACKED
    for one in (plain, model):
        one.train().set_grad_checkpointing()
    expected, _ = gradients(plain, x)
    actual, ran = gradients(model, x)
    assert len(in_blocks(ran)) > 2 * len(PACKED)  # the backward runs some of them again
    assert_same_gradients(actual, expected, 1e-9)


def test_timm_intermediates_and_pruning():
    plain, x = timm_vit(depth=3), images()
    model = vit_fast.optimize(copy.deepcopy(plain))
    for words in (dict(indices=[0, 2]), dict(indices=[1], stop_early=True, intermediates_only=True)):
        expected, actual = plain.forward_intermediates(x, **words), model.forward_intermediates(x, **words)
        if "intermediates_only" not in words:
            (first, expected), (second, actual) = expected, actual
            same(second, first)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            same(one, other)
    for one in (plain, model):
        one.prune_intermediate_layers(2)
        del one.blocks[0]
    actual, ran = operations(model, x)
    same(actual, output(plain, x))
    assert in_blocks(ran) == 2 * PACKED
    assert classes(vit_fast.restore(model)) == classes(plain)


@pytest.mark.parametrize("name", ("ViT", "Dinov2", "CLIPVision", "SiglipVision"))
def test_hugging_face_attention_weights_hidden_states_and_masks(name):
    plain, x = CASES[name].build(attn_implementation="eager").double(), images(dtype=torch.float64)
    model = vit_fast.optimize(copy.deepcopy(plain))
    one, two = plain(x, output_attentions=True), model(x, output_attentions=True)
    assert len(two.attentions) == 2 and all(torch.equal(a, b) for a, b in zip(one.attentions, two.attentions))
    assert not in_blocks(operations(model, x, output_attentions=True)[1])
    # The library's recording hooks are there for good now; asleep, they are in nobody's way.
    model.config.output_attentions = True
    assert len(model(x).attentions) == 2
    model.config.output_attentions = False
    assert in_blocks(operations(model, x)[1]) == 2 * SEPARATE
    assert in_blocks(operations(model, x, output_hidden_states=True)[1]) == 2 * SEPARATE
    one, two = plain(x, output_hidden_states=True), model(x, output_hidden_states=True)
    assert len(two.hidden_states) == 3
    for expected, actual in zip(one.hidden_states, two.hidden_states, strict=True):
        same(actual, expected)  # transformers takes the softmax in float32
    layers, plain_layers = CASES[name].row(model), CASES[name].row(plain)
    tokens, mask = torch.randn(2, 5, 48).double(), torch.zeros(2, 1, 5, 5).double()
    mask[..., 2:] = -torch.inf
    with vit_fast.backends.recording() as choices:
        actual = layers[0](tokens, mask)
        assert fused(choices) == SEPARATE
        layers[0](tokens, None)
        assert len(fused(choices)) == 8
        layers[0](tokens, None, output_attentions=True)
        assert unfused(choices) == [("block", "output_attentions is given")]
    same(actual, plain_layers[0](tokens, mask))
    layers[1].get_submodule("mlp").register_forward_hook(doubled)
    assert in_blocks(operations(model, x)[1]) == SEPARATE


@pytest.mark.parametrize("name", ("CLIPVision", "SiglipVision"))
def test_hugging_face_encoders_pass_masks_on(name):
    plain = CASES[name].build()
    model, tokens, mask = vit_fast.optimize(copy.deepcopy(plain)), torch.randn(2, 5, 48), torch.zeros(2, 1, 5, 5)
    mask[..., 2:] = -torch.inf
    with vit_fast.backends.recording() as choices:
        result = model.encoder(tokens, mask)
    expected = plain.encoder(tokens, mask)
    assert type(result) is type(expected) and fused(choices) == 2 * SEPARATE
    same(result[0], expected[0])
    same(model.encoder(inputs_embeds=tokens)[0], plain.encoder(inputs_embeds=tokens)[0])


@each()
def test_modules_keep_the_name_of_their_class(case):
    """accelerate and Trainer load and shard as a whole the classes that a user or a model names."""
    model = case.build()
    before = [type(module).__name__ for module in model.modules()]
    vit_fast.optimize(model)
    assert [type(module).__name__ for module in model.modules()] == before
    if hasattr(model, "_no_split_modules"):
        assert {type(layer).__name__ for layer in case.row(model)} <= set(model._no_split_modules)


@pytest.mark.parametrize("reentrant", (False, True))
def test_hugging_face_checkpointing(reentrant):
    plain, x = CASES["ViT"].build().double().train(), images(dtype=torch.float64)
    model = vit_fast.optimize(copy.deepcopy(plain))
    expected, _ = gradients(plain, x)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    actual, ran = gradients(model, x)
    assert_same_gradients(actual, expected, 1e-9)
    ran = in_blocks(ran)
    assert ran[: len(ran) // 2] == 2 * SEPARATE and len(ran) > 2 * len(SEPARATE)  # the backward runs them again


def clip_models():
    words = {key: value for key, value in CONFIG.items() if key not in ("image_size", "patch_size")}
    text = words | dict(vocab_size=30, max_position_embeddings=12, eos_token_id=2)
    for name in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=CONFIG)
        yield moved(getattr(transformers, f"{name}Model")(config))


def test_hugging_face_text_towers_are_left_alone():
    x, words = images(), torch.randint(3, 30, (2, 9))
    for plain in clip_models():
        model = vit_fast.optimize(copy.deepcopy(plain), strict=True)
        assert classes(model.text_model) == classes(plain.text_model)
        with vit_fast.backends.recording() as choices:
            result = model(input_ids=words, pixel_values=x)
        assert in_blocks(fused(choices)) == 2 * SEPARATE + (POOLED if hasattr(model.vision_model, "head") else [])
        expected = plain(input_ids=words, pixel_values=x)
        assert torch.equal(result.text_embeds, expected.text_embeds)
        same(result.image_embeds, expected.image_embeds)
        # Even the fast class gives way to a causal mask.
        layer, causal = copy.deepcopy(model.vision_model.encoder.layers[0]), dict(is_causal=True)
        tokens = torch.randn(2, 5, 48)
        same(layer(tokens, None, **causal), vit_fast.restore(copy.deepcopy(layer))(tokens, None, **causal))


def test_open_clip_text_tower_is_left_alone(peer):
    open_clip = peer("open_clip")
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=8, image_size=32)
    text = open_clip.model.CLIPTextCfg(context_length=9, vocab_size=30, width=48, heads=3, layers=2)
    for quick_gelu in (False, True):
        plain = moved(open_clip.CLIP(16, vision, text, quick_gelu=quick_gelu))
        model, x, words = vit_fast.optimize(copy.deepcopy(plain), strict=True), images(), torch.randint(1, 30, (2, 9))
        assert classes(model.transformer) == classes(plain.transformer)
        with vit_fast.backends.recording() as choices:
            assert torch.equal(model.encode_text(words), plain.encode_text(words)) and not choices
            same(model.encode_image(x), plain.encode_image(x))
        assert in_blocks(fused(choices)) == 2 * PACKED
        assert classes(vit_fast.restore(model)) == classes(plain)


def test_open_clip_masks_keys_and_checkpointing(peer):
    peer("open_clip")
    plain = open_clip_tower().double()
    model, x = vit_fast.optimize(copy.deepcopy(plain)), torch.randn(2, 17, 48).double()
    block, plain_block, mask = model.transformer.resblocks[0], plain.transformer.resblocks[0], torch.zeros(17, 17)
    mask[:, 5:] = -torch.inf
    for words in (dict(attn_mask=mask), dict(k_x=x.flip(1), v_x=x.flip(2))):
        with vit_fast.backends.recording() as choices:
            actual = block(x, **words)
        assert torch.equal(actual, plain_block(x, **words)) and not fused(choices)
        assert unfused(choices) == [("block", f"{next(iter(words))} is given")]
    same(model.transformer(x, attn_mask=mask), plain.transformer(x, attn_mask=mask))
    for one in (plain, model):
        one.train().set_grad_checkpointing()
    pixels = images(dtype=torch.float64)
    expected, _ = gradients(plain, pixels)
    actual, ran = gradients(model, pixels)
    ran = in_blocks(ran)
    assert ran[: 2 * len(PACKED)] == 2 * PACKED and len(ran) > 2 * len(PACKED)  # the backward runs them again
    assert_same_gradients(actual, expected, 1e-9)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@each([name for name in CASES if name not in ("timm SAM", "timm Gemma4")])  # whose blocks take more than tokens
def test_autocast_gives_what_the_library_gives(case, dtype):
    """A LayerScale in float32 makes a residual in bfloat16 wider in the library, and the fused branches do not."""
    plain, tokens = case.build(), torch.randn(2, 17, 48).to(dtype)
    plain, model = case.row(plain)[0], case.row(vit_fast.optimize(copy.deepcopy(plain)))[0]
    arguments = (None,) if case.operations is SEPARATE else ()  # transformers' layers want a mask
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with vit_fast.backends.recording() as choices:
            actual = model(tokens, *arguments)
        expected = plain(tokens, *arguments)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    assert bool(fused(choices)) is (expected.dtype == tokens.dtype)
    told = [("block", f"the input is {tokens.dtype} under autocast to torch.bfloat16")]
    assert unfused(choices) == ([] if fused(choices) else told)


def test_mixed_dtypes_and_other_inputs_run_as_they_did():
    block, x = vit_fast.optimize(timm_vit(init_values=0.5)).bfloat16().blocks[0], torch.randn(2, 5, 48)
    with vit_fast.backends.recording() as choices, pytest.raises(RuntimeError):
        block(x)
    assert choices == [("block", "library", ("the input is torch.float32, the weights are torch.bfloat16",))]
    assert operations(block, x.bfloat16())[1] == PACKED
    block.ls1.float()
    with vit_fast.backends.recording() as choices, pytest.raises(RuntimeError):
        block(x.bfloat16())  # timm does not cast the float32 that comes of ls1
    assert choices == [("block", "library", ("the input is torch.bfloat16, LayerScale is torch.float32",))]
    assert vit_fast.optimize(timm_vit()).to("meta")(images().to("meta")).shape == (2, 10)


def test_tracers_see_the_library():
    model, x = vit_fast.optimize(timm_vit()), images()
    expected = output(model, x)
    same(torch.fx.symbolic_trace(model)(x), expected)
    same(torch.jit.trace(model, x)(x), expected)  # compares graphs with and without gradients


@pytest.mark.parametrize("name", ("timm", "torchvision", "ViT", "CLIPVision"))
def test_compiles_in_one_graph(name):
    model, x = CASES[name].build(), images()
    with torch.no_grad():
        expected = output(model, x)
        vit_fast.optimize(model)
        same(output(torch.compile(model, fullgraph=True, backend="eager"), x), expected)


def test_compiled_training():
    model, x = timm_vit(init_values=0.5).double().train(), images(dtype=torch.float64)
    expected, _ = gradients(model, x)
    compiled = torch.compile(vit_fast.optimize(model), fullgraph=True, backend="aot_eager")
    actual, _ = gradients(compiled, x)
    assert_same_gradients({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected, 1e-9)


def test_data_parallel_training(tmp_path):
    """DDP around, and FSDP2 over the blocks of, an optimised model; a model that is sharded already stays as it is."""
    model, x = timm_vit(init_values=0.5).double().train(), images(dtype=torch.float64)
    expected, _ = gradients(model, x)
    sharded = copy.deepcopy(model)
    vit_fast.optimize(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        actual, ran = gradients(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), x)
        assert in_blocks(ran) == 2 * PACKED
        assert_same_gradients({name.removeprefix("module."): value for name, value in actual.items()}, expected, 1e-9)
        for one, operations_of_blocks in ((model, 2 * PACKED), (sharded, [])):
            for block in one.blocks:
                torch.distributed.fsdp.fully_shard(block, mesh=mesh)
            vit_fast.optimize(one, strict=one is model)
            actual, ran = gradients(one, x)
            assert in_blocks(ran) == operations_of_blocks
            actual = {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in actual.items()}
            assert_same_gradients(actual, expected, 1e-9)
    finally:
        torch.distributed.destroy_process_group()


@each(PREPARABLE)
def test_prepared_rows(case):
    model, x = case.build().bfloat16(), images(8, torch.bfloat16)
    keys = list(model.state_dict())
    with torch.inference_mode():
        golden, eager = output(copy.deepcopy(model).double(), x.double()), output(model, x)
        vit_fast.prepare(vit_fast.optimize(model))
        actual, ran = operations(model, x)
        assert in_blocks(ran) == ["prepared_blocks"] and list(model.state_dict()) == keys
        assert_within_budget(actual, eager, golden, kind="model", replicas=[])
        assert in_blocks(operations(copy.deepcopy(model), x)[1]) == 2 * case.operations
        handle = case.row(model)[0].get_submodule(case.linear).register_forward_hook(doubled)
        assert in_blocks(operations(model, x)[1]) == case.operations
        handle.remove()
        assert in_blocks(operations(model, x)[1]) == ["prepared_blocks"]
        vit_fast.restore(model)
        result, ran = operations(model, x)
        assert torch.equal(result, eager) and not ran
        assert all(PREPARED not in vars(module) for module in model.modules())
    model.train()
    assert not operations(model, x)[1]


@each(ONE_EACH)
def test_explain_names_the_fused_blocks(case):
    model = vit_fast.optimize(case.build())
    rows = vit_fast.explain(model) if case is CASES["timm"] else vit_fast.explain(model, images())
    names = [f"{case.blocks}.{name}" for name, _ in case.row(model).named_children()]
    expected = [(name, operation) for name in names for operation in case.operations]
    assert [(row.module, row.operation) for row in rows if row.operation != "patch_embed"] == expected


class Trunk(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.trunk(x))


class OtherBlock(Block):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_model_that_holds_a_model_and_one_that_is_a_block(caplog):
    model, x = Trunk(timm_vit()), images()
    model.trunk.blocks[0].__class__ = OtherBlock
    expected = model(x)
    with caplog.at_level(logging.INFO, "vit_fast"):
        actual, ran = operations(vit_fast.optimize(model), x)
    assert caplog.messages == ["optimize leaves trunk.blocks.0 as it is: it is a OtherBlock, a subclass of Block"]
    same(actual, expected)
    assert ran == ["patch_embed", *PACKED] and type(model.trunk.blocks) is nn.Sequential
    block, tokens = moved(Block(48, 3)), torch.randn(2, 5, 48)
    expected = block(tokens)
    assert vit_fast.optimize(block) is block
    assert operations(block, tokens)[1] == PACKED
    same(block(tokens), expected)


def _group_norm(model):
    model.blocks[1].norm2 = nn.GroupNorm(1, 17)


def _hooked(model):
    model.blocks[1].attn.register_forward_hook(doubled)


def _forward(model):
    model.blocks[1].forward = model.blocks[1].forward


def _gate(model):
    model.blocks[1].attn.gate = nn.Sequential(nn.Linear(48, 48))


def _glu(model):
    model.blocks[1].mlp = timm.layers.GlobalResponseNormMlp(48, 96)


def _tanh(model):
    model.blocks[1].mlp.act = nn.Tanh()


def _another_part(model):
    model.blocks[1].adapter = nn.Linear(48, 48)


def _wide_norm(model):
    model.blocks[1].norm1 = nn.LayerNorm((17, 48))


REASONS = {
    _group_norm: "norm2 is torch.nn.modules.normalization.GroupNorm",
    _hooked: "attn carries a hook",
    _forward: "it has a forward of its own",
    _gate: "attn.gate is torch.nn.modules.container.Sequential",
    _glu: "mlp is timm.layers.mlp.GlobalResponseNormMlp",
    _tanh: "mlp.act is torch.nn.modules.activation.Tanh",
    _another_part: "it has parts that are not known: adapter",
    _wide_norm: "norm1 normalises more than the last axis",
}


@pytest.mark.parametrize("change", REASONS)
def test_strict_names_what_stays_and_changes_nothing(change, caplog):
    model, x = timm_vit(), images()
    change(model)
    expected, before = output(model, x), classes(model)
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        vit_fast.optimize(model, strict=True)
    assert str(raised.value) == f"vit_fast.optimize: these blocks stay as they are: blocks.1: {REASONS[change]}"
    assert classes(model) == before
    with caplog.at_level(logging.INFO, "vit_fast"):
        vit_fast.optimize(model)
    assert caplog.messages == [f"optimize leaves blocks.1 as it is: {REASONS[change]}"]
    actual, ran = operations(model, x)
    same(actual, expected)
    assert ran == ["patch_embed", *PACKED]


def reason(block):
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        vit_fast.optimize(block)
    head = f"vit_fast.optimize: no block can be optimised, they stay as they are: {type(block).__name__}: "
    assert str(raised.value).startswith(head)
    return str(raised.value).removeprefix(head)


def test_reasons_of_other_libraries(peer):
    block = EncoderBlock(3, 48, 96, 0.0, 0.0)
    for words, wanted in (
        (dict(kdim=24), "q, k and v differ in width"),
        (dict(add_bias_kv=True), "its attention adds keys"),
        (dict(add_zero_attn=True), "its attention adds keys"),
        (dict(batch_first=False), "its attention is not batch_first"),
    ):
        block.self_attention = nn.MultiheadAttention(48, 3, **dict(batch_first=True) | words)
        assert reason(block) == wanted
    layers = {name: CASES[name].row(CASES[name].build())[0] for name in ("ViT", "Dinov2", "CLIPVision")}
    layers["ViT"].mlp.activation_fn = transformers.activations.ACT2FN["gelu_10"]
    assert reason(layers["ViT"]).startswith("mlp.activation_fn is transformers.activations.Clipped")
    layers["ViT"].mlp.activation_fn = transformers.activations.ACT2FN["gelu_python"]
    assert reason(layers["ViT"]).startswith("its activation is GELUActivation")
    layers["CLIPVision"].self_attn.is_causal = True
    assert reason(layers["CLIPVision"]) == "its attention is causal"
    layers["Dinov2"].attention.config._attn_implementation = "flex_attention"
    assert reason(layers["Dinov2"]) == "its attention runs as 'flex_attention'"
    peer("open_clip")
    tower = open_clip_tower(layers=1)
    tower.transformer.resblocks[0].ln_1_kv = nn.LayerNorm(48)
    with pytest.raises(vit_fast.UnsupportedError, match=r"resblocks\.0: it has parts that are not known: ln_1_kv"):
        vit_fast.optimize(tower)


def test_bad_models():
    for function in (vit_fast.optimize, vit_fast.restore):
        with pytest.raises(TypeError) as raised:
            function(3)
        assert str(raised.value) == f"vit_fast.{function.__name__}: model is int, expected an nn.Module"
    with pytest.raises(ValueError) as raised:
        vit_fast.optimize(nn.Linear(2, 2))
    assert str(raised.value) == (
        "vit_fast.optimize: model is Linear without transformer blocks, expected a model of timm (the blocks of its "
        "ViTs and PatchEmbed); torchvision (EncoderBlock); transformers (vision layers of ViT, DINO, CLIP, SigLIP, "
        "BEiT, SAM, ...); open_clip (ResidualAttentionBlock of the image tower, custom ones too); torch_nn "
        "(TransformerEncoderLayer)"
    )
    with pytest.raises(TypeError, match=r"vit_fast\.optimize: strict is 'yes', expected a bool"):
        vit_fast.optimize(nn.Linear(2, 2), strict="yes")
    linear = nn.Linear(2, 2)
    assert vit_fast.restore(linear) is linear


def test_another_version_of_a_library_is_passed_over(monkeypatch):
    model, name = CASES["ViT"].build(), "transformers.models.vit.modeling_vit"
    vit_fast.optimize(CASES["Dinov2"].build())
    monkeypatch.delitem(sys.modules["vit_fast.integrations.transformers"].FAST, type(model.layers[0]), raising=False)
    monkeypatch.delattr(sys.modules[name], "ViTMLP")
    before = classes(model)
    why = f"transformers is of a version that is not known: cannot import name 'ViTMLP' from '{name}'"
    with pytest.raises(vit_fast.UnsupportedError, match=rf"layers\.0–1: {name}\.ViTLayer is not a class.*; {why}"):
        vit_fast.optimize(model)
    assert classes(model) == before
    for other in (CASES["Dinov2"].build(), timm_vit()):
        assert vit_fast.restore(vit_fast.optimize(other, strict=True)) is other


def test_an_integration_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "vit_fast.integrations.transformers", None)  # import raises ImportError
    with pytest.raises(vit_fast.UnsupportedError, match="transformers is of a version that is not known: import of"):
        vit_fast.optimize(CASES["ViT"].build())
    vit_fast.optimize(timm_vit(), strict=True)


def test_a_failure_midway_changes_nothing(monkeypatch):
    def fail(loaded):
        raise RuntimeError("after the blocks, before their stack")

    model = timm_vit()
    before = classes(model)
    monkeypatch.setattr(vit_fast.class_swap, "_stacks", fail)
    with pytest.raises(RuntimeError, match="after the blocks"):
        vit_fast.optimize(model)
    assert classes(model) == before


def test_no_library_is_imported_for_another():
    code = """
        import sys, torch, vit_fast
        libraries = ("timm", "torchvision", "transformers", "open_clip")
        try:
            vit_fast.optimize(torch.nn.Linear(2, 2))
        except ValueError:
            print([name for name in libraries if name in sys.modules or f"vit_fast.integrations.{name}" in sys.modules])
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "[]\n", result.stderr


def check_kernels(case, device):
    """The kernels of an optimised model keep the budget that the library's own model sets."""
    model, x = case.build().bfloat16().to(device), images(4, torch.bfloat16).to(device)
    with torch.inference_mode():
        golden, eager = output(copy.deepcopy(model).double(), x.double()), output(model, x)
        with vit_fast.backend("triton"):
            actual, ran = operations(vit_fast.optimize(model), x)
    assert in_blocks(ran) == 2 * case.operations
    assert not torch.equal(actual, eager)
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


@pytest.mark.interp
@each(KERNELS)
def test_interpreted_kernels_are_within_the_budget_of_a_model(case):
    check_kernels(case, "cpu")


@pytest.mark.gpu
@each()
def test_gpu_kernels_are_within_the_budget_of_a_model(case):
    check_kernels(case, "cuda")


@pytest.mark.interp
@each(KERNELS)
def test_interpreted_kernels_have_the_gradients_of_the_library(case):
    model, x = case.build().train(), images()
    golden, _ = gradients(copy.deepcopy(model).double(), x.double())
    with vit_fast.backend("triton"):
        actual, ran = gradients(vit_fast.optimize(model), x)
    assert in_blocks(ran) == 2 * case.operations
    assert_same_gradients(actual, golden, 1e-4)


@pytest.mark.interp
@each(ONE_EACH)
def test_compiled_graphs_hold_the_operations(case):
    """The graph that torch.compile sees calls the kernels' operators, so that it is not the library's own."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model, x = vit_fast.optimize(case.build()), images()
    with vit_fast.backend("triton"), torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(x)
    assert in_blocks([t.split(".")[-1].removesuffix("_fwd") for t in targets if "vit_fast" in t]) == 2 * case.operations
