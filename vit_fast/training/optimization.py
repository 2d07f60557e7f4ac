"""How weights are updated: timm's optimisers and schedules, autocast, loss scaling and gradient clipping."""

import contextlib
import difflib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from vit_fast.bench.errors import require

from .errors import TrainingError
from .settings import Settings

SCHEDULES = ("cosine", "tanh", "step", "poly", "wsd", "rsqrt", "constant")


def check(settings: Settings) -> None:
    """Refuses an optimiser or a schedule that timm does not have."""
    known = require("timm.optim", "train").list_optimizers()
    if settings.opt not in known:
        near = difflib.get_close_matches(settings.opt, known, n=5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise TrainingError(f"--opt is {settings.opt!r}, expected one of timm's {len(known)} optimisers{hint}")
    if settings.sched not in SCHEDULES:
        raise TrainingError(f"--sched is {settings.sched!r}, expected one of {', '.join(SCHEDULES)}")
    if settings.warmup_epochs >= settings.epochs:
        raise TrainingError(
            f"--warmup-epochs is {settings.warmup_epochs}, expected fewer than the {settings.epochs} of --epochs"
        )


def optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """timm's optimiser of the parameters that are trained; biases and norms are not decayed."""
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {}
    if settings.opt_eps is not None:
        options["eps"] = settings.opt_eps
    if settings.opt_betas is not None:
        options["betas"] = settings.opt_betas
    try:
        return create_optimizer_v2(
            model,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            layer_decay=settings.layer_decay,
            **options,
        )
    except (TypeError, ValueError, AttributeError, AssertionError, ImportError, IndexError) as error:
        told = "".join(f", {name} {value}" for name, value in options.items())
        raise TrainingError(f"--opt: {settings.opt!r}{told} cannot be made: {error}") from error


def scheduler(adapted: torch.optim.Optimizer, settings: Settings, updates: int) -> tuple[Any, int]:
    """(timm's schedule, which takes a step after each update; epochs of the whole run).

    Args:
        updates: of an epoch.
    """
    from timm.scheduler import create_scheduler_v2

    found, epochs = create_scheduler_v2(
        adapted,
        sched=settings.sched,
        num_epochs=settings.epochs,
        decay_epochs=settings.decay_epochs if settings.sched == "step" else None,
        cooldown_epochs=settings.cooldown_epochs,
        decay_rate=settings.decay_rate,
        min_lr=settings.min_lr,
        warmup_lr=settings.warmup_lr,
        warmup_epochs=settings.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    if found is None:
        raise TrainingError(f"--sched is {settings.sched!r}, which this release of timm does not have")
    found.step_update(0)
    return found, epochs


class Updates:
    """Backward passes and the update behind the last of them.

    float16 under autocast has its loss scaled (``torch.amp.GradScaler``): an update whose gradients overflow is left
    out, and the scale becomes smaller.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        from timm.utils import NativeScaler

        self.settings, self.device = settings, device
        self.dtype = getattr(torch, settings.amp_dtype) if settings.amp_dtype else None
        self.scaler = NativeScaler(device.type) if self.dtype == torch.float16 else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def backward(
        self, loss: torch.Tensor, adapted: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], update: bool
    ) -> None:
        """Adds the gradients of a loss; then clips them, updates the parameters and drops the gradients, if told."""
        from timm.utils import dispatch_clip_grad

        clip, mode = self.settings.clip_grad, self.settings.clip_mode
        if self.scaler is not None:
            self.scaler(loss, adapted, clip, mode, parameters, need_update=update)
        else:
            loss.backward()
            if update:
                if clip is not None:
                    dispatch_clip_grad(parameters, clip, mode)
                adapted.step()
        if update:
            adapted.zero_grad(set_to_none=True)
