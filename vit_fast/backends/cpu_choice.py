"""Where the CPU extension is measured to be at least as fast as PyTorch, as data: ``cpu`` is chosen there alone.

PyTorch's own products are hard to beat on weights that are packed anew in every call, except in the 16-bit dtypes that
a processor cannot multiply: there PyTorch is several times slower than in float32. Stacks of prepared blocks, whose
weights are packed once, are chosen, except where PyTorch multiplies their dtype with instructions that the extension
does not use (AMX, AVX512-FP16); such processors, and the level generic, were not measured.

Measured on one thread, CPU seconds, fastest of 9 and of 15, on an idle AMD EPYC (Zen 4: AVX-512 with VNNI and BF16, no
FP16), ViT-B sizes at 8, 16, 32, 64, 197, 577 and 1576 rows, torch 2.13.0, 2026-11-30 (``benchmarks/results/cpu/``); in
brackets PyTorch's time over the extension's at 197 rows. ``benchmarks/cpu_choice.py`` measures it again. A bfloat16
without instructions was measured on an Intel machine alone (docs/measured_facts.md).
"""

from collections.abc import Mapping
from typing import Any

import torch

# Operation → the fewest rows from which it is chosen, None for never. Rows of a product; tokens of attention.
NATIVE_FLOAT32: dict[str, int | None] = {
    "layer_norm": None,  # 0.76
    "layer_norm_linear": None,  # 0.87
    "linear_residual": None,  # 0.77
    "layernorm_mlp": None,  # 0.90
    "attention": 8,  # 1.15
    "patch_embed": None,  # 0.96
}
NATIVE_BFLOAT16: dict[str, int | None] = {
    "layer_norm": 256,  # 1.00, at 577 rows 1.16
    "layer_norm_linear": 577,  # 0.87, at 577 rows 1.12
    "linear_residual": None,  # 0.84
    "layernorm_mlp": 577,  # 0.85, at 577 rows 1.07
    "attention": 8,  # 1.84
    "patch_embed": 8,  # 1.39
}
EMULATED_16_BIT: dict[str, int | None] = {
    "layer_norm": 577,  # 0.89, at 577 rows 1.04
    "layer_norm_linear": 16,  # 4.1
    "linear_residual": 8,  # 4.0
    "layernorm_mlp": 16,  # 3.8
    "attention": 8,  # 2.6
    "patch_embed": 8,  # 24
}
_NEVER: dict[str, int | None] = dict.fromkeys(NATIVE_FLOAT32)

# Dtype → capabilities (``torch.cpu.get_capabilities()``) with which PyTorch multiplies it, and the extension does not.
_FASTER_IN_TORCH = {
    torch.bfloat16: ("amx_bf16", "sve_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


def faster_in_torch(dtype: torch.dtype, capabilities: Mapping[str, Any]) -> str | None:
    """The instructions with which PyTorch multiplies a dtype on this processor and the extension does not, or None."""
    return next((name for name in _FASTER_IN_TORCH.get(dtype, ()) if capabilities.get(name)), None)


def stack_reasons(dtype: torch.dtype, capabilities: Mapping[str, Any]) -> list[str]:
    """Why stacks of blocks with weights of a dtype are left to PyTorch; empty where they are packed."""
    if instructions := faster_in_torch(dtype, capabilities):
        return [f"PyTorch multiplies {str(dtype).removeprefix('torch.')} by {instructions}, the cpu extension does not"]
    return []


def fewest_rows(operation: str, dtype: torch.dtype, level: str, capabilities: Mapping[str, Any]) -> int | None:
    """From how many rows on the extension is chosen for an operation on weights of a dtype; None for never.

    Args:
        level: the instruction-set level whose kernels run.
        capabilities: what ``torch.cpu.get_capabilities()`` returns.
    """
    return _table(dtype, level, capabilities)[operation]


def is_never_chosen(dtype: torch.dtype, level: str, capabilities: Mapping[str, Any]) -> bool:
    """Whether ``fewest_rows`` is None for every operation."""
    return not any(_table(dtype, level, capabilities).values())


def _table(dtype: torch.dtype, level: str, capabilities: Mapping[str, Any]) -> dict[str, int | None]:
    if level == "generic" or faster_in_torch(dtype, capabilities):
        return _NEVER
    if dtype == torch.float32:
        return NATIVE_FLOAT32
    native = dtype == torch.bfloat16 and level == "avx512_bf16"
    return NATIVE_BFLOAT16 if native else EMULATED_16_BIT
