"""The model of a run by name, in vit_fast's form: the weights it begins from, frozen parameters, LoRA adapters."""

import copy
import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vit_fast
from vit_fast import registry
from vit_fast.bench.errors import reason, require
from vit_fast.checkpoints import read_state_dict

from .errors import TrainingError
from .settings import Settings

# What the images of a data set are made for, unless told otherwise: 8 × 8 grey pixels in patches of 4 × 4.
OF_DATASET = {"digits": dict(img_size=8, in_chans=1, patch_size=4)}


def arguments(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of the model's constructor, but for ``num_classes``."""
    given = dict(img_size=settings.img_size, in_chans=settings.in_chans)
    found = OF_DATASET.get(settings.dataset, {}) | {key: value for key, value in given.items() if value is not None}
    rates = dict(drop_rate=settings.drop, drop_path_rate=settings.drop_path)
    return found | {key: rate for key, rate in rates.items() if rate} | settings.model_kwargs


def _known_here(name: str) -> bool:
    return name.startswith(("hf-hub:", "local-dir:")) or name.partition(".")[0] in registry.names()


def make(name: str, warn: Callable[[str], None], /, **kwargs: Any) -> nn.Module:
    """A model of ``vit_fast.create_model``, or any other of timm with what can run fused running fused.

    Args:
        warn: told where nothing of it can.
    """
    timm = require("timm", "train")
    if _known_here(name) or not timm.is_model(name.partition(".")[0]):
        return vit_fast.create_model(name, **kwargs)
    try:
        model = timm.create_model(name, **kwargs)
    except TypeError as error:
        if "img_size" not in kwargs or "'img_size'" not in str(error):
            raise
        kwargs.pop("img_size")  # a convolutional model takes images of any size
        model = timm.create_model(name, **kwargs)
    try:
        return vit_fast.optimize(model)
    except (ValueError, vit_fast.UnsupportedError) as error:
        warn(f"{name} is trained as timm built it: {reason(error)}")
        return model


def check(settings: Settings) -> int:
    """Refuses a model that cannot be made, or that gives no logits; allocates nothing.

    Returns:
        the channels of its images.
    """
    # The true number of classes is known when the data are; any number finds a bad argument.
    kwargs = arguments(settings) | dict(num_classes=settings.num_classes or 2)
    try:
        with torch.device("meta"):
            model: Any = make(settings.model, lambda text: None, **kwargs)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise TrainingError(f"--model: {settings.model!r} cannot be made: {reason(error)}") from error
    if not hasattr(model, "get_classifier") or not hasattr(model, "reset_classifier"):
        raise TrainingError(f"--model: {settings.model!r} has no classifier that could be trained")
    return _input_size(model, settings)[0]


def build(settings: Settings, classes: int, warn: Callable[[str], None]) -> nn.Module:
    """The model with the weights that it begins from, on the CPU, in training mode.

    Args:
        classes: of the data set; the head is new where a checkpoint has another number.
    Raises:
        TrainingError: weights that cannot be had or do not fit, or a pattern of --freeze that no parameter has.
    """
    classes = settings.num_classes or classes
    kwargs = arguments(settings)
    path = settings.initial_checkpoint
    try:
        if path is None:
            model: Any = make(settings.model, warn, pretrained=settings.pretrained, num_classes=classes, **kwargs)
        else:
            theirs = _classes_of(settings, kwargs) or classes
            model = make(settings.model, warn, checkpoint_path=str(path), num_classes=theirs, **kwargs)
            if theirs != classes:
                warn(f"the head is new: {str(path)!r} has {theirs} classes, the data set {classes}")
                model.reset_classifier(classes)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        flag = "--model" if path is None else "--initial-checkpoint"
        raise TrainingError(f"{flag}: {reason(error)}") from error
    model.train()
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)
    _freeze(model, settings)
    return _with_lora(model, settings) if settings.lora_rank else model


def _classes_of(settings: Settings, kwargs: dict[str, Any]) -> int | None:
    """The classes of the head in --initial-checkpoint, where it has the name of the model's head."""
    state = read_state_dict(settings.initial_checkpoint or "")
    with torch.device("meta"):
        model: Any = make(settings.model, lambda text: None, num_classes=2, **kwargs)
    head = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is head), None)
    weight = state.get(f"{name}.weight")
    return None if weight is None else weight.shape[0]


def _head_parameters(model: Any) -> set[nn.Parameter]:
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return {parameter for head in heads for parameter in head.parameters()}


def _freeze(model: nn.Module, settings: Settings) -> None:
    if settings.linear_probe:
        head = _head_parameters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in head)
    for pattern in settings.freeze:
        found = [parameter for name, parameter in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise TrainingError(f"--freeze is {pattern!r}, expected a pattern of the names of parameters of the model")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(f"--freeze is {', '.join(settings.freeze)!r}, expected to leave a parameter to train")


def _with_lora(model: Any, settings: Settings) -> nn.Module:
    """The model with adapters (E. J. Hu et al., 2021, arXiv:2106.09685), which are trained, and so is the head."""
    peft = require("peft", "train")
    head = _head_parameters(model)
    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets)
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(f"--lora-targets is {','.join(settings.lora_targets)!r}: {error}") from error
    for parameter in head:
        parameter.requires_grad_(True)
    return adapted


def plain_state(model: Any) -> dict[str, torch.Tensor]:
    """The state_dict under the names of the model without adapters, which are merged into the weights."""
    if hasattr(model, "merge_and_unload"):  # of peft
        model = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _input_size(model: Any, settings: Settings) -> tuple[int, int, int]:
    from vit_fast.input_size import input_size

    size = input_size(model) or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    channels = arguments(settings).get("in_chans", size[0])
    side = settings.img_size
    return (channels, side, side) if side else (channels, *size[1:])


def data_config(model: Any, settings: Settings) -> dict[str, Any]:
    """What the model's images are: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, as timm's."""
    from timm.data import resolve_data_config

    size = _input_size(model, settings)
    found = resolve_data_config({"input_size": size}, model=model)
    if len(found["mean"]) != size[0]:
        found |= dict(mean=(0.5,) * size[0], std=(0.5,) * size[0])
    if settings.dataset == "digits":
        found["crop_pct"] = 1.0  # whole, as they are trained on
    return found


@torch.no_grad()
def check_logits(model: nn.Module, images: torch.Tensor, classes: int) -> None:
    """Refuses a model whose output in training is no logits [B, classes]."""
    out = model(images)
    if not isinstance(out, torch.Tensor) or out.shape != (len(images), classes):
        got = list(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise TrainingError(f"--model: its output in training is {got}, expected logits {[len(images), classes]}")
