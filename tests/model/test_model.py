"""VisionTransformer against timm: keys, strict load, every block's output, logits; options, compile, export, errors.

Parameters are perturbed away from their initial values first: zero biases and unit gains would hide what is left out.
Both models run the same float32 arithmetic on a CPU, so that the largest difference allowed is a few ulp of the output.
"""

import copy
import pickle

import pytest
import timm
import torch
import torch._dynamo.testing
from support.models import SMALL, assert_equal, images_for, perturb
from torch import nn
from torch.utils._pytree import tree_leaves

import vit_fast
from vit_fast.presets import PRESETS

# name → smaller words, so that twelve families run in a minute; widths, heads, patches and options stay the family's.
ARCHITECTURES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch8_224": dict(img_size=64, depth=3),
    "vit_base_patch16_224": dict(depth=4),
    "vit_base_patch32_384": dict(depth=3),
    "vit_large_patch14_224": dict(img_size=112, depth=2),
    "vit_huge_patch14_224": dict(img_size=56, depth=2),
    "vit_giant_patch14_224": dict(img_size=56, depth=1),
    "vit_base_patch16_clip_224": dict(depth=3),
    "vit_base_patch32_clip_quickgelu_224": dict(depth=3),
    "vit_small_patch14_dinov2": dict(img_size=98, depth=4),
    "vit_giant_patch14_reg4_dinov2": dict(img_size=56, depth=1),
    "vit_base_patch16_siglip_224": dict(img_size=128, depth=3),
    "vit_so400m_patch14_siglip_gap_224": dict(img_size=56, depth=2),
    "vit_base_patch32_siglip_256": dict(depth=2),
    "vit_base_patch16_reg4_gap_256": dict(img_size=128, depth=2),
}


def pair(name, **words):
    theirs = perturb(timm.create_model(name, **words)).eval()
    ours = vit_fast.create_model(name, **words).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("name", [name for name, p in PRESETS.items() if p.build is vit_fast.VisionTransformer])
def test_keys_and_shapes_are_timms(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), vit_fast.create_model(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    config = theirs.default_cfg
    assert ours.default_cfg["input_size"] == tuple(config["input_size"])
    assert (ours.default_cfg["mean"], ours.default_cfg["std"]) == (tuple(config["mean"]), tuple(config["std"]))
    assert ours.num_classes == config["num_classes"]


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parity_with_timm(name):
    ours, theirs = pair(name, **ARCHITECTURES[name])
    x = images_for(ours)
    final, blocks = ours.forward_intermediates(x, norm=False, return_prefix_tokens=True)
    their_final, their_blocks = theirs.forward_intermediates(x, norm=False, return_prefix_tokens=True)
    assert len(blocks) == len(their_blocks) == len(ours.blocks)
    for ours_i, theirs_i in zip(blocks, their_blocks, strict=True):
        for a, b in zip(ours_i, theirs_i, strict=True) if isinstance(ours_i, tuple) else [(ours_i, theirs_i)]:
            assert_equal(a, b)
    assert_equal(final, their_final)
    assert_equal(ours.forward_features(x), theirs.forward_features(x))
    logits = ours(x)
    assert_equal(logits, theirs(x))
    assert_equal(
        ours.forward_head(ours.forward_features(x), pre_logits=True),
        theirs.forward_head(theirs.forward_features(x), pre_logits=True),
    )
    assert not torch.allclose(logits[0], logits[1])


OPTIONS = {
    "qk_norm": dict(qk_norm=True),
    "no qkv bias": dict(qkv_bias=False, proj_bias=False),
    "layer scale": dict(init_values=0.3),
    "pre-norm": dict(pre_norm=True),
    "registers": dict(reg_tokens=3),
    "registers outside pos_embed": dict(reg_tokens=3, no_embed_class=True),
    "no class token, avg": dict(class_token=False, global_pool="avg"),
    "avg with prefix": dict(global_pool="avg", pool_include_prefix=True),
    "avg, norm before": dict(global_pool="avg", fc_norm=False),
    "max": dict(global_pool="max"),
    "avgmax": dict(global_pool="avgmax"),
    "map": dict(class_token=False, global_pool="map"),
    "no pool": dict(global_pool=""),
    "no head": dict(num_classes=0),
    "no pos_embed": dict(pos_embed="none"),
    "no final norm": dict(final_norm=False),
    "one channel, not square": dict(in_chans=1, img_size=(32, 48), patch_size=(8, 16)),
    "tanh": dict(act_layer="gelu_tanh"),
    "quick": dict(act_layer="quick_gelu"),
    "relu": dict(act_layer="relu"),
    "eps": dict(norm_layer=nn.LayerNorm),
    "mlp ratio": dict(mlp_ratio=2.5),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_forward_and_gradients(option):
    words = SMALL | OPTIONS[option]
    theirs = perturb(timm.models.vision_transformer.VisionTransformer(**words))
    ours = vit_fast.VisionTransformer(**words)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        x = images_for(ours)
        results = []
        for model in (ours, theirs):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            out.square().mean().backward()
            results.append((out, leaf.grad, {n: p.grad for n, p in model.named_parameters()}))
        assert_equal(results[0][0], results[1][0])
        assert_equal(results[0][1], results[1][1])
        for name, grad in results[0][2].items():
            assert grad is not None, name
            assert_equal(grad, results[1][2][name])


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (48, 24), (16, 80)])
def test_dynamic_sizes(size):
    words = SMALL | dict(dynamic_img_size=True, reg_tokens=1)
    theirs = perturb(timm.models.vision_transformer.VisionTransformer(**words)).eval()
    ours = vit_fast.VisionTransformer(**words).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    for _ in range(2):
        assert_equal(ours(x), theirs(x))
    ours.pos_embed.mul_(2), theirs.pos_embed.mul_(2)
    assert_equal(ours(x), theirs(x))


