"""Kill suites of training: dropout, sums of columns, the GEMM that keeps its pre-activation, the backward kernels."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from stand_ins import Recorder, device_is_made_current, equal
from support import trained_operations
from support.large_tensors import last_programs_alone, reserved
from support.matmul_precision import matmul_precision
from vit_fast.kernels import column_sums as column_sums_kernels
from vit_fast.kernels import configs as configs_module
from vit_fast.kernels import dropout as dropout_kernels
from vit_fast.kernels import gemm_train as gemm_train_kernels
from vit_fast.kernels import launch as launch_kernels
from vit_fast.kernels import layer_norm_bwd as layer_norm_bwd_kernels
from vit_fast.kernels import layernorm_mlp_bwd as layernorm_mlp_bwd_kernels
from vit_fast.kernels import linear_bwd as linear_bwd_kernels
from vit_fast.kernels import patch_embed_bwd as patch_embed_bwd_kernels
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LayerNormBwdConfig, LinearConfig

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
CPU = torch.device("cpu")
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
    for count in (0, 1, 64, kernels.BLOCK, kernels.BLOCK + 3):
        for p in (0.3, uniform[5].item()):
            kept = kernels.keep_mask(SEED, count, p, CPU)
            assert torch.equal(kept, reference.keep_mask(SEED, count, p, CPU))
    recorder = Recorder()
    with mock.patch.object(kernels, "_keep_mask_kernel", recorder):
        kernels.keep_mask(SEED, kernels.BLOCK + 1, 0.1, torch.device("meta"))
    (launch,) = recorder.launches
    assert launch.grid == (2,) and [t.device.type for t in launch.args[:2]] == ["meta", "meta"]
    assert launch.args[2:] == (kernels.BLOCK + 1, torch.tensor(0.1).item())
    with mock.patch.object(kernels, "_keep_mask_kernel", None):
        assert kernels.keep_mask(SEED, 0, 0.1, CPU).shape == (0,)
    count = 2**31 + 5
    with last_programs_alone():
        far = kernels.keep_mask(SEED, count, 0.3, CPU)
    places = torch.arange(count - 5, count)
    assert torch.equal(far[-5:], reference._uniform(SEED, places) > torch.tensor(0.3)) and not far[:5].any()


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
        gamma = torch.randn(20, 2, dtype=dtype)[:, 0]
        behind, total = kernels.branch_gradient(grad, out_dtype, scale, p, SEED, with_sums, gamma)
        torch.testing.assert_close(
            behind, (wanted * gamma.to(acc)).to(out_dtype), rtol=1e-3 if out_dtype == FLOAT16 else 1e-6, atol=1e-6
        )
        if with_sums:
            torch.testing.assert_close(total.double(), sums.double() * gamma.double(), rtol=1e-5, atol=1e-5)
        if with_sums:
            wide = FLOAT64 if dtype == FLOAT64 else FLOAT32
            allowed = 1e-12 if dtype == FLOAT64 else 1e-6
            torch.testing.assert_close(sums, wanted.double().sum((0, 1)).to(wide), rtol=allowed, atol=allowed)
    grad = torch.randn(3, 2, 20)
    g, sums = kernels.branch_gradient(grad, FLOAT32, None, 0.0, None, True)
    assert g is grad
    torch.testing.assert_close(sums, grad.sum((0, 1)), rtol=1e-6, atol=1e-6)
    assert kernels.branch_gradient(grad, FLOAT32, None, 0.0, None, False) == (grad, None)
    doubled, _ = kernels.branch_gradient(grad, FLOAT32, None, 0.0, None, False, torch.full((20,), 2.0))
    assert torch.equal(doubled, grad * 2)
    assert kernels.column_sums(grad, FLOAT16).dtype == FLOAT16
    for dtype, wanted in ((None, FLOAT32), (FLOAT16, FLOAT16)):
        empty = kernels.column_sums(grad[:0], dtype)
        assert empty.dtype == wanted and torch.equal(empty, torch.zeros(20, dtype=wanted))
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
                call = lambda: kernels._run(torch.empty(2, 3, device="cuda"), None, None, 0.0, None, None, True)  # noqa: E731
            launch = device_is_made_current(kernels, name, call)
            assert name != "_column_sums_kernel" or launch.args[1] is None


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
    partials = partials.flatten()[: 3 * (2**30 + 64)].view(3, 2**30 + 64)
    partials[:, -32:] = torch.randn(3, 32)
    with last_programs_alone():
        sums, _ = kernels.add_partials(partials, None, FLOAT32, FLOAT32)
    torch.testing.assert_close(sums[-32:], partials[:, -32:].sum(0))


def layer_norm_bwd():
    kernels = layer_norm_bwd_kernels
    whole, loop = LayerNormBwdConfig(2, 16, 4, programs=2), LayerNormBwdConfig(1, 8, 4, programs=2, chunk=4)
    for config in (whole, loop):
        for norm in ("layer", "rms"):
            _layer_norm_gradients(kernels, config, norm, FLOAT64)
        for dtype in (FLOAT16, FLOAT32):
            _layer_norm_gradients(kernels, config, "layer", dtype)
            mean = 1e4 if dtype == FLOAT32 else 30.0
            _layer_norm_gradients(kernels, config, "layer", dtype, mean, needs=(True, False, False))
            _layer_norm_gradients(kernels, config, "layer", dtype, absent="weight")
        for absent in ("weight", "bias", "residual_grad"):
            _layer_norm_gradients(kernels, config, "layer", FLOAT64, absent=absent)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            _layer_norm_gradients(kernels, config, "layer", FLOAT64, needs=needs)
        _far_layer_norm(kernels, config)
    _layer_norm_bwd_launches(kernels)


def _layer_norm_gradients(kernels, config, norm, dtype, mean=0.0, absent=None, needs=None):
    """Of nine rows of twelve channels, each tensor at strides of its own; row i has the mean i · ``mean``, saved with a
    rounding, and gradients are far from zero."""
    wide = FLOAT64 if dtype == FLOAT64 else FLOAT32
    tensors = dict(
        grad=torch.randn(3, 4, 12)[:, 1:] + 30, x=torch.randn(3, 3, 24)[..., ::2], weight=torch.rand(24)[::2] + 0.5,
        bias=torch.randn(12), residual_grad=torch.randn(3, 3, 12).transpose(0, 1),
    )  # fmt: skip
    tensors["x"] += mean * torch.arange(1, 10).view(3, 3, 1)
    tensors = {name: None if name == absent else t.to(dtype) for name, t in tensors.items()}
    grad, x, weight, bias, past = tensors.values()
    _, means, rstd = reference.layer_norm_fwd(x.double(), None, None, 1e-6, norm=norm)
    wanted = reference.layer_norm_bwd(
        *(None if t is None else t.double() for t in (grad, x, weight, bias)), means, rstd, norm=norm,
        residual_grad=None if past is None else past.double(),
    )  # fmt: skip
    shifted = means if norm == "rms" else means * (1 + 2**-16 * (mean != 0.0))
    statistics = shifted.to(wide), rstd.to(wide)
    results = kernels.layer_norm_bwd(
        grad, x, weight, bias, *statistics, norm=norm, residual_grad=past, needs=needs, config=config
    )
    allowed = {FLOAT64: 1e-12, FLOAT32: 2e-5, FLOAT16: 1.2e-3}[dtype]
    for result, golden, need in zip(results, wanted, needs or (True,) * 3):
        assert (result is None) == (golden is None or not need)
        if result is not None:
            assert result.dtype == dtype and result.is_contiguous()
            torch.testing.assert_close(result.double(), golden, rtol=allowed, atol=allowed)


def _layer_norm_bwd_launches(kernels):
    """What is launched, with which accumulators, and no launch at all."""
    names = ("_layer_norm_bwd_kernel", "_layer_norm_wide_bwd_kernel", "_layer_norm_sums_kernel")
    whole, wide, sums = (Recorder() for _ in names)
    x, (mean, rstd), parameter = torch.randn(2, 5, 16), torch.randn(2, 10), torch.randn(16)
    with (
        mock.patch.multiple(kernels, **dict(zip(names, (whole, wide, sums)))),
        mock.patch.object(kernels, "add_partials", lambda *given: given[:2]),
    ):
        call = lambda *needs, weight=parameter, config=None, **more: kernels.layer_norm_bwd(  # noqa: E731
            x, x, weight, parameter, mean, rstd, needs=needs, config=config, **more
        )
        assert call(False, False, False) == (None, None, None) == call(False, True, False, weight=None)
        _, dweight, dbias = call(True, True, True)
        assert dweight.shape == dbias.shape == (1, 16) and dweight.dtype == FLOAT32
        config = LayerNormBwdConfig(1, 8, 4, chunk=4)
        call(True, False, False, config=config)
        _, dweight, _ = call(False, True, False, config=config)
        assert dweight.shape == (3, 16)
        call(False, False, True, config=config, residual_grad=x)
        call(False, True, False, residual_grad=x[:, :, ::2].repeat_interleave(2, 2))
        call(True, True, False, residual_grad=x.double(), config=LayerNormBwdConfig(1, 16, 4, programs=4))
        call(True, False, False, weight=parameter.double(), config=LayerNormBwdConfig(2, 16, 4, programs=9))
    assert [launch.grid for launch in whole.launches] == [(1,), (1,), (4,), (5,)]
    assert [str(launch.ACC) for launch in whole.launches] == ["fp32", "fp32", "fp64", "fp64"]
    assert [launch.args[5] is None for launch in whole.launches] == [True, True, False, True]
    assert [launch.grid for launch in wide.launches] == [(10,)]
    assert [launch.grid for launch in sums.launches] == [(6,), (6,)]
    dtypes = [t.dtype for t in kernels.layer_norm_bwd(x, x, parameter.half(), parameter.double(), mean, rstd)]
    assert dtypes == [FLOAT32, FLOAT16, FLOAT64]
    with mock.patch.multiple(kernels, **dict.fromkeys((*names, "add_partials"))):
        empty = kernels.layer_norm_bwd(x[:0], x[:0], parameter.half(), parameter.double(), mean[:0], rstd[:0])
        equal(empty, (x[:0], torch.zeros(16).half(), torch.zeros(16).double()))
        empty = kernels.layer_norm_bwd(x[:0], x[:0], parameter, None, mean[:0], rstd[:0], needs=(False, False, True))
        assert empty == (None, None, None)
    with mock.patch.object(kernels, "add_partials", lambda *given: given[:2]):
        cuda = lambda *shape: torch.empty(shape, device="cuda")  # noqa: E731
        device_is_made_current(
            kernels,
            "_layer_norm_bwd_kernel",
            lambda: kernels.layer_norm_bwd(cuda(2, 16), cuda(2, 16), None, None, cuda(2), cuda(2)),
        )


def _far_layer_norm(kernels, config):
    """Offsets beyond 2³¹ that are products of small numbers, in and out."""
    tensors, (weight, bias) = torch.randn(3, 2, 3, 12).half(), torch.randn(2, 12).half()
    _, mean, rstd = reference.layer_norm_fwd(tensors[1], weight, bias, 1e-6)
    step = 2**31 + 64
    memory = reserved(2 * step, dtype=FLOAT16)
    grad, x, past = tensors
    wanted = kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config)
    for strides in ((step, 12, 1), (256, step // 2, 1), (256, 1, step // 11)):
        far = [torch.as_strided(memory[64 * i :], grad.shape, strides).copy_(t) for i, t in enumerate(tensors)]
        grad, x, past = far
        equal(kernels.layer_norm_bwd(grad, x, weight, bias, mean, rstd, residual_grad=past, config=config), wanted)
    rows = 2**28
    means, rstds = (reserved(rows, dtype=FLOAT32) for _ in range(2))
    means[-1], rstds[-1] = mean[0], rstd[0]
    grad, x = (t[0, :1].expand(rows, 12) for t in tensors[:2])
    with last_programs_alone():
        dx, *_ = kernels.layer_norm_bwd(
            grad, x, weight, None, means, rstds, needs=(True, False, False),
            config=LayerNormBwdConfig(1, config.block, 4, programs=2**30),
        )  # fmt: skip
    alone, *_ = kernels.layer_norm_bwd(grad[:1], x[:1], weight, None, mean[:1], rstd[:1], config=config)
    assert torch.equal(dx[-1:], alone) and not dx[0].any()


class Parts:
    """The kernels that a backward is composed of, in plain PyTorch, and what was called."""

    def __init__(self):
        self.calls = []

    def column_sums(self, x, dtype=None):
        self.calls.append("sums")
        return x.flatten(0, -2).sum(0).to(dtype or launch_kernels.stat_dtype(x.dtype))

    def branch_gradient(self, grad, dtype, row_scale, dropout_p, seed, with_sums, gamma=None):
        self.calls.append(("g" if gamma is None else "gamma g") + (" and sums" if with_sums else ""))
        grad = grad if gamma is None else grad * gamma.to(grad.dtype)
        g = grad if row_scale is None else grad * row_scale[:, None, None].to(grad.dtype)
        g = reference.dropout(g, dropout_p, seed)
        return g.to(dtype), self.column_sums(g) if with_sums else None

    def layer_norm_bwd(self, grad, x, *rest, **options):
        self.calls.append("norm " + "".join("01"[need] for need in options["needs"]))
        return reference.layer_norm_bwd(grad, x, *rest, **options)

    def linear(self, x, weight, bias):
        self.calls.append("linear")
        return F.linear(x, weight, bias)

    def layer_norm_fwd(self, x, weight, bias, eps, *, out_dtype=None, norm):
        self.calls.append("statistics")
        out, *statistics = reference.layer_norm_fwd(x, weight, bias, eps, norm=norm)
        return out.to(out_dtype or x.dtype), *statistics

    def layer_norm(self, x, weight, bias, eps, *, out_dtype, norm):
        self.calls.append("normal")
        return reference.layer_norm(x, weight, bias, eps, norm=norm).to(out_dtype)

    def pre_activation_gradient(self, grad, weight, z, activation, *, dropout_p, seed, with_hidden, config):
        self.config = config
        self.calls.append("dz and h" if with_hidden else "dz")
        hidden = reference.dropout(reference.activate(z, activation), dropout_p, seed)
        dz = reference.activate_bwd(reference.dropout(grad @ weight, dropout_p, seed), z, activation)
        return dz, hidden if with_hidden else None

    @contextmanager
    def instead(self, *modules):
        names = ("column_sums", "branch_gradient", "layer_norm_bwd", "linear", "pre_activation_gradient")
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                for name in names:
                    if hasattr(module, name):
                        patch.setattr(module, name, getattr(self, name))
                if hasattr(module, "ln"):
                    patch.setattr(module, "ln", self)
            yield


def _saved(problem):
    """What the forward of a problem saves."""
    t, words = problem.tensors, problem.words
    if problem.operation not in ("layer_norm_linear", "layernorm_mlp"):
        return []
    normal, *saved = reference.layer_norm_fwd(
        t["x"], t["ln_weight"], t["ln_bias"], 1e-6, norm=words.get("norm", "layer")
    )
    if problem.operation == "layernorm_mlp":
        z = F.linear(normal.to(t["w1"].dtype), t["w1"], t["b1"])
        saved.append(z.new_empty(0) if words.get("recompute") else z)
    return saved


def _composed(parts, operation):
    """Gradients of all small problems of an operation: all of them, each alone, all but each."""
    generator = torch.Generator().manual_seed(0)
    problems = trained_operations.problems(generator, width=6, features=8, hidden=4, tokens=3)
    for name, problem in problems.items():
        if problem.operation != operation:
            continue
        grad = torch.randn(trained_operations.formula(problem).shape, generator=generator, dtype=FLOAT64)
        golden, saved = trained_operations.autograd(problem, grad), _saved(problem)
        order = trained_operations.NAMES[operation]
        alone = [[name == one for name in order] for one in order]
        but_one = [[name != one for name in order] for one in order]
        for needs in (None, (True,) * len(order), (False,) * len(order), *alone, *but_one):
            results = trained_operations.backward(problem, saved, grad, needs)
            for argument, result, need in zip(order, results, needs or (True,) * len(order), strict=True):
                assert (result is None) == (not need or problem.tensors[argument] is None), (name, argument, needs)
                if result is not None:
                    torch.testing.assert_close(result, golden[argument], rtol=1e-10, atol=1e-10)
        yield name, problem, saved, grad


def _mixed(problem, dtype=FLOAT16):
    """The problem with 16-bit weights beside a float32 stream: dtypes, and values as far as they go."""
    mixed = trained_operations.mixed(problem, dtype)
    grad = torch.randn(trained_operations.formula(mixed).shape)
    grad = grad.to(dtype) if problem.operation in ("layer_norm_linear", "patch_embed") else grad
    golden = trained_operations.autograd(mixed.to(FLOAT64), grad.double())
    results = trained_operations.backward(mixed, _saved(mixed), grad)
    for argument, result in zip(trained_operations.NAMES[problem.operation], results, strict=True):
        if result is not None:
            wanted = golden[argument]
            assert result.dtype == mixed.tensors[argument].dtype, argument
            assert (result.double() - wanted).abs().max() <= 5e-3 * (1 + wanted.abs().max()), argument


def _called(parts, problem, saved, grad, *wanted):
    """The parts that are called for results that alone are wanted."""
    parts.calls.clear()
    names = trained_operations.NAMES[problem.operation]
    trained_operations.backward(problem, saved, grad, [name in wanted for name in names])
    return parts.calls


def patch_embed_bwd():
    """The kernel under it as plain PyTorch; results are never views of the gradient."""
    kernels, parts = patch_embed_bwd_kernels, Parts()
    with parts.instead(kernels):
        for name, problem, saved, grad in _composed(parts, "patch_embed"):
            of_sums = ("bias", "pos_embed", "prefix_tokens")
            chosen = (("images", "weight"), *((one,) for one in of_sums), of_sums)
            calls = [len(_called(parts, problem, saved, grad, *wanted)) for wanted in chosen]
            wanted = {"patch_embed": [0, 1, 1, 1, 2], "patch_embed overlapping": [0, 1, 0, 0, 1]}
            assert calls == wanted.get(name, [0, 0, 1, 0, 1])
            results = [t for t in trained_operations.backward(problem, saved, grad) if t is not None]
            storages = [t.untyped_storage() for t in results]
            assert len({grad.data_ptr(), *(s.data_ptr() for s in storages)}) == len(storages) + 1
            assert [s.nbytes() for s in storages[2:]] == [t.nbytes for t in results[2:]]
            _mixed(problem)
            wide = trained_operations.backward(problem.to(FLOAT16), saved, grad.float())
            assert all(t is None or t.dtype == FLOAT16 for t in wide)


def linear_bwd():
    kernels, parts = linear_bwd_kernels, Parts()
    _layer_scale(kernels)
    _parameters(kernels)
    with parts.instead(kernels):
        for operation in ("layer_norm_linear", "linear_residual"):
            for name, problem, saved, grad in _composed(parts, operation):
                if name == "linear_residual inner norm":
                    _linear_calls(parts, problem, saved, grad)
                if name == "linear_residual":
                    arguments = [problem.tensors[one] for one in trained_operations.NAMES[operation][:5]]
                    wanted = trained_operations.backward(problem, saved, grad)
                    equal(kernels.linear_residual_bwd(grad, *arguments)[:5], wanted[:5])
                if name == "layer_norm_linear gelu":
                    called = [list(_called(parts, problem, saved, grad, one)) for one in ("weight", "bias", "ln_bias")]
                    assert called == [["normal", "linear", *more] for more in ([], ["sums"], ["norm 001"])]
                if name == "layer_norm_linear":
                    called = [list(_called(parts, problem, saved, grad, one)) for one in ("weight", "bias", "x")]
                    assert called == [["normal"], ["sums"], ["norm 100"]]
                    _norm_and_product(kernels, problem, saved, grad)
                if name.split()[-1] in ("gelu", "norm", "dropout"):
                    _mixed(problem)
    for dtype, wide in ((FLOAT16, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT32), (FLOAT64, FLOAT64)):
        dz, x = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 4).to(dtype)
        product = kernels.wide_product(dz, x)
        assert product.dtype == wide
        torch.testing.assert_close(
            product.double(), torch.einsum("btn,btk->nk", dz.double(), x.double()), rtol=1e-6, atol=1e-6
        )
    with mock.patch.object(torch, "mm", lambda left, right, out_dtype: (left.shape, right.shape, out_dtype)):
        cuda = SimpleNamespace(type="cuda")
        on_cuda = lambda n, dtype=FLOAT16: SimpleNamespace(  # noqa: E731
            dtype=dtype, device=cuda, shape=(2, 3, n), reshape=torch.randn(6, n).reshape
        )
        assert kernels.wide_product(on_cuda(5), on_cuda(4)) == ((5, 6), (6, 4), FLOAT32)
        assert kernels.wide_product(on_cuda(5, FLOAT32), on_cuda(4, FLOAT32)).shape == (5, 4)


def _parameters(kernels):
    """A bias alone needs no product, what is absent or not wanted nothing; results in the dtypes of the parameters."""
    g, weight, (bias, gamma) = torch.randn(2, 3, 5).half(), torch.randn(5, 4).half(), torch.randn(2, 5).half()
    sums = torch.randn(5)
    for scale in (None, gamma):
        _, dbias, _ = kernels.parameter_gradients(g, sums, None, weight, bias, scale, (False, True, False))
        assert dbias.dtype == FLOAT16 and torch.equal(dbias, (sums if scale is None else sums * scale).half())
        for one, needs in ((bias, (False, False, False)), (None, (False, True, False))):
            assert kernels.parameter_gradients(g, sums, None, weight, one, scale, needs) == (None, None, None)
    assert kernels.row_scale_gradient(g, g, None, gamma[:2], 0.0, None).dtype == FLOAT16


def _norm_and_product(kernels, problem, saved, grad):
    """A gradient that is wider than the weights; one of a residual, which is added."""
    wide = trained_operations.backward(problem.to(FLOAT16), saved, grad.float())
    assert all(t.dtype == FLOAT16 for t in wide)
    x, ln_weight, ln_bias, weight, _ = (problem.tensors[one] for one in trained_operations.NAMES[problem.operation])
    needs = (True, False, False, False, False)
    dx, *_ = trained_operations.backward(problem, saved, grad, needs)
    with_x, *_ = kernels.layer_norm_product_bwd(
        grad, None, x, ln_weight, ln_bias, weight, None, *saved, "layer", needs, x
    )
    torch.testing.assert_close(with_x, dx + x)


def _linear_calls(parts, problem, saved, grad):
    forward, product = ["g", "statistics"], ["g and sums"]
    for wanted, calls in (
        (("bias",), product), (("weight",), forward), (("gamma",), ["g and sums", "statistics"]),
        (("x",), [*forward, "gamma g", "norm 100"]), (("inner_bias",), [*forward, "gamma g", "norm 001"]), ((), ["g"]),
        (("row_scale",), [*forward, "linear", "g"]),
    ):  # fmt: skip
        assert [call for call in _called(parts, problem, saved, grad, *wanted) if call != "sums"] == calls, wanted
    assert _called(parts, problem, saved, grad, "weight") == forward
    for absent, wanted, calls in (  # what they would need is not computed
        ("bias", "bias", ["g"]), ("gamma", "gamma", ["g"]), ("bias", "gamma", forward),
        ("row_scale", "row_scale", ["g"]), ("gamma", "inner_bias", [*forward, "norm 001"]),
    ):  # fmt: skip
        less = trained_operations.Problem(problem.operation, problem.tensors | {absent: None}, problem.words)
        assert _called(parts, less, saved, grad, wanted) == calls, (absent, wanted)


def _layer_scale(kernels):
    """gamma's part of the gradients, in the smallest blocks; weights at any strides; offsets beyond 2³¹."""
    assert kernels.LAYER_SCALE_BLOCK == 1024
    with mock.patch.object(kernels, "LAYER_SCALE_BLOCK", 8):
        for dtype in (FLOAT64, FLOAT16):
            wide = FLOAT64 if dtype == FLOAT64 else FLOAT32
            product, sums = torch.randn(5, 12, dtype=wide), torch.randn(5, dtype=wide)
            weight, (bias, gamma) = torch.randn(12, 10).to(dtype).t()[::2], torch.randn(5, 2).to(dtype).unbind(1)
            for one, needs in (
                (bias, (True, True, True)), (None, (True, True, True)), (bias, (True, False, False)),
                (bias, (False, False, True)), (bias, (False, True, False)),
            ):  # fmt: skip
                total = sums if needs[1] or needs[2] else None
                more = () if all(needs) else (needs,)
                results = kernels.layer_scale_bwd(product, weight, one, gamma, total, *more)
                wanted = [gamma.to(wide)[:, None] * product, gamma.to(wide) * sums, (weight.to(wide) * product).sum(1)]
                if one is not None:
                    wanted[2] = wanted[2] + one.to(wide) * sums
                for result, golden, need in zip(results, wanted, needs):
                    assert (result is None) == (not need or (one is None and golden is wanted[1]))
                    if result is not None:
                        allowed = 1e-12 if dtype == FLOAT64 else 2e-3
                        assert result.dtype == dtype and result.is_contiguous()
                        torch.testing.assert_close(result.to(wide), golden, rtol=allowed, atol=allowed)
        product, gamma, weight = torch.randn(3, 12), torch.randn(3), torch.randn(3, 12)
        wanted = kernels.layer_scale_bwd(product, weight, None, gamma, None)
        memory = reserved(2**32 + 2**10, dtype=FLOAT32)
        for strides in ((2**31, 1), (1, 2**28)):
            far = torch.as_strided(memory, (3, 12), strides).copy_(weight)
            equal(
                [r for r in kernels.layer_scale_bwd(product, far, None, gamma, None) if r is not None],
                [r for r in wanted if r is not None],
            )
        rows = 2**28
        many, gammas = reserved(rows, 12, dtype=FLOAT32), reserved(rows, dtype=FLOAT32)
        many[-1], gammas[-1] = product[0], gamma[0]
        with last_programs_alone():
            dweight, _, dgamma = kernels.layer_scale_bwd(many, weight[:1].expand(rows, 12), None, gammas, None)
        assert torch.equal(dweight[-1], wanted[0][0]) and torch.equal(dgamma[-1], wanted[2][0])
    cuda = lambda *shape: torch.empty(shape, device="cuda")  # noqa: E731
    call = lambda: kernels.layer_scale_bwd(cuda(2, 3), cuda(2, 3), None, cuda(2), None)  # noqa: E731
    device_is_made_current(kernels, "_layer_scale_bwd_kernel", call)


