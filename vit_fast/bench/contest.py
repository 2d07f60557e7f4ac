"""The models of one benchmark, ours and the baselines, with the same weights; their pixels; columns of all rows.

Parity is with timm's model, for a family (``families``) with its plain PyTorch form.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vit_fast
from vit_fast import parity

from . import baselines, machine, measure, models, photographs, weights
from .providers import ENGINES, PLAIN, PRECISION_OF, VARIANTS
from .settings import Settings

PEAK_SECONDS = 2.0  # time that measuring the peak of a matrix product takes


@dataclass
class Contest:
    """Models with the same weights, and their pixels.

    Attributes:
        reference: the model that parity is with.
        ours, baselines: {provider: module}; ``absent``: {provider without a module: the reason}.
        flops: per image.
        facts: columns that all rows share; ``own_facts``: {provider: columns of its own, and those that differ}.
        kernel_cache: folder of Triton's compiled kernels.
    """

    reference: nn.Module
    ours: dict[str, nn.Module]
    baselines: dict[str, Any]
    absent: dict[str, str]
    pixels: torch.Tensor
    flops: int
    facts: dict[str, Any]
    own_facts: dict[str, dict[str, Any]]
    kernel_cache: Path


def provider_names(settings: Settings, contest: Contest) -> tuple[list[str], list[str]]:
    """(ours, baselines), in the order of the rows."""
    ours = [PLAIN] if settings.family else [VARIANTS[name].provider for name in settings.variants]
    return ours, [*(contest.baselines if settings.family else settings.baselines)]


def caller(
    model: Callable[[torch.Tensor], Any],
    pixels: torch.Tensor,
    settings: Settings,
    no_grad: Callable[[], Any] = torch.inference_mode,
) -> Callable[[], Any]:
    """A function that runs the model on the pixels, without gradients and under the autocast of the settings."""

    def call():
        cast = contextlib.nullcontext()
        if settings.amp_dtype:
            cast = torch.autocast(settings.device.type, settings.compute_dtype)
        with no_grad(), cast:
            return model(pixels)

    return call


def graphed(model: nn.Module, batch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of pixels that captures a CUDA graph when it is first called, and then replays it."""
    captured = functools.cache(lambda: vit_fast.graphed(model, batch_sizes=[batch]))
    return lambda pixels: captured()(pixels)


def _family_models(settings):
    """(reference, {provider of ours: module}, baselines, absent) of a family."""
    from . import families

    our_model, others = families.contestants(settings.family, parity.perturb)
    for model in (our_model, *others.values()):
        model.to(settings.device, getattr(torch, settings.precision))
    return others["torch"], {PLAIN: our_model}, others, {}


def _models(settings):
    """(timm's model, {provider of ours: module}, baselines, absent) with the same weights."""
    kwargs = settings.constructor_kwargs()
    torch.manual_seed(0)
    timm_model = models.timm_model(settings.model, settings.pretrained, **kwargs)
    our_model = models.vit_fast_model(settings.model, **kwargs)
    if not settings.pretrained:
        weights.fill(timm_model, settings.weights)
    our_model.load_state_dict(timm_model.state_dict(), strict=True)

    # Parameters keep requires_grad, as in usual inference code: without it, torch runs some products as batched ones.
    def settle(model):
        model.to(settings.device, getattr(torch, settings.precision), memory_format=settings.memory_format)

    settle(timm_model)
    settle(our_model)
    made_here = [name for name in settings.baselines if name not in ENGINES]
    others, absent = baselines.build(made_here, timm_model, settings.device)
    for name, model in others.items():
        if name not in PRECISION_OF:  # .to() would cast its float8 weights to the dtype of the other baselines
            settle(model)
    ours, unsupported = _variants(settings.variants, our_model)
    return timm_model, ours, others, absent | unsupported


