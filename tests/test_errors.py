"""Bad input: the exact type and words of the error, raised before anything is launched, the same on every backend."""

import pytest
from torch import int64, nan, ones

import vit_fast
from vit_fast import ops

BAD = {
    "rank": (
        lambda: ops.attention(ones(5, 24), 2, 0.5),
        ValueError,
        r"attention: qkv has 2 dimensions \[5, 24\], expected 3",
    ),
    "width": (
        lambda: ops.attention(ones(1, 5, 570), 12, 0.5),
        ValueError,
        r"attention: qkv has width 570, expected 3·num_heads·head_size with num_heads=12",
    ),
    "heads": (lambda: ops.attention(ones(1, 5, 24), 0, 0.5), ValueError, "num_heads is 0, expected 1 or more"),
    "negative heads": (lambda: ops.attention(ones(1, 5, 24), -2, 0.5), ValueError, "num_heads is -2"),
    "head type": (lambda: ops.attention(ones(1, 5, 24), 2.0, 0.5), TypeError, "num_heads is float, expected an int"),
    "scale": (lambda: ops.attention(ones(1, 5, 24), 2, nan), ValueError, "scale is nan, expected a finite"),
    "head size": (
        lambda: ops.attention(ones(1, 5, 64), 1, 0.5, k=ones(1, 5, 80), v=ones(1, 5, 80)),
        ValueError,
        r"attention: k has head_size 80, expected 64 \(as q\)",
    ),
    "missing v": (
        lambda: ops.attention(ones(1, 5, 64), 1, 0.5, k=ones(1, 5, 64)),
        ValueError,
        "v is None, expected a tensor",
    ),
    "dtype": (
        lambda: ops.attention(ones(1, 5, 24, dtype=int64), 2, 0.5),
        ValueError,
        "qkv has dtype torch.int64, expected one of float16, bfloat16",
    ),
    "mixed dtype": (
        lambda: ops.attention(ones(1, 5, 8), 2, 0.5, k=ones(1, 5, 8).half(), v=ones(1, 5, 8)),
        ValueError,
        "k has dtype torch.float16, expected torch.float32",
    ),
    "device": (
        lambda: ops.layer_norm(ones(2, 4), ones(4, device="meta"), None),
        ValueError,
        "weight is on meta, expected cpu",
    ),
    "not a tensor": (
        lambda: ops.layer_norm([1.0], None, None),
        TypeError,
        "layer_norm: x is list, expected a torch.Tensor",
    ),
    "eps": (lambda: ops.layer_norm(ones(2, 4), None, None, -1e-6), ValueError, "eps is -1e-06, expected 0 or more"),
    "norm width": (lambda: ops.layer_norm(ones(2, 4), ones(5), None), ValueError, "weight has 5 elements, expected 4"),
    "features": (
        lambda: ops.layer_norm_linear(ones(2, 4), None, None, 1e-6, ones(8, 5), None),
        ValueError,
        r"weight has shape \[8, 5\], expected \[\*, 4\]",
    ),
    "activation": (
        lambda: ops.layer_norm_linear(ones(2, 4), None, None, 1e-6, ones(8, 4), None, "swish"),
        ValueError,
        "activation is 'swish', expected one of gelu",
    ),
    "odd swiglu": (
        lambda: ops.layer_norm_linear(ones(2, 4), None, None, 1e-6, ones(7, 4), None, "swiglu"),
        ValueError,
        "7 rows, expected an even number",
    ),
    "residual": (
        lambda: ops.linear_residual(ones(2, 3, 4), ones(8, 4), None, None, ones(2, 3, 4)),
        ValueError,
        r"residual has shape \[2, 3, 4\], expected \[2, 3, 8\]",
    ),
    "gamma": (
        lambda: ops.linear_residual(ones(2, 3, 4), ones(8, 4), None, ones(4), ones(2, 3, 8)),
        ValueError,
        "gamma has 4 elements, expected 8",
    ),
    "row scale": (
        lambda: ops.linear_residual(ones(2, 3, 4), ones(8, 4), None, None, ones(2, 3, 8), row_scale=ones(3)),
        ValueError,
        "row_scale has 3 elements, expected 2",
    ),
    "dropout": (
        lambda: ops.linear_residual(ones(2, 3, 4), ones(8, 4), None, None, ones(2, 3, 8), dropout_p=1.0),
        ValueError,
        "dropout_p is 1.0, expected 0 ≤ dropout_p < 1",
    ),
    "w2": (
        lambda: ops.layernorm_mlp(ones(2, 3, 4), None, None, 1e-6, ones(8, 4), None, ones(4, 9), None, "gelu", None),
        ValueError,
        r"w2 has shape \[4, 9\], expected \[\*, 8\]",
    ),
    "channels": (
        lambda: ops.patch_embed(ones(1, 4, 8, 8), ones(8, 3, 4, 4), None, None, None, 4),
        ValueError,
        "images have 4 channels, expected 3",
    ),
    "small image": (
        lambda: ops.patch_embed(ones(1, 3, 3, 8), ones(8, 3, 4, 4), None, None, None, 4),
        ValueError,
        "images are 3×8, expected at least one patch of 4×4",
    ),
    "stride": (
        lambda: ops.patch_embed(ones(1, 3, 8, 8), ones(8, 3, 4, 4), None, None, None, 0),
        ValueError,
        "stride is 0, expected 1 or more",
    ),
    "pos_embed": (
        lambda: ops.patch_embed(ones(1, 3, 8, 8), ones(8, 3, 4, 4), None, ones(1, 5, 8), None, 4),
        ValueError,
        r"pos_embed has shape \[1, 5, 8\], expected \[1, 4, 8\]",
    ),
    "prefix": (
        lambda: ops.patch_embed(ones(2, 3, 8, 8), ones(8, 3, 4, 4), None, None, ones(3, 1, 8), 4),
        ValueError,
        r"prefix_tokens has shape \[3, 1, 8\], expected \[1 or 2, K, 8\]",
    ),
    "std": (
        lambda: ops.patch_embed(ones(1, 3, 8, 8), ones(8, 3, 4, 4), None, None, None, 4, (0.0,) * 3, (0.5, 0.0, 0.5)),
        ValueError,
        "std is 0.0, expected more than 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=f"vit_fast\\..*{message}"):
        call()


@pytest.mark.interp
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_the_same_under_triton(name):
    call, error, message = BAD[name]
    with vit_fast.backend("triton"), pytest.raises(error, match=f"vit_fast\\..*{message}"):
        call()