def layernorm_mlp_bwd():
    """The kernels under it as plain PyTorch."""
    kernels, parts = layernorm_mlp_bwd_kernels, Parts()
    with (
        parts.instead(kernels, linear_bwd_kernels),
        mock.patch.object(linear_bwd_kernels, "layer_scale_bwd", _plain_layer_scale),
    ):
        for name, problem, saved, grad in _composed(parts, "layernorm_mlp"):
            if name in ("layernorm_mlp dropouts", "layernorm_mlp recompute", "layernorm_mlp inner norm"):
                _mlp_calls(parts, problem, saved, grad, name.split()[1])
                _mixed(problem)
            # What an absent gamma or bias would need is not computed.
            absent = {"bare": ("b2",), "no biases": ("gamma", "b2"), "swiglu dropouts": ("gamma",)}
            for one in absent.get(name.removeprefix("layernorm_mlp").strip(), ()):
                assert _called(parts, problem, saved, grad, one) == ["g"], (name, one)
            if name == "layernorm_mlp":
                _mlp_alone(kernels, parts, problem, saved, grad)
            if name == "layernorm_mlp inner norm":
                _mlp_again(problem, grad)


def _plain_layer_scale(product, weight, bias, gamma, sums, needs):
    wide = product.dtype
    dgamma = (weight.to(wide) * product).sum(1) + (0 if bias is None or sums is None else bias.to(wide) * sums)
    dbias = None if bias is None or sums is None else (gamma.to(wide) * sums).to(bias.dtype)
    results = (gamma.to(wide)[:, None] * product).to(weight.dtype), dbias, dgamma.to(gamma.dtype)
    return tuple(result if need else None for result, need in zip(results, needs))


