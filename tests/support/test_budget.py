"""The error budget and the interpreter's fixes, tested on results known to be wrong and known to be right."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import sanitizer
from support.budget import assert_within_budget, ulp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOW = (torch.float16, torch.bfloat16)


def problem(dtype, rows=64, width=96, inner=48):
    """(eager, golden) of a matrix product; golden rounded once to dtype is the best a kernel can do."""
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, width).to(dtype)
    return a @ b, a.double() @ b.double()


def truncate(x, dtype):
    """x toward zero in dtype."""
    rounded = x.to(dtype)
    return torch.where(rounded.double().abs() > x.abs(), torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("forward", "gradient", "model"))
def test_right_results_pass(dtype, kind):
    eager, golden = problem(dtype)
    assert_within_budget(golden.to(dtype), eager, golden, kind)
    assert_within_budget(eager, eager, golden, kind)


def test_float64_passes_and_fails():
    _, golden = problem(torch.float64)
    assert_within_budget(golden * (1 + 2**-52), golden, golden)
    with pytest.raises(AssertionError, match=r"^max:"):
        assert_within_budget(golden * (1 + 2**-44), golden, golden)


@pytest.mark.parametrize("dtype", LOW)
def test_truncation_fails(dtype):
    eager, golden = problem(dtype)
    with pytest.raises(AssertionError, match=r"^(bias|rms|max):"):
        assert_within_budget(truncate(golden, dtype), eager, golden)


@pytest.mark.parametrize("dtype", LOW)
def test_scale_one_ulp_off_fails(dtype):
    eager, golden = problem(dtype)
    scaled = (golden * (1 + torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match=r"^(bias|rms|max):"):
        assert_within_budget(scaled, eager, golden)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_fails(dtype):
    eager, golden = problem(dtype)
    actual = golden.to(dtype)
    actual[3, 5] += 8 * ulp(dtype, golden.abs().max().item())
    eager = golden.to(dtype) if dtype == torch.float32 else eager
    with pytest.raises(AssertionError, match=r"^max:.*at \(3, 5\)"):
        assert_within_budget(actual, eager, golden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_not_finite_fails(dtype, value):
    eager, golden = problem(dtype)
    actual = golden.to(dtype)
    actual[0, 0] = value
    with pytest.raises(AssertionError, match=r"^finite:"):
        assert_within_budget(actual, eager, golden)


def test_tf32_for_fp32_fails():
    eager, golden = problem(torch.float32)
    with pytest.raises(AssertionError, match=r"^max:"):
        assert_within_budget(golden.float() + 2**-11 * torch.randn_like(eager), eager, golden)


def test_vacuous_comparisons_fail():
    eager, golden = problem(torch.float16)
    zero = torch.zeros_like(golden)
    sparse = golden.relu()
    for actual, reference, gold in (
        (zero.half(), zero.half(), zero),
        (sparse.half(), sparse.half(), sparse),
        (golden.half(), golden.half(), golden.half().double()),
        (golden.half(), eager, golden.float()),
        (golden.half(), eager.float(), golden),
        (golden.half(), eager, golden / 0),
        (golden.half(), eager / 0, golden),
        (golden.half()[:0], eager[:0], golden[:0]),
    ):
        with pytest.raises(AssertionError, match="MISTRUSTED"):
            assert_within_budget(actual, reference, gold)
    assert_within_budget(sparse.half(), eager.relu(), sparse, expected_zeros=0.7)


def test_shape_mismatch_fails():
    eager, golden = problem(torch.float16)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(golden.half()[:1], eager, golden)


def test_failure_names_the_case_in_one_line():
    eager, golden = problem(torch.float16)
    with pytest.raises(AssertionError) as error:
        assert_within_budget(golden.half() + 1, eager, golden)
    assert str(error.value).splitlines()[-1].startswith("repro: ")
    assert "test_failure_names_the_case_in_one_line" in str(error.value).splitlines()[-1]


def test_ulp_is_the_spacing():
    for dtype in (*DTYPES, torch.float64):
        for value in (1.0, 1.5, 3.0, 1000.0, 2.0**-10):
            x = torch.tensor(value, dtype=dtype)
            step = torch.nextafter(x, x.new_tensor(math.inf)).double() - x.double()
            assert ulp(dtype, value) == step.item()


def test_timm_imports_without_cuda():
    import timm

    model = timm.create_model("test_vit", pretrained=False)
    assert model(torch.zeros(1, 3, 160, 160)).isfinite().all()


def test_unlisted_skip_fails_the_run(tmp_path):
    """A skip whose reason is not listed makes the run fail, a listed one does not."""
    tests = Path(__file__).parents[1]
    (tmp_path / "support").mkdir()
    for name in ("conftest.py", "support/interpreter_cures.py", "support/sanitizer.py"):
        (tmp_path / name).write_text((tests / name).read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    interp: i\n    aot: a\n    gpu: g\n")
    for reason, expected in (("because", 1), ("Triton is not installed", 0)):
        (tmp_path / "test_it.py").write_text(f"import pytest\n\ndef test_it():\n    pytest.skip({reason!r})\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == expected, result.stdout


def special_floats():
    """Random bit patterns and the corners: ties, subnormals, largest values, infinities, NaN payloads, both signs."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    corners = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7F800001]
    corners += [0x7FC00000, 0x7FFFFFFF, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x007FFFFF, 0x00800000]
    corners = np.array(corners, dtype=np.uint32)
    return torch.from_numpy(np.concatenate([bits, corners, corners | 0x80000000]).view(np.float32))


