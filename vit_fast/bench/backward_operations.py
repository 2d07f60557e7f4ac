"""The operations of a training step: forward and backward of a model, each with its FLOP and its compulsory traffic.

Conventions are those of ``operations``. The functions below tell what the backward of vit_fast's operators launches on
the backend ``triton``, products of PyTorch's included: each takes the arguments of an operator
``vit_fast::<op>_bwd`` by name and yields (name, a parameter or None, FLOP, bytes). A gradient that is not wanted costs
nothing, and what only it needs is not counted. "column_sums" are sums over rows (``kernels.column_sums``),
"layer_scale" the gradients of LayerScale from dW′ (``kernels.linear_bwd``).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vit_fast.fake_tensors import without_shared_caches

from .operations import Call, Recorder, moved_bytes

_Found = Iterator[tuple[str, torch.Tensor | None, int, int]]


class _Wanted:
    """Which gradients of the tensors named are wanted; what they write."""

    def __init__(self, a: dict[str, Any], *names: str) -> None:
        self.tensors = {name: a[name] for name, need in zip(names, a["needs"], strict=True) if need}
        self.tensors = {name: t for name, t in self.tensors.items() if t is not None}

    def __call__(self, *names: str) -> bool:
        return any(name in self.tensors for name in names)

    def bytes(self, *names: str) -> int:
        """Bytes of the gradients of these tensors."""
        return sum(moved_bytes(self.tensors[name]) for name in names if name in self.tensors)


def _norm_bwd(a, wanted, x, weight, bias, dy, stat, past=0):
    """The backward of a norm whose incoming gradient has ``dy`` bytes; ``past``: bytes of a gradient that is added."""
    if wanted(x, weight, bias):
        read = dy + moved_bytes(a[x], a[weight]) + 2 * stat + (past if wanted(x) else 0)
        yield "layer_norm", a[weight], 0, read + wanted.bytes(x, weight, bias)


def _rows(t):
    return t.numel() // t.shape[-1]


def _layer_norm(a: dict[str, Any]) -> _Found:
    wanted = _Wanted(a, "x", "weight", "bias")
    yield from _norm_bwd(a, wanted, "x", "weight", "bias", moved_bytes(a["grad"]), moved_bytes(a["saved0"]))


def _norm_again(x, weight, bias, normal):
    return "layer_norm", weight, 0, moved_bytes(x, weight, bias) + normal


def _product_behind_norm(a, wanted, weight, bias, dz, normal, past=0):
    """dx, dweight and dbias of LN(x) Wᵀ + b, from dz of so many bytes."""
    x, w = a["x"], a[weight]
    flop = 2 * _rows(x) * w.numel()
    if wanted("x", "ln_weight", "ln_bias"):
        yield "linear", w, flop, dz + moved_bytes(w) + normal
        yield from _norm_bwd(a, wanted, "x", "ln_weight", "ln_bias", normal, moved_bytes(a["saved0"]), past)
    if wanted(weight):
        yield "linear", w, flop, dz + normal + wanted.bytes(weight)
    if wanted(bias):
        yield "column_sums", a[bias], 0, dz + wanted.bytes(bias)


def _layer_norm_linear(a: dict[str, Any]) -> _Found:
    wanted = _Wanted(a, "x", "ln_weight", "ln_bias", "weight", "bias")
    x, weight, rows = a["x"], a["weight"], _rows(a["x"])
    normal, dz = x.numel() * weight.element_size(), rows * weight.shape[0] * weight.element_size()
    if a["activation"] is not None or wanted("weight"):
        yield _norm_again(x, a["ln_weight"], a["ln_bias"], normal)
    if a["activation"] is not None:
        yield "linear", weight, 2 * rows * weight.numel(), normal + moved_bytes(weight, a["bias"]) + dz
        yield "activation", None, 0, moved_bytes(a["grad"]) + 2 * dz
    yield from _product_behind_norm(a, wanted, "weight", "bias", dz, normal)


def _branch(a, wanted, weight, bias, dropout_p):
    """The incoming gradient behind drop path and dropout, and its column sums."""
    grad, w = a["grad"], a[weight]
    sums = wanted(bias) or (wanted("gamma") and a[bias] is not None)
    changed = a["row_scale"] is not None or dropout_p > 0 or grad.dtype != w.dtype
    if changed or sums:
        written = grad.numel() * w.element_size() if changed else 0
        yield "column_sums", a[bias], 0, moved_bytes(grad, a["row_scale"]) + written + (4 * grad.shape[-1] * sums)


def _behind_gamma(a, weight):
    """The gradient of a product behind LayerScale."""
    if a["gamma"] is not None:
        written = a["grad"].numel() * a[weight].element_size()
        yield "column_sums", a["gamma"], 0, moved_bytes(a["grad"], a["row_scale"], a["gamma"]) + written


def _parameters(a, wanted, weight, bias, g, hidden):
    """dweight, dbias and dgamma of gamma ∘ (hidden Wᵀ + b), from g and hidden of so many bytes."""
    w, gamma = a[weight], a["gamma"]
    if wanted(weight) or (gamma is not None and wanted("gamma")):
        product = 4 * w.numel() if gamma is not None else wanted.bytes(weight)
        yield "linear", w, 2 * _rows(a["grad"]) * w.numel(), g + hidden + product
    if gamma is not None and wanted(weight, bias, "gamma"):
        read = 4 * w.numel() + moved_bytes(gamma) + (moved_bytes(w) if wanted("gamma") else 0)
        yield "layer_scale", gamma, 0, read + wanted.bytes(weight, bias, "gamma")


def _linear_residual(a: dict[str, Any]) -> _Found:
    wanted = _Wanted(a, "x", "weight", "bias", "gamma", "row_scale", "inner_weight", "inner_bias")
    x, weight, rows = a["x"], a["weight"], _rows(a["x"])
    normal, g = x.numel() * weight.element_size(), a["grad"].numel() * weight.element_size()
    flop, inner = 2 * rows * weight.numel(), a["inner_eps"] is not None
    yield from _branch(a, wanted, "weight", "bias", a["dropout_p"])
    of_inner = wanted("x", "inner_weight", "inner_bias")
    if inner and (of_inner or wanted("weight", "gamma", "row_scale")):
        yield _norm_again(x, a["inner_weight"], a["inner_bias"], normal)
    yield from _parameters(a, wanted, "weight", "bias", g, normal)
    if wanted("row_scale"):
        yield "linear", weight, flop, normal + moved_bytes(weight, a["bias"], a["grad"]) + wanted.bytes("row_scale")
    if of_inner:
        written = normal if inner else wanted.bytes("x")
        yield from _behind_gamma(a, "weight")
        yield "linear", weight, flop, g + moved_bytes(weight) + written
        if inner:
            yield from _norm_bwd(a, wanted, "x", "inner_weight", "inner_bias", normal, 4 * rows)


def _layernorm_mlp(a: dict[str, Any]) -> _Found:
    wanted = _Wanted(
        a, "x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "gamma", "row_scale", "inner_weight", "inner_bias"
    )
    x, w1, w2, rows = a["x"], a["w1"], a["w2"], _rows(a["x"])
    normal, size = x.numel() * w1.element_size(), w1.element_size()
    g, z, hidden = x.numel() * size, rows * w1.shape[0] * size, rows * w2.shape[1] * size
    yield from _branch(a, wanted, "w2", "b2", a["out_dropout_p"])
    of_fc1, of_hidden = wanted("x", "ln_weight", "ln_bias", "w1", "b1"), wanted("w2", "gamma", "row_scale")
    of_inner, inner = wanted("inner_weight", "inner_bias"), a["inner_eps"] is not None
    missing = a["saved2"].numel() == 0 and (of_fc1 or of_hidden or of_inner)
    if missing or wanted("w1"):
        yield _norm_again(x, a["ln_weight"], a["ln_bias"], normal)
    if missing:
        yield "linear", w1, 2 * rows * w1.numel(), normal + moved_bytes(w1, a["b1"]) + z
    if inner and (of_fc1 or of_inner or of_hidden):
        yield "activation", None, 0, z + hidden
        yield _norm_again_of_hidden(a, hidden)
    if of_fc1 or of_inner:
        yield from _behind_gamma(a, "w2")
        read = g + moved_bytes(w2)
        if inner:
            yield "linear", w2, 2 * rows * w2.numel(), read + hidden
            moved = 2 * hidden + moved_bytes(a["inner_weight"]) + 8 * rows + wanted.bytes("inner_weight", "inner_bias")
            yield "layer_norm", a["inner_weight"], 0, moved + hidden
            yield "activation", None, 0, hidden + 2 * z
        else:
            yield "linear", w2, 2 * rows * w2.numel(), read + 2 * z + (hidden if of_hidden else 0)
    elif of_hidden and not inner:
        yield "activation", None, 0, z + hidden
    yield from _parameters(a, wanted, "w2", "b2", g, hidden)
    if wanted("row_scale"):
        moved = hidden + moved_bytes(w2, a["b2"], a["grad"]) + wanted.bytes("row_scale")
        yield "linear", w2, 2 * rows * w2.numel(), moved
    if of_fc1:
        yield from _product_behind_norm(a, wanted, "w1", "b1", z, normal, past=moved_bytes(a["grad"]))


def _norm_again_of_hidden(a, hidden):
    return "layer_norm", a["inner_weight"], 0, 2 * hidden + moved_bytes(a["inner_weight"], a["inner_bias"])


def _attention(a: dict[str, Any]) -> _Found:
    """Five products: the scores and dP, each by its two operands; dv, dq and dk."""
    q, out = a["qkv"], a["saved0"]
    k, v = a["k"], a["v"]
    keys, of_values = (q if k is None else k).shape[1], out.shape[-1]
    of_scores = of_values if k is None else q.shape[2]
    flop = 2 * q.shape[0] * q.shape[1] * keys * (3 * of_scores + 2 * of_values)
    written = sum(moved_bytes(t) for t, need in zip((q, k, v), a["needs"], strict=False) if need and t is not None)
    yield "attention", None, flop, moved_bytes(a["grad"], q, k, v, out, a["saved1"]) + written


def _patch_embed(a: dict[str, Any]) -> _Found:
    wanted = _Wanted(a, "images", "weight", "bias", "pos_embed", "prefix_tokens")
    images, weight, grad = a["images"], a["weight"], a["grad"]
    places = math.prod((images.shape[2 + i] - weight.shape[2 + i]) // a["stride"][i] + 1 for i in range(2))
    flop = 2 * images.shape[0] * places * weight.numel()
    patches = images.shape[0] * grad.shape[1] * weight[0].numel() * weight.element_size()
    if wanted("images"):
        yield "patch_embed", weight, flop, moved_bytes(grad, weight) + wanted.bytes("images")
    if wanted("weight"):
        yield "im2col", None, 0, moved_bytes(images) + patches
        yield "patch_embed", weight, flop, moved_bytes(grad) + patches + wanted.bytes("weight")
    if wanted("bias", "pos_embed", "prefix_tokens"):
        written = wanted.bytes("bias", "pos_embed", "prefix_tokens")
        yield "column_sums", weight, 0, moved_bytes(grad) + written


_BACKWARD = {
    "vit_fast::attention_bwd": _attention,
    "vit_fast::attention_options_bwd": _attention,
    "vit_fast::layer_norm_bwd": _layer_norm,
    "vit_fast::layer_norm_linear_bwd": _layer_norm_linear,
    "vit_fast::linear_residual_bwd": _linear_residual,
    "vit_fast::layernorm_mlp_bwd": _layernorm_mlp,
    "vit_fast::patch_embed_bwd": _patch_embed,
}


def _of_aten(operator, arguments, inputs):
    """(FLOP, bytes of the results behind the first) of a backward of PyTorch that multiplies; None of another call."""
    if "scaled_dot_product" in operator and operator.endswith("_backward"):
        q, k, v = inputs[1:4]
        return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1]), moved_bytes(k, v)
    if operator == "aten::convolution_backward":
        grad, _, weight = inputs[:3]
        return 2 * grad.numel() * weight[0].numel() * sum(arguments["output_mask"][:2]), 0
    return None


class _TrainingRecorder(Recorder):
    table = Recorder.table | {name: lambda a, _, tell=tell: tell(a) for name, tell in _BACKWARD.items()}

    def _operations(self, operator, arguments, inputs, out, named):
        found = _of_aten(operator, arguments, inputs)
        for operation in super()._operations(operator, arguments, inputs, out, named):
            yield replace(operation, flop=found[0], bytes=operation.bytes + found[1]) if found else operation


def training_operations(model: nn.Module, pixels: torch.Tensor) -> list[Call]:
    """The calls of the forward and backward pass of ``model`` on ``pixels``, as it is (``train`` or ``eval``).

    The loss is the cross-entropy; gradients are those of the parameters that want one. Nothing is computed, and the
    parameters keep the gradients that they have.
    """
    recorder, fake = _TrainingRecorder(model), FakeTensorMode(allow_non_fake_inputs=True)
    pixels = fake.from_tensor(pixels)
    with torch.inference_mode(False), torch.enable_grad(), without_shared_caches(), fake, recorder:
        logits = model(pixels)
        loss = F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return recorder.calls


def by_kind(calls: Iterable[Call]) -> dict[str, tuple[int, int, int]]:
    """{kind of operation: (how many, FLOP, bytes)}, the most FLOP first, then the most bytes."""
    kinds: dict[str, tuple[int, int, int]] = {}
    for operation in (operation for call in calls for operation in call.operations):
        count, flop, moved = kinds.get(operation.name, (0, 0, 0))
        kinds[operation.name] = count + 1, flop + operation.flop, moved + operation.bytes
    return dict(sorted(kinds.items(), key=lambda item: item[1][1:], reverse=True))