@torch.no_grad()
def test_padding_and_set_input_size():
    words = SMALL | dict(dynamic_img_size=True, dynamic_img_pad=True)
    theirs = perturb(timm.models.vision_transformer.VisionTransformer(**words)).eval()
    ours = vit_fast.VisionTransformer(**words).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 27, 41)
    assert_equal(ours(x), theirs(x))
    assert ours.forward_intermediates(x, 1, intermediates_only=True)[0].shape == (2, 48, 4, 6)
    fixed, theirs_fixed = (
        m(**SMALL).eval() for m in (vit_fast.VisionTransformer, timm.models.vision_transformer.VisionTransformer)
    )
    fixed.load_state_dict(theirs_fixed.state_dict())
    fixed.set_input_size((48, 16)), theirs_fixed.set_input_size((48, 16))
    x = torch.randn(2, 3, 48, 16)
    assert_equal(fixed(x), theirs_fixed(x))
    assert fixed.patch_embed.grid_size == (6, 2)


@torch.no_grad()
def test_intermediates_are_timms():
    ours, theirs = pair("vit_small_patch14_reg4_dinov2", img_size=56, depth=4)
    x = images_for(ours)
    for words in (
        dict(indices=2, norm=True),
        dict(indices=[0, -1], output_fmt="NLC"),
        dict(indices=[1], stop_early=True, intermediates_only=True),
        dict(indices=1, return_prefix_tokens=True),
    ):
        a, b = ours.forward_intermediates(x, **words), theirs.forward_intermediates(x, **words)
        for left, right in zip(tree_leaves(a), tree_leaves(b), strict=True):
            assert_equal(left, right)
    a, b = (m.forward_intermediates(x, 2, output_dict=True, return_prefix_tokens=True) for m in (ours, theirs))
    assert a.keys() == b.keys()
    for key in a:
        for left, right in zip(tree_leaves(a[key]), tree_leaves(b[key]), strict=True):
            assert_equal(left, right)
    for a, b in zip(*(m.get_intermediate_layers(x, 2, reshape=True, norm=True) for m in (ours, theirs)), strict=True):
        assert_equal(a, b)
    with pytest.raises(ValueError, match="layer 9 asked for, expected 0 to 3"):
        ours.get_intermediate_layers(x, [9])


@torch.no_grad()
def test_attention_maps():
    model = perturb(vit_fast.VisionTransformer(**SMALL, qk_norm=True, reg_tokens=1)).eval()
    x = images_for(model)
    seen = {}

    def watch(name):
        def hook(module, inputs):
            qkv = module.qkv(inputs[0])
            q, k, _ = qkv.reshape(2, 18, 3, 4, 12).permute(2, 0, 3, 1, 4)
            q, k = module.q_norm(q), module.k_norm(k)
            seen[name] = ((q @ k.transpose(-2, -1)) * 12**-0.5).softmax(-1)

        return hook

    maps = model.get_attention_maps(x, [0, 1])
    handles = [block.attn.register_forward_pre_hook(watch(i)) for i, block in enumerate(model.blocks)]
    model(x)
    for handle in handles:
        handle.remove()
    for i, probabilities in enumerate(maps):
        assert probabilities.shape == (2, 4, 18, 18)
        torch.testing.assert_close(probabilities, seen[i])
    (row,) = model.get_attention_maps(x, 1, queries=slice(0, 1))
    torch.testing.assert_close(row, maps[1][:, :, :1])


