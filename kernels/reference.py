"""The operations in plain PyTorch, with the signatures of the kernels.

Three uses: the truth in tests (float64), the backend ``torch`` (called directly where inductor can fuse through it,
and inside the registered operators in training), and, in the ``*_bwd`` functions, the formulas of the gradients in
closed form.
``*_fwd`` functions return, beside the output, what a backward needs: mean and rstd of every row [rows] and the
natural-log LSE [B, H, N], in float32 (float64 for float64 inputs), and of the MLP the pre-activation z.
``*_bwd`` functions take ``needs``, a bool for each result: what is not needed may be None, and costs nothing. They
neither need nor compute again the output of a branch: LayerScale's gradients are taken from those of the scaled
weight (``linear_residual_bwd``).
Arguments are taken as checked (``arguments``). Shapes: B batch, N tokens, C width, H heads, D head size.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation_names import GATED
from .block_options import PLAIN, BlockOptions
from .folding import E4M3, E4M3_MAX, Float8Block, FoldedBlock, unflatten
from .packing import Int8Block, PackedBlock, unpack, unpacked_linears
from .prepared_layer import PreparedLayer
from .tracing import is_transformed, known_values, transform_reasons, untraced

Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps

_ACTIVATION = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "silu": F.silu,
}


def _may_overwrite():
    """Whether a fresh intermediate may be written in place: nothing records it for a backward or a graph."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or transform_reasons())


def _stat_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation of a pre-activation; a gated one halves the last axis: act(first half) · second half."""
    if activation in GATED:
        gate, value = z.chunk(2, dim=-1)
        return _ACTIVATION[GATED[activation]](gate) * value
    return _ACTIVATION[activation](z)


def activate_bwd(grad: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """Gradient with respect to the pre-activation."""
    if activation is None:
        return grad
    if activation in GATED:
        gate, value = z.chunk(2, dim=-1)
        inner = GATED[activation]
        return torch.cat([activate_bwd(grad * value, gate, inner), grad * activate(gate, inner)], dim=-1)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    if activation == "quick_gelu":
        s = torch.sigmoid(1.702 * z)
        return grad * (s + 1.702 * z * s * (1 - s))
    if activation == "relu":
        return grad * (z > 0)
    return torch.ops.aten.silu_backward(grad, z)


_CHUNK = 1 << 14  # numbers of a mask that are drawn at once on a CPU: their words stay in the cache


def keep_mask(seed: Tensor | None, count: int, p: float, device: torch.device) -> Tensor:
    """Which of ``count`` elements dropout keeps, bool [count], drawn by Philox4x32-10 from (seed, index): the numbers
    of ``tl.rand``. This is what dropout and drop path mean on every backend.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    seed = seed.reshape(()).to(device)
    step = _CHUNK if device.type == "cpu" and not torch.compiler.is_compiling() else max(count, 1)
    parts = [
        _uniform(seed, torch.arange(first, min(first + step, count), dtype=torch.int64, device=device)) > p
        for first in range(0, count, step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.bool, device=device)


def dropout_mask(seed: Tensor | None, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Keep-mask / (1 − p), float32, of a tensor whose elements are numbered by their linear index in ``shape``."""
    return (keep_mask(seed, math.prod(shape), p, device).to(torch.float32) / (1 - p)).reshape(shape)


def _uniform(seed, index):
    """The first word of Philox4x32-10 for each counter, as a float32 in [0, 1)."""
    low32 = 0xFFFFFFFF
    c0, c1, c2, c3 = index & low32, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        product_a, product_b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product_b >> 32) & low32) ^ c1 ^ k0,
            product_b & low32,
            ((product_a >> 32) & low32) ^ c3 ^ k1,
            product_a & low32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    signed = torch.where(c0 >= 2**31, c0 - 2**32, c0)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * 4.6566127342e-10


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout from an explicit seed, or from torch's generator where the seed is None."""
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    return x * dropout_mask(seed, x.shape, p, x.device).to(x.dtype)


# layer_norm: y = (x − mean) / sqrt(var + eps) · weight + bias over the last axis. norm "rms" takes 0 for the mean, and
# mean(x²) for var.


def _width(x):
    """The size of the last axis as an int, which ONNX export requires."""
    return x.shape[-1] if torch._C._get_tracing_state() is None else _untraced_width(x)


@untraced
def _untraced_width(x):
    return x.shape[-1]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: str = "layer") -> Tensor:
    if (weight is not None and weight.dtype != x.dtype) or (bias is not None and bias.dtype != x.dtype):
        dtype = torch.promote_types(x.dtype, (weight if weight is not None else bias).dtype)
        return layer_norm(x.to(dtype), _cast(weight, dtype), _cast(bias, dtype), eps, norm=norm).to(x.dtype)
    if is_transformed():
        return _plain_layer_norm(x, weight, bias, eps, norm)
    if norm == "rms":
        return _rms_norm(x, weight, bias, eps)
    return torch.layer_norm(x, (_width(x),), weight, bias, eps)


def _cast(t, dtype):
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _rms_norm(x, weight, bias, eps):
    if bias is None:
        return F.rms_norm(x, (_width(x),), weight, eps)
    wide = _stat_dtype(x)
    return (F.rms_norm(x.to(wide), (_width(x),), _cast(weight, wide), eps) + bias).to(x.dtype)


def _plain_layer_norm(x, weight, bias, eps, norm):
    """``layer_norm`` in plain arithmetic: torch (2.13) has a wrong derivative of F.layer_norm's forward mode."""
    wide = x.to(_stat_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def layer_norm_stats(x: Tensor, eps: float, *, norm: str = "layer") -> tuple[Tensor, Tensor]:
    """mean (0 for "rms") and rstd of every row, each [rows]."""
    rows = x.reshape(-1, x.shape[-1]).to(_stat_dtype(x))
    mean = rows.mean(-1) if norm == "layer" else rows.new_zeros(rows.shape[0])
    return mean, torch.rsqrt((rows - mean[:, None]).square().mean(-1) + eps)


def _aten_norm(x, weight, bias):
    """x, weight and bias as aten's LayerNorm takes them with statistics in ``_stat_dtype``: the kernels for a CPU know
    16-bit x beside float32 parameters, those for a GPU one dtype."""
    if x.device.type == "cpu":
        dtype = _stat_dtype(x)
        if weight is None and x.dtype != dtype:
            weight = x.new_ones(x.shape[-1], dtype=dtype)
    else:
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, weight, bias) if t is not None))
        x = x.to(dtype)
    return x, _cast(weight, dtype), _cast(bias, dtype)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: str = "layer"
) -> tuple[Tensor, Tensor, Tensor]:
    if norm == "layer":
        y, mean, rstd = torch.ops.aten.native_layer_norm(*_before_norm(*_aten_norm(x, weight, bias)), eps)
        return y.to(x.dtype), mean.flatten(), rstd.flatten()
    return layer_norm(x, weight, bias, eps, norm=norm), *layer_norm_stats(x, eps, norm=norm)


