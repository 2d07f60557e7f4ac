"""Images by class: a folder with a sub-folder for each class, or scikit-learn's digits; the part kept for validation.

The digits are 1797 scans of handwritten digits, 8 × 8 pixels of 17 greys (E. Alpaydin and C. Kaynak, 1998, UCI). They
come with scikit-learn, so that training runs offline.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vit_fast.bench.errors import require

from .errors import TrainingError
from .settings import Settings

# Up to so many images are read whole before a run begins; of more the headers alone.
READ_WHOLE = 20_000
MODES = {1: "L", 3: "RGB"}


class Images(Protocol):
    """Images with labels."""

    @property
    def labels(self) -> Sequence[int]:
        """The class of each image."""

    def image(self, index: int) -> Any:
        """A PIL image."""


@dataclass(frozen=True)
class Data:
    """The images to train on and to validate on, and the names of the classes in the order of the labels."""

    train: Images
    val: Images
    classes: tuple[str, ...]


class FolderImages:
    """The images of files, in the colours of a model with ``in_chans`` channels."""

    def __init__(self, files: Sequence[tuple[Path, int]], in_chans: int) -> None:
        self.paths, self.labels = [path for path, _ in files], [label for _, label in files]
        self.mode = MODES[in_chans]

    def image(self, index: int) -> Any:
        """A PIL image; TrainingError names a file that cannot be read."""
        return _eight_bits(read_image(self.paths[index])).convert(self.mode)


class Digits:
    """Some of scikit-learn's digits, with the greys 0 … 16 spread over 0 … 255."""

    def __init__(self, pixels: Any, labels: Sequence[int], in_chans: int) -> None:
        self.pixels, self.labels, self.mode = (pixels * 255 / 16).round().astype("uint8"), labels, MODES[in_chans]

    def image(self, index: int) -> Any:
        """A PIL image of 8 × 8 pixels."""
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert(self.mode)


def read_image(path: Path, pixels: bool = True) -> Any:
    """The PIL image of a file, its pixels read too unless told otherwise."""
    from PIL import Image

    try:
        image = Image.open(path)
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels have 32 bits (mode {image.mode} of Pillow), expected 8 or 16")
        if pixels:
            image.load()
        return image
    except Exception as error:  # PIL's decoders raise errors of many classes on foreign bytes
        lines = str(error).splitlines() or [type(error).__name__]
        raise TrainingError(f"image {str(path)!r} cannot be read: {lines[0]}") from None


