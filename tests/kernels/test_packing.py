"""kernels/packing.py: the layout of packed weights, int8 quantisation, and kernels/reference.py on such weights."""

import pytest
import torch
from support.linear import ACTIVATIONS
from support.packed_blocks import packed, quantised, unrounded
from support.prepared_blocks import EPS, HEADS, SCALE, block, formula
from torch.nn.functional import linear
from vit_fast.kernels import activation_names, folding, packing, reference

SIZES = ((1, 1), (31, 3), (32, 4), (33, 5), (63, 64), (70, 7), (97, 41))
GROUPS = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}
WORDS = [word for word in ACTIVATIONS if word]


def random(rows, columns, dtype):
    return (torch.randn(rows, columns) * 40).to(dtype)


@pytest.mark.parametrize("dtype", GROUPS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("rows,columns", SIZES)
def test_a_packed_weight(rows, columns, dtype):
    """Element (panel, k, n, i) is the weight's (32·panel + n, group·k + i), or 0 beyond it."""
    weight, group = random(rows, columns, dtype), GROUPS[dtype]
    out = packing.pack(weight)
    panels, groups = -(-rows // 32), -(-columns // group)
    assert out.shape == (panels, groups, 32, group) and out.is_contiguous() and out.dtype == dtype
    padded = torch.zeros(32 * panels, group * groups, dtype=dtype)
    padded[:rows, :columns] = weight
    for panel in range(panels):
        for k in range(groups):
            assert torch.equal(out[panel, k], padded[32 * panel : 32 * (panel + 1), group * k : group * (k + 1)])
    back = packing.unpack(out)
    assert torch.equal(back[:rows, :columns], weight) and not back[rows:].any() and not back[:, columns:].any()


@pytest.mark.parametrize("rows", (1, 31, 32, 33, 70))
def test_a_packed_row(rows):
    values = torch.randn(rows)
    out = packing.pack_row(values)
    assert out.shape[0] % 32 == 0 and out.shape[0] - rows < 32 and out.is_contiguous()
    assert torch.equal(out[:rows], values) and not out[rows:].any()


@pytest.mark.parametrize("half", (1, 15, 16, 17, 32, 40))
@pytest.mark.parametrize("shape", ((), (3,)), ids=("vector", "matrix"))
def test_interleaved_gates_and_values(half, shape):
    """Panel p holds the gates 16p … 16p + 15, then the values that they gate."""
    t = torch.randn(2 * half, *shape)
    out = packing.interleave(t)
    units = -(-half // 16) * 16
    assert out.shape == (2 * units, *shape)
    for unit in range(units):
        place = unit // 16 * 32 + unit % 16
        for offset, start in ((0, 0), (16, half)):
            wanted = t[start + unit] if unit < half else torch.zeros(shape)
            assert torch.equal(out[place + offset], wanted)
    gates, values = packing.deinterleave(out).chunk(2)
    assert torch.equal(gates[:half], t[:half]) and torch.equal(values[:half], t[half:])


def test_int8_rounds_to_the_nearest_and_ties_to_even():
    scale = 0.5
    wanted = [-127, -2, -2, -1, 0, 0, 0, 0, 1, 2, 2, 3, 127]
    weight = torch.tensor([[-127, -2.5, -1.6, -0.6, -0.5, -0.4, 0, 0.5, 0.51, 1.5, 2.5, 2.51, 127]]).double() * scale
    integers, scales = packing.quantise_int8(weight)
    assert integers.dtype == torch.int8 and integers[0].tolist() == wanted
    assert scales.dtype == torch.float64 and scales.tolist() == [scale]


def test_int8_scales_belong_to_rows():
    weight = torch.randn(5, 40, dtype=torch.float64) * torch.tensor([1e-6, 1, 1e6, 3, 7.0]).double()[:, None]
    weight[3] = 0
    integers, scales = packing.quantise_int8(weight)
    assert (integers.abs().amax(1) == torch.tensor([127, 127, 127, 0, 127])).all() and scales[3] == 1
    assert ((integers * scales[:, None] - weight).abs() <= scales[:, None] / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("activation", WORDS)
@pytest.mark.parametrize("make,size", ((packed, 2), (quantised, 5)), ids=("packed", "int8"))
@pytest.mark.parametrize("width,hidden", ((24, 40), (34, 46), (66, 66)))
def test_linears_come_back_from_a_block(width, hidden, make, size, activation):
    """Without padding, gates before values: the folded weights. fc2's inputs may stay padded with zeros."""
    parts = block(width, hidden, activation, torch.float32)
    record = make([parts], activation)
    folded = folding.prepare_block(*parts)
    linears = packing.unpacked_linears(record, width, activation)
    for name, (weight, *values) in zip(("qkv", "proj", "fc1", "fc2"), linears, strict=True):
        wanted, bias = getattr(folded, f"{name}_weight"), getattr(folded, f"{name}_bias")
        gain = values.pop(0) if size == 5 else torch.ones(())
        restored = weight * values[0][:, None] * gain if size == 5 else weight
        rows = slice(len(wanted))
        if name == "fc1":  # where fc2's inputs are padded, each half of fc1 is
            halves = 2 if activation in activation_names.GATED else 1
            keep = torch.arange(len(weight)).unflatten(0, (halves, -1))[:, : len(wanted) // halves].flatten()
            rest = torch.ones(len(weight), dtype=torch.bool).index_fill(0, keep, False)
            assert not weight[rest].any() and not values[-1][rest].any()
            rows = keep
        restored, bias_back = restored[rows], values[-1][rows]
        assert not restored[:, wanted.shape[1] :].any()
        tolerance = 0.51 * values[0][rows].max().item() if size == 5 else 0  # the gain is 1 at most
        torch.testing.assert_close(restored[:, : wanted.shape[1]], wanted, rtol=0, atol=tolerance)
        torch.testing.assert_close(bias_back, bias, rtol=1e-6, atol=1e-6)
        if size == 5:
            assert gain.max() == 1
            assert torch.equal(values[1], weight.sum(1, dtype=torch.int32)) and values[1].dtype == torch.int32


@pytest.mark.parametrize("optional", (True, False), ids=("everything", "bare"))
@pytest.mark.parametrize("activation", WORDS)
@pytest.mark.parametrize("width,hidden,tokens", ((24, 40, 5), (34, 46, 7), (62, 14, 1)))
def test_packed_blocks_are_the_blocks(width, hidden, tokens, activation, optional):
    """Packing float32 weights only folds and moves: in float64, float32 rounding of the folded weights is left."""
    blocks = [block(width, hidden, activation, torch.float32, optional) for _ in range(2)]
    x = torch.randn(2, tokens, width, dtype=torch.float64) + 3
    weights = packed(blocks, activation)
    assert len(weights) == 2 * len(packing.PackedBlock._fields)
    golden = formula(x, blocks, activation)
    actual = reference.packed_blocks(x, weights, HEADS, SCALE, activation, *EPS)
    torch.testing.assert_close(actual, golden, rtol=0, atol=3e-6 * golden.abs().max().item())
    again = unrounded(x, weights, HEADS, SCALE, activation, *EPS, packing.PackedBlock)
    torch.testing.assert_close(actual, again, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("float32", "bfloat16", "float16")
)
@pytest.mark.parametrize("activation", WORDS)
@pytest.mark.parametrize("width,hidden,tokens", ((48, 80, 5), (34, 46, 7), (62, 30, 1)))
def test_int8_blocks_are_near_the_blocks(width, hidden, tokens, activation, dtype):
    """Quantised weights and activations err by some hundredths of what the blocks add."""
    blocks = [block(width, hidden, activation, torch.float32) for _ in range(2)]
    x, weights = torch.randn(3, tokens, width).to(dtype), quantised(blocks, activation)
    golden = formula(x, blocks, activation)
    actual = reference.int8_blocks(x, weights, HEADS, SCALE, activation, *EPS)
    assert actual.dtype == dtype
    added, rounding = (golden - x.double()).norm(), torch.finfo(dtype).eps * golden.norm()
    error = (actual.double() - golden).norm()
    assert 1e-4 * added < error < 0.08 * added + rounding
    exact = unrounded(x, weights, HEADS, SCALE, activation, *EPS, packing.Int8Block)
    assert (exact - golden).norm() < 0.05 * added and (actual.double() - exact).norm() < 0.06 * added + rounding


def test_int8_activations_round_to_256_steps_between_their_extremes():
    x = torch.tensor([[-1.0, 0.0, 0.3, 4.1], [0.0, 1, 2, 255], [-255.0, -3, -2.5, -1], [0, 0, 0, 0]]).double()
    weight, one, nothing = torch.eye(4, dtype=torch.int8), torch.ones(4), torch.zeros(4)
    out = reference.int8_linear(x, weight, one, one, nothing)
    assert torch.equal(out[1], x[1]) and not out[3].any() and out[0, 1] == 0
    assert torch.equal(out[2], torch.tensor([-255.0, -3, -3, -1]).double())  # of 252 and 253 the even one
    assert ((out[0] - x[0]).abs() <= 0.51 * 5.1 / 255).all()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_what_is_not_finite_stays_in_its_row(value):
    x = torch.randn(3, 8)
    weight = torch.ones(2, 8, dtype=torch.int8), torch.ones(8), torch.ones(2), torch.zeros(2)
    wanted = reference.int8_linear(x, *weight)
    x[1, 5] = value
    out = reference.int8_linear(x, *weight)
    assert out[1].isnan().all() and torch.equal(out[::2], wanted[::2])


def test_int8_linear_is_near_the_product():
    x, weight = torch.randn(20, 300), torch.randn(30, 300, dtype=torch.float64)
    gain = packing.input_gain(weight)
    integers, scale = packing.quantise_int8(weight / gain)
    out = reference.int8_linear(x, integers, gain, scale.float(), torch.ones(30))
    golden = linear(x.double(), weight) + 1
    assert 0 < (out - golden).norm() < 0.02 * golden.norm()


def test_a_large_column_costs_the_others_little_precision():
    """One column in 96 with 30 times the weight takes 5 of 8 bits from the others; the gain gives half of them back."""
    x, weight = torch.randn(50, 384, dtype=torch.float64), torch.randn(96, 384, dtype=torch.float64)
    x[:, ::96] /= 30  # every column says as much
    weight[:, ::96] *= 30
    golden = linear(x, weight)

    def error(gain):
        integers, scale = packing.quantise_int8(weight / gain)
        return (reference.int8_linear(x, integers, gain, scale, torch.zeros(96)) - golden).norm() / golden.norm()

    assert 4 * error(packing.input_gain(weight)) < error(torch.ones(384))


@pytest.mark.parametrize("column", (0.0, float("nan"), float("inf")))
def test_a_column_without_a_norm_has_a_gain_of_one(column):
    weight = torch.randn(5, 7).index_fill(1, torch.tensor(2), column)
    gain = packing.input_gain(weight)
    assert gain[2] == 1 and gain.isfinite().all() and (gain > 0).all()
