"""vit_fast.prepare: the budget of a whole model, when prepared weights serve and when they do not, what drops them.

Models are small; those of the families are their own smallest presets. Every parameter is moved away from its initial
value, so that a fold that forgets one shows.
"""

import copy
import logging
import pickle
import threading
import weakref

import pytest
import torch
from support.budget import assert_within_budget
from torch import nn

import vit_fast
from vit_fast import plain
from vit_fast.block import PREPARED

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)
VARIANTS = {
    "plain": {},
    "LayerScale": dict(init_values=0.5),
    "swiglu": dict(mlp_layer="swiglu", act_layer="silu"),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "pre-norm, quick_gelu": dict(pre_norm=True, act_layer="quick_gelu"),
    "registers, pooled": dict(reg_tokens=4, global_pool="avg"),
    "attention pool, gelu_tanh": dict(global_pool="map", class_token=False, act_layer="gelu_tanh"),
}


def moved(model, dtype=torch.bfloat16):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02 if parameter.dim() > 1 else 0.1)
    return model.eval().to(dtype)


def small(dtype=torch.bfloat16, **words):
    return moved(vit_fast.VisionTransformer(**SMALL | words), dtype)


def images(batch=2, dtype=torch.bfloat16):
    return torch.randn(batch, 3, 32, 32).to(dtype)


def used(model, x, operation="prepared_blocks"):
    """Whether prepared weights serve the call."""
    with vit_fast.backends.recording() as choices:
        model(x)
    return operation in [op for op, *_ in choices]


def logits(output):
    return output if isinstance(output, torch.Tensor) else logits(output[0])


def check(model, x):
    """Prepared and eager logits of a model, both held against float64 on the same weights."""
    golden_model = copy.deepcopy(model).double()
    with torch.inference_mode():
        golden, eager = logits(golden_model(x.double())), logits(model(x))
        assert vit_fast.prepare(model) is model
        assert used(model, x)
        actual = logits(model(x))
    assert not torch.equal(actual, eager)
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])
    return actual


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_within_the_budget_of_a_model(variant, dtype):
    check(small(dtype, **VARIANTS[variant]), images(16, dtype))


@pytest.mark.parametrize(
    "name", ("deit_tiny_distilled_patch16_224", "t2t_vit_7", "ViT-B_16", "ViT-B/32", "vit_tiny_patch16_224")
)
def test_families_are_within_the_budget_of_a_model(name):
    model = moved(vit_fast.create_model(name))
    check(model, torch.randn(2, 3, 224, 224).bfloat16())


def relative(actual, golden):
    return ((actual.double() - golden).norm() / golden.norm()).item()


def with_row_scales(model, x):
    """Logits in float64, where every projection of a block rounds the rows of its weight and of its input to e4m3, each
    by a scale of its own that is taken from the row."""

    def rounded(rows):
        scale = 448 / rows.abs().amax(-1, keepdim=True)
        return (rows * scale).float().to(torch.float8_e4m3fn).double() / scale

    model = copy.deepcopy(model).double()
    blocks = [module for module in model.modules() if hasattr(module, "params")]
    projections = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    for layer in projections:
        layer.weight.data = rounded(layer.weight.data)
        layer.register_forward_pre_hook(lambda layer, inputs: (rounded(inputs[0]),))
    assert len(projections) >= 4 * len(blocks) > 0
    return logits(model(x.double()))


def check_fp8(models, x):
    """Scales that are bounds cost no more than scales taken from the data: errors of logits over some models, whose
    weights are rounded but once."""
    errors = []
    for model in models:
        golden_model = copy.deepcopy(model).double()
        with torch.inference_mode():
            golden, eager, row_scales = logits(golden_model(x.double())), logits(model(x)), with_row_scales(model, x)
            assert vit_fast.prepare(model, precision="fp8") is model
            assert used(model, x, "fp8_blocks") and not used(model, x)
            errors.append([relative(output, golden) for output in (logits(model(x)), row_scales, eager)])
    fp8, row_scales, eager = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert 0.9 * eager < fp8 < 1.25 * (row_scales**2 + eager**2) ** 0.5 < 0.2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_float8(variant, dtype):
    check_fp8((small(dtype, **VARIANTS[variant]) for _ in range(6)), images(16, dtype))


@pytest.mark.parametrize("name", ("deit_tiny_distilled_patch16_224", "t2t_vit_7", "vit_tiny_patch16_224"))
def test_families_in_float8(name):
    check_fp8((moved(vit_fast.create_model(name)) for _ in range(2)), torch.randn(2, 3, 224, 224).bfloat16())


