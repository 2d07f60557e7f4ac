"""Files of other programs in this library's models: the same numbers as the programs', and a word for every key.

Oracles: transformers' own models, saved by ``save_pretrained``; timm's loader and its converter of DINOv2's files.
"""

import argparse
import json
import logging
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_systems_hybrid import google_arrays

import vit_fast
from vit_fast import checkpoints
from vit_fast.checkpoints import convert_file, convert_state_dict
from vit_fast.systems import clip, deit, hybrid, t2t

WORDS = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5)
HF = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
)  # fmt: skip
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def norm(eps):
    return lambda width, **words: torch.nn.LayerNorm(width, eps=eps, **words)


def small(**words):
    return vit_fast.VisionTransformer(**{**WORDS, **words}).eval()


def saved(folder, model):
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def told_of(caplog, level):
    return "\n".join(
        record.getMessage() for record in caplog.records if (record.name, record.levelno) == ("vit_fast", level)
    )


# Hugging Face: class → how the names of what is left out begin
LEFT_OUT = {
    "ViTForImageClassification": [],
    "ViTModel": ["pooler.dense.bias", "pooler.dense.weight"],
    "Dinov2Model": ["embeddings.mask_token"],
    "Dinov2WithRegistersModel": ["embeddings.mask_token"],
    "CLIPVisionModelWithProjection": [],
    "CLIPModel": ["logit_scale", "text_model."],
    "SiglipVisionModel": [],
    "SiglipModel": ["logit_bias", "logit_scale", "text_model."],
}


def vit_case(transformers, name):
    """(their model, their output for images, our words)."""
    vit = dict(norm_layer=norm(1e-12))
    if name == "ViTForImageClassification":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5))
        return model, lambda m, x: m(x).logits, vit
    if name == "ViTModel":
        model = transformers.ViTModel(transformers.ViTConfig(**HF))
        return model, lambda m, x: m(x).last_hidden_state[:, 0], vit | dict(num_classes=0)
    dinov2 = dict(num_classes=0, init_values=1.0, mlp_ratio=4.0)
    if name == "Dinov2Model":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**HF))
        return model, lambda m, x: m(x).pooler_output, dinov2
    if name == "Dinov2WithRegistersModel":
        config = transformers.Dinov2WithRegistersConfig(**HF, num_register_tokens=3, use_swiglu_ffn=True)
        words = dinov2 | dict(reg_tokens=3, no_embed_class=True, mlp_layer="swiglu", mlp_ratio=128 / 24 + 1e-6)
        return transformers.Dinov2WithRegistersModel(config), lambda m, x: m(x).pooler_output, words
    tower = dict(pre_norm=True, norm_layer=norm(1e-5), act_layer="quick_gelu", num_classes=12)
    if name == "CLIPVisionModelWithProjection":
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF, projection_dim=12))
        return model, lambda m, x: m(x).image_embeds, tower
    if name == "CLIPModel":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=HF, projection_dim=12)
        return transformers.CLIPModel(config), lambda m, x: m.get_image_features(x).pooler_output, tower
    siglip = dict(class_token=False, global_pool="map", num_classes=0, act_layer="gelu_tanh")
    if name == "SiglipVisionModel":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF))
        return model, lambda m, x: m(x).pooler_output, siglip
    config = transformers.SiglipConfig(text_config=TEXT | {"hidden_size": 24}, vision_config=HF)
    return transformers.SiglipModel(config), lambda m, x: m.get_image_features(x).pooler_output, siglip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_hugging_face(name, tmp_path, caplog):
    source, output, words = vit_case(pytest.importorskip("transformers"), name)
    path = saved(tmp_path, perturbed(source))
    with caplog.at_level(logging.INFO, "vit_fast"), torch.no_grad():
        model = checkpoints.load_checkpoint(small(**words), path)
        expected = output(source, IMAGES)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=2e-5)
    state, table = checkpoints.read_state_dict(path), told_of(caplog, logging.INFO)
    assert all(key in table for key in state)
    left_out = told_of(caplog, logging.WARNING)
    assert all(part in left_out for part in LEFT_OUT[name]) and bool(left_out) == bool(LEFT_OUT[name])
    report = convert_file(path, tmp_path / "timm.safetensors")
    assert {source for entry in report for source in entry.sources} == state.keys()
    again = checkpoints.load_checkpoint(small(**words), tmp_path / "timm.safetensors")
    assert torch.equal(again(IMAGES), model(IMAGES))
    # The names of the modules themselves, and a file of another grid.
    checkpoints.load_state_dict(small(**words), source.state_dict())
    larger = checkpoints.load_checkpoint(small(**{**words, "img_size": 48}), path)
    assert larger.pos_embed.shape[1] == model.pos_embed.shape[1] - 16 + 36


