"""The backward kernels of LayerNorm, the linear layers, the MLP branch and patch embedding, called as the backends do.

Forward and backward are the kernels' own, interpreted (``support.trained_operations``), truth is autograd of the
reference in float64 on the same rounded inputs, eager the same at the dtype. The error budget of gradients, gradcheck
through both kernels, results that are not wanted, layouts of the incoming gradient, dropout masks, order of programs.
VIT_FAST_DEPTH=full: gradcheck with every option, and all results but one.
"""

import pytest
import torch
from support import properties, sanitizer, trained_operations
from support.budget import assert_within_budget
from vit_fast.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interp
REPLICAS = 12
NAMES = tuple(trained_operations.problems(torch.Generator()))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")


SMALL = dict(width=10, features=6, hidden=12, tokens=3)


def drawn(name, seed, dtype=torch.float64, **sizes):
    """(problem, incoming gradient), rounded to the dtype, in float64."""
    generator = torch.Generator().manual_seed(seed)
    problem = trained_operations.problems(generator, **sizes)[name].to(dtype).to(torch.float64)
    grad = torch.randn(trained_operations.formula(problem).shape, generator=generator, dtype=torch.float64)
    return problem, grad.to(dtype).double()


def sides(name, seed, dtype):
    problem, grad = drawn(name, seed, dtype)
    return trained_operations.autograd(problem.to(dtype), grad.to(dtype)), trained_operations.autograd(problem, grad)


def in_budget(name, dtype, sides, problem, actual):
    eager, golden = sides(name, 0, dtype)
    others = [sides(name, seed, dtype) for seed in range(1, REPLICAS)]
    assert actual.keys() == golden.keys()
    for argument, g in golden.items():
        replicas = [(eagers[argument], goldens[argument]) for eagers, goldens in others]
        assert actual[argument].dtype == problem.tensors[argument].dtype
        assert_within_budget(
            actual[argument], eager[argument], g, kind="gradient", repro=f"{name} {dtype}, {argument}",
            expected_zeros=0.6, replicas=replicas,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_budget(name, dtype):
    problem, grad = drawn(name, 0, dtype)
    problem = problem.to(dtype)
    in_budget(name, dtype, sides, problem, trained_operations.gradients(problem, grad.to(dtype))[1])


def mixed(name, seed, dtype, **sizes):
    """(problem, incoming gradient) with 16-bit products beside a float32 stream."""
    problem, grad = drawn(name, seed, torch.float32, **sizes)
    return trained_operations.mixed(problem, dtype), grad.float()


def mixed_sides(name, seed, dtype):
    problem, grad = mixed(name, seed, dtype)
    wide = trained_operations.autograd(problem.to(torch.float64), grad.double())
    return trained_operations.autograd(problem, grad), wide


LAYER_SCALED = ("linear_residual", "linear_residual dropout", "layernorm_mlp", "layernorm_mlp inner norm")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])
@pytest.mark.parametrize("name", LAYER_SCALED)
def test_budget_beside_a_wider_stream(name, dtype):
    """LayerScale between a float32 stream and 16-bit weights: its product with either is rounded to 16 bits."""
    problem, grad = mixed(name, 0, dtype)
    in_budget(name, dtype, mixed_sides, problem, trained_operations.gradients(problem, grad)[1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])
@pytest.mark.parametrize(
    "name, argument",
    (("layernorm_mlp", "b1"), ("layernorm_mlp inner norm", "b1"), ("linear_residual inner norm", "inner_bias")),
)
def test_layer_scale_is_not_rounded_away(name, argument, dtype):
    """A gamma so close to 1 that gamma ∘ W in 16 bits is W: over many rows, sums of gradients would show it."""
    problem, grad = mixed(name, 0, dtype, tokens=150)
    problem.tensors["gamma"] = torch.full_like(problem.tensors["gamma"], 1 + torch.finfo(dtype).eps / 5)
    grad = grad.abs()
    golden = trained_operations.autograd(problem.to(torch.float64), grad.double())[argument]
    errors = [
        (found[argument].double() - golden).norm()
        for found in (trained_operations.gradients(problem, grad)[1], trained_operations.autograd(problem, grad))
    ]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("name", NAMES if properties.FULL else trained_operations.NAMES)
