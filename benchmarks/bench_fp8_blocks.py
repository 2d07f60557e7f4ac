"""fp8_blocks: a whole transformer block whose matrix products are taken in float8 e4m3, [B, N, C] → [B, N, C].

Run: pytest benchmarks/bench_fp8_blocks.py --benchmark-only
FLOPs 2·B·N·C·(4·C + 2·F) + 4·B·N²·C, of which attention's are in 16 bits; bytes are those of the inputs and the
output, without tensors that pass between the launches. x is bfloat16, on a CPU too.
Baseline: eager, the same block in PyTorch on the same quantised weights, which multiplies in float32: it is the
reference for correctness, not for speed. For speed compare with ``bench_prepared_blocks``, and with a whole model in
float8 by PyTorch (``vit-fast bench --baselines scaled-mm``).
"""

import pytest
import torch
from vit_fast.kernels import folding, reference

from vit_fast import ops
from vit_fast.precisions import FP8


@pytest.mark.parametrize("provider", ("vit_fast", "eager"))
def bench_fp8_blocks(compare, shape, provider):
    s = shape
    device = s.random(1).device
    if device.type == "cuda" and (missing := FP8.why_emulated(device)):
        pytest.skip(missing)
    providers = {
        "vit_fast": lambda x, *weights: ops.fp8_blocks(x, list(weights), *s.block_arguments),
        "eager": lambda x, *weights: reference.fp8_blocks(x, weights, *s.block_arguments),
    }

    def make():
        return s.random(s.B, s.N, s.C).to(torch.bfloat16), *folding.fp8_block(*s.block(), "gelu")

    compare(f"fp8_blocks {s}", providers, provider, make, s.block_flops, folding.E4M3)
