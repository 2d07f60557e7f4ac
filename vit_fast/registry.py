"""Model names and their presets as data; the names and the constructor words are timm's."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from .vit import VisionTransformer

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_WIDTHS = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "xsmall": dict(embed_dim=256, depth=10, num_heads=4),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "medium": dict(embed_dim=512, depth=12, num_heads=8),
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


@dataclass(frozen=True)
class Preset:
    """A name's constructor words, and how to build it: ``build(**words)``."""

    words: dict = field(default_factory=dict)
    build: Callable[..., nn.Module] = VisionTransformer


PRESETS: dict[str, Preset] = {}


def register(name: str, build=VisionTransformer, **words):
    """Adds a preset under a name that ``create_model`` and ``list_models`` then know."""
    PRESETS[name] = Preset(words, build)


def _register_plain():
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
    headless = ("vit_small_patch8_224", "vit_large_patch32_224", "vit_huge_patch14_224")
    for width, pairs in sizes.items():
        for patch, image in pairs:
            name = f"vit_{width}_patch{patch}_{image}"
            words = dict(patch_size=patch, img_size=image, num_classes=0 if name in headless else 1000)
            if name == "vit_small_patch8_224":
                words |= dict(mean=_IMAGENET[0], std=_IMAGENET[1])
            register(name, **words, **_WIDTHS[width])


def _register_clip():
    """vit_<width>_patch<P>_clip_[quickgelu_]<image>: pre-norm towers; the head is a projection or, where timm's
    default weights are fine-tuned, a classifier."""
    sizes = {
        "xsmall": ((16, 224, 512),),
        "medium": ((16, 224, 512), (32, 224, 512)),
        "betwixt": ((32, 224, 512),),
        "base": ((16, 224, 1000), (16, 384, 1000), (32, 224, 1000), (32, 256, 512), (32, 384, 1000), (32, 448, 1000)),
        "large": ((14, 224, 1000), (14, 336, 1000)),
        "huge": ((14, 224, 1000), (14, 336, 1000), (14, 378, 1024)),
        "giant": ((14, 224, 1024),),
        "gigantic": ((14, 224, 1280), (14, 378, 1280)),
    }
    quick = ("base_patch16_224", "base_patch32_224", "large_patch14_224", "large_patch14_336")
    quick += ("huge_patch14_224", "huge_patch14_378", "gigantic_patch14_224")
    projection = {"base": 512, "large": 768, "huge": 1024, "gigantic": 1280}
    norm_layer = partial(nn.LayerNorm, eps=1e-5)
    common = dict(pre_norm=True, norm_layer=norm_layer, mean=_CLIP[0], std=_CLIP[1])
    for width, rows in sizes.items():
        for patch, image, classes in rows:
            words = dict(common, patch_size=patch, img_size=image, num_classes=classes, **_WIDTHS[width])
            if f"{width}_patch{patch}_{image}" in quick:
                words_quick = dict(words, num_classes=projection[width], act_layer="quick_gelu")
                register(f"vit_{width}_patch{patch}_clip_quickgelu_{image}", **words_quick)
            if width == "large":
                words |= dict(mean=_HALF, std=_HALF)
            register(f"vit_{width}_patch{patch}_clip_{image}", **words)
    words = dict(common, patch_size=16, img_size=240, num_classes=640, **_WIDTHS["base_plus"])
    register("vit_base_patch16_plus_clip_240", **words)


def _register_dinov2():
    """vit_<width>_patch14[_reg4]_dinov2."""
    giant = dict(embed_dim=1536, depth=40, num_heads=24, mlp_ratio=5.33334, mlp_layer="swiglu")
    for width in ("small", "base", "large", "giant"):
        words = dict(patch_size=14, img_size=518, init_values=1e-5, num_classes=0, mean=_IMAGENET[0], std=_IMAGENET[1])
        words |= giant if width == "giant" else _WIDTHS[width]
        register(f"vit_{width}_patch14_dinov2", **words)
        register(f"vit_{width}_patch14_reg4_dinov2", reg_tokens=4, no_embed_class=True, **words)


def _register_siglip():
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
            words = dict(patch_size=patch, img_size=image, class_token=False, num_classes=0, **_WIDTHS[width])
            if f"{width}_patch{patch}_{image}" in tanh:
                words["act_layer"] = "gelu_tanh"
            if (patch, image) in pairs:
                register(f"vit_{width}_patch{patch}_siglip_{image}", global_pool="map", **words)
            words |= dict(global_pool="avg", fc_norm=False)
            register(f"vit_{width}_patch{patch}_siglip_gap_{image}", **words)


