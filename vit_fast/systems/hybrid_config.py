"""Configs of the config-driven ViT (``hybrid``): reading a caller's config, and the originals' configs by name.

Names with a "-" are jeonsworld's, whose dropout_rate is 0.1 in all; names with a "+" are Google's hybrids, with
patches of a size in cells of the feature map where jeonsworld's R50 has a grid.
"""

from collections.abc import Mapping
from typing import Any


class Config(dict):
    """A dict whose entries are attributes too, nested dicts included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            if isinstance(value, dict) and not isinstance(value, Config):
                self[key] = Config(value)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def _config(
    hidden_size: int,
    mlp_dim: int,
    num_heads: int,
    num_layers: int,
    dropout_rate: float = 0.1,
    resnet: tuple[int, ...] | None = None,
    **patches: Any,
) -> Config:
    config = Config(
        patches=patches,
        hidden_size=hidden_size,
        transformer=dict(
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            attention_dropout_rate=0.0,
            dropout_rate=dropout_rate,
        ),
        classifier="token",
        representation_size=None,
    )
    if resnet is not None:
        config.resnet = Config(num_layers=resnet, width_factor=1)
    return config


_TI, _S, _B = (192, 768, 3, 12), (384, 1536, 6, 12), (768, 3072, 12, 12)
_L, _H = (1024, 4096, 16, 24), (1280, 5120, 16, 32)

CONFIGS: dict[str, Config] = {
    "testing": _config(1, 1, 1, 1, size=(16, 16)),
    "ViT-Ti_16": _config(*_TI, size=(16, 16)),
    "ViT-S_16": _config(*_S, size=(16, 16)),
    "ViT-S_32": _config(*_S, size=(32, 32)),
    "ViT-B_8": _config(*_B, size=(8, 8)),
    "ViT-B_16": _config(*_B, size=(16, 16)),
    "ViT-B_32": _config(*_B, size=(32, 32)),
    "ViT-L_16": _config(*_L, size=(16, 16)),
    "ViT-L_32": _config(*_L, size=(32, 32)),
    "ViT-H_14": _config(*_H, size=(14, 14)),
    "R50-ViT-B_16": _config(*_B, resnet=(3, 4, 9), grid=(14, 14)),
    "R+ViT-Ti_16": _config(*_TI, 0.0, resnet=(), size=(8, 8)),
    "R26+ViT-S_32": _config(*_S, 0.0, resnet=(2, 2, 2, 2), size=(1, 1)),
    "R26+ViT-B_32": _config(*_B, 0.0, resnet=(2, 2, 2, 2), size=(1, 1)),
    "R50+ViT-B_16": _config(*_B, 0.1, resnet=(3, 4, 9), size=(1, 1)),
    "R50+ViT-L_32": _config(*_L, 0.1, resnet=(3, 4, 6, 3), size=(1, 1)),
}

_REQUIRED = object()


def read(config: Any, path: str, default: Any = _REQUIRED) -> Any:
    """An entry of a config of dicts, objects or both; ``default`` where it is absent or None."""
    value = config
    for name in path.split("."):
        if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
            value = value[name] if name in value.keys() else None
        else:
            value = getattr(value, name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"vit_fast.systems.hybrid: config has no {path}, expected one")
            return default
    return value
