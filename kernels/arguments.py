"""Checks of the arguments of every operation, the same for all backends.

Each ``check_<op>`` reads shapes, dtypes and devices, and of ``cu_seqlens`` in the memory of the host the values; it
raises before anything is allocated or launched, and no tensor is printed. A message uses the names of the signature and
tells the operation, the argument, what was given and what is expected. Callers' mistakes are ``TypeError`` (wrong
Python type) or ``ValueError`` (rank, shape, dtype, layout, device, value). The checks run on every call, so the usual
types are recognised first.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch

from . import folding, packing
from .activation_names import ACTIVATIONS, GATED
from .tracing import known_values, untraced

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PATCH_WEIGHT_SIZES = (
    "weight has {} rows", "weight has {} channels", "weight has patch height {}", "weight has patch width {}"
)  # fmt: skip
MAX_ROWS = 2**31 - 256
NORMS = ("layer", "rms")
ROPE_LAYOUTS = ("half", "interleaved")


class UnsupportedError(RuntimeError):
    """The requested operation, option or backend cannot run this call."""


def _shape(tensor):
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _check_tensor(op, name, value, ndim=None, dtypes=FLOAT_DTYPES):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"vit_fast.{op}: {name} is {type(value).__name__}, expected a torch.Tensor")
    if value.is_nested or value.layout != torch.strided:
        came = "is nested" if value.is_nested else f"has layout {value.layout}"
        raise ValueError(f"vit_fast.{op}: {name} {came}, expected a dense tensor")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"vit_fast.{op}: {name} has {value.dim()} dimensions {_shape(value)}, expected {ndim}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = wanted if len(dtypes) == 1 else f"one of {wanted}"
        raise ValueError(f"vit_fast.{op}: {name} has dtype {value.dtype}, expected {wanted}")


def _check_device(op, name, value, like_name, like):
    if value.device != like.device:
        raise ValueError(f"vit_fast.{op}: {name} is on {value.device}, expected {like.device} (as {like_name})")


def _check_vector(op, name, value, size, why, like_name, like, dtype=None):
    if value is None:
        return
    _check_tensor(op, name, value, 1)
    if value.shape[0] != size:
        raise ValueError(f"vit_fast.{op}: {name} has {value.shape[0]} elements, expected {size} ({why})")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"vit_fast.{op}: {name} has dtype {value.dtype}, expected {dtype} (as {like_name})")
    _check_device(op, name, value, like_name, like)


def _check_int(op, name, value, minimum=1):
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt))):
        raise TypeError(f"vit_fast.{op}: {name} is {type(value).__name__}, expected an int")
    if value < minimum:
        raise ValueError(f"vit_fast.{op}: {name} is {value}, expected {minimum} or more")
    _check_bits(op, name, value)


def _check_bits(op, name, value):
    """PyTorch's schemas and scalars take no larger int."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"vit_fast.{op}: {name} is {value}, expected a number of 64 bits")


def _check_size(op, came, size):
    if size < 1:
        raise ValueError(f"vit_fast.{op}: {came.format(size)}, expected 1 or more")


def _check_real(op, name, value):
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat))):
        raise TypeError(f"vit_fast.{op}: {name} is {type(value).__name__}, expected a float")
    if not -math.inf < value < math.inf:
        raise ValueError(f"vit_fast.{op}: {name} is {value}, expected a finite number")
    _check_bits(op, name, value)


def _check_eps(op, name, eps):
    _check_real(op, name, eps)
    if eps < 0:
        raise ValueError(f"vit_fast.{op}: {name} is {eps}, expected 0 or more")


