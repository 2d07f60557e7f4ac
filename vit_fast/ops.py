"""The operations as PyTorch sees them, and the only place that chooses a backend.

Each public function checks its arguments, asks ``backends.select.choose``, and calls either the reference directly
or a registered operator ``vit_fast::<op>_fwd``, which looks its function up in the tables of the chosen backend.
For the backend ``torch`` the operator runs where gradients are wanted of an eager call, because it keeps less for the
backward; under torch.compile, where inductor fuses through it, and where ``torch`` is forced, the reference runs
(``_direct``). Where gradients are wanted the operators return, beside the output, what a backward needs (natural-log
LSE; mean and rstd of rows; the pre-activation of an MLP); elsewhere, as in inference, these are empty and no kernel
stores them. They carry a fake, an autograd formula and a FLOP formula, and record the backend. Their backward
``vit_fast::<op>_bwd`` runs on that backend where it has a backward of the operation, else it is the closed formula of
``kernels.reference``; differentiating it once more runs autograd over the reference.
Dropout is drawn from a seed, the same for every backend (``reference.dropout_mask``).
Under torch.func's transforms, forward-mode differentiation, torch.jit.trace and ONNX export the reference runs
(``kernels.tracing``). A graph of torch.fx has one node for each public function.

Shapes: B batch, N tokens, C width, H heads, D head size, P patch, K prefix tokens.
Stacks of prepared blocks, one operation for each form of a precision of ``vit_fast.precisions``, have no gradient:
``vit_fast.prepare`` calls them in inference only.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backends import select
from .backends.base import Backend, backward_key
from .backends.torch import TORCH
from .kernels import arguments, reference
from .kernels.activation_names import GATED
from .kernels.arguments import UnsupportedError
from .kernels.block_options import PLAIN, SCHEMA, BlockOptions
from .kernels.packing import PackedWeight
from .kernels.prepared_layer import SCHEMA as LAYER_SCHEMA
from .kernels.prepared_layer import PreparedLayer
from .kernels.tracing import autocasts, is_transformed, known_values, transform_reasons
from .precisions import FOLDED, FP8, Precision, forms

__all__ = [
    "OPERATORS",
    "attention",
    "dropout",
    "keep_samples",
    "layer_norm",
    "layer_norm_linear",
    "layernorm_mlp",
    "linear_residual",
    "patch_embed",
]

# torch ≤ 2.11 warns on import of its FLOP counter where Triton is absent; importing vit_fast is silent.
_flop_log = logging.getLogger("torch.utils.flop_counter")
_flop_log.disabled = True
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

_flop_log.disabled = False

NormParams = tuple[torch.Tensor | None, torch.Tensor | None, float]  # weight, bias, eps of a norm

_library = torch.library.Library("vit_fast", "DEF")


def _refuse_transforms(name: str, backend: str) -> None:
    """Raises inside a torch.func transform or dual level: the operators have no forward-mode derivative. Only a graph
    that was recorded outside of the transform reaches an operator there."""
    if is_transformed():
        raise UnsupportedError(
            f"vit_fast.{name}: a recorded graph of the {backend} backend cannot run under torch.func's transforms or "
            "forward-mode differentiation; call the model itself, or record it inside `with vit_fast.backend('torch')`"
        )


def _owned(result: torch.Tensor) -> torch.Tensor:
    """A result of a backend, contiguous, and no view: autograd forbids to change a view that an operator returns."""
    result = result.contiguous()
    return result.detach() if result._is_view() else result


def _register(
    name: str,
    signature: str,
    results: str,
    differentiable: Sequence[int],
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[torch.Tensor | None]],
    flops: Callable[..., int],
    save_output: bool = False,
    flag: str | None = None,
    reasons: Callable[..., Any] | None = None,
    operation: str | None = None,
    passes: int | None = None,
) -> None:
    """Registers ``vit_fast::<name>_fwd`` and ``_bwd``.

    ``signature`` lists the arguments without ``flag`` and the backend, which the operators have at the end.
    ``differentiable`` are the positions of the tensor arguments that get gradients, in the order in which
    ``backward(run, grad, inputs, saved, needs)`` yields them; ``forward(run, *inputs)`` yields the outputs; ``run`` is
    a function of a backend's table. Inputs and statistics are saved, with ``save_output`` the output too.
    ``flag`` names the argument that says whether statistics are wanted; without, they are empty and have no backward.
    ``reasons(ask, *inputs)`` calls ``ask`` as ``select.choose`` is called; default ``forward``, where those arguments
    are the function's.
    ``operation`` is that of the backends' tables, default ``name``.
    ``passes`` is the position of an argument, of the output's shape and dtype, whose gradient is the incoming one. It
    is not saved, and ``_bwd`` gets the gradient in its place.
    """
    operation = operation or name
    signature = f"{signature}, bool {flag}" if flag else signature
    statistics = results.count("Tensor") - 1
    kept = statistics + save_output
    saved = "".join(f", Tensor saved{i}" for i in range(kept))
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{name}_fwd({signature}, str backend) -> {results}", tags=tags)
    _library.define(f"{name}_bwd(Tensor grad, {signature}{saved}, bool[] needs, str backend) -> Tensor[]", tags=tags)

    def ask(method: Callable[..., Sequence[str]], inputs: Sequence[Any]) -> Sequence[str]:
        values = inputs[: -2 if flag else -1]
        told: Sequence[str] = (reasons or forward)(functools.partial(method, operation), *values)
        return told

    def fwd(*inputs: Any) -> Any:
        _refuse_transforms(operation, inputs[-1])
        device = inputs[0].device
        with _no_autocast(device.type):
            return select.run(operation, select.loaded(inputs[-1], operation), device, fwd_on, inputs, ask)

    def fwd_on(backend: Backend, *inputs: Any) -> Any:
        if not flag:
            return _owned(forward(backend.forward[operation], *inputs[:-1]))
        if inputs[-2]:
            return tuple(map(_owned, forward(backend.forward[operation], *inputs[:-2])))
        out, stat = _owned(forward(backend.output(operation), *inputs[:-2])), _stat(inputs[0])
        return out, *[out.new_empty(0, dtype=stat) for _ in range(statistics)]

    def bwd(grad: torch.Tensor, *values: Any) -> list[torch.Tensor]:
        *inputs, needs, word = values
        inputs, saved = inputs[: len(inputs) - kept], inputs[len(inputs) - kept :]
        if flag:
            *inputs, wanted = inputs
            if not wanted:
                raise RuntimeError(f"vit_fast.{operation}: {flag} is False, expected True where gradients are wanted")
        on, values = select.of_backward(word, operation), (grad, inputs, saved, needs)
        if (reasons or forward)(functools.partial(on.backward_reasons, operation), *inputs):
            on = TORCH
        with _no_autocast(grad.device.type):
            grads: Sequence[Any] = select.run(backward_key(operation), on, grad.device, bwd_on, values, None)
        return [g.contiguous() for g, need in zip(grads, needs, strict=True) if need]

    def bwd_on(backend: Backend, *values: Any) -> Sequence[Any]:
        return backward(backend.backward[operation], *values)

    def bwd_fake(grad: torch.Tensor, *values: Any) -> list[torch.Tensor]:
        *inputs, needs, _ = values
        wanted = (inputs[position] for position, need in zip(differentiable, needs, strict=True) if need)
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if statistics else (output,)
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.constants = [None if is_tensor else value for value, is_tensor in zip(inputs, ctx.is_tensor, strict=True)]
        tensors = [v for position, v in enumerate(inputs) if ctx.is_tensor[position] and position != passes]
        ctx.save_for_backward(*tensors, *outputs[0 if save_output else 1 :])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        result: list[torch.Tensor | None] = [None] * len(ctx.is_tensor)
        if grad is None:
            return tuple(result)
        tensors, inputs = iter(ctx.saved_tensors), list(ctx.constants)
        for position, is_tensor in enumerate(ctx.is_tensor):
            if is_tensor:
                inputs[position] = grad if position == passes else next(tensors)
        if passes is not None and ctx.needs_input_grad[passes]:
            result[passes] = grad
        needs = [ctx.needs_input_grad[position] for position in differentiable]
        if any(needs):
            operator = getattr(torch.ops.vit_fast, f"{name}_bwd").default
            grads = iter(operator(grad, *inputs[:-1], *tensors, needs, inputs[-1]))
            for position, need in zip(differentiable, needs, strict=True):
                if need:
                    result[position] = next(grads)
        return tuple(result)

    def second_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.needs, ctx.count = inputs[-2], len(inputs)
        values = inputs[: len(inputs) - 2 - kept - bool(flag)]
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in values]
        ctx.constants = [None if is_tensor else value for value, is_tensor in zip(values, ctx.is_tensor, strict=True)]
        ctx.save_for_backward(*(v for v, is_tensor in zip(values, ctx.is_tensor, strict=True) if is_tensor))

    def second(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
        """The gradients of ``_bwd``: autograd over the reference, which can be differentiated again."""
        tensors, values = iter(ctx.saved_tensors), list(ctx.constants)
        for position, is_tensor in enumerate(ctx.is_tensor):
            if is_tensor:
                values[position] = next(tensors)
        sources = [i for i, need in enumerate(ctx.needs_input_grad[: len(values)]) if need and i - 1 != passes]
        result: list[torch.Tensor | None] = [None] * ctx.count
        with torch.enable_grad(), _no_autocast(values[0].device.type), sdpa_kernel(SDPBackend.MATH):
            # Aliases: the gradient depends on the inputs, and no path between them may count here.
            values = [v.view_as(v) if isinstance(v, torch.Tensor) else v for v in values]
            grad, *inputs = values
            taken = [inputs[position] for position, need in zip(differentiable, ctx.needs, strict=True) if need]
            out = forward(_differentiable(operation), *inputs)
            firsts = torch.autograd.grad(out, taken, grad, create_graph=True, allow_unused=True)
        pairs = [(f, g) for f, g in zip(firsts, grads, strict=True) if f is not None and g is not None]
        if pairs and sources:
            seconds = torch.autograd.grad(
                [f for f, _ in pairs], [values[i] for i in sources], [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(), allow_unused=True,
            )  # fmt: skip
            for i, value in zip(sources, seconds, strict=True):
                result[i] = value
        return tuple(result)

    _library.impl(f"{name}_fwd", fwd, "CompositeExplicitAutograd")
    _library.impl(f"{name}_bwd", bwd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vit_fast::{name}_fwd", fake, lib=_library)
    torch.library.register_fake(f"vit_fast::{name}_bwd", bwd_fake, lib=_library)
    torch.library.register_autograd(f"vit_fast::{name}_fwd", autograd, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"vit_fast::{name}_bwd", second, setup_context=second_setup, lib=_library)
    register_flop_formula(getattr(torch.ops.vit_fast, f"{name}_fwd"))(flops)
    register_flop_formula(getattr(torch.ops.vit_fast, f"{name}_bwd"))(lambda grad, *inputs, **_: 2 * flops(*inputs))


def _differentiable(operation: str) -> Callable[..., Any]:
    """An operation in plain PyTorch, as autograd sees it."""
    function = TORCH.inference.get(operation, TORCH.forward[operation])
    return lambda *arguments, recompute=False, **options: function(*arguments, **options)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Inside of an operator, whose inputs have been cast already."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _rows(shape: Sequence[int]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _stat(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row_stats(x: torch.Tensor, wanted: bool) -> list[torch.Tensor]:
    return [x.new_empty(_rows(x.shape) if wanted else 0, dtype=_stat(x)) for _ in range(2)]


def _by_position(run: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a function of a backend's table with an operator's inputs as they come."""
    return run(*inputs)


