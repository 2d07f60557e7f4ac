"""timm's Beit and VisionTransformerRelPos: blocks with a bias of the scores by relative position.

The bias is made of the model's own table or MLP in every call, as timm makes it, so that its gradient reaches them.
Source: timm/models/beit.py, timm/models/vision_transformer_relpos.py, timm/layers/pos_embed_rel.py.
"""

from typing import Any

import timm.models.beit as beit
import timm.models.vision_transformer_relpos as relpos
import torch
from torch import nn

from vit_fast.integrations import Fused
from vit_fast.plain import submodules

from .parts import DROP_PATHS, MLP, NORMS, SCALES, PostNormBlock, PreNormBlock, attention_submodules, layer_scales


class FastBeitBlock(PreNormBlock, beit.Block):
    """Pre-norm block; the bias is that of its own table, of one that the blocks share, or the sum of both."""

    ARGUMENTS = ("shared_rel_pos_bias",)
    BIAS = "shared_rel_pos_bias"
    SUBMODULES = submodules(
        norm1=NORMS,
        **attention_submodules(beit.Attention),
        drop_path1=DROP_PATHS,
        norm2=NORMS,
        **MLP,
        drop_path2=DROP_PATHS,
    )
    gamma_1: Any
    gamma_2: Any

    def gammas(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.gamma_1, self.gamma_2

    def bias(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        attn: Any = self._modules["attn"]
        if attn._parameters.get("relative_position_bias_table") is None:
            return mask
        own: torch.Tensor = attn._get_rel_pos_bias()
        return own if mask is None else own + mask


class _RelPos:
    """Where the bias of the scores comes from: the block's own module, or one that is shared by the blocks."""

    ARGUMENTS: tuple[str, ...] = ("shared_rel_pos",)
    BIAS = "shared_rel_pos"
    CALLED: tuple[str, ...] = ("attn.rel_pos",)
    attn: Any

    def bias(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        return mask if self.attn.rel_pos is None else self.attn.rel_pos.get_bias()


class FastRelPosBlock(_RelPos, PreNormBlock, relpos.RelPosBlock):
    SUBMODULES = submodules(
        norm1=NORMS,
        **attention_submodules(relpos.RelPosAttention),
        ls1=SCALES,
        drop_path1=DROP_PATHS,
        norm2=NORMS,
        **MLP,
        ls2=SCALES,
        drop_path2=DROP_PATHS,
    )
    ls1: Any
    ls2: Any

    def gammas(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return layer_scales(self)


class FastResPostRelPosBlock(_RelPos, PostNormBlock, relpos.ResPostRelPosBlock):
    SUBMODULES = submodules(
        **attention_submodules(relpos.RelPosAttention),
        norm1=NORMS,
        drop_path1=DROP_PATHS,
        **MLP,
        norm2=NORMS,
        drop_path2=DROP_PATHS,
    )


FAST: dict[type[nn.Module], type[Fused]] = {
    beit.Block: FastBeitBlock,
    relpos.RelPosBlock: FastRelPosBlock,
    relpos.ResPostRelPosBlock: FastResPostRelPosBlock,
}
