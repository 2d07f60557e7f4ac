"""prepared_blocks: a whole transformer block on folded weights, [B, N, C] → [B, N, C].

Run: pytest benchmarks/bench_prepared_blocks.py --benchmark-only
FLOPs 2·B·N·C·(4·C + 2·F) + 4·B·N²·C; bytes as the inputs and the output, so without what passes between the launches.
Baseline: eager, the same block in PyTorch on the same folded weights. On a CPU, where weights are float32 and are not
folded by ``vit_fast.prepare``, it measures the torch backend all the same.
"""

import pytest
from vit_fast.kernels import reference

from vit_fast import ops


def _words(head_count, width):
    return head_count, (width // head_count) ** -0.5, "gelu", 1e-6, 1e-6


def _vit_fast(heads):
    return lambda x, *weights: ops.prepared_blocks(x, list(weights), *_words(heads, x.shape[2]))


def _eager(heads):
    return lambda x, *weights: reference.prepared_blocks(x, weights, *_words(heads, x.shape[2]))


@pytest.mark.parametrize("provider", ("vit_fast", "eager"))
def bench_prepared_blocks(compare, shape, provider):
    s = shape

    def linear(rows, columns):
        return s.random(rows, columns, scale=columns**-0.5), s.random(rows)

    def make():
        norms = [(1 + s.random(s.C, scale=0.3), s.random(s.C)) for _ in range(2)]
        first = (norms[0], linear(3 * s.C, s.C), linear(s.C, s.C), None)
        second = (norms[1], linear(s.F, s.C), linear(s.C, s.F), None)
        return s.random(s.B, s.N, s.C), *reference.prepare_block(*first, *second)

    providers = {"vit_fast": _vit_fast(s.H), "eager": _eager(s.H)}
    flops = 2 * s.B * s.N * s.C * (4 * s.C + 2 * s.F) + 4 * s.B * s.N**2 * s.C
    compare(f"prepared_blocks {s}", providers, provider, make, flops)
