"""A backend that fails: the next one runs the call, one warning names cause and remedy, and the second call is silent.

Where each fault is tried, "build" being tests/csrc/test_build.py, "extension" tests/csrc/test_extension.py:

==============================  ======================================================================================
Triton absent                   test_without_triton
Triton fails to import          test_backends.py, test_a_triton_that_fails_to_import_is_told_once
no driver                       test_no_driver, once for all operations
driver too old                  FAULTS: it refuses the cubin or the PTX when a kernel is loaded
CompilationError                FAULTS
PTXASError                      FAULTS
OutOfResources                  FAULTS
all configs fail                a rule picks one config and no call tries another: FAULTS (OutOfResources). Of the
                                tuner: tests/bench/test_tune.py, test_a_rule_whose_config_does_not_run_stands_out
config table unreadable         test_a_config_table_that_cannot_be_read: configs are a module, kernels/configs.py
tuned file corrupt              the rules pick: test_tuned.py, test_a_damaged_file_is_told_once and its neighbour; the
                                tuner writes whole files: test_tune.py, test_files_are_whole
cache: JSON truncated           Triton's own cache, which raises JSONDecodeError on every start: FAULTS
cache: JSON empty               the same
cache: group JSON broken        Triton's own, JSONDecodeError or KeyError: FAULTS
cache: cubin missing            Triton's own, KeyError: FAULTS
cache: cubin of no length       Triton's own; found when the driver loads it, as a RuntimeError: FAULTS
cache folder unwritable         Triton's own, FileNotFoundError or PermissionError: FAULTS; of the extension: build,
                                test_unwritable_cache, test_a_read_only_cache_is_read
disk full                       FAULTS; of the extension: build, test_full_disk
nvcc absent                     build, test_no_ninja_and_no_nvcc
ninja or g++ absent             build, test_no_ninja_and_no_nvcc, test_no_compiler
extension: compile error        build, test_compile_error
stale build lock                build, test_a_lock_file_without_a_holder_stops_nobody, test_waiting_ends
builder killed                  build, test_a_killed_builder_is_cleaned_up_after, test_killed_compiler,
                                test_what_was_compiled_before_a_build_ended_is_kept
garbage library                 extension, test_damage_is_found_before_dlopen, test_dlopen_in_a_child
library, undefined symbol       extension, test_dlopen_in_a_child
NaN or wrong at first use       test_a_library_that_computes_wrong_results, test_the_first_look
invalid environment variable    test_errors.py, test_environment_word; test_invalid_words_of_the_environment
==============================  ======================================================================================

``Failing`` stands for a compiled backend on CPU tensors, which raises what a real one raises.
"""

import errno
import importlib.util
import json
import sys
import threading
import types
import warnings

import pytest
import torch
from support.budget import assert_within_budget
from torch._dynamo.testing import CompileCounterWithBackend
from vit_fast.kernels import folding, packing, reference

import vit_fast
from vit_fast import ops
from vit_fast.backends import canary, cpu, quarantine, select
from vit_fast.backends.base import Backend
from vit_fast.backends.cuda import CUDA
from vit_fast.backends.torch import TORCH
from vit_fast.backends.triton import Triton


class Failing(Backend):
    """The reference under another name; its forwards raise ``error``, its backwards ``backward_error``."""

    remedy = "Do this."

    def __init__(self, name="failing", error=None, backward_error=None):
        super().__init__()
        self.name, self.error, self.backward_error, self.calls = name, error, backward_error, 0
        self.forward = {operation: self.guarded("error", run) for operation, run in TORCH.forward.items()}
        self.inference = {operation: self.guarded("error", run) for operation, run in TORCH.inference.items()}
        self.backward = {operation: self.guarded("backward_error", run) for operation, run in TORCH.backward.items()}

    def guarded(self, which, run):
        def guarded(*arguments, **options):
            self.calls += 1
            if getattr(self, which) is not None:
                raise getattr(self, which)
            return run(*arguments, **options)

        return guarded