def _mlp_alone(kernels, parts, problem, saved, grad):
    """Without the words that have defaults; with tiles of the caller."""
    results = trained_operations.backward(problem, saved, grad, tiles=TILES)
    assert parts.config is TILES
    t = problem.tensors
    before, after = (t[one] for one in ("x", "ln_weight", "ln_bias")), (t[one] for one in ("w1", "b1", "w2", "b2"))
    alone = kernels.layernorm_mlp_bwd(grad, *before, 1e-6, *after, "gelu", t["gamma"], None, *saved)
    equal(alone[:8], results[:8])


def _mlp_again(problem, grad):
    """z is computed again for what lies behind it, whatever alone is wanted."""
    again = trained_operations.Problem(problem.operation, problem.tensors, problem.words | dict(recompute=True))
    golden, saved = trained_operations.autograd(problem, grad), _saved(again)
    for one in ("inner_weight", "inner_bias", "row_scale"):
        needs = [argument == one for argument in trained_operations.NAMES[problem.operation]]
        found = trained_operations.named(again, trained_operations.backward(again, saved, grad, needs))
        torch.testing.assert_close(found[one], golden[one], rtol=1e-10, atol=1e-10)


def _mlp_calls(parts, problem, saved, grad, kind):
    again = ["normal", "linear"] if kind == "recompute" else []
    inner = ["statistics"] if kind == "inner" else []
    through = ["gamma g", *(["statistics", "norm 100"] if kind == "inner" else ["dz"])]
    for wanted, calls in (
        ((), ["g"]), (("b2",), ["g and sums"]), (("w2",), ["g", *again, *inner]),
        (("gamma",), ["g and sums", *again, *inner]), (("b1",), ["g", *again, *through]),
        (("w1",), ["g", *(again or ["normal"]), *through]), (("x",), ["g", *again, *through, "norm 100"]),
    ):  # fmt: skip
        called = [call for call in _called(parts, problem, saved, grad, *wanted) if call != "sums"]
        if (kind == "inner" and not wanted) or (kind == "inner" and wanted == ("b2",)):
            calls = [*calls, "statistics"]
        assert called == calls, (kind, wanted, called)