def _check_dropout(op, dropout_p, seed, like_name, like, prefix=""):
    _check_real(op, f"{prefix}dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"vit_fast.{op}: {prefix}dropout_p is {dropout_p}, expected 0 ≤ {prefix}dropout_p < 1")
    _check_seed(op, f"{prefix}seed", seed, like_name, like)


def _check_seed(op, name, seed, like_name, like):
    if seed is None:
        return
    _check_tensor(op, name, seed, dtypes=(torch.int64,))
    if seed.numel() != 1:
        raise ValueError(f"vit_fast.{op}: {name} has shape {_shape(seed)}, expected one element")
    _check_device(op, name, seed, like_name, like)


def _check_activation(op, activation, allow_none):
    if activation is None and allow_none:
        return
    is_word = isinstance(activation, str)
    if not is_word or activation not in ACTIVATIONS:
        came = repr(activation) if is_word else type(activation).__name__
        words = ", ".join(ACTIVATIONS) + (" or None" if allow_none else "")
        raise (ValueError if is_word else TypeError)(f"vit_fast.{op}: activation is {came}, expected one of {words}")


def _check_norm(op, norm):
    is_word = isinstance(norm, str)
    if not is_word or norm not in NORMS:
        came = repr(norm) if is_word else type(norm).__name__
        raise (ValueError if is_word else TypeError)(
            f"vit_fast.{op}: norm is {came}, expected one of {', '.join(NORMS)}"
        )


def _check_inner_norm(op, inner_norm, width, why, x):
    """(weight [width], bias [width], eps) or None."""
    if inner_norm is None:
        return
    _check_pair(op, "inner_norm", inner_norm, "(weight or None, bias or None, eps)")
    weight, bias, eps = inner_norm
    _check_vector(op, "inner_norm weight", weight, width, why, "x", x)
    _check_vector(op, "inner_norm bias", bias, width, why, "x", x)
    _check_eps(op, "inner_norm eps", eps)


def _check_gated(op, name, rows, activation):
    if rows % 2:
        raise ValueError(
            f"vit_fast.{op}: {name} has {rows} rows, expected an even number for activation {activation!r}"
        )


def _check_layer_norm(op, x, weight, bias, eps, norm, prefix=""):
    _check_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"vit_fast.{op}: x has 0 dimensions, expected 1 or more")
    width = x.shape[-1]
    _check_size(op, "x has width {}", width)
    _check_vector(op, prefix + "weight", weight, width, "the width of x", "x", x)
    _check_vector(op, prefix + "bias", bias, width, "the width of x", "x", x)
    _check_eps(op, "eps", eps)
    if norm != "layer":
        _check_norm(op, norm)


def _check_weight(op, name, weight, in_features, why, x):
    _check_tensor(op, name, weight, 2)
    _check_size(op, name + " has {} rows", weight.shape[0])
    if weight.shape[1] != in_features:
        raise ValueError(f"vit_fast.{op}: {name} has shape {_shape(weight)}, expected [*, {in_features}] ({why})")
    _check_device(op, name, weight, "x", x)


def _check_branch(op, x, gamma, row_scale, width, why):
    """gamma [width] and row_scale [B] of a residual branch."""
    _check_vector(op, "gamma", gamma, width, why, "x", x)
    if row_scale is not None:
        _check_vector(op, "row_scale", row_scale, x.shape[0], "the batch size of x", "x", x)


@untraced
def check_layer_norm(x: Any, weight: Any, bias: Any, eps: Any, norm: Any) -> None:
    _check_layer_norm("layer_norm", x, weight, bias, eps, norm)


@untraced
def check_layer_norm_linear(
    x: Any, ln_weight: Any, ln_bias: Any, eps: Any, weight: Any, bias: Any, activation: Any, norm: Any
) -> None:
    op = "layer_norm_linear"
    _check_layer_norm(op, x, ln_weight, ln_bias, eps, norm, "ln_")
    _check_weight(op, "weight", weight, x.shape[-1], "the width of x", x)
    _check_vector(op, "bias", bias, weight.shape[0], "the rows of weight", "weight", weight, weight.dtype)
    _check_activation(op, activation, allow_none=True)
    if activation in GATED:
        _check_gated(op, "weight", weight.shape[0], activation)


