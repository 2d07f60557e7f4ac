"""timm: the blocks of its ViTs, their stems and pooling on the fused operations, a file for each family.

    parts.py          what the blocks are made of, and the pre-norm and post-norm block
    vit.py            VisionTransformer, NaFlexVit, ViTamin, DeiT, hybrids
    eva.py            blocks with RoPE: Eva, EVA-02, DINOv3, PE, NaFlexVit, Qwen3, DeepSeek
    beit.py           bias by relative position: Beit, VisionTransformerRelPos
    sam.py            windows and decomposed relative position: VisionTransformerSAM
    gemma.py cait.py  Gemma4, CaiT
    patch_embed.py    PatchEmbed
    naflex.py         the patch embedding of NaFlexVit
    pool.py           AttentionPoolLatent

``FAMILY`` has timm's modules whose models are its ViT family, in ``vit_fast.coverage`` too.
"""

from collections.abc import Iterator

from torch import nn

from vit_fast.integrations import Found, Fused, instances

from . import beit, cait, eva, patch_embed, pool, sam, vit

FAST: dict[type[nn.Module], type[Fused]] = {
    **vit.FAST, **eva.FAST, **beit.FAST, **sam.FAST, **cait.FAST, **patch_embed.FAST, **pool.FAST
}  # fmt: skip
try:
    from . import gemma, naflex
except ImportError:  # older timm has none
    pass
else:
    FAST |= gemma.FAST | naflex.FAST

FAMILY = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "naflexvit",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vision_transformer_hybrid",
    "vitamin",
    "gemma4_vit",
    "qwen3_vit",
    "deepseek_vit",
    "cait",
)


def find(model: nn.Module) -> Iterator[Found]:
    return instances(model, FAST)
