"""int8: what the four projections of a block multiply on a CPU; the residual and statistics stay in float, and so does
attention, which the CPU extension multiplies in bfloat16 where the processor can, and in int16 where it has VNNI alone.

Weights have a scale for each output, activations a step and a zero point for each token, found as they pass; before
that each input gets a gain, whose inverse is in the weight (``packing.input_gain``). No data is needed. The CPU
extension runs a stack of blocks in one call (``csrc/cpu/prepared_blocks.h``); without it plain PyTorch computes the
same, slowly.
"""

from collections.abc import Sequence

import torch

from vit_fast.block_params import BlockParams
from vit_fast.kernels import arguments, packing, reference
from vit_fast.kernels.block_options import PLAIN, BlockOptions
from vit_fast.parity import INT8_BUDGET

from .base import Precision, folding_arguments, norms_to_fold


class Int8(Precision):
    """``precision="int8"``."""

    name = "int8"
    operation = "int8_blocks"
    linear = "int8_linear"
    record = packing.Int8Block
    weight_dtypes = (torch.float32, torch.float16, torch.bfloat16)
    products = "int8"
    budget = INT8_BUDGET
    variant, graphed_variant = "int8", None

    def fold(self, params: BlockParams) -> packing.Int8Block:
        return packing.int8_block(*folding_arguments(params), params.activation, **norms_to_fold(params))

    def pack(self, weight: torch.Tensor) -> packing.PackedWeight:
        return packing.int8_weight(weight)

    def check(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        arguments.check_int8_blocks(x, weights)

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
        out: torch.Tensor = reference.int8_blocks(x, weights, num_heads, scale, activation, eps1, eps2, options)
        return out

    def product_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def why_emulated(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "int8 products are for a CPU"

    def device_reasons(self, device: torch.device) -> list[str]:
        return [] if device.type == "cpu" else [f"int8 is for a CPU, the weights are on {device}"]


INT8 = Int8()
