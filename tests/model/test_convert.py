"""Checkpoints in other keys: the converted model says what the original says, and the report tells of every key.

Oracles: timm's own converter of OpenAI's keys, open_clip's tower, timm's hybrid names, and models of this library under
two sets of keys. The rest of ``vit-fast list`` is tested here too.
"""

import numpy as np
import pytest
import torch

import vit_fast
from vit_fast import cli
from vit_fast.checkpoints import WeightsError, convert_file, convert_state_dict, read_state_dict
from vit_fast.checkpoints.registry import family_of
from vit_fast.systems import hybrid

safetensors = pytest.importorskip("safetensors.torch")

WORDS = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5)
CONFIG = {
    "patches": {"size": (8, 8)},
    "hidden_size": 24,
    "transformer": {"mlp_dim": 48, "num_heads": 3, "num_layers": 2, "attention_dropout_rate": 0.0, "dropout_rate": 0.0},
}


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def timm_keyed(state=None, **words):
    model = perturbed(vit_fast.VisionTransformer(**{**WORDS, **words}))
    if state is not None:
        model.load_state_dict(state)
    return model


def jeonsworld(resnet=None, **words):
    config = CONFIG | ({} if resnet is None else {"resnet": {"num_layers": resnet, "width_factor": 0.5}})
    if resnet is not None:
        config["patches"] = {"size": (1, 1)}
    return perturbed(hybrid.build(config=config, img_size=32, num_classes=5, **words))


def assert_whole(report, state, converted):
    """Every key that came is in the report, every key that was written once."""
    assert {name for entry in report for name in entry.sources} == set(state)
    written = [entry.target for entry in report if entry.action != "dropped"]
    assert sorted(written) == sorted(converted)
    for entry in report:
        assert (entry.action == "kept") == (entry.sources == (entry.target,) and not entry.note)
        assert (entry.action == "dropped") == (entry.target == "")
        assert (entry.action == "added") == (entry.sources == ())
    lines = str(report).splitlines()
    assert len(lines) == len(report) + 1 and lines[-1].endswith(f"{report.count('dropped')} dropped")


def test_jeonsworld_to_timm_and_back():
    source, images = jeonsworld(), torch.randn(2, 3, 32, 32)
    state, report = convert_state_dict(source.state_dict())
    assert_whole(report, source.state_dict(), state)
    assert family_of(source.state_dict()) == "jeonsworld"
    assert report.count("mapped") == len(state) - 2 and report.count("kept") == 2 and report.count("dropped") == 0
    entry = next(entry for entry in report if entry.target == "blocks.1.attn.qkv.weight")
    assert entry.sources == tuple(f"transformer.encoder.layer.1.attn.{w}.weight" for w in ("query", "key", "value"))
    torch.testing.assert_close(timm_keyed(state)(images), source(images)[0], rtol=1e-5, atol=1e-5)
    back, report = convert_state_dict(state, "jeonsworld")
    assert_whole(report, state, back)
    assert back.keys() == source.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("resnet", [(2, 1), ()])
def test_hybrids_get_timms_hybrid_names(resnet):
    timm = pytest.importorskip("timm")
    name = "vit_base_r50_s16_224" if resnet else "vit_tiny_r_s16_p8_224"
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000).state_dict()
        ours = vit_fast.create_model("R50-ViT-B_16" if resnet else "R+ViT-Ti_16", num_classes=1000).state_dict()
    state, _ = convert_state_dict(ours)
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in theirs.items()}
    source = jeonsworld(resnet).state_dict()
    there, _ = convert_state_dict(source)
    back, report = convert_state_dict(there, "jeonsworld")
    assert_whole(report, there, back)
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)