def _before_norm(x, weight, bias):
    """The arguments of aten's LayerNorm before eps."""
    return x, (x.shape[-1],), weight, bias


def _wanted(needs, *arguments):
    """Which gradients to compute: those needed, of arguments that are given."""
    needs = (True,) * len(arguments) if needs is None else needs
    return [need and argument is not None for need, argument in zip(needs, arguments, strict=True)]


def layer_norm_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    norm: str = "layer",
    needs: Sequence[bool] | None = None,
    residual_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); ``residual_grad``, the gradient of a residual x, is added to dx."""
    wants = _wanted(needs, x, weight, bias)
    if norm == "layer":
        wide, scale, shift = _aten_norm(x, weight, bias)
        statistics = (t.to(_stat_dtype(wide)).view(*x.shape[:-1], 1) for t in (mean, rstd))
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grad.to(wide.dtype), wide, (x.shape[-1],), *statistics, scale, shift, wants
        )
    else:
        dx, dweight, dbias = _rms_norm_bwd(grad, x, weight, rstd, wants)
    if wants[0]:
        dx = dx.to(x.dtype) if residual_grad is None else dx.to(x.dtype).add_(residual_grad)
    return (
        dx if wants[0] else None,
        dweight.to(weight.dtype) if wants[1] else None,
        dbias.to(bias.dtype) if wants[2] else None,
    )


def _rms_norm_bwd(grad, x, weight, rstd, wants):
    """(dx, dweight, dbias) of RMSNorm, in the dtype of its statistics."""
    stat = rstd.dtype
    dy, normal = grad.to(stat), x.to(stat) * rstd.view(*x.shape[:-1], 1)
    width = x.shape[-1]
    dweight = (dy * normal).reshape(-1, width).sum(0) if wants[1] else None
    dbias = dy.reshape(-1, width).sum(0) if wants[2] else None
    if not wants[0]:
        return None, dweight, dbias
    dnormal = dy if weight is None else dy * weight.to(stat)
    dx = torch.addcmul(dnormal, normal, (dnormal * normal).mean(-1, keepdim=True), value=-1)
    return dx.mul_(rstd.view(*x.shape[:-1], 1)), dweight, dbias


# layer_norm_linear: act(LN(x) Wᵀ + b), computed in the dtype of the weight.


def layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> Tensor:
    z = F.linear(_cast(layer_norm(x, ln_weight, ln_bias, eps, norm=norm), weight.dtype), weight, bias)
    if activation in ("gelu", "gelu_tanh") and _may_overwrite():
        return torch._C._nn.gelu_(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return activate(z, activation)


def layer_norm_linear_fwd(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = layer_norm_fwd(x, ln_weight, ln_bias, eps, norm=norm)
    return activate(F.linear(y.to(weight.dtype), weight, bias), activation), mean, rstd


def linear_bwd(
    dz: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool] | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of z = x Wᵀ + b."""
    wants = _wanted(needs, x, weight, bias)
    drows = dz.reshape(-1, dz.shape[-1])
    dx = dz @ weight if wants[0] else None
    dweight = drows.t() @ x.reshape(-1, x.shape[-1]) if wants[1] else None
    return dx, dweight, _column_sums(drows, bias.dtype) if wants[2] else None


def _wide_product(dz, x):
    """dzᵀ x over the rows, in float32 or wider: what is multiplied once more is not rounded to 16 bits between."""
    left, right = dz.reshape(-1, dz.shape[-1]).t(), x.reshape(-1, x.shape[-1])
    stat = _stat_dtype(dz)
    if dz.dtype != stat and dz.is_cuda:
        return torch.mm(left, right, out_dtype=stat)
    return left.to(stat) @ right.to(stat)