def same(a, b):
    """Bit for bit, where any NaN equals any NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(integer), b[~nan].view(integer))


@pytest.mark.interp
@pytest.mark.parametrize(
    "source,rounding",
    ((torch.float32, None), (torch.float32, "rtne"), (torch.float16, None), (torch.float64, None)),
)
def test_interpreted_casts_to_bf16_round_to_nearest_even(source, rounding):
    values = special_floats().to(source)
    assert same(cast_in_kernel(values, torch.bfloat16, rounding), values.float().to(torch.bfloat16))


@pytest.mark.interp
@pytest.mark.parametrize("target", (torch.float32, torch.float16, torch.float64))
def test_interpreted_casts_from_bf16_are_exact(target):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    poison = sanitizer.poison(torch.zeros(1, dtype=torch.bfloat16)).view(torch.int16)
    values = values[values.view(torch.int16) != poison]
    assert same(cast_in_kernel(values, target), values.to(target))


@pytest.mark.interp
def test_interpreted_casts_between_bf16_and_integers():
    pixels = torch.arange(256).to(torch.uint8)
    assert torch.equal(cast_in_kernel(pixels, torch.bfloat16), pixels.to(torch.bfloat16))
    assert torch.equal(cast_in_kernel(pixels.to(torch.bfloat16), torch.int32), pixels.int())


@pytest.mark.interp
def test_interpreted_truncation_is_still_there_when_asked_for():
    values = special_floats()
    values = values[values.isfinite() & (values.abs() > 1e-30) & (values.abs() < 1e30)]
    assert torch.equal(
        cast_in_kernel(values, torch.bfloat16, "rtz").double(), truncate(values.double(), torch.bfloat16).double()
    )


@pytest.mark.interp
def test_fresh_memory_is_poisoned():
    x = torch.zeros(3)
    for fresh in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (2,))):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) != 0).all()


def cast_in_kernel(values, target, rounding=None):
    import triton
    import triton.language as tl

    @triton.jit
    def cast_kernel(out_ptr, x_ptr, size, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < size)
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offsets < size)

    out = torch.empty(values.shape, dtype=target)
    cast_kernel[(triton.cdiv(values.numel(), 65536),)](out, values, values.numel(), rounding, 65536)
    return out
