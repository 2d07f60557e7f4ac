"""Small vision models of transformers, a case for each family that ``vit_fast.optimize`` knows, with their inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

CONFIG = dict(
    image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
)  # fmt: skip


class Case(NamedTuple):
    """A model as arguments of its config, the layers of it that are swapped, and how images become its inputs."""

    model: str
    config: str
    arguments: dict[str, Any]
    blocks: int = 2
    inputs: Callable[[torch.dtype], dict[str, Any]] = lambda dtype: {"pixel_values": images(dtype)}
    float32: bool = False  # whether transformers computes some of it in float32 for float64 inputs too

    def build(self, **arguments: Any) -> torch.nn.Module:
        """A model in eval mode, every parameter moved away from its initial value."""
        config = getattr(transformers, self.config)(**CONFIG | self.arguments | arguments)
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.2)
        return model.eval()


def images(dtype, *batch):
    return torch.randn(*(batch or (2,)), 3, 32, 32).to(dtype)


def _vision(name, **arguments):
    return Case(f"{name}VisionModel", f"{name}VisionConfig", arguments)


def _model(name, **arguments):
    return Case(f"{name}Model", f"{name}Config", arguments)


def _naflex(dtype):
    mask = torch.arange(16)[None] < torch.tensor([[16], [12]])
    return dict(
        pixel_values=torch.randn(2, 16, 192).to(dtype),
        pixel_attention_mask=mask.long(),
        spatial_shapes=torch.tensor([[4, 4], [3, 4]]),
    )


def _mae(dtype):
    return dict(pixel_values=images(dtype), noise=torch.rand(2, 16))


_SPECTROGRAM = dict(frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16)
_DECODER = dict(
    decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64
)  # fmt: skip

CASES = {
    "ViT": _model("ViT"),
    "DeiT": _model("DeiT"),
    "ViTMAE": _model("ViTMAE")._replace(inputs=_mae),
    "ViTMAE with its decoder": Case("ViTMAEForPreTraining", "ViTMAEConfig", _DECODER, blocks=3, inputs=_mae),
    "ViTMSN": _model("ViTMSN"),
    "IJepa": _model("IJepa"),
    "AST": _model("AST", **_SPECTROGRAM)._replace(
        inputs=lambda dtype: {"input_values": torch.randn(2, 32, 16).to(dtype)}
    ),
    "Vivit": _model("Vivit", num_frames=4, tubelet_size=[2, 8, 8])._replace(
        inputs=lambda dtype: {"pixel_values": images(dtype, 2, 4)}
    ),
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
    "Git": _vision("Git"),
    "Siglip": _vision("Siglip"),
    "Siglip2": _vision("Siglip2", num_patches=16)._replace(inputs=_naflex),
    "VideoMAE": _model("VideoMAE", num_frames=4)._replace(
        inputs=lambda dtype: {"pixel_values": images(dtype, 2, 4)}
    ),
    "Yolos": _model("Yolos", image_size=[32, 32], num_detection_tokens=3),
    "Beit": _model("Beit", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "Beit with a shared bias": _model("Beit", use_shared_relative_position_bias=True),
    "Data2VecVision": _model("Data2VecVision", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "Data2VecVision with two biases": _model(
        "Data2VecVision", use_relative_position_bias=True, use_shared_relative_position_bias=True
    ),
}


def output(model, inputs, **options):
    """The main output of a model."""
    result = model(**inputs, **options)
    return result.logits if "logits" in result else result[0]
