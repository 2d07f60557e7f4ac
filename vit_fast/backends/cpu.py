"""The backend ``cpu``: the compiled extension for CPU tensors (``csrc/cpu/``), which ``vit-fast build`` builds."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vit_fast import extension
from vit_fast.kernels.block_options import PLAIN, BlockOptions
from vit_fast.kernels.prepared_layer import PreparedLayer
from vit_fast.precisions import INT8, PACKED

from . import canary, cpu_choice
from .base import Backend, Table, attention_option_reasons, normalised_heads

# The operators of csrc/cpu/*.cpp. Their schemas are defined here, because a namespace that two libraries define crashes
# the process.
_SCHEMAS = (
    "level() -> str",
    "levels() -> str",
    "use_level(str name) -> ()",
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, bool with_stats) "
    "-> (Tensor, Tensor, Tensor)",
    "keep_mask(Tensor seed, int count, float p) -> Tensor",
    "attention(Tensor qkv, Tensor? k, Tensor? v, int num_heads, float scale, bool with_lse, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor)",
    "attention_bwd(Tensor grad, Tensor qkv, int num_heads, float scale, Tensor? k, Tensor? v, Tensor out, Tensor lse, "
    "float dropout_p, Tensor? seed) -> Tensor[]",
    "layer_norm_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool rms) "
    "-> (Tensor, Tensor, Tensor)",
    "layer_norm_linear(Tensor x, Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor weight, Tensor? bias, "
    "str activation, bool rms, bool with_stats, bool with_z) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor residual, Tensor? row_scale, "
    "int rows_per_scale, float dropout_p, Tensor? seed) -> Tensor",
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, int[] step, "
    "Tensor? mean, Tensor? std) -> Tensor",
    "prepared_blocks(Tensor x, Tensor[] weights, int num_heads, float scale, str activation, float eps1, float eps2, "
    "str norm, float out_eps, float hidden_eps, int hidden_features, Tensor? q_weight, Tensor? q_bias, float q_eps, "
    "Tensor? k_weight, Tensor? k_bias, float k_eps, Tensor? cos, Tensor? sin, str rope_layout, int num_prefix, "
    "Tensor? bias) -> Tensor",
    "packed_linear(Tensor x, Tensor[] weight, int features, Tensor? ln_weight, Tensor? ln_bias, float eps, bool rms, "
    "str activation, Tensor? gamma, Tensor? residual) -> Tensor",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Norm = tuple[torch.Tensor | None, torch.Tensor | None, float]  # weight, bias, eps
_Stats = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, mean, rstd


def _dtype_reasons(*tensors: torch.Tensor) -> list[str]:
    dtypes = dict.fromkeys(t.dtype for t in tensors if t.dtype not in _DTYPES)
    return [f"dtype {str(dtype).removeprefix('torch.')} is not supported" for dtype in dtypes]


def _patch_embed_reasons(images: torch.Tensor, weight: torch.Tensor, *_: object) -> list[str]:
    return _dtype_reasons(weight) if images.dtype == torch.uint8 else _dtype_reasons(images, weight)


def _vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter as the kernels read vectors: float32 and dense."""
    return None if t is None else t.detach().float().contiguous()


def _dense(t: torch.Tensor) -> torch.Tensor:
    """A tensor whose last axis is dense; its rows may be strided."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [rows, C], a view where there can be one."""
    return _dense(x.reshape(-1, x.shape[-1]))


def keep_mask(seed: torch.Tensor, count: int, p: float, device: torch.device) -> torch.Tensor:
    """``reference.keep_mask``."""
    keep: torch.Tensor = torch.ops.vit_fast_cpu.keep_mask(seed.to(device), count, p)
    return keep


