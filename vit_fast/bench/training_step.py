"""What ``--bench train`` times: the forward and backward pass of a model, alone and with the update of its weights.

The loss is the cross-entropy with fixed labels. The optimiser is AdamW as timm makes it; gradients are dropped after
each call. Every provider trains its own copy of the weights.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .settings import Settings

FORWARD_BACKWARD, STEP = "forward+backward", "step"
# So small that weights stay where they are, however many steps are timed.
LEARNING_RATE = 1e-6


def labels_for(logits: torch.Tensor) -> torch.Tensor:
    """Labels of a batch, the same for all providers."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(logits.shape[1], logits.shape[:1], generator=draw).to(logits.device)


def autocast_of(settings: Settings) -> AbstractContextManager[Any]:
    """The autocast of the settings; nothing without one."""
    if settings.amp_dtype:
        return torch.autocast(settings.device.type, settings.compute_dtype)
    return contextlib.nullcontext()


def loss_of(model: Callable[..., Any], pixels: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The loss under the autocast of the settings, in float32 or more."""
    with autocast_of(settings):
        logits = model(pixels)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels_for(logits))


def calls(
    module: nn.Module, model: Callable[..., Any], pixels: torch.Tensor, settings: Settings
) -> dict[str, Callable[[], torch.Tensor]]:
    """{part: function that does it once and returns the loss}.

    Args:
        module: holds the parameters; model: runs it, perhaps compiled.
    """
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(module, opt="adamw", lr=LEARNING_RATE, weight_decay=0.05)

    def forward_backward() -> torch.Tensor:
        loss = loss_of(model, pixels, settings)
        loss.backward()
        module.zero_grad(set_to_none=True)
        return loss.detach()

    def step() -> torch.Tensor:
        loss = loss_of(model, pixels, settings)
        loss.backward()
        optimizer.step()
        module.zero_grad(set_to_none=True)
        return loss.detach()

    return {FORWARD_BACKWARD: forward_backward, STEP: step}


def gradients(module: nn.Module, pixels: torch.Tensor, settings: Settings) -> dict[str, torch.Tensor]:
    """{name of a parameter: its gradient}."""
    module.zero_grad(set_to_none=True)
    loss_of(module, pixels, settings).backward()
    found = {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found
