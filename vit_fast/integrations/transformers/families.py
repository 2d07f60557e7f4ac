"""The vision layers of transformers that run fused: a row for each class, by the file of transformers that has it.

A row names the layer's class and the beginning of the names of its sub-modules' classes; ``names`` has those that do
not follow the rule. Classes under one form are equal but for their names (``tests/integrations/test_transformers.py``
compares their source). Nothing of transformers is imported before a model of that file is met.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from vit_fast.plain import submodules

from . import clip, dino, multimodal, pooling, sam, vit
from .layer import Layer

Form = Layer | pooling.PoolingHead | pooling.Aimv2Head


class Family(NamedTuple):
    """A class of layers, or of heads that pool, and how its sub-modules' classes are called."""

    form: type[Form]
    layer: str  # name of its class
    prefix: str  # "{}MLP" of the form is this and "MLP"
    encoder: str | None = None  # name of the class of its stack, where that stack can be prepared
    names: Mapping[str, str] = {}  # classes that are not named by the rule


_MODELS = "transformers.models."
_VIT, _CLIP, _DINOV2 = vit.ViTForm, clip.CLIPStackForm, dino.Dinov2Form

# file below transformers.models → its layers
FAMILIES: dict[str, tuple[Family, ...]] = {
    "vit.modeling_vit": (Family(_VIT, "ViTLayer", "ViT"),),
    "deit.modeling_deit": (Family(_VIT, "DeiTLayer", "DeiT"),),
    "vit_mae.modeling_vit_mae": (Family(_VIT, "ViTMAELayer", "ViTMAE"),),
    "vit_msn.modeling_vit_msn": (Family(_VIT, "ViTMSNLayer", "ViTMSN"),),
    "ijepa.modeling_ijepa": (Family(_VIT, "IJepaLayer", "IJepa"),),
    "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer": (Family(_VIT, "ASTLayer", "AST"),),
    "vivit.modeling_vivit": (Family(_VIT, "VivitLayer", "Vivit"),),
    "pixio.modeling_pixio": (Family(vit.PixioForm, "PixioLayer", "Pixio"),),
    "dinov2.modeling_dinov2": (Family(_DINOV2, "Dinov2Layer", "Dinov2"),),
    "dinov2_with_registers.modeling_dinov2_with_registers": (
        Family(_DINOV2, "Dinov2WithRegistersLayer", "Dinov2WithRegisters"),
    ),
    "tipsv2.modeling_tipsv2": (Family(_DINOV2, "Tipsv2VisionLayer", "Tipsv2Vision"),),
    "radio.modeling_radio": (Family(_DINOV2, "RadioLayer", "Radio"),),
    "eomt.modeling_eomt": (Family(dino.EomtForm, "EomtLayer", "Eomt"),),
    "videomt.modeling_videomt": (Family(dino.EomtForm, "VideomtLayer", "Videomt"),),
    "dinov3_vit.modeling_dinov3_vit": (
        Family(dino.DINOv3Form, "DINOv3ViTLayer", "DINOv3ViT", names={"DINOv3ViTDropPath": "Dinov3ViTDropPath"}),
    ),
    "eomt_dinov3.modeling_eomt_dinov3": (Family(dino.DINOv3Form, "EomtDinov3Layer", "EomtDinov3"),),
    "clip.modeling_clip": (Family(_CLIP, "CLIPEncoderLayer", "CLIP", "CLIPEncoder"),),
    "altclip.modeling_altclip": (Family(_CLIP, "AltCLIPEncoderLayer", "AltCLIP", "AltCLIPEncoder"),),
    "clipseg.modeling_clipseg": (
        Family(_CLIP, "CLIPSegEncoderLayer", "CLIPSeg", "CLIPSegEncoder"),
        Family(clip.CLIPSegDecoderForm, "CLIPSegDecoderLayer", "CLIPSeg"),
    ),
    "metaclip_2.modeling_metaclip_2": (Family(_CLIP, "MetaClip2EncoderLayer", "MetaClip2", "MetaClip2Encoder"),),
    "chinese_clip.modeling_chinese_clip": (
        Family(_CLIP, "ChineseCLIPVisionLayer", "ChineseCLIPVision", "ChineseCLIPVisionEncoder"),
    ),
    "owlvit.modeling_owlvit": (Family(_CLIP, "OwlViTEncoderLayer", "OwlViT", "OwlViTEncoder"),),
    "owlv2.modeling_owlv2": (Family(_CLIP, "Owlv2EncoderLayer", "Owlv2", "Owlv2Encoder"),),
    "mlcd.modeling_mlcd": (Family(clip.MLCDForm, "MLCDEncoderLayer", "MLCD"),),
    "groupvit.modeling_groupvit": (Family(clip.CLIPForm, "GroupViTEncoderLayer", "GroupViT"),),
    "x_clip.modeling_x_clip": (
        Family(_CLIP, "XCLIPEncoderLayer", "XCLIP", "XCLIPEncoder"),
        Family(clip.XCLIPVisionForm, "XCLIPVisionEncoderLayer", "XCLIP"),
    ),
    "git.modeling_git": (Family(_CLIP, "GitVisionEncoderLayer", "GitVision", "GitVisionEncoder"),),
    "kosmos2.modeling_kosmos2": (Family(_CLIP, "Kosmos2VisionEncoderLayer", "Kosmos2Vision", "Kosmos2VisionEncoder"),),
    "blip.modeling_blip": (Family(clip.BlipForm, "BlipEncoderLayer", "Blip"),),
    "blip_2.modeling_blip_2": (Family(clip.BlipForm, "Blip2EncoderLayer", "Blip2"),),
    "instructblip.modeling_instructblip": (Family(clip.BlipForm, "InstructBlipEncoderLayer", "InstructBlip"),),
    "siglip.modeling_siglip": (
        Family(_CLIP, "SiglipEncoderLayer", "Siglip", "SiglipEncoder"),
        Family(pooling.PoolingHead, "SiglipMultiheadAttentionPoolingHead", "Siglip"),
    ),
    "siglip2.modeling_siglip2": (
        Family(_CLIP, "Siglip2EncoderLayer", "Siglip2", "Siglip2Encoder"),
        Family(pooling.PoolingHead, "Siglip2MultiheadAttentionPoolingHead", "Siglip2"),
    ),
    "idefics2.modeling_idefics2": (Family(_CLIP, "Idefics2EncoderLayer", "Idefics2Vision", "Idefics2Encoder"),),
    "idefics3.modeling_idefics3": (Family(_CLIP, "Idefics3EncoderLayer", "Idefics3Vision", "Idefics3Encoder"),),
    "smolvlm.modeling_smolvlm": (Family(_CLIP, "SmolVLMEncoderLayer", "SmolVLMVision", "SmolVLMEncoder"),),
    "videomae.modeling_videomae": (Family(vit.VideoMAEForm, "VideoMAELayer", "VideoMAE"),),
    "yolos.modeling_yolos": (Family(vit.VideoMAEForm, "YolosLayer", "Yolos"),),
    "dpt.modeling_dpt": (
        Family(vit.VideoMAEForm, "DPTViTLayer", "DPTViT", names={"DPTViTSelfAttention": "DPTSelfAttention"}),
    ),
    "vitpose_backbone.modeling_vitpose_backbone": (Family(vit.VitPoseForm, "VitPoseBackboneLayer", "VitPoseBackbone"),),
    "beit.modeling_beit": (Family(vit.BeitForm, "BeitLayer", "Beit"),),
    "data2vec.modeling_data2vec_vision": (Family(vit.Data2VecForm, "Data2VecVisionLayer", "Data2VecVision"),),
    "internvl.modeling_internvl": (Family(vit.InternVLForm, "InternVLVisionLayer", "InternVLVision"),),
    "aimv2.modeling_aimv2": (
        Family(multimodal.Aimv2Form, "Aimv2EncoderLayer", "Aimv2"),
        Family(pooling.Aimv2Head, "Aimv2AttentionPoolingHead", "Aimv2"),
    ),
    "phi4_multimodal.modeling_phi4_multimodal": (
        Family(clip.Phi4Form, "Phi4MultimodalVisionEncoderLayer", "Phi4MultimodalVision"),
        Family(pooling.PoolingHead, "Phi4MultimodalVisionMultiheadAttentionPoolingHead", "Phi4MultimodalVision"),
    ),
    "ovis2.modeling_ovis2": (
        Family(
            multimodal.Aimv2Form, "Ovis2VisionEncoderLayer", "Ovis2", names={"Ovis2Attention": "Ovis2VisionAttention"}
        ),
    ),
    "pixtral.modeling_pixtral": (Family(multimodal.PixtralForm, "PixtralAttentionLayer", "Pixtral"),),
    "qwen2_vl.modeling_qwen2_vl": (
        Family(multimodal.QwenForm, "Qwen2VLVisionBlock", "", names={"VisionMLP": "VisionMlp"}),
    ),
    "qwen2_5_vl.modeling_qwen2_5_vl": (Family(multimodal.QwenGatedForm, "Qwen2_5_VLVisionBlock", "Qwen2_5_VL"),),
    "glm4v.modeling_glm4v": (
        Family(multimodal.QwenGatedForm, "Glm4vVisionBlock", "Glm4v", names={"Glm4vMLP": "Glm4VisionMlp"}),
    ),
    "glm4v_moe.modeling_glm4v_moe": (
        Family(multimodal.QwenGatedForm, "Glm4vMoeVisionBlock", "Glm4vMoe", names={"Glm4vMoeMLP": "Glm4vMoeisionMlp"}),
    ),
    "qwen3_vl.modeling_qwen3_vl": (Family(multimodal.QwenForm, "Qwen3VLVisionBlock", "Qwen3VL"),),
    "qwen3_vl_moe.modeling_qwen3_vl_moe": (Family(multimodal.QwenForm, "Qwen3VLMoeVisionBlock", "Qwen3VLMoe"),),
    "qwen3_omni_moe.modeling_qwen3_omni_moe": (Family(multimodal.QwenForm, "Qwen3OmniMoeVisionBlock", "Qwen3OmniMoe"),),
    "qwen3_5.modeling_qwen3_5": (Family(multimodal.QwenForm, "Qwen3_5VisionBlock", "Qwen3_5"),),
    "qwen3_5_moe.modeling_qwen3_5_moe": (Family(multimodal.QwenForm, "Qwen3_5MoeVisionBlock", "Qwen3_5Moe"),),
    "sam.modeling_sam": (Family(sam.SamForm, "SamVisionLayer", "Sam"),),
    "sam_hq.modeling_sam_hq": (Family(sam.SamForm, "SamHQVisionLayer", "SamHQ"),),
}


