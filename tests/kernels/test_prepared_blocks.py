"""kernels/prepared_blocks.py and the folds of kernels/reference.py against a float64 block of its own.

The folds are algebra: in float64 a prepared block is the block. In 16 bits the kernels are held to eager PyTorch on the
same prepared weights; models are held to their own weights before the fold in tests/model/test_prepare.py.
"""

import pytest
import torch
from support import sanitizer
from support.budget import assert_within_budget
from support.linear import ACTIVATIONS
from support.prepared_blocks import EPS, HEADS, SCALE, block, formula, prepared
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from vit_fast.kernels import configs, folding, reference
from vit_fast.kernels.block_options import PLAIN, BlockOptions

import vit_fast
from vit_fast import ops


@pytest.mark.parametrize("optional", (True, False), ids=("everything", "bare"))
@pytest.mark.parametrize("activation", [word for word in ACTIVATIONS if word])
def test_the_folds_are_algebra(activation, optional):
    blocks = [block(24, 40, activation, optional=optional) for _ in range(2)]
    x, weights = torch.randn(2, 5, 24, dtype=torch.float64) + 3, prepared(blocks)
    assert len(weights) == 2 * len(folding.FoldedBlock._fields)
    golden = formula(x, blocks, activation)
    actual = ops.prepared_blocks(x, weights, HEADS, SCALE, activation, *EPS)
    torch.testing.assert_close(actual, golden, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_rows_are_centred_before_they_are_rounded_and_summed_after(dtype):
    weight, bias = (torch.randn(64, 96) + 5).to(dtype), torch.randn(64).to(dtype)
    ln_weight, ln_bias = (1 + 0.3 * torch.randn(96)).to(dtype), torch.randn(96).to(dtype)
    folded, sums, shift = folding.fold_norm((weight, bias), (ln_weight, ln_bias))
    wide = weight.double() * ln_weight.double()
    assert folded.dtype == dtype and sums.dtype == shift.dtype == torch.float32
    assert torch.equal(folded, (wide - wide.mean(1, keepdim=True)).to(dtype))
    torch.testing.assert_close(sums, folded.double().sum(1).float(), rtol=0, atol=1e-6)
    assert sums.abs().max() < 0.2 < wide.sum(1).abs().min()
    torch.testing.assert_close(shift.double(), weight.double() @ ln_bias.double() + bias.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.interp
@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float64), ids=("float16", "bfloat16", "float64")
)
@pytest.mark.parametrize(
    "shape,hidden,activation,layout",
    (
        ((2, 17, 48), 96, "gelu", "contiguous"),
        ((1, 50, 80), 64, "quick_gelu", "contiguous"),
        ((3, 5, 32), 80, "swiglu", "tail"),
        ((2, 9, 64), 32, "gelu_tanh", "swapped"),
        ((1, 1, 48), 40, "relu", "contiguous"),
    ),
)
def test_kernels_are_within_the_budget_of_eager(shape, hidden, activation, layout, dtype):
    blocks = [block(shape[-1], hidden, activation, dtype) for _ in range(2)]
    weights = prepared(blocks)
    x = {
        "contiguous": lambda: torch.randn(shape),
        "tail": lambda: torch.randn(shape[0], shape[1] + 2, shape[2])[:, 2:],
        "swapped": lambda: torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1),
    }[layout]()
    x = x.to(dtype)
    words = (HEADS, SCALE, activation, *EPS)
    with vit_fast.backend("triton"):
        out = ops.prepared_blocks(x, weights, *words)
    golden = reference.prepared_blocks(x.double(), [weight.double() for weight in weights], *words)
    assert out.is_contiguous() and out.dtype == dtype
    assert_within_budget(out, reference.prepared_blocks(x, weights, *words), golden, kind="model")
    with vit_fast.backend("triton"):
        assert torch.equal(ops.prepared_blocks(x, weights, *words), out)
        first, second = folding.unflatten(folding.FoldedBlock, weights)
        halves = [ops.prepared_blocks(x, first, *words)]
        halves.append(ops.prepared_blocks(halves[0], second, *words))
    assert_within_budget(halves[1], reference.prepared_blocks(x, weights, *words), golden, kind="model")


def options(tokens, size, dtype):
    """Options of stacks by name; a head is ``size`` wide."""

    def norm(bias):
        return 1 + 0.3 * torch.randn(size).to(dtype), torch.randn(size).to(dtype) if bias else None, 1e-4

    def tables(rows, *heads):
        angles = torch.randn(*heads, rows, size)
        return angles.cos(), angles.sin()

    return {
        "RMSNorm": BlockOptions(norm="rms"),
        "inner norms": BlockOptions(out_eps=1e-5, hidden_eps=1e-4, hidden_features=40),
        "inner RMSNorms": BlockOptions(norm="rms", out_eps=1e-5, hidden_eps=1e-4, hidden_features=40),
        "qk-norm": BlockOptions(q_norm=norm(True), k_norm=norm(False)),
        "rope": BlockOptions(rope=tables(tokens - 1), num_prefix=1),
        "interleaved": BlockOptions(rope=tables(tokens, HEADS), rope_layout="interleaved"),
        "bias": BlockOptions(bias=torch.randn(1, HEADS, tokens, tokens).to(dtype)),
        "lengths": BlockOptions(key_lengths=torch.tensor([tokens, 3])),
    }


