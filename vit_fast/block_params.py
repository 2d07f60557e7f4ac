"""The weights of a transformer block under one set of names, read by the fused branches and by weight folding."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import nn


class Norm(NamedTuple):
    """A LayerNorm: weight and bias [C] or None, eps."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    @overload
    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm: ...
    @overload
    @classmethod
    def of(cls, module: nn.Module) -> Norm | None: ...
    @classmethod
    def of(cls, module: Any) -> Norm | None:
        """The parameters of an ``nn.LayerNorm``; None for an ``nn.Identity``."""
        return None if isinstance(module, nn.Identity) else cls(module.weight, module.bias, module.eps)


class BlockParams(NamedTuple):
    """What a block needs: weights as ``nn.Linear`` holds them, [out, in]."""

    norm1: Norm | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None
    norm2: Norm | None
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None
    num_heads: int
    scale: float
    activation: str = "gelu"
    gamma1: torch.Tensor | None = None
    gamma2: torch.Tensor | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    value_skip: bool | str = False
