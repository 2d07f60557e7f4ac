"""Names, tags and what belongs to them, against the installed timm: data configs, heads, weights, lists, hub names."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.pretrained_cfgs import FILE, cfgs_of_timm, table, text
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg

import vit_fast
from vit_fast import pretrained_cfg
from vit_fast.presets import PRESETS

NAMES = [name for name, preset in PRESETS.items() if preset.build is vit_fast.VisionTransformer]
OF_TIMM = [name for name in PRESETS if timm.is_model(name)]
BUILT_BY_TIMM = [name for name in pretrained_cfg.modules() if name not in PRESETS]
# A tower of a few numbers in the place of the published one.
TINY = dict(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=4)


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


def test_the_table_is_what_timm_says():
    assert FILE.read_text(encoding="utf-8") == text(table()), "run python tests/support/pretrained_cfgs.py"


def test_setup_ships_the_table():
    assert FILE.name in (FILE.parents[1] / "setup.py").read_text()


@pytest.fixture
def no_download(monkeypatch):
    """timm's download gives nothing, so that its model keeps the parameters it began with; the configs asked for."""
    asked = []
    monkeypatch.setattr(
        timm.models._builder, "load_pretrained", lambda model, pretrained_cfg, **words: asked.append(pretrained_cfg)
    )
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_every_tag_is_built_as_timm_builds_it(name, no_download):
    for full in (name, *(f"{name}.{tag}" for tag in cfgs_of_timm(name))):
        words = dict(depth=1, weight_init="skip")
        with torch.device("meta"):
            theirs = timm.create_model(full, **words)
            pretrained = full != name and bool(get_pretrained_cfg(full).has_weights)
            ours = vit_fast.create_model(full, pretrained=pretrained, **words)
        assert no_download == ([theirs.pretrained_cfg] if pretrained else [])
        no_download.clear()
        assert ours.pretrained_cfg == theirs.pretrained_cfg and ours.default_cfg == theirs.default_cfg
        for use_test_size in (False, True):
            config = resolve_model_data_config(ours, use_test_size=use_test_size)
            assert config == resolve_model_data_config(theirs, use_test_size=use_test_size)
        config = resolve_model_data_config(theirs)
        assert (ours.mean, ours.std) == (config["mean"], config["std"])
        assert ours.num_classes == theirs.num_classes and shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", [name for name in OF_TIMM if name not in NAMES])
@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_families_have_timms_config(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), vit_fast.create_model(name)
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)


def test_names_that_timm_lacks_have_their_familys_config():
    with torch.device("meta"):
        families = {PRESETS[name].build: name for name in PRESETS if name not in OF_TIMM}
        assert len(families) >= 6
        for name in families.values():
            model = vit_fast.create_model(name)
            config = resolve_model_data_config(model)
            for key, value in model.default_cfg.items():
                assert config.get(key, value) == value, (name, key)


def test_a_config_is_of_one_model():
    with torch.device("meta"):
        first = vit_fast.create_model("vit_tiny_patch16_224", depth=1)
        first.pretrained_cfg["mean"] = None
        again = vit_fast.create_model("vit_tiny_patch16_224", depth=1)
    assert again.pretrained_cfg == get_pretrained_cfg("vit_tiny_patch16_224").to_dict()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_huge_patch14_224.mae", "vit_large_patch14_clip_224.openai_ft_in1k", "vit_large_patch14_clip_224"]
)
def test_uint8_images_take_the_tags_mean_and_std(name):
    model = vit_fast.create_model(name, **TINY).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = get_pretrained_cfg(name).to_dict()
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(model(images), model((images / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    other = vit_fast.create_model(name, **TINY, mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3)).eval()
    other.load_state_dict(model.state_dict())
    assert resolve_model_data_config(other)["mean"] == other.mean == (0.4, 0.4, 0.4)
    assert not torch.allclose(other(images), model(images), atol=1e-3)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_clip_224.openai", "vit_huge_patch14_224.mae", "vit_tiny_patch16_224"]
)
def test_num_classes_replaces_the_head_of_the_tag(name, no_download):
    for classes in (7, 0):
        for pretrained in (False, True):
            with torch.device("meta"):
                model = vit_fast.create_model(name, pretrained=pretrained, depth=1, num_classes=classes)
            assert model.num_classes == getattr(model.head, "out_features", 0) == classes
            assert model.pretrained_cfg == get_pretrained_cfg(name).to_dict()


@torch.no_grad()
@pytest.mark.parametrize("words", [{}, dict(num_classes=5), dict(num_classes=0), dict(in_chans=1), dict(img_size=48)])
@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_clip_224.openai", "vit_so400m_patch14_siglip_378.webli_ft_in1k", "vit_base_patch16_224.dino"],
)
def test_pretrained_weights_are_timms(name, words, tmp_path):
    """A file in the place of the download, through timm's own loader."""
    torch.manual_seed(0)
    published = timm.create_model(name, **TINY)
    for parameter in published.parameters():
        parameter.normal_(std=0.1)
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    words = dict(TINY, **words) if "img_size" not in words else TINY | words
    # The file is of another grid than the tag, which timm has to be told.
    overlay = dict(file=str(tmp_path / "weights.safetensors"), input_size=(3, 32, 32))
    ours = vit_fast.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **words).eval()
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **words).eval()
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    for key, value in theirs.state_dict().items():
        if not (key.startswith("head") and "num_classes" in words):
            assert torch.equal(ours.state_dict()[key], value), key
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, ours.in_chans, *ours.patch_embed.img_size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "words",
    [
        dict(pretrained_cfg="mae"),
        dict(pretrained_cfg=dict(mean=(0.1, 0.2, 0.3), num_classes=12, input_size=(3, 96, 64), fixed_input_size=True)),
        dict(pretrained_cfg=dict(num_classes=-1)),
        dict(pretrained_cfg_overlay=dict(num_classes=3, std=(1.0, 1.0, 1.0), license=None)),
        dict(pretrained_cfg_overlay=dict(file="weights.npz")),
        dict(pretrained_cfg_overlay=dict(url="", hf_hub_id="org/name")),
    ],
)
def test_a_config_of_ones_own(words):
    name = "vit_base_patch16_224"
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, depth=1, **words), vit_fast.create_model(name, depth=1, **words)
    assert ours.pretrained_cfg == theirs.pretrained_cfg and shapes(ours) == shapes(theirs)


