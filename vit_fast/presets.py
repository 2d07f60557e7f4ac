"""The presets of ``create_model`` as data: timm's name → arguments of ``VisionTransformer``, or of another function.

A preset of ``VisionTransformer`` holds the architecture alone. Image size, classes, mean and std come from the
``pretrained_cfg`` of the name and tag, as in timm. The families of ``systems`` add their own by ``register``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from .vit import VisionTransformer

_WIDTHS: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "wee": dict(embed_dim=256, depth=14, num_heads=4, mlp_ratio=5),
    "little": dict(embed_dim=320, depth=14, num_heads=5, mlp_ratio=5.6),
    "xsmall": dict(embed_dim=256, depth=10, num_heads=4),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "medium": dict(embed_dim=512, depth=12, num_heads=8),
    "mediumd": dict(embed_dim=512, depth=20, num_heads=8),
    "betwixt": dict(embed_dim=640, depth=12, num_heads=10),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "base_plus": dict(embed_dim=896, depth=12, num_heads=14),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "so400m": dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
    "giant": dict(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
    "giantopt": dict(embed_dim=1536, depth=40, num_heads=16),
    "gigantic": dict(embed_dim=1664, depth=48, num_heads=16, mlp_ratio=64 / 13),
}
_DINOV2_GIANT: dict[str, Any] = dict(embed_dim=1536, depth=40, num_heads=24, mlp_ratio=5.33334, mlp_layer="swiglu")


@dataclass(frozen=True)
class Preset:
    """A name's keyword arguments, and how to build it: ``build(**arguments)``."""

    arguments: dict[str, Any] = field(default_factory=dict)
    build: Callable[..., nn.Module] = VisionTransformer


PRESETS: dict[str, Preset] = {}


def register(name: str, build: Callable[..., nn.Module] = VisionTransformer, **arguments: Any) -> None:
    """Adds a preset under a name that ``create_model`` and ``list_models`` then know."""
    PRESETS[name] = Preset(arguments, build)


