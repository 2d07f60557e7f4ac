"""The implementations of the operations: one file a backend, and ``select``, which chooses one for a call.

==============  =======================================================================================
``base``        the base class: why a backend cannot run here, why not this call, its functions by operation
``select``      the order, the requested backend, the choice, and recording it for ``explain``
``quarantine``  whose fault an error is, and the one warning about a backend that failed
``canary``      the first look at a compiled library: small calls against the reference
``triton``      the Triton kernels of ``vit_fast.kernels``
``cuda``        the CUDA extension, which is not built yet
``cpu``         the CPU extension, ``csrc/cpu/``
``torch``       the reference in plain PyTorch, which runs everything
==============  =======================================================================================
"""

from .select import (
    Status,
    backend,
    backward_name,
    names,
    note,
    preferred,
    recording,
    requested,
    run_block,
    status,
    unavailable,
)

__all__ = [
    "Status",
    "backend",
    "backward_name",
    "names",
    "note",
    "preferred",
    "recording",
    "requested",
    "run_block",
    "status",
    "unavailable",
]
