"""Backends as objects: their tables, their order, what a further one needs, and what happens where one cannot.

``Fake`` is a fifth backend, as a file of its own would define it: it runs the reference and counts.
"""

import importlib.util
import inspect
import sys
import warnings
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vit_fast.kernels import reference

import vit_fast
from vit_fast import ops
from vit_fast.backends import base, cpu_choice, select
from vit_fast.backends.base import Backend
from vit_fast.backends.cpu import CPU
from vit_fast.backends.cuda import CUDA
from vit_fast.backends.torch import TORCH
from vit_fast.backends.triton import TRITON, Triton
from vit_fast.precisions import forms


class Fake(Backend):
    name = "fake"

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.forward = {
            "layer_norm": self.counted("layer_norm", reference.layer_norm_fwd),
            "linear_residual": self.counted("linear_residual", reference.linear_residual),
            "attention": self.counted("attention", reference.attention_fwd),
        }
        self.backward = {"layer_norm": self.counted("layer_norm backward", reference.layer_norm_bwd)}
        self.not_supported = {
            "layer_norm": lambda x, weight, bias, eps, norm: ["width is above 64"] if x.shape[-1] > 64 else []
        }

    def counted(self, name, function):
        def run(*arguments, **options):
            self.calls[name] += 1
            return function(*arguments, **options)

        return run

    def unavailable(self, device):
        return () if device.type == "cpu" else ("fake runs CPU tensors alone",)


def put(monkeypatch, *backends):
    monkeypatch.setattr(select, "BACKENDS", {backend.name: backend for backend in backends})


@pytest.fixture
def fake(monkeypatch):
    """The fifth backend in its place, before the reference."""
    backend = Fake()
    put(monkeypatch, TRITON, CUDA, CPU, backend, TORCH)
    return backend


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


CALLS = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b), [(2, 5, 16), (16,), (16,)]),
    "linear_residual": (
        lambda x, w, b, residual: ops.linear_residual(x, w, b, None, residual),
        [(2, 5, 8), (16, 8), (16,), (2, 5, 16)],
    ),
    "attention": (lambda qkv: ops.attention(qkv, 2, 0.5), [(2, 5, 48)]),
    "layernorm_mlp": (
        lambda x, w1, w2: ops.layernorm_mlp(x, None, None, 1e-6, w1, None, w2, None, "gelu", None),
        [(2, 5, 16), (32, 16), (16, 32)],
    ),
}


def chosen(call, *arguments):
    """What a call returns, and its one choice of a backend."""
    with vit_fast.backends.recording() as choices:
        out = call(*arguments)
    (choice,) = choices
    return out, choice


@pytest.mark.parametrize("name", ["layer_norm", "linear_residual", "attention"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_fifth_backend_runs_what_it_has(name, gradients, fake):
    call, shapes = CALLS[name]
    with torch.set_grad_enabled(gradients):
        out, choice = chosen(call, *tensors(*shapes))
        assert choice == (name, "fake", ()) and fake.calls == {name: 1}
        with vit_fast.backend("torch"):
            torch.testing.assert_close(out, call(*tensors(*shapes)))
    assert fake.calls == {name: 1}


@pytest.mark.parametrize("name", ["layer_norm", "linear_residual", "attention"])
def test_its_backward_is_its_own_or_the_references(name, fake):
    call, shapes = CALLS[name]
    gradients = []
    for backend in ("fake", "torch"):
        leaves = tensors(*shapes)
        with vit_fast.backend(backend):
            gradients.append(torch.autograd.grad(call(*leaves).square().sum(), leaves))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted)
    own = {"layer_norm backward": 1} if name == "layer_norm" else {}
    assert fake.calls == {name: 1} | own


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda: ops.layer_norm(torch.ones(2, 65), None, None), "width is above 64"),
        (lambda: CALLS["layernorm_mlp"][0](*tensors(*CALLS["layernorm_mlp"][1])), "fake has no layernorm_mlp"),
        (lambda: ops.attention(torch.ones(1, 2, 6), 1, 1.0, dropout_p=0.1), "dropout_p is not fused"),
    ],
)
def test_what_it_cannot_run_goes_on_to_the_reference(call, reason, fake, monkeypatch):
    _, (name, backend, reasons) = chosen(call)
    assert (backend, reasons) == ("torch", (reason,)) and not fake.calls
    with vit_fast.backend("fake"), pytest.raises(vit_fast.UnsupportedError) as raised:
        call()
    assert str(raised.value) == f"vit_fast.{name}: backend 'fake' was forced and cannot run: {reason}"
    monkeypatch.setattr(select, "_STRICT", "1")
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        call()
    assert str(raised.value) == f"vit_fast.{name}: fake cannot run this (VIT_FAST_STRICT=1): {reason}"