def test_refresh_keeps_the_precision(caplog):
    model, x = small(), images()
    vit_fast.prepare(model, precision="fp8")
    with torch.no_grad():
        before = model(x)
        vit_fast.refresh(model)
        assert torch.equal(model(x), before)
        model.blocks[2].mlp.fc2.weight.mul_(2)
        with caplog.at_level(logging.WARNING, "vit_fast"):
            assert not used(model, x, "fp8_blocks") and "prepared weights are dropped" in caplog.text
        vit_fast.refresh(model)
        assert used(model, x, "fp8_blocks") and not torch.equal(model(x), before)
        vit_fast.prepare(model)
        assert used(model, x) and not used(model, x, "fp8_blocks")
        vit_fast.refresh(model)
        assert used(model, x)
        other = copy.deepcopy(model)
        vit_fast.refresh(other)
        assert used(other, x)


def test_bad_precision_and_capability(monkeypatch):
    for precision in ("fp16", "FP8", torch.float8_e4m3fn, 8):
        with pytest.raises(ValueError) as raised:
            vit_fast.prepare(small(), precision=precision)
        assert str(raised.value) == f"vit_fast.prepare: precision is {precision!r}, expected None, 'fp8' or 'int8'"

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 0)

    model = small()
    for block in model.blocks:
        for module in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(OnCuda), requires_grad=False)
    monkeypatch.setattr(plain, "_PARAMETERS", plain._PARAMETERS | {OnCuda})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        vit_fast.prepare(model, precision="fp8")
    assert str(raised.value).endswith("blocks: float8 needs capability 8.9, cuda:0 has 8.6")


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_interpreted_kernels_in_float8(dtype):
    with vit_fast.backend("triton"):
        check_fp8([small(dtype, init_values=0.5) for _ in range(2)], images(4, dtype))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_interpreted_kernels_are_within_the_budget_of_a_model(dtype):
    with vit_fast.backend("triton"):
        model, x = small(dtype, init_values=0.5), images(4, dtype)
        vit_fast.prepare(model)
        with torch.inference_mode():
            actual = model(x)
    model, golden_model = copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.inference_mode(), vit_fast.backend("torch"):
        assert_within_budget(actual, model(x), golden_model(x.double()), kind="model", replicas=[])


def test_a_row_of_blocks_runs_in_parts():
    model, x = small(), images()
    with torch.inference_mode():
        plain = model.forward_intermediates(x, [0, 2], norm=True)
        maps = model.get_attention_maps(x, [1])
        vit_fast.prepare(model)
        assert used(lambda x: model.forward_intermediates(x, [0, 2]), x)
        prepared = model.forward_intermediates(x, [0, 2], norm=True)
        whole = model.forward_features(x)
    assert torch.equal(prepared[0], prepared[0]) and len(prepared[1]) == 2
    torch.testing.assert_close(prepared[0].float(), whole.float(), rtol=0.02, atol=0.05)
    for one, other in zip(prepared[1], plain[1]):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.1)
    with torch.inference_mode():
        torch.testing.assert_close(model.get_attention_maps(x, [1])[0], maps[0], rtol=0.05, atol=0.01)
        early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], prepared[1][0] * 0 + early[0])


