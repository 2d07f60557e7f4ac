"""Shared by the two T2T-ViTs and the LANL ViT: overlapping windows as tokens, and the sinusoid position table.

Source: Yuan et al., "Tokens-to-Token ViT", 2021; Vaswani et al., "Attention Is All You Need", 2017.
"""

from typing import Any

import torch
import torch.nn.functional as F

from vit_fast.kernels.tracing import untraced


def sinusoid_table(tokens: int, width: int) -> torch.Tensor:
    """[1, tokens, width] float32: sin (even channels) and cos (odd) of position / 10000^(2·⌊channel/2⌋/width).

    Computed in float64; any width; row 0 is 0, 1, 0, 1, ...
    """
    channel = torch.arange(width)
    position = torch.arange(tokens, dtype=torch.float64)
    exponent = (channel // 2 * 2).to(torch.float64) / width
    angle = position[:, None] / torch.pow(10000.0, exponent)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).to(torch.float32)[None]


def split_grid(size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(rows, columns) of windows: ⌊(size + 2·padding − kernel)/stride⌋ + 1 each; below 1 where none fits."""
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return rows, columns


@untraced
def _window_pixels(padded: Any, kernel: int, stride: int) -> list[torch.Tensor]:
    """The pixel rows [rows, kernel] and columns [columns, kernel] of the windows."""
    windows = split_grid(padded.shape[2:], kernel, stride, 0)
    offsets = torch.arange(kernel, device=padded.device)
    return [torch.arange(count, device=padded.device)[:, None] * stride + offsets for count in windows]


def _gathered(padded: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Two ``Tensor.unfold`` calls by indexing, as ONNX lacks unfold: [B, C, rows, columns, kernel, kernel]."""
    pixels = padded.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    return pixels.reshape(*padded.shape[:2], *rows.shape, *columns.shape).transpose(3, 4)


def soft_split(images: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Zero-padded windows as tokens: [B, C, H, W] → [B, rows·columns, C·kernel²], contiguous.

    Tokens are row-major; inside a token the channel is outermost, then window row, then window column.
    """
    padded = F.pad(images, (padding, padding, padding, padding)) if padding else images
    if torch.jit.is_tracing():
        windows = _gathered(padded, *_window_pixels(padded, kernel, stride))
    else:
        windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def as_image(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens back on their grid: [B, rows·columns, C] → [B, C, rows, columns], a view."""
    # unflatten would fix the batch size in ONNX
    return tokens.view(tokens.shape[0], *grid, tokens.shape[2]).permute(0, 3, 1, 2)
