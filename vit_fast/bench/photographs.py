"""Real pixels for a benchmark: the user's photographs, or the sample photograph that matplotlib ships."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError, require

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Photographs:
    """``pixels`` is float32 [count, channels, height, width], normalised; ``skipped`` names unreadable files."""

    pixels: "torch.Tensor"
    source: str
    skipped: list[str]


def _decode(path, mode):
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert(mode)


def _folder(folder, count, mode):
    """The first ``count`` readable images below a folder, in the order of their names, and the unreadable files."""
    if not folder.is_dir():
        raise BenchError(f"--images: {folder} is not a folder; wanted a folder of photographs")
    try:
        os.listdir(folder)  # raises if unreadable; rglob would skip it silently
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise BenchError(f"--images: {folder} cannot be read: {error.strerror}") from error
    images, skipped = [], []
    for path in files:
        if len(images) == count:
            break
        try:
            images.append(_decode(path, mode))
        except Exception as error:  # decoders raise on foreign files without a common class; the caller tells them
            skipped.append(f"{path}: {type(error).__name__}: {error}")
    if not images:
        what = f"none of its {len(files)} files is a readable image" if files else "it is empty"
        first = f", the first: {skipped[0]}" if skipped else ""
        raise BenchError(f"--images: no photograph in {folder}: {what}{first}")
    return images, skipped


def check_folder(folder: Path | None) -> None:
    """Raises BenchError unless a folder (None: matplotlib's sample photograph) holds a readable image."""
    if folder is not None:
        require("PIL.Image", "bench")
        _folder(folder, 1, "RGB")


def _sample(mode):
    cbook = require("matplotlib.cbook", "bench")
    return _decode(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), mode)


def _views(images, count, width, height):
    """``count`` crops of the target's aspect ratio: the largest centred ones first, then random and mirrored ones."""
    from PIL import Image, ImageOps

    draw = random.Random(0)
    for index in range(count):
        image = images[index % len(images)]
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        mirrored = False
        if index >= len(images):
            scale *= draw.uniform(0.4, 0.95)
            left = draw.uniform(0, image.width - scale * width)
            top = draw.uniform(0, image.height - scale * height)
            mirrored = draw.random() < 0.5
        box = (left, top, left + scale * width, top + scale * height)
        view = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        yield ImageOps.mirror(view) if mirrored else view


def load(
    folder: Path | None, count: int, height: int, width: int, mean: Sequence[float], std: Sequence[float]
) -> Photographs:
    """``count`` different normalised images.

    Args:
        folder: of photographs, searched with its subfolders; None takes matplotlib's sample photograph.
        mean, std: per channel, of pixels in 0…1; their length is the number of channels (1 or 3).

    Raises:
        BenchError: no such folder, or no readable photograph in it.
    """
    require("PIL.Image", "bench")
    import numpy as np
    import torch

    mode = {1: "L", 3: "RGB"}.get(len(mean))
    if mode is None:
        raise BenchError(f"photographs have 1 or 3 channels, the model wants {len(mean)}")
    if folder is None:
        images, skipped = [_sample(mode)], []
        source = "matplotlib's sample photograph grace_hopper.jpg"
    else:
        images, skipped = _folder(Path(folder), count, mode)
        source = f"{len(images)} photograph{'s' if len(images) > 1 else ''} of {folder}"
    if len(images) < count:
        source += f", {count} different crops and mirror images"
    pixels = torch.empty(count, len(mean), height, width)  # at once, so that too many fail at once
    for index, view in enumerate(_views(images, count, width, height)):
        channels_last = np.array(view).reshape(height, width, len(mean))
        pixels[index] = torch.from_numpy(channels_last).permute(2, 0, 1)
    pixels /= 255
    per_channel = (1, -1, 1, 1)
    return Photographs(
        (pixels - torch.tensor(mean).view(per_channel)) / torch.tensor(std).view(per_channel), source, skipped
    )
