"""The models of ``vit-fast bench --family``: each model family's main preset against its plain PyTorch form.

Plain means this library's backend "torch". Where timm or open_clip has the same model, it runs too, with the same
weights. A family whose outputs are a tuple is compared on the first of them, its logits.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

import vit_fast
from vit_fast.checkpoints import convert_state_dict


@dataclass(frozen=True)
class Family:
    """A preset, its input and its baselines from other libraries."""

    preset: str
    input_size: tuple[int, int, int] = (3, 224, 224)
    timm_name: str | None = None
    open_clip_name: str | None = None


FAMILIES = {
    "clip": Family("ViT-B/16", open_clip_name="ViT-B-16-quickgelu"),
    "deit": Family("deit_base_patch16_224", timm_name="deit_base_patch16_224"),
    "hybrid": Family("ViT-B_16", timm_name="vit_base_patch16_224"),
    "scratch": Family("vit_from_scratch", (3, 8, 8)),
    "lanl": Family("lanl_vit", (1, 400, 100)),
    "t2t": Family("t2t_vit_14"),
}


class Logits(nn.Module):
    """The first output of a model, on a forced backend where one is named."""

    def __init__(self, model: nn.Module, backend: str | None = None) -> None:
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with vit_fast.backend(self.backend) if self.backend else contextlib.nullcontext():
            out = self.model(pixels)
        while isinstance(out, (tuple, list)):
            out = out[0]
        return out


def _timm_peer(name, model):
    state, _ = convert_state_dict(model.state_dict(), "timm")
    peer = timm.create_model(name, num_classes=state["head.weight"].shape[0]).eval()
    peer.load_state_dict(state, strict=True)
    return peer


def _open_clip_peer(name, model):
    import open_clip

    peer = open_clip.create_model(name, pretrained=None).visual.eval()
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer


def contestants(name: str, perturb: Callable[[nn.Module], Any]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """(our model, {baseline: module}) of a family; ``perturb`` moves the fresh parameters in place."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = vit_fast.create_model(family.preset).eval()
    perturb(model)
    baselines: dict[str, nn.Module] = {"torch": Logits(model, "torch")}
    if family.timm_name:
        baselines["timm"] = _timm_peer(family.timm_name, model)
    if family.open_clip_name:
        with contextlib.suppress(ImportError):
            baselines["open_clip"] = _open_clip_peer(family.open_clip_name, model)
    return Logits(model), baselines
