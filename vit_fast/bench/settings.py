"""The settings of a benchmark of whole models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """The checked settings.

    Attributes:
        model: the model's name in timm, built with ``img_size`` and ``model_kwargs``.
        precision: dtype of weights and pixels, "float32" say; ``amp_dtype`` is autocast's or None.
        variants, baselines: names from ``providers``, in the order of the rows.
        warm_iterations, bench_iterations: calls before the timing, and timed calls, of each provider.
        weights: "random", "initial" or "structured" (``weights``); ``pretrained`` goes before it.
        images: folder of photographs; None takes a sample photograph.
        bench: "inference" or "train", as timm's flag.
        peak_rss: whether to measure each provider's peak resident memory in a process of its own.
        backend: forced backend of vit_fast; None leaves the choice to vit_fast and its environment variables.
        family: name of a family in ``families``, used instead of ``model``.
        load_average: the machine's, before the benchmark began.
    """

    model: str
    batch_sizes: tuple[int, ...]
    device: torch.device
    precision: str = "float32"
    amp_dtype: str | None = None
    img_size: int | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ("plain",)
    baselines: tuple[str, ...] = ("eager",)
    warm_iterations: int = 10
    bench_iterations: int = 40
    channels_last: bool = False
    pretrained: bool = False
    weights: str = "random"
    images: Path | None = None
    backend: str | None = None
    family: str | None = None
    load_average: float | None = None
    peak_rss: bool = False
    bench: str = "inference"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products, except those in float8."""
        return getattr(torch, self.amp_dtype or self.precision)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def constructor_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the model's constructor."""
        return self.model_kwargs | ({} if self.img_size is None else {"img_size": self.img_size})
