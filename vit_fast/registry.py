"""Model names and their presets as data; the names and the arguments are timm's.

A preset of ``VisionTransformer`` holds the architecture alone. Image size, classes, mean and std come from the
``pretrained_cfg`` of the name and tag, as in timm.
"""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from . import pretrained_cfg as cfgs
from .checkpoints import WeightsError, hub, load_checkpoint
from .features import FeatureGetterNet
from .kernels.arguments import UnsupportedError
from .vit import VisionTransformer

_WIDTHS: dict[str, dict[str, Any]] = {
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
    giant: dict[str, Any] = dict(embed_dim=1536, depth=40, num_heads=24, mlp_ratio=5.33334, mlp_layer="swiglu")
    for width in ("small", "base", "large", "giant"):
        kwargs: dict[str, Any] = dict(patch_size=14, init_values=1e-5)
        kwargs |= giant if width == "giant" else _WIDTHS[width]
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
    for name, patch, width in (
        ("base_patch16_gap_224", 16, dict(_WIDTHS["base"], num_heads=16)),
        ("huge_patch14_gap_224", 14, _WIDTHS["huge"]),
        ("huge_patch16_gap_448", 16, _WIDTHS["huge"]),
        ("giant_patch16_gap_224", 16, _WIDTHS["giant"]),
    ):
        register(f"vit_{name}", patch_size=patch, **plain_gap, **width)
    register(
        "vit_base_patch16_reg4_gap_256", patch_size=16, reg_tokens=4, no_embed_class=True, **gap, **_WIDTHS["base"]
    )
    so150m: dict[str, Any] = dict(embed_dim=896, depth=18, num_heads=14, mlp_ratio=2.572)
    for image in (256, 384):
        register(f"vit_so150m_patch16_reg4_gap_{image}", patch_size=16, reg_tokens=4, **plain_gap, **so150m)


for _family in (_register_plain, _register_clip, _register_dinov2, _register_siglip, _register_pooled):
    _family()


def _patterns(argument: str, value: str | Iterable[str]) -> list[str]:
    """A shell pattern or several, as a list."""
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"vit_fast.list_models: {argument} is {value!r}, expected a str or a list of str")
    return [pattern for pattern in patterns if pattern]


def _natural(name: str) -> list[int | str]:
    """A sort key by which patch8 stands before patch16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _module(name: str) -> str:
    """timm's module of a name: "vision_transformer", or the family of ``vit_fast.systems``."""
    build = PRESETS[name].build
    return "vision_transformer" if build is VisionTransformer else build.__module__.rsplit(".", 1)[-1]


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """The names that ``create_model`` knows, with 8 before 16; timm's arguments.

    Args:
        filter: a shell pattern such as "*dinov2*", or several, of which one has to match.
        module: "vision_transformer" or a family of ``vit_fast.systems``, or several.
        pretrained: only names with published weights, with their tags.
        exclude_filters: patterns of names to leave out.
        name_matches_cfg: only names that timm has.
        include_tags: name.tag, for each tag of a name; None: as ``pretrained``. A pattern without a dot then matches
            every tag.
    Raises:
        TypeError: a pattern that is no str.
    """
    include, exclude = _patterns("filter", filter), _patterns("exclude_filters", exclude_filters)
    modules = _patterns("module", module)
    include_tags = pretrained if include_tags is None else include_tags
    pairs = []  # (name, tag or "", the text that patterns are matched against)
    for name in PRESETS:
        if not modules or _module(name) in modules:
            chosen = (cfgs.tags(name) or [""]) if include_tags else [""]
            pairs += [(name, tag, f"{name}.{tag}" if tag else name) for tag in chosen]

    def matches(patterns: Iterable[str], full: str) -> bool:
        return any(
            fnmatch.fnmatchcase(full, pattern)
            or (include_tags and "." not in pattern and fnmatch.fnmatchcase(full, f"{pattern}.*"))
            for pattern in patterns
        )

    return sorted(
        (
            full
            for name, tag, full in pairs
            if (not include or matches(include, full))
            and not matches(exclude, full)
            and (not pretrained or cfgs.has_source(cfgs.resolve(name, tag)))
            and (not name_matches_cfg or cfgs.tags(name))
        ),
        key=_natural,
    )


