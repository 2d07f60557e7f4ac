"""CLIP's image tower in its four variants against a float64 formula, open_clip and transformers."""

import copy
import math
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from family_formulas import assert_kernels_agree

import vit_fast
from vit_fast import WeightsError, systems
from vit_fast.systems import clip, clip_reid

TABLE = {  # vision parameters, rows of positional_embedding
    "ViT-B/32": (87_849_216, 50),
    "ViT-B/16": (86_192_640, 197),
    "ViT-L/14": (303_966_208, 257),
    "ViT-L/14@336px": (304_293_888, 577),
}
ACTIVATIONS = {
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
}


def formula_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + eps) * weight + bias


def formula(state, images, heads, stride, act="quick_gelu", cv_emb=None):
    """(input of the last block, output of the last block); dtype of the state, by unfold and explicit softmax."""
    s = state
    weight = s["conv1.weight"]
    x = F.unfold(images.to(weight.dtype), weight.shape[2:], stride=stride).transpose(1, 2) @ weight.flatten(1).t()
    first = s["class_embedding"].expand(len(x), 1, -1)
    if cv_emb is not None:
        first = first + cv_emb[:, None]
    x = torch.cat([first, x], dim=1) + s["positional_embedding"]
    if "ln_pre.weight" in s:
        x = formula_norm(x, s["ln_pre.weight"], s["ln_pre.bias"])
    depth = 1 + max(int(key.split(".")[2]) for key in s if key.startswith("transformer"))
    for i in range(depth):
        b = {k.removeprefix(f"transformer.resblocks.{i}."): v for k, v in s.items()}
        last = x
        y = formula_norm(x, b["ln_1.weight"], b["ln_1.bias"])
        q, k, v = (y @ b["attn.in_proj_weight"].t() + b["attn.in_proj_bias"]).chunk(3, -1)
        q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        out = out @ b["attn.out_proj.weight"].t() + b["attn.out_proj.bias"]
        x = x + out * b.get("ls_1.gamma", 1.0)
        y = formula_norm(x, b["ln_2.weight"], b["ln_2.bias"])
        y = ACTIVATIONS[act](y @ b["mlp.c_fc.weight"].t() + b["mlp.c_fc.bias"])
        x = x + (y @ b["mlp.c_proj.weight"].t() + b["mlp.c_proj.bias"]) * b.get("ls_2.gamma", 1.0)
    return last, x


def formula_pooled(state, *args, **words):
    x = formula(state, *args, **words)[1]
    y = formula_norm(x[:, 0], state["ln_post.weight"], state["ln_post.bias"])
    return y @ state["proj"] if "proj" in state else y


