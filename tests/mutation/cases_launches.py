"""Kill suites of what stands around launches: tables of configs, intercepted launches, warming up, launch plans.

Kernels and compiled variants are stand-ins here, but where the interpreter runs a real one.
"""

import json
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from vit_fast.kernels import configs as configs_module
from vit_fast.kernels import interception as interception_module
from vit_fast.kernels import layer_norm as layer_norm_kernels
from vit_fast.kernels import tuned as tuned_module
from vit_fast.kernels import warming as warming_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PICKED = configs_module.LinearConfig(128, 256, 64, 8, 8, 3, True)


def tuned():
    """Which files are read, which are refused, and what a table changes."""
    module = tuned_module
    assert module.FOLDER == Path(module.__file__).parent / "tuned"
    assert module.file_of("NVIDIA H100 PCIe") == module.FOLDER / "h100-pcie.json"
    _fields_of_tuned(module)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "FOLDER", Path(folder)):
        _files_of_tuned(module, module.file_of("NVIDIA H200"))
        _overrides(module, module.file_of("NVIDIA H200"))


def _all_fields(**changes):
    return {name: getattr(PICKED, name) for name in tuned_module.FIELDS} | changes


def _fields_of_tuned(module):
    assert list(module.FIELDS) == list(PICKED.__dataclass_fields__)
    for right in (_all_fields(), _all_fields(block_m=1, tma=False, maxnreg=1), _all_fields(maxnreg=None)):
        assert module._checked(right, True) is right and module._checked(right, False) is right
    assert module._checked({"block_k": 1}, False) == {"block_k": 1} and module._checked({}, False) == {}
    missing = _all_fields()
    del missing["group_m"]
    for every, wrong, text in (
        (True, missing, "wanted all of block_m"), (False, _all_fields(odd=1), "wanted some of block_m"),
        (True, _all_fields(odd=1), "wanted all of"), (True, [], "got fields []"), (False, None, "got fields None"),
        (True, _all_fields(block_m=0), "got block_m 0, wanted a int"), (False, {"tma": 1}, "got tma 1, wanted a bool"),
        (False, {"block_m": -16}, "got block_m -16"), (False, {"block_m": 16.0}, "got block_m 16.0"),
        (False, {"split_k": True}, "got split_k True"), (False, {"maxnreg": 0}, "got maxnreg 0, wanted a int | None"),
        (False, {"maxnreg": True}, "got maxnreg True"), (False, {"num_warps": None}, "got num_warps None"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            module._checked(wrong, every)
        assert text in str(error.value)


def _files_of_tuned(module, file):
    entry = {"out_features": 3072, "picked": _all_fields(), "use": {"num_warps": 4}}
    right = {"device": "NVIDIA H200", "triton": "3.7.1", "linear": [entry, entry | {"out_features": 768}]}
    table = {(width, *_all_fields().values()): {"num_warps": 4} for width in (3072, 768)}
    for content, wanted in ((right, table), (right | {"linear": []}, {}), (right | {"triton": "3.6.0"}, {})):
        file.write_text(json.dumps(content))
        assert module.read(file, "NVIDIA H200", "3.7.1") == wanted
    for content, text in (
        (right | {"device": "NVIDIA H100"}, "got device 'NVIDIA H100', wanted 'NVIDIA H200'"),
        ({}, "no entry 'device'"), ([], "list indices"), (right | {"linear": [entry | {"picked": {}}]}, "wanted all of"),
        (right | {"linear": [entry | {"use": {"odd": 1}}]}, "wanted some of"),
        (right | {"linear": [entry | {"out_features": "wide"}]}, "invalid literal"),
    ):  # fmt: skip
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="cannot be used") as error:
            module.read(file, "NVIDIA H200", "3.7.1")
        assert text in str(error.value) and str(file) in str(error.value)
        assert ("no entry" in str(error.value)) == text.startswith("no entry")
    file.write_text(json.dumps(right))


def _overrides(module, file):
    picked = []

    def pick(rows, out_features, *more, **named):
        """The rule."""
        picked.append((rows, out_features, more, named))
        return PICKED

    @module.reads_tables
    def arch_of(device):
        """Of a device."""
        return 90 if device.type == "cuda" else 80

    picking = module.overrides(pick)
    assert (picking.__doc__, arch_of.__doc__) == ("The rule.", "Of a device.")
    with (
        mock.patch.object(module, "_tables", {}),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: {CUDA: "NVIDIA H200"}[device]),
        mock.patch.object(module.importlib.metadata, "version", {"triton": "3.7.1"}.get),
    ):
        assert arch_of(CPU) == 80 and module._tables == {} and picking(1, 3072, True, 90) is PICKED
        assert arch_of(CUDA) == 90 and list(module._tables) == [90]
        for found in (picking(1, 3072, True, 90), picking(1, 3072, True, 80, arch=90), picking(1, 3072, arch=90)):
            assert found == replace(PICKED, num_warps=4)
        for same in (picking(1, 768, True, 100), picking(1, 1024, True, 90), picking(1, 3072)):
            assert same is PICKED
        assert picked[:2] == [(1, 3072, (True, 90), {}), (1, 3072, (True, 90), {})]
        file.unlink()
        assert arch_of(CUDA) == 90 and module._tables == {90: {}} and picking(1, 3072, True, 90) is PICKED


class Lock:
    """A lock that raises where it would block."""

    def __init__(self):
        self.locked = False

    def __enter__(self):
        assert not self.locked, "a deadlock"
        self.locked = True

    def __exit__(self, *error):
        self.locked = False


def interception():
    """Launches inside go to the handler, in this thread alone; outside nothing of it is left."""
    assert type(interception_module._one_at_a_time) is type(threading.Lock())
    with mock.patch.object(interception_module, "_one_at_a_time", Lock()):
        _intercepted(interception_module)