@untraced
def check_keep_samples(x: Any, p: Any, seed: Any) -> None:
    op = "keep_samples"
    _check_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"vit_fast.{op}: x has 0 dimensions, expected a batch axis")
    _check_real(op, "p", p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"vit_fast.{op}: p is {p}, expected 0 ≤ p < 1")
    _check_seed(op, "seed", seed, "x", x)


def check_dropout(x: Any, p: Any, seed: Any) -> None:
    _check_tensor("dropout", "x", x)
    _check_real("dropout", "p", p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"vit_fast.dropout: p is {p}, expected 0 ≤ p < 1")
    _check_seed("dropout", "seed", seed, "x", x)


@untraced
def check_linear_residual(
    x: Any,
    weight: Any,
    bias: Any,
    gamma: Any,
    residual: Any,
    row_scale: Any,
    norm: Any,
    inner_norm: Any,
    dropout_p: Any,
    seed: Any,
) -> None:
    op = "linear_residual"
    _check_tensor(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"vit_fast.{op}: x has {x.dim()} dimensions {_shape(x)}, expected 2 or more")
    _check_size(op, "x has width {}", x.shape[-1])
    _check_weight(op, "weight", weight, x.shape[-1], "the width of x", x)
    _check_vector(op, "bias", bias, weight.shape[0], "the rows of weight", "weight", weight, weight.dtype)
    _check_tensor(op, "residual", residual)
    _check_device(op, "residual", residual, "x", x)
    if residual.shape != (*x.shape[:-1], weight.shape[0]):
        wanted = "[" + ", ".join(str(size) for size in (*x.shape[:-1], weight.shape[0])) + "]"
        raise ValueError(f"vit_fast.{op}: residual has shape {_shape(residual)}, expected {wanted}")
    _check_branch(op, x, gamma, row_scale, weight.shape[0], "the rows of weight")
    if norm != "layer":
        _check_norm(op, norm)
    _check_inner_norm(op, inner_norm, x.shape[-1], "the width of x", x)
    _check_dropout(op, dropout_p, seed, "x", x)


@untraced
def check_layernorm_mlp(
    x: Any,
    ln_weight: Any,
    ln_bias: Any,
    eps: Any,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    activation: Any,
    gamma: Any,
    row_scale: Any,
    norm: Any,
    inner_norm: Any,
    dropout_p: Any,
    seed: Any,
    out_dropout_p: Any = 0.0,
    out_seed: Any = None,
    recompute: Any = False,
) -> None:
    op = "layernorm_mlp"
    _check_layer_norm(op, x, ln_weight, ln_bias, eps, norm, "ln_")
    if x.dim() < 2:
        raise ValueError(f"vit_fast.{op}: x has {x.dim()} dimensions {_shape(x)}, expected 2 or more")
    _check_activation(op, activation, allow_none=False)
    _check_weight(op, "w1", w1, x.shape[-1], "the width of x", x)
    _check_vector(op, "b1", b1, w1.shape[0], "the rows of w1", "w1", w1, w1.dtype)
    hidden, why = w1.shape[0], "the rows of w1"
    if activation in GATED:
        _check_gated(op, "w1", hidden, activation)
        hidden, why = hidden // 2, "half the rows of w1"
    _check_weight(op, "w2", w2, hidden, why, x)
    if w2.shape[0] != x.shape[-1]:
        raise ValueError(f"vit_fast.{op}: w2 has {w2.shape[0]} rows, expected {x.shape[-1]} (the width of x)")
    if w2.dtype != w1.dtype:
        raise ValueError(f"vit_fast.{op}: w2 has dtype {w2.dtype}, expected {w1.dtype} (as w1)")
    _check_vector(op, "b2", b2, w2.shape[0], "the rows of w2", "w1", w1, w1.dtype)
    _check_branch(op, x, gamma, row_scale, x.shape[-1], "the width of x")
    _check_inner_norm(op, inner_norm, hidden, why, x)
    _check_dropout(op, dropout_p, seed, "x", x)
    _check_dropout(op, out_dropout_p, out_seed, "x", x, "out_")
    if not isinstance(recompute, bool):
        raise TypeError(f"vit_fast.{op}: recompute is {type(recompute).__name__}, expected a bool")


