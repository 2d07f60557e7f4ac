"""Dropout inside kernels: keep or drop is a function of (seed, linear index in the whole dropped tensor), by Philox.

The numbers are those of ``tl.rand(seed, int64 index)``, Philox4x32-10, and of ``reference.dropout_mask``: forward,
backward and recomputation draw the same mask, on every backend, whatever the tiles.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """What a kernel needs for dropout."""

    seed_ptr: Any  # int64, one element
    p: float
    scale: float  # of the elements that are kept


@triton.jit
def dropped(value, dropout, index):
    """value · mask / (1 − p): ``index`` (int64) are the places of its elements in the whole dropped tensor."""
    keep = tl.rand(tl.load(dropout.seed_ptr), index) > dropout.p
    return tl.where(keep, value * dropout.scale, 0.0)


@functools.cache
def _float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def dropout_of(p: float, seed: torch.Tensor | None) -> Dropout | None:
    """The argument of a launch; None where nothing is dropped. p and 1/(1 − p) are rounded as in
    ``reference.dropout_mask``."""
    return Dropout(seed, _float32(p), _float32(1.0 / _float32(1.0 - p))) if p > 0.0 else None