OPTIONS = tuple(options(2, 2, torch.float32))


def with_options(name, width, hidden, dtype):
    """x, folded weights and options of two blocks."""
    chosen = options(9, width // HEADS, dtype)[name]
    inside = {}
    if chosen.out_eps is not None:
        inside = dict(
            out_norm=(1 + 0.3 * torch.randn(width).to(dtype), torch.randn(width).to(dtype)),
            inner_norm=(1 + 0.3 * torch.randn(hidden).to(dtype), None),
        )
    blocks = [block(width, hidden, "gelu", dtype) for _ in range(2)]
    weights = [folding.prepare_block(*parts, norm=chosen.norm, **inside) for parts in blocks]
    return torch.randn(2, 9, width).to(dtype) + 1, blocks, inside, folding.flatten(weights), chosen


@pytest.mark.parametrize("name", OPTIONS)
def test_the_folds_with_options_are_algebra(name):
    x, blocks, inside, weights, chosen = with_options(name, 24, 40, torch.float64)
    actual = ops.prepared_blocks(x, weights, HEADS, SCALE, "gelu", *EPS, chosen)
    y, kind = x, chosen.norm
    for norm1, qkv, proj, gamma1, norm2, fc1, fc2, gamma2 in blocks:
        packed = reference.layer_norm_linear(y, *norm1, EPS[0], *qkv, norm=kind)
        out = reference.attention(packed, HEADS, SCALE, **chosen.of_attention())
        out_norm = (*inside["out_norm"], chosen.out_eps) if inside else None
        y = reference.linear_residual(out, *proj, gamma1, y, inner_norm=out_norm, norm=kind)
        hidden_norm = (*inside["inner_norm"], chosen.hidden_eps) if inside else None
        y = reference.layernorm_mlp(
            y, *norm2, EPS[1], *fc1, *fc2, "gelu", gamma2, norm=kind, inner_norm=hidden_norm
        )  # fmt: skip
    torch.testing.assert_close(actual, y, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(actual, ops.prepared_blocks(x, weights, HEADS, SCALE, "gelu", *EPS))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=("bfloat16", "float64"))
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_with_options_are_within_the_budget_of_eager(name, dtype):
    x, _, _, weights, chosen = with_options(name, 32, 40, dtype)
    words = (HEADS, SCALE, "gelu", *EPS)
    with vit_fast.backend("triton"):
        out = ops.prepared_blocks(x, weights, *words, chosen)
    wide = BlockOptions.unflatten(
        [
            value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for value in chosen.flatten()
        ]
    )
    golden = reference.prepared_blocks(x.double(), [weight.double() for weight in weights], *words, wide)
    assert_within_budget(out, reference.prepared_blocks(x, weights, *words, chosen), golden, kind="model")


def test_bad_options():
    x, weights = torch.zeros(2, 5, 16).half(), prepared([block(16, 24, "gelu", torch.float16)])
    for options, message in (
        (BlockOptions(norm="batch"), "prepared_blocks: norm is 'batch', expected one of layer, rms"),
        (BlockOptions(rope=(torch.zeros(4, 8), torch.zeros(4, 8))), r"rope cos has shape \[4, 8\], expected \[5, 8\]"),
        (BlockOptions(bias=torch.zeros(5, 5)), r"bias has 2 dimensions \[5, 5\], expected 4"),
        (BlockOptions(q_norm=(torch.ones(16), None, 1e-6)), "q_norm weight has 16 elements, expected 8"),
        (BlockOptions(key_lengths=torch.tensor([1])), "key_lengths has 1 elements, expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.prepared_blocks(x, weights, HEADS, SCALE, "gelu", *EPS, options)


@pytest.mark.interp
def test_five_launches_a_block_and_one_in_front(monkeypatch):
    names, launch = [], sanitizer._Launch
    monkeypatch.setattr(sanitizer, "_Launch", lambda name, *rest: names.append(name) or launch(name, *rest))
    weights = prepared([block(32, 64, "gelu", torch.bfloat16) for _ in range(3)])
    with vit_fast.backend("triton"):
        ops.prepared_blocks(torch.randn(1, 17, 32).bfloat16(), weights, HEADS, SCALE, "gelu", *EPS)
    five = ["_linear_fwd_kernel", "_attention_fwd_resident_kernel", *["_linear_fwd_kernel"] * 3]
    assert names == ["_row_partials_kernel", *five * 3]


@pytest.mark.interp
@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float64), ids=("float16", "bfloat16", "float64")
)
def test_every_form_of_the_statistics_is_within_the_budget_of_eager(monkeypatch, dtype):
    """On rows far from zero; partials merged by every program or once give the same bits."""
    weights = prepared([block(48, 40, "gelu", dtype) for _ in range(2)])
    x, words = (torch.randn(2, 9, 48) + 20 * torch.randn(2, 9, 1)).to(dtype), (HEADS, SCALE, "gelu", *EPS)
    golden = reference.prepared_blocks(x.double(), [weight.double() for weight in weights], *words)
    expected, outs = reference.prepared_blocks(x, weights, *words), {}
    for form in configs.STATISTICS:
        monkeypatch.setattr(configs, "pick_stack_config", lambda *args, form=form: configs.StackConfig(form))
        with vit_fast.backend("triton"):
            outs[form] = ops.prepared_blocks(x, weights, *words)
        assert_within_budget(outs[form], expected, golden, kind="model")
    assert torch.equal(outs["partials"], outs["finalised"])
    assert dtype == torch.float64 or not torch.equal(outs["partials"], outs["plain"])


@pytest.mark.interp
@pytest.mark.parametrize("form,seven", (("finalised", "_row_statistics_kernel"), ("plain", "_layer_norm_fwd_kernel")))
def test_seven_launches_a_block_in_the_other_forms(monkeypatch, form, seven):
    names, launch = [], sanitizer._Launch
    monkeypatch.setattr(sanitizer, "_Launch", lambda name, *rest: names.append(name) or launch(name, *rest))
    monkeypatch.setattr(configs, "pick_stack_config", lambda *args: configs.StackConfig(form))
    weights = prepared([block(32, 64, "gelu", torch.bfloat16) for _ in range(2)])
    with vit_fast.backend("triton"):
        ops.prepared_blocks(torch.randn(1, 17, 32).bfloat16(), weights, HEADS, SCALE, "gelu", *EPS)
    attention = [seven, "_linear_fwd_kernel", "_attention_fwd_resident_kernel", "_linear_fwd_kernel"]
    whole = [*attention, seven, "_linear_fwd_kernel", "_linear_fwd_kernel"]
    assert names == ["_row_partials_kernel"] * (form == "finalised") + whole * 2


@pytest.mark.interp
def test_operator():
    weights = prepared([block(16, 24, "gelu", torch.float16)])
    arguments = (torch.randn(2, 5, 16).half(), weights, HEADS, SCALE, "gelu", *EPS, *PLAIN.flatten(), "triton")
    opcheck(torch.ops.vit_fast.prepared_blocks.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_flops_are_counted():
    weights = [weight.to("meta") for weight in prepared([block(32, 64, "gelu", torch.float16)] * 2)]
    with FlopCounterMode(display=False) as counter:
        torch.ops.vit_fast.prepared_blocks(
            torch.empty(2, 5, 32, dtype=torch.float16, device="meta"), weights, HEADS, SCALE, "gelu", *EPS,
            *PLAIN.flatten(), "triton",
        )  # fmt: skip
    matrices = 2 * 10 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)
    assert counter.get_total_flops() == 2 * (matrices + 4 * 2 * 5 * 5 * 32)


@pytest.mark.parametrize(
    "x,error,message",
    (
        (torch.zeros(2, 5, 16), ValueError, "x has dtype torch.float32, expected float16"),
        (torch.zeros(5, 16).half(), ValueError, "x has 2 dimensions [5, 16], expected 3"),
        (torch.zeros(2, 5, 24).half(), ValueError, "x has width 24, expected 16 (as the weights)"),
        (torch.zeros(2, 5, 16, device="meta").half(), ValueError, "x is on meta, expected cpu (as weights)"),
        (None, TypeError, "x is NoneType, expected a torch.Tensor"),
    ),
)
def test_bad_input(x, error, message):
    weights = prepared([block(16, 24, "gelu", torch.float16)])
    with pytest.raises(error) as raised:
        ops.prepared_blocks(x, weights, HEADS, SCALE, "gelu", *EPS)
    assert str(raised.value) == f"vit_fast.prepared_blocks: {message}"


@pytest.mark.interp
def test_what_triton_cannot_runs_on_torch():
    weights = prepared([block(514, 8, "gelu", torch.float16)])
    x = torch.randn(1, 2, 514).half()
    with vit_fast.backend("triton"), pytest.raises(vit_fast.UnsupportedError, match="head size 514 is above 256"):
        ops.prepared_blocks(x, weights, 1, SCALE, "gelu", *EPS)
    expected = reference.prepared_blocks(x, weights, 1, SCALE, "gelu", *EPS)
    assert torch.equal(ops.prepared_blocks(x, weights, 1, SCALE, "gelu", *EPS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("batch,tokens,width,hidden", ((64, 197, 768, 3072), (1, 197, 768, 3072), (4, 257, 1280, 5120)))
def test_gpu_blocks(batch, tokens, width, hidden, dtype):
    blocks = [block(width, hidden, "gelu", dtype, device="cuda") for _ in range(2)]
    weights, x = prepared(blocks), torch.randn(batch, tokens, width, device="cuda").to(dtype)
    words = (width // 64, 0.125, "gelu", *EPS)
    with vit_fast.backend("triton"):
        out = ops.prepared_blocks(x, weights, *words)
        assert torch.equal(out, ops.prepared_blocks(x, weights, *words))
    golden = reference.prepared_blocks(x.double(), [weight.double() for weight in weights], *words)
    assert_within_budget(out, reference.prepared_blocks(x, weights, *words), golden, kind="model")
