"""kernels/layer_norm_bwd.py and kernels/column_sums.py against autograd in float64 on the same rounded inputs.

Widths as in test_layer_norm.py: real ViTs, one that fills its block, 1, and widths above one block, which take the
kernels that loop. Rows far from zero and constant rows; rows in any layout; offsets beyond 2³¹.
"""

import pytest
import torch
from support.budget import assert_within_budget
from support.large_tensors import last_programs_alone, reserved
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LayerNormBwdConfig, pick_layer_norm_bwd_config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")
SHORT = LayerNormBwdConfig(rows=1, block=32, num_warps=4, chunk=4)  # the kernels for wide rows


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.layer_norm_bwd", reason="Triton is not installed")


def problem(shape, dtype, mean=0.0, side_dtype=None, spread=1.0):
    """grad, x, weight, bias, residual_grad"""
    width = shape[-1]
    x = (torch.randn(shape) * spread + mean).to(dtype)
    weight, bias = (1 + 0.3 * torch.randn(width)).to(side_dtype or dtype), torch.randn(width).to(side_dtype or dtype)
    return torch.randn(shape).to(dtype), x, weight, bias, torch.randn(shape).to(dtype)


def autograd(grad, x, weight, bias, residual_grad, norm, dtype=None):
    """dx + residual_grad, dweight, dbias"""
    leaves = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
    reference.layer_norm(*leaves, 1e-6, norm=norm).backward(grad.to(dtype or x.dtype))
    dx, *rest = (None if leaf is None else leaf.grad for leaf in leaves)
    return (dx if residual_grad is None else dx + residual_grad.to(dx.dtype)), *rest


def check(kernels, grad, x, weight, bias, residual_grad, norm="layer", config=None, expected_zeros=0.1, order=0.0):
    _, mean, rstd = reference.layer_norm_fwd(x, weight, bias, 1e-6, norm=norm)
    results = kernels.layer_norm_bwd(
        grad, x, weight, bias, mean, rstd, norm=norm, residual_grad=residual_grad, config=config
    )
    eager = autograd(grad, x, weight, bias, residual_grad, norm)
    golden = autograd(grad, x, weight, bias, residual_grad, norm, torch.float64)
    for result, e, g in zip(results, eager, golden, strict=True):
        if g is None:
            assert result is None
            continue
        assert result.is_contiguous()
        few = g.dim() == 1
        replicas = [
            (autograd(*other, norm)[i], autograd(*other, norm, torch.float64)[i])
            for i in (1, 2)
            for other in [problem(x.shape, x.dtype, side_dtype=weight.dtype) for _ in range(3 * few)]
        ] if few and weight is not None and bias is not None else None  # fmt: skip
        assert_within_budget(
            result,
            e.to(result.dtype),
            g,
            kind="gradient",
            expected_zeros=expected_zeros,
            replicas=replicas,
            order=order,
        )
    return results


def test_every_width_has_a_config():
    for width in (*range(1, 5000), 8192, 8193, 65536):
        tiles = pick_layer_norm_bwd_config(width)
        assert tiles.block & (tiles.block - 1) == 0 and tiles.rows >= 1
        assert tiles.block * tiles.rows <= 512 * tiles.num_warps
        assert tiles.block >= width or tiles.rows == 1


@pytest.mark.interp
@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "shape", ((1, 2, 48), (2, 2, 192), (2, 9, 588), (1, 17, 768), (3, 64), (2, 3, 1152), (2, 3, 4, 80))
)
def test_vit_shapes(kernels, shape, dtype, norm):
    check(kernels, *problem(shape, dtype), norm=norm)


@pytest.mark.interp
@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_wide_rows(kernels, dtype, norm):
    check(kernels, *problem((2, 2, 9000), dtype), norm=norm)
    check(kernels, *problem((5, 3, 100), dtype), norm=norm, config=SHORT)


@pytest.mark.interp
@pytest.mark.parametrize("config", (None, SHORT), ids=("one block", "loop"))
@pytest.mark.parametrize("mean,spread", ((1e2, 1e-2), (1e4, 1.0), (1e6, 1.0), (-1000.0, 1.0)))
def test_far_means(kernels, mean, spread, config):
    grad, x, weight, bias, past = problem((1, 9, 384), torch.float32, mean, spread=spread)
    check(kernels, grad, x, weight, bias, past, config=config)
    check(kernels, grad, x, weight, None, None, config=config)


