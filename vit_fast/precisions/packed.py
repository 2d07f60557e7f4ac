"""The dtype of the weights on a CPU with its extension: folded weights, packed as its kernels read them.

The form of ``precision=None`` where the backend ``cpu`` runs. One call runs a stack of blocks
(``csrc/cpu/prepared_blocks.h``); between the products all is float32. Outputs differ from the unprepared model's by the
rounding of the folded weights, and are held to the same budget.
"""

from collections.abc import Sequence

import torch

from vit_fast.block_params import BlockParams
from vit_fast.kernels import arguments, packing, reference
from vit_fast.kernels.block_options import PLAIN, BlockOptions

from .base import Precision, folding_arguments, norms_to_fold


class Packed(Precision):
    """``precision=None`` on a CPU."""

    name = None
    operation = "packed_blocks"
    linear = "packed_linear"
    record = packing.PackedBlock
    weight_dtypes = (torch.float32, torch.float16, torch.bfloat16)
    variant, graphed_variant = "prepared", "graphed"

    def fold(self, params: BlockParams) -> packing.PackedBlock:
        return packing.packed_block(*folding_arguments(params), params.activation, **norms_to_fold(params))

    def pack(self, weight: torch.Tensor) -> packing.PackedWeight:
        return packing.packed_weight(weight)

    def check(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        arguments.check_packed_blocks(x, weights)

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
        out: torch.Tensor = reference.packed_blocks(x, weights, num_heads, scale, activation, eps1, eps2, options)
        return out


PACKED = Packed()
