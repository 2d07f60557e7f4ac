"""Lets torchvision, timm and open_clip import on a torch for which torchvision's operators cannot be loaded.

torchvision's wheels are built for one torch build; on another (a CPU-only torch) their library does not load, and
the import then fails because ``torchvision::nms`` and ``torchvision::qnms`` have no schema. A ``.pth`` file of the
virtual environment imports this module, which defines the two schemas, where they are missing, at the moment that
torchvision wants to register its fakes. Nothing is imported before that. For tests and benchmarks only.
"""

import importlib.abc
import sys

_REGISTRATIONS = ("torchvision._autograd_registrations", "torchvision._meta_registrations")
_libraries = []


class _DefineMissingSchemas(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in _REGISTRATIONS and not _libraries:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, op):
                    library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
        return None


sys.meta_path.insert(0, _DefineMissingSchemas())
