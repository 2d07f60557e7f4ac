"""Where the CPU extension is measured to be at least as fast as PyTorch, as data: ``cpu`` is chosen there alone.

PyTorch's own products are hard to beat on weights that are packed anew in every call, except in the 16-bit dtypes that
a processor cannot multiply: there PyTorch is several times slower than in float32. Stacks of prepared blocks, whose
weights are packed once, are always chosen.

Measured on one thread, CPU seconds, fastest of 9, on an AMD EPYC (Zen 4: AVX-512 with VNNI and BF16, no FP16), ViT-B
sizes at 16, 64, 197 and 1576 rows, torch 2.13.0, 2026-11-29; in brackets PyTorch's time over the extension's at 197
rows. A bfloat16 without instructions was measured on an Intel machine alone (docs/measured_facts.md).
"""

import torch

# Operation → the fewest rows from which it is chosen, None for never. Rows of a product; tokens of attention.
NATIVE_FLOAT32: dict[str, int | None] = {  # attention, patch_embed: equal within 5 %
    "layer_norm": None,  # 0.56
    "layer_norm_linear": None,  # 0.83
    "linear_residual": None,  # 0.78
    "layernorm_mlp": None,  # 0.91
    "attention": None,  # 1.01
    "patch_embed": None,  # 1.00
}
NATIVE_BFLOAT16: dict[str, int | None] = {
    "layer_norm": None,  # 0.72
    "layer_norm_linear": None,  # 0.80
    "linear_residual": None,  # 0.84
    "layernorm_mlp": None,  # 0.85
    "attention": 32,  # 1.60
    "patch_embed": 64,  # 1.60
}
EMULATED_16_BIT: dict[str, int | None] = {
    "layer_norm": None,  # 0.67
    "layer_norm_linear": 16,  # 4.0
    "linear_residual": 16,  # 4.2
    "layernorm_mlp": 16,  # 4.0
    "attention": 16,  # 2.4
    "patch_embed": 16,  # 25
}


def fewest_rows(operation: str, dtype: torch.dtype, level: str) -> int | None:
    """From how many rows on the extension is chosen for an operation on weights of a dtype; None for never.

    Args:
        level: the instruction-set level whose kernels run.
    """
    if dtype == torch.float32:
        table = NATIVE_FLOAT32
    else:
        native = dtype == torch.bfloat16 and level == "avx512_bf16"
        table = NATIVE_BFLOAT16 if native else EMULATED_16_BIT
    return table[operation]
