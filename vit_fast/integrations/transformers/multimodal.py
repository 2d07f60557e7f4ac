"""The vision towers of multimodal models, AIMv2, Pixtral and Qwen-VL: the forms of their layers."""

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar

import torch

from vit_fast.integrations import not_dense
from vit_fast.plain import LINEAR

from .layer import (
    ACTIVATIONS,
    GATED_MLP,
    MAYBE_LINEAR,
    NORM,
    Layer,
    Modules,
    Parts,
    Settings,
    attention_modules,
    mlp_parts,
)


class Aimv2Form(Layer):
    """AIMv2 and Ovis2: RMSNorm and a gated MLP."""

    MODULES: ClassVar[Modules] = dict(
        rms_norm1=("{}RMSNorm",),
        **attention_modules("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
        rms_norm2=("{}RMSNorm",),
        ffn=("{}MLP",),
        **{f"ffn__{name}": classes for name, classes in GATED_MLP.items()},
    )
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.rms_norm1, attn, qkv, attn.out_proj, self.rms_norm2, *mlp_parts(self.ffn))


class PixtralForm(Layer):
    """Pixtral: RMSNorm, rotary embedding, a gated MLP; the images of a batch are one sequence under a block mask."""

    MODULES: ClassVar[Modules] = dict(
        attention_norm=("{}RMSNorm",),
        **attention_modules("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ffn_norm=("{}RMSNorm",),
        feed_forward=("{}MLP",),
        **{f"feed_forward__{name}": classes for name, classes in GATED_MLP.items()},
    )
    ARGUMENTS = ("attention_mask", "position_embeddings")
    READS = ARGUMENTS
    HEADS, SCALE, DROPOUT = "num_heads", "scaling", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.attention_norm, attn, qkv, attn.o_proj, self.ffn_norm, *mlp_parts(self.feed_forward))


class QwenForm(Layer):
    """Qwen2-VL and Qwen3-VL: [tokens of all images, C], rotary embedding, attention inside each image."""

    RUNS_PREPARED = False  # all their images are packed into one sequence
    MODULES: ClassVar[Modules] = dict(
        norm1=NORM,
        attn=("{}VisionAttention",),
        attn__qkv=LINEAR,
        attn__proj=LINEAR,
        norm2=NORM,
        mlp=("{}VisionMLP",),
        **{f"mlp__{name}": MAYBE_LINEAR for name in ("fc1", "fc2", "linear_fc1", "linear_fc2")},
        mlp__act=(*ACTIVATIONS, NoneType),
        mlp__act_fn=(*ACTIVATIONS, NoneType),
    )
    ARGUMENTS = ("cu_seqlens", "position_embeddings")
    READS = (*ARGUMENTS, "max_seqlen")  # the longest image, which only FlashAttention wants to know
    HEADS = "num_heads"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attn
        return Parts(self.norm1, attn, (attn.qkv,), attn.proj, self.norm2, *mlp_parts(self.mlp))

    def fused(self, x: torch.Tensor, settings: Settings, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if reason := not_dense(x, 2):
            return reason
        return super().fused(x.unsqueeze(0), settings, args, named)

    def add_branches(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        """[1, tokens, C] → [tokens, C], not as a view: FSDP2 warns of an output that is one."""
        return self.add_mlp(self.add_attention(x, parts, options).squeeze(0), parts)


class QwenGatedForm(QwenForm):
    """Qwen2.5-VL and GLM-4V: RMSNorm and a gated MLP."""

    MODULES: ClassVar[Modules] = dict(
        norm1=("{}RMSNorm",),
        attn=("{}VisionAttention",),
        attn__qkv=LINEAR,
        attn__proj=LINEAR,
        norm2=("{}RMSNorm",),
        mlp=("{}MLP",),
        **{f"mlp__{name}": classes for name, classes in GATED_MLP.items()},
    )