_FILES = {
    name: file for file, families in FAMILIES.items() for family in families for name in (family.layer, family.encoder)
}


def family_of(cls: type[nn.Module]) -> Family | None:
    """The family whose layers are of a class, or None."""
    families = FAMILIES.get(cls.__module__.removeprefix(_MODELS), ())
    return next((family for family in families if family.layer == cls.__name__), None)


def layer_class(name: str) -> type[nn.Module]:
    """The class of the layers whose class, or that of their stack, has a name. Raises KeyError where no family has it,
    ImportError where transformers has not."""
    file = _FILES[name]
    layer = next(family.layer for family in FAMILIES[file] if name in (family.layer, family.encoder))
    return _class(importlib.import_module(_MODELS + file), layer)


def fast_class(cls: type[nn.Module]) -> tuple[type[Form], dict[type[nn.Module], type[nn.Module]]]:
    """(fast class of a family's layers, {class of a stack of them: its fast class}).

    Raises ImportError where transformers lacks a class that it reads.
    """
    family, module = family_of(cls), importlib.import_module(cls.__module__)
    assert family is not None

    def found(wanted: Any) -> type:
        if not isinstance(wanted, str):
            return wanted
        name = wanted.format(family.prefix)
        return _class(module, family.names.get(name, name))

    known = {path: tuple(map(found, classes)) for path, classes in family.form.MODULES.items()}
    fast = _subclass(family.form, cls, SUBMODULES=submodules(**known))
    if family.encoder is None:
        return fast, {}
    encoder = _class(module, family.encoder)
    return fast, {encoder: _subclass(clip.Encoder, encoder)}


def _class(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise ImportError(f"cannot import name {name!r} from {module.__name__!r}")
    return getattr(module, name)


def _subclass(base: type[nn.Module], cls: type[nn.Module], **attributes: Any) -> Any:
    """A subclass of both that pickle finds in this package."""
    place = {"__module__": __package__, "__qualname__": f"Fast{cls.__name__}", "__doc__": base.__doc__}
    return type(cls.__name__, (base, cls), place | attributes)
