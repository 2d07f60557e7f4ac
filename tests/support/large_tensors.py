"""Tensors of more than 2^31 elements of which only a few pages exist."""

import contextlib
import mmap
import sys
from unittest import mock

import torch
from support import sanitizer


def reserved(*shape, dtype):
    """A tensor of zeros that takes memory only for the pages that are touched."""
    count = torch.Size(shape).numel()
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # unnamed before Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype).reshape(shape)


@contextlib.contextmanager
def last_programs_alone():
    """Inside, ``torch.empty`` and ``torch.empty_like`` only reserve memory, and only the last program of every launch
    runs."""

    def empty(*shape, dtype, device):
        return reserved(*(shape if isinstance(shape[0], int) else shape[0]), dtype=dtype)

    def empty_like(t):
        return reserved(*t.shape, dtype=t.dtype)

    with (
        mock.patch.multiple(torch, empty=empty, empty_like=empty_like),
        sanitizer.only_programs(lambda count: [count - 1]),
    ):
        yield
