"""Small models of timm, torchvision, transformers, open_clip and torch.nn, for tests of ``vit_fast.optimize``."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from support.timm_models import MODELS as TIMM_MODELS
from support.timm_models import build as build_timm
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import vit_fast

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)


CONFIG = dict(
    image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
)  # fmt: skip


PACKED = ["layer_norm_linear", "attention", "linear_residual", "layernorm_mlp"]


POOLED = ["attention", "layernorm_mlp"]


SEPARATE = ["layer_norm", "attention", "linear_residual", "layernorm_mlp"]


def moved(model, dtype=torch.float32):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.2)
    return model.eval().to(dtype)


def timm_vit(**kwargs):
    return moved(TimmViT(**SMALL | kwargs))


def torchvision_vit(**kwargs):
    return moved(TorchvisionViT(32, 8, 2, 3, 48, 96, num_classes=10, **kwargs))


TRANSFORMERS = Version(transformers.__version__)


def hugging_face(name):
    def build(**kwargs):
        if name.startswith("Dinov2") and TRANSFORMERS < Version("5.23"):
            pytest.skip("transformers before 5.23 makes DINOv2 of other parts")
        return moved(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**CONFIG | kwargs)))

    return build


def open_clip_tower(**kwargs):
    import open_clip

    kwargs = dict(layers=2, ls_init_value=0.5) | kwargs
    return moved(open_clip.transformer.VisionTransformer(32, 8, 48, heads=3, mlp_ratio=2.0, output_dim=16, **kwargs))


class EncoderViT(torch.nn.Module):
    """A ViT around torch's TransformerEncoder, as tutorials build it."""

    def __init__(self, **kwargs):
        super().__init__()
        kwargs = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True) | kwargs
        self.patches = torch.nn.Conv2d(3, 48, 8, 8)
        self.encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(48, 3, 96, **kwargs), 2, torch.nn.LayerNorm(48), enable_nested_tensor=False
        )

    def forward(self, x):
        return self.encoder(self.patches(x).flatten(2).transpose(1, 2))


def encoder_vit(**kwargs):
    return moved(EncoderViT(**kwargs))


class Case(NamedTuple):
    """A model, the path of its blocks, and the path of a Linear in a block whose ``__call__`` the library uses."""

    build: object
    blocks: str
    linear: str
    operations: list

    def row(self, model):
        return model.get_submodule(self.blocks)


# A part of the block that is read, where mlp.fc2 is not there, or a norm behind it takes its scale back.
_LINEARS = {
    "ViTamin": "mlp.w1",
    "ParallelScalingBlock": "attn_out_proj",
    "DiffParallelScalingBlock": "out_proj",
    "Gemma4": "norm4",
    "ResPostBlock": "norm2",
    "EvaBlockPostNorm": "norm2",
    "ResPostRelPosBlock": "norm2",
}


CASES = {
    "timm": Case(timm_vit, "blocks", "mlp.fc2", PACKED),
    "torchvision": Case(torchvision_vit, "encoder.layers", "mlp.3", PACKED),
    "open_clip": Case(open_clip_tower, "transformer.resblocks", "mlp.c_proj", PACKED),
    "torch_nn": Case(encoder_vit, "encoder.layers", "linear2", PACKED),
    "ViT": Case(hugging_face("ViT"), "layers", "attention.o_proj", SEPARATE),
    "DeiT": Case(hugging_face("DeiT"), "layers", "mlp.fc1", SEPARATE),
    "Dinov2": Case(hugging_face("Dinov2"), "encoder.layer", "attention.q_proj", SEPARATE),
    "Dinov2WithRegisters": Case(hugging_face("Dinov2WithRegisters"), "encoder.layer", "mlp.fc2", SEPARATE),
    "CLIPVision": Case(hugging_face("CLIPVision"), "encoder.layers", "self_attn.v_proj", SEPARATE),
    "SiglipVision": Case(
        partial(hugging_face("SiglipVision"), vision_use_head=False), "encoder.layers", "self_attn.out_proj", SEPARATE
    ),
}


for _name, (_, _operations) in TIMM_MODELS.items():
    CASES[f"timm {_name}"] = Case(
        lambda name=_name: moved(build_timm(name)), "blocks", _LINEARS.get(_name, "mlp.fc2"), _operations
    )


PREPARABLE = ("timm", "torchvision", "open_clip", "torch_nn", "CLIPVision", "SiglipVision")


def output(model, x, **kwargs):
    result = model(x, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.last_hidden_state


def operations(model, x, **kwargs):
    """(output, names of the operations that ran)."""
    with vit_fast.backends.recording() as choices:
        result = output(model, x, **kwargs)
    return result, fused(choices)


def fused(choices):
    """The operations in the choices of ``recording``, without blocks that ran their library's own forward."""
    return [operation for operation, backend, _ in choices if backend != "library"]
