"""prepare(model): weights folded once for inference, so that a transformer block is five launches, or runs in float8.

The weight and bias of a norm are folded into the projection behind it (its statistics are applied in the epilogue of
that projection), LayerScale into the projection that ends the branch; the precision (``precisions``) decides what else
is done to the weights. A stack of blocks (``nn.Sequential``, ``nn.ModuleList``) that runs as a whole is folded as a
whole; where its model loops over the blocks, or gives them position tables, each block is folded alone. Of a block
whose form no stack has, each linear layer is prepared alone (``twin``). The folded copies are an attribute of
the stack or block that they were made of: no parameter changes, and ``state_dict``, ``deepcopy`` and pickles leave them
out. ``block.run_blocks`` and the blocks check in each call whether they may be used; where not, a warning says why,
once. They are dropped as soon as anything that the blocks compute with has changed (``snapshot``).
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from . import backends, heap, integrations, ops
from .block import PREPARED
from .block_params import BlockParams
from .class_swap import grouped
from .kernels.arguments import UnsupportedError
from .kernels.block_options import PLAIN, BlockOptions
from .kernels.folding import flatten
from .kernels.tracing import autocasts
from .plain import why_not_plain
from .precisions import PRECISIONS, Precision
from .remembered import has_hooks
from .snapshot import HOOKS, Snapshot
from .twin import linear_weights, twin

_logger = logging.getLogger("vit_fast")
_TRAINS = "a part of the blocks is in training mode"
_GRADIENTS = "gradients are enabled; they serve under torch.inference_mode() or torch.no_grad()"
_folded = WeakTensorKeyDictionary()  # the parameters that weights were folded from
_COPIED = "a copy or pickle of a model does not hold them; vit_fast.refresh(model) folds anew"


def _params(blocks: Iterable[Any]) -> list[BlockParams]:
    """The weights of every block of a stack."""
    return [block.params() for block in blocks]


class Stale:
    """Replaces prepared weights that were dropped: keeps their precision, for ``refresh``, and the reason.

    Attributes:
        name: of the stack or block in its model.
        precision: the name of the precision, as ``prepare`` takes it.
        unused: why the last call ran without prepared weights, or None.
        released: whether ``prepare`` gave the blocks' own weights back to the system.
    """

    def __init__(
        self,
        name: str,
        precision: str | None,
        unused: str | None,
        told: Iterable[str] = (),
        released: bool = False,
    ) -> None:
        self.name, self.precision, self._gone, self.released = name, precision, unused, released
        self.unused = unused
        self._told = set(told)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stale, (self.name, self.precision, _COPIED, (), self.released)

    def serves(self, x: torch.Tensor, holder: nn.Module) -> bool:
        """Whether prepared weights may be used for x [B, N, C]. The first time they may not, a warning says why.

        Raises:
            RuntimeError: they may not, and the blocks' own weights were released.
        """
        self.unused = reason = self._why_unused(x)  # a local, because another thread may set self.unused meanwhile
        if reason is not None:
            self.need_weights(holder, reason)
            self.pass_over(reason)
        return reason is None

    def need_weights(self, holder: nn.Module, reason: str) -> None:
        """Raises RuntimeError where a call needs the blocks' own weights and they were released."""
        if self.released and any(parameter.is_meta for parameter in holder.parameters()):
            raise RuntimeError(
                f"vit_fast.prepare: prepared weights of {self.name or 'the blocks'} are not used ({reason}), and the "
                "weights that they were made of were released; load these again with "
                "model.load_state_dict(state_dict, assign=True)"
            )

    def pass_over(self, reason: str) -> None:
        """Records why a call does not use prepared weights; each reason is warned about once."""
        self.unused = reason
        if reason not in self._told:
            self._told.add(reason)
            _logger.warning("prepared weights of %s are not used: %s", self.name or "the blocks", reason)

    def _why_unused(self, x: torch.Tensor) -> str | None:
        return self._gone


