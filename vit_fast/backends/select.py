"""Which backend runs an operation: the order, the requested backend, the choice for a call, and its recording.

Order: ``triton`` → ``cuda`` → ``cpu`` (extensions) → ``torch`` (the reference). The choice is made ahead of a
launch from capability. A backend that fails nevertheless is quarantined for that operation: one warning, and the next
backend runs this call and all later ones (``run``, ``quarantine``). ``VIT_FAST_BACKEND`` or
``with vit_fast.backend(...)`` force a backend: a forced backend never falls back. ``VIT_FAST_STRICT=1``
raises wherever the reference would run an operation on a device that has a faster backend, and where one fails.
"""

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vit_fast.kernels.arguments import UnsupportedError
from vit_fast.kernels.tracing import autocasts, transform_reasons

from . import quarantine
from .base import Backend, backward_key
from .cpu import CPU
from .cuda import CUDA
from .torch import TORCH
from .triton import TRITON

# In the order in which they are tried. A new backend is a file of its own and an entry here.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TRITON, CUDA, CPU, TORCH)}

KEEP_MASK = "keep_mask"  # the key of ``Backend.keep_mask`` in ``Backend.quarantined``
Choice = tuple[str, str, tuple[str, ...]]  # operation, backend, reasons

_ENVIRONMENT = os.environ.get("VIT_FAST_BACKEND", "auto")
_STRICT = os.environ.get("VIT_FAST_STRICT", "0")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("vit_fast_backend", default=None)
# Dynamo guards module globals, and neither context variables nor thread locals.
_forced_when_compiling: str | None = None
_failing = threading.Lock()
_recorder: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("vit_fast_recorder", default=None)
_recording_backward: contextvars.ContextVar[bool] = contextvars.ContextVar("vit_fast_backward", default=False)
_direct: contextvars.ContextVar[bool] = contextvars.ContextVar("vit_fast_direct", default=False)


def names() -> tuple[str, ...]:
    """The names that ``backend`` and ``VIT_FAST_BACKEND`` accept."""
    return ("auto", *BACKENDS)


def _check_word(source: str, word: str) -> None:
    if word not in names():
        raise ValueError(f"{source}: backend is {word!r}, expected one of {', '.join(names())}")


def _strict() -> bool:
    if _STRICT not in ("0", "1"):
        raise ValueError(f"VIT_FAST_STRICT: value is {_STRICT!r}, expected 0 or 1")
    return _STRICT == "1"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for the operations called inside the ``with`` block.

    Eager code sees the innermost block of its own thread or task, ``torch.compile`` the innermost of the process.

    Args:
        name: "auto", "triton", "cuda", "cpu" or "torch".

    Raises:
        ValueError: another name.
        UnsupportedError: from the operation, where the forced backend cannot run it.
    """
    global _forced_when_compiling
    _check_word("vit_fast.backend", name)
    token, outer = _forced.set(name), _forced_when_compiling
    _forced_when_compiling = name
    try:
        yield
    finally:
        _forced.reset(token)
        _forced_when_compiling = outer


def requested() -> str:
    """The requested backend: that of the innermost ``with``, else ``VIT_FAST_BACKEND``, else "auto"."""
    word = _forced_when_compiling if torch.compiler.is_compiling() else _forced.get()
    if word is None:
        word = _ENVIRONMENT
        _check_word("VIT_FAST_BACKEND", word)
    return word


def unavailable(name: str, device: torch.device) -> tuple[str, ...]:
    """Why a backend cannot run anything on a device; empty where it can."""
    return BACKENDS[name].unavailable(device)


def preferred(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for which stacks of blocks are prepared whose weights have a dtype: the requested one, or the first
    of the order that runs on the device and is not known to be slower than the next."""
    word = requested()
    if word != "auto":
        return word
    able = (name for name in BACKENDS if not unavailable(name, device))
    return next(name for name in able if not BACKENDS[name].slower_stack_reasons(dtype))


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (0.7 s). Dynamo could not trace
# the import of Triton inside.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def note(operation: str, chosen: str, reasons: Sequence[str]) -> None:
    """Adds to the innermost ``recording`` what runs an operation, and why nothing faster does.

    Args:
        operation: an operation of ``ops``, or "block" for a transformer block as a whole.
        chosen: the backend, or "library" where a library's own forward runs.
        reasons: why the fused path does not run; empty where it does.
    """
    if torch.compiler.is_compiling():
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append((operation, chosen, tuple(reasons)))