def put(monkeypatch, *backends):
    monkeypatch.setattr(select, "BACKENDS", {backend.name: backend for backend in backends})
    return backends[0]


def told(call):
    """What a call returns, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call()
    return out, [str(warning.message) for warning in caught]


def decode_error(text):
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error


def triton_error(name):
    """An error of Triton's as Triton raises it, or one of that name where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return type(name, (Exception,), {})("at 3:4: no")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "CompilationError": lambda: CompilationError("x = tl.dot(a, b)", None, "K is below 16"),
        "PTXASError": lambda: PTXASError("Internal Triton PTX codegen error"),
        "OutOfResources": lambda: OutOfResources(393216, 232448, "shared memory"),
    }[name]()


FAULTS = {
    "driver too old": lambda: RuntimeError("Triton Error [CUDA]: the provided PTX has an unsupported toolchain"),
    "CompilationError": lambda: triton_error("CompilationError"),
    "PTXASError": lambda: triton_error("PTXASError"),
    "OutOfResources": lambda: triton_error("OutOfResources"),
    "cache JSON truncated": lambda: decode_error('{"name": '),
    "cache JSON empty": lambda: decode_error(""),
    "group JSON broken": lambda: KeyError("child_paths"),
    "cubin missing": lambda: KeyError("cubin"),
    "cubin of no length": lambda: RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    "cache folder unwritable": lambda: PermissionError(errno.EACCES, "Permission denied", "cache"),
    "cache folder gone": lambda: FileNotFoundError(errno.ENOENT, "No such file or directory", "cache"),
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "operator of the extension": lambda: RuntimeError("layer_norm.cpp:12: x is not dense"),
    "not implemented": lambda: NotImplementedError("Could not run 'vit_fast_cpu::layer_norm' with arguments from CPU"),
}  # fmt: skip
X, W, B = torch.randn(3, 5, 24), torch.randn(24), torch.randn(24)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived(fault, monkeypatch):
    backend = put(monkeypatch, Failing(error=FAULTS[fault]()), TORCH)
    kind = type(backend.error).__name__
    with vit_fast.backend("failing"), pytest.raises(vit_fast.UnsupportedError) as raised:
        ops.layer_norm(X, W, B)
    assert raised.value.__cause__ is backend.error
    assert str(raised.value).startswith(f"vit_fast.layer_norm: backend 'failing' was forced and failed: {kind}: ")
    with monkeypatch.context() as patch:
        patch.setattr(select, "_STRICT", "1")
        with pytest.raises(vit_fast.UnsupportedError, match=r"failed \(VIT_FAST_STRICT=1\): ") as raised:
            ops.layer_norm(X, W, B)
        assert raised.value.__cause__ is backend.error and not backend.quarantined  # a raise is no silence bought

    backend.calls = 0
    out, (warning,) = told(lambda: ops.layer_norm(X, W, B))
    golden, eager = (reference.layer_norm(*(t.to(d) for t in (X, W, B)), 1e-6) for d in (torch.float64, torch.float32))
    assert_within_budget(out, eager, golden)
    start = (
        "vit_fast.layer_norm: backend 'failing' failed and is left out for this operation from now on; 'torch' runs it."
    )
    assert warning.startswith(f"{start} Cause: {kind}: ")
    assert "Do this." in warning and "VIT_FAST_BACKEND=torch" in warning and "vit-fast doctor" in warning
    again, silence = told(lambda: ops.layer_norm(X, W, B))
    assert silence == [] and torch.equal(again, out) and backend.calls == 1

    status = vit_fast.status("cpu")
    why = status.quarantine["failing"]["layer_norm"]
    assert why.startswith(kind) and f"failing failed in this process, layer_norm: {why}" in str(status).splitlines()
    (row,) = [line.split() for line in str(status).splitlines() if line.startswith("layer_norm ")]
    assert row == ["layer_norm", "failed", "yes"]
    with vit_fast.backends.recording() as choices:
        ops.layer_norm(X, W, B)
    assert choices == [("layer_norm", "torch", (f"it failed earlier in this process ({why})",))]
    with (
        vit_fast.backend("failing"),
        pytest.raises(vit_fast.UnsupportedError, match="it failed earlier in this process"),
    ):
        ops.layer_norm(X, W, B)
    monkeypatch.setattr(select, "_STRICT", "1")
    with pytest.raises(vit_fast.UnsupportedError, match="it failed earlier in this process"):
        ops.layer_norm(X, W, B)