def _register_pooled():
    """Towers without a class token that average their tokens, with and without registers."""
    gap = dict(class_token=False, global_pool="avg")
    plain_gap = dict(gap, fc_norm=False)
    for name, patch, image, width in (
        ("base_patch16_gap_224", 16, 224, dict(_WIDTHS["base"], num_heads=16)),
        ("huge_patch14_gap_224", 14, 224, _WIDTHS["huge"]),
        ("huge_patch16_gap_448", 16, 448, _WIDTHS["huge"]),
        ("giant_patch16_gap_224", 16, 224, _WIDTHS["giant"]),
    ):
        words = dict(num_classes=0, mean=_IMAGENET[0], std=_IMAGENET[1])
        if name == "base_patch16_gap_224":
            words = dict(num_classes=1000)
        register(f"vit_{name}", patch_size=patch, img_size=image, **plain_gap, **words, **width)
    register(
        "vit_base_patch16_reg4_gap_256", patch_size=16, img_size=256, reg_tokens=4, no_embed_class=True,
        **gap, **_WIDTHS["base"],
    )  # fmt: skip
    for image in (256, 384):
        so150m = dict(embed_dim=896, depth=18, num_heads=14, mlp_ratio=2.572)
        register(
            f"vit_so150m_patch16_reg4_gap_{image}", patch_size=16, img_size=image, reg_tokens=4, **plain_gap, **so150m
        )


for _family in (_register_plain, _register_clip, _register_dinov2, _register_siglip, _register_pooled):
    _family()


def list_models(pattern: str = "*") -> list[str]:
    """The names that ``create_model`` knows, sorted; ``pattern`` is a shell pattern such as "*dinov2*"."""
    return sorted(fnmatch.filter(PRESETS, pattern))


def _check_words(name, build, words):
    """``TypeError`` for a word that a preset's function does not take."""
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for word in words:
        if word not in parameters:
            near = difflib.get_close_matches(word, parameters, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise TypeError(f"vit_fast.create_model: unknown word {word!r} for {name!r}{hint}")


def create_model(name: str, pretrained: bool = False, checkpoint_path: str | None = None, **kwargs) -> nn.Module:
    """Builds a model by its timm name.

    Args:
        name: one of ``list_models()``; a tag after a dot ("vit_base_patch16_224.augreg_in21k") chooses among timm's
            weights and matters only with ``pretrained``.
        pretrained: loads timm's weights for that name, through timm and huggingface_hub.
        checkpoint_path: a file instead: ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` in timm's keys (a family's own
            keys for its presets), or Google's ``.npz``.
        kwargs: constructor words of ``VisionTransformer``, or of the family; they stand over the preset's.
    Returns:
        the model, in training mode as timm's, with ``default_cfg`` (input_size, mean, std, num_classes).
    Raises:
        TypeError, ValueError: unknown name or word (the nearest ones are named), or bad values.
        WeightsError: weights that cannot be had or do not fit.
    """
    if not isinstance(name, str):
        raise TypeError(f"vit_fast.create_model: name is {type(name).__name__}, expected a str")
    if not isinstance(pretrained, bool):
        raise TypeError(
            f"vit_fast.create_model: pretrained is {pretrained!r}, expected a bool; checkpoint_path takes a file"
        )
    base, _, tag = name.partition(".")
    if base not in PRESETS:
        near = difflib.get_close_matches(base, PRESETS, n=5, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"vit_fast.create_model: unknown model {name!r}{hint}; vit_fast.list_models() has them all")
    if pretrained and checkpoint_path:
        raise ValueError("vit_fast.create_model: checkpoint_path and pretrained are both given, expected one")
    preset = PRESETS[base]
    words = {key: value for key, value in kwargs.items() if value is not None}
    _check_words(base, preset.build, words)
    if preset.build is VisionTransformer and isinstance(channels := words.get("in_chans", 3), int) and channels != 3:
        for key in ("mean", "std"):
            words.setdefault(key, (0.5,) * channels)
    model = preset.build(**{**preset.words, **words})
    if preset.build is VisionTransformer:
        model.default_cfg = model.pretrained_cfg = dict(
            architecture=base,
            tag=tag,
            input_size=(model.in_chans, *model.patch_embed.img_size),
            mean=model.mean,
            std=model.std,
            num_classes=model.num_classes,
        )
    if checkpoint_path:
        from .weights import load_checkpoint

        load_checkpoint(model, checkpoint_path)
    elif pretrained:
        from .weights import load_pretrained

        load_pretrained(model, name, words)
    return model