def test_hugging_faces_deit_clip_and_mae_in_the_families(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    source = perturbed(transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HF, num_labels=5)))
    words = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5)
    model = deit.build(**words, distilled=True, norm_layer=norm(1e-12)).eval()
    checkpoints.load_checkpoint(model, saved(tmp_path / "deit", source))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source(IMAGES).logits, rtol=1e-5, atol=2e-5)

    source = perturbed(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF, projection_dim=12))
    )
    model = clip.build(
        img_size=32, patch_size=8, width=24, layers=2, heads=3, mlp_ratio=2.0, output_dim=12
    ).eval()  # fmt: skip
    checkpoints.load_checkpoint(model, saved(tmp_path / "clip", source))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source(IMAGES).image_embeds, rtol=1e-5, atol=2e-5)

    decoder = dict(decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
    config = transformers.ViTMAEConfig(**HF, **decoder, decoder_intermediate_size=16, mask_ratio=0.0)
    source = perturbed(transformers.ViTMAEForPreTraining(config))
    caplog.clear()
    model = small(num_classes=0, norm_layer=norm(1e-12))
    checkpoints.load_checkpoint(model, saved(tmp_path / "mae", source))
    assert "decoder.decoder_embed.bias" in told_of(caplog, logging.WARNING)
    with torch.no_grad():
        expected = source.vit(IMAGES).last_hidden_state[:, 0]
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=2e-5)


def test_hugging_face_files_that_do_not_fit(tmp_path):
    transformers = pytest.importorskip("transformers")
    headless = transformers.ViTModel(transformers.ViTConfig(**HF))
    with pytest.raises(vit_fast.WeightsError, match="it holds no classifier: num_classes=0 builds a model without"):
        checkpoints.load_checkpoint(small(), saved(tmp_path, headless))
    state = headless.state_dict()
    with pytest.raises(vit_fast.WeightsError, match=r"unexpected layers\.0\.attention\.sink"):
        checkpoints.load_state_dict(small(num_classes=0), state | {"layers.0.attention.sink": torch.zeros(3)})
    del state["layers.1.attention.k_proj.weight"]
    with pytest.raises(
        vit_fast.WeightsError, match=r"blocks\.1\.attn\.qkv\.weight has .*q_proj.*, expected query, key"
    ):
        convert_state_dict(state)
    config = transformers.Dinov2Config(**HF, num_labels=5)
    state, report = convert_state_dict(transformers.Dinov2ForImageClassification(config).state_dict())
    assert "head.weight" not in state
    assert next(e.note for e in report if e.sources == ("classifier.bias",)).startswith("it classifies the class token")