@torch.no_grad()
def test_hooks_and_parametrizations_are_honoured():
    model = perturb(vit_fast.VisionTransformer(**SMALL, init_values=0.5)).eval()
    x = images_for(model)
    plain = model(x)
    calls = []
    for name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    assert not model.blocks[0].is_fused()
    assert_equal(model(x), plain)
    assert {"patch_embed.proj", "blocks.1.attn.qkv", "blocks.0.mlp.fc2", "blocks.0.ls1", "norm", "head"} <= set(calls)
    changed = vit_fast.VisionTransformer(**SMALL).eval()
    before = changed(x)
    nn.utils.parametrize.register_parametrization(changed.blocks[0].mlp.fc1, "weight", nn.Tanh())
    assert not changed.blocks[0].is_fused() and changed.blocks[1].is_fused()
    changed.blocks[0].mlp.fc1.parametrizations.weight.original.mul_(30)
    assert not torch.allclose(changed(x), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["patch_embed", "patch_embed.proj", "blocks.1", "blocks.1.attn", "blocks.0.mlp.fc2", "norm", "head"]
)
def test_a_forward_that_an_instance_was_given_runs(name):
    model = perturb(vit_fast.VisionTransformer(**SMALL)).eval()
    x, module, calls = images_for(model), model.get_submodule(name), []
    plain, forward = model(x), module.forward

    def counted(*args, **kwargs):
        calls.append(name)
        return forward(*args, **kwargs)

    module.forward = counted
    assert_equal(model(x), plain)
    assert calls == [name]


@torch.no_grad()
def test_uint8_images():
    model = vit_fast.VisionTransformer(**SMALL, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    torch.testing.assert_close(model(pixels), model((pixels / 255 - mean) / std))


def test_drop_rates():
    rates = dict(
        drop_rate=0.1,
        pos_drop_rate=0.1,
        patch_drop_rate=0.3,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.4,
    )
    model = vit_fast.VisionTransformer(**SMALL | dict(depth=3), **rates)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    x = images_for(model)
    a, b = model(x), model(x)
    assert not torch.allclose(a, b)
    a.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model(x), model(x))
    plain = vit_fast.VisionTransformer(**SMALL | dict(depth=3)).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))


def test_drop_path_keeps_the_mean():
    from vit_fast.block import drop_path_scale

    scale = drop_path_scale(torch.zeros(20000, 1), 0.25, True)
    assert scale.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(scale.mean().item() - 1) < 0.03
    assert drop_path_scale(torch.zeros(2, 1), 0.25, False) is None


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_grad_checkpointing_changes_nothing(drop):
    model = perturb(vit_fast.VisionTransformer(**SMALL, proj_drop_rate=drop, drop_path_rate=drop))
    grads = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        model(images_for(model)).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0, atol=0)


@torch.no_grad()
def test_compile_without_breaks_and_few_recompiles():
    model = vit_fast.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (1, 2, 3, 4, 5, 8, 16, 7):
        x = torch.randn(batch, 3, 64, 64)
        assert_equal(compiled(x), model(x))
    assert counter.frame_count <= 3, "more than two recompiles"


def test_compiled_training_step():
    words = SMALL | dict(qk_norm=True, init_values=0.3, reg_tokens=1, drop_path_rate=0.0)
    model = perturb(vit_fast.VisionTransformer(**words))
    x = images_for(model)
    model(x).square().mean().backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, eager[name])


@torch.no_grad()
def test_compile_follows_the_backend():
    model = vit_fast.VisionTransformer(**SMALL).eval()
    compiled = torch.compile(model, backend="eager")
    x = images_for(model)
    compiled(x)
    with vit_fast.backend("cuda"), pytest.raises(vit_fast.UnsupportedError, match="'cuda' was forced"):
        compiled(x)
    assert_equal(compiled(x), model(x))


