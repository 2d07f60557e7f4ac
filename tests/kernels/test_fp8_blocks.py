"""kernels/fp8_blocks.py, its parts, and the quantisation of kernels/folding.py.

Scales are bounds: that no input exceeds them is tried with inputs made to reach them. A kernel that rounds to e4m3 is
held to float64 rounded once, everything else to the error budget, where the same formula in PyTorch stands for eager.
Whole models are held to their own float64 weights in tests/model/test_prepare.py.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from support import sanitizer
from support.budget import assert_within_budget
from support.fp8_blocks import E4M3, quantised, unrounded
from support.gpu import NO_FLOAT8
from support.linear import ACTIVATIONS, exact_activation
from support.prepared_blocks import EPS, HEADS, SCALE, block, formula, normalised
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from vit_fast.kernels import activation_names, configs, folding, reference
from vit_fast.kernels.block_options import PLAIN, BlockOptions

import vit_fast
from vit_fast import ops

WORDS = [word for word in ACTIVATIONS if word]
DTYPES = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))


def assert_rounded_once(actual, golden, slack=2.0**-7):
    """e4m3 numbers that are golden (float64) rounded to nearest, but for ``slack`` of a half step, without bias."""
    assert actual.dtype == E4M3 and actual.shape == golden.shape
    k = actual.double()
    step = 2.0 ** (torch.frexp(golden.abs().clamp(2.0**-6)).exponent - 4).double()
    off = (k - golden).abs() / step
    assert off.max() <= 0.5 * (1 + slack), f"{off.max().item():.4f} steps off"
    bias = ((k - golden) / step * golden.sign()).mean().abs().item()
    assert bias <= 0.02 + 1.2 / math.sqrt(golden.unique().numel()), f"rounded with a bias of {bias:.3f} steps"


def assert_errs_as(actual, eager, golden):
    """The kernels round to e4m3 where the formula in PyTorch does, and differ where a sum falls on the other side of a
    rounding: their errors are alike in size, and mostly the same."""
    error, eager_error = actual.double() - golden, eager.double() - golden
    assert error.norm() <= 1.3 * eager_error.norm() and error.abs().max() <= 2 * eager_error.abs().max()
    assert (error - eager_error).norm() <= 0.8 * eager_error.norm()


@pytest.mark.parametrize(
    "bound,scale",
    (
        (448.0, 1.0),
        (448.1, 0.5),
        (447.9, 1.0),
        (224.0, 2.0),
        (1.0, 256.0),
        (0.0, 1.0),
        (math.inf, math.nan),
        (math.nan, math.nan),
        (1e-300, 2.0**100),
        (1e300, 2.0**-100),
    ),
)
def test_scale_is_the_largest_power_of_two_under_the_bound(bound, scale):
    actual = folding.power_of_two_scale(torch.tensor(bound, dtype=torch.float64)).item()
    assert actual == scale or (math.isnan(scale) and math.isnan(actual))


def test_rows_of_a_weight_are_rounded_once():
    weight = torch.randn(40, 96, dtype=torch.float64) * torch.logspace(-3, 3, 40, dtype=torch.float64)[:, None]
    weight[3] = 0
    rows, scale = folding.quantise_rows(weight)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert_rounded_once(rows, weight / scale[:, None])
    assert (rows.double().abs().amax(1) >= 224).sum() == 39
    again, its_scale = folding.quantise_rows(rows.double() * scale[:, None])
    assert torch.equal(again.double() * its_scale[:, None], rows.double() * scale[:, None])
    weight[5, 7] = math.inf
    assert folding.quantise_rows(weight)[0].isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("optional", (True, False), ids=("everything", "bare"))
@pytest.mark.parametrize("activation", WORDS)
def test_scales_cancel(activation, optional):
    """With the rounding of the weights taken out of the comparison, quantised blocks are the blocks."""
    blocks = [block(24, 40, activation, optional=optional) for _ in range(2)]
    weights, x = quantised(blocks, activation), torch.randn(2, 5, 24, dtype=torch.float64) + 3
    assert len(weights) == 2 * len(folding.Float8Block._fields)
    assert all(t.dtype in (E4M3, torch.float32) and t.is_contiguous() for t in weights)
    golden, actual = formula(x, blocks, activation), unrounded(x, weights, HEADS, SCALE, activation, *EPS)
    assert 1e-3 < ((actual - golden).norm() / (golden - x).norm()).item() < 0.1
    # Weights that e4m3 holds exactly: the folds alone are left, and they are algebra.
    exact = []
    for norm1, qkv, proj, _, norm2, fc1, fc2, _ in blocks:
        qkv, proj, fc1, fc2 = (
            (torch.randint(-8, 9, weight.shape).double() / 16, bias) for weight, bias in (qkv, proj, fc1, fc2)
        )
        qkv, fc1 = ((w - w.roll(1, 1), b) for w, b in (qkv, fc1))  # rows whose mean is 0
        norms = [(None, bias) for _, bias in (norm1, norm2)]
        exact.append((norms[0], qkv, proj, None, norms[1], fc1, fc2, None))
    actual = unrounded(x, quantised(exact, activation), HEADS, SCALE, activation, *EPS)
    torch.testing.assert_close(actual, formula(x, exact, activation), rtol=1e-5, atol=1e-5)


def one_block(width, activation, seed=0):
    """The parts of a block whose projections have rows of very different lengths."""
    torch.manual_seed(seed)
    norm1, qkv, proj, gamma1, norm2, fc1, fc2, gamma2 = block(width, 4 * width, activation)

    def uneven(weight, bias):
        return weight * torch.logspace(-2, 2, weight.shape[0], dtype=weight.dtype)[:, None], bias

    return norm1, uneven(*qkv), proj, gamma1, norm2, uneven(*fc1), fc2, gamma2


@pytest.mark.parametrize("activation", WORDS)
@pytest.mark.parametrize("width", (1, 2, 48, 768))
def test_no_input_exceeds_a_bound(width, activation):
    """Inputs as large as LayerNorm lets them be, along each row of a weight: none saturates, some come near."""
    made = folding.fp8_block(*one_block(width, activation), activation)
    norm_scale, hidden_scale = made.norm_scale, made.hidden_scale
    qkv = made.qkv_weight, made.qkv_scale, made.qkv_bias
    fc1 = made.fc1_weight, made.fc1_scale, made.fc1_bias
    spikes = torch.eye(width, dtype=torch.float64)[:64] * 1e4
    largest = (normalised(spikes, None, None, 1e-30) * norm_scale.double()).abs().max().item()
    assert largest <= 448 and (largest > 200 or width == 1)
    used = []
    for weight, scale, bias in (qkv, fc1):
        aligned = weight.double()[:: max(1, weight.shape[0] // 100)]
        x = torch.cat([spikes, -spikes, aligned, -aligned])
        rounded = (normalised(x, None, None, 1e-30) * norm_scale.double()).float().to(E4M3)
        assert not rounded.isnan().any()
        used.append(reference.fp8_linear(rounded, weight, scale, bias, out_dtype=torch.float64))
    values = used[0][:, 2 * width :].abs()
    hidden = (reference.activate(used[1], activation) * hidden_scale).abs()
    assert values.max() <= 448 * (1 - 2.0**-8) and hidden.max() <= 448
    if width == 768:
        assert values.max() > 150 and (hidden.max() > 150 or activation in activation_names.GATED)


def test_channels_of_no_weight_and_bad_weights():
    parts = list(one_block(16, "gelu"))
    parts[1] = (parts[1][0].clone(), parts[1][1].clone())
    parts[1][0][40], parts[1][1][40] = 0, 0  # a value channel that is always 0
    weights = folding.fp8_block(*parts, "gelu")
    assert all(t.float().isfinite().all() for t in weights)
    for broken in (math.nan, math.inf):
        parts[6][0][3, 2] = broken
        weights = folding.fp8_block(*parts, "gelu")
        out = reference.fp8_blocks(torch.randn(1, 5, 16).half(), weights, 2, 0.3, "gelu", *EPS)
        assert out.isnan().all((0, 1)).nonzero().tolist() == [[3]] and out.isnan().sum() == 5


@pytest.mark.parametrize("arch", (89, 90, 100, 120))
def test_tiles_of_an_architecture(arch):
    for rows, columns, swiglu in itertools.product((1, 197, 50432, 10**7), (768, 3072), (False, True)):
        tiles = configs.pick_linear_config(rows, columns, swiglu, E4M3, torch.bfloat16, False, False, arch)
        stage = (tiles.block_m + tiles.block_n * (1 + swiglu)) * tiles.block_k
        assert stage * tiles.num_stages <= (227 if arch in (90, 100) else 99) * 1024
        assert tiles.block_k >= 64 and tiles.tma == (arch in (90, 100))


def test_tiles_of_float8():
    """Few tiles are small, but for tcgen05; swiglu has two accumulators; unaligned loads take less at a time."""
    config = configs.LinearConfig
    for arch, many, few in (
        (89, config(128, 128, 64, 8, 8, 3, False), config(64, 64, 64, 8, 4, 4, False)),
        (90, config(128, 128, 128, 8, 4, 3, True), config(64, 64, 128, 8, 4, 4, True)),
        (100, config(128, 128, 128, 8, 8, 3, True), config(128, 64, 128, 8, 4, 4, True)),
        (120, config(128, 128, 64, 8, 8, 3, False), config(64, 64, 64, 8, 4, 4, False)),
    ):
        for rows, wanted in ((50432, many), (197, few)):
            assert configs.pick_linear_config(rows, 768, False, E4M3, E4M3, False, False, arch) == wanted
            unaligned = configs.pick_linear_config(rows, 768, False, E4M3, E4M3, False, True, arch)
            small = rows == 197 and arch != 100
            tile = (64, 64, 32, 8, 4, 3) if small else (128, 64, 32, 8, 8, 3)
            assert unaligned == config(*tile, arch in (90, 100))
            half = dataclasses.replace(wanted, block_n=wanted.block_n // 2)
            assert configs.pick_linear_config(rows, 768, True, E4M3, E4M3, False, False, arch) == half


def parts_of_linear(rows, out_features, in_features, activation):
    """x and weight in e4m3, weight_scale, bias, and the scale of an out in e4m3."""
    x = (torch.randn(rows, in_features) * 16).to(E4M3)
    weight, scale = folding.quantise_rows(torch.randn(out_features, in_features, dtype=torch.float64))
    width = out_features // 2 if activation in activation_names.GATED else out_features
    bias, out_scale = torch.randn(out_features), 2.0 ** torch.randint(-3, 4, (width,))
    return x, weight, scale.float() / 16 / in_features**0.5, bias, out_scale


def exact_linear(x, weight, scale, bias, activation, out_scale=None, residual=None):
    z = torch.einsum("mk,nk->mn", x.double(), weight.double()) * scale.double() + bias.double()
    out = exact_activation(z, activation) * (1 if out_scale is None else out_scale.double())
    return out if residual is None else residual.double() + out


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("activation", (None, *WORDS))
@pytest.mark.parametrize("rows,out_features,in_features", ((37, 48, 80), (5, 24, 33), (130, 136, 128)))
def test_linear_is_within_the_budget(rows, out_features, in_features, activation, dtype):
    from vit_fast.kernels.linear import fp8_linear

    x, weight, scale, bias, _ = parts_of_linear(rows, out_features, in_features, activation)
    out = fp8_linear(x, weight, scale, bias, activation, out_dtype=dtype)
    eager = reference.fp8_linear(x, weight, scale, bias, activation, out_dtype=dtype)
    assert out.dtype == dtype
    zeros = 0.7 if activation == "relu" else 0.1
    golden = exact_linear(x, weight, scale, bias, activation)
    assert_within_budget(out, eager, golden, expected_zeros=zeros)


@pytest.mark.interp
@pytest.mark.parametrize("activation", (None, *WORDS))
def test_linear_rounds_once_to_e4m3(activation):
    from vit_fast.kernels.linear import fp8_linear

    x, weight, scale, bias, out_scale = parts_of_linear(70, 96, 48, activation)
    out = fp8_linear(x, weight, scale, bias, activation, out_scale=out_scale, out_dtype=E4M3)
    assert_rounded_once(out, exact_linear(x, weight, scale, bias, activation, out_scale))


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("splits", (1, 2, 4))
def test_linear_adds_the_residual_and_splits_its_sums(splits, dtype):
    from vit_fast.kernels.linear import fp8_linear

    x, weight, scale, *_ = parts_of_linear(20, 48, 200, None)
    residual = torch.randn(20, 96).to(dtype)[:, ::2]
    config = configs.LinearConfig(16, 32, 16, 8, 4, 2, False, splits)
    semaphore = torch.zeros(8, dtype=torch.int32)
    out = fp8_linear(x, weight, scale, None, residual=residual, semaphore=semaphore, config=config)
    eager = reference.fp8_linear(x, weight, scale, None, residual=residual)
    assert_within_budget(out, eager, exact_linear(x, weight, scale, torch.zeros(48), None, residual=residual))
    tiles = 2 * 2
    assert semaphore.tolist() == [splits if splits > 1 else 0] * tiles + [0] * 4
    spread = fp8_linear(
        x.repeat(1, 2)[:, :200], weight.t().contiguous().t(), torch.stack([scale, scale], 1)[:, 0], None,
        residual=residual, semaphore=torch.zeros(8, dtype=torch.int32), config=config,
    )  # fmt: skip
    assert torch.equal(spread, out)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("shape", ((3, 7, 48), (2, 5, 16385)))
def test_layer_norm_rounds_once(shape, dtype):
    from vit_fast.kernels.layer_norm import layer_norm

    x = (torch.randn(shape) * 3 + 50).to(dtype)
    scale = torch.full(shape[-1:], 2.0)
    out = layer_norm(x, scale, None, 1e-6, E4M3)
    assert_rounded_once(out, normalised(x.double(), scale, None, 1e-6), slack=2.0**-5)


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("tokens,head_size", ((17, 16), (50, 24), (300, 32)))
def test_attention_rounds_its_mean_of_values(tokens, head_size, dtype):
    """300 keys stream, fewer stay on chip. The weights are rounded to 16 bits, as ever, before they meet v."""
    from vit_fast.kernels.attention import attention

    qkv = torch.randn(2, tokens, 6 * head_size).to(dtype)
    qkv[..., 4 * head_size :] *= 100
    out = attention(qkv, 2, 0.3, out_dtype=E4M3)
    plain = attention(qkv, 2, 0.3)
    golden = reference.attention(qkv.double(), 2, 0.3)
    assert out.dtype == E4M3 and plain.dtype == dtype
    step = 2.0 ** (torch.frexp(golden.abs().clamp(2.0**-6)).exponent - 4).double()
    error = (plain.double() - golden).abs().max()
    assert ((out.double() - golden).abs() <= 0.5 * step + 4 * error).all()
    exact = out.double() == golden.float().to(E4M3).double()
    assert exact.double().mean() > 0.9


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize(
    "shape,hidden,activation,layout",
    (
        ((2, 17, 48), 96, "gelu", "contiguous"),
        ((1, 50, 80), 64, "quick_gelu", "contiguous"),
        ((3, 5, 32), 80, "swiglu", "tail"),
        ((2, 9, 64), 32, "gelu_tanh", "swapped"),
        ((8, 1, 48), 40, "relu", "contiguous"),
    ),
)
def test_kernels_err_as_the_formula_does(shape, hidden, activation, layout, dtype):
    blocks = [block(shape[-1], hidden, activation, dtype) for _ in range(2)]
    weights = quantised(blocks, activation)
    x = {
        "contiguous": lambda: torch.randn(shape),
        "tail": lambda: torch.randn(shape[0], shape[1] + 2, shape[2])[:, 2:],
        "swapped": lambda: torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1),
    }[layout]()
    x = x.to(dtype)
    words = (HEADS, SCALE, activation, *EPS)
    with vit_fast.backend("triton"):
        out = ops.fp8_blocks(x, weights, *words)
        assert torch.equal(ops.fp8_blocks(x, weights, *words), out)
        first, second = folding.unflatten(folding.Float8Block, weights)
        halves = ops.fp8_blocks(ops.fp8_blocks(x, first, *words), second, *words)
    assert torch.equal(halves, out)
    assert out.is_contiguous() and out.dtype == dtype
    assert_errs_as(out, reference.fp8_blocks(x, weights, *words), formula(x, blocks, activation))


@pytest.mark.interp
def test_seven_launches_a_block(monkeypatch):
    names, launch = [], sanitizer._Launch
    monkeypatch.setattr(sanitizer, "_Launch", lambda name, *rest: names.append(name) or launch(name, *rest))
    weights = quantised([block(32, 64, "gelu", torch.bfloat16) for _ in range(3)], "gelu")
    with vit_fast.backend("triton"):
        ops.fp8_blocks(torch.randn(1, 17, 32).bfloat16(), weights, HEADS, SCALE, "gelu", *EPS)
    norm, linear = "_layer_norm_fwd_kernel", "_linear_fwd_kernel"
    assert names == [norm, linear, "_attention_fwd_resident_kernel", linear, norm, linear, linear] * 3


@pytest.mark.interp
def test_operator():
    weights = quantised([block(16, 24, "gelu", torch.float16)], "gelu")
    arguments = (torch.randn(2, 5, 16).half(), weights, HEADS, SCALE, "gelu", *EPS, *PLAIN.flatten(), "triton")
    before = [weight.clone() for weight in weights]
    opcheck(torch.ops.vit_fast.fp8_blocks.default, arguments, test_utils=("test_faketensor",))
    # torch's own check of the schema multiplies every tensor by 2, and has no such kernel for e4m3.
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(weights, before))


def test_flops_are_counted():
    weights = [weight.to("meta") for weight in quantised([block(32, 64, "gelu", torch.float16)] * 2, "gelu")]
    with FlopCounterMode(display=False) as counter:
        torch.ops.vit_fast.fp8_blocks(
            torch.empty(2, 5, 32, dtype=torch.float16, device="meta"),
            weights,
            HEADS,
            SCALE,
            "gelu",
            *EPS,
            *PLAIN.flatten(),
            "triton",
        )
    matrices = 2 * 10 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)
    assert counter.get_total_flops() == 2 * (matrices + 4 * 2 * 5 * 5 * 32)


@pytest.mark.interp
def test_what_triton_cannot_runs_on_torch():
    weights = quantised([block(514, 8, "gelu", torch.float16)], "gelu")
    x = torch.randn(1, 2, 514).half()
    with vit_fast.backend("triton"), pytest.raises(vit_fast.UnsupportedError, match="head size 514 is above 256"):
        ops.fp8_blocks(x, weights, 1, SCALE, "gelu", *EPS)
    expected = reference.fp8_blocks(x, weights, 1, SCALE, "gelu", *EPS)
    assert torch.equal(ops.fp8_blocks(x, weights, 1, SCALE, "gelu", *EPS), expected)


def test_capability_is_a_reason(monkeypatch):
    from vit_fast.kernels import fp8_blocks, launch
    from vit_fast.kernels import layer_norm as ln

    class OnCuda:
        """As much of a tensor as the reasons look at."""

        device, dtype, shape = torch.device("cuda"), torch.float16, (1, 5, 16)

        def new_empty(self, *shape):
            return self

    weights = quantised([block(16, 24, "gelu", torch.float16)], "gelu")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for arch, told in ((80, ["float8 needs capability 8.9, the device has 8.0"]), (89, []), (90, [])):
        monkeypatch.setattr(configs, "arch_of", lambda device, arch=arch: arch)
        monkeypatch.setattr(ln, "not_supported_reasons", lambda *_: [])
        monkeypatch.setattr(fp8_blocks.attn, "not_supported_reasons", lambda *_: [])
        assert fp8_blocks.not_supported_reasons(OnCuda(), weights, 1) == told


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("batch,tokens,width,hidden", ((64, 197, 768, 3072), (1, 197, 768, 3072), (4, 257, 1280, 5120)))
def test_gpu_blocks(batch, tokens, width, hidden, dtype):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(NO_FLOAT8)
    blocks = [block(width, hidden, "gelu", dtype, device="cuda") for _ in range(2)]
    weights, x = quantised(blocks, "gelu"), torch.randn(batch, tokens, width, device="cuda").to(dtype)
    words = (width // 64, 0.125, "gelu", *EPS)
    with vit_fast.backend("triton"):
        out = ops.fp8_blocks(x, weights, *words)
        assert torch.equal(out, ops.fp8_blocks(x, weights, *words))
    weights_of_blocks = [t.double() for t in folding.flatten(folding.prepare_block(*parts) for parts in blocks)]
    golden = reference.prepared_blocks(x.double(), weights_of_blocks, *words)
    assert_errs_as(out, reference.fp8_blocks(x, weights, *words), golden)


def with_inner_norms(norm, dtype):
    """x, quantised weights and options of two blocks with norms before proj and fc2, and the blocks in float64."""
    torch.manual_seed(0)
    width, hidden = 32, 40
    chosen = BlockOptions(norm=norm, out_eps=1e-5, hidden_eps=1e-4, hidden_features=hidden)
    blocks = [block(width, hidden, "gelu") for _ in range(2)]
    inside = {
        "out_norm": (1 + 0.3 * torch.randn(width).double(), torch.randn(width).double()),
        "inner_norm": (1 + 0.3 * torch.randn(hidden).double(), None),
    }
    weights = folding.flatten(folding.fp8_block(*parts, "gelu", norm=norm, **inside) for parts in blocks)
    exact = folding.flatten(folding.prepare_block(*parts, norm=norm, **inside) for parts in blocks)
    return torch.randn(2, 9, width).to(dtype) + 1, weights, exact, chosen


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_inner_norms_are_folded(norm):
    x, weights, exact, chosen = with_inner_norms(norm, torch.float64)
    words = (HEADS, SCALE, "gelu", *EPS, chosen)
    golden, out = reference.prepared_blocks(x, exact, *words), reference.fp8_blocks(x.bfloat16(), weights, *words)
    assert 1e-3 < (out.double() - golden).norm() / (golden - x).norm() < 0.1
    hidden_scale = weights[folding.Float8Block._fields.index("hidden_scale")]
    assert (math.sqrt(40) * hidden_scale).max() <= 448 and hidden_scale.unique().numel() == 1


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_kernels_with_inner_norms_err_as_eager(norm, dtype):
    x, weights, exact, chosen = with_inner_norms(norm, dtype)
    words = (HEADS, SCALE, "gelu", *EPS, chosen)
    with vit_fast.backend("triton"):
        out = ops.fp8_blocks(x, weights, *words)
    golden = reference.prepared_blocks(x.double(), exact, *words)
    assert_errs_as(out, reference.fp8_blocks(x, weights, *words), golden)
