"""timm's facts about published weights: sizes, normalisation, crop, classes, location. Kept here as data, so that they
are there without timm installed. ``tests/support/pretrained_cfgs.py`` writes the file from timm.

``pretrained_cfgs.json``: "timm", the version it was made from; "fields", the names an entry may have; "defaults", the
values of fields that an entry leaves out; "common", the values that most entries of "models" have; "modules", timm's
modules of the ViT family → their model names; "models", name → tag → the rest, the default tag first (an empty tag: the
name has none). As in timm, a hub id "timm/" stands for timm/<name>.<tag>.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEPT_NULL = ("pool_size", "first_conv", "classifier")  # timm leaves out every other field that is None
_SOURCES = ("file", "url", "hf_hub_id", "hf_hub_filename")


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("pretrained_cfgs.json").read_text(encoding="utf-8"))


def tags(name: str) -> list[str]:
    """The tags of a model name without a tag, the default first; empty for a name that timm does not have."""
    return list(_data()["models"].get(name, ()))


@functools.cache
def modules() -> dict[str, str]:
    """Name → timm's module, of every model of timm's ViT family."""
    return {name: module for module, names in _data()["modules"].items() for name in names}


def has_source(cfg: Mapping[str, Any]) -> bool:
    """Whether a ``pretrained_cfg`` names a source of weights or holds them."""
    return any(cfg.get(source) for source in ("url", "file", "hf_hub_id", "state_dict"))


def _from_table(name: str, tag: str | None) -> dict[str, Any]:
    known = _data()["models"].get(name)
    if known is None:
        if tag:
            raise ValueError(f"vit_fast.create_model: unknown tag {tag!r} of {name!r}, which has none")
        return {}
    tag = tag or next(iter(known))
    if tag not in known:
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.3) or list(known)
        raise ValueError(
            f"vit_fast.create_model: unknown tag {tag!r} of {name!r}; near: {', '.join(near)} "
            f"(timm {_data()['timm']}; pretrained_cfg takes the dict of another)"
        )
    cfg = {"architecture": name, "tag": tag or None, **_data()["common"], **known[tag]}
    if cfg.get("hf_hub_id") == "timm/":
        cfg["hf_hub_id"] = f"timm/{cfg['architecture']}.{tag}"
    return cfg


def _check_fields(argument: str, cfg: Mapping[str, Any]) -> None:
    for field in cfg:
        if field not in _data()["fields"]:
            near = difflib.get_close_matches(str(field), _data()["fields"], n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"vit_fast.create_model: unknown field {field!r} of {argument}{hint}")


def resolve(
    name: str, cfg: str | Mapping[str, Any] | None = None, overlay: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a model name, equal to timm's.

    Args:
        name: without a tag.
        cfg: a tag, or a dict of timm's fields in place of the table's; default the name's default tag.
        overlay: fields that replace those of ``cfg``.
    Returns:
        a dict of its own for each call; empty for a name that timm does not have.
    Raises:
        TypeError: ``cfg`` or ``overlay`` of another type.
        ValueError: unknown tag or field; the nearest ones are named.
    """
    if isinstance(cfg, Mapping):
        _check_fields("pretrained_cfg", cfg)
        fields = {"architecture": name, **cfg}
    elif cfg is None or isinstance(cfg, str):
        fields = _from_table(name, cfg)
    else:
        raise TypeError(f"vit_fast.create_model: pretrained_cfg is {type(cfg).__name__}, expected a tag or a dict")
    if overlay is not None:
        if not isinstance(overlay, Mapping):
            raise TypeError(
                f"vit_fast.create_model: pretrained_cfg_overlay is {type(overlay).__name__}, expected a dict"
            )
        _check_fields("pretrained_cfg_overlay", overlay)
        if any(overlay.get(source) for source in _SOURCES):
            # custom_load describes the format of the default file, which the overlay replaces.
            overlay = {"custom_load": False, **overlay}
        fields = {**fields, **overlay}
    if not fields:
        return {}
    fields = {**_data()["defaults"], **fields}
    return {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in fields.items()
        if value is not None or field in _KEPT_NULL
    }
