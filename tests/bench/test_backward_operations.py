"""FLOP and bytes of the backward of vit_fast's operators: FLOP as PyTorch counts the reference's, bytes by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit_fast
from vit_fast import ops
from vit_fast.backends import select
from vit_fast.backends.torch import TORCH
from vit_fast.bench import backward_operations
from vit_fast.bench.backward_operations import training_operations

B, N, C, HIDDEN = 2, 5, 32, 48


def gradients_alone(monkeypatch, function, *tensors):
    """(the operations of the backward of ``function``, FLOP of the reference's backward as PyTorch counts them)"""
    counted = []

    def spy(backward):
        def run(*arguments, **options):
            with FlopCounterMode(display=False) as counter:
                found = backward(*arguments, **options)
            counted.append(counter.get_total_flops())
            return found

        return run

    monkeypatch.setattr(TORCH, "backward", {name: spy(backward) for name, backward in TORCH.backward.items()})
    recorder = backward_operations._TrainingRecorder(torch.nn.Module())
    leaves = [x if x is None else x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    with recorder:
        torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], torch.ones_like(out))
    (call,) = (call for call in recorder.calls if call.operator.startswith("vit_fast::"))
    (flop,) = counted
    return call.operations, flop


def t(*shape):
    return torch.randn(shape)


NORM = (t(C), t(C))
CASES = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b), (t(B, N, C), *NORM)),
    "layer_norm_linear": (
        lambda x, w, b, v, c: ops.layer_norm_linear(x, w, b, 1e-6, v, c), (t(B, N, C), *NORM, t(HIDDEN, C), t(HIDDEN)),
    ),
    "layer_norm_linear gelu": (
        lambda x, w, b, v, c: ops.layer_norm_linear(x, w, b, 1e-6, v, c, "gelu"),
        (t(B, N, C), *NORM, t(HIDDEN, C), t(HIDDEN)),
    ),
    "linear_residual": (ops.linear_residual, (t(B, N, C), t(HIDDEN, C), t(HIDDEN), t(HIDDEN), t(B, N, HIDDEN))),
    "linear_residual plain": (ops.linear_residual, (t(B, N, C), t(HIDDEN, C), None, None, t(B, N, HIDDEN))),
    "layernorm_mlp": (
        lambda x, w, b, w1, b1, w2, b2, s: ops.layernorm_mlp(x, w, b, 1e-6, w1, b1, w2, b2, "gelu", s),
        (t(B, N, C), *NORM, t(HIDDEN, C), t(HIDDEN), t(C, HIDDEN), t(C), t(C)),
    ),
    "layernorm_mlp swiglu again": (
        lambda x, w1, w2: ops.layernorm_mlp(x, None, None, 1e-6, w1, None, w2, None, "swiglu", None, recompute=True),
        (t(B, N, C), t(2 * HIDDEN, C), t(C, HIDDEN)),
    ),
    "patch_embed": (
        lambda *tensors: ops.patch_embed(*tensors, 4), (t(B, 3, 8, 8), t(C, 3, 4, 4), t(C), t(1, 4, C), None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flop_is_what_pytorch_counts(name, monkeypatch):
    """Of the closed formulas of the reference, which compute the same products."""
    operations, counted = gradients_alone(monkeypatch, CASES[name][0], *CASES[name][1])
    assert sum(operation.flop for operation in operations) == counted
    assert bool(counted) == (name != "layer_norm") and all(operation.bytes > 0 for operation in operations)


def test_flop_of_attention_is_that_of_five_products(monkeypatch):
    """PyTorch's count of its own operator, and the same products of heads of another size."""
    qkv = t(B, 2 * N, 3 * C)
    (found,), counted = gradients_alone(monkeypatch, lambda qkv: ops.attention(qkv, 4, 0.3), qkv)
    assert found.flop == 10 * B * (2 * N) ** 2 * C and counted in (0, found.flop)
    moved = 4 * B * 2 * N * (C + 2 * 3 * C + C + 4)  # grad, qkv and dqkv, out, LSE of 4 heads
    assert found.bytes == moved
    tensors = t(B, N, C), t(B, 2 * N, C), t(B, 2 * N, 2 * C)
    (found,), _ = gradients_alone(monkeypatch, lambda q, k, v: ops.attention(q, 4, 0.3, k=k, v=v), *tensors)
    assert found.flop == 2 * B * N * 2 * N * (3 * C + 2 * 2 * C)


def test_bytes_by_hand(monkeypatch):
    function, tensors = CASES["layernorm_mlp"]
    found, _ = gradients_alone(monkeypatch, function, *tensors)
    rows, x, hidden, weight = B * N, 4 * B * N * C, 4 * B * N * HIDDEN, 4 * HIDDEN * C
    assert [(o.name, o.bytes) for o in found] == [
        ("column_sums", x + 4 * C),
        ("layer_norm", x + 8 * C + x),
        ("column_sums", 2 * x + 4 * C),  # gamma ∘ g
        ("linear", x + weight + 3 * hidden),  # dz and h from it, W2 and z
        ("linear", x + hidden + weight),  # dW′ of fc2
        ("layer_scale", 2 * weight + 4 * C + weight + 8 * C),
        ("linear", hidden + weight + x),  # the gradient of LN(x)
        ("layer_norm", x + x + 4 * C + 8 * rows + x + x + 8 * C),
        ("linear", hidden + x + weight),
        ("column_sums", hidden + 4 * HIDDEN),
    ]


def test_a_frozen_parameter_costs_nothing(monkeypatch):
    x, weight = t(B, N, C), t(HIDDEN, C)
    (product,), counted = gradients_alone(
        monkeypatch, lambda x: ops.linear_residual(x, weight, None, None, torch.zeros(B, N, HIDDEN)), x
    )
    assert product.flop == counted == 2 * B * N * HIDDEN * C


def test_products_of_pytorch_s_backward_count_as_pytorch_counts():
    """Where the backend ``torch`` runs the reference: a convolution, attention, and linear layers."""
    model = vit_fast.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10).train()
    pixels = torch.randn(2, 3, 32, 32)
    kinds = backward_operations.by_kind(training_operations(model, pixels))
    with vit_fast.backend("torch"), FlopCounterMode(display=False) as counter:
        model(pixels).sum().backward()
    attention = (4 + 10) * 2 * 5 * 5 * 192  # which PyTorch does not count on a CPU
    assert sum(flop for _, flop, _ in kinds.values()) == counter.get_total_flops() + attention
    assert kinds["attention"][1] == attention and next(iter(kinds)) == "linear"


def test_a_training_step(monkeypatch):
    """Twice the forward's products in the backward, but for the pixels' gradient, and scores computed again."""
    monkeypatch.setattr(select, "choose", lambda *call, **options: "triton")
    model = vit_fast.create_model("vit_tiny_patch16_224", depth=2, num_classes=10).train()
    calls = training_operations(model, torch.empty(2, 3, 224, 224))
    flop = {part: 0 for part in ("forward", "backward")}
    attention = patches = 0
    for call in calls:
        part = "backward" if call.operator.endswith("_bwd") else "forward"
        for operation in call.operations:
            if call.operator.startswith("vit_fast::"):
                flop[part] += operation.flop
            attention += operation.flop if operation.name == "attention" and part == "forward" else 0
            patches += operation.flop if operation.name == "patch_embed" and part == "forward" else 0
    assert flop["backward"] == 2 * flop["forward"] + attention // 2 - patches
    assert not any(p.grad is not None for p in model.parameters())
    assert {f"vit_fast::{name}_bwd" for name in TORCH.backward} <= set(backward_operations._BACKWARD)
