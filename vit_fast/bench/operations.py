"""The operations of one forward pass, each with its FLOP and its compulsory traffic, found by a run on fake tensors.

Nothing is computed and no memory is taken: a dispatch mode sees every operator call with its shapes. A call is one
operation, except a call of vit_fast's own operators, which launch several kernels, one for each operation. FLOP counts
matrix products (2 a multiply-add). Bytes counts every input read once and the result written once, also tensors that
pass between the kernels of one operator. A tensor expanded along an axis counts once along it. An operation carries the
name of the module whose parameters it reads, or else of the module in whose forward it ran, with * for the number of a
block. Tensors that ``vit_fast.prepare`` made carry the names of the parameters that they were made of.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vit_fast.block import PREPARED
from vit_fast.fake_tensors import without_shared_caches
from vit_fast.kernels.folding import Float8Block, FoldedBlock, unflatten
from vit_fast.kernels.packing import Int8Block
from vit_fast.precisions import PRECISIONS
from vit_fast.twin import packed_weights

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_NAMES = {"mm": "linear", "addmm": "linear", "native_layer_norm": "layer_norm"}
_ATTENTION = "scaled_dot_product_attention"
_LISTED = 30  # torch.profiler records no sizes for longer lists of tensors
_NARROW_DTYPES = {precision.product_dtype(torch.bfloat16) for precision in PRECISIONS.values() if precision.products}


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass.

    Attributes:
        name, module: the kind of operation, and the module whose parameters it reads.
        flop: of matrix products.
        bytes: that must move to and from memory.
        narrow: whether the matrix products are narrower than the model's weights.
    """

    name: str
    module: str
    flop: int
    bytes: int
    narrow: bool = False

    def roofline_seconds(self, flop_rate: float, byte_rate: float, narrow_rate: float | None = None) -> float:
        """The roofline bound: least seconds on a device that reaches these FLOP and bytes a second."""
        rate = narrow_rate if self.narrow and narrow_rate else flop_rate
        return max(self.flop / rate, self.bytes / byte_rate)


@dataclass(frozen=True)
class Call:
    """One call of an operator: its name and its tensors' sizes as the profiler writes them, and what it computes."""

    operator: str
    sizes: tuple[tuple[int, ...], ...]
    operations: tuple[Operation, ...]


def operator_name(name: str) -> str:
    """The operator's name, the same for all forms of it that a backend may choose."""
    return f"aten::{_ATTENTION}" if "scaled_dot_product" in name else name


