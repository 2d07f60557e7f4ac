"""prepare(model): weights folded once for inference, so that a transformer block is five launches, or runs in float8.

LayerNorm's weight and bias go into the projection that follows it (its statistics stay, in that projection's epilogue),
LayerScale into the projection that ends the branch; for float8 the result is quantised. The folded copies belong to the
row of blocks they were made of (``nn.Sequential``, ``nn.ModuleList``): no parameter changes, and ``state_dict``,
``deepcopy`` and pickles do not see them. ``block.run_blocks`` asks them whether they serve a call, which includes a
look at every parameter they came from.
"""

import logging

import torch
from torch import nn

from . import ops
from .block import PREPARED, BlockParams
from .kernels.arguments import UnsupportedError
from .kernels.folding import TENSORS_PER_BLOCK, TENSORS_PER_FP8_BLOCK, fp8_block, prepare_block

_logger = logging.getLogger("vit_fast")
_DTYPES = (torch.float16, torch.bfloat16)
_PRECISIONS = (None, "fp8")


def _version(tensor):
    """What grows with every change in place; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


class Dropped:
    """In the place of folded weights that no longer serve: their precision, for ``refresh``."""

    def __init__(self, precision):
        self.precision = precision

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()

    def serves(self, x) -> bool:
        return False


class Prepared(Dropped):
    """The folded weights of a row of blocks, and what they were folded from."""

    def __init__(self, blocks, precision):
        super().__init__(precision)
        self.blocks = blocks
        params = [block.params() for block in blocks]
        head = params[0]
        self.words = (head.num_heads, head.scale, head.activation, head.norm1.eps, head.norm2.eps)
        self.dtype = head.qkv_weight.dtype
        with torch.no_grad():
            self.weights = [tensor for p in params for tensor in _fold(p, precision)]
        self.modules, self.children, self.parameters = [], [], []
        for name, module in blocks.named_modules():
            if module is not blocks:
                self.modules.append((module, type(module)))
            self.children += [(module._modules, key, child) for key, child in module._modules.items()]
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    where = (f"{name}.{key}", module._parameters, key, tensor)
                    self.parameters.append((*where, tensor.data_ptr(), _version(tensor)))

    def serves(self, x) -> bool:
        """Whether these weights may take x: inference, plain modules, the dtype and device they have; drops them, with
        a warning, where a parameter they were folded from has changed since."""
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or x.dtype != self.dtype
            or x.device != self.weights[0].device
        ):
            return False
        for module, cls in self.modules:
            if module.training or module._forward_hooks or module._forward_pre_hooks or type(module) is not cls:
                return False
            if "forward" in module.__dict__:
                return False
        changed = self._changed()
        if changed is not None:
            _logger.warning("%s changed: its prepared weights are dropped; vit_fast.refresh(model) folds anew", changed)
            self.blocks.__dict__[PREPARED] = Dropped(self.precision)
        return changed is None

    def _changed(self):
        """The name of a module or parameter that is no longer what was folded, or None."""
        for modules, key, child in self.children:
            if modules.get(key) is not child:
                return key
        for name, parameters, key, tensor, pointer, version in self.parameters:
            if parameters.get(key) is not tensor or tensor.data_ptr() != pointer or _version(tensor) != version:
                return name
        return None

    def run(self, x, first, last):
        """x through the blocks first … last."""
        operation, size = ops.prepared_blocks, TENSORS_PER_BLOCK
        if self.precision == "fp8":
            operation, size = ops.fp8_blocks, TENSORS_PER_FP8_BLOCK
        chosen = range(len(self.weights) // size)[first:last]
        if not chosen:
            return x
        return operation(x, self.weights[chosen.start * size : chosen.stop * size], *self.words)


def _fold(p: BlockParams, precision):
    parts = (
        p.norm1[:2], (p.qkv_weight, p.qkv_bias), (p.proj_weight, p.proj_bias), p.gamma1,
        p.norm2[:2], (p.fc1_weight, p.fc1_bias), (p.fc2_weight, p.fc2_bias), p.gamma2,
    )  # fmt: skip
    return fp8_block(*parts, p.activation) if precision == "fp8" else prepare_block(*parts)


def _not_supported_reasons(blocks, precision):
    """Why a row of blocks cannot be prepared."""
    if not all(getattr(block, "is_fused", lambda: True)() for block in blocks):
        return ["a block carries a hook, a parametrization or a module of another class"]
    params, reasons = [block.params() for block in blocks], []
    if any(p.norm1 is None or p.norm2 is None for p in params):
        return ["the blocks are not pre-norm"]
    if any(p.value_skip for p in params):
        reasons.append("the blocks add the values to the branch (value_skip)")
    if any(p.q_norm is not None or p.k_norm is not None for p in params):
        reasons.append("the blocks normalise q and k (qk_norm)")
    words = [
        (p.num_heads, p.scale, p.activation, p.norm1.eps, p.norm2.eps, p.qkv_weight.shape, p.qkv_weight.device)
        for p in params
    ]
    if any(word != words[0] for word in words):
        reasons.append("the blocks differ in heads, scale, activation, eps, width or device")
    tensors = [getattr(p, name) for p in params for name in ("qkv_weight", "proj_weight", "fc1_weight", "fc2_weight")]
    if any(t.device.type == "meta" for t in tensors):
        reasons.append("the weights are on the device meta")
    dtypes = {t.dtype for t in tensors}
    if dtypes - set(_DTYPES) or len(dtypes) > 1:
        came = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        reasons.append(f"the weights are {came}, folding is for all float16 or all bfloat16 (model.to(torch.bfloat16))")
    device = tensors[0].device
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        reasons.append(f"float8 needs capability 8.9, {device} has {major}.{minor}")
    return reasons


def _rows_of_blocks(model):
    """(name, container) of every row of blocks in a model."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
            if all(hasattr(block, "params") for block in module):
                yield name, module


