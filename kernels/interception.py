"""Launches of our kernels, handed to a function instead of being run: ``warming`` and ``launch_plan``.

A launch function calls ``kernel[grid](...)``, which in Triton, compiled or interpreted, is ``kernel.run(*args,
grid=grid, warmup=False, **kwargs)``. Inside ``intercepted`` the ``run`` of every kernel of this folder is one that
calls the handler, in the thread that entered it; other threads launch as ever.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from triton.runtime.jit import KernelInterface

# (kernel, its own run, positional arguments, grid, keyword arguments)
Handler = Callable[[Any, Callable[..., Any], tuple[Any, ...], Any, dict[str, Any]], Any]
_one_at_a_time = threading.Lock()
_owner: int | None = None  # the thread whose launches are intercepted


def active() -> bool:
    """Whether launches of this thread are intercepted."""
    return _owner == threading.get_ident()


def _kernels() -> list[Any]:
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")]
    found = (value for module in modules for value in vars(module).values())
    return list({id(value): value for value in found if isinstance(value, KernelInterface)}.values())


@contextlib.contextmanager
def intercepted(handler: Handler) -> Iterator[None]:
    """A context in which launches of this thread are given to ``handler``. Not nested; threads take turns."""
    global _owner
    if active():
        raise RuntimeError("vit_fast: launches of this thread are intercepted already")

    def run(kernel: Any, own: Callable[..., Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not active():
            return own(*args, grid=grid, warmup=warmup, **kwargs)
        return handler(kernel, own, args, grid, kwargs)

    with _one_at_a_time:
        kernels, _owner = _kernels(), threading.get_ident()
        for kernel in kernels:
            kernel.run = functools.partial(run, kernel, kernel.run)
        try:
            yield
        finally:
            for kernel in kernels:
                del kernel.run
            _owner = None