# DINOv2's and MAE's own files


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("mlp", ["mlp", "swiglu"])
def test_dinov2_of_the_hub(registers, mlp, tmp_path, caplog):
    timm = pytest.importorskip("timm.models.vision_transformer")
    words = dict(num_classes=0, init_values=1e-5, mlp_layer=mlp, mlp_ratio=4.0)
    if registers:
        words |= dict(reg_tokens=registers, no_embed_class=True)
    plain = perturbed(small(**words)).state_dict()
    hub = {}
    for key, value in plain.items():
        key = key.replace("reg_token", "register_tokens")
        if mlp == "swiglu":
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        hub[key] = value
    hub["mask_token"] = torch.zeros(1, 24)
    if registers:
        hub["pos_embed"] = torch.cat([torch.randn(1, 1, 24), hub["pos_embed"]], dim=1)
    torch.save(hub, tmp_path / "hub.pth")
    with caplog.at_level(logging.INFO, "vit_fast"):
        model = checkpoints.load_checkpoint(small(**words), tmp_path / "hub.pth")
    assert "mask_token (it stands for masked patches" in told_of(caplog, logging.WARNING)
    assert all(key in told_of(caplog, logging.INFO) for key in hub)
    theirs = timm._convert_dinov2(dict(hub), None)
    ours = model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    report = convert_file(tmp_path / "hub.pth", tmp_path / "timm.safetensors")
    assert {source for entry in report for source in entry.sources} == hub.keys()
    again = checkpoints.load_checkpoint(small(**words), tmp_path / "timm.safetensors")
    assert torch.equal(again(IMAGES), model(IMAGES))
    larger = checkpoints.load_checkpoint(small(**{**words, "img_size": 48}), tmp_path / "hub.pth")
    assert torch.equal(
        larger.pos_embed, vit_fast.resize_pos_embed(ours["pos_embed"], (4, 4), (6, 6), "R5", 1 - bool(registers))
    )


