"""Small models of timm's ViT family, 48 wide with two blocks, for tests of ``vit_fast.optimize``.

``MODELS``: name → (function that builds it, the operations of one of its blocks).
"""

from functools import partial

import timm
import torch
from timm import layers
from timm.models import beit, cait, deepseek_vit, eva, gemma4_vit, qwen3_vit, vision_transformer, vitamin
from timm.models import vision_transformer_relpos as relpos
from timm.models import vision_transformer_sam as sam
from torch import nn

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
_SPLIT_MLP = ["layer_norm_linear", "attention", "linear_residual", "layer_norm", "linear_residual"]
_PACKED = ["layer_norm_linear", "attention", "linear_residual", "layernorm_mlp"]
_POST_NORM = ["attention", "layer_norm", "layer_norm"]


def _vit(**kwargs):
    return partial(vision_transformer.VisionTransformer, **SMALL | kwargs)


def _eva(**kwargs):
    return partial(eva.Eva, **SMALL | dict(use_rot_pos_emb=True) | kwargs)


def _naflex(**kwargs):
    small = {key: value for key, value in SMALL.items() if key not in ("img_size", "patch_size")}
    return partial(timm.create_model, "naflexvit_base_patch16_gap", **small | kwargs)


_GEMMA = dict(
    img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_kv_heads=1, head_dim=16, intermediate_size=96,
    global_pool="avg",
)  # fmt: skip

MODELS = {
    "AIMv2": (
        _vit(norm_layer=layers.RmsNorm, mlp_layer=layers.SwiGLU, act_layer=nn.SiLU, qkv_bias=False), _SPLIT_MLP
    ),
    "BEiT-3": (_vit(scale_attn_norm=True, scale_mlp_norm=True), _PACKED),
    "qk-norm with RMSNorm": (_vit(norm_layer=layers.RmsNorm, qk_norm=True, init_values=0.5), _PACKED),
    "ViTamin": (
        _vit(mlp_layer=vitamin.GeGluMlp, act_layer="gelu"),
        ["layer_norm_linear", "attention", "linear_residual", "layer_norm", "layer_norm", "linear_residual"],
    ),
    "differential": (
        _vit(attn_layer="diff", qk_norm=True),
        ["layer_norm_linear", "attention", "attention", "layer_norm", "linear_residual", "layernorm_mlp"],
    ),
    "ResPostBlock": (_vit(block_fn=vision_transformer.ResPostBlock, init_values=0.5, qk_norm=True), _POST_NORM),
    "ParallelScalingBlock": (
        _vit(block_fn=vision_transformer.ParallelScalingBlock, init_values=0.5),
        ["layer_norm_linear", "attention", "linear_residual", "linear_residual"],
    ),
    "DiffParallelScalingBlock": (
        _vit(block_fn=vision_transformer.DiffParallelScalingBlock, qkv_bias=False),
        ["layer_norm_linear", "attention", "attention", "layer_norm", "linear_residual"],
    ),
    "EVA-02": (
        _eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False, scale_attn_inner=True, ref_feat_shape=(14, 14)),
        ["layer_norm", "attention", "linear_residual", "layer_norm", "linear_residual"],
    ),
    "DINOv3": (
        _eva(rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4, init_values=0.5, use_abs_pos_emb=False),
        _PACKED,
    ),
    "mixed RoPE": (_eva(attn_type="rope", rope_type="mixed"), _PACKED),
    "Sapiens2": (
        _eva(
            attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True, norm_layer=layers.RmsNorm, swiglu_mlp=True,
            init_values=0.5, attn_only_layer_scale=True,
        ),
        ["layer_norm", "attention", "linear_residual", "layernorm_mlp"],
    ),
    "EvaBlockPostNorm": (_eva(use_post_norm=True, use_rot_pos_emb=False), _POST_NORM),
    "BEiT": (partial(beit.Beit, **SMALL, use_rel_pos_bias=True, init_values=0.5), _PACKED),
    "RelPosBlock": (
        partial(
            relpos.VisionTransformerRelPos, **SMALL, rel_pos_type="bias", class_token=True, qk_norm=True,
            init_values=0.5,
        ),
        _PACKED,
    ),
    "ResPostRelPosBlock": (
        partial(
            relpos.VisionTransformerRelPos, **SMALL, rel_pos_type="bias", class_token=True,
            block_fn=relpos.ResPostRelPosBlock,
        ),
        _POST_NORM,
    ),
    "SAM": (
        partial(sam.VisionTransformerSAM, **SMALL, window_size=3, use_rel_pos=True, neck_chans=16),
        ["layer_norm", "attention", "linear_residual", "layernorm_mlp"],
    ),
    "Gemma4": (
        partial(gemma4_vit.Gemma4VitEncoder, **_GEMMA),
        ["layer_norm", "layer_norm", "attention", "layer_norm", "layer_norm", "layer_norm"],
    ),
    "CaiT": (
        partial(cait.Cait, **SMALL, init_values=0.5, depth_token_only=0, global_pool="avg"),
        ["layer_norm_linear", "linear_residual", "layernorm_mlp"],
    ),
    "NaFlexVit": (_naflex(), _PACKED),
    "NaFlexVit with RoPE": (_naflex(rope_type="axial"), _PACKED),
}  # fmt: skip