def prepare(model: nn.Module, precision: str | None = None) -> nn.Module:
    """Folds the weights of a model's transformer blocks for inference, in place.

    Used in ``eval`` without gradients (``torch.no_grad``, ``torch.inference_mode``), outside ``torch.compile`` and
    autocast; elsewhere the model runs as it was. ``explain(model)`` shows ``prepared_blocks`` where they serve. A
    changed, moved or replaced parameter, a new module, ``load_state_dict`` or ``.to()`` drops them, with a warning;
    ``refresh`` folds anew. Writes through ``parameter.data`` cannot be seen: call ``refresh`` after them. The copies
    take as much memory as the blocks (in float8 half of it). Results differ from the unprepared model's by the rounding
    of the folded weights, within the error budget of a whole model.

    ``precision="fp8"`` quantises the weights of the four projections, and what they multiply, to float8 e4m3. No data
    is needed for it: all scales follow from the weights, and no value saturates. Each product then errs by some 5 % of
    its spread instead of 0.3 % in bfloat16; see what that does to your task before you rely on it.

    Args:
        model: a ``VisionTransformer``, a model of ``vit_fast.systems``, one that ``vit_fast.optimize`` has changed, or
            a module that holds one; float16 or bfloat16 weights.
        precision: None keeps the dtype of the weights; "fp8" needs capability 8.9 on a GPU.
    Returns:
        the model itself.
    Raises:
        TypeError: no module.
        ValueError: a model in training mode, or without transformer blocks of this library; another precision.
        UnsupportedError: none of its rows of blocks can be prepared; the reasons are named.
    Source: numeric rules of the fold: statistics of the rounded activations, merged from centred sums; weight rows
        centred before rounding; their sums taken after it. e4m3: Micikevicius et al., "FP8 Formats for Deep Learning".
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"vit_fast.prepare: precision is {precision!r}, expected None or 'fp8'")
    return _prepare(model, lambda blocks: precision)


def refresh(model: nn.Module) -> nn.Module:
    """Folds the weights of a prepared model anew, after they have changed, to the same precision; see ``prepare``."""
    return _prepare(model, lambda blocks: getattr(blocks.__dict__.get(PREPARED), "precision", None))


def _prepare(model, precision_of):
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.prepare: model is {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError("vit_fast.prepare: model is in training mode, expected model.eval()")
    rows = [(name, blocks, precision_of(blocks)) for name, blocks in _rows_of_blocks(model)]
    if not rows:
        raise ValueError(
            f"vit_fast.prepare: model is {type(model).__name__} without transformer blocks of this library, expected "
            "a VisionTransformer, a model of vit_fast.systems or an optimised model"
        )
    reasons = {name: _not_supported_reasons(blocks, precision) for name, blocks, precision in rows}
    if all(reasons.values()):
        told = "; ".join(f"{name or type(model).__name__}: {', '.join(why)}" for name, why in reasons.items())
        raise UnsupportedError(f"vit_fast.prepare: nothing can be prepared: {told}")
    for name, blocks, precision in rows:
        if reasons[name]:
            _logger.info("prepare leaves %s as it is: %s", name, "; ".join(reasons[name]))
        else:
            blocks.__dict__[PREPARED] = Prepared(blocks, precision)
    return model
