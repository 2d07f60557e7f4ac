"""Launch plans: the launches of a function on fixed weights, noted once and repeated without the Python behind them.

A stack of 12 prepared blocks is 63 launches, and what leads to them (allocation, choice of a config, descriptors,
Triton's look at every argument) takes longer on the host than a small batch takes on the GPU. The first call with given
weights, shape and strides runs the function and notes its launches (``interception``): compiled kernel, grid and
arguments. A later call repeats them.

Every tensor among the arguments is x, the result, a weight, zeros (split-K semaphores) or an intermediate. Those get
places in one arena, where two that are needed at the same launch do not overlap. A call allocates result, arena and
zeros with PyTorch, as the function would: no memory of the GPU is held between calls, and calls on several streams and
in several threads do not meet. PyTorch's allocator mostly returns the addresses of the call before; then its arguments,
descriptors included, serve again, and other addresses are put into them anew.

A plan holds addresses of weights and no weights; its key has the address, strides and shape of each. A function that
does more than allocate, view and launch (copies of oddly strided tensors) is not planned, nor are options that hold
tensors.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import interception, launch

MAX_PLANS = 512  # the oldest goes; a plan takes some 10 kB of host memory a block
MAX_ADDRESSES = 4  # sets of addresses for which a plan keeps arguments
_ALIGNMENT = 512  # bytes, of every place in the arena and among the zeros
_X, _OUT, _ARENA, _ZEROS, _FIXED = range(5)
_shape = attrgetter("shape")


class _Storage:
    """Memory that a recorded function works on, and where it lies in a repeated call."""

    def __init__(self, address: int, size: int, base: int) -> None:
        self.address, self.size, self.base = address, size, base
        self.offset = 0
        self.launches: list[int] = []  # that have it among their arguments


class _Argument(NamedTuple):
    """A tensor among the arguments of a launch, ``offset`` bytes into its storage."""

    storage: _Storage
    offset: int
    dtype: torch.dtype
    shape: Sequence[int]
    strides: Sequence[int]
    tensor: Tensor | None  # itself, where it is fixed and interpreted


class _Descriptor(NamedTuple):
    """A tensor descriptor among them."""

    base: _Argument
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]


class _Address:
    """What a descriptor asks of its base."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


class _Recorder(TorchDispatchMode):
    """Notes the allocations and launches of a function, and whether it does anything else to tensors but view them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        first = x.untyped_storage().data_ptr()
        # By the address of the storage; an allocation takes the place of one that was freed there.
        self.storages = {first: _Storage(x.data_ptr(), 0, _X)}
        self.made: list[_Storage] = []
        self.launches: list[tuple[Any, Any, list[Any]]] = []
        self.refused = False
        self._launching = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._launching:  # Triton's own tensors
            return result
        aten = torch.ops.aten
        zeros = function is aten.zeros.default
        if zeros or function in (aten.empty.memory_format, aten.empty_strided.default):
            made = result.untyped_storage()
            storage = _Storage(made.data_ptr(), made.nbytes(), _ZEROS if zeros else _ARENA)
            self.storages[storage.address] = storage
            self.made.append(storage)
        elif not function.is_view and any(isinstance(value, Tensor) for value in (result, *args)):
            self.refused = True
        return result

    def note(self, kernel: Any, run: Callable[..., Any], args: tuple[Any, ...], grid: Any, kwargs: Any) -> None:
        """Launches a kernel, and notes it."""
        self._launching = True
        made = run(*args, grid=grid, warmup=False, **kwargs)
        self._launching = False
        named = dict(zip(kernel.arg_names, args)) | kwargs
        values = [self._described(named[name]) for name in kernel.arg_names]
        if launch.INTERPRETED:
            made = _Interpreted(kernel)
        elif made is None:  # a hook of Triton's took the launch
            self.refused = True
        elif hasattr(made, "result"):  # compiled in a thread
            made = made.result()
        self.launches.append((made, (*grid, 1, 1)[:3], values))

    def _described(self, value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return _Descriptor(self._described(value.base), value.shape, value.strides, value.block_shape)
        if isinstance(value, tuple):
            return _rebuilt(value, map(self._described, value))
        if not isinstance(value, Tensor):
            return value
        address, first = value.data_ptr(), value.untyped_storage().data_ptr()
        storage = self.storages.get(first) or _Storage(0, 0, _FIXED)
        storage.launches.append(len(self.launches))
        kept = value if launch.INTERPRETED and storage.base == _FIXED else None
        return _Argument(storage, address - storage.address, value.dtype, value.shape, value.stride(), kept)


def _rebuilt(like: tuple[Any, ...], parts: Iterable[Any]) -> tuple[Any, ...]:
    """A tuple, or named tuple, of the class of another."""
    return like._make(parts) if hasattr(like, "_make") else tuple(parts)


class _Interpreted:
    """A kernel of Triton's interpreter, which takes tensors instead of addresses."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, stream: self._kernel.run(*args, grid=grid, warmup=False)


