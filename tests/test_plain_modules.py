"""Modules whose weights may not be read past their ``__call__``: hooks, adapters, pruning, parametrizations, subclasses.

Every family, every sub-module: what eager PyTorch would run is run, and ``explain`` says why a block is not fused.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
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
    """Paths of the sub-modules with parameters that the original calls: torch's MultiheadAttention reads its out_proj
    past the call, CLIP-ReID calls the blocks one by one."""
    skipped = ("transformer", "transformer.resblocks") if name == "clip_reid" else ()
    return [
        path
        for path, module in model.named_modules()
        if path
        and next(module.parameters(), None) is not None
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
            acts = (changed - plain).abs().max() > 1e-6
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
