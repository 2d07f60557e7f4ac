"""Memory sanitizer for Triton's interpreter: checks every access of every program against the views of its arguments.

``install()`` hooks it into this process for good; a fault is raised as ``MemoryFault`` from the launch, with the
kernel, the argument, its shape and strides, the element and the program. What is found:

out of view        a load, store or atomic, also through a tensor descriptor, of an element that does not belong to the
                   view (shape and strides, not only the storage) of the argument that its pointer comes from
uninitialised      a load of an element that nothing has written since ``torch.empty`` (see ``poison``)
conflict           two programs write one element, or one writes what another reads. Allowed: atomics on an element, and
                   after an acquire the reads of what was written before a release that it synchronises with
written twice      one program stores an element twice, in one instruction or in two
unwritten          an argument that was uninitialised before the launch is not fully written after it

How: each tensor argument gets a number, which is put into bits 48 … 63 of its base address; pointer arithmetic keeps
it, and loads and stores look up the view by it and strip it. A storage knows the writer and the readers of each
of its cells, a view the cells that belong to it; where a storage has many cells and few are in use (views that span
2³² elements) only those in use are kept.

``program_order(seed)`` runs the programs of every launch in a shuffled order (None: ascending, -1: descending).
``only_programs(pick)`` runs the programs pick(grid size) of every launch, and nothing is checked: for outputs too large
to be computed or tracked.
"""

import contextlib
import inspect

import numpy as np
import torch

COUNTS = {"launches": 0, "accesses": 0}

_TAG_BITS = 48
_ADDRESS = np.uint64((1 << _TAG_BITS) - 1)
_DENSE = 1 << 24  # cells, above which only those in use are kept
_MANY = -1  # readers or atomics of more than one program
_ATOMIC = -2
# NaNs that no arithmetic yields (a computed NaN has the payload 0): fresh memory holds them until it is written.
_POISON = {
    torch.float16: (torch.int16, np.int16, 0x7DA5),
    torch.bfloat16: (torch.int16, np.int16, 0x7FA5),
    torch.float32: (torch.int32, np.int32, 0x7FA5A5A5),
    torch.float64: (torch.int64, np.int64, 0x7FF5A5A5A5A5A5A5),
    torch.float8_e4m3fn: (torch.uint8, np.uint8, 0xFF),  # the NaN with the sign set, which no cast yields
}


class MemoryFault(AssertionError):
    """A kernel touched memory that it must not touch, or left memory that it had to write."""


