"""The backend ``cuda``: the kernels of ``csrc/cuda`` for CUDA tensors, from compute capability 7.5 on.

Attention, LayerNorm and patch embedding are kernels of their own. Linear layers are LayerNorm, and a matrix product
with its epilogue by CUTLASS (``cutlass.py``) or, where that library is absent or cannot take a call, a product by
PyTorch and a pass for the activation or for LayerScale, drop-path and residual. No backward: the reference's runs.
The library is loaded on the first use. Its operators ``torch.ops.vit_fast_cuda.<name>`` write into tensors that are
made here, have no fake and no gradient, and are called inside the operators of ``vit_fast.ops`` alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast import extension
from vit_fast.kernels.activation_names import ACTIVATIONS, GATED
from vit_fast.kernels.arguments import check_rows
from vit_fast.kernels.block_options import PLAIN, BlockOptions
from vit_fast.kernels.folding import FoldedBlock, unflatten
from vit_fast.kernels.prepared_layer import PreparedLayer

from . import cutlass
from .base import Backend, attention_option_reasons, normalised_heads

# The implementations are in csrc/cuda/<name>.cu, epilogue.cu for the last two.
_SCHEMAS = (
    "layer_norm(Tensor(a!)? y, Tensor(b!)? mean, Tensor(c!)? rstd, Tensor x, Tensor? weight, Tensor? bias, "
    "float eps, bool rms) -> ()",
    "attention(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, int num_heads, float scale) -> ()",
    "patch_embed(Tensor(a!) out, Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, "
    "Tensor? pixels, int patch_height, int patch_width, int step_height, int step_width, int grid_width, "
    "bool channels_inner) -> ()",
    "activation(Tensor(a!) out, Tensor z, int activation) -> ()",
    "residual(Tensor(a!) out, Tensor x, Tensor residual, Tensor? gamma, Tensor? row_scale) -> ()",
)
_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS, 1)}  # as in csrc/cuda/epilogue.cu
Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps
_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
_MAX_WIDTH = 2**24  # of a row, and tokens of an image: int32 in the kernels


@functools.cache
def define_operators() -> torch.library.Library:
    """The schemas of ``torch.ops.vit_fast_cuda``. They are defined in Python, as a library that defines them twice, or
    is loaded from two places, would end the process."""
    library = torch.library.Library("vit_fast_cuda", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def _no_copy(x: Tensor) -> bool:
    """Whether the kernels read the rows of x [..., C] in place: C contiguous, rows at two strides at most."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return False
    axes, continued = 0, None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1:
            axes += stride != continued
            continued = size * stride
    return axes <= 2


def _rows(x: Tensor) -> Tensor:
    return x if _no_copy(x) else x.contiguous()


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None or v.is_contiguous() else v.contiguous()


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, dtype: torch.dtype, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(LN(x) in a dtype, mean [rows], rstd [rows]); of norm "rms" the mean is 0."""
    own = dtype if x.dtype == torch.float32 else x.dtype  # the kernel narrows a float32 x alone
    sides = [_vector(t) for t in (weight, bias)]
    if {t.dtype for t in sides if t is not None} not in ({own}, {torch.float32}):
        sides = [None if t is None else t.float() for t in sides]
    y = torch.empty(x.shape, dtype=own, device=x.device)
    rows = x.numel() // x.shape[-1]
    check_rows("layer_norm", rows)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) if statistics else None for _ in range(2))
    if rows:
        torch.ops.vit_fast_cuda.layer_norm(y, mean, rstd, _rows(x), *sides, eps, norm == "rms")
    return y.to(dtype), mean, rstd


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: str = "layer") -> Tensor:
    """As ``kernels.reference.layer_norm``."""
    return _normalise(x, weight, bias, eps, norm, x.dtype, False)[0]


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: str = "layer"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``kernels.reference.layer_norm_fwd``."""
    return _normalise(x, weight, bias, eps, norm, x.dtype, True)