def _place(storages: Sequence[_Storage]) -> int:
    """Gives storages their places, the earliest first, each the lowest that is free at all its launches; the size."""
    placed: list[_Storage] = []
    for storage in storages:
        alive = [other for other in placed if other.launches[-1] >= storage.launches[0]]
        for other in sorted(alive, key=lambda other: other.offset):
            if storage.offset + storage.size <= other.offset:
                break
            storage.offset = max(storage.offset, -(-(other.offset + other.size) // _ALIGNMENT) * _ALIGNMENT)
        placed.append(storage)
    return max((storage.offset + storage.size for storage in placed), default=0)


class Plan:
    """The launches of one call, to be repeated for an x of the same shape, strides, dtype, device and alignment."""

    def __init__(self, recorder: _Recorder, out: Tensor) -> None:
        self._launches = recorder.launches
        recorder.storages[out.untyped_storage().data_ptr()].base = _OUT
        used = sorted((s for s in recorder.made if s.launches), key=lambda storage: storage.launches[0])
        self.arena_bytes = _place([storage for storage in used if storage.base == _ARENA])
        zeros, self._zero_bytes = (s for s in used if s.base == _ZEROS), 0
        for storage in zeros:
            storage.offset = self._zero_bytes
            self._zero_bytes += -(-storage.size // _ALIGNMENT) * _ALIGNMENT
        self._shape, self._dtype = out.shape, out.dtype
        self._bound: OrderedDict[tuple[int, ...], list[tuple[Callable[..., Any], list[Any]]]] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        with launch.device_guard(x):
            out = torch.empty(self._shape, dtype=self._dtype, device=x.device)
            arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=x.device)
            zeros = torch.zeros(self._zero_bytes, dtype=torch.uint8, device=x.device)
            bases = (x, out, arena, zeros)
            if launch.INTERPRETED:
                launches, stream = self._with(bases, _tensor), None
            else:
                addresses = tuple(map(Tensor.data_ptr, bases))
                launches = self._bound.get(addresses) or self._bind(addresses)
                stream = driver.active.get_current_stream(driver.active.get_current_device())
            for kernel, args in launches:
                kernel(*args, stream=stream)
        return out

    def _bind(self, addresses: tuple[int, ...]) -> list[tuple[Callable[..., Any], list[Any]]]:
        self._bound[addresses] = bound = self._with(addresses, _address)
        if len(self._bound) > MAX_ADDRESSES:
            self._bound.popitem(last=False)
        return bound

    def _with(self, bases: Any, make: Callable[[_Argument, Any], Any]) -> list[tuple[Callable[..., Any], list[Any]]]:
        """The launches with ``make(argument, bases)`` in the place of each tensor."""

        def real(value: Any) -> Any:
            if isinstance(value, _Argument):
                return make(value, bases)
            if isinstance(value, _Descriptor):
                base = make(value.base, bases)
                base = base if isinstance(base, Tensor) else _Address(base, value.base.dtype)
                return TensorDescriptor(base, list(value.shape), list(value.strides), list(value.block_shape))
            return _rebuilt(value, map(real, value)) if isinstance(value, tuple) else value

        return [(kernel[grid], list(map(real, values))) for kernel, grid, values in self._launches]


def _address(argument: _Argument, addresses: tuple[int, ...]) -> int:
    storage = argument.storage
    return (0 if storage.base == _FIXED else addresses[storage.base]) + storage.offset + argument.offset


def _tensor(argument: _Argument, bases: tuple[Tensor, ...]) -> Tensor:
    """For the interpreter."""
    if argument.tensor is not None:
        return argument.tensor
    base = bases[argument.storage.base]
    offset = base.storage_offset() * base.itemsize + argument.storage.offset + argument.offset
    found = torch.empty(0, dtype=argument.dtype, device=base.device)
    return found.set_(base.untyped_storage(), offset // found.itemsize, argument.shape, argument.strides)


def record(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, Plan | None]:
    """(function(x, *arguments), the plan of its launches, or None where it has none that would do the same)."""
    recorder = _Recorder(x)
    with interception.intercepted(recorder.note), recorder:
        out = function(x, *arguments)
    storage = recorder.storages.get(out.untyped_storage().data_ptr())
    made_here = storage is not None and storage.base == _ARENA and bool(storage.launches) and out.is_contiguous()
    if recorder.refused or not made_here or out.untyped_storage().nbytes() != out.nbytes:
        return out, None
    return out, Plan(recorder, out)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_holds_tensor, value)))


_plans: OrderedDict[Any, Plan | None] = OrderedDict()  # None: there is no plan


def planned(function: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor], *arguments: Any) -> Tensor:
    """function(x, weights, *arguments), from the second call on by its plan where no argument holds a tensor."""
    if launch.INTERPRETED or x.numel() == 0 or x.is_meta or interception.active() or _holds_tensor(arguments):
        return function(x, weights, *arguments)
    key = (
        function, x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, *arguments, launch.dot_precision(),
        *map(Tensor.data_ptr, weights), *map(Tensor.stride, weights), *map(_shape, weights),
    )  # fmt: skip
    if key not in _plans:
        out, _plans[key] = record(function, x, weights, *arguments)
        while len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
        return out
    plan = _plans[key]
    return function(x, weights, *arguments) if plan is None else plan(x)
