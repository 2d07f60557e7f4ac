"""Modules whose weights may not be read past their ``__call__``: hooks, adapters, pruning, parametrizations, torchao.

Every family, every sub-module: what eager PyTorch would run is run, and ``explain`` says why a block is not fused.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed.fsdp
import torch.nn.utils.parametrizations as parametrizations
from support.library_models import CASES
from torch import nn
from torch.nn.utils import prune

import vit_fast
from vit_fast import parity, systems

CLIP = dict(patch_size=8, width=16, layers=2, heads=2, output_dim=6)
DEIT = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
T2T = dict(img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=5, token_dim=8, mlp_ratio=2.0)
SCRATCH = dict(image_h=8, image_w=8, model_dim=16, nhead=2, num_layers=2, dim_feedforward=24, num_classes=5)
LANL = dict(token_len=16, depth=2, num_heads=2, preds=3)
OWN = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
HYBRID = {
    "hidden_size": 16, "patches": {"size": (8, 8)}, "classifier": "token",
    "transformer": {"mlp_dim": 24, "num_heads": 2, "num_layers": 2},
}  # fmt: skip
MODELS = {
    "own": lambda: vit_fast.VisionTransformer(**OWN, qk_norm=True, init_values=0.5, pre_norm=True),
    "own_map": lambda: vit_fast.VisionTransformer(**OWN, global_pool="map", act_layer="gelu_tanh"),
    "own_avg": lambda: vit_fast.VisionTransformer(**OWN, global_pool="avg", mlp_layer="swiglu", reg_tokens=1),
    "clip": lambda: systems.clip.build("openai", **CLIP, input_resolution=16),
    "clip_reid": lambda: systems.clip.build("clip_reid", **CLIP, h_resolution=2, w_resolution=2),
    "open_clip": lambda: systems.clip.build("open_clip", **CLIP, image_size=16, ls_init_value=0.5, output_tokens=True),
    "deit": lambda: systems.deit.build(**DEIT, representation_size=7),
    "deit_distilled": lambda: systems.deit.build(**DEIT, distilled=True),
    "deit_literal": lambda: systems.deit.build(**DEIT, distilled=True, compat="literal"),
    "hybrid": lambda: systems.hybrid.build(HYBRID, 16, 5),
    "hybrid_resnet": lambda: systems.hybrid.build(
        HYBRID | {"patches": {"size": (1, 1)}, "resnet": {"num_layers": (1,), "width_factor": 0.5}}, 16, 5,
        variant="google",
    ),
    "scratch": lambda: systems.scratch.build(**SCRATCH, final_norm=True),
    "scratch_pre_norm": lambda: systems.scratch.build(**SCRATCH, pre_norm=True),
    "t2t": lambda: systems.t2t.build(**T2T),
    "t2t_transformer": lambda: systems.t2t.build(**T2T, tokens_type="transformer"),
    "lanl": lambda: systems.lanl.build(img_size=(1, 16, 16), patch_size=8, **LANL),
    "lanl_t2t": lambda: systems.lanl.build(
        "T2T_ViT", img_size=(1, 32, 32), softsplit_kernels=(7, 3, 3), token_chan=8, **LANL
    ),
}  # fmt: skip


def make(name, dtype=torch.float64):
    """(the model in eval mode, its images); float64, so that the fused and the unfused path agree closely."""
    torch.manual_seed(0)
    model = MODELS[name]()
    parity.perturb(model)
    model = model.to(dtype).eval()
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 16, 16))
    return model, torch.randn(3, *size, dtype=dtype)


def outputs(result):
    """All floating tensors of a model's output as one vector."""
    if isinstance(result, torch.Tensor):
        return result.flatten()
    return torch.cat([outputs(part) for part in result] or [torch.zeros(0, dtype=torch.float64)])


