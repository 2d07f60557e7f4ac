"""timm: its ViT ``Block`` and ``PatchEmbed`` on the fused operations.

    x = x + drop_path1(ls1(attn(norm1(x))))
    x = x + drop_path2(ls2(mlp(norm2(x))))

Source: timm/models/vision_transformer.py, timm/layers.
"""

from collections.abc import Iterator
from typing import Any

import timm.layers as layers
import torch
from timm.models.vision_transformer import Attention, Block, DropPath, LayerScale, Mlp, PatchEmbed
from torch import nn

from vit_fast import ops
from vit_fast.block import attention_branch, drop_path_scale, drop_rate, drops_not_covered, mlp_branch
from vit_fast.block_params import BlockParams, Norm
from vit_fast.plain import LINEAR, NOTHING, submodules

from . import GELU, Found, Fused, autocasts, given, instances, not_dense, not_taken

_NORMS: tuple[type, ...] = (nn.LayerNorm, layers.LayerNorm)
if hasattr(layers, "LayerNormFp32"):  # older timm has none
    _NORMS += (layers.LayerNormFp32,)
_DROPOUTS = (nn.Dropout, *NOTHING)
_ACTIVATIONS = {
    layers.GELU: "gelu",
    layers.GELUTanh: "gelu_tanh",
    layers.QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
}


def _activation(mlp):
    """The name of the activation of an Mlp or a GluMlp, or None."""
    act = type(mlp.act)
    if type(mlp) is layers.GluMlp:
        return "swiglu" if act is nn.SiLU and not mlp.gate_last else None
    if act is nn.GELU:
        return GELU.get(mlp.act.approximate)
    return _ACTIVATIONS.get(act)


def _drop_path(module):
    """The current rate of a DropPath."""
    return module.drop_prob if type(module) is DropPath and module.training else 0.0


class FastBlock(Fused, Block):
    """timm's Block as two fused branches: [B, N, C] → [B, N, C]."""

    SUBMODULES = submodules(
        norm1=_NORMS,
        attn=(Attention,),
        attn__qkv=LINEAR,
        attn__q_norm=(*_NORMS, *NOTHING),
        attn__k_norm=(*_NORMS, *NOTHING),
        attn__attn_drop=_DROPOUTS,
        attn__norm=NOTHING,
        attn__gate=NOTHING,
        attn__proj=LINEAR,
        attn__proj_drop=_DROPOUTS,
        ls1=(LayerScale, *NOTHING),
        drop_path1=(DropPath, *NOTHING),
        norm2=_NORMS,
        mlp=(Mlp, layers.GluMlp),
        mlp__fc1=LINEAR,
        mlp__act=(nn.GELU, nn.SiLU, *_ACTIVATIONS),
        mlp__drop1=_DROPOUTS,
        mlp__norm=NOTHING,
        mlp__fc2=LINEAR,
        mlp__drop2=_DROPOUTS,
        ls2=(LayerScale, *NOTHING),
        drop_path2=(DropPath, *NOTHING),
    )
    attn: Any
    mlp: Any

    def not_covered(self) -> str | None:
        if _activation(self.mlp) is None:
            gated = " that gates by its second half" if getattr(self.mlp, "gate_last", False) else ""
            return f"mlp is {type(self.mlp).__name__} with {type(self.mlp.act).__name__}{gated}"
        for module in (self.drop_path1, self.drop_path2):
            if type(module) is DropPath and not module.scale_by_keep:
                return "drop_path does not scale by the keep rate"
        return None

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, mlp = self.attn, self.mlp
        return BlockParams(
            norm1=Norm.of(self.norm1),
            qkv_weight=attn.qkv.weight,
            qkv_bias=attn.qkv.bias,
            proj_weight=attn.proj.weight,
            proj_bias=attn.proj.bias,
            norm2=Norm.of(self.norm2),
            fc1_weight=mlp.fc1.weight,
            fc1_bias=mlp.fc1.bias,
            fc2_weight=mlp.fc2.weight,
            fc2_bias=mlp.fc2.bias,
            num_heads=attn.num_heads,
            scale=attn.head_dim**-0.5 if attn.fused_attn else attn.scale,
            activation=_activation(mlp),
            gamma1=getattr(self.ls1, "gamma", None),
            gamma2=getattr(self.ls2, "gamma", None),
            q_norm=Norm.of(attn.q_norm),
            k_norm=Norm.of(attn.k_norm),
        )

    def forward(self, x: torch.Tensor, *masks: Any, **named_masks: Any) -> Any:
        if reason := given(masks, named_masks) or self.not_fused():
            return self.run_library(reason, x, *masks, **named_masks)
        p, attn, mlp = self.params(), self.attn, self.mlp
        # With fused_attn timm reads the training flag of the attention, not of its Dropout.
        attn_trains = attn.training if attn.fused_attn else attn.attn_drop.training
        attn_drop = getattr(attn.attn_drop, "p", 0.0) if attn_trains else 0.0
        paths = _drop_path(self.drop_path1), _drop_path(self.drop_path2)
        drops = attn_drop, drop_rate(attn.proj_drop), drop_rate(mlp.drop1)
        reason = not_taken(x, p.qkv_weight, p.gamma1, p.gamma2)
        if reason := reason or drops_not_covered((*paths, *drops), drops[2], drop_rate(mlp.drop2)):
            return self.run_library(reason, x, *masks, **named_masks)
        row_scale = drop_path_scale(x, paths[0], True)
        x = attention_branch(x, p, row_scale=row_scale, attn_drop=attn_drop, proj_drop=drops[1])
        return mlp_branch(x, p, row_scale=drop_path_scale(x, paths[1], True), proj_drop=drops[2])


class FastPatchEmbed(Fused, PatchEmbed):
    """timm's PatchEmbed in one operation: [B, in_chans, H, W] → [B, N, C] or [B, rows, columns, C]."""

    SUBMODULES = submodules(proj=(nn.Conv2d,), norm=NOTHING)
    proj: Any

    def not_covered(self) -> str | None:
        proj = self.proj
        if not self.flatten and self.output_fmt != layers.Format.NHWC:
            return "its output has the channels in front"
        if proj.stride != tuple(self.patch_size) or proj.kernel_size != proj.stride:
            return "proj does not go in steps of patch_size"
        return None

    def _not_taken(self, x):
        """Why timm would refuse, pad or cast images of this size or dtype, or None."""
        if reason := not_dense(x, 4):
            return reason
        if autocasts(x):
            return "autocast is on"
        if x.dtype != self.proj.weight.dtype:
            return f"the images are {x.dtype}, the weights are {self.proj.weight.dtype}"
        size = tuple(x.shape[2:])
        if self.img_size is not None and self.strict_img_size and size != tuple(self.img_size):
            return f"the images are {size[0]}×{size[1]}, not {self.img_size[0]}×{self.img_size[1]}"
        if size[0] % self.patch_size[0] or size[1] % self.patch_size[1]:
            return f"images of {size[0]}×{size[1]} are no whole number of patches"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if reason := self.not_fused() or self._not_taken(x):
            return self.run_library(reason, x)
        proj = self.proj
        tokens = ops.patch_embed(x, proj.weight, proj.bias, None, None, proj.stride)
        return tokens if self.flatten else tokens.unflatten(1, (-1, x.shape[3] // proj.stride[1]))


FAST = {Block: FastBlock, PatchEmbed: FastPatchEmbed}


def find(model: nn.Module) -> Iterator[Found]:
    return instances(model, FAST)
