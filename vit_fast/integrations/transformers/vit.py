"""ViT, and what was made of it: the forms of the layers of ViT, VideoMAE, BEiT, Data2VecVision and InternVL."""

import math
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import nn

from vit_fast import ops
from vit_fast.block import drop_rate
from vit_fast.block_params import Norm
from vit_fast.plain import LINEAR, NOTHING

from .layer import ACTIVATIONS, MLP, NORM, Layer, Modules, Parts, Settings, attention_modules, mlp_parts


class ViTForm(Layer):
    """ViT and the models that copy its layer."""

    MODULES: ClassVar[Modules] = dict(
        layernorm_before=NORM,
        **attention_modules("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        layernorm_after=NORM,
        **MLP,
        dropout=(nn.Dropout,),
    )

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.layernorm_before, attn, qkv, attn.o_proj, self.layernorm_after, *mlp_parts(self.mlp))


class PixioForm(ViTForm):
    """Pixio: ViT's layer with stochastic depth."""

    MODULES: ClassVar[Modules] = {**ViTForm.MODULES, "drop_path": ("{}DropPath", *NOTHING)}


_BERT_MLP = ("intermediate", "output")


class VideoMAEForm(Layer):
    """VideoMAE, DPT and YOLOS: ViT's layer as BERT names its modules."""

    MODULES: ClassVar[Modules] = dict(
        attention=("{}Attention",),
        attention__attention=("{}SelfAttention",),
        attention__attention__query=LINEAR,
        attention__attention__key=LINEAR,
        attention__attention__value=LINEAR,
        attention__output=("{}SelfOutput",),
        attention__output__dense=LINEAR,
        attention__output__dropout=(nn.Dropout,),
        intermediate=("{}Intermediate",),
        intermediate__dense=LINEAR,
        intermediate__intermediate_act_fn=ACTIVATIONS,
        output=("{}Output",),
        output__dense=LINEAR,
        output__dropout=(nn.Dropout,),
        layernorm_before=NORM,
        layernorm_after=NORM,
    )
    ARGUMENTS: tuple[str, ...] = ()
    READS: tuple[str, ...] = ()
    DROPOUT = "dropout_prob"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn, intermediate = self.attention.attention, self.intermediate
        return Parts(
            self.layernorm_before, attn, (attn.query, attn.key, attn.value), self.attention.output.dense,
            self.layernorm_after, (intermediate.dense,), intermediate.intermediate_act_fn, self.output.dense,
        )  # fmt: skip

    def dropout_rates(self) -> tuple[float, float]:
        modules: Any = self._modules
        return drop_rate(modules["attention"].output.dropout), drop_rate(modules["output"].dropout)


class VitPoseForm(VideoMAEForm):
    """ViTPose with one expert: VideoMAE's layer with an MLP of its own."""

    MODULES: ClassVar[Modules] = {
        **{name: classes for name, classes in VideoMAEForm.MODULES.items() if name.partition("__")[0] not in _BERT_MLP},
        "mlp": ("{}MLP",),
        "mlp__fc1": LINEAR,
        "mlp__activation": ACTIVATIONS,
        "mlp__fc2": LINEAR,
    }
    ARGUMENTS = ("dataset_index",)

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn, mlp = self.attention.attention, self.mlp
        return Parts(
            self.layernorm_before, attn, (attn.query, attn.key, attn.value), self.attention.output.dense,
            self.layernorm_after, (mlp.fc1,), mlp.activation, mlp.fc2,
        )  # fmt: skip

    def dropout_rates(self) -> tuple[float, float]:
        modules: Any = self._modules
        return drop_rate(modules["attention"].output.dropout), 0.0


def position_bias(module: nn.Module, x: torch.Tensor, named: Mapping[str, Any], patch_size: int) -> torch.Tensor:
    """The bias [1, H, N, N] of a layer for images of the resolution that its model gives."""
    height, width = named["resolution"]
    window = height // patch_size, width // patch_size
    return module(window, named.get("interpolate_pos_encoding", False), dim_size=x.shape[1])


