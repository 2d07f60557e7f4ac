"""The backward of linear layers in a transformer block: ``linear_residual`` and ``layer_norm_linear`` of ``linear``.

For y = residual + row_scale[b] · gamma · mask / (1 − p) · (h Wᵀ + bias), with the gradient g of (h Wᵀ + bias) · gamma,
that is the incoming one behind drop path and dropout (``column_sums.branch_gradient``):

    dh = (g ∘ gamma) W    dW = gamma ∘ dW′    dbias = gamma ∘ colsum(g)    dgamma = rowsum(W ∘ dW′) + bias ∘ colsum(g)

with dW′ = gᵀ h and gamma along the rows of W, so that the branch's output is not needed. g ∘ gamma is rounded once,
from the incoming gradient: gamma ∘ W in 16 bits would err alike in every row, and sums over rows behind it too.
Products are PyTorch's (cuBLAS); with a gamma dW′ is float32, and one small kernel makes dW, dgamma and dbias of it.
drow_scale, which trainable drop path alone wants, computes the branch again.

LayerNorm + linear: LN(x) is computed again; with an activation z too. Then the products, then ``layer_norm_bwd``.
Moves, beside the products, rows·N for colsum(g), and 2·rows·N each for g ∘ gamma and a g that is not the incoming
gradient.
Limits: those of ``layer_norm_bwd`` and ``column_sums``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, reference
from . import layer_norm as ln
from .column_sums import branch_gradient, column_sums
from .layer_norm_bwd import layer_norm_bwd
from .linear import Norm, linear

LAYER_SCALE_BLOCK = 1024


@triton.jit
def _layer_scale_bwd_kernel(
    dweight_ptr,  # [N, width] contiguous, or None
    dbias_ptr,  # [N], or None
    dgamma_ptr,  # [N], or None
    product_ptr,  # [N, width] contiguous: dW′
    weight_ptr,  # [N, width]
    bias_ptr,  # [N], or None
    gamma_ptr,  # [N]
    sums_ptr,  # [N]: colsum(g), or None
    width,
    stride_wn,
    stride_wk,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    gamma = tl.load(gamma_ptr + row).to(product_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK], product_ptr.dtype.element_ty)
    for start in range(0, width, BLOCK):
        column = start + lane
        mask = column < width
        product = tl.load(product_ptr + row * width + column, mask=mask, other=0.0)
        if dgamma_ptr is not None:
            weight = tl.load(weight_ptr + row * stride_wn + column * stride_wk, mask=mask, other=0.0)
            total += product * weight.to(product.dtype)
        if dweight_ptr is not None:
            dweight = gamma * product
            tl.store(dweight_ptr + row * width + column, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dgamma_ptr is not None:
        dgamma = tl.sum(total, axis=0)
        if bias_ptr is not None:
            dgamma += tl.load(bias_ptr + row).to(dgamma.dtype) * tl.load(sums_ptr + row)
        tl.store(dgamma_ptr + row, dgamma.to(dgamma_ptr.dtype.element_ty))
    if dbias_ptr is not None:
        dbias = gamma * tl.load(sums_ptr + row)
        tl.store(dbias_ptr + row, dbias.to(dbias_ptr.dtype.element_ty))


def layer_scale_bwd(
    product: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    sums: Tensor | None,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dW, dbias, dgamma) of gamma · (h Wᵀ + bias), in the dtypes of the parameters.

    product [N, K] dW′ and sums [N] colsum(g), float32 (float64 for float64); sums may be None where only dW is wanted.
    """
    features, width = weight.shape

    def result(needed, like, *shape):
        return torch.empty(shape, dtype=like.dtype, device=like.device) if needed else None

    needs_dbias = needs[1] and bias is not None
    dweight, dgamma = result(needs[0], weight, features, width), result(needs[2], gamma, features)
    dbias = result(True, bias, features) if needs_dbias else None
    with launch.device_guard(product):
        _layer_scale_bwd_kernel[(features,)](
            dweight, dbias, dgamma, product, weight, launch.vector(bias), launch.vector(gamma), sums,
            width, *weight.stride(), BLOCK=LAYER_SCALE_BLOCK, num_warps=4,
        )  # fmt: skip
    return dweight, dbias, dgamma


def _rows(t):
    return t.reshape(-1, t.shape[-1])


