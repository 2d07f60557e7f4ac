"""patch_embed, forward and backward: gradients of all but the pixels, of which that of the weight is compared.

Run: pytest benchmarks/bench_patch_embed_bwd.py --benchmark-only
FLOPs twice those of ``bench_patch_embed``: the forward's product, and that of the weight's gradient.
Baseline: eager, as timm, and autograd.
"""

import pytest
import torch
from bench_patch_embed import PROVIDERS as FORWARD


def _trained(patch_embed):
    def run(grad, images, *arguments):
        *tables, stride = arguments
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in tables]
            out = patch_embed(images.clone(), *leaves, stride)
            return torch.autograd.grad(out, leaves, grad.clone())[0]

    return run


PROVIDERS = {name: _trained(patch_embed) for name, patch_embed in FORWARD.items()}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_patch_embed_bwd(compare, shape, provider):
    s = shape
    patches, taps = (s.side // s.P) ** 2, 3 * s.P**2

    def make():
        weight = s.random(s.C, 3, s.P, s.P, scale=taps**-0.5)
        tables = (s.random(s.C), s.random(1, patches, s.C), s.random(1, 1, s.C))
        return s.random(s.B, patches + 1, s.C), s.random(s.B, 3, s.side, s.side), weight, *tables, s.P

    title = f"patch_embed forward and backward {s}"
    compare(title, PROVIDERS, provider, make, 4 * s.B * patches * taps * s.C)