def called(model, name):
    """Paths of the sub-modules that the original calls: torch's MultiheadAttention reads its out_proj past the call,
    CLIP-ReID calls the blocks one by one, and DeiT has no use for some of a ViT's empty places."""
    skipped = {
        "clip_reid": ("transformer", "transformer.resblocks"),
        "deit": ("norm_pre", "fc_norm"),
        "deit_distilled": ("norm_pre", "fc_norm", "pre_logits"),
        "deit_literal": ("pre_logits",),
    }.get(name, ())
    return [
        path
        for path, module in model.named_modules()
        if path
        and not isinstance(module, nn.ModuleList)
        and not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)
        and path not in skipped
    ]


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_every_module_fire_and_act(name):
    model, images = make(name)
    calls = []

    def look(module, inputs, output):
        calls.append(module)

    def change(module, inputs, output):
        calls.append(module)
        if isinstance(output, tuple):
            return tuple(part.cos() if isinstance(part, torch.Tensor) else part for part in output)
        return output.cos()

    with torch.no_grad():
        plain = outputs(model(images))
        for path in called(model, name):
            module = model.get_submodule(path)
            handle = module.register_forward_hook(look)
            looked = outputs(model(images))
            handle.remove()
            assert calls == [module] * len(calls) and calls, path
            torch.testing.assert_close(looked, plain, rtol=1e-9, atol=1e-9, msg=path)
            calls.clear()
            handle = module.register_forward_hook(change)
            changed = outputs(model(images))
            handle.remove()
            # Attention over the batch: in the literal model no patch ever reaches the class token.
            acts = not torch.equal(changed, looked)
            assert calls and acts == ((name, path) != ("deit_literal", "patch_embed")), path
            calls.clear()
        assert torch.equal(outputs(model(images)), plain)


