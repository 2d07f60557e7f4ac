"""timm's Eva (EVA-02, DINOv3, PE, RoPE ViTs, Sapiens2), NaFlexVit with RoPE, Qwen3 and DeepSeek: blocks with rotary
position embedding.

Source: timm/models/eva.py, timm/models/deepseek_vit.py.
"""

from typing import Any

import timm.layers as layers
import timm.models.eva as eva
import torch
from torch import nn

from vit_fast.integrations import Fused
from vit_fast.plain import submodules

from .parts import (
    DROP_PATHS,
    MLP,
    NORM_OR_NONE,
    NORMS,
    OPTIONAL,
    PostNormBlock,
    PreNormBlock,
    attention_submodules,
)

_ATTENTION = (eva.EvaAttention, *((layers.AttentionRope,) if hasattr(layers, "AttentionRope") else ()))
_PARTS = dict(
    norm1=NORMS,
    **attention_submodules(
        *_ATTENTION, norm=NORM_OR_NONE, gate=OPTIONAL, q_proj=OPTIONAL, k_proj=OPTIONAL, v_proj=OPTIONAL
    ),
    drop_path1=DROP_PATHS,
    norm2=NORMS,
    **MLP,
    drop_path2=DROP_PATHS,
)


class FastEvaBlock(PreNormBlock, eva.EvaBlock):
    """Pre-norm block; ``rope`` is timm's table of sines and cosines, [N, 2D] or broadcast to [B, H, N, 2D]."""

    ARGUMENTS = ("rope", "attn_mask", "is_causal")
    SUBMODULES = submodules(**_PARTS)
    gamma_1: Any
    gamma_2: Any

    def gammas(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.gamma_1, self.gamma_2


class FastEvaBlockPostNorm(PostNormBlock, eva.EvaBlockPostNorm):
    """Post-norm block; ``rope`` as in ``FastEvaBlock``."""

    ARGUMENTS = ("rope", "attn_mask", "is_causal")
    SUBMODULES = submodules(**_PARTS)


FAST: dict[type[nn.Module], type[Fused]] = {
    eva.EvaBlock: FastEvaBlock,
    eva.EvaBlockPostNorm: FastEvaBlockPostNorm,
}

try:
    from timm.models.deepseek_vit import DeepseekVitBlock
except ImportError:  # older timm has none
    pass
else:

    class FastDeepseekVitBlock(PreNormBlock, DeepseekVitBlock):
        """Pre-norm block with RMSNorm; ``rope`` as in ``FastEvaBlock``."""

        ARGUMENTS = ("rope",)
        SUBMODULES = submodules(**_PARTS)

    FAST[DeepseekVitBlock] = FastDeepseekVitBlock