def _intercepted(module):
    handled = []
    x = torch.randn(3, 16)
    wanted = layer_norm_kernels.layer_norm(x, None, None, 1e-6)

    def handler(kernel, run, args, grid, kwargs):
        handled.append((kernel, grid))
        assert len({id(one) for one in module._kernels()}) == len(module._kernels())
        return run(*args, grid=grid, warmup=False, **kwargs)

    def elsewhere():
        assert not module.active()
        assert torch.equal(layer_norm_kernels.layer_norm(x, None, None, 1e-6), wanted)
        return "done"

    kernel = layer_norm_kernels._layer_norm_fwd_kernel
    assert kernel in module._kernels() and not module.active()
    with ThreadPoolExecutor(1) as pool:
        with module.intercepted(handler):
            assert module.active()
            assert torch.equal(layer_norm_kernels.layer_norm(x, None, None, 1e-6), wanted)
            assert [one for one, _ in handled] == [kernel] and pool.submit(elsewhere).result() == "done"
            assert len(handled) == 1
            with pytest.raises(RuntimeError, match="intercepted already"):
                with module.intercepted(handler):
                    pass
        with pytest.raises(KeyError), module.intercepted(handler):
            raise KeyError
    with module.intercepted(lambda *given: "made"):
        assert kernel.run(1, grid=(2,), warmup=False, PDL=True) == "made"
    stranger = triton.runtime.jit.KernelInterface()
    with mock.patch.dict(sys.modules, {"kernels_of_others": SimpleNamespace(kernel=stranger)}):
        assert stranger not in module._kernels()
    assert not module.active() and "run" not in vars(kernel) and not module._one_at_a_time.locked
    given, own = [], SimpleNamespace(run=lambda *args, **kwargs: given.append((args, kwargs)) or "ran")
    with mock.patch.object(module, "_kernels", lambda: [own]):
        with module.intercepted(lambda *all_: all_):
            assert own.run(3, grid=(1,), warmup=True, PDL=False)[2:] == ((3,), (1,), {"PDL": False})
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(own.run, 3, grid=(1,), warmup=True, PDL=False).result() == "ran"
            own.run = None
    assert given == [((3,), dict(grid=(1,), warmup=True, PDL=False))]
    assert len(module._kernels()) == len({id(one) for one in module._kernels()}) > 20


def warming():
    """What is compiled, noted and loaded, with the kernels and Triton's asynchronous mode as stand-ins."""
    _compiled(warming_module)
    _compiling(warming_module)


class Variant(triton.FutureKernel):
    """A variant that is being compiled."""

    def __init__(self, kernel=None, fails=None):
        self.kernel, self.fails, self.loaded = kernel, fails, None

    @property
    def run(self):
        self.loaded = threading.current_thread().name
        if self.fails:
            raise self.fails
        return len


def _compiled(module):
    found, ready, new, other = module.Compiled(), Variant("compiled"), Variant(), object()
    assert [found.add(name, one) for name, one in (("a", ready), ("b", new), ("c", other))] == [False, True, False]
    assert found.add("b", new) is False
    assert found.variants == {id(ready): "a", id(new): "b", id(other): "c"} and found.new == {id(new): "b"}
    assert found._kept == [ready, new, other] and found.failed == {}
    with found.watching() as watched:
        assert watched == set()
        found.add("a", ready)
        late = Variant()
        assert found.add("d", late) is True
    found.add("e", object())
    assert watched == {id(ready), id(late)} and len(found.variants) == 5
    with pytest.raises(KeyError), found.watching() as watched:
        raise KeyError
    found.add("a", ready)
    assert not watched


def _compiling(module):
    handlers, asked, pools, devices = [], [], [], []

    @contextmanager
    def intercepted(handler):
        handlers.append(handler)
        yield

    @contextmanager
    def asynchronous(pool, **options):
        pools.append((pool._max_workers, pool._thread_name_prefix, options))
        yield

    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="_kernel"))
    right, wrong, nothing, ready = Variant(), Variant(fails=MemoryError("too few registers")), None, Variant("compiled")

    def launch(handler, variant):
        run = lambda *args, **options: asked.append((args, options)) or variant  # noqa: E731
        assert handler(kernel, run, (1, 2), (3,), dict(PDL=True)) is None

    with (
        mock.patch.object(module.interception, "intercepted", intercepted),
        mock.patch.object(module.triton, "AsyncCompileMode", asynchronous),
        mock.patch.object(torch.cuda, "device", lambda device: devices.append(device) or mock.MagicMock()),
    ):
        with module.compiling(CPU) as found:
            launch(handlers[-1], nothing)
            launch(handlers[-1], wrong)
        assert not pools and list(found.variants.values()) == ["_kernel"] and not found.failed and not wrong.loaded
        with mock.patch.object(module.launch, "INTERPRETED", False):
            with module.compiling(CUDA, 3) as found:
                for variant in (right, wrong, nothing, ready, right):
                    launch(handlers[-1], variant)
            with module.compiling(CPU):
                launch(handlers[-1], Variant())
            with mock.patch.object(module.os, "cpu_count", lambda: 5), module.compiling(CPU):
                pass
    assert set(found.variants) == {id(right), id(wrong), id(ready)} and set(found.new) == {id(right), id(wrong)}
    assert found.failed == {id(wrong): wrong.fails} and devices == [CUDA, CUDA]
    assert right.loaded.startswith("vit_fast.warmup") and ready.loaded is None
    assert asked[0] == ((1, 2), dict(grid=(3,), warmup=True, PDL=True))
    assert [workers for workers, *_ in pools][::2] == [3, 5]
    assert {name: options for _, name, options in pools} == {"vit_fast.warmup": {"ignore_errors": True}}