def _column_sums(rows, dtype):
    """The sums over the rows, accumulated in ``_stat_dtype``."""
    return rows.sum(0, dtype=_stat_dtype(rows)).to(dtype)


def layer_norm_linear_bwd(
    grad: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    norm: str = "layer",
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dln_weight, dln_bias, dweight, dbias)."""
    *wants, wants_weight, wants_bias = _wanted(needs, x, ln_weight, ln_bias, weight, bias)
    y = x
    if activation or wants_weight:
        y = layer_norm(x, ln_weight, ln_bias, eps, norm=norm).to(weight.dtype)
    dz = activate_bwd(grad, F.linear(y, weight, bias), activation) if activation else grad.to(weight.dtype)
    dy, dweight, dbias = linear_bwd(dz, y, weight, bias, (any(wants), wants_weight, wants_bias))
    if dy is None:
        return None, None, None, dweight, dbias
    return *layer_norm_bwd(dy, x, ln_weight, ln_bias, mean, rstd, norm=norm, needs=wants), dweight, dbias


# linear_residual: residual + row_scale · gamma · dropout(LN(x) Wᵀ + b), in the dtype of the residual; LN only where
# inner_norm = (weight, bias, eps) is given.


def _per_sample(row_scale, like):
    return row_scale.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    if inner_norm is not None:
        x = layer_norm(x, *inner_norm, norm=norm)
    branch = dropout(F.linear(_cast(x, weight.dtype), weight, bias), dropout_p, seed)
    if branch.dtype == residual.dtype and gamma is None and row_scale is None and _may_overwrite():
        return branch.add_(residual)
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * _per_sample(row_scale, branch)
    return _cast(residual + branch, residual.dtype)


def linear_residual_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    *,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dgamma, drow_scale, dinner_weight, dinner_bias); that of the residual is ``grad``.

    With g = grad · row_scale · dropout mask and dW' = gᵀ LN(x): dgamma = rowsum(W · dW') + b · colsum(g),
    dweight = gamma · dW', dbias = gamma · colsum(g), so that the branch itself is not needed.
    The product's own gradient is rounded once, gamma · g: gamma · W would err alike in every row.
    """
    inner = inner_norm or (None, None, None)
    arguments = x, weight, bias, gamma, row_scale, *inner[:2]
    of_x, of_weight, of_bias, of_gamma, of_scale, *of_inner = _wanted(needs, *arguments)
    of_product = any((of_x, *of_inner))
    normal = x
    if of_weight or of_gamma or of_scale:
        normal = (x if inner_norm is None else layer_norm(x, *inner_norm, norm=norm)).to(weight.dtype)
    drow_scale = None
    keeps = dropout_mask(seed, grad.shape, dropout_p, grad.device).to(weight.dtype) if dropout_p else None
    g = grad.to(weight.dtype) if keeps is None else grad.to(weight.dtype) * keeps
    if of_scale:
        branch = F.linear(normal, weight, bias)
        branch = branch if gamma is None else branch * gamma.to(branch.dtype)
        drow_scale = (g * branch).flatten(1).sum(1, dtype=_stat_dtype(g)).to(row_scale.dtype)
    if row_scale is not None:
        g = g * _per_sample(row_scale, g)
    if gamma is None:
        dx, dweight, dbias = linear_bwd(g, normal, weight, bias, (of_product, of_weight, of_bias))
        dgamma = None
    else:
        stat = _stat_dtype(g)
        scale, of_sums = gamma.to(stat), of_bias or (of_gamma and bias is not None)
        dx = None
        if of_product:
            dproduct = grad * scale if row_scale is None else grad * scale * _per_sample(row_scale, grad)
            dproduct = dproduct.to(weight.dtype)
            dx = (dproduct if keeps is None else dproduct * keeps) @ weight
        dweight = _wide_product(g, normal) if of_weight or of_gamma else None
        sums = _column_sums(g.reshape(-1, g.shape[-1]), stat) if of_sums else None
        dgamma = dbias = None
        if of_gamma:
            dgamma = (weight * dweight).sum(1)
            dgamma = (dgamma if bias is None else torch.addcmul(dgamma, bias.to(stat), sums)).to(gamma.dtype)
        if of_bias:
            dbias = (sums * scale).to(bias.dtype)
        dweight = (dweight * scale[:, None]).to(weight.dtype) if of_weight else None
    dinner_weight = dinner_bias = None
    if inner_norm is not None and dx is not None:
        inner_weight, inner_bias, eps = inner_norm
        statistics = layer_norm_stats(x, eps, norm=norm)
        dx, dinner_weight, dinner_bias = layer_norm_bwd(
            dx, x, inner_weight, inner_bias, *statistics, norm=norm, needs=(of_x, *of_inner)
        )
    return None if dx is None else dx.to(x.dtype), dweight, dbias, dgamma, drow_scale, dinner_weight, dinner_bias


# layernorm_mlp: x + row_scale · gamma · dropout(fc2(LN(dropout(act(fc1(LN(x))))))); the inner LN only where inner_norm
# is given. z = fc1(LN(x)) is the pre-activation.


def layernorm_mlp(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: Tensor | None = None,
) -> Tensor:
    hidden = layer_norm_linear(x, ln_weight, ln_bias, eps, w1, b1, activation, norm=norm)
    return linear_residual(
        dropout(hidden, dropout_p, seed), w2, b2, gamma, x,
        row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=out_dropout_p, seed=out_seed,
    )  # fmt: skip


