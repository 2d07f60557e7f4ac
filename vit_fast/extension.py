"""Loads the compiled libraries of csrc/ into this process, after their checksums; keeps why one cannot be loaded.

A library is looked for in ``vit_fast/_lib/``, where a wheel that was built with it has it, then in the cache that
``vit-fast build`` writes. An absent one is a reason and no warning. One that is there and cannot be loaded gets one
warning. Nothing is looked for before the first ``load``.
"""

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SHIPPED = Path(__file__).parent / "_lib"

_lock = threading.Lock()


class _State(NamedTuple):
    library: Path | None  # the file that is loaded
    reasons: tuple[str, ...]
    warning: str | None = None


_states: dict[str, _State] = {}


def load(name: str) -> tuple[str, ...]:
    """Loads the library "cpu", "cuda" or "cutlass", once; returns why that is impossible here, empty if it is done."""
    if name in _states:
        return _states[name].reasons
    with _lock:
        first = name not in _states
        if first:
            _states[name] = _attempt(name)
    state = _states[name]
    if first and state.warning:
        warnings.warn(state.warning, RuntimeWarning, stacklevel=2)
    return state.reasons


def library(name: str) -> Path | None:
    """The file of the library that ``load`` has loaded; None before, or where it could not."""
    return _states[name].library if name in _states else None


def command(name: str) -> str:
    """The command that builds a library."""
    return "vit-fast build" if name == "cpu" else f"vit-fast build --{name}"


def _candidates(name: str, key: str) -> Iterator[Path]:
    from vit_fast.csrc import cache

    shipped = SHIPPED / cache.file_name(name)
    if shipped.exists():
        yield shipped
    yield from cache.entries(name, key)


def _attempt(name: str) -> _State:
    from vit_fast.csrc import cache

    if name not in cache.NAMES:
        raise ValueError(f"vit_fast.extension: name is {name!r}, expected one of {', '.join(cache.NAMES)}")
    if not sys.platform.startswith("linux"):
        return _State(None, (f"the {name} extension exists for Linux alone, this is {sys.platform}",))
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < cache.ABI_TARGET:
        wanted = ".".join(map(str, cache.ABI_TARGET))
        return _State(None, (f"the {name} extension needs torch {wanted} or newer, this is {torch.__version__}",))
    if name != "cpu" and torch.version.cuda is None:
        return _State(None, (f"torch {torch.__version__} is built without CUDA",))
    failures = []
    try:
        key = cache.key(name)
        for path in _candidates(name, key):
            try:
                cache.check(path, key)
                torch.ops.load_library(str(path))
                return _State(path, ())
            except (cache.DamagedError, OSError) as error:
                cause = str(error.__cause__ or error)  # torch's own error names the file alone
                failures.append(f"{path}: {cause.removeprefix(f'{path}: ')}")
    except (OSError, RuntimeError) as error:  # of the cache folder
        failures.append(str(error))
    if not failures:
        return _State(None, (f"the {name} extension is not built: run `{command(name)}`",))
    reason = f"the {name} extension is there and cannot be loaded: {'; '.join(failures)}"
    remedy = f"Run `{command(name)} --force`, or reinstall vit-fast."
    return _State(None, (reason,), f"vit_fast: {reason}; the next backend is used. {remedy}")
