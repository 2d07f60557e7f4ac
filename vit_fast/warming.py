"""warmup(model, batch_sizes): compiles the kernels that calls of a model will need, before the first of them.

Triton compiles a kernel when it is first launched, a second or so each, and a batch size that crosses a threshold of
tiles, split-K or programmatic dependent launch needs other ones: a stall of a live server, and an error inside the
capture of a CUDA graph. ``warmup`` runs the model once for each batch size on images without content, with launches of
our kernels compiled in threads instead of run (``kernels/warming.py``). So it finds what the model launches whatever
has been done to it (``prepare``, ``optimize``, hooks), and needs the memory of a call, not its time. What the model
computes with PyTorch runs, which makes the handles and work spaces of its libraries too.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import backends
from .backends import select
from .cuda_graphs import Graphed, check_batch_sizes
from .input_size import input_size
from .kernels.arguments import UnsupportedError

_logger = logging.getLogger("vit_fast")


@dataclass(frozen=True)
class Warmup:
    """What ``warmup`` did; its text is a summary.

    Attributes:
        device: of the model.
        batch_sizes: ascending; for a ``graphed`` model those of its graphs.
        shapes: of one image, (channels, height, width).
        kernels: the kernels that were compiled, a name for each variant.
        ready: how many variants were compiled before.
        failed: a line for each variant that does not compile: its calls will run on the next backend.
        thresholds: shape → the batch sizes that need other kernels than the one before them in ``batch_sizes``.
        seconds: how long it took.
        reason: why there was nothing to compile, or None.
    """

    device: str
    batch_sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    kernels: tuple[str, ...] = ()
    ready: int = 0
    failed: tuple[str, ...] = ()
    thresholds: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"nothing to compile on {self.device}: {self.reason}"
        done = f"{len(self.kernels)} kernels compiled in {self.seconds:.1f} s on {self.device}"
        lines = [f"{done}, {self.ready} were ready"]
        for shape, sizes in self.thresholds.items():
            which = f"other kernels from batch size {', '.join(map(str, sizes))} on" if sizes else "one set of kernels"
            lines.append(f"images of {' × '.join(map(str, shape))}: {which}")
        return "\n".join([*lines, *(f"failed: {line}" for line in self.failed)])


def _check_image_sizes(image_sizes: Any, model: nn.Module) -> list[tuple[int, int, int]]:
    """[(channels, height, width)]."""
    own = input_size(model)
    if image_sizes is None:
        if own is None:
            raise ValueError(
                "vit_fast.warmup: image_sizes is None, expected some, as the model does not tell its input size"
            )
        return [own]
    if not isinstance(image_sizes, (tuple, list)):
        raise TypeError(f"vit_fast.warmup: image_sizes is {image_sizes!r}, expected a list of ints or (height, width)")
    if not image_sizes:
        raise ValueError("vit_fast.warmup: image_sizes is empty, expected one size or more")
    sizes = []
    for size in image_sizes:
        pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
            raise TypeError(f"vit_fast.warmup: image_sizes has {size!r}, expected an int or (height, width)")
        if min(pair) < 1:
            raise ValueError(f"vit_fast.warmup: image_sizes has {size!r}, expected 1 or more")
        sizes.append((own[0] if own else 3, *pair))
    return sizes


def _why_nothing(device: torch.device) -> str | None:
    """Why calls on a device compile nothing, or None."""
    if why := select.unavailable("triton", device):
        if device.type == "cuda":
            return "; ".join(why)
        absent = "" if torch.cuda.is_available() else ", and this machine has no CUDA device"
        return f"a model on a CPU compiles nothing in its calls{absent}"
    if backends.requested() not in ("auto", "triton"):
        return f"the backend {backends.requested()!r} is forced"
    from .kernels import launch  # not at the head of the file: importing vit_fast needs no Triton

    return "Triton's interpreter is on" if launch.INTERPRETED else None


def warmup(
    model: nn.Module,
    batch_sizes: Sequence[int] = (1,),
    image_sizes: Sequence[int | tuple[int, int]] | None = None,
    *,
    threads: int | None = None,
) -> Warmup:
    """Compiles every Triton kernel that inference of a model will need at these batch sizes, and loads it.

    After it, calls at these sizes compile nothing, and may be captured in a CUDA graph of your own. Call it when the
    model is as it will be used (device, dtype, ``prepare``, ``optimize``) and under the autocast and matmul precision
    of its calls. It allocates what a call allocates; Triton keeps compiled kernels on disk for the next process.

    Args:
        model: in eval mode, of one argument, a batch of images in the dtype of the weights; also timm's, torchvision's
            and transformers'. Of a ``graphed`` model the graphs that these batch sizes need are captured too.
        batch_sizes: any number; ``range(1, 65)`` finds all thresholds up to 64.
        image_sizes: each an int or (height, width); default the model's own size.
        threads: compilers at a time; default the number of processors.
    Returns:
        ``Warmup``: what was compiled, how long it took, and at which batch sizes other kernels are needed. For a model
        on a CPU it says that there is nothing to compile.
    Raises:
        TypeError, ValueError: bad arguments.
        UnsupportedError: training mode; a device that is neither a CPU nor of CUDA.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.warmup: model is {type(model).__name__}, expected an nn.Module")
    graphed = model if isinstance(model, Graphed) else None
    inner = model if graphed is None else graphed.model
    batches = check_batch_sizes("warmup", batch_sizes)
    if graphed is None:
        shapes: list[tuple[int, ...]] = [*_check_image_sizes(image_sizes, inner)]
    elif image_sizes is None:
        batches = tuple(sorted({bucket for batch in batches for bucket in graphed.buckets_of(batch)}))
        shapes = [graphed.sizes]
    else:
        raise ValueError(f"vit_fast.warmup: image_sizes is {image_sizes!r}, expected None: graphs have one size")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"vit_fast.warmup: threads is {threads!r}, expected an int of 1 or more")
    if training := [name for name, module in inner.named_modules() if module.training]:
        raise UnsupportedError(
            f"vit_fast.warmup: {training[0] or 'the model'} is in training mode, expected eval mode (model.eval())"
        )
    like = next((parameter for parameter in inner.parameters() if parameter.is_floating_point()), None)
    if like is None:
        raise ValueError("vit_fast.warmup: model has no floating-point parameters, expected some to tell its device")
    if like.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"vit_fast.warmup: the model is on {like.device}, expected a CUDA device or a CPU")
    dtype = like.dtype if graphed is None else graphed.image_dtype()
    start = time.perf_counter()
    record = Warmup(str(like.device), batches, tuple(shapes), reason=_why_nothing(like.device))
    if record.reason is None:
        record = _compile(inner, torch.empty(0, dtype=dtype, device=like.device), record, threads)
    if graphed is not None:
        graphed.capture(*batches)
    record = replace(record, seconds=time.perf_counter() - start)
    _logger.info("vit_fast.warmup: %s", record)
    return record


def _compile(model: nn.Module, like: torch.Tensor, record: Warmup, threads: int | None) -> Warmup:
    """Compiles for images of the dtype and device of ``like``."""
    from .kernels.warming import compiling

    thresholds = {}
    with compiling(like.device, threads) as found, torch.inference_mode(False), torch.no_grad():
        for shape in record.shapes:
            before: set[int] | None = None
            changes = []
            for batch in record.batch_sizes:
                with found.watching() as needed:
                    model(like.new_zeros(batch, *shape))
                if before is not None and needed != before:
                    changes.append(batch)
                before = needed
            thresholds[shape] = tuple(changes)
    return replace(
        record,
        kernels=tuple(sorted(found.new.values())),
        ready=len(found.variants) - len(found.new),
        failed=tuple(f"{found.variants[key]}: {type(e).__name__}: {e}" for key, e in found.failed.items()),
        thresholds=thresholds,
    )
