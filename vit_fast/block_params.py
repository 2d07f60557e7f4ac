"""The weights of a transformer block under one set of names, read by the fused branches and by weight folding."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import nn


class Norm(NamedTuple):
    """A LayerNorm or an RMSNorm: weight and bias [C] or None, eps."""

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
        """The parameters of a LayerNorm or RMSNorm of any library; None for an ``nn.Identity``.

        An RMSNorm has no bias as a rule; its eps, which transformers calls variance_epsilon, may be None in torch's:
        then it is that of the dtype, float32's for a 16-bit one.
        """
        if isinstance(module, nn.Identity):
            return None
        parameters = module._parameters
        weight, eps = parameters.get("weight"), module.__dict__.get("variance_epsilon")
        if eps is None and (eps := module.eps) is None:
            dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
            eps = torch.finfo(dtype).eps
        return cls(weight, parameters.get("bias"), eps)


class BlockParams(NamedTuple):
    """What a block needs: weights as ``nn.Linear`` holds them, [out, in].

    ``norm`` is the kind of all norms, "layer" or "rms". ``inner_norm`` normalises the hidden activations before fc2,
    ``out_norm`` what attention puts out before proj; None where there is none.
    """

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
    norm: str = "layer"
    inner_norm: Norm | None = None
    out_norm: Norm | None = None
