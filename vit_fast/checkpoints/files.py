"""The state_dict that a weight file or a checkpoint holds. Reading one runs no code, but for TorchScript."""

import argparse
import json
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import WeightsError, listed

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".npz", ".ckpt", ".index.json")
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)(\.\w+)")
# What torch.compile, activation checkpointing and FSDP put around a module, wherever it stands in a model.
_AROUND_MODULES = re.compile(r"(^|\.)(?:(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.)+")
# Keys that hold the state_dict of a checkpoint, in the order in which timm's loader looks for them.
_AVERAGED = ("state_dict_ema", "model_ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model")
_UPDATES = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates beside "module."
_LOGGER = logging.getLogger("vit_fast")
_Path = str | os.PathLike[str]


def _read_npz(path: _Path) -> dict[str, torch.Tensor]:
    """Arrays by name; bfloat16, which numpy holds as raw two-byte values, becomes float32."""
    import numpy as np

    if not zipfile.is_zipfile(path):  # numpy's own error advises to unpickle it
        raise WeightsError(f"vit_fast: weight file {str(path)!r} cannot be read: it is no archive of arrays")
    state = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            array = file[name]
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:
                state[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
            else:
                state[name] = torch.from_numpy(array)
    return state


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that Hugging Face's index of a sharded checkpoint names; they lie beside it."""
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state: dict[str, torch.Tensor] = {}
    for name in files:
        shard = index.parent / name
        if not shard.is_file():
            raise WeightsError(f"vit_fast: weight file {str(index)!r} names {name}, expected that file beside it")
        state |= _read_safetensors(shard) if shard.suffix == ".safetensors" else _read_pickle(shard)
    return state


def _read_safetensors(path: _Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _is_torchscript(path: _Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_torchscript(path: _Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path, map_location="cpu").state_dict()


def _classes_in(path: _Path) -> list[str]:
    """The classes and functions that a pickle names beyond tensors and containers; none where it cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of foreign bytes, without a common class
        return []


def _read_pickle(path: _Path) -> Any:
    try:
        # timm's training checkpoints hold their options in a Namespace: a container, whose unpickling runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own error advises to execute what the file holds.
        remedy = ""
        if classes := _classes_in(path):
            save = "torch.save(checkpoint['state_dict'], 'weights.pth'), with the key that holds them"
            if any(name.startswith("torch.nn.modules.") for name in classes):
                save += ", or checkpoint.state_dict() where it is a whole model"
            remedy = (
                f". It names {listed(classes)}; where you trust it, save its tensors alone: "
                f"checkpoint = torch.load({str(path)!r}, weights_only=False); {save}"
            )
        raise WeightsError(
            f"vit_fast: weight file {str(path)!r} cannot be read: it is damaged, or holds Python objects, "
            f"expected tensors alone; nothing in it was executed{remedy}"
        ) from error


def read_state_dict(path: str | os.PathLike[str], *, torchscript: bool = False) -> dict[str, torch.Tensor]:
    """The state_dict in a file: .safetensors, .npz, or .pt/.pth/.bin/.tar/.ckpt; reading it executes nothing.

    The index of a sharded checkpoint of Hugging Face (.safetensors.index.json) stands for its files. Checkpoints that
    wrap the state_dict are unwrapped as timm's loader does (see ``unwrap``). torchscript also reads TorchScript
    archives, by ``torch.jit.load``, which runs what they hold: for files that you trust.

    Raises:
        TypeError: not a path.
        WeightsError: missing, truncated or foreign file.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"vit_fast: path of a weight file is {type(path).__name__}, expected a str or os.PathLike")
    path = Path(path)
    subject = f"vit_fast: weight file {str(path)!r}"
    if not path.is_file():
        raise WeightsError(f"{subject} {'is a directory' if path.is_dir() else 'does not exist'}")
    if not path.name.endswith(_SUFFIXES):
        raise WeightsError(f"{subject} ends in {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
    if not path.stat().st_size:
        raise WeightsError(f"{subject} cannot be read: it is empty")
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        raise WeightsError(
            f"{subject} is one of {int(shard[2])} shards, expected their index {shard[1]}{shard[3]}.index.json"
        )
    archive = path.suffix not in (".safetensors", ".npz") and _is_torchscript(path)
    if archive and not torchscript:
        raise WeightsError(
            f"{subject} cannot be read: it is a TorchScript archive, which is a program. Where you trust it, save its "
            f"tensors alone: torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    try:
        if path.suffix == ".safetensors":
            state = _read_safetensors(path)
        elif path.suffix == ".npz":
            state = _read_npz(path)
        elif path.suffix == ".json":
            state = _read_shards(path)
        else:
            state = _read_torchscript(path) if archive else _read_pickle(path)
    except (ImportError, WeightsError):
        raise
    except Exception as error:
        # What torch, numpy and safetensors raise on foreign bytes has no common class.
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise WeightsError(f"{subject} cannot be read: {cause}") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{subject} holds no state_dict of tensors, but a {type(state).__name__}")
    return unwrap(state, subject)


def unwrap(checkpoint: Mapping[str, Any], subject: str) -> dict[str, torch.Tensor]:
    """The state_dict in a checkpoint, as timm's loader takes it.

    Averaged (EMA) weights come before the others, and the log says so at level INFO: "state_dict_ema", "model_ema",
    "state_dict", "model". What DistributedDataParallel, torch.compile, activation checkpointing and FSDP add to names
    is taken out.

    Args:
        checkpoint: a state_dict, or a mapping around one.
        subject: what an error speaks of.
    Raises:
        WeightsError: something else than tensors inside, no tensor, or tensors that are sparse or on the meta device.
    """
    state = checkpoint
    while wrapper := next((name for name in _WRAPPERS if isinstance(state.get(name), Mapping)), None):
        if wrapper in _AVERAGED:
            others = [name for name in _WRAPPERS if name != wrapper and isinstance(state.get(name), Mapping)]
            rest = f"; {' and '.join(others)} left aside" if others else ""
            _LOGGER.info("%s: %s is taken, the averaged (EMA) weights%s", subject, wrapper, rest)
        state = state[wrapper]
    if _UPDATES in state:
        _LOGGER.info("%s: the weights of an AveragedModel are taken, its count %s left aside", subject, _UPDATES)
        state = {key: value for key, value in state.items() if key != _UPDATES}
    foreign = [str(k) for k, v in state.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if foreign:
        nested = [key for key, value in state.items() if isinstance(value, Mapping)]
        remedy = f"; where {' or '.join(map(repr, nested))} is the state_dict, save or pass it alone" if nested else ""
        raise WeightsError(f"{subject} holds no state_dict of tensors, but {listed(foreign)}{remedy}")
    if not state:
        raise WeightsError(f"{subject} holds no tensor")
    if unusable := [f"{key} {why}" for key, value in state.items() if (why := why_unusable(value))]:
        raise WeightsError(f"{subject} holds tensors that cannot be loaded: {listed(unusable)}")
    return {_clean(key): value for key, value in state.items()}


def why_unusable(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be loaded into a model, or None: it is sparse, or has no values."""
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    return "on the meta device" if tensor.is_meta else None


def _clean(key: str) -> str:
    return _AROUND_MODULES.sub(r"\1", _AROUND_MODULES.sub(r"\1", key).removeprefix("module."))
