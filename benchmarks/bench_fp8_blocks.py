"""fp8_blocks: a whole transformer block whose matrix products are taken in float8 e4m3, [B, N, C] → [B, N, C].

Run: pytest benchmarks/bench_fp8_blocks.py --benchmark-only
FLOPs 2·B·N·C·(4·C + 2·F) + 4·B·N²·C, of which attention's are in 16 bits; bytes as the inputs and the output, so
without what passes between the launches. x is bfloat16, on a CPU too.
Baseline: eager, the same block in PyTorch on the same quantised weights, which multiplies in float32: it is the truth
and no rival. Rivals of float8 are models (``vit-fast bench --rivals scaled-mm``), and ``bench_prepared_blocks``.
"""

import pytest
import torch
from vit_fast.kernels import reference

from vit_fast import ops
from vit_fast.cli import measure


def _words(head_count, width):
    return head_count, (width // head_count) ** -0.5, "gelu", 1e-6, 1e-6


def _vit_fast(heads):
    return lambda x, *weights: ops.fp8_blocks(x, list(weights), *_words(heads, x.shape[2]))


def _eager(heads):
    return lambda x, *weights: reference.fp8_blocks(x, weights, *_words(heads, x.shape[2]))


@pytest.mark.parametrize("provider", ("vit_fast", "eager"))
def bench_fp8_blocks(compare, shape, provider):
    s = shape
    x = s.random(1)
    if x.is_cuda and (missing := measure.float8_missing(x.device)):
        pytest.skip(missing)

    def linear(rows, columns):
        return s.random(rows, columns, scale=columns**-0.5), s.random(rows)

    def make():
        norms = [(1 + s.random(s.C, scale=0.3), s.random(s.C)) for _ in range(2)]
        first = (norms[0], linear(3 * s.C, s.C), linear(s.C, s.C), None)
        second = (norms[1], linear(s.F, s.C), linear(s.C, s.F), None)
        return s.random(s.B, s.N, s.C).to(torch.bfloat16), *reference.fp8_block(*first, *second, "gelu")

    providers = {"vit_fast": _vit_fast(s.H), "eager": _eager(s.H)}
    flops = 2 * s.B * s.N * s.C * (4 * s.C + 2 * s.F) + 4 * s.B * s.N**2 * s.C
    compare(f"fp8_blocks {s}", providers, provider, make, flops, measure.E4M3)
