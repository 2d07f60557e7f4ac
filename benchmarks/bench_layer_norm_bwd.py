"""layer_norm, forward and backward: [B, N, C] over the last axis, gradients of x, weight and bias.

Run: pytest benchmarks/bench_layer_norm_bwd.py --benchmark-only
No matrix product: FLOPs 0. Bytes 5·B·N·C elements: x and the output forward; the gradient, x and dx backward.
Baseline: eager, torch.nn.functional.layer_norm and autograd.
"""

import pytest
import torch
from bench_layer_norm import PROVIDERS as FORWARD


def _trained(layer_norm):
    def run(grad, x, weight, bias, eps):
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            return torch.autograd.grad(layer_norm(*leaves, eps), leaves, grad.clone())[0]

    return run


PROVIDERS = {name: _trained(layer_norm) for name, layer_norm in FORWARD.items()}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_layer_norm_bwd(compare, shape, provider):
    s = shape
    compare(
        f"layer_norm forward and backward {s}",
        PROVIDERS,
        provider,
        lambda: (s.random(s.B, s.N, s.C), s.random(s.B, s.N, s.C), s.random(s.C), s.random(s.C), 1e-6),
        0,
    )
