"""Launches recorded instead of run, and device code as plain Python on stand-ins for Triton's values.

Stand-ins are integers that know their range and whether Triton keeps them in 32 or 64 bits, pointers that add up
offsets, and data that has no value. An integer that leaves its width is an error, and what loads and stores address
tells where a program reads and writes. With them random sizes, up to what no GPU holds.
"""

import contextlib
import operator
import random
import types

import pytest
import torch
import triton
import triton.language as tl
from vit_fast.kernels import (
    attention,
    attention_bwd,
    column_sums,
    configs,
    gemm,
    gemm_train,
    layer_norm,
    layer_norm_bwd,
    linear_bwd,
    patch_embed,
    prepared_linear,
)  # fmt: skip
from vit_fast.kernels.attention import TensorDescriptor

GRID_LIMIT = 2**31 - 1
INT32 = 2**31
MEMORY = 141 * 2**30  # bytes of the largest GPU that the kernels are compiled for
KERNELS = {
    attention: ("_attention_fwd_resident_kernel", "_attention_fwd_streaming_kernel"),
    attention_bwd: ("_attention_bwd_kernel", "_attention_bwd_dq_kernel"),
    layer_norm: (
        "_layer_norm_fwd_kernel",
        "_layer_norm_wide_fwd_kernel",
        "_row_partials_kernel",
        "_row_statistics_kernel",
    ),
    gemm: ("_linear_fwd_kernel",),
    prepared_linear: ("_quantise_tokens_fwd_kernel",),
    patch_embed: ("_patch_embed_fwd_kernel",),
    gemm_train: ("_linear_train_kernel",),
    layer_norm_bwd: ("_layer_norm_bwd_kernel", "_layer_norm_wide_bwd_kernel", "_layer_norm_sums_kernel"),
    linear_bwd: ("_layer_scale_bwd_kernel",),
    column_sums: ("_column_sums_kernel", "_partial_sums_kernel"),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Overflow(AssertionError):
    """An integer of the device code does not fit where Triton keeps it."""


class Data:
    """What comes from memory: any arithmetic, any shape, no value."""

    def _self(self, *_, **__):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _self
    __and__ = __rand__ = __lt__ = __gt__ = __eq__ = __getitem__ = to = reshape = permute = _self
    __floordiv__ = _self
    __hash__ = object.__hash__
    T = dtype = element_ty = shape = property(_self)

    def split(self):
        return self, self


DATA = Data()


class Mask(Data):
    """A comparison: data, and the answer of a branch where the operands leave no doubt."""

    def __init__(self, answer):
        self.answer = answer

    def __bool__(self):
        assert self.answer is not None, "a branch on a tensor"
        return self.answer


class Int:
    """All integers of a tensor, or one scalar: bounds, width in bits, and ``first``, the element of the first lane."""

    def __init__(self, low, high, bits, first=None):
        if not -(2 ** (bits - 1)) <= low <= high < 2 ** (bits - 1):
            raise Overflow(f"{low} … {high} in int{bits}")
        self.low, self.high, self.bits = low, high, bits
        self.first = low if first is None else first

    @staticmethod
    def of(value):
        """An argument of a launch or a constant, as Triton types them."""
        if isinstance(value, Int):
            return value
        return Int(value, value, 32 if -INT32 <= value < INT32 else 64)

    def _with(self, other, operator, bounds=None):
        if isinstance(other, (Data, float)):
            return DATA
        if isinstance(other, Pointer):
            return NotImplemented
        other = Int.of(other)
        corners = [operator(x, y) for x in (self.low, self.high) for y in (other.low, other.high)]
        low, high = bounds(self, other) if bounds else (min(corners), max(corners))
        return Int(low, high, max(self.bits, other.bits), operator(self.first, other.first))

    def __add__(self, other):
        return self._with(other, operator.add)

    def __sub__(self, other):
        return self._with(other, operator.sub)

    def __mul__(self, other):
        return self._with(other, operator.mul)

    def __floordiv__(self, other):
        return self._with(other, operator.floordiv)

    def __mod__(self, other):
        def bounds(a, b):
            same = b.low == b.high and a.low // b.low == a.high // b.low
            return (a.low % b.low, a.high % b.low) if same else (0, b.high - 1)

        return self._with(other, operator.mod, bounds)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return Int.of(other) - self

    def __truediv__(self, other):
        return DATA

    __rtruediv__ = __truediv__

    def __lt__(self, other):
        other = Int.of(other)
        return Mask(True if self.high < other.low else False if self.low >= other.high else None)

    def __gt__(self, other):
        return Int.of(other) < self

    def __getitem__(self, _):
        return self

    def to(self, dtype):
        bits = {tl.int32: 32, tl.int64: 64}.get(dtype)
        return Int(self.low, self.high, bits, self.first) if bits else DATA

    shape = property(lambda self: DATA)


class Pointer:
    """An argument's address plus an offset in elements; ``loads`` and ``stores`` collect the offsets of all of them."""

    dtype = DATA

    def __init__(self, loads=None, stores=None, offset=None):
        self.loads, self.stores = [] if loads is None else loads, [] if stores is None else stores
        self.offset = offset or Int(0, 0, 64)

    def __add__(self, offset):
        offset = Int.of(offset)
        return Pointer(self.loads, self.stores, self.offset + Int(offset.low, offset.high, 64, offset.first))

    __radd__ = __add__


class Descriptor:
    """A tensor descriptor: takes int32 coordinates, like the hardware."""

    def __init__(self, descriptor):
        self.shape, self.stores = descriptor.shape, []

    def _coordinates(self, coordinates):
        coordinates = [Int.of(c) for c in coordinates]
        for coordinate, size in zip(coordinates, self.shape, strict=True):
            if coordinate.bits != 32:
                raise Overflow("a coordinate of a descriptor is int64")
            assert 0 <= coordinate.low == coordinate.high < size
        return [coordinate.low for coordinate in coordinates]

    def load(self, coordinates):
        self._coordinates(coordinates)
        return DATA

    def store(self, coordinates, _):
        self.stores.append(self._coordinates(coordinates))


def _store(pointer, _, mask=None):
    pointer.stores.append(pointer.offset)


def _count(pointer, _, sem):
    """An atomic addition; every program is taken for the last one to arrive."""
    pointer.stores.append(pointer.offset)
    return DATA


def _load(pointer, mask=None, other=None, cache_modifier=""):
    pointer.loads.append(pointer.offset)
    return DATA


def _minimum(a, b):
    if isinstance(a, Data):
        return DATA
    a, b = Int.of(a), Int.of(b)
    return Int(min(a.low, b.low), min(a.high, b.high), max(a.bits, b.bits))


def _maximum(a, b, propagate_nan=None):
    if isinstance(a, Data):
        return DATA
    a, b = Int.of(a), Int.of(b)
    return Int(max(a.low, b.low), max(a.high, b.high), max(a.bits, b.bits))


def _arange(begin, end):
    return Int(begin, end - 1, 32)


def _full(shape, value, dtype):
    return Int(value, value, {tl.int32: 32, tl.int64: 64}[dtype]) if dtype in (tl.int32, tl.int64) else DATA


def _range(*bounds, num_stages=None):
    """All steps of a short loop; of a long one the first, the second and the last, as wide as the widest bound."""
    begin, end, step = bounds if len(bounds) == 3 else (0, *bounds, 1)[-3:]
    begin, end, step = (Int.of(bound) for bound in (begin, end, step))
    steps = range(begin.low, end.high, step.low)
    bits = max(begin.bits, end.bits, step.bits)
    Int(steps.stop, steps.stop + step.low, bits)  # the counter that ends the loop
    chosen = steps if len(steps) <= 64 else (steps[0], steps[1], steps[-1])
    return [Int(value, value, bits) for value in chosen]


class Language(types.SimpleNamespace):
    """Stands in for ``triton.language``; what is not told here yields data."""

    def __getattr__(self, name):
        return lambda *_, **__: DATA


def _language(program, programs):
    return Language(
        program_id=lambda axis: Int(program, program, 32),
        num_programs=lambda axis: Int(programs, programs, 32),
        cdiv=lambda x, divisor: (Int.of(x) + (divisor - 1)) // divisor,  # as triton.language.standard
        arange=_arange, full=_full, minimum=_minimum, maximum=_maximum, load=_load, store=_store,
        atomic_add=_count, range=_range,
        static_range=range, int32=tl.int32, int64=tl.int64, float32=tl.float32, PropagateNan=tl.PropagateNan,
    )  # fmt: skip


def _plain(function, language, done):
    """The Python function under a JITFunction, with the stand-ins as its globals."""
    if function not in done:
        space = dict(function.fn.__globals__, tl=language, range=_range)
        done[function] = types.FunctionType(function.fn.__code__, space)
        for name, value in function.fn.__globals__.items():
            if isinstance(value, triton.JITFunction):
                space[name] = _plain(value, language, done)
            elif isinstance(value, types.ModuleType) and value.__name__.startswith("vit_fast.kernels."):
                helpers = {n: v for n, v in vars(value).items() if isinstance(v, triton.JITFunction)}
                space[name] = types.SimpleNamespace(**{n: _plain(v, language, done) for n, v in helpers.items()})
    return done[function]


class Launch:
    """One recorded launch."""

    def __init__(self, kernel, grid, arguments, options):
        self.kernel, self.grid = kernel, grid
        self.arguments = {**dict(zip(kernel.arg_names, arguments)), **options}

    def __getattr__(self, name):
        return self.arguments[name]

    def run(self, program):
        """The arguments after one program has run, as stand-ins: their ``stores`` tell what it wrote."""

        def stand_in(value):
            if isinstance(value, torch.Tensor):
                return Pointer()
            if isinstance(value, TensorDescriptor):
                return Descriptor(value)
            if hasattr(value, "_fields"):
                return type(value)(*map(stand_in, value))
            return Int.of(value) if type(value) is int else value

        seen = {
            name: value if name.isupper() else stand_in(value)
            for name in self.kernel.arg_names
            for value in (self.arguments[name],)
        }
        _plain(self.kernel, _language(program, self.grid[0]), {})(**seen)
        return types.SimpleNamespace(**seen)


class Recorder:
    """Stands in for a kernel and launches nothing."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(Launch(self.kernel, grid, arguments, options))


@contextlib.contextmanager
def recording(arch=80, multiprocessors=132):
    """The launches made inside, in order, as if on a GPU of that architecture."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, Recorder(getattr(module, name), launches))
        patch.setattr(configs, "arch_of", lambda device: arch)
        patch.setattr(configs, "multiprocessors_of", lambda device: multiprocessors)
        yield launches


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def ceiling(size, block):
    """How many blocks cover a size, counted in a way of its own: one more for each block that begins inside it."""
    return 0 if size == 0 else 1 + (size - 1 - (size - 1) % block) // block


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def random_batch():
    """From 0 up to 2³¹, every magnitude alike, now and then an edge."""
    edges = (0, 1, 2, 65535, 65536, 2**31 - 1, 2**31)
    return random.choice(edges) if random.random() < 0.2 else int(2 ** random.uniform(0, 31))


def random_tokens():
    usual = (1, 2, 16, 17, 50, 65, 128, 196, 197, 257, 273, 577, 730, 1025, 4097)
    return random.choice((*usual, random.randint(1, 16384)))


def random_width():
    return random.choice((16, 192, 384, 768, 1001, 1024, 1152, 1280, 1408, 1664, 4304, random.randint(1, 8192)))
