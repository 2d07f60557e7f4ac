"""What a precision is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vit_fast.block_params import BlockParams
from vit_fast.kernels.block_options import PLAIN, BlockOptions
from vit_fast.kernels.packing import PackedWeight
from vit_fast.parity import Budget

# The module of timm's block that the fields of a record are made of, by the first word of their name. The scale of the
# normalised x serves both LayerNorms, and belongs to no module.
_MODULES = {"norm": "", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "hidden": "mlp.fc1", "fc2": "mlp.fc2"}


class Kernels(NamedTuple):
    """The Triton kernels of an operation on prepared blocks."""

    run: Callable[..., torch.Tensor]  # (x, weights, num_heads, scale, activation, eps1, eps2, options)
    not_supported_reasons: Callable[..., list[str]]  # (x, weights, num_heads, options): why they cannot run a call


class Precision:
    """One way to prepare a stack of transformer blocks for inference, and what is true of models that run this way.

    Attributes:
        name: the word for ``vit_fast.prepare(model, precision=...)``; None for the dtype of the weights.
        operation: the operation of ``ops`` that runs a stack, and its operator ``torch.ops.vit_fast.<operation>``.
        linear: the operation of ``ops`` that runs one linear layer of a block which no stack describes; None without,
            for the reason ``no_linear``.
        record: the named tuple of the tensors of a block (``kernels.folding``).
        weight_dtypes: the dtypes of models that it can prepare; linear_dtypes: of blocks that ``linear`` runs, where
            these are others.
        products: what the matrix products multiply, in words; None where it is the dtype of the weights.
        budget: how far the outputs may be from float64; None where they are held to eager PyTorch (``parity``).
        variant, graphed_variant: its names on the command line, alone and as CUDA graphs (None where no GPU runs it).
    """

    name: str | None
    operation: str
    linear: str | None = None
    no_linear = "the precision has no form for single linear layers"
    record: type[Any]
    weight_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    linear_dtypes: tuple[torch.dtype, ...] | None = None
    products: str | None = None
    budget: Budget | None = None
    variant: str
    graphed_variant: str | None

    def form(self, backend: str) -> "Precision":
        """The precision as it is prepared for a backend; its name stays."""
        return self

    def forms(self) -> "tuple[Precision, ...]":
        """All that ``form`` may return."""
        return (self,)

    def fold(self, params: BlockParams) -> tuple[torch.Tensor, ...]:
        """The record of a block."""
        raise NotImplementedError

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """The weight [out, in] of one linear layer for the operation ``linear``."""
        raise NotImplementedError

    def check(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        """Raises TypeError or ValueError where tokens x do not fit the tensors of a stack."""
        raise NotImplementedError

    def reference(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        num_heads: int,
        scale: float,
        activation: str,
        eps1: float,
        eps2: float,
        options: BlockOptions = PLAIN,
    ) -> torch.Tensor:
        """The operation in plain PyTorch: x [B, N, C] through the blocks whose tensors ``weights`` lists."""
        raise NotImplementedError

    def kernels(self) -> Kernels | None:
        """The Triton kernels of the operation, imported here and not before; None where the reference runs."""
        return None

    def product_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """What the matrix products of a model with such weights multiply: the roofline peak that it is held against."""
        return weight_dtype

    def product(self, a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A call that multiplies a bᵀ of matrices in ``product_dtype`` by PyTorch: the roofline is measured with it."""
        return partial(F.linear, a, b)

    def why_emulated(self, device: torch.device) -> str | None:
        """Why a device has no matrix product of ``product_dtype``, so that PyTorch emulates it, or None."""
        return None

    def device_reasons(self, device: torch.device) -> list[str]:
        """Why the operation cannot run on a device at all; empty where it can."""
        return []

    def not_supported_reasons(self, weights: Sequence[torch.Tensor], by_parts: bool = False) -> list[str]:
        """Why blocks with these weights of their projections cannot be prepared; empty where they can. ``by_parts``:
        each linear layer alone."""
        reasons, dtypes = [], {weight.dtype for weight in weights}
        able = self.linear_dtypes if by_parts and self.linear_dtypes else self.weight_dtypes
        if dtypes - set(able) or len(dtypes) > 1:
            came = ", ".join(sorted(map(_dtype_name, dtypes)))
            wanted = " or ".join(f"all {_dtype_name(dtype)}" for dtype in able)
            remedy = f"model.to({able[-1]})"
            reasons.append(f"the weights are {came}, folding is for {wanted} ({remedy})")
        return reasons + self.device_reasons(weights[0].device)

    def modules(self) -> tuple[str, ...]:
        """Which module of a block (timm's names) each tensor of a record is made of; "" for a tensor of none."""
        return tuple(_MODULES[field.partition("_")[0]] for field in self.record._fields)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def folding_arguments(p: BlockParams) -> tuple[Any, ...]:
    """The parameters of a block as the functions of ``folding`` and ``packing`` take them; ``norms_to_fold`` has the
    other norms."""
    assert p.norm1 is not None and p.norm2 is not None  # ``prepare`` refuses blocks without
    return (
        p.norm1[:2], (p.qkv_weight, p.qkv_bias), (p.proj_weight, p.proj_bias), p.gamma1,
        p.norm2[:2], (p.fc1_weight, p.fc1_bias), (p.fc2_weight, p.fc2_bias), p.gamma2,
    )  # fmt: skip


def norms_to_fold(p: BlockParams) -> dict[str, Any]:
    """The kind of a block's norms, and the parameters of those inside its branches."""
    return dict(
        norm=p.norm,
        out_norm=None if p.out_norm is None else p.out_norm[:2],
        inner_norm=None if p.inner_norm is None else p.inner_norm[:2],
    )