@untraced
def check_attention(
    qkv: Any,
    num_heads: Any,
    scale: Any,
    *,
    k: Any = None,
    v: Any = None,
    bias: Any = None,
    rel_pos: Any = None,
    key_lengths: Any = None,
    cu_seqlens: Any = None,
    rope: Any = None,
    rope_layout: Any = "half",
    num_prefix: Any = 0,
    q_norm: Any = None,
    k_norm: Any = None,
    norm: Any = "layer",
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> None:
    op = "attention"
    _check_tensor(op, "qkv", qkv, 3)
    _check_int(op, "num_heads", num_heads)
    _check_real(op, "scale", scale)
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"vit_fast.{op}: {missing} is None, expected a tensor (as {given})")
    if k is None:
        if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
            raise ValueError(
                f"vit_fast.{op}: qkv has width {qkv.shape[2]}, "
                f"expected 3·num_heads·head_size with num_heads={num_heads}"
            )
        _check_size(op, "qkv has {} tokens", qkv.shape[1])
        width, keys = qkv.shape[2] // 3, qkv.shape[1]
    else:
        width = qkv.shape[2]
        if width == 0 or width % num_heads:
            raise ValueError(
                f"vit_fast.{op}: q has width {width}, expected num_heads·head_size with num_heads={num_heads}"
            )
        _check_keys(op, qkv, k, v, num_heads)
        keys = k.shape[1]
    sizes = (qkv.shape[0], num_heads, qkv.shape[1], keys)
    if not (bias is None and rel_pos is None and key_lengths is None and cu_seqlens is None):
        _check_score_options(op, qkv, sizes, bias, rel_pos, key_lengths, cu_seqlens)
    _check_head_options(op, qkv, sizes, width // num_heads, rope, rope_layout, num_prefix, q_norm, k_norm, norm)
    _check_dropout(op, dropout_p, seed, "qkv", qkv)


def _check_keys(op, q, k, v, num_heads):
    """Separate k and v. A head of v may have a size of its own."""
    for name, tensor in (("k", k), ("v", v)):
        _check_tensor(op, name, tensor, 3)
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"vit_fast.{op}: {name} has batch size {tensor.shape[0]}, expected {q.shape[0]} (as q)")
        if tensor.dtype != q.dtype:
            raise ValueError(f"vit_fast.{op}: {name} has dtype {tensor.dtype}, expected {q.dtype} (as q)")
        _check_device(op, name, tensor, "q", q)
    if k.shape[2] != q.shape[2]:
        what, came, wanted = "width", k.shape[2], q.shape[2]
        if came % num_heads == 0:
            what, came, wanted = "head_size", came // num_heads, wanted // num_heads
        raise ValueError(f"vit_fast.{op}: k has {what} {came}, expected {wanted} (as q)")
    if v.shape[2] == 0 or v.shape[2] % num_heads:
        raise ValueError(
            f"vit_fast.{op}: v has width {v.shape[2]}, expected num_heads·head_size with num_heads={num_heads}"
        )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"vit_fast.{op}: v has {v.shape[1]} tokens, expected {k.shape[1]} (as k)")
    _check_size(op, "k has {} tokens", k.shape[1])


def _check_pair(op, name, value, parts):
    if not isinstance(value, tuple):
        raise TypeError(f"vit_fast.{op}: {name} is {type(value).__name__}, expected a tuple {parts}")
    wanted = parts.count(",") + 1
    if len(value) != wanted:
        raise ValueError(f"vit_fast.{op}: {name} has {len(value)} elements, expected {wanted} {parts}")


