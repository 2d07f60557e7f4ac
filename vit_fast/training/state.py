"""All that a run needs to go on bit for bit, as one file: weights, averages, optimiser, schedule, loss scale, the
generators of random numbers of every process, and how far it has come.

``state_dict`` and ``state_dict_ema`` have timm's names, so that ``create_model(checkpoint_path=...)`` and timm load the
file as it is. Reading it runs no code (``weights_only``).
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import TrainingError
from .run_folder import STATE

FORMAT, VERSION = "vit_fast training state", 2
_CONTENT = (
    *("settings", "classes", "images", "progress", "state_dict", "optimizer", "scheduler", "random"),
    *("vit_fast", "torch"),
)


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of this process: Python's, numpy's, torch's on the CPU and on the device."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    found = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts the generators of this process where ``random_state`` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def path_of(given: Path) -> Path:
    """The file of --resume, which names it or its folder."""
    path = given / STATE if given.is_dir() else given
    if not path.is_file():
        raise TrainingError(f"--resume: {str(path)!r} does not exist, expected the folder of a run or its {STATE}")
    return path


def read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        TrainingError: a file that is cut off or foreign, or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise errors of many classes on foreign bytes
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise TrainingError(f"--resume: {str(path)!r} cannot be read, it is cut off or damaged: {cause}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(
            f"--resume: {str(path)!r} holds no state of a run; --initial-checkpoint takes files of weights"
        )
    if state.get("version") != VERSION:
        raise TrainingError(
            f"--resume: {str(path)!r} has version {state.get('version')} of a state, expected {VERSION}: it was "
            f"written by vit_fast {state.get('vit_fast')}"
        )
    if missing := [name for name in _CONTENT if name not in state]:
        raise TrainingError(f"--resume: {str(path)!r} is damaged: it lacks {', '.join(missing)}")
    return state


def check_data(state: dict[str, Any], classes: Sequence[str], images: Sequence[int], path: Path) -> None:
    """Refuses to go on with other classes, or with other numbers of images to train on and to validate on."""
    if list(classes) != state["classes"]:
        raise TrainingError(
            f"--data-dir: the classes are {', '.join(classes)}, expected {', '.join(state['classes'])} as in "
            f"{str(path)!r}"
        )
    if list(images) != state["images"]:
        (train, val), (its_train, its_val) = images, state["images"]
        raise TrainingError(
            f"--data-dir: it has {train} images to train on and {val} to validate on, expected {its_train} and "
            f"{its_val} as in {str(path)!r}; begin a new run from its weights with --initial-checkpoint"
        )


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer, fsdp: bool) -> tuple[dict, dict]:
    """(state_dict of a model without wrapper, that of its optimiser), whole also where FSDP2 shards them."""
    if not fsdp:
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


def load_model(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], fsdp: bool) -> None:
    """Loads what ``model_state`` gave; TrainingError where it does not fit."""
    try:
        if not fsdp:
            model.load_state_dict(state["state_dict"], strict=True)
            optimizer.load_state_dict(state["optimizer"])
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["state_dict"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines()
        raise TrainingError(f"--resume: the state is of another model: {' '.join(lines[:2])[:400]}") from error