def _norm_by_name(run: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a function of a backend's table, which takes norm, an operator's last input, by name."""
    return run(*inputs[:-1], norm=inputs[-1])


_NO_NORM = None, None, None  # weight, bias and eps of an inner norm that is not there


def _dropout(p: float, seed: torch.Tensor | None, *, prefix: str = "") -> dict[str, Any]:
    """Dropout as the functions of the backends' tables take it; nothing where nothing is dropped."""
    return {f"{prefix}dropout_p": p, f"{prefix}seed": seed} if p else {}


def _branch_options(row_scale: Any, weight: Any, bias: Any, eps: Any, norm: str, *dropouts: Any) -> dict[str, Any]:
    """What an operator has last, by the names of the backends' functions: row_scale, the weight, bias and eps of an
    inner norm (None for the eps: there is none), norm, and one or two pairs of dropout_p and seed."""
    inner_norm = None if eps is None else (weight, bias, eps)
    (p, seed), (out_p, out_seed) = dropouts[:2], dropouts[2:] or (0.0, None)
    drops = _dropout(p, seed) | _dropout(out_p, out_seed, prefix="out_")
    return dict(row_scale=row_scale, norm=norm, inner_norm=inner_norm, **drops)


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward may follow a call, for which its statistics have to be stored."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _direct(name: str, *tensors: torch.Tensor | None) -> bool:
    """Whether the reference runs in the place of an operator: for the backend ``torch``, unless a backward may follow
    in eager mode. Subclasses of tensors, as DTensor, know PyTorch's operations alone."""
    if name != "torch":
        return False
    if not _needs_grad(*tensors) or torch.compiler.is_compiling() or select.requested() == "torch":
        return True
    return bool(transform_reasons()) or any(t is not None and type(t) not in _PLAIN_TENSORS for t in tensors)


def _seeded(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> tuple[float, torch.Tensor | None]:
    """dropout_p and its seed: the given one, else one drawn on the device of x by torch's generator, whose state CUDA
    graphs and checkpointing keep."""
    if p and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return float(p), seed


# keep_samples and dropout: masks alone


def _keep_mask(seed: torch.Tensor, count: int, p: float, backend: str) -> torch.Tensor:
    def draw(on: Backend, *inputs: Any) -> torch.Tensor:
        return (on.keep_mask or reference.keep_mask)(*inputs)

    inputs = seed, count, p, seed.device
    return select.run(select.KEEP_MASK, select.loaded(backend, select.KEEP_MASK), seed.device, draw, inputs, None)


_library.define(
    "keep_mask(Tensor seed, SymInt count, float p, str backend) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("keep_mask", _keep_mask, "CompositeExplicitAutograd")
torch.library.register_fake(
    "vit_fast::keep_mask", lambda seed, count, p, backend: seed.new_empty(count, dtype=torch.bool), lib=_library
)


def keep_samples(x: torch.Tensor, p: float, seed: torch.Tensor | None = None) -> torch.Tensor:
    """Which samples of a batch drop path keeps, each with the chance 1 − p: the mask of its seed, the index that of the
    sample (``reference.keep_mask``).

    Args:
        x: [B, ...], any dtype.
        p: 0 ≤ p < 1.
        seed: int64 tensor of one element, or None for torch's generator.
    Returns:
        bool [B] on the device of x.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    arguments.check_keep_samples(x, p, seed)
    count, (p, seed) = x.shape[0], _seeded(x, p, seed)
    if seed is None:  # nothing is dropped
        return x.new_ones(count, dtype=torch.bool)
    if transform_reasons():
        return reference.keep_mask(seed, count, p, x.device)
    kept: torch.Tensor = torch.ops.vit_fast.keep_mask(seed, count, p, select.drawing(x.device))
    return kept


@torch.fx.wrap
def dropout(x: torch.Tensor, p: float, seed: torch.Tensor | None = None) -> torch.Tensor:
    """x · mask / (1 − p), for what no other operation drops: the mask of its seed, the index that of the element in x
    (``reference.dropout``). The backward keeps the mask, a byte an element.

    Without a seed, the backend ``torch`` leaves it to PyTorch's own dropout, as the other operations do.

    Args:
        x: any shape, strides and floating dtype.
        p: 0 ≤ p < 1; with 0 the result is x itself.
        seed: int64 tensor of one element, or None for torch's generator.
    Returns:
        the shape and dtype of x.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
    """
    arguments.check_dropout(x, p, seed)
    backend = select.drawing(x.device, x.dtype)
    unseeded = backend == "torch" and seed is None
    if not p or unseeded or type(x) not in _PLAIN_TENSORS or transform_reasons():
        return reference.dropout(x, p, seed)
    p, seed = _seeded(x, p, seed)
    keep = torch.ops.vit_fast.keep_mask(seed, x.numel(), p, backend).view(x.shape)
    return torch.where(keep, x, 0.0) * (1 / (1 - p))


def _autocast(device_type: str, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, as eager casts the arguments of a matrix product."""
    if not autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    low = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in low else t for t in tensors)


# layer_norm

_register(
    "layer_norm",
    "Tensor x, Tensor? weight, Tensor? bias, float eps, str norm",
    "(Tensor, Tensor, Tensor)",
    (0, 1, 2),
    _norm_by_name,
    lambda x, weight, bias, eps, norm, with_stats, backend: (x.new_empty(x.shape), *_row_stats(x, with_stats)),
    lambda run, grad, inputs, saved, needs: run(grad, *inputs[:3], *saved, norm=inputs[4], needs=needs),
    lambda *shapes, **_: 0,
    flag="with_stats",
)


@torch.fx.wrap
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
) -> torch.Tensor:
    """LayerNorm over the last axis: (x − mean)/√(var + eps)·weight + bias, statistics in float32.

    RMSNorm (norm="rms") has mean(x²) in the place of var, and subtracts no mean.

    Args:
        x: [..., C] float16, bfloat16, float32 or float64.
        weight, bias: [C] or None; may be float32 beside a 16-bit x.
        norm: "layer" or "rms".
    Returns:
        [..., C] in the dtype of x; as eager, in float32 under autocast, but not under that of a CPU.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
        UnsupportedError: a forced backend cannot.
    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer Normalization",
        2019.
    """
    if select.is_direct() and eps >= 0:
        return reference.layer_norm(x, weight, bias, eps, norm=norm)
    arguments.check_layer_norm(x, weight, bias, eps, norm)
    name = select.choose("layer_norm", x.device, (), x, weight, bias, eps, norm=norm)
    if _direct(name, x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps, norm=norm)
    if x.device.type != "cpu" and autocasts(x.device.type) and x.dtype != torch.float64:
        x = x.float()
    return torch.ops.vit_fast.layer_norm_fwd(x, weight, bias, eps, norm, _needs_grad(x, weight, bias), name)[0]


# layer_norm_linear


def _linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    return 2 * _rows(x_shape) * weight_shape[0] * weight_shape[1]


def _layer_norm_linear_fake(
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    norm: str,
    with_stats: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    features = weight.shape[0] // 2 if activation in GATED else weight.shape[0]
    return weight.new_empty((*x.shape[:-1], features)), *_row_stats(x, with_stats)


_register(
    "layer_norm_linear",
    "Tensor x, Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor weight, Tensor? bias, str? activation, str norm",
    "(Tensor, Tensor, Tensor)",
    (0, 1, 2, 4, 5),
    _norm_by_name,
    _layer_norm_linear_fake,
    lambda run, grad, inputs, saved, needs: run(grad, *inputs[:-1], *saved, norm=inputs[-1], needs=needs),
    lambda x, ln_weight, ln_bias, eps, weight, *_, **__: _linear_flops(x, weight),
    flag="with_stats",
)


@torch.fx.wrap
def layer_norm_linear(
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> torch.Tensor:
    """act(LN(x) Wᵀ + b): LayerNorm and the qkv projection, or LayerNorm, fc1 and its activation.

    Args:
        x: [..., C].
        ln_weight, ln_bias: [C] or None.
        weight: [F, C]; for the gated activations [2F, C], gate rows first: act(gate) · value.
        bias: as many elements as weight has rows, or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", the gated "swiglu" (by silu), "geglu" (by gelu)
            and "geglu_tanh", or None.
        norm: "layer", or "rms" for RMSNorm in the place of LayerNorm.
    Returns:
        [..., F] in the dtype of weight.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
        UnsupportedError: a forced backend cannot.
    """
    if isinstance(weight, PackedWeight):
        ln = (ln_weight, ln_bias, eps)
        return _packed_linear(x, weight, bias, ln=ln, norm=norm, activation=activation)
    if select.is_direct() and eps >= 0:
        return reference.layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm=norm)
    arguments.check_layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm)
    name = select.choose(
        "layer_norm_linear", x.device, (), x, ln_weight, ln_bias, eps, weight, bias, activation, norm=norm
    )
    if _direct(name, x, ln_weight, ln_bias, weight, bias):
        return reference.layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm=norm)
    weight, bias = _autocast(x.device.type, weight, bias)
    with_stats = _needs_grad(x, ln_weight, ln_bias, weight, bias)
    operator = torch.ops.vit_fast.layer_norm_linear_fwd
    return operator(x, ln_weight, ln_bias, eps, weight, bias, activation, norm, with_stats, name)[0]


