"""prepare(model): weights folded once for inference, so that a transformer block is five launches.

LayerNorm's weight and bias go into the projection that follows it (its statistics stay, in that projection's epilogue),
LayerScale into the projection that ends the branch. The folded copies belong to the row of blocks they were made of
(``nn.Sequential``, ``nn.ModuleList``): no parameter changes, and ``state_dict``, ``deepcopy`` and pickles do not see
them. ``block.run_blocks`` asks them whether they serve a call, which includes a look at every parameter they came from.
"""

import logging

import torch
from torch import nn

from . import ops
from .block import PREPARED, BlockParams
from .kernels.arguments import UnsupportedError
from .kernels.reference import TENSORS_PER_BLOCK, prepare_block

_logger = logging.getLogger("vit_fast")
_DTYPES = (torch.float16, torch.bfloat16)


def _version(tensor):
    """What grows with every change in place; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


class Prepared:
    """The folded weights of a row of blocks, and what they were folded from."""

    def __init__(self, blocks):
        self.blocks = blocks
        params = [block.params() for block in blocks]
        head = params[0]
        self.words = (head.num_heads, head.scale, head.activation, head.norm1.eps, head.norm2.eps)
        with torch.no_grad():
            self.weights = [tensor for p in params for tensor in _fold(p)]
        self.modules, self.children, self.parameters = [], [], []
        for name, module in blocks.named_modules():
            if module is not blocks:
                self.modules.append((module, type(module)))
            self.children += [(module._modules, key, child) for key, child in module._modules.items()]
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    where = (f"{name}.{key}", module._parameters, key, tensor)
                    self.parameters.append((*where, tensor.data_ptr(), _version(tensor)))

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()

    def serves(self, x) -> bool:
        """Whether these weights may take x: inference, plain modules, the dtype and device they have; drops them, with
        a warning, where a parameter they were folded from has changed since."""
        weight = self.weights[0]
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or x.dtype != weight.dtype
            or x.device != weight.device
        ):
            return False
        for module, cls in self.modules:
            if module.training or module._forward_hooks or module._forward_pre_hooks or type(module) is not cls:
                return False
        changed = self._changed()
        if changed is not None:
            _logger.warning("%s changed: its prepared weights are dropped; vit_fast.refresh(model) folds anew", changed)
            self.blocks.__dict__.pop(PREPARED, None)
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
        chosen = range(len(self.weights) // TENSORS_PER_BLOCK)[first:last]
        if not chosen:
            return x
        weights = self.weights[chosen.start * TENSORS_PER_BLOCK : chosen.stop * TENSORS_PER_BLOCK]
        return ops.prepared_blocks(x, weights, *self.words)


def _fold(p: BlockParams):
    return prepare_block(
        p.norm1[:2], (p.qkv_weight, p.qkv_bias), (p.proj_weight, p.proj_bias), p.gamma1,
        p.norm2[:2], (p.fc1_weight, p.fc1_bias), (p.fc2_weight, p.fc2_bias), p.gamma2,
    )  # fmt: skip


def _not_supported_reasons(blocks):
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
    return reasons


def _rows_of_blocks(model):
    """(name, container) of every row of blocks in a model."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
            if all(hasattr(block, "params") for block in module):
                yield name, module


def prepare(model: nn.Module) -> nn.Module:
    """Folds the weights of a model's transformer blocks for inference, in place.

    Used in ``eval`` without gradients (``torch.no_grad``, ``torch.inference_mode``), outside ``torch.compile`` and
    autocast; elsewhere the model runs as it was. ``explain(model)`` shows ``prepared_blocks`` where they serve. A
    changed, moved or replaced parameter, a new module, ``load_state_dict`` or ``.to()`` drops them, with a warning;
    ``refresh`` folds anew. Writes through ``parameter.data`` cannot be seen: call ``refresh`` after them. The copies
    take as much memory as the blocks. Results differ from the unprepared model's by the rounding of the folded
    weights, within the error budget of a whole model.

    Args:
        model: a ``VisionTransformer``, a model of ``vit_fast.systems``, or a module that holds one; float16 or
            bfloat16 weights.
    Returns:
        the model itself.
    Raises:
        TypeError: no module.
        ValueError: a model in training mode, or without transformer blocks of this library.
        UnsupportedError: none of its rows of blocks can be prepared; the reasons are named.
    Source: numeric rules of the fold: statistics of the rounded activations, merged from centred sums; weight rows
        centred before rounding; their sums taken after it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.prepare: model is {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError("vit_fast.prepare: model is in training mode, expected model.eval()")
    rows = list(_rows_of_blocks(model))
    if not rows:
        raise ValueError(
            f"vit_fast.prepare: model is {type(model).__name__} without transformer blocks of this library, expected "
            "a VisionTransformer or a model of vit_fast.systems"
        )
    reasons = {name: _not_supported_reasons(blocks) for name, blocks in rows}
    if all(reasons.values()):
        told = "; ".join(f"{name or type(model).__name__}: {', '.join(why)}" for name, why in reasons.items())
        raise UnsupportedError(f"vit_fast.prepare: nothing can be prepared: {told}")
    for name, blocks in rows:
        if reasons[name]:
            _logger.info("prepare leaves %s as it is: %s", name, "; ".join(reasons[name]))
        else:
            blocks.__dict__[PREPARED] = Prepared(blocks)
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Folds the weights of a prepared model anew, after they have changed; see ``prepare``."""
    return prepare(model)
