"""Model families under their originals' words and parameter names."""

import importlib

from ..pos_embed import resize_pos_embed

__all__ = ["clip", "deit", "hybrid", "lanl", "resize_pos_embed", "scratch", "t2t"]


def __getattr__(name):
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
