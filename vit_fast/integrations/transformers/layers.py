"""The forms that vision layers of transformers have, each with a fused forward; ``families.py`` has the classes.

    x = x + drop_path(gamma1 · out(attention(q, k, v)))    q, k, v of norm1(x)
    x = x + drop_path(gamma2 · fc2(act(fc1(norm2(x)))))    or fc2(act(gate(norm2(x))) · up(norm2(x)))

A form says where a layer keeps its modules (``SUBMODULES``, ``parts``), what its forward takes beside the input, and
how it passes masks, rotary tables and sequence bounds to its attention. Three projections stay three, after one norm,
and so do gate and up: packing them would copy their weights in each call.
Source: transformers/models/*/modeling_*.py, version 5.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import output_capturing

from vit_fast import ops
from vit_fast.block import drop_path_scale, drop_rate, pack, pass_over_prepared, run_blocks
from vit_fast.block_params import BlockParams, Norm
from vit_fast.kernels.reference import activate
from vit_fast.plain import LINEAR, NOTHING, TENSORS

from .. import GELU, Fused, Swapped, given, not_dense, not_taken

NORM = (nn.LayerNorm,)
_ACTIVATIONS = {
    FastGELUActivation: "gelu_tanh",  # √(2/π) to ten digits
    NewGELUActivation: "gelu_tanh",
    QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}
ACTIVATIONS = (GELUActivation, GELUTanh, nn.GELU, *_ACTIVATIONS)
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "vit_fast")  # all are softmax(scale · q kᵀ) v
_IGNORED = ("output_hidden_states", "return_dict", "num_items_in_batch")  # keyword arguments that no attention reads


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation, or None where it is not known."""
    kind = type(module)
    if kind is nn.GELU:
        return GELU.get(str(module.approximate))
    if kind is GELUActivation:
        return "gelu" if module.act is F.gelu else None
    if kind is GELUTanh:
        act: Any = module.act
        exact = isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if exact else None
    return _ACTIVATIONS.get(kind)


def _kind(module: nn.Module) -> dict[str, Any]:
    """The argument ``norm`` of an operation."""
    return {} if isinstance(module, nn.LayerNorm) else {"norm": "rms"}


