"""DINOv2, its relatives and DINOv3: the forms of their layers."""

from types import NoneType
from typing import Any, ClassVar

from vit_fast.plain import LINEAR, NOTHING

from .layer import ACTIVATIONS, GATED, MAYBE_LINEAR, NORM, Layer, Modules, Parts, attention_modules, mlp_parts


class Dinov2Form(Layer):
    """DINOv2 and the models that copy its layer: LayerScale, stochastic depth, an MLP or SwiGLU."""

    MODULES: ClassVar[Modules] = dict(
        norm1=NORM,
        **attention_modules("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        layer_scale1=("{}LayerScale",),
        drop_path=("{}DropPath", *NOTHING),
        norm2=NORM,
        mlp=("{}MLP", "{}SwiGLUFFN"),
        mlp__fc1=MAYBE_LINEAR,
        mlp__activation_fn=(*ACTIVATIONS, NoneType),
        mlp__fc2=MAYBE_LINEAR,
        **{f"mlp__{name}": MAYBE_LINEAR for name in GATED},
        mlp__act_fn=(*ACTIVATIONS, NoneType),
        layer_scale2=("{}LayerScale",),
    )
    READS = ("attention_mask", "cu_seqlens")  # RADIO packs images of several sizes

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.norm1, attn, qkv, attn.o_proj, self.norm2, *mlp_parts(self.mlp))

    def gammas(self) -> tuple[Any, Any]:
        modules: Any = self._modules
        return modules["layer_scale1"].lambda1, modules["layer_scale2"].lambda1


class EomtForm(Dinov2Form):
    """EoMT and its video model: DINOv2's layer on the attention of CLIP."""

    MODULES: ClassVar[Modules] = {
        name: classes for name, classes in Dinov2Form.MODULES.items() if name != "attention__o_proj"
    } | {"attention__out_proj": LINEAR}
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.attention
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.norm1, attn, qkv, attn.out_proj, self.norm2, *mlp_parts(self.mlp))


class DINOv3Form(Dinov2Form):
    """DINOv3: rotary embedding of the patch tokens, LayerScale, an MLP or a gated one."""

    MODULES: ClassVar[Modules] = dict(
        norm1=NORM,
        **attention_modules("attention", "{}Attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        layer_scale1=("{}LayerScale",),
        drop_path=("{}DropPath", *NOTHING),
        norm2=NORM,
        mlp=("{}MLP", "{}GatedMLP"),
        mlp__gate_proj=MAYBE_LINEAR,
        mlp__up_proj=LINEAR,
        mlp__down_proj=LINEAR,
        mlp__act_fn=ACTIVATIONS,
        layer_scale2=("{}LayerScale",),
    )
    ARGUMENTS = ("attention_mask", "position_embeddings")
    READS = ARGUMENTS
    HEADS, DROPOUT = "num_heads", "dropout"
