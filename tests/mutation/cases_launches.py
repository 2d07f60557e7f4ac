"""Kill suites of what stands around launches: tables of configs, intercepted launches, warming up, launch plans.

Kernels and compiled variants are stand-ins here, but where the interpreter runs a real one.
"""

import json
import os
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor
from vit_fast.kernels import configs as configs_module
from vit_fast.kernels import interception as interception_module
from vit_fast.kernels import launch as launch_module
from vit_fast.kernels import launch_plan as launch_plan_module
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
    checked = partial(module._checked, kinds=module.FIELDS)
    assert list(module.STACK_FIELDS) == list(configs_module.StackConfig.__dataclass_fields__)
    for form in configs_module.STATISTICS:
        assert module._checked({"statistics": form}, module.STACK_FIELDS, True) == {"statistics": form}
    with pytest.raises(ValueError, match="got statistics 'odd', wanted any of partials, finalised, plain"):
        module._checked({"statistics": "odd"}, module.STACK_FIELDS, True)
    for right in (_all_fields(), _all_fields(block_m=1, tma=False, maxnreg=1), _all_fields(maxnreg=None)):
        assert checked(right, every=True) is right and checked(right, every=False) is right
    assert checked({"block_k": 1}, every=False) == {"block_k": 1} and checked({}, every=False) == {}
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
            checked(wrong, every=every)
        assert text in str(error.value)