def calls():
    """Operation → a call of it with a sum of its output to differentiate; every operation of the tables."""
    qkv, w1, w2, images = torch.randn(2, 5, 72), torch.randn(40, 24), torch.randn(24, 40), torch.randn(2, 3, 8, 8)
    patch, hidden = torch.randn(24, 3, 4, 4), torch.randn(3, 5, 40)
    block = ((W, B), (torch.randn(72, 24), None), (torch.randn(24, 24), None), None) + (
        (W, B),
        (w1, None),
        (w2, None),
        None,
    )
    shape = (2, 0.3, "gelu", 1e-6, 1e-6)
    stacks = {
        "prepared_blocks": (vit_fast.precisions.FOLDED, folding.flatten([folding.prepare_block(*block)]), X),
        "packed_blocks": (vit_fast.precisions.PACKED, folding.flatten([packing.packed_block(*block, "gelu")]), X),
        "int8_blocks": (vit_fast.precisions.INT8, folding.flatten([packing.int8_block(*block, "gelu")]), X),
    }
    return {
        "layer_norm": lambda x: ops.layer_norm(x, W, B),
        "layer_norm_linear": lambda x: ops.layer_norm_linear(x, W, B, 1e-6, w1, None, "gelu"),
        "linear_residual": lambda x: ops.linear_residual(hidden, w2, None, None, x),
        "layernorm_mlp": lambda x: ops.layernorm_mlp(x, W, B, 1e-6, w1, None, w2, None, "gelu", None),
        "attention": lambda x: ops.attention(x.repeat(1, 1, 3) + 0 * qkv.mean(), 2, 0.3),
        "patch_embed": lambda x: ops.patch_embed(images + x.mean(), patch, None, None, None, 4),
    } | {
        name: lambda x, p=p, weights=weights: ops.blocks(p, x.detach(), weights, *shape)
        for name, (p, weights, _) in stacks.items()
    }


@pytest.mark.parametrize("operation", calls())
def test_every_operation_goes_on(operation, monkeypatch):
    backend = put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
    call, x = calls()[operation], X.clone().requires_grad_()
    out, (warning,) = told(lambda: call(x))
    assert warning.startswith(f"vit_fast.{operation}: ") and set(backend.quarantined) == {operation}
    again, silence = told(lambda: call(x))
    torch.testing.assert_close(out, again, rtol=1e-6, atol=1e-6)
    assert silence == [] and backend.calls == 1
    if out.requires_grad:
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, again)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        assert backend.calls == 1


@pytest.mark.parametrize("operation", ["layer_norm", "attention"])
def test_a_backward_that_fails_is_the_references(operation, monkeypatch):
    backend = put(monkeypatch, Failing(backward_error=RuntimeError("boom")), TORCH)
    call, gradients = calls()[operation], []
    for _ in range(2):
        x = X.clone().requires_grad_()
        out = call(x)
        grad, warned = told(lambda out=out, x=x: torch.autograd.grad(out.square().sum(), x)[0])
        gradients.append((grad, len(warned)))
    with vit_fast.backend("torch"):
        wanted = torch.autograd.grad(call(x).square().sum(), x)[0]
    assert [count for _, count in gradients] == [1, 0] and set(backend.quarantined) == {f"{operation} backward"}
    torch.testing.assert_close(gradients[0][0], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1][0], wanted, rtol=1e-5, atol=1e-5)
    backend.quarantined.clear()
    with vit_fast.backend("failing"):
        out = call(x)
        with pytest.raises(vit_fast.UnsupportedError, match=f"{operation}: backend 'failing' was forced and failed"):
            out.sum().backward()


