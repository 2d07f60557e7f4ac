"""Position-embedding tables of one grid resized to another.

The policies differ between the programs that published weights; R1 and R2 differ materially.

====  =========================================  ==========================================
R1    Google's JAX ViT                           bilinear, corners aligned
R2    timm ≤ 0.4.12, timm's .npz loader          bilinear
R3    CLIP-ReID, TransReID                       bilinear
R4    DeiT, T2T-ViT, timm 0.5–0.6                bicubic
R5    open_clip, timm ≥ 0.8                      bicubic, antialiased
====  =========================================  ==========================================
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .kernels.tracing import untraced

_POLICIES: dict[str, dict[str, Any]] = {
    "R1": dict(mode="bilinear", align_corners=True),
    "R2": dict(mode="bilinear", align_corners=False),
    "R3": dict(mode="bilinear", align_corners=False),
    "R4": dict(mode="bicubic", align_corners=False),
    "R5": dict(mode="bicubic", align_corners=False, antialias=True),
}


def check_policy(policy: str) -> str:
    """The policy itself, or ``ValueError`` naming the known ones."""
    if not isinstance(policy, str) or policy not in _POLICIES:
        raise ValueError(f"vit_fast: pos_embed policy is {policy!r}, expected one of {', '.join(_POLICIES)}")
    return policy


def _check_grid(name: str, grid: Any) -> tuple[int, ...]:
    pair = isinstance(grid, (tuple, list, torch.Size)) and len(grid) == 2
    if not pair or not all(isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) for size in grid):
        raise TypeError(f"vit_fast.resize_pos_embed: {name} is {grid!r}, expected a pair of ints")
    if any(size < 1 for size in grid):
        raise ValueError(f"vit_fast.resize_pos_embed: {name} is {tuple(grid)}, expected positive sizes")
    return tuple(grid)


def resize_pos_embed(
    table: torch.Tensor,
    old_grid: Sequence[int] | None,
    new_grid: Sequence[int],
    policy: str = "R5",
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """A table of position embeddings for another grid.

    Args:
        table: [1, K + gh·gw, C] or [K + gh·gw, C], row-major; the K prefix rows stay as they are, in front.
        old_grid: (gh, gw), or None for the square root of the count.
        new_grid: (gh, gw).
        policy: "R1" … "R5".
        num_prefix_tokens: K.
    Returns:
        the table in its own rank and dtype; the same tensor where the grids are equal.
    Raises:
        TypeError: a table that is no tensor, a grid that is no pair of ints.
        ValueError: unknown policy, or a table that does not hold the old grid.
    """
    check_policy(policy)
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"vit_fast.resize_pos_embed: table is {type(table).__name__}, expected a torch.Tensor")
    if table.dim() not in (2, 3):
        raise ValueError(f"vit_fast.resize_pos_embed: table has {table.dim()} dimensions, expected 2 or 3")
    new_grid = _check_grid("new_grid", new_grid)
    rows = table.shape[-2] - num_prefix_tokens
    if old_grid is None:
        side = math.isqrt(max(rows, 0))
        if side * side != rows or not rows:
            raise ValueError(
                f"vit_fast.resize_pos_embed: table has {table.shape[-2]} rows, expected "
                f"{num_prefix_tokens} prefix rows and a square, or old_grid=(rows, columns)"
            )
        old_grid = (side, side)
    else:
        old_grid = _check_grid("old_grid", old_grid)
    if rows != old_grid[0] * old_grid[1] or rows < 1:
        raise ValueError(
            f"vit_fast.resize_pos_embed: table has {table.shape[-2]} rows, "
            f"expected {num_prefix_tokens} prefix rows and a grid of {old_grid[0]}×{old_grid[1]}"
        )
    if old_grid == new_grid:
        return table
    if torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        # The TorchScript ONNX exporter has no antialiased bicubic interpolation: the resized table becomes a constant.
        return untraced(_resize)(table.detach(), old_grid, new_grid, policy, num_prefix_tokens)
    return _resize(table, old_grid, new_grid, policy, num_prefix_tokens)


def _resize(
    table: torch.Tensor, old_grid: Sequence[int], new_grid: Sequence[int], policy: str, num_prefix_tokens: int
) -> torch.Tensor:
    prefix, grid = table[..., :num_prefix_tokens, :], table[..., num_prefix_tokens:, :]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if grid.dtype in (torch.float16, torch.bfloat16):
        grid = grid.float()
    grid = F.interpolate(grid, size=new_grid, **_POLICIES[policy])
    grid = grid.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new_grid[0] * new_grid[1], -1).to(table.dtype)
    return torch.cat([prefix, grid], dim=-2) if num_prefix_tokens else grid
