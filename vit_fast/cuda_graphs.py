"""graphed(model): inference by CUDA graphs, for batches so small that launching kernels takes longer than running them.

One graph is captured a batch size (bucket), all in one pool of memory: the smallest at once, which shows that the model
can be captured, each other in the first call that needs it or, on request, all at once, the largest first. A call
copies its images into the static input of the smallest bucket that holds them, replays that graph on the current stream
and returns clones of the first rows. The other rows keep what they held: an image's result must not depend on its batch
mates.

A graph holds addresses and no Python. So in every call, while the device works, the host checks whether parameters,
buffers, sub-modules, their classes, hooks and constant attributes, and settings are still those of the capture
(``snapshot``); where they are not, all graphs are captured anew and the call is repeated. Weights that are written in
place need no new capture: a graph reads them at their address. Prepared weights,
which were computed from the weights before the call, do not follow such a write; for a model that uses them, a new
version of a weight causes a new capture. A write through ``param.data`` raises no version, so prepared weights stay
stale after it. Every tensor that a captured operation reads is kept alive as long as the graphs. Hooks of the model run
when it is captured, not at replays.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from . import backends
from .input_size import input_size
from .kernels.arguments import UnsupportedError
from .snapshot import Snapshot

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_logger = logging.getLogger("vit_fast")
_Storages = dict[int, torch.UntypedStorage]  # by address


class CudaGraphs:
    """Captures calls on one device. Their graphs share a pool of memory, so ``turn`` lets only one replay at a time."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedError(f"vit_fast.graphed: the model is on {device}, CUDA graphs need a CUDA device")
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()
            self.done = torch.cuda.Event()

    def capture(
        self, call: Callable[[torch.Tensor], Any], static_input: torch.Tensor
    ) -> tuple[Callable[[], None], Any]:
        """(replay, output): ``replay()`` queues ``call(static_input)`` on the current stream, to write ``output``."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            # torch.cuda.graph does not restore the current stream where a capture fails; this context does.
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    call(static_input)
                graph = torch.cuda.CUDAGraph()
                # Else every graph captured on this stream would compute in one cuBLAS workspace outside its pool.
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                        output = call(static_input)
                except BaseException:
                    self._recover()
                    raise
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, output

    def _recover(self) -> None:
        """Cleans up after a failed capture, which may leave torch's allocator (up to 2.12) and random generator in
        capture mode, so that later calls fail. The generator leaves that mode at the end of the next capture."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
            torch.zeros(1, device=self.device)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Work queued inside waits for the work of the previous ``turn``, on whichever stream that was."""
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedError("vit_fast.graphed: called while a CUDA graph is captured; capture its model")
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            try:
                yield
            finally:
                self.done.record(stream)


class _Reads(TorchDispatchMode):
    """Collects the storages that operations read and did not create, and refuses operations that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: _Storages = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function is not aten.lift_fresh.default:  # its input is a constant created by the call
            found = {_address(tensor): tensor.untyped_storage() for tensor in inputs}
            self.storages |= {address: found[address] for address in found.keys() - self._made}
        masked = function is aten.index.Tensor and any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1:])
        if (
            masked
            or function in (aten.nonzero.default, aten.masked_select.default)
            or torch.Tag.data_dependent_output in function.tags
        ):
            raise UnsupportedError(f"vit_fast.graphed: the model calls {function}, for whose result the host must wait")
        result = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in (*inputs, *outputs)}
        if function in (aten._to_copy.default, aten.copy_.default) and len(devices) > 1:
            raise UnsupportedError(f"vit_fast.graphed: the model copies between {' and '.join(map(str, devices))}")
        self._made.update({_address(tensor) for tensor in outputs} - self.storages.keys())
        return result


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Layout(NamedTuple):
    """The pytree structure of an output, and which of its leaves are tensors with one row per image."""

    spec: TreeSpec
    batched: list[bool]


class _Bucket(NamedTuple):
    input: torch.Tensor
    replay: Callable[[], None]
    leaves: list[Any]


class _Captured(NamedTuple):
    graphs: Any
    buckets: dict[int, _Bucket]  # by batch size, those captured so far
    like: torch.Tensor  # [0, ...]: sizes, dtype and device of the images
    layout: _Layout
    watch: Snapshot
    settings: tuple[Any, ...]
    kept: list[torch.UntypedStorage]  # the storages that the graphs read

    def changed(self) -> bool:
        return self.settings != _settings(self.graphs.device.type) or self.watch.changed() is not None

    def fits(self, images: torch.Tensor) -> bool:
        like = self.like
        return images.shape[1:] == like.shape[1:] and images.dtype == like.dtype and images.device == like.device

    def capture(self, model: nn.Module, sizes: Iterable[int]) -> None:
        """Captures the buckets of these sizes that are missing, the largest first: the others then fit its memory."""
        missing = set(sizes) - self.buckets.keys()
        with _capturing() if missing else contextlib.nullcontext():
            for size in sorted(missing, reverse=True):
                static_input = self.like.new_zeros(size, *self.like.shape[1:])
                self.buckets[size] = _capture_bucket(self.graphs, model, static_input, self.layout)


