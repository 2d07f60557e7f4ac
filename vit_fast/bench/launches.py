"""The launches of one forward pass on a GPU that this machine lacks, from shapes alone.

The model runs on fake tensors. Each call of one of vit_fast's operators then runs its Triton backend once more on meta
tensors: the host code of the kernels picks configs, allocates and sizes grids for the pretended GPU as it would there,
and the launches are noted instead of made. So a change of a rule of kernels/configs.py, or of a grid, changes what is
found here. Nothing is compiled and no memory is taken.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

import vit_fast
from vit_fast.backends.triton import TRITON
from vit_fast.precisions import Precision

from . import models
from .errors import BenchError, reason
from .gpus import Gpu
from .operations import Call, Recorder, record

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # the real implementation, for meta tensors too


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        name: of the kernel; ``programs``: of its grid.
        arguments: by name, those of the kernel and of the launch (``num_warps``, ``num_stages``); tensors on meta.
    """

    name: str
    programs: int
    arguments: dict[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that it is given, those of descriptors too."""
        leaves = (getattr(leaf, "base", leaf) for leaf in tree_leaves(list(self.arguments.values())))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Launched:
    """One call of an operator and the launches of vit_fast that it makes; None of other operators."""

    call: Call
    launches: tuple[Launch, ...]


@contextlib.contextmanager
def pretending(gpu: Gpu, seen: list[Launch]) -> Iterator[None]:
    """Sends vit_fast's operators on CPU tensors to the Triton backend of a pretended GPU, which notes launches in
    ``seen``. Replaces functions of the whole process, and puts them back."""
    if missing := TRITON.load():
        raise BenchError(f"launches are predicted from the Triton kernels, and {'; '.join(missing)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BenchError("launches are predicted from kernels that compile, and TRITON_INTERPRET is 1: unset it")
    import triton

    from vit_fast.kernels import configs, launch

    def run(kernel, *args, grid, warmup, **options):
        names = (param.name for param in kernel.params)
        programs = 1
        for size in grid:
            programs *= int(size)
        seen.append(Launch(kernel.fn.__name__, programs, dict(zip(names, args, strict=False)) | options))

    replaced = [
        (triton.JITFunction, "run", run),
        (configs, "arch_of", lambda device: gpu.arch),
        (configs, "multiprocessors_of", lambda device: gpu.multiprocessors),
        (launch, "device_reasons", lambda *tensors: []),
    ]
    shipped = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    vars(TRITON)["unavailable"] = lambda device: ()
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        with vit_fast.backend("auto"):
            yield
    finally:
        del vars(TRITON)["unavailable"]
        for owner, name, value in shipped:
            setattr(owner, name, value)


def _meta(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class _Launches(Recorder):
    """A ``Recorder`` that also notes, for each call, what vit_fast's operator launches."""

    def __init__(self, model, seen):
        super().__init__(model)
        self.seen, self.launched = seen, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.calls)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.seen.clear()
        if func.namespace == "vit_fast":
            with unset_fake_temporarily():
                args, kwargs = tree_map_only(torch.Tensor, _meta, (args, kwargs or {}))
                func.redispatch(_CPU, *args, **kwargs)
            if len(self.calls) == before:  # an operator without figures of its own
                self.calls.append(Call(func._schema.name, (), ()))
        if len(self.calls) > before:
            self.launched.append(Launched(self.calls[-1], tuple(self.seen)))
        return out


def forward_launches(
    name: str, kwargs: dict[str, Any], batch: int, dtype: torch.dtype, precision: Precision | None, gpu: Gpu
) -> tuple[tuple[int, ...], list[Launched]]:
    """(size of an image, calls and launches) of one forward pass of a model of vit_fast on a pretended GPU.

    Args:
        name, kwargs: of ``vit_fast.create_model``.
        precision: that of ``vit_fast.prepare``; None for a model that is not prepared.

    Raises:
        BenchError: a model that cannot be made, prepared or run; a GPU that lacks the precision; no Triton.
    """
    from vit_fast.input_size import input_size

    with torch.device("meta"):
        model = models.vit_fast_model(name, **kwargs).to(dtype).requires_grad_(False)
    size = input_size(model)
    if size is None:
        raise BenchError(f"vit_fast's model {name!r} does not tell the size of its input, so nothing is predicted")
    seen: list[Launch] = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with pretending(gpu, seen), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # it is 0 and stays so
            with fake:
                model.to_empty(device="cpu")
                if precision is not None:
                    vit_fast.prepare(model, precision=precision.name)
                pixels = torch.empty(batch, *size, dtype=dtype)
            recorder = _Launches(model, seen)
            record(model, pixels, recorder, fake)
    except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
        raise BenchError(f"{name} cannot be predicted: {reason(error)}") from error
    return size, recorder.launched