def _check_score_options(op, qkv, sizes, bias, rel_pos, key_lengths, cu_seqlens):
    """The options that act on the scores [B, H, Nq, Nk], whose sizes are given."""
    batch, num_heads, queries, keys = sizes
    if bias is not None:
        _check_tensor(op, "bias", bias, 4)
        _check_device(op, "bias", bias, "qkv", qkv)
        if any(size != 1 and size != want for size, want in zip(bias.shape, sizes, strict=True)):  # symbols too
            text = "[" + ", ".join(str(size) for size in sizes) + "]"
            raise ValueError(f"vit_fast.{op}: bias has shape {_shape(bias)}, expected {text} or 1 on any axis")
    if rel_pos is not None:
        _check_pair(op, "rel_pos", rel_pos, "(height, width)")
        for name, part in zip(("height", "width"), rel_pos, strict=True):
            _check_tensor(op, f"rel_pos {name}", part, 4)
            _check_device(op, f"rel_pos {name}", part, "qkv", qkv)
            if part.shape[:3] != (batch, num_heads, queries):
                raise ValueError(
                    f"vit_fast.{op}: rel_pos {name} has shape {_shape(part)}, "
                    f"expected [{batch}, {num_heads}, {queries}, *]"
                )
        height, width = rel_pos[0].shape[3], rel_pos[1].shape[3]
        if height * width != keys:
            raise ValueError(
                f"vit_fast.{op}: rel_pos has {height} rows and {width} columns of keys, expected {keys} in all"
            )
    if key_lengths is not None:
        _check_tensor(op, "key_lengths", key_lengths, 1, dtypes=(torch.int32, torch.int64))
        _check_device(op, "key_lengths", key_lengths, "qkv", qkv)
        if key_lengths.shape[0] != batch:
            raise ValueError(
                f"vit_fast.{op}: key_lengths has {key_lengths.shape[0]} elements, expected {batch} (the batch size)"
            )
    if cu_seqlens is not None:
        _check_tensor(op, "cu_seqlens", cu_seqlens, 1, dtypes=(torch.int32,))
        _check_device(op, "cu_seqlens", cu_seqlens, "qkv", qkv)
        for name, value in (("bias", bias), ("rel_pos", rel_pos), ("key_lengths", key_lengths)):
            if value is not None:
                raise ValueError(f"vit_fast.{op}: {name} is given with cu_seqlens, expected one of the two")
        if batch != 1 or queries != keys:
            raise ValueError(
                f"vit_fast.{op}: cu_seqlens is given with batch size {batch}, {queries} queries and {keys} keys, "
                "expected one batch entry with as many queries as keys"
            )
        _check_sequences(op, cu_seqlens, keys)


def _check_sequences(op, cu_seqlens, tokens):
    """Where the values are known on the host, they must rise from 0 to the number of tokens."""
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"vit_fast.{op}: cu_seqlens has {cu_seqlens.shape[0]} elements, expected 2 or more")
    bounds = known_values(cu_seqlens)
    if bounds is not None and (bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds)):
        raise ValueError(f"vit_fast.{op}: cu_seqlens does not rise from 0 to {tokens} (the tokens)")


def _check_head_options(op, qkv, sizes, head_size, rope, rope_layout, num_prefix, q_norm, k_norm, norm):
    """The options that act on q and k."""
    _check_int(op, "num_prefix", num_prefix, 0)
    if num_prefix > sizes[2]:
        raise ValueError(f"vit_fast.{op}: num_prefix is {num_prefix}, expected at most {sizes[2]} (the tokens)")
    for name, word, words in (
        ("rope_layout", rope_layout, ROPE_LAYOUTS),
        ("norm", norm, NORMS),
    ):
        if word not in words:
            raise ValueError(f"vit_fast.{op}: {name} is {word!r}, expected one of {', '.join(words)}")
    if rope is not None:
        _check_rope(op, qkv, sizes, head_size, rope, num_prefix)
    for name, head_norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if head_norm is None:
            continue
        _check_pair(op, name, head_norm, "(weight, bias or None, eps)")
        _check_vector(op, f"{name} weight", head_norm[0], head_size, "the head size", "qkv", qkv)
        _check_vector(op, f"{name} bias", head_norm[1], head_size, "the head size", "qkv", qkv)
        _check_eps(op, f"{name} eps", head_norm[2])


