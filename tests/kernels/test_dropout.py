"""The masks of drop path and of ``ops.dropout``: which backend draws them, the kernel against the reference, statistics
over seeds, and what drops by them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from support.seeded import BACKENDS
from torch.utils.checkpoint import checkpoint
from vit_fast.kernels import reference

import vit_fast
from vit_fast import ops
from vit_fast.backends import select
from vit_fast.block import drop_path_scale

CPU = torch.device("cpu")
SEEDS = (0, 1, -5, 2**33 + 7, -(2**63), 2**63 - 1)


@pytest.mark.interp
@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000])
def test_the_kernel_draws_the_reference_s_mask(count):
    from vit_fast.kernels import dropout

    for seed, p in zip(SEEDS, (0.1, 0.5, 0.9, 1e-6, 0.3, 0.7), strict=True):
        seed = torch.tensor([seed])
        assert torch.equal(dropout.keep_mask(seed, count, p, CPU), reference.keep_mask(seed, count, p, CPU))
    x = torch.zeros(count, 2)
    assert select.drawing(CPU) == "triton"
    assert torch.equal(ops.keep_samples(x, 0.4, seed), reference.keep_mask(seed, count, 0.4, CPU))


def test_a_sample_is_kept_by_its_seed_and_index():
    seed, x = torch.tensor([11]), torch.zeros(9, 3)
    kept = ops.keep_samples(x, 0.4, seed)
    assert kept.dtype == torch.bool and torch.equal(kept, reference.keep_mask(seed, 9, 0.4, CPU))
    assert torch.equal(kept, reference.dropout_mask(seed, (9,), 0.4, CPU) > 0)
    assert torch.equal(ops.keep_samples(x[:4], 0.4, seed), kept[:4])
    assert ops.keep_samples(x, 0.0).all() and ops.keep_samples(x[:0], 0.4).shape == (0,)
    torch.manual_seed(3)
    first = ops.keep_samples(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(ops.keep_samples(x, 0.4), first)
    for word in ("auto", "torch"):
        with vit_fast.backend(word):
            assert torch.equal(ops.keep_samples(x, 0.4, seed), kept)


def test_a_kernel_that_fails_leaves_its_masks_to_the_reference(monkeypatch):
    class Broken(type(select.BACKENDS["torch"])):
        name = "broken"
        remedy = "Mend it."

        def keep_mask(self, *inputs):
            raise RuntimeError("no driver")

    broken = Broken.__new__(Broken)
    super(Broken, broken).__init__()
    del broken.keep_mask
    monkeypatch.setattr(select, "BACKENDS", {"broken": broken} | select.BACKENDS)
    seed, x = torch.tensor([11]), torch.zeros(9, 3)
    with pytest.warns(RuntimeWarning, match="broken"):
        kept = ops.keep_samples(x, 0.4, seed)
    assert torch.equal(kept, reference.keep_mask(seed, 9, 0.4, CPU))
    assert select.drawing(CPU) != "broken"


def test_statistics_over_seeds():
    """The rate, and no dependence between samples or between the seeds of branches, to five standard deviations."""
    torch.manual_seed(0)
    p, x = 0.3, torch.zeros(64, 1)
    keep = torch.stack([drop_path_scale(x, p, True) for _ in range(150)]).double() > 0
    assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
    centred = (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    for pairs in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(pairs.mean()) < 5 * pairs.numel() ** -0.5


@pytest.fixture
def by_seeds(monkeypatch):
    """A backend that draws masks, as on a GPU."""
    monkeypatch.setattr(select, "BACKENDS", BACKENDS)


@pytest.mark.usefixtures("by_seeds")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_is_the_mask_of_its_seed(dtype):
    """Also of strided elements, whose index is that in the shape; nothing, not even NaN, comes from what is dropped."""
    x, seed = torch.randn(5, 4, 3).to(dtype).transpose(0, 2).requires_grad_(), torch.tensor([2**35])
    keep = reference.keep_mask(seed, x.numel(), 0.3, CPU).view(x.shape)
    out = ops.dropout(x, 0.3, seed)
    assert out.dtype == dtype and torch.equal(out, torch.where(keep, x, 0) * (1 / 0.7))
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], torch.where(keep, grad * (1 / 0.7), 0))
    broken = torch.full_like(x, float("nan"))
    assert torch.equal(ops.dropout(broken, 0.3, seed).isnan(), keep)
    assert ops.dropout(x, 0.0) is x and ops.dropout(x[:0], 0.5).shape == (0, 4, 5)
    torch.testing.assert_close(out, reference.dropout(x, 0.3, seed))


def drawn(run, x):
    torch.manual_seed(9)
    x = x.detach().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return out, x.grad


@pytest.mark.usefixtures("by_seeds")
def test_dropout_is_drawn_again_when_recomputed():
    x = torch.randn(3, 50)
    run = lambda x: ops.dropout(ops.dropout(x, 0.2).sin(), 0.5)  # noqa: E731
    wanted = drawn(run, x)
    for reentrant in (False, True):
        again = drawn(functools.partial(checkpoint, run, use_reentrant=reentrant), x)
        assert all(map(torch.equal, again, wanted))
    compiled = torch.compile(lambda x, seed: ops.dropout(x, 0.5, seed), backend="aot_eager", fullgraph=True)
    seed = torch.tensor([4])
    for size in (3, 2):
        assert torch.equal(compiled(x[:size], seed), ops.dropout(x[:size], 0.5, seed))


@pytest.mark.usefixtures("by_seeds")
def test_statistics_of_dropout():
    """The rate, and no dependence between neighbours or calls, to five standard deviations."""
    torch.manual_seed(0)
    p, x = 0.3, torch.ones(40, 500)
    keep = torch.stack([ops.dropout(x, p) for _ in range(4)]).double() > 0
    assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
    centred = (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    for pairs in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[..., 1:] * centred[..., :-1]):
        assert abs(pairs.mean()) < 5 * pairs.numel() ** -0.5


def test_without_a_backend_that_draws_dropout_is_pytorch_s():
    x = torch.randn(4, 30, dtype=torch.float64)  # a dtype that the compiled library has not got
    torch.manual_seed(1)
    out = ops.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(out, F.dropout(x, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_is_in_the_dtype_of_the_samples(dtype):
    torch.manual_seed(0)
    x = torch.zeros(64, 1, dtype=dtype)
    scale = drop_path_scale(x, 0.3, True)
    assert scale.dtype == dtype and scale.unique().tolist() == [0, (torch.ones((), dtype=dtype) / 0.7).item()]
    assert drop_path_scale(x, 0.3, True, scale_by_keep=False).unique().tolist() == [0, 1]
    assert drop_path_scale(x, 0.3, False) is None and drop_path_scale(x, 0.0, True) is None


def test_the_operator_is_one_to_pytorch():
    torch.library.opcheck(torch.ops.vit_fast.keep_mask.default, (torch.tensor([3]), 7, 0.3, "torch"))
    with torch.device("meta"):
        assert ops.keep_samples(torch.zeros(5, 2), 0.3).shape == (5,)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: ops.keep_samples([1], 0.1), "keep_samples: x is list, expected a torch.Tensor"),
        (lambda: ops.keep_samples(torch.tensor(1.0), 0.1), "keep_samples: x has 0 dimensions, expected a batch axis"),
        (lambda: ops.keep_samples(torch.ones(2), 1.0), "keep_samples: p is 1.0, expected 0 ≤ p < 1"),
        (lambda: ops.keep_samples(torch.ones(2), "a"), "keep_samples: p is "),
        (lambda: ops.keep_samples(torch.ones(2), 0.1, 3), "keep_samples: seed is int, expected a torch.Tensor"),
        (lambda: ops.keep_samples(torch.ones(2), 0.1, torch.ones(2).long()), "expected one element"),
        (lambda: ops.dropout([1], 0.1), "dropout: x is list, expected a torch.Tensor"),
        (lambda: ops.dropout(torch.ones(2), 1.0), "dropout: p is 1.0, expected 0 ≤ p < 1"),
        (lambda: ops.dropout(torch.ones(2), 0.1, torch.ones(2)), "dropout: seed "),
    ],
)
def test_errors(call, told):
    with pytest.raises((TypeError, ValueError), match=f"vit_fast.*{told}"):
        call()
