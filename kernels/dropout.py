"""Dropout inside kernels: keep or drop is a function of (seed, linear index in the whole dropped tensor), by Philox.

``keep_mask`` draws a mask alone: that of drop path, whose index is that of the sample.

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

from . import launch

BLOCK = 128  # elements of a mask that a program draws


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


@triton.jit(do_not_specialize=["count"])
def _keep_mask_kernel(
    keep_ptr,  # [count] bool, contiguous
    seed_ptr,  # int64, one element
    count,
    p,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(tl.load(seed_ptr), index) > p
    tl.store(keep_ptr + index, keep, mask=index < count)


def keep_mask(seed: torch.Tensor, count: int, p: float, device: torch.device) -> torch.Tensor:
    """``reference.keep_mask`` in one launch."""
    keep = torch.empty(count, dtype=torch.bool, device=device)
    if count:
        with launch.device_guard(keep):
            _keep_mask_kernel[(triton.cdiv(count, BLOCK),)](
                keep, seed.to(device), count, _float32(p), BLOCK=BLOCK, num_warps=1
            )
    return keep


def dropout_of(p: float, seed: torch.Tensor | None) -> Dropout | None:
    """The argument of a launch; None where nothing is dropped. p and 1/(1 − p) are rounded as in
    ``reference.dropout_mask``."""
    return Dropout(seed, _float32(p), _float32(1.0 / _float32(1.0 - p))) if p > 0.0 else None
