"""The base class of the backends."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import quarantine

Table = Mapping[str, Callable[..., Any]]

DROPOUT_OPTIONS = ("dropout_p", "seed", "out_dropout_p", "out_seed")  # present in a call's options where it drops

_nothing = contextlib.nullcontext()


def backward_key(operation: str) -> str:
    """The key of the backward of an operation in ``Backend.quarantined``."""
    return f"{operation} backward"


Norm = tuple[torch.Tensor | None, torch.Tensor | None, float]  # weight, bias, eps


def attention_option_reasons(
    qkv: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    **options: Any,
) -> list[str]:
    """Why a backend that has no option of attention but norms of q and k (``normalised_heads``) cannot run a call."""
    names: tuple[str, ...] = ("bias", "rel_pos", "key_lengths", "cu_seqlens", "rope")
    lacks = [name for name in names if name in options]
    lacks += ["head size of v other than that of q"] if v is not None and v.shape[2] != qkv.shape[2] else []
    return [f"attention has no {option} here" for option in lacks]


def normalised_heads(
    layer_norm: Callable[..., torch.Tensor],
    qkv: torch.Tensor,
    num_heads: int,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm: str = "layer",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """qkv, k, v of attention with q and k normalised by a backend's ``layer_norm`` before the kernel."""
    if q_norm is None and k_norm is None:
        return qkv, k, v
    q, k, v = qkv.chunk(3, dim=2) if k is None else (qkv, k, v)
    q, k = (
        x if of is None else layer_norm(x.unflatten(2, (num_heads, -1)), *of, norm=norm).flatten(2)
        for x, of in ((q, q_norm), (k, k_norm))
    )
    return q, k, v


class Backend:
    """One implementation of operations, with tables of functions by operation.

    Arguments and results of a function are those of the function at the same place in ``backends.torch``. Statistics
    (natural-log LSE; mean and rstd of rows) mean the same in every backend, so that the backward of one may follow the
    forward of another.

    Attributes:
        name: as ``vit_fast.backend`` and ``VIT_FAST_BACKEND`` take it.
        device_types: the types of device that it may run on; None while that is not known.
        forward: the output, and the statistics that the backward needs; holds every operation of the backend.
        inference: the output alone, where leaving out the statistics is cheaper than ``forward``.
        backward: the gradients; where an operation is missing, the reference's backward runs.
        dropout: the operations whose ``forward`` and ``inference`` take ``dropout_p`` and ``seed`` (and the second
            pair of ``layernorm_mlp``); the others refuse a call that drops.
        keep_mask: draws the masks of drop path and of ``ops.dropout``, as ``reference.keep_mask``; None leaves them to
            the reference.
        not_supported: why the forward cannot run a call, a list of reasons; operations without limits have no entry.
        backward_not_supported: why the backward cannot follow a call, of the same arguments, also those of dropout;
            then the reference's runs.
        remedy: what a user may do where it fails; a sentence of the warning.
        quarantined: operation → why it failed in this process; it is left to the next backend from then on. The
            backward of an operation has a key of its own, ``backward_key``.
    """

    name: str
    device_types: tuple[str, ...] | None = None
    remedy = "Report it with what `vit-fast doctor` prints."

    def __init__(self) -> None:
        self.forward: Table = {}
        self.inference: Table = {}
        self.backward: Table = {}
        self.dropout: frozenset[str] = frozenset()
        self.keep_mask: Callable[..., torch.Tensor] | None = None
        self.not_supported: Table = {}
        self.backward_not_supported: Table = {}
        self.quarantined: dict[str, str] = {}

    def load(self) -> tuple[str, ...]:
        """Fills the tables, once; returns why that is impossible in this process, empty if it is done."""
        return ()

    def unavailable(self, device: torch.device) -> tuple[str, ...]:
        """Why the backend runs nothing on a device; empty where it does."""
        return self.load()

    def version(self) -> str | None:
        """The version of the underlying library, for ``status``; None without one."""
        return None

    def reasons(self, operation: str, *arguments: Any, **options: Any) -> list[str]:
        """Why an available backend cannot run an operation on these arguments; empty where it can."""
        if operation not in self.forward:
            return [f"{self.name} has no {operation}"]
        if operation in self.quarantined:
            return [quarantine.reason(self.quarantined[operation])]
        reasons = []
        if operation not in self.dropout:
            reasons = [f"{name} is not fused" for name in ("dropout_p", "out_dropout_p") if name in options]
            options = {name: value for name, value in options.items() if name not in DROPOUT_OPTIONS}
        not_supported = self.not_supported.get(operation)
        return reasons + (list(not_supported(*arguments, **options)) if not_supported else [])

    def backward_reasons(self, operation: str, *arguments: Any, **options: Any) -> list[str]:
        """Why the backward of an operation cannot follow a call that the forward has run; empty where it can."""
        if operation not in self.backward:
            return [f"{self.name} has none"]
        for key in (operation, backward_key(operation)):
            if key in self.quarantined:
                return [quarantine.reason(self.quarantined[key])]
        not_supported = self.backward_not_supported.get(operation)
        return list(not_supported(*arguments, **options)) if not_supported else []

    def slower_reasons(self, operation: str, *arguments: Any, **options: Any) -> list[str]:
        """Why a backend that can run an operation on these arguments leaves it to the next, unless it is forced."""
        return []

    def is_slower(self, dtype: torch.dtype) -> bool:
        """Whether every operation on a dtype but stacks of blocks is left to the next, whatever the sizes."""
        return False

    def slower_stack_reasons(self, dtype: torch.dtype) -> list[str]:
        """Why stacks of blocks whose weights have a dtype are not prepared for it, unless it is forced."""
        return []

    def is_failure(self, error: Exception, device: torch.device) -> bool:
        """Whether an error that a function of the tables raised is the backend's: then the next one runs the call."""
        return quarantine.is_failure(error)

    def launching(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context around each call of a function of ``forward``, ``inference`` or ``backward``."""
        return _nothing

    def output(self, operation: str) -> Callable[..., torch.Tensor]:
        """The function that computes only the output of an operation with statistics."""
        if operation in self.inference:
            return self.inference[operation]
        forward = self.forward[operation]
        return lambda *arguments, **options: forward(*arguments, **options)[0]
