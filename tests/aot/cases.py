"""What the ahead-of-time checks launch: real operations on CPU tensors of real ViT shapes.

To add a case, yield a Case from the function of your operation: a name, a dtype, and a call of the launch function.
Only shapes, dtypes, strides and alignment matter, values do not: nothing is executed. Batch 2 stands for every batch
(Triton specialises on 1 and on divisibility by 16 alone), batch 1 is a case of its own.
"""

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


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def attention_cases():
    from vit_fast.kernels.attention import attention

    def call(batch, tokens, heads, head_size, dtype):
        attention(torch.zeros(batch, tokens, 3 * heads * head_size, dtype=dtype), heads, head_size**-0.5)

    for dtype in DTYPES:
        for name, (tokens, width, heads, _, _) in VITS.items():
            yield Case(f"attention {name}", _name(dtype), lambda a=(2, tokens, heads, width // heads, dtype): call(*a))
        yield Case("attention base batch 1", _name(dtype), lambda a=(1, 197, 12, 64, dtype): call(*a))
        for head_size in (32, 48, 88, 96, 104, 128):
            a = (2, 257, 8, head_size, dtype)
            yield Case(f"attention head size {head_size}", _name(dtype), lambda a=a: call(*a))


def layer_norm_cases():
    from vit_fast.kernels.layer_norm import layer_norm

    def call(batch, tokens, width, dtype, weight_dtype):
        x = torch.zeros(batch, tokens, width, dtype=dtype)
        layer_norm(x, torch.zeros(width, dtype=weight_dtype), torch.zeros(width, dtype=weight_dtype), 1e-6)

    for dtype in DTYPES:
        for name, (tokens, width, _, _, _) in VITS.items():
            yield Case(f"layer_norm {name}", _name(dtype), lambda a=(2, tokens, width, dtype, dtype): call(*a))
            a = (2, tokens, width, dtype, torch.float32)
            yield Case(f"layer_norm {name} fp32 parameters", _name(dtype), lambda a=a: call(*a))
        yield Case("layer_norm base batch 1", _name(dtype), lambda a=(1, 197, 768, dtype, dtype): call(*a))


def patch_embed_cases():
    from vit_fast.kernels.patch_embed import patch_embed

    def call(batch, dtype, pixels, width, patch, prefix, layout=torch.contiguous_format):
        size = 224 // patch * patch
        images = torch.zeros(batch, 3, size, size, dtype=pixels).to(memory_format=layout)
        weight, bias = torch.zeros(width, 3, patch, patch, dtype=dtype), torch.zeros(width, dtype=dtype)
        pos_embed = torch.zeros(1, (size // patch) ** 2, width, dtype=dtype)
        prefix_tokens = torch.zeros(1, prefix, width, dtype=dtype) if prefix else None
        patch_embed(images, weight, bias, pos_embed, prefix_tokens, (patch, patch))

    for dtype in DTYPES:
        for name, (_, width, _, _, patch) in VITS.items():
            prefix = 0 if name == "so400m" else 1
            yield Case(f"patch_embed {name}", _name(dtype), lambda a=(2, dtype, dtype, width, patch, prefix): call(*a))
        yield Case("patch_embed base batch 1", _name(dtype), lambda a=(1, dtype, dtype, 768, 16, 1): call(*a))
        yield Case("patch_embed base uint8", _name(dtype), lambda a=(2, dtype, torch.uint8, 768, 16, 1): call(*a))
        yield Case(
            "patch_embed base channels_last",
            _name(dtype),
            lambda a=(2, dtype, dtype, 768, 16, 5): call(*a, layout=torch.channels_last),
        )
        yield Case(
            "patch_embed base fp32 images", _name(dtype), lambda a=(2, dtype, torch.float32, 768, 32, 1): call(*a)
        )


OPERATIONS = (attention_cases, layer_norm_cases, patch_embed_cases)
