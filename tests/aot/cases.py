"""The launches that are compiled ahead of time: real operations on CPU tensors of real ViT shapes.

To add a case, yield ``case(operation, shape, dtype, call, *arguments)`` from the function of your operation, where
``call(*arguments)`` makes the tensors and calls the launch function; a new operation's function goes into OPERATIONS.
Only shapes, dtypes, strides and alignment matter, values do not: nothing is executed, and torch.empty touches no
memory. Batch 1 and 64 stand for all (tiles may differ, and Triton specialises on 1 and on divisibility by 16).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from vit_fast.kernels.activation_names import GATED

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# (kernel, dtype): (bytes at most, why). IEEE fp32 only: its dots are scalar FMAs, and ptxas chooses a register
# count that spills a few values, although the next larger count would hold them.
ALLOWED_SPILLS = {
    ("_attention_fwd_streaming_kernel", "float32"): (80, "16 to 76 bytes at head sizes 48 and 64 on sm_90 and sm_100"),
    ("_layer_norm_bwd_kernel", "float32"): (16, "16 bytes at width 768 on sm_80, at 56 registers"),
    ("_patch_embed_fwd_kernel", "float32"): (32, "20 bytes for patch 14 on sm_100 under Triton 3.6, none under 3.7"),
}

MORE_ACTIVATIONS = ("gelu_tanh", "quick_gelu", "relu", "silu", "swiglu", "geglu", "geglu_tanh")  # than gelu

# name: (tokens with prefix, width, heads, MLP width, patch)
VITS = {
    "small": (197, 384, 6, 1536, 16),
    "base": (197, 768, 12, 3072, 16),
    "large": (577, 1024, 16, 4096, 16),
    "huge": (257, 1280, 16, 5120, 14),
    "so400m": (729, 1152, 16, 4304, 14),
}


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    call: Callable[[], object]
    archs: tuple[int, ...] = (80, 90, 100)


def case(operation, shape, dtype, call, *args, **options):
    """A Case named after its arguments."""
    words = [operation, shape, *(f"{name}={value}" for name, value in options.items())]
    if isinstance(args[0], int):
        words.insert(2, f"batch {args[0]}")
    name = " ".join(words).replace("torch.", "")
    return Case(name, str(dtype).removeprefix("torch."), functools.partial(call, *args, **options))


@contextlib.contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def attention_cases():
    from vit_fast.kernels.attention import attention, attention_fwd

    def call(batch, tokens, heads, head_size, dtype, forward=attention):
        forward(torch.empty(batch, tokens, 3 * heads * head_size, dtype=dtype), heads, head_size**-0.5)

    def pooled(batch, tokens, heads, head_size, dtype):
        query, key_value = (torch.empty(batch, n, heads * head_size * m, dtype=dtype) for n, m in ((1, 1), (tokens, 2)))
        k, v = key_value.chunk(2, dim=-1)
        attention(query, heads, head_size**-0.5, k=k, v=v)

    for dtype in DTYPES:
        for batch in (1, 64):
            for name, (tokens, width, heads, _, _) in VITS.items():
                yield case("attention", name, dtype, call, batch, tokens, heads, width // heads, dtype)
        for name in ("base", "huge", "so400m"):
            tokens, width, heads, _, _ = VITS[name]
            if dtype != torch.float32:
                yield case(
                    "attention with LSE", name, dtype, call, 64, tokens, heads, width // heads, dtype, attention_fwd
                )
        if dtype != torch.float32:
            yield case("attention", "so400m of 256 tokens", dtype, call, 64, 256, 16, 72, dtype)
        yield case("attention pooled", "base", dtype, pooled, 64, 196, 12, 64, dtype)
        for head_size in (32, 48, 88, 96, 104, 128):
            yield case("attention", f"head size {head_size}", dtype, call, 2, 257, 8, head_size, dtype)


def attention_options_cases():
    """bfloat16 stands for float16 here: both are loaded, turned and multiplied alike."""
    from vit_fast.kernels.attention import attention

    def call(batch, tokens, head_size, dtype=torch.bfloat16, rope=None, norm=None, bias=False, grid=None, packed=False,
             dropout_p=0.0):  # fmt: skip
        options, heads = {}, 8
        if rope:
            tables = torch.empty(2, tokens - 1, head_size)
            options |= dict(rope=(tables[0], tables[1]), rope_layout=rope, num_prefix=1)
        if norm:
            weight = torch.empty(head_size)
            options |= dict(q_norm=(weight, weight, 1e-6), k_norm=(weight, None, 1e-6), norm=norm)
        if bias:
            options |= dict(bias=torch.empty(1, heads, tokens, tokens, dtype=dtype))
        if grid:
            rel_pos = [torch.empty(batch, heads, tokens, size, dtype=dtype) for size in grid]
            options |= dict(rel_pos=rel_pos, key_lengths=torch.empty(batch, dtype=torch.int32))
        if packed:
            options |= dict(cu_seqlens=torch.empty(33, dtype=torch.int32))
        if dropout_p:
            options |= dict(dropout_p=dropout_p, seed=torch.empty(1, dtype=torch.int64))
        attention(torch.empty(batch, tokens, 3 * heads * head_size, dtype=dtype), heads, head_size**-0.5, **options)

    for dtype, name, *sizes, options in (
        (torch.bfloat16, "head size 64", 64, 257, 64, dict(rope="interleaved")),
        (torch.bfloat16, "head size 72", 64, 257, 72, dict(rope="half", norm="layer")),
        (torch.bfloat16, "head size 128", 64, 257, 128, dict(rope="half", norm="rms")),
        (torch.bfloat16, "BEiT", 64, 197, 64, dict(bias=True)),
        (torch.bfloat16, "SAM", 2, 4096, 80, dict(grid=(64, 64))),
        (torch.bfloat16, "packed", 1, 8192, 80, dict(rope="half", packed=True)),
        (torch.float32, "head size 64", 64, 257, 64, dict(rope="half")),
        (torch.bfloat16, "head size 64", 64, 197, 64, dict(dropout_p=0.1)),
        (torch.bfloat16, "head size 128", 64, 257, 128, dict(dropout_p=0.1)),
    ):
        yield case("attention with options", name, dtype, call, *sizes, dtype, **options)


def attention_bwd_cases():
    from vit_fast.kernels.attention_bwd import attention_bwd

    def call(batch, tokens, heads, head_size, dtype, lengths=False, **options):
        """Of packed qkv; with lengths of separate q, k and v."""
        grad, lse = torch.empty(batch, tokens, heads * head_size, dtype=dtype), torch.empty(batch, heads, tokens)
        qkv, k, v = torch.empty(batch, tokens, 3 * heads * head_size, dtype=dtype), None, None
        if lengths:
            qkv, k, v = torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)
            options |= dict(key_lengths=torch.empty(batch, dtype=torch.int32))
        if "dropout_p" in options:
            options |= dict(seed=torch.empty(1, dtype=torch.int64))
        attention_bwd(grad, qkv, heads, head_size**-0.5, k, v, grad, lse, **options)

    def pooled(tokens, heads, head_size, dtype):
        grad, lse = torch.empty(64, 1, heads * head_size, dtype=dtype), torch.empty(64, heads, 1)
        k, v = torch.empty(64, tokens, 2 * heads * head_size, dtype=dtype).chunk(2, dim=-1)
        attention_bwd(grad, torch.empty_like(grad), heads, head_size**-0.5, k, v, grad, lse)

    half = torch.bfloat16  # float16 is loaded and multiplied alike
    for dtype in DTYPES:
        for name, (tokens, width, heads, _, _) in VITS.items():
            yield case("attention backward", name, dtype, call, 64, tokens, heads, width // heads, dtype)
    for head_size in (32, 48, 88, 96, 104, 128, 192):
        yield case("attention backward", f"head size {head_size}", half, call, 2, 257, 8, head_size, half)
    for tokens in (50, 82):
        yield case("attention backward", f"{tokens} tokens", half, call, 64, tokens, 12, 64, half)
    for head_size in (64, 72, 128):
        for options in (dict(dropout_p=0.1), dict(lengths=True)):
            size = f"head size {head_size}"
            yield case("attention backward", size, half, call, 64, 257, 8, head_size, half, **options)
    yield case("attention backward pooled", "base", half, pooled, 196, 12, 64, half)


def layer_norm_cases():
    from vit_fast.kernels.layer_norm import layer_norm, layer_norm_fwd, row_partials

    def call(batch, tokens, width, dtype, weight_dtype, forward=layer_norm):
        x = torch.empty(batch, tokens, width, dtype=dtype)
        forward(x, torch.empty(width, dtype=weight_dtype), torch.empty(width, dtype=weight_dtype), 1e-6)

    def rms(batch, tokens, width, dtype, forward=layer_norm):
        forward(torch.empty(batch, tokens, width, dtype=dtype), torch.empty(width, dtype=dtype), None, 1e-6, norm="rms")

    def partials(*size_and_dtype):
        *size, dtype = size_and_dtype
        row_partials(torch.empty(size, dtype=dtype))

    for dtype in DTYPES:
        for batch in (1, 64):
            for name, (tokens, width, _, _, _) in VITS.items():
                yield case("layer_norm", name, dtype, call, batch, tokens, width, dtype, dtype)
        for name, (tokens, width, _, _, _) in VITS.items():
            yield case("row_partials", name, dtype, partials, 64, tokens, width, dtype)
        for name in ("base", "so400m"):
            tokens, width, _, _, _ = VITS[name]
            sizes = (64, tokens, width, dtype, dtype)
            yield case("layer_norm with statistics", name, dtype, call, *sizes, layer_norm_fwd)
            yield case("layer_norm rms", name, dtype, rms, 64, tokens, width, dtype)
            yield case("layer_norm rms with statistics", name, dtype, rms, 64, tokens, width, dtype, layer_norm_fwd)
        yield case("layer_norm rms", "wide", dtype, rms, 1, 64, 20480, dtype)
        yield case("layer_norm", "base, fp32 parameters", dtype, call, 64, 197, 768, dtype, torch.float32)


def linear_cases():
    from vit_fast.kernels.layer_norm import row_statistics
    from vit_fast.kernels.linear import folded_linear, layer_norm_linear, linear, linear_residual, linear_with_partials

    def projection(batch, tokens, width, out, dtype, activation=None, tf32=False):
        x, weight = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(out, width, dtype=dtype)
        norm = torch.empty(width, dtype=dtype)
        with matmul_precision("high" if tf32 else "highest"):
            layer_norm_linear(x, norm, norm, 1e-6, weight, torch.empty(out, dtype=dtype), activation)

    def branch(batch, tokens, width, out, dtype, residual=None, gamma=True, row_scale=False, tf32=False):
        x, weight = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(out, width, dtype=dtype)
        with matmul_precision("high" if tf32 else "highest"):
            linear_residual(
                x, weight, torch.empty(out, dtype=dtype), torch.empty(out, dtype=dtype) if gamma else None,
                torch.empty(batch, tokens, out, dtype=residual or dtype),
                row_scale=torch.empty(batch) if row_scale else None,
            )  # fmt: skip

    def mixed(batch, tokens, width, out, x_dtype, dtype):
        linear(torch.empty(batch, tokens, width, dtype=x_dtype), torch.empty(out, width, dtype=dtype), None)

    def folded(batch, tokens, width, out, dtype, activation=None, finalised=False):
        x, weight = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(out, width, dtype=dtype)
        proj, vector = torch.empty(width, width, dtype=dtype), torch.empty(width)
        x, statistics = linear_with_partials(x, proj, vector, torch.empty_like(x))
        if finalised:
            statistics = row_statistics(statistics, width, 1e-6)
        folded_linear(x, statistics, 1e-6, weight, torch.empty(out), torch.empty(out), activation)

    def with_partials(batch, tokens, width, out, dtype):
        x, weight = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(out, width, dtype=dtype)
        linear_with_partials(x, weight, torch.empty(out), torch.empty(batch, tokens, out, dtype=dtype))

    for dtype in DTYPES[:2]:
        for batch in (1, 64):
            for name, (tokens, width, _, hidden, _) in VITS.items():
                yield case("fc2 with partials", name, dtype, with_partials, batch, tokens, hidden, width, dtype)
                yield case("folded qkv", name, dtype, folded, batch, tokens, width, 3 * width, dtype)
                yield case("folded fc1", name, dtype, folded, batch, tokens, width, hidden, dtype, activation="gelu")
            for activation in MORE_ACTIVATIONS:
                base = ("folded fc1", "base", dtype, folded, batch, 197, 768, 4096, dtype)
                yield case(*base, activation=activation)
            for name in ("base", "so400m"):
                tokens, width, _, hidden, _ = VITS[name]
                sizes = dtype, folded, batch, tokens, width
                yield case("folded qkv", name, *sizes, 3 * width, dtype, finalised=True)
                yield case("folded fc1", name, *sizes, hidden, dtype, activation="gelu", finalised=True)
            yield case(
                "folded fc1", "base", dtype, folded, batch, 197, 768, 4096, dtype, activation="swiglu", finalised=True
            )
    for dtype in DTYPES:
        for batch in (1, 64):
            for name, (tokens, width, _, hidden, _) in VITS.items():
                yield case("qkv", name, dtype, projection, batch, tokens, width, 3 * width, dtype)
                yield case("fc1", name, dtype, projection, batch, tokens, width, hidden, dtype, activation="gelu")
                yield case("proj", name, dtype, branch, batch, tokens, width, width, dtype)
                yield case("fc2", name, dtype, branch, batch, tokens, hidden, width, dtype, gamma=False)
            for activation in MORE_ACTIVATIONS:
                base = ("fc1", "base", dtype, projection, batch, 197, 768, 4096, dtype)
                yield case(*base, activation=activation)
            base = ("fc2", "base", dtype, branch, batch, 197, 3072, 768, dtype)
            yield case(*base, row_scale=True)
            yield case(*base, residual=torch.float32)
        yield case("head, odd width", "base", dtype, mixed, 64, 1, 768, 1001, dtype, dtype)
        yield case("fc1, odd depth", "base", dtype, mixed, 64, 197, 588, 3072, dtype, dtype)
        for x_dtype in DTYPES:
            if x_dtype != dtype:
                words = f"base, x {x_dtype}".replace("torch.", "")
                yield case("linear", words, dtype, mixed, 64, 197, 768, 768, x_dtype, dtype)
    for batch in (1, 64):
        float32 = torch.float32
        yield case("fc1", "base", float32, projection, batch, 197, 768, 3072, float32, activation="gelu", tf32=True)
        yield case("fc2", "base", float32, branch, batch, 197, 3072, 768, float32, tf32=True)


def layer_norm_bwd_cases():
    from vit_fast.kernels.layer_norm_bwd import layer_norm_bwd

    def call(batch, tokens, width, dtype, side, needs=(True, True, True), norm="layer", past=True):
        x, grad = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(batch, tokens, width, dtype=side)
        vector, statistics = torch.empty(width, dtype=side), torch.empty(batch * tokens)
        layer_norm_bwd(
            grad, x, vector, vector, statistics, statistics, norm=norm, needs=needs, residual_grad=x if past else None
        )

    for dtype in DTYPES:
        for name, (tokens, width, _, _, _) in VITS.items():
            yield case("layer_norm_bwd", name, dtype, call, 64, tokens, width, dtype, dtype)
        for width in (4096, 8192, 20480):
            yield case("layer_norm_bwd", f"width {width}", dtype, call, 1, 64, width, dtype, dtype)
        base = ("layer_norm_bwd", "base", dtype, call, 64, 197, 768, dtype, dtype)
        yield case(*base, needs=(True, False, False))
        yield case(*base, needs=(False, True, True), past=False)
        yield case(*base, norm="rms", past=False)
        yield case("layer_norm_bwd", "base, fp32 x", dtype, call, 64, 197, 768, torch.float32, dtype)


def linear_train_cases():
    """The products of training and the passes around them; what torch multiplies is left out."""
    from vit_fast.kernels.column_sums import branch_gradient, column_sums
    from vit_fast.kernels.gemm_train import linear_train, pre_activation_gradient
    from vit_fast.kernels.linear_bwd import layer_scale_bwd

    def fc1(batch, tokens, width, out, dtype, activation="gelu", dropout_p=0.0, tf32=False):
        x, weight = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(out, width, dtype=dtype)
        seed = torch.empty(1, dtype=torch.int64)
        with matmul_precision("high" if tf32 else "highest"):
            linear_train(
                x, weight, torch.empty(out, dtype=dtype), activation, dropout_p=dropout_p, seed=seed, with_z=True
            )

    def fc2(batch, tokens, hidden, width, dtype):
        x, weight = torch.empty(batch, tokens, hidden, dtype=dtype), torch.empty(width, hidden, dtype=dtype)
        vector, seed = torch.empty(width, dtype=dtype), torch.empty(1, dtype=torch.int64)
        residual = torch.empty(batch, tokens, width, dtype=dtype)
        linear_train(
            x, weight, vector, gamma=vector, residual=residual, row_scale=torch.empty(batch), dropout_p=0.1, seed=seed
        )

    def dz(batch, tokens, width, hidden, dtype, activation="gelu", with_hidden=True, dropout_p=0.0, tf32=False):
        grad = torch.empty(batch, tokens, width, dtype=dtype)
        z = torch.empty(batch, tokens, hidden * (1 + (activation in GATED)), dtype=dtype)
        seed = torch.empty(1, dtype=torch.int64)
        with matmul_precision("high" if tf32 else "highest"):
            pre_activation_gradient(
                grad, torch.empty(width, hidden, dtype=dtype), z, activation,
                dropout_p=dropout_p, seed=seed, with_hidden=with_hidden,
            )  # fmt: skip

    def passes(batch, tokens, width, hidden, dtype):
        grad, seed = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(1, dtype=torch.int64)
        column_sums(grad)
        branch_gradient(grad, dtype, torch.empty(batch), 0.1, seed, True)
        wide, vector = torch.empty(width, hidden), torch.empty(width, dtype=dtype)
        branch_gradient(grad, dtype, torch.empty(batch), 0.1, seed, False, vector)
        layer_scale_bwd(wide, torch.empty(width, hidden, dtype=dtype), vector, vector, torch.empty(width))

    for dtype in DTYPES:
        yield case("passes of a backward", "base", dtype, passes, 64, 197, 768, 3072, dtype)
        for name, (tokens, width, _, hidden, _) in VITS.items():
            yield case("dz", name, dtype, dz, 64, tokens, width, hidden, dtype)
            yield case("fc1 with z", name, dtype, fc1, 64, tokens, width, hidden, dtype)
        base = (dtype, dz, 64, 197, 768, 3072, dtype)
        for activation in MORE_ACTIVATIONS:
            yield case("dz", "base", *base, activation=activation)
        yield case("dz", "base", *base, with_hidden=False)
        yield case("dz", "base", *base, dropout_p=0.1)
        yield case("dz", "base", dtype, dz, 1, 197, 768, 3072, dtype)
        yield case("dz, odd depth", "base", dtype, dz, 64, 197, 588, 3072, dtype)
        base = ("fc1 with z", "base", dtype, fc1, 64, 197, 768, 3072, dtype)
        yield case(*base, activation="swiglu")
        yield case(*base, dropout_p=0.1)
        yield case("fc1 with z", "base", dtype, fc1, 1, 197, 768, 3072, dtype)
        yield case("fc2 with dropout", "base", dtype, fc2, 64, 197, 3072, 768, dtype)
    yield case("dz", "base", torch.float32, dz, 64, 197, 768, 3072, torch.float32, tf32=True)
    yield case("fc1 with z", "base", torch.float32, fc1, 64, 197, 768, 3072, torch.float32, tf32=True)


def keep_mask_cases():
    from vit_fast.kernels.dropout import keep_mask

    def call(count):
        seed = torch.empty(1, dtype=torch.int64)
        keep_mask(seed, count, 0.1, seed.device)

    yield case("keep_mask", "drop path", torch.bool, call, 256)


def layernorm_mlp_cases():
    """Launches only kernels of layer_norm and linear; the case shows that nothing else gets compiled."""
    from vit_fast.kernels.layernorm_mlp import layernorm_mlp

    def call(batch, tokens, width, hidden, dtype, activation, inner=False):
        def empty(*shape):
            return torch.empty(*shape, dtype=dtype)

        norm, half = empty(width), hidden // 2 if activation in GATED else hidden
        first, second = (empty(hidden, width), empty(hidden)), (empty(width, half), empty(width))
        inner_norm = (empty(half), empty(half), 1e-6) if inner else None
        x = empty(batch, tokens, width)
        layernorm_mlp(x, norm, norm, 1e-6, *first, *second, activation, norm, inner_norm=inner_norm)

    for dtype in DTYPES:
        for activation in ("gelu", "swiglu", "geglu"):
            words = f"base {activation}"
            yield case("layernorm_mlp", words, dtype, call, 64, 197, 768, 4096, dtype, activation)
        yield case("layernorm_mlp", "base swiglu", dtype, call, 64, 197, 768, 4096, dtype, "swiglu", inner=True)


def patch_embed_cases():
    from vit_fast.kernels.patch_embed import patch_embed

    def call(batch, dtype, width, patch, prefix, pixels=None, layout=torch.contiguous_format, std=None, tf32=False):
        size = 224 // patch * patch
        images = torch.empty(batch, 3, size, size, dtype=pixels or dtype).to(memory_format=layout)
        weight, bias = torch.empty(width, 3, patch, patch, dtype=dtype), torch.empty(width, dtype=dtype)
        pos_embed = torch.empty(1, (size // patch) ** 2, width, dtype=dtype)
        prefix_tokens = torch.empty(1, prefix, width, dtype=dtype) if prefix else None
        with matmul_precision("high" if tf32 else "highest"):
            patch_embed(images, weight, bias, pos_embed, prefix_tokens, (patch, patch), std=std)

    for dtype in DTYPES:
        for name, (_, width, _, _, patch) in VITS.items():
            yield case("patch_embed", name, dtype, call, 64, dtype, width, patch, 0 if patch == 14 else 1)
        yield case("patch_embed", "base/32", dtype, call, 64, dtype, 768, 32, 5)
        yield case("patch_embed", "huge", dtype, call, 64, dtype, 1280, 14, 1, pixels=torch.uint8)
        for batch in (1, 64):
            base = ("patch_embed", "base", dtype, call, batch, dtype, 768, 16, 1)
            yield case(*base)
            yield case(*base, pixels=torch.uint8)
            yield case(*base, pixels=torch.float32, std=(0.2, 0.2, 0.2))
            yield case(*base, pixels=torch.uint8, layout=torch.channels_last)
        yield case("patch_embed", "huge", dtype, call, 1, dtype, 1280, 14, 1)
        yield case("patch_embed", "base", dtype, call, 64, dtype, 768, 16, 1, layout=torch.channels_last)
    for batch in (1, 64):
        yield case("patch_embed", "base", torch.float32, call, batch, torch.float32, 768, 16, 1, tf32=True)


def prepared_blocks_cases():
    """Launches the kernels of layer_norm, linear and attention, the first block with the partials of whole rows."""
    from vit_fast.kernels.folding import FoldedBlock, flatten
    from vit_fast.kernels.prepared_blocks import prepared_blocks

    def call(batch, tokens, width, heads, hidden, dtype):
        def weight(rows, columns):
            return torch.empty(rows, columns, dtype=dtype), *(torch.empty(rows) for _ in range(2))

        proj, fc2 = weight(width, width)[:2], weight(width, hidden)[:2]
        block = FoldedBlock(*weight(3 * width, width), *proj, *weight(hidden, width), *fc2)
        x = torch.empty(batch, tokens, width, dtype=dtype)
        prepared_blocks(x, flatten([block] * 2), heads, (width // heads) ** -0.5, "gelu", 1e-6, 1e-6)

    for dtype in DTYPES[:2]:
        for batch in (1, 64):
            for name, (tokens, width, heads, hidden, _) in VITS.items():
                yield case("prepared_blocks", name, dtype, call, batch, tokens, width, heads, hidden, dtype)


def fp8_blocks_cases():
    """Launches the kernels of layer_norm, linear and attention on float8 e4m3, which sm_80 does not have."""
    from vit_fast.kernels.folding import Float8Block
    from vit_fast.kernels.fp8_blocks import fp8_blocks
    from vit_fast.kernels.linear import fp8_linear

    def odd_depth(batch, tokens, width, out, dtype):
        x, weight = (torch.empty(*size, width, dtype=torch.float8_e4m3fn) for size in ((batch, tokens), (out,)))
        fp8_linear(x, weight, torch.empty(out), torch.empty(out), "gelu", out_dtype=dtype)

    def call(batch, tokens, width, heads, hidden, dtype, activation="gelu"):
        half = hidden // 2 if activation in GATED else hidden

        def linear(rows, columns):
            weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            return weight, torch.empty(rows), torch.empty(rows)

        block = Float8Block(
            torch.empty(width), *linear(3 * width, width), *linear(width, width),
            *linear(hidden, width), torch.empty(half), *linear(width, half),
        )  # fmt: skip
        x = torch.empty(batch, tokens, width, dtype=dtype)
        fp8_blocks(x, block, heads, (width // heads) ** -0.5, activation, 1e-6, 1e-6)

    for dtype in DTYPES[:2]:
        for batch in (1, 64):
            for name, (tokens, width, heads, hidden, _) in VITS.items():
                made = case("fp8_blocks", name, dtype, call, batch, tokens, width, heads, hidden, dtype)
                yield replace(made, archs=(90, 100))
            for activation in MORE_ACTIVATIONS:
                base = ("fp8_blocks", "base", dtype, call, batch, 197, 768, 12, 4096, dtype)
                yield replace(case(*base, activation=activation), archs=(90, 100))
            made = case("fp8_linear", "odd depth", dtype, odd_depth, batch, 197, 588, 768, dtype)
            yield replace(made, archs=(90, 100))


def prepared_linear_cases():
    """Launches the kernel that rounds tokens to float8 e4m3, and the GEMM that scales them back."""
    from vit_fast.kernels.prepared_layer import PreparedLayer
    from vit_fast.kernels.prepared_linear import fp8_linear

    def call(batch, tokens, width, out, dtype, norm="layer", activation=None, ends=False):
        rows = 2 * out if activation in GATED else out
        matrix = torch.empty(rows, width, dtype=torch.float8_e4m3fn)
        bias, gamma = torch.empty(rows, dtype=dtype), torch.empty(out, dtype=dtype) if ends else None
        x, vector = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(width, dtype=dtype)
        ln = (vector, vector, 1e-6) if norm else (None, None, None)
        layer = PreparedLayer([matrix, torch.empty(rows)], bias, out, *ln, norm or "layer", activation, gamma)
        fp8_linear(x, layer, torch.empty(batch, tokens, out, dtype=dtype) if ends else None)

    for dtype in DTYPES[:2]:
        made = []
        for name, batch in (("base", 64), ("base", 1), ("so400m", 64)):
            tokens, width, _, hidden, _ = VITS[name]
            to_hidden, to_width = (batch, tokens, width, hidden, dtype), (batch, tokens, hidden, width, dtype)
            made += [
                case("fp8_linear fc1", name, dtype, call, *to_hidden, activation="gelu"),
                case("fp8_linear fc2", name, dtype, call, *to_width, norm=None, ends=True),
            ]
        base = ("fp8_linear", "base", dtype, call, 64, 197, 768, 3072, dtype)
        made += [case(*base, activation="swiglu"), case(*base, norm="rms")]
        for found in made:
            yield replace(found, archs=(90, 100))


def linear_hopper_cases():
    """Gluon's kernel for sm_90, with the tile of its own config and cooperative; other architectures have no case."""
    from vit_fast.kernels.layer_norm import RowPartials
    from vit_fast.kernels.linear_hopper import LinearHopperConfig, linear_hopper

    def call(
        batch, tokens, width, out, dtype, activation=None, part=None, bias=True, ends=False, partials=False, pdl=False,
        tile=None,
    ):  # fmt: skip
        x, weight = torch.empty(batch, tokens, width, dtype=dtype), torch.empty(out, width, dtype=dtype)
        norm, config = None, None
        if part is not None:
            norm = RowPartials(torch.empty(2, -(-width // part), batch * tokens), part), 1e-6, torch.empty(out)
        residual = torch.empty(batch, tokens, out, dtype=dtype) if ends else None
        if tile is not None:
            stages = 3 if ends else 4
            config = LinearHopperConfig(block_m=tile[0], block_n=tile[1], num_stages=stages, cooperative=True)
        linear_hopper(
            x, weight, torch.empty(out) if bias else None, activation,
            residual=residual, norm=norm, with_partials=partials, pdl=pdl, config=config,
        )  # fmt: skip

    for dtype in DTYPES[:2]:
        made = []
        for name, (tokens, width, _, hidden, _) in VITS.items():
            to_hidden, to_width = (64, tokens, width, hidden, dtype), (64, tokens, hidden, width, dtype)
            made += [
                case("hopper folded qkv", name, dtype, call, 64, tokens, width, 3 * width, dtype, part=128),
                case("hopper folded fc1", name, dtype, call, *to_hidden, activation="gelu", part=128),
                case("hopper fc2", name, dtype, call, *to_width, ends=True, partials=True),
            ]
        base = ("base", dtype, call, 64, 197, 768, 3072, dtype)
        for activation in ("gelu_tanh", "quick_gelu", "relu"):
            made.append(case("hopper folded fc1", *base, activation=activation, part=128))
        made += [
            case("hopper folded fc1, partials of whole rows", *base, activation="gelu", part=1024),
            case("hopper fc1", *base, activation="gelu"),
            case("hopper fc1", *base, bias=False),
            case("hopper fc1 with partials", *base, partials=True),
            case("hopper fc2", *base, ends=True),
            case("hopper folded fc1", *base, activation="gelu", part=64, pdl=True),
            case("hopper fc2", *base, ends=True, partials=True, pdl=True),
            case("hopper head, odd width", "base", dtype, call, 64, 1, 768, 1001, dtype, activation="gelu", part=64),
            case("hopper fc2, odd width", "base", dtype, call, 64, 1, 768, 1000, dtype, ends=True, partials=True),
        ]
        for tile in ((128, 256), (256, 128)):
            made += [
                case("hopper folded fc1", *base, activation="gelu", part=tile[1], tile=tile),
                case("hopper folded fc1", *base, activation="gelu", part=128, pdl=True, tile=tile),
                case("hopper folded qkv", "base", dtype, call, 64, 197, 768, 2304, dtype, part=tile[1], tile=tile),
                case("hopper fc1", *base, activation="gelu", tile=tile),
                case("hopper fc1 with partials", *base, partials=True, tile=tile),
                case(
                    "hopper fc2", "base", dtype, call, 64, 197, 3072, 768, dtype, ends=True, partials=True, pdl=True,
                    tile=tile,
                ),
            ]  # fmt: skip
        # Of 256 × 128 it spills, as odd widths do of both.
        words = dict(ends=True, partials=True, tile=(128, 256))
        made.append(case("hopper fc2, odd width", "base", dtype, call, 64, 1, 768, 1000, dtype, **words))
        for found in made:
            yield replace(found, archs=(90,))


OPERATIONS = (
    attention_cases, attention_options_cases, attention_bwd_cases, layer_norm_cases, layer_norm_bwd_cases, linear_cases,
    linear_train_cases, keep_mask_cases, layernorm_mlp_cases, patch_embed_cases, prepared_blocks_cases,
    fp8_blocks_cases, prepared_linear_cases, linear_hopper_cases,
)  # fmt: skip
