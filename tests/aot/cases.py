"""What the ahead-of-time checks launch: real operations on CPU tensors of real ViT shapes.

To add a case, yield ``case(operation, shape, dtype, call, *arguments)`` from the function of your operation, where
``call(*arguments)`` makes the tensors and calls the launch function; a new operation's function goes into OPERATIONS.
Only shapes, dtypes, strides and alignment matter, values do not: nothing is executed, and zeros cost no memory. Batch 1
and batch 64 stand for all (tiles may differ, and Triton specialises on 1 and on divisibility by 16).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# (kernel, dtype): why it may spill.
ALLOWED_SPILLS = {}

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


def case(operation, shape, dtype, call, *args, **options):
    """A Case named after what it is called with."""
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
    from vit_fast.kernels.attention import attention

    def call(batch, tokens, heads, head_size, dtype):
        attention(torch.zeros(batch, tokens, 3 * heads * head_size, dtype=dtype), heads, head_size**-0.5)

    for dtype in DTYPES:
        for batch in (1, 64):
            for name, (tokens, width, heads, _, _) in VITS.items():
                yield case("attention", name, dtype, call, batch, tokens, heads, width // heads, dtype)
        for head_size in (32, 48, 88, 96, 104, 128):
            yield case("attention", f"head size {head_size}", dtype, call, 2, 257, 8, head_size, dtype)


def layer_norm_cases():
    from vit_fast.kernels.layer_norm import layer_norm

    def call(batch, tokens, width, dtype, weight_dtype):
        x = torch.zeros(batch, tokens, width, dtype=dtype)
        layer_norm(x, torch.zeros(width, dtype=weight_dtype), torch.zeros(width, dtype=weight_dtype), 1e-6)

    for dtype in DTYPES:
        for batch in (1, 64):
            for name, (tokens, width, _, _, _) in VITS.items():
                yield case("layer_norm", name, dtype, call, batch, tokens, width, dtype, dtype)
        yield case("layer_norm", "base, fp32 parameters", dtype, call, 64, 197, 768, dtype, torch.float32)


def patch_embed_cases():
    from vit_fast.kernels.patch_embed import patch_embed

    def call(batch, dtype, width, patch, prefix, pixels=None, layout=torch.contiguous_format, std=None, tf32=False):
        size = 224 // patch * patch
        images = torch.zeros(batch, 3, size, size, dtype=pixels or dtype).to(memory_format=layout)
        weight, bias = torch.zeros(width, 3, patch, patch, dtype=dtype), torch.zeros(width, dtype=dtype)
        pos_embed = torch.zeros(1, (size // patch) ** 2, width, dtype=dtype)
        prefix_tokens = torch.zeros(1, prefix, width, dtype=dtype) if prefix else None
        with matmul_precision("high" if tf32 else "highest"):
            patch_embed(images, weight, bias, pos_embed, prefix_tokens, (patch, patch), std=std)

    for dtype in DTYPES:
        for batch in (1, 64):
            for name, (_, width, _, _, patch) in VITS.items():
                yield case("patch_embed", name, dtype, call, batch, dtype, width, patch, 0 if patch == 14 else 1)
            base = ("patch_embed", "base/32", dtype, call, batch, dtype, 768, 32, 5)
            yield case(*base)
            base = ("patch_embed", "base", dtype, call, batch, dtype, 768, 16, 1)
            yield case(*base, pixels=torch.uint8)
            yield case(*base, pixels=torch.float32, std=(0.2, 0.2, 0.2))
            yield case(*base, layout=torch.channels_last)
            yield case(*base, pixels=torch.uint8, layout=torch.channels_last)
        yield case("patch_embed", "huge", dtype, call, 64, dtype, 1280, 14, 1, pixels=torch.uint8)
    yield case("patch_embed", "base", torch.float32, call, 1, torch.float32, 768, 16, 1, tf32=True)
    yield case("patch_embed", "base", torch.float32, call, 64, torch.float32, 768, 16, 1, tf32=True)


OPERATIONS = (attention_cases, layer_norm_cases, patch_embed_cases)
