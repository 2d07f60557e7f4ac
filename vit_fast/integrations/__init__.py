"""What the fast classes of the libraries share: when a block may run fused, and the row that holds such blocks.

A file of this folder serves one library and is imported only where that library is. ``vit_fast.optimize`` swaps
``module.__class__`` for a fast class, a subclass of the library's own without fields. It decides ahead of each call:
where something is in the way, the library's own forward runs, so that every hook of an inner module fires. It has

    PARTS              path of each sub-module → the classes it may have (``vit_fast.plain``)
    not_covered(self)  what its formula does not cover, or None; asked of the library's instance too, before the swap
    params(self)       its weights (``BlockParams``), where its row can be prepared

and the file has ``FAST``, class → fast class, ``find(model)``: (name, module, class of the library) of what it may
serve, instances of subclasses too, and perhaps ``ROWS``, class → fast class of what holds a row of blocks.
"""

import torch
from torch import nn

from vit_fast.block import run_blocks
from vit_fast.plain import TENSORS, Fusible, not_fused_reason

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by the word of nn.GELU


class Row(nn.Sequential):
    """A row of fast blocks: the blocks one by one, or all at once where ``vit_fast.prepare`` has prepared them."""

    def forward(self, input):
        return run_blocks(self, input)

    @staticmethod
    def row(module):
        """The blocks of a module that may become this class."""
        return module


class Fused(Fusible):
    """Base of the fast classes, in front of the library's class."""

    def is_fused(self) -> bool:
        """Whether the block runs fused: all of its parts are plain."""
        return not_fused_reason(self, type(self)) is None


def unknown_parts(module, fast) -> list[str]:
    """Sub-modules that a fast class does not know: a library's newer version may run them."""
    return sorted({name for name, _ in module.named_modules()} - {name for name, *_ in fast.PARTS} - {""})


def absent(args, kwargs) -> bool:
    """Whether optional arguments, masks above all, are left out, None or False."""
    return all(value is None or value is False for value in (*args, *kwargs.values()))


def is_dense(x, dims) -> bool:
    """Whether x is a plain tensor of so many dimensions, and no tracer of torch.fx or torch.jit watches it."""
    return type(x) in TENSORS and not x.is_nested and x.dim() == dims and not torch.jit.is_tracing()


def autocasts(x) -> bool:
    """Whether autocast is on for the device of x."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def takes(x, weight, *gammas) -> bool:
    """Whether x is a plain [B, N, C], in the dtype that the library's own forward would return: the fused branches
    return that of the residual."""
    if not is_dense(x, 3):
        return False
    if autocasts(x):
        low = torch.get_autocast_dtype(x.device.type)
        return x.dtype == torch.float32 or (x.dtype == low and all(gamma is None for gamma in gammas))
    return x.dtype == weight.dtype and all(gamma is None or gamma.dtype == x.dtype for gamma in gammas)


def rate(module) -> float:
    """The rate at which an ``nn.Dropout`` or a module that stands for none drops now."""
    return module.p if type(module) is nn.Dropout and module.training else 0.0


def instances(model, classes):
    """(name, module, class) of every module of the classes, of subclasses too."""
    for name, module in model.named_modules():
        for cls in classes:
            if isinstance(module, cls):
                yield name, module, cls


def multihead_not_covered(attn) -> str | None:
    """What the formula does not cover of an ``nn.MultiheadAttention``, or None."""
    if attn.in_proj_weight is None:
        return "q, k and v differ in width"
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        return "its attention adds keys"
    if not attn.batch_first:
        return "its attention is not batch_first"
    return None