def _files_of_tuned(module, file):
    entry = {"out_features": 3072, "picked": _all_fields(), "use": {"num_warps": 4}}
    right = {"device": "NVIDIA H200", "triton": "3.7.1", "linear": [entry, entry | {"out_features": 768}]}
    table = {(width, *_all_fields().values()): {"num_warps": 4} for width in (3072, 768)}
    stack = [{"width": 1024, "picked": {"statistics": "partials"}, "use": {"statistics": "finalised"}}]
    of_stacks = {(1024, "partials"): {"statistics": "finalised"}}
    for content, wanted in (
        (right, table), (right | {"linear": []}, {}), (right | {"triton": "3.6.0"}, {}),
        (right | {"stack": stack}, table | of_stacks),
    ):  # fmt: skip
        file.write_text(json.dumps(content))
        assert module.read(file, "NVIDIA H200", "3.7.1") == wanted
    for content, text in (
        (right | {"device": "NVIDIA H100"}, "got device 'NVIDIA H100', wanted 'NVIDIA H200'"),
        ({}, "no entry 'device'"), ([], "list indices"),
        (right | {"linear": [entry | {"picked": {}}]}, "wanted all of"),
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
        text = file.read_text()
        file.write_text("{")
        with mock.patch.dict(os.environ, VIT_FAST_STRICT="1"), pytest.raises(ValueError, match="cannot be used"):
            arch_of(CUDA)
        with mock.patch.dict(os.environ, VIT_FAST_STRICT="0"), pytest.warns(RuntimeWarning, match="used: .* un"):
            assert arch_of(CUDA) == 90
        assert module._tables == {90: {}} and picking(1, 3072, True, 90) is PICKED
        file.write_text(text)
        assert arch_of(CUDA) == 90 and picking(1, 3072, True, 90) is not PICKED
        file.unlink()
        with warnings.catch_warnings(action="error"):
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


class Pair(NamedTuple):
    """A named tuple among the arguments of a kernel."""

    tensor: Any
    factor: float


class Adding:
    """A kernel: adds what it is given to ``out``; a semaphore must be zero, and is no more afterwards. Its ``run``
    computes, as in the interpreter, and returns ``made``."""

    arg_names = ("out", "x", "pair", "semaphore", "N")

    def __init__(self, made=None):
        self.made, self.launched = made, []

    def run(self, out, x, pair, semaphore, N, *, grid, warmup):
        assert not warmup
        self.launched.append((grid, N))
        if semaphore is not None:
            assert not semaphore.any() and semaphore.dtype == torch.int32
            semaphore.fill_(1)
        found = x.base if isinstance(x, TensorDescriptor) else x
        out.copy_(found + pair[0] * pair[1])
        return self.made


def launch_plan():
    """Places, what is recorded and refused, what a repeated call launches, and what makes a new plan."""
    module = launch_plan_module
    assert (module.MAX_PLANS, module.MAX_ADDRESSES, module._ALIGNMENT) == (512, 4, 512)
    _places(module)
    kernel = Adding()
    with mock.patch.object(module.interception, "_kernels", lambda: [kernel]):
        _repeated(module, kernel)
        _not_repeated(module, kernel)
        _compiled_plans(module, kernel)
    _planned(module)


def _places(module):
    """Sizes and launches → offsets."""
    for storages, offsets, size in (
        ([], [], 0), ([(100, 0, 1)], [0], 100), ([(100, 0, 1), (100, 1, 2), (100, 2, 3)], [0, 512, 0], 612),
        ([(512, 0, 4), (513, 0, 1), (700, 1, 4), (512, 2, 3), (1, 3, 4)], [0, 512, 1536, 512, 1024], 2236),
        ([(1024, 0, 1), (100, 0, 9), (1025, 2, 9), (512, 3, 3), (512, 3, 3)], [0, 1024, 1536, 0, 512], 2561),
        ([(1024, 0, 0), (512, 0, 5), (512, 1, 2), (1024, 2, 3), (512, 3, 3)], [0, 1024, 0, 1536, 0], 2560),
    ):  # fmt: skip
        made = [module._Storage(0, count, module._ARENA) for count, *_ in storages]
        for storage, (_, first, last) in zip(made, storages):
            storage.launches = [first, (first + last + 1) // 2, last]
        assert module._place(made) == size and [storage.offset for storage in made] == offsets
    memory, storage = torch.zeros(96, dtype=torch.uint8), module._Storage(0, 64, module._ARENA)
    storage.offset = 16
    tensor = module._tensor(module._Argument(storage, 8, torch.int32, (2, 3), (1, 2), None), (None, None, memory[4:]))
    assert (tensor.shape, tensor.stride(), tensor.data_ptr() - memory.data_ptr()) == ((2, 3), (1, 2), 28)


def _steps(kernel, x, weights, factor=1.0, descriptor=False):
    """Three launches: intermediates, a semaphore at two, views, and memory that nothing reads."""
    first, spare = torch.empty(x.shape[0] + 1, *x.shape[1:])[1:], torch.empty(7)
    rooms = torch.zeros(2, 200, dtype=torch.int32).unbind()
    kernel.run(first, x, Pair(weights[0], 2.0), None, 5, grid=(2,), warmup=False)
    second = torch.empty_strided(x.shape, first.stride())
    source = TensorDescriptor(first, list(x.shape), list(first.stride()), [1, 4]) if descriptor else first.view(-1, 4)
    source = source if descriptor else source.view(x.shape)
    kernel.run(second, source, (weights[1], factor), rooms[1], grid=(1, 2), warmup=False, N=6)
    more, out = torch.zeros(1, dtype=torch.int32), torch.empty(x.shape)
    kernel.run(out, second, Pair(first, 1.0), more, grid=(1, 2, 3), warmup=False, N=None)
    assert spare is not None
    return out


def _inputs(shape=(3, 4)):
    return torch.randn(shape), torch.randn(shape[0] + 2, *shape[1:])[2:], torch.randn(shape[::-1]).t()


def _recorded(module, kernel, x, *arguments, function=_steps):
    """Fresh memory is not poisoned meanwhile, which would be more than an allocation."""
    with mock.patch("support.sanitizer.poison", lambda tensor: tensor):
        return module.record(lambda x, *more: function(kernel, x, *more), x, *arguments)


def _repeated(module, kernel):
    weights = [torch.randn(3, 4), torch.randn(5, 4)[1:4]]
    for x, other in zip(_inputs(), _inputs()):
        for descriptor in (False, True):
            kernel.launched = []
            out, plan = _recorded(module, kernel, x, weights, 3.0, descriptor)
            wanted = 2 * x + 4 * weights[0] + 3 * weights[1]
            torch.testing.assert_close(out, wanted)
            assert kernel.launched == [((2,), 5), ((1, 2), 6), ((1, 2, 3), None)]
            kernel.launched = []
            torch.testing.assert_close(plan(other), 2 * other + 4 * weights[0] + 3 * weights[1])
            assert kernel.launched == [((2, 1, 1), 5), ((1, 2, 1), 6), ((1, 2, 3), None)]
            assert (plan.arena_bytes, plan._zero_bytes) == (512 + 48, 2048 + 512)


def _not_repeated(module, kernel):
    """Functions that do more than allocate, view and launch, or whose result is not memory of their own."""
    weights = [torch.randn(3, 4), torch.randn(3, 4)]

    def launched(shape, make=torch.empty):
        out = make(shape)
        kernel.run(out, weights[0][0, 0], (weights[1][0, 0], 1.0), None, 1, grid=(1,), warmup=False)
        return out

    def annotated(kernel, x):
        with torch.profiler.record_function("a name"):
            return launched(3)

    assert _recorded(module, kernel, torch.randn(3, 4), function=annotated)[1] is not None
    for function in (
        lambda kernel, x: _steps(kernel, x + 1, weights), lambda kernel, x: x, lambda kernel, x: weights[0],
        lambda kernel, x: torch.empty(3), lambda kernel, x: launched(3, torch.zeros), lambda kernel, x: launched(4)[:3],
        lambda kernel, x: launched((4, 3)).t(), lambda kernel, x: (torch.arange(3), launched(3))[1],
        lambda kernel, x: (x[0, 0].item(), launched(3))[1], lambda kernel, x: launched(4)[1:],
        lambda kernel, x: (launched(3), torch.ones(3))[0],
    ):  # fmt: skip
        assert _recorded(module, kernel, torch.randn(3, 4), function=function)[1] is None
    assert not module.interception.active()


class Compiled:
    """A compiled kernel: notes grid, stream and arguments."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, stream: self.launches.append((grid, stream, args))


def _compiled_plans(module, kernel):
    """Addresses in the place of tensors, of the call's own memory, bound once for each set of addresses."""
    weights, x = [torch.randn(3, 4), torch.randn(3, 4)], torch.randn(3, 4)
    made, guarded = Compiled(), []
    active = SimpleNamespace(get_current_stream={5: "stream"}.get, get_current_device=lambda: 5)
    with (
        mock.patch.object(launch_module, "INTERPRETED", False),
        mock.patch.object(launch_module, "device_guard", lambda x: guarded.append(x) or mock.MagicMock()),
        mock.patch.object(module.driver, "_active", active, create=True),
        mock.patch.object(type(module.driver), "active", active, create=True),
    ):
        assert _recorded(module, kernel, x, weights)[1] is None  # a hook took the launch
        for kernel.made in (made, SimpleNamespace(result=lambda: made)):
            _, plan = _recorded(module, kernel, x, weights, 3.0, True)
            made.launches.clear()
            out = plan(x)
            assert guarded[-1] is x and [(grid, stream) for grid, stream, _ in made.launches] == [
                ((2, 1, 1), "stream"), ((1, 2, 1), "stream"), ((1, 2, 3), "stream"),
            ]  # fmt: skip
            (_, _, first), (_, _, second), (_, _, third) = made.launches
            assert first[1:] == (x.data_ptr(), Pair(weights[0].data_ptr(), 2.0), None, 5) and third[0] == out.data_ptr()
            assert type(first[2]) is Pair and second[2] == (weights[1].data_ptr(), 3.0) and second[4] == 6
            described = second[1]
            assert isinstance(described, TensorDescriptor) and described.base.data_ptr() == first[0]
            assert (described.base.dtype, described.shape, described.strides) == (torch.float32, [3, 4], [4, 1])
            assert described.block_shape == [1, 4] and third[1] == second[0] == first[0] - 16 + 512
            assert third[2] == Pair(first[0], 1.0) and third[3] - second[3] == 2048 - 800 and third[4] is None
            assert plan._launches[0][2][2].tensor.tensor is None
    _bound(module, plan, x)


def _bound(module, plan, x):
    """Arguments serve again for the same addresses; the oldest of more than MAX_ADDRESSES sets go."""
    for number in range(6):
        assert (
            plan._bind((number << 20, 1 << 30, 2 << 30, 3 << 30))
            is plan._bound[number << 20, 1 << 30, 2 << 30, 3 << 30]
        )
    assert [addresses[0] >> 20 for addresses in plan._bound] == [2, 3, 4, 5]
    with (
        mock.patch.object(launch_module, "INTERPRETED", False), mock.patch.object(module, "driver", mock.MagicMock()),
        mock.patch.multiple(torch, empty=lambda *a, **k: x, zeros=lambda *a, **k: x),
    ):  # fmt: skip
        assert plan(x) is x
        bound = plan._bound[(x.data_ptr(),) * 4]
        plan(x)
    assert plan._bound[(x.data_ptr(),) * 4] is bound and len(plan._bound) == 4


def _planned(module):
    """A call is recorded once for all that a plan depends on."""
    called, repeated, recorded = [], [], []

    def function(x, weights, *arguments):
        assert isinstance(x, torch.Tensor) and isinstance(weights, list)
        called.append(arguments)
        return "computed"

    def record(function, x, weights, *arguments):
        assert isinstance(x, torch.Tensor) and isinstance(weights, list)
        recorded.append(arguments)
        return function(x, weights, *arguments), (None if arguments == ("no plan",) else lambda x: repeated.append(x))

    memory, weights = torch.randn(64).half(), [torch.randn(3, 4), torch.randn(3, 4)]
    memory = memory[-memory.data_ptr() % 16 // 2 :]
    x = memory[:12].view(3, 4)
    other = [weights[0], weights[0].clone()]
    mock_record = mock.patch.object(module, "record", record)
    with mock.patch.object(module, "_plans", module.OrderedDict()), mock_record:
        module.planned(function, x, weights)
        assert not recorded, "interpreted"
        with mock.patch.object(launch_module, "INTERPRETED", False):
            for number, (given, given_weights, arguments) in enumerate((
                (x, weights, ()), (x, weights, (1, (2, "three"))), (x, weights, ("no plan",)), (x[:2], weights, ()),
                (memory[:24].view(3, 8)[:, :4], weights, ()), (x.view(torch.bfloat16), weights, ()),
                (memory[1:13].view(3, 4), weights, ()), (x, other, ()), (x, weights[:1], ()),
                (x, [weights[0].view(4, 3), weights[1]], ()),
                (x, [weights[0].as_strided((3, 4), (1, 3)), other[1]], ()),
            )):  # fmt: skip
                called.clear()
                assert module.planned(function, given, given_weights, *arguments) == "computed"
                assert len(recorded) == number + 1 and recorded[-1] == arguments == called[0]
                repeated.clear()
                again = module.planned(function, given, given_weights, *arguments)
                assert again == "computed" if arguments == ("no plan",) else repeated[0] is given
                assert len(called) == 1 + (arguments == ("no plan",))
            module.planned(function, memory[8:20].view(3, 4), weights)  # as far from 16 bytes as x
            assert len(recorded) == number + 1
            module.planned(lambda *given: None, x, weights)
            with mock.patch.object(launch_module, "dot_precision", lambda: "tf32"):
                module.planned(function, x, weights)
            assert len(recorded) == number + 3 == len(module._plans)
            with mock.patch.object(module.interception, "active", lambda: True):
                module.planned(function, x, weights, 9)
            for given, arguments in (
                (x[:0], ()), (x.to("meta"), ()), (x, (1, x)), (x, ((None, x), 1)), (x, (1, ("a", (x,)))),
            ):  # fmt: skip
                assert module.planned(function, given, weights, *arguments) == "computed"
            assert len(recorded) == number + 3
            with mock.patch.object(module, "MAX_PLANS", 3):
                module.planned(function, x, weights, 7)
            assert len(module._plans) == 3 and list(module._plans)[-1][6:7] == (7,)
