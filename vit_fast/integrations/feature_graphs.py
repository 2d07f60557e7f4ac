"""Optimised modules in the graphs of torchvision's ``create_feature_extractor``, which timm's ``features_only`` uses.

torch.fx traces the library's own forward of an optimised module. A feature graph has a node behind it too that calls
the module: what is asked for behind or at a block is what the model itself computes, fused and bit for bit, and names
inside a block (``blocks.3.attn.qkv``) are still there. torchvision removes the nodes that no feature needs.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vit_fast.remembered import has_hooks


def called_in_feature_graph(module: nn.Module, traced: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of a module in the graph that is traced: a call of the module, named by its path, in a feature graph;
    else ``traced``, the output of the library's forward.

    A module with hooks stays traced, since its hooks are traced around this forward, and a call would run them again.
    """
    feature_extraction = sys.modules.get("torchvision.models.feature_extraction")
    tracer = getattr(traced, "tracer", None)
    if (
        feature_extraction is None
        or not isinstance(traced, torch.fx.Proxy)
        or not isinstance(tracer, feature_extraction.NodePathTracer)
        or has_hooks([module])
    ):
        return traced
    path = tracer.path_of_module(module)
    called = tracer.create_proxy("call_module", path, tuple(args), dict(kwargs))
    # Not torchvision's name, which takes the number of encoder_layer_0 for one that counts calls.
    names = tracer.node_to_qualname
    calls = sum(node.op == "call_module" and node.target == path for node in names)
    names[called.node] = path if calls == 1 else f"{path}_{calls - 1}"
    return called