class Prepared(Stale):
    """The folded weights of a stack of blocks or of one block, and what they were folded from.

    Attributes:
        holder: the stack or block, which has them as an attribute.
        form: the precision, as it is prepared for the backend that runs on the device of the weights.
        dtype, device, width: of the tokens that they accept.
        records: the folded weights, one record of the precision for each block.
        weights: the tensors of all records in one list, as the operator takes them.
        arguments: heads, scale, activation and both eps, which follow the weights in the operator's signature.
        options: what the blocks have beside these.
    """

    def __init__(
        self, name: str, holder: nn.Module, blocks: Sequence[nn.Module], precision: Precision, release: bool
    ) -> None:
        super().__init__(name, precision.name, None, released=release)
        self.holder, self.form = holder, precision
        params = _params(blocks)
        first = params[0]
        assert first.norm1 is not None and first.norm2 is not None  # ensured by _not_supported_reasons
        self.arguments = first.num_heads, first.scale, first.activation, first.norm1.eps, first.norm2.eps
        self.options = _options(first)
        self.dtype, self.device = first.qkv_weight.dtype, first.qkv_weight.device
        self.width = first.qkv_weight.shape[1]
        del first
        self.records = []
        with torch.no_grad():
            for block in blocks:
                # Nothing else refers to these parameters: what a block makes of its own is gone when it is folded.
                self.records.append(precision.fold(params.pop(0)))
                if release:
                    _release(block)
                heap.trim()
        self.weights = flatten(self.records)
        self._blocks = None if holder is blocks[0] else tuple(blocks)
        # Before the snapshot, which sees what blocks hold.
        vars(holder)[PREPARED] = self
        for index, block in enumerate(self._blocks or ()):
            if getattr(block, "RUNS_PREPARED", False):
                vars(block)[PREPARED] = Part(holder, index)
        self._watch()

    def _watch(self) -> None:
        """Remembers what the modules are made of, so that a change of it is seen."""
        self._parts = dict(self.holder.named_modules(prefix=self.name))
        if self._blocks is not None:
            del self._parts[self.name]  # the stack is only a container: its own forward does not run
        self._snapshot = Snapshot(self._parts)
        _folded.update(dict.fromkeys(self._snapshot.tensors, True))
        _count_steps()

    def _why_unused(self, x: torch.Tensor) -> str | None:
        """Why the blocks have to run one by one, or None. Where what was folded has changed, drops the weights."""
        if torch.is_grad_enabled():
            return _GRADIENTS
        if autocasts(x.device.type):
            return "autocast is enabled; they serve outside of it"
        changed = self._snapshot.changed()
        if changed is not None and (reason := self._steps_aside()):
            return reason
        if self._blocks is not None and tuple(self.holder._modules.values()) != self._blocks:
            changed = self.name or "the blocks"
        if changed is not None:
            reason = f"{changed} changed, so the prepared weights are dropped; vit_fast.refresh(model) folds anew"
            vars(self.holder)[PREPARED] = Stale(
                self.name, self.precision, reason, told=[reason], released=self.released
            )
            return reason
        if x.dtype != self.dtype or x.device != self.device:
            return f"tokens are {x.dtype} on {x.device}; they are {self.dtype} on {self.device}"
        return None

    def _steps_aside(self) -> str | None:
        """Why the weights are passed over for now but not dropped (training mode, a hook, a forward of an instance), or
        None."""
        for name, module in self._parts.items():
            if module.training:
                return f"{name} is in training mode; they serve after model.eval()"
            if any(vars(module)[hooks] for hooks in HOOKS):
                return f"{name} carries a hook"
            if "forward" in vars(module):
                return f"{name} has a forward of its own"
        return None

    def run(self, x: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """x [B, N, C] through blocks[first:last] of a stack."""
        if x.shape[-1] != self.width:  # which packed weights alone tell only up to their padding
            raise ValueError(
                f"vit_fast.{self.form.operation}: x has width {x.shape[-1]}, expected {self.width} (as the weights)"
            )
        weights = self.weights if (first, last) == (0, None) else flatten(self.records[first:last])
        return ops.blocks(self.form, x, weights, *self.arguments, self.options) if weights else x

    def run_block(self, x: torch.Tensor, index: int = 0, **options: Any) -> torch.Tensor:
        """x [B, N, C] through one block; ``options`` are fields of ``BlockOptions`` that differ from call to call."""
        chosen = self.options._replace(**options) if options else self.options
        return ops.blocks(self.form, x, self.records[index], *self.arguments, chosen)


class PreparedParts(Prepared):
    """A block of which no stack of prepared blocks knows the form: each of its linear layers has a prepared weight.

    Attributes:
        twin: the block, with those weights (``twin``).
    """

    def __init__(
        self, name: str, holder: nn.Module, blocks: Sequence[nn.Module], precision: Precision, release: bool
    ) -> None:
        Stale.__init__(self, name, precision.name, None, released=release)
        self.holder, self.form, self._blocks = holder, precision, None
        self.records = []
        self.device, self.dtype = _kind(holder)
        with torch.no_grad():
            self.twin = twin(holder, precision)
        if release:
            _release(holder)
        heap.trim()
        vars(holder)[PREPARED] = self
        self._watch()

    def run_block(self, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:  # type: ignore[override]
        """The fused form of the block."""
        out: torch.Tensor = self.twin.fused_parts(*inputs, **options)
        return out


class Part:
    """What a block of a prepared stack holds, for calls of the block alone: the stack, and the block's place in it."""

    unused = None  # the stack tells

    def __init__(self, holder: nn.Module | None, index: int) -> None:
        self._holder, self._index = None if holder is None else weakref.ref(holder), index

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (None, self._index)

    def _stack(self) -> Any:
        """The prepared weights of the stack, or None; a copy has none."""
        holder = None if self._holder is None else self._holder()
        return None if holder is None else vars(holder).get(PREPARED)

    def serves(self, x: torch.Tensor, holder: nn.Module) -> bool:
        """As ``Stale.serves``."""
        stack = self._stack()
        return stack is not None and stack.serves(x, holder)

    def need_weights(self, holder: nn.Module, reason: str) -> None:
        """As ``Stale.need_weights``."""
        if (stack := self._stack()) is not None:
            stack.need_weights(holder, reason)

    def pass_over(self, reason: str) -> None:
        """As ``Stale.pass_over``; of weights that are gone, the stack has told."""
        if isinstance(stack := self._stack(), Prepared):
            stack.pass_over(reason)

    def run_block(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """As ``Prepared.run_block``."""
        out: torch.Tensor = self._stack().run_block(x, self._index, **options)
        return out


def _options(p: BlockParams) -> BlockOptions:
    """What a block has beside its weights, heads, scale, activation and the eps of norm1 and norm2."""
    norms = (p.out_norm, p.inner_norm, p.q_norm, p.k_norm)
    if p.norm == "layer" and all(norm is None for norm in norms):
        return PLAIN
    options = BlockOptions(norm=p.norm, q_norm=p.q_norm, k_norm=p.k_norm)
    if p.out_norm is not None:
        options = options._replace(out_eps=p.out_norm.eps)
    if p.inner_norm is not None:
        options = options._replace(hidden_eps=p.inner_norm.eps, hidden_features=p.fc2_weight.shape[1])
    return options


def _release(block: nn.Module) -> None:
    """Gives the weights of the linear layers of a block back to the system: the parameters keep their shapes, on the
    device meta."""
    for module, name, weight in linear_weights(block):
        empty = torch.empty_like(weight, device="meta")
        module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)


@functools.cache
def _count_steps() -> None:
    """Makes every optimizer step raise the version of the parameters that weights were folded from: torch's fused
    optimizers, and those of other libraries, write in place without doing so."""

    def count(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in _folded:
                    torch.autograd.graph.increment_version(parameter)

    register_optimizer_step_post_hook(count)


def _runs_its_params(cls: Any) -> bool:
    """Whether a block class computes what its ``params`` describe: a subclass may override ``forward`` alone."""
    owner = next((base for base in cls.__mro__ if "params" in vars(base)), None)
    return owner is not None and inspect.unwrap(cls.forward) is inspect.unwrap(owner.forward)


def _not_supported_reasons(blocks: Sequence[Any], precision: Precision) -> list[str]:
    """Why a stack of blocks, or a block alone, cannot be prepared."""
    if unknown := {type(block).__name__ for block in blocks if not _can_be_folded(block)}:
        return [f"blocks of class {', '.join(sorted(unknown))} are not folded"]
    if not all(getattr(block, "is_fused", lambda: True)() for block in blocks):
        return ["a block carries a hook, a parametrization or a module of another class"]
    if any(not _runs_its_params(type(b)) or why_not_plain(b, (type(b),), b.ignores) for b in blocks):
        return ["a block carries a hook or has a forward of its own"]
    if _any_trains(blocks):
        return [_TRAINS]
    told = {getattr(block, "not_folded", lambda: None)() for block in blocks}
    if why := sorted(reason for reason in told if reason is not None):
        return why
    params = _params(blocks)
    if any(p.norm1 is None or p.norm2 is None for p in params):
        return ["the blocks are not pre-norm"]
    reasons: list[str] = []
    if any(p.value_skip for p in params):
        reasons.append("the blocks add the values to the branch (value_skip)")
    if any(p.qkv_weight.shape != (3 * p.qkv_weight.shape[1], p.proj_weight.shape[0]) for p in params):
        reasons.append("the heads are not as wide as the tokens in all")
    tensors = [getattr(p, name) for p in params for name in ("qkv_weight", "proj_weight", "fc1_weight", "fc2_weight")]
    reasons += _state_reasons(blocks)
    return reasons + precision.not_supported_reasons(tensors)


def _runs_by_parts(block: Any) -> bool:
    """Whether the linear layers of a block are prepared one by one, because no stack has its form."""
    if not getattr(block, "RUNS_PARTS", False) or not block.is_fused():
        return False
    if not _can_be_folded(block) or getattr(block, "not_folded", lambda: None)() is not None:
        return True
    p = block.params()
    return p.norm1 is None or p.norm2 is None


def _not_by_parts_reasons(blocks: Sequence[Any], precision: Precision) -> list[str]:
    """Why the linear layers of blocks cannot be prepared one by one."""
    if precision.linear is None:
        return [*_not_supported_reasons(blocks, precision), precision.no_linear]
    if any(why_not_plain(block, (type(block),), block.ignores) for block in blocks):
        return ["a block carries a hook or has a forward of its own"]
    linears = [linear for block in blocks for linear in linear_weights(block)]
    if has_hooks(module for module, *_ in linears):
        return ["a linear layer carries a hook"]
    if any(type(weight) is not nn.Parameter for *_, weight in linears):
        return ["a weight is of another class than nn.Parameter"]
    if _any_trains(blocks):
        return [_TRAINS]
    return _state_reasons(blocks) or precision.not_supported_reasons([weight for *_, weight in linears], by_parts=True)


def _any_trains(blocks: Sequence[Any]) -> bool:
    return any(module.training for block in blocks for module in block.modules())


def _state_reasons(blocks: Sequence[Any]) -> list[str]:
    """Why the parameters of blocks cannot be prepared where they are."""
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    reasons = []
    if any(parameter.device.type == "meta" and parameter.dim() > 1 for parameter in parameters):
        reasons.append("the weights are on the device meta")
    if any(parameter.is_inference() for parameter in parameters):
        reasons.append(
            "the weights are inference tensors, whose changes torch does not count (make, load and move the model "
            "outside of torch.inference_mode())"
        )
    return reasons


def _not_whole_reasons(blocks: Sequence[Any]) -> list[str]:
    """Why blocks that can be prepared cannot be prepared together."""
    params, reasons = _params(blocks), []
    if any(p.q_norm is not None or p.k_norm is not None for p in params):
        reasons.append("the blocks normalise q and k (qk_norm)")
    if any(values != _shared(params[0]) for values in map(_shared, params)):
        reasons.append("the blocks differ in heads, scale, activation, norms, width or device")
    return reasons


def _can_be_folded(block: Any) -> bool:
    """Whether the class of a block has a prepared form, in a stack or alone."""
    return hasattr(block, "params") and (getattr(block, "STACKABLE", True) or getattr(block, "RUNS_PREPARED", False))


def _shared(p: BlockParams) -> tuple[Any, ...]:
    """What the blocks of a stack have in common."""
    norms = (p.norm1, p.norm2, p.out_norm, p.inner_norm)
    eps = [norm and norm.eps for norm in norms]
    return p.num_heads, p.scale, p.activation, p.norm, eps, p.qkv_weight.shape, p.fc2_weight.shape, p.qkv_weight.device


class _Unit(NamedTuple):
    """What is prepared at once: a stack of blocks, or a block alone, which then is the holder."""

    name: str
    holder: nn.Module
    blocks: tuple[nn.Module, ...]


def _units(model: nn.Module) -> Iterator[tuple[_Unit | None, list[_Unit]]]:
    """For every stack of blocks in a model the stack, where it runs as a whole, and those of its blocks that can be
    prepared alone."""
    whole = {stack for module in model.modules() for stack in integrations.stacks_of(module)}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList)) or not len(module):
            continue
        blocks = tuple(module)
        alone = [
            _Unit(f"{name}.{key}".removeprefix("."), block, (block,))
            for key, block in module.named_children()
            if _runs_by_parts(block) or (getattr(block, "RUNS_PREPARED", False) and hasattr(block, "params"))
        ]
        runs_whole = module in whole or not any(isinstance(block, integrations.Fused) for block in blocks)
        stack = _Unit(name, module, blocks)
        if runs_whole and all(hasattr(block, "params") and getattr(block, "STACKABLE", True) for block in blocks):
            yield stack, alone
        elif alone or all(isinstance(block, integrations.Fused) for block in blocks):
            yield None, alone or [_Unit(name, module, blocks)]


def prepare(model: nn.Module, precision: str | None = None, *, release: bool = False) -> nn.Module:
    """Folds the weights of a model's transformer blocks for inference, in place.

    Used in ``eval`` without gradients (``torch.no_grad``, ``torch.inference_mode``), outside ``torch.compile`` and
    autocast; in other calls, and with hooks in the blocks, the blocks run as they were, and the logger "vit_fast" warns
    once of each reason. ``explain(model)`` shows ``prepared_blocks`` where the folded weights are used, on a CPU with
    the C++ library ``packed_blocks``, by precision ``fp8_blocks`` or ``int8_blocks``. Any change of what the blocks
    compute (parameters trained, moved, loaded or replaced, modules, ``.to()``, attributes such as
    ``num_heads``, ``scale`` and ``eps``) drops them, with a warning; ``refresh`` folds anew, ``unprepare`` undoes
    ``prepare``. Writes through ``parameter.data`` go unnoticed: call ``refresh`` after them; ``check`` finds them.
    Copies and pickles of the model do not hold the folded weights, which take as much memory as the blocks (in float8
    half of it, in int8 a quarter of float32's). Results differ from the unprepared model's by the rounding of the
    folded weights, within the error budget of a whole model.

    ``precision="fp8"`` quantises the weights of the four projections, and what they multiply, to float8 e4m3. No data
    is needed for it: all scales follow from the weights, and no value saturates. Each product then errs by some 5 % of
    its spread instead of 0.3 % in bfloat16; see what that does to your task before you rely on it.

    On a CPU the weights are packed for the C++ library (``vit-fast build``), which takes float32 too, and
    ``precision="int8"`` quantises the weights of the four projections, a scale for each output, and what they multiply,
    a step and a zero point for each token, found as it passes: no data is needed. Attention, residual and statistics
    stay in float.

    Blocks that are not pre-norm, or have branches, windows or attention of another kind, are prepared linear layer by
    linear layer, on every device and in every precision: ``explain`` shows ``prepared_linear``, on a CPU with the C++
    library ``packed_linear``, by precision ``fp8_linear`` (a step for each token, found as it passes) or
    ``int8_linear``. Nothing is folded there, layers that multiply the same tokens are one product, and without a
    precision float32 is taken on a GPU too.

    Args:
        model: a ``VisionTransformer``, a model of ``vit_fast.systems``, one that ``vit_fast.optimize`` has changed, or
            a module that holds one; float16 or bfloat16 weights, with the C++ library on a CPU float32 too.
        precision: None keeps the dtype of the weights; "fp8" needs capability 8.9 on a GPU; "int8" is for a CPU.
        release: give the memory of the blocks' own matrices back, so that the prepared weights replace them. The model
            then runs prepared alone: a call that cannot use them raises, and so do ``check``, ``refresh`` and
            ``unprepare``, until ``model.load_state_dict(state_dict, assign=True)`` has loaded the matrices again.
            Tensors that share their memory elsewhere are not freed.
    Returns:
        the model itself.
    Raises:
        TypeError: no module.
        ValueError: a model in training mode, or without transformer blocks of this library; another precision.
        UnsupportedError: none of its stacks of blocks can be prepared; the reasons are named.
    Source: numeric rules of the fold: statistics of the rounded activations, merged from centred sums; weight rows
        centred before rounding; their sums taken after it. e4m3: Micikevicius et al., "FP8 Formats for Deep Learning".
    """
    _named("prepare", precision)  # a wrong name is reported before a wrong model
    return _prepare("prepare", model, lambda blocks: precision, release)


def refresh(model: nn.Module) -> nn.Module:
    """Folds the weights of a prepared model anew, after they have changed, to the same precision; see ``prepare``."""
    return _prepare("refresh", model, lambda blocks: getattr(blocks.__dict__.get(PREPARED), "precision", None))


def unprepare(model: nn.Module) -> nn.Module:
    """Undoes ``prepare``: frees the folded weights, so that the model runs on its own again, bit for bit as before.

    Args:
        model: any module; one that is not prepared stays as it is.
    Returns:
        the model itself.
    Raises:
        TypeError: no module.
        RuntimeError: the model's own weights were released, and not loaded again.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.unprepare: model is {type(model).__name__}, expected an nn.Module")
    for module in model.modules():
        if (held := module.__dict__.get(PREPARED)) is not None:
            held.need_weights(module, "unprepare drops them")
    for module in model.modules():
        module.__dict__.pop(PREPARED, None)
    return model


def _named(caller: str, name: str | None) -> Precision:
    """The precision of a name."""
    if name not in tuple(PRECISIONS):
        *others, last = map(repr, PRECISIONS)
        raise ValueError(f"vit_fast.{caller}: precision is {name!r}, expected {', '.join(others)} or {last}")
    return PRECISIONS[name]


def _kind(blocks: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the matrices of blocks."""
    found = ((p.device, p.dtype) for p in blocks.parameters() if p.dim() > 1)
    return next(found, (torch.device("cpu"), torch.float32))


def _prepare(
    caller: str, model: nn.Module, precision_of: Callable[[nn.Module], str | None], release: bool = False
) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"vit_fast.{caller}: model is {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError(f"vit_fast.{caller}: model is in training mode, expected model.eval()")
    chosen: list[tuple[type[Prepared], _Unit, Precision]] = []
    left: dict[str, str] = {}

    for stack, alone in _units(model):
        for unit in alone if stack is None or any(map(_runs_by_parts, stack.blocks)) else [stack]:
            precision = _named(caller, precision_of(unit.holder)).form(backends.preferred(*_kind(unit.holder)))
            by_parts = unit is not stack and _runs_by_parts(unit.holder)
            how, refuse = (PreparedParts, _not_by_parts_reasons) if by_parts else (Prepared, _not_supported_reasons)
            if reasons := refuse(unit.blocks, precision):
                left[unit.name] = ", ".join(reasons)
            elif unit is not stack or not (reasons := _not_whole_reasons(unit.blocks)):
                chosen.append((how, unit, precision))
            elif alone:
                chosen += [(Prepared, block, precision) for block in alone]
            else:
                left[unit.name] = ", ".join(reasons)
    if not (chosen or left):
        raise ValueError(
            f"vit_fast.{caller}: model is {type(model).__name__} without transformer blocks of this library, expected "
            "a VisionTransformer, a model of vit_fast.systems or an optimised model"
        )
    told = grouped(left, type(model).__name__)
    if not chosen:
        text = "; ".join(f"{names}: {reason}" for names, reason in told)
        raise UnsupportedError(f"vit_fast.{caller}: nothing can be prepared: {text}")
    for names, reason in told:
        _logger.info("prepare leaves %s as it is: %s", names, reason)
    for how, unit, precision in chosen:
        for module in unit.holder.modules():
            module.__dict__.pop(PREPARED, None)
        how(*unit, precision, release)
    return model