def test_a_device_that_it_does_not_run(fake):
    x = torch.ones(2, 8, device="meta")
    _, (_, backend, reasons) = chosen(ops.layer_norm, x, None, None)
    assert backend == "torch" and reasons == TRITON.unavailable(x.device)
    with vit_fast.backend("fake"), pytest.raises(vit_fast.UnsupportedError, match=r"fake runs CPU tensors alone$"):
        ops.layer_norm(x, None, None)


def test_words_and_status_know_it(fake):
    with pytest.raises(ValueError, match=r"expected one of auto, triton, cuda, cpu, fake, torch$"):
        vit_fast.backend("nope").__enter__()
    status = vit_fast.status("cpu")
    _, _, head, *table = str(status).splitlines()
    column = head.split().index("fake") + 1
    cells = {line.split()[0]: line.split()[column] for line in table[: len(TORCH.forward)]}
    assert cells == {name: "yes" if name in fake.forward else "no" for name in TORCH.forward}
    assert status.reasons["fake"] == ()
    assert status.reasons["cuda"] == ("the cuda extension does not run on device type cpu",)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

    def forward(self, x):
        x = ops.layer_norm(x, self.norm.weight, self.norm.bias)
        return ops.linear_residual(x, self.linear.weight, self.linear.bias, None, x)


def test_explain_tells_which_backward_runs(fake):
    model, x = Layers(), torch.randn(2, 5, 16)
    rows = vit_fast.explain(model, x)
    assert [(row.operation, row.backend, row.backward) for row in rows] == [
        ("layer_norm", "fake", "fake"),
        ("linear_residual", "fake", "torch"),
    ]
    assert str(rows).splitlines()[-1] == "backward of linear_residual: torch (fake has none)"
    with torch.no_grad():
        rows = vit_fast.explain(model.eval(), x)
    assert {row.backward for row in rows} == {None} and "backward" not in str(rows)
    with vit_fast.backend("torch"):
        rows = vit_fast.explain(model.train(), x)
    assert {row.backward for row in rows} == {"torch"} and "backward" not in str(rows)


def test_a_compiled_call_runs_it_and_knows_the_forced_backend(fake):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = Layers(), torch.randn(2, 5, 16)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    expected = model(x)
    fake.calls.clear()
    torch.testing.assert_close(compiled(x), expected)
    assert fake.calls == {"layer_norm": 1, "linear_residual": 1}
    with vit_fast.backend("torch"):
        torch.testing.assert_close(compiled(x), expected)
    assert fake.calls == {"layer_norm": 1, "linear_residual": 1} and counter.frame_count == 2
    compiled(x).sum().backward()
    assert fake.calls == {"layer_norm": 2, "linear_residual": 2, "layer_norm backward": 1}
    assert counter.frame_count == 2


@pytest.mark.interp
def test_backends_are_asked_in_order(fake, monkeypatch):
    """Triton first, the fifth for what Triton cannot; each tells its reasons where neither can."""
    _, choice = chosen(ops.layer_norm, torch.ones(2, 8), None, None)
    assert choice == ("layer_norm", "triton", ()) and not fake.calls
    wide = torch.ones(1, 2, 3 * 257)
    _, choice = chosen(ops.attention, wide, 1, 1.0)
    assert choice == ("attention", "fake", ("head size 257 is above 256",)) and fake.calls == {"attention": 1}
    _, (_, backend, reasons) = chosen(lambda: ops.attention(wide, 1, 1.0, dropout_p=0.1))
    assert backend == "torch"
    assert reasons == ("triton: head size 257 is above 256", "fake: dropout_p is not fused")
    put(monkeypatch, fake, TRITON, CUDA, CPU, TORCH)
    _, choice = chosen(ops.layer_norm, torch.ones(2, 8), None, None)
    assert choice == ("layer_norm", "fake", ())


@pytest.mark.interp
def test_explain_tells_the_backend_of_the_backward(monkeypatch):
    model = Layers()
    rows = vit_fast.explain(model, torch.randn(2, 5, 16))
    assert {(row.backend, row.backward) for row in rows} == {("triton", "triton")} and "backward" not in str(rows)
    monkeypatch.setattr(TRITON, "backward", {})
    rows = vit_fast.explain(model, torch.randn(2, 5, 16))
    assert {(row.backend, row.backward) for row in rows} == {("triton", "torch")}
    assert str(rows).splitlines()[-1] == "backward of layer_norm, linear_residual: torch (triton has none)"


