"""The dtype of the weights: LayerNorm and LayerScale are folded into the projections, and nothing is quantised.

Five launches a block (``kernels/prepared_blocks.py``). Outputs differ from the unprepared model's by the rounding of
the folded weights, and are held to the same budget. A block that no stack describes runs linear layer by linear layer
(``kernels/prepared_linear.py``), in float32 too; nothing is folded there.
"""

from collections.abc import Sequence

import torch

from vit_fast.block_params import BlockParams
from vit_fast.kernels import arguments, folding, packing, reference
from vit_fast.kernels.block_options import PLAIN, BlockOptions

from .base import Kernels, Precision, folding_arguments, norms_to_fold
from .packed import PACKED


class Folded(Precision):
    """``precision=None``."""

    name = None
    operation = "prepared_blocks"
    linear = "prepared_linear"
    linear_dtypes = (torch.float32, torch.float16, torch.bfloat16)
    record = folding.FoldedBlock
    variant, graphed_variant = "prepared", "graphed"

    def form(self, backend: str) -> Precision:
        return PACKED if backend == "cpu" else self

    def forms(self) -> tuple[Precision, ...]:
        return self, PACKED

    def not_supported_reasons(self, weights: Sequence[torch.Tensor], by_parts: bool = False) -> list[str]:
        reasons = super().not_supported_reasons(weights, by_parts)
        kinds = {(weight.device.type, weight.dtype) for weight in weights}
        if reasons and not by_parts and kinds == {("cpu", torch.float32)}:
            reasons.append("float32 is for a CPU with its C++ library (run `vit-fast build`)")
        return reasons

    def fold(self, params: BlockParams) -> folding.FoldedBlock:
        return folding.prepare_block(*folding_arguments(params), **norms_to_fold(params))

    def pack(self, weight: torch.Tensor) -> packing.PackedWeight:
        return packing.prepared_weight(weight)

    def check(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        arguments.check_prepared_blocks(x, weights)

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
        out: torch.Tensor = reference.prepared_blocks(x, weights, num_heads, scale, activation, eps1, eps2, options)
        return out

    def kernels(self) -> Kernels:
        from vit_fast.kernels import prepared_blocks

        return Kernels(prepared_blocks.prepared_blocks, prepared_blocks.not_supported_reasons)


FOLDED = Folded()