def _variants(names, model):
    """({provider: module}, {provider: why it has none}) of our model's variants, each with its own copy of it.

    For a graphed variant this is the prepared model; its graph is captured later, by the first call at a batch size.
    """
    ours, absent = {}, {}
    for variant in map(VARIANTS.get, names):
        try:
            if variant.precision is None:
                ours[variant.provider] = model
            else:
                ours[variant.provider] = vit_fast.prepare(copy.deepcopy(model), precision=variant.precision.name)
        except vit_fast.UnsupportedError as error:
            absent[variant.provider] = str(error)
    return ours, absent


def input_of(reference: Any, settings: Settings) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
    """(height, width, mean, std) of the images that a model takes."""
    if settings.family:
        from .families import FAMILIES

        channels, height, width = FAMILIES[settings.family].input_size
        return height, width, (0.5,) * channels, (0.5,) * channels
    config = reference.pretrained_cfg
    side = (settings.img_size,) * 2 if settings.img_size else config["input_size"][1:]
    height, width = getattr(getattr(reference, "patch_embed", None), "img_size", None) or side
    mean, std = config["mean"], config["std"]
    channels = settings.model_kwargs.get("in_chans", len(mean))
    if channels != len(mean):
        mean = std = (0.5,) * channels
    return height, width, mean, std


def prepare(settings: Settings, seconds_left: Callable[[], float], tell: Any) -> Contest:
    """Makes the models and loads the pixels; measures the peak of a matrix product if there is time for it."""
    kernel_cache = measure.kernel_cache()
    reference, ours, others, absent = (_family_models if settings.family else _models)(settings)
    height, width, mean, std = input_of(reference, settings)
    photos = photographs.load(settings.images, max(settings.batch_sizes), height, width, mean, std)
    for skipped in photos.skipped:
        tell.warn(f"skipped {skipped}")
    dtype = getattr(torch, settings.precision)
    pixels = photos.pixels.to(settings.device, dtype, memory_format=settings.memory_format)
    flops = measure.flops_per_image(reference, pixels)
    peak_of = settings.device if seconds_left() > 10 * PEAK_SECONDS else None
    facts = {
        "model": settings.model,
        "infer_img_size": height if height == width else f"{height}x{width}",
        "infer_gmacs": flops / 2e9,
        "param_count": sum(p.numel() for p in reference.parameters()) / 1e6,
        "precision": settings.precision,
        "amp_dtype": settings.amp_dtype,
        "channels_last": settings.channels_last,
        "weights": "pretrained" if settings.pretrained else settings.weights,
        "images": photos.source,
        "device": str(settings.device),
        "device_name": machine.name(settings.device),
        "cpu_threads": torch.get_num_threads(),
        "load_average": settings.load_average,
        **_product_facts(settings.compute_dtype, peak_of),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": vit_fast.status(settings.device).versions.get("triton"),
        "timm": timm.__version__,
        "vit_fast": vit_fast.__version__,
        "vit_fast_commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    own_facts: dict[str, dict[str, Any]] = {}
    for precision in dict.fromkeys(precision for precision in PRECISION_OF.values() if precision.products):
        names = [name for name, of_name in PRECISION_OF.items() if of_name is precision]
        runs = any(name in ours or name in others for name in names)
        own_facts |= dict.fromkeys(names, _narrow_facts(precision, settings, peak_of if runs else None))
    return Contest(reference, ours, others, absent, pixels, flops, facts, own_facts, kernel_cache)


def _narrow_facts(precision, settings, device):
    """``_product_facts`` of a precision; without a peak where its products are emulated."""
    if precision.why_emulated(settings.device):
        device = None
    return _product_facts(precision.product_dtype(settings.compute_dtype), device, precision.product)


def _product_facts(dtype, device, *product):
    """Columns for the dtype of the products' operands and for their peak, which is not measured without a device."""
    peak, sustained = measure.matmul_peaks(dtype, device, *product) if device else (None, None)
    name = str(dtype).removeprefix("torch.").removesuffix("fn")
    return {"product_dtype": name, "matmul_peak_tflops": peak, "matmul_peak_sustained_tflops": sustained}
