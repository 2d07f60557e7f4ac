"""A small vision model of transformers for each family that ``vit_fast.optimize`` knows, and its inputs.

48 wide, two layers; random weights, no downloads. The coverage table and the tests build them.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

_CONFIG = dict(
    image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
)  # fmt: skip
Inputs = Callable[[torch.dtype], dict[str, Any]]  # dtype of the images → keyword arguments of the model's forward


class SmallModel(NamedTuple):
    """A model as the classes of it and of its config, the arguments of the config, and the inputs."""

    model: str
    config: str
    arguments: dict[str, Any]
    inputs: Inputs = lambda dtype: {"pixel_values": images(dtype)}

    @property
    def folder(self) -> str:
        """The folder of transformers.models that defines the model."""
        return str(_found(self.config).__module__.split(".")[2])

    def build(self, **arguments: Any) -> nn.Module:
        """The model in eval mode; ``arguments``: further ones of the config."""
        config, model = _found(self.config), _found(self.model)
        built: nn.Module = model(config(**_CONFIG | self.arguments | arguments))
        return built.eval()


def _found(name: str) -> Any:
    """A class of transformers: its name, or its file and name where transformers itself does not export it."""
    file, _, name = name.rpartition(":")
    return getattr(importlib.import_module(f"transformers.models.{file}") if file else transformers, name)


def images(dtype: torch.dtype, *batch: int) -> torch.Tensor:
    """[2, 3, 32, 32], or of another batch."""
    return torch.randn(*(batch or (2,)), 3, 32, 32).to(dtype)


def _vision(name: str, **arguments: Any) -> SmallModel:
    return SmallModel(f"{name}VisionModel", f"{name}VisionConfig", arguments)


def _model(name: str, **arguments: Any) -> SmallModel:
    return SmallModel(f"{name}Model", f"{name}Config", arguments)


def _frames(dtype: torch.dtype) -> dict[str, Any]:
    return {"pixel_values": images(dtype, 2, 4)}


def _rows(*rows: int) -> torch.Tensor:
    """Which of the 4×4 patches of each image are no padding: the first rows."""
    return (torch.arange(4)[:, None] < torch.tensor(rows)[:, None, None]).repeat(1, 1, 4)


def _naflex(dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.arange(16)[None] < torch.tensor([[16], [12]])
    return dict(
        pixel_values=torch.randn(2, 16, 192).to(dtype),
        pixel_attention_mask=mask.long(),
        spatial_shapes=torch.tensor([[4, 4], [3, 4]]),
    )


def _mae(dtype: torch.dtype) -> dict[str, Any]:
    return dict(pixel_values=images(dtype), noise=torch.rand(2, 16))


_SPECTROGRAM = dict(frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16)
_DECODER = dict(
    decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64
)  # fmt: skip

SMALL_MODELS: dict[str, SmallModel] = {
    "ViT": _model("ViT"),
    "DeiT": _model("DeiT"),
    "ViTMAE": _model("ViTMAE")._replace(inputs=_mae),
    "ViTMAE with its decoder": SmallModel("ViTMAEForPreTraining", "ViTMAEConfig", _DECODER, inputs=_mae),
    "ViTMSN": _model("ViTMSN"),
    "IJepa": _model("IJepa"),
    "AST": _model("AST", **_SPECTROGRAM)._replace(
        inputs=lambda dtype: {"input_values": torch.randn(2, 32, 16).to(dtype)}
    ),
    "Vivit": _model("Vivit", num_frames=4, tubelet_size=[2, 8, 8])._replace(inputs=_frames),
    "Pixio": _model("Pixio"),
    "Dinov2": _model("Dinov2"),
    "Dinov2 giant": _model("Dinov2", use_swiglu_ffn=True),
    "Dinov2WithRegisters": _model("Dinov2WithRegisters"),
    "Tipsv2": _vision("Tipsv2"),
    "CLIP": _vision("CLIP"),
    "AltCLIP": _vision("AltCLIP"),
    "CLIPSeg": _vision("CLIPSeg"),
    "MetaClip2": _vision("MetaClip2"),
    "ChineseCLIP": _vision("ChineseCLIP"),
    "OwlViT": _vision("OwlViT"),
    "Owlv2": _vision("Owlv2"),
    "GroupViT": _vision("GroupViT", depths=[1, 1], num_group_tokens=[4, 2], num_output_groups=[4, 2]),
    "XCLIP": _vision("XCLIP", num_frames=2)._replace(inputs=lambda dtype: {"pixel_values": images(dtype, 4)}),
    "Blip": _vision("Blip"),
    "Blip2": _vision("Blip2"),
    "InstructBlip": _vision("InstructBlip"),
    "MLCD": _vision("MLCD"),
    "VitPose": SmallModel("VitPoseBackbone", "VitPoseBackboneConfig", dict(image_size=[32, 32], patch_size=[8, 8])),
    "Git": _vision("Git"),
    "Siglip": _vision("Siglip"),
    "Siglip2": _vision("Siglip2", num_patches=16)._replace(inputs=_naflex),
    "VideoMAE": _model("VideoMAE", num_frames=4)._replace(inputs=_frames),
    "Yolos": _model("Yolos", image_size=[32, 32], num_detection_tokens=3),
    "Beit": _model("Beit", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "Beit with a shared bias": _model("Beit", use_shared_relative_position_bias=True),
    "Data2VecVision": _model("Data2VecVision", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "Data2VecVision with two biases": _model(
        "Data2VecVision", use_relative_position_bias=True, use_shared_relative_position_bias=True
    ),
}


def _grid(rows: int, columns: int, patch: int, frames: int = 2) -> Inputs:
    """Tokens of two images for the towers of Qwen and its kind: flattened patches and (frames, rows, columns)."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return dict(
            hidden_states=torch.randn(rows * columns + frames * 4 * 4, patch).to(dtype),
            grid_thw=torch.tensor([[1, rows, columns], [frames, 4, 4]]),
        )

    return inputs


