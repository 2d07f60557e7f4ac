"""Hugging Face transformers: the layers of ViT, DeiT, DINOv2, CLIP vision and SigLIP vision on the fused operations.

    x = x + drop_path(layer_scale1(out_proj(attention(q, k, v))))    q, k, v of norm1(x), three projections
    x = x + drop_path(layer_scale2(mlp(norm2(x))))

Three projections stay three, after one LayerNorm: packing them would copy their weights in each call. Text towers are
not touched. The encoders of CLIP and SigLIP hold stacks that can be prepared; the other models loop over their layers
in their own forward, so their stacks cannot.
Source: transformers/models/{vit,deit,dinov2,dinov2_with_registers,clip,siglip}/modeling_*.py, version 5.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoder, CLIPEncoderLayer
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoder, SiglipEncoderLayer, SiglipMLP
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP
from transformers.utils import output_capturing

from vit_fast import ops
from vit_fast.block import drop_path_scale, drop_rate, pack, pass_over_prepared, run_blocks
from vit_fast.block_params import BlockParams, Norm
from vit_fast.plain import LINEAR, NOTHING, submodules

from . import GELU, Found, Fused, Swapped, given, instances, not_taken

_NORM = (nn.LayerNorm,)
_ACTIVATIONS = (GELUActivation, GELUTanh, QuickGELUActivation, nn.GELU, nn.ReLU)
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")  # all of them softmax(scale · q kᵀ) v
_IGNORED = ("output_hidden_states", "return_dict", "num_items_in_batch")  # keyword arguments that no attention reads


def _activation(module):
    """The name of an activation, or None."""
    if type(module) is nn.GELU:
        return GELU.get(module.approximate)
    if type(module) is GELUActivation:
        return "gelu" if module.act is F.gelu else None
    if type(module) is GELUTanh:
        act = module.act
        exact = isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if exact else None
    return {QuickGELUActivation: "quick_gelu", nn.ReLU: "relu"}.get(type(module))


class _FastLayer(Fused):
    """[B, N, C] → [B, N, C]; a subclass gives the names of the sub-modules in its library class."""

    ATTENTION, NORMS, OUT = "attention", ("norm1", "norm2"), "o_proj"
    HEADS, SCALE, DROPOUT = "num_attention_heads", "scaling", "attention_dropout"
    SCALES: tuple[str | None, str | None] = (None, None)
    mlp: Any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if len(cls.__bases__) > 1:
            cls.__name__ = cls.__bases__[-1].__name__  # accelerate wraps layers by the name of their class

    @staticmethod
    def ignores(hook: Any) -> bool:
        """transformers leaves the hooks that record attention weights on a model; inactive ones are ignored."""
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return False
        collected = output_capturing._active_collector.get()
        return collected is None or "attentions" not in collected

    @classmethod  # also called on the library's instance, which has no ATTENTION
    def not_covered(cls, self: Any) -> str | None:  # type: ignore[override]
        attn = getattr(self, cls.ATTENTION)
        if attn.is_causal:
            return f"{cls.ATTENTION} is causal"
        if attn.config._attn_implementation not in _KERNELS:
            return f"{cls.ATTENTION} runs as {attn.config._attn_implementation!r}"
        if _activation(self.mlp.activation_fn) is None:
            return f"mlp.activation_fn is {self.mlp.activation_fn}"
        return None

    def forward(self, hidden_states: torch.Tensor, *masks: Any, **options: Any) -> Any:
        read = {name: value for name, value in options.items() if name not in _IGNORED}
        if reason := given(masks, read) or self.not_fused():
            return self.run_library(reason, hidden_states, *masks, **options)
        x, attn, mlp = hidden_states, getattr(self, self.ATTENTION), self.mlp
        gammas = [getattr(self, name).lambda1 if name else None for name in self.SCALES]
        attn_drop = getattr(attn, self.DROPOUT) if attn.training else 0.0
        drop_path = getattr(self, "drop_path", None)
        path = getattr(drop_path, "drop_prob", 0.0) if drop_path is not None and drop_path.training else 0.0
        # ViT and DeiT have dropout after the MLP only; the fused branch, like timm, also drops the hidden activations.
        dropout = drop_rate(getattr(self, "dropout", None))
        reason = not_taken(x, attn.q_proj.weight, *gammas)
        if dropout or max(attn_drop, path) >= 1:
            reason = "it drops the output of its MLP" if dropout else "a drop rate is 1"
        if reason is not None:
            return self.run_library(reason, hidden_states, *masks, **options)
        norm1: Norm
        norm2: Norm
        norm1, norm2 = (Norm.of(getattr(self, name)) for name in self.NORMS)
        normal, out = ops.layer_norm(x, *norm1), getattr(attn, self.OUT)
        q, k, v = (F.linear(normal, m.weight, m.bias) for m in (attn.q_proj, attn.k_proj, attn.v_proj))
        y = ops.attention(q, getattr(attn, self.HEADS), getattr(attn, self.SCALE), k=k, v=v, dropout_p=attn_drop)
        row_scale = drop_path_scale(x, path, True)
        x = ops.linear_residual(y, out.weight, out.bias, gammas[0], x, row_scale=row_scale)
        fc1, fc2, row_scale = mlp.fc1, mlp.fc2, drop_path_scale(x, path, True)
        return ops.layernorm_mlp(
            x, *norm2, fc1.weight, fc1.bias, fc2.weight, fc2.bias, _activation(mlp.activation_fn), gammas[1],
            row_scale=row_scale,
        )  # fmt: skip


def _attention(name, cls, out):
    projections = {f"{name}__{part}": LINEAR for part in ("q_proj", "k_proj", "v_proj", out)}
    return {name: (cls,), **projections}


def _mlp(cls):
    return dict(mlp=(cls,), mlp__fc1=LINEAR, mlp__activation_fn=_ACTIVATIONS, mlp__fc2=LINEAR)


def _vit_submodules(attention, mlp):
    return submodules(
        layernorm_before=_NORM,
        **_attention("attention", attention, "o_proj"),
        layernorm_after=_NORM,
        **_mlp(mlp),
        dropout=(nn.Dropout,),
    )


def _dinov2_submodules(attention, mlp, layer_scale, drop_path):
    return submodules(
        norm1=_NORM,
        **_attention("attention", attention, "o_proj"),
        layer_scale1=(layer_scale,),
        drop_path=(drop_path, *NOTHING),
        norm2=_NORM,
        **_mlp(mlp),
        layer_scale2=(layer_scale,),
    )


def _clip_submodules(attention, mlp):
    return submodules(
        layer_norm1=_NORM, **_attention("self_attn", attention, "out_proj"), layer_norm2=_NORM, **_mlp(mlp)
    )


class FastViTLayer(_FastLayer, ViTLayer):
    NORMS = ("layernorm_before", "layernorm_after")
    SUBMODULES = _vit_submodules(ViTAttention, ViTMLP)


class FastDeiTLayer(_FastLayer, DeiTLayer):
    NORMS = ("layernorm_before", "layernorm_after")
    SUBMODULES = _vit_submodules(DeiTAttention, DeiTMLP)


class FastDinov2Layer(_FastLayer, dinov2.Dinov2Layer):
    SCALES = ("layer_scale1", "layer_scale2")
    SUBMODULES = _dinov2_submodules(
        dinov2.Dinov2Attention, dinov2.Dinov2MLP, dinov2.Dinov2LayerScale, dinov2.Dinov2DropPath
    )


class FastDinov2WithRegistersLayer(_FastLayer, registers.Dinov2WithRegistersLayer):
    SCALES = ("layer_scale1", "layer_scale2")
    SUBMODULES = _dinov2_submodules(
        registers.Dinov2WithRegistersAttention,
        registers.Dinov2WithRegistersMLP,
        registers.Dinov2WithRegistersLayerScale,
        registers.Dinov2WithRegistersDropPath,
    )


class _FastCLIPLayer(_FastLayer):
    ATTENTION, NORMS, OUT = "self_attn", ("layer_norm1", "layer_norm2"), "out_proj"
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"
    self_attn: Any
    layer_norm1: nn.LayerNorm
    layer_norm2: nn.LayerNorm

    def params(self) -> BlockParams:
        """The weights for folding, with q, k and v packed."""
        attn, mlp = self.self_attn, self.mlp
        qkv_weight, qkv_bias = pack((attn.q_proj, attn.k_proj, attn.v_proj))
        return BlockParams(
            norm1=Norm.of(self.layer_norm1),
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=Norm.of(self.layer_norm2),
            fc1_weight=mlp.fc1.weight,
            fc1_bias=mlp.fc1.bias,
            fc2_weight=mlp.fc2.weight,
            fc2_bias=mlp.fc2.bias,
            num_heads=attn.num_heads,
            scale=attn.scale,
            activation=_activation(mlp.activation_fn),
        )


class FastCLIPEncoderLayer(_FastCLIPLayer, CLIPEncoderLayer):
    SUBMODULES = _clip_submodules(CLIPAttention, CLIPMLP)


class FastSiglipEncoderLayer(_FastCLIPLayer, SiglipEncoderLayer):
    SUBMODULES = _clip_submodules(SiglipAttention, SiglipMLP)


class _FastEncoder(Swapped):
    """The layers one by one, or all at once where ``vit_fast.prepare`` has prepared them."""

    layers: nn.ModuleList

    def forward(self, inputs_embeds: torch.Tensor, *masks: Any, **options: Any) -> Any:
        reason = given(masks, options)
        if recorded := output_capturing._active_collector.get():  # may be requested by the config too
            reason = f"{next(iter(recorded))} are recorded"
        if reason is not None:
            pass_over_prepared(self.layers, reason)
            return super().forward(inputs_embeds, *masks, **options)
        x = run_blocks(self.layers, inputs_embeds, run=lambda layer, x: layer(x, None))
        return BaseModelOutput(last_hidden_state=x)

    @staticmethod
    def stack(module: nn.Module) -> nn.Module:
        """The container of the blocks in a module that may be swapped to this class."""
        return module.get_submodule("layers")


class FastCLIPEncoder(_FastEncoder, CLIPEncoder):
    pass


class FastSiglipEncoder(_FastEncoder, SiglipEncoder):
    pass


FAST = {
    ViTLayer: FastViTLayer,
    DeiTLayer: FastDeiTLayer,
    dinov2.Dinov2Layer: FastDinov2Layer,
    registers.Dinov2WithRegistersLayer: FastDinov2WithRegistersLayer,
    CLIPEncoderLayer: FastCLIPEncoderLayer,
    SiglipEncoderLayer: FastSiglipEncoderLayer,
}
STACKS = {CLIPEncoder: FastCLIPEncoder, SiglipEncoder: FastSiglipEncoder}
_VISION = {CLIPEncoderLayer: CLIPVisionConfig, SiglipEncoderLayer: SiglipVisionConfig}


def find(model: nn.Module) -> Iterator[Found]:
    for name, module, cls in instances(model, FAST):
        if cls not in _VISION or isinstance(module.get_submodule("self_attn").config, _VISION[cls]):
            yield name, module, cls
