"""vit_fast.coverage, the tables of a library, and the committed page made of them."""

import os
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from support.coverage_tables import committed
from support.library_models import moved, timm_vit
from support.timm_models import build
from torch import nn

import vit_fast
from vit_fast import library_coverage as table

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("VIT_FAST_DEPTH") == "full"
TABLES = committed()
COMMITTED = TABLES["timm"]
OTHERS = [(library, row.architecture) for library in ("transformers", "open_clip") for row in TABLES[library]]
# One of each class of block, and of each patch embedding.
FEW = (
    "test_vit", "test_vit4", "test_eva", "test_vit_relpos", "beit_base_patch16_224", "vit_base_patch16_rpn_224",
    "samvit_base_patch16_224", "vitamin_small_224", "naflexvit_base_patch16_gap", "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_dwee_patch16_reg1_gap_256", "aimv2_large_patch14_224",
    "vit_base_r26_s32_224", "cait_xxs24_224",
)  # fmt: skip


# The smallest of open_clip, and one of each form of transformers' layers.
FEW_OTHERS = (
    "ViT-S-32-alt", "MobileCLIP2-B", "ViTMAE with its decoder", "Beit", "Dinov2", "DINOv3", "CLIP", "Siglip2", "Aimv2",
    "Pixtral", "Qwen2-VL", "SAM",
)  # fmt: skip


def images():
    return torch.randn(2, 3, 32, 32)


def test_a_model_of_which_all_or_nothing_runs_fused():
    plain = timm_vit()
    before = vit_fast.coverage(plain)
    assert before.share == 0.0 and not before.fully_fused and (before.blocks, before.fused_blocks) == (2, 0)
    assert list(before.reasons) == ["vit_fast.optimize(model) fuses it"]
    state = {name: (type(module), module.training) for name, module in plain.train().named_modules()}
    after = vit_fast.coverage(vit_fast.optimize(plain))
    assert after.share == 1.0 and after.fully_fused and not after.reasons
    assert [row.kind for row in after.rows] == ["patch_embed", "block", "block"]
    assert all(module.training for module in plain.modules())
    told = "VisionTransformer: 100.0% of the FLOPs of blocks and patch embedding run fused, 2 of 2 blocks"
    assert str(after) == told
    vit_fast.restore(plain)
    assert {name: (type(module), module.training) for name, module in plain.named_modules()} == state


def test_the_share_is_that_of_the_flops():
    model = vit_fast.optimize(timm_vit(depth=3))
    tokens, width, hidden = 17, 48, 192
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    patches = 2 * 16 * width * 3 * 64
    assert [row.flops for row in vit_fast.coverage(model).rows] == [patches, *3 * [block]]
    model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    found = vit_fast.coverage(model)
    assert found.share == pytest.approx((patches + 2 * block) / (patches + 3 * block))
    assert found.reasons == {"mlp carries a hook": ["blocks.1"]} and found.fused_blocks == 2
    assert str(found).endswith("\n  blocks.1: mlp carries a hook")
    model.blocks[2].mlp.register_forward_hook(lambda *_: None)
    assert str(vit_fast.coverage(model)).endswith("\n  blocks.1 and 1 more: mlp carries a hook")


def test_what_shows_in_the_call_alone():
    model = vit_fast.optimize(moved(build("DINOv3")))
    model.blocks[1].float().half()
    reasons = vit_fast.coverage(model.to("meta")).reasons
    assert reasons == {"the input is torch.float32, the weights are torch.float16": ["blocks.1"]}


def test_other_models():
    own = vit_fast.create_model("vit_tiny_patch16_224")
    assert vit_fast.coverage(own).share == 1.0
    own.blocks[3].mlp.register_forward_hook(lambda *_: None)
    found = vit_fast.coverage(own)
    assert not found.fully_fused and list(found.reasons.values()) == [["blocks.3"]]
    prepared = vit_fast.prepare(vit_fast.optimize(timm_vit().bfloat16().eval()))
    assert vit_fast.coverage(prepared).fully_fused
    with torch.inference_mode(), vit_fast.backends.recording() as choices:
        prepared(images().bfloat16())
    assert "prepared_blocks" in [operation for operation, *_ in choices]
    naflex = vit_fast.optimize(moved(build("NaFlexVit")))
    found = vit_fast.coverage(naflex)
    assert found.fully_fused and found.share == 1
    mixer = vit_fast.coverage(timm.create_model("mixer_s32_224"))
    assert mixer.share == 0.0 and mixer.blocks == 8