def test_training_gradients_autocast_and_hooks_go_past_the_copies():
    model, x = small(), images()
    plain = copy.deepcopy(model)
    vit_fast.prepare(model)
    assert not used(model, x) and torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert used(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not used(model, x)
        model.train()
        assert not used(model, x)
        model.eval()
        assert used(model, x)
        seen = []
        for module in (model.blocks[1], model.blocks[1].attn, model.blocks[1].mlp.fc1):
            for register in (module.register_forward_hook, module.register_forward_pre_hook):
                seen.clear()
                handle = register(lambda *arguments: seen.append(len(arguments)))
                assert not used(model, x) and len(seen) == 1
                assert torch.equal(model(x), plain(x))
                handle.remove()
        assert used(model, x)
        fc1 = model.blocks[1].mlp.fc1
        fc1.forward = lambda x: seen.append(x) or nn.Linear.forward(fc1, x)
        seen.clear()
        assert not used(model, x) and len(seen) == 1
        del fc1.forward
        assert used(model, x)
        model.blocks[0].training = True
        assert not used(model, x)
        model.eval()
        nn.utils.parametrizations.weight_norm(model.blocks[0].attn.proj)
        assert not used(model, x)


def _scale(model):
    model.blocks[2].mlp.fc2.weight.mul_(2)


def _scale_norm(model):
    model.blocks[0].norm1.weight.mul_(-8)


def _replace_parameter(model):
    model.blocks[1].attn.proj.weight = nn.Parameter(torch.randn(48, 48).bfloat16())


def _replace_module(model):
    model.blocks[1].mlp.fc1 = nn.Linear(48, 192).bfloat16().eval()


def _load(model):
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


def _move(model):
    model.to(torch.float16).to(torch.bfloat16)


@pytest.mark.parametrize("change", (_scale, _scale_norm, _replace_parameter, _replace_module, _load, _move))
def test_a_changed_weight_drops_them(change, caplog):
    model, x = small(), images()
    vit_fast.prepare(model)
    with torch.no_grad():
        before = model(x)
        change(model)
        plain = copy.deepcopy(model)
        with caplog.at_level(logging.WARNING, "vit_fast"):
            assert not used(model, x)
        assert "prepared weights are dropped" in caplog.text and "refresh" in caplog.text
        assert torch.equal(model(x), plain(x))
        caplog.clear()
        vit_fast.refresh(model)
        assert used(model, x) and not caplog.text
        if change is not _move:
            assert not torch.allclose(model(x), before, rtol=0.05, atol=0.05)
        torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.1)


def test_a_write_through_data_is_seen_by_refresh():
    model, x = small(), images()
    vit_fast.prepare(model)
    with torch.no_grad():
        before = model(x)
        model.blocks[0].mlp.fc1.weight.data.mul_(3)
        assert torch.equal(model(x), before)
        vit_fast.refresh(model)
        assert not torch.equal(model(x), before)


