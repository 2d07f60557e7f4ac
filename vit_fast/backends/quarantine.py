"""What happens after a function of a backend has raised: whose fault it is, in which words it is told, and what to do.

A failure of the backend (its compiler, its driver, its library) quarantines the operation on that backend for the rest
of the process, with one warning; the next backend runs the call. Mistakes of the caller, a full memory and a lost CUDA
context pass through: no other backend would do better.
"""

import re
import warnings

import torch

from vit_fast.kernels.arguments import UnsupportedError

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
# Errors after which every call in the CUDA context fails: cudaErrorIllegalAddress and its like.
_CONTEXT_LOST = re.compile(
    r"illegal memory access|illegal address|misaligned address|illegal instruction|invalid program counter|"
    r"invalid address space|hardware stack error|unspecified launch failure|device-side assert|launch timed out|"
    r"uncorrectable ECC|fallen off the bus|GPU is lost",
    re.IGNORECASE,
)
_LOST = (
    "vit_fast: after this error every CUDA call of the process fails, in whichever library, so that no other backend "
    "was tried. It may come from an earlier kernel. Start a new process; CUDA_LAUNCH_BLOCKING=1 shows the kernel that "
    "failed, VIT_FAST_BACKEND=torch leaves those of vit_fast out."
)
_LONGEST = 300  # characters of a cause


def is_failure(error: Exception) -> bool:
    """Whether an error raised by a backend's function is the backend's, so that the next one may run the call.

    A subclass of ValueError or TypeError is no mistake of the caller's: a damaged cache raises JSONDecodeError.
    """
    if type(error) in (ValueError, TypeError) or isinstance(error, UnsupportedError):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _OUT_OF_MEMORY.search(str(error)):
        return False
    if _CONTEXT_LOST.search(str(error)):
        error.add_note(_LOST)
        return False
    return True


def cause(error: Exception) -> str:
    """An error in one line: its type, and its text, whose middle is left out where it is long."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def reason(why: str) -> str:
    """What ``explain`` and errors say of a quarantined operation."""
    return f"it failed earlier in this process ({why})"


def warn(backend: str, operation: str, why: str, successor: str, remedy: str) -> None:
    """The one warning about a quarantined operation."""
    warnings.warn(
        f"vit_fast.{operation}: backend {backend!r} failed and is left out for this operation from now on; "
        f"{successor!r} runs it. Cause: {why}. {remedy} VIT_FAST_BACKEND={successor} chooses {successor!r} without a "
        "warning, VIT_FAST_STRICT=1 raises instead, `vit-fast doctor` prints a report.",
        RuntimeWarning,
        stacklevel=3,
    )
