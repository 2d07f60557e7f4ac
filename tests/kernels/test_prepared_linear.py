"""kernels/prepared_linear.py, its weights (kernels/packing.py) and kernels/reference.py on them.

Tokens in float8 are rounded once by a step of their own; the rest is held to the error budget by the random cases of
test_properties_prepared_linear.py. Whole models are in tests/integrations/test_prepared_models.py.
"""

import math

import pytest
import torch
from support.layer_norm import formula as normalised
from support.prepared_linear import PACK, formula, kernel_of, problem
from torch.library import opcheck
from vit_fast.kernels import arguments, folding, packing, reference
from vit_fast.kernels.prepared_layer import PreparedLayer

import vit_fast
from vit_fast import ops

BOTH = pytest.mark.parametrize("fp8", (False, True), ids=("prepared", "fp8"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def stepped(x):
    """A row of each kind: everyday values, one large, zeros, the smallest and the largest of a dtype."""
    x = x.clone()
    x[1, 3], x[2] = 1e4, 0
    x[3] *= torch.finfo(x.dtype).smallest_normal
    x[4] = torch.finfo(x.dtype).max
    return x


def assert_rounded_by_steps(tokens, step, golden):
    """Each element of a row is the nearest e4m3 number of golden / step, and the largest is 448."""
    largest = golden.abs().amax(-1, keepdim=True)
    wanted = torch.where(largest > 1e-30, largest / 448, 1.0)
    torch.testing.assert_close(step.double(), wanted, rtol=2e-6, atol=0)
    scaled = golden / wanted
    spacing = 2.0 ** (torch.frexp(scaled.abs().clamp(2.0**-6)).exponent - 4).double()
    assert tokens.dtype == folding.E4M3 and ((tokens.double() - scaled).abs() <= spacing / 2 * 1.01).all()
    assert (tokens.double().abs().amax(-1, keepdim=True)[largest > 1e-30] == 448).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_have_steps_of_their_own(dtype):
    x = stepped(torch.randn(6, 40).to(dtype))
    assert_rounded_by_steps(*reference.quantise_tokens(x.float()), x.double())


@pytest.mark.interp
@pytest.mark.parametrize("norm", (None, "layer", "rms"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_tokens_have_steps_of_their_own(dtype, norm):
    from vit_fast.kernels.prepared_linear import quantise_tokens

    x = torch.randn(6, 40).to(dtype)
    weight, bias, eps = (torch.randn(40), torch.randn(40), 1e-6) if norm else (None, None, None)
    x = x if norm else stepped(x)
    golden = normalised(x, weight, bias, eps, norm)[0] if norm else x.double()
    tokens, statistics = quantise_tokens(x, weight, bias, eps, norm or "layer")
    assert not statistics.values[0].any()
    assert_rounded_by_steps(tokens, statistics.values[1][:, None], golden)
    spread = torch.stack([x, x], 2)[..., 1]
    assert torch.equal(quantise_tokens(spread, weight, bias, eps, norm or "layer")[0].float(), tokens.float())


@pytest.mark.interp
def test_a_token_that_is_not_finite_becomes_nan():
    from vit_fast.kernels.prepared_linear import quantise_tokens

    x = torch.randn(3, 20)
    x[1, 4], x[2, 5] = math.inf, math.nan
    tokens, _ = quantise_tokens(x)
    assert tokens.float().isnan().nonzero().tolist() == [[1, 4], [2, 5]]


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("shape", ((0, 5, 48), (2, 0, 48)))
def test_no_tokens(shape, fp8):
    out = kernel_of(fp8)(*problem(shape, 32, torch.bfloat16, fp8, norm="layer"))
    assert out.shape == (*shape[:2], 32) and out.dtype == torch.bfloat16


@pytest.mark.interp
def test_wide_tokens_are_left_to_others():
    from vit_fast.kernels import prepared_linear as kernels

    x, layer = torch.empty(1, 70000), PreparedLayer([torch.empty(8, 70000)], None, 8, eps=1e-6)
    assert kernels.prepared_linear_not_supported_reasons(x, layer) == ["width 70000 is above 65536"]
    assert kernels.fp8_linear_not_supported_reasons(x, layer) == ["width 70000 is above 16384"]
    assert kernels.prepared_linear_not_supported_reasons(x, layer._replace(eps=None)) == []


@BOTH
@pytest.mark.parametrize("norm,activation,ends,bias", ((None, None, True, True), ("layer", "swiglu", False, False)))
def test_reference(fp8, norm, activation, ends, bias):
    torch.manual_seed(0)
    inputs = problem((2, 9, 64), 48, torch.float32, fp8, activation, norm, ends, bias)
    golden, out = formula(*inputs), reference.packed_linear(*inputs)
    error = ((out - golden).norm() / golden.norm()).item()
    assert (1e-3 < error < 0.05) if fp8 else error < 1e-6


def test_a_float8_weight_and_one_as_it_is():
    torch.manual_seed(0)
    weight = torch.randn(24, 40).t()
    prepared, fp8 = packing.prepared_weight(weight), packing.fp8_weight(weight)
    assert prepared.tensors[0].is_contiguous() and torch.equal(prepared.tensors[0], weight)
    rows, scale = fp8.tensors
    assert rows.is_contiguous() and rows.dtype == folding.E4M3 and scale.dtype == torch.float32
    torch.testing.assert_close(rows.float() * scale[:, None], weight, rtol=2.0**-4, atol=1e-6)
    bias = torch.randn(40)
    assert prepared.bias(None) is None and prepared.bias(bias) is bias
    assert [packing.is_tiny(torch.empty(*size)) for size in ((15, 400), (400, 8), (16, 16))] == [True, True, False]


@BOTH
def test_operations_take_the_place_of_the_unprepared_ones(fp8):
    """LayerNorm and a linear layer, an MLP, the end of a branch and a layer alone, gated or not."""
    torch.manual_seed(0)
    x, norm = torch.randn(2, 7, 32), (torch.randn(32), torch.randn(32), 1e-6)
    w1, b1 = torch.randn(128, 32) * 0.2, torch.randn(128)
    w2, b2 = torch.randn(32, 64) * 0.2, torch.randn(32)
    gamma, inner = torch.randn(32), (torch.randn(64), torch.randn(64), 1e-5)
    hidden = torch.randn(2, 7, 64)
    calls = (
        lambda pack: ops.layer_norm_linear(x, *norm, pack(w1), b1, "gelu"),
        lambda pack: ops.layer_norm_linear(x, *norm, pack(w1), None, "geglu", norm="rms"),
        lambda pack: ops.layernorm_mlp(x, *norm, pack(w1), b1, pack(w2), b2, "swiglu", gamma, inner_norm=inner),
        lambda pack: ops.linear_residual(hidden, pack(w2), b2, gamma, x, inner_norm=inner),
        lambda pack: ops.linear(x, pack(w1), b1, "silu"),
        lambda pack: ops.linear(x, pack(w1), None),
    )
    for call in calls:
        wanted, out = call(lambda weight: weight), call(PACK[fp8])
        assert out.dtype == wanted.dtype and out.shape == wanted.shape
        error = ((out - wanted).norm() / wanted.norm()).item()
        assert (1e-4 < error < 0.1) if fp8 else error < 1e-6


@BOTH
def test_operators_are_sound(fp8):
    operator = torch.ops.vit_fast.fp8_linear.default if fp8 else torch.ops.vit_fast.prepared_linear.default
    # torch's own check of the schema multiplies every tensor by 2, and has no such kernel for e4m3.
    checks = ("test_faketensor",) if fp8 else ("test_schema", "test_faketensor")
    for options in (dict(activation="swiglu", norm="layer"), dict(ends=True)):
        x, layer, residual = problem((2, 3, 24), 16, torch.bfloat16, fp8, **options)
        opcheck(operator, (x, *layer, residual, "torch"), test_utils=checks)


@BOTH
def test_bad_tokens_are_named(fp8):
    weight = PACK[fp8](torch.randn(16, 24))
    with pytest.raises(ValueError, match=r"vit_fast\.(fp8|prepared)_linear: x has width 23, expected 24"):
        ops.linear(torch.randn(2, 23), weight, None)
    with pytest.raises(ValueError, match=r"x has dtype torch\.bfloat16, expected torch\.float32"):
        ops.linear(torch.randn(2, 24).bfloat16(), weight, None)
    with vit_fast.backend("cpu"), pytest.raises(arguments.UnsupportedError, match="was forced and cannot run"):
        ops.linear(torch.randn(2, 24), weight, None)