TILES = LinearConfig(16, 32, 16, 2, 4, 2, False)


def gemm_train():
    kernels = gemm_train_kernels
    for dtype, activation in ((FLOAT64, "gelu"), (FLOAT64, "swiglu"), (FLOAT16, "gelu"), (BFLOAT16, "swiglu")):
        _forward(kernels, dtype, activation)
        _backward(kernels, dtype, activation)
    with mock.patch.object(configs_module, "pick_linear_train_config", None):  # a config that is given is taken
        _forward(kernels, FLOAT64, None, options=False)
        _backward(kernels, FLOAT64, None, options=False)
        _backward(kernels, FLOAT64, "swiglu", options=False)
        _backward(kernels, FLOAT64, "swiglu", contiguous=True)
    tma = LinearConfig(16, 16, 16, 3, 4, 2, True)
    _forward(kernels, FLOAT32, "relu", tma, width=32, features=24, out_dtype=FLOAT64)
    for activation, step in (("geglu", _forward), ("relu", _backward)):
        step(kernels, FLOAT32, activation, tma, width=32, features=24)
    # Rows that a descriptor could take but for the stride of their elements, or their type.
    x, weight = torch.randn(3, 64)[:, ::2], torch.randn(8, 64)[:, ::2]
    for one, other in ((x, weight.contiguous()), (x.contiguous(), weight), (x.double(), weight.contiguous())):
        out, z = kernels.linear_train(one, other, None, config=tma)
        torch.testing.assert_close(out, F.linear(x, weight))
        assert z is None
    _far_train(kernels)
    _train_launches(kernels, tma)
    weight = torch.empty(16, 1, device="meta")
    for call in (
        lambda: kernels.linear_train(torch.empty(2**31, 1, device="meta"), weight, None),
        lambda: kernels.pre_activation_gradient(
            torch.empty(2**31, 1, device="meta"), weight.t(), torch.empty(2**31, 16, device="meta"), None
        ),
    ):
        with pytest.raises(RuntimeError, match=f"vit_fast.linear: {2**31} rows"):
            call()


