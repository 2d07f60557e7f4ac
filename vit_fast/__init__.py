"""Fast Vision Transformers for PyTorch: fused kernels behind timm's names."""

from . import ops, systems
from .backends import backend, status
from .certificate import check
from .checkpoints import WeightsError
from .class_swap import optimize, restore
from .cuda_graphs import graphed
from .diagnosis import doctor
from .explanation import explain
from .fused_share import Coverage, coverage
from .kernels.arguments import UnsupportedError
from .pos_embed import resize_pos_embed
from .prepared import prepare, refresh, unprepare
from .registry import create_model, list_models
from .vit import VisionTransformer
from .warming import Warmup, warmup

__version__ = "0.1.0"

__all__ = [
    "Coverage",
    "UnsupportedError",
    "VisionTransformer",
    "Warmup",
    "WeightsError",
    "backend",
    "check",
    "coverage",
    "create_model",
    "doctor",
    "explain",
    "graphed",
    "list_models",
    "ops",
    "optimize",
    "prepare",
    "refresh",
    "resize_pos_embed",
    "restore",
    "status",
    "systems",
    "unprepare",
    "warmup",
]
