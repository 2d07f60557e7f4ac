"""Whether a call runs under a tracer, exporter, function transform or forward-mode differentiation of PyTorch.

These handle plain PyTorch operations. The registered operators have a backward only: no vmap rule, no forward-mode
derivative, no ONNX translation.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing


def transform_reasons() -> tuple[str, ...]:
    """Why only plain PyTorch operations can run now, whatever the arguments; empty in an ordinary call."""
    if torch._C._get_tracing_state() is not None:
        return ("torch.jit.trace records plain PyTorch operations only",)
    if is_transformed():
        return ("torch.func's transforms and forward-mode differentiation need plain PyTorch operations",)
    if _in_onnx_export():
        return ("torch.onnx.export knows plain PyTorch operations only",)
    return ()


def is_recording() -> bool:
    """Whether torch.jit.trace or torch.fx records a graph, which may later run in another mode and with another batch
    size."""
    return torch.jit.is_tracing() or is_fx_symbolic_tracing()


def is_transformed() -> bool:
    """Whether the call runs inside a transform of torch.func (grad, vmap, jvp, ...) or a level of dual tensors."""
    return forward_ad._current_level >= 0 or _in_torch_func()


def _in_torch_func():
    return torch._C._functorch.maybe_current_level() is not None


def _in_onnx_export():
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def known_values(tensor: torch.Tensor) -> list[Any] | None:
    """The numbers of a tensor in the memory of the host; None where reading them would wait for a device, or while
    something records the call and would keep them as constants."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or records_numbers():
        return None
    values: list[Any] = tensor.tolist()
    return values


def records_numbers() -> bool:
    """Whether something records or transforms the call, and would keep the numbers of a tensor as constants."""
    if torch.compiler.is_compiling():
        return True
    records = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
    return records or torch.jit.is_tracing() or is_transformed()


# Dynamo cannot trace these two; while tracing it enters torch.func's transforms and guards their stack. The attribute
# is what torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (0.7 s).
_in_torch_func._dynamo_marked_constant = _in_onnx_export._dynamo_marked_constant = True


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; "meta" has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: hides the function from an active torch.jit tracer.

    Inside it sizes are ints instead of traced tensors; a tensor that it creates becomes a constant of the graph.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        state = torch._C._get_tracing_state()
        if state is None:
            return function(*args, **kwargs)
        torch._C._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)

    return run