def _activate(z: Tensor, activation: str | None, in_place: bool = True) -> Tensor:
    """The activation of z; a gated one is never in place."""
    if activation is None:
        return z
    out = z.new_empty((*z.shape[:-1], z.shape[-1] // 2)) if activation in GATED else z
    if not in_place and out is z:
        out = torch.empty_like(z)
    if not z.numel():
        return out
    torch.ops.vit_fast_cuda.activation(out, z, _ACTIVATIONS[activation])
    return out


def _product(y: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(y weightᵀ + bias)."""
    if not cutlass.reasons(y, weight, activation):
        return cutlass.linear(y, weight, bias, activation)
    bias = None if bias is None else bias.to(weight.dtype)
    return _activate(F.linear(y, weight, bias).contiguous(), activation)


def _layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    norm: str,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y, mean, rstd = _normalise(x, ln_weight, ln_bias, eps, norm, weight.dtype, statistics)
    return _product(y, weight, bias, activation), mean, rstd


def layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> Tensor:
    """As ``kernels.reference.layer_norm_linear``."""
    return _layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm, False)[0]


def layer_norm_linear_fwd(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``kernels.reference.layer_norm_linear_fwd``."""
    return _layer_norm_linear(x, ln_weight, ln_bias, eps, weight, bias, activation, norm, True)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
) -> Tensor:
    """As ``kernels.reference.linear_residual``, without dropout."""
    if inner_norm is not None:
        x = layer_norm(x, *inner_norm, norm=norm)
    x = x.to(weight.dtype)
    if not cutlass.reasons(x, weight, residual=residual, row_scale=row_scale):
        return cutlass.linear_residual(x, weight, bias, gamma, residual)
    branch = F.linear(x, weight, None if bias is None else bias.to(weight.dtype)).contiguous()
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out.numel():
        torch.ops.vit_fast_cuda.residual(out, branch, _rows(residual), _vector(gamma), _vector(row_scale))
    return out


def layernorm_mlp(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
) -> Tensor:
    """As ``kernels.reference.layernorm_mlp``, without dropout."""
    hidden = layer_norm_linear(x, ln_weight, ln_bias, eps, w1, b1, activation, norm=norm)
    return linear_residual(hidden, w2, b2, gamma, x, row_scale=row_scale, norm=norm, inner_norm=inner_norm)


def layernorm_mlp_fwd(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """As ``kernels.reference.layernorm_mlp_fwd``, without dropout."""
    first = activation if recompute else None
    hidden, mean, rstd = layer_norm_linear_fwd(x, ln_weight, ln_bias, eps, w1, b1, first, norm=norm)
    z, hidden = (w1.new_empty(0), hidden) if recompute else (hidden, _activate(hidden, activation, in_place=False))
    out = linear_residual(hidden, w2, b2, gamma, x, row_scale=row_scale, norm=norm, inner_norm=inner_norm)
    return out, mean, rstd, z


def _attention(
    qkv: Tensor, num_heads: int, scale: float, k: Tensor | None, v: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if k is None or v is None:
        qkv, k, v = qkv.chunk(3, dim=2)
    # A begin between pieces of 16 bytes, which is seen here alone: a traced tensor has no address and no offset.
    q, k, v = (t.clone(memory_format=torch.contiguous_format) if t.data_ptr() % 16 else t for t in (qkv, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=torch.float32) if with_lse else None
    if out.numel():
        torch.ops.vit_fast_cuda.attention(out, lse, q, k, v, num_heads, scale)
    return out, lse


def attention(
    qkv: Tensor, num_heads: int, scale: float, *, k: Tensor | None = None, v: Tensor | None = None, **norms: Any
) -> Tensor:
    """As ``kernels.reference.attention``, of its options with q_norm and k_norm alone."""
    qkv, k, v = normalised_heads(layer_norm, qkv, num_heads, k, v, **norms)
    return _attention(qkv, num_heads, scale, k, v, False)[0]


def attention_fwd(
    qkv: Tensor, num_heads: int, scale: float, *, k: Tensor | None = None, v: Tensor | None = None, **norms: Any
) -> tuple[Tensor, Tensor | None]:
    """As ``kernels.reference.attention_fwd``."""
    qkv, k, v = normalised_heads(layer_norm, qkv, num_heads, k, v, **norms)
    return _attention(qkv, num_heads, scale, k, v, True)


@functools.lru_cache(maxsize=64)
def _pixel_table(
    channels: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    unit: float,
    device: torch.device,
) -> Tensor | None:
    """[2, in]: shift and scale with (x/unit − mean)/std = (x − shift)·scale; None for the identity. Cached, because a
    copy from the host cannot be captured in a CUDA graph."""
    shift = [value * unit for value in mean or [0.0] * channels]
    scale = [1.0 / (value * unit) for value in std or [1.0] * channels]
    if set(shift) == {0.0} and set(scale) == {1.0}:
        return None
    return torch.tensor([shift, scale], dtype=torch.float32, device=device)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: Sequence[int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """As ``kernels.reference.patch_embed``."""
    batch, channels, height, width = images.shape
    dim, _, patch_height, patch_width = weight.shape
    grid_width = (width - patch_width) // stride[1] + 1
    tokens = ((height - patch_height) // stride[0] + 1) * grid_width
    num_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    check_rows("patch_embed", batch * tokens)
    out = torch.empty(batch, num_prefix + tokens, dim, dtype=weight.dtype, device=images.device)
    if not out.numel():
        return out
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    mean, std = (None if values is None else tuple(map(float, values)) for values in (mean, std))
    channels_inner = channels > 1 and images.stride(1) == 1 and images.stride(3) == channels
    flat = (weight.permute(0, 2, 3, 1) if channels_inner else weight).reshape(dim, -1)
    torch.ops.vit_fast_cuda.patch_embed(
        out, images, flat if flat.stride(1) == 1 else flat.contiguous(), bias, pos_embed,
        prefix_tokens if num_prefix else None, _pixel_table(channels, mean, std, unit, images.device),
        patch_height, patch_width, *stride, grid_width, channels_inner,
    )  # fmt: skip
    return out


def row_statistics(x: Tensor, eps: float, norm: str = "layer") -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the rows of x [..., C], [rows] float32: what a norm needs that is folded into a product."""
    rows = x.numel() // x.shape[-1]
    check_rows("layer_norm", rows)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    torch.ops.vit_fast_cuda.layer_norm(None, mean, rstd, _rows(x), None, None, eps, norm == "rms")
    return mean, rstd


def _folded_linear(
    x: Tensor, eps: float, norm: str, weight: Tensor, sums: Tensor, bias: Tensor, activation: str | None = None
) -> Tensor:
    """act(LN(x) weightᵀ + bias), the affine part of the norm being folded into weight and bias."""
    if not cutlass.folds(x) or cutlass.reasons(x, weight, activation):
        return _product(layer_norm(x, None, None, eps, norm=norm), weight, bias, activation)
    return cutlass.folded_linear(x, *row_statistics(x, eps, norm), weight, sums, bias, activation)


def prepared_blocks(
    x: Tensor,
    weights: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str | None,
    eps1: float,
    eps2: float,
    options: BlockOptions = PLAIN,
) -> Tensor:
    """As ``kernels.reference.prepared_blocks``, of attention's options with q_norm and k_norm alone."""
    norm, features = options.norm, options.hidden_features
    of_out, of_hidden = (None if eps is None else (None, None, eps) for eps in (options.out_eps, options.hidden_eps))
    for block in unflatten(FoldedBlock, weights):
        packed = _folded_linear(x, eps1, norm, block.qkv_weight, block.qkv_sums, block.qkv_bias)
        out = attention(packed, num_heads, scale, **options.of_attention())
        x = linear_residual(out, block.proj_weight, block.proj_bias, None, x, norm=norm, inner_norm=of_out)
        hidden = _folded_linear(x, eps2, norm, block.fc1_weight, block.fc1_sums, block.fc1_bias, activation)
        fc2 = block.fc2_weight
        if of_hidden is not None:  # of the features without the padding of packed weights
            hidden, fc2 = hidden[..., :features], fc2[:, :features]
        x = linear_residual(hidden, fc2, block.fc2_bias, None, x, norm=norm, inner_norm=of_hidden)
    return x


def prepared_linear(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> Tensor:
    """As ``kernels.prepared_linear.prepared_linear``; an activation or a residual, not both."""
    (matrix,), eps = layer.weight, layer.eps
    y = x if eps is None else layer_norm(x, layer.ln_weight, layer.ln_bias, eps, norm=layer.norm)
    if residual is None:
        return _product(y, matrix, layer.bias, layer.activation)
    return linear_residual(y, matrix, layer.bias, layer.gamma, residual).to(x.dtype)


# Why the kernels cannot take a call; empty where they can. The batch size plays no part.


def _dtype_reasons(allowed: Sequence[torch.dtype], **tensors: Tensor | None) -> list[str]:
    words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
    return [
        f"{name} has dtype {str(t.dtype).removeprefix('torch.')}, the CUDA extension takes {words} here"
        for name, t in tensors.items()
        if t is not None and t.dtype not in allowed
    ]


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as select.unavailable


def _product_reasons(x: Tensor) -> list[str]:
    """Of a kernel with tensor-core products."""
    if x.dtype == torch.bfloat16 and x.device.type == "cuda":
        major, minor = _capability(x.device)
        if major < 8:
            return [f"bfloat16 products need compute capability 8.0, the device has {major}.{minor}"]
    return []


def layer_norm_reasons(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: str = "layer"
) -> list[str]:
    """Of layer_norm."""
    reasons = _dtype_reasons(_FLOAT, x=x, weight=weight, bias=bias)
    if x.shape[-1] >= _MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is not below {_MAX_WIDTH}")
    return reasons


def layer_norm_linear_reasons(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    norm: str = "layer",
) -> list[str]:
    """Of layer_norm_linear."""
    return layer_norm_reasons(x, ln_weight, ln_bias, eps, norm=norm) + _dtype_reasons(_FLOAT, weight=weight)


def linear_residual_reasons(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
) -> list[str]:
    """Of linear_residual."""
    sides = (weight.dtype, torch.float32)
    reasons = _dtype_reasons(_FLOAT, weight=weight) + _dtype_reasons(sides, residual=residual)
    reasons += _dtype_reasons(sides, gamma=gamma, row_scale=row_scale)
    return reasons if inner_norm is None else reasons + layer_norm_reasons(x, *inner_norm, norm=norm)


def layernorm_mlp_reasons(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm: Norm | None = None,
) -> list[str]:
    """Of layernorm_mlp."""
    first = layer_norm_linear_reasons(x, ln_weight, ln_bias, eps, w1, b1, activation, norm=norm)
    sides = (w2.dtype, torch.float32)
    return (
        first
        + [
            reason
            for reason in _dtype_reasons(_FLOAT, w2=w2) + _dtype_reasons(sides, x=x, gamma=gamma, row_scale=row_scale)
            if reason not in first
        ]
        + (_dtype_reasons(_FLOAT, inner_weight=inner_norm[0], inner_bias=inner_norm[1]) if inner_norm else [])
    )


def attention_reasons(
    qkv: Tensor, num_heads: int, *, k: Tensor | None = None, v: Tensor | None = None, **options: Any
) -> list[str]:
    """Of attention."""
    reasons = _dtype_reasons(_FLOAT, qkv=qkv) + _product_reasons(qkv) + attention_option_reasons(qkv, k, v, **options)
    head_size = qkv.shape[2] // (num_heads * (3 if k is None else 1))
    if head_size % 8 or not 16 <= head_size <= 128:
        reasons.append(f"head size {head_size} is not a multiple of 8 from 16 to 128")
    for name, t in {"qkv": qkv, "k": k, "v": v}.items():
        if t is None:
            continue
        if t.shape[1] >= _MAX_WIDTH:
            reasons.append(f"{name} has {t.shape[1]} tokens, not below {_MAX_WIDTH}")
        steps = [stride for size, stride in zip(t.shape[:2], t.stride()[:2], strict=True) if size != 1]
        if t.stride(2) != 1 or any(step * t.itemsize % 16 for step in steps):
            reasons.append(
                f"{name} has strides {tuple(t.stride())}, the kernel takes contiguous heads, and rows and images at "
                f"multiples of {16 // t.itemsize} elements"
            )
    return reasons


def patch_embed_reasons(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    stride: Sequence[int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[str]:
    """Of patch_embed."""
    reasons = _dtype_reasons(_FLOAT, weight=weight) + _product_reasons(weight)
    if not reasons:
        reasons = _dtype_reasons((torch.uint8, torch.float32, weight.dtype), images=images)
        reasons += _dtype_reasons((weight.dtype,), bias=bias)
        reasons += _dtype_reasons((weight.dtype, torch.float32), pos_embed=pos_embed, prefix_tokens=prefix_tokens)
    return reasons


def prepared_blocks_reasons(
    x: Tensor, weights: Sequence[Tensor], num_heads: int, options: BlockOptions = PLAIN
) -> list[str]:
    """Of prepared_blocks."""
    packed = x.new_empty((1, 1, 3 * x.shape[-1]), device="meta")
    reasons = layer_norm_reasons(x, None, None, 0.0) + _product_reasons(x)
    return reasons + attention_reasons(packed, num_heads, **options.of_attention())


def prepared_linear_reasons(x: Tensor, layer: PreparedLayer, residual: Tensor | None = None) -> list[str]:
    """Of prepared_linear."""
    reasons = _dtype_reasons(_FLOAT, x=x)
    if layer.eps is not None:
        reasons = layer_norm_reasons(x, layer.ln_weight, layer.ln_bias, layer.eps)
    if residual is not None:
        reasons += _dtype_reasons((x.dtype, torch.float32), residual=residual, gamma=layer.gamma)
    return reasons


class Cuda(Backend):
    name = "cuda"
    device_types = ("cuda",)
    remedy = "Run `vit-fast build --cuda --force`, or update the GPU's driver."

    def load(self) -> tuple[str, ...]:
        if self.forward:
            return ()
        define_operators()
        reasons = extension.load("cuda")
        if not reasons:
            self.fill_tables()
        return reasons

    def fill_tables(self) -> None:
        """The functions by operation; the library has been loaded."""
        self.not_supported = {
            "patch_embed": patch_embed_reasons,
            "attention": attention_reasons,
            "layer_norm": layer_norm_reasons,
            "layer_norm_linear": layer_norm_linear_reasons,
            "linear_residual": linear_residual_reasons,
            "layernorm_mlp": layernorm_mlp_reasons,
            "prepared_blocks": prepared_blocks_reasons,
            "prepared_linear": prepared_linear_reasons,
        }
        self.inference = {
            "attention": attention,
            "layer_norm": layer_norm,
            "layer_norm_linear": layer_norm_linear,
            "layernorm_mlp": layernorm_mlp,
        }
        self.forward = {
            "patch_embed": patch_embed,
            "attention": attention_fwd,
            "layer_norm": layer_norm_fwd,
            "layer_norm_linear": layer_norm_linear_fwd,
            "linear_residual": linear_residual,
            "layernorm_mlp": layernorm_mlp_fwd,
            "prepared_blocks": prepared_blocks,
            "prepared_linear": prepared_linear,
        }

    def version(self) -> str | None:
        """What runs the matrix products."""
        if self.load():
            return None
        missing = cutlass.load()
        return f"products by PyTorch: {missing[0]}" if missing else "products by CUTLASS"

    def unavailable(self, device: torch.device) -> tuple[str, ...]:
        if device.type != "cuda":
            return (f"the cuda extension does not run on device type {device.type}",)
        if reasons := self.load():
            return reasons
        major, minor = _capability(device)
        if (major, minor) < (7, 5):
            return (f"the cuda extension needs compute capability 7.5, the device has {major}.{minor}",)
        return ()


CUDA = Cuda()
