"""layer_norm: [B, N, C] over the last axis.

Run: pytest benchmarks/bench_layer_norm.py --benchmark-only
No matrix product: FLOPs 0. Bytes (2·B·N·C + 2·C) elements: x read, output written, weight and bias.
Baseline: eager, torch.nn.functional.layer_norm.
"""

import pytest
import torch.nn.functional as F

from vit_fast import ops


def _eager(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


PROVIDERS = {"vit_fast": ops.layer_norm, "eager": _eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_layer_norm(compare, shape, provider):
    s = shape
    compare(
        f"layer_norm {s}",
        PROVIDERS,
        provider,
        lambda: (s.random(s.B, s.N, s.C), s.random(s.C), s.random(s.C), 1e-6),
        0,
    )