def test_the_chain_is_followed(monkeypatch):
    """First fails, second cannot run the call, third fails, fourth runs it."""
    first, second = Failing("first", RuntimeError("one")), Failing("second")
    third, fourth = Failing("third", RuntimeError("three")), Failing("fourth")
    second.not_supported = {"attention": lambda qkv, num_heads, k=None, v=None: ["second does not"]}
    put(monkeypatch, first, second, third, fourth, TORCH)
    with vit_fast.backends.recording() as choices:
        out, warned = told(lambda: ops.attention(torch.ones(1, 3, 12), 2, 0.5))
    assert torch.equal(out, torch.ones(1, 3, 4))
    assert [text.split("; ")[1].split(" runs")[0] for text in warned] == ["'third'", "'fourth'"]
    ((operation, backend, reasons),) = choices
    assert (operation, backend) == ("attention", "fourth") and len(reasons) == 2
    assert (first.calls, second.calls, third.calls, fourth.calls) == (1, 0, 1, 1)
    out, warned = told(lambda: ops.attention(torch.ones(1, 3, 12), 2, 0.5))
    assert not warned and (first.calls, third.calls, fourth.calls) == (1, 1, 2)
    out, warned = told(lambda: ops.layer_norm(X, W, B))  # another operation is tried
    assert len(warned) == 1 and second.calls == 1


def test_a_recorded_name(monkeypatch):
    """As in a graph that was exported before the failure."""
    backend = put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
    operator = torch.ops.vit_fast.layer_norm_fwd
    (out, *_), warned = told(lambda: operator(X, W, B, 1e-6, "layer", True, "failing"))
    (again, *_), silence = told(lambda: operator(X, W, B, 1e-6, "layer", True, "failing"))
    assert (len(warned), silence, backend.calls) == (1, [], 1)
    assert torch.equal(out, again) and torch.equal(out, reference.layer_norm(X, W, B, 1e-6))
    with (
        vit_fast.backend("failing"),
        pytest.raises(vit_fast.UnsupportedError, match="forced and failed: it failed ear"),
    ):
        operator(X, W, B, 1e-6, "layer", True, "failing")


def test_a_compiled_call(monkeypatch):
    torch._dynamo.reset()
    backend = put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: ops.layer_norm(x, W, B), fullgraph=True, backend=counter)
    out, warned = told(lambda: compiled(X))
    again, _ = told(lambda: compiled(X))
    assert sum("backend 'failing' failed" in text for text in warned) == backend.calls == 1
    torch.testing.assert_close(out, reference.layer_norm(X, W, B, 1e-6))
    torch.testing.assert_close(again, out)
    assert told(lambda: compiled(X))[1] == [] and counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype, monkeypatch):
    for operation, call in calls().items():
        with torch.autocast("cpu", dtype):
            put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
            out, _ = told(lambda call=call: call(X))
            put(monkeypatch, Failing(), TORCH)
            wanted = call(X)
        assert out.dtype == wanted.dtype, operation
        torch.testing.assert_close(out, wanted)


PASSED = {
    "mistake": ValueError("x is bad"),
    "wrong type": TypeError("x is bad"),
    "unsupported": vit_fast.UnsupportedError("no"),
    "memory of the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory": MemoryError(),
    "memory of the CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "memory of Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(1),
}


