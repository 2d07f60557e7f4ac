"""Masks of padding as ``key_lengths``: attention then leaves out the padding instead of adding a bias to it.

A mask [B or 1, 1, Nq or 1, Nk] that lets the first keys of each image take part and no other says no more than how
many they are; one that lets all take part says nothing. It may leave out the queries of the padding too, by the lowest
finite number, as that of timm's NaFlexVit does: those rows, which are the mean of all values there, become attention
to the same keys as the others. No row of an image depends on them.

The numbers of a mask are read once in a forward, by the first block that it comes to; on a GPU that waits for the mask.
Nothing is read where a call is recorded or compiled.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels.tracing import records_numbers


class _Reading(NamedTuple):
    """What was read of a mask."""

    version: int | None  # of the mask; None for an inference tensor, which counts no changes
    block: int  # the id of the block that read it; where there is no version, it reads anew in its next call
    lengths: torch.Tensor | None  # [B or 1], or None for a mask that is no padding
    padded: bool  # whether any image has padding


_READINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask → _Reading


def key_lengths(block: nn.Module, mask: torch.Tensor, batch: int) -> dict[str, torch.Tensor] | None:
    """The options of ``ops.attention`` for a mask of padding.

    Args:
        block: the module that the mask is given to.
        mask: what is added to the scores, or bools, True where a key takes part; up to four dimensions.
        batch: of the tokens.
    Returns:
        ``key_lengths`` [batch], or nothing where all keys take part; None for any other mask.
    """
    if records_numbers() or type(mask) is not torch.Tensor:
        return None
    if mask.is_meta or mask.requires_grad or mask.numel() == 0:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    version = None if mask.is_inference() else mask._version
    reading = _READINGS.get(mask)
    if reading is None or reading.version != version or (version is None and reading.block == id(block)):
        _READINGS[mask] = reading = _Reading(version, id(block), *_read(mask[(None,) * (4 - mask.dim())]))
    if reading.lengths is None:
        return None
    return {"key_lengths": reading.lengths.expand(batch).contiguous()} if reading.padded else {}


def _read(mask: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """The lengths that a mask of four dimensions says, and whether any is less than the number of keys."""
    keys, yes = mask.shape[3], torch.ones((), dtype=torch.bool, device=mask.device)
    allowed, known, finite = mask, yes, ~yes
    if mask.dtype != torch.bool:
        allowed, lowest = mask == 0, torch.finfo(mask.dtype).min
        known, finite = (allowed | (mask <= lowest)).all(), (mask >= lowest).all()
    first = allowed[:, :1, :1]  # the row of query 0
    lengths = first.sum(3)
    of_all = (allowed == first).all()
    if mask.shape[2] == keys:  # or of the queries that are no padding themselves
        of_all = of_all | (finite & (allowed == (first & first.mT)).all())
    starts = (first == (torch.arange(keys, device=mask.device) < lengths[..., None])).all()
    is_padding, padded = torch.stack((known & of_all & starts & (lengths > 0).all(), (lengths < keys).any())).tolist()
    return (lengths.flatten() if is_padding else None), padded
