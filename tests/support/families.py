"""A small model of every family, and its first output."""

import torch
from support import models

import vit_fast
from vit_fast import systems

SMALL = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)


HYBRID = {
    "patches": {"size": (8, 8)},
    "hidden_size": 12,
    "transformer": dict(mlp_dim=16, num_heads=3, num_layers=1, attention_dropout_rate=0.0, dropout_rate=0.0),
    "classifier": "token",
    "representation_size": None,
}


RESNET = HYBRID | {"patches": {"size": (1, 1)}, "resnet": {"num_layers": (1,), "width_factor": 0.5}}


CLIP = dict(patch_size=8, width=16, layers=1, heads=2, output_dim=6)


T2T = dict(img_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3, token_dim=4)


def vit(**kwargs):
    return vit_fast.VisionTransformer(**SMALL | kwargs)


# name → (a small model, the shape of an image)
FAMILIES = {
    "vit": (lambda: vit(reg_tokens=1, qk_norm=True, init_values=0.1), (3, 16, 16)),
    "vit at another size": (lambda: vit(dynamic_img_size=True, dynamic_img_pad=True), (3, 20, 16)),
    "vit, MAP pooling, SwiGLU": (lambda: vit(global_pool="map", mlp_layer="swiglu"), (3, 16, 16)),
    "clip": (lambda: systems.clip.build("openai", input_resolution=16, **CLIP), (3, 16, 16)),
    "clip_reid": (
        lambda: systems.clip_reid.build(4, stride_size=4, h_resolution=3, w_resolution=3, **CLIP),
        (3, 16, 16),
    ),
    "deit": (lambda: systems.deit.build(distilled=True, **SMALL), (3, 16, 16)),
    "deit, literal": (lambda: systems.deit.build(compat="literal", **SMALL), (3, 16, 16)),
    "scratch": (lambda: systems.scratch.build(num_layers=1), (3, 8, 8)),
    "t2t": (lambda: systems.t2t.build(**T2T), (3, 16, 16)),
    "t2t, transformer": (lambda: systems.t2t.build(tokens_type="transformer", **T2T), (3, 16, 16)),
    "lanl": (
        lambda: systems.lanl.build("ViT_Model", img_size=(1, 16, 16), patch_size=8, token_len=8, depth=1),
        (1, 16, 16),
    ),
    "lanl, t2t": (
        lambda: systems.lanl.build(
            "T2T_ViT", img_size=(1, 16, 16), softsplit_kernels=(7, 3, 3), token_len=8, token_chan=4, depth=1
        ),
        (1, 16, 16),
    ),
    "hybrid": (lambda: systems.hybrid.build(config=HYBRID, img_size=16, num_classes=3), (3, 16, 16)),
    "hybrid, ResNet": (lambda: systems.hybrid.build(config=RESNET, img_size=32, num_classes=3), (3, 32, 32)),
}  # fmt: skip


def perturb(model):
    return models.perturb(model, seed=1, scale=0.1).eval()


def family(name):
    """(model, two images, five images)."""
    build, shape = FAMILIES[name]
    return perturb(build()), torch.randn(2, *shape), torch.randn(5, *shape)


def first(out):
    """The first tensor of what a model returns."""
    while not isinstance(out, torch.Tensor):
        out = out[0]
    return out.detach()