def layernorm_mlp_fwd(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, mean, rstd, and z in the dtype of w1; z is empty with ``recompute``: the backward computes it again."""
    z, mean, rstd = layer_norm_linear_fwd(x, ln_weight, ln_bias, eps, w1, b1, norm=norm)
    out = linear_residual(
        dropout(activate(z, activation), dropout_p, seed), w2, b2, gamma, x,
        row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=out_dropout_p, seed=out_seed,
    )  # fmt: skip
    return out, mean, rstd, z.new_empty(0) if recompute else z


def layernorm_mlp_bwd(
    grad: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor,
    *,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: Tensor | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dln_weight, dln_bias, dw1, db1, dw2, db2, dgamma, drow_scale, dinner_weight, dinner_bias)."""
    inner = (inner_norm or (None, None))[:2]
    arguments = x, ln_weight, ln_bias, w1, b1, w2, b2, gamma, row_scale, *inner
    of_x, of_ln_weight, of_ln_bias, of_w1, of_b1, *of_fc2 = _wanted(needs, *arguments)
    of_norm = of_x, of_ln_weight, of_ln_bias
    y, again = x, z.numel() == 0
    if of_w1 or again:
        y = layer_norm(x, ln_weight, ln_bias, eps, norm=norm).to(w1.dtype)
    if again:
        z = F.linear(y, w1, b1)
    hidden = activate(z, activation)
    keeps = dropout_mask(seed, hidden.shape, dropout_p, hidden.device).to(hidden.dtype) if dropout_p else None
    if keeps is not None:
        hidden = hidden * keeps
    dhidden, *grads_of_fc2 = linear_residual_bwd(
        grad, hidden, w2, b2, gamma, row_scale, norm=norm, inner_norm=inner_norm, dropout_p=out_dropout_p,
        seed=out_seed, needs=(any((*of_norm, of_w1, of_b1)), *of_fc2),
    )  # fmt: skip
    del hidden
    if dhidden is None:
        return None, None, None, None, None, *grads_of_fc2
    dz = activate_bwd(dhidden if keeps is None else dhidden * keeps, z, activation)
    del dhidden, keeps
    dy, dw1, db1 = linear_bwd(dz, y, w1, b1, (any(of_norm), of_w1, of_b1))
    del dz, y
    if dy is None:
        return None, None, None, dw1, db1, *grads_of_fc2
    grads_of_norm = layer_norm_bwd(
        dy, x, ln_weight, ln_bias, mean, rstd, norm=norm, needs=of_norm, residual_grad=grad if of_x else None
    )
    return *grads_of_norm, dw1, db1, *grads_of_fc2


# attention: per head softmax(scale · q kᵀ) v; packed [B, N, 3C] or separate q, k, v [B, N, C] → [B, N, C].


def split_heads(qkv: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, H, N, D] views."""
    if k is None:
        return qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (qkv, k, v))


def head_norm(x: Tensor, norm: Norm | None, kind: str) -> Tensor:
    """A norm over each head of x [B, H, N, D]."""
    return x if norm is None else layer_norm(x, *norm, norm=kind)


def rotate(x: Tensor, layout: str) -> Tensor:
    """A quarter turn of every pair of channels: "half" pairs c with c + D/2, "interleaved" 2i with 2i + 1."""
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def rotary(x: Tensor, rope: tuple[Tensor, Tensor] | None, layout: str, num_prefix: int) -> Tensor:
    """x [B, H, N, D] turned by the angles of cos and sin, its first ``num_prefix`` tokens unchanged.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    if rope is None:
        return x
    cos, sin = rope
    prefix, rest = x[:, :, :num_prefix], x[:, :, num_prefix:]
    rest = _cast(rest * cos + rotate(rest, layout) * sin, x.dtype)
    return torch.cat([prefix, rest], dim=2) if num_prefix else rest


def _token_sequences(cu_seqlens, tokens):
    """The sequence of each token; −1 or the number of sequences where it is in none."""
    rows = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.contiguous(), rows, right=True) - 1


