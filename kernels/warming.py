"""Compiles what launches need without running them: ``compiling``.

Triton compiles in threads (``triton.AsyncCompileMode``): its passes and ptxas run outside of Python's lock. A kernel is
then loaded onto the device, so that its first launch neither compiles nor loads, and may be in the capture of a CUDA
graph. A kernel that fails to compile stays in Triton's cache as a failure: its launch raises the error.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from . import interception, launch


class Compiled:
    """What ``compiling`` found.

    Attributes:
        variants: id → the name of the kernel of every variant (constants, specialisation, device) that was launched.
        new: those of ``variants`` that were not compiled before.
        failed: id → the error of a variant that cannot be compiled or loaded.
    """

    def __init__(self) -> None:
        self.variants: dict[int, str] = {}
        self.new: dict[int, str] = {}
        self.failed: dict[int, Exception] = {}
        self._kept: list[Any] = []  # so that no other object gets the id of one of them
        self._watched: set[int] | None = None

    def add(self, name: str, variant: Any) -> bool:
        """Notes a launch; whether its variant is a new one, which is being compiled."""
        key = id(variant)
        if self._watched is not None:
            self._watched.add(key)
        if key in self.variants:
            return False
        self._kept.append(variant)
        self.variants[key] = name
        if new := isinstance(variant, triton.FutureKernel) and variant.kernel is None:
            self.new[key] = name
        return new

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[int]]:
        """The ids of the variants that are launched inside."""
        self._watched = watched = set()
        try:
            yield watched
        finally:
            self._watched = None


@contextlib.contextmanager
def compiling(device: torch.device, threads: int | None = None) -> Iterator[Compiled]:
    """A context in which launches of this thread compile, ``threads`` at a time, and do not run. At its end all are
    compiled and loaded onto ``device``. Interpreted kernels have nothing to compile."""
    found, futures = Compiled(), dict[int, Any]()

    def compile_only(kernel: Any, run: Callable[..., Any], args: Any, grid: Any, kwargs: Any) -> None:
        made = run(*args, grid=grid, warmup=True, **kwargs)
        if made is not None and found.add(kernel.fn.__name__, made):
            futures[id(made)] = made

    def load(made: Any) -> Exception | None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                made.run  # noqa: B018  # the launcher, made together with the handle of the loaded kernel
            except Exception as error:  # the compiler's, the driver's, of too few resources: all are reported
                return error
        return None

    if launch.INTERPRETED:
        with interception.intercepted(compile_only):
            yield found
        return
    with ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="vit_fast.warmup") as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True), interception.intercepted(compile_only):
            yield found
        errors = pool.map(load, futures.values())
        found.failed = {key: error for key, error in zip(futures, errors) if error is not None}