_QWEN = dict(depth=2, num_heads=3, patch_size=4, spatial_merge_size=2, in_channels=3, temporal_patch_size=2)

SMALL_MODELS |= {
    "DINOv3": _model("DINOv3ViT", num_register_tokens=2),
    "DINOv3 gated": _model("DINOv3ViT", use_gated_mlp=True, hidden_act="silu"),
    "Aimv2": _vision("Aimv2"),
    "Ovis2": SmallModel(
        "ovis2.modeling_ovis2:Ovis2VisionModel", "ovis2.configuration_ovis2:Ovis2VisionConfig", {}
    ),
    "Pixtral": _vision("Pixtral")._replace(
        inputs=lambda dtype: dict(pixel_values=images(dtype), image_sizes=[(32, 32), (24, 16)])
    ),
    "InternVL": _vision("InternVL", layer_scale_init_value=0.5),
    "InternVL with RMSNorm": _vision("InternVL", use_qk_norm=True, norm_type="rms_norm"),
    "Qwen2-VL": SmallModel(
        "qwen2_vl.modeling_qwen2_vl:Qwen2VisionTransformerPretrainedModel",
        "qwen2_vl.configuration_qwen2_vl:Qwen2VLVisionConfig",
        _QWEN | dict(embed_dim=48, hidden_size=64), inputs=_grid(4, 6, 96),
    ),
    "Qwen2.5-VL": SmallModel(
        "qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
        "qwen2_5_vl.configuration_qwen2_5_vl:Qwen2_5_VLVisionConfig",
        _QWEN | dict(out_hidden_size=64, window_size=16, fullatt_block_indexes=[1]), inputs=_grid(4, 6, 96),
    ),
    "Qwen3-VL": SmallModel(
        "Qwen3VLVisionModel", "qwen3_vl.configuration_qwen3_vl:Qwen3VLVisionConfig",
        _QWEN | dict(out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        inputs=_grid(4, 6, 96),
    ),
    "Qwen3-VL MoE": SmallModel(
        "Qwen3VLMoeVisionModel", "qwen3_vl_moe.configuration_qwen3_vl_moe:Qwen3VLMoeVisionConfig",
        _QWEN | dict(out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        inputs=_grid(4, 6, 96),
    ),
    "Qwen3.5": SmallModel(
        "Qwen3_5VisionModel", "qwen3_5.configuration_qwen3_5:Qwen3_5VisionConfig",
        _QWEN | dict(out_hidden_size=64, num_position_embeddings=16), inputs=_grid(4, 6, 96),
    ),
    "Qwen3.5 MoE": SmallModel(
        "Qwen3_5MoeVisionModel", "qwen3_5_moe.configuration_qwen3_5_moe:Qwen3_5MoeVisionConfig",
        _QWEN | dict(out_hidden_size=64, num_position_embeddings=16), inputs=_grid(4, 6, 96),
    ),
    "Qwen3-Omni": SmallModel(
        "qwen3_omni_moe.modeling_qwen3_omni_moe:Qwen3OmniMoeVisionEncoder",
        "qwen3_omni_moe.configuration_qwen3_omni_moe:Qwen3OmniMoeVisionEncoderConfig",
        _QWEN | dict(out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        inputs=_grid(4, 6, 96),
    ),
    "GLM-4V": SmallModel(
        "Glm4vVisionModel", "Glm4vVisionConfig", _QWEN | dict(out_hidden_size=48), inputs=_grid(4, 6, 96, 1),
    ),
    "GLM-4V MoE": SmallModel(
        "Glm4vMoeVisionModel", "Glm4vMoeVisionConfig", _QWEN | dict(out_hidden_size=48), inputs=_grid(4, 6, 96, 1),
    ),
    "Radio": _model("Radio"),
    "Eomt": SmallModel(
        "EomtForUniversalSegmentation", "EomtConfig", dict(num_blocks=1, num_queries=3, num_upscale_blocks=1)
    ),
    "EomtDinov3": SmallModel(
        "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config",
        dict(num_blocks=1, num_queries=3, num_upscale_blocks=1),
    ),
    "VidEoMT": SmallModel(
        "VideomtForUniversalSegmentation", "VideomtConfig",
        dict(num_blocks=1, num_queries=3, num_upscale_blocks=1, num_frames=1),
        inputs=lambda dtype: {"pixel_values_videos": images(dtype, 2, 1)},
    ),
    "Idefics2": SmallModel(
        "idefics2.modeling_idefics2:Idefics2VisionTransformer", "idefics2.configuration_idefics2:Idefics2VisionConfig",
        {},
    ),
    "Idefics3": SmallModel("Idefics3VisionTransformer", "Idefics3VisionConfig", {}),
    "SmolVLM": SmallModel("SmolVLMVisionTransformer", "SmolVLMVisionConfig", {}),
    "Phi-4": SmallModel(
        "phi4_multimodal.modeling_phi4_multimodal:Phi4MultimodalVisionModel",
        "phi4_multimodal.configuration_phi4_multimodal:Phi4MultimodalVisionConfig", dict(crop_size=32),
        inputs=lambda dtype: dict(pixel_values=images(dtype), patch_attention_mask=_rows(4, 2)),
    ),
    "DPT": _model("DPT"),
    "Kosmos2": SmallModel(
        "kosmos2.modeling_kosmos2:Kosmos2VisionModel", "kosmos2.configuration_kosmos2:Kosmos2VisionConfig", {}
    ),
    "SAM HQ": SmallModel(
        "SamHQVisionModel", "SamHQVisionConfig",
        dict(output_channels=16, window_size=3, global_attn_indexes=[1], mlp_dim=96),
    ),
    "SAM": SmallModel(
        "SamVisionModel", "SamVisionConfig",
        dict(output_channels=16, window_size=3, global_attn_indexes=[1], mlp_dim=96),
    ),
}  # fmt: skip