def _linear(x: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


class Parts(NamedTuple):
    """The sub-modules of a layer that its fused forward reads."""

    norm1: nn.Module
    attention: Any  # the module that knows the heads, the scale and the dropout of the probabilities
    qkv: tuple[nn.Linear, ...]  # three, or one that is packed
    out: nn.Linear
    norm2: nn.Module
    fc1: tuple[nn.Linear, ...]  # one, or gate and up
    act: nn.Module
    fc2: nn.Linear


class Layer(Fused):
    """[B, N, C] → [B, N, C]; base of the forms."""

    MODULES: Mapping[str, tuple[Any, ...]] = {}  # as for ``plain.submodules``; "{}Name" stands for a family's own class
    ARGUMENTS: tuple[str, ...] = ("attention_mask",)  # what the library's forward takes by position after the input
    READS: tuple[str, ...] = ("attention_mask",)  # the arguments that the fused forward takes too
    HEADS, SCALE, DROPOUT = "num_attention_heads", "scaling", "attention_dropout"

    @staticmethod
    def ignores(hook: Any) -> bool:
        """transformers leaves the hooks that record attention weights on a model; inactive ones are ignored."""
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return False
        collected = output_capturing._active_collector.get()
        return collected is None or "attentions" not in collected

    @classmethod
    def parts(cls, self: Any) -> Parts:
        """The sub-modules of a layer, which may be an instance of the library's class."""
        raise NotImplementedError

    @classmethod  # also called on the library's instance, which has no ``parts``
    def not_covered(cls, self: Any) -> str | None:  # type: ignore[override]
        parts = cls.parts(self)
        attention = parts.attention
        if getattr(attention, "is_causal", False):
            return "its attention is causal"
        config = getattr(attention, "config", None)
        if config is not None and config._attn_implementation not in _KERNELS:
            return f"its attention runs as {config._attn_implementation!r}"
        if activation_of(parts.act) is None:
            return f"its activation is {parts.act}"
        return None

    def scale(self, attention: Any) -> float:
        """The factor of the scores."""
        return getattr(attention, self.SCALE)

    def gammas(self) -> tuple[Any, Any]:
        """LayerScale of the two branches, or None."""
        return None, None

    def drop_path_rates(self) -> tuple[float, float]:
        """The current rates of stochastic depth of the two branches."""
        module = self._modules.get("drop_path")
        rate = getattr(module, "drop_prob", 0.0) if module is not None and module.training else 0.0
        return rate, rate

    def dropout_rate(self) -> float:
        """The current rate of dropout of the two branches."""
        return drop_rate(self._modules.get("dropout"))

    def attention_dropout_rate(self, attention: Any) -> float:
        """The current rate of dropout of the probabilities."""
        return getattr(attention, self.DROPOUT) if attention.training else 0.0

    def attention_options(self, x: torch.Tensor, named: Mapping[str, Any]) -> dict[str, Any] | str:
        """The options of ``ops.attention`` for what a call gives beside the input, or why there are none."""
        options: dict[str, Any] = {}
        for name, value in named.items():
            if value is None or value is False or name in _IGNORED:
                continue
            if name not in self.READS:
                return f"{name} is given"
            if name == "attention_mask":
                if type(value) not in TENSORS or value.dim() != 4:
                    return "attention_mask is no tensor of 4 dimensions"
                options["bias"] = value
            elif name == "position_embeddings":
                options["rope"] = value
            elif name == "cu_seqlens":
                options["cu_seqlens"] = value
        if "rope" in options:
            options["num_prefix"] = x.shape[1] - options["rope"][0].shape[-2]
        return options

    def _not_taken(self, x: torch.Tensor, parts: Parts) -> str | None:
        """Why the fused forward does not take x, or the layer in its current state, or None."""
        if reason := not_taken(x, parts.qkv[0].weight, *self.gammas()):
            return reason
        for norm in (parts.norm1, parts.norm2):
            if not isinstance(norm, nn.LayerNorm) and norm.weight.dtype != x.dtype:
                return f"the input is {x.dtype}, an RMSNorm is {norm.weight.dtype}"
        # transformers drops what the MLP returns; the fused branch, like timm, also drops the hidden activations.
        if self.dropout_rate():
            return "it drops the output of its MLP"
        if max(self.attention_dropout_rate(parts.attention), *self.drop_path_rates()) >= 1:
            return "a drop rate is 1"
        return None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        result = self.not_fused()
        if result is None:
            result = self.fused(hidden_states, args, options)
        if isinstance(result, str):
            return self.run_library(result, hidden_states, *args, **options)
        return result

    def fused(self, x: torch.Tensor, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What the library's forward returns, or why the fused one cannot compute it."""
        if len(args) > len(self.ARGUMENTS):
            return "a mask or another argument beside the input is given"
        parts = self.parts(self)
        if reason := self._not_taken(x, parts):
            return reason
        options = self.attention_options(x, dict(zip(self.ARGUMENTS, args, strict=False)) | dict(named))
        if isinstance(options, str):
            return options
        return self.add_mlp(self.add_attention(x, parts, options), parts)

    def project(self, x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The first argument of ``ops.attention``, and k and v where they are not packed."""
        norm1, kind = Norm.of(parts.norm1), _kind(parts.norm1)
        if len(parts.qkv) == 1:
            qkv = parts.qkv[0]
            return ops.layer_norm_linear(x, *norm1, qkv.weight, qkv.bias, **kind), {}
        normal = ops.layer_norm(x, *norm1, **kind)
        q, k, v = (_linear(normal, module) for module in parts.qkv)
        return q, {"k": k, "v": v}

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        """x plus the attention branch."""
        attention, (q, kv) = parts.attention, self.project(x, parts)
        bias = options.get("bias")
        if bias is not None and bias.dtype == torch.bool:  # True where a key counts
            options["bias"] = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
        y = ops.attention(
            q, getattr(attention, self.HEADS), self.scale(attention), **kv, **options,
            dropout_p=self.attention_dropout_rate(attention),
        )  # fmt: skip
        row_scale = drop_path_scale(x, self.drop_path_rates()[0], True)
        return ops.linear_residual(y, parts.out.weight, parts.out.bias, self.gammas()[0], x, row_scale=row_scale)

    def add_mlp(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x plus the MLP branch."""
        gamma, fc2, act = self.gammas()[1], parts.fc2, str(activation_of(parts.act))
        norm2, kind = Norm.of(parts.norm2), _kind(parts.norm2)
        row_scale = drop_path_scale(x, self.drop_path_rates()[1], True)
        if len(parts.fc1) == 1:
            fc1 = parts.fc1[0]
            return ops.layernorm_mlp(
                x, *norm2, fc1.weight, fc1.bias, fc2.weight, fc2.bias, act, gamma, row_scale=row_scale, **kind
            )
        normal = ops.layer_norm(x, *norm2, **kind)
        gate, up = (_linear(normal, module) for module in parts.fc1)
        return ops.linear_residual(activate(gate, act) * up, fc2.weight, fc2.bias, gamma, x, row_scale=row_scale)


def _attention(name: str, cls: str, projections: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    return {name: (cls,), **{f"{name}__{projection}": LINEAR for projection in projections}}


_MAYBE_LINEAR = (nn.Linear, NoneType)
_GATED = ("gate_proj", "up_proj", "down_proj")
_MLP = dict(mlp=("{}MLP",), mlp__fc1=LINEAR, mlp__activation_fn=ACTIVATIONS, mlp__fc2=LINEAR)


def _mlp(mlp: Any) -> tuple[tuple[nn.Linear, ...], nn.Module, nn.Linear]:
    """(fc1 or gate and up, activation, fc2) of an MLP under the names that transformers uses."""
    if "gate_proj" in mlp._modules:
        return (mlp.gate_proj, mlp.up_proj), mlp.act_fn, mlp.down_proj
    if "up_proj" in mlp._modules:
        return (mlp.up_proj,), mlp.act_fn, mlp.down_proj
    if "linear_fc1" in mlp._modules:
        return (mlp.linear_fc1,), mlp.act_fn, mlp.linear_fc2
    return (mlp.fc1,), mlp._modules.get("activation_fn") or mlp.act, mlp.fc2


class ViTForm(Layer):
    """ViT and the models that copy its layer."""

    MODULES = dict(
        layernorm_before=NORM,
        **_attention("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        layernorm_after=NORM,
        **_MLP,
        dropout=(nn.Dropout,),
    )

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.layernorm_before, attn, qkv, attn.o_proj, self.layernorm_after, *_mlp(self.mlp))


class CLIPForm(Layer):
    """CLIP, SigLIP and the models that copy their layer. Their encoders hold stacks that can be prepared."""

    MODULES = dict(
        layer_norm1=NORM,
        **_attention("self_attn", "{}Attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
        layer_norm2=NORM,
        **_MLP,
    )
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.self_attn
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.layer_norm1, attn, qkv, attn.out_proj, self.layer_norm2, *_mlp(self.mlp))

    def params(self) -> BlockParams:
        """The weights for folding, with q, k and v packed."""
        parts = self.parts(self)
        qkv_weight, qkv_bias = pack(parts.qkv)
        (fc1,) = parts.fc1
        return BlockParams(
            norm1=Norm.of(parts.norm1),
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            proj_weight=parts.out.weight,
            proj_bias=parts.out.bias,
            norm2=Norm.of(parts.norm2),
            fc1_weight=fc1.weight,
            fc1_bias=fc1.bias,
            fc2_weight=parts.fc2.weight,
            fc2_bias=parts.fc2.bias,
            num_heads=parts.attention.num_heads,
            scale=parts.attention.scale,
            activation=str(activation_of(parts.act)),
        )


class Dinov2Form(Layer):
    """DINOv2 and the models that copy its layer: LayerScale, stochastic depth, an MLP or SwiGLU."""

    MODULES = dict(
        norm1=NORM,
        **_attention("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        layer_scale1=("{}LayerScale",),
        drop_path=("{}DropPath", *NOTHING),
        norm2=NORM,
        mlp=("{}MLP", "{}SwiGLUFFN"),
        mlp__fc1=_MAYBE_LINEAR,
        mlp__activation_fn=(*ACTIVATIONS, NoneType),
        mlp__fc2=_MAYBE_LINEAR,
        **{f"mlp__{name}": _MAYBE_LINEAR for name in _GATED},
        mlp__act_fn=(*ACTIVATIONS, NoneType),
        layer_scale2=("{}LayerScale",),
    )
    READS = ("attention_mask", "cu_seqlens")  # RADIO packs images of several sizes

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.norm1, attn, qkv, attn.o_proj, self.norm2, *_mlp(self.mlp))

    def gammas(self) -> tuple[Any, Any]:
        modules: Any = self._modules
        return modules["layer_scale1"].lambda1, modules["layer_scale2"].lambda1


class EomtForm(Dinov2Form):
    """EoMT and its video model: DINOv2's layer on the attention of CLIP."""

    MODULES = {
        name: classes for name, classes in Dinov2Form.MODULES.items() if name != "attention__o_proj"
    } | {"attention__out_proj": LINEAR}
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.norm1, attn, qkv, attn.out_proj, self.norm2, *_mlp(self.mlp))


class PixioForm(ViTForm):
    """Pixio: ViT's layer with stochastic depth."""

    MODULES = {**ViTForm.MODULES, "drop_path": ("{}DropPath", *NOTHING)}


class DINOv3Form(Dinov2Form):
    """DINOv3: rotary embedding of the patch tokens, LayerScale, an MLP or a gated one."""

    MODULES = dict(
        norm1=NORM,
        **_attention("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        layer_scale1=("{}LayerScale",),
        drop_path=("{}DropPath", *NOTHING),
        norm2=NORM,
        mlp=("{}MLP", "{}GatedMLP"),
        mlp__gate_proj=_MAYBE_LINEAR,
        mlp__up_proj=LINEAR,
        mlp__down_proj=LINEAR,
        mlp__act_fn=ACTIVATIONS,
        layer_scale2=("{}LayerScale",),
    )
    ARGUMENTS = ("attention_mask", "position_embeddings")
    READS = ARGUMENTS
    HEADS, DROPOUT = "num_heads", "dropout"


class VideoMAEForm(Layer):
    """VideoMAE, DPT and YOLOS: ViT's layer as BERT names its modules."""

    MODULES = dict(
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
    ARGUMENTS = READS = ()
    DROPOUT = "dropout_prob"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn, intermediate = self.attention.attention, self.intermediate
        return Parts(
            self.layernorm_before, attn, (attn.query, attn.key, attn.value), self.attention.output.dense,
            self.layernorm_after, (intermediate.dense,), intermediate.intermediate_act_fn, self.output.dense,
        )  # fmt: skip

    def dropout_rate(self) -> float:
        modules: Any = self._modules
        return max(drop_rate(modules["attention"].output.dropout), drop_rate(modules["output"].dropout))


class BeitForm(ViTForm):
    """BEiT: ViT's layer with LayerScale, stochastic depth and a relative position bias."""

    MODULES = {
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


def position_bias(module: nn.Module, x: torch.Tensor, named: Mapping[str, Any], patch_size: int) -> torch.Tensor:
    """The bias [1, H, N, N] of a layer for images of the resolution that its model gives."""
    height, width = named["resolution"]
    window = height // patch_size, width // patch_size
    return module(window, named.get("interpolate_pos_encoding", False), dim_size=x.shape[1])


class Data2VecForm(VideoMAEForm):
    """Data2VecVision: BEiT's layer as BERT names its modules. It returns a tuple."""

    MODULES = {
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

    def fused(self, x: torch.Tensor, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        result = super().fused(x, args, named)
        if isinstance(result, str):
            return result
        return (result, None) if "Sdpa" in type(self.parts(self).attention).__name__ else (result,)


class InternVLForm(ViTForm):
    """InternVL: ViT's layer with LayerScale, norms of either kind and norms of q and k over the whole width."""

    MODULES = dict(
        layernorm_before=(nn.LayerNorm, "{}RMSNorm"),
        **_attention("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "projection_layer")),
        attention__projection_dropout=(nn.Dropout, nn.Identity),
        attention__q_norm=("{}RMSNorm", nn.Identity),
        attention__k_norm=("{}RMSNorm", nn.Identity),
        layernorm_after=(nn.LayerNorm, "{}RMSNorm"),
        **_MLP,
        dropout=(nn.Dropout,),
    )
    ARGUMENTS = READS = ()
    HEADS, SCALE = "num_heads", "scale"
    gammas = BeitForm.gammas
    lambda_1: Any
    lambda_2: Any

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.layernorm_before, attn, qkv, attn.projection_layer, self.layernorm_after, *_mlp(self.mlp))

    def dropout_rate(self) -> float:
        modules: Any = self._modules
        return max(super().dropout_rate(), drop_rate(modules["attention"].projection_dropout))

    def project(self, x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        q, kv = super().project(x, parts)
        if type(parts.attention.q_norm) is nn.Identity:
            return q, kv
        q = ops.layer_norm(q, *Norm.of(parts.attention.q_norm), norm="rms")
        return q, {"k": ops.layer_norm(kv["k"], *Norm.of(parts.attention.k_norm), norm="rms"), "v": kv["v"]}


_GATED_MLP = {**{name: LINEAR for name in _GATED}, "act_fn": ACTIVATIONS}


class Aimv2Form(Layer):
    """AIMv2 and Ovis2: RMSNorm and a gated MLP."""

    MODULES = dict(
        rms_norm1=("{}RMSNorm",),
        **_attention("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
        rms_norm2=("{}RMSNorm",),
        ffn=("{}MLP",),
        **{f"ffn__{name}": classes for name, classes in _GATED_MLP.items()},
    )
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.rms_norm1, attn, qkv, attn.out_proj, self.rms_norm2, *_mlp(self.ffn))


class PixtralForm(Layer):
    """Pixtral: RMSNorm, rotary embedding, a gated MLP; the images of a batch are one sequence under a block mask."""

    MODULES = dict(
        attention_norm=("{}RMSNorm",),
        **_attention("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ffn_norm=("{}RMSNorm",),
        feed_forward=("{}MLP",),
        **{f"feed_forward__{name}": classes for name, classes in _GATED_MLP.items()},
    )
    ARGUMENTS = ("attention_mask", "position_embeddings")
    READS = ARGUMENTS
    HEADS, SCALE, DROPOUT = "num_heads", "scaling", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.attention_norm, attn, qkv, attn.o_proj, self.ffn_norm, *_mlp(self.feed_forward))


class QwenForm(Layer):
    """Qwen2-VL and Qwen3-VL: [tokens of all images, C], rotary embedding, attention inside each image."""

    MODULES = dict(
        norm1=NORM,
        attn=("{}VisionAttention",),
        attn__qkv=LINEAR,
        attn__proj=LINEAR,
        norm2=NORM,
        mlp=("{}VisionMLP",),
        **{f"mlp__{name}": _MAYBE_LINEAR for name in ("fc1", "fc2", "linear_fc1", "linear_fc2")},
        mlp__act=(*ACTIVATIONS, NoneType),
        mlp__act_fn=(*ACTIVATIONS, NoneType),
    )
    ARGUMENTS = ("cu_seqlens", "position_embeddings")
    READS = (*ARGUMENTS, "max_seqlen")  # the longest image, which only FlashAttention wants to know
    HEADS = "num_heads"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attn
        return Parts(self.norm1, attn, (attn.qkv,), attn.proj, self.norm2, *_mlp(self.mlp))

    def fused(self, x: torch.Tensor, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if reason := not_dense(x, 2):
            return reason
        result = super().fused(x.unsqueeze(0), args, named)
        return result if isinstance(result, str) else result.squeeze(0)


class QwenGatedForm(QwenForm):
    """Qwen2.5-VL and GLM-4V: RMSNorm and a gated MLP."""

    MODULES = dict(
        norm1=("{}RMSNorm",),
        attn=("{}VisionAttention",),
        attn__qkv=LINEAR,
        attn__proj=LINEAR,
        norm2=("{}RMSNorm",),
        mlp=("{}MLP",),
        **{f"mlp__{name}": classes for name, classes in _GATED_MLP.items()},
    )


class XCLIPVisionForm(CLIPForm):
    """The vision layer of X-CLIP: CLIP's layer, to whose tokens a message of the other frames is added for attention."""

    MODULES = {
        **CLIPForm.MODULES,
        "message_fc": LINEAR,
        "message_ln": NORM,
        "message_attn": ("{}Attention",),
        **{f"message_attn__{name}": LINEAR for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "drop_path": ("{}DropPath", *NOTHING),
    }
    READS = ()
    message_fc: Any
    message_ln: Any
    message_attn: Any
    drop_path: Any
    num_frames: int

    def drop_path_rates(self) -> tuple[float, float]:
        return 0.0, 0.0  # only the message drops

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        message = self.message_fc(x[:, 0]).unflatten(0, (-1, self.num_frames))
        message = message + self.drop_path(self.message_attn(self.message_ln(message))[0])
        with_message = torch.cat([x, message.flatten(0, 1).unsqueeze(1)], dim=1)
        return super().add_attention(with_message, parts, options)[:, : x.shape[1]]


class SamForm(Layer):
    """SAM: [B, rows, columns, C] with decomposed relative positions, in windows or over the whole image."""

    MODULES = dict(
        layer_norm1=NORM,
        attn=("{}VisionAttention", "{}VisionSdpaAttention"),
        attn__qkv=LINEAR,
        attn__proj=LINEAR,
        layer_norm2=NORM,
        mlp=("{}MLPBlock",),
        mlp__lin1=LINEAR,
        mlp__act=ACTIVATIONS,
        mlp__lin2=LINEAR,
    )
    ARGUMENTS = READS = ()
    SCALE, DROPOUT = "scale", "dropout"
    window_size: int
    window_partition: Any  # methods of the library's layer
    window_unpartition: Any

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn, mlp = self.attn, self.mlp
        return Parts(self.layer_norm1, attn, (attn.qkv,), attn.proj, self.layer_norm2, (mlp.lin1,), mlp.act, mlp.lin2)

    def attention_dropout_rate(self, attention: Any) -> float:
        return 0.0 if "Sdpa" in type(attention).__name__ else super().attention_dropout_rate(attention)

    def fused(self, x: torch.Tensor, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if reason := not_dense(x, 4):
            return reason
        parts = self.parts(self)
        if reason := self._not_taken(x.flatten(1, 2), parts) or given(args, named):
            return reason
        return self.add_mlp(self.add_attention(x, parts, {}), parts)

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        attention, size = parts.attention, self.window_size
        tokens = ops.layer_norm(x, *Norm.of(parts.norm1))
        if size:
            tokens, padded = self.window_partition(tokens, size)  # pads with zeros, so that the norm comes first
        batch, height, width, channels = tokens.shape
        qkv = _linear(tokens.flatten(1, 2), parts.qkv[0])
        if attention.use_rel_pos:
            heads = attention.num_attention_heads
            q = qkv[..., :channels].unflatten(2, (heads, -1)).transpose(1, 2).unflatten(2, (height, width))
            rows = attention.get_rel_pos(height, height, attention.rel_pos_h)
            columns = attention.get_rel_pos(width, width, attention.rel_pos_w)
            options["rel_pos"] = (
                torch.einsum("bnhwc,hkc->bnhwk", q, rows).flatten(2, 3),
                torch.einsum("bnhwc,wkc->bnhwk", q, columns).flatten(2, 3),
            )
        y = ops.attention(
            qkv, attention.num_attention_heads, attention.scale, **options,
            dropout_p=self.attention_dropout_rate(attention),
        )  # fmt: skip
        y = y.unflatten(1, (height, width))
        if size:
            y = self.window_unpartition(y, size, padded, x.shape[1:3])
        return ops.linear_residual(y, parts.out.weight, parts.out.bias, None, x)


class Encoder(Swapped):
    """A stack of layers, run one by one, or all at once where ``vit_fast.prepare`` has prepared them."""

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