def wide_product(dz: Tensor, x: Tensor) -> Tensor:
    """dzᵀ x of rows [..., N] and [..., K], [N, K] in float32 (float64 for float64)."""
    left, right = _rows(dz).t(), _rows(x)
    if dz.dtype in (torch.float32, torch.float64):
        return left @ right
    if dz.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def product_gradient(
    g: Tensor, grad: Tensor, gamma: Tensor | None, row_scale: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """The gradient of h Wᵀ + bias, gamma ∘ g in the dtype of g, from the incoming one."""
    if gamma is None:
        return g
    return branch_gradient(grad, g.dtype, row_scale, dropout_p, seed, False, gamma)[0]


def parameter_gradients(
    g: Tensor,
    sums: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dW, dbias, dgamma) of gamma · (hidden Wᵀ + bias) from g and its column sums; ``needs`` in that order. hidden is
    not needed where only dbias is wanted, sums not without a bias."""
    needs_dweight, needs_dbias, needs_dgamma = needs
    if gamma is None:
        dbias = sums.to(bias.dtype) if needs_dbias and bias is not None and sums is not None else None
        return (_rows(g).t() @ _rows(hidden)) if needs_dweight and hidden is not None else None, dbias, None
    if not (needs_dweight or needs_dgamma):
        if not needs_dbias or bias is None or sums is None:
            return None, None, None
        return None, (sums * gamma).to(bias.dtype), None
    assert hidden is not None
    return layer_scale_bwd(wide_product(g, hidden), weight, bias, gamma, sums, needs)


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
    """(dx, dweight, dbias, dgamma, drow_scale, dinner_weight, dinner_bias), None where ``needs`` says so; that of the
    residual is ``grad``."""
    needs = needs or (True,) * 7
    needs_dx, needs_dweight, needs_dbias, needs_dgamma, needs_drow_scale, *needs_inner = needs
    needs_dbias, needs_dgamma = needs_dbias and bias is not None, needs_dgamma and gamma is not None
    needs_dnormal = needs_dx or (inner_norm is not None and any(needs_inner))
    g, sums = branch_gradient(
        grad, weight.dtype, row_scale, dropout_p, seed, needs_dbias or (needs_dgamma and bias is not None)
    )
    needs_normal = needs_dweight or needs_dgamma or (needs_drow_scale and row_scale is not None)
    normal, statistics = x, ()
    if inner_norm is not None and (needs_normal or needs_dnormal):
        normal, *statistics = ln.layer_norm_fwd(x, *inner_norm, out_dtype=weight.dtype, norm=norm)
    normal = normal.to(weight.dtype) if needs_normal else normal
    dweight, dbias, dgamma = parameter_gradients(
        g, sums, normal, weight, bias, gamma, (needs_dweight, needs_dbias, needs_dgamma)
    )
    drow_scale = None
    if needs_drow_scale and row_scale is not None:
        drow_scale = row_scale_gradient(grad, linear(normal, weight, bias), gamma, row_scale, dropout_p, seed)
    dinner: tuple[Any, Any] = (None, None)
    dx = product_gradient(g, grad, gamma, row_scale, dropout_p, seed) @ weight if needs_dnormal else None
    if inner_norm is not None and dx is not None:
        dx, *dinner = layer_norm_bwd(dx, x, *inner_norm[:2], *statistics, norm=norm, needs=(needs_dx, *needs_inner))
    return None if dx is None else dx.to(x.dtype), dweight, dbias, dgamma, drow_scale, *dinner


def row_scale_gradient(
    grad: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """drow_scale [B] from the branch h Wᵀ + bias before dropout and gamma."""
    stat = launch.stat_dtype(grad.dtype)
    g = branch_gradient(grad, stat, None, dropout_p, seed, False)[0]
    scaled = branch.to(stat) if gamma is None else branch.to(stat) * gamma.to(stat)
    return (g * scaled).flatten(1).sum(1).to(row_scale.dtype)


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
    """(dx, dln_weight, dln_bias, dweight, dbias), None where ``needs`` says so."""
    needs = needs or (True,) * 5
    dz, normal = grad.to(weight.dtype), None
    if activation is not None or needs[3]:
        normal = ln.layer_norm(x, ln_weight, ln_bias, eps, out_dtype=weight.dtype, norm=norm)
    if activation is not None:
        dz = reference.activate_bwd(dz, linear(normal, weight, bias), activation)
    return layer_norm_product_bwd(dz, normal, x, ln_weight, ln_bias, weight, bias, mean, rstd, norm, needs)


def layer_norm_product_bwd(
    dz: Tensor,
    normal: Tensor | None,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    needs: Sequence[bool],
    residual_grad: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dln_weight, dln_bias, dweight, dbias) of z = LN(x) Wᵀ + bias; normal: LN(x), where dweight is wanted."""
    dnorm: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[:3]):
        dnorm = layer_norm_bwd(
            dz @ weight, x, ln_weight, ln_bias, mean, rstd, norm=norm, needs=needs[:3], residual_grad=residual_grad
        )
    dweight = _rows(dz).t() @ _rows(normal) if needs[3] else None
    return *dnorm, dweight, column_sums(dz, bias.dtype) if needs[4] and bias is not None else None