def _note_backward(operation: str, chosen: str, arguments: Sequence[Any], options: dict[str, Any]) -> None:
    """Notes a backward that this call leaves to the reference, though the backend has one of the operation."""
    if torch.compiler.is_compiling() or not _recording_backward.get() or of_backward(chosen, operation).name != chosen:
        return
    if reasons := BACKENDS[chosen].backward_reasons(operation, *arguments, **options):
        note(backward_key(operation), TORCH.name, reasons)


def choose(operation: str, device: torch.device, not_fused: Sequence[str], *arguments: Any, **options: Any) -> str:
    """The name of the backend that runs a call: the first of the order that can, or the one that is forced.

    Where a tracer or transform wants plain PyTorch operations, only ``torch`` can.

    Args:
        not_fused: options of the call that no registered operator has, so that only ``torch`` can run it.
        arguments, options: of the call, as the backends' ``not_supported`` take them.

    Raises:
        UnsupportedError: a forced backend cannot; in strict mode, only the reference can.
    """
    if is_direct():
        return "torch"
    word = requested()
    if word == "torch":
        note(operation, word, ("forced",))
        return word
    absent: tuple[str, ...] = ()  # why the first backend tried does not run on the device
    refused: dict[str, tuple[str, ...]] = {}  # backends that run on the device → why not this call
    slower: dict[str, tuple[str, ...]] = {}  # backends that could run it, and leave it to the next
    for name in BACKENDS if word == "auto" else (word,):
        if name == "torch":
            break
        if why := unavailable(name, device):
            absent = absent or why
            continue
        why = transform_reasons() or (*not_fused, *BACKENDS[name].reasons(operation, *arguments, **options))
        if why:
            refused[name] = why
        elif word == "auto" and (why := tuple(BACKENDS[name].slower_reasons(operation, *arguments, **options))):
            slower[name] = why
        else:
            note(operation, name, _joined(refused))
            _note_backward(operation, name, arguments, options)
            return name
    reasons = _joined(refused | slower) or absent
    if word != "auto":
        if reasons == transform_reasons():
            reasons = (*reasons, 'run it inside `with vit_fast.backend("torch")`')
        told = "; ".join(reasons)
        raise UnsupportedError(f"vit_fast.{operation}: backend {word!r} was forced and cannot run: {told}")
    if _strict() and (refused or device.type == "cuda"):
        names, told = ", ".join(refused or [next(iter(BACKENDS))]), "; ".join(reasons)
        raise UnsupportedError(f"vit_fast.{operation}: {names} cannot run this (VIT_FAST_STRICT=1): {told}")
    note(operation, "torch", reasons)
    return "torch"