def test_bad_models():
    with pytest.raises(TypeError, match=r"vit_fast\.coverage: model is int, expected an nn\.Module"):
        vit_fast.coverage(3)
    with pytest.raises(ValueError, match=r"vit_fast\.coverage: model is Linear without transformer blocks"):
        vit_fast.coverage(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"vit_fast\.coverage: example is None, expected an input"):
        vit_fast.coverage(timm_vit().blocks)


@pytest.mark.parametrize("library", TABLES)
def test_the_committed_table_has_the_architectures_of_its_library(library, peer):
    module = peer(library)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name.removesuffix("_torch"): version for name, _, version in (line.partition("==") for line in lines)}
    assert f" {pinned[library]}: " in (ROOT / "docs/coverage.md").read_text(encoding="utf-8")
    known = [(one.name, one.family, len(one.tags)) for one in table.LIBRARIES[library]()]
    rows = [(row.architecture, row.family, row.tags) for row in TABLES[library]]
    if module.__version__ == pinned[library]:
        assert rows == known
    else:  # no family has shrunk
        assert len({name for name, *_ in known} & {name for name, *_ in rows}) > 0.9 * len(rows)


def test_every_family_of_transformers_has_a_model_in_the_table():
    from vit_fast.integrations.transformers.families import FAMILIES

    folders = {file.partition(".")[0] for file in FAMILIES}
    assert {row.family for row in TABLES["transformers"]} == folders


@pytest.mark.parametrize(
    ("library", "name"), [one for one in OTHERS if (FULL and one[0] == "transformers") or one[1] in FEW_OTHERS]
)
def test_the_committed_rows_of_other_libraries_are_true(library, name, peer):
    peer(library)
    (built,) = (one for one in table.LIBRARIES[library]() if one.name == name)
    (row,) = (row for row in TABLES[library] if row.architecture == name)
    assert table.architecture_row(built) == row


@pytest.mark.parametrize("name", [row.architecture for row in COMMITTED if FULL or row.architecture in FEW])
def test_the_committed_rows_are_true(name):
    (built,) = (one for one in table.LIBRARIES["timm"]() if one.name == name)
    (row,) = (row for row in COMMITTED if row.architecture == name)
    assert table.architecture_row(built, created_tags=row.created_tags) == row


def test_the_committed_page_is_made_of_the_table():
    assert (ROOT / "docs/coverage.md").read_text(encoding="utf-8") == table.page(committed())
    assert f"{table.readme_table(committed())}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_target_is_met():
    """At least 95 % of the pretrained tags of each library run fully fused."""
    *_, (_, architectures, fused, tags, fused_tags, _) = table.summary(COMMITTED)
    assert fused_tags >= 0.95 * tags and fused >= 0.95 * architectures
    for library in ("transformers", "open_clip"):
        assert all(row.fully_fused for row in TABLES[library])
    assert Counter(row.family for row in COMMITTED)["vision_transformer"] > 150


def small(name):
    """An architecture with two blocks of two heads, as far as its arguments allow."""
    with torch.device("meta"):
        attention = next(m for m in timm.create_model(name).modules() if hasattr(m, "num_heads"))
    size = getattr(attention, "head_dim", 16)
    for kwargs in (dict(depth=2, embed_dim=2 * size, num_heads=2), dict(depth=2), {}):
        try:
            return timm.create_model(name, **kwargs)
        except (TypeError, AssertionError, RuntimeError, IndexError):
            continue
    raise AssertionError(f"{name} cannot be built")


@pytest.mark.parametrize("name", [row.architecture for row in COMMITTED if FULL or row.architecture in FEW[:4]])
def test_every_architecture_computes_what_timm_computes(name):
    plain = moved(small(name))
    size = plain.default_cfg["input_size"]
    x = torch.randn(1, *size)
    with torch.no_grad():
        expected = plain(x)
        with vit_fast.backends.recording() as choices:
            actual = vit_fast.optimize(plain)(x)
    assert not [reasons for operation, backend, reasons in choices if (operation, backend) == ("block", "library")]
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * max(scale, 1.0))
