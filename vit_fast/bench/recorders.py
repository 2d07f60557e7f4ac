"""Dispatch modes that record which operators a call runs, to compare two programs and to name the attention kernel.

Under inference mode a dispatch mode sees composite operators alone, such as F.linear and
scaled_dot_product_attention, and not what these call: run a model under ``torch.no_grad`` instead.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MOVES = tuple(f"aten::{name}" for name in ("add", "cat", "clone", "copy", "_to_copy", "empty_like", "_unsafe_view"))


class Operators(TorchDispatchMode):
    """Records the operators that run under it, and the sizes of their tensors.

    An operator of vit_fast on its backend "torch" is recorded as the operators that it calls; in-place forms have the
    name of the out-of-place ones. Views, sums and copies are left out, because equal programs place them differently
    (eager timm adds the position table separately).

    Attributes:
        calls: (name, sorted sizes of its tensors) of each operator, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vit_fast" and args[-1] == "torch":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func._schema.name.rstrip("_")
        if tensors and not func.is_view and name not in _MOVES:
            self.calls.append((name, sorted(tuple(t.shape) for t in tensors)))
        return out


class AttentionOps(TorchDispatchMode):
    """Collects the ``names`` of the attention operators that run under it; "softmax" is attention in plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if re.search(r"scaled_dot_product|multi_head_attention|softmax", func.name()):
            self.names.add(func.name().removeprefix("aten::").strip("_"))
        return func(*args, **(kwargs or {}))