LISTS = [
    {},
    dict(filter="*dino*"),
    dict(filter=["*dino*"]),
    dict(filter=("*dino*", "*siglip*"), exclude_filters=["*so400m*", "*reg4*"]),
    dict(filter="vit_base*", exclude_filters="*clip*"),
    dict(pretrained=True),
    dict(filter="vit_base_patch16_clip_224", pretrained=True),
    dict(filter="*.openai", pretrained=True),
    dict(filter=["*clip*", "*.dino"], exclude_filters=["*quickgelu*", "*.laion2b*"], pretrained=True),
    dict(filter="*huge*", include_tags=True),
    dict(filter="*huge*", exclude_filters="*.untrained", include_tags=True),
    dict(filter="*gap*", pretrained=True, include_tags=False),
    dict(filter="*gap*", pretrained=False, name_matches_cfg=True),
    dict(filter="swin*"),
    dict(filter=[]),
]


@pytest.mark.parametrize("words", LISTS, ids=range(len(LISTS)))
def test_lists_are_timms(words):
    theirs = timm.list_models(module="vision_transformer", **words)
    assert vit_fast.list_models(module="vision_transformer", **words) == theirs
    assert set(theirs) <= set(vit_fast.list_models(**words))


def test_lists_of_families():
    assert vit_fast.list_models("*dino*", ["deit", "clip"]) == []
    assert set(vit_fast.list_models(module="deit")) > set(vit_fast.list_models("deit_*_distilled_*", "deit")) > set()
    assert len(vit_fast.list_models()) == len(PRESETS) + len(BUILT_BY_TIMM)
    everything = vit_fast.list_models()
    assert everything.index("vit_base_patch8_224") < everything.index("vit_base_patch16_224")
    assert not [name for name in vit_fast.list_models(name_matches_cfg=True) if not timm.is_model(name)]


