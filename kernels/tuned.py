"""Launch configurations that a run on a GPU found better than the rules of ``configs``, read from kernels/tuned/.

A file is for one device and one Triton, and named after the device: ``h200.json`` for "NVIDIA H200". Without one, or
under another Triton, the rules alone pick; so they do, with one warning, where a file cannot be understood, which is an
error with VIT_FAST_STRICT=1. Its form:

    {"device": "NVIDIA H200", "triton": "3.7.1", "linear": [{"out_features": 3072, "picked": {…}, "use": {…}}],
     "stack": [{"width": 768, "picked": {"statistics": "partials"}, "use": {"statistics": "finalised"}}]}

``picked`` holds all fields of the ``LinearConfig`` that the rule picks, ``use`` those that replace them where it does
for so many ``out_features``; likewise of the ``StackConfig`` for a width; "stack" may be missing.
``python -P benchmarks/first_look.py --install FOLDER`` puts a file there. Tables are by architecture: of two devices of
one architecture in a process, the one that is asked last counts.
"""

import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"
FIELDS = {
    "block_m": int, "block_n": int, "block_k": int, "group_m": int, "num_warps": int, "num_stages": int, "tma": bool,
    "split_k": int, "maxnreg": int | None,
}  # fmt: skip
STACK_FIELDS = {"statistics": ("partials", "finalised", "plain")}
Table = dict[tuple[Any, ...], dict[str, Any]]
_tables: dict[int, Table] = {}  # by arch


def file_of(device_name: str) -> Path:
    """The file of a device."""
    return FOLDER / (device_name.lower().removeprefix("nvidia ").replace(" ", "-") + ".json")


def _checked(fields, kinds, every):
    """Fields of a config, all of them where ``every``; raises ValueError."""
    if not isinstance(fields, dict) or (every and set(fields) != set(kinds)) or not set(fields) <= set(kinds):
        raise ValueError(f"got fields {fields}, wanted {'all' if every else 'some'} of {', '.join(kinds)}")
    for name, value in fields.items():
        kind: Any = kinds[name]
        if isinstance(kind, tuple):
            if value not in kind:
                raise ValueError(f"got {name} {value!r}, wanted any of {', '.join(kind)}")
            continue
        right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not right or (type(value) is int and value < 1):
            word = getattr(kind, "__name__", kind)
            raise ValueError(f"got {name} {value!r}, wanted a {word}, at least 1 where it is a number")
    return fields


def read(path: Path, device_name: str, triton_version: str) -> Table:
    """{(out_features or width, *fields of the picked config): fields that replace them}; empty for another Triton.

    Raises:
        ValueError: what the file holds is not of the form at the head of this file, or of another device.
    """
    try:
        content = json.loads(path.read_text())
        if content["device"] != device_name:
            raise ValueError(f"got device {content['device']!r}, wanted {device_name!r}")
        if content["triton"] != triton_version:
            return {}
        entries = [(entry["out_features"], FIELDS, entry) for entry in content["linear"]]
        entries += [(entry["width"], STACK_FIELDS, entry) for entry in content.get("stack", ())]
        return {
            (int(size), *(_checked(entry["picked"], kinds, True)[name] for name in kinds)): _checked(
                entry["use"], kinds, False
            )
            for size, kinds, entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"vit_fast.kernels.tuned: {path} cannot be used: {said}; mend it, or delete it to use the rules"
        ) from error


def reads_tables(arch_of: Callable[[torch.device], int]) -> Callable[[torch.device], int]:
    """Makes ``configs.arch_of`` read the table of a CUDA device."""

    @functools.wraps(arch_of)
    def reading(device):
        arch = arch_of(device)
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            path = file_of(name)
            _tables[arch] = {}
            try:
                _tables[arch] = read(path, name, importlib.metadata.version("triton")) if path.exists() else {}
            except ValueError as error:
                if os.environ.get("VIT_FAST_STRICT") == "1":
                    raise
                warnings.warn(f"{error}. The rules pick until then.", RuntimeWarning, stacklevel=2)
        return arch

    return reading


def overrides(pick: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a rule (rows, out_features or width, …, arch) use the table of the architecture, where it has one."""

    @functools.wraps(pick)
    def picking(rows, size, *more, **named):
        config = pick(rows, size, *more, **named)
        table = _tables.get(named.get("arch", more[-1] if more else None))
        use = table.get((size, *astuple(config))) if table else None
        return replace(config, **use) if use else config

    return picking
