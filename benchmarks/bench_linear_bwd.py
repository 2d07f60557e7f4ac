"""The two linear layers around attention, forward and backward: layer_norm_linear and linear_residual, all gradients.

Run: pytest benchmarks/bench_linear_bwd.py --benchmark-only
FLOPs three times those of ``bench_linear``: the forward's product, and two in the backward.
Baseline: eager, one PyTorch call a step, as timm's block, and autograd.
"""

import pytest
import torch
from bench_linear import LAYER_NORM_LINEAR, LINEAR_RESIDUAL


def _trained(forward, eps_at=None):
    """``forward`` with its gradients of all tensors; ``eps_at`` is the place of its eps."""

    def run(grad, *tensors):
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in tensors]
            arguments = leaves if eps_at is None else [*leaves[:eps_at], 1e-6, *leaves[eps_at:]]
            return torch.autograd.grad(forward(*arguments), leaves, grad.clone())[0]

    return run


NORM_PROVIDERS = {name: _trained(forward, eps_at=3) for name, forward in LAYER_NORM_LINEAR.items()}
RESIDUAL_PROVIDERS = {name: _trained(forward) for name, forward in LINEAR_RESIDUAL.items()}


@pytest.mark.parametrize("provider", NORM_PROVIDERS)
def bench_layer_norm_linear_bwd(compare, shape, provider):
    s = shape

    def make():
        weight, bias = s.random(3 * s.C, s.C, scale=s.C**-0.5), s.random(3 * s.C)
        return s.random(s.B, s.N, 3 * s.C), s.random(s.B, s.N, s.C), s.random(s.C), s.random(s.C), weight, bias

    title = f"layer_norm_linear forward and backward {s}"
    compare(title, NORM_PROVIDERS, provider, make, 18 * s.B * s.N * s.C**2)


@pytest.mark.parametrize("provider", RESIDUAL_PROVIDERS)
def bench_linear_residual_bwd(compare, shape, provider):
    s = shape

    def make():
        grad, x, residual = (s.random(s.B, s.N, s.C) for _ in range(3))
        return grad, x, s.random(s.C, s.C, scale=s.C**-0.5), s.random(s.C), s.random(s.C), residual

    title = f"linear_residual forward and backward {s}"
    compare(title, RESIDUAL_PROVIDERS, provider, make, 6 * s.B * s.N * s.C**2)