def _published(tmp_path, **words):
    """A model of timm in a folder, as its ``save_for_hf`` leaves one; the hub's files are the same."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY, **words)
    cfg = dict(num_classes=9, input_size=[3, 32, 32], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], classifier="head")
    cfg |= dict(first_conv="patch_embed.proj", fixed_input_size=True)
    config = dict(architecture="vit_tiny_patch16_224", model_args=TINY | words, num_classes=9, pretrained_cfg=cfg)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return model


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:", "local-dir:"])
def test_models_of_the_hub_and_of_folders(prefix, tmp_path, monkeypatch):
    published = _published(tmp_path, num_classes=9, reg_tokens=2).eval()
    asked = []

    def download(repo_id, filename, revision, **words):
        asked.append((repo_id, revision))
        return tmp_path / filename

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    name = prefix + (str(tmp_path) if prefix == "local-dir:" else "org/some.name@v1")
    x = torch.randn(2, 3, 32, 32)
    ours = vit_fast.create_model(name, pretrained=True).eval()
    torch.testing.assert_close(ours(x), published(x), rtol=2e-5, atol=2e-5)
    assert ours.mean == (0.1, 0.2, 0.3) and ours.num_classes == 9
    theirs = timm.create_model(name, pretrained=True).pretrained_cfg
    assert ours.pretrained_cfg == {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items()}
    assert set(asked) == (set() if prefix == "local-dir:" else {("org/some.name", "v1")})
    changed = vit_fast.create_model(name, pretrained=True, num_classes=3)
    assert changed.head.out_features == 3 and torch.equal(changed.cls_token, published.cls_token)
    fresh = vit_fast.create_model(name)
    assert shapes(fresh) == shapes(published) and not torch.equal(fresh.head.weight, published.head.weight)


@pytest.mark.parametrize(
    "name", ["vit_large_patch14_224", "vit_gigantic_patch14_224", "ViT-B/32", "t2t_vit_14", "ViT-B_16", "lanl_vit"]
)
def test_names_without_weights_are_refused_at_once(name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)  # asked for in vain, a download would be worse
    with pytest.raises(vit_fast.WeightsError, match=f"timm has no weights of '{name}'.*; checkpoint_path takes a file"):
        vit_fast.create_model(name, pretrained=True)


def test_tags_with_weights_are_named():
    message = r"no weights of 'vit_huge_patch14_224\.untrained'; of 'vit_huge_patch14_224' it has orig_in21k, mae;"
    with pytest.raises(vit_fast.WeightsError, match=message):
        vit_fast.create_model("vit_huge_patch14_224.untrained", pretrained=True)


def test_hub_names_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(vit_fast.WeightsError, match=r"create_model: the config of 'hf-hub:org/name' cannot be had"):
        vit_fast.create_model("hf-hub:org/name", cache_dir=str(tmp_path))
    with pytest.raises(vit_fast.WeightsError, match=r"the config of 'local-dir:.*absent' cannot be had.*config.json"):
        vit_fast.create_model(f"local-dir:{tmp_path / 'absent'}")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
    with pytest.raises(ValueError, match="unknown model 'local-dir:"):
        vit_fast.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": {"rope": True}})
    )
    with pytest.raises(TypeError, match="unknown argument 'rope' for 'vit_tiny_patch16_224'"):
        vit_fast.create_model(f"local-dir:{tmp_path}")


def test_timm_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    for name in ("hf-hub:org/name", "local-dir:somewhere"):
        with pytest.raises(ImportError, match=f"vit_fast: '{name}' needs timm: pip install"):
            vit_fast.create_model(name)
    with torch.device("meta"):
        model = vit_fast.create_model("vit_base_patch16_224.mae", depth=1)
    assert model.pretrained_cfg["crop_pct"] == 0.9 and vit_fast.list_models("*.openai", pretrained=True)


# Names of timm's ViT family that timm builds.

CHEAP = [
    "beit_base_patch16_224", "eva02_tiny_patch14_224.mim_in22k", "vit_small_patch16_dinov3.lvd1689m",
    "deit3_small_patch16_224", "vit_relpos_small_patch16_224", "naflexvit_base_patch16_gap", "vit_tiny_r_s16_p8_224", "samvit_base_patch16_224",
]  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_models_built_by_timm_are_timms(name, no_download):
    base, _, tag = name.partition(".")
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = vit_fast.create_model(name, pretrained=bool(tag))
        few = vit_fast.create_model(name, num_classes=3)
    assert isinstance(ours, type(theirs)) == (base not in PRESETS) and shapes(ours) == shapes(theirs)
    assert ours.pretrained_cfg == theirs.pretrained_cfg and few.num_classes == 3
    assert no_download == ([theirs.pretrained_cfg] if tag and base not in PRESETS else no_download)


@torch.no_grad()
def test_a_model_built_by_timm_computes_what_timms_does():
    torch.manual_seed(0)
    theirs = timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=56).eval()
    ours = vit_fast.create_model("eva02_tiny_patch14_224", depth=2, img_size=56).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    features = vit_fast.create_model(
        "eva02_tiny_patch14_224", depth=2, img_size=56, features_only=True, out_indices=[1]
    )
    assert [f.shape for f in features(x)] == [(2, 192, 4, 4)]


def test_errors_of_models_built_by_timm(tmp_path, monkeypatch):
    name = "eva02_tiny_patch14_224"
    with pytest.raises(TypeError, match=r"timm's 'eva02_tiny_patch14_224' does not take these arguments: .*nonsense"):
        vit_fast.create_model(name, nonsense=1)
    with pytest.raises(ValueError, match="unknown tag 'mim' of 'eva02_tiny_patch14_224'; near: mim_in22k"):
        vit_fast.create_model(f"{name}.mim")
    (tmp_path / "cut.safetensors").write_bytes(b"garbage")
    with pytest.raises(vit_fast.WeightsError, match="weights of 'eva02_tiny_patch14_224' cannot be had through timm"):
        vit_fast.create_model(name, checkpoint_path=str(tmp_path / "cut.safetensors"), depth=1)
    with pytest.raises(ValueError, match=r"unknown model 'eva02_tiny'; near: .*eva02_tiny_patch14_224"):
        vit_fast.create_model("eva02_tiny")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="needs timm: pip install"):
        vit_fast.create_model(name)
