"""Transformer blocks found by structure, and what optimize, explain and status say of a model that does not run fused.

Models of timm are made on the device meta, a sample of each family; what a name should give was read in timm.
"""

import logging
from collections import Counter

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import vit_fast
from vit_fast import systems
from vit_fast.structure import transformer_blocks

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
CONFIG = dict(
    image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
)  # fmt: skip
SHALLOW = dict(depth=2)

TIMM = {  # name → (arguments, classes of its blocks)
    "vit_tiny_patch16_224": (SHALLOW, {"Block": 2}),
    "aimv2_large_patch14_224": (SHALLOW, {"Block": 2}),
    "vit_base_patch16_rpn_224": (SHALLOW, {"ResPostBlock": 2}),
    "vit_small_patch16_36x1_224": (SHALLOW, {"Block": 2}),
    "vit_small_patch16_18x2_224": (SHALLOW, {"ParallelThingsBlock": 2}),
    "vit_base_patch16_xp_224": (SHALLOW, {"ParallelScalingBlock": 2}),
    "deit3_small_patch16_224": (SHALLOW, {"Block": 2}),
    "vit_small_r26_s32_224": (SHALLOW, {"Block": 2}),
    "vit_relpos_small_patch16_224": (SHALLOW, {"RelPosBlock": 2}),
    "vit_relpos_small_patch16_rpn_224": (SHALLOW, {"ResPostRelPosBlock": 2}),
    "samvit_base_patch16_224": (SHALLOW, {"Block": 2}),
    "vit_small_patch16_dinov3": (SHALLOW, {"EvaBlock": 2}),
    "vit_small_patch16_rope_224": (SHALLOW, {"EvaBlock": 2}),
    "eva02_tiny_patch14_224": (SHALLOW, {"EvaBlock": 2}),
    "eva02_enormous_patch14_clip_224": (SHALLOW, {"EvaBlockPostNorm": 2}),
    "beit_base_patch16_224": (SHALLOW, {"Block": 2}),
    "cait_xxs24_224": (SHALLOW, {"LayerScaleBlock": 2, "LayerScaleBlockClassAttn": 2}),
    "xcit_nano_12_p16_224": (SHALLOW, {"XCABlock": 2, "ClassAttentionBlock": 2}),
    "convit_tiny": (SHALLOW, {"Block": 2}),
    "tnt_s_legacy_patch16_224": (SHALLOW, {"Block": 2}),
    "naflexvit_base_patch16_gap": (SHALLOW, {"Block": 2}),
    "mixer_s32_224": ({}, {"MixerBlock": 8}),
    "resmlp_12_224": ({}, {"ResBlock": 12}),
    "gmlp_ti16_224": ({}, {"SpatialGatingBlock": 30}),
    "pit_ti_224": ({}, {"Block": 12}),
    "crossvit_tiny_240": ({}, {"Block": 15, "CrossAttentionBlock": 6}),
    "swin_tiny_patch4_window7_224": ({}, {"SwinTransformerBlock": 12}),
    "swinv2_tiny_window8_256": ({}, {"SwinTransformerV2Block": 12}),
    "volo_d1_224": ({}, {"Outlooker": 4, "Transformer": 14, "ClassBlock": 2}),
    "hiera_tiny_224": ({}, {"HieraBlock": 12}),
    "mvitv2_tiny": ({}, {"MultiScaleBlock": 10}),
    "pvt_v2_b0": ({}, {"Block": 8}),
    "levit_128s": ({}, {"LevitBlock": 9}),
    "coatnet_0_224": ({}, {"TransformerBlock2d": 7}),
    "edgenext_xx_small": ({}, {"SplitTransposeBlock": 3}),
    "mobilevit_xxs": ({}, {"Block": 9}),
    "fastvit_sa12": ({}, {"AttentionBlock": 2}),
    "resnet18": ({}, {}),
    "seresnet50": ({}, {}),
    "regnety_002": ({}, {}),
    "efficientnet_b0": ({}, {}),
    "mobilenetv3_small_050": ({}, {}),
    "convnext_atto": ({}, {}),
    "convmixer_768_32": ({}, {}),
    "mambaout_femto": ({}, {}),
}


def timm_model(name):
    with torch.device("meta"):
        return timm.create_model(name, **TIMM[name][0]).eval()


def found(model):
    return dict(Counter(type(block).__name__ for block in transformer_blocks(model).values()))


FUSED = {name for name, (_, blocks) in TIMM.items() if name.startswith(("pit", "deit3", "naflex"))}
FUSED |= {name for name in TIMM if name.startswith(("vit_", "aimv2", "samvit", "eva02", "beit", "cait", "mobilevit_"))}