def _check_arguments(name: str, build: Callable[..., nn.Module], arguments: Iterable[str]) -> None:
    """``TypeError`` for an argument that a preset's function does not take."""
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for argument in arguments:
        if argument not in parameters:
            near = difflib.get_close_matches(argument, parameters, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise TypeError(f"vit_fast.create_model: unknown argument {argument!r} for {name!r}{hint}")


def _known(name: str, asked_for: str) -> Preset:
    """The preset of a name without a tag."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=5, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        if any(sign in asked_for for sign in "/\\:") and not asked_for.startswith(hub.SOURCES):
            hint += f"; of the Hugging Face hub: 'hf-hub:{asked_for}', of a folder: 'local-dir:{asked_for}'"
        raise ValueError(
            f"vit_fast.create_model: unknown model {asked_for!r}{hint}; vit_fast.list_models() has them all"
        )
    return PRESETS[name]


def _arguments_of(cfg: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a ``pretrained_cfg`` decides; ``given`` are the caller's."""
    if not cfg:
        return {}
    arguments = dict(in_chans=cfg["input_size"][0], mean=cfg["mean"], std=cfg["std"])
    if cfg["num_classes"] >= 0:  # −1 in a config: not known
        arguments["num_classes"] = cfg["num_classes"]
    if cfg["fixed_input_size"]:
        arguments["img_size"] = cfg["input_size"][1:]
    channels = given.get("in_chans", arguments["in_chans"])
    if isinstance(channels, int) and channels != len(arguments["mean"]):
        arguments |= dict(mean=(0.5,) * channels, std=(0.5,) * channels)
    return arguments


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    *,
    pretrained_cfg: str | Mapping[str, Any] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    out_indices: int | list[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by its timm name.

    Args:
        name: one of ``list_models()``. A tag after a dot ("vit_base_patch16_clip_224.openai") chooses among timm's
            weights and, as in timm, the head, mean and std that belong to them, also without ``pretrained``; the
            default is timm's. "hf-hub:org/name[@revision]" and "local-dir:path" take a model in timm's format from
            the Hugging Face hub or a folder.
        pretrained: loads timm's weights for that name, through timm and huggingface_hub.
        checkpoint_path: a file instead: ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` in timm's keys (a family's own
            keys for its presets), or Google's ``.npz``.
        pretrained_cfg: a tag, or a dict of timm's fields, in place of the tag's.
        pretrained_cfg_overlay: fields that replace those of the tag, such as dict(file=...).
        cache_dir: where downloads are kept.
        features_only: the model as a ``FeatureGetterNet``, whose output is the list of feature maps after chosen
            blocks; the blocks behind the last one, the norm and the head are left out.
        out_indices: those blocks: the last n or a list; default the last 3.
        kwargs: arguments of ``VisionTransformer``, or of the family; they override the preset's. None
            counts as not given.
    Returns:
        the model, in training mode as timm's, with timm's ``pretrained_cfg``, also as ``default_cfg``.
    Raises:
        TypeError, ValueError: unknown name, tag or argument (the nearest ones are named), or bad values.
        UnsupportedError: features_only of a family.
        ImportError: weights or a config that need timm, where it is not installed.
        WeightsError: weights that cannot be had or do not fit.
    """
    if not isinstance(name, str):
        raise TypeError(f"vit_fast.create_model: name is {type(name).__name__}, expected a str")
    for argument, value in (("pretrained", pretrained), ("features_only", features_only)):
        if not isinstance(value, bool):
            hint = "; checkpoint_path takes a file" if argument == "pretrained" else ""
            raise TypeError(f"vit_fast.create_model: {argument} is {value!r}, expected a bool{hint}")
    if pretrained and checkpoint_path:
        raise ValueError("vit_fast.create_model: checkpoint_path and pretrained are both given, expected one")
    if out_indices is not None and not features_only:
        raise ValueError(f"vit_fast.create_model: out_indices is {out_indices!r}, expected features_only=True with it")
    arguments = {key: value for key, value in kwargs.items() if value is not None}
    if name.startswith(hub.SOURCES):
        if pretrained_cfg is not None:
            raise ValueError(f"vit_fast.create_model: pretrained_cfg is given, expected None, as {name!r} has its own")
        pretrained_cfg, base, saved = hub.config_of(name, cache_dir)
        arguments = {**saved, **arguments}
    else:
        base, _, tag = name.partition(".")
        pretrained_cfg = pretrained_cfg or tag or None
    preset = _known(base, name)
    of_vit = preset.build is VisionTransformer
    if features_only and not of_vit:
        raise UnsupportedError(
            f"vit_fast.create_model: features_only is True, expected False, as {base!r} is no VisionTransformer"
        )
    _check_arguments(base, preset.build, arguments)
    cfg = cfgs.resolve(base, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and not cfgs.has_source(cfg):
        others = [tag for tag in cfgs.tags(base) if cfgs.has_source(cfgs.resolve(base, tag))]
        hint = f"; of {base!r} it has {', '.join(others)}" if others else ""
        raise WeightsError(
            f"vit_fast.create_model: pretrained is True, expected False, as timm has no weights of {name!r}{hint}; "
            "checkpoint_path takes a file"
        )
    model: Any = preset.build(**{**preset.arguments, **(_arguments_of(cfg, arguments) if of_vit else {}), **arguments})
    if of_vit:
        cfg |= {key: getattr(model, key) for key in ("mean", "std") if key in arguments}
        model.default_cfg = cfg
    model.pretrained_cfg = cfg or getattr(model, "default_cfg", {})
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)
    elif pretrained:
        hub.load_pretrained(model, name, base, cfg, arguments, cache_dir)
    if features_only:
        model = FeatureGetterNet(model, 3 if out_indices is None else out_indices)
    return model