class BeitForm(ViTForm):
    """BEiT: ViT's layer with LayerScale, stochastic depth and a relative position bias."""

    MODULES: ClassVar[Modules] = {
        **ViTForm.MODULES,
        "drop_path": ("{}DropPath", *NOTHING),
        "relative_position_bias": ("{}RelativePositionBias", NoneType),
    }
    ARGUMENTS = ("attention_mask", "interpolate_pos_encoding", "resolution")
    READS = ARGUMENTS
    lambda_1: Any
    lambda_2: Any
    patch_size: int

    def gammas(self) -> tuple[Any, Any]:
        scales = self.lambda_1, self.lambda_2  # 1.0 or None in a model without LayerScale
        first, second = (scale if isinstance(scale, torch.Tensor) else None for scale in scales)
        return first, second

    def attention_options(self, x: torch.Tensor, named: Mapping[str, Any]) -> dict[str, Any] | str:
        options = super().attention_options(x, named)
        bias: Any = self._modules.get("relative_position_bias")
        if bias is not None and not isinstance(options, str):
            own, mask = position_bias(bias, x, named, self.patch_size), options.get("bias")
            options["bias"] = own if mask is None else own + mask
        return options


class Data2VecForm(VideoMAEForm):
    """Data2VecVision: BEiT's layer as BERT names its modules. It returns a tuple."""

    MODULES: ClassVar[Modules] = {
        **VideoMAEForm.MODULES,
        "attention__attention": ("{}SelfAttention", "{}SdpaSelfAttention"),
        "attention__attention__dropout": (nn.Dropout,),
        "attention__attention__relative_position_bias": ("{}RelativePositionBias", NoneType),
        "drop_path": ("{}DropPath", *NOTHING),
    }
    ARGUMENTS = ("output_attentions", "relative_position_bias", "interpolate_pos_encoding", "resolution")
    READS = ARGUMENTS[1:]
    gammas = BeitForm.gammas

    def scale(self, attention: Any) -> float:
        return 1 / math.sqrt(attention.attention_head_size)

    def attention_dropout_rate(self, attention: Any) -> float:
        if "Sdpa" not in type(attention).__name__:
            return drop_rate(attention.dropout)
        return attention.config.attention_probs_dropout_prob if attention.training else 0.0

    def attention_options(self, x: torch.Tensor, named: Mapping[str, Any]) -> dict[str, Any] | str:
        options = super().attention_options(x, named)
        if isinstance(options, str):
            return options
        attention, shared = self.parts(self).attention, named.get("relative_position_bias")
        if attention.has_relative_position_bias:
            own = position_bias(attention.relative_position_bias, x, named, attention.config.patch_size)
            shared = own if shared is None else own + shared
        return options if shared is None else options | {"bias": shared}

    def fused(self, x: torch.Tensor, settings: Settings, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        result = super().fused(x, settings, args, named)
        if isinstance(result, str):
            return result
        return (result, None) if "Sdpa" in type(settings.parts.attention).__name__ else (result,)


class InternVLForm(ViTForm):
    """InternVL: ViT's layer with LayerScale, norms of either kind and norms of q and k over the whole width."""

    MODULES: ClassVar[Modules] = dict(
        layernorm_before=(nn.LayerNorm, "{}RMSNorm"),
        **attention_modules("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "projection_layer")),
        attention__projection_dropout=(nn.Dropout, nn.Identity),
        attention__q_norm=("{}RMSNorm", nn.Identity),
        attention__k_norm=("{}RMSNorm", nn.Identity),
        layernorm_after=(nn.LayerNorm, "{}RMSNorm"),
        **MLP,
        dropout=(nn.Dropout,),
    )
    ARGUMENTS: tuple[str, ...] = ()
    READS: tuple[str, ...] = ()
    HEADS, SCALE = "num_heads", "scale"
    gammas = BeitForm.gammas
    lambda_1: Any
    lambda_2: Any

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(
            self.layernorm_before, attn, qkv, attn.projection_layer, self.layernorm_after, *mlp_parts(self.mlp)
        )

    def dropout_rates(self) -> tuple[float, float]:
        modules: Any = self._modules
        return drop_rate(modules["attention"].projection_dropout), super().dropout_rates()[1]

    def project(self, x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, dict[str, Any]]:
        q, kv = super().project(x, parts)
        norms = parts.attention.q_norm, parts.attention.k_norm
        q, k = (
            part if type(norm) is nn.Identity else ops.layer_norm(part, *Norm.of(norm), norm="rms").to(part.dtype)
            for part, norm in zip((q, kv["k"]), norms, strict=True)
        )
        return q, kv | {"k": k}
