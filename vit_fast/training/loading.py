"""Batches of a data set. Which images a batch has depends on seed, epoch and number of processes, how an image is
augmented on seed, epoch and image: neither on the number of workers nor on where a run was stopped and went on."""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from .datasets import Images
from .errors import TrainingError
from .parallel import Processes
from .settings import Settings

Batch = tuple[torch.Tensor, torch.Tensor]
NOT_COUNTED = -1


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the generators of random, numpy and torch's CPU from a key in its block, and puts them back after it."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Transformed(Dataset):
    """(tensor [C, H, W], label) of each image; ``epoch`` seeds what the transform draws."""

    def __init__(self, images: Images, transform: Any, seed: int) -> None:
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images.image(index)
        with seeded(self.seed, self.epoch, index):
            return self.transform(image), self.images.labels[index]


def transforms(settings: Settings, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """timm's transforms to train and to validate with.

    Args:
        data_config: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` of the model.
    Raises:
        TrainingError: an augmentation that timm does not have.
    """
    from timm.data import create_transform

    shared = {key: data_config[key] for key in ("input_size", "mean", "std", "interpolation")}
    try:
        train = create_transform(
            **shared,
            is_training=True,
            no_aug=settings.no_aug,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.aa,
            re_prob=settings.reprob,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, LookupError) as error:
        if settings.aa is None:
            raise
        raise TrainingError(f"--aa is {settings.aa!r}, expected a policy of timm: {error}") from error
    return train, create_transform(**shared, crop_pct=data_config["crop_pct"])


class TrainingBatches:
    """The batches of each epoch that one process trains on; images that do not fill a batch are left out.

    Attributes:
        count: batches of an epoch.
    """

    def __init__(self, images: Images, transform: Any, settings: Settings, processes: Processes) -> None:
        self.dataset = Transformed(images, transform, settings.seed)
        self.settings, self.processes = settings, processes
        self.sampler: DistributedSampler[int] = DistributedSampler(
            self.dataset, processes.count, processes.rank, shuffle=True, seed=settings.seed, drop_last=True
        )
        self.count = len(self.sampler) // settings.batch_size
        if not self.count:
            raise TrainingError(
                f"--batch-size is {settings.batch_size}, expected {len(self.sampler)} or less: {len(self.dataset)} "
                f"images to train on, for {processes.count} processes"
            )

    def epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch but for the first ``skip``."""
        self.sampler.set_epoch(epoch)
        self.dataset.epoch = epoch
        batches = list(BatchSampler(self.sampler, self.settings.batch_size, drop_last=True))[skip:]
        return _loaded(self.dataset, batches, self.settings, self.processes)


class ValidationBatches:
    """The batches that one process validates on: every image once, each in one of the processes.

    All processes have the same number of batches, as FSDP2 and the buffers of DDP want it. What a process has too few
    images for is a batch of one image with the label ``NOT_COUNTED``.
    """

    def __init__(self, images: Images, transform: Any, settings: Settings, processes: Processes) -> None:
        self.dataset = Transformed(images, transform, settings.seed)
        self.settings, self.processes = settings, processes

    def __iter__(self) -> Iterator[Batch]:
        own = range(self.processes.rank, len(self.dataset), self.processes.count)
        size = self.settings.validation_batch_size or self.settings.batch_size
        longest = -(-len(self.dataset) // self.processes.count)
        batches = [list(own[start : start + size]) for start in range(0, longest, size)]
        loaded = _loaded(self.dataset, [batch or [0] for batch in batches], self.settings, self.processes)
        for batch, (images, labels) in zip(batches, loaded, strict=True):
            yield images, labels if batch else torch.full_like(labels, NOT_COUNTED)


def _loaded(
    dataset: Transformed, batches: list[list[int]], settings: Settings, processes: Processes
) -> Iterator[Batch]:
    device = processes.device
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(settings.workers, len(batches)),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise every epoch takes a number from torch's own
    )
    try:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except TrainingError as error:  # a worker puts its traceback before the text
        raise TrainingError(str(error).rpartition("TrainingError: ")[2].strip()) from None