def _settings(device_type: str) -> tuple[Any, ...]:
    """The global settings that, beside the weights, decide which kernels a model launches."""
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    return autocast, torch.get_float32_matmul_precision(), backends.requested()


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    """No gradients, no inference tensors, and no weight cache of autocast: autocast frees it when its block ends."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _watched(model: nn.Module, images: torch.Tensor) -> tuple[Any, _Storages]:
    """The output of a call and the storages that it read; ``torch.compile`` is off, so that every operation is seen."""
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with stance, _Reads() as reads:
        output = model(images)
    reads.storages.pop(_address(images), None)
    return output, reads.storages


def _random(count: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Images from a generator of their own, so that a capture leaves the state of the global generator unchanged."""
    generator = torch.Generator(device).manual_seed(count)
    if dtype.is_floating_point:
        return torch.randn(count, *sizes, dtype=dtype, device=device, generator=generator)
    return torch.randint(0, 2, (count, *sizes), dtype=dtype, device=device, generator=generator)


def _layout_of(two: Any, three: Any) -> _Layout:
    """The layout of an output, from the outputs for two and for three images."""
    (two, spec), (three, other) = tree_flatten(two), tree_flatten(three)
    if spec != other:
        raise UnsupportedError("vit_fast.graphed: the output of 2 images has another structure than that of 3")
    batched = []
    for i, (a, b) in enumerate(zip(two, three)):
        rows = isinstance(a, torch.Tensor) and a.shape[:1] == (2,) and b.shape == (3, *a.shape[1:])
        batched.append(rows)
        if isinstance(a, torch.Tensor):
            if not rows and not (a.shape == b.shape and torch.equal(a, b)):
                raise UnsupportedError(
                    f"vit_fast.graphed: tensor {i} of the output is {list(a.shape)} of 2 images and {list(b.shape)} of "
                    "3 others, expected the batch as its first axis, or no dependence on the images"
                )
        elif not isinstance(a, _CONSTANTS):
            raise UnsupportedError(
                f"vit_fast.graphed: the output holds a {type(a).__name__}, expected tensors in tuples, lists, dicts or "
                "classes known to torch.export.register_dataclass"
            )
        elif a != b:
            raise UnsupportedError(f"vit_fast.graphed: value {i} of the output is {a!r} of 2 images and {b!r} of 3")
    return _Layout(spec, batched)


def _causes(error: BaseException, outer: BaseException | None) -> str:
    """The first line of an error, preceded by those of the chain of errors that caused it, up to ``outer``."""
    context = error.__context__
    before = "" if context is None or context is outer else f"{_causes(context, outer)}; then "
    return f"{before}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _capture_bucket(graphs: CudaGraphs, model: nn.Module, static_input: torch.Tensor, layout: _Layout) -> _Bucket:
    size, outer = len(static_input), sys.exception()
    try:
        replay, output = graphs.capture(model, static_input)
    except Exception as error:
        causes = _causes(error, outer)
        raise UnsupportedError(f"vit_fast.graphed: batch size {size} cannot be captured: {causes}") from error
    leaves, spec = tree_flatten(output)
    if spec != layout.spec or any(
        batched and leaf.shape[:1] != (size,) for leaf, batched in zip(leaves, layout.batched)
    ):
        raise UnsupportedError(f"vit_fast.graphed: batch size {size} makes an output of another structure than 2 and 3")
    return _Bucket(static_input, replay, leaves)


def _first_parameter(model: nn.Module) -> nn.Parameter:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError("vit_fast.graphed: model has no floating-point parameters, expected some to tell its device")


def check_batch_sizes(caller: str, batch_sizes: Any) -> tuple[int, ...]:
    """Batch sizes, ascending and each once; ``caller`` is named in the errors."""
    if not isinstance(batch_sizes, (tuple, list, range)):
        raise TypeError(f"vit_fast.{caller}: batch_sizes is {batch_sizes!r}, expected a tuple of ints")
    for size in batch_sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"vit_fast.{caller}: batch_sizes has {size!r}, expected an int")
        if size < 1:
            raise ValueError(f"vit_fast.{caller}: batch_sizes has {size}, expected 1 or more")
    if not batch_sizes:
        raise ValueError(f"vit_fast.{caller}: batch_sizes is empty, expected one size or more")
    return tuple(sorted(set(batch_sizes)))


