"""The backend ``cpu``: the compiled extension for CPU tensors (``csrc/cpu/``), which ``vit-fast build`` builds."""

from collections.abc import Sequence

import torch

from vit_fast import extension
from vit_fast.precisions import INT8, PACKED

from .base import Backend

# The operators of csrc/cpu/*.cpp. Their schemas are defined here, because a namespace that two libraries define crashes
# the process.
_SCHEMAS = (
    "level() -> str",
    "levels() -> str",
    "use_level(str name) -> ()",
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool with_stats) -> (Tensor, Tensor, Tensor)",
    "attention(Tensor qkv, Tensor? k, Tensor? v, int num_heads, float scale, bool with_lse) -> (Tensor, Tensor)",
    "prepared_blocks(Tensor x, Tensor[] weights, int num_heads, float scale, str activation, float eps1, float eps2) "
    "-> Tensor",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _dtype_reasons(x: torch.Tensor) -> list[str]:
    return [] if x.dtype in _DTYPES else [f"dtype {str(x.dtype).removeprefix('torch.')} is not supported"]


def _last_axis_dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _attention(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    qkv, k, v = (None if t is None else _last_axis_dense(t) for t in (qkv, k, v))
    out: tuple[torch.Tensor, torch.Tensor]
    out = torch.ops.vit_fast_cpu.attention(qkv, k, v, num_heads, scale, with_lse)
    return out


def _attention_out(
    qkv: torch.Tensor, num_heads: int, scale: float, *, k: torch.Tensor | None = None, v: torch.Tensor | None = None
) -> torch.Tensor:
    return _attention(qkv, num_heads, scale, k, v, False)[0]


def _attention_fwd(
    qkv: torch.Tensor, num_heads: int, scale: float, *, k: torch.Tensor | None = None, v: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _attention(qkv, num_heads, scale, k, v, True)


def _rows(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, with_stats: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, bias = (None if t is None else t.detach().float().contiguous() for t in (weight, bias))
    rows = _last_axis_dense(x.reshape(-1, x.shape[-1]))
    out, mean, rstd = torch.ops.vit_fast_cpu.layer_norm(rows, weight, bias, eps, with_stats)
    return out.view(x.shape), mean, rstd


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return _rows(x, weight, bias, eps, False)[0]


def _layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _rows(x, weight, bias, eps, True)


def _blocks(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    num_heads: int,
    scale: float,
    activation: str,
    eps1: float,
    eps2: float,
) -> torch.Tensor:
    out: torch.Tensor
    out = torch.ops.vit_fast_cpu.prepared_blocks(x, list(weights), num_heads, scale, activation, eps1, eps2)
    return out


class Cpu(Backend):
    name = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self._library: torch.library.Library | None = None

    def load(self) -> tuple[str, ...]:
        if self.forward:
            return ()
        if self._library is None:
            self._library = torch.library.Library("vit_fast_cpu", "DEF")
            for schema in _SCHEMAS:
                self._library.define(schema)
        if reasons := extension.load("cpu"):
            return reasons
        self.not_supported = {
            "attention": lambda qkv, num_heads, k=None, v=None: _dtype_reasons(qkv),
            "layer_norm": lambda x, weight, bias, eps: _dtype_reasons(x),
        }
        self.not_supported |= {form.operation: lambda x, *_: _dtype_reasons(x) for form in (PACKED, INT8)}
        self.inference = {"attention": _attention_out, "layer_norm": _layer_norm}
        self.forward = {"attention": _attention_fwd, "layer_norm": _layer_norm_fwd}
        self.forward |= {form.operation: _blocks for form in (PACKED, INT8)}
        return ()

    def unavailable(self, device: torch.device) -> tuple[str, ...]:
        if device.type != "cpu":
            return (f"the cpu extension does not run on device type {device.type}",)
        return self.load()

    def version(self) -> str | None:
        """The instruction-set level whose kernels run."""
        return None if self.load() else str(torch.ops.vit_fast_cpu.level())


CPU = Cpu()
