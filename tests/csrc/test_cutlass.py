"""``csrc/cutlass`` without a GPU: its operator and its epilogues on CPU tensors, and the backend above them.

CUTLASS's kernels are replaced by loops on the host (``tests/emulator/cutlass.cpp``), whose sums pass through the
epilogues of ``epilogue.h``, the functions that the kernels call. The visitor trees of the kernels run on the host as
they are (``tests/emulator/cutlass_visitors_*.cpp``). What is shown: the arithmetic of the epilogues, where the trees
read and write, the operator's checks and choice, the backend's choice of calls. What is not: the kernels' loops, and
what TMA moves. ``cutlass_ledger.py`` compiles the kernels.
"""

import ctypes
import functools
import math
import re

import pytest
import torch
from support import cuda_emulator
from support.budget import assert_within_budget
from support.linear import exact_activation, formula, wide
from vit_fast.csrc import build
from vit_fast.kernels import reference
from vit_fast.kernels.folding import FoldedBlock

import vit_fast
from vit_fast import extension, ops
from vit_fast.backends import cuda, cutlass, select

HALF = (torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(cutlass.ACTIVATIONS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def libraries():
    """The operators of both libraries for CPU tensors."""
    for operators, path in (
        (cuda.define_operators, cuda_emulator.build_operators()),
        (cutlass._define_operator, cuda_emulator.build_cutlass()),
    ):
        operators()
        torch.ops.load_library(str(path))
    return ctypes.CDLL(str(cuda_emulator.build_cutlass()))


@pytest.fixture
def device(libraries, monkeypatch):
    """``device(capability)`` makes CPU tensors those of a device, on which the library is loaded and trusted."""

    def become(capability):
        libraries.set_emulated_capability(capability)
        monkeypatch.setattr(cutlass, "capability", lambda device: capability)

    monkeypatch.setattr(cutlass, "load", lambda: ())
    monkeypatch.setattr(cutlass, "_looked", {CPU: ()})
    become(90)
    return become


@pytest.fixture
def calls(device, monkeypatch):
    """The names of the functions of ``backends/cutlass.py`` that ran."""
    ran = []
    for name in ("linear", "linear_residual", "folded_linear"):
        function = getattr(cutlass, name)
        monkeypatch.setattr(cutlass, name, lambda *a, f=function, n=name: (ran.append(n), f(*a))[1])
    return ran


@pytest.fixture
def backend(device, monkeypatch):
    """The backend ``cuda``, for CPU tensors and forced."""
    emulated = cuda.Cuda()
    emulated.fill_tables()
    monkeypatch.setattr(cuda.Cuda, "unavailable", lambda self, device: ())
    monkeypatch.setattr(select, "BACKENDS", select.BACKENDS | {"cuda": emulated})
    with vit_fast.backend("cuda"):
        yield emulated


def problem(dtype, rows=(3, 7), size=48, features=40):
    x, weight = torch.randn(*rows, size).to(dtype), (torch.randn(features, size) * size**-0.5).to(dtype)
    return x, weight, torch.randn(features).to(dtype)


# The epilogues


@pytest.mark.parametrize("dtype,arch", ((HALF[0], 90), (HALF[0], 80), (HALF[1], 80), (HALF[1], 75), (HALF[1], 120)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(device, dtype, arch, activation):
    device(arch)
    x, weight, bias = problem(dtype)
    for given in (bias, None):
        eager = reference.activate(torch.nn.functional.linear(x, weight, given), activation)
        golden = formula(x, weight, given, activation)
        for config in cutlass.configs(dtype, arch):
            out = cutlass.linear(x, weight, given, activation, config)
            assert out.dtype == dtype and out.is_contiguous()
            assert_within_budget(out, eager, golden, expected_zeros=0.7)
        assert torch.equal(out, cutlass.linear(x, weight, given, activation))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gamma", (None, torch.float32, "same"))
def test_residual(device, dtype, gamma):
    device(80)
    x, weight, bias = problem(dtype)
    scale = None if gamma is None else torch.randn(40).to(dtype if gamma == "same" else gamma)
    wider = torch.randn(3, 7, 48).to(dtype)
    for residual in (torch.randn(3, 7, 40).to(dtype), wider[..., :40]):
        for given in (bias, None):
            out = cutlass.linear_residual(x, weight, given, scale, residual)
            eager = reference.linear_residual(x, weight, given, scale, residual)
            assert_within_budget(out, eager, formula(x, weight, given, gamma=scale, residual=residual))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_folded_layer_norm(device, activation):
    x, weight, bias = problem(HALF[0])
    x = x + 3
    bias = bias.float()
    rows = x.float().flatten(0, 1)
    mean, rstd = rows.mean(1), (rows.var(1, correction=0) + 1e-6).rsqrt()
    normal = torch.nn.functional.layer_norm(wide(x), (48,), eps=1e-6)
    golden = formula(normal, weight, bias, activation)
    eager = reference.layer_norm_linear(x, None, None, 1e-6, weight, bias.bfloat16(), activation)
    for config in cutlass.configs(HALF[0], 90):
        if config.family != "multistage":
            out = cutlass.folded_linear(x, mean, rstd, weight, weight.float().sum(1), bias, activation, config)
            assert_within_budget(out, eager, golden, kind="model", expected_zeros=0.7)


EPILOGUES = ("activation", "fold", "residual")


def run_epilogue(library, name, activation, *inputs):
    """An epilogue on float32 vectors, one value at a time."""
    out = torch.empty_like(inputs[0])
    addresses = (ctypes.c_void_p * len(inputs))(*(t.data_ptr() for t in inputs))
    arguments = map(ctypes.c_int64, (EPILOGUES.index(name), cutlass.ACTIVATIONS[activation], len(out)))
    assert ctypes.CDLL(str(library)).emulated_epilogue(*arguments, addresses, ctypes.c_void_p(out.data_ptr()))
    return out


def check_epilogue(library, name, activation):
    """One epilogue in float32 against float64."""
    inputs = [torch.randn(4000) for _ in range({"activation": 2, "fold": 5, "residual": 4}[name])]
    acc, *rest = (t.double() for t in inputs)
    if name == "residual":
        bias, gamma, residual = rest
        golden = residual + gamma * (acc + bias)
    else:
        z = rest[1] * (acc - rest[0] * rest[2]) + rest[3] if name == "fold" else acc + rest[0]
        golden = exact_activation(z, activation)
    error = (run_epilogue(library, name, activation, *inputs).double() - golden).abs()
    assert (error <= 2e-6 * (1 + golden.abs())).all(), error.max()


@pytest.mark.parametrize("name,activation", (*((n, a) for n in EPILOGUES[:2] for a in ACTIVATIONS), ("residual", None)))
def test_epilogue(name, activation):
    check_epilogue(cuda_emulator.build_epilogue(), name, activation)


FAULTS = (
    ("acc[i] - mean[i] * sum[i]", "acc[i] - sum[i]", "fold", None),
    ("rstd[i] * (acc[i]", "(acc[i]", "fold", None),
    ("gamma[i] * (acc[i] + bias[i])", "gamma[i] * acc[i] + bias[i]", "residual", None),
    ("residual[i] + gamma[i]", "gamma[i]", "residual", None),
    ("acc[i] += bias[i]", "acc[i] += 0.0f * bias[i]", "activation", None),
    ("0.7071067811865476f", "0.707f", "activation", "gelu"),
    ("TANH * 0.044715f", "0.044715f", "fold", "gelu_tanh"),
    ("1.702f", "1.0f", "fold", "quick_gelu"),
    ("CLAMP, 0.0f", "CLAMP, NEVER", "activation", "relu"),
)


@pytest.mark.parametrize("old,new,name,activation", FAULTS)
def test_a_fault_of_an_epilogue_is_found(old, new, name, activation):
    with pytest.raises(AssertionError):
        check_epilogue(cuda_emulator.build_epilogue((old, new)), name, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation):
    """Tails, numbers whose squares overflow, infinity and NaN."""
    library, far = cuda_emulator.build_epilogue(), torch.tensor([30.0, 1e4, 1e18, 1e20, 3e38, math.inf, math.nan])

    def run(z):
        return run_epilogue(library, "activation", activation, z, torch.zeros_like(z))

    z = torch.linspace(-15, 15, 6001)
    assert (run(z) - exact_activation(z.double(), activation)).abs().max() <= 2e-6
    assert torch.equal(run(far)[:-1], far[:-1]) and run(far)[-1].isnan()
    tail = -far[:-2] if activation is None else torch.zeros(5)
    torch.testing.assert_close(run(-far[:-2]), tail, rtol=0, atol=1e-20)


def visit(library, product, bias, gamma, residual, activation, dtype):
    """The epilogue of every tile of a product; what lies behind the output must stay as it was."""
    rows, features = product.shape
    out = torch.full((rows + 130, features), 7.0, dtype=dtype)
    tensors = (out, product, bias, gamma, residual)
    addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    stride = features if residual is None else residual.stride(0)
    numbers = map(ctypes.c_int64, (rows, features, stride, cutlass.ACTIVATIONS[activation]))
    assert ctypes.CDLL(str(library)).emulated_visitors(*addresses, *numbers)
    assert (out[rows:] == 7).all()
    return out[:rows]


def check_visitors(library, dtype, rows=200, features=264):
    """Bias, gamma and residual reach the elements that they belong to, in whole tiles and in tails."""
    product, bias, gamma = torch.randn(rows, features), torch.randn(features), torch.randn(features)
    residual = torch.randn(rows, features + 16).to(dtype)[:, :features]
    for b, g in ((bias, gamma), (None, None), (bias, None)):
        z = product.double() + (0 if b is None else b)
        found = visit(library, product, b, g, residual, None, dtype)
        golden = residual + z * (1 if g is None else g)
        torch.testing.assert_close(found, golden.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        for activation in ACTIVATIONS:
            found = visit(library, product, b, None, None, activation, dtype)
            golden = exact_activation(z, activation).to(dtype)
            torch.testing.assert_close(found, golden, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype,element", ((torch.bfloat16, "bfloat16_t"), (torch.float16, "half_t")))
def test_visitors_of_sm80(dtype, element):
    """CUTLASS's own visitors with our trees and arguments, on the host."""
    library = cuda_emulator.build_visitors("sm80", element)
    for rows, features in ((200, 264), (256, 128), (1, 392), (129, 8)):
        check_visitors(library, dtype, rows, features)


def visit_sm90(library, cooperative, product, bias=None, gamma=None, residual=None, norm=None, activation=None):
    """As ``visit``, with the trees of sm_90."""
    rows, features = product.shape
    out = torch.full((rows + 300, features), 7.0, dtype=torch.bfloat16)
    tensors = (out, product, bias, gamma, residual, *(norm or (None, None, None)))
    addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    stride = features if residual is None else residual.stride(0)
    numbers = map(ctypes.c_int64, (rows, features, stride, cutlass.ACTIVATIONS[activation], cooperative))
    assert ctypes.CDLL(str(library)).emulated_visitors_sm90(*addresses, *numbers)
    assert (out[rows:] == 7).all()
    return out[:rows].float()


def check_visitors_sm90(library, cooperative, rows=200, features=264):
    product, bias, gamma, sums = torch.randn(rows, features), *(torch.randn(features) for _ in range(3))
    mean, rstd = torch.randn(rows), torch.rand(rows) + 0.5
    residual = torch.randn(rows, features + 16).bfloat16()[:, :features]
    run = functools.partial(visit_sm90, library, cooperative, product)
    for b, g in ((bias, gamma), (None, None)):
        z = product.double() + (0 if b is None else b)
        folded = rstd[:, None] * (product.double() - mean[:, None] * sums) + (0 if b is None else b)
        cases = [(run(b, g, residual), residual + z * (1 if g is None else g))]
        for activation in ACTIVATIONS:
            cases.append((run(b, activation=activation), exact_activation(z, activation)))
            cases.append((run(b, norm=(mean, rstd, sums), activation=activation), exact_activation(folded, activation)))
        for found, golden in cases:
            torch.testing.assert_close(found, golden.bfloat16().float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("cooperative", (False, True))
def test_visitors_of_sm90(cooperative):
    library = cuda_emulator.build_visitors("sm90")
    for rows, features in ((200, 264), (256, 256), (1, 392)):
        check_visitors_sm90(library, cooperative, rows, features)


VISITOR_FAULTS = (
    ("sm80", "{p.residual_stride, _1{}, 0}", "{p.features, _1{}, 0}"),
    ("sm90", "{p.mean, 0.0f, {}}, {p.rstd, 0.0f, {}}", "{p.rstd, 0.0f, {}}, {p.mean, 0.0f, {}}"),
)


@pytest.mark.parametrize("name,old,new", VISITOR_FAULTS)
def test_a_fault_of_the_visitors_is_found(name, old, new):
    library = cuda_emulator.build_visitors(name, replaced=(old, new))
    with pytest.raises(AssertionError):
        if name == "sm80":
            check_visitors(library, torch.bfloat16)
        else:
            check_visitors_sm90(library, False)


def test_the_first_look_finds_faults(device, monkeypatch):
    """Right kernels pass it on every device; wrong results and errors are told once, and nothing is run after."""
    monkeypatch.setattr(cutlass, "_looked", {})
    for arch in (75, 80, 90, 100):
        device(arch)
        assert list(cutlass._wrong(CPU)) == []
    device(90)
    assert cutlass._first_look(CPU) == () == cutlass._looked[CPU]
    right = cutlass._run

    def shifted(*arguments, **options):
        return right(*arguments, **options) + (0.1 if "norm" in options else 0.0)

    monkeypatch.setattr(cutlass, "_run", shifted)
    monkeypatch.setattr(cutlass, "_looked", {})
    with pytest.warns(RuntimeWarning, match=r"wrong results.*products by PyTorch are used") as warned:
        (reason,) = cutlass._first_look(CPU)
    assert cutlass._first_look(CPU) == (reason,) and len(warned) == 1
    assert re.findall(r"(\w+) fold in bfloat16 has a relative error", reason) == ["pingpong", "cooperative"]
    assert "activation" not in reason and "residual" not in reason
    x, weight, _ = problem(HALF[0])
    assert cutlass.reasons(x, weight) == [reason]
    monkeypatch.setattr(cutlass, "_run", lambda *a, **o: 1 / 0)
    assert "raises ZeroDivisionError" in next(cutlass._wrong(CPU))


# The operator


def run_operator(out, x, weight, activation=0, family=0, swizzle=1, **tensors):
    named = [tensors.get(name) for name in ("bias", "gamma", "residual", "mean", "rstd", "sums")]
    torch.ops.vit_fast_cutlass.linear(out, x, weight, *named, activation, family, swizzle)


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def floats(length):
    return torch.zeros(length)


BAD_CALLS = {
    "size of x": (dict(x=zeros(4, 24)), "sizes"),
    "size of no multiple of 8": (dict(x=zeros(4, 12), weight=zeros(8, 12)), "sizes"),
    "features of no multiple of 8": (dict(out=zeros(4, 12), weight=zeros(12, 16)), "sizes"),
    "no rows": (dict(x=zeros(0, 16), out=zeros(0, 8)), "sizes"),
    "rows of out": (dict(out=zeros(3, 8)), "sizes"),
    "columns of weight": (dict(weight=zeros(16, 8).t()), "weight or out is not contiguous"),
    "dtypes": (dict(weight=zeros(8, 16, dtype=torch.float16)), "dtypes"),
    "float32": (dict(out=floats((4, 8)), x=floats((4, 16)), weight=floats((8, 16))), "no such kernel"),
    "rows apart by 17": (dict(x=zeros(4, 17)[:, :16]), "rows are not aligned"),
    "rows upon each other": (dict(x=zeros(1, 16).expand(4, 16)), "rows are not aligned"),
    "two strides": (dict(x=zeros(2, 3, 16)[:, :2]), "rows at more than one stride"),
    "begin of x": (dict(x=zeros(65)[1:].view(4, 16)), "rows are not aligned"),
    "bias in bfloat16": (dict(bias=zeros(8)), "bias"),
    "length of bias": (dict(bias=floats(9)), "bias"),
    "gamma without residual": (dict(gamma=floats(8)), "exclude each other"),
    "mean alone": (dict(mean=floats(4)), "exclude each other"),
    "residual and mean": (
        dict(residual=zeros(4, 8), mean=floats(4), rstd=floats(4), sums=floats(8)), "exclude each other",
    ),
    "shape of residual": (dict(residual=zeros(4, 16)), "residual"),
    "residual with gelu": (dict(residual=zeros(4, 8), activation=1), "activation"),
    "activation": (dict(activation=5), "activation"),
    "swizzle": (dict(swizzle=3), "swizzle"),
    "family": (dict(family=3), "no such kernel for the device"),
    "fold on multistage": (dict(mean=floats(4), rstd=floats(4), sums=floats(8)), "no such kernel for the device"),
}  # fmt: skip


@pytest.mark.parametrize("change,words", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_of_the_operator_is_an_error(device, change, words):
    good = dict(out=zeros(4, 8), x=zeros(4, 16), weight=zeros(8, 16))
    run_operator(**good)
    with pytest.raises(RuntimeError, match=f"vit_fast_cutlass::linear: .*{words}"):
        run_operator(**good | change)


@pytest.mark.parametrize(
    "arch,dtype,family", ((75, 0, 0), (89, 0, 1), (100, 0, 1), (120, 0, 2), (90, 1, 1), (70, 1, 0))
)
def test_a_kernel_is_found_on_its_devices_alone(device, arch, dtype, family):
    device(arch)
    out, x, weight = (zeros(*shape, dtype=HALF[dtype]) for shape in ((4, 8), (4, 16), (8, 16)))
    with pytest.raises(RuntimeError, match="no such kernel for the device"):
        run_operator(out, x, weight, family=family)
    if arch >= 80:
        run_operator(out, x, weight)


def test_every_config_has_its_kernel(device):
    """The tables of Python, of linear.h and of the builder are of the same kernels."""
    text = (cuda_emulator.CUTLASS / "linear.h").read_text()
    rows = re.findall(r"KERNEL\((\w+), (\w+), (\w+), (\w+), (\d+), (\d+)\)", text)
    assert [row[0] for row in rows] == list(build.CUTLASS_KERNELS)
    dtypes = {"BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16}
    for arch in (70, 75, 80, 86, 89, 90, 100, 103, 120):
        found = {
            (dtypes[dtype], family.lower(), epilogue.lower())
            for _, family, epilogue, dtype, first, last in rows
            if int(first) <= arch <= int(last)
        }
        wanted = set()
        for dtype in HALF:
            for config in cutlass.configs(dtype, arch):
                kinds = EPILOGUES if config.family != "multistage" else EPILOGUES[::2]
                wanted |= {(dtype, config.family, epilogue) for epilogue in kinds}
                assert cutlass.pick_config(10**6, 768, dtype, arch) in cutlass.configs(dtype, arch)
        assert found == wanted, arch
    for kernel, (file, defines, _) in build.CUTLASS_KERNELS.items():
        source = (cuda_emulator.CUTLASS / file).read_text()
        assert all(f"VF_{name}" in source for name in defines), kernel


# The backend


def test_the_backend_takes_it(backend, calls):
    x, norm = torch.randn(2, 5, 48).bfloat16(), (torch.randn(48).bfloat16(), torch.randn(48).bfloat16(), 1e-6)
    first, second = problem(HALF[0], (2, 5), 48, 64)[1:], problem(HALF[0], (2, 5), 64, 48)[1:]
    gamma = torch.randn(48).bfloat16()
    arguments = (x, *norm, *first, *second, "gelu", gamma)
    out = ops.layernorm_mlp(*arguments)
    assert calls == ["linear", "linear_residual"]
    golden = reference.layernorm_mlp(*(wide(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert_within_budget(out, reference.layernorm_mlp(*arguments), golden, kind="model")
    ops.layer_norm_linear(x, *norm, *first)
    assert calls[2:] == ["linear"]


def test_what_it_cannot_take_runs_by_pytorch(backend, calls):
    x, weight, bias = problem(HALF[0], (2, 5), 48, 48)
    scale = torch.tensor([1.0, 0.0])
    out = ops.linear_residual(x, weight, bias, None, x, row_scale=scale)
    assert_within_budget(out, reference.linear_residual(x, weight, bias, None, x, row_scale=scale),
                         formula(x, weight, bias, residual=x, row_scale=scale))  # fmt: skip
    ops.linear_residual(x, weight, bias, None, x.float())
    ops.linear_residual(x[:, 1:], weight, bias, None, x[:, 1:])
    ops.layer_norm_linear(x.float(), None, None, 1e-6, weight.float(), None)
    ops.layer_norm_linear(x, None, None, 1e-6, weight, bias, "swiglu")
    ops.layer_norm_linear(x[:0], None, None, 1e-6, weight, bias)
    assert calls == []


def block(width=32, hidden=64):
    def tensor(*shape):
        return torch.randn(shape).bfloat16() * shape[-1] ** -0.5

    qkv, fc1 = tensor(3 * width, width), tensor(hidden, width)
    biases = [torch.randn(size) for size in (3 * width, width, hidden, width)]
    return FoldedBlock(
        qkv, qkv.float().sum(1), biases[0], tensor(width, width), biases[1],
        fc1, fc1.float().sum(1), biases[2], tensor(width, hidden), biases[3],
    )  # fmt: skip


@pytest.mark.parametrize("arch,ran", ((90, "folded_linear"), (80, "linear")))
def test_prepared_blocks(backend, device, calls, arch, ran):
    device(arch)
    weights = [t for _ in range(2) for t in block()]
    x = torch.randn(2, 7, 32).bfloat16() + 1
    arguments = (2, 0.25, "gelu", 1e-6, 1e-6)
    out = backend.forward["prepared_blocks"](x, weights, *arguments)
    assert calls == [ran, "linear_residual"] * 4
    golden = reference.prepared_blocks(wide(x), [wide(t) for t in weights], *arguments)
    assert_within_budget(out, reference.prepared_blocks(x, weights, *arguments), golden, kind="model")


def test_statistics_alone(backend):
    for x in (torch.randn(5, 64), torch.randn(5, 60).bfloat16() + 3, torch.randn(3, 3000).half()):
        mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
        torch.ops.vit_fast_cuda.layer_norm(None, mean, rstd, x, None, None, 1e-6, False)
        _, *both = cuda.layer_norm_fwd(x, None, None, 1e-6)
        assert torch.equal(mean, both[0]) and torch.equal(rstd, both[1])


NOT_TAKEN = {
    "float32": (lambda x, w: (x.float(), w.float()), "dtypes are float32, float32; .* float16 or bfloat16 alone"),
    "dtypes": (lambda x, w: (x, w.half()), "dtypes are bfloat16, float16"),
    "residual": (lambda x, w: (x, w, None, x.float()), "dtypes are bfloat16, bfloat16, float32"),
    "activation": (lambda x, w: (x, w, "swiglu"), "activation swiglu is not among"),
    "row_scale": (lambda x, w: (x, w, None, x, torch.ones(2)), "row_scale is not among"),
    "sizes": (lambda x, w: (x[..., :20], w[:, :20].contiguous()), "weight is 48 × 20, .* multiples of 8"),
    "no rows": (lambda x, w: (x[:0], w), "x has 0 rows"),
    "strides of x": (lambda x, w: (x[:, 1:], w), r"x has strides \(240, 48, 1\), .* aligned rows at one stride"),
    "columns": (lambda x, w: (x.mT.contiguous().mT, w), "x has strides"),
    "expanded": (lambda x, w: (x[:, :1].expand(2, 5, 48), w), "x has strides"),
    "begin": (lambda x, w: (torch.cat([x.flatten(), x[0, 0, :1]])[1:].view_as(x), w), "x has strides"),
    "strides of residual": (lambda x, w: (x[:, 1:].contiguous(), w, None, x[:, 1:]), "residual has strides"),
    "weight": (lambda x, w: (x, w.t()), "weight is not contiguous"),
}


@pytest.mark.parametrize("call,words", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_reasons(device, call, words):
    x, weight = torch.randn(2, 5, 48).bfloat16(), torch.randn(48, 48).bfloat16()
    assert cutlass.reasons(x, weight) == cutlass.reasons(x[:, 0], weight, residual=x[:, 0]) == []
    found = cutlass.reasons(*call(x, weight))
    assert found and any(re.search(words, reason) for reason in found), found


def test_reasons_of_devices(device):
    x, weight = torch.randn(2, 48).bfloat16(), torch.randn(48, 48).bfloat16()
    device(75)
    assert cutlass.reasons(x, weight) == ["bfloat16 products need a newer device"]
    assert cutlass.reasons(x.half(), weight.half()) == []


def test_the_version_of_the_backend_tells_what_multiplies(backend, monkeypatch):
    assert backend.version() == "products by CUTLASS"
    monkeypatch.setattr(cutlass, "load", lambda: ("it is not built",))
    assert backend.version() == "products by PyTorch: it is not built"


def test_large_tiles_where_they_fill_the_chip():
    assert cutlass.pick_config(256 * 197, 768, HALF[0], 90).family == "cooperative"
    assert cutlass.pick_config(197, 3072, HALF[0], 90).family == "pingpong"
    for dtype, arch in ((HALF[1], 90), (HALF[0], 100), (HALF[0], 80)):
        assert cutlass.pick_config(256 * 197, 768, dtype, arch).family == "multistage"


def test_without_the_library(monkeypatch):
    """In a process without CUDA: a reason, and no warning."""
    monkeypatch.setattr(extension, "_states", {})
    (reason,) = cutlass.load()
    assert (
        "built without CUDA" in reason or reason == "the cutlass extension is not built: run `vit-fast build --cutlass`"
    )
    x = torch.randn(2, 48).bfloat16()
    assert cutlass.reasons(x, x[:, :48]) == [reason] and not cutlass.folds(x)