def test_mae_of_its_authors(tmp_path, caplog):
    source = perturbed(small(num_classes=0))
    decoder = {
        "mask_token": torch.zeros(1, 1, 16), "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 24), "decoder_blocks.0.norm1.weight": torch.zeros(16),
    }  # fmt: skip
    torch.save({"model": source.state_dict() | decoder}, tmp_path / "mae.pth")
    model = checkpoints.load_checkpoint(small(num_classes=0), tmp_path / "mae.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    left_out = told_of(caplog, logging.WARNING)
    assert all(key in left_out for key in decoder) and "rebuilds masked patches" in left_out
    report = convert_file(tmp_path / "mae.pth", tmp_path / "timm.safetensors")
    assert {entry.sources[0] for entry in report if entry.action == "dropped"} == decoder.keys()
    assert torch.equal(
        checkpoints.load_checkpoint(small(num_classes=0), tmp_path / "timm.safetensors")(IMAGES), model(IMAGES)
    )


# What timm's loader takes


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize(
    "names",
    [("model", "model_ema"), ("model_ema",), ("state_dict", "state_dict_ema", "model_ema"), ("state_dict",), ()],
)
def test_checkpoints_as_timm_takes_them(prefix, names, tmp_path, caplog):
    timm = pytest.importorskip("timm.models")
    states = [{f"{prefix}head.weight": torch.full((2, 2), float(i))} for i in range(max(len(names), 1))]
    checkpoint = dict(zip(names, states), epoch=3, args=argparse.Namespace(lr=0.1)) if names else states[0]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    theirs = timm.load_state_dict(str(tmp_path / "last.ckpt"))
    with caplog.at_level(logging.INFO, "vit_fast"):
        ours = checkpoints.read_state_dict(tmp_path / "last.ckpt")
    assert ours.keys() == theirs.keys() == {"head.weight"}
    assert torch.equal(ours["head.weight"], theirs["head.weight"])
    averaged = any("ema" in name for name in names)
    assert ("the averaged (EMA) weights" in told_of(caplog, logging.INFO)) == averaged


@pytest.mark.parametrize("family", [clip, deit, hybrid])
def test_families_take_the_same_checkpoints(family, tmp_path):
    if family is clip:
        build = lambda: clip.build(img_size=32, patch_size=8, width=24, layers=1, heads=3, output_dim=4)  # noqa: E731
    elif family is deit:
        build = lambda: deit.build(**WORDS)  # noqa: E731
    else:
        transformer = dict(mlp_dim=48, num_heads=3, num_layers=1, attention_dropout_rate=0.0, dropout_rate=0.0)
        config = dict(patches=dict(size=(8, 8)), hidden_size=24, transformer=transformer)
        build = lambda: hybrid.build(config=config, img_size=32, num_classes=5)  # noqa: E731
    raw, averaged, loaded = build(), perturbed(build()), build()
    states = [{f"_orig_mod.{key}": value for key, value in model.state_dict().items()} for model in (raw, averaged)]
    checkpoint = dict(model=states[0], model_ema=states[1], args=argparse.Namespace(lr=0.1))
    torch.save(checkpoint, tmp_path / "x.ckpt")
    checkpoints.load_checkpoint(loaded, tmp_path / "x.ckpt")
    assert all(torch.equal(value, averaged.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_files_that_are_not_taken_name_a_remedy(tmp_path):
    model = small()
    with pytest.warns(DeprecationWarning):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "archive.pt")
    remedy = re.escape(f"torch.save(torch.jit.load({str(tmp_path / 'archive.pt')!r}).state_dict(), 'weights.pth')")
    with pytest.raises(vit_fast.WeightsError, match=f"is a TorchScript archive, .*{remedy}"):
        checkpoints.load_checkpoint(model, tmp_path / "archive.pt")
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": pytest.approx(1)}, tmp_path / "objects.ckpt")
    with pytest.raises(vit_fast.WeightsError, match=r"It names .*Approx.*torch.load\(.*weights_only=False\)"):
        checkpoints.load_checkpoint(model, tmp_path / "objects.ckpt")
    torch.save({"student": {"head.weight": torch.zeros(1)}, "epoch": 1}, tmp_path / "pair.pth")
    with pytest.raises(vit_fast.WeightsError, match="epoch, student; where 'student' is the state_dict, save or pass"):
        checkpoints.load_checkpoint(model, tmp_path / "pair.pth")
    lightning = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": lightning, "pytorch-lightning_version": "2"}, tmp_path / "lightning.ckpt")
    with pytest.raises(vit_fast.WeightsError, match=r"its keys stand under 'net\.': pass \{k\.removeprefix\('net\.'\)"):
        checkpoints.load_checkpoint(model, tmp_path / "lightning.ckpt")


@pytest.mark.parametrize(
    "names",
    [
        lambda key: key.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda key: "module." + key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."),
        lambda key: "_fsdp_wrapped_module." + key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."),
        lambda key: "_orig_mod.module._orig_mod." + key.replace(".mlp.", ".mlp._orig_mod."),
    ],
    ids=["compiled", "checkpointed", "fsdp", "ddp"],
)
def test_wrappers_of_blocks_are_taken_out_of_names(names, tmp_path):
    source, model = perturbed(small()), small()
    torch.save({names(key): value for key, value in source.state_dict().items()}, tmp_path / "x.pth")
    checkpoints.load_checkpoint(model, tmp_path / "x.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    convert_file(tmp_path / "x.pth", tmp_path / "timm.safetensors")
    assert torch.equal(checkpoints.load_checkpoint(small(), tmp_path / "timm.safetensors")(IMAGES), source(IMAGES))


def test_an_averaged_model_of_torch(tmp_path, caplog):
    source, model = perturbed(small()), small()
    torch.save(torch.optim.swa_utils.AveragedModel(source).state_dict(), tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, "vit_fast"):
        checkpoints.load_checkpoint(model, tmp_path / "x.pth")
    assert torch.equal(model(IMAGES), source(IMAGES)) and "n_averaged" in told_of(caplog, logging.INFO)


@pytest.mark.parametrize("safe", [True, False])
def test_the_index_of_shards_stands_for_them(safe, tmp_path):
    source, model = perturbed(small()), small()
    state = source.state_dict()
    names = [f"model-0000{n}-of-00002.{'safetensors' if safe else 'bin'}" for n in (1, 2)]
    for name, keys in zip(names, (list(state)[:9], list(state)[9:]), strict=True):
        part = {key: state[key] for key in keys}
        save_file(part, tmp_path / name) if safe else torch.save(part, tmp_path / name)
    index = tmp_path / f"model{'.safetensors' if safe else '.bin'}.index.json"
    of = {key: names[place >= 9] for place, key in enumerate(state)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": of}))
    checkpoints.load_checkpoint(model, index)
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert convert_file(index, tmp_path / "timm.safetensors").count("kept") == len(state)
    for read in (checkpoints.read_state_dict, lambda path: convert_file(path, tmp_path / "y.safetensors")):
        with pytest.raises(vit_fast.WeightsError, match=rf"is one of 2 shards, expected their index {index.name}"):
            read(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(vit_fast.WeightsError, match=f"names {names[1]}, expected that file beside it"):
        checkpoints.load_checkpoint(model, index)
    index.write_text("{}")
    with pytest.raises(vit_fast.WeightsError, match="cannot be read: KeyError: 'weight_map'"):
        checkpoints.load_checkpoint(model, index)


def test_files_without_usable_tensors(tmp_path):
    model = small()
    dense = model.state_dict()
    for name, checkpoint, message in (
        ("empty", {}, "holds no tensor"),
        ("nothing", {"model": {}}, "holds no tensor"),
        ("sparse", dense | {"head.weight": dense["head.weight"].to_sparse()}, "head.weight of layout torch.sparse_coo"),
        ("meta", {key: value.to("meta") for key, value in dense.items()}, "blocks.0.attn.proj.bias on the meta device"),
    ):
        path = tmp_path / f"{name}.pth"
        torch.save(checkpoint, path)
        with pytest.raises(vit_fast.WeightsError, match=message):
            checkpoints.load_checkpoint(model, path)
        with pytest.raises(vit_fast.WeightsError, match=message):
            convert_file(path, tmp_path / "x.safetensors")
        if name in ("sparse", "meta"):
            with pytest.raises(vit_fast.WeightsError, match=r"of the state is o[fn] .*, expected a dense tensor"):
                checkpoints.load_state_dict(model, checkpoint)


def test_other_errors_of_files_name_a_remedy(tmp_path):
    model = small()
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(vit_fast.WeightsError, match=r"or checkpoint\.state_dict\(\) where it is a whole model"):
        checkpoints.load_checkpoint(model, tmp_path / "whole.pth")
    tower = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    pair = {name: {f"backbone.{key}": value for key, value in tower.items()} for name in ("student", "teacher")}
    torch.save(pair, tmp_path / "pair.pth")
    with pytest.raises(vit_fast.WeightsError, match="where 'student' or 'teacher' is the state_dict"):
        checkpoints.load_checkpoint(model, tmp_path / "pair.pth")
    remedy = r"; its keys stand under 'backbone\.': pass \{k\.removeprefix\('backbone\.'\)"
    with pytest.raises(vit_fast.WeightsError, match=f"missing blocks.*{remedy}"):
        checkpoints.load_state_dict(model, pair["teacher"])
    with pytest.raises(vit_fast.WeightsError, match=f"belong to no known family, .*{remedy}"):
        convert_state_dict(pair["teacher"])
    deep = {f"model.image.{key}": value for key, value in deit.build(**WORDS).state_dict().items()}
    with pytest.raises(vit_fast.WeightsError, match=r"its keys stand under 'model\.image\.'"):
        convert_state_dict(deep | {"criterion.weight": torch.zeros(1)})
    logits = deit.build(**WORDS, representation_size=24)
    with pytest.raises(vit_fast.WeightsError, match=r"pre_logits\.fc\.weight \(it holds no pre_logits: repres"):
        checkpoints.load_state_dict(logits, model.state_dict())
    checkpoints.load_state_dict(deit.build(**WORDS, representation_size=0), model.state_dict())
    with pytest.raises(vit_fast.WeightsError, match=r"no classifier: num_classes=0 .*; it holds no pre_logits"):
        checkpoints.load_state_dict(logits, tower)


@pytest.mark.parametrize("family", ["vit", "deit", "clip", "t2t", "hybrid"])
def test_a_table_of_another_grid_is_told_once(family, tmp_path):
    tower = dict(patch_size=8, width=24, layers=1, heads=3, output_dim=4)
    tokens = dict(embed_dim=24, depth=1, num_heads=3, mlp_ratio=2.0, num_classes=5)
    build = {
        "vit": small,
        "deit": lambda **size: deit.build(**WORDS | size),
        "clip": lambda **size: clip.build(**tower, **size),
        "t2t": lambda **size: t2t.build(**tokens, **size),
        "hybrid": lambda **size: jeonsworld(**size),
    }[family]
    torch.save(build(img_size=32).state_dict(), tmp_path / "x.pth")
    with pytest.raises(vit_fast.WeightsError, match=r"pos.* does not fit: table has \d+ rows") as error:
        checkpoints.load_checkpoint(build(img_size=48), tmp_path / "x.pth", old_grid=(3, 3))
    assert str(error.value).count("vit_fast") == 1


def test_a_table_that_is_no_square_asks_for_its_grid(tmp_path):
    source = small(img_size=(64, 16))
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = small(img_size=48)
    checkpoints.load_checkpoint(model, tmp_path / "x.pth", old_grid=(8, 2))
    assert torch.equal(model.pos_embed, vit_fast.resize_pos_embed(source.pos_embed, (8, 2), (6, 6), "R5", 1))
    tower = dict(patch_size=8, width=24, layers=1, heads=3, output_dim=4)
    for build in (small, lambda **size: deit.build(**WORDS | size), lambda **size: clip.build(**tower, **size)):
        torch.save(build(img_size=(64, 24)).state_dict(), tmp_path / "y.pth")
        with pytest.raises(vit_fast.WeightsError, match=r"pos.*25.*old_grid=\(rows, columns\)"):
            checkpoints.load_checkpoint(build(img_size=48), tmp_path / "y.pth")
        checkpoints.load_checkpoint(build(img_size=48), tmp_path / "y.pth", old_grid=(8, 3))


def test_canonical_keys_load_into_the_families():
    for build in (
        lambda: deit.build(**WORDS),
        lambda: t2t.build(img_size=32, embed_dim=24, depth=1, num_heads=3, mlp_ratio=2.0, num_classes=5),
        jeonsworld,
    ):
        source, model = perturbed(build()), build()
        checkpoints.load_state_dict(model, convert_state_dict(source.state_dict(), "canonical")[0])
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


# Google's files: a key that is missing is the one that is named, and heads are those of the model


def jeonsworld(heads=3, resnet=None, img_size=32):
    transformer = dict(mlp_dim=48, num_heads=heads, num_layers=2, attention_dropout_rate=0.0, dropout_rate=0.0)
    config = dict(patches=dict(size=(8, 8)), hidden_size=24, transformer=transformer)
    if resnet is not None:
        config |= dict(patches=dict(size=(1, 1)), resnet=dict(num_layers=resnet, width_factor=0.5))
    return hybrid.build(
        config=config, img_size=img_size, num_classes=5, **({} if resnet is None else {"hybrid_mode": "google"})
    )


@pytest.mark.parametrize(
    "words", [{}, {"linen": True}, {"stacked": True, "linen": True}], ids=["old", "linen", "stacked"]
)
@pytest.mark.parametrize("resnet", [None, (1,)])
def test_every_missing_key_of_a_google_file_is_named(words, resnet):
    model = jeonsworld(resnet=resnet)
    source = google_arrays(model, **words)
    for key in source:
        if key == "cls":
            continue  # a file may be without
        rest = {name: value for name, value in source.items() if name != key}
        with pytest.raises(vit_fast.WeightsError, match=re.escape(f"Google checkpoint lacks {key!r}")):
            hybrid.load(model, rest)
    hybrid.load(model, source)


@pytest.mark.parametrize("heads", [1, 2, 4, 6])
def test_heads_of_a_google_file_are_the_models(heads, tmp_path):
    arrays = google_arrays(jeonsworld(heads), heads)
    np.savez(tmp_path / "x.npz", **arrays)
    for model in (jeonsworld(), small(), deit.build(**WORDS)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(vit_fast.WeightsError, match=rf"kernels of {heads} heads, expected 3 \(num_heads of "):
            checkpoints.load_checkpoint(model, tmp_path / "x.npz")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    checkpoints.load_checkpoint(small(num_heads=heads), tmp_path / "x.npz")
