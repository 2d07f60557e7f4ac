"""prepared_blocks: a whole transformer block on folded weights, [B, N, C] → [B, N, C].

Run: pytest benchmarks/bench_prepared_blocks.py --benchmark-only
FLOPs 2·B·N·C·(4·C + 2·F) + 4·B·N²·C; bytes: inputs and output, not tensors between launches.
Baseline: eager, the same block in PyTorch on the same folded weights. On a CPU the weights are float32, which
``vit_fast.prepare`` does not fold; the benchmark then measures the operation on the torch backend.
"""

import pytest
from vit_fast.kernels import folding, reference

from vit_fast import ops


@pytest.mark.parametrize("provider", ("vit_fast", "eager"))
def bench_prepared_blocks(compare, shape, provider):
    s = shape
    providers = {
        "vit_fast": lambda x, *weights: ops.prepared_blocks(x, list(weights), *s.block_arguments),
        "eager": lambda x, *weights: reference.prepared_blocks(x, weights, *s.block_arguments),
    }

    def make():
        return s.random(s.B, s.N, s.C), *folding.prepare_block(*s.block())

    compare(f"prepared_blocks {s}", providers, provider, make, s.block_flops)
