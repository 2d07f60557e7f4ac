"""Weights for a benchmark without trained ones: three kinds, the same in every run.

``random``      timm's initial weights with every parameter moved, so that none hides a fault (``parity.perturb``)
``initial``     timm's initial weights alone
``structured``  what training leaves in weights and random draws lack, and quantisation is sensitive to. Against the
                initial weights: the scales of the channels of each LayerNorm are log-normal (deviation 0.5), its biases
                normal (deviation 0.1); the columns of each linear layer have norms by a power law (the k-th of a random
                order k^-0.5, the norm of the matrix kept); in each LayerNorm the same few channels, one in 96, are
                outliers, with 8 times the scale
"""

import torch
from torch import nn

from vit_fast import parity

KINDS = ("random", "initial", "structured")
_OUTLIERS = 96  # channels an outlier


def fill(model: nn.Module, kind: str, seed: int = 0) -> None:
    """Changes timm's initial weights of a model, in place, to one of ``KINDS``."""
    if kind == "random":
        parity.perturb(model)
    elif kind == "structured":
        _structure(model, torch.Generator().manual_seed(seed))


def _structure(model, draw):
    outliers: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                width = module.weight.numel()
                if width not in outliers:
                    outliers[width] = torch.randperm(width, generator=draw)[: max(1, width // _OUTLIERS)]
                module.weight.mul_((0.5 * torch.randn(width, generator=draw)).exp())
                module.weight[outliers[width]] *= 8
                if module.bias is not None:
                    module.bias.add_(torch.randn(width, generator=draw), alpha=0.1)
            elif isinstance(module, nn.Linear):
                columns = module.weight.shape[1]
                norms = (1.0 + torch.randperm(columns, generator=draw)) ** -0.5
                module.weight.mul_(norms * (columns / norms.square().sum()).sqrt())