@pytest.mark.parametrize("which", PASSED)
def test_what_is_not_the_backends_passes(which, monkeypatch):
    backend = put(monkeypatch, Failing(error=PASSED[which]), TORCH)
    with pytest.raises(type(PASSED[which])) as raised:
        ops.layer_norm(X, W, B)
    assert raised.value is PASSED[which] and not backend.quarantined
    assert not getattr(raised.value, "__notes__", ())


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: misaligned address",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
    ],
)
def test_a_lost_context_is_told_and_raised(text, monkeypatch):
    backend = put(monkeypatch, Failing(error=RuntimeError(text)), TORCH)
    with pytest.raises(RuntimeError, match=text.split(": ")[1]) as raised:
        ops.layer_norm(X, W, B)
    (note,) = raised.value.__notes__
    assert "Start a new process" in note and "CUDA_LAUNCH_BLOCKING=1" in note and not backend.quarantined


def test_threads_warn_once(monkeypatch):
    start = threading.Barrier(8)

    def wait(*arguments, **options):
        start.wait(30)  # all have chosen this backend before it fails in one
        raise RuntimeError("boom")

    backend = put(monkeypatch, Failing(), TORCH)
    backend.inference = backend.inference | {"layer_norm": wait}
    outs = []
    threads = [threading.Thread(target=lambda: outs.append(ops.layer_norm(X, W, B))) for _ in range(8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(outs) == 8 and len(caught) == 1 and all(torch.equal(out, outs[0]) for out in outs)


def test_a_warning_that_is_an_error_comes_once(monkeypatch):
    put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="boom"):
            ops.layer_norm(X, W, B)
        ops.layer_norm(X, W, B)


def test_a_long_cause_keeps_both_ends():
    text = quarantine.cause(RuntimeError("first\n" + "x" * 5000 + "\nlast"))
    assert text.startswith("RuntimeError: first x") and text.endswith("x last") and len(text) < 340


def test_explain_and_check_say_what_ran(monkeypatch):
    put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
    model = vit_fast.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3
    ).eval()
    certificate, warned = told(lambda: vit_fast.check(model, torch.rand(2, 3, 16, 16)))
    assert certificate.passed and all(name.startswith("torch ") for name in certificate.operations)
    assert warned and len(warned) == len({text.split(": ")[0] for text in warned})
    rows = vit_fast.explain(model)
    assert {row.backend for row in rows} == {"torch"} and "it failed earlier in this process" in str(rows)


def test_errors_of_the_interpreter_are_shown():
    error = RuntimeError("boom")
    assert not Triton().is_failure(error, torch.device("cpu")) and Triton().is_failure(error, torch.device("cuda"))


# Triton


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    put(monkeypatch, Triton(), TORCH)
    out, warned = told(lambda: ops.layer_norm(X, W, B))
    assert warned == [] and torch.equal(out, reference.layer_norm(X, W, B, 1e-6))
    assert vit_fast.status("cpu").reasons["triton"] == ("triton is not installed",)
    with vit_fast.backend("triton"), pytest.raises(vit_fast.UnsupportedError, match="triton is not installed"):
        ops.layer_norm(X, W, B)


