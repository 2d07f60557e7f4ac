"""Model families: the arguments, outputs, parameter names and weight files of published ViT programs.

clip       CLIP's image tower: OpenAI, CLIP-ReID, open_clip, and a plain one          clip_reid  its ReID classifier
deit       DeiT and timm's older ViT: distillation, pre-logits
hybrid     the config-driven ViT (jeonsworld, Google) and its ResNetV2 hybrids        resnetv2   their ResNet
scratch    a ViT around torch's TransformerEncoder
lanl       LANL's ViT and T2T-ViT
t2t        T2T-ViT

Shared: encoder_layer (torch's encoder layer on fused branches), soft_split (overlapping windows, sinusoid table),
arguments (checks of arguments and images, reading of state_dicts).

A family has ``build(**the original's arguments)``, ``load(model, state_dict or path)`` and ``PRESETS``; its presets are
models of ``vit_fast.create_model`` too. Every ``load`` resizes position tables by ``resize_pos_embed``.
"""

from vit_fast.pos_embed import resize_pos_embed
from vit_fast.presets import register

from . import clip, clip_reid, deit, hybrid, lanl, scratch, t2t

__all__ = ["clip", "clip_reid", "deit", "hybrid", "lanl", "resize_pos_embed", "scratch", "t2t"]

for _family in (clip, deit, hybrid, lanl, scratch, t2t):
    for _name, _arguments in _family.PRESETS.items():
        register(_name, build=_family.build, **_arguments)