@pytest.mark.interp
@pytest.mark.parametrize("config", (None, SHORT), ids=("one block", "loop"))
@pytest.mark.parametrize("value", (0.0, 0.1, 1e6 + 1 / 3, -3e7))
def test_constant_rows(kernels, value, config):
    """x̂ is zero: dx is rstd · (n − mean(n)), dweight zero."""
    grad, _, weight, bias, _ = problem((3, 768), torch.float32)
    x = torch.full((3, 768), value)
    mean, rstd = x[:, 0].clone(), torch.full((3,), 1e3)
    dx, dweight, dbias = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, config=config)
    n = (grad * weight).double()
    torch.testing.assert_close(dx.double(), 1e3 * (n - n.mean(1, keepdim=True)), rtol=1e-5, atol=1e-3)
    assert not dweight.any()
    torch.testing.assert_close(dbias, grad.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.interp
@pytest.mark.parametrize("config", (None, SHORT), ids=("one block", "loop"))
@pytest.mark.parametrize("weight,bias", ((True, False), (False, True), (False, False)))
def test_without_parameters(kernels, weight, bias, config):
    grad, x, w, b, past = problem((2, 17, 192), torch.float64)
    _, mean, rstd = reference.layer_norm_fwd(x, None, None, 1e-6)
    w, b = w if weight else None, b if bias else None
    results = kernels.layer_norm_bwd(grad, x, w, b, mean, rstd, residual_grad=past, config=config)
    for result, wanted in zip(results, autograd(grad, x, w, b, past, "layer"), strict=True):
        assert (result is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(result, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.interp
def test_results_that_are_not_wanted_launch_nothing(kernels, monkeypatch):
    grad, x, weight, bias, _ = problem((2, 5, 48), torch.float32)
    _, mean, rstd = reference.layer_norm_fwd(x, weight, bias, 1e-6)
    launched = []
    for name in ("_layer_norm_bwd_kernel", "_layer_norm_wide_bwd_kernel", "_layer_norm_sums_kernel"):
        kernel = getattr(kernels, name)
        recorder = type(
            "Recorder", (), {"__getitem__": lambda s, grid, n=name, k=kernel: launched.append(n) or k[grid]}
        )
        monkeypatch.setattr(kernels, name, recorder())
    arguments = (grad, x, weight, bias, mean, rstd)
    assert kernels.layer_norm_bwd(*arguments, needs=(False, False, False)) == (None, None, None) and not launched
    kernels.layer_norm_bwd(*arguments, needs=(True, False, False), config=SHORT)
    kernels.layer_norm_bwd(*arguments, needs=(False, True, False), config=SHORT)
    kernels.layer_norm_bwd(*arguments, needs=(False, True, True))
    assert launched == ["_layer_norm_wide_bwd_kernel", "_layer_norm_sums_kernel", "_layer_norm_bwd_kernel"]


LAYOUTS = {
    "without the class token": lambda x: x[:, 1:],
    "one token": lambda x: x[:, 3],
    "transposed batch": lambda x: x.transpose(0, 1),
    "transposed channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other channel": lambda x: x[..., ::2],
    "expanded rows": lambda x: x[:, :1].expand(-1, 5, -1),
    "expanded batch": lambda x: x[:1].expand(4, -1, -1),
    "one row": lambda x: x[1:2, 4:5],
    "part of every channel vector": lambda x: x[..., 1:41],
    "three strides": lambda x: x.unflatten(1, (2, 4)).permute(1, 0, 2, 3),
}


@pytest.mark.interp
@pytest.mark.parametrize("config", (None, SHORT), ids=("one block", "loop"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernels, layout, config):
    """Of the gradient, x and the residual's gradient in turn; weight and bias at a stride of two."""
    tensors = [LAYOUTS[layout](t) for t in torch.randn(3, 3, 8, 48)]
    width = tensors[0].shape[-1]
    weight, bias = torch.randn(2, width).t().contiguous().unbind(1)
    _, mean, rstd = reference.layer_norm_fwd(tensors[1].contiguous(), weight, bias, 1e-6)
    grad, x, past = (t.contiguous() for t in tensors)
    wanted = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config)
    for i, view in enumerate(tensors):
        grad, x, past = (view if i == j else t.contiguous() for j, t in enumerate(tensors))
        results = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config)
        assert all(torch.equal(result, other) for result, other in zip(results, wanted, strict=True))


@pytest.mark.interp
def test_many_rows_share_few_programs(kernels):
    """More tiles than programs: every program takes several, the last fewer."""
    grad, x, weight, bias, past = problem((37, 16), torch.float64)
    _, mean, rstd = reference.layer_norm_fwd(x, weight, bias, 1e-6)
    wanted = autograd(grad, x, weight, bias, past, "layer")
    for config in (LayerNormBwdConfig(4, 16, 4, programs=3), LayerNormBwdConfig(2, 16, 4, programs=19)):
        results = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config)
        for result, other in zip(results, wanted, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-12, atol=1e-12)


@pytest.mark.interp
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_bad_row_stays_alone(kernels, bad):
    grad, x, weight, bias, past = problem((2, 9, 48), torch.float32)
    _, mean, rstd = reference.layer_norm_fwd(x, weight, bias, 1e-6)
    clean, *_ = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past)
    grad[1, 4, 5] = bad
    spoilt, dweight, dbias = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past)
    keep = torch.arange(18) != 13
    assert torch.equal(spoilt.view(18, 48)[keep], clean.view(18, 48)[keep]) and not spoilt[1, 4].isfinite().any()
    assert not dweight[5].isfinite() and not dbias[5].isfinite() and dbias[:5].isfinite().all()