@pytest.mark.parametrize("name", TIMM)
def test_blocks_of_timm(name):
    model, blocks = timm_model(name), TIMM[name][1]
    assert found(model) == blocks
    if name in FUSED:
        vit_fast.optimize(model)
        assert all(isinstance(block, vit_fast.integrations.Fused) for block in transformer_blocks(model).values())
    elif blocks:
        before = {module: type(module) for module in model.modules()}
        with pytest.raises(vit_fast.UnsupportedError, match="as they are: ") as raised:
            vit_fast.optimize(model, strict=True)
        assert {module: type(module) for module in model.modules()} == before
        for block_name, block in transformer_blocks(model).items():
            if not isinstance(block, timm.models.vision_transformer.Block):  # CrossViT has some of these too
                assert block_name.rpartition(".")[0] in str(raised.value)
                assert f"{type(block).__name__} is not a class that vit_fast fuses" in str(raised.value)


def test_every_block_that_stays_is_logged_and_explained(caplog):
    model = timm.create_model("convit_tiny", depth=2, img_size=32).eval()
    why = "timm.models.convit.Block is not a class that vit_fast fuses"
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        vit_fast.optimize(model, strict=True)
    assert str(raised.value) == f"vit_fast.optimize: these blocks stay as they are: blocks.0–1: {why}"
    with caplog.at_level(logging.INFO, "vit_fast"):
        vit_fast.optimize(model)
    assert caplog.messages == [f"optimize leaves blocks.{i} as it is: {why}" for i in range(2)]
    rows = vit_fast.explain(model)
    assert [(row.module, row.operation) for row in rows if row.backend != "library"] == [("patch_embed", "patch_embed")]
    told = [(row.module, row.operation, row.reasons) for row in rows if row.backend == "library"]
    assert told == [(f"blocks.{i}", "block", (why,)) for i in range(2)]


class OwnBlock(nn.Module):
    """A block of nobody's library, its projections under names of its own."""

    def __init__(self):
        super().__init__()
        self.before, self.mix = nn.LayerNorm(48), nn.MultiheadAttention(48, 3, batch_first=True)
        self.wide, self.narrow = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x):
        y = self.before(x)
        return x + self.narrow(self.wide(x + self.mix(y, y, y)[0]))


class Wrapped(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


def test_subclasses_unknown_classes_and_wrapped_blocks():
    model = timm.models.vision_transformer.VisionTransformer(**SMALL | dict(depth=3)).eval()
    model.blocks[0] = OwnBlock()
    model.blocks[1].__class__ = type("OtherBlock", (type(model.blocks[1]),), {})
    model.blocks[2] = Wrapped(model.blocks[2])
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        vit_fast.optimize(model, strict=True)
    assert "blocks.1: it is a OtherBlock, a subclass of Block" in str(raised.value)
    assert f"blocks.0: {__name__}.OwnBlock is not a class that vit_fast fuses" in str(raised.value)
    assert "blocks.2" not in str(raised.value)
    operations = {row.module: row.backend for row in vit_fast.explain(vit_fast.optimize(model))}
    assert operations["blocks.0"] == operations["blocks.1"] == "library" and operations["blocks.2.block"] == "torch"


def test_blocks_of_torchvision_and_transformers():
    with torch.device("meta"):
        assert found(torchvision.models.swin_t()) == {"SwinTransformerBlock": 12}
        assert found(torchvision.models.vit_b_16()) == {"EncoderBlock": 12}
        assert not found(torchvision.models.convnext_tiny()) and not found(torchvision.models.resnet18())
        for name, cls in (("Beit", "BeitLayer"), ("DINOv3ViT", "DINOv3ViTLayer"), ("ViTMAE", "ViTMAELayer")):
            model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**CONFIG))
            assert found(model) == {cls: 2}
            vit_fast.optimize(model, strict=True)
            assert all(isinstance(block, vit_fast.integrations.Fused) for block in transformer_blocks(model).values())
        text = {key: value for key, value in CONFIG.items() if key not in ("image_size", "patch_size")}
        bert = transformers.BertModel(transformers.BertConfig(**text, vocab_size=30, max_position_embeddings=12))
    assert not found(bert)
    with pytest.raises(ValueError, match="model is BertModel without transformer blocks"):
        vit_fast.optimize(bert)


def test_a_text_tower_of_another_class_is_left_alone(peer):
    open_clip = peer("open_clip")
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=8, image_size=32)
    text = dict(context_length=9, vocab_size=30, width=48, heads=3, layers=2)
    custom = open_clip.model.CLIPTextCfg(**text, block_type="custom", qk_norm=True)
    for build, words in ((open_clip.CLIP, text), (open_clip.CustomTextCLIP, text), (open_clip.CLIP, custom)):
        words = words if words is custom else open_clip.model.CLIPTextCfg(**words)
        model = build(16, vision, words)
        assert {name.split(".")[0] for name in transformer_blocks(model)} == {"visual"}
        vit_fast.optimize(model, strict=True)


NAFLEX = dict(
    patches=torch.zeros(1, 6, 192),
    patch_coord=torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 0]]]),
    patch_valid=torch.tensor([[True] * 4 + [False] * 2]),
)


