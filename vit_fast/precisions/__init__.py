"""The precisions that ``vit_fast.prepare`` can fold a model to: one file a precision.

==========  ==================================================================================================
``base``    what a precision is: its name, how it folds a block, the operation it runs, where it cannot run
``folded``  the dtype of the weights: LayerNorm and LayerScale folded into the projections (``precision=None``)
``packed``  the form of ``folded`` for the CPU extension
``int8``    packed, with the four projections of a block multiplied in int8, on a CPU (``precision="int8"``)
``fp8``     the same as ``folded``, with the four projections of a block multiplied in float8 e4m3 (``precision="fp8"``)
==========  ==================================================================================================

``prepare``, ``refresh``, ``explain``, ``check``, ``ops``, ``backends`` and the command line ask the object. A further
precision is a file of its own and a place in ``PRECISIONS``.
"""

from .base import Kernels, Precision
from .folded import FOLDED
from .fp8 import FP8
from .int8 import INT8
from .packed import PACKED

__all__ = ["FOLDED", "FP8", "INT8", "PACKED", "PRECISIONS", "Kernels", "Precision", "forms", "of_operation"]

# By the name that ``vit_fast.prepare(model, precision=...)`` takes.
PRECISIONS: dict[str | None, Precision] = {precision.name: precision for precision in (FOLDED, FP8, INT8)}


def forms() -> list[Precision]:
    """Every precision in every form that it takes on a backend."""
    return [form for precision in PRECISIONS.values() for form in precision.forms()]


def of_operation(operation: str) -> Precision | None:
    """The precision whose stacks, or linear layers, run as an operation of ``ops``; None for an operation on a model's
    own weights."""
    return next((form for form in forms() if operation in (form.operation, form.linear)), None)
