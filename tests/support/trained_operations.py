"""Gradients of an operation through the Triton kernels themselves, forward and backward, beside those of the reference.

A ``Problem`` names an operation of ``reference`` and its arguments; ``TRAINED`` says, for each operation, how the
kernels' forward is called, what it saves, and how the backward is called. ``eager`` and ``golden`` are autograd of
the reference at the dtype and in float64.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from vit_fast.kernels import reference

SEED, OUT_SEED = 1234567890123, 42
NAMES = {  # the arguments that have gradients, in the order of the backward's results
    "layer_norm": ("x", "weight", "bias"),
    "layer_norm_linear": ("x", "ln_weight", "ln_bias", "weight", "bias"),
    "linear_residual": ("x", "weight", "bias", "gamma", "row_scale", "inner_weight", "inner_bias"),
    "layernorm_mlp": (
        "x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "gamma", "row_scale", "inner_weight", "inner_bias",
    ),
    "patch_embed": ("images", "weight", "bias", "pos_embed", "prefix_tokens"),
}  # fmt: skip


@dataclass
class Problem:
    """An operation, its tensors by name (None: absent), and its words: activation, norm, stride, p, out_p, …"""

    operation: str
    tensors: dict[str, Any]
    words: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype):
        tensors = {n: t if t is None else t.to(dtype) for n, t in self.tensors.items()}
        return Problem(self.operation, tensors, self.words)


NARROW = ("weight", "bias", "w1", "b1", "w2", "b2")  # the weights and biases of products


def mixed(problem, dtype):
    """The problem with products in a 16-bit dtype, all else in float32."""
    tensors = {
        name: t if t is None else t.to(dtype if name in NARROW else torch.float32)
        for name, t in problem.tensors.items()
    }
    return Problem(problem.operation, tensors, problem.words)


def seeds():
    return torch.tensor([SEED]), torch.tensor([OUT_SEED])


def _inner(t, words):
    return (t["inner_weight"], t["inner_bias"], 1e-5) if words.get("inner") else None


def formula(problem):
    """The operation in plain PyTorch on the problem's tensors."""
    t, w, (seed, out_seed) = problem.tensors, problem.words, seeds()
    norm, activation = w.get("norm", "layer"), w.get("activation")
    if problem.operation == "layer_norm":
        return reference.layer_norm(t["x"], t["weight"], t["bias"], 1e-6, norm=norm)
    if problem.operation == "layer_norm_linear":
        return reference.layer_norm_linear(
            t["x"], t["ln_weight"], t["ln_bias"], 1e-6, t["weight"], t["bias"], activation, norm=norm
        )
    if problem.operation == "linear_residual":
        return reference.linear_residual(
            t["x"], t["weight"], t["bias"], t["gamma"], t["residual"], row_scale=t["row_scale"], norm=norm,
            inner_norm=_inner(t, w), dropout_p=w.get("p", 0.0), seed=seed,
        )  # fmt: skip
    if problem.operation == "patch_embed":
        return reference.patch_embed(*(t[name] for name in NAMES["patch_embed"]), w["stride"])
    hidden = reference.layer_norm_linear(
        t["x"], t["ln_weight"], t["ln_bias"], 1e-6, t["w1"], t["b1"], activation, norm=norm
    )
    hidden = reference.dropout(hidden, w.get("p", 0.0), seed)
    return reference.linear_residual(
        hidden, t["w2"], t["b2"], t["gamma"], t["x"], row_scale=t["row_scale"], norm=norm, inner_norm=_inner(t, w),
        dropout_p=w.get("out_p", 0.0), seed=out_seed,
    )  # fmt: skip


def autograd(problem, grad):
    """Gradients of the formula for the incoming ``grad``, by name; those of absent tensors are left out."""
    leaves = {n: t if t is None else t.detach().clone().requires_grad_() for n, t in problem.tensors.items()}
    out = formula(Problem(problem.operation, leaves, problem.words))
    out.backward(grad.to(out.dtype))
    return {n: leaves[n].grad for n in NAMES[problem.operation] if leaves.get(n) is not None}