def _close(result, golden, dtype):
    assert result.dtype == dtype and result.is_contiguous()
    allowed = {FLOAT64: 1e-12, FLOAT32: 1e-5, FLOAT16: 2e-3, BFLOAT16: 1.6e-2}[dtype]
    torch.testing.assert_close(result.double(), golden, rtol=allowed, atol=allowed)


def _forward(kernels, dtype, activation, config=TILES, width=20, features=36, options=True, out_dtype=None):
    """Two images of nine rows; every option at once, or none; x, W and the residual at strides of their own, the
    residual in ``out_dtype``."""
    rows = features * 2 if activation in ("swiglu", "geglu") else features
    x, weight = torch.randn(2, 10, width).to(dtype)[:, 1:], (torch.randn(rows, width) * width**-0.5).to(dtype)
    if not config.tma:
        weight = weight.t().contiguous().t()
    x = x.contiguous() if config.tma else x
    bias, gamma = torch.randn(rows).to(dtype), torch.randn(features).to(dtype)
    out_dtype, row_scale = out_dtype or dtype, torch.tensor([1.25, 0.6]).to(dtype)
    residual = torch.randn(2, 9, 2 * features).to(out_dtype)[..., ::2]
    more = dict(gamma=gamma, residual=residual, row_scale=row_scale, dropout_p=0.3, seed=SEED) if options else {}
    out, z = kernels.linear_train(
        x, weight, bias if options else None, activation, **more, with_z=options, config=config
    )
    wide = {name: t.double() if isinstance(t, torch.Tensor) and name != "seed" else t for name, t in more.items()}
    before = F.linear(x.double(), weight.double(), bias.double() if options else None)
    after = reference.activate(before, activation)
    if options:
        _close(z, before, dtype)
        after = reference.dropout(after, 0.3, SEED) * wide["gamma"] * wide["row_scale"][:, None, None]
        after = after + wide["residual"]
    else:
        assert z is None
    _close(out, after, out_dtype)


