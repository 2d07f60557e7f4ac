"""attention: packed qkv [B, N, 3C] → [B, N, C].

Run: pytest benchmarks/bench_attention.py --benchmark-only
FLOPs 4·B·N²·C (q kᵀ and p v). Bytes 4·B·N·C elements: qkv read, output written.
Baselines: sdpa, as timm calls it (views, scaled_dot_product_attention, a copy back to [B, N, C]); eager, which
writes the scores to memory.
"""

import pytest
import torch.nn.functional as F

from vit_fast import ops


def _heads(qkv, heads):
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _eager(qkv, heads, scale):
    q, k, v = _heads(qkv, heads)
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)


def _sdpa(qkv, heads, scale):
    q, k, v = _heads(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


PROVIDERS = {"vit_fast": ops.attention, "sdpa": _sdpa, "eager": _eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_attention(compare, shape, provider):
    s = shape
    compare(
        f"attention {s}",
        PROVIDERS,
        provider,
        lambda: (s.random(s.B, s.N, 3 * s.C), s.H, (s.C // s.H) ** -0.5),
        4 * s.B * s.N**2 * s.C,
    )