class Lora(nn.Module):
    """A linear layer and a low-rank one beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        like = dict(dtype=base.weight.dtype)
        self.down = nn.Linear(base.in_features, 2, bias=False, **like)
        self.up = nn.Linear(2, base.out_features, bias=False, **like)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_act_and_learn(name):
    model, images = make(name)
    plain = outputs(model(images))
    linears = [path for path in called(model, name) if type(model.get_submodule(path)) is nn.Linear]
    for path in linears:
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, Lora(model.get_submodule(path)))
        moved = outputs(model(images))
        assert (moved - plain).abs().max() > 1e-6, path
        plain = moved
    plain.square().sum().backward()
    for path in linears:
        lora = model.get_submodule(path)
        assert lora.down.weight.grad.abs().max() > 0 and lora.up.weight.grad.abs().max() > 0, path


CHANGES = {
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": lambda linear: nn.utils.weight_norm(linear),
    "full_backward_hook": lambda linear: linear.register_full_backward_hook(lambda *args: None),
    "pre_hook": lambda linear: linear.register_forward_pre_hook(lambda module, inputs: None),
    "own_forward": lambda linear: setattr(linear, "forward", partial(type(linear).forward, linear)),
    "no_parameter": lambda linear: _unregister(linear),
}


FUSED = {
    "own": "blocks.1.attn.qkv",
    "clip": "transformer.resblocks.0.mlp.c_fc",
    "deit_literal": "blocks.1.linear2",
    "scratch_pre_norm": "transformer_encoder.layers.0.linear1",
    "hybrid": "transformer.encoder.layer.0.attn.value",
    "t2t": "tokens_to_token.attention1.kqv",
    "t2t_transformer": "tokens_to_token.attention2.mlp.fc2",
    "lanl_t2t": "tokens_to_token.transformer1.attn.proj",
}


def _unregister(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_changes_a_weight_is_honoured(name, change):
    """Truth: the same model with the weight that the changed module computes."""
    model, images = make(name)
    path = FUSED[name]
    truth = copy.deepcopy(model)
    module = model.get_submodule(path)
    CHANGES[change](module)
    module.eval()
    if isinstance(module.weight, torch.Tensor):
        truth.get_submodule(path).weight.data.copy_(module.weight)
    torch.testing.assert_close(outputs(model(images)), outputs(truth(images)), rtol=1e-9, atol=1e-9)
    told = [(row.module, row.reasons[0]) for row in vit_fast.explain(model, images) if row.operation == "block"]
    assert [path.startswith(f"{module}.{reason.split()[0]}") for module, reason in told] == [True], told
    if change != "no_parameter":
        outputs(model(images)).sum().backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


TARGETS = {
    "own": ["qkv", "proj", "fc1", "fc2"],
    "clip": ["c_fc", "c_proj"],
    "deit_literal": ["linear1", "linear2"],
    "hybrid": ["query", "value", "fc1"],
    "t2t": ["kqv", "project", "fc2"],
    "lanl": ["qkv", "fc1", "project"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_peft_adapters_act_and_learn(name, peer):
    peft = peer("peft")
    model, images = make(name, torch.float32)
    plain = outputs(model(images))
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=TARGETS[name], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model).eval()
    moved = outputs(model(images))
    assert (moved - plain).abs().max() > 1e-3
    moved.square().sum().backward()
    adapters = {key: p.grad for key, p in model.named_parameters() if "lora_" in key}
    assert adapters and all(grad is not None and grad.abs().max() > 0 for grad in adapters.values())
    certificate = vit_fast.check(model, images)
    assert certificate.passed and not certificate.ignored, certificate


@pytest.mark.parametrize("name", ["clip", "own"])
def test_check_fails_where_a_block_passes_an_adapter_over(name, monkeypatch):
    model, images = make(name, torch.float32)
    block = model.transformer.resblocks[0] if name == "clip" else model.blocks[0]
    linear = "c_fc" if name == "clip" else "fc1"
    adapter = Lora(block.mlp.get_submodule(linear))
    adapter.weight, adapter.bias = adapter.base.weight, adapter.base.bias
    setattr(block.mlp, linear, adapter)
    assert vit_fast.check(model, images).passed
    monkeypatch.setattr(type(block), "is_fused", lambda self: True)  # a block that never asks, in the plain form either
    certificate = vit_fast.check(model, images)
    assert not certificate.passed and f"mlp.{linear}.down" in str(certificate)


def test_check_fails_where_a_hook_is_passed_over(monkeypatch):
    model, images = make("clip", torch.float32)
    block = model.transformer.resblocks[0]
    block.mlp.c_fc.register_forward_hook(lambda module, inputs, output: None)
    assert vit_fast.check(model, images).passed
    asks = type(block).is_fused
    monkeypatch.setattr(type(block), "is_fused", lambda self: not self.ln_1._forward_hooks or asks(self))
    certificate = vit_fast.check(model, images)
    assert certificate.ignored == ("transformer.resblocks.0.mlp.c_fc",) and not certificate.passed
    assert "Passed over: transformer.resblocks.0.mlp.c_fc" in str(certificate)


@pytest.mark.parametrize("name", ["own", "own_map", "clip", "deit_distilled", "deit_literal", "hybrid", "t2t", "lanl"])
def test_quantised_weights_run_unfused(name, peer):
    quantization = peer("torchao.quantization")
    model, images = make(name, torch.float32)
    eager = copy.deepcopy(model)
    for module in eager.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    for form in (model, eager):
        quantization.quantize_(form, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        torch.testing.assert_close(outputs(model(images)), outputs(eager(images)), rtol=1e-4, atol=1e-4)
    reasons = [row.reasons[0] for row in vit_fast.explain(model, images) if row.operation == "block"]
    assert reasons and all("holds a" in reason for reason in reasons), reasons


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_sharded_layers_run_in_their_own_call(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name, path in FUSED.items():
            model, images = make(name, torch.float32)
            plain = outputs(model(images))
            module = torch.distributed.fsdp.fully_shard(model.get_submodule(path))
            sharded = outputs(model(images))
            torch.testing.assert_close(sharded, plain, rtol=1e-4, atol=1e-5)
            sharded.sum().backward()
            assert type(module.weight) is torch.distributed.tensor.DTensor and module.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["own_map", "clip", "deit", "hybrid"])
def test_prepared_models_step_aside(name):
    model, images = make(name, torch.bfloat16)
    with torch.no_grad():
        vit_fast.prepare(model)
        assert any(row.operation == "prepared_blocks" for row in vit_fast.explain(model, images))
        before = outputs(model(images))
        path = FUSED.get(name, "blocks.1.mlp.fc1")
        calls = []
        handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: calls.append(path))
        model(images)
        handle.remove()
        assert calls == [path]
        parent, _, key = path.rpartition(".")
        adapter = Lora(model.get_submodule(path))
        adapter.up.weight.mul_(50)
        setattr(model.get_submodule(parent), key, adapter)
        assert (outputs(model(images)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name, path", [("own_map", "blocks"), ("clip", "transformer.resblocks"), ("deit", "blocks")])
def test_a_hook_on_the_row_of_blocks_fires(name, path, prepared):
    model, images = make(name, torch.bfloat16)
    if prepared:
        vit_fast.prepare(model)
    calls = []
    model.get_submodule(path).register_forward_hook(lambda module, inputs, output: calls.append(output))
    with torch.no_grad():
        model(images)
    assert len(calls) == 1


def test_attention_maps_see_adapters_and_hooks():
    model, images = make("own")
    with torch.no_grad():
        plain = model.get_attention_maps(images, n=2)
        model.blocks[1].attn.q_norm.register_forward_hook(lambda module, inputs, output: 2 * output)
        first, last = model.get_attention_maps(images, n=2)
    torch.testing.assert_close(first, plain[0])
    assert (last - plain[1]).abs().max() > 1e-3
    model.blocks[0].attn = nn.Identity()
    with pytest.raises(vit_fast.UnsupportedError, match=r"attn is torch.*Identity, expected vit_fast"):
        model.get_attention_maps(images, n=2)


def test_parts_may_be_taken_out():
    """Blocks without an MLP or an attention run, unfused, instead of failing on a weight that is not there."""
    model, images = make("own")
    model.blocks[0].mlp, model.blocks[1].attn = nn.Identity(), nn.Identity()
    assert outputs(model(images)).isfinite().all()
    reasons = [row.reasons[0] for row in vit_fast.explain(model, images) if row.operation == "block"]
    assert reasons == [
        "mlp is torch.nn.modules.linear.Identity", "attn is torch.nn.modules.linear.Identity",
    ]  # fmt: skip


def unfused(model):
    """A copy of a model whose modules all run in their own call."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    return model