@pytest.mark.interp
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_powers_of_two_scale_exactly(kernels, norm):
    grad, x, weight, bias, _ = problem((2, 9, 192), torch.float32)
    _, mean, rstd = reference.layer_norm_fwd(x, weight, bias, 1e-6, norm=norm)
    dx, dweight, dbias = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, norm=norm)
    again = kernels.layer_norm_bwd(grad * 8, x * 4, weight, bias, mean * 4, rstd / 4, norm=norm)
    assert all(torch.equal(a, b) for a, b in zip(again, (dx * 2, dweight * 8, dbias * 8), strict=True))


@pytest.mark.interp
@pytest.mark.parametrize("config", (LayerNormBwdConfig(2, 64, 4), SHORT), ids=("one block", "loop"))
def test_offsets_beyond_two_to_the_31(kernels, config):
    step = 2**31 + 64
    storage = reserved(2 * step, dtype=torch.float16)
    tensors = torch.randn(3, 2, 3, 48).half()
    weight, bias = torch.randn(2, 48).half()
    _, mean, rstd = reference.layer_norm_fwd(tensors[1], weight, bias, 1e-6)
    grad, x, past = tensors
    wanted = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config)
    for i in range(3):
        for strides in ((step, 48, 1), (64, step // 2, 1), (64, 1, step // 32)):
            far = torch.as_strided(storage, grad.shape, strides).copy_(tensors[i])
            grad, x, past = (far if i == j else t for j, t in enumerate(tensors))
            results = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config)
            assert all(torch.equal(result, other) for result, other in zip(results, wanted, strict=True))


@pytest.mark.interp
@pytest.mark.parametrize("block", (64, 16), ids=("one block", "loop"))
def test_outputs_beyond_two_to_the_31(kernels, block):
    rows = (2**31 + 64) // 64
    x, grad = torch.randn(1, 64).half(), torch.randn(1, 64).half()
    _, mean, rstd = reference.layer_norm_fwd(x, None, None, 1e-6)
    wanted, *_ = kernels.layer_norm_bwd(grad, x, None, None, mean, rstd)
    means, rstds = (reserved(rows, dtype=torch.float32) for _ in range(2))
    means[-1], rstds[-1] = mean[0], rstd[0]
    config = LayerNormBwdConfig(rows=1, block=block, num_warps=4, programs=2**30)
    with last_programs_alone():
        dx, _, _ = kernels.layer_norm_bwd(
            grad.expand(rows, 64), x.expand(rows, 64), None, None, means, rstds, config=config
        )
    assert dx.numel() > 2**31 and not dx[0].any()
    torch.testing.assert_close(dx[-1:], wanted, rtol=2e-3, atol=2e-3)
