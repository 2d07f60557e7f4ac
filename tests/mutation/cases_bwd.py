"""Kill suites of training: dropout, sums of columns, the GEMM that keeps its pre-activation, the backward kernels."""

from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from stand_ins import Recorder, device_is_made_current, equal
from support.large_tensors import last_programs_alone, reserved
from vit_fast.kernels import column_sums as column_sums_kernels
from vit_fast.kernels import dropout as dropout_kernels
from vit_fast.kernels import reference

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
SEED = torch.tensor([2**40 + 3])


@triton.jit
def _dropped_kernel(out_ptr, value_ptr, dropout, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out_ptr + index, dropout_kernels.dropped(tl.load(value_ptr + index), dropout, index.to(tl.int64)))


def dropout():
    """Masks are those of the reference, also where a random number is p itself; factors are rounded to float32."""
    kernels = dropout_kernels
    uniform, value = reference._uniform(SEED, torch.arange(64)), torch.randn(64)
    for p in (0.1, 0.3, 0.7, uniform[5].item()):
        out, dropout = torch.empty(64), kernels.dropout_of(p, SEED)
        _dropped_kernel[(1,)](out, value, dropout, 64)
        assert torch.equal(out, value * reference.dropout_mask(SEED, (64,), p, value.device))
        assert dropout.seed_ptr is SEED and dropout.p == torch.tensor(p).item()
        assert dropout.scale == (1 / (1 - torch.tensor(p))).item()
    assert kernels.dropout_of(0.0, SEED) is None


def column_sums():
    kernels = column_sums_kernels
    small = dict(CHUNK=4, ROWS=2, COLUMNS=16, PARTIAL_ROWS=2, PARTIAL_COLUMNS=16)
    with mock.patch.multiple(kernels, **small):
        _branch_gradients(kernels)
        for view in (lambda x: x[:, 1:], lambda x: x.transpose(0, 1)[..., ::2]):
            x = view(torch.randn(3, 4, 20))
            torch.testing.assert_close(kernels.column_sums(x), x.double().flatten(0, -2).sum(0).float())
    x = torch.randn(2, 130, 72).double()
    torch.testing.assert_close(kernels.column_sums(x), x.sum((0, 1)), rtol=1e-12, atol=1e-12)
    pair = torch.randn(2, 130, 33)
    for given in ((pair[0], pair[1]), (pair[0], None), (None, pair[1]), (None, None)):
        results = kernels.add_partials(*given, FLOAT32, FLOAT16)
        for result, partials, dtype, tolerance in zip(results, given, (FLOAT32, FLOAT16), (1e-5, 2e-3)):
            assert (result is None) == (partials is None)
            if partials is not None:
                torch.testing.assert_close(result, partials.double().sum(0).to(dtype), rtol=tolerance, atol=1e-5)
    _column_sum_launches(kernels)
    _far_columns(kernels)


