"""Weights from files and from timm's hub, always strict: nothing is dropped or left out silently."""

import argparse
import json
import logging
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from vit_fast.pos_embed import resize_pos_embed


class WeightsError(ValueError):
    """A weight file that cannot be had, cannot be read, or does not fit the model."""


class MissingKeyError(WeightsError, KeyError):
    """A key that a checkpoint of a known format lacks."""

    __str__ = Exception.__str__


_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".npz", ".ckpt", ".index.json")
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)(\.\w+)")
# What torch.compile, activation checkpointing and FSDP put around a module, wherever it stands in a model.
_AROUND_MODULES = re.compile(r"(^|\.)(?:(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.)+")
# Keys that hold the state_dict of a checkpoint, in the order in which timm's loader looks for them.
_AVERAGED = ("state_dict_ema", "model_ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model")
_UPDATES = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates beside "module."
_LOGGER = logging.getLogger("vit_fast")


def _read_npz(path):
    """Arrays by name; bfloat16, which numpy holds as raw two-byte values, becomes float32."""
    import numpy as np

    if not zipfile.is_zipfile(path):  # numpy's own words advise to unpickle it
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


def _read_shards(index):
    """The tensors of all files that Hugging Face's index of a sharded checkpoint names; they lie beside it."""
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state = {}
    for name in files:
        shard = index.parent / name
        if not shard.is_file():
            raise WeightsError(f"vit_fast: weight file {str(index)!r} names {name}, expected that file beside it")
        state |= _read_safetensors(shard) if shard.suffix == ".safetensors" else _read_pickle(shard)
    return state


def _read_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def _is_torchscript(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path, map_location="cpu").state_dict()


def _classes_in(path):
    """The classes and functions that a pickle names beyond tensors and containers; none where it cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of foreign bytes, without a common class
        return []


def _read_pickle(path):
    try:
        # timm's training checkpoints hold their options in a Namespace: a container, whose unpickling runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to execute what the file holds.
        remedy = ""
        if classes := _classes_in(path):
            save = "torch.save(checkpoint['state_dict'], 'weights.pth'), with the key that holds them"
            if any(name.startswith("torch.nn.modules.") for name in classes):
                save += ", or checkpoint.state_dict() where it is a whole model"
            remedy = (
                f". It names {_listed(classes)}; where you trust it, save its tensors alone: "
                f"checkpoint = torch.load({str(path)!r}, weights_only=False); {save}"
            )
        raise WeightsError(
            f"vit_fast: weight file {str(path)!r} cannot be read: it is damaged, or holds Python objects, "
            f"expected tensors alone; nothing in it was executed{remedy}"
        ) from error


def read_state_dict(path, *, torchscript: bool = False) -> dict[str, torch.Tensor]:
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


def unwrap(checkpoint: Mapping, subject: str) -> dict[str, torch.Tensor]:
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
        raise WeightsError(f"{subject} holds no state_dict of tensors, but {_listed(foreign)}{remedy}")
    if not state:
        raise WeightsError(f"{subject} holds no tensor")
    if unusable := [f"{key} {why}" for key, value in state.items() if (why := _why_unusable(value))]:
        raise WeightsError(f"{subject} holds tensors that cannot be loaded: {_listed(unusable)}")
    return {_clean(key): value for key, value in state.items()}


def _why_unusable(tensor):
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    return "on the meta device" if tensor.is_meta else None


def _clean(key):
    return _AROUND_MODULES.sub(r"\1", _AROUND_MODULES.sub(r"\1", key).removeprefix("module."))


def _listed(keys):
    keys = sorted(keys)
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def log_left_out(subject: str, dropped: Iterable[tuple[str, str]]):
    """One warning for keys of a file that a model does not take: (key, why) of each."""
    reasons = {}
    for key, why in dropped:
        reasons.setdefault(why, []).append(key)
    if reasons:
        parts = "; ".join(f"{_listed(keys)} ({why})" for why, keys in reasons.items())
        _LOGGER.warning("vit_fast: %s: left out: %s", subject, parts)


def prefix_remedy(prefix):
    """What to do where the keys of a state_dict stand under a prefix."""
    return (
        f"; its keys stand under {prefix!r}: pass "
        f"{{k.removeprefix({prefix!r}): v for k, v in state.items() if k.startswith({prefix!r})}}"
    )


def _prefix_hint(state, own):
    """``prefix_remedy`` where most of the model's keys stand under a prefix in the file; the head may be another."""
    first = next(iter(own))
    for key in state:
        prefix = key.removesuffix(first)
        if prefix and prefix != key and 2 * sum(prefix + name in state for name in own) > len(own):
            return prefix_remedy(prefix)
    return ""