def _eight_bits(image: Any) -> Any:
    """An image of 16-bit greys with the upper 8 bits of each, which Pillow itself would clip at 255."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype("uint8"))


def _natural(path: Path) -> Any:
    """Names in the order of timm, by their numbers and without regard to case; no two are equal."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def _class_folders(folder: Path) -> list[Path]:
    found = sorted((path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."), key=_natural)
    if not found:
        raise TrainingError(f"--data-dir: {str(folder)!r} holds no class folders, expected a folder for each class")
    for path in found:
        undecodable = os.fsencode(path.name) != path.name.encode(errors="replace")
        if undecodable or "\n" in path.name:  # no safetensors file could hold the name
            raise TrainingError(f"--data-dir: class folder {str(path)!r}, expected a name of one line in UTF-8")
    return found


def _classes(folder: Path) -> tuple[str, ...]:
    found = tuple(path.name for path in _class_folders(folder))
    if len(found) < 2:
        raise TrainingError(f"--data-dir: {str(folder)!r} has {found[0]!r} as its only class, expected two or more")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """The files of a folder and of the folders in it, links to folders followed; each folder once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # which of two ways to a folder is gone does not depend on the file system
        yield from (Path(parent, name) for name in names)


def _images_of(folder: Path, others: list[Path]) -> list[Path]:
    """The images of a class in the order of their paths; ``others`` gets what is none, but for hidden files."""
    from timm.data.readers.img_extensions import get_img_extensions
    from torchvision.datasets.folder import IMG_EXTENSIONS

    endings = tuple(sorted({*IMG_EXTENSIONS, *get_img_extensions()}))
    found = []
    for path in sorted(_below(folder)):
        if path.name.lower().endswith(endings):
            found.append(path)
        elif path.name[0] != ".":
            others.append(path)
    if not found:
        raise TrainingError(f"--data-dir: class folder {str(folder)!r} holds no images ({', '.join(endings)})")
    return found


def _files(folder: Path, classes: Sequence[str], others: list[Path]) -> Iterator[tuple[Path, int]]:
    for path in _class_folders(folder):
        if path.name not in classes:
            raise TrainingError(f"--data-dir: {str(path)!r} is a class that the folder to train on does not have")
        yield from ((image, classes.index(path.name)) for image in _images_of(path, others))


def split(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices to validate on): that share of each class, at least one image, drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for label in sorted(set(labels)):
        own = [index for index, other in enumerate(labels) if other == label]
        if len(own) < 2:
            raise TrainingError("--val-share: a class has a single image, expected two or more to split it")
        order = torch.randperm(len(own), generator=generator).tolist()
        count = min(max(round(share * len(own)), 1), len(own) - 1)
        val += sorted(own[index] for index in order[:count])
        train += sorted(own[index] for index in order[count:])
    return train, val


def _folder(settings: Settings, in_chans: int, warn: Callable[[str], None]) -> Data:
    folder = settings.data_dir
    assert folder is not None
    others: list[Path] = []
    names = (settings.train_split, settings.val_split)
    parts = [folder / name for name in names]
    if all(part.is_dir() for part in parts):
        classes = _classes(parts[0])
        both = [list(_files(part, classes, others)) for part in parts]
    elif any(part.is_dir() for part in parts):
        missing = next(part for part in parts if not part.is_dir())
        raise TrainingError(f"--data-dir: {str(folder)!r} lacks {missing.name!r}, expected both or neither of {names}")
    else:
        classes = _classes(folder)
        files = list(_files(folder, classes, others))
        both = [
            [files[index] for index in part]
            for part in split([label for _, label in files], settings.val_share, settings.split_seed)
        ]
    paths = [path for files in both for path, _ in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda path: read_image(path, len(paths) <= READ_WHOLE).close(), paths):
            pass
    if others:
        endings = ", ".join(sorted({path.suffix.lower() or path.name for path in others})[:5])
        warn(f"--data-dir: {len(others)} files are no images by their names and are left out ({endings})")
    return Data(FolderImages(both[0], in_chans), FolderImages(both[1], in_chans), classes)


def _digits(settings: Settings, in_chans: int, warn: Callable[[str], None]) -> Data:
    digits = require("sklearn.datasets", "train").load_digits()
    labels = digits.target.tolist()
    train, val = (
        Digits(digits.images[part], [labels[index] for index in part], in_chans)
        for part in split(labels, settings.val_share, settings.split_seed)
    )
    return Data(train, val, tuple(str(name) for name in digits.target_names))


def load(settings: Settings, in_chans: int, warn: Callable[[str], None]) -> Data:
    """The data of a run. Every file of a folder is opened, so that a run does not end at one that cannot be read.

    Args:
        in_chans: channels that the model takes, 1 or 3.
        warn: told of files that are left out.
    Raises:
        TrainingError: a folder or class without images, a single class, a class of ``val_split`` alone, an image that
            cannot be read, a model of too few classes or of other channels.
    """
    if in_chans not in MODES:
        raise TrainingError(f"--in-chans is {in_chans}, expected 1 (grey) or 3 (RGB)")
    data = (_digits if settings.dataset == "digits" else _folder)(settings, in_chans, warn)
    if settings.num_classes is not None and settings.num_classes < len(data.classes):
        last = len(data.classes) - 1
        raise TrainingError(
            f"--num-classes is {settings.num_classes}, expected {len(data.classes)} or more: the class "
            f"{data.classes[last]!r} has the label {last}"
        )
    return data
