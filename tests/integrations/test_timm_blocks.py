"""timm's ViT family under ``vit_fast.optimize``: outputs against timm's own and float64, masks, drops, adapters.

``test_optimize.py`` runs the same models through copies, hooks, gradients, ``restore``.
"""

import copy

import pytest
import torch
from support.drop_path import philox_drop_path  # noqa: F401 a fixture
from support.library_models import fused, moved, operations
from support.timm_models import MODELS, OPTIONS, build, naflex_input
from timm.layers import DropPath
from timm.models import beit, cait, vision_transformer, vision_transformer_relpos, vision_transformer_sam
from torch import nn

import vit_fast


def images(batch=2, dtype=torch.float32, size=32):
    return torch.randn(batch, 3, size, size).to(dtype)


def in_library(choices):
    return [(operation, *reasons) for operation, backend, reasons in choices if backend == "library"]


def error(actual, golden):
    return (actual.double() - golden).abs().max().item()


@pytest.mark.parametrize("name", (*MODELS, *OPTIONS))
def test_outputs_are_as_exact_as_timm_s_own(name):
    """Equal bits for most; where sums are taken in another order, the error against float64 is of the same size. Every
    parameter is moved away from its initial value, so that a forgotten one shows."""
    plain, x = moved(build(name)), images()
    golden, expected = copy.deepcopy(plain).double()(x.double()), plain(x)
    with vit_fast.backends.recording() as choices:
        actual = vit_fast.optimize(plain, strict=True)(x)
    assert not in_library(choices) and fused(choices)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert error(actual, golden) <= max(2 * error(expected, golden), 1e-6 * golden.abs().max().item())


@pytest.mark.parametrize("name", (*MODELS, "DeepSeek", "class attention", "ParallelThingsBlock", "gated attention"))
def test_autocast_returns_what_timm_returns(name):
    plain, x = moved(build(name)), images()
    model = vit_fast.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, expected = model(x), plain(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ("EVA-02", "DINOv3", "BEiT", "RelPosBlock", "differential", "ViTamin"))
def test_a_batch_of_none_and_one(name):
    plain = moved(build(name))
    model = vit_fast.optimize(copy.deepcopy(plain))
    assert model(images(0)).shape == (0, 10)
    x = images(1)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=2e-6)


COMPILED = ("AIMv2", "EVA-02", "DINOv3", "EvaBlockPostNorm", "BEiT", "SAM", "Gemma4", "DiffParallelScalingBlock")


@pytest.mark.parametrize("name", COMPILED)
def test_each_compiles_in_one_graph(name):
    torch._dynamo.reset()  # the blocks of all these models share one forward, and a limit of compilations
    model, x = moved(build(name)), images()
    with torch.no_grad():
        expected = model(x)
        blocks = vit_fast.optimize(model).blocks
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
        actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ("EVA-02", "mixed RoPE", "BEiT", "SAM", "DINOv3", "NaFlexVit with RoPE"))
def test_checkpointing(name):
    plain, x = moved(build(name)).double().train(), images(dtype=torch.float64)
    model = vit_fast.optimize(copy.deepcopy(plain))
    found = []
    for one in (plain, model):
        one.set_grad_checkpointing(one is model)
        one(x).square().sum().backward()
        found.append({key: parameter.grad for key, parameter in one.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-8, atol=1e-8)


def test_gradients_reach_the_tables_of_positions():
    for name, keys in (
        ("BEiT", ["blocks.0.attn.relative_position_bias_table"]),
        ("shared bias", ["rel_pos_bias.relative_position_bias_table"]),
        ("MLP of positions", ["blocks.1.attn.rel_pos.mlp.fc1.weight"]),
        ("SAM", ["blocks.0.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"]),
        ("mixed RoPE", ["rope.freqs"]),
    ):
        plain, x = moved(build(name)).double(), images(dtype=torch.float64)
        model = vit_fast.optimize(copy.deepcopy(plain), strict=True)
        for one in (plain, model):
            one(x).square().sum().backward()
        for key in keys:
            gradient = plain.get_parameter(key).grad
            assert gradient.abs().max() > 1e-6
            torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ("NaFlexVit", "NaFlexVit with RoPE"))
def test_naflex_masks_run_fused(name):
    plain, x = moved(build(name)), naflex_input()
    model, expected = vit_fast.optimize(copy.deepcopy(plain)), plain(x)
    with vit_fast.backends.recording() as choices:
        actual = model(x)
    given = "the patches are given, and their projection is a linear layer of PyTorch"
    assert in_library(choices) == [("patch_embed", given)] and len(fused(choices)) == 2 * len(MODELS[name][1])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    other = {key: value.clone() for key, value in x.items()}
    other["patches"][1, 7:] += 1  # padding
    torch.testing.assert_close(model(other)[1], actual[1], rtol=1e-5, atol=2e-6)


def drop_cases():
    vit = dict(drop_path_rate=0.5, proj_drop_rate=0.3)
    for name in ("AIMv2", "ResPostBlock", "ParallelScalingBlock", "EVA-02", "DINOv3", "BEiT", "RelPosBlock", "CaiT"):
        builder = MODELS[name][0]
        for key, rate in vit.items():
            yield pytest.param(builder, {key: rate}, id=f"{name}-{key}")