def test_copies_are_nobodys_business_but_the_models():
    model, x = small(), images()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    vit_fast.prepare(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    assert sum(1 for _ in model.buffers()) == 0
    with torch.no_grad():
        for other in (copy.deepcopy(model), copy.copy(model.blocks), pickle.loads(pickle.dumps(model))):
            if isinstance(other, nn.Sequential):
                continue
            assert not hasattr(other.blocks.__dict__[PREPARED], "weights") and not used(other, x)
            torch.testing.assert_close(other(x), model(x), rtol=0.05, atol=0.1)


def test_explain_names_them():
    model = small()
    vit_fast.prepare(model)
    assert [row.operation for row in vit_fast.explain(model)] == ["patch_embed", "prepared_blocks", "layer_norm"]


def test_compiled_code_runs_the_weights_themselves():
    model, x = small(depth=1), images()
    with torch.no_grad():
        plain = model(x)
        vit_fast.prepare(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain)


def test_an_inner_model_and_several_rows():
    inner = small()
    outer = nn.ModuleDict({"tower": inner, "other": moved(vit_fast.VisionTransformer(**SMALL | dict(depth=1)))}).eval()
    vit_fast.prepare(outer)
    with torch.no_grad():
        assert used(outer["tower"], images()) and used(outer["other"], images())


def test_other_dtypes_and_shapes_of_input():
    model = small(dynamic_img_size=True)
    vit_fast.prepare(model)
    with torch.no_grad():
        assert used(model, torch.randn(1, 3, 48, 32).bfloat16())
        assert used(model, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
        assert model(torch.zeros(0, 3, 32, 32).bfloat16()).shape == (0, 10)


def test_threads_share_a_prepared_model():
    model, x = small(), images()
    vit_fast.prepare(model)
    with torch.no_grad():
        expected = model(x)
    failures = []

    def work():
        with torch.no_grad():
            failures.extend(1 for _ in range(20) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_bad_models():
    for model, error, message in (
        ("vit", TypeError, "model is str, expected an nn.Module"),
        (small().train(), ValueError, "model is in training mode, expected model.eval()"),
        (
            nn.Linear(2, 2).eval(),
            ValueError,
            "model is Linear without transformer blocks of this library, expected a VisionTransformer, a model of "
            "vit_fast.systems or an optimised model",
        ),
        (
            small(torch.float32),
            vit_fast.UnsupportedError,
            "nothing can be prepared: blocks: the weights are float32, folding is for all float16 or all bfloat16 "
            "(model.to(torch.bfloat16)), float32 is for a CPU with its C++ library (run `vit-fast build`)",
        ),
        (
            moved(vit_fast.create_model("vit_from_scratch")),
            vit_fast.UnsupportedError,
            "nothing can be prepared: transformer_encoder.layers: the blocks are not pre-norm",
        ),
        (
            small().to("meta"),
            vit_fast.UnsupportedError,
            "nothing can be prepared: blocks: the weights are on the device meta",
        ),
    ):
        for function in (vit_fast.prepare, vit_fast.refresh):
            with pytest.raises(error) as raised:
                function(model)
            assert str(raised.value) == f"vit_fast.{function.__name__}: {message}"


def rows_of(model, x):
    """Which block or stack runs prepared, by name."""
    with torch.inference_mode():
        return [row.module for row in vit_fast.explain(model, x) if row.operation == "prepared_blocks"]


def test_unlike_blocks_are_prepared_alone():
    x = images(16)
    for change in (
        lambda block: setattr(block.attn, "scale", 0.5),
        lambda block: setattr(block.norm1, "eps", 1e-3),
    ):
        model = small()
        change(model.blocks[1])
        check(model, x)
        assert rows_of(model, x) == [f"blocks.{i}" for i in range(len(model.blocks))]
    model = small(qk_norm=True)
    check(model, x)
    assert rows_of(model, x) == [f"blocks.{i}" for i in range(len(model.blocks))]
    vit_fast.unprepare(model)
    assert not rows_of(model, x)


def test_stacks_that_stay_are_told():
    model = small()
    model.blocks[1].attn.register_forward_hook(lambda *arguments: None)
    with pytest.raises(vit_fast.UnsupportedError, match="a block carries a hook, a parametrization or a module"):
        vit_fast.prepare(model)
    model = small()
    model.blocks[0].mlp.half()
    with pytest.raises(vit_fast.UnsupportedError, match="the weights are bfloat16, float16, folding is for all"):
        vit_fast.prepare(model)


def test_a_block_of_a_prepared_stack_runs_prepared_alone_too():
    """As models do that loop over their blocks to collect features, or give them masks."""
    model = vit_fast.prepare(small())
    with torch.inference_mode():
        tokens = torch.randn(2, 5, model.embed_dim, dtype=torch.bfloat16)
        whole, loop = model.blocks(tokens), tokens
        for block in model.blocks:
            loop = block(loop)
        assert torch.equal(whole, loop)
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        masked = model.blocks[0](tokens, attn_mask=mask)
        vit_fast.unprepare(model)
        torch.testing.assert_close(masked, model.blocks[0](tokens, attn_mask=mask), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("name", ("vit_base_patch16_224", "vit_small_patch14_reg4_dinov2", "ViT-B/16"))
def test_gpu_models(name, dtype):
    model = moved(vit_fast.create_model(name), dtype).cuda()
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    x = torch.randn(8, *size).to("cuda", dtype)
    with vit_fast.backend("triton"):
        actual = check(model, x)
        with torch.inference_mode():
            assert torch.equal(actual, logits(model(x)))


def test_released_weights_come_back_by_loading():
    model, x = small(), images()
    saved = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        eager = model(x)
    assert vit_fast.prepare(model, release=True) is model
    weight = model.blocks[0].mlp.fc1.weight
    assert weight.is_meta and weight.shape == saved["blocks.0.mlp.fc1.weight"].shape and not model.head.weight.is_meta
    assert model.blocks[0].norm1.weight.device == model.blocks[0].mlp.fc1.bias.device == torch.device("cpu")
    with torch.inference_mode():
        assert used(model, x)
        released = model(x)
    other = copy.deepcopy(model)
    calls = (
        ("gradients are enabled", lambda: model(x)),
        ("a copy or pickle", lambda: torch.no_grad()(other)(x)),
        ("unprepare", lambda: vit_fast.unprepare(model)),
        ("unprepare", lambda: vit_fast.check(model, x)),
    )
    for reason, call in calls:
        with pytest.raises(RuntimeError, match=rf"(?s){reason}.*were released; load these again with"):
            call()
    with pytest.raises(vit_fast.UnsupportedError, match="the weights are on the device meta"):
        vit_fast.refresh(model)
    for each in (model, other):
        each.load_state_dict(saved, assign=True)
        with torch.inference_mode():
            assert torch.equal(each(x), eager) and not used(each, x)
            assert torch.equal(vit_fast.refresh(each)(x), released) and used(each, x)
        assert vit_fast.check(each, x).passed
        vit_fast.unprepare(each)


def test_released_weights_are_no_longer_held():
    """Block by block: the folded weights of one block need the memory of no other."""
    model = small()
    held = [weakref.ref(p) for p in model.blocks.parameters() if p.dim() > 1]
    vit_fast.prepare(model, release=True)
    assert len(held) == 12 and not any(reference() is not None for reference in held)
