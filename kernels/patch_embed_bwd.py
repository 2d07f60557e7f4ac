"""The backward of ``patch_embed``, for float images without normalisation.

    dweight = dconvᵀ · patches,  dpos_embed = Σ over images of dconv,  dbias = Σ over images and patches of dconv
    dprefix = Σ over images of the prefix rows (or those rows, with a prefix for each image)

grad [B, K + N, C] with any strides: K prefix rows, then dconv, N patch rows. patches [B, K + N, in·P·Q] are copied out
of the images once (im2col, with K rows of zeros, so that grad is read in place), and multiplied by PyTorch (cuBLAS);
one copy of the images where patches do not overlap. Sums over images: ``column_sums`` of grad as [B, (K + N)·C], of
which that of the patch rows is summed once more for the bias.
The gradient of the pixels, which training does not want, is PyTorch's convolution_backward (cuDNN).
2·B·N·C·in·P·Q FLOP (twice with pixels); moves 2·B·(K + N)·C elements, and those of patches twice.
Limits: those of ``column_sums``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .column_sums import column_sums


def _patches(images: Tensor, weight: Tensor, stride: tuple[int, int], prefix: int) -> Tensor:
    """[B·(K + N), in·P·Q] in the weight's dtype; the rows of the prefix are zeros."""
    batch, channels = images.shape[:2]
    patch_h, patch_w = weight.shape[2:]
    found = images.unfold(2, patch_h, stride[0]).unfold(3, patch_w, stride[1]).permute(0, 2, 3, 1, 4, 5)
    rows, columns = found.shape[1:3]
    out = images.new_empty((batch, prefix + rows * columns, channels * patch_h * patch_w), dtype=weight.dtype)
    out[:, :prefix].zero_()
    out[:, prefix:].unflatten(1, (rows, columns)).unflatten(3, found.shape[3:]).copy_(found)
    return out.flatten(0, 1)


def patch_embed_bwd(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: tuple[int, int],
    *,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dimages, dweight, dbias, dpos_embed, dprefix_tokens), None where ``needs`` says so and for what is None."""
    needs = needs or (True,) * 5
    needs_dimages, needs_dweight = needs[:2]
    needs_dbias, needs_dpos, needs_dprefix = (
        need and t is not None for need, t in zip(needs[2:], (bias, pos_embed, prefix_tokens), strict=True)
    )
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    dconv, dimages, dweight, dbias, dpos, dprefix = grad[:, prefix:], None, None, None, None, None
    if needs_dimages:
        rows = (images.shape[2] - weight.shape[2]) // stride[0] + 1
        dimages = torch.ops.aten.convolution_backward(
            dconv.transpose(1, 2).unflatten(2, (rows, -1)).to(weight.dtype), images.to(weight.dtype), weight, None,
            stride, (0, 0), (1, 1), False, (0, 0), 1, (True, False, False),
        )[0].to(images.dtype)  # fmt: skip
    if needs_dweight:
        left = grad.to(weight.dtype).flatten(0, 1).t()
        dweight = (left @ _patches(images, weight, stride, prefix)).reshape(weight.shape)
    each = prefix_tokens is not None and prefix_tokens.shape[0] != 1
    sums = None
    if needs_dpos or (needs_dprefix and not each):
        sums = column_sums(grad.flatten(1)).unflatten(0, grad.shape[1:])
    if needs_dpos and sums is not None and pos_embed is not None:
        dpos = sums[prefix:].to(pos_embed.dtype, copy=True)[None]
    if needs_dbias and bias is not None:
        dbias = column_sums(dconv if sums is None else sums[prefix:], bias.dtype)
    if needs_dprefix and prefix_tokens is not None:
        dprefix = grad[:, :prefix] if each else sums[None, :prefix] if sums is not None else None
        dprefix = None if dprefix is None else dprefix.to(prefix_tokens.dtype, copy=True)
    return dimages, dweight, dbias, dpos, dprefix