def _branch_gradients(kernels):
    """g is the formula's to the bit, its sums are not of rounded values."""
    row_scale = torch.tensor([1.25, 0.3, 0.7])
    for dtype, out_dtype, p, scaled, with_sums in (
        (FLOAT32, FLOAT32, 0.3, False, False), (FLOAT32, FLOAT32, 0.0, True, True), (FLOAT16, FLOAT16, 0.3, True, True),
        (BFLOAT16, FLOAT16, 0.3, False, True), (FLOAT32, FLOAT64, 0.3, True, True), (FLOAT64, FLOAT64, 0.0, True, True),
        (FLOAT32, FLOAT16, 0.0, False, True), (FLOAT16, FLOAT32, 0.0, False, False),
    ):  # fmt: skip
        grad, scale = torch.randn(3, 3, 20).to(dtype), row_scale.to(dtype) if scaled else None
        acc = FLOAT64 if FLOAT64 in (dtype, out_dtype) else FLOAT32
        wanted = grad.to(acc)
        if p:
            mask = reference.dropout_mask(SEED, grad.shape, p, grad.device)
            wanted = torch.where(mask > 0, wanted * mask.max().to(acc), 0)
        if scaled:
            wanted = wanted * scale.to(acc)[:, None, None]
        g, sums = kernels.branch_gradient(grad, out_dtype, scale, p, SEED, with_sums)
        assert torch.equal(g, wanted.to(out_dtype)) and (sums is not None) == with_sums
        if with_sums:
            wide = FLOAT64 if dtype == FLOAT64 else FLOAT32
            allowed = 1e-12 if dtype == FLOAT64 else 1e-6
            torch.testing.assert_close(sums, wanted.double().sum((0, 1)).to(wide), rtol=allowed, atol=allowed)
    grad = torch.randn(3, 2, 20)
    g, sums = kernels.branch_gradient(grad, FLOAT32, None, 0.0, None, True)
    assert g is grad
    torch.testing.assert_close(sums, grad.sum((0, 1)), rtol=1e-6, atol=1e-6)
    assert kernels.branch_gradient(grad, FLOAT32, None, 0.0, None, False) == (grad, None)
    assert kernels.column_sums(grad, FLOAT16).dtype == FLOAT16
    for dtype, wanted in ((None, FLOAT32), (FLOAT16, FLOAT16)):
        empty = kernels.column_sums(grad[:0], dtype)
        assert torch.equal(empty, torch.zeros(20, dtype=wanted))
    for with_sums in (True, False):
        g, sums = kernels.branch_gradient(grad[:0], FLOAT16, row_scale, 0.1, SEED, with_sums)
        assert g.shape == (0, 2, 20) and g.dtype == FLOAT16
        assert (sums is None) if not with_sums else torch.equal(sums, torch.zeros(20))


def _column_sum_launches(kernels):
    constants = (kernels.CHUNK, kernels.ROWS, kernels.COLUMNS, kernels.PARTIAL_ROWS, kernels.PARTIAL_COLUMNS)
    assert constants == (256, 16, 64, 128, 32)
    for name in ("_column_sums_kernel", "_partial_sums_kernel"):
        others = {"_column_sums_kernel", "_partial_sums_kernel"} - {name}
        with mock.patch.multiple(kernels, **{other: Recorder() for other in others}):
            call = lambda: kernels.add_partials(None, torch.empty(2, 3, device="cuda"), FLOAT32, FLOAT32)  # noqa: E731
            if name == "_column_sums_kernel":
                call = lambda: kernels._run(torch.empty(2, 3, device="cuda"), None, 0.0, None, None, True)  # noqa: E731
            device_is_made_current(kernels, name, call)


def _far_columns(kernels):
    """Offsets beyond 2³¹ that are products of small numbers."""
    x = torch.randn(3, 2, 20).half()
    memory = reserved(20 * (2**27 + 2**24), dtype=FLOAT16)
    wanted = kernels.branch_gradient(x, FLOAT32, None, 0.0, None, True)
    for strides in ((2**30 + 64, 20, 1), (64, 2**31 + 64, 1), (2, 1, 2**27 + 2**24)):
        far = torch.as_strided(memory, x.shape, strides).copy_(x)
        equal(kernels.branch_gradient(far, FLOAT32, None, 0.0, None, True), wanted)
    rows = 2**25 + 3
    with last_programs_alone():
        g, _ = kernels.branch_gradient(x[0, :1].repeat(1, 4)[:, :64].expand(rows, 64), FLOAT32, None, 0.0, None, False)
    assert torch.equal(g[-1], x[0, 0].repeat(4)[:64].float()) and not g[0].any()
    partials = reserved(2, 2**31 + 64, dtype=FLOAT32)
    partials[:, -32:] = torch.randn(2, 32)
    with last_programs_alone():
        sums, _ = kernels.add_partials(partials, None, FLOAT32, FLOAT32)
    torch.testing.assert_close(sums[-32:], partials[:, -32:].sum(0))