# Further options, and classes whose norms are float32 in a float64 model too.
OPTIONS = {
    "gated attention": _eva(attn_type="rope", norm_layer=layers.RmsNorm),
    "GluMlp": _vit(mlp_layer=layers.GluMlp, act_layer=nn.Sigmoid),
    "GeGLU, gate first": _vit(mlp_layer=partial(layers.GluMlp, gate_last=False), act_layer=nn.GELU),
    "SiLU": _vit(act_layer=nn.SiLU, scale_mlp_norm=True),
    "RMSNorm of torch": _vit(norm_layer=nn.RMSNorm),
    "RmsNormFp32": _vit(norm_layer=layers.RmsNormFp32, qk_norm=True),
    "differential, normalised": _vit(attn_layer="diff", scale_attn_norm=True, norm_layer=layers.RmsNorm),
    "ResPostBlock with SwiGLU": _vit(
        block_fn=vision_transformer.ResPostBlock, mlp_layer=layers.SwiGLU, act_layer=nn.SiLU, scale_mlp_norm=True,
        scale_attn_norm=True,
    ),
    "one output projection": _vit(
        block_fn=partial(vision_transformer.ParallelScalingBlock, fuse_out_proj=True), qkv_bias=False, qk_norm=True
    ),
    "ParallelThingsBlock": _vit(block_fn=vision_transformer.ParallelThingsBlock, init_values=0.5),
    "patch embedding with norm": _vit(embed_norm_layer=layers.RmsNorm),
    "EVA": _eva(use_rot_pos_emb=False, init_values=0.5),
    "EVA-02, packed": _eva(swiglu_mlp=True, ref_feat_shape=(14, 14)),
    "EVA, any image size": _eva(dynamic_img_size=True),
    "post-norm with RoPE": _eva(use_post_norm=True, swiglu_mlp=True, scale_mlp=True),
    "attention pool": _eva(global_pool="map", class_token=False),
    "shared bias": partial(beit.Beit, **SMALL, use_shared_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True),
    "both biases": partial(beit.Beit, **SMALL, use_shared_rel_pos_bias=True, use_rel_pos_bias=True),
    "shared MLP of positions": partial(relpos.VisionTransformerRelPos, **SMALL, shared_rel_pos=True, init_values=0.5),
    "MLP of positions": partial(relpos.VisionTransformerRelPos, **SMALL, class_token=True, init_values=0.5),
    "SAM with RoPE": partial(
        sam.VisionTransformerSAM, **SMALL, window_size=2, global_attn_indexes=(1,), use_rope=True, qk_norm=True,
        neck_chans=16, init_values=0.5, ref_feat_shape=((14, 14), (2, 2)),
    ),
    "SAM, global": partial(sam.VisionTransformerSAM, **SMALL, window_size=0, use_rel_pos=True, neck_chans=16),
    "Gemma4, clipped": partial(gemma4_vit.Gemma4VitEncoder, **_GEMMA | dict(num_kv_heads=3, use_clipped_linears=True)),
    "class attention": partial(cait.Cait, **SMALL, init_values=0.5),
    "DeepSeek": partial(deepseek_vit.DeepseekVitClassifier, **SMALL),
    "Qwen3": partial(qwen3_vit.Qwen3VitClassifier, **SMALL, pos_embed_grid_size=3, mlp_ratio=2.0),
}  # fmt: skip


def build(name):
    """A model of ``MODELS`` or ``OPTIONS`` as timm makes it."""
    model = (MODELS[name][0] if name in MODELS else OPTIONS[name])()
    for module in model.modules():
        if name == "gated attention" and isinstance(module, layers.AttentionRope):
            module.gate = nn.Linear(48, 48)
        if isinstance(module, gemma4_vit.Gemma4ClippableLinear) and module.use_clipped:
            for bound, value in ("input_min", -1.0), ("input_max", 1.0), ("output_min", -2.0), ("output_max", 2.0):
                getattr(module, bound).fill_(value)
    return model


def naflex_input(batch=2, patches=12, valid=(12, 7)):
    """Patches of images of different sizes, padded to the same number, as timm's loader gives them."""
    coordinates = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1).view(1, -1, 2)
    mask = torch.arange(patches) < torch.tensor(valid).unsqueeze(1)
    coordinates = coordinates.expand(batch, -1, -1) * mask.unsqueeze(2)
    return {
        "patches": torch.randn(batch, patches, 16 * 16 * 3) * mask.unsqueeze(2),
        "patch_coord": coordinates,
        "patch_valid": mask,
    }