def test_tables_hold_operations_with_the_references_arguments():
    pytest.importorskip("triton", reason="Triton is not installed")
    without_kernels = {name for form in forms() if form.kernels() is None for name in (form.operation, form.linear)}
    assert TRITON.load() == () and set(TRITON.forward) == set(TORCH.forward) - without_kernels
    for table in ("forward", "inference", "backward"):
        ours, wanted = getattr(TRITON, table), getattr(TORCH, table)
        for name, function in ours.items():
            names = [list(inspect.signature(f).parameters) for f in (function, wanted[name])]
            parameters = inspect.signature(wanted[name]).parameters.values()
            required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
            assert names[0][: len(required)] == names[1][: len(required)] == required, (table, name)
    assert not any((backend.forward, backend.inference, backend.backward) != ({}, {}, {}) for backend in (CUDA, CPU))


def test_an_operator_names_a_backend_that_is_here():
    """As a recorded graph of another machine may not."""
    operator, names = torch.ops.vit_fast.layer_norm_fwd, ", ".join(select.BACKENDS)
    words = r"layer_norm: backend 'cuda' cannot run: .*(is not built|without CUDA)"
    with pytest.raises(vit_fast.UnsupportedError, match=words):
        operator(torch.ones(2, 8), None, None, 1e-6, "layer", False, "cuda")
    with pytest.raises(ValueError, match=rf"layer_norm: backend is 'nope', expected one of {names}$"):
        operator(torch.ones(2, 8), None, None, 1e-6, "layer", False, "nope")


def test_a_triton_that_fails_to_import_is_told_once(monkeypatch):
    from vit_fast import kernels

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "vit_fast.kernels.attention", None)
    monkeypatch.delattr(kernels, "attention", raising=False)
    broken = Triton()
    put(monkeypatch, broken, CUDA, CPU, TORCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _, (_, backend, (reason,)) = chosen(ops.layer_norm, torch.ones(2, 8), None, None)
            assert backend == "torch" and reason.startswith("triton fails to import: ")
    (warning,) = caught
    assert "triton is installed and fails to import" in str(warning.message)
    assert "Reinstall triton" in str(warning.message)
    with vit_fast.backend("triton"), pytest.raises(vit_fast.UnsupportedError, match="triton fails to import"):
        ops.layer_norm(torch.ones(2, 8), None, None)


def test_where_the_cpu_extension_is_chosen():
    def rows(operation, dtype, level="avx512_vnni", **capabilities):
        return cpu_choice.fewest_rows(operation, dtype, level, capabilities)

    assert rows("attention", torch.bfloat16) == rows("attention", torch.float16) == 8
    assert rows("patch_embed", torch.bfloat16, "avx512_bf16") == 8
    assert rows("layernorm_mlp", torch.bfloat16, "avx512_bf16") == 577 and rows("layernorm_mlp", torch.bfloat16) == 16
    for dtype, capability in (
        (torch.bfloat16, "amx_bf16"),
        (torch.float16, "avx512_fp16"),
        (torch.float16, "amx_fp16"),
    ):
        assert rows("attention", dtype, "avx512_bf16", **{capability: True}) is None
        assert capability in cpu_choice.stack_reasons(dtype, {capability: True})[0]
    assert rows("attention", torch.float16, "generic") is None
    for operation in TORCH.backward:
        assert (rows(operation, torch.float32) is None) == (operation != "attention")
    assert not any(cpu_choice.stack_reasons(dtype, {}) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def test_attention_without_options_of_its_own():
    """What the extensions share: they normalise q and k before the kernel, and name every other option."""
    qkv, norm = torch.randn(2, 5, 48), (torch.randn(8), torch.randn(8), 1e-5)
    for of in ({"q_norm": norm}, {"k_norm": norm}, {"q_norm": norm, "k_norm": norm, "norm": "rms"}):
        for k, v, q in ((None, None, qkv), (qkv[..., 16:32], qkv[..., 32:], qkv[..., :16])):
            changed = base.normalised_heads(reference.layer_norm, q, 2, k, v, **of)
            out = reference.attention(changed[0], 2, 0.3, k=changed[1], v=changed[2])
            assert torch.equal(out, reference.attention(q, 2, 0.3, k=k, v=v, **of))
    given = dict(bias=1, rel_pos=2, key_lengths=3, cu_seqlens=4, rope=5, rope_layout="half", num_prefix=0, norm="rms")
    told = base.attention_option_reasons(qkv, None, None, **given)
    lacks = ("bias", "rel_pos", "key_lengths", "cu_seqlens", "rope")
    assert told == [f"attention has no {name} here" for name in lacks]
    assert not base.attention_option_reasons(qkv, None, None, q_norm=norm, k_norm=None, norm="rms")
    assert len(base.attention_option_reasons(qkv[..., :16], qkv[..., :16], qkv[..., :32])) == 1