def forward(problem, tiles=None):
    """(output of the kernels, what their forward saves)"""
    from vit_fast.kernels import layer_norm, layernorm_mlp, linear, patch_embed

    t, w, (seed, out_seed) = problem.tensors, problem.words, seeds()
    norm, activation = w.get("norm", "layer"), w.get("activation")
    if problem.operation == "layer_norm":
        out, *saved = layer_norm.layer_norm_fwd(t["x"], t["weight"], t["bias"], 1e-6, norm=norm)
    elif problem.operation == "layer_norm_linear":
        out, *saved = linear.layer_norm_linear_fwd(
            t["x"], t["ln_weight"], t["ln_bias"], 1e-6, t["weight"], t["bias"], activation, norm=norm
        )
    elif problem.operation == "linear_residual":
        saved = []
        out = linear.linear_residual(
            t["x"], t["weight"], t["bias"], t["gamma"], t["residual"], row_scale=t["row_scale"], norm=norm,
            inner_norm=_inner(t, w), dropout_p=w.get("p", 0.0), seed=seed, config=tiles,
        )  # fmt: skip
    elif problem.operation == "patch_embed":
        saved = []
        out = patch_embed.patch_embed(*(t[name] for name in NAMES["patch_embed"]), w["stride"])
    else:
        out, *saved = layernorm_mlp.layernorm_mlp_fwd(
            t["x"], t["ln_weight"], t["ln_bias"], 1e-6, t["w1"], t["b1"], t["w2"], t["b2"], activation, t["gamma"],
            row_scale=t["row_scale"], norm=norm, inner_norm=_inner(t, w), dropout_p=w.get("p", 0.0), seed=seed,
            out_dropout_p=w.get("out_p", 0.0), out_seed=out_seed, recompute=w.get("recompute", False),
            config=tiles and (tiles, tiles),
        )  # fmt: skip
    return out, saved


def backward(problem, saved, grad, needs=None, tiles=None, **more):
    """The results of the kernels' backward, in order."""
    from vit_fast.kernels import layer_norm_bwd, layernorm_mlp_bwd, linear_bwd, patch_embed_bwd

    t, w, (seed, out_seed) = problem.tensors, problem.words, seeds()
    more |= dict(needs=needs)
    if problem.operation != "patch_embed":
        more |= dict(norm=w.get("norm", "layer"))
    if problem.operation == "layer_norm":
        return layer_norm_bwd.layer_norm_bwd(grad, t["x"], t["weight"], t["bias"], *saved, **more)
    if problem.operation == "layer_norm_linear":
        return linear_bwd.layer_norm_linear_bwd(
            grad, t["x"], t["ln_weight"], t["ln_bias"], 1e-6, t["weight"], t["bias"], w.get("activation"), *saved,
            **more,
        )  # fmt: skip
    if problem.operation == "linear_residual":
        return linear_bwd.linear_residual_bwd(
            grad, t["x"], t["weight"], t["bias"], t["gamma"], t["row_scale"], inner_norm=_inner(t, w),
            dropout_p=w.get("p", 0.0), seed=seed, **more,
        )  # fmt: skip
    if problem.operation == "patch_embed":
        return patch_embed_bwd.patch_embed_bwd(grad, *(t[n] for n in NAMES["patch_embed"]), w["stride"], **more)
    return layernorm_mlp_bwd.layernorm_mlp_bwd(
        grad, t["x"], t["ln_weight"], t["ln_bias"], 1e-6, t["w1"], t["b1"], t["w2"], t["b2"], w["activation"],
        t["gamma"], t["row_scale"], *saved, inner_norm=_inner(t, w), dropout_p=w.get("p", 0.0), seed=seed,
        out_dropout_p=w.get("out_p", 0.0), out_seed=out_seed, config=tiles, **more,
    )  # fmt: skip


def gradients(problem, grad, needs=None, tiles=None, **more):
    """(output, gradients by name) through the kernels' forward and backward."""
    out, saved = forward(problem, tiles)
    return out, named(problem, backward(problem, saved, grad, needs, tiles, **more))


def named(problem, results):
    """The results of a backward by name; those of absent tensors are left out."""
    found = zip(NAMES[problem.operation], results, strict=True)
    return {name: result for name, result in found if problem.tensors.get(name) is not None}


class Trained(torch.autograd.Function):
    """The kernels' forward and backward as one function for gradcheck: of the operation and names, then tensors."""

    @staticmethod
    def forward(ctx, operation, words, names, *tensors):
        problem = Problem(operation, dict(zip(names, tensors, strict=True)), words)
        out, saved = forward(problem)
        ctx.problem, ctx.saved, ctx.names = problem, saved, names
        return out

    @staticmethod
    def backward(ctx, grad):
        results = dict(zip(NAMES[ctx.problem.operation], backward(ctx.problem, ctx.saved, grad), strict=True))
        past = {"residual": grad} if ctx.problem.operation == "linear_residual" else {}
        return None, None, None, *((results | past)[name] for name in ctx.names)


