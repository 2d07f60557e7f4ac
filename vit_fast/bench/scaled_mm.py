"""The float8 baseline: timm's model whose block linears (qkv, proj, fc1, fc2) multiply in float8, in plain PyTorch.

A weight is quantised to e4m3 once, each row by its largest absolute value; the activations that it multiplies are
quantised the same way in every call. So no calibration data is needed, as with
``vit_fast.prepare(precision="fp8")``. torch._scaled_mm multiplies with its fast accumulation, applies the scales and
adds the bias; with scales by row it can write bfloat16 only. torch.compile fuses the quantisation with the operations
before it. ``plain`` is the same model with products in float32.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from vit_fast.kernels.folding import E4M3

_LINEARS = ("qkv", "proj", "fc1", "fc2")
_LARGEST = torch.finfo(E4M3).max


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [..., K], float32 [..., 1]): x ≈ e4m3 · scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).to(E4M3), scale


def _scaled_product(x, weight, x_scale, weight_scale, bias):
    return torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _plain_product(x, weight, x_scale, weight_scale, bias):
    out = F.linear(x.float(), weight.float()) * x_scale * weight_scale
    return (out if bias is None else out + bias).to(torch.bfloat16)


class ScaledLinear(nn.Module):
    """A linear layer in float8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))
        self.product = _scaled_product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = quantise_rows(x.flatten(0, -2))
        out = self.product(rows, self.weight, scale, self.scale, self.bias)
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


def quantised(model: nn.Module) -> nn.Module:
    """A copy of a timm model with its block linears in float8; raises ValueError where it has none."""
    model = copy.deepcopy(model)
    blocks = getattr(model, "blocks", nn.Module())
    for module in list(blocks.modules()):
        for name, child in module.named_children():
            if name in _LINEARS and type(child) is nn.Linear:
                setattr(module, name, ScaledLinear(child))
    if not any(isinstance(module, ScaledLinear) for module in model.modules()):
        raise ValueError("the model has no block linears to quantise")
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy of a quantised model that multiplies the same numbers in float32."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            module.product = _plain_product
    return model