@torch.no_grad()
def test_inductor():
    model = perturb(vit_fast.VisionTransformer(**SMALL | dict(depth=1))).eval()
    x = images_for(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_export_with_dynamic_batch(tmp_path):
    model = perturb(vit_fast.VisionTransformer(**SMALL, reg_tokens=1)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images_for(model),), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, tmp_path / "vit.pt2")
    loaded = torch.export.load(tmp_path / "vit.pt2").module()
    for size in (1, 5):
        x = images_for(model, size)
        assert_equal(loaded(x), model(x))


@torch.no_grad()
def test_copies_and_pickles():
    model = perturb(vit_fast.VisionTransformer(**SMALL, dynamic_img_size=True)).eval()
    x = torch.randn(1, 3, 48, 48)
    out = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), out)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not torch.equal(copied(x), out)
    assert torch.equal(model(x), out)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_timm(dtype):
    ours, theirs = pair("vit_tiny_patch16_224", depth=4, img_size=96)
    golden = copy.deepcopy(theirs).double()
    x = images_for(ours).to(dtype)
    for parameter, low in zip(golden.parameters(), theirs.to(dtype).parameters(), strict=True):
        parameter.copy_(low.double())
    error = lambda model: (model(x).double() - golden(x.double())).abs().max().item()  # noqa: E731
    assert error(ours.to(dtype)) <= 1.25 * error(theirs)


def test_init_modes():
    for mode in ("", "jax", "jax_nlhb", "moco"):
        torch.manual_seed(0)
        model = vit_fast.VisionTransformer(**SMALL | dict(embed_dim=192), weight_init=mode)
        torch.manual_seed(0)
        theirs = timm.models.vision_transformer.VisionTransformer(**SMALL | dict(embed_dim=192), weight_init=mode)
        for (name, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.15, abs=2e-6), (mode, name)
            assert a.mean().item() == pytest.approx(b.mean().item(), abs=max(0.2 * b.std().item(), 1e-5)), (mode, name)


def test_classifier_and_groups():
    model = vit_fast.VisionTransformer(**SMALL)
    model.reset_classifier(3, "avg")
    assert model(images_for(model)).shape == (2, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(images_for(model)).shape == (2, 48)
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}
    assert [info["reduction"] for info in model.feature_info] == [8, 8]
    with pytest.raises(ValueError, match="expected a model built with it"):
        model.reset_classifier(3, "map")


def test_explain_names_the_reason():
    model = vit_fast.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    rows = vit_fast.explain(model)
    assert model.training
    assert [r.operation for r in rows if r.module == "blocks.1"] == [
        "layer_norm_linear",
        "attention",
        "linear_residual",
        "layernorm_mlp",
    ]
    assert all(r.backend == "torch" and "TRITON_INTERPRET" in r.reasons[0] for r in rows)
    with vit_fast.backend("torch"):
        assert "forced" in str(vit_fast.explain(model))
    model.set_input_size(64)
    assert len(vit_fast.explain(model)) == len(rows)


@pytest.mark.interp
def test_explain_under_triton():
    model = vit_fast.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    rows = vit_fast.explain(model)
    assert {r.backend for r in rows} == {"triton"} and not any(r.reasons for r in rows)


@pytest.mark.interp
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_base_patch32_clip_quickgelu_224",
    ],
)
def test_interpreted_model_is_no_worse_than_eager(name, dtype):
    """The whole model through the kernels, held to 1.25 × the error of timm's eager at the same dtype."""
    words = dict(img_size=56 if "14" in name else 64, depth=1, num_classes=10, embed_dim=192, num_heads=3)
    ours, theirs = pair(name, **words)
    x = images_for(ours).to(dtype)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    golden = copy.deepcopy(theirs).double()(x.double())
    with vit_fast.backend("triton"):
        error = (ours(x).double() - golden).abs().max().item()
    eager = (theirs(x).double() - golden).abs().max().item()
    ulp = torch.finfo(dtype).eps * golden.abs().max().item()
    assert error <= 1.25 * eager + (4 * ulp if dtype == torch.float32 else 0.5 * ulp)


