"""Small runs of training: a folder of images that two classes of stripes fill, and the settings of a ViT for them."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from vit_fast.training.loop import Run
from vit_fast.training.parallel import Processes
from vit_fast.training.settings import Settings

ALONE = Processes(torch.device("cpu"))
SIDE = 16
VIT = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2)


def stripes(folder, count, classes=("across", "along"), seed=0):
    """Writes count images of each class: dark and light rows, or columns, with noise."""
    draw = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            waves = 127 + 90 * np.sin(np.arange(SIDE) * (1.2 + label // 2))
            pixels = np.broadcast_to(waves, (SIDE, SIDE)).T if label % 2 == 0 else np.broadcast_to(waves, (SIDE, SIDE))
            noisy = pixels[..., None] + draw.normal(0, 20, (SIDE, SIDE, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def settings(data, output, **changes):
    """Three epochs of four updates on a folder of 2 × 20 images."""
    small = Settings(
        model="vit_tiny_patch16_224",
        output=output,
        data_dir=data,
        img_size=SIDE,
        model_kwargs=VIT,
        batch_size=8,
        epochs=3,
        warmup_epochs=1,
        workers=0,
        scale=(0.5, 1.0),
    )
    return replace(small, **changes)


def run(one, resume=None, **callbacks):
    """A whole run; returns it."""
    made = Run(one, ALONE, lambda text: None, resume)
    made.fit(**callbacks)
    return made


def assert_same(one, other, path="state"):
    """That two states are equal to the bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}.{index}")
    else:
        assert one == other, path