SEQUENTIALS = {
    "clip": "transformer.resblocks.0.mlp",
    "t2t": "tokens_to_token.attention1.mlp",
    "torchvision": "encoder.layers.encoder_layer_0.mlp",
    "open_clip": "transformer.resblocks.1.mlp",
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_whatever_a_sequential_holds_is_run(name, peer):
    if name in MODELS and name != "open_clip":
        model, images = make(name)
    else:
        peer(name)
        model, images = vit_fast.optimize(CASES[name].build().double()), torch.randn(2, 3, 32, 32).double()
        parity.perturb(model)
    with torch.no_grad():
        plain = outputs(model(images))
        model.get_submodule(SEQUENTIALS[name]).append(nn.Tanh())
        changed = outputs(model(images))
        assert (changed - plain).abs().max() > 1e-8
        torch.testing.assert_close(changed, outputs(unfused(model)(images)), rtol=1e-9, atol=1e-9)
    assert any("mlp holds " in row.reasons[0] for row in vit_fast.explain(model, images))


def _dropouts(model, mode):
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.train(mode)


def _attention_and_mlp(model, mode):
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("attn", "mlp", "ffn"):
            module.train(mode)


DROPS = {
    "own": (lambda: vit_fast.VisionTransformer(**OWN, proj_drop_rate=0.5, attn_drop_rate=0.5), _attention_and_mlp),
    "hybrid": (
        lambda: systems.hybrid.build(
            HYBRID | {"transformer": HYBRID["transformer"] | dict(dropout_rate=0.5, attention_dropout_rate=0.5)}, 16, 5
        ),
        _attention_and_mlp,
    ),
    "t2t_transformer": (
        lambda: nn.Sequential(systems.t2t.Token_transformer(48, 16, drop=0.5, attn_drop=0.5)), _attention_and_mlp,
    ),
    "scratch": (lambda: systems.scratch.build(**SCRATCH, dropout=0.5), _dropouts),
    "clip": (MODELS["clip"], _dropouts),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPS)
def test_each_module_drops_in_its_own_mode(name):
    """Some freeze the dropouts of a model that trains, others draw with the dropouts of one that does not."""
    build, switch = DROPS[name]
    model, images = build(), torch.randn(3, 3, 16, 16)
    images = {"t2t_transformer": torch.randn(3, 4, 48), "scratch": images[..., :8, :8]}.get(name, images)
    parity.perturb(model)
    for module in model.modules():
        if name == "clip" and isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
    for mode in (True, False):
        for embedding in model.train(not mode).children():  # the dropout of positions is not a block's
            if type(embedding).__name__ == "Transformer" and hasattr(embedding, "embeddings"):
                embedding.embeddings.eval()
        switch(model, mode)
        for form in (model, unfused(model)):
            assert torch.equal(outputs(form(images)), outputs(form(images))) is not mode


TORCH_LAYERS = {
    "activation": lambda layer: setattr(layer, "activation", torch.tanh),
    "batch_first": lambda layer: setattr(layer.self_attn, "batch_first", False),
    "add_zero_attn": lambda layer: setattr(layer.self_attn, "add_zero_attn", True),
}


@pytest.mark.parametrize("change", TORCH_LAYERS)
def test_options_of_torch_layers_are_honoured(change):
    for name, path in (("scratch", "transformer_encoder.layers.0"), ("clip", "transformer.resblocks.0")):
        model, images = make(name)
        layer = model.get_submodule(path)
        if name == "clip":
            if change == "activation":
                continue
            layer.self_attn = layer.attn
        with torch.no_grad():
            plain = outputs(model(images))
            TORCH_LAYERS[change](layer)
            changed = outputs(model(images))
            assert (changed - plain).abs().max() > 1e-6
            torch.testing.assert_close(changed, outputs(unfused(model)(images)), rtol=1e-9, atol=1e-9)


def test_projections_may_have_no_bias():
    model, images = make("hybrid")
    attn = model.transformer.encoder.layer[0].attn
    for names in (("key",), ("query", "value")):
        for name in names:
            getattr(attn, name).bias = None
        torch.testing.assert_close(outputs(model(images)), outputs(unfused(model)(images)), rtol=1e-9, atol=1e-9)


class Twice(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


NORM_LAYERS = {
    "subclass": (Twice, False),
    "partial": (partial(Twice, eps=1e-3), False),
    "not_affine": (partial(nn.LayerNorm, elementwise_affine=False), True),
    "no_bias": (partial(nn.LayerNorm, bias=False, eps=1e-3), True),
    "function": (lambda width: nn.LayerNorm(width, bias=False), True),
}
NORM_MODELS = {
    "own": lambda norm: vit_fast.VisionTransformer(**OWN, qk_norm=True, norm_layer=norm),
    "own_map": lambda norm: vit_fast.VisionTransformer(**OWN, global_pool="map", norm_layer=norm),
    "clip": lambda norm: systems.clip.build("openai", **CLIP, input_resolution=16, norm_layer=norm),
    "deit": lambda norm: systems.deit.build(**DEIT, norm_layer=norm),
    "t2t": lambda norm: systems.t2t.build(**T2T, norm_layer=norm),
    "lanl": lambda norm: systems.lanl.build(img_size=(3, 16, 16), patch_size=8, **LANL, norm_layer=norm),
}


@pytest.mark.parametrize("layer", NORM_LAYERS)
@pytest.mark.parametrize("name", NORM_MODELS)
def test_norm_layers_are_built_as_given(name, layer):
    norm_layer, fused = NORM_LAYERS[layer]
    model = NORM_MODELS[name](norm_layer)
    parity.perturb(model)
    model = model.double().eval()
    images = torch.randn(2, 3, *((32, 32) if name == "t2t" else (16, 16))).double()
    wanted = norm_layer(16)
    norms = [m for path, m in model.named_modules() if isinstance(m, nn.LayerNorm) and "tokens_to_token" not in path]
    assert norms
    for norm in norms:
        assert type(norm) is type(wanted) and norm.eps == wanted.eps
        assert [*norm.state_dict()] == [*wanted.state_dict()]
    assert any(row.operation == "block" for row in vit_fast.explain(model, images)) != fused
    golden = copy.deepcopy(model)
    for module in golden.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model(images)), outputs(golden(images)), rtol=1e-9, atol=1e-9)


