"""prepared_linear, fp8_linear: LayerNorm and qkv of a block on a prepared weight, [B, N, C] → [B, N, 3C].

Run: pytest benchmarks/bench_prepared_linear.py --benchmark-only
FLOPs 6·B·N·C²; bytes: inputs and output, not the tokens between the two launches. In float8 x is bfloat16, on a CPU
too. Baseline: eager, the same layer in PyTorch on the same weight, which in float8 multiplies in float32: it is the
reference for correctness, not for speed. For speed compare with the other operation, and with ``bench_linear``.
"""

import pytest
import torch
from vit_fast.kernels import folding, reference
from vit_fast.kernels.packing import PackedWeight
from vit_fast.kernels.prepared_layer import PreparedLayer

from vit_fast import ops
from vit_fast.precisions import FOLDED, FP8


@pytest.mark.parametrize("provider", ("vit_fast", "eager"))
@pytest.mark.parametrize("precision", (FOLDED, FP8), ids=lambda precision: precision.linear)
def bench_prepared_linear(compare, shape, precision, provider):
    s, narrow = shape, precision is FP8
    device = s.random(1).device
    if narrow and device.type == "cuda" and (missing := FP8.why_emulated(device)):
        pytest.skip(missing)
    dtype = torch.bfloat16 if narrow else s.random(1).dtype
    shaped = torch.empty(3 * s.C, s.C, dtype=dtype, device="meta")

    def fused(x, ln_weight, ln_bias, bias, *tensors):
        weight = PackedWeight(precision.linear, tensors, shaped)
        return ops.layer_norm_linear(x, ln_weight, ln_bias, 1e-6, weight, bias)  # type: ignore[arg-type]

    def eager(x, ln_weight, ln_bias, bias, *tensors):
        return reference.packed_linear(x, PreparedLayer(tensors, bias, 3 * s.C, ln_weight, ln_bias, 1e-6))

    def make():
        weight = precision.pack(s.random(3 * s.C, s.C, scale=s.C**-0.5).to(dtype))
        vectors = (s.random(size).to(dtype) for size in (s.C, s.C, 3 * s.C))
        return s.random(s.B, s.N, s.C).to(dtype), *vectors, *weight.tensors

    peak = (folding.E4M3,) if narrow else ()
    providers = {"vit_fast": fused, "eager": eager}
    compare(f"{precision.linear} {s}", providers, provider, make, 6 * s.B * s.N * s.C**2, *peak)