def perturbed(model):
    """Every parameter and buffer away from its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def double(state):
    return {key: value.double() for key, value in state.items()}


def close(actual, expected):
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= 2e-6 * (1 + expected.abs().max().item())


def tiny(variant="openai", **words):
    words = dict(dict(patch_size=8, width=32, layers=3, heads=4, output_dim=12), **words)
    if not {"img_size", "image_size", "input_resolution", "h_resolution", "num_patches"} & words.keys():
        words["img_size"] = 32
    return perturbed(clip.build(variant, **words))


CASES = {
    "square": (dict(input_resolution=32), (32, 32)),
    "rectangle": (dict(img_size=[16, 40]), (16, 40)),
    "overlap": (dict(img_size=(32, 24), stride_size=6), (32, 24)),
    "gaps": (dict(img_size=(32, 24), stride_size=(10, 9), patch_size=(8, 6)), (32, 24)),
    "no projection": (dict(output_dim=None), (32, 32)),
    "one layer": (dict(layers=1), (32, 32)),
    "channels": (dict(in_chans=5), (32, 32)),
    "head size 1": (dict(heads=32), (32, 32)),
    "one head of 33": (dict(width=33, heads=1), (32, 32)),
    "hidden 53": (dict(mlp_ratio=1.6666), (32, 32)),
    **{act: (dict(activation=act), (32, 32)) for act in ACTIVATIONS},
}


@pytest.mark.parametrize("name", CASES)
def test_openai_is_the_formula(name):
    words, size = CASES[name]
    model = tiny(**words)
    images = torch.randn(2, words.get("in_chans", 3), *size)
    expected = formula_pooled(
        double(model.state_dict()), images.double(), words.get("heads", 4),
        words.get("stride_size", words.get("patch_size", 8)), words.get("activation", "quick_gelu"),
    )  # fmt: skip
    close(model.eval()(images), expected)
    close(model.train()(images), expected)
    assert (model.double()(images.double()) - expected).abs().max() < 1e-12 * (1 + expected.abs().max())


def test_plain_knows_only_the_number_of_patches():
    words = dict(patch_size=8, stride_size=6, width=24, num_patches=10, output_dim=6)
    model = clip.build("plain", **words, heads=12)
    assert len(model.transformer.resblocks) == 12
    model = perturbed(clip.build("plain", **words, heads=12, layers=2))
    for size in ((32, 14), (14, 32)):
        images = torch.randn(2, 3, *size)
        close(model(images), formula_pooled(double(model.state_dict()), images.double(), 12, 6))
    with pytest.raises(ValueError, match=r"14×38, expected 10 patches, got 2×6"):
        model(torch.randn(1, 3, 14, 38))
    with pytest.raises(ValueError, match="num_patches"):
        clip.build("plain", patch_size=8, width=24, num_patches=10, img_size=32)


@pytest.mark.parametrize("layers", [1, 2, 13])
@pytest.mark.parametrize("output_dim", [None, 5])
def test_clip_reid_returns_the_triple(layers, output_dim):
    words = dict(h_resolution=5, w_resolution=3, patch_size=8, stride_size=6, layers=layers, output_dim=output_dim)
    model = tiny("clip_reid", **words)
    images, cv_emb = torch.randn(2, 3, 32, 22), torch.randn(2, 32)
    state = double(model.state_dict())
    for emb in (None, cv_emb):
        last, x = formula(state, images.double(), 4, 6, cv_emb=None if emb is None else emb.double())
        x = formula_norm(x, state["ln_post.weight"], state["ln_post.bias"])
        for training in (False, True):
            x11, x12, xproj = model.train(training)(images, emb)
            close(x11, last)
            close(x12, x)
            if output_dim is None:
                assert xproj is None
            else:
                close(xproj, x @ state["proj"])
    assert (model(images, cv_emb)[1] - model(images)[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"cv_emb has shape \(2, 31\), expected \(2, 32\)"):
        model(images, cv_emb[:, :31])
    with pytest.raises(ValueError, match="clip_reid"):
        tiny()(torch.randn(2, 3, 32, 32), cv_emb)


def test_reid_grid_rule():
    for stride, grid in ((16, (16, 8)), (12, (21, 10))):
        words = dict(clip.PRESETS[f"clip_reid_vit_b16_s{stride}_256x128"], width=12, layers=1)
        assert (words["h_resolution"], words["w_resolution"]) == grid
        model = clip.build(**words)
        assert model(torch.randn(1, 3, 256, 128))[1].shape == (1, 1 + grid[0] * grid[1], 12)
        assert clip.build("openai", img_size=(256, 128), patch_size=16, stride_size=stride, width=64).grid_size == grid


def open_clip_pair(open_clip, **words):
    words = dict(image_size=(32, 24), patch_size=8, width=32, layers=2, heads=4, mlp_ratio=3.0, **words)
    theirs = perturbed(open_clip.VisionTransformer(**words)).eval()
    ours = clip.load(clip.build("open_clip", **words), theirs.state_dict()).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "words",
    [
        {},
        dict(output_dim=7, ls_init_value=0.3),
        dict(no_ln_pre=True, pool_type="avg"),
        dict(pool_type="none"),
        dict(pool_type="avg", final_ln_after_pool=True, output_tokens=True),
        dict(output_tokens=True),
        dict(final_ln_after_pool=True, output_tokens=True, pool_type="none"),
        dict(act_layer=torch.nn.ReLU, norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-3)),
    ],
)
def test_open_clip_agrees(words, peer):
    ours, theirs = open_clip_pair(peer("open_clip.transformer"), **words)
    images = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        actual, expected = ours(images), theirs(images)
    assert isinstance(actual, tuple) == words.get("output_tokens", False)
    for a, e in zip(actual, expected) if isinstance(actual, tuple) else ((actual, expected),):
        close(a, e)


def test_open_clip_defaults_and_formula():
    model = tiny("open_clip", image_size=32, output_dim=9)
    assert (
        model.activation == "gelu" and clip.build("open_clip", image_size=32, patch_size=8, width=64).output_dim == 512
    )
    images = torch.randn(2, 3, 32, 32)
    close(model(images), formula_pooled(double(model.state_dict()), images.double(), 4, 8, "gelu"))


def test_patch_dropout_keeps_whole_tokens_in_training_alone():
    model = tiny("open_clip", image_size=32, patch_dropout=0.5)
    plain = tiny("open_clip", image_size=32)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    close(model.eval()(images), plain(images))
    model.train()
    kept, everything = model._embed(images, None), plain._embed(images, None)
    assert kept.shape == (2, 9, 32)
    assert torch.equal(kept[:, 0], everything[:, 0])
    for image in range(2):
        places = [next(i for i in range(17) if torch.equal(token, everything[image, i])) for token in kept[image]]
        assert len(set(places)) == 9
    assert not torch.equal(kept, model._embed(images, None))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_transformers_agrees(act):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, projection_dim=12, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, hidden_act=act,
    )  # fmt: skip
    theirs = CLIPVisionModelWithProjection(config).eval()
    ours = tiny(activation=act).eval()
    s, t = ours.state_dict(), {}
    t["visual_projection.weight"] = s["proj"].t()
    t["vision_model.embeddings.class_embedding"] = s["class_embedding"]
    t["vision_model.embeddings.patch_embedding.weight"] = s["conv1.weight"]
    t["vision_model.embeddings.position_embedding.weight"] = s["positional_embedding"]
    for kind in ("weight", "bias"):
        t[f"vision_model.pre_layrnorm.{kind}"] = s[f"ln_pre.{kind}"]
        t[f"vision_model.post_layernorm.{kind}"] = s[f"ln_post.{kind}"]
        for i in range(3):
            a, b = f"vision_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
            packed = s[f"{b}attn.in_proj_{kind}"]
            for name, part in zip("qkv", packed.chunk(3)):
                t[f"{a}self_attn.{name}_proj.{kind}"] = part
            t[f"{a}self_attn.out_proj.{kind}"] = s[f"{b}attn.out_proj.{kind}"]
            t[f"{a}layer_norm1.{kind}"], t[f"{a}layer_norm2.{kind}"] = s[f"{b}ln_1.{kind}"], s[f"{b}ln_2.{kind}"]
            t[f"{a}mlp.fc1.{kind}"], t[f"{a}mlp.fc2.{kind}"] = s[f"{b}mlp.c_fc.{kind}"], s[f"{b}mlp.c_proj.{kind}"]
    missing, unexpected = theirs.load_state_dict(t, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(ours(images), theirs(pixel_values=images).image_embeds)


def test_keys_and_shapes_are_the_originals():
    model = clip.build("openai", input_resolution=32, patch_size=8, width=64, layers=2, heads=2, output_dim=12)
    expected = {
        "class_embedding": (64,), "positional_embedding": (17, 64), "proj": (64, 12), "conv1.weight": (64, 3, 8, 8),
    }  # fmt: skip
    for name in ("ln_pre", "ln_post"):
        expected |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    for i in range(2):
        b = f"transformer.resblocks.{i}."
        for name in ("ln_1", "ln_2"):
            expected |= {f"{b}{name}.weight": (64,), f"{b}{name}.bias": (64,)}
        expected |= {f"{b}attn.in_proj_weight": (192, 64), f"{b}attn.in_proj_bias": (192,)}
        for name, (rows, columns) in {
            "attn.out_proj": (64, 64), "mlp.c_fc": (256, 64), "mlp.c_proj": (64, 256)
        }.items():  # fmt: skip
            expected |= {f"{b}{name}.weight": (rows, columns), f"{b}{name}.bias": (rows,)}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        for name, (parameters, rows) in TABLE.items():
            for model in (clip.build(**clip.PRESETS[name]), vit_fast.create_model(name)):
                assert count(model) == parameters
                assert model.positional_embedding.shape[0] == rows
                assert model.transformer.resblocks[0].attn.head_dim == 64
    reid = {"clip_reid_vit_b16_s16_256x128": 129, "clip_reid_vit_b16_s12_256x128": 211}
    with torch.device("meta"):
        for name, rows in reid.items():
            model = vit_fast.create_model(name)
            assert count(model) == 86_192_640 + (rows - 197) * 768
            assert model.default_cfg["input_size"][1:] in ((256, 128), (256, 124))


def test_parameter_counts_of_open_clip(peer):
    open_clip = peer("open_clip.transformer")
    heads = {"ViT-H-14": 80, "ViT-g-14": 88, "ViT-bigG-14": 104}
    for name, head_size in heads.items():
        words = dict(clip.PRESETS[name])
        with torch.device("meta"):
            ours = vit_fast.create_model(name)
            words.pop("variant")
            theirs = open_clip.VisionTransformer(**words)
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
        assert ours.transformer.resblocks[0].attn.head_dim == head_size


def test_presets_are_models():
    assert clip.PRESETS.keys() <= set(vit_fast.list_models())
    assert systems.resize_pos_embed is vit_fast.resize_pos_embed


def test_initialisation():
    model = clip.build("openai", input_resolution=64, patch_size=8, width=256, layers=1, heads=4, output_dim=200)
    block = model.transformer.resblocks[0]
    for parameter in (model.class_embedding, model.positional_embedding, model.proj):
        assert parameter.std().item() == pytest.approx(1 / 16, rel=0.15)
    bound = math.sqrt(6 / (256 + 768))
    assert block.attn.in_proj_weight.abs().max() <= bound and block.attn.in_proj_weight.std() > bound / 2
    assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
    assert block.mlp.c_fc.weight.abs().max() <= 1 / 16 and block.mlp.c_fc.bias.any()
    assert torch.equal(model.ln_pre.weight, torch.ones(256)) and not model.ln_post.bias.any()


def test_metamorphic():
    model = tiny().eval()
    images = torch.randn(4, 3, 32, 32)
    out = model(images)
    order = torch.tensor([2, 0, 3, 1])
    close(model(images[order]), out[order])
    close(model(images[1:2]), out[1:2])
    assert (model(images + torch.randn(1, 3, 32, 32)) - out).abs().max() > 1e-2
    assert model(images[:0]).shape == (0, 12)


@pytest.mark.parametrize("variant", clip.VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_the_formulas_gradient(variant, checkpointing):
    model = tiny(variant, **(dict(num_patches=16) if variant == "plain" else {})).double()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model.train()(images)
    loss = sum(part.square().sum() for part in out) if variant == "clip_reid" else out.square().sum()
    loss.backward()
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    act = "gelu" if variant == "open_clip" else "quick_gelu"
    if variant == "clip_reid":
        last, x = formula(state, images, 4, 8)
        x = formula_norm(x, state["ln_post.weight"], state["ln_post.bias"])
        (last.square().sum() + x.square().sum() + (x @ state["proj"]).square().sum()).backward()
    else:
        formula_pooled(state, images, 4, 8, act).square().sum().backward()
    for name, parameter in model.named_parameters():
        grad = state[name].grad
        assert (parameter.grad - grad).abs().max() <= 1e-10 * (1 + grad.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_within_budget(dtype):
    model = tiny(width=64, img_size=48).eval().to(dtype)
    images = torch.randn(4, 3, 48, 48).to(dtype)
    with torch.no_grad():
        out = model(images)
        eager = formula_pooled(model.state_dict(), images, 4, 8)
        golden = formula_pooled(double(model.state_dict()), images.double(), 4, 8)
    assert out.dtype == dtype
    assert (out.double() - golden).abs().max() <= 1.25 * (eager.double() - golden).abs().max() + 1e-3


def test_mixed_precision_of_openai():
    model = tiny(width=64).eval()
    reference = model(torch.ones(1, 3, 32, 32)).detach()
    assert clip.convert_weights(model, torch.bfloat16) is model
    low = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    high = {name for name, _ in model.named_parameters()} - low
    assert {name.rpartition(".")[0].rpartition(".")[2] or name for name in high} == {
        "class_embedding", "positional_embedding", "ln_pre", "ln_post", "ln_1", "ln_2"
    }  # fmt: skip
    assert "proj" in low and "transformer.resblocks.2.attn.in_proj_bias" in low
    out = model(torch.ones(1, 3, 32, 32))
    assert out.dtype == torch.bfloat16 and (out.float() - reference).abs().max() < 0.05 * (1 + reference.abs().max())
    assert {p.dtype for p in clip.convert_weights(model, torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", clip.VARIANTS)
def test_compiles(variant):
    model = tiny(variant, **(dict(num_patches=16) if variant == "plain" else {})).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    actual, expected = compiled(images), model(images)
    if variant != "clip_reid":
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected):
        close(a, e)


def test_autocast():
    model = tiny(width=64).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert (out - expected).abs().max() < 0.1 * (1 + expected.abs().max())


def test_copies():
    model = tiny("clip_reid", h_resolution=4, w_resolution=4).eval()
    images = torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images)[2], model(images)[2])


def test_explain_names_the_operations():
    rows = vit_fast.explain(tiny())
    names = [row.operation for row in rows]
    assert names.count("attention") == 3 and names.count("layernorm_mlp") == 3 and names[0] == "patch_embed"


# weights


def test_load_takes_the_tower_out_of_a_whole_clip(tmp_path):
    source = tiny(layers=2)
    state = {f"module.visual.{key}": value for key, value in source.state_dict().items()}
    state |= {"module.logit_scale": torch.ones(()), "module.transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    state |= {f"module.{name}": torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
    for weights in (state, {"model": state}, tmp_path / "a.pt", str(tmp_path / "a.pt")):
        model = clip.load(clip.build(img_size=32, patch_size=8, width=32, layers=2, heads=4, output_dim=12), weights)
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
    assert any(key.startswith("module.visual.") for key in state)


def test_load_safetensors_and_torchscript(tmp_path):
    from safetensors.torch import save_file

    source = tiny(layers=1)
    save_file(source.state_dict(), tmp_path / "a.safetensors")

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Module()
            for key, value in source.state_dict().items():
                module = self.visual
                *path, leaf = key.split(".")
                for name in path:
                    if not hasattr(module, name):
                        module.add_module(name, torch.nn.Module())
                    module = getattr(module, name)
                module.register_parameter(leaf, torch.nn.Parameter(value.half()))
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x):
            return x

    with pytest.warns(DeprecationWarning):
        torch.jit.script(Whole()).save(tmp_path / "b.pt")
    shapes = dict(
        patch_size=(8, 8), stride_size=(8, 8), width=32, layers=1, output_dim=12, in_chans=3, mlp_ratio=4.0,
        no_ln_pre=False, ls_init_value=None,
    )  # fmt: skip
    known = dict(heads=4, img_size=32, activation="gelu")
    assert clip.infer_arguments(tmp_path / "a.safetensors", **known) == shapes | known
    told = dict(heads=4, img_size=32, activation="quick_gelu")
    assert clip.infer_arguments(tmp_path / "b.pt", heads=4) == shapes | told
    with pytest.raises(ValueError, match="heads is None"):  # 32 // 64, the rule of OpenAI's program, is none
        clip.infer_arguments(tmp_path / "b.pt")
    for path, half in ((tmp_path / "a.safetensors", False), (tmp_path / "b.pt", True)):
        model = clip.load(clip.build(**clip.infer_arguments(path, **known)), path)
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value.half().float() if half else value)


def test_infer_arguments_asks_for_what_the_file_does_not_tell():
    words = dict(img_size=(128, 64), patch_size=8, width=320, heads=4, layers=1, activation="gelu", no_ln_pre=True)
    source = perturbed(tiny("open_clip", **words, ls_init_value=0.5))
    state, known = source.state_dict(), dict(heads=4, img_size=(128, 64), activation="gelu")
    for name in known:
        with pytest.raises(
            ValueError, match=f"infer_arguments: {name} is None, expected a value: the file does not tell"
        ):
            clip.infer_arguments(state, **dict(known, **{name: None}))
    for wrong in (dict(img_size=88), dict(stride_size=4)):
        with pytest.raises(ValueError, match=r"img_size .* and stride_size .* patches, expected 128"):
            clip.infer_arguments(state, **dict(known, **wrong))
    model = clip.load(clip.build("open_clip", **clip.infer_arguments(state, **known)), state).eval()
    images = torch.randn(1, 3, 128, 64)
    assert torch.equal(model(images), source(images))


def test_plain_has_twelve_layers_and_heads_whatever_the_width():
    model = clip.build("plain", patch_size=16, stride_size=12, width=96, num_patches=25, output_dim=20)
    blocks = model.transformer.resblocks
    assert len(blocks) == 12 and {block.attn.num_heads for block in blocks} == {12}
    for variant in ("openai", "clip_reid", "open_clip"):
        tower = clip.build(variant, patch_size=16, img_size=64, width=128, layers=1, output_dim=20)
        assert tower.transformer.resblocks[0].attn.num_heads == 2


@pytest.mark.parametrize("variant, policy", [("clip_reid", "R3"), ("open_clip", "R5")])
def test_load_resizes_the_position_table(variant, policy):
    source = tiny(img_size=32)
    words = dict(h_resolution=6, w_resolution=3) if variant == "clip_reid" else dict(image_size=(48, 24))
    model = clip.load(tiny(variant, **words), source.state_dict())
    table = source.positional_embedding.detach()
    grid = table[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    how = dict(mode="bilinear") if policy == "R3" else dict(mode="bicubic", antialias=True)
    expected = F.interpolate(grid, (6, 3), align_corners=False, **how).permute(0, 2, 3, 1).reshape(18, 32)
    assert torch.equal(model.positional_embedding[0], table[0])
    assert torch.allclose(model.positional_embedding[1:], expected, atol=1e-6)
    back = clip.load(tiny(img_size=48), model.state_dict(), old_grid=(6, 3))
    assert back.positional_embedding.shape == (37, 32)
    # The same count on another grid: kept as it is by default, resized where the caller knows the grid.
    flat = tiny(img_size=(16, 64))
    assert torch.equal(clip.load(flat, source.state_dict()).positional_embedding, source.positional_embedding)
    assert not torch.equal(
        clip.load(flat, source.state_dict(), old_grid=(4, 4)).positional_embedding, source.positional_embedding
    )


def test_load_reports_what_does_not_fit(tmp_path):
    model = tiny()
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    bad = {key: value * 2 for key, value in state.items() if key != "ln_post.bias"} | {"extra": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"missing ln_post\.bias; unexpected extra"):
        clip.load(model, bad)
    with pytest.raises(WeightsError, match="wrong shape"):
        clip.load(model, dict(state, proj=torch.ones(32, 5)))
    with pytest.raises(WeightsError, match="ResNet"):
        clip.load(model, {"visual.conv1.weight": torch.ones(8, 3, 3, 3), "visual.bn1.weight": torch.ones(8)})
    with pytest.raises(WeightsError, match="wrong shape positional_embedding"):
        clip.load(model, dict(state, positional_embedding=torch.ones(12, 32)))
    with pytest.raises(WeightsError, match="a grid of 3×4"):
        clip.load(model, state, old_grid=(3, 4))
    with pytest.raises(WeightsError, match="does not exist"):
        clip.load(model, tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "broken.pt", "w") as archive:
        archive.writestr("broken/constants.pkl", b"nothing")
    for name, content in (("a.pt", b"PK"), ("b.pt", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("broken.pt", "a.pt", "b.pt"):
        with pytest.raises(WeightsError, match="cannot be read"):
            clip.load(model, tmp_path / name)
    with pytest.raises(WeightsError, match=r"lack 'conv1\.weight'"):
        clip.infer_arguments({"a": torch.ones(1)})
    with pytest.raises(TypeError, match="expected a state_dict or a path"):
        clip.load(model, 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# sizes and bad words


def test_dynamic_image_size_resizes_the_table_with_gradient():
    model = tiny(img_size=32, dynamic_img_size=True)
    fixed = tiny(img_size=(48, 24))
    images = torch.randn(2, 3, 48, 24)
    clip.load(fixed, model.state_dict())
    close(model(images), fixed(images))
    model(images).sum().backward()
    assert model.positional_embedding.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="multiples of the patch 8×8"):
        model(torch.randn(1, 3, 48, 25))


def test_flooring_only_on_request():
    model, images = tiny(img_size=64, patch_size=16), torch.randn(1, 3, 70, 70)
    with pytest.raises(ValueError, match=r"vit_fast\.systems\.clip: images are 70×70, expected 64×64"):
        model(images)
    floored = tiny(img_size=64, patch_size=16, allow_floor=True)
    floored.load_state_dict(model.state_dict())
    close(floored(images), model(images[:, :, :64, :64]))
    with pytest.raises(ValueError, match="img_size is 70×70"):
        tiny(img_size=70, patch_size=16)
    grid = tiny("clip_reid", h_resolution=4, w_resolution=4, patch_size=16)
    with pytest.raises(ValueError, match="70×70, expected multiples of the patch 16×16"):
        grid(images)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.randn(1, 3, 32, 128), "images are 32×128, expected 64×64"),
        (torch.randn(1, 3, 48, 64), "images are 48×64, expected 64×64"),
        (torch.randn(1, 4, 64, 64), "4 channels, expected 3"),
        (torch.randn(3, 64, 64), "3 dimensions, expected 4"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        tiny(img_size=64, patch_size=16)(images)
    with pytest.raises(TypeError, match="ndarray"):
        tiny()(torch.ones(1).numpy())


def test_a_grid_of_the_same_count_is_another_grid():
    model = tiny("clip_reid", h_resolution=4, w_resolution=4, patch_size=16)
    with pytest.raises(ValueError, match="32×128, expected a grid of 4×4 patches, got 2×8"):
        model(torch.randn(1, 3, 32, 128))
    with pytest.raises(ValueError, match="8×8, expected at least one patch of 16×16"):
        model(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(heads=5), "heads is 5, expected a divisor of width 32"),
        (dict(heads=None), "heads is None"),
        (dict(stride_size=0), "stride_size is 0"),
        (dict(patch_size=64), "img_size is 32×32, expected at least one patch of 64×64"),
        (dict(variant="vit"), "variant is 'vit'"),
        (dict(activation="silu"), "activation is 'silu'"),
        (dict(act_layer=torch.nn.SiLU), "expected GELU, QuickGELU or ReLU"),
        (dict(layers=0), "layers is 0"),
        (dict(patch_size=(8, 8, 8)), "patch_size"),
        (dict(img_size=None), "img_size is None"),
        (dict(input_resolution=32), "one of img_size"),
        (dict(h_resolution=3, w_resolution=4), "the grid of img_size"),
        (dict(pool_type="avg"), "open_clip"),
        (dict(variant="open_clip", pool_type="max"), "pool_type is 'max'"),
        (dict(pos_embed_policy="R9"), "R9"),
        (dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dict(patch_dropout=1.0), "patch_dropout is 1.0"),
        (dict(norm_layer=torch.nn.BatchNorm2d), "norm_layer"),
    ],
)
def test_bad_words(words, message):
    words = dict(dict(variant="openai", img_size=32, patch_size=8, width=32, layers=1, heads=4), **words)
    with pytest.raises(ValueError, match=message):
        clip.build(**words)


def test_missing_words_are_named_after_the_variant():
    with pytest.raises(ValueError, match="variant is 'vit', expected one of 'openai'"):
        clip.build(variant="vit")
    with pytest.raises(TypeError, match="patch_size and width not given"):
        clip.build()


def test_unknown_and_missing_words_are_type_errors():
    for words in (dict(width=64), dict(patch_size=8, width=64, img_size=32, colour=1), dict(patch_size="8", width=64)):
        with pytest.raises(TypeError):
            clip.build("openai", **words)


# CLIP-ReID's classifier


def reid(**words):
    tower = dict(h_resolution=4, w_resolution=2, patch_size=8, width=32, layers=2, heads=4, output_dim=12)
    return perturbed(clip_reid.build(num_classes=5, **tower, **words))


@pytest.mark.parametrize("cameras, views", [(0, 0), (3, 0), (1, 0), (0, 2), (3, 2)])
def test_reid_side_information_and_outputs(cameras, views):
    model = reid(camera_num=cameras, view_num=views, sie_coe=3.0)
    images = torch.randn(4, 3, 32, 16)
    cam, view = torch.tensor([0, 1, 2, 0]) % max(cameras, 1), torch.tensor([1, 0, 1, 1]) % max(views, 1)
    labels = dict(cam_label=cam if cameras else None, view_label=view if views else None)
    emb = None
    if cameras or views:
        assert model.cv_embed.shape == (max(cameras, 1) * max(views, 1), 32)
        emb = 3.0 * model.cv_embed[cam * views + view if cameras and views else (cam if cameras else view)].double()
    s = double({k.removeprefix("image_encoder."): v for k, v in model.image_encoder.state_dict().items()})
    last, x = formula(s, images.double(), 4, 8, cv_emb=emb)
    x = formula_norm(x, s["ln_post.weight"], s["ln_post.bias"])
    f_last, f, f_proj = last[:, 0], x[:, 0], (x @ s["proj"])[:, 0]

    close(model.eval()(images, **labels), torch.cat([f, f_proj], 1))
    model.neck_feat = "after"
    rstd = 1 / math.sqrt(1 + 1e-5)
    heads = double(model.state_dict())
    after = [
        y * rstd * heads[f"{name}.weight"] + heads[f"{name}.bias"]
        for y, name in ((f, "bottleneck"), (f_proj, "bottleneck_proj"))
    ]
    close(model(images, **labels), torch.cat(after, 1))

    scores, features, projected = model.train()(images, **labels)
    for a, e in zip(features, (f_last, f, f_proj)):
        close(a, e)
    close(projected, f_proj)
    for y, name, score in ((f, "", scores[0]), (f_proj, "_proj", scores[1])):
        normal = (y - y.mean(0)) / torch.sqrt(y.var(0, unbiased=False) + 1e-5)
        normal = normal * heads[f"bottleneck{name}.weight"] + heads[f"bottleneck{name}.bias"]
        assert torch.allclose(score.double(), normal @ heads[f"classifier{name}.weight"].t(), atol=2e-5)
    sum(part.square().sum() for part in (*scores, *features)).backward()
    for name, parameter in model.named_parameters():
        frozen = name in ("bottleneck.bias", "bottleneck_proj.bias")
        assert (parameter.grad is None) == frozen and parameter.requires_grad != frozen, name


def test_reid_weights_and_errors():
    source = reid(camera_num=2)
    state = dict(source.state_dict(), **{"text_encoder.a": torch.ones(1), "prompt_learner.b": torch.ones(1)})
    model = clip_reid.load(reid(camera_num=2), state)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    tower = tiny(width=32, layers=2, img_size=(32, 16))
    whole = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    assert torch.equal(clip_reid.load(model, whole).image_encoder.proj, tower.proj)
    assert torch.equal(clip.load(tower, source.state_dict()).proj, source.image_encoder.proj)
    images = torch.randn(2, 3, 32, 16)
    with pytest.raises(ValueError, match="cam_label"):
        model(images)
    with pytest.raises(ValueError, match="no table"):
        reid()(images, view_label=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="neck_feat"):
        reid(neck_feat="middle")


@pytest.mark.interp
@pytest.mark.parametrize("variant, words", [("openai", dict(stride_size=6)), ("clip_reid", {}), ("open_clip", {})])
def test_interpreted_kernels_agree(variant, words):
    model = tiny(variant, layers=2, **words)
    assert_kernels_agree(model, torch.randn(2, 3, 32, 32))
