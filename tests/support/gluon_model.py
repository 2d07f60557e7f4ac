"""A model of a Hopper multiprocessor for warp-specialised GEMMs: mbarriers, TMA and wgmma, each at a random pace.

``functions(module)`` are the device functions of a Gluon kernel file as Python, over stand-ins for gl, mbarrier, tma
and wgmma that act on the current ``Machine``. The partitions of a kernel are threads of which one runs at a time, up to
its next wait, arrival, copy or product. A copy or product takes effect at any later moment, at the latest where a
partition waits for it. The next thread, copy or product to proceed is drawn at random, each with a rate of its own. Not
modelled: layouts, registers, the threads of a warpgroup, memory ordering.

A ``Fault`` is a wait that never ends, an arrival too many, a slot that is written while it is read or before it was
read, or read while it is written, a result that is read before its products are done, and memory that is touched before
the kernel before has ended: with PDL each partition waits for that (``gdc_wait``), and only what it does not write
(``Matrix.constant``) may be read earlier.
"""

import functools
import random
import threading
import types

import numpy as np
import triton


class Fault(AssertionError):
    pass


class _Stopped(BaseException):
    """Ends the threads of a machine that failed."""


class Barrier:
    """An mbarrier: a phase ends when its arrivals and the bytes that it expects are there."""

    def __init__(self):
        self.count = None

    def init(self, count):
        self.count = self.missing = count
        self.bytes = self.phases = 0

    def arrive(self, count=1):
        if self.count is None:
            raise Fault("a barrier that is not initialised")
        if count > self.missing:
            raise Fault("an arrival too many")
        self.missing -= count
        self._end()

    def take(self, count):
        self.bytes -= count
        self._end()

    def _end(self):
        if self.missing == 0 and self.bytes == 0:
            self.missing = self.count
            self.phases += 1

    def has_ended(self, parity):
        """Whether the phase of this parity has ended, as a wait sees it."""
        return self.phases & 1 != parity


class Slot:
    def __init__(self):
        self.data, self.copies, self.products, self.unread = None, 0, 0, 0

    def permute(self, order):
        assert order == (1, 0)
        return self


class Ring:
    """A ring of ``shape[0]`` slots or barriers in shared memory."""

    def __init__(self, kind, shape):
        self.shape, self.parts = tuple(shape), [kind() for _ in range(shape[0])]

    def index(self, i):
        assert 0 <= i < len(self.parts)
        return self.parts[i]


class Matrix:
    """A tensor descriptor of a matrix in tiles of ``shape``, each read by so many; reads zeros beyond the edges."""

    dtype, layout = "elements", None

    def __init__(self, values, shape, constant=False, readers=1):
        self.values, self.block_type = values, types.SimpleNamespace(shape=shape, nbytes=2 * shape[0] * shape[1])
        self.constant, self.readers = constant, readers

    def tile(self, coordinates):
        (i, k), (height, width) = coordinates, self.block_type.shape
        part = self.values[i : i + height, k : k + width]
        return np.pad(part, ((0, height - part.shape[0]), (0, width - part.shape[1])))


class _Partition(threading.Thread):
    def __init__(self, machine, name, call):
        super().__init__(name=name, daemon=True)
        self.machine, self.call, self.pace = machine, call, machine.random.uniform(-2, 0)
        self.go, self.ready, self.done, self.products = threading.Semaphore(0), lambda: True, False, []
        self.waited = False

    def run(self):
        try:
            self.go.acquire()
            if not self.machine.failure:
                self.call()
        except _Stopped:
            pass
        except BaseException as error:
            self.machine.failure = error
        self.done = True
        self.machine.back.release()


class Machine:
    """Runs one program: ``program`` of ``programs``; ``early``: perhaps while the kernel before still runs."""

    current = None

    def __init__(self, seed, program, programs, early=False):
        self.random, self.program, self.programs = random.Random(seed), program, programs
        self.back, self.failure, self.partitions, self.copies = threading.Semaphore(0), None, [], []
        self.paces = [self.random.uniform(-2, 0) for _ in range(3)]
        self.early, self.alone = early, not early
        Machine.current = self

    def pause(self, ready=lambda: True):
        """Called by a partition: lets others run until it is ready and drawn again."""
        partition = threading.current_thread()
        partition.ready = ready
        self.back.release()
        partition.go.acquire()
        if self.failure:
            raise _Stopped

    def run(self, calls):
        self.partitions = [_Partition(self, f"partition {i}", call) for i, call in enumerate(calls)]
        for partition in self.partitions:
            partition.start()
        try:
            while not self.failure and not all(partition.done for partition in self.partitions):
                self._step()
        except Fault as fault:
            self.failure = fault
        for partition in self.partitions:
            while not partition.done:
                partition.go.release()
                self.back.acquire()
        if self.failure:
            raise self.failure
        if self.copies:
            raise Fault("copies that nobody waits for")

    def _step(self):
        choices = [(p.pace, functools.partial(self._resume, p)) for p in self.partitions if not p.done and p.ready()]
        choices += [(self.paces[0], functools.partial(self._copy, copy)) for copy in self.copies]
        choices += [(self.paces[1], functools.partial(self._multiply, p)) for p in self.partitions if p.products]
        choices += [(self.paces[2], self._be_alone)] * (not self.alone)
        if not choices:
            raise Fault("every partition waits")
        self.random.choices([go for _, go in choices], [10**pace for pace, _ in choices])[0]()

    def _resume(self, partition):
        partition.go.release()
        self.back.acquire()

    def _copy(self, copy):
        self.copies.remove(copy)
        source, coordinates, barrier, slot = copy
        slot.data, slot.unread = source.tile(coordinates), source.readers
        slot.copies -= 1
        barrier.take(source.block_type.nbytes)

    def _be_alone(self):
        """The kernel before ends."""
        self.alone = True

    def _multiply(self, partition):
        acc, a, b = partition.products.pop(0)
        acc += a.data @ b.data.T
        for slot in (a, b):
            slot.products -= 1
            slot.unread -= 1