@pytest.mark.parametrize("words", [{}, {"init_values": 0.1}, {"reg_tokens": 2, "qkv_bias": False}])
def test_canonical_keys_there_and_back_and_into_create_model(words, tmp_path):
    source = timm_keyed(**words)
    state, report = convert_state_dict(source.state_dict(), "canonical")
    assert_whole(report, source.state_dict(), state)
    block = {key.removeprefix("blocks.0.").rsplit(".", 1)[0] for key in state if key.startswith("blocks.0.")}
    gammas = {"gamma1", "gamma2"} if "init_values" in words else set()
    assert block == {"ln1", "qkv", "out", "ln2", "fc1", "fc2"} | gammas
    back, _ = convert_state_dict(state, "timm")
    assert back.keys() == source.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())
    safetensors.save_file(state, tmp_path / "x.safetensors")
    model = vit_fast.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "x.safetensors"), **{**WORDS, **words}
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), source(images))


def test_timms_keys_stay_and_old_patch_weights_get_their_axes():
    source = timm_keyed().state_dict()
    state, report = convert_state_dict(source)
    assert_whole(report, source, state)
    assert report.count("kept") == len(source) and all(state[key] is source[key] for key in source)
    old = source | {"patch_embed.proj.weight": source["patch_embed.proj.weight"].flatten(1)}
    state, report = convert_state_dict(old, patch_size=8)
    assert torch.equal(state["patch_embed.proj.weight"], source["patch_embed.proj.weight"])
    assert report.count("resized") == 1 and "192 columns → 3×8×8" in str(report)
    for patch_size in (None, 7):
        with pytest.raises(WeightsError, match=f"patch_size is {patch_size}, expected the side.*192 columns"):
            convert_state_dict(old, patch_size=patch_size)
    assert convert_state_dict(old, patch_size=4)[0]["patch_embed.proj.weight"].shape == (24, 12, 4, 4)


def test_clip_to_timm_as_open_clip_says(tmp_path, peer):
    open_clip = peer("open_clip.transformer")
    tower = open_clip.VisionTransformer(
        image_size=32, patch_size=8, width=64, layers=2, heads=1, mlp_ratio=4.0, output_dim=12, ls_init_value=0.5
    )
    perturbed(tower)
    text = {"logit_scale": torch.tensor(1.0), "token_embedding.weight": torch.randn(3, 4)}
    whole = {f"visual.{key}": value for key, value in tower.state_dict().items()} | text
    state, report = convert_state_dict(whole)
    assert_whole(report, whole, state)
    assert [entry.sources[0] for entry in report if entry.action == "dropped"] == list(text)
    assert [entry.target for entry in report if entry.action == "added"] == ["head.bias"]
    words = dict(embed_dim=64, num_heads=1, mlp_ratio=4.0, num_classes=12, init_values=0.5, pre_norm=True)
    model = timm_keyed(state, norm_layer=torch.nn.LayerNorm, **words)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), tower(images), rtol=1e-5, atol=1e-5)
    bare, _ = convert_state_dict(tower.state_dict())
    reid, _ = convert_state_dict({f"image_encoder.{key}": value for key, value in tower.state_dict().items()})
    assert all(torch.equal(bare[key], state[key]) and torch.equal(reid[key], state[key]) for key in state)


def test_clip_to_timm_as_timm_converts():
    timm = pytest.importorskip("timm.models.vision_transformer")
    from vit_fast.systems import clip

    source = perturbed(clip.build(input_resolution=32, patch_size=8, width=64, layers=2, heads=1, output_dim=12))
    state = {f"visual.{key}": value for key, value in source.state_dict().items()}
    theirs = timm._convert_openai_clip(dict(state), timm_keyed(embed_dim=64, num_heads=1, num_classes=12))
    ours, _ = convert_state_dict(state)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key].reshape(value.shape)), key