def _register_plain() -> None:
    """vit_<width>_patch<P>_<image>."""
    sizes = {
        "tiny": ((16, 224), (16, 384)),
        "small": ((8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
        "base": ((8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
        "large": ((14, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
        "huge": ((14, 224),),
        "giant": ((14, 224),),
        "gigantic": ((14, 224),),
    }
    for width, pairs in sizes.items():
        for patch, image in pairs:
            register(f"vit_{width}_patch{patch}_{image}", patch_size=patch, **_WIDTHS[width])


def _register_clip() -> None:
    """vit_<width>_patch<P>_clip_[quickgelu_]<image>: pre-norm towers."""
    sizes = {
        "xsmall": ((16, 224),),
        "medium": ((16, 224), (32, 224)),
        "betwixt": ((32, 224),),
        "base": ((16, 224), (16, 384), (32, 224), (32, 256), (32, 384), (32, 448)),
        "large": ((14, 224), (14, 336)),
        "huge": ((14, 224), (14, 336), (14, 378)),
        "giant": ((14, 224),),
        "gigantic": ((14, 224), (14, 378)),
    }
    quick: tuple[str, ...] = ("base_patch16_224", "base_patch32_224", "large_patch14_224", "large_patch14_336")
    quick += ("huge_patch14_224", "huge_patch14_378", "gigantic_patch14_224")
    common: dict[str, Any] = dict(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    for width, pairs in sizes.items():
        for patch, image in pairs:
            kwargs = dict(common, patch_size=patch, **_WIDTHS[width])
            if f"{width}_patch{patch}_{image}" in quick:
                register(f"vit_{width}_patch{patch}_clip_quickgelu_{image}", **kwargs, act_layer="quick_gelu")
            register(f"vit_{width}_patch{patch}_clip_{image}", **kwargs)
    register("vit_base_patch16_plus_clip_240", **common, patch_size=16, **_WIDTHS["base_plus"])


def _register_dinov2() -> None:
    """vit_<width>_patch14[_reg4]_dinov2."""
    for width in ("small", "base", "large", "giant"):
        kwargs: dict[str, Any] = dict(patch_size=14, init_values=1e-5)
        kwargs |= _DINOV2_GIANT if width == "giant" else _WIDTHS[width]
        register(f"vit_{width}_patch14_dinov2", **kwargs)
        register(f"vit_{width}_patch14_reg4_dinov2", reg_tokens=4, no_embed_class=True, **kwargs)


def _register_siglip() -> None:
    """vit_<width>_patch<P>_siglip_[gap_]<image>: no class token, MAP or average pooling."""
    sizes = {
        "base": ((16, 224), (16, 256), (16, 384), (16, 512), (32, 256)),
        "large": ((16, 256), (16, 384), (16, 512)),
        "so400m": ((14, 224), (14, 378), (14, 384), (16, 256), (16, 384), (16, 512)),
        "giantopt": ((16, 256), (16, 384)),
    }
    tanh = {"base_patch32_256", "large_patch16_512", "giantopt_patch16_256", "giantopt_patch16_384"}
    tanh |= {"so400m_patch16_256", "so400m_patch16_384", "so400m_patch16_512"}
    gap_only = {"so400m": ((14, 448), (14, 896))}
    for width, pairs in sizes.items():
        for patch, image in pairs + gap_only.get(width, ()):
            kwargs: dict[str, Any] = dict(patch_size=patch, class_token=False, **_WIDTHS[width])
            if f"{width}_patch{patch}_{image}" in tanh:
                kwargs["act_layer"] = "gelu_tanh"
            if (patch, image) in pairs:
                register(f"vit_{width}_patch{patch}_siglip_{image}", global_pool="map", **kwargs)
            kwargs |= dict(global_pool="avg", fc_norm=False)
            register(f"vit_{width}_patch{patch}_siglip_gap_{image}", **kwargs)


def _register_pooled() -> None:
    """Towers without a class token that average their tokens, with and without registers."""
    gap: dict[str, Any] = dict(class_token=False, global_pool="avg")
    plain_gap = dict(gap, fc_norm=False)
    for name, patch, size in (
        ("base_patch16_gap_224", 16, dict(_WIDTHS["base"], num_heads=16)),
        ("huge_patch14_gap_224", 14, _WIDTHS["huge"]),
        ("huge_patch16_gap_448", 16, _WIDTHS["huge"]),
        ("giant_patch16_gap_224", 16, _WIDTHS["giant"]),
    ):
        register(f"vit_{name}", patch_size=patch, **plain_gap, **size)
    register(
        "vit_base_patch16_reg4_gap_256", patch_size=16, reg_tokens=4, no_embed_class=True, **gap, **_WIDTHS["base"]
    )
    so150m: dict[str, Any] = dict(embed_dim=896, depth=18, num_heads=14, mlp_ratio=2.572)
    for image in (256, 384):
        register(f"vit_so150m_patch16_reg4_gap_{image}", patch_size=16, reg_tokens=4, **plain_gap, **so150m)
    register(
        "vit_so150m_patch16_reg4_map_256", patch_size=16, reg_tokens=4, class_token=False, global_pool="map", **so150m
    )
    so150m2: dict[str, Any] = dict(embed_dim=832, depth=21, num_heads=13, mlp_ratio=34 / 13, qkv_bias=False)
    for image in (256, 384, 448):
        register(
            f"vit_so150m2_patch16_reg1_gap_{image}", patch_size=16, reg_tokens=1, init_values=1e-5, **gap, **so150m2
        )
    for width, image in (("medium", 240), ("medium", 256), ("medium", 384), ("betwixt", 256)):
        register(
            f"vit_{width}_patch16_gap_{image}", patch_size=16, qkv_bias=False, init_values=1e-6, **plain_gap,
            **_WIDTHS[width],
        )  # fmt: skip
    registers = {
        "wee": ((1, 256),),
        "little": ((1, 256), (4, 256)),
        "medium": ((1, 256), (4, 256)),
        "mediumd": ((4, 256), (4, 384)),
        "betwixt": ((1, 256), (4, 256), (4, 384)),
    }
    for width, pairs in registers.items():
        for count, image in pairs:
            register(
                f"vit_{width}_patch16_reg{count}_gap_{image}", patch_size=16, reg_tokens=count, no_embed_class=True,
                init_values=1e-5, **gap, **_WIDTHS[width],
            )  # fmt: skip


def _register_deit3() -> None:
    """deit3_<width>_patch<P>_<image>: LayerScale, and a position embedding without a row for the class token."""
    sizes = {
        "small": ((16, 224), (16, 384)),
        "medium": ((16, 224),),
        "base": ((16, 224), (16, 384)),
        "large": ((16, 224), (16, 384)),
        "huge": ((14, 224),),
    }
    for width, pairs in sizes.items():
        for patch, image in pairs:
            register(
                f"deit3_{width}_patch{patch}_{image}", patch_size=patch, no_embed_class=True, init_values=1e-6,
                **_WIDTHS[width],
            )  # fmt: skip


def _register_distilled() -> None:
    """Towers trained from other models: RADIO, TIPSv2, InternViT, EVA's plain ViT-L."""
    radio = {
        "base": ("v3", 7, dict(_WIDTHS["base"], init_values=1e-5)),
        "large": ("v3", 7, dict(_WIDTHS["large"], init_values=1e-5)),
        "huge": ("v3", 7, _WIDTHS["huge"]),
        "giant": ("v3", 7, dict(embed_dim=1536, depth=40, num_heads=24)),
        "so400m": ("v4", 9, _WIDTHS["so400m"]),
    }
    common: dict[str, Any] = dict(no_embed_class=True, final_norm=False, img_size=512, patch_size=16)
    for width, (version, count, size) in radio.items():
        register(f"vit_{width}_patch16_radio_{version}", reg_tokens=count, **common, **size)
    register("vit_huge_patch16_radio_v4", reg_tokens=9, **common, **_WIDTHS["huge"])
    for width in ("base", "large", "so400m", "giant"):
        size = _DINOV2_GIANT if width == "giant" else _WIDTHS[width]
        register(
            f"vit_{width}_patch14_reg1_tipsv2",
            patch_size=14,
            reg_tokens=1,
            no_embed_class=True,
            init_values=1.0,
            **size,
        )
    register(
        "vit_intern300m_patch14_448", patch_size=14, init_values=0.1, final_norm=False, dynamic_img_size=True,
        **_WIDTHS["large"],
    )  # fmt: skip
    for image in (196, 336):
        register(f"eva_large_patch14_{image}", patch_size=14, global_pool="avg", **_WIDTHS["large"])


def _register_others() -> None:
    """FlexiViT, single variations of the plain sizes, and timm's small models for tests."""
    for width in ("small", "base", "large"):
        register(f"flexivit_{width}", patch_size=16, no_embed_class=True, **_WIDTHS[width])
    register("vit_base_patch16_224_miil", patch_size=16, qkv_bias=False, **_WIDTHS["base"])
    register("vit_small_patch16_36x1_224", patch_size=16, init_values=1e-5, **dict(_WIDTHS["small"], depth=36))
    for patch, image in ((16, 240), (32, 256)):
        register(f"vit_base_patch{patch}_plus_{image}", patch_size=patch, init_values=1e-5, **_WIDTHS["base_plus"])
    small: dict[str, Any] = dict(patch_size=16, embed_dim=64, num_heads=2, mlp_ratio=3, dynamic_img_size=True)
    register("test_vit", depth=6, **small)
    average: dict[str, Any] = dict(class_token=False, reg_tokens=1, init_values=1e-5)
    register("test_vit2", depth=8, global_pool="avg", **average, **small)
    register(
        "test_vit3", patch_size=16, embed_dim=96, depth=9, num_heads=3, mlp_ratio=2, global_pool="map",
        pool_include_prefix=True, **average,
    )  # fmt: skip


_FAMILIES = (
    _register_plain, _register_clip, _register_dinov2, _register_siglip, _register_pooled, _register_deit3,
    _register_distilled, _register_others,
)  # fmt: skip
for _family in _FAMILIES:
    _family()
