"""Memory that was freed, given back to the system.

The allocator of glibc keeps what is freed between blocks in use. Packing a model frees the temporaries of each layer
and keeps its packed weight, often in the very place where they were, so that the next layer's find no place there: with
nothing given back, an int8 ViT-B took up to 535 MiB instead of 100.
"""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function, or None under another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no CDLL(None)
        return None


def trim() -> None:
    """Gives the pages of freed memory back to the system, where its C library can."""
    if (function := _malloc_trim()) is not None:
        function(0)