def _dropped(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """x · mask / (1 − p) in place; x is dense."""
    if seed is None:
        return x
    return x.masked_fill_(~keep_mask(seed, x.numel(), p, x.device).view(x.shape), 0.0).mul_(1 / (1 - p))


def _attention(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    with_lse: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (t if t is None else _dense(t) for t in (k, v))
    out: tuple[torch.Tensor, torch.Tensor]
    out = torch.ops.vit_fast_cpu.attention(_dense(qkv), k, v, num_heads, scale, with_lse, dropout_p, seed)
    return out


def attention(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    **norms: Any,
) -> torch.Tensor:
    qkv, k, v = normalised_heads(layer_norm, qkv, num_heads, k, v, **norms)
    return _attention(qkv, num_heads, scale, k, v, False, dropout_p, seed)[0]


def attention_fwd(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    **norms: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    qkv, k, v = normalised_heads(layer_norm, qkv, num_heads, k, v, **norms)
    return _attention(qkv, num_heads, scale, k, v, True, dropout_p, seed)


def attention_bwd(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    grad = _dense(grad.to(qkv.dtype))
    k, v = (t if t is None else _dense(t) for t in (k, v))
    grads = torch.ops.vit_fast_cpu.attention_bwd(
        grad, _dense(qkv), num_heads, scale, k, v, _dense(out), lse.contiguous(), dropout_p, seed
    )
    return (*grads, None, None)[:3]


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str, with_stats: bool
) -> _Stats:
    out, *stats = torch.ops.vit_fast_cpu.layer_norm(
        _rows(x), _vector(weight), _vector(bias), eps, norm == "rms", with_stats
    )
    return out.view(x.shape), *stats


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *, norm: str = "layer"
) -> torch.Tensor:
    return _layer_norm(x, weight, bias, eps, norm, False)[0]


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *, norm: str = "layer"
) -> _Stats:
    return _layer_norm(x, weight, bias, eps, norm, True)


def layer_norm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    *,
    norm: str = "layer",
    needs: Sequence[bool] | None = None,
    residual_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    rows = _rows(x)
    dx, dweight, dbias = torch.ops.vit_fast_cpu.layer_norm_bwd(
        _rows(grad.to(x.dtype)), rows, _vector(weight), mean.contiguous(), rstd.contiguous(), norm == "rms"
    )
    dx = dx.view(x.shape) if residual_grad is None else dx.view(x.shape).add_(residual_grad)
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype)