# linear_residual


def _linear_residual_forward(
    run: Callable[..., Any], x: Any, weight: Any, bias: Any, gamma: Any, residual: Any, *options: Any
) -> Any:
    return run(x, weight, bias, gamma, residual, **_branch_options(*options))


def _linear_residual_backward(
    run: Callable[..., Any], grad: torch.Tensor, inputs: Sequence[Any], saved: Sequence[Any], needs: Sequence[bool]
) -> Any:
    x, weight, bias, gamma, _, *options = inputs
    return run(grad, x, weight, bias, gamma, **_branch_options(*options), needs=needs)


_register(
    "linear_residual",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor residual, Tensor? row_scale, Tensor? inner_weight, "
    "Tensor? inner_bias, float? inner_eps, str norm, float dropout_p, Tensor? seed",
    "Tensor",
    (0, 1, 2, 3, 5, 6, 7),
    _linear_residual_forward,
    lambda x, weight, bias, gamma, residual, *_: residual.new_empty(residual.shape),
    _linear_residual_backward,
    lambda x, weight, *_, **__: _linear_flops(x, weight),
    passes=4,
)


@torch.fx.wrap
def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    row_scale: torch.Tensor | None = None,
    norm: str = "layer",
    inner_norm: NormParams | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + row_scale·gamma·dropout(LN(x) Wᵀ + b): out-projection or fc2 with LayerScale, drop path and residual.
    LN is left out without ``inner_norm``.

    Args:
        x: [B, ..., K].
        weight: [C, K], bias [C] or None.
        gamma: LayerScale [C] or None.
        residual: [B, ..., C].
        row_scale: [B] or None, the drop-path mask divided by the keep rate.
        inner_norm: (weight [K] or None, bias [K] or None, eps) of a norm of x, or None.
        norm: the kind of that norm, "layer" or "rms".
        dropout_p: 0 ≤ p < 1; seed: int64 tensor of one element, or None for torch's generator.
    Returns:
        the shape and dtype of residual.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
        UnsupportedError: a forced backend cannot.
    """
    if isinstance(weight, PackedWeight):
        x = x if inner_norm is None else layer_norm(x, *inner_norm, norm=norm)
        return _packed_linear(x, weight, bias, gamma=gamma, residual=residual)
    if select.is_direct():
        return reference.linear_residual(
            x, weight, bias, gamma, residual,
            row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    arguments.check_linear_residual(x, weight, bias, gamma, residual, row_scale, norm, inner_norm, dropout_p, seed)
    name = select.choose(
        "linear_residual", x.device, (), x, weight, bias, gamma, residual,
        row_scale=row_scale, norm=norm, inner_norm=inner_norm, **_dropout(dropout_p, seed),
    )  # fmt: skip
    inner = inner_norm or _NO_NORM
    unseeded = dropout_p and seed is None
    if _direct(name, x, weight, bias, gamma, residual, row_scale, *inner[:2]) or (name == "torch" and unseeded):
        return reference.linear_residual(
            x, weight, bias, gamma, residual,
            row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    weight, bias = _autocast(x.device.type, weight, bias)
    drops = _seeded(x, dropout_p, seed)
    return torch.ops.vit_fast.linear_residual_fwd(
        x, weight, bias, gamma, residual, row_scale, *inner, norm, *drops, name
    )


# layernorm_mlp


def _layernorm_mlp_forward(run: Callable[..., Any], *inputs: Any) -> Any:
    plain, options, recompute = inputs[:10], inputs[10:-1], inputs[-1]
    return run(*plain, **_branch_options(*options), **({"recompute": True} if recompute else {}))


def _layernorm_mlp_fake(x: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    w1, *_, recompute, with_stats, _ = inputs[3:]
    shape = (*x.shape[:-1], w1.shape[0]) if with_stats and not recompute else 0
    return x.new_empty(x.shape), *_row_stats(x, with_stats), w1.new_empty(shape)


def _layernorm_mlp_backward(
    run: Callable[..., Any], grad: torch.Tensor, inputs: Sequence[Any], saved: Sequence[Any], needs: Sequence[bool]
) -> Any:
    plain, options = inputs[:10], _branch_options(*inputs[10:-1])
    return run(grad, *plain, options.pop("row_scale"), *saved, **options, needs=needs)


_register(
    "layernorm_mlp",
    "Tensor x, Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "str activation, Tensor? gamma, Tensor? row_scale, Tensor? inner_weight, Tensor? inner_bias, float? inner_eps, "
    "str norm, float dropout_p, Tensor? seed, float out_dropout_p, Tensor? out_seed, bool recompute",
    "(Tensor, Tensor, Tensor, Tensor)",
    (0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12),
    _layernorm_mlp_forward,
    _layernorm_mlp_fake,
    _layernorm_mlp_backward,
    lambda x, ln_weight, ln_bias, eps, w1, b1, w2, *_, **__: _linear_flops(x, w1) + _linear_flops(x, w2),
    flag="with_stats",
    reasons=lambda ask, *inputs: _layernorm_mlp_forward(ask, *inputs[:-1], False),
)


@torch.fx.wrap
def layernorm_mlp(
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    eps: float,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    gamma: torch.Tensor | None,
    *,
    row_scale: torch.Tensor | None = None,
    norm: str = "layer",
    inner_norm: NormParams | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """x + row_scale·gamma·dropout(fc2(LN(dropout(act(fc1(LN(x))))))): the whole MLP branch of a transformer block. The
    second LN is left out without ``inner_norm``.

    Args:
        x: [B, ..., C], also the residual.
        w1: [F, C] (gated activations: [2F, C], gate rows first), b1 or None; w2: [C, F], b2 [C] or None.
        activation: as in ``layer_norm_linear``, but not None.
        norm: "layer" or "rms", the kind of both norms.
        inner_norm: (weight [F] or None, bias [F] or None, eps) of a norm of the hidden activations, or None.
        gamma, row_scale: as in ``linear_residual``.
        dropout_p, seed: as in ``linear_residual``, of the hidden activations; out_dropout_p, out_seed: of fc2's output.
        recompute: the backward computes the pre-activation again instead of keeping it, [B, ..., F] for each layer.
    Returns:
        the shape and dtype of x.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
        UnsupportedError: a forced backend cannot.
    """
    if isinstance(w1, PackedWeight):
        hidden = layer_norm_linear(x, ln_weight, ln_bias, eps, w1, b1, activation, norm=norm)
        return linear_residual(hidden, w2, b2, gamma, x, norm=norm, inner_norm=inner_norm)
    if select.is_direct() and eps >= 0:
        return reference.layernorm_mlp(
            x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma,
            row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=dropout_p, seed=seed,
            out_dropout_p=out_dropout_p, out_seed=out_seed,
        )  # fmt: skip
    arguments.check_layernorm_mlp(
        x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma, row_scale, norm, inner_norm, dropout_p, seed,
        out_dropout_p, out_seed, recompute,
    )  # fmt: skip
    name = select.choose(
        "layernorm_mlp", x.device, (), x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma,
        row_scale=row_scale, norm=norm, inner_norm=inner_norm, **_dropout(dropout_p, seed),
        **_dropout(out_dropout_p, out_seed, prefix="out_"),
    )  # fmt: skip
    inner = inner_norm or _NO_NORM
    tensors = x, ln_weight, ln_bias, w1, b1, w2, b2, gamma, row_scale, *inner[:2]
    unseeded = (dropout_p and seed is None) or (out_dropout_p and out_seed is None)
    if _direct(name, *tensors) or (name == "torch" and unseeded):
        return reference.layernorm_mlp(
            x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma,
            row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=dropout_p, seed=seed,
            out_dropout_p=out_dropout_p, out_seed=out_seed,
        )  # fmt: skip
    w1, b1, w2, b2 = _autocast(x.device.type, w1, b1, w2, b2)
    with_stats = _needs_grad(*tensors)
    drops = *_seeded(x, dropout_p, seed), *_seeded(x, out_dropout_p, out_seed)
    return torch.ops.vit_fast.layernorm_mlp_fwd(
        x, ln_weight, ln_bias, eps, w1, b1, w2, b2, activation, gamma, row_scale, *inner, norm, *drops,
        recompute and with_stats, with_stats, name,
    )[0]  # fmt: skip


# attention


def _attention_forward(
    run: Callable[..., Any],
    qkv: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> Any:
    return run(qkv, num_heads, scale, k=k, v=v, **_dropout(dropout_p, seed))


def _attention_fake(
    qkv: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, num_heads: int, *inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with_lse, (batch, tokens, width) = inputs[-2], qkv.shape
    out = qkv.new_empty((batch, tokens, width // 3 if k is None else width))
    return out, qkv.new_empty((batch, num_heads, tokens) if with_lse else 0, dtype=_stat(qkv))


def _attention_backward(
    run: Callable[..., Any], grad: torch.Tensor, inputs: Sequence[Any], saved: Sequence[Any], needs: Sequence[bool]
) -> Any:
    qkv, k, v, num_heads, scale, *dropout = inputs
    return run(grad, qkv, num_heads, scale, k, v, *saved, **_dropout(*dropout), needs=needs)


def _attention_flops(qkv: Any, k: Any, v: Any, num_heads: int, *_: Any, **__: Any) -> int:
    batch, tokens, width = qkv
    keys, width = (tokens, width // 3) if k is None else (k[1], width)
    return 4 * batch * tokens * keys * width


_register(
    "attention",
    "Tensor qkv, Tensor? k, Tensor? v, int num_heads, float scale, float dropout_p, Tensor? seed",
    "(Tensor, Tensor)",
    (0, 1, 2),
    _attention_forward,
    _attention_fake,
    _attention_backward,
    _attention_flops,
    save_output=True,
    flag="with_lse",
    reasons=lambda ask, qkv, k, v, num_heads, scale, *drop: ask(qkv, num_heads, k=k, v=v, **_dropout(*drop)),
)


def _attention_options(
    bias: torch.Tensor | None,
    rel_pos: tuple[torch.Tensor, torch.Tensor] | None,
    key_lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    rope_layout: str,
    num_prefix: int,
    q_norm: NormParams | None,
    k_norm: NormParams | None,
    norm: str,
) -> dict[str, Any]:
    """The options of a call that are given, by name; words that belong to one go with it."""
    options: dict[str, Any] = {}
    if bias is not None:
        options["bias"] = bias
    if rel_pos is not None:
        options["rel_pos"] = rel_pos
    if key_lengths is not None:
        options["key_lengths"] = key_lengths
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens
    if rope is not None:
        options |= dict(rope=rope, rope_layout=rope_layout, num_prefix=num_prefix)
    if q_norm is not None or k_norm is not None:
        options |= dict(q_norm=q_norm, k_norm=k_norm, norm=norm)
    return options


def _inputs_of_options(
    bias: torch.Tensor | None = None,
    rel_pos: Sequence[torch.Tensor | None] = (None, None),
    key_lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rope: Sequence[torch.Tensor | None] = (None, None),
    rope_layout: str = "half",
    num_prefix: int = 0,
    q_norm: NormParams | None = None,
    k_norm: NormParams | None = None,
    norm: str = "layer",
) -> tuple[Any, ...]:
    """The options of ``_attention_options`` as the operator has them, behind qkv, k and v; no norm has no eps."""
    (*q_vectors, q_eps), (*k_vectors, k_eps) = q_norm or (None, None, None), k_norm or (None, None, None)
    tensors = (bias, *rel_pos, *rope, *q_vectors, *k_vectors, key_lengths, cu_seqlens)
    return *tensors, q_eps, k_eps, norm, rope_layout, num_prefix


def _options_of_inputs(*inputs: Any) -> dict[str, Any]:
    """The inverse of ``_inputs_of_options``."""
    bias, height, width, cos, sin, q_weight, q_bias, k_weight, k_bias, key_lengths, cu_seqlens, *words = inputs
    q_eps, k_eps, norm, rope_layout, num_prefix = words
    rel_pos, rope = None if height is None else (height, width), None if cos is None else (cos, sin)
    q_norm = None if q_eps is None else (q_weight, q_bias, q_eps)
    k_norm = None if k_eps is None else (k_weight, k_bias, k_eps)
    return _attention_options(
        bias, rel_pos, key_lengths, cu_seqlens, rope, rope_layout, num_prefix, q_norm, k_norm, norm
    )


def _options_forward(run: Callable[..., Any], qkv: torch.Tensor, k: Any, v: Any, *inputs: Any) -> Any:
    *options, num_heads, scale, dropout_p, seed = inputs
    return run(qkv, num_heads, scale, k=k, v=v, **_options_of_inputs(*options), **_dropout(dropout_p, seed))


def _options_reasons(ask: Callable[..., Any], qkv: torch.Tensor, k: Any, v: Any, *inputs: Any) -> Any:
    *options, num_heads, _, dropout_p, seed = inputs
    return ask(qkv, num_heads, k=k, v=v, **_options_of_inputs(*options), **_dropout(dropout_p, seed))


def _options_fake(qkv: torch.Tensor, k: Any, v: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, *rest = inputs[16:]
    out, lse = _attention_fake(qkv, k, v, num_heads, *rest)
    return out if v is None else qkv.new_empty((*qkv.shape[:2], v.shape[2])), lse


def _options_backward(
    run: Callable[..., Any], grad: torch.Tensor, inputs: Sequence[Any], saved: Sequence[Any], needs: Sequence[bool]
) -> Any:
    qkv, k, v, *options, num_heads, scale, dropout_p, seed = inputs
    given = _options_of_inputs(*options) | _dropout(dropout_p, seed)
    return run(grad, qkv, num_heads, scale, k, v, *saved, **given, needs=needs)


def _options_flops(qkv: Any, k: Any, v: Any, *inputs: Any, **_: Any) -> int:
    """Two products for each query and key; of packed sequences as if all were as long."""
    cu_seqlens, num_heads = inputs[10], inputs[16]
    flops = _attention_flops(qkv, k, v, num_heads)
    if v is not None:
        flops = flops * (qkv[2] + v[2]) // (2 * qkv[2])
    return flops if cu_seqlens is None else flops // (cu_seqlens[0] - 1)


# An operator of its own: PyTorch's time for a call grows with the number of arguments, and plain calls have five.
_register(
    "attention_options",
    "Tensor qkv, Tensor? k, Tensor? v, Tensor? bias, Tensor? height, Tensor? width, Tensor? cos, Tensor? sin, "
    "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? key_lengths, Tensor? cu_seqlens, "
    "float? q_eps, float? k_eps, str norm, str rope_layout, int num_prefix, int num_heads, float scale, "
    "float dropout_p, Tensor? seed",
    "(Tensor, Tensor)",
    range(12),
    _options_forward,
    _options_fake,
    _options_backward,
    _options_flops,
    save_output=True,
    flag="with_lse",
    reasons=_options_reasons,
    operation="attention",
)


_checked: set[tuple[Any, ...]] = set()  # the kinds of calls of attention that have passed the checks
_MOST_KINDS = 1000


def _kind_of_attention(
    num_heads: int, scale: float, layout: str, prefix: int, *tensors: torch.Tensor | None
) -> tuple[Any, ...] | None:
    """All that the checks see of the arguments of attention; None where a tensor is of another class."""
    kind: list[Any] = [num_heads, scale, layout, prefix]
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
        elif type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided:
            kind += (tensor.shape, tensor.dtype, tensor.device)
        else:
            return None
    return tuple(kind)


@torch.fx.wrap
def attention(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rel_pos: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    rope_layout: str = "half",
    num_prefix: int = 0,
    q_norm: NormParams | None = None,
    k_norm: NormParams | None = None,
    norm: str = "layer",
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per head softmax(scale·q kᵀ + bias) v, where q and k are first normalised, then turned by rotary embedding.

    Args:
        qkv: packed [B, N, 3C], channels q | k | v, each head-major; with k and v given, q alone [B, Nq, C].
        num_heads: H, C = H·D.
        scale: any finite number, applied to the scores in float32.
        k, v: [B, Nk, C]. The heads of v may have a size of their own, D': [B, Nk, H·D'].
        bias: additive, broadcast to [B, H, Nq, Nk].
        rel_pos: decomposed relative position (height [B, H, Nq, h], width [B, H, Nq, w]), h·w = Nk: the score of a
            query and key j gets height[..., j // w] + width[..., j % w].
        key_lengths: int32 or int64 [B], keys from there on are ignored; a query without keys gives zeros.
        cu_seqlens: int32 [S + 1], for B = 1: sequence s is tokens cu_seqlens[s] … cu_seqlens[s + 1] − 1, and attends
            to itself alone. A token of no sequence gives zeros.
        rope: (cos, sin) of rotary embedding, each [N − num_prefix, D] or broadcast to [B, H, N − num_prefix, D], in
            float32 or the dtype of q: x·cos + rotate(x)·sin; for self-attention.
        rope_layout: which channels make a pair: "half", c and c + D/2, or "interleaved", 2i and 2i + 1.
        num_prefix: how many tokens at the beginning rope leaves as they are.
        q_norm, k_norm: (weight [D], bias [D] or None, eps) of a norm over each head.
        norm: their kind, "layer" or "rms".
        dropout_p, seed: dropout of the probabilities.
    Returns:
        [B, Nq, C] (C' = H·D' where v has it) in the dtype of q.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
        UnsupportedError: a forced backend cannot.
    Source: Dao et al., "FlashAttention", 2022; Su et al., "RoFormer", 2021 (rope); Li et al., "MViTv2", 2021 (rel_pos).
    """
    if select.is_direct() and bias is rel_pos is key_lengths is cu_seqlens is rope is None and math.isfinite(scale):
        return reference.attention(
            qkv, num_heads, scale, k=k, v=v, q_norm=q_norm, k_norm=k_norm, norm=norm, dropout_p=dropout_p, seed=seed
        )
    kind = None
    if select.is_direct() and key_lengths is cu_seqlens is rel_pos is q_norm is k_norm is None and not dropout_p:
        kind = _kind_of_attention(num_heads, scale, rope_layout, num_prefix, qkv, k, v, bias, *(rope or ()))
    if kind is None or kind not in _checked:
        arguments.check_attention(
            qkv, num_heads, scale, k=k, v=v, bias=bias, rel_pos=rel_pos, key_lengths=key_lengths, cu_seqlens=cu_seqlens,
            rope=rope, rope_layout=rope_layout, num_prefix=num_prefix, q_norm=q_norm, k_norm=k_norm, norm=norm,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        if kind is not None:
            if len(_checked) >= _MOST_KINDS:
                _checked.clear()
            _checked.add(kind)
    if key_lengths is None and select.is_direct():
        return reference.attention(
            qkv, num_heads, scale, k=k, v=v, bias=bias, rel_pos=rel_pos, cu_seqlens=cu_seqlens, rope=rope,
            rope_layout=rope_layout, num_prefix=num_prefix, q_norm=q_norm, k_norm=k_norm, norm=norm,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    if key_lengths is not None and (lengths := known_values(key_lengths)) is not None:
        key_lengths = None if min(lengths, default=0) >= (qkv if k is None else k).shape[1] else key_lengths
    options = _attention_options(
        bias, rel_pos, key_lengths, cu_seqlens, rope, rope_layout, num_prefix, q_norm, k_norm, norm
    )
    drop = _dropout(dropout_p, seed)
    name = select.choose("attention", qkv.device, (), qkv, num_heads, k=k, v=v, **options, **drop)
    inputs = _inputs_of_options(**options) if options else ()
    plain = (dropout_p and seed is None) or cu_seqlens is not None or qkv.device.type != "cpu"
    if _direct(name, qkv, k, v, *inputs[:9]) or (name == "torch" and plain):
        return reference.attention(qkv, num_heads, scale, k=k, v=v, **drop, **options)
    with_lse = _needs_grad(qkv, k, v, *inputs[:9])
    qkv, k, v = _autocast(qkv.device.type, qkv, k, v)
    last = num_heads, scale, *_seeded(qkv, dropout_p, seed), with_lse, name
    if not options:
        return torch.ops.vit_fast.attention_fwd(qkv, k, v, *last)[0]
    return torch.ops.vit_fast.attention_options_fwd(qkv, k, v, *inputs, *last)[0]


# prepared_blocks, packed_blocks, fp8_blocks, int8_blocks: one operator for each form of a precision


def _register_blocks(precision: Precision) -> None:
    """Registers the operator of a precision, a stack of blocks on prepared weights; no gradient."""
    name, tensors_per_block = precision.operation, len(precision.record._fields)
    _library.define(
        f"{name}(Tensor x, Tensor[] weights, int num_heads, float scale, str activation, float eps1, float eps2, "
        f"{SCHEMA}, str backend) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(x: torch.Tensor, weights: Sequence[torch.Tensor], *values: Any) -> torch.Tensor:
        *arguments, word = values
        _refuse_transforms(name, word)
        backend, options = select.loaded(word, name), BlockOptions.unflatten(arguments[5:])
        inputs = (x, weights, *arguments[:5], options)
        out: torch.Tensor = select.run(name, backend, x.device, run_on, inputs, ask)
        return out

    def run_on(backend: Backend, *inputs: Any) -> torch.Tensor:
        return backend.forward[name](*inputs).contiguous()

    def ask(method: Callable[..., Sequence[str]], inputs: Sequence[Any]) -> Sequence[str]:
        return method(name, *inputs[:3], inputs[-1])

    def flops(x: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
        batch, tokens, width = x
        matrices = sum(2 * batch * tokens * math.prod(shape) for shape in weights if len(shape) > 1)
        return matrices + len(weights) // tensors_per_block * 4 * batch * tokens * tokens * width

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vit_fast::{name}", lambda x, *_: x.new_empty(x.shape), lib=_library)
    register_flop_formula(getattr(torch.ops.vit_fast, name))(flops)


for _precision in forms():
    _register_blocks(_precision)


# prepared_linear, packed_linear, fp8_linear, int8_linear: a linear layer of a prepared block that no stack describes


def _register_linear(name: str) -> None:
    """Registers the operator of a linear layer on a prepared weight; no gradient."""
    _library.define(
        f"{name}(Tensor x, {LAYER_SCHEMA}, Tensor? residual, str backend) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(x: torch.Tensor, *values: Any) -> torch.Tensor:
        *layer, residual, word = values
        _refuse_transforms(name, word)
        inputs = x, PreparedLayer(*layer), residual
        out: torch.Tensor = select.run(name, select.loaded(word, name), x.device, run_on, inputs, ask)
        return out

    def run_on(backend: Backend, *inputs: Any) -> torch.Tensor:
        return backend.forward[name](*inputs).contiguous()

    def ask(method: Callable[..., Sequence[str]], inputs: Sequence[Any]) -> Sequence[str]:
        return method(name, *inputs)

    def fake(x: torch.Tensor, weight: Any, bias: Any, features: int, *_: Any) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], features))

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vit_fast::{name}", fake, lib=_library)
    register_flop_formula(getattr(torch.ops.vit_fast, name))(
        lambda x, weight, bias, features, *_, **__: (
            2 * _rows(x) * x[-1] * (weight[0][0] if len(weight[0]) == 2 else features)  # packed ones are padded
        )
    )


for _precision in forms():
    if _precision.linear is not None:
        _register_linear(_precision.linear)


def _packed_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    ln: NormParams = _NO_NORM,  # type: ignore[assignment]
    norm: str = "layer",
    activation: str | None = None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(LN(x) Wᵀ + b), or residual + gamma·(x Wᵀ + b), on a prepared weight; inference only."""
    name, features = weight.operation, weight.shape[0]
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"vit_fast.{name}: x has width {x.shape[-1]}, expected {weight.shape[1]} (as the weight)")
    if x.dtype != weight.dtype:
        raise ValueError(f"vit_fast.{name}: x has dtype {x.dtype}, expected {weight.dtype} (as the weight)")
    after = None
    if activation in GATED:
        if weight.in_panels:  # which keep the rows of gates and values apart
            activation, after = None, activation
        else:
            features //= 2
    layer = PreparedLayer(weight.tensors, weight.bias(bias), features, *ln, norm, activation, gamma)
    backend = select.choose(name, x.device, (), x, layer, residual)
    out: torch.Tensor
    if backend == "torch":
        out = reference.packed_linear(x, layer, residual)
    else:
        out = getattr(torch.ops.vit_fast, name)(x, *layer, residual, backend)
    return reference.activate(out, after)


def linear(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None, activation: str | None = None
) -> torch.Tensor:
    """act(x Wᵀ + b), by PyTorch but for a weight that ``vit_fast.prepare`` has prepared."""
    if isinstance(weight, PackedWeight):
        return _packed_linear(x, weight, bias, activation=activation)
    return reference.activate(F.linear(x, weight, bias), activation)


def blocks(
    precision: Precision,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    num_heads: int,
    scale: float,
    activation: str,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> torch.Tensor:
    """x [B, N, C] through blocks that ``precision`` has folded, by the operation of that precision."""
    precision.check(x, weights)
    if options is not PLAIN:
        arguments.check_block_options(precision.operation, x, num_heads, options)
    name = precision.operation
    backend = select.choose(name, x.device, (), x, weights, num_heads, options)
    if backend == "torch":
        return precision.reference(x, weights, num_heads, scale, activation, eps1, eps2, options)
    operator = getattr(torch.ops.vit_fast, name)
    out: torch.Tensor
    out = operator(x, list(weights), num_heads, scale, activation, eps1, eps2, *options.flatten(), backend)
    return out


def prepared_blocks(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    num_heads: int,
    scale: float,
    activation: str,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> torch.Tensor:
    """x through a stack of pre-norm transformer blocks with folded weights (``vit_fast.prepare``); inference only.

    Args:
        x: [B, N, C] in the dtype of the weights.
        weights: the tensors of a ``folding.FoldedBlock`` for each block, one block after the other.
        num_heads, scale: as in ``attention``; activation: as in ``layernorm_mlp``.
        eps1, eps2: of the norm before qkv and before fc1.
        options: further norms, rotary embedding and masks, the same for every block.
    Returns:
        [B, N, C] in the dtype of x.
    Raises:
        ValueError: x does not fit the weights.
        UnsupportedError: a forced backend cannot.
    """
    return blocks(FOLDED, x, weights, num_heads, scale, activation, eps1, eps2, options)


def fp8_blocks(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    num_heads: int,
    scale: float,
    activation: str,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> torch.Tensor:
    """x through a stack of pre-norm transformer blocks in float8 e4m3 (``vit_fast.prepare``); inference only.

    Args:
        x: [B, N, C], float16 or bfloat16.
        weights: the tensors of a ``folding.Float8Block`` for each block, one block after the other.
        num_heads, scale: as in ``attention``; activation: as in ``layernorm_mlp``, that of the weights.
        eps1, eps2: of the norm before qkv and before fc1.
        options: further norms, rotary embedding and masks, the same for every block.
    Returns:
        [B, N, C] in the dtype of x.
    Raises:
        ValueError: x does not fit the weights.
        UnsupportedError: a forced backend cannot.
    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    return blocks(FP8, x, weights, num_heads, scale, activation, eps1, eps2, options)


# patch_embed


def _grid(images: Sequence[int], weight: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    rows, columns = ((images[2 + i] - weight[2 + i]) // stride[i] + 1 for i in range(2))
    return rows, columns


def _patch_embed_fake(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    stride: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    backend: str,
) -> torch.Tensor:
    rows, columns = _grid(images.shape, weight.shape, stride)
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    return weight.new_empty((images.shape[0], prefix + rows * columns, weight.shape[0]))


def _patch_embed_backward(
    run: Callable[..., Any], grad: torch.Tensor, inputs: Sequence[Any], saved: Sequence[Any], needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    images, weight, bias, pos_embed, prefix_tokens, stride, mean, std = inputs
    normalised = images.dtype == torch.uint8 or mean is not None or std is not None
    pixels = reference.normalise_pixels(images, mean, std, weight.dtype) if normalised else images
    dpixels, *grads = run(grad, pixels, weight, bias, pos_embed, prefix_tokens, stride, needs=needs)
    if needs[0] and std is not None:
        dpixels = dpixels / dpixels.new_tensor(std).view(1, -1, 1, 1)
    return None if dpixels is None else dpixels.to(images.dtype), *grads


def _patch_embed_flops(
    images: Any, weight: Any, bias: Any, pos_embed: Any, prefix_tokens: Any, stride: Any, *_: Any, **__: Any
) -> int:
    rows, columns = _grid(images, weight, stride)
    return 2 * images[0] * rows * columns * weight[0] * weight[1] * weight[2] * weight[3]


_register(
    "patch_embed",
    "Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, int[2] stride, "
    "float[]? mean, float[]? std",
    "Tensor",
    (0, 1, 2, 3, 4),
    _by_position,
    _patch_embed_fake,
    _patch_embed_backward,
    _patch_embed_flops,
)


# Forward operators by name, for policies of selective activation checkpointing: with
# ``torch.utils.checkpoint.create_selective_checkpoint_contexts`` name what to keep, for example
# ``OPERATORS["attention"]``; they run where gradients are wanted, but not under torch.compile of the backend ``torch``.
OPERATORS: dict[str, torch._ops.OpOverload] = {
    name: getattr(torch.ops.vit_fast, f"{name}_fwd").default
    for name in (
        *("layer_norm", "layer_norm_linear", "linear_residual", "layernorm_mlp", "attention", "attention_options"),
        "patch_embed",
    )
}


@torch.fx.wrap
def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    stride: int | tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Patch embedding: convolution, position embedding of the patch rows, prefix tokens in front.

    Args:
        images: [B, in, H, W], any strides; float, or uint8 (pixel/255 is what mean and std refer to).
        weight: [C, in, P, P'], bias [C] or None.
        pos_embed: [1, N, C], patch rows only, or None; N = ⌊(H − P)/s + 1⌋·⌊(W − P')/s' + 1⌋, row-major.
        prefix_tokens: [1 or B, K, C], written unchanged (position embedding already added), or None.
        stride: s or (s, s').
        mean, std: a float a channel, or None: (pixel − mean)/std before the convolution.
    Returns:
        [B, K + N, C] in the dtype of weight.
    Raises:
        TypeError, ValueError: bad arguments, before any launch.
        UnsupportedError: a forced backend cannot.
    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
    """
    stride = arguments.check_patch_embed(images, weight, bias, pos_embed, prefix_tokens, stride, mean, std)
    mean, std = (None if values is None else tuple(values) for values in (mean, std))
    name = select.choose(
        "patch_embed", images.device, (), images, weight, bias, pos_embed, prefix_tokens, stride, mean, std
    )
    if _direct(name, images, weight, bias, pos_embed, prefix_tokens):
        return reference.patch_embed(images, weight, bias, pos_embed, prefix_tokens, stride, mean, std)
    dtype = weight.dtype
    weight, bias = _autocast(images.device.type, weight, bias)
    out = torch.ops.vit_fast.patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, stride, mean, std, name)
    return out.to(dtype)