def test_explain_of_masked_patches_and_of_a_hook():
    """The mask of NaFlexVit's own input goes into the attention; its grid depends on the coordinates."""
    model = timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3, patch_size=8).eval()
    vit_fast.optimize(model)
    for example in (NAFLEX, (NAFLEX,)):
        rows = vit_fast.explain(model, example)
        assert [row.module for row in rows if row.operation == "attention"] == ["blocks.0", "blocks.1"]
        assert [row.module for row in rows if row.backend == "library"] == ["embeds"]  # a linear layer of patches
    assert not any(row.backend == "library" for row in vit_fast.explain(model, torch.zeros(1, 3, 32, 32)))
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    rows = vit_fast.explain(model, torch.zeros(1, 3, 32, 32))
    assert [row.module for row in rows if row.operation == "layernorm_mlp"] == ["blocks.0"]
    assert [(row.module, row.reasons) for row in rows if row.backend == "library"] == [
        ("blocks.1", ("attn carries a hook",))
    ]


def test_explain_takes_keyword_arguments():
    model = vit_fast.optimize(transformers.ViTModel(transformers.ViTConfig(**CONFIG)))
    model.blocks_in_training = model.layers[0].eval()
    rows = vit_fast.explain(model, dict(pixel_values=torch.zeros(1, 3, 32, 32)))
    assert {row.backend for row in rows} == {"torch"} and len(rows) == 9  # the patch projection, four of each block
    assert not model.layers[0].training and model.layers[1].training


def test_explain_of_a_model_that_runs_nothing_fused():
    model = timm.models.vision_transformer.VisionTransformer(**SMALL).eval()
    lines = str(vit_fast.explain(model)).splitlines()
    assert lines[0] == (
        "no operation of vit_fast runs in VisionTransformer; vit_fast.optimize(model) fuses 3 of its modules"
    )
    assert len(lines) == 4 and lines[3].endswith("library vit_fast.optimize(model) fuses it")
    assert "no operation" not in str(vit_fast.explain(vit_fast.optimize(model)))
    rows = vit_fast.explain(torchvision.models.resnet18(), torch.zeros(1, 3, 32, 32))
    assert not rows and str(rows) == "no operation of vit_fast runs in ResNet, and no transformer block"
    for arguments, wanted in (
        (("x",), "model is str, expected an nn.Module"),
        ((model, "x"), "example is str, expected a tensor, or a tuple or a dict of what the model is called with"),
    ):
        with pytest.raises(TypeError) as raised:
            vit_fast.explain(*arguments)
        assert str(raised.value) == f"vit_fast.explain: {wanted}"


CLIP = dict(patch_size=8, width=64, layers=2, heads=4, output_dim=16, input_resolution=32)
SCRATCH = dict(
    image_h=16, image_w=24, ic=3, patch_size=8, model_dim=24, max_num_token=9, num_classes=7, nhead=3, num_layers=2,
    dim_feedforward=40,
)  # fmt: skip
T2T = dict(img_size=32, num_classes=5, embed_dim=24, depth=2, num_heads=3, token_dim=16)
OWN = {
    "vit": lambda: vit_fast.VisionTransformer(**SMALL),
    "clip": lambda: systems.clip.build("openai", **CLIP),
    "deit": lambda: systems.deit.build(**SMALL),
    "scratch": lambda: systems.scratch.build(**SCRATCH),
    "t2t": lambda: systems.t2t.build(**T2T),
    "lanl": lambda: systems.lanl.build(),
    "hybrid": lambda: systems.hybrid.build("ViT-S_32", 64, 5),
}


@pytest.mark.parametrize("name", OWN)
def test_optimize_of_a_model_that_is_fused_already(name):
    """The blocks of every family are found, and called what they are."""
    with torch.device("meta"):
        model = OWN[name]()
    with pytest.raises(ValueError, match=r"^vit_fast\.optimize: model is .*, whose blocks are vit_fast's own and"):
        vit_fast.optimize(model)


def scriptable():
    import open_clip

    yield timm.models.vision_transformer.VisionTransformer(**SMALL)
    yield torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 96)
    yield transformers.ViTModel(transformers.ViTConfig(**CONFIG))
    yield transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CONFIG))
    yield open_clip.transformer.VisionTransformer(32, 8, 48, layers=2, heads=3, mlp_ratio=2.0)


def test_scripting_an_optimised_model_says_to_restore_it(peer):
    peer("open_clip")
    for model in scriptable():
        vit_fast.optimize(model)
        with pytest.raises(vit_fast.UnsupportedError, match=r"call vit_fast\.restore\(model\) first"):
            torch.jit.script(model)
    script = torch.jit.script(vit_fast.restore(timm.models.vision_transformer.VisionTransformer(**SMALL)))
    assert script(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_status_of_a_device_that_is_not_there():
    count = torch.cuda.device_count()
    have = f"{torch.__version__} finds {count} CUDA devices"
    for device, error, wanted in (
        ("x", ValueError, "device is 'x', expected 'cpu', 'cuda' or 'cuda:<index>'"),
        (3.0, TypeError, "device is float, expected a torch.device or its name"),
        (f"cuda:{count}", ValueError, f"device is 'cuda:{count}', expected one of this machine, where torch {have}"),
    ):
        with pytest.raises(error) as raised:
            vit_fast.status(device)
        assert str(raised.value) == f"vit_fast.status: {wanted}"
    assert "device cpu" in str(vit_fast.status("cpu"))