def problems(generator, width=48, features=40, hidden=80, tokens=17):
    """name → Problem in float64: every operation, with and without each option."""

    def t(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def scales(size):
        return 1 + t(size, scale=0.2)

    row_scale = torch.tensor([1.25, 0.5], dtype=torch.float64)
    x, residual = t(2, tokens, width), t(2, tokens, features)
    norm = dict(ln_weight=scales(width), ln_bias=t(width))
    square = dict(weight=t(features, width, scale=width**-0.5), bias=t(features))
    inner = dict(inner_weight=scales(width), inner_bias=t(width))
    no_inner = dict(inner_weight=None, inner_bias=None)

    def mlp(gated=False, **more):
        rows = 2 * hidden if gated else hidden
        made = dict(
            x=x, **norm, w1=t(rows, width, scale=width**-0.5), b1=t(rows), w2=t(width, hidden, scale=hidden**-0.5),
            b2=t(width), gamma=scales(width), row_scale=None, **no_inner,
        )  # fmt: skip
        return made | more

    branch = dict(x=x, **square, gamma=scales(features), residual=residual, row_scale=row_scale, **no_inner)
    of_hidden = dict(inner_weight=scales(hidden), inner_bias=t(hidden))
    found = {
        "layer_norm": Problem("layer_norm", dict(x=x, weight=scales(width), bias=t(width))),
        "layer_norm rms": Problem("layer_norm", dict(x=x, weight=scales(width), bias=None), dict(norm="rms")),
        "layer_norm bare": Problem("layer_norm", dict(x=x, weight=None, bias=None)),
        "layer_norm_linear": Problem("layer_norm_linear", dict(x=x, **norm, **square)),
        "layer_norm_linear gelu": Problem("layer_norm_linear", dict(x=x, **norm, **square), dict(activation="gelu")),
        "layer_norm_linear swiglu rms": Problem(
            "layer_norm_linear", dict(x=x, **norm, **square) | dict(ln_bias=None, bias=None),
            dict(activation="swiglu", norm="rms"),
        ),
        "linear_residual": Problem("linear_residual", branch),
        "linear_residual plain": Problem("linear_residual", branch | dict(gamma=None, row_scale=None)),
        "linear_residual bare": Problem("linear_residual", branch | dict(gamma=None, row_scale=None, bias=None)),
        "linear_residual dropout": Problem("linear_residual", branch, dict(p=0.3)),
        "linear_residual inner norm": Problem("linear_residual", branch | inner, dict(inner=True, p=0.2)),
        "linear_residual inner rms": Problem(
            "linear_residual", branch | inner | dict(gamma=None, inner_bias=None), dict(inner=True, norm="rms")
        ),
        "layernorm_mlp": Problem("layernorm_mlp", mlp(), dict(activation="gelu")),
        "layernorm_mlp bare": Problem(
            "layernorm_mlp", mlp(ln_weight=None, ln_bias=None, b1=None, b2=None, gamma=None), dict(activation="relu")
        ),
        "layernorm_mlp no biases": Problem("layernorm_mlp", mlp(b1=None, b2=None), dict(activation="silu")),
        "layernorm_mlp swiglu": Problem("layernorm_mlp", mlp(True), dict(activation="swiglu")),
        "layernorm_mlp geglu rms": Problem(
            "layernorm_mlp", mlp(True, ln_bias=None), dict(activation="geglu", norm="rms")
        ),
        "layernorm_mlp dropouts": Problem(
            "layernorm_mlp", mlp(row_scale=row_scale), dict(activation="gelu_tanh", p=0.3, out_p=0.2)
        ),
        "layernorm_mlp swiglu dropouts": Problem(
            "layernorm_mlp", mlp(True, gamma=None), dict(activation="swiglu", p=0.2, out_p=0.1)
        ),
        "layernorm_mlp recompute": Problem(
            "layernorm_mlp", mlp(), dict(activation="quick_gelu", recompute=True, p=0.1)
        ),
        "layernorm_mlp inner norm": Problem(
            "layernorm_mlp", mlp(True, row_scale=row_scale, **of_hidden), dict(activation="swiglu", inner=True)
        ),
        "layernorm_mlp inner rms": Problem(
            "layernorm_mlp", mlp(**of_hidden | dict(inner_bias=None)),
            dict(activation="gelu", inner=True, norm="rms", p=0.2),
        ),
        "patch_embed": Problem(
            "patch_embed",
            dict(
                images=t(2, 3, 12, 16), weight=t(features, 3, 4, 4, scale=width**-0.5), bias=t(features),
                pos_embed=t(1, 12, features), prefix_tokens=t(1, 2, features),
            ),
            dict(stride=(4, 4)),
        ),
        "patch_embed overlapping": Problem(
            "patch_embed",
            dict(
                images=t(2, 3, 9, 8), weight=t(features, 3, 4, 3, scale=6**-1), bias=t(features), pos_embed=None,
                prefix_tokens=t(2, 1, features),
            ),
            dict(stride=(2, 3)),
        ),
        "patch_embed with gaps": Problem(
            "patch_embed",
            dict(
                images=t(2, 1, 11, 12), weight=t(features, 1, 2, 3, scale=6**-0.5), bias=None,
                pos_embed=t(1, 12, features), prefix_tokens=None,
            ),
            dict(stride=(3, 4)),
        ),
    }  # fmt: skip
    return found
