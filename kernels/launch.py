"""What the launches of all kernels share.

Device code: the wait of programmatic dependent launch (PDL), and where a row of a tensor begins.
Host code: the options of a launch, the layout of rows, dtypes of accumulators and statistics, the device guard, and
the reasons why a tensor cannot go to a Triton kernel.

PDL (capability 9.0 and later): a kernel launched with it may start while the kernel before it in the stream still runs,
so that its launch latency is hidden; ``pdl_wait`` at its top keeps it from memory until that kernel has finished.
"""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """First in a kernel. With PDL: lets the next kernel start too, then waits until the kernel before has finished and
    its writes are visible."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, TWO_STRIDES: tl.constexpr):
    """Element offset of a row (int64) under ``row_layout``."""
    if TWO_STRIDES:
        outer = row // inner
        return outer * stride_outer + (row - outer * inner) * stride_inner
    return row * stride_inner


INTERPRETED = not isinstance(row_offset, triton.JITFunction)


def _row_axes(x):
    """The leading axes of x [..., C] as [(size, stride)], innermost first, merged where one continues another."""
    axes = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, stride))
    return axes


def row_layout(x: Tensor) -> tuple[Any, ...]:
    """Where the rows of x [..., C] begin: (x, two_strides, inner, stride_outer, stride_inner).

    Row r begins at r·stride_inner or, with two strides, at (r // inner)·stride_outer + (r % inner)·stride_inner, as in
    x[:, 1:] of a [B, N, C] tensor. An x whose leading axes need three strides is copied.
    """
    width = x.shape[-1]
    if x.is_contiguous():
        return x, False, 0, 0, width
    axes = _row_axes(x)
    if len(axes) > 2:
        return x.contiguous(), False, 0, 0, width
    if len(axes) == 2:
        return x, True, axes[0][0], axes[1][1], axes[0][1]
    return x, False, 0, 0, axes[0][1] if axes else 0


def row_stride(x: Tensor) -> int | None:
    """The one stride between the rows of x [..., C]; None where they need more than one."""
    axes = _row_axes(x)
    if len(axes) > 1:
        return None
    return axes[0][1] if axes else x.shape[-1]


def vector_bytes(t: Tensor, *steps: int) -> int:
    """The widest piece, at most 16 bytes, that one aligned load can take at any multiple of ``steps`` (elements)."""
    if t.data_ptr() % 16:
        return t.element_size()
    return min(16, t.element_size() * math.gcd(16, *steps))


def vector(v: Tensor | None) -> Tensor | None:
    """A parameter vector [C] as the kernels read it: contiguous."""
    return v if v is None or v.is_contiguous() else v.contiguous()


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The torch dtype of statistics over elements of ``dtype``: float32, for float64 itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(*dtypes: torch.dtype) -> Any:
    """The Triton dtype in which products and sums of these dtypes are accumulated."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def dot_precision() -> str:
    """``input_precision`` of float32 products: IEEE, unless ``torch.set_float32_matmul_precision`` allows TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device of x is the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def options(pdl: bool, num_warps: int, **more: Any) -> dict[str, Any]:
    """The keyword arguments of a launch that say how it runs, with PDL where ``pdl``."""
    more.update(PDL=pdl, num_warps=num_warps)
    return more | {"launch_pdl": True} if pdl else more


def device_reasons(*tensors: Tensor | None) -> list[str]:
    """Why these tensors cannot go to a Triton kernel at all; empty where they can."""
    if INTERPRETED:
        return []
    reasons = []
    devices = {t.device.type for t in tensors if t is not None}
    if devices != {"cuda"}:
        reasons.append(f"tensors on {', '.join(sorted(devices))}, Triton kernels need a CUDA device")
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        reasons.append("float64 runs in the interpreter only")
    return reasons
