"""The vision models of other libraries that the tables of coverage have, and how each is built.

``LIBRARIES`` has a library's function, which yields its architectures. timm's and open_clip's are built in their own
size, on the device meta; those of transformers small from their configs, as many read values of their inputs.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """An architecture of a library, and how it is built."""

    name: str
    family: str  # the library's module that defines it
    tags: tuple[str, ...]  # of its pretrained weights
    build: Callable[[], nn.Module]
    example: Callable[[], Any] = lambda: None  # what it is called with; None: one image of its own size
    is_timm: bool = False  # whether its tags are names that ``create_model`` takes


def _on_meta(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A model in eval mode without memory for its weights."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return build(*args, **kwargs).eval()


def timm_architectures() -> Iterator[Architecture]:
    """The architectures of timm's ViT family: those that the modules of ``integrations.timm.FAMILY`` register."""
    import timm
    from timm.models import _registry

    from .integrations.timm import FAMILY

    tags: dict[str, list[str]] = {}
    for name in timm.list_models(pretrained=True):
        tags.setdefault(name.partition(".")[0], []).append(name)
    current = set(timm.list_models())
    for family in FAMILY:
        for name in sorted(_registry._module_to_models.get(family, ())):
            if name in current:  # without names that stand for another one
                build = functools.partial(_on_meta, timm.create_model, name)
                yield Architecture(name, family, tuple(tags.get(name, ())), build, is_timm=True)


def transformers_architectures() -> Iterator[Architecture]:
    """A small model for each family of vision layers that ``integrations.transformers`` knows."""
    from .integrations.transformers.small_models import SMALL_MODELS

    for name, model in SMALL_MODELS.items():
        yield Architecture(name, model.folder, (), model.build, functools.partial(model.inputs, torch.float32))


def open_clip_architectures() -> Iterator[Architecture]:
    """The image towers of open_clip's configs that are ViTs: its own, and those of timm's ViT family."""
    import open_clip
    from timm.models import _registry

    from .integrations.timm import FAMILY

    tags: dict[str, list[str]] = {}
    for name, tag in open_clip.list_pretrained():
        tags.setdefault(name, []).append(tag)
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        vision = dict(config["vision_cfg"], timm_model_pretrained=False)
        if "timm_model_name" in vision:
            module = _registry._model_to_module[vision["timm_model_name"].partition(".")[0]]
            if module not in FAMILY:
                continue
            family = f"timm: {module}"
        elif isinstance(vision["layers"], list):  # a ResNet's stages
            continue
        else:
            family = "VisionTransformer"
        build = functools.partial(_open_clip_tower, config["embed_dim"], vision, config.get("quick_gelu", False))
        yield Architecture(name, family, tuple(tags.get(name, ())), build)


def _open_clip_tower(embed_dim: int, vision: dict[str, Any], quick_gelu: bool) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    return _on_meta(_build_vision_tower, embed_dim, CLIPVisionCfg(**vision), quick_gelu)


LIBRARIES: dict[str, Callable[[], Iterator[Architecture]]] = {
    "timm": timm_architectures,
    "transformers": transformers_architectures,
    "open_clip": open_clip_architectures,
}
