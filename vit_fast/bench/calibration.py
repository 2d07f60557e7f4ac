"""The images that static quantisation is calibrated on: the user's photographs, or synthetic ones.

A synthetic image has what photographs have and noise lacks: an amplitude spectrum that falls as 1/frequency, channels
that go together, and its own brightness and contrast. The same images in every run.
"""

from typing import Any

import torch

from . import photographs
from .contest import input_of
from .settings import Settings


def load(settings: Settings, reference: Any, count: int) -> tuple[torch.Tensor, str]:
    """(float32 images [count, channels, height, width], normalised for the model, and their source)."""
    height, width, mean, std = input_of(reference, settings)
    if settings.images is not None:
        photos = photographs.load(settings.images, count, height, width, mean, std)
        return photos.pixels, photos.source
    shape = (-1, 1, 1)
    images = [
        (image - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        for image in synthetic(count, len(mean), height, width)
    ]
    return torch.stack(images), f"{count} synthetic images with the spectrum of photographs"


def synthetic(count: int, channels: int, height: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """``count`` images [channels, height, width] of values in 0…1."""
    draw = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    spectrum = 1 / frequency.clamp_min(1 / max(height, width))
    images = []
    for _ in range(count):
        noise = torch.randn(channels, height, width, generator=draw)
        image = torch.fft.irfft2(torch.fft.rfft2(noise) * spectrum, s=(height, width))
        image = 0.4 * image + 0.6 * image.mean(0)
        contrast, brightness = 0.1 + 0.2 * torch.rand(2, generator=draw)
        images.append(((image - image.mean()) / image.std() * contrast + 0.25 + 2.5 * (brightness - 0.1)).clamp(0, 1))
    return images