def test_gradcheck(name):
    """float64, through the forward's saved statistics, z and masks. Autograd of the reference gives the same with every
    option (``test_layouts_of_the_incoming_gradient``)."""
    generator = torch.Generator().manual_seed(5)
    problem = trained_operations.problems(generator, **SMALL)[name]
    if problem.operation == "patch_embed":
        problem.tensors["weight"] = problem.tensors["weight"][:6]
    given = {n: t.detach().clone().requires_grad_() for n, t in problem.tensors.items() if t is not None}
    absent = [n for n, t in problem.tensors.items() if t is None]

    def function(*tensors):
        names = (*given, *absent)
        return trained_operations.Trained.apply(
            problem.operation, problem.words, names, *tensors, *[None] * len(absent)
        )

    assert torch.autograd.gradcheck(function, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed(name):
    """Each gradient alone, and all but each, is what it is among all; the others are None. The kill suites of
    ``tests/mutation`` have all but each too, with the kernels below as plain PyTorch."""
    problem, grad = drawn(name, 1, **SMALL)
    _, saved = trained_operations.forward(problem)
    whole = trained_operations.backward(problem, saved, grad)
    for wanted in range(len(whole)):
        for alone in (True, False) if properties.FULL else (True,):
            needs = [(i == wanted) == alone for i in range(len(whole))]
            results = trained_operations.backward(problem, saved, grad, needs)
            for need, result, complete in zip(needs, results, whole, strict=True):
                if not need or complete is None:
                    assert result is None
                else:
                    torch.testing.assert_close(result, complete, rtol=1e-10, atol=1e-10)
    assert all(result is None for result in trained_operations.backward(problem, saved, grad, [False] * len(whole)))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_the_incoming_gradient(name):
    """float64: one gradient in every layout, expanded ones, and zeros."""
    problem, grad = drawn(name, 0)
    _, saved = trained_operations.forward(problem)
    golden = trained_operations.autograd(problem, grad)
    layouts = {layout: properties.laid_out(grad, layout) for layout in properties.LAYOUTS[1:]}
    layouts["transposed twice"] = grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    others = {
        "expanded": grad[:1].expand_as(grad),
        "zeros": torch.zeros_like(grad),
        "one element repeated": grad[:1, :1, :1].expand_as(grad),
    }
    for how, given in (layouts | others).items():
        truth = golden if how in layouts else trained_operations.autograd(problem, given)
        actual = trained_operations.named(problem, trained_operations.backward(problem, saved, given))
        assert actual.keys() == truth.keys()
        for argument, g in truth.items():
            found = (actual[argument] - g).abs().max()
            assert found <= 1e-9 * (1 + g.abs().max()), f"{how}, {argument}: {found}"


@pytest.mark.parametrize("name", ("layer_norm", "layernorm_mlp dropouts", "linear_residual dropout", "patch_embed"))
def test_bits_do_not_depend_on_the_order_of_programs(name):
    problem, grad = drawn(name, 2, torch.bfloat16)
    problem, grad = problem.to(torch.bfloat16), grad.bfloat16()
    _, once = trained_operations.gradients(problem, grad)
    for order in (-1, 7):
        with sanitizer.program_order(order):
            _, again = trained_operations.gradients(problem, grad)
        assert all(torch.equal(again[argument], result) for argument, result in once.items())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_mixed_dtypes(dtype):
    """A float32 stream and float32 norms beside 16-bit weights, as under autocast."""
    for name in ("layernorm_mlp dropouts", "linear_residual inner norm", "layer_norm_linear gelu"):
        narrow = ("w1", "b1", "w2", "b2", "weight", "bias")
        problem, grad = drawn(name, 3, dtype)
        golden = trained_operations.autograd(problem, grad)
        mixed = {
            n: t if t is None else t.to(dtype if n in narrow else torch.float32) for n, t in problem.tensors.items()
        }
        mixed = trained_operations.Problem(problem.operation, mixed, problem.words)
        grad = grad.float() if "residual" in mixed.tensors or "w2" in mixed.tensors else grad.to(dtype)
        eager = trained_operations.autograd(mixed, grad)
        out, actual = trained_operations.gradients(mixed, grad)
        assert out.dtype == grad.dtype
        for argument, g in golden.items():
            result = actual[argument]
            assert result.dtype == mixed.tensors[argument].dtype
            of_eager, largest = (eager[argument].double() - g).abs().max().item(), g.abs().max().item()
            torch.testing.assert_close(result.double(), g, rtol=0, atol=1.5 * of_eager + 1e-3 * largest)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", (0, 1))
def test_small_batches(name, batch):
    problem, grad = drawn(name, 4)
    whole = ("x", "images", "residual", "row_scale")
    tensors = {n: t[:batch] if n in whole and t is not None else t for n, t in problem.tensors.items()}
    prefix = tensors.get("prefix_tokens")
    if prefix is not None and len(prefix) > 1:
        tensors["prefix_tokens"] = prefix[:batch]
        if batch == 0:
            return
    problem, grad = trained_operations.Problem(problem.operation, tensors, problem.words), grad[:batch]
    _, actual = trained_operations.gradients(problem, grad)
    if batch == 0:
        for argument, result in actual.items():
            assert result.shape == tensors[argument].shape and not result.any()
        return
    for argument, g in trained_operations.autograd(problem, grad).items():
        torch.testing.assert_close(actual[argument], g, rtol=1e-9, atol=1e-9)


def test_dropout_masks_are_those_of_the_reference():
    """Bit for bit, at both places, in the forward and in the backward, on rows that begin anywhere."""
    from vit_fast.kernels.column_sums import branch_gradient
    from vit_fast.kernels.gemm_train import linear_train, pre_activation_gradient

    seeds, rates = (0, 1, 2**31, 2**40 + 3, -1, -(2**63), 2**63 - 1), (0.1, 0.5, 0.9)
    for number, seed in enumerate(seeds):
        seed, p, shape = torch.tensor([seed]), rates[number % 3], (3, 7, 24)
        wanted = reference.dropout_mask(seed, shape, p, torch.device("cpu"))
        ones, eye = torch.ones(3, 7, 1), torch.ones(24, 1)
        out, _ = linear_train(ones, eye, None, dropout_p=p, seed=seed)
        assert torch.equal(out, wanted)
        g, sums = branch_gradient(torch.ones(shape), torch.float32, None, p, seed, True)
        assert torch.equal(g, wanted)
        torch.testing.assert_close(sums, wanted.sum((0, 1)))
        z = torch.full(shape, 2.0)
        dz, hidden = pre_activation_gradient(ones, eye.t().contiguous(), z, "relu", dropout_p=p, seed=seed)
        assert torch.equal(dz, wanted) and torch.equal(hidden, 2 * wanted)


def test_the_mask_is_a_coin():
    mask = reference.dropout_mask(torch.tensor([3]), (400, 500), 0.3, torch.device("cpu"))
    share = (mask > 0).double().mean().item()
    assert abs(share - 0.7) < 4 * (0.21 / 2e5) ** 0.5 and mask.max().item() == pytest.approx(1 / 0.7)
    assert abs(torch.corrcoef(mask[:, :2].t())[0, 1]) < 0.2
