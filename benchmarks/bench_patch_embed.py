"""patch_embed: images [B, 3, side, side] → [B, N, C], one class token, position embedding.

Run: pytest benchmarks/bench_patch_embed.py --benchmark-only
n = (side/P)² patches. FLOPs 6·B·n·P²·C. Bytes (3·B·side² + B·(n + 1)·C + 3·P²·C + n·C + 2·C) elements.
Baseline: eager, as timm: convolution, transposition, position embedding, concatenation.
"""

import pytest
import torch
import torch.nn.functional as F

from vit_fast import ops


def _eager(images, weight, bias, pos_embed, prefix_tokens, stride):
    tokens = F.conv2d(images, weight, bias, stride).flatten(2).transpose(1, 2) + pos_embed
    return torch.cat([prefix_tokens.expand(images.shape[0], -1, -1), tokens], dim=1)


PROVIDERS = {"vit_fast": ops.patch_embed, "eager": _eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_patch_embed(compare, shape, provider):
    s = shape
    patches, taps = (s.side // s.P) ** 2, 3 * s.P**2

    def make():
        weight = s.random(s.C, 3, s.P, s.P, scale=taps**-0.5)
        tables = (s.random(s.C), s.random(1, patches, s.C), s.random(1, 1, s.C))
        return s.random(s.B, 3, s.side, s.side), weight, *tables, s.P

    compare(f"patch_embed {s}", PROVIDERS, provider, make, 2 * s.B * patches * taps * s.C)