def test_copies_of_layer_norm_stay_fused(peer):
    layers = peer("timm.layers")
    for norm_layer in (layers.LayerNorm, partial(layers.LayerNorm, eps=1e-4)):
        model = vit_fast.VisionTransformer(**OWN, norm_layer=norm_layer).eval()
        assert type(model.norm) is nn.LayerNorm and model.norm.eps == norm_layer(1).eps
        assert not [row for row in vit_fast.explain(model) if row.operation == "block"]


class GELU(nn.Module):
    """Has a name that is known and computes something else."""

    def forward(self, x):
        return x.tanh()


class Sigmoid1702(nn.Module):
    """Has a name that is not known and computes QuickGELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def test_activations_are_known_by_what_they_compute(peer):
    layers = peer("timm.layers")
    built = vit_fast.VisionTransformer(**OWN, act_layer=Sigmoid1702)
    assert built.blocks[0].mlp.activation == "quick_gelu"
    for act_layer in (GELU, nn.PReLU, torch.tanh, nn.ReLU6, partial(nn.Hardtanh, 0.0, 1000.0)):
        with pytest.raises(ValueError, match="act_layer is"):
            vit_fast.VisionTransformer(**OWN, act_layer=act_layer)
        with pytest.raises(ValueError, match="activation is"):
            systems.clip.build("openai", **CLIP, input_resolution=16, act_layer=act_layer)
    images = torch.randn(2, 3, 16, 16)
    assert systems.deit.build(**DEIT, act_layer=nn.PReLU, dtype=torch.bfloat16)(images.bfloat16()).isfinite().all()
    deit = systems.deit.build(**DEIT, act_layer=GELU).eval()
    assert type(deit.blocks[0].mlp.act) is GELU
    assert {row.reasons[0] for row in vit_fast.explain(deit, images) if row.operation == "block"} == {
        "mlp is vit_fast.systems.deit.OpenMlp"
    }
    for mlp_layer in (partial(layers.Mlp, use_conv=True), GELU, layers.SwiGLU, "conv"):
        with pytest.raises(ValueError, match=r"mlp_layer is .*, expected 'mlp' or 'swiglu'"):
            vit_fast.VisionTransformer(**OWN, mlp_layer=mlp_layer)
    for mlp_layer in (layers.SwiGLUPacked, "SwiGLUPacked"):
        built = vit_fast.VisionTransformer(**OWN, mlp_layer=mlp_layer, act_layer=nn.SiLU)
        assert built.blocks[0].mlp.activation == "swiglu"


@pytest.mark.interp
@pytest.mark.parametrize("name", MODELS)
def test_kernels_give_way_to_hooks_and_adapters(name):
    model, images = make(name, torch.float32)
    with torch.no_grad(), vit_fast.backend("triton"):
        fused = outputs(model(images))
        calls, linears = [], [path for path in called(model, name) if type(model.get_submodule(path)) is nn.Linear]
        handles = [
            model.get_submodule(path).register_forward_hook(lambda module, inputs, output: calls.append(module))
            for path in called(model, name)
        ]
        torch.testing.assert_close(outputs(model(images)), fused, rtol=1e-4, atol=1e-5)
        assert {model.get_submodule(path) for path in called(model, name)} == set(calls)
        for handle in handles:
            handle.remove()
        for path in linears[:2]:
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, Lora(model.get_submodule(path)))
            moved = outputs(model(images))
            assert not torch.equal(moved, fused), path
            fused = moved