def tensor_sizes(sizes: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Sizes of the tensors in a profiler's list of arguments; drops arguments without a size, flattens lists."""
    flat: list[Any] = []
    for size in sizes:
        if size and isinstance(size[0], (list, tuple)):
            flat += tensor_sizes(size)
        elif size:
            flat.append(tuple(size))
    return tuple(flat)


def moved_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors; elements repeated by a stride of 0 count once, None counts 0."""
    total = 0
    for t in {id(t): t for t in tensors if t is not None}.values():
        kept = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or size == 0)
        total += math.prod(kept) * t.element_size()
    return total


def _aten_flop(name, inputs, out):
    if name in _PRODUCTS:
        left, right = inputs[-2:]
        return 2 * left.numel() * right.shape[-1]
    if name == "convolution":
        return 2 * out.numel() * inputs[1][0].numel()
    if name == _ATTENTION:
        q, k, v = inputs[:3]
        return 2 * q.numel() * k.shape[-2] + 2 * math.prod(q.shape[:-1]) * k.shape[-2] * v.shape[-1]
    return 0


def _attention(a, out):
    q, keys = (a["qkv"], a["qkv"]) if a["k"] is None else (a["qkv"], a["k"])
    flop = 4 * q.shape[0] * q.shape[1] * keys.shape[1] * out.shape[-1]
    yield "attention", None, flop, moved_bytes(a["qkv"], a["k"], a["v"], out)


def _attention_options(a, out):
    q, keys = (a["qkv"], a["qkv"]) if a["k"] is None else (a["qkv"], a["k"])
    of_values = out.shape[-1]
    of_scores = of_values if a["k"] is None else q.shape[2]
    sequences = 1 if a["cu_seqlens"] is None else a["cu_seqlens"].shape[0] - 1
    flop = 2 * q.shape[0] * q.shape[1] * keys.shape[1] * (of_scores + of_values) // sequences
    tables = (a[name] for name in ("bias", "height", "width", "cos", "sin"))
    yield "attention", None, flop, moved_bytes(a["qkv"], a["k"], a["v"], *tables, out)


def _layer_norm(a, out):
    yield "layer_norm", a["weight"], 0, moved_bytes(a["x"], a["weight"], a["bias"], out)


def _layer_norm_linear(a, out):
    x, weight = a["x"], a["weight"]
    normal = x.numel() * weight.element_size()
    yield "layer_norm", a["ln_weight"], 0, moved_bytes(x, a["ln_weight"], a["ln_bias"]) + normal
    yield "linear", weight, 2 * x.numel() * weight.shape[0], normal + moved_bytes(weight, a["bias"], out)


def _linear_residual(a, out):
    x, weight = a["x"], a["weight"]
    read = moved_bytes(x)
    if a["inner_eps"] is not None:
        normal = x.numel() * weight.element_size()
        yield "layer_norm", a["inner_weight"], 0, read + moved_bytes(a["inner_weight"], a["inner_bias"]) + normal
        read = normal
    moved = moved_bytes(weight, a["bias"], a["gamma"], a["row_scale"], a["residual"], out) + read
    yield "linear", weight, 2 * x.numel() * weight.shape[0], moved


def _layernorm_mlp(a, out):
    x, w1, w2 = a["x"], a["w1"], a["w2"]
    rows = x.numel() // x.shape[-1]
    normal, hidden = x.numel() * w1.element_size(), rows * w2.shape[1] * w1.element_size()
    yield "layer_norm", a["ln_weight"], 0, moved_bytes(x, a["ln_weight"], a["ln_bias"]) + normal
    yield "linear", w1, 2 * x.numel() * w1.shape[0], normal + moved_bytes(w1, a["b1"]) + hidden
    if a["inner_eps"] is not None:
        yield "layer_norm", a["inner_weight"], 0, moved_bytes(a["inner_weight"], a["inner_bias"]) + 2 * hidden
    vectors = (a["b2"], a["gamma"], a["row_scale"])
    yield "linear", w2, 2 * rows * w2.numel(), hidden + moved_bytes(w2, *vectors, x, out)


def _patch_embed(a, out):
    images, weight = a["images"], a["weight"]
    patches = math.prod((images.shape[2 + i] - weight.shape[2 + i]) // a["stride"][i] + 1 for i in range(2))
    moved = moved_bytes(images, weight, a["bias"], a["pos_embed"], a["prefix_tokens"], out)
    yield "patch_embed", weight, 2 * images.shape[0] * patches * weight.numel(), moved


def _prepared_blocks(a, out):
    """Bytes as in the table at the head of ``kernels/prepared_blocks.py``."""
    wide = moved_bytes(out)
    _, tokens, width = out.shape
    rows = out.numel() // width

    def linear(moved, weight, *vectors):
        return "linear", weight, 2 * rows * weight.numel(), moved_bytes(weight, *vectors) + moved

    for b in unflatten(FoldedBlock, a["weights"]):
        hidden = rows * b.fc2_weight.shape[1] * b.fc2_weight.element_size()
        yield linear(4 * wide, b.qkv_weight, b.qkv_sums, b.qkv_bias)
        yield "attention", b.proj_weight, 4 * rows * tokens * width, 4 * wide
        yield linear(3 * wide, b.proj_weight, b.proj_bias)
        yield linear(wide + hidden, b.fc1_weight, b.fc1_sums, b.fc1_bias)
        yield linear(hidden + 2 * wide, b.fc2_weight, b.fc2_bias)


def _fp8_blocks(a, out):
    """Bytes as in the table at the head of ``kernels/fp8_blocks.py``: 1 an element for e4m3 tensors."""
    wide = moved_bytes(out)
    _, tokens, width = out.shape
    rows = out.numel() // width
    narrow = rows * width

    def linear(moved, weight, *vectors):
        return "linear", weight, 2 * rows * weight.numel(), moved_bytes(weight, *vectors) + moved

    for b in unflatten(Float8Block, a["weights"]):
        hidden = rows * b.fc2_weight.shape[1]
        norm = ("layer_norm", b.norm_scale, 0, wide + moved_bytes(b.norm_scale) + narrow)
        yield norm
        yield linear(narrow + 3 * wide, b.qkv_weight, b.qkv_scale, b.qkv_bias)
        yield "attention", b.norm_scale, 4 * rows * tokens * width, 3 * wide + narrow
        yield linear(narrow + 2 * wide, b.proj_weight, b.proj_scale, b.proj_bias)
        yield norm
        yield linear(narrow + hidden, b.fc1_weight, b.fc1_scale, b.fc1_bias, b.hidden_scale)
        yield linear(hidden + 2 * wide, b.fc2_weight, b.fc2_scale, b.fc2_bias)


def _int8_blocks(a, out):
    """Bytes: 1 an element for what is multiplied, 4 for what is float32 between the products."""
    _, tokens, width = out.shape
    rows = out.numel() // width
    narrow, wide = rows * width, 4 * rows * width

    def linear(moved, weight, *vectors):
        return "linear", weight, 2 * rows * weight.numel(), moved_bytes(weight, *vectors) + moved

    for b in unflatten(Int8Block, a["weights"]):
        hidden = rows * b.fc2_weight.shape[1] * b.fc2_weight.shape[3]
        norm = ("layer_norm", None, 0, wide + narrow)
        yield norm
        yield linear(narrow + 3 * wide, b.qkv_weight, b.qkv_gain, b.qkv_scale, b.qkv_sums, b.qkv_bias)
        yield "attention", None, 4 * rows * tokens * width, 4 * wide
        yield linear(narrow + 2 * wide, b.proj_weight, b.proj_gain, b.proj_scale, b.proj_sums, b.proj_bias)
        yield norm
        yield linear(narrow + hidden, b.fc1_weight, b.fc1_gain, b.fc1_scale, b.fc1_sums, b.fc1_bias)
        yield linear(hidden + 2 * wide, b.fc2_weight, b.fc2_gain, b.fc2_scale, b.fc2_sums, b.fc2_bias)


def _one_linear(a, out):
    """One linear layer on a prepared weight, which may be narrower than what it multiplies: an element of a token takes
    as many bytes as one of the weight. In float8 and int8 tokens are rounded by a launch of their own, norm or not."""
    x, weight = a["x"], a["weight"]
    rows, size = x.numel() // x.shape[-1], weight[0].element_size()
    if a["eps"] is not None or size == 1:
        yield "layer_norm", weight[0], 0, moved_bytes(x, a["ln_weight"], a["ln_bias"]) + x.numel() * size
    outputs = weight[0].shape[0] if weight[0].dim() == 2 else a["features"]
    moved = x.numel() * size + moved_bytes(*weight, a["bias"], a["gamma"], a["residual"], out)
    yield "linear", weight[0], 2 * rows * x.shape[-1] * outputs, moved


# Each function yields (name, a parameter or None, FLOP, bytes) of the kernels that an operator launches, in order.
_VIT_FAST = {
    "vit_fast::attention_fwd": _attention,
    "vit_fast::attention_options_fwd": _attention_options,
    "vit_fast::layer_norm_fwd": _layer_norm,
    "vit_fast::layer_norm_linear_fwd": _layer_norm_linear,
    "vit_fast::linear_residual_fwd": _linear_residual,
    "vit_fast::layernorm_mlp_fwd": _layernorm_mlp,
    "vit_fast::patch_embed_fwd": _patch_embed,
    "vit_fast::prepared_blocks": _prepared_blocks,
    "vit_fast::fp8_blocks": _fp8_blocks,
    "vit_fast::int8_blocks": _int8_blocks,
    "vit_fast::prepared_linear": _one_linear,
    "vit_fast::packed_linear": _one_linear,
    "vit_fast::fp8_linear": _one_linear,
    "vit_fast::int8_linear": _one_linear,
}


def _label(path):
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _prepared_names(model):
    """{id of a tensor: label} of the tensors that ``vit_fast.prepare`` made, labelled by their source modules; and the
    same by the blocks that they are of."""
    names, blocks = {}, {}
    for name, module in model.named_modules():
        prepared = module.__dict__.get(PREPARED)
        for part, weight in packed_weights(prepared.twin) if hasattr(prepared, "twin") else ():
            names |= {id(tensor): _label(f"{name}.{part}") for tensor in weight.tensors}
        records = getattr(prepared, "records", ())
        block = "*" if isinstance(module, nn.Sequential | nn.ModuleList) else ""  # a stack, or a block alone
        for record in records:
            for part, tensor in zip(prepared.form.modules(), record, strict=True):
                names[id(tensor)] = ".".join(filter(None, (name, block, part)))
                blocks[id(tensor)] = ".".join(filter(None, (name, block)))
    return names, blocks


def _storages(tensors):
    return {t.untyped_storage()._cdata for t in tensors}


def _moves_nothing(func, inputs, outputs):
    """Whether a call moves no data: a view, or an allocation."""
    if func.is_view or "empty" in func._schema.name:
        return True
    return bool(inputs) and not func._schema.is_mutable and _storages(outputs) <= _storages(inputs)


class Recorder(TorchDispatchMode):
    """Records every operator call; names parameters, and tensors computed from parameters alone."""

    table = _VIT_FAST  # of vit_fast's operators

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.module = ""
        self.names = {id(p): _label(name.rpartition(".")[0] or name) for name, p in model.named_parameters()}
        prepared, self.blocks = _prepared_names(model)
        self.names |= prepared
        self.kept: list[Any] = []  # references: the id of a freed tensor may be given to another

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        named = [self.names[id(t)] for t in inputs if id(t) in self.names]
        if inputs and len(named) == len(inputs):
            self.kept += outputs
            self.names |= {id(t): named[0] for t in outputs}
        if outputs and not _moves_nothing(func, inputs, outputs):
            arguments = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
            operations = tuple(self._operations(func._schema.name, arguments, inputs, outputs[0], named))
            if operations:
                listed = [a for a in args if not (isinstance(a, list | tuple) and len(a) > _LISTED)]
                listed = [leaf for leaf in tree_leaves((listed, kwargs)) if isinstance(leaf, torch.Tensor)]
                sizes = tensor_sizes([tuple(t.shape) for t in listed])
                self.calls.append(Call(operator_name(func._schema.name), sizes, operations))
        return out

    def _operations(self, operator, arguments, inputs, out, named):
        if operator in self.table:
            for name, parameter, flop, moved in self.table[operator](arguments, out):
                narrow = parameter is not None and parameter.dtype in _NARROW_DTYPES
                labels = self.blocks if name == "attention" else self.names
                yield Operation(name, labels.get(id(parameter), self.module), flop, moved, narrow)
        elif operator.startswith("aten::"):
            name = operator_name(operator).removeprefix("aten::").rstrip("_")
            shown = "attention" if name == _ATTENTION else _NAMES.get(name, name)
            module = named[-1] if named else self.module
            yield Operation(shown, module, _aten_flop(name, inputs, out), moved_bytes(*inputs, out))


def record(model: nn.Module, pixels: torch.Tensor, recorder: Recorder, fake: FakeTensorMode) -> None:
    """Runs one forward pass of ``model`` on fake ``pixels``, seen by ``recorder``."""
    names = {module: _label(name) for name, module in model.named_modules()}
    stack = [""]

    def enter(module, inputs):
        stack.append(names.get(module, stack[-1]))
        recorder.module = stack[-1]

    def leave(module, inputs, output):
        stack.pop()
        recorder.module = stack[-1]

    # Global hooks, not the modules' own: a module that carries a hook is not fused.
    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        # Under inference_mode a dispatch mode sees composite operators such as F.linear, the profiler what they call.
        with torch.inference_mode(False), torch.no_grad(), without_shared_caches(), fake, recorder:
            model(pixels)
    finally:
        for handle in handles:
            handle.remove()


def forward_operations(model: nn.Module, pixels: torch.Tensor) -> list[Call]:
    """The calls of one forward pass of ``model`` on ``pixels``, in order: of PyTorch's operators and of vit_fast's."""
    recorder, fake = Recorder(model), FakeTensorMode(allow_non_fake_inputs=True)
    record(model, fake.from_tensor(pixels), recorder, fake)
    return recorder.calls
