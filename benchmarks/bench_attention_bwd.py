"""attention with its gradient: packed qkv [B, N, 3C] and the gradient of the output [B, N, C] → dqkv [B, N, 3C].

Run: pytest benchmarks/bench_attention_bwd.py --benchmark-only
FLOPs 14·B·N²·C: 4 forward and 10 backward, which computes the scores again. Each provider copies its inputs, so that
autograd may record them, runs the forward, and differentiates it.
Baselines: sdpa, as timm calls it; eager, which writes the scores to memory.
"""

import pytest
import torch
from bench_attention import PROVIDERS as FORWARD


def _with_gradient(attention):
    def run(qkv, grad, heads, scale):
        with torch.inference_mode(False), torch.enable_grad():
            qkv, grad = qkv.clone().requires_grad_(), grad.clone()
            return torch.autograd.grad(attention(qkv, heads, scale), qkv, grad)[0]

    return run


PROVIDERS = {name: _with_gradient(attention) for name, attention in FORWARD.items()}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_attention_bwd(compare, shape, provider):
    s = shape
    compare(
        f"attention and its gradient {s}",
        PROVIDERS,
        provider,
        lambda: (s.random(s.B, s.N, 3 * s.C), s.random(s.B, s.N, s.C), s.H, (s.C // s.H) ** -0.5),
        14 * s.B * s.N**2 * s.C,
    )
