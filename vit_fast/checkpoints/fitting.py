"""Tensors of a checkpoint fitted to another grid of patches, patch size or number of channels."""

import math
from collections.abc import Sequence

import torch

from vit_fast.pos_embed import resize_pos_embed

from .errors import WeightsError

# The first convolution in timm's keys: of hybrids with and without stages, and of plain ViTs.
FIRST_CONVOLUTIONS = (
    "patch_embed.backbone.stem.conv.weight", "patch_embed.backbone.conv.weight", "patch_embed.proj.weight"
)  # fmt: skip


def resized_table(
    subject: str,
    table: torch.Tensor,
    old_grid: Sequence[int] | None,
    new_grid: Sequence[int],
    policy: str,
    num_prefix_tokens: int,
) -> torch.Tensor:
    """``resize_pos_embed`` of a table out of a file; ``subject`` is what an error speaks of.

    Raises:
        WeightsError: the table does not hold the old grid.
    """
    try:
        return resize_pos_embed(table, old_grid, new_grid, policy, num_prefix_tokens)
    except ValueError as error:
        raise WeightsError(f"{subject} does not fit: {str(error).partition(': ')[2]}") from error


def fit_table(
    state: dict[str, torch.Tensor], grid: Sequence[int], old_grid: Sequence[int] | None, policy: str
) -> str | None:
    """Resizes pos_embed of a state_dict in timm's keys, in place; returns a note, or None where nothing changed.

    Whether the table has rows for the prefix tokens is told by its number of rows.

    Raises:
        WeightsError: there is no table, it does not hold the old grid, or it fits with prefix rows and without.
    """
    table = state.get("pos_embed")
    if table is None or table.dim() != 3:
        raise WeightsError(
            "vit_fast.checkpoints: grid is given, expected a checkpoint with a table pos_embed [1, N, C]"
        )
    prefix = sum(state[name].shape[-2] for name in ("cls_token", "dist_token", "reg_token") if name in state)
    rows, fits, problems = table.shape[1], [], []
    for count in dict.fromkeys((prefix, 0)):
        try:
            fits.append(resized_table("vit_fast.checkpoints: pos_embed", table, old_grid, grid, policy, count))
        except WeightsError as error:
            problems.append(error)
    if not fits:
        raise problems[0]
    if len(fits) == 2:
        raise WeightsError(
            f"vit_fast.checkpoints: old_grid is None, expected rows and columns: the {rows} rows of pos_embed are a "
            f"square with {prefix} prefix rows and without"
        )
    state["pos_embed"] = fits[0]
    return None if fits[0] is table else f"{rows} → {fits[0].shape[1]} rows, {policy}"


def fit_patches(state: dict[str, torch.Tensor], patch_size: int | None) -> str | None:
    """Gives patch weights of old files, a matrix [C, in_chans·P·P], their four axes, in place.

    Returns:
        a note, or None where nothing changed.
    Raises:
        WeightsError: ``patch_size`` is None or does not divide the columns.
    """
    old = state.get("patch_embed.proj.weight")
    if old is None or old.dim() != 2:
        return None
    columns = old.shape[1]
    if patch_size is None or columns % patch_size**2:
        raise WeightsError(
            f"vit_fast.checkpoints: patch_size is {patch_size}, expected the side of the patches: "
            f"patch_embed.proj.weight has {columns} columns, in_chans · patch_size²"
        )
    channels = columns // patch_size**2
    state["patch_embed.proj.weight"] = old.reshape(old.shape[0], channels, patch_size, patch_size)
    return f"{columns} columns → {channels}×{patch_size}×{patch_size}"


def fit_channels(state: dict[str, torch.Tensor], in_chans: int) -> tuple[str, str | None]:
    """Gives the first convolution of a state_dict in timm's keys another number of channels, in place.

    Returns:
        (its key, a note, or None where nothing changed).
    Raises:
        WeightsError: there is no such convolution.
    """
    for key in FIRST_CONVOLUTIONS:
        if key in state:
            have = state[key].shape[1]
            state[key] = adapt_in_chans(state[key], in_chans)
            return key, None if have == in_chans else f"{have} → {in_chans} channels"
    raise WeightsError("vit_fast.checkpoints: in_chans is given, expected a checkpoint with a first convolution")


def adapt_in_chans(kernel: torch.Tensor, in_chans: int) -> torch.Tensor:
    """A first convolution [out, c, kh, kw] for another number of channels: summed for one, else tiled · c/in_chans."""
    have = kernel.shape[1]
    if have == in_chans:
        return kernel
    if in_chans == 1:
        return kernel.sum(1, keepdim=True)
    repeat = math.ceil(in_chans / have)
    return kernel.repeat(1, repeat, 1, 1)[:, :in_chans] * (have / in_chans)