def test_google_npz_by_the_command_line(tmp_path, capsys):
    from support.google_arrays import google_arrays

    source = jeonsworld()
    arrays = google_arrays(source) | {"opt/state/step": np.zeros(1, np.int32)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert run("convert", tmp_path / "x.npz", tmp_path / "x.safetensors", "--grid", "6x5", "--in-chans", "1") == 0
    printed = capsys.readouterr().out
    assert "resized  Transformer/posembed_input/pos_embedding → pos_embed  (17 → 31 rows, R2)" in printed
    assert "resized  embedding/kernel → patch_embed.proj.weight  (3 → 1 channels)" in printed
    assert "dropped  opt/state/step  (no place)" in printed
    assert printed.splitlines()[-1].endswith("2 resized, 0 added, 1 dropped")
    words = {**WORDS, "img_size": (48, 40), "in_chans": 1}
    from_npz = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "x.npz"), **words)
    model = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "x.safetensors"), **words)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, from_npz.state_dict()[key])
    assert run("convert", tmp_path / "x.npz", tmp_path / "j.safetensors", "--to", "jeonsworld", "--quiet") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    loaded = hybrid.load(jeonsworld(), tmp_path / "j.safetensors").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("family", ["lanl", "torch"])
def test_blocks_that_timm_has_not_become_canonical_only(family, tmp_path):
    from vit_fast.systems import lanl, scratch

    if family == "lanl":
        model = lanl.build(img_size=(1, 16, 16), patch_size=8, token_len=24, num_heads=3, depth=2, qkv_bias=True)
    else:
        words = dict(model_dim=24, max_num_token=20, num_classes=5, nhead=3, num_layers=2, dim_feedforward=32)
        model = scratch.build(image_h=32, image_w=32, ic=3, patch_size=8, **words)
    source = perturbed(model).state_dict()
    torch.save({"model": source}, tmp_path / "x.pth")
    report = convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors", "canonical")
    state = read_state_dict(tmp_path / "x.safetensors")
    assert_whole(report, source, state)
    for name in ("ln1", "qkv", "out", "ln2", "fc1", "fc2"):
        assert {f"blocks.1.{name}.weight", f"blocks.1.{name}.bias"} <= state.keys()
    theirs = (
        "backbone.blocks.1.neuralnet.fc2.weight" if family == "lanl" else "transformer_encoder.layers.1.linear2.weight"
    )
    assert torch.equal(state["blocks.1.fc2.weight"], source[theirs])
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["vit_fast.family"] == family and facts["vit_fast.keys"] == "canonical"
    assert facts["vit_fast.value_skip"] == str(family == "lanl")
    # Both programs take a class of LayerNorm and of the activation, torch's layer may be pre-norm: names tell neither.
    assert not facts.keys() & {"vit_fast.eps", "vit_fast.activation"}
    assert facts.get("vit_fast.pre_norm") == ("True" if family == "lanl" else None)
    with pytest.raises(ValueError, match=f"expected 'canonical' for family '{family}'"):
        convert_file(tmp_path / "x.pth", tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=f"expected 'canonical': the file is of family '{family}'"):
        convert_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()
    convert_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "canonical")
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == facts


@pytest.mark.parametrize("policy", [None, "R2", "R4"])
def test_tables_of_rectangles_and_heads(policy):
    source = timm_keyed(img_size=(16, 64)).state_dict() | {"head_dist.weight": torch.zeros(5, 24)}
    words = dict(grid=(3, 4), old_grid=(2, 8), policy=policy, drop_head=True)
    state, report = convert_state_dict(source, **words)
    expected = vit_fast.resize_pos_embed(source["pos_embed"], (2, 8), (3, 4), policy or "R5", 1)
    assert torch.equal(state["pos_embed"], expected)
    assert_whole(report, source, state)
    dropped = [entry.sources[0] for entry in report if entry.action == "dropped"]
    assert sorted(dropped) == ["head.bias", "head.weight", "head_dist.weight"]
    same, report = convert_state_dict(source, grid=(2, 8), old_grid=(2, 8))
    assert same["pos_embed"] is source["pos_embed"] and report.count("resized") == 0
    no_class_row = timm_keyed(no_embed_class=True).state_dict()
    state, _ = convert_state_dict(no_class_row, grid=(2, 2))
    assert state["pos_embed"].shape == (1, 4, 24)