def poison(tensor):
    """Fills fresh memory with poison, by which the sanitizer, or any comparison, detects what was never written."""
    with torch.no_grad():
        if tensor.dtype in _POISON:
            integer, _, pattern = _POISON[tensor.dtype]
            tensor.view(integer).fill_(pattern)
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif not tensor.is_complex():
            info = torch.iinfo(tensor.dtype)
            tensor.fill_(info.max - info.max // 3)
    return tensor


@contextlib.contextmanager
def poisoned_memory():
    """Inside, ``torch.empty`` and its relatives give poisoned memory."""
    shipped = [(torch, name, getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")]
    shipped.append((torch.Tensor, "new_empty", torch.Tensor.new_empty))

    def poisoned(function):
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    try:
        for owner, name, function in shipped:
            setattr(owner, name, poisoned(function))
        yield
    finally:
        for owner, name, function in shipped:
            setattr(owner, name, function)


def _cells(tensor, start, cell):
    """The cells of every element, [*shape, cells per element], counted from the address ``start``."""
    size = tensor.element_size()
    cells = np.asarray((tensor.data_ptr() - start) // cell) + np.arange(size // cell)
    for axis, (count, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = np.arange(count) * (stride * (size // cell))
        cells = cells + steps.reshape(-1, *[1] * (tensor.dim() - axis))
    return cells


class _Storage:
    """Writers and readers of the cells of one storage; a cell has the size of its narrowest view's elements."""

    def __init__(self, tensors):
        tensors = [t for t in tensors if t.numel()]
        self.cell = min((t.element_size() for t in tensors), default=1)
        self.start = min((t.data_ptr() for t in tensors), default=0)
        cells = [_cells(t, self.start, self.cell) for t in tensors]
        count = 1 + max((int(c.max()) for c in cells), default=-1)
        self.known = None  # sorted cells in use, if there are too many cells to keep them all
        if count > _DENSE:
            self.known = np.unique(np.concatenate([c.ravel() for c in cells]))
            count = self.known.size
        self.writer, self.reader = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.missing = np.zeros(count, bool)  # holds poison
        self.late = np.zeros(count, bool)  # written since the last release of its writer
        self.met = {}  # cell → programs whose releases an acquire of it synchronises with
        self.nowhere = count

    def find(self, cells):
        """Indices of these cells in the arrays; ``nowhere`` for cells of no view."""
        if self.known is None:
            return np.where((cells >= 0) & (cells < self.nowhere), cells, self.nowhere)
        places = np.searchsorted(self.known, cells)
        return np.where(self.known[np.minimum(places, self.nowhere - 1)] == cells, places, self.nowhere)


class _View:
    """One tensor argument: which cells belong to it, and whether they come initialised."""

    def __init__(self, name, tensor, storage):
        self.name, self.storage = name, storage
        self.text = f"{list(tensor.shape)} strides {list(tensor.stride())} {str(tensor.dtype).removeprefix('torch.')}"
        self.base, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.inside = np.zeros(storage.nowhere + 1, bool)
        self.fresh = False
        if tensor.numel():
            self.places = storage.find(_cells(tensor, storage.start, storage.cell))
            self.inside[self.places] = True
            if tensor.dtype in _POISON:
                integer, kind, pattern = _POISON[tensor.dtype]
                bits = tensor.detach().view(integer).numpy() == kind(pattern)
                self.fresh = bool(bits.any())
                storage.missing[self.places[bits]] = True

    def unwritten(self):
        """Mask, in the view's shape, of elements that are still poison."""
        return self.storage.missing[self.places[..., 0]]


class _Launch:
    """The views of one launch, and the program that runs."""

    def __init__(self, kernel, arguments):
        self.kernel, self.program, self.grid, self.order = kernel, 1, None, None
        self.seen = {}  # program → the programs whose released writes it may read
        named = list(_tensors(arguments))
        groups = {}
        for _, tensor in named:
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        storages = {pointer: _Storage(tensors) for pointer, tensors in groups.items()}
        self.storages = storages.values()
        self.views, self.tags = [None], {}
        for name, tensor in named:
            key = _key(tensor)
            if key in self.tags:
                self.views[self.tags[key]].name += f" or {name}"
                continue
            self.tags[key] = len(self.views)
            self.views.append(_View(name, tensor, storages[tensor.untyped_storage().data_ptr()]))

    def fail(self, what, view=None, offset=None):
        width, height, _ = self.grid
        pid = self.program - 1
        place = (pid % width, pid // width % height, pid // (width * height))
        text = f"{what}: kernel {self.kernel}, grid {self.grid}, program {place}"
        if view is not None:
            text += f", argument {view.name} {view.text}"
        if offset is not None:
            text += f", {offset // view.itemsize} elements from its start"
        raise MemoryFault(text)

    def fault(self, what, view, addresses, mask, bad):
        """Fails for the first bad cell of an access."""
        first = int(bad.argmax()) // (view.itemsize // view.storage.cell)
        self.fail(what, view, int(addresses[mask][first] & _ADDRESS) - view.base)

    def enter(self, addresses, mask, what):
        """(view, addresses without tag, indices of the cells under the mask)."""
        COUNTS["accesses"] += 1
        plain = addresses & _ADDRESS
        wanted = addresses[mask]
        if not wanted.size:
            return None, plain, None
        tags = wanted >> np.uint64(_TAG_BITS)
        tag = int(tags[0])
        if tag == 0 or tag >= len(self.views) or not (tags == tags[0]).all():
            self.fail(f"{what} at an address that comes from no argument")
        view = self.views[tag]
        storage = view.storage
        bytes_in = (wanted & _ADDRESS).astype(np.int64) - view.base
        places = storage.find((bytes_in + (view.base - storage.start)) // storage.cell)
        wrong = (bytes_in % view.itemsize != 0) | ~view.inside[places]
        if wrong.any():
            self.fail(f"out-of-view {what} of {int(wrong.sum())} elements", view, bytes_in[wrong][0])
        if view.itemsize > storage.cell:
            places = (places[:, None] + np.arange(view.itemsize // storage.cell)).ravel()
        return view, plain, places

    def load(self, addresses, mask):
        view, plain, places = self.enter(addresses, mask, "load")
        if places is not None:
            storage, me = view.storage, self.program
            if (bad := storage.missing[places]).any():
                self.fault("uninitialised load", view, addresses, mask, bad)
            writer = storage.writer[places]
            if (bad := (writer != 0) & (writer != me)).any():
                bad &= ~np.isin(writer, list(self.seen.get(me, ()))) | storage.late[places]
            if bad.any():
                self.fault("conflict, load of what another program writes", view, addresses, mask, bad)
            reader = storage.reader[places]
            storage.reader[places] = np.where((reader == 0) | (reader == me), me, _MANY)
        return plain

    def store(self, addresses, mask):
        view, plain, places = self.enter(addresses, mask, "store")
        if places is not None:
            storage, me = view.storage, self.program
            writer, reader = storage.writer[places], storage.reader[places]
            if (bad := (writer != 0) & (writer != me)).any():
                self.fault("conflict, store to what another program writes", view, addresses, mask, bad)
            if (bad := (reader != 0) & (reader != me)).any():
                self.fault("conflict, store to what another program reads", view, addresses, mask, bad)
            if (bad := writer == me).any():
                self.fault("written twice by one program", view, addresses, mask, bad)
            if np.unique(places).size != places.size:
                self.fail("written twice by one store", view)
            storage.writer[places] = me
            storage.late[places] = True
            storage.missing[places] = False
        return plain

    def atomic(self, addresses, mask, semantics=""):
        view, plain, places = self.enter(addresses, mask, "atomic")
        if places is not None:
            storage, me = view.storage, self.program
            if (bad := storage.missing[places]).any():
                self.fault("uninitialised atomic", view, addresses, mask, bad)
            writer, reader = storage.writer[places], storage.reader[places]
            if (bad := ((writer != 0) & (writer != _ATOMIC)) | ((reader != 0) & (reader != me))).any():
                self.fault("conflict, atomic on what a plain access touches", view, addresses, mask, bad)
            storage.writer[places] = _ATOMIC
            if "acq" in semantics:
                for place in places.tolist():
                    self.seen.setdefault(me, set()).update(storage.met.get(place, ()))
            if "rel" in semantics:
                for other in self.storages:
                    other.late[other.writer == me] = False
                for place in places.tolist():
                    storage.met.setdefault(place, set()).update({me}, self.seen.get(me, ()))
        return plain

    def finish(self):
        for view in self.views[1:]:
            if view.fresh and (left := view.unwritten()).any():
                first = [int(i) for i in np.argwhere(left)[0]]
                self.fail(f"unwritten, {int(left.sum())} elements, the first at {first}", view)


def _tensors(arguments):
    """(name, tensor) of all arguments that are tensors, descriptors or tuples of them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    for name, value in arguments.items():
        if isinstance(value, TensorDescriptor):
            yield name, value.base
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif isinstance(value, torch.Tensor):
            yield name, value


def _key(tensor):
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


_launch = None
_order = None
_pick = None


@contextlib.contextmanager
def program_order(seed):
    global _order
    outer, _order = _order, seed
    try:
        yield
    finally:
        _order = outer


@contextlib.contextmanager
def only_programs(pick):
    global _pick
    outer, _pick = _pick, pick
    try:
        yield
    finally:
        _pick = outer


def _permutation(count):
    if _order is None:
        return range(count)
    return range(count - 1, -1, -1) if _order == -1 else np.random.default_rng(_order).permutation(count).tolist()


def install():
    """Hooks the sanitizer into Triton's interpreter, for this process."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "sanitized"):
        return
    builder.sanitized = True
    shipped_load, shipped_store = builder.create_masked_load, builder.create_masked_store
    shipped_rmw, shipped_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    shipped_index, shipped_convert = builder.set_grid_idx, interpreter._implicit_cvt
    shipped_call = interpreter.GridExecutor.__call__

    def everywhere(pointers):
        return np.ones(pointers.data.shape, bool)

    def masked_load(self, ptrs, mask, *rest, **options):
        if _launch is None:
            return shipped_load(self, ptrs, mask, *rest, **options)
        plain = _launch.load(ptrs.data, np.asarray(mask.data, bool))
        return shipped_load(self, handle(plain, ptrs.dtype), mask, *rest, **options)

    def masked_store(self, ptrs, value, mask, *rest, **options):
        if _launch is None:
            return shipped_store(self, ptrs, value, mask, *rest, **options)
        plain = _launch.store(ptrs.data, np.asarray(mask.data, bool))
        return shipped_store(self, handle(plain, ptrs.dtype), value, mask, *rest, **options)

    def words(semantics):
        return {"ACQUIRE_RELEASE": "acq_rel", "ACQUIRE": "acq", "RELEASE": "rel"}.get(semantics.name, "")

    def atomic_rmw(self, operation, ptr, value, mask, semantics, *rest):
        if _launch is None:
            return shipped_rmw(self, operation, ptr, value, mask, semantics, *rest)
        plain = _launch.atomic(ptr.data, np.asarray(mask.data, bool), words(semantics))
        return shipped_rmw(self, operation, handle(plain, ptr.dtype), value, mask, semantics, *rest)

    def atomic_cas(self, ptr, compared, value, semantics, *rest):
        if _launch is None:
            return shipped_cas(self, ptr, compared, value, semantics, *rest)
        plain = _launch.atomic(ptr.data, everywhere(ptr), words(semantics))
        return shipped_cas(self, handle(plain, ptr.dtype), compared, value, semantics, *rest)

    def set_grid_idx(self, x, y, z):
        if _launch is None:
            self.grid_idx = (self.picked[x], y, z)
            return
        width, height, _ = self.grid_dim
        if _launch.grid != self.grid_dim:
            _launch.grid, _launch.order = self.grid_dim, _permutation(width)
        x = _launch.order[x]
        _launch.program = 1 + x + width * (y + height * z)
        shipped_index(self, x, y, z)

    def num_programs(self, axis):
        picked = _launch is None and axis == 0
        return handle(np.array([self.programs if picked else self.grid_dim[axis]], np.int32), interpreter.tl.int32)

    def implicit_cvt(arg):
        result = shipped_convert(arg)
        if isinstance(arg, torch.Tensor) and _launch is not None:
            address = arg.data_ptr() + (_launch.tags[_key(arg)] << _TAG_BITS)
            result.handle.data = np.array([address], np.uint64)
        return result

    def call(self, *args, **options):
        global _launch
        known = inspect.signature(self.fn).parameters
        given = {name: value for name, value in options.items() if name in known}
        if _pick is not None:
            interpreter.interpreter_builder.picked = sorted(_pick(self.grid[0]))
            interpreter.interpreter_builder.programs = self.grid[0]
            self.grid = (len(interpreter.interpreter_builder.picked),)
            return shipped_call(self, *args, **options)
        outer = _launch
        _launch = _Launch(self.fn.__name__, inspect.getcallargs(self.fn, *args, **given))
        COUNTS["launches"] += 1
        try:
            shipped_call(self, *args, **options)
            _launch.finish()
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, MemoryFault):
                raise error.__cause__ from None
            raise
        finally:
            _launch = outer

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas
    builder.set_grid_idx, interpreter._implicit_cvt = set_grid_idx, implicit_cvt
    builder.create_get_num_programs = num_programs
    interpreter.GridExecutor.__call__ = call