def _check_rope(op, qkv, sizes, head_size, rope, num_prefix):
    batch, num_heads, tokens, keys = sizes
    if tokens != keys:
        raise ValueError(f"vit_fast.{op}: rope is given with {tokens} queries and {keys} keys, expected as many")
    if head_size % 2:
        raise ValueError(f"vit_fast.{op}: rope is given with head size {head_size}, expected an even number")
    _check_pair(op, "rope", rope, "(cos, sin)")
    dtypes = tuple(dict.fromkeys((torch.float32, qkv.dtype)))
    wanted = (batch, num_heads, tokens - num_prefix, head_size)
    for name, table in zip(("cos", "sin"), rope, strict=True):
        _check_tensor(op, f"rope {name}", table, dtypes=dtypes)
        _check_device(op, f"rope {name}", table, "qkv", qkv)
        dims = table.dim()
        fits = 2 <= dims <= 4 and table.shape[-2:] == wanted[-2:]
        if not fits or any(size != 1 and size != want for size, want in zip(table.shape, wanted[4 - dims : 2])):
            text = ", ".join(str(size) for size in wanted)
            raise ValueError(
                f"vit_fast.{op}: rope {name} has shape {_shape(table)}, expected [{wanted[2]}, {head_size}] "
                f"or [{text}], where the batch size and the heads may be 1"
            )


