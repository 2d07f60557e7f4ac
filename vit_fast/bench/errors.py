"""Errors that stop a benchmark and that its user can fix: a wrong value, a missing package, an unknown model.

The text of such an error is all that the command line prints.
"""

import importlib
import re
from types import ModuleType


class BenchError(Exception):
    """A failure that the user can fix; its text says how."""


class WrongValueError(BenchError):
    """A value that cannot be used; holds the value and a text that describes what is wanted."""

    def __init__(self, got: object, wanted: str) -> None:
        super().__init__(f"got {got!r}, wanted {wanted}")
        self.got, self.wanted = got, wanted


def reason(error: object) -> str:
    """The text of a library error without the function's name, in whose place the command line names a flag."""
    return re.sub(r"^vit_fast(\.\w+)*: ", "", str(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells that memory, of the host or of a GPU, cannot be had, or that no address reaches so far."""
    import torch

    told = re.search("can't allocate memory|Storage size calculation overflowed", str(error))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or told is not None


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional dependency, or says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = (error.name or module).split(".")[0]
        cause = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails to import ({error})"
        raise BenchError(f"{name} {cause}; pip install 'vit-fast[{extra}]' brings it") from error
    except RuntimeError as error:  # torchvision, if its operators were built for another torch
        raise BenchError(f"{module} fails to import ({error}); install torch and torchvision in one step") from error
