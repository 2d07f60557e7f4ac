"""Which backend may run an operation here, which one is asked for, and why not.

Order: ``triton`` → ``cuda`` → ``cpu`` (extensions) → ``torch`` (the reference). The choice is made ahead of a
launch from capability, never by catching an exception around one. ``VIT_FAST_BACKEND`` or
``with vit_fast.backend(...)`` force a backend: a forced backend never falls back. ``VIT_FAST_STRICT=1``
raises wherever the first backend that belongs to a device cannot run an operation.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass

import torch

from .kernels.arguments import UnsupportedError
from .kernels.tracing import transform_reasons

BACKENDS = ("triton", "cuda", "cpu", "torch")
OPERATIONS = (
    "patch_embed", "attention", "layer_norm", "layer_norm_linear", "linear_residual", "layernorm_mlp",
    "prepared_blocks", "fp8_blocks",
)  # fmt: skip
WORDS = ("auto", *BACKENDS)
_MODULES = (
    "patch_embed", "attention", "layer_norm", "linear", "layernorm_mlp", "prepared_blocks", "fp8_blocks"
)  # fmt: skip

_logger = logging.getLogger("vit_fast")
_ENVIRONMENT = os.environ.get("VIT_FAST_BACKEND", "auto")
_STRICT = os.environ.get("VIT_FAST_STRICT", "0")
_forced = contextvars.ContextVar("vit_fast_backend", default=None)
_forced_when_compiling = None  # dynamo guards module globals, and neither context variables nor thread locals
_recorder = contextvars.ContextVar("vit_fast_recorder", default=None)


def _check_word(source, word):
    if word not in WORDS:
        raise ValueError(f"{source}: backend is {word!r}, expected one of {', '.join(WORDS)}")


def _strict():
    if _STRICT not in ("0", "1"):
        raise ValueError(f"VIT_FAST_STRICT: value is {_STRICT!r}, expected 0 or 1")
    return _STRICT == "1"


@contextlib.contextmanager
def backend(name: str):
    """Force a backend for the operations called inside the ``with`` block.

    Eager code sees the innermost block of its own thread or task, ``torch.compile`` the innermost of the process.

    Args:
        name: "auto", "triton", "cuda", "cpu" or "torch".

    Raises:
        ValueError: another word.
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
    """The backend word in force: the innermost ``with``, else ``VIT_FAST_BACKEND``, else "auto"."""
    word = _forced_when_compiling if torch.compiler.is_compiling() else _forced.get()
    if word is None:
        word = _ENVIRONMENT
        _check_word("VIT_FAST_BACKEND", word)
    return word


_triton_failure = None
_kernels = {}  # name → module of kernels/, filled with the first look at Triton: importing vit_fast needs none of it


def _triton_reasons():
    """Why the kernels cannot be imported; a broken install is told once, plain absence of Triton is not."""
    global _triton_failure
    if _triton_failure is None:
        if importlib.util.find_spec("triton") is None:
            _triton_failure = ("triton is not installed",)
        else:
            try:
                for name in _MODULES:
                    _kernels[name] = importlib.import_module(f".kernels.{name}", __package__)
                _triton_failure = ()
            except Exception as error:
                _triton_failure = (f"triton fails to import: {error}",)
                warnings.warn(
                    f"vit_fast: triton is installed and fails to import ({error}); the torch backend is used. "
                    "Reinstall triton in the version that this torch asks for.",
                    stacklevel=2,
                )
    return _triton_failure


def kernel(name: str):
    """A module of kernels/; the name is a file's stem."""
    if not _kernels:
        _triton_reasons()
    return _kernels[name]


def unavailable(name: str, device_type: str, device_index: int | None = None) -> tuple[str, ...]:
    """Why a backend cannot run anything on a device; empty where it can."""
    if name == "torch":
        return ()
    if name in ("cuda", "cpu"):
        return (f"the {name} extension is not built",)
    if reasons := _triton_reasons():
        return reasons
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(device_index)
        if major < 8:
            return (f"Triton kernels need compute capability 8.0, the device has {major}.{minor}",)
        return ()
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            return ("Triton runs CPU tensors only in its interpreter (TRITON_INTERPRET=1)",)
        return ()
    return (f"Triton kernels do not run on device type {device_type}",)


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (0.7 s).
unavailable._dynamo_marked_constant = True


def note(operation: str, chosen: str, reasons) -> None:
    """Tells ``recording`` what runs an operation, and why nothing faster does.

    Args:
        operation: one of ``OPERATIONS``, or "block" for a transformer block as a whole.
        chosen: the backend, or "library" where a library's own forward runs.
        reasons: why the fused path does not run; empty where it does.
    """
    if torch.compiler.is_compiling():
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append((operation, chosen, tuple(reasons)))


def select(op: str, device: torch.device, not_supported) -> str:
    """The backend that runs ``op`` on ``device``: "torch" where a tracer or transform wants plain PyTorch operations.

    Args:
        not_supported: function of no arguments that lists why Triton cannot run this very call.

    Raises:
        UnsupportedError: a forced backend, or strict mode, and the backend cannot.
    """
    word = requested()
    if word == "torch":
        chosen, reasons = "torch", ["forced"]
    elif word == "auto":
        reasons = list(unavailable("triton", device.type, device.index) or transform_reasons()) or not_supported()
        chosen = "torch" if reasons else "triton"
        if reasons and _strict() and (device.type == "cuda" or not unavailable("triton", device.type, device.index)):
            raise UnsupportedError(f"vit_fast.{op}: triton cannot run this (VIT_FAST_STRICT=1): {'; '.join(reasons)}")
    else:
        reasons = list(unavailable(word, device.type, device.index))
        if not reasons and (reasons := list(transform_reasons())):
            reasons.append('run it inside `with vit_fast.backend("torch")`')
        if reasons := reasons or not_supported():
            raise UnsupportedError(f"vit_fast.{op}: backend {word!r} was forced and cannot run: {'; '.join(reasons)}")
        chosen = word
    note(op, chosen, reasons)
    return chosen


@dataclass(frozen=True)
class Status:
    """What ``status()`` found; its text is the table."""

    device: str
    requested: str
    versions: dict[str, str]
    reasons: dict[str, tuple[str, ...]]

    def __str__(self):
        lines = [f"device {self.device}, backend {self.requested}"]
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        width = max(len(op) for op in OPERATIONS)
        lines.append(" ".join([" " * width, *(f"{name:>7}" for name in BACKENDS)]))
        for op in OPERATIONS:
            cells = ("no" if self.reasons[name] else "yes" for name in BACKENDS)
            lines.append(" ".join([f"{op:<{width}}", *(f"{cell:>7}" for cell in cells)]))
        lines += [f"{name}: {'; '.join(why)}" for name, why in self.reasons.items() if why]
        return "\n".join(lines)


def _present(device):
    """A device of this machine, as ``torch.device``."""
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
    versions = {"torch": torch.__version__}
    if not _triton_reasons():
        import triton

        versions["triton"] = triton.__version__
    reasons = {name: unavailable(name, device.type, device.index) for name in BACKENDS}
    return Status(str(device), requested(), versions, reasons)


@contextlib.contextmanager
def recording():
    """Collects ``(operation, backend, reasons)`` of every selection and ``note`` made inside."""
    rows = []
    token = _recorder.set(rows)
    try:
        yield rows
    finally:
        _recorder.reset(token)