def test_bad_words_and_files(tmp_path):
    state = timm_keyed().state_dict()
    with pytest.raises(ValueError, match="to is 'clip', expected one of timm, canonical, jeonsworld"):
        convert_state_dict(state, "clip")
    with pytest.raises(ValueError, match="family is 'vgg', expected one of timm"):
        convert_state_dict(state, family="vgg")
    with pytest.raises(WeightsError, match="keys such as a, b belong to no known family"):
        convert_state_dict({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"pos_embed does not fit: .*17 rows"):
        convert_state_dict(state, grid=(2, 2), old_grid=(3, 3))
    with pytest.raises(WeightsError) as error:
        convert_state_dict(state, grid=(2, 2), old_grid=(3, 3))
    assert "expected 1 prefix rows" in str(error.value) and str(error.value).count("vit_fast") == 1
    for words in (dict(old_grid=(3, 3)), dict(policy="R1")):
        with pytest.raises(ValueError, match=rf"{next(iter(words))} is .*, expected grid with it"):
            convert_state_dict(state, **words)
    with pytest.raises(ValueError, match=r"^vit_fast: pos_embed policy is 'R9', expected one of R1"):
        convert_state_dict(state, grid=(2, 2), policy="R9")
    for family in ("clip", "huggingface", "google", "jeonsworld", "canonical", "lanl"):
        with pytest.raises(ValueError, match=f"family is '{family}', expected 'timm', whose keys these are"):
            convert_state_dict(state, family=family)
    assert convert_state_dict(state, family="dinov2")[0].keys() == state.keys()
    some = {key: value for key, value in state.items() if key.startswith("norm.")}
    assert convert_state_dict(some, family="timm")[0].keys() == some.keys()
    for family in ("clip", "huggingface", "google"):
        with pytest.raises(WeightsError, match="belong to no known family"):
            convert_state_dict(some, family=family)
    with pytest.raises(WeightsError, match="grid is given, expected a checkpoint with a table"):
        convert_state_dict({key: value for key, value in state.items() if key != "pos_embed"}, grid=(2, 2))
    lacking = {key: v for key, v in jeonsworld().state_dict().items() if not key.endswith("1.attn.key.weight")}
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.weight lacks key"):
        convert_state_dict(lacking)
    with pytest.raises(ValueError, match=r"target is .*x\.pth'.*expected a file name ending in \.safetensors"):
        convert_file("x.pth", tmp_path / "x.pth")


def test_command_line_refuses_and_overwrites(tmp_path, capsys):
    torch.save(timm_keyed().state_dict(), tmp_path / "x.pth")
    target = tmp_path / "x.safetensors"
    assert run("convert", tmp_path / "x.pth", target, "--to", "canonical") == 0
    assert "mapped   blocks.0.norm1.weight → blocks.0.ln1.weight" in capsys.readouterr().out
    assert run("convert", tmp_path / "x.pth", target) == 1
    assert "exists; --force overwrites it" in capsys.readouterr().err
    assert run("convert", tmp_path / "x.pth", target, "--force") == 0
    assert "blocks.0.norm1.weight" in read_state_dict(target)
    for words, message in (
        (["--grid", "4x"], "--grid is '4x', expected rows and columns"),
        (["--to", "jax"], "to is 'jax', expected one of"),
        (["--from", "jax"], "family is 'jax', expected one of"),
        (["--policy", "R9", "--grid", "2"], "policy"),
    ):
        assert run("convert", tmp_path / "x.pth", tmp_path / "new.safetensors", *words) == 1
        assert message in capsys.readouterr().err
    assert run("convert", tmp_path / "none.pth", tmp_path / "new.safetensors") == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


def test_openais_archive_only_where_it_is_trusted(tmp_path, capsys):
    from vit_fast.systems import clip

    source = clip.build(input_resolution=32, patch_size=8, width=64, layers=1, heads=1, output_dim=12).eval()

    class Whole(torch.nn.Module):
        def forward(self, x):
            return x

    whole = Whole()
    for key, value in source.state_dict().items():
        module = whole
        for name in ("visual", *key.split(".")[:-1]):
            if name not in module._modules:
                module.add_module(name, Whole())
            module = module._modules[name]
        module.register_parameter(key.split(".")[-1], torch.nn.Parameter(value))
    with pytest.warns(DeprecationWarning):
        torch.jit.script(whole).save(str(tmp_path / "x.pt"))
    assert run("convert", tmp_path / "x.pt", tmp_path / "x.safetensors") == 1
    assert "cannot be read" in capsys.readouterr().err
    assert run("convert", tmp_path / "x.pt", tmp_path / "x.safetensors", "--torchscript") == 0
    assert torch.equal(read_state_dict(tmp_path / "x.safetensors")["cls_token"][0, 0], source.class_embedding)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_metadata_of_a_clip_tower_tells_no_activation(tmp_path, activation):
    from safetensors import safe_open

    from vit_fast.systems import clip

    words = dict(image_size=32, patch_size=8, width=24, layers=1, heads=3, activation=activation)
    safetensors.save_file(clip.build("open_clip", **words).state_dict(), tmp_path / "x.safetensors")
    assert run("convert", tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--quiet") == 0
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts == {
        "format": "pt", "vit_fast.keys": "timm", "vit_fast.family": "clip", "vit_fast.pre_norm": "True",
        "vit_fast.value_skip": "False",
    }  # fmt: skip


def test_metadata_of_googles_files_tells_the_heads(tmp_path):
    from safetensors import safe_open
    from support.google_arrays import google_arrays

    np.savez(tmp_path / "x.npz", **google_arrays(jeonsworld()))
    convert_file(tmp_path / "x.npz", tmp_path / "y.safetensors", "canonical")
    convert_file(tmp_path / "y.safetensors", tmp_path / "z.safetensors")
    for name, keys in (("y", "canonical"), ("z", "timm")):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            facts = file.metadata()
        assert facts["vit_fast.num_heads"] == "3" and facts["vit_fast.activation"] == "gelu_tanh"
        assert facts["vit_fast.family"] == "google" and facts["vit_fast.keys"] == keys


def test_a_table_that_is_a_square_with_and_without_prefix_rows_asks_for_its_grid():
    state = timm_keyed(img_size=24, reg_tokens=4, no_embed_class=True).state_dict()
    with pytest.raises(WeightsError, match="old_grid is None, expected rows and columns: the 9 rows"):
        convert_state_dict(state, grid=(2, 2))
    assert convert_state_dict(state, grid=(2, 2), old_grid=(3, 3))[0]["pos_embed"].shape == (1, 4, 24)


# vit-fast list


def test_list_families_and_long(capsys):
    assert run("list", "*B_16*", "--family", "hybrid") == 0
    assert capsys.readouterr().out.split() == ["R50+ViT-B_16", "R50-ViT-B_16", "ViT-B_16"]
    assert run("list", "--families") == 0
    counts = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert int(counts["hybrid"]) == len(hybrid.PRESETS) and sum(map(int, counts.values())) == len(
        vit_fast.list_models()
    )
    assert run("list", "vit_tiny_patch16_224", "-l") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "input", "classes", "parameters", "trainable"]
    assert lines[2].split() == [
        "vit_tiny_patch16_224",
        "vision_transformer",
        "3×224×224",
        "1000",
        "5,717,416",
        "5,717,416",
    ]
    assert run("list", "ViT-B_32", "--long", "--num-classes", "1000") == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["ViT-B_32"][3:5] == ["1000", "88,224,232"] and "R26+ViT-B_32" in rows
    assert run("list", "--family", "vgg") == 1
    assert "--family is 'vgg', expected one of" in capsys.readouterr().err