@pytest.mark.usefixtures("philox_drop_path")
@pytest.mark.parametrize(("builder", "rates"), [*drop_cases()])
def test_drops_are_those_of_timm(builder, rates):
    """The same seed gives what timm gives."""
    plain, x = moved(builder(**rates)).double().train(), images(16, torch.float64)
    if "drop_path_rate" in rates:
        for block in plain.blocks:
            path = "drop_path" if hasattr(block, "drop_path") else "drop_path1"
            setattr(block, path, DropPath(0.3))
    model, results = vit_fast.optimize(copy.deepcopy(plain)), []
    for one in (plain, model):
        torch.manual_seed(5)
        with vit_fast.backends.recording() as choices:
            results.append(one(x))
    assert fused(choices) and not in_library(choices)
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    torch.manual_seed(6)
    assert not torch.allclose(model(x), results[1])


def test_drops_that_do_not_fuse_run_as_they_did():
    for name, rates, why in (
        ("SAM", dict(drop_path_rate=0.5), "it drops windows, or tokens of windows"),
        ("SAM", dict(proj_drop_rate=0.3), "it drops windows, or tokens of windows"),
        ("differential", dict(attn_drop_rate=0.3), "its attention drops weights"),
        ("DiffParallelScalingBlock", dict(attn_drop_rate=0.3), "its attention drops weights"),
    ):
        plain, x = moved(MODELS[name][0](**rates)).train(), images(8)
        model, results = vit_fast.optimize(copy.deepcopy(plain)), []
        for one in (plain, model):
            torch.manual_seed(5)
            with vit_fast.backends.recording() as choices:
                results.append(one(x))
        assert ("block", why) in in_library(choices), name
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    (
        ("BEiT", ["qkv", "proj"]),
        ("EVA-02", ["q_proj", "v_proj"]),
        ("DINOv3", ["qkv"]),
        ("SAM", ["qkv"]),
        ("AIMv2", ["fc1_g"]),
        ("ParallelScalingBlock", ["in_proj"]),
    ),
)
def test_adapters_before_and_after(name, targets, peer):
    peft = peer("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    plain, x = moved(build(name)), images()
    untouched = plain(x)
    for first in (True, False):
        torch.manual_seed(3)
        expected_model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
        torch.manual_seed(3)
        model = copy.deepcopy(plain)
        model = vit_fast.optimize(model) if first else model
        model = peft.get_peft_model(model, config).eval()
        if not first:
            try:
                vit_fast.optimize(model)
            except vit_fast.UnsupportedError:
                pass  # every block has an adapter
        expected = expected_model(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=2e-6)
        if name not in ("BEiT", "DINOv3"):  # timm multiplies by the weight of their qkv itself, past the adapter
            assert not torch.allclose(expected, untouched)
        torch.testing.assert_close(model.merge_and_unload()(x), expected_model.merge_and_unload()(x))


def test_reasons():
    block = moved(MODELS["SAM"][0](qk_norm=True))
    with pytest.raises(vit_fast.UnsupportedError, match="it normalises q and k and has decomposed relative position"):
        vit_fast.optimize(block, strict=True)
    things = moved(build("ParallelThingsBlock")).train()
    with vit_fast.backends.recording() as choices:
        vit_fast.optimize(things)(images())
    assert in_library(choices) == 2 * [("block", "it is in training mode")]
    three = vision_transformer.ParallelThingsBlock(48, 3, num_parallel=3)
    with pytest.raises(vit_fast.UnsupportedError, match=r"attns holds 0, 1, 2|parts that are not known"):
        vit_fast.optimize(three)


@pytest.mark.parametrize(
    "block",
    (
        beit.Block(48, 3),
        cait.LayerScaleBlock(48, 3),
        vision_transformer_relpos.RelPosBlock(48, 3),
        vision_transformer_sam.Block(48, 3),
        vision_transformer.ResPostBlock(48, 3),
    ),
)
def test_other_dtypes_and_shapes_fail_or_run_as_in_timm(block):
    block = moved(block)
    fast = vit_fast.optimize(copy.deepcopy(block))
    x = torch.randn(2, 3, 4, 48) if isinstance(block, vision_transformer_sam.Block) else torch.randn(2, 12, 48)
    torch.testing.assert_close(fast(x.mT.contiguous().mT), block(x), rtol=1e-5, atol=2e-6)
    with vit_fast.backends.recording() as choices:
        for one in (fast, block):
            with pytest.raises(RuntimeError):
                one(x.bfloat16())
    assert in_library(choices) == [("block", "the input is torch.bfloat16, the weights are torch.float32")]


def test_operations_of_an_unchanged_block_are_those_of_the_vit():
    model, x = moved(build("BEiT-3")), images()
    assert operations(vit_fast.optimize(model), x)[1] == ["patch_embed", *2 * MODELS["BEiT-3"][1]]
    assert isinstance(model.blocks[0].attn.norm, nn.LayerNorm)
