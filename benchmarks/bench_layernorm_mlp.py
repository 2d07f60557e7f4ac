"""layernorm_mlp: x + gamma·fc2(gelu(fc1(LN(x)))), [B, N, C] → [B, N, C], hidden width F.

Run: pytest benchmarks/bench_layernorm_mlp.py --benchmark-only
FLOPs 4·B·N·C·F. Bytes (2·B·N·C + 2·C·F + F + 4·C) elements: the hidden activations are no compulsory traffic.
Baseline: eager, one PyTorch call a step, as timm's block.
"""

import pytest
import torch.nn.functional as F

from vit_fast import ops


def _eager(x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma):
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps), w1, b1))
    return x + F.linear(hidden, w2, b2) * gamma


PROVIDERS = {"vit_fast": ops.layernorm_mlp, "eager": _eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_layernorm_mlp(compare, shape, provider):
    s = shape

    def make():
        norm = (s.random(s.C), s.random(s.C), 1e-6)
        first = (s.random(s.F, s.C, scale=s.C**-0.5), s.random(s.F))
        second = (s.random(s.C, s.F, scale=s.F**-0.5), s.random(s.C))
        return s.random(s.B, s.N, s.C), *norm, *first, *second, "gelu", s.random(s.C)

    compare(f"layernorm_mlp {s}", PROVIDERS, provider, make, 4 * s.B * s.N * s.C * s.F)
