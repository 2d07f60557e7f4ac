"""A checkpoint format is one record: a toy program is read, converted and loaded by it alone.

The loader of a model family is found by what the family declared; and the package of checkpoints imports no model.
"""

from pathlib import Path

import pytest
import torch
from support.imports import imports
from torch import nn

import vit_fast
from vit_fast.checkpoints import convert_file, convert_state_dict, load_checkpoint, load_state_dict, registry
from vit_fast.checkpoints.base import Format
from vit_fast.checkpoints.key_rules import compile_rules, renamed
from vit_fast.checkpoints.loading import loads
from vit_fast.systems import clip, deit, hybrid, lanl, scratch, t2t

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5)
PAIRS = (("toy.layer{+}.", "blocks.{}."), ("toy.", ""))
TOY = Format(
    name="toy",
    recognise=lambda state: "toy.layer1.norm1.weight" in state,
    to_timm=lambda state: renamed(state, compile_rules(PAIRS)),
    policy="R2",
    facts=dict(eps=1e-6),
)


def toy_state(model):
    return {
        f"toy.layer{int(key.split('.')[1]) + 1}.{key.split('.', 2)[2]}"
        if key.startswith("blocks.")
        else f"toy.{key}": v
        for key, v in model.state_dict().items()
    }


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", [*registry.FORMATS, TOY])


def test_a_format_is_read_by_all_that_reads_checkpoints(toy, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    torch.manual_seed(0)
    source = vit_fast.VisionTransformer(**SMALL)
    state = toy_state(source)
    assert registry.family_of(state) == "toy" and registry.names()[-1] == "toy"
    converted, report = convert_state_dict(state)
    assert converted.keys() == source.state_dict().keys() and report.count("mapped") == len(state)
    resized, _ = convert_state_dict(state, grid=(2, 2))
    assert torch.equal(resized["pos_embed"], vit_fast.resize_pos_embed(source.pos_embed, (4, 4), (2, 2), "R2", 1))
    for given in (None, "toy"):
        assert torch.equal(convert_state_dict(state, family=given)[0]["head.weight"], source.head.weight)
    torch.save(state, tmp_path / "toy.pth")
    convert_file(tmp_path / "toy.pth", tmp_path / "timm.safetensors")
    with safetensors.safe_open(tmp_path / "timm.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts == {"format": "pt", "vit_fast.family": "toy", "vit_fast.keys": "timm", "vit_fast.eps": "1e-06"}
    for family in (vit_fast.VisionTransformer, deit.build):
        model = load_checkpoint(family(**SMALL), tmp_path / "toy.pth")
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_format_that_is_not_registered_is_unknown():
    state = toy_state(vit_fast.VisionTransformer(**SMALL))
    assert "toy" not in registry.names()
    with pytest.raises(vit_fast.WeightsError, match="belong to no known family"):
        convert_state_dict(state)
    with pytest.raises(ValueError, match="family is 'toy', expected one of timm"):
        convert_state_dict(state, family="toy")
    with pytest.raises(vit_fast.WeightsError, match="missing"):
        load_state_dict(vit_fast.VisionTransformer(**SMALL), state)


def test_a_format_that_is_written_needs_a_function_for_it():
    with pytest.raises(ValueError, match="format 'half' is written, expected from_timm with it"):
        Format(name="half", recognise=bool, to_timm=TOY.to_timm, is_target=True)


def test_names_are_unique_and_variants_name_a_format():
    names = registry.names()
    assert len(set(names)) == len(names)
    assert {known.variant_of for known in registry.FORMATS} <= {None, *names}


def test_every_key_of_every_family_is_recognised_as_one_format_or_none():
    """The order of the list decides nothing for the models here, but for timm's variants."""
    models = (
        vit_fast.VisionTransformer(**SMALL),
        clip.build(img_size=32, patch_size=8, width=64, layers=1, output_dim=4),
        deit.build(**SMALL, compat="literal"),
        hybrid.build(config="testing", img_size=32, num_classes=2),
        lanl.build(img_size=(1, 16, 16), patch_size=8, token_len=24, num_heads=3, depth=1),
        scratch.build(),
        t2t.build(img_size=32, embed_dim=24, depth=1, num_heads=3),
    )
    for model, name in zip(models, ("timm", "clip", "torch", "jeonsworld", "lanl", "torch", "timm"), strict=True):
        assert [known.name for known in registry.FORMATS if known.recognise(model.state_dict())] == [name]


def test_the_declared_loader_of_a_class_serves_its_subclasses(tmp_path):
    class Own(nn.Linear):
        pass

    class Derived(Own):
        pass

    asked = []

    @loads(Own)
    def load(model, path, old_grid=None):
        asked.append((model, path, old_grid))
        return model

    model = Derived(2, 2)
    assert load_checkpoint(model, "x.pth") is model and load_checkpoint(model, "x.pth", (2, 3)) is model
    assert asked == [(model, "x.pth", None), (model, "x.pth", (2, 3))]

    class Mine(deit.DeiT):
        pass

    source, mine = deit.build(**SMALL, distilled=True), deit.build(**SMALL, distilled=True)
    mine.__class__ = Mine
    torch.save(source.state_dict(), tmp_path / "x.pth")
    load_checkpoint(mine, tmp_path / "x.pth")
    assert torch.equal(mine.dist_token, source.dist_token)


@pytest.mark.parametrize("folder", ["checkpoints", "systems"])
def test_checkpoints_import_no_model_and_nothing_is_imported_late(folder):
    files = sorted((Path(vit_fast.__file__).parent / folder).glob("*.py"))
    assert len(files) > 8
    for path in files:
        for name, late in imports(path, f"vit_fast.{folder}"):
            assert not (late and name.startswith("vit_fast")), f"{path.name}: {name} is imported in a function"
            if folder == "checkpoints":
                allowed = ("vit_fast.checkpoints", "vit_fast.pos_embed", "vit_fast.kernels")
                assert not name.startswith("vit_fast") or name.startswith(allowed), f"{path.name} imports {name}"