def score_mask(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    rel_pos: tuple[Tensor, Tensor] | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """What is added to the scaled scores of q, k [B, H, N, D], in ``dtype``, by default that of q; None where nothing
    is."""
    dtype = dtype or q.dtype
    mask = _cast(bias, dtype)
    if rel_pos is not None:
        height, width = rel_pos
        position = (height[..., :, None] + width[..., None, :]).flatten(-2).to(dtype)
        mask = position if mask is None else mask + position
    padding = None
    if key_lengths is not None:
        padding = torch.arange(k.shape[2], device=q.device) >= key_lengths[:, None, None, None]
    if cu_seqlens is not None:
        sequence = _token_sequences(cu_seqlens, q.shape[2])
        padding = (sequence[:, None] != sequence) | (sequence < 0) | (sequence >= cu_seqlens.shape[0] - 1)
    if padding is not None:
        mask = (q.new_zeros((), dtype=dtype) if mask is None else mask).masked_fill(padding, -math.inf)
    return mask


def _prepared_heads(
    qkv, k, v, num_heads, q_norm=None, k_norm=None, norm="layer", rope=None, rope_layout="half", num_prefix=0
):
    """q, k, v [B, H, N, D], q and k normalised and turned."""
    if k is None and q_norm is None and k_norm is None and rope is not None and _same_for_heads(*rope):
        width = qkv.shape[2] // 3  # q and k are turned at once, as twice as many heads
        both, v = (t.unflatten(2, (-1, width // num_heads)).transpose(1, 2) for t in qkv.split((2 * width, width), 2))
        q, k = rotary(both, rope, rope_layout, num_prefix).chunk(2, dim=1)
        return q, k, v
    q, k, v = split_heads(qkv, k, v, num_heads)
    q, k = head_norm(q, q_norm, norm), head_norm(k, k_norm, norm)
    return rotary(q, rope, rope_layout, num_prefix), rotary(k, rope, rope_layout, num_prefix), v


def _same_for_heads(*tables):
    """Whether tables of rotary embedding, [..., H, N, D] or [N, D], are the same for every head."""
    return all(table.dim() == 2 or table.shape[-3] == 1 for table in tables)


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_layout: str = "half",
    num_prefix: int = 0,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm: str = "layer",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The options are those of ``vit_fast.ops.attention``."""
    q, k, v = _prepared_heads(qkv, k, v, num_heads, q_norm, k_norm, norm, rope, rope_layout, num_prefix)
    bounds = None if cu_seqlens is None or dropout_p else known_values(cu_seqlens)
    if bounds is not None:
        sequences = [
            F.scaled_dot_product_attention(q[:, :, first:end], k[:, :, first:end], v[:, :, first:end], scale=scale)
            for first, end in itertools.pairwise(bounds)
        ]
        return torch.cat(sequences, dim=2).transpose(1, 2).flatten(2)
    mask = score_mask(q, k, bias, rel_pos, key_lengths, cu_seqlens)
    # torch's fused attention on a CPU has no forward-mode derivative, no second derivative and no vmap rule.
    if dropout_p and seed is not None:
        out = _wide_attention(q, k, v, scale, mask, dropout_p, seed)[0]
    elif is_transformed():
        out = dropout(attention_weights(q, k, scale, mask), dropout_p, None) @ v
    else:
        out = F.scaled_dot_product_attention(*_for_aten(q), k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).flatten(2)


def attention_weights(q: Tensor, k: Tensor | None, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax probabilities [B, H, N, keys] of q, k [B, H, N, D]; a row with every key masked is zero."""
    scores = (q @ k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    return torch.nan_to_num(scores.softmax(-1), nan=0.0) if mask is not None else scores.softmax(-1)


def attention_fwd(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse, which is that without dropout; the LSE of a query without keys is −inf."""
    q, k, v = _prepared_heads(qkv, k, v, num_heads, **_of_heads(options))
    mask = score_mask(q, k, *_of_scores(options), _stat_dtype(q))
    if not dropout_p and _has_aten_attention(q, v):
        q, k, v = _for_aten(q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
        if mask is not None:  # torch's LSE of a query without keys is 0
            lse = lse.masked_fill((mask == -math.inf).all(-1).expand(lse.shape), -math.inf)
    else:
        out, scores = _wide_attention(q, k, v, scale, mask, dropout_p, seed)
        lse = torch.logsumexp(scores, -1)
    return out.transpose(1, 2).flatten(2), lse


def _has_aten_attention(q, v):
    """Whether aten's attention for a CPU, which returns the LSE and has a backward, takes these heads."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.numel() > 0


@untraced
def _channels_adjacent(heads):
    """Whether the channels of heads [B, H, N, D] lie side by side, and those of no two tokens overlap."""
    return heads.stride(-1) == 1 and heads.stride(-2) >= heads.shape[-1]


def _for_aten(*heads):
    """Heads as aten's attention for a CPU takes them: it reads channels as if they lay side by side, and writes an
    output with the strides of q."""
    return tuple(t if _channels_adjacent(t) else t.contiguous() for t in heads)


def _of_heads(options):
    """The options that act on q and k."""
    names = ("q_norm", "k_norm", "norm", "rope", "rope_layout", "num_prefix")
    return {name: options[name] for name in names if name in options}


def _of_scores(options):
    """The options that ``score_mask`` takes."""
    return (options.get(name) for name in ("bias", "rel_pos", "key_lengths", "cu_seqlens"))


def _scores(q, k, scale, mask):
    """What the softmax takes."""
    scores = (q @ k.transpose(-2, -1)) * scale
    return scores if mask is None else scores + mask


def _wide_attention(q, k, v, scale, mask, dropout_p, seed):
    """(out, scores) of heads [B, H, N, D], the scores and probabilities in float32 or wider."""
    stat = _stat_dtype(q)
    scores = _scores(q.to(stat), k.to(stat), scale, mask if mask is None else mask.to(stat))
    p = scores.softmax(-1)
    p = p if mask is None else torch.nan_to_num(p, nan=0.0)
    return dropout(p, dropout_p, seed).to(v.dtype) @ v, scores


def attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    scale: float,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(dqkv, None, None) for packed input, (dq, dk, dv) otherwise; with options also the gradients of bias, height,
    width, cos, sin, and of weight and bias of q_norm and of k_norm, None where there is none."""
    stat, (bias, rel_pos, *_) = lse.dtype, _of_scores(options)
    q_norm, k_norm, norm = options.get("q_norm"), options.get("k_norm"), options.get("norm", "layer")
    rope, num_prefix = options.get("rope"), options.get("num_prefix", 0)
    layout = options.get("rope_layout", "half")
    q, k_heads, v_heads = split_heads(qkv, k, v, num_heads)
    dout, out = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (grad, out))
    ds_needed = rel_pos is not None or (bias is not None and (needs is None or needs[3]))
    by_aten = not (dropout_p or ds_needed) and _has_aten_attention(q, v_heads)
    plain = (q, k_heads, v_heads) if by_aten else tuple(t.to(stat) for t in (q, k_heads, v_heads))
    tables = rope if rope is None or by_aten else tuple(table.to(stat) for table in rope)
    normal = head_norm(plain[0], q_norm, norm), head_norm(plain[1], k_norm, norm)
    turned = *(rotary(t, tables, layout, num_prefix) for t in normal), plain[2]
    mask = score_mask(*turned[:2], *_of_scores(options), stat)
    if by_aten:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.to(qkv.dtype), *_for_aten(*turned, out), lse.masked_fill(lse == -math.inf, 0.0), 0.0, False,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        ds = None
    else:
        dq, dk, dv, ds = _attention_bwd(dout.to(stat), *turned, scale, mask, dropout_p, seed)
    more: tuple[Tensor | None, ...] = ()
    if options:
        dbias = None if bias is None or ds is None else ds.sum_to_size(bias.shape).to(bias.dtype)
        dheight = dwidth = dcos = dsin = None
        if rel_pos is not None:
            height, width = rel_pos
            grid = ds.unflatten(-1, (height.shape[-1], width.shape[-1]))
            dheight, dwidth = grid.sum(-1).to(height.dtype), grid.sum(-2).to(width.dtype)
        dq, dk = dq.to(stat), dk.to(stat)
        if rope is not None:
            if needs is None or needs[6] or needs[7]:
                dcos, dsin = rotary_tables_bwd((dq, dk), normal, rope, layout, num_prefix)
            dq, dk = (rotary_bwd(t, rope, layout, num_prefix) for t in (dq, dk))
        dq, *dq_norm = head_norm_bwd(dq, plain[0], q_norm, norm)
        dk, *dk_norm = head_norm_bwd(dk, plain[1], k_norm, norm)
        more = dbias, dheight, dwidth, dcos, dsin, *dq_norm, *dk_norm
    if k is None:
        packed = torch.stack([t.transpose(1, 2).to(qkv.dtype) for t in (dq, dk, dv)], dim=2)
        return packed.flatten(2), None, None, *more
    return *(t.transpose(1, 2).flatten(2).to(qkv.dtype) for t in (dq, dk, dv)), *more


def _attention_bwd(dout, q, k, v, scale, mask, dropout_p, seed):
    """(dq, dk, dv, dscores) of heads [B, H, N, D] in one wide dtype. The probabilities are computed again, and their
    sums too: LSE and output of another backend's forward are rounded otherwise."""
    p = _scores(q, k, scale, mask).softmax(-1)
    if mask is not None:
        p.nan_to_num_(nan=0.0)  # a query without keys
    dp = dout @ v.transpose(-2, -1)
    if dropout_p:
        keeps = dropout_mask(seed, p.shape, dropout_p, p.device).to(p.dtype)
        dp *= keeps
        dv = (p * keeps).transpose(-2, -1) @ dout
    else:
        dv = p.transpose(-2, -1) @ dout
    dp -= (p * dp).sum(-1, keepdim=True)
    ds = p.mul_(dp)
    return (ds @ k) * scale, (ds.transpose(-2, -1) @ q) * scale, dv, ds


def rotary_tables_bwd(
    grads: Sequence[Tensor], heads: Sequence[Tensor], rope: tuple[Tensor, Tensor], layout: str, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """(dcos, dsin) from the gradients of turned heads [B, H, N, D], and the heads before they were turned."""
    cos, sin = rope
    pairs = [(grad[:, :, num_prefix:], x[:, :, num_prefix:]) for grad, x in zip(grads, heads, strict=True)]
    dcos = torch.stack([grad * x for grad, x in pairs]).sum(0)
    dsin = torch.stack([grad * rotate(x, layout) for grad, x in pairs]).sum(0)
    return dcos.sum_to_size(cos.shape).to(cos.dtype), dsin.sum_to_size(sin.shape).to(sin.dtype)


def rotary_bwd(grad: Tensor, rope: tuple[Tensor, Tensor], layout: str, num_prefix: int) -> Tensor:
    """The transposed rotation: that of −sin, applied to the products with the tables."""
    cos, sin = (table.to(grad.dtype) for table in rope)
    prefix, rest = grad[:, :, :num_prefix], grad[:, :, num_prefix:]
    return torch.cat([prefix, rest * cos - rotate(rest * sin, layout)], dim=2)


def head_norm_bwd(grad: Tensor, x: Tensor, norm: Norm | None, kind: str) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias) of ``head_norm``."""
    if norm is None:
        return grad, None, None
    weight, bias, eps = norm
    return layer_norm_bwd(grad, x, weight, bias, *layer_norm_stats(x, eps, norm=kind), norm=kind)


# prepared_blocks: transformer blocks whose LayerNorm and LayerScale are folded into their projections (``folding``).


def prepared_blocks(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> Tensor:
    """x [B, N, C] through the blocks of a list of ``folding.FoldedBlock`` tensors, in the dtype of the weights."""
    for b in unflatten(FoldedBlock, weights):
        linears = [
            (weight, bias.to(x.dtype))
            for weight, bias in (
                (b.qkv_weight, b.qkv_bias), (b.proj_weight, b.proj_bias),
                (b.fc1_weight, b.fc1_bias), (b.fc2_weight, b.fc2_bias),
            )
        ]  # fmt: skip
        x = _folded_block(x, linears, num_heads, scale, activation, eps1, eps2, options)
    return x


def _folded_block(x, linears, num_heads, scale, activation, eps1, eps2, options):
    """x [B, N, C] through a block of folded linear layers: (weight, bias) of qkv, proj, fc1, fc2."""
    qkv, proj, fc1, fc2 = linears
    packed = layer_norm_linear(x, None, None, eps1, *qkv, norm=options.norm)
    out = attention(packed, num_heads, scale, **options.of_attention())
    x = linear_residual(_bare_norm(out, options.out_eps, options.norm), *proj, None, x)
    hidden = layer_norm_linear(x, None, None, eps2, *fc1, activation, norm=options.norm)
    hidden, weight = _hidden_norm(hidden, fc2[0], options)
    return linear_residual(hidden, weight, fc2[1], None, x)


def _bare_norm(x, eps, norm):
    """A norm without parameters, or nothing where eps is None."""
    return x if eps is None else layer_norm(x, None, None, eps, norm=norm)


def _hidden_norm(hidden, weight, options):
    """The hidden activations and the weight of fc2, without padding and normalised where there is a norm of them."""
    if options.hidden_eps is None:
        return hidden, weight
    features = options.hidden_features
    return _bare_norm(hidden[..., :features], options.hidden_eps, options.norm), weight[:, :features]


# fp8_blocks: transformer blocks whose matrix products are taken in float8 e4m3.


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: str | None = None,
    *,
    out_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + out_scale · act(weight_scale · (x weightᵀ) + bias): x and weight e4m3, all else float32."""
    wide = torch.float64 if residual is not None and residual.dtype == torch.float64 else torch.float32
    z = F.linear(x.to(wide), weight.to(wide)) * weight_scale
    out = activate(z if bias is None else z + bias, activation)
    out = out if out_scale is None else out * out_scale
    return out.to(out_dtype) if residual is None else (residual + out).to(residual.dtype)


def fp8_blocks(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> Tensor:
    """x [B, N, C] through the blocks of a list of ``folding.Float8Block`` tensors, in the dtype of x."""
    for b in unflatten(Float8Block, weights):
        normal = _fp8_norm(x, b.norm_scale, eps1, options.norm)
        packed = fp8_linear(normal, b.qkv_weight, b.qkv_scale, b.qkv_bias, out_dtype=x.dtype)
        out = attention(packed, num_heads, scale, **options.of_attention())
        out = out.to(E4M3) if options.out_eps is None else _fp8_norm(out, b.norm_scale, options.out_eps, options.norm)
        x = fp8_linear(out, b.proj_weight, b.proj_scale, b.proj_bias, residual=x)
        fc1 = (_fp8_norm(x, b.norm_scale, eps2, options.norm), b.fc1_weight, b.fc1_scale, b.fc1_bias, activation)
        if options.hidden_eps is None:
            hidden = fp8_linear(*fc1, out_scale=b.hidden_scale, out_dtype=E4M3)
        else:
            hidden = fp8_linear(*fc1, out_dtype=x.dtype)
            hidden = _fp8_norm(hidden, b.hidden_scale, options.hidden_eps, options.norm)
        x = fp8_linear(hidden, b.fc2_weight, b.fc2_scale, b.fc2_bias, residual=x)
    return x


def _fp8_norm(x, norm_scale, eps, norm):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return layer_norm(wide, norm_scale.to(wide.dtype), None, eps, norm=norm).to(E4M3)


# packed_blocks, int8_blocks: transformer blocks on weights packed for the CPU extension.


def packed_blocks(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> Tensor:
    """x [B, N, C] through the blocks of a list of ``packing.PackedBlock`` tensors, in the dtype of x."""
    for block in unflatten(PackedBlock, weights):
        linears = [
            (weight.to(x.dtype), bias.to(x.dtype)) for weight, bias in unpacked_linears(block, x.shape[2], activation)
        ]
        x = _folded_block(x, linears, num_heads, scale, activation, eps1, eps2, options)
    return x


def int8_linear(x: Tensor, weight: Tensor, gain: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale · step·(q − zero) weightᵀ + bias: weight int8, q the rows of x · gain as uint8, by a step and a zero point
    of each row, taken from its smallest and largest value and 0."""
    x = x * gain.to(x.dtype)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = torch.where(high - low > 1e-30, (high - low) / 255, 1.0)
    zero = (-low / step).round()
    q = (x / step + zero).round().clamp(0, 255) - zero
    out = F.linear(q, weight.to(x.dtype)) * (step * scale.to(x.dtype)) + bias.to(x.dtype)
    return torch.where((high - low).isfinite(), out, math.nan)


def int8_blocks(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> Tensor:
    """x [B, N, C] through the blocks of a list of ``packing.Int8Block`` tensors; float32 between the products."""
    wide = x.to(_stat_dtype(x))
    with torch.autocast(x.device.type, enabled=False):  # sums of integers leave the range of float16
        for block in unflatten(Int8Block, weights):
            linears = unpacked_linears(block, x.shape[2], activation)
            qkv, proj, fc1, fc2 = ((weight, *values, bias) for weight, *values, _, bias in linears)
            packed = int8_linear(_bare_norm(wide, eps1, options.norm), *qkv)
            out = attention(packed, num_heads, scale, **options.of_attention())
            wide = wide + int8_linear(_bare_norm(out, options.out_eps, options.norm), *proj)
            hidden = activate(int8_linear(_bare_norm(wide, eps2, options.norm), *fc1), activation)
            hidden, weight = _hidden_norm(hidden, fc2[0], options)
            wide = wide + int8_linear(hidden, weight, *fc2[1:])
    return wide.to(x.dtype)


# patch_embed: [B, in, H, W] → [B, K + N, C].


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [..., C], step [..., 1]) of x, float32 or wider: x ≈ e4m3 · step, the largest of each row is ±448."""
    largest = x.abs().amax(-1, keepdim=True)
    step = torch.where(largest > 1e-30, largest / E4M3_MAX, 1.0)
    return (x * (1 / step)).to(E4M3), step


def packed_linear(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> Tensor:
    """A linear layer on a prepared weight, in the dtype of x; gated activations for weights that are not packed alone.

    In int8 and float8 the weight has a scale for each output and x a step for each token, found here.
    """
    matrix, *rows = layer.weight
    features, bias = layer.features, layer.bias
    if matrix.dtype == x.dtype and matrix.dim() == 2:
        return _prepared_linear(x, matrix, layer, residual)
    normal = wide = x.to(_stat_dtype(x))
    if layer.eps is not None:
        normal = layer_norm(wide, layer.ln_weight, layer.ln_bias, layer.eps, norm=layer.norm)
    with torch.autocast(x.device.type, enabled=False):
        if matrix.dtype == E4M3:
            tokens, step = quantise_tokens(normal)
            out = F.linear(tokens.to(wide.dtype), matrix.to(wide.dtype)) * (step * rows[0])
            out = out if bias is None else out + bias
        else:
            matrix, bias = unpack(matrix)[:features, : x.shape[-1]], bias[:features]
            if matrix.dtype == torch.int8:
                gain, scale, _ = rows
                out = int8_linear(normal, matrix, gain[: x.shape[-1]], scale[:features], bias)
            else:
                out = F.linear(normal.to(x.dtype), matrix.to(x.dtype), bias.to(x.dtype)).to(wide.dtype)
    return _end_of(activate(out, layer.activation), layer, residual).to(x.dtype)


def _prepared_linear(x, weight, layer, residual):
    """``packed_linear`` of a weight as it is, as the operations without preparation compute it."""
    if layer.eps is not None:
        ln = layer.ln_weight, layer.ln_bias, layer.eps
        out = layer_norm_linear(x, *ln, weight, layer.bias, layer.activation, norm=layer.norm)
    elif layer.activation is None and residual is not None:
        return linear_residual(x, weight, layer.bias, layer.gamma, residual)
    else:
        out = activate(F.linear(x, weight, layer.bias), layer.activation)
    return _end_of(out, layer, residual)


def _end_of(out, layer, residual):
    out = out if layer.gamma is None else out * layer.gamma
    return out if residual is None else residual + out


def normalise_pixels(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """(pixel − mean)/std in float32 or wider, uint8 pixels divided by 255 first, then in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    pixels = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    if mean is not None:
        pixels = pixels - pixels.new_tensor(mean).view(1, -1, 1, 1)
    if std is not None:
        pixels = pixels / pixels.new_tensor(std).view(1, -1, 1, 1)
    return pixels.to(dtype)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
    if mean is not None or std is not None or images.dtype == torch.uint8:
        images = normalise_pixels(images, mean, std, weight.dtype)
    tokens = F.conv2d(images.to(weight.dtype), weight, bias, stride).flatten(2).transpose(1, 2)
    if pos_embed is not None:
        tokens = (tokens + pos_embed).to(weight.dtype)
    if prefix_tokens is not None:
        prefix = prefix_tokens.to(weight.dtype).expand(images.shape[0], -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
    return tokens


def patch_embed_bwd(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: tuple[int, int],
    *,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dimages, dweight, dbias, dpos_embed, dprefix_tokens) for float images without normalisation."""
    of_images, of_weight, of_bias, of_pos, of_prefix = _wanted(needs, images, weight, bias, pos_embed, prefix_tokens)
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    stat, patches = _stat_dtype(grad), grad[:, prefix:]
    dimages = dweight = dbias = dpos = dprefix = None
    if of_images or of_weight:
        rows = (images.shape[2] - weight.shape[2]) // stride[0] + 1
        dimages, dweight, _ = torch.ops.aten.convolution_backward(
            patches.transpose(1, 2).unflatten(2, (rows, -1)).to(weight.dtype), images.to(weight.dtype), weight, None,
            stride, (0, 0), (1, 1), False, (0, 0), 1, (of_images, of_weight, False),
        )  # fmt: skip
    if of_bias:
        dbias = patches.sum((0, 1), dtype=stat).to(bias.dtype)
    if of_pos:
        dpos = patches.sum(0, keepdim=True, dtype=stat).to(pos_embed.dtype)
    if of_prefix:
        dprefix = grad[:, :prefix]
        dprefix = dprefix.sum(0, keepdim=True, dtype=stat) if prefix_tokens.shape[0] == 1 else dprefix.contiguous()
        dprefix = dprefix.to(prefix_tokens.dtype)
    return None if dimages is None else dimages.to(images.dtype), dweight, dbias, dpos, dprefix