def _layer_norm_linear(
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    norm: str,
    with_stats: bool = False,
    with_z: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, mean, rstd, what the activation takes), the last three without elements unless asked for."""
    out, mean, rstd, z = torch.ops.vit_fast_cpu.layer_norm_linear(
        _rows(x), _vector(ln_weight), _vector(ln_bias), eps, _dense(weight), _vector(bias), activation or "none",
        norm == "rms", with_stats, with_z,
    )  # fmt: skip
    z = z.view(*x.shape[:-1], z.shape[-1]) if with_z else z
    return out.view(*x.shape[:-1], out.shape[-1]), mean, rstd, z


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
    return _layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm)[0]


def layer_norm_linear_fwd(
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> _Stats:
    return _layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm, True)[:3]


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    row_scale: torch.Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = _rows(x if inner_norm is None else layer_norm(x, *inner_norm, norm=norm))
    per_scale = 1 if row_scale is None else max(rows.shape[0] // max(row_scale.shape[0], 1), 1)
    out = torch.ops.vit_fast_cpu.linear_residual(
        rows, _dense(weight), _vector(bias), _vector(gamma), _rows(residual).contiguous(), _vector(row_scale),
        per_scale, dropout_p, seed,
    )  # fmt: skip
    return out.view(residual.shape)


def _layernorm_mlp(
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    eps: float,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str | None,
    gamma: torch.Tensor | None,
    *,
    row_scale: torch.Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out_dropout_p: float = 0.0,
    out_seed: torch.Tensor | None = None,
    with_stats: bool = False,
    with_z: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, mean, rstd, z = _layer_norm_linear(x, ln_weight, ln_bias, eps, w1, b1, activation, norm, with_stats, with_z)
    out = linear_residual(
        _dropped(hidden, dropout_p, seed), w2, b2, gamma, x,
        row_scale=row_scale, norm=norm, inner_norm=inner_norm, dropout_p=out_dropout_p, seed=out_seed,
    )  # fmt: skip
    return out, mean, rstd, z


def layernorm_mlp(*inputs: Any, **options: Any) -> torch.Tensor:
    return _layernorm_mlp(*inputs, **options)[0]


def layernorm_mlp_fwd(
    *inputs: Any, recompute: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _layernorm_mlp(*inputs, **options, with_stats=True, with_z=not recompute)


def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    stride: Sequence[int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    prefix = None if prefix_tokens is None else prefix_tokens.detach().to(weight.dtype).contiguous()
    of_pixels = (None if values is None else torch.tensor(values, dtype=torch.float32) for values in (mean, std))
    out: torch.Tensor = torch.ops.vit_fast_cpu.patch_embed(
        images, weight.contiguous(), _vector(bias), _vector(pos_embed), prefix, list(stride), *of_pixels
    )
    return out


def _blocks(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    num_heads: int,
    scale: float,
    activation: str,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> torch.Tensor:
    values = _PLAIN_VALUES if options is PLAIN else _option_values(options, x, num_heads)
    out: torch.Tensor
    out = torch.ops.vit_fast_cpu.prepared_blocks(x, list(weights), num_heads, scale, activation, eps1, eps2, *values)
    return out


def packed_linear(x: torch.Tensor, layer: PreparedLayer, residual: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.vit_fast_cpu.packed_linear(
        _rows(x), [*layer.weight, layer.bias], layer.features, _vector(layer.ln_weight), _vector(layer.ln_bias),
        -1.0 if layer.eps is None else layer.eps, layer.norm == "rms", layer.activation or "none", _vector(layer.gamma),
        None if residual is None else _rows(residual.to(x.dtype)).contiguous(),
    )  # fmt: skip
    return out.view(*x.shape[:-1], layer.features)


_PLAIN_VALUES = ("layer", -1.0, -1.0, 0, *(None, None, -1.0) * 2, None, None, "half", 0, None)


def _option_values(options: BlockOptions, x: torch.Tensor, num_heads: int) -> tuple[Any, ...]:
    """The options as the operator takes them: eps of −1 without a norm, tables [B, H, N', D] and a bias [B, H, N, N]
    in float32, which their strides broadcast."""
    batch, tokens, width = x.shape
    norms = [
        (None, None, -1.0) if norm is None else (_vector(norm[0]), _vector(norm[1]), norm[2])
        for norm in (options.q_norm, options.k_norm)
    ]
    patches = tokens - options.num_prefix
    tables = [
        _broadcast(table, (batch, num_heads, patches, width // num_heads)) for table in options.rope or (None, None)
    ]
    bias = options.bias
    if options.key_lengths is not None:
        padding = torch.arange(tokens) >= options.key_lengths[:, None, None, None]
        bias = (x.new_zeros(()) if bias is None else bias).masked_fill(padding, -math.inf)
    eps = (-1.0 if value is None else value for value in (options.out_eps, options.hidden_eps))
    return (
        options.norm, *eps, options.hidden_features, *norms[0], *norms[1], *tables, options.rope_layout,
        options.num_prefix, _broadcast(bias, (batch, num_heads, tokens, tokens)),
    )  # fmt: skip


def _broadcast(t: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A tensor as float32 of a shape whose last axis is dense; the leading axes may have strides of 0."""
    if t is None:
        return None
    t = t.detach().float()
    return _dense(t.expand(*t.shape[:-1], shape[-1])).expand(shape)


def _count(x: torch.Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


# Operation → what decides whether the extension is the faster: rows (tokens of attention), and the dtype multiplied.
_SIZES: dict[str, Callable[..., tuple[int, torch.dtype]]] = {
    "patch_embed": lambda images, weight, *_: (
        images.shape[0] * (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3]), weight.dtype
    ),
    "attention": lambda qkv, *_: (qkv.shape[1], qkv.dtype),
    "layer_norm": lambda x, *_, **__: (_count(x), x.dtype),
    "layer_norm_linear": lambda x, ln_weight, ln_bias, eps, weight, *_, **__: (_count(x), weight.dtype),
    "linear_residual": lambda x, weight, *_, **__: (_count(x), weight.dtype),
    "layernorm_mlp": lambda x, ln_weight, ln_bias, eps, w1, *_, **__: (_count(x), w1.dtype),
}  # fmt: skip


class Cpu(Backend):
    name = "cpu"
    device_types = ("cpu",)
    remedy = "Run `vit-fast build --force`, or reinstall vit-fast."

    def __init__(self) -> None:
        super().__init__()
        self._library: torch.library.Library | None = None
        self._level = ""  # the instruction-set level whose kernels run
        self._capabilities: Mapping[str, Any] = {}  # of the processor, as PyTorch finds them
        self._loading = threading.Lock()
        self._wrong: tuple[str, ...] = ()  # why what is loaded is not trusted

    def load(self) -> tuple[str, ...]:
        if self.forward or self._wrong:
            return self._wrong
        with self._loading:
            return self._load()

    def _load(self) -> tuple[str, ...]:
        if self.forward or self._wrong:  # another thread was here first
            return self._wrong
        if self._library is None:
            self._library = torch.library.Library("vit_fast_cpu", "DEF")
            for schema in _SCHEMAS:
                self._library.define(schema)
        if reasons := extension.load("cpu"):
            return reasons
        self._level, self._capabilities = torch.ops.vit_fast_cpu.level(), torch.cpu.get_capabilities()
        not_supported: Table = {
            "patch_embed": _patch_embed_reasons,
            "attention": lambda qkv, num_heads, **options: (
                _dtype_reasons(qkv) + attention_option_reasons(qkv, **options)
            ),
            "layer_norm": lambda x, *_, **__: _dtype_reasons(x),
            "layer_norm_linear": lambda x, ln_weight, ln_bias, eps, weight, *_, **__: _dtype_reasons(x, weight),
            "linear_residual": lambda x, weight, bias, gamma, residual, **_: _dtype_reasons(x, weight, residual),
            "layernorm_mlp": lambda x, ln_weight, ln_bias, eps, w1, *_, **__: _dtype_reasons(x, w1),
        }
        prepared = [name for form in (PACKED, INT8) for name in (form.operation, form.linear) if name]
        self.not_supported = {**not_supported, **dict.fromkeys(prepared, lambda x, *_: _dtype_reasons(x))}
        self.inference = {
            "attention": attention,
            "layer_norm": layer_norm,
            "layer_norm_linear": layer_norm_linear,
            "layernorm_mlp": layernorm_mlp,
        }
        self.backward = {"attention": attention_bwd, "layer_norm": layer_norm_bwd}
        self.dropout = frozenset({"attention", "linear_residual", "layernorm_mlp"})
        self.backward_not_supported = {
            "attention": lambda qkv, num_heads, k=None, v=None, **options: [
                f"attention has no {name} in the backward here" for name in ("q_norm", "k_norm") if name in options
            ]
        }
        forward: Table = {
            "patch_embed": patch_embed,
            "attention": attention_fwd,
            "layer_norm": layer_norm_fwd,
            "layer_norm_linear": layer_norm_linear_fwd,
            "linear_residual": linear_residual,
            "layernorm_mlp": layernorm_mlp_fwd,
        }
        forward = {**forward, **{form.operation: _blocks for form in (PACKED, INT8)}}
        forward = {**forward, **{form.linear: packed_linear for form in (PACKED, INT8) if form.linear}}
        self._wrong = canary.reasons("cpu", forward, self.remedy)
        if not self._wrong:
            self.forward, self.keep_mask = forward, keep_mask
        return self._wrong

    def slower_stack_reasons(self, dtype: torch.dtype) -> list[str]:
        return [] if self.load() else cpu_choice.stack_reasons(dtype, self._capabilities)

    def is_slower(self, dtype: torch.dtype) -> bool:
        return dtype not in _DTYPES or cpu_choice.is_never_chosen(dtype, self._level, self._capabilities)

    def slower_reasons(self, operation: str, *arguments: Any, **options: Any) -> list[str]:
        of = _SIZES.get(operation)
        if of is None:
            return []
        rows, dtype = of(*arguments)
        fewest = cpu_choice.fewest_rows(operation, dtype, self._level, self._capabilities)
        named = str(dtype).removeprefix("torch.")
        if fewest is None:
            known = cpu_choice.stack_reasons(dtype, self._capabilities)
            return known or [f"PyTorch is measured to be as fast or faster for {operation} in {named} on a CPU"]
        return [] if rows >= fewest else [f"{rows} rows, the cpu extension is measured to be faster from {fewest} on"]

    def unavailable(self, device: torch.device) -> tuple[str, ...]:
        if device.type != "cpu":
            return (f"the cpu extension does not run on device type {device.type}",)
        return self.load()

    def version(self) -> str | None:
        """The instruction-set level whose kernels run."""
        return None if self.load() else self._level

    def levels(self) -> list[str]:
        """The instruction-set levels that this processor can run, from the lowest to the highest."""
        return [] if self.load() else torch.ops.vit_fast_cpu.levels().split(",")

    def use_level(self, name: str) -> None:
        """Runs the kernels of one of ``levels()`` from now on; for tests and measurements."""
        torch.ops.vit_fast_cpu.use_level(name)
        self._level = name


CPU = Cpu()
