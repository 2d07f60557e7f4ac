"""Launch configurations as data: a frozen dataclass per kernel and the rule that picks one.

``arch`` is 10·major + minor of the compute capability (80, 90, 100). Tiles come from ahead-of-time
compiles (no spills, wgmma not serialised, shared memory within the limit), not from timings:
where a figure was measured on a GPU, its machine, date and commit stand beside the entry.
"""

from dataclasses import dataclass

import torch


def arch_of(device):
    """10·major + minor of a CUDA device; tensors elsewhere (interpreter) take the tiles of sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class LayerNormConfig:
    rows: int  # rows per program, while a row fits in one block
    block: int
    num_warps: int


def pick_layer_norm_config(width):
    """Depends on the width alone, so that the sums of a row are taken in one order at every batch size."""
    block = max(16, 1 << (width - 1).bit_length())
    if block > 16384:
        return LayerNormConfig(rows=1, block=4096, num_warps=8)
    return LayerNormConfig(rows=max(1, 4096 // block), block=block, num_warps=4 if block <= 4096 else block // 1024)


@dataclass(frozen=True)
class LinearConfig:
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    descriptors: bool  # tiles by TMA where addresses and strides allow it