def _machine():
    return Machine.current


def gdc_wait():
    partition = threading.current_thread()
    _machine().pause(lambda: _machine().alone)
    partition.waited = True


def _touch_memory():
    if _machine().early and not threading.current_thread().waited:
        raise Fault("memory is touched before the kernel before has ended")


class mbarrier:
    def MBarrierLayout():
        return None

    def init(barrier, count):
        barrier.init(count)

    def wait(barrier, parity):
        _machine().pause(lambda: barrier.has_ended(parity))

    def expect(barrier, count):
        _machine().pause()
        barrier.bytes += count
        barrier.arrive()

    def arrive(barrier, count):
        _machine().pause()
        barrier.arrive(count)


class tma:
    def async_copy_global_to_shared(source, coordinates, barrier, slot):
        _machine().pause()
        if not source.constant:
            _touch_memory()
        if slot.products or slot.copies or slot.unread:
            raise Fault("a slot is written that is still read")
        slot.copies += 1
        _machine().copies.append((source, coordinates, barrier, slot))


def warpgroup_mma(a, b, acc, is_async):
    assert is_async
    _machine().pause()
    for slot in (a, b):
        if slot.copies or slot.data is None:
            raise Fault("a slot is read before it is written")
        slot.products += 1
    threading.current_thread().products.append((acc, a, b))
    return acc


def warpgroup_mma_wait(most, deps):
    products = threading.current_thread().products
    _machine().pause(lambda: len(products) <= most)
    return deps[0]


class Int(int):
    def to(self, dtype):
        return self


class gl:
    int64, float32, constexpr, static_range = "int64", "float32", object, range

    def static_assert(condition, words=""):
        assert condition, words

    def cdiv(a, b):
        return -(-a // b)

    def program_id(axis):
        return _machine().program

    def num_programs(axis):
        return _machine().programs

    def zeros(shape, dtype, layout):
        return np.zeros(shape)

    def allocate_shared_memory(dtype, shape, layout):
        return Ring(Barrier if dtype == gl.int64 else Slot, shape)

    def NVMMADistributedLayout(*_):
        return None

    BlockedLayout = NVMMADistributedLayout

    def warp_specialize(partitions, warps, registers):
        assert len(warps) == len(registers) == len(partitions) - 1
        _machine().run([functools.partial(function, *arguments) for function, arguments in partitions])


def _halves(t, dim):
    """Splits a result in halves. Kernels read a result here first, so products still in flight are a fault."""
    if threading.current_thread().products:
        raise Fault("a result is read before its products are done")
    return np.split(t, 2, axis=dim)


def _finish(acc, mean, rstd, out, column_sum, bias, residual, top, left, rows, columns, activation):
    """An epilogue that pauses and then only adds the residual and stores the sums."""
    if residual is not None:
        if residual.copies or residual.data is None:
            raise Fault("a slot is read before it is written")
        residual.products += 1  # of those that read it now
    _machine().pause()
    _touch_memory()
    if residual is not None:
        residual.products -= 1
        residual.unread -= 1
        acc = acc + residual.data
    height, width = (max(0, min(size, most)) for size, most in zip(acc.shape, (rows - top, columns - left)))
    part = out[top : top + height, left : left + width]
    if not np.isnan(part).all():
        raise Fault("an element is stored twice")
    part[:] = acc[:height, :width]


def functions(module, changed=("", "", "")):
    """Name → Python function of a kernel file's device functions; ``changed``: (function, text in it, replacement)."""
    space = dict(
        vars(module), gl=gl, mbarrier=mbarrier, tma=tma, gdc_wait=gdc_wait, gdc_launch_dependents=lambda: None,
        tl=types.SimpleNamespace(constexpr=None, minimum=min, debug_barrier=lambda: None),
        fence_async_shared=lambda: None, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
    )  # fmt: skip
    name, old, new = changed
    for key, value in vars(module).items():
        if isinstance(value, triton.JITFunction) and value.fn.__module__.startswith("vit_fast.kernels."):
            source = value.src
            if key == name:
                assert source.count(old) == 1, f"{source.count(old)} times in {key}: {old}"
                source = source.replace(old, new)
            exec(compile(source, module.__file__, "exec"), space)
    place = space["tile_position"]
    space.update(PIECE_M=2, _halves=_halves, _finish=_finish)
    space["tile_position"] = lambda *a: tuple(Int(number) for number in place(*a))
    return space
