"""What a backend is."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

Table = Mapping[str, Callable[..., Any]]

_nothing = contextlib.nullcontext()


class Backend:
    """One implementation of operations, with tables of functions by operation.

    Arguments and results of a function are those of the function at the same place in ``backends.torch``. Statistics
    (natural-log LSE; mean and rstd of rows) mean the same in every backend, so that the backward of one may follow the
    forward of another.

    Attributes:
        name: the word that forces it.
        forward: the output, and the statistics that the backward needs; every operation that the backend has.
        inference: the output alone, where leaving out the statistics is cheaper than ``forward``.
        backward: the gradients; where an operation is missing, the reference's backward runs.
        not_supported: why the forward cannot run a call, a list of reasons; operations without limits are missing.
    """

    name: str

    def __init__(self) -> None:
        self.forward: Table = {}
        self.inference: Table = {}
        self.backward: Table = {}
        self.not_supported: Table = {}

    def load(self) -> tuple[str, ...]:
        """Makes the tables ready, once; returns why that is impossible in this process, or nothing."""
        return ()

    def unavailable(self, device: torch.device) -> tuple[str, ...]:
        """Why it runs nothing on a device; empty where it does."""
        return self.load()

    def version(self) -> str | None:
        """The version of the library underneath, for ``status``; None where there is none."""
        return None

    def reasons(self, operation: str, *arguments: Any, **options: Any) -> list[str]:
        """Why it cannot run an operation on these arguments, on a device where it is available; empty where it can."""
        if operation not in self.forward:
            return [f"{self.name} has no {operation}"]
        not_supported = self.not_supported.get(operation)
        return list(not_supported(*arguments, **options)) if not_supported else []

    def launching(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """What surrounds each call of a function of ``forward``, ``inference`` or ``backward``."""
        return _nothing

    def output(self, operation: str) -> Callable[..., torch.Tensor]:
        """The function of an operation that has statistics, for its output alone."""
        if operation in self.inference:
            return self.inference[operation]
        forward = self.forward[operation]
        return lambda *arguments, **options: forward(*arguments, **options)[0]
