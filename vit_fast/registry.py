"""``create_model`` and ``list_models``: models by their timm names and tags.

The architectures of ``presets`` are built here. The other names of timm's ViT family are built by timm and then
optimised (``timm_models``).
"""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from . import pretrained_cfg as cfgs
from . import timm_models
from .checkpoints import WeightsError, hub, load_checkpoint
from .features import FeatureGetterNet
from .kernels.arguments import UnsupportedError
from .presets import PRESETS
from .vit import VisionTransformer


def _patterns(argument: str, value: str | Iterable[str]) -> list[str]:
    """A shell pattern or several, as a list."""
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"vit_fast.list_models: {argument} is {value!r}, expected a str or a list of str")
    return [pattern for pattern in patterns if pattern]


def _natural(name: str) -> list[int | str]:
    """A sort key by which patch8 stands before patch16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def names() -> list[str]:
    """Every name that ``create_model`` knows, without tags."""
    return list(dict.fromkeys((*PRESETS, *cfgs.modules())))


def module_of(name: str) -> str:
    """timm's module of a name ("vision_transformer", "eva", ...), or the family of ``vit_fast.systems``."""
    if name not in PRESETS or PRESETS[name].build is VisionTransformer:
        return cfgs.modules().get(name, "vision_transformer")
    return PRESETS[name].build.__module__.rsplit(".", 1)[-1]


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
        module: a module of timm ("vision_transformer", "eva", ...) or a family of ``vit_fast.systems``, or several.
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
    for name in names():
        if not modules or module_of(name) in modules:
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


def _check_name(name: str, asked_for: str) -> None:
    """``ValueError`` for a name, without a tag, that is not known; the nearest ones are named."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        if any(sign in asked_for for sign in "/\\:") and not asked_for.startswith(hub.SOURCES):
            hint += f"; of the Hugging Face hub: 'hf-hub:{asked_for}', of a folder: 'local-dir:{asked_for}'"
        raise ValueError(
            f"vit_fast.create_model: unknown model {asked_for!r}{hint}; vit_fast.list_models() has them all"
        )


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
        kwargs: arguments of ``VisionTransformer``, of the family or of timm's class; they override the preset's. None
            counts as not given.
    Returns:
        the model, in training mode as timm's, with timm's ``pretrained_cfg``, also as ``default_cfg``: a
        ``VisionTransformer``, a model of ``vit_fast.systems``, or, for the other names of timm's ViT family, timm's own
        class, optimised (``vit_fast.optimize``).
    Raises:
        TypeError, ValueError: unknown name, tag or argument (the nearest ones are named), or bad values.
        UnsupportedError: features_only of a family, or a model of timm of which no block can run fused.
        ImportError: weights, a config or a class that need timm, where it is not installed.
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
    _check_name(base, name)
    cfg = cfgs.resolve(base, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and not cfgs.has_source(cfg):
        others = [tag for tag in cfgs.tags(base) if cfgs.has_source(cfgs.resolve(base, tag))]
        hint = f"; of {base!r} it has {', '.join(others)}" if others else ""
        raise WeightsError(
            f"vit_fast.create_model: pretrained is True, expected False, as timm has no weights of {name!r}{hint}; "
            "checkpoint_path takes a file"
        )
    if base not in PRESETS:
        features = dict(features_only=True, out_indices=out_indices) if features_only else {}
        return timm_models.build(base, name, pretrained, checkpoint_path, cfg, cache_dir, features, arguments)
    preset = PRESETS[base]
    of_vit = preset.build is VisionTransformer
    if features_only and not of_vit:
        raise UnsupportedError(
            f"vit_fast.create_model: features_only is True, expected False, as {base!r} is no VisionTransformer"
        )
    _check_arguments(base, preset.build, arguments)
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