def _words(batch: int | str, like: torch.Tensor) -> str:
    """Text that describes a batch of images; ``like`` has their sizes, dtype and device."""
    sizes = ", ".join(map(str, (batch, *like.shape[1:])))
    return f"[{sizes}] {str(like.dtype).removeprefix('torch.')} on {like.device}"


class Graphed(nn.Module):
    """What ``graphed`` returns. ``model`` is the model; the ``state_dict`` is the model's own."""

    graphs = CudaGraphs  # captures and replays; a new one, on the model's device, at each capture

    def __init__(
        self,
        model: nn.Module,
        batch_sizes: Sequence[int],
        example: torch.Tensor | None,
        clone: bool,
        lazy: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"vit_fast.graphed: model is {type(model).__name__}, expected an nn.Module")
        self.batch_sizes = check_batch_sizes("graphed", batch_sizes)
        if example is not None and not isinstance(example, torch.Tensor):
            raise TypeError(f"vit_fast.graphed: example is {type(example).__name__}, expected a torch.Tensor")
        if example is not None and example.dim() < 2:
            raise ValueError(f"vit_fast.graphed: example has {example.dim()} dimensions, expected a batch of images")
        sizes = input_size(model) if example is None else tuple(example.shape[1:])
        if sizes is None:
            raise ValueError(
                "vit_fast.graphed: example is None, expected images, as the model does not tell its input size"
            )
        self.sizes: tuple[int, ...] = sizes  # of an image
        # None: images have the dtype of the weights, which may change later.
        if example is None or example.dtype == _first_parameter(model).dtype:
            self._dtype: torch.dtype | None = None
        else:
            self._dtype = example.dtype
        self.model, self.clone, self.training = model, clone, False
        self._at_once = self.batch_sizes[:1] if lazy else self.batch_sizes
        self._lock = threading.Lock()
        self._captured: _Captured | None = None
        self._capture(self._at_once)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_captured": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def state_dict(  # type: ignore[override]  # one signature for both overloads
        self, *args: Any, destination: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        if args or destination is not None:  # called by a parent module, which loads by attribute names
            return super().state_dict(*args, destination=destination, **kwargs)
        return self.model.state_dict(**kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._captured = None  # graphs would keep the old weights until the next call
        return super()._apply(*args, **kwargs)

    def forward(self, images: torch.Tensor) -> Any:
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"vit_fast.graphed: images are {type(images).__name__}, expected a torch.Tensor")
        if self.model.training:
            raise UnsupportedError("vit_fast.graphed: the model is in training mode, expected eval mode (model.eval())")
        sizes = self.buckets_of(len(images)) if images.dim() else ()
        with self._lock:
            captured = self._captured
            if captured is not None and not (captured.fits(images) and captured.buckets.keys() >= set(sizes)):
                captured = None if captured.changed() else captured
            if captured is None:
                captured = self._capture(sizes)
            result = self._run(captured, images, sizes)
            if captured.changed():  # checked while the device works, so it adds no latency
                _logger.info("vit_fast.graphed: weights, sub-modules or settings changed, so graphs are captured anew")
                del captured, result  # frees their memory before the new capture
                result = self._run(self._capture(sizes), images, sizes)
        return result

    def capture(self, *counts: int) -> None:
        """Captures now what is missing of the graphs that these numbers of images need."""
        sizes = {size for count in counts for size in self.buckets_of(count)}
        with self._lock:
            captured = self._captured
            if captured is None or captured.changed():
                captured = self._capture(sizes)
            with captured.graphs.turn():
                captured.capture(self.model, sizes)

    def image_dtype(self) -> torch.dtype:
        return self._dtype or _first_parameter(self.model).dtype

    def buckets_of(self, count: int) -> tuple[int, ...]:
        """The batch sizes whose graphs run ``count`` images, one after the other."""
        largest = self.batch_sizes[-1]
        rest = count % largest
        return (largest,) * (count // largest) + tuple(s for s in self.batch_sizes if s >= rest > 0)[:1]

    def _capture(self, sizes: Iterable[int]) -> _Captured:
        """Captures the model as it is now: the buckets that a call needs, and those that were asked for beforehand."""
        self._captured = None  # frees the memory of the old graphs first
        model = self.model
        if training := [name for name, module in model.named_modules() if module.training]:
            raise UnsupportedError(
                f"vit_fast.graphed: {training[0] or 'the model'} is in training mode, expected eval mode (model.eval())"
            )
        like = _first_parameter(model)
        device, dtype = like.device, self.image_dtype()
        if others := {parameter.device for parameter in model.parameters()} - {device}:
            raise UnsupportedError(
                f"vit_fast.graphed: parameters are on {device} and {others.pop()}, expected one device"
            )
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in tensors.items():
            if is_traceable_wrapper_subclass(tensor):
                words = f"vit_fast.graphed: {name} is a {type(tensor).__name__}, expected a plain tensor"
                raise UnsupportedError(words)
        graphs = self.graphs(device)
        with _capturing():
            two = model(_random(2, self.sizes, dtype, device))
            three, read = _watched(model, _random(3, self.sizes, dtype, device))
            layout = _layout_of(two, three)
            no_images = torch.empty(0, *self.sizes, dtype=dtype, device=device)
        weights = {_address(tensor): tensor.untyped_storage() for tensor in tensors.values()}
        made_of_weights = any(read[address].device == device for address in read.keys() - weights.keys())
        watch = Snapshot(dict(model.named_modules()), versions=made_of_weights)
        kept = [*(read | weights).values()]
        captured = _Captured(graphs, {}, no_images, layout, watch, _settings(device.type), kept)
        captured.capture(model, {*sizes, *self._at_once})
        self._captured = captured
        return captured

    def _run(self, captured: _Captured, images: torch.Tensor, sizes: Sequence[int]) -> Any:
        if not captured.fits(images):
            like = captured.like
            raise ValueError(
                f"vit_fast.graphed: images are {_words(images.shape[0] if images.dim() else 0, images)}, "
                f"captured were {_words('B', like)}"
            )
        if torch.is_grad_enabled() and (images.requires_grad or any(t.requires_grad for t in captured.watch.tensors)):
            raise UnsupportedError(
                "vit_fast.graphed: gradients are enabled, which graphs do not give; call it under "
                "torch.inference_mode() or torch.no_grad()"
            )
        if len(images) == 0:
            return self.model(images)
        with captured.graphs.turn():
            captured.capture(self.model, sizes)
            chunks, clone = images.split(self.batch_sizes[-1]), self.clone or len(sizes) > 1
            parts = [
                self._replay(captured.buckets[size], captured.layout, chunk, clone)
                for size, chunk in zip(sizes, chunks, strict=True)
            ]
        leaves = parts[0]
        if len(parts) > 1:
            leaves = [
                torch.cat(rows) if batched else rows[0] for rows, batched in zip(zip(*parts), captured.layout.batched)
            ]
        return tree_unflatten(leaves, captured.layout.spec)

    def _replay(self, bucket: _Bucket, layout: _Layout, images: torch.Tensor, clone: bool) -> list[Any]:
        count = len(images)
        bucket.input[:count].copy_(images)
        bucket.replay()
        leaves = []
        for leaf, batched in zip(bucket.leaves, layout.batched):
            leaf = leaf[:count] if batched else leaf
            leaves.append(leaf.clone() if clone and isinstance(leaf, torch.Tensor) else leaf)
        return leaves


def graphed(
    model: nn.Module,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    *,
    example: torch.Tensor | None = None,
    clone: bool = True,
    lazy: bool = True,
) -> Graphed:
    """The model as CUDA graphs: inference with little latency at small batches.

    The graph of the smallest batch size is captured here, each other in the first call that needs it: that call runs
    the model three times and compiles what this batch size needs (``lazy=False`` or ``warmup`` does it beforehand).
    After a change of weights, sub-modules, hooks, constant attributes, dtype, device, autocast, matmul precision or
    forced backend, the graphs that a call needs are captured anew in it. Any number of images may come: they are padded
    to the next batch size, more than the largest run in several replays, none run the model itself. Calls of several
    threads and on several streams take turns.

    All graphs share one pool of memory, so that of the largest alone is needed where it is captured first
    (``lazy=False``). Otherwise they need that of all sizes together at most: with the default sizes as much as the
    activations of 127 images, and inputs and outputs of each.

    Args:
        model: in eval mode, on a CUDA device, of one tensor argument; also timm's, torchvision's and transformers'.
        batch_sizes: one graph each; a batch runs in the smallest that holds it.
        example: images [B, ...] whose sizes and dtype are captured; default the model's own size and dtype.
        clone: False returns views of the graph's memory, which the next call overwrites.
        lazy: False captures the graphs of all batch sizes here.
    Returns:
        ``Graphed``: a module of the model's outputs (tensors in tuples, lists, dicts, registered classes) without
        gradients. Copies and pickles of it capture anew.
    Raises:
        UnsupportedError: no CUDA device, training mode, gradients asked for, or a model that cannot be captured.
        TypeError, ValueError: bad arguments; images of other sizes, dtype or device than captured.
    """
    return Graphed(model, batch_sizes, example, clone, lazy)