@pytest.mark.interp
def test_training_step_through_kernels():
    words = SMALL | dict(init_values=0.3, drop_path_rate=0.0)
    model = perturb(vit_fast.VisionTransformer(**words))
    x = images_for(model)
    grads = []
    for name in ("torch", "triton"):
        model.zero_grad()
        with vit_fast.backend(name):
            model(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.interp
@torch.no_grad()
def test_compile_through_kernels():
    model = perturb(vit_fast.VisionTransformer(**SMALL | dict(depth=1))).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (1, 2, 3, 5):
        x = images_for(model, batch)
        assert_equal(compiled(x), model(x))
    assert counter.frame_count <= 3


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "vit_so400m_patch14_siglip_gap_224", "vit_giant_patch14_clip_224"]
)
def test_gpu_model_is_no_worse_than_eager(name, dtype):
    ours, theirs = pair(name, depth=6)
    ours, theirs = ours.to("cuda", dtype), theirs.to("cuda", dtype)
    x = images_for(ours, 8).to("cuda", dtype)
    golden = copy.deepcopy(theirs).double()(x.double())
    with vit_fast.backend("triton"):
        out = ours(x)
        assert torch.equal(out, ours(x))
    eager = (theirs(x).double() - golden).abs().max().item()
    ulp = torch.finfo(dtype).eps * golden.abs().max().item()
    error = (out.double() - golden).abs().max().item()
    assert error <= 1.25 * eager + (4 * ulp if dtype == torch.float32 else 0.5 * ulp)


BAD_WORDS = {
    "heads": (dict(num_heads=5), ValueError, "num_heads is 5, expected a divisor of embed_dim 48"),
    "zero depth": (dict(depth=0), ValueError, "depth is 0, expected 1 or more"),
    "negative width": (dict(embed_dim=-48), ValueError, "embed_dim is -48"),
    "float": (dict(depth=2.0), TypeError, "depth is 2.0, expected an int"),
    "pool": (dict(global_pool="mean"), ValueError, "global_pool is 'mean', expected one of"),
    "token": (dict(class_token=False), ValueError, "global_pool is 'token', expected another pool"),
    "small image": (dict(img_size=4), ValueError, "img_size is 4×4, expected at least one patch of 8×8"),
    "patch": (dict(patch_size=0), ValueError, "patch_size is 0, expected 1 or more"),
    "activation": (dict(act_layer="mish"), ValueError, "act_layer is 'mish', expected one of gelu"),
    "norm": (dict(norm_layer=nn.BatchNorm1d), ValueError, "norm_layer is .*, expected a LayerNorm class"),
    "mlp": (dict(mlp_layer="moe"), ValueError, "mlp_layer is 'moe', expected 'mlp' or 'swiglu'"),
    "odd swiglu": (dict(mlp_layer="swiglu", mlp_ratio=49 / 48), ValueError, "expected an even hidden width"),
    "rate": (dict(drop_path_rate=1.5), ValueError, "drop_path_rate is 1.5, expected 0 ≤ rate < 1"),
    "huge width": (dict(embed_dim=48 * 10**20), ValueError, "embed_dim is 4800.*, expected a number of 64 bits"),
    "huge image": (dict(img_size=10**20), ValueError, "img_size is 1000.*, expected a number of 64 bits"),
    "policy": (dict(pos_embed_policy="R9"), ValueError, "policy is 'R9', expected one of R1"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words(case):
    words, error, message = BAD_WORDS[case]
    with pytest.raises(error, match=message):
        vit_fast.VisionTransformer(**SMALL | words)


def test_bad_images():
    model = vit_fast.VisionTransformer(**SMALL).eval()
    for images, error, message in (
        (torch.zeros(3, 32, 32), ValueError, "images have 3 dimensions, expected 4"),
        (torch.zeros(1, 4, 32, 32), ValueError, "images have 4 channels, expected 3"),
        (torch.zeros(1, 3, 32, 40), ValueError, "images are 32×40, expected 32×32"),
        ([1], TypeError, "images are list, expected a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            model(images)
    dynamic = vit_fast.VisionTransformer(**SMALL, dynamic_img_size=True)
    with pytest.raises(ValueError, match="images are 30×32, expected multiples of the patch 8×8"):
        dynamic(torch.zeros(1, 3, 30, 32))
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 7)


def test_unknown_names_are_helped():
    with pytest.raises(ValueError, match=r"unknown model 'vit_base_patch16_244'; near: .*vit_base_patch16_224"):
        vit_fast.create_model("vit_base_patch16_244")
    assert "vit_base_patch14_dinov2" in vit_fast.list_models("*dinov2*")