def drawing(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The name of the backend that draws masks: the requested one, or the first of the order, where it has that; else
    the reference's, whose bits are the same. ``dtype``: of elements that are dropped; a backend that leaves all
    operations on it to the next one leaves their masks too."""
    word = requested()
    for name in BACKENDS if word == "auto" else (word,):
        backend = BACKENDS[name]
        if word == "auto" and dtype is not None and backend.is_slower(dtype):
            continue
        if not unavailable(name, device) and backend.keep_mask and KEEP_MASK not in backend.quarantined:
            return name
    return TORCH.name


def _is_reference_alone(x: torch.Tensor) -> bool:
    """Whether ``choose`` names the reference for every operation on tensors like x, nobody asks why, and no gradient is
    wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _STRICT != "0" or _recorder.get() is not None:
        return False
    word = _forced.get() or requested()
    if word != "auto":
        return word == "torch"
    device = x.device
    device_type = device.type
    if autocasts(device_type):
        return False
    for backend in BACKENDS.values():
        types = backend.device_types
        if (types is not None and device_type not in types) or backend is TORCH:
            continue
        if not backend.unavailable(device) and not backend.is_slower(x.dtype):
            return False
    return True


def run_block(run: Callable[..., Any], x: torch.Tensor, *arguments: Any) -> Any:
    """``run(x, *arguments)``, several operations on x and on weights of its dtype.

    Where the reference alone can run them, they call it without a check and a choice each (``is_direct``). Where that
    fails they run once more with their checks, which say what is wrong with an argument.
    """
    if not _is_reference_alone(x):
        return run(x, *arguments)
    token = _direct.set(True)
    try:
        return run(x, *arguments)
    except Exception:  # raised again below, by a check or by PyTorch
        pass
    finally:
        _direct.reset(token)
    return run(x, *arguments)


def is_direct() -> bool:
    """Whether an operation is called inside ``run_block``, and the reference runs it."""
    return not torch.compiler.is_compiling() and _direct.get()


def _joined(refused: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The reasons of all backends, each with the backend's name where there are several."""
    several = len(refused) > 1
    return tuple(f"{name}: {reason}" if several else reason for name, why in refused.items() for reason in why)


def loaded(name: str, operation: str) -> Backend:
    """The backend that an operator of ``torch.ops.vit_fast`` names. A recorded graph may name a missing one.

    Raises:
        ValueError: no backend has that name.
        UnsupportedError: it cannot be loaded.
    """
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"vit_fast.{operation}: backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if not backend.forward and (reasons := backend.load()):
        raise UnsupportedError(f"vit_fast.{operation}: backend {name!r} cannot run: {'; '.join(reasons)}")
    return backend


def of_backward(name: str, operation: str) -> Backend:
    """The backend that runs the backward of an operation whose forward was sent to the named one.

    Where the forward has failed there, another backend ran it; statistics mean the same in all, and the reference's
    backward follows.
    """
    backend = BACKENDS[name]
    backend.load()
    lost = backend.quarantined
    own = operation in backend.backward and operation not in lost and backward_key(operation) not in lost
    return backend if own else TORCH


Ask = Callable[[Callable[..., Sequence[str]], Sequence[Any]], Sequence[str]]


def run(
    key: str,
    backend: Backend,
    device: torch.device,
    compute: Callable[..., Any],
    inputs: Sequence[Any],
    ask: Ask | None,
) -> Any:
    """``compute(backend, *inputs)``; where that fails, and where it failed before, the same on the next backend.

    Args:
        key: the operation, or ``backward_key`` of it.
        ask: calls ``reasons`` or ``slower_reasons`` of a backend with the inputs of an operator; None for a backward,
            which the reference takes over.

    Raises:
        UnsupportedError: a forced backend failed, or any in strict mode.
        Exception: of the caller, of a full memory and of a lost CUDA context, as they came.
    """
    if key in backend.quarantined:  # the name is one that a graph has recorded
        backend = _successor(key, backend, device, inputs, ask)
    while True:
        try:
            with backend.launching(device):
                return compute(backend, *inputs)
        except Exception as error:  # compilers, drivers and libraries raise anything
            if backend is TORCH or not backend.is_failure(error, device):
                raise
            backend = _after_failure(key, backend, device, inputs, ask, error)


def _successor(
    key: str,
    failed: Backend,
    device: torch.device,
    inputs: Sequence[Any],
    ask: Ask | None,
    cause: Exception | None = None,
) -> Backend:
    """The next backend in the order that can run a call."""
    operation = key.removesuffix(backward_key(""))
    # A backward may run in a thread of autograd, which does not have the context of the call.
    forced = failed.name in (requested(), _forced_when_compiling)
    if forced or _strict():
        why = quarantine.cause(cause) if cause else quarantine.reason(failed.quarantined[key])
        told = "was forced and failed" if forced else "failed (VIT_FAST_STRICT=1)"
        raise UnsupportedError(
            f"vit_fast.{operation}: backend {failed.name!r} {told}: {why}. {failed.remedy}"
        ) from cause
    order = list(BACKENDS)
    for name in order[order.index(failed.name) + 1 :]:
        backend = BACKENDS[name]
        if ask is None or backend is TORCH:
            break
        if not (unavailable(name, device) or ask(backend.reasons, inputs) or ask(backend.slower_reasons, inputs)):
            return backend
    return TORCH


def _after_failure(
    key: str, failed: Backend, device: torch.device, inputs: Sequence[Any], ask: Ask | None, error: Exception
) -> Backend:
    """Quarantines an operation, warns once, and names the backend that goes on."""
    successor, why = _successor(key, failed, device, inputs, ask, error), quarantine.cause(error)
    with _failing:
        first = key not in failed.quarantined
        failed.quarantined.setdefault(key, why)
    if ask:
        _correct(key, failed.name, successor.name, quarantine.reason(why))
    if first:
        quarantine.warn(failed.name, key, why, successor.name, failed.remedy)
    return successor


def _correct(operation: str, failed: str, successor: str, reason: str) -> None:
    """Puts the backend that goes on in the place of the one that ``choose`` has recorded last for an operation."""
    rows = _recorder.get() or []
    for index in reversed(range(len(rows))):
        if rows[index][:2] == (operation, failed):
            rows[index] = (operation, successor, (*rows[index][2], reason))
            return


def backward_name(chosen: str, operation: str) -> str | None:
    """The name of the backend that runs the backward of a noted operation; None for an operation without a backward."""
    known = chosen in BACKENDS and operation in TORCH.backward
    return of_backward(chosen, operation).name if known else None


@dataclass(frozen=True)
class Status:
    """The result of ``status()``; its text is the table."""

    device: str
    requested: str
    versions: dict[str, str]
    reasons: dict[str, tuple[str, ...]]
    operations: dict[str, frozenset[str]]
    quarantine: dict[str, dict[str, str]]  # backend → operation, or its backward → why it failed in this process
    without_backward: dict[str, tuple[str, ...]]  # backend → its operations whose backward is left to torch

    def __str__(self) -> str:
        lines = [f"device {self.device}, backend {self.requested}"]
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        width = max(len(operation) for operation in TORCH.forward)
        lines.append(" ".join([" " * width, *(f"{name:>7}" for name in self.reasons)]))
        for operation in TORCH.forward:
            cells = [
                "failed" if operation in self.quarantine.get(name, {})
                else "yes" if operation in self.operations[name] and not why
                else "no"
                for name, why in self.reasons.items()
            ]  # fmt: skip
            lines.append(" ".join([f"{operation:<{width}}", *(f"{cell:>7}" for cell in cells)]))
        lines += [f"{name}: {'; '.join(why)}" for name, why in self.reasons.items() if why]
        lines += [
            f"backward of {', '.join(operations)}: torch ({name} has none)"
            for name, operations in self.without_backward.items()
        ]
        lines += [
            f"{name} failed in this process, {operation}: {why}"
            for name, lost in self.quarantine.items()
            for operation, why in lost.items()
        ]
        return "\n".join(lines)


def _present(device: torch.device | str) -> torch.device:
    """The ``torch.device``, checked to exist on this machine."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"vit_fast.status: device is {type(device).__name__}, expected a torch.device or its name")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"vit_fast.status: device is {device!r}, expected 'cpu', 'cuda' or 'cuda:<index>'") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"vit_fast.status: device is '{device}', expected one of this machine, where torch {torch.__version__} "
                f"finds {count} CUDA devices"
            )
    return device


def status(device: torch.device | str | None = None) -> Status:
    """The backends × operations of a device (default: the current CUDA device, else the CPU), with reasons.

    Raises:
        TypeError, ValueError: no device, or one that this machine does not have.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _present(device)
    reasons = {name: backend.unavailable(device) for name, backend in BACKENDS.items()}
    versions = {name: version for name, backend in BACKENDS.items() if (version := backend.version())}
    operations = {name: frozenset(backend.forward) for name, backend in BACKENDS.items()}
    lost = {name: dict(backend.quarantined) for name, backend in BACKENDS.items() if backend.quarantined}
    without = {
        name: tuple(key for key in TORCH.backward if key in backend.forward and key not in backend.backward)
        for name, backend in BACKENDS.items()
        if not reasons[name]
    }
    without = {name: keys for name, keys in without.items() if keys}
    return Status(str(device), requested(), {"torch": torch.__version__} | versions, reasons, operations, lost, without)


@contextlib.contextmanager
def recording(backward: bool = False) -> Iterator[list[Choice]]:
    """Collects ``(operation, backend, reasons)`` of every choice and ``note`` made inside.

    Args:
        backward: after a call whose backward its backend leaves to the reference, also a row of that backward.
    """
    rows: list[Choice] = []
    tokens = _recorder.set(rows), _recording_backward.set(backward)
    try:
        yield rows
    finally:
        _recorder.reset(tokens[0])
        _recording_backward.reset(tokens[1])