def test_no_driver(monkeypatch):
    """A GPU that torch finds, and Triton does not: one warning for all operations."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime import driver

    def none(self):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(type(driver), "active", property(none))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    triton = Triton()
    reasons, warned = told(lambda: [triton.unavailable(torch.device("cuda")) for _ in range(3)])
    assert set(reasons) == {
        ("triton finds no GPU driver: RuntimeError: 0 active drivers ([]). There should only be one.",)
    }
    (warning,) = warned
    assert "0 active drivers" in warning and "update the GPU's driver" in warning


def test_a_config_table_that_cannot_be_read(monkeypatch):
    from vit_fast import kernels

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("attention", "layer_norm", "layernorm_mlp", "linear", "patch_embed", "configs"):
        monkeypatch.delitem(sys.modules, f"vit_fast.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    monkeypatch.setitem(sys.modules, "vit_fast.kernels.configs", None)
    put(monkeypatch, Triton(), TORCH)
    out, (warning,) = told(lambda: [ops.layer_norm(X, W, B) for _ in range(2)][1])
    assert torch.equal(out, reference.layer_norm(X, W, B, 1e-6))
    assert "configs" in warning and "Reinstall triton" in warning
    assert "configs" in vit_fast.status("cpu").reasons["triton"][0]


# A library that computes wrong results

LOOKED_AT = ("layer_norm", "attention", "layernorm_mlp", "patch_embed", "packed_blocks", "int8_blocks")


def first_look(**broken):
    def int8(x, weights, *shape):  # its reference takes the same arguments
        return reference.int8_blocks(x, weights, *shape)

    right = dict(TORCH.forward) | {"int8_blocks": int8}
    return told(lambda: canary.reasons("cpu", right | broken, "Do this."))


@pytest.mark.parametrize("operation", LOOKED_AT)
def test_the_first_look(operation):
    assert first_look() == ((), [])
    right = TORCH.forward[operation]

    def spoilt(by):
        def run(*arguments):
            out = right(*arguments)
            return (by(out[0]), *out[1:]) if isinstance(out, tuple) else by(out)

        return run

    def raises(*arguments):
        raise RuntimeError("illegal instruction")

    wrong = {
        "nan": spoilt(lambda out: out * torch.nan),
        "one value": spoilt(lambda out: out.flatten().index_fill(0, torch.tensor(0), 9e9).view(out.shape)),
        "shifted": spoilt(lambda out: out.roll(1, -1)),
        "zeros": spoilt(torch.zeros_like),
        "raises": raises,
    }
    for how, run in wrong.items():
        (reason,), (warning,) = first_look(**{operation: run})
        assert f"{operation} in float32" in reason and reason in warning and "Do this." in warning, how
        others = [name for name in LOOKED_AT if f" {name} in " in reason]
        assert others == [operation], how


def test_the_first_look_leaves_the_callers_state_alone():
    state = torch.get_rng_state()
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert first_look() == ((), [])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_library_that_computes_wrong_results(monkeypatch):
    """It loads, and its operators are not what they should be."""
    monkeypatch.setattr(cpu.extension, "load", lambda name: ())
    monkeypatch.setattr(torch.ops, "vit_fast_cpu", types.SimpleNamespace(level=lambda: "generic"), raising=False)
    backend = cpu.Cpu()
    backend._library = object()  # a second one of this namespace is not allowed
    put(monkeypatch, CUDA, backend, TORCH)
    x = X.half()
    out, (warning,) = told(lambda: [ops.attention(x, 2, 0.5, k=x, v=x) for _ in range(2)][1])
    assert torch.equal(out, reference.attention(x, 2, 0.5, k=x, v=x))
    assert "the cpu extension computes wrong results on this machine: layer_norm in float32 raises" in warning
    assert "Run `vit-fast build --force`" in warning
    status = vit_fast.status("cpu")
    assert status.reasons["cpu"] == (backend._wrong[0],) and "computes wrong results" in str(status)
    with vit_fast.backend("cpu"), pytest.raises(vit_fast.UnsupportedError, match="computes wrong results"):
        ops.layer_norm(X, W, B)


@pytest.mark.extension
def test_the_first_look_at_the_library_on_every_level():
    if cpu.CPU.load():
        pytest.skip("the cpu extension is not built")
    level = cpu.CPU.version()
    try:
        for name in cpu.CPU.levels():
            cpu.CPU.use_level(name)
            assert canary.reasons("cpu", cpu.CPU.forward, "") == (), name
    finally:
        cpu.CPU.use_level(level)


@pytest.mark.parametrize("name,value", [("_STRICT", "yes"), ("_ENVIRONMENT", "gpu")])
def test_invalid_words_of_the_environment(name, value, monkeypatch):
    """The first call says so, on every call: no backend runs meanwhile."""
    backend = put(monkeypatch, Failing(error=RuntimeError("boom")), TORCH)
    monkeypatch.setattr(select, name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"VIT_FAST_.* is '{value}'"):
            ops.layer_norm(X, W, B)
    assert not backend.quarantined
