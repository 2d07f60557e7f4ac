"""Gradients of every operation through the interpreted kernels: the error budget, and layouts of the incoming gradient.

Truth is autograd of the reference in float64 on the same rounded inputs, eager autograd of the reference at the dtype.
What runs is the kernel forward with its saved statistics, and the closed formula of the backward.
"""

import pytest
import torch
from support import properties
from support.budget import assert_within_budget
from vit_fast.kernels import reference

import vit_fast
from vit_fast import ops

pytestmark = pytest.mark.interp
REPLICAS = 12


def _problems(generator):
    """name → (operation, tensors as float64, the arguments between and after them)."""

    def t(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def scales(width):
        return 1 + t(width, scale=0.2)

    x, residual, gate = t(2, 17, 48), t(2, 17, 40), torch.tensor([1.25, 0.0], dtype=torch.float64)
    norm, square = (scales(48), t(48)), t(40, 48, scale=48**-0.5)
    mlp = t(96, 48, scale=48**-0.5), t(96), t(48, 96, scale=96**-0.5), t(48)
    swiglu = t(80, 48, scale=48**-0.5), t(80), t(48, 40, scale=40**-0.5), t(48)
    return {
        "layer_norm": (lambda m, *a: m.layer_norm(*a, 1e-6), (x, *norm)),
        "layer_norm_linear": (
            lambda m, x, w, b, *rest: m.layer_norm_linear(x, w, b, 1e-6, *rest, "gelu"),
            (x, *norm, square, t(40)),
        ),
        "linear_residual": (
            lambda m, *a: m.linear_residual(*a[:-1], row_scale=a[-1]),
            (x, square, t(40), scales(40), residual, gate),
        ),
        "layernorm_mlp": (
            lambda m, x, w, b, w1, b1, w2, b2, gamma: m.layernorm_mlp(x, w, b, 1e-6, w1, b1, w2, b2, "gelu", gamma),
            (x, *norm, *mlp, scales(48)),
        ),
        "layernorm_mlp_swiglu": (
            lambda m, x, w, b, w1, b1, w2, b2, gamma: m.layernorm_mlp(x, w, b, 1e-6, w1, b1, w2, b2, "swiglu", gamma),
            (x, *norm, *swiglu, scales(48)),
        ),
        "layer_norm_rms": (lambda m, x, w: m.layer_norm(x, w, None, 1e-6, norm="rms"), (x, scales(48))),
        "linear_residual_inner_norm": (
            lambda m, x, w, b, residual, *inner: m.linear_residual(x, w, b, None, residual, inner_norm=(*inner, 1e-5)),
            (x, square, t(40), residual, *norm),
        ),
        "layernorm_mlp_geglu_inner_norm": (
            lambda m, x, w, w1, b1, w2, b2, gamma, inner: m.layernorm_mlp(
                x, w, None, 1e-6, w1, b1, w2, b2, "geglu", gamma, norm="rms", inner_norm=(inner, None, 1e-5)
            ),
            (x, scales(48), *swiglu, scales(48), scales(40)),
        ),
        "layer_norm_linear_silu": (
            lambda m, x, w, weight, b: m.layer_norm_linear(x, w, None, 1e-6, weight, b, "silu", norm="rms"),
            (x, scales(48), square, t(40)),
        ),
        "attention": (lambda m, qkv: m.attention(qkv, 3, 0.25), (t(2, 17, 144),)),
        "attention_pooled": (
            lambda m, q, k, v: m.attention(q, 3, 0.25, k=k, v=v),
            (t(2, 5, 48), t(2, 17, 48), t(2, 17, 48)),
        ),
        "attention_options": (
            lambda m, qkv, cos, sin, w, b, bias: m.attention(
                qkv, 3, 0.25, rope=(cos, sin), num_prefix=1, q_norm=(w, b, 1e-5), k_norm=(w, None, 1e-6), bias=bias
            ),
            (t(2, 17, 144), t(16, 16), t(3, 16, 16), scales(16), t(16), t(1, 3, 17, 17)),
        ),
        "patch_embed": (
            lambda m, *a: m.patch_embed(*a, (4, 4)),
            (t(2, 3, 12, 16), t(40, 3, 4, 4, scale=48**-0.5), t(40), t(1, 12, 40), t(1, 2, 40)),
        ),
    }


NAMES = tuple(_problems(torch.Generator()))


def gradients(module, operation, tensors, dtype, grad=None):
    """(gradients of the tensors, the incoming gradient)."""
    leaves = [t.to(dtype).requires_grad_() for t in (t.detach().clone() for t in tensors)]
    out = operation(module, *leaves)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(grad.to(dtype))
    return [leaf.grad for leaf in leaves], grad


def sides(name, seed, dtype):
    """(operation, tensors, incoming gradient, eager's gradients, true gradients)."""
    operation, tensors = _problems(torch.Generator().manual_seed(seed))[name]
    tensors = [t.to(dtype).double() for t in tensors]
    eager, grad = gradients(reference, operation, tensors, dtype)
    golden, _ = gradients(reference, operation, tensors, torch.float64, grad)
    return operation, tensors, grad, eager, golden


@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float32), ids=("float16", "bfloat16", "float32")
)
@pytest.mark.parametrize("name", NAMES)
def test_budget(name, dtype):
    operation, tensors, grad, eager, golden = sides(name, 0, dtype)
    with vit_fast.backend("triton"):
        actual, _ = gradients(ops, operation, tensors, dtype, grad)
    others = [sides(name, seed, dtype)[3:] for seed in range(1, REPLICAS)]
    for i, (a, e, g) in enumerate(zip(actual, eager, golden, strict=True)):
        assert a.is_contiguous()
        replicas = [(eagers[i], goldens[i]) for eagers, goldens in others]
        assert_within_budget(
            a, e, g, kind="gradient", repro=f"{name} {dtype}, argument {i}", expected_zeros=0.6, replicas=replicas
        )


@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_the_incoming_gradient(name):
    operation, tensors, grad, _, golden = sides(name, 0, torch.float64)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with vit_fast.backend("triton"):
        out = operation(ops, *leaves)
        for layout in properties.LAYOUTS[1:]:
            actual = torch.autograd.grad(out, leaves, properties.laid_out(grad, layout), retain_graph=True)
            for a, g in zip(actual, golden, strict=True):
                torch.testing.assert_close(a, g, rtol=1e-9, atol=1e-9, msg=lambda text, at=layout: f"{at}: {text}")
