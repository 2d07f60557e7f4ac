"""Weights from files and from timm's hub, always strict: nothing is dropped or left out silently."""

import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from .pos_embed import resize_pos_embed


class WeightsError(ValueError):
    """A weight file that cannot be had, cannot be read, or does not fit the model."""


class MissingKeyError(WeightsError, KeyError):
    """A key that a checkpoint of a known format lacks."""

    __str__ = Exception.__str__


_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".npz")


def _read_npz(path):
    """Arrays by name; bfloat16, which numpy holds as raw two-byte values, becomes float32."""
    import numpy as np

    state = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            array = file[name]
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:
                state[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
            else:
                state[name] = torch.from_numpy(array)
    return state


def read_state_dict(path) -> dict[str, torch.Tensor]:
    """The state_dict in a file: .safetensors, .npz, or .pt/.pth/.bin/.tar; reading it executes nothing.

    Checkpoints that wrap it ("state_dict_ema", "state_dict", "model") are unwrapped, a "module." prefix is stripped.

    Raises:
        TypeError: not a path.
        WeightsError: missing, truncated or foreign file.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"vit_fast: path of a weight file is {type(path).__name__}, expected a str or os.PathLike")
    path = Path(path)
    if not path.is_file():
        came = "is a directory" if path.is_dir() else "does not exist"
        raise WeightsError(f"vit_fast: weight file {str(path)!r} {came}")
    if path.suffix not in _SUFFIXES:
        raise WeightsError(
            f"vit_fast: weight file {str(path)!r} ends in {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}"
        )
    if not path.stat().st_size:
        raise WeightsError(f"vit_fast: weight file {str(path)!r} cannot be read: it is empty")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif path.suffix == ".npz":
            state = _read_npz(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own words advise to execute what the file holds.
        raise WeightsError(
            f"vit_fast: weight file {str(path)!r} cannot be read: it is damaged, or holds Python objects, "
            "expected tensors alone; nothing in it was executed"
        ) from error
    except Exception as error:
        # What torch, numpy and safetensors raise on foreign bytes has no common class.
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise WeightsError(f"vit_fast: weight file {str(path)!r} cannot be read: {cause}") from error
    for wrapper in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise WeightsError(
            f"vit_fast: weight file {str(path)!r} holds no state_dict of tensors, but a {type(state).__name__}"
        )
    foreign = [str(k) for k, v in state.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if foreign:
        raise WeightsError(
            f"vit_fast: weight file {str(path)!r} holds no state_dict of tensors, but {_listed(foreign)}"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def _listed(keys):
    keys = sorted(keys)
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def load_state_dict(model, state):
    """Strict load; mismatches of keys, shapes and dtypes are listed in one ``WeightsError`` and nothing is changed.

    A floating dtype may differ from the model's; integers for floats are a mismatch.

    Names of Google's .npz files and canonical ones (``vit_fast.convert``) are translated first.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"vit_fast: state is {type(state).__name__}, expected a state_dict of tensors")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"vit_fast: {key} of the state is {type(value).__name__}, expected a torch.Tensor")
    from . import convert
    from .systems import google_npz

    google = google_npz.is_google(state)
    if google:
        state = google_npz.for_model(model, state)
    elif convert.is_canonical(state):
        state = convert.canonical_to_timm(state)[0]
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
        problems.append(f"missing {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected {_listed(unexpected)}")
    if shapes:
        problems.append(f"wrong shape {_listed(shapes)}")
    if dtypes:
        problems.append(f"wrong dtype {_listed(dtypes)}")
    if problems:
        raise WeightsError(f"vit_fast: weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)
    if google and hasattr(model, "google_weights_loaded"):
        model.google_weights_loaded()
    return model


def load_checkpoint(model, path):
    """Loads a file into a model; a position embedding of another grid is resized.

    ``VisionTransformer``: timm's keys, Google's .npz or canonical ones. A model of ``vit_fast.systems``: what the
    ``load`` of its family takes.

    Raises:
        WeightsError: unreadable file, or keys or shapes that do not fit (listed).
    """
    family = type(model).__module__
    if family.startswith("vit_fast.systems."):
        return sys.modules[family].load(model, path)
    state = read_state_dict(path)
    table = state.get("pos_embed")
    if table is not None and model.pos_embed is not None and table.dim() == 3 and table.shape != model.pos_embed.shape:
        try:
            state["pos_embed"] = resize_pos_embed(
                table, None, model.patch_embed.grid_size, model.pos_embed_policy, model._pos_prefix
            )
        except ValueError as error:
            raise WeightsError(f"vit_fast: pos_embed of {str(path)!r} does not fit: {error}") from error
    return load_state_dict(model, state)


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