def resized_table(subject, table, old_grid, new_grid, policy, num_prefix_tokens):
    """``resize_pos_embed`` of a table out of a file; ``subject`` is what an error speaks of.

    Raises:
        WeightsError: the table does not hold the old grid.
    """
    try:
        return resize_pos_embed(table, old_grid, new_grid, policy, num_prefix_tokens)
    except ValueError as error:
        raise WeightsError(f"{subject} does not fit: {str(error).partition(': ')[2]}") from error


# What a file may lack and a model may be built without: how.
_ABSENT = {
    "head.": "it holds no classifier: num_classes=0 builds a model without one",
    "pre_logits.": "it holds no pre_logits: representation_size=0 builds a model without them",
}


def load_state_dict(model, state, fit=None):
    """Strict load; mismatches of keys, shapes and dtypes are listed in one ``WeightsError`` and nothing is changed.

    A floating dtype may differ from the model's; integers for floats are a mismatch.

    Args:
        state: a state_dict; names of other programs that ``vit_fast.convert`` knows are translated first, and the log
            tells of every key.
        fit: a function of the state_dict under the model's names, which returns the one to load (position tables).
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"vit_fast: state is {type(state).__name__}, expected a state_dict of tensors")
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"vit_fast: {key} of the state is {type(value).__name__}, expected a torch.Tensor")
        if not on_meta and (why := _why_unusable(value)):
            raise WeightsError(f"vit_fast: {key} of the state is {why}, expected a dense tensor with values")
    from . import conversion
    from .google_npz import is_google

    google = is_google(state)
    state = conversion.for_model(model, state)
    if fit is not None:
        state = fit(state)
    own = model.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    dtypes = [
        f"{key} {state[key].dtype} instead of {own[key].dtype}"
        for key in own.keys() & state.keys()
        if state[key].is_floating_point() != own[key].is_floating_point()
    ]
    problems = []
    if missing:
        absent = {part: {key for key in own if key.startswith(part)} for part in _ABSENT}
        hints = [hint for part, hint in _ABSENT.items() if absent[part] and absent[part] <= missing]
        told = hints and missing <= set().union(*absent.values())
        problems.append(f"missing {_listed(missing)}" + (f" ({'; '.join(hints)})" if told else ""))
    if unexpected:
        problems.append(f"unexpected {_listed(unexpected)}")
    if shapes:
        tables = [key for key in ("pos_embed", "positional_embedding") if key in own and key in state]
        rows = any(state[key].shape[-2] != own[key].shape[-2] for key in tables if state[key].dim() == own[key].dim())
        hint = " (old_grid=(rows, columns) says which grid the file's table has)" if rows else ""
        problems.append(f"wrong shape {_listed(shapes)}{hint}")
    if dtypes:
        problems.append(f"wrong dtype {_listed(dtypes)}")
    if problems:
        raise WeightsError(
            f"vit_fast: weights do not fit {type(model).__name__}: {'; '.join(problems)}{_prefix_hint(state, own)}"
        )
    model.load_state_dict(state)
    if google and hasattr(model, "google_weights_loaded"):
        model.google_weights_loaded()
    return model


def load_checkpoint(model, path, old_grid=None):
    """Loads a file into a model; a position embedding of another grid is resized.

    Args:
        model: a ``VisionTransformer``, or a model of ``vit_fast.systems``, which its family's ``load`` serves.
        path: a file of ``read_state_dict``: timm's keys, or those of a program that ``vit_fast.convert`` knows. The log
            says at level INFO what became of every key, and as a warning what was left out.
        old_grid: (rows, columns) of the file's position embedding; default the model's own grid where the count is the
            same, else a square.
    Raises:
        WeightsError: unreadable file, or keys or shapes that do not fit (listed).
    """
    family = type(model).__module__
    if family.startswith("vit_fast.systems."):
        return sys.modules[family].load(model, path, **({} if old_grid is None else {"old_grid": old_grid}))

    def fit(state):
        table, own = state.get("pos_embed"), model.pos_embed
        if table is None or own is None or table.dim() != 3 or (old_grid is None and table.shape == own.shape):
            return state
        grid, subject = model.patch_embed.grid_size, f"vit_fast: pos_embed of {str(path)!r}"
        table = resized_table(subject, table, old_grid, grid, model.pos_embed_policy, model._pos_prefix)
        return {**state, "pos_embed": table}

    return load_state_dict(model, read_state_dict(path), fit)


SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # in front of model names that timm's hub functions look up

# The constructor words that change what a state_dict of timm's holds, by timm's names.
_SHAPING_WORDS = (
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token", "pos_embed", "no_embed_class", "reg_tokens",
    "pre_norm", "final_norm", "fc_norm",
)  # fmt: skip


def _import_timm(what):
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"vit_fast: {what} needs timm: pip install vit-fast[timm]") from error
    except RuntimeError as error:  # torchvision, whose operators are built for one torch
        raise ImportError(
            f"vit_fast: {what} needs timm, which fails to import ({error}); install torch and torchvision in one step"
        ) from error
    return timm


def config_of(name, cache_dir=None):
    """(pretrained_cfg, architecture, constructor words) that the config.json of a hub or folder model tells.

    Raises:
        ImportError: timm is not installed, or too old to read folders.
        WeightsError: there is no such config, or it cannot be downloaded.
    """
    hub = _import_timm(repr(name)).models._hub
    source, _, place = name.partition(":")
    reader = "load_model_config_from_path" if source == "local-dir" else "load_model_config_from_hf"
    if not hasattr(hub, reader):
        raise ImportError(f"vit_fast: {name!r} needs a timm that has {reader}: pip install -U timm")
    words = {"cache_dir": cache_dir} if cache_dir is not None and source != "local-dir" else {}
    try:
        return getattr(hub, reader)(place, **words)
    except Exception as error:
        # What huggingface_hub raises without network, repository or permission has no common class.
        raise WeightsError(
            f"vit_fast.create_model: the config of {name!r} cannot be had through timm: {error}"
        ) from error


def load_pretrained(model, name, architecture, cfg, words, cache_dir=None):
    """timm's weights of a ``pretrained_cfg``, adapted by timm to ``words`` (num_classes, in_chans, img_size, ...).

    Raises:
        ImportError: timm is not installed.
        WeightsError: timm has no such weights, or they cannot be downloaded.
    """
    timm = _import_timm("pretrained=True")
    known = {key: words[key] for key in _SHAPING_WORDS if key in words}
    if cache_dir is not None:
        known["cache_dir"] = cache_dir
    try:
        source = timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg or None, **known)
    except Exception as error:
        raise WeightsError(
            f"vit_fast.create_model: pretrained weights of {name!r} cannot be had through timm: {error}. "
            "They are downloaded from the Hugging Face hub; without network pass checkpoint_path=FILE."
        ) from error
    return load_state_dict(model, source.state_dict())
