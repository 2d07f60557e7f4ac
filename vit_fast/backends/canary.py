"""A first look at a compiled library: small calls of its operations against the reference, when it is loaded.

A library that was compiled wrongly, or whose kernels a processor runs wrongly, gives other numbers and no error. These
calls take some milliseconds, and find what is grossly wrong; ``vit_fast.doctor()`` holds each operation to its error
budget.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vit_fast.kernels import folding, packing, reference
from vit_fast.kernels.tracing import untraced

_WIDTH, _HIDDEN, _HEADS, _TOKENS = 48, 80, 2, 7  # no multiples of what a vector or a panel holds
_EPS = 1e-6
# The largest error allowed, relative to the largest value. Roundings of 16-bit numbers are 0.4 %; a step of int8 0.8 %.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_INT8_TOLERANCE = 1e-1  # against weights that are not quantised: 2 % where all is right

_Call = tuple[str, Callable[..., torch.Tensor], tuple[Any, ...], float]  # operation, reference, arguments, tolerance


def _calls(dtype: torch.dtype) -> Iterator[_Call]:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.rand(*shape, generator=draw, device="cpu") * (2 * spread) - spread).to(dtype)

    def linear(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random(outputs, inputs, spread=(3 / inputs) ** 0.5), random(outputs)

    def norm() -> tuple[torch.Tensor, torch.Tensor]:
        return 1 + random(_WIDTH, spread=0.3), random(_WIDTH)

    x, tolerance = random(2, _TOKENS, _WIDTH), _TOLERANCE[dtype]
    yield "layer_norm", reference.layer_norm, (x, *norm(), _EPS), tolerance
    yield "attention", reference.attention, (random(2, _TOKENS, 3 * _WIDTH), _HEADS, 0.3), tolerance
    fc1, fc2 = linear(_HIDDEN, _WIDTH), linear(_WIDTH, _HIDDEN)
    mlp = (x, *norm(), _EPS, *fc1, *fc2, "gelu", random(_WIDTH))
    yield "layernorm_mlp", reference.layernorm_mlp, mlp, tolerance
    images, patch = random(1, 3, 12, 12), random(_WIDTH, 3, 4, 4, spread=0.25)
    yield "patch_embed", reference.patch_embed, (images, patch, random(_WIDTH), None, None, (4, 4)), tolerance
    block = norm(), linear(3 * _WIDTH, _WIDTH), linear(_WIDTH, _WIDTH), random(_WIDTH), norm(), fc1, fc2, random(_WIDTH)
    packed, shape = folding.flatten([packing.packed_block(*block, "gelu")]), (_HEADS, 0.3, "gelu", _EPS, _EPS)
    yield "packed_blocks", reference.packed_blocks, (x, packed, *shape), tolerance
    if dtype == torch.float32:  # its products are the same in all dtypes
        quantised, golden = (
            folding.flatten([packing.int8_block(*block, "gelu")]),
            functools.partial(_not_quantised, packed),
        )
        yield "int8_blocks", golden, (x, quantised, *shape), _INT8_TOLERANCE


def _not_quantised(packed: list[torch.Tensor], x: torch.Tensor, _: Any, *shape: Any) -> torch.Tensor:
    """The truth of int8, whose own reference takes 5 ms to set up."""
    out: torch.Tensor = reference.packed_blocks(x, packed, *shape)
    return out


def _wide(value: Any) -> Any:
    """Floating tensors in float32, in which the reference has no 16-bit kernels to set up."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return [_wide(one) for one in value] if isinstance(value, list) else value


@untraced
def _wrong(forward: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
    """What is wrong, one line for an operation and a dtype; nothing where a call is right."""
    for dtype in _TOLERANCE:
        for operation, truth, arguments, tolerance in _calls(dtype):
            if operation not in forward:
                continue
            named = f"{operation} in {str(dtype).removeprefix('torch.')}"
            try:
                out = forward[operation](*arguments)
            except Exception as error:  # a library may raise anything
                yield f"{named} raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            out = out[0] if isinstance(out, tuple) else out
            golden = truth(*map(_wide, arguments))
            found = ((out.float() - golden).abs().max() / golden.abs().max()).item()
            if not found <= tolerance:  # NaN too
                yield f"{named} has a relative error of {found:.1e}, allowed {tolerance:.0e}"


def reasons(name: str, forward: Mapping[str, Callable[..., Any]], remedy: str) -> tuple[str, ...]:
    """Why the functions of a library are not to be trusted on this machine, with one warning; empty where they are."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        wrong = tuple(_wrong(forward))
    if not wrong:
        return ()
    reason = f"the {name} extension computes wrong results on this machine: {'; '.join(wrong)}"
    warnings.warn(f"vit_fast: {reason}; the next backend is used. {remedy}", RuntimeWarning, stacklevel=3)
    return (reason,)
