"""The two linear layers around attention: layer_norm_linear (LN and qkv) and linear_residual (projection, LayerScale).

Run: pytest benchmarks/bench_linear.py --benchmark-only
layer_norm_linear [B, N, C] → [B, N, 3C]: FLOPs 6·B·N·C²; bytes (4·B·N·C + 3·C² + 5·C) elements.
linear_residual [B, N, C] → [B, N, C]: FLOPs 2·B·N·C²; bytes (3·B·N·C + C² + 2·C) elements.
Baseline: eager, one PyTorch call a step, as timm's block.
"""

import pytest
import torch.nn.functional as F

from vit_fast import ops


def _eager_layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias):
    return F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps), weight, bias)


def _eager_linear_residual(x, weight, bias, gamma, residual):
    return residual + F.linear(x, weight, bias) * gamma


LAYER_NORM_LINEAR = {"vit_fast": ops.layer_norm_linear, "eager": _eager_layer_norm_linear}
LINEAR_RESIDUAL = {"vit_fast": ops.linear_residual, "eager": _eager_linear_residual}


@pytest.mark.parametrize("provider", LAYER_NORM_LINEAR)
def bench_layer_norm_linear(compare, shape, provider):
    s = shape

    def make():
        norm = (s.random(s.C), s.random(s.C), 1e-6)
        return s.random(s.B, s.N, s.C), *norm, s.random(3 * s.C, s.C, scale=s.C**-0.5), s.random(3 * s.C)

    compare(f"layer_norm_linear {s}", LAYER_NORM_LINEAR, provider, make, 6 * s.B * s.N * s.C**2)


@pytest.mark.parametrize("provider", LINEAR_RESIDUAL)
def bench_linear_residual(compare, shape, provider):
    s = shape

    def make():
        weight = s.random(s.C, s.C, scale=s.C**-0.5)
        return s.random(s.B, s.N, s.C), weight, s.random(s.C), s.random(s.C), s.random(s.B, s.N, s.C)

    compare(f"linear_residual {s}", LINEAR_RESIDUAL, provider, make, 2 * s.B * s.N * s.C**2)