@untraced
def check_patch_embed(
    images: Any, weight: Any, bias: Any, pos_embed: Any, prefix_tokens: Any, stride: Any, mean: Any, std: Any
) -> tuple[int, int]:
    """Returns the stride as a pair."""
    op = "patch_embed"
    _check_tensor(op, "images", images, 4, dtypes=(*FLOAT_DTYPES, torch.uint8))
    _check_tensor(op, "weight", weight, 4)
    _check_device(op, "images", images, "weight", weight)
    channels, height, width = images.shape[1:]
    for came, size in zip(_PATCH_WEIGHT_SIZES, weight.shape, strict=True):
        _check_size(op, came, size)
    if weight.shape[1] != channels:
        raise ValueError(f"vit_fast.{op}: images has {channels} channels, expected {weight.shape[1]} (as weight)")
    if isinstance(stride, (tuple, list)):
        if len(stride) != 2:
            raise ValueError(f"vit_fast.{op}: stride has {len(stride)} elements, expected an int or a pair")
        stride = tuple(stride)
    else:
        stride = (stride, stride)
    for size in stride:
        _check_int(op, "stride", size)
    if height < weight.shape[2] or width < weight.shape[3]:
        raise ValueError(
            f"vit_fast.{op}: images has size {height}×{width}, "
            f"expected at least one patch of {weight.shape[2]}×{weight.shape[3]}"
        )
    dim = weight.shape[0]
    tokens = ((height - weight.shape[2]) // stride[0] + 1) * ((width - weight.shape[3]) // stride[1] + 1)
    _check_vector(op, "bias", bias, dim, "the rows of weight", "weight", weight, weight.dtype)
    if pos_embed is not None:
        _check_tensor(op, "pos_embed", pos_embed, 3)
        _check_device(op, "pos_embed", pos_embed, "images", images)
        if pos_embed.shape[0] != 1 or pos_embed.shape[1] != tokens or pos_embed.shape[2] != dim:
            raise ValueError(
                f"vit_fast.{op}: pos_embed has shape {_shape(pos_embed)}, "
                f"expected [1, {tokens}, {dim}] (patch rows only)"
            )
    if prefix_tokens is not None:
        _check_tensor(op, "prefix_tokens", prefix_tokens, 3)
        _check_device(op, "prefix_tokens", prefix_tokens, "images", images)
        batch = images.shape[0]
        # Compared without `in`, which would tie a compiled graph to one batch size.
        if (prefix_tokens.shape[0] != 1 and prefix_tokens.shape[0] != batch) or prefix_tokens.shape[2] != dim:
            raise ValueError(
                f"vit_fast.{op}: prefix_tokens has shape {_shape(prefix_tokens)}, expected [1 or {batch}, K, {dim}]"
            )
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if not isinstance(values, (tuple, list)):
            raise TypeError(f"vit_fast.{op}: {name} is {type(values).__name__}, expected a tuple of floats or None")
        if len(values) != channels:
            raise ValueError(f"vit_fast.{op}: {name} has {len(values)} values, expected {channels} (one a channel)")
        for i, value in enumerate(values):
            _check_real(op, f"{name}[{i}]", value)
            if name == "std" and value <= 0:
                raise ValueError(f"vit_fast.{op}: std[{i}] is {value}, expected more than 0")
    return stride


@untraced
def check_prepared_blocks(x: Any, weights: Any) -> None:
    weight = folding.first_block(folding.FoldedBlock, weights).qkv_weight
    _check_blocks("prepared_blocks", x, weight, (weight.dtype,))


@untraced
def check_block_options(op: str, x: Any, num_heads: int, options: Any) -> None:
    """The options of prepared blocks ``op`` on x [B, N, C], which has been checked."""
    batch, tokens, width = x.shape
    sizes = (batch, num_heads, tokens, tokens)
    _check_score_options(op, x, sizes, options.bias, None, options.key_lengths, None)
    _check_head_options(
        op, x, sizes, width // num_heads, options.rope, options.rope_layout, options.num_prefix, options.q_norm,
        options.k_norm, options.norm,
    )  # fmt: skip


@untraced
def check_fp8_blocks(x: Any, weights: Any) -> None:
    weight = folding.first_block(folding.Float8Block, weights).qkv_weight
    _check_blocks("fp8_blocks", x, weight, (torch.float16, torch.bfloat16))


@untraced
def check_packed_blocks(x: Any, weights: Any) -> None:
    first = folding.first_block(packing.PackedBlock, weights)
    _check_tensor("packed_blocks", "x", x, 3)
    _check_packed_width("packed_blocks", x, first.qkv_weight)


@untraced
def check_int8_blocks(x: Any, weights: Any) -> None:
    first = folding.first_block(packing.Int8Block, weights)
    _check_tensor("int8_blocks", "x", x, 3)
    _check_packed_width("int8_blocks", x, first.qkv_weight)


def _check_packed_width(op, x, weight):
    """A packed weight tells its inputs up to the padding of a group."""
    groups, group = weight.shape[1], weight.shape[3]
    if -(-x.shape[2] // group) != groups:
        raise ValueError(f"vit_fast.{op}: x has width {x.shape[2]}, expected {groups * group} (as the weights)")
    _check_device(op, "x", x, "weights", weight)


def _check_blocks(op, x, weight, dtypes):
    _check_tensor(op, "x", x, 3, dtypes)
    if x.shape[2] != weight.shape[1]:
        raise ValueError(f"vit_fast.{op}: x has width {x.shape[2]}, expected {weight.shape[1]} (as the weights)")
    _check_device(op, "x", x, "weights", weight)


def check_rows(op: str, rows: int) -> None:
    """Raises where the rows plus one tile exceed int32. Called only at a launch, where sizes are plain ints."""
    if rows > MAX_ROWS:
        raise UnsupportedError(f"vit_fast.{op}: {rows} rows, expected at most {MAX_ROWS} in one call; split the batch")
