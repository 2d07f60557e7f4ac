"""A patch projection for another patch size.

A patch resized by B, projected with the new weight, gives what the old patch gave with the old one: new = old pinv(B).
Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", 2022.
"""

import torch
import torch.nn.functional as F


def resize_patch_embed(weight: torch.Tensor, new_size: tuple[int, int]) -> torch.Tensor:
    """A weight [C, in_chans, Ph, Pw] for patches of ``new_size``, in its own dtype; bicubic as in timm."""
    old_size = tuple(weight.shape[2:])
    if old_size == tuple(new_size):
        return weight
    pixels = old_size[0] * old_size[1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    basis = torch.eye(pixels, device=weight.device, dtype=dtype).unflatten(1, (1, *old_size))
    resized = F.interpolate(basis, size=new_size, mode="bicubic", antialias=True, align_corners=False)
    matrix = resized.flatten(1).T  # [new pixels, old pixels]
    return (weight.flatten(2).to(dtype) @ torch.linalg.pinv(matrix)).unflatten(2, new_size).to(weight.dtype)
