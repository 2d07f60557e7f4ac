"""float8 e4m3: what the four projections of a block multiply; attention and the residual keep the weights' dtype.

Seven launches a block (``kernels/fp8_blocks.py``). Every scale follows from the weights: no data is needed. A CPU
emulates the products, a GPU needs capability 8.9. Each product errs by some 5 % of its spread. A block that no stack
describes runs linear layer by linear layer, with a step for each token that is found as it passes
(``kernels/prepared_linear.py``).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from vit_fast.block_params import BlockParams
from vit_fast.kernels import arguments, folding, packing, reference
from vit_fast.kernels.block_options import PLAIN, BlockOptions
from vit_fast.parity import FLOAT8_BUDGET

from .base import Kernels, Precision, folding_arguments, norms_to_fold

_CAPABILITY = (8, 9)


class Float8(Precision):
    """``precision="fp8"``."""

    name = "fp8"
    operation = "fp8_blocks"
    linear = "fp8_linear"
    record = folding.Float8Block
    products = "float8"
    budget = FLOAT8_BUDGET
    variant, graphed_variant = "fp8", "fp8-graphed"

    def fold(self, params: BlockParams) -> folding.Float8Block:
        return folding.fp8_block(*folding_arguments(params), params.activation, **norms_to_fold(params))

    def pack(self, weight: torch.Tensor) -> packing.PackedWeight:
        return packing.fp8_weight(weight)

    def check(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        arguments.check_fp8_blocks(x, weights)

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
        out: torch.Tensor = reference.fp8_blocks(x, weights, num_heads, scale, activation, eps1, eps2, options)
        return out

    def kernels(self) -> Kernels:
        from vit_fast.kernels import fp8_blocks

        return Kernels(fp8_blocks.fp8_blocks, fp8_blocks.not_supported_reasons)

    def product_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return folding.E4M3

    def product(self, a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
        one = torch.ones((), device=a.device)
        return partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    def why_emulated(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "float8 products need a GPU of capability 8.9"
        lacks = _lacks(device)
        return lacks and f"float8 products need {lacks}"

    def device_reasons(self, device: torch.device) -> list[str]:
        lacks = _lacks(device) if device.type == "cuda" else None
        return [f"float8 needs {lacks}"] if lacks else []


def _lacks(device: torch.device) -> str | None:
    """The capability that a CUDA device would need, and the one that it has, or None where that is enough."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _CAPABILITY:
        return None
    needed, found = (".".join(map(str, pair)) for pair in (_CAPABILITY, capability))
    return f"capability {needed}, {device} has {found}"


FP8 = Float8()
