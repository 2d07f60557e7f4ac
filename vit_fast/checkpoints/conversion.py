"""Checkpoints of one program in the keys of another, with a report of every key.

Read are all formats of ``registry.FORMATS``; written are "timm", "canonical" and "jeonsworld". Names of keys tell
neither an activation nor an eps, nor whether blocks are pre-norm: what a source tells of its blocks goes into the
metadata of a converted file. Programs whose block timm does not have (post-norm, value skip) get canonical keys alone.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_fast.pos_embed import check_policy

from . import registry
from .base import Format
from .files import read_state_dict
from .fitting import fit_channels, fit_patches, fit_table
from .report import Entry, Report, log_left_out, report_of


def convert_state_dict(
    state: Mapping[str, Any],
    to: str = "timm",
    *,
    family: str | None = None,
    grid: tuple[int, int] | None = None,
    old_grid: tuple[int, int] | None = None,
    policy: str | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    drop_head: bool = False,
) -> tuple[dict[str, torch.Tensor], Report]:
    """A state_dict in other keys.

    Args:
        state: names to tensors or arrays, of any format of ``registry.FORMATS``.
        to: "timm", "canonical" or "jeonsworld".
        family: the name of the program that ``state`` is from; None recognises it by the keys.
        grid, old_grid, policy: the position table is resized to ``grid`` (rows, columns) by ``policy`` (the
            program's own where None); ``old_grid`` None takes a square.
        patch_size: side of the patches, which files with a matrix of patch weights do not contain.
        in_chans: channels of the first convolution: summed for one, tiled otherwise.
        drop_head: leaves out head, head_dist and pre_logits.
    Returns:
        (state_dict, report).
    Raises:
        ValueError: unknown values of arguments, a family that the keys contradict, or timm's keys asked for a program
            whose block timm does not have.
        WeightsError: keys of no known program, or missing ones.
    """
    target = registry.by_name(to)
    if target is None or not target.is_target or target.from_timm is None:
        raise ValueError(f"vit_fast.checkpoints: to is {to!r}, expected one of {', '.join(registry.targets())}")
    for name, value in (("old_grid", old_grid), ("policy", policy)):
        if value is not None and grid is None:
            raise ValueError(f"vit_fast.checkpoints: {name} is {value!r}, expected grid with it")
    if policy is not None:
        check_policy(policy)
    tensors = {key: torch.as_tensor(value) for key, value in state.items()}
    source = registry.format_of(tensors, family)
    _check_block(target, f" for family {source.name!r}", source)
    translated, log, left_out = source.to_timm(tensors)
    dropped = list(left_out)
    notes = {"patch_embed.proj.weight": fit_patches(translated, patch_size)}
    if in_chans is not None:
        key, note = fit_channels(translated, in_chans)
        notes[key] = note or notes.get(key)
    if grid is not None:
        notes["pos_embed"] = fit_table(translated, tuple(grid), old_grid, policy or source.policy)
    if drop_head:
        origin = {made: came for came, made in log}
        for key in [key for key in translated if key.split(".")[0] in ("head", "head_dist", "pre_logits")]:
            del translated[key]
            dropped += [(name, "head") for name in origin[key]]
    resized = {id(translated[key]): note for key, note in notes.items() if note}
    out, second, _ = target.from_timm(translated)
    return {key: value.contiguous() for key, value in out.items()}, report_of(log, second, out, dropped, resized)


def _check_block(target: Format, subject: str, source: Format) -> None:
    """``ValueError`` where a format of timm's block is asked to hold another."""
    if source.unlike_timm and not target.any_block:
        able = " or ".join(repr(known.name) for known in registry.FORMATS if known.is_target and known.any_block)
        raise ValueError(
            f"vit_fast.checkpoints: to is {target.name!r}, expected {able}{subject}: its blocks {source.unlike_timm}, "
            f"{target.name}'s do not"
        )


def for_model(model: nn.Module, state: Mapping[str, torch.Tensor], source: Format | None) -> Mapping[str, torch.Tensor]:
    """A state_dict of another program under a model's own names; unchanged where it has them, or is of no known format.

    What became of every key is logged at level INFO. Heads and pooling that the model was built without, and what no
    ViT here has (decoders, mask tokens, text towers), are left out with a warning.

    Args:
        source: ``registry.recognised(state)``.
    Raises:
        WeightsError: a file of a known format lacks a key, or has other heads than the model where it tells of them.
    """
    if source is not None and source.for_model is not None:
        return source.for_model(model, state)
    own = model.state_dict()
    target = registry.of_model(own)
    if source is None or target is None or target.from_timm is None:
        return state
    if source is target or source.unlike_timm or own.keys() == state.keys():
        return state
    translated, log, dropped = source.to_timm(state)
    translated, second, _ = target.from_timm(translated)
    report = report_of(log, second, translated, dropped, {})
    absent = tuple(part for part in source.optional if not any(key.startswith(part) for key in own))
    for index, entry in enumerate(report):
        if entry.target and entry.target.startswith(absent):
            del translated[entry.target]
            report[index] = Entry("dropped", entry.sources, "", "the model has no place for it")
    logging.getLogger("vit_fast").info("%s keys for %s:\n%s", source.name, type(model).__name__, report)
    left_out = [(key, entry.note) for entry in report if entry.action == "dropped" for key in entry.sources]
    log_left_out(f"{source.name} keys for {type(model).__name__}", left_out)
    return translated


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "timm",
    *,
    torchscript: bool = False,
    **options: Any,
) -> Report:
    """Converts a file of ``read_state_dict`` into a ``.safetensors`` file.

    Metadata of the target: the keys, the family, what its blocks do as far as that is known, and the "vit_fast."
    entries of a source that was converted before.

    Args:
        options: the keyword arguments of ``convert_state_dict``.
        torchscript: also reads OpenAI's TorchScript archives, by ``torch.jit.load``: for sources that you trust.
    Raises:
        ImportError: safetensors is not installed.
        ValueError, WeightsError: see ``convert_state_dict``; nothing is written then.
    """
    if Path(target).suffix != ".safetensors":
        raise ValueError(
            f"vit_fast.checkpoints: target is {str(target)!r}, expected a file name ending in .safetensors"
        )
    from safetensors import safe_open
    from safetensors.torch import save_file

    state = read_state_dict(source, torchscript=torchscript)
    metadata: dict[str, str] = {}
    if Path(source).suffix == ".safetensors":
        with safe_open(source, "pt") as file:
            metadata = {key: v for key, v in (file.metadata() or {}).items() if key.startswith("vit_fast.")}
    known = registry.format_of(state, options.get("family"))
    origin = registry.by_name(metadata.get("vit_fast.family", known.name)) or known
    written = registry.by_name(to)
    if origin is not known and written is not None:
        _check_block(written, f": the file is of family {origin.name!r}", origin)
    converted, report = convert_state_dict(state, to, **options)
    facts = dict(known.facts) | (known.read_facts(state) if known.read_facts else {})
    tags = {"format": "pt", "vit_fast.family": origin.name} | {f"vit_fast.{name}": str(v) for name, v in facts.items()}
    save_file(converted, target, tags | metadata | {"vit_fast.keys": to})
    return report
