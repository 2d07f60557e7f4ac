"""Feature maps of chosen blocks, as timm's ``features_only`` gives them to detection and segmentation heads."""

from typing import Any

import torch
from torch import nn

from .vit import VisionTransformer


class FeatureInfo:
    """Channels, reduction and module of every block, timm's interface; methods report the chosen blocks by default."""

    def __init__(self, info: list[dict[str, Any]], out_indices: list[int]) -> None:
        self.info = [{"index": i, **block} for i, block in enumerate(info)]
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | list[int] | None = None) -> Any:
        """Values of a key: of the chosen blocks, of block ``idx``, or of the blocks in a list."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: list[str] | None = None, idx: int | list[int] | None = None) -> Any:
        """The entries of the chosen blocks, of block ``idx``, or of the blocks in a list; ``keys`` selects."""

        def entry(i: int) -> dict[str, Any]:
            return self.info[i] if keys is None else {key: self.info[i][key] for key in keys}

        return entry(idx) if isinstance(idx, int) else [entry(i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | list[int] | None = None) -> Any:
        """Channels of the feature maps."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | list[int] | None = None) -> Any:
        """Image pixels per feature-map pixel, along a side."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | list[int] | None = None) -> Any:
        """Names of the blocks in the model."""
        return self.get("module", idx)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class FeatureGetterNet(nn.Module):
    """Images [B, in_chans, H, W] → list of feature maps [B, C, rows, columns], in block order.

    Args:
        model: a ``VisionTransformer``; the blocks behind the last one asked for, the norm and the head are removed.
        out_indices: the last n blocks, or a list (negative counts from the end).
    """

    def __init__(self, model: VisionTransformer, out_indices: int | list[int]) -> None:
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices, prune_norm=True)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.in_chans = model.in_chans
        self.model = model
        head_fields = ("num_classes", "classifier", "global_pool")
        self.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in head_fields}
        self.default_cfg = self.pretrained_cfg

    @property
    def patch_embed(self) -> nn.Module:
        """The patch embedding of the model, which holds the image size."""
        return self.model.patch_embed

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.model.forward_intermediates(images, self.out_indices, stop_early=True, intermediates_only=True)
