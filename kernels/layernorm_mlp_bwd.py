"""The backward of the MLP branch (``layernorm_mlp``): x + row_scale[b] · gamma · drop(fc2(drop(act(fc1(LN(x)))))).

From the saved pre-activation z of fc1, or from z computed again where none was saved, with g the incoming gradient
behind drop path and the output's dropout:

    dz = ((g ∘ gamma) W2) · mask / (1 − p) · act′(z) and h again      one product with both in its epilogue
    dw2, db2, dgamma of g and h; dw1 = dzᵀ LN(x), db1 = colsum(dz); dx = LN backward of dz W1, and the incoming gradient

Seven launches of Triton's (``gemm_train``, ``layer_norm``, ``layer_norm_bwd``, ``column_sums``, ``linear_bwd``) and
three products of PyTorch's, fewer where gradients are not wanted. With inner_norm the product before it is PyTorch's,
and the derivative of the activation an elementwise pass of PyTorch's: dz then needs the whole rows of LN's backward.
8·rows·C·hidden FLOP (12 for a gated activation); moves, in elements, about 6·rows·hidden and 10·rows·C.
Limits: those of the parts.
"""

from collections.abc import Sequence

from torch import Tensor

from . import configs, reference
from . import layer_norm as ln
from .column_sums import branch_gradient
from .gemm_train import pre_activation_gradient
from .layer_norm_bwd import layer_norm_bwd
from .linear import Norm, linear
from .linear_bwd import layer_norm_product_bwd, parameter_gradients, product_gradient, row_scale_gradient


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
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dln_weight, dln_bias, dw1, db1, dw2, db2, dgamma, drow_scale, dinner_weight, dinner_bias), None where
    ``needs`` says so. z [B, ..., rows of w1] in the dtype of w1; without elements it is computed again from x."""
    needs = needs or (True,) * 11
    of_fc1, (needs_dw2, needs_db2, needs_dgamma, needs_drow_scale), of_inner = needs[:5], needs[5:9], needs[9:]
    needs_db2, needs_dgamma = needs_db2 and b2 is not None, needs_dgamma and gamma is not None
    needs_drow_scale = needs_drow_scale and row_scale is not None
    needs_sums = needs_db2 or (needs_dgamma and b2 is not None)
    g, sums = branch_gradient(grad, w2.dtype, row_scale, out_dropout_p, out_seed, needs_sums)
    # What is computed again from x.
    needs_hidden, needs_dz = needs_dw2 or needs_dgamma or needs_drow_scale, any(of_fc1)
    normal = None
    missing = z.numel() == 0 and (needs_hidden or needs_dz or any(of_inner))
    if of_fc1[3] or missing:
        normal = ln.layer_norm(x, ln_weight, ln_bias, eps, out_dtype=w1.dtype, norm=norm)
    if missing:
        assert normal is not None
        z = linear(normal, w1, b1)
    dproduct = g
    if needs_dz or any(of_inner):
        dproduct = product_gradient(g, grad, gamma, row_scale, out_dropout_p, out_seed)
    if inner_norm is None:
        dz, hidden, dinner = None, None, (None, None)
        if needs_dz:
            dz, hidden = pre_activation_gradient(
                dproduct, w2, z, activation,
                dropout_p=dropout_p, seed=seed, with_hidden=needs_hidden, config=config,
            )  # fmt: skip
        elif needs_hidden:
            hidden = reference.dropout(reference.activate(z, activation), dropout_p, seed)
    else:
        dz, hidden, dinner = _through_inner_norm(
            dproduct, z, w2, activation, inner_norm, norm, dropout_p, seed, needs_dz, of_inner
        )
    of_fc2 = parameter_gradients(g, sums, hidden, w2, b2, gamma, (needs_dw2, needs_db2, needs_dgamma))
    drow_scale = None
    if needs_drow_scale:
        assert hidden is not None and row_scale is not None
        drow_scale = row_scale_gradient(grad, linear(hidden, w2, b2), gamma, row_scale, out_dropout_p, out_seed)
    dfc1: tuple[Tensor | None, ...] = (None,) * 5
    if dz is not None:
        dfc1 = layer_norm_product_bwd(
            dz, normal, x, ln_weight, ln_bias, w1, b1, mean, rstd, norm, of_fc1, residual_grad=grad
        )
    return *dfc1, *of_fc2, drow_scale, *dinner


def _through_inner_norm(dproduct, z, w2, activation, inner_norm, norm, dropout_p, seed, needs_dz, of_inner):
    """(dz or None, LN(h), (dinner_weight, dinner_bias)) where fc2 multiplies LN(h)."""
    weight, bias, eps = inner_norm
    activated = reference.dropout(reference.activate(z, activation), dropout_p, seed)
    hidden, *statistics = ln.layer_norm_fwd(activated, weight, bias, eps, norm=norm)
    if not (needs_dz or any(of_inner)):
        return None, hidden, (None, None)
    dhidden, *dinner = layer_norm_bwd(
        dproduct @ w2, activated, weight, bias, *statistics, norm=norm, needs=(needs_dz, *of_inner)
    )
    dz = reference.activate_bwd(reference.dropout(dhidden, dropout_p, seed), z, activation) if needs_dz else None
    return dz, hidden, dinner