def _backward(kernels, dtype, activation, config=TILES, width=20, features=36, options=True, contiguous=False):
    rows = features * 2 if activation in ("swiglu", "geglu") else features
    grad, weight = torch.randn(2, 10, width).to(dtype)[:, 1:], (torch.randn(width, features) * width**-0.5).to(dtype)
    grad = grad.contiguous() if config.tma else grad
    if not (config.tma or contiguous):
        weight = weight.t().contiguous().t()
    z, p = torch.randn(2, 9, rows).to(dtype), 0.3 if options else 0.0
    dz, hidden = kernels.pre_activation_gradient(
        grad, weight, z, activation, dropout_p=p, seed=SEED if options else None, with_hidden=options, config=config
    )
    dhidden = reference.dropout(grad.double() @ weight.double(), p, SEED)
    _close(dz, reference.activate_bwd(dhidden, z.double(), activation), dtype)
    assert (hidden is None) != options
    if options:
        _close(hidden, reference.dropout(reference.activate(z.double(), activation), p, SEED), dtype)


def _far_train(kernels):
    """Offsets beyond 2³¹ that are products of small numbers: x, W and residual; then rows of out, z, dz and h."""
    x, weight, residual = torch.randn(2, 3, 20).half(), torch.randn(24, 20).half(), torch.randn(2, 3, 24).half()
    wanted = kernels.linear_train(x, weight, None, residual=residual, config=TILES)[0]
    back = kernels.pre_activation_gradient(x, weight.t(), residual, "relu", config=TILES)
    step = 2**31 + 64
    memory = reserved(2 * step, dtype=FLOAT16)
    for strides in ((step, 20, 1), (64, step // 2, 1), (64, 1, step // 10)):
        far = torch.as_strided(memory, x.shape, strides).copy_(x)
        assert torch.equal(kernels.linear_train(far, weight, None, residual=residual, config=TILES)[0], wanted)
        equal(kernels.pre_activation_gradient(far, weight.t(), residual, "relu", config=TILES), back)
    for strides in ((step, 24, 1), (128, step // 2, 1), (128, 1, step // 23)):
        far = torch.as_strided(memory, residual.shape, strides).copy_(residual)
        assert torch.equal(kernels.linear_train(x, weight, None, residual=far, config=TILES)[0], wanted)
    for strides in ((step // 12, 1), (1, step // 10)):
        far = torch.as_strided(memory, weight.shape, strides).copy_(weight)
        assert torch.equal(kernels.linear_train(x, far, None, residual=residual, config=TILES)[0], wanted)
        equal(kernels.pre_activation_gradient(x, far.t(), residual, "relu", config=TILES), back)
    halves = kernels.linear_train(x, weight, None, "swiglu", config=TILES)[0]
    far = torch.as_strided(memory, weight.shape, (step // 12, 1)).copy_(weight)
    assert torch.equal(kernels.linear_train(x, far, None, "swiglu", config=TILES)[0], halves)
    rows, gated = 2**26 + 5, torch.randn(96, 32).half()  # fewer rows than there may be, of more elements
    x, z = torch.randn(1, 32).half().expand(rows, 32), torch.randn(1, 96).half()
    out, whole = kernels.linear_train(x[:1], gated, None, "swiglu", with_z=True, config=TILES)
    dz, hidden = kernels.pre_activation_gradient(x[:1], gated[:48].t(), z, "swiglu", config=TILES)
    with last_programs_alone():
        far_out, far_z = kernels.linear_train(x, gated, None, "swiglu", with_z=True, config=TILES)
        memory = reserved(rows, 96, dtype=FLOAT16)
        memory[-16:] = z
        with mock.patch.object(torch, "empty_like", lambda t: reserved(*t.shape, dtype=t.dtype)):
            far_dz, far_hidden = kernels.pre_activation_gradient(x, gated[:48].t(), memory, "swiglu", config=TILES)
    for far, one in ((far_out, out), (far_z, whole), (far_dz, dz), (far_hidden, hidden)):
        assert torch.equal(far[-1, 32:48], one[0, 32:48]) and not far[0].any()


def _train_launches(kernels, tma):
    """What launches are told, which the interpreter's result does not show."""
    recorder, picked = Recorder(), []

    def pick(*args):
        picked.append(args)
        return LinearConfig(16, 32, 16, 4, 8, 3, True)

    x, weight, z, (bias, scale) = (torch.randn(n).bfloat16() for n in ((2, 9, 32), (64, 32), (2, 9, 64), (2, 64)))
    drop = dict(dropout_p=0.5, seed=SEED)
    single = torch.randn(2, 9, 32), torch.randn(64, 32)
    with (
        mock.patch.object(kernels, "_linear_train_kernel", recorder),
        mock.patch.multiple(configs_module, pick_linear_train_config=pick, arch_of=lambda device: 90),
    ):
        kernels.linear_train(x, weight, bias, "swiglu")
        kernels.linear_train(x, weight, bias, "gelu", residual=torch.randn(2, 9, 64).double(), **drop)
        kernels.pre_activation_gradient(x, weight.t().contiguous(), z, "relu")
        kernels.pre_activation_gradient(x, weight[:32].t().contiguous(), z, "geglu", **drop)
        for word in ("highest", "high"):
            with matmul_precision(word):
                kernels.linear_train(*single, None, None, gamma=scale[:64])
        kernels.linear_train(x[..., :24], weight[:60, :24], bias[:60], row_scale=scale[:2])
        kernels.pre_activation_gradient(x[..., 4:], weight.t()[4:, :36], z[..., :36].contiguous(), "relu")
        kernels.linear_train(x[:, 1:], weight, None, with_z=True)
        with mock.patch.object(launch_kernels, "INTERPRETED", False), matmul_precision("high"):
            kernels.linear_train(x, weight, bias)
        kernels.linear_train(x[:0], weight, bias, row_scale=scale[:0])
        kernels.pre_activation_gradient(x[:0], weight.t(), z[:0], None)
    low, wide = (BFLOAT16, BFLOAT16, False), (FLOAT32, FLOAT32)
    assert picked == [
        (18, 32, True, *low, False, 90, False), (18, 64, False, BFLOAT16, FLOAT64, False, False, 90, True),
        (18, 64, False, *low, False, 90, True), (18, 32, False, *low, False, 90, True),
        (18, 64, False, *wide, False, False, 90, False), (18, 64, False, *wide, True, False, 90, False),
        (18, 60, False, *low, False, 90, False), (18, 36, False, *low, True, 90, True),
        (16, 64, False, *low, False, 90, False), (18, 64, False, *low, False, 90, False),
    ]  # fmt: skip
    found = [(n.grid[0], n.SLICES, n.DESCRIPTORS, n.EVEN_K, n.ALIGN_K, n.ALIGN_N) for n in recorder.launches]
    assert found == [
        (2, 2, True, True, 16, 16), (4, 4, True, True, 16, 16), (4, 2, True, True, 16, 16), (2, 4, True, True, 16, 16),
        (4, 2, True, True, 16, 16), (4, 2, True, True, 16, 16), (4, 2, True, True, 16, 4), (4, 2, False, False, 4, 1),
        (2, 2, False, True, 16, 16), (4, 2, True, True, 16, 16),
    ]  # fmt: skip
    flags = [(n.PRECISION, n.EXACT, str(n.ACC), str(n.UPCAST), n.ACTIVATION, n.GATED) for n in recorder.launches]
    assert flags == [
        ("ieee", False, "fp32", "fp32", "silu", True), ("ieee", False, "fp64", "fp64", "gelu", False),
        ("ieee", False, "fp32", "fp32", "relu", False), ("ieee", False, "fp32", "fp32", "gelu", True),
        ("ieee", True, "fp32", "None", None, False), ("tf32", True, "fp32", "None", None, False),
        ("ieee", False, "fp32", "fp32", None, False), ("ieee", False, "fp32", "fp32", "relu", False),
        ("ieee", False, "fp32", "fp32", None, False), ("ieee", False, "fp32", "None", None, False),
    ]  # fmt: skip
    first, _, back, *_ = recorder.launches
    apart = torch.randn(64, 33).bfloat16()[:, :32]  # rows apart by an odd number
    with mock.patch.object(kernels, "_linear_train_kernel", Recorder()) as plain:
        for one, other in ((x[..., 4:], weight[:, 4:]), (x[:1, :1].expand(1, 9, 32), weight)):
            kernels.linear_train(one, other, None, config=tma)
        kernels.linear_train(x, weight[:1].expand(64, 32), None, config=tma)
        kernels.linear_train(x, weight, None, config=TILES)
        kernels.pre_activation_gradient(x, apart[:32].t(), z, "geglu", config=TILES)
    assert [(n.DESCRIPTORS, n.ALIGN_K) for n in plain.launches] == [(False, n) for n in (4, 16, 16, 16, 16)]
    assert [n.SLICES for n in plain.launches] == [2, 2, 2, 2, 4]
    assert first.args[3].block_shape == [16, 16] and first.args[4].block_shape == [32, 16]
    assert back.args[4].block_shape == [16, 32] and back.args[4].strides == [64, 1]
    device_is_made_current(
        kernels,
        "_linear_train_kernel",
        lambda: kernels.linear_train(torch.empty(2, 16, device="cuda"), torch.empty(8, 16, device="cuda"), None),
    )
