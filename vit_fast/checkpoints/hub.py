"""Weights and configs from the Hugging Face hub or a folder, through timm."""

from collections.abc import Mapping
from typing import Any

from .errors import WeightsError
from .loading import Model, load_state_dict

SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # in front of model names that timm's hub functions look up

# The arguments that change what a state_dict of timm's holds, by timm's names.
_SHAPING_ARGUMENTS = (
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token", "pos_embed", "no_embed_class", "reg_tokens",
    "pre_norm", "final_norm", "fc_norm",
)  # fmt: skip


def import_timm(what: str) -> Any:
    """The module timm; ImportError where it is not installed, naming ``what`` needs it."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"vit_fast: {what} needs timm: pip install vit-fast[timm]") from error
    except RuntimeError as error:  # torchvision, whose operators are built for one torch
        raise ImportError(
            f"vit_fast: {what} needs timm, which fails to import ({error}); install torch and torchvision in one step"
        ) from error
    return timm


def config_of(name: str, cache_dir: str | None = None) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(pretrained_cfg, architecture, keyword arguments) that the config.json of a hub or folder model tells.

    Raises:
        ImportError: timm is not installed, or too old to read folders.
        WeightsError: there is no such config, or it cannot be downloaded.
    """
    hub = import_timm(repr(name)).models._hub
    source, _, place = name.partition(":")
    reader = "load_model_config_from_path" if source == "local-dir" else "load_model_config_from_hf"
    if not hasattr(hub, reader):
        raise ImportError(f"vit_fast: {name!r} needs a timm that has {reader}: pip install -U timm")
    options = {"cache_dir": cache_dir} if cache_dir is not None and source != "local-dir" else {}
    try:
        return getattr(hub, reader)(place, **options)
    except Exception as error:
        # What huggingface_hub raises without network, repository or permission has no common class.
        raise WeightsError(
            f"vit_fast.create_model: the config of {name!r} cannot be had through timm: {error}"
        ) from error


def load_pretrained(
    model: Model,
    name: str,
    architecture: str,
    cfg: Mapping[str, Any],
    arguments: Mapping[str, Any],
    cache_dir: str | None = None,
) -> Model:
    """Loads timm's weights of a ``pretrained_cfg`` into a model.

    Args:
        name: the model's, for errors.
        architecture: timm's name of the model, without a tag.
        arguments: what the model was built with; timm adapts the weights to num_classes, in_chans, img_size, ...
    Returns:
        the model.
    Raises:
        ImportError: timm is not installed.
        WeightsError: timm has no such weights, or they cannot be downloaded.
    """
    timm = import_timm("pretrained=True")
    known = {key: arguments[key] for key in _SHAPING_ARGUMENTS if key in arguments}
    if cache_dir is not None:
        known["cache_dir"] = cache_dir
    try:
        source = timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg or None, **known)
    except Exception as error:
        # As above: timm passes on what huggingface_hub raises.
        raise WeightsError(
            f"vit_fast.create_model: pretrained weights of {name!r} cannot be had through timm: {error}. "
            "They are downloaded from the Hugging Face hub; without network pass checkpoint_path=FILE."
        ) from error
    return load_state_dict(model, source.state_dict())
