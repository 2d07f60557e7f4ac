"""layernorm_mlp, forward and backward: x + gamma · fc2(gelu(fc1(LN(x)))), all gradients.

Run: pytest benchmarks/bench_layernorm_mlp_bwd.py --benchmark-only
FLOPs 3·4·B·N·C·F: the forward's two products, and two for each in the backward.
Baseline: eager, one PyTorch call a step, as timm's block, and autograd.
"""

import pytest
import torch
import torch.nn.functional as F

from vit_fast import ops


def _eager(x, ln_weight, ln_bias, w1, b1, w2, b2, gamma):
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, 1e-6), w1, b1))
    return x + F.linear(hidden, w2, b2) * gamma


def _fused(x, ln_weight, ln_bias, w1, b1, w2, b2, gamma):
    return ops.layernorm_mlp(x, ln_weight, ln_bias, 1e-6, w1, b1, w2, b2, "gelu", gamma)


def _trained(forward):
    def run(grad, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            return torch.autograd.grad(forward(*leaves), leaves, grad)[0]

    return run


PROVIDERS = {"vit_fast": _trained(_fused), "eager": _trained(_eager)}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_layernorm_mlp_bwd(compare, shape, provider):
    s = shape

    def make():
        hidden = 4 * s.C
        fc1 = s.random(hidden, s.C, scale=s.C**-0.5), s.random(hidden)
        fc2 = s.random(s.C, hidden, scale=hidden**-0.5), s.random(s.C)
        return s.random(s.B, s.N, s.C), s.random(s.B, s.N, s.C), s.random(s.C), s.random(s.C), *fc1, *fc2, s.random(s.C)

    compare(f"layernorm_mlp forward and backward {s}", PROVIDERS, provider, make, 48 * s.B * s.N * s.C**2)
