"""Bad input: the exact type and every word of the error, for operations, models, configuration and weight files.

An operation refuses a bad argument before any operator of aten runs and before any kernel is launched, with the same
error on every backend and in compiled code. A case is a good call (``GOOD``) with some arguments changed.
"""

import os
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import properties
from torch import bfloat16, complex64, float16, float64, inf, int32, int64, nan, nn, ones, tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vit_fast.kernels import arguments, folding, packing
from vit_fast.kernels.arguments import UnsupportedError

import vit_fast
from vit_fast import checkpoints, ops
from vit_fast.backends import select
from vit_fast.backends.torch import TORCH
from vit_fast.precisions import INT8, PACKED

GOOD = {
    "attention": dict(qkv=ones(2, 5, 24), num_heads=2, scale=0.5),
    "layer_norm": dict(x=ones(2, 4), weight=ones(4), bias=ones(4), eps=1e-6),
    "layer_norm_linear": dict(
        x=ones(2, 4), ln_weight=ones(4), ln_bias=ones(4), eps=1e-6, weight=ones(8, 4), bias=ones(8)
    ),
    "linear_residual": dict(
        x=ones(2, 3, 4), weight=ones(8, 4), bias=ones(8), gamma=ones(8), residual=ones(2, 3, 8), row_scale=ones(2)
    ),
    "layernorm_mlp": dict(
        x=ones(2, 3, 4), ln_weight=ones(4), ln_bias=ones(4), eps=1e-6, w1=ones(8, 4), b1=ones(8), w2=ones(4, 8),
        b2=ones(4), activation="gelu", gamma=ones(4),
    ),
    "patch_embed": dict(
        images=ones(2, 3, 8, 8), weight=ones(8, 3, 4, 4), bias=ones(8), pos_embed=ones(1, 4, 8),
        prefix_tokens=ones(1, 1, 8), stride=4, mean=[0.5, 0.5, 0], std=(1, 0.5, 0.5),
    ),
    "prepared_blocks": dict(
        x=ones(2, 3, 4), num_heads=2, scale=0.5, activation="gelu", eps1=1e-6, eps2=1e-6,
        weights=folding.prepare_block(
            *((ones(4), ones(4)), (ones(12, 4), ones(12)), (ones(4, 4), ones(4)), ones(4)),
            *((ones(4), ones(4)), (ones(8, 4), ones(8)), (ones(4, 8), ones(4)), ones(4)),
        ),
    ),
    "fp8_blocks": dict(
        x=ones(2, 3, 4).half(), num_heads=2, scale=0.5, activation="gelu", eps1=1e-6, eps2=1e-6,
        weights=folding.fp8_block(
            *((ones(4), ones(4)), (ones(12, 4), ones(12)), (ones(4, 4), ones(4)), ones(4)),
            *((ones(4), ones(4)), (ones(8, 4), ones(8)), (ones(4, 8), ones(4)), ones(4)), "gelu",
        ),
    ),
}  # fmt: skip
FLOATS = "expected one of float16, bfloat16, float32, float64"
WORDS = "expected one of gelu, gelu_tanh, quick_gelu, relu, silu, swiglu, geglu, geglu_tanh"
A_NORM = "(weight, bias or None, eps)"
ONE = "where the batch size and the heads may be 1"
SEQUENCES = tensor([0, 2, 5], dtype=int32)


def _separate(k, v, **words):
    return dict(qkv=ones(2, 5, 8), k=k, v=v, **words)


CASES = {
    "attention": [
        (dict(qkv=ones(2, 5, 8)), ValueError, "qkv has width 8, expected 3·num_heads·head_size with num_heads=2"),
        (_separate(ones(2, 5, 0), ones(2, 5, 0)) | dict(qkv=ones(2, 5, 0)), ValueError,
         "q has width 0, expected num_heads·head_size with num_heads=2"),
        (dict(bias=ones(2, 2, 5, 5, device="meta")), ValueError, "bias is on meta, expected cpu (as qkv)"),
        (dict(key_lengths=ones(2, dtype=int64, device="meta")), ValueError,
         "key_lengths is on meta, expected cpu (as qkv)"),
        (dict(q_norm=(ones(4), ones(5), 1e-6)), ValueError, "q_norm bias has 5 elements, expected 4 (the head size)"),
        (dict(bias=ones(2, 2, 5, 2)), ValueError,
         "bias has shape [2, 2, 5, 2], expected [2, 2, 5, 5] or 1 on any axis"),
        (dict(bias=ones(2, 0, 5, 5)), ValueError,
         "bias has shape [2, 0, 5, 5], expected [2, 2, 5, 5] or 1 on any axis"),
        (_separate(ones(2, 3, 8), ones(2, 3, 8), bias=ones(2, 2, 5, 5)), ValueError,
         "bias has shape [2, 2, 5, 5], expected [2, 2, 5, 3] or 1 on any axis"),
        (dict(scale=inf), ValueError, "scale is inf, expected a finite number"),
        (dict(qkv=np.ones((2, 5, 24))), TypeError, "qkv is ndarray, expected a torch.Tensor"),
        (dict(qkv=ones(5, 24)), ValueError, "qkv has 2 dimensions [5, 24], expected 3"),
        (dict(qkv=ones(2, 2, 5, 12)), ValueError, "qkv has 4 dimensions [2, 2, 5, 12], expected 3"),
        (dict(qkv=ones(2, 5, 24, dtype=int64)), ValueError, f"qkv has dtype torch.int64, {FLOATS}"),
        (dict(qkv=ones(2, 5, 24, dtype=complex64)), ValueError, f"qkv has dtype torch.complex64, {FLOATS}"),
        (dict(qkv=ones(2, 5, 24).to_sparse()), ValueError, "qkv has layout torch.sparse_coo, expected a dense tensor"),
        (
            dict(qkv=ones(2, 5, 570), num_heads=12),
            ValueError,
            "qkv has width 570, expected 3·num_heads·head_size with num_heads=12",
        ),
        (dict(qkv=ones(2, 5, 0)), ValueError, "qkv has width 0, expected 3·num_heads·head_size with num_heads=2"),
        (dict(qkv=ones(2, 0, 24)), ValueError, "qkv has 0 tokens, expected 1 or more"),
        (dict(num_heads=0), ValueError, "num_heads is 0, expected 1 or more"),
        (dict(num_heads=-2), ValueError, "num_heads is -2, expected 1 or more"),
        (dict(num_heads=2.0), TypeError, "num_heads is float, expected an int"),
        (dict(num_heads=True), TypeError, "num_heads is bool, expected an int"),
        (dict(num_heads=tensor(2)), TypeError, "num_heads is Tensor, expected an int"),
        (dict(scale=nan), ValueError, "scale is nan, expected a finite number"),
        (dict(scale=-(2**63) - 1), ValueError, f"scale is {-(2**63) - 1}, expected a number of 64 bits"),
        (dict(scale=-inf), ValueError, "scale is -inf, expected a finite number"),
        (dict(scale=None), TypeError, "scale is NoneType, expected a float"),
        (dict(scale=tensor(0.5)), TypeError, "scale is Tensor, expected a float"),
        (dict(k=ones(2, 5, 24)), ValueError, "v is None, expected a tensor (as k)"),
        (dict(v=ones(2, 5, 24)), ValueError, "k is None, expected a tensor (as v)"),
        (dict(qkv=ones(2, 5, 9), k=ones(2, 5, 9), v=ones(2, 5, 9)), ValueError,
         "q has width 9, expected num_heads·head_size with num_heads=2"),
        (dict(qkv=ones(2, 5, 64), num_heads=1, k=ones(2, 5, 80), v=ones(2, 5, 80)), ValueError,
         "k has head_size 80, expected 64 (as q)"),
        (dict(qkv=ones(2, 5, 64), k=ones(2, 5, 80), v=ones(2, 5, 80)), ValueError,
         "k has head_size 40, expected 32 (as q)"),
        (_separate(ones(2, 5, 8), ones(2, 5, 9)), ValueError,
         "v has width 9, expected num_heads·head_size with num_heads=2"),
        (_separate(ones(2, 5, 8), ones(2, 5, 0)), ValueError,
         "v has width 0, expected num_heads·head_size with num_heads=2"),
        (_separate(ones(2, 5, 9), ones(2, 5, 9)), ValueError, "k has width 9, expected 8 (as q)"),
        (_separate(ones(1, 5, 8), ones(2, 5, 8)), ValueError, "k has batch size 1, expected 2 (as q)"),
        (_separate(ones(2, 6, 8), ones(2, 7, 8)), ValueError, "v has 7 tokens, expected 6 (as k)"),
        (_separate(ones(2, 0, 8), ones(2, 0, 8)), ValueError, "k has 0 tokens, expected 1 or more"),
        (_separate(ones(2, 2, 5, 4), ones(2, 2, 5, 4)), ValueError, "k has 4 dimensions [2, 2, 5, 4], expected 3"),
        (_separate(ones(2, 5, 8, dtype=float16), ones(2, 5, 8)), ValueError,
         "k has dtype torch.float16, expected torch.float32 (as q)"),
        (_separate(ones(2, 5, 8), ones(2, 5, 8, device="meta")), ValueError, "v is on meta, expected cpu (as q)"),
        (dict(bias=ones(2, 5, 5)), ValueError, "bias has 3 dimensions [2, 5, 5], expected 4"),
        (dict(bias=ones(1, 1, 5, 6)), ValueError,
         "bias has shape [1, 1, 5, 6], expected [2, 2, 5, 5] or 1 on any axis"),
        (dict(bias=ones(1, 1, 5, 5, dtype=torch.bool)), ValueError, f"bias has dtype torch.bool, {FLOATS}"),
        (dict(key_lengths=[5, 5]), TypeError, "key_lengths is list, expected a torch.Tensor"),
        (dict(key_lengths=ones(2)), ValueError, "key_lengths has dtype torch.float32, expected one of int32, int64"),
        (dict(key_lengths=ones(3, dtype=int32)), ValueError, "key_lengths has 3 elements, expected 2 (the batch size)"),
        (dict(q_norm=nn.LayerNorm(4)), TypeError, f"q_norm is LayerNorm, expected a tuple {A_NORM}"),
        (dict(k_norm=(ones(4), None)), ValueError, f"k_norm has 2 elements, expected 3 {A_NORM}"),
        (dict(q_norm=(ones(8), None, 0.1)), ValueError, "q_norm weight has 8 elements, expected 4 (the head size)"),
        (dict(k_norm=(None, None, "0.1")), TypeError, "k_norm eps is str, expected a float"),
        (dict(k_norm=(None, None, -0.1)), ValueError, "k_norm eps is -0.1, expected 0 or more"),
        (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0, expected 0 ≤ dropout_p < 1"),
        (dict(dropout_p=tensor(0.1)), TypeError, "dropout_p is Tensor, expected a float"),
        (dict(dropout_p=0.1, seed=3), TypeError, "seed is int, expected a torch.Tensor"),
        (dict(num_prefix=tensor([1, 2])), TypeError, "num_prefix is Tensor, expected an int"),
        (dict(num_prefix=-1), ValueError, "num_prefix is -1, expected 0 or more"),
        (dict(num_prefix=6), ValueError, "num_prefix is 6, expected at most 5 (the tokens)"),
        (dict(norm="batch"), ValueError, "norm is 'batch', expected one of layer, rms"),
        (dict(rope_layout=0), ValueError, "rope_layout is 0, expected one of half, interleaved"),
        (dict(rope=ones(5, 4)), TypeError, "rope is Tensor, expected a tuple (cos, sin)"),
        (dict(rope=(ones(5, 4),)), ValueError, "rope has 1 elements, expected 2 (cos, sin)"),
        (dict(rope=(ones(5, 4), None)), TypeError, "rope sin is NoneType, expected a torch.Tensor"),
        (dict(rope=(ones(5, 4).half(), ones(5, 4))), ValueError,
         "rope cos has dtype torch.float16, expected float32"),
        (dict(qkv=ones(2, 5, 24).half(), rope=(ones(5, 4).half(), ones(5, 4).double())), ValueError,
         "rope sin has dtype torch.float64, expected one of float32, float16"),
        (dict(rope=(ones(5, 4, device="meta"), ones(5, 4))), ValueError, "rope cos is on meta, expected cpu (as qkv)"),
        (dict(rope=(ones(5, 4), ones(5, 2))), ValueError,
         f"rope sin has shape [5, 2], expected [5, 4] or [2, 2, 5, 4], {ONE}"),
        (dict(rope=(ones(5, 4), ones(5, 4)), num_prefix=1), ValueError,
         f"rope cos has shape [5, 4], expected [4, 4] or [2, 2, 4, 4], {ONE}"),
        (dict(rope=(ones(3, 1, 5, 4), ones(5, 4))), ValueError,
         f"rope cos has shape [3, 1, 5, 4], expected [5, 4] or [2, 2, 5, 4], {ONE}"),
        (dict(rope=(ones(5, 4), ones(3, 5, 4))), ValueError,
         f"rope sin has shape [3, 5, 4], expected [5, 4] or [2, 2, 5, 4], {ONE}"),
        (dict(rope=(ones(4), ones(4))), ValueError,
         f"rope cos has shape [4], expected [5, 4] or [2, 2, 5, 4], {ONE}"),
        (dict(qkv=ones(2, 5, 18), rope=(ones(5, 3), ones(5, 3))), ValueError,
         "rope is given with head size 3, expected an even number"),
        (_separate(ones(2, 3, 8), ones(2, 3, 8), rope=(ones(5, 4), ones(5, 4))), ValueError,
         "rope is given with 5 queries and 3 keys, expected as many"),
        (dict(rel_pos=ones(2, 2, 5, 5)), TypeError, "rel_pos is Tensor, expected a tuple (height, width)"),
        (dict(rel_pos=(ones(2, 2, 5, 5),)), ValueError, "rel_pos has 1 elements, expected 2 (height, width)"),
        (dict(rel_pos=(ones(2, 2, 5), ones(2, 2, 5, 1))), ValueError,
         "rel_pos height has 3 dimensions [2, 2, 5], expected 4"),
        (dict(rel_pos=(ones(2, 2, 5, 5), ones(1, 2, 5, 1))), ValueError,
         "rel_pos width has shape [1, 2, 5, 1], expected [2, 2, 5, *]"),
        (dict(rel_pos=(ones(2, 2, 5, 2), ones(2, 2, 5, 2))), ValueError,
         "rel_pos has 2 rows and 2 columns of keys, expected 5 in all"),
        (dict(rel_pos=(ones(2, 2, 5, 5), ones(2, 2, 5, 1, device="meta"))), ValueError,
         "rel_pos width is on meta, expected cpu (as qkv)"),
        (dict(cu_seqlens=[0, 5]), TypeError, "cu_seqlens is list, expected a torch.Tensor"),
        (dict(cu_seqlens=tensor([0, 5])), ValueError, "cu_seqlens has dtype torch.int64, expected int32"),
        (dict(qkv=ones(1, 5, 24), cu_seqlens=SEQUENCES.to("meta")), ValueError,
         "cu_seqlens is on meta, expected cpu (as qkv)"),
        (dict(qkv=ones(1, 5, 8), k=ones(1, 3, 8), v=ones(1, 3, 8), cu_seqlens=SEQUENCES), ValueError,
         "cu_seqlens is given with batch size 1, 5 queries and 3 keys, expected one batch entry with as many queries "
         "as keys"),
        (dict(cu_seqlens=SEQUENCES), ValueError,
         "cu_seqlens is given with batch size 2, 5 queries and 5 keys, expected one batch entry with as many queries "
         "as keys"),
        (dict(qkv=ones(1, 5, 24), cu_seqlens=SEQUENCES[:1]), ValueError,
         "cu_seqlens has 1 elements, expected 2 or more"),
        (dict(qkv=ones(1, 5, 24), cu_seqlens=SEQUENCES, bias=ones(1, 1, 5, 5)), ValueError,
         "bias is given with cu_seqlens, expected one of the two"),
        (dict(qkv=ones(1, 5, 24), cu_seqlens=SEQUENCES, key_lengths=tensor([5])), ValueError,
         "key_lengths is given with cu_seqlens, expected one of the two"),
    ],
    "layer_norm": [
        (dict(x=[1.0]), TypeError, "x is list, expected a torch.Tensor"),
        (dict(x=ones(2, 4, dtype=int32)), ValueError, f"x has dtype torch.int32, {FLOATS}"),
        (dict(x=tensor(1.0)), ValueError, "x has 0 dimensions, expected 1 or more"),
        (dict(x=ones(2, 0)), ValueError, "x has width 0, expected 1 or more"),
        (dict(x=torch.nested.nested_tensor([ones(2, 4), ones(3, 4)], layout=torch.jagged)), ValueError,
         "x is nested, expected a dense tensor"),
        (dict(x=torch.nested.nested_tensor([ones(2, 4), ones(3, 4)])), ValueError,
         "x is nested, expected a dense tensor"),
        (dict(x=ones(2, 4).to_sparse()), ValueError, "x has layout torch.sparse_coo, expected a dense tensor"),
        (dict(weight=ones(4, device="meta")), ValueError, "weight is on meta, expected cpu (as x)"),
        (dict(weight=ones(5)), ValueError, "weight has 5 elements, expected 4 (the width of x)"),
        (dict(weight=ones(1, 4)), ValueError, "weight has 2 dimensions [1, 4], expected 1"),
        (dict(weight=nn.LayerNorm(4)), TypeError, "weight is LayerNorm, expected a torch.Tensor"),
        (dict(bias=ones(4, dtype=int64)), ValueError, f"bias has dtype torch.int64, {FLOATS}"),
        (dict(eps=-1e-6), ValueError, "eps is -1e-06, expected 0 or more"),
        (dict(eps=nan), ValueError, "eps is nan, expected a finite number"),
        (dict(eps="1e-6"), TypeError, "eps is str, expected a float"),
        (dict(eps=tensor(1e-6)), TypeError, "eps is Tensor, expected a float"),
        (dict(norm="RMS"), ValueError, "norm is 'RMS', expected one of layer, rms"),
        (dict(norm=np.array(["rms"])), TypeError, "norm is ndarray, expected one of layer, rms"),
        (dict(norm=nn.RMSNorm), TypeError, "norm is type, expected one of layer, rms"),
    ],
    "layer_norm_linear": [
        (dict(norm="batch"), ValueError, "norm is 'batch', expected one of layer, rms"),
        (dict(weight=ones(9, 4), bias=ones(9), activation="geglu"), ValueError,
         "weight has 9 rows, expected an even number for activation 'geglu'"),
        (dict(weight=ones(9, 4), bias=ones(9), activation="swiglu"), ValueError,
         "weight has 9 rows, expected an even number for activation 'swiglu'"),
        (dict(activation=3), TypeError, f"activation is int, {WORDS} or None"),
        (dict(activation=["gelu"]), TypeError, f"activation is list, {WORDS} or None"),
        (dict(activation=np.array(["gelu"])), TypeError, f"activation is ndarray, {WORDS} or None"),
        (dict(ln_weight=ones(8)), ValueError, "ln_weight has 8 elements, expected 4 (the width of x)"),
        (dict(weight=nn.Linear(4, 8)), TypeError, "weight is Linear, expected a torch.Tensor"),
        (dict(weight=ones(8, 5)), ValueError, "weight has shape [8, 5], expected [*, 4] (the width of x)"),
        (dict(weight=ones(4, 8)), ValueError, "weight has shape [4, 8], expected [*, 4] (the width of x)"),
        (dict(weight=ones(4)), ValueError, "weight has 1 dimensions [4], expected 2"),
        (dict(weight=ones(0, 4)), ValueError, "weight has 0 rows, expected 1 or more"),
        (dict(weight=ones(8, 4).to_sparse()), ValueError,
         "weight has layout torch.sparse_coo, expected a dense tensor"),
        (dict(weight=ones(8, 4, device="meta")), ValueError, "weight is on meta, expected cpu (as x)"),
        (dict(bias=ones(1, 8)), ValueError, "bias has 2 dimensions [1, 8], expected 1"),
        (dict(bias=ones(8, dtype=bfloat16)), ValueError,
         "bias has dtype torch.bfloat16, expected torch.float32 (as weight)"),
        (dict(activation="swish"), ValueError, f"activation is 'swish', {WORDS} or None"),
        (dict(activation=nn.GELU()), TypeError, f"activation is GELU, {WORDS} or None"),
        (dict(activation=ones(1)), TypeError, f"activation is Tensor, {WORDS} or None"),
        (dict(weight=ones(7, 4), bias=None, activation="swiglu"), ValueError,
         "weight has 7 rows, expected an even number for activation 'swiglu'"),
    ],
    "linear_residual": [
        (dict(norm="l2"), ValueError, "norm is 'l2', expected one of layer, rms"),
        (dict(inner_norm=nn.LayerNorm(4)), TypeError,
         "inner_norm is LayerNorm, expected a tuple (weight or None, bias or None, eps)"),
        (dict(inner_norm=(ones(4), ones(4))), ValueError,
         "inner_norm has 2 elements, expected 3 (weight or None, bias or None, eps)"),
        (dict(inner_norm=(ones(8), None, 1e-6)), ValueError,
         "inner_norm weight has 8 elements, expected 4 (the width of x)"),
        (dict(inner_norm=(ones(4), ones(4, device="meta"), 1e-6)), ValueError,
         "inner_norm bias is on meta, expected cpu (as x)"),
        (dict(inner_norm=(ones(4), None, None)), TypeError, "inner_norm eps is NoneType, expected a float"),
        (dict(residual=ones(2, 3, 8, device="meta")), ValueError, "residual is on meta, expected cpu (as x)"),
        (dict(x=ones(2, 3, 0), weight=ones(8, 0)), ValueError, "x has width 0, expected 1 or more"),
        (dict(x=[1.0]), TypeError, "x is list, expected a torch.Tensor"),
        (dict(bias=ones(7)), ValueError, "bias has 7 elements, expected 8 (the rows of weight)"),
        (dict(weight=ones(8, 5)), ValueError, "weight has shape [8, 5], expected [*, 4] (the width of x)"),
        (dict(weight=ones(4)), ValueError, "weight has 1 dimensions [4], expected 2"),
        (dict(x=ones(4)), ValueError, "x has 1 dimensions [4], expected 2 or more"),
        (dict(residual=None), TypeError, "residual is NoneType, expected a torch.Tensor"),
        (dict(residual=ones(2, 3, 4)), ValueError, "residual has shape [2, 3, 4], expected [2, 3, 8]"),
        (dict(residual=ones(1, 3, 8)), ValueError, "residual has shape [1, 3, 8], expected [2, 3, 8]"),
        (dict(gamma=1e-5), TypeError, "gamma is float, expected a torch.Tensor"),
        (dict(gamma=ones(4)), ValueError, "gamma has 4 elements, expected 8 (the rows of weight)"),
        (dict(gamma=ones(8, device="meta")), ValueError, "gamma is on meta, expected cpu (as x)"),
        (dict(row_scale=0.9), TypeError, "row_scale is float, expected a torch.Tensor"),
        (dict(row_scale=ones(3)), ValueError, "row_scale has 3 elements, expected 2 (the batch size of x)"),
        (dict(row_scale=ones(2, 1, 1)), ValueError, "row_scale has 3 dimensions [2, 1, 1], expected 1"),
        (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0, expected 0 ≤ dropout_p < 1"),
        (dict(dropout_p=-0.1), ValueError, "dropout_p is -0.1, expected 0 ≤ dropout_p < 1"),
        (dict(dropout_p=True), TypeError, "dropout_p is bool, expected a float"),
        (dict(seed=ones(1, dtype=int32)), ValueError, "seed has dtype torch.int32, expected int64"),
        (dict(seed=ones(2, dtype=int64)), ValueError, "seed has shape [2], expected one element"),
        (dict(seed=ones(1, dtype=int64, device="meta")), ValueError, "seed is on meta, expected cpu (as x)"),
    ],
    "layernorm_mlp": [
        (dict(norm=None), TypeError, "norm is NoneType, expected one of layer, rms"),
        (dict(inner_norm=(ones(4), None, 1e-6)), ValueError,
         "inner_norm weight has 4 elements, expected 8 (the rows of w1)"),
        (dict(inner_norm=(None, ones(8), 1e-6), activation="geglu_tanh", w2=ones(4, 4)), ValueError,
         "inner_norm bias has 8 elements, expected 4 (half the rows of w1)"),
        (dict(x=ones(4)), ValueError, "x has 1 dimensions [4], expected 2 or more"),
        (dict(ln_bias=ones(3)), ValueError, "ln_bias has 3 elements, expected 4 (the width of x)"),
        (dict(w1=ones(4, 8)), ValueError, "w1 has shape [4, 8], expected [*, 4] (the width of x)"),
        (dict(b1=ones(4)), ValueError, "b1 has 4 elements, expected 8 (the rows of w1)"),
        (dict(w2=ones(4, 9)), ValueError, "w2 has shape [4, 9], expected [*, 8] (the rows of w1)"),
        (dict(w2=ones(6, 8)), ValueError, "w2 has 6 rows, expected 4 (the width of x)"),
        (dict(w2=ones(4, 8, dtype=float64)), ValueError,
         "w2 has dtype torch.float64, expected torch.float32 (as w1)"),
        (dict(b2=ones(8)), ValueError, "b2 has 8 elements, expected 4 (the rows of w2)"),
        (dict(activation="GELU"), ValueError, f"activation is 'GELU', {WORDS}"),
        (dict(activation=None), TypeError, f"activation is NoneType, {WORDS}"),
        (dict(activation="swiglu"), ValueError, "w2 has shape [4, 8], expected [*, 4] (half the rows of w1)"),
        (dict(w1=ones(7, 4), b1=None, activation="swiglu"), ValueError,
         "w1 has 7 rows, expected an even number for activation 'swiglu'"),
        (dict(gamma=ones(8)), ValueError, "gamma has 8 elements, expected 4 (the width of x)"),
        (dict(out_dropout_p=1.0), ValueError, "out_dropout_p is 1.0, expected 0 ≤ out_dropout_p < 1"),
        (dict(out_seed=ones(2, dtype=int64)), ValueError, "out_seed has shape [2], expected one element"),
        (dict(recompute=1), TypeError, "recompute is int, expected a bool"),
        (dict(dropout_p=50), ValueError, "dropout_p is 50, expected 0 ≤ dropout_p < 1"),
    ],
    "patch_embed": [
        (dict(images=ones(2, 3, 8, 3)), ValueError, "images has size 8×3, expected at least one patch of 4×4"),
        (dict(prefix_tokens=ones(1, 1, 7)), ValueError, "prefix_tokens has shape [1, 1, 7], expected [1 or 2, K, 8]"),
        (dict(pos_embed=ones(2, 4, 8)), ValueError,
         "pos_embed has shape [2, 4, 8], expected [1, 4, 8] (patch rows only)"),
        (dict(pos_embed=ones(1, 4, 7)), ValueError,
         "pos_embed has shape [1, 4, 7], expected [1, 4, 8] (patch rows only)"),
        (dict(pos_embed=ones(1, 4, 8, device="meta")), ValueError, "pos_embed is on meta, expected cpu (as images)"),
        (dict(prefix_tokens=ones(1, 1, 8, device="meta")), ValueError,
         "prefix_tokens is on meta, expected cpu (as images)"),
        (dict(images="cat.jpg"), TypeError, "images is str, expected a torch.Tensor"),
        (dict(images=ones(3, 8, 8)), ValueError, "images has 3 dimensions [3, 8, 8], expected 4"),
        (dict(images=ones(2, 8, 8, 3)), ValueError, "images has 8 channels, expected 3 (as weight)"),
        (dict(images=ones(2, 4, 8, 8)), ValueError, "images has 4 channels, expected 3 (as weight)"),
        (dict(images=ones(2, 3, 8, 8, dtype=int64)), ValueError, f"images has dtype torch.int64, {FLOATS}, uint8"),
        (dict(images=ones(2, 3, 8, 8, device="meta")), ValueError, "images is on meta, expected cpu (as weight)"),
        (dict(images=ones(2, 3, 3, 8)), ValueError, "images has size 3×8, expected at least one patch of 4×4"),
        (dict(weight=ones(8, 48)), ValueError, "weight has 2 dimensions [8, 48], expected 4"),
        (dict(weight=ones(8, 3, 0, 4)), ValueError, "weight has patch height 0, expected 1 or more"),
        (dict(bias=ones(3)), ValueError, "bias has 3 elements, expected 8 (the rows of weight)"),
        (dict(stride=0), ValueError, "stride is 0, expected 1 or more"),
        (dict(stride=(4, 2**63)), ValueError, f"stride is {2**63}, expected a number of 64 bits"),
        (dict(stride=4.0), TypeError, "stride is float, expected an int"),
        (dict(stride=(4, None)), TypeError, "stride is NoneType, expected an int"),
        (dict(stride=(4, 4, 4)), ValueError, "stride has 3 elements, expected an int or a pair"),
        (dict(pos_embed=ones(4, 8)), ValueError, "pos_embed has 2 dimensions [4, 8], expected 3"),
        (dict(pos_embed=ones(1, 5, 8)), ValueError,
         "pos_embed has shape [1, 5, 8], expected [1, 4, 8] (patch rows only)"),
        (dict(prefix_tokens=ones(1, 8)), ValueError, "prefix_tokens has 2 dimensions [1, 8], expected 3"),
        (dict(prefix_tokens=ones(3, 1, 8)), ValueError,
         "prefix_tokens has shape [3, 1, 8], expected [1 or 2, K, 8]"),
        (dict(mean=0.5), TypeError, "mean is float, expected a tuple of floats or None"),
        (dict(mean=ones(3)), TypeError, "mean is Tensor, expected a tuple of floats or None"),
        (dict(mean=(0.5,)), ValueError, "mean has 1 values, expected 3 (one a channel)"),
        (dict(mean=(0.5, "0.5", 0.5)), TypeError, "mean[1] is str, expected a float"),
        (dict(std=(0.5, 0.0, 0.5)), ValueError, "std[1] is 0.0, expected more than 0"),
    ],
    "prepared_blocks": [
        (dict(x=ones(2, 3, 4).half()), ValueError, "x has dtype torch.float16, expected float32"),
        (dict(x=ones(3, 4)), ValueError, "x has 2 dimensions [3, 4], expected 3"),
        (dict(x=ones(2, 3, 4).to_sparse()), ValueError, "x has layout torch.sparse_coo, expected a dense tensor"),
        (dict(x=ones(2, 3, 5)), ValueError, "x has width 5, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 12)), ValueError, "x has width 12, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 4, device="meta")), ValueError, "x is on meta, expected cpu (as weights)"),
        (dict(x=None), TypeError, "x is NoneType, expected a torch.Tensor"),
    ],
    "fp8_blocks": [
        (dict(x=ones(2, 3, 4)), ValueError, "x has dtype torch.float32, expected one of float16, bfloat16"),
        (dict(x=ones(2, 3, 4).to(torch.float8_e4m3fn)), ValueError,
         "x has dtype torch.float8_e4m3fn, expected one of float16, bfloat16"),
        (dict(x=ones(3, 4).half()), ValueError, "x has 2 dimensions [3, 4], expected 3"),
        (dict(x=ones(2, 3, 12).half()), ValueError, "x has width 12, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 4, device="meta").half()), ValueError, "x is on meta, expected cpu (as weights)"),
        (dict(x=None), TypeError, "x is NoneType, expected a torch.Tensor"),
    ],
}  # fmt: skip


BLOCK = (
    *((ones(4), ones(4)), (ones(12, 4), ones(12)), (ones(4, 4), ones(4)), ones(4)),
    *((ones(4), ones(4)), (ones(8, 4), ones(8)), (ones(4, 8), ones(4)), ones(4)), "gelu",
)  # fmt: skip
# Stacks for a CPU, whose operations only a prepared model calls. A packed weight tells its width up to its padding.
STACKS = {
    "packed_blocks": (PACKED, packing.packed_block(*BLOCK), [
        (dict(x=ones(3, 4)), ValueError, "x has 2 dimensions [3, 4], expected 3"),
        (dict(x=ones(2, 3, 4).to_sparse()), ValueError, "x has layout torch.sparse_coo, expected a dense tensor"),
        (dict(x=ones(2, 3, 5)), ValueError, "x has width 5, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 3)), ValueError, "x has width 3, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 4).int()), ValueError, f"x has dtype torch.int32, {FLOATS}"),
        (dict(x=ones(2, 3, 4, device="meta")), ValueError, "x is on meta, expected cpu (as weights)"),
        (dict(x=None), TypeError, "x is NoneType, expected a torch.Tensor"),
    ]),
    "int8_blocks": (INT8, packing.int8_block(*BLOCK), [
        (dict(x=ones(3, 4)), ValueError, "x has 2 dimensions [3, 4], expected 3"),
        (dict(x=ones(2, 3, 5)), ValueError, "x has width 5, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 36)), ValueError, "x has width 36, expected 4 (as the weights)"),
        (dict(x=ones(2, 3, 4).to(torch.int8)), ValueError, f"x has dtype torch.int8, {FLOATS}"),
        (dict(x=ones(2, 3, 4, device="meta")), ValueError, "x is on meta, expected cpu (as weights)"),
        (dict(x=None), TypeError, "x is NoneType, expected a torch.Tensor"),
    ]),
}  # fmt: skip


def _parametrized(cases):
    return pytest.mark.parametrize(
        "op, changes, error, message",
        [
            pytest.param(op, changes, error, f"vit_fast.{op}: {message}", id=f"{op}-{'-'.join(changes)}")
            for op, rows in cases.items()
            for changes, error, message in rows
        ],
    )


class Recorder(TorchDispatchMode):
    """Every operator of aten that runs, also on fresh memory."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def raises(error, message):
    """This very type and these words; a function of the cause may stand for the words."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert str(caught.value) == (message(caught.value.__cause__) if callable(message) else message)


@contextmanager
def raises_first(error, message):
    """``raises``, and no operator of aten runs."""
    with Recorder() as seen, raises(error, message):
        yield
    assert not seen.operators


@pytest.fixture
def no_launch(monkeypatch):
    """A launch in Triton's interpreter fails the test."""
    from triton.runtime.interpreter import GridExecutor

    def launch(self, *args, **kwargs):
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(GridExecutor, "__call__", launch)


def test_every_operation_is_called():
    assert set(TORCH.backward) <= set(GOOD) and set(TORCH.backward) <= set(CASES)


@_parametrized({op: rows for op, (_, _, rows) in STACKS.items()})
def test_bad_input_to_a_stack_on_a_cpu(op, changes, error, message):
    precision, weights, _ = STACKS[op]
    assert ops.blocks(precision, ones(2, 3, 4), weights, 2, 0.5, "gelu", 1e-6, 1e-6).shape == (2, 3, 4)
    with raises_first(error, message):
        ops.blocks(precision, *changes.values(), weights, 2, 0.5, "gelu", 1e-6, 1e-6)


@pytest.mark.parametrize("op", GOOD)
def test_good_calls_run_operators(op):
    """What the cases change is the only thing wrong with them, and the recorder sees what runs."""
    with Recorder() as seen:
        out = getattr(ops, op)(**GOOD[op])
    assert seen.operators and torch.isfinite(out).all()


@pytest.mark.interp
@pytest.mark.parametrize("op", GOOD)
def test_good_calls_launch(op, no_launch):
    with vit_fast.backend("triton"), pytest.raises(pytest.fail.Exception, match="a kernel was launched"):
        getattr(ops, op)(**GOOD[op])


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 2, 5], [0, 6]])
def test_sequences_that_do_not_cover_the_tokens(bounds):
    """Seen in eager code on a CPU alone: compiled code does not read the values."""
    with raises(ValueError, "vit_fast.attention: cu_seqlens does not rise from 0 to 5 (the tokens)"):
        ops.attention(ones(1, 5, 24), 2, 0.5, cu_seqlens=tensor(bounds, dtype=int32))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@_parametrized(CASES)
def test_operation(op, changes, error, message, backend):
    with vit_fast.backend(backend), raises_first(error, message):
        getattr(ops, op)(**GOOD[op] | changes)


@pytest.mark.parametrize("scale", [2**63 - 1, -(2**63), 1e30])
def test_the_largest_numbers(scale):
    arguments.check_attention(ones(2, 5, 24), 2, scale)


@pytest.mark.extension
@pytest.mark.usefixtures("cpu_extension")
@_parametrized(CASES)
def test_operation_of_the_library(op, changes, error, message):
    with vit_fast.backend("cpu"), raises_first(error, message):
        getattr(ops, op)(**GOOD[op] | changes)


@pytest.mark.interp
@pytest.mark.parametrize("backend", ["auto", "triton"])
@_parametrized(CASES)
def test_operation_interpreted(op, changes, error, message, backend, no_launch):
    with vit_fast.backend(backend), raises_first(error, message):
        getattr(ops, op)(**GOOD[op] | changes)


@_parametrized(CASES if properties.FULL else {op: rows[::5] for op, rows in CASES.items()})
def test_operation_compiled(op, changes, error, message):
    """Dynamo meets the error while it traces, breaks the graph and lets the error rise from the plain function. The
    texts are those of the eager call, so that every fifth case of an operation does; at VIT_FAST_DEPTH=full all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with raises(error, message):
        torch.compile(getattr(ops, op), backend="eager")(**GOOD[op] | changes)
    assert torch._dynamo.utils.counters["frames"]["total"]


@_parametrized({op: [rows[1], rows[-1]] for op, rows in CASES.items()})
def test_operation_compiled_as_one_graph(op, changes, error, message):
    """With fullgraph dynamo wraps what it meets; the words are there in full."""
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(getattr(ops, op), backend="eager", fullgraph=True)(**GOOD[op] | changes)
    assert message in str(caught.value)


# Backends that are asked for and cannot


@pytest.mark.parametrize("name", ["cuda", "cpu"])
@pytest.mark.parametrize("op", GOOD)
def test_forced_extension(op, name):
    why = {"cuda": "does not run on device type cpu", "cpu": "is not built: run `vit-fast build`"}[name]
    message = f"vit_fast.{op}: backend {name!r} was forced and cannot run: the {name} extension {why}"
    with vit_fast.backend(name), raises_first(UnsupportedError, message):
        getattr(ops, op)(**GOOD[op])


@pytest.mark.parametrize("op", GOOD)
def test_forced_triton_without_interpreter(op):
    pytest.importorskip("triton", reason="Triton is not installed")
    message = f"vit_fast.{op}: backend 'triton' was forced and cannot run: "
    message += "Triton runs CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    with vit_fast.backend("triton"), raises_first(UnsupportedError, message):
        getattr(ops, op)(**GOOD[op])


NOT_FUSED = [
    ("attention", dict(qkv=ones(2, 5, 771), num_heads=1), "head size 257 is above 256"),
    ("attention", dict(qkv=ones(2, 5, 771), num_heads=1, dropout_p=0.1), "head size 257 is above 256"),
]


@pytest.mark.interp
@pytest.mark.parametrize("op, changes, reason", NOT_FUSED)
def test_forced_triton_and_strict_mode(op, changes, reason, no_launch, monkeypatch):
    message = f"vit_fast.{op}: backend 'triton' was forced and cannot run: {reason}"
    with vit_fast.backend("triton"), raises_first(UnsupportedError, message):
        getattr(ops, op)(**GOOD[op] | changes)
    monkeypatch.setattr(select, "_STRICT", "1")
    message = f"vit_fast.{op}: triton cannot run this (VIT_FAST_STRICT=1): {reason}"
    with raises_first(UnsupportedError, message):
        getattr(ops, op)(**GOOD[op] | changes)


BACKENDS = f"expected one of {', '.join(select.names())}"


@pytest.mark.parametrize("word", ["cudnn", "Triton", None, ["torch"]], ids=repr)
def test_backend_word(word):
    with raises(ValueError, f"vit_fast.backend: backend is {word!r}, {BACKENDS}"), vit_fast.backend(word):
        pytest.fail("the block was entered")
    assert select.requested() == "auto"


@pytest.mark.parametrize(
    "variable, word, message",
    [
        ("_ENVIRONMENT", "gpu", f"VIT_FAST_BACKEND: backend is 'gpu', {BACKENDS}"),
        ("_ENVIRONMENT", "", f"VIT_FAST_BACKEND: backend is '', {BACKENDS}"),
        ("_STRICT", "yes", "VIT_FAST_STRICT: value is 'yes', expected 0 or 1"),
    ],
)
@pytest.mark.parametrize("op", GOOD)
def test_environment_word(op, variable, word, message, monkeypatch):
    monkeypatch.setattr(select, variable, word)
    with raises_first(ValueError, message):
        getattr(ops, op)(**GOOD[op])


# Models

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7)
LAYER_NORM = nn.LayerNorm(48)
CLASSES = "gelu, gelu_tanh, quick_gelu, relu, GELU, GELUTanh, QuickGELU, ReLU"
CONSTRUCTOR = [
    (dict(num_heads=4.0), TypeError, "num_heads is 4.0, expected an int"),
    (dict(num_heads=True), TypeError, "num_heads is True, expected an int"),
    (dict(num_heads=0), ValueError, "num_heads is 0, expected 1 or more"),
    (dict(embed_dim=50), ValueError, "num_heads is 4, expected a divisor of embed_dim 50"),
    (dict(num_classes=-1), ValueError, "num_classes is -1, expected 0 or more"),
    (dict(in_chans="3"), TypeError, "in_chans is '3', expected an int"),
    (dict(reg_tokens=-1), ValueError, "reg_tokens is -1, expected 0 or more"),
    (dict(mlp_ratio="4"), TypeError, "mlp_ratio is '4', expected a float"),
    (dict(mlp_ratio=inf), ValueError, "mlp_ratio is inf, expected a finite number"),
    (dict(mlp_ratio=0.001), ValueError, "mlp_ratio is 0.001, expected a hidden width of 1 or more"),
    (dict(drop_rate="0.1"), TypeError, "drop_rate is '0.1', expected a float"),
    (dict(pos_drop_rate=None), TypeError, "pos_drop_rate is None, expected a float"),
    (dict(attn_drop_rate=-0.1), ValueError, "attn_drop_rate is -0.1, expected 0 ≤ rate < 1"),
    (dict(drop_path_rate=[0.0, 0.1]), TypeError, "drop_path_rate is [0.0, 0.1], expected a float"),
    (dict(patch_drop_rate=1), ValueError, "patch_drop_rate is 1, expected 0 ≤ rate < 1"),
    (dict(init_values="1e-5"), TypeError, "init_values is '1e-5', expected a float or None"),
    (dict(init_values=True), TypeError, "init_values is True, expected a float or None"),
    (dict(class_token="no"), TypeError, "class_token is 'no', expected a bool"),
    (dict(dynamic_img_size=448), TypeError, "dynamic_img_size is 448, expected a bool"),
    (dict(qkv_bias=None), TypeError, "qkv_bias is None, expected a bool"),
    (dict(img_size=(32, 32, 3)), ValueError, "img_size has 3 elements, expected an int or a pair"),
    (dict(img_size="32"), TypeError, "img_size is '32', expected an int or a pair of ints"),
    (dict(patch_size=8.0), TypeError, "patch_size is 8.0, expected an int or a pair of ints"),
    (dict(patch_size=64), ValueError, "img_size is 32×32, expected at least one patch of 64×64"),
    (dict(norm_layer=LAYER_NORM), ValueError, f"norm_layer is {LAYER_NORM!r}, expected a LayerNorm class"),
    (dict(norm_layer=nn.GroupNorm), ValueError, f"norm_layer is {nn.GroupNorm!r}, expected a LayerNorm class"),
    (dict(act_layer=["gelu"]), ValueError, f"act_layer is ['gelu'], expected one of {CLASSES}"),
    (dict(act_layer=nn.Mish), ValueError, f"act_layer is {nn.Mish!r}, expected one of {CLASSES}"),
    (
        dict(act_layer="relu", mlp_layer="swiglu"),
        ValueError,
        "act_layer is 'relu', expected SiLU for a SwiGLU MLP",
    ),
    (dict(pos_embed="sincos"), ValueError, "pos_embed is 'sincos', expected 'learn' or 'none'"),
    (
        dict(weight_init="xavier"),
        ValueError,
        "weight_init is 'xavier', expected '', 'jax', 'jax_nlhb', 'moco' or 'skip'",
    ),
    (dict(mean=0.5), TypeError, "mean is float, expected a tuple of floats"),
    (dict(std=ones(3)), TypeError, "std is Tensor, expected a tuple of floats"),
    (dict(mean=("red", 0.5, 0.5)), TypeError, "mean[0] is 'red', expected a float"),
]


@pytest.mark.parametrize("words, error, message", CONSTRUCTOR, ids=["-".join(case[0]) for case in CONSTRUCTOR])
def test_constructor(words, error, message):
    with raises_first(error, f"vit_fast.VisionTransformer: {message}"):
        vit_fast.VisionTransformer(**SMALL | words)


TINY = "vit_tiny_patch16_224"
CREATE = [
    (dict(name=3), TypeError, "name is int, expected a str"),
    (
        dict(name="vit_tiny_patch_224"),
        ValueError,
        "unknown model 'vit_tiny_patch_224'; near: vit_tiny_patch16_224, deit_tiny_patch16_224, vit_tiny_patch16_384, "
        "vit_giant_patch14_224, eva02_tiny_patch14_224; vit_fast.list_models() has them all",
    ),
    (dict(name="regnety_040"), ValueError, "unknown model 'regnety_040'; vit_fast.list_models() has them all"),
    (
        dict(num_class=10),
        TypeError,
        f"unknown argument 'num_class' for {TINY!r}; near: num_classes, no_embed_class, num_heads",
    ),
    (dict(feature_only=True), TypeError, f"unknown argument 'feature_only' for {TINY!r}"),
    (dict(features_only=1), TypeError, "features_only is 1, expected a bool"),
    (
        dict(name="ViT-B/16", features_only=True),
        vit_fast.UnsupportedError,
        "features_only is True, expected False, as 'ViT-B/16' is no VisionTransformer",
    ),
    (dict(out_indices=2), ValueError, "out_indices is 2, expected features_only=True with it"),
    (
        dict(name=f"{TINY}.augreg_in21"),
        ValueError,
        f"unknown tag 'augreg_in21' of {TINY!r}; near: augreg_in21k, augreg_in21k_ft_in1k (timm 1.0.31; pretrained_cfg "
        "takes the dict of another)",
    ),
    (dict(name="ViT-B/16.openai"), ValueError, "unknown tag 'openai' of 'ViT-B/16', which has none"),
    (dict(pretrained_cfg=3), TypeError, "pretrained_cfg is int, expected a tag or a dict"),
    (dict(pretrained_cfg={"mea": 0}), ValueError, "unknown field 'mea' of pretrained_cfg; near: mean"),
    (dict(pretrained_cfg_overlay="mae"), TypeError, "pretrained_cfg_overlay is str, expected a dict"),
    (
        dict(pretrained_cfg_overlay={"crop": 1.0}),
        ValueError,
        "unknown field 'crop' of pretrained_cfg_overlay; near: crop_pct, crop_mode",
    ),
    (
        dict(name="hf-hub:org/name", pretrained_cfg="mae"),
        ValueError,
        "pretrained_cfg is given, expected None, as 'hf-hub:org/name' has its own",
    ),
    (
        dict(name="org/some-model"),
        ValueError,
        "unknown model 'org/some-model'; of the Hugging Face hub: 'hf-hub:org/some-model', of a folder: "
        "'local-dir:org/some-model'; vit_fast.list_models() has them all",
    ),
    (dict(pretrained="tiny.pt"), TypeError, "pretrained is 'tiny.pt', expected a bool; checkpoint_path takes a file"),
    (
        dict(pretrained=True, checkpoint_path="tiny.pt"),
        ValueError,
        "checkpoint_path and pretrained are both given, expected one",
    ),
]


@pytest.mark.parametrize("words, error, message", CREATE, ids=range(len(CREATE)))
def test_create_model(words, error, message):
    with raises_first(error, f"vit_fast.create_model: {message}"):
        vit_fast.create_model(**dict(name=TINY) | words)


@pytest.mark.parametrize("argument", ["filter", "module", "exclude_filters"])
@pytest.mark.parametrize("value", [3, ["*", 3], None])
def test_list_models(argument, value):
    with raises_first(TypeError, f"vit_fast.list_models: {argument} is {value!r}, expected a str or a list of str"):
        vit_fast.list_models(**{argument: value})


def test_create_model_hands_words_on():
    """What a constructor and a weight file refuse comes through unchanged."""
    with raises_first(TypeError, "vit_fast.VisionTransformer: in_chans is '1', expected an int"):
        vit_fast.create_model(TINY, in_chans="1")
    with raises(TypeError, "vit_fast: path of a weight file is int, expected a str or os.PathLike"):
        vit_fast.create_model(TINY, depth=1, weight_init="skip", checkpoint_path=3)


def _small(**words):
    torch.manual_seed(0)
    return vit_fast.VisionTransformer(**SMALL | words).eval()


IMAGES, TOKENS = ones(1, 3, 32, 32), ones(1, 17, 48)
INDICES = "expected an int or a list of ints"
USES = [
    ("forward", [np.ones((1, 3, 32, 32))], TypeError, "images are ndarray, expected a torch.Tensor"),
    ("forward", [ones(3, 32, 32)], ValueError, "images have 3 dimensions, expected 4 [B, 3, H, W]"),
    ("forward", [ones(1, 32, 32, 3)], ValueError, "images have 32 channels, expected 3"),
    ("forward", [ones(1, 1, 32, 32)], ValueError, "images have 1 channels, expected 3"),
    ("forward", [ones(1, 3, 64, 32)], ValueError,
     "images are 64×32, expected 32×32; build with dynamic_img_size=True or call set_input_size"),
    ("pool", [TOKENS, "mean"], ValueError, "pool_type is 'mean', expected a pool it has"),
    ("pool", [TOKENS, "map"], ValueError, "pool_type is 'map', expected a model built with it"),
    ("reset_classifier", [-3], ValueError, "num_classes is -3, expected 0 or more"),
    ("reset_classifier", ["10"], TypeError, "num_classes is '10', expected an int"),
    ("reset_classifier", [3, "cls"], ValueError, "global_pool is 'cls', expected a pool it has"),
    ("set_input_size", ["32"], TypeError, "img_size is '32', expected an int or a pair of ints"),
    ("set_input_size", [None, "8"], TypeError, "patch_size is '8', expected an int or a pair of ints"),
    ("set_input_size", [None, 0], ValueError, "patch_size is 0, expected 1 or more"),
    ("set_input_size", [None, 64], ValueError, "img_size is 32×32, expected at least one patch of 64×64"),
    ("set_input_size", [4], ValueError, "img_size is 4×4, expected at least one patch of 8×8"),
    ("get_intermediate_layers", [IMAGES, 9], ValueError, "9 last layers asked for, expected 1 to 2"),
    ("prune_intermediate_layers", [3], ValueError, "3 last layers asked for, expected 1 to 2"),
    ("prune_intermediate_layers", [[0, 2]], ValueError, "layer 2 asked for, expected 0 to 1"),
    ("get_intermediate_layers", [IMAGES, 1, False, True, False, None, True], ValueError,
     "return_class_token is True, expected return_prefix_tokens=False with it"),
    ("forward", [IMAGES, [[True]]], TypeError, "attn_mask is list, expected a torch.Tensor"),
    ("forward", [IMAGES, ones(17, 17, dtype=int64)], TypeError,
     "attn_mask has dtype torch.int64, expected bool or a float"),
    ("forward", [IMAGES, ones(16, 16)], ValueError,
     "attn_mask has shape (16, 16), expected [B, H, 17, 17] or what broadcasts to it (prefix tokens count)"),
    ("forward", [IMAGES, ones(1, 1, 1, 17, 17)], ValueError,
     "attn_mask has shape (1, 1, 1, 17, 17), expected [B, H, 17, 17] or what broadcasts to it (prefix tokens count)"),
    ("forward", [IMAGES, ones(17, 17), True], ValueError, "attn_mask is given, expected None with is_causal=True"),
    ("forward_intermediates", [IMAGES, [2]], ValueError, "layer 2 asked for, expected 0 to 1"),
    ("forward_intermediates", [IMAGES, "1"], TypeError, f"indices is '1', {INDICES}"),
    ("forward_intermediates", [IMAGES, 1.0], TypeError, f"indices is 1.0, {INDICES}"),
    ("get_attention_maps", [IMAGES, [0.5]], TypeError, f"indices is [0.5], {INDICES}"),
    ("forward_intermediates", [IMAGES, 1, False, False, False, "NHWC"], ValueError,
     "output_fmt is 'NHWC', expected 'NCHW' or 'NLC'"),
]  # fmt: skip


@pytest.mark.parametrize("method, arguments, error, message", USES, ids=[f"{use[0]}{i}" for i, use in enumerate(USES)])
def test_use_of_a_model(method, arguments, error, message):
    model = _small()
    before = model(IMAGES)
    with raises_first(error, f"vit_fast.VisionTransformer: {message}"):
        getattr(model, method)(*arguments)
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize(
    "images, came",
    [
        (ones(1, 3, 32, 32, dtype=int64), f"has dtype torch.int64, {FLOATS}, uint8"),
        (ones(1, 3, 32, 32).to_sparse(), "has layout torch.sparse_coo, expected a dense tensor"),
        (ones(1, 3, 32, 32, device="meta"), "is on meta, expected cpu (as weight)"),
    ],
    ids=["dtype", "layout", "device"],
)
def test_images_that_the_patch_embedding_refuses(images, came):
    with raises(ValueError, f"vit_fast.patch_embed: images {came}"):
        _small()(images)


# Weight files


class Evil:
    """Unpickling this makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _state(**changes):
    state = {key: value.clone() for key, value in _small().state_dict().items()} | changes
    return {key: value for key, value in state.items() if value is not None}


def _safetensors(**changes):
    return lambda path: save_file(_state(**changes), path)


def _bytes(content):
    return lambda path: path.write_bytes(content)


def _pickle(value):
    return lambda path: torch.save(value, path)


def _truncated(path):
    save_file(_state(), path)
    path.write_bytes(path.read_bytes()[:-100])


def _reader(error):
    """The words of the library that reads the format."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


PICKLED = "cannot be read: it is damaged, or holds Python objects, expected tensors alone; nothing in it was executed"
RESAVE = (
    f"{PICKLED}. It names posix.mkdir; where you trust it, save its tensors alone: checkpoint = torch.load(PATH, "
    "weights_only=False); torch.save(checkpoint['state_dict'], 'weights.pth'), with the key that holds them"
)
EIGHT = ", ".join(f"blocks.0.{name}" for name in (
    "attn.proj.bias", "attn.proj.weight", "attn.qkv.bias", "attn.qkv.weight",
    "mlp.fc1.bias", "mlp.fc1.weight", "mlp.fc2.bias", "mlp.fc2.weight",
))  # fmt: skip
ENDINGS = ".safetensors, .pt, .pth, .bin, .tar, .npz, .ckpt, .index.json"
NO_ARCHIVE = "cannot be read: it is no archive of arrays"
FILES = [
    ("absent.pt", lambda path: None, "does not exist"),
    ("folder.pt", lambda path: path.mkdir(), "is a directory"),
    ("weights.h5", _bytes(b"x"), f"ends in '.h5', expected one of {ENDINGS}"),
    ("weights", _bytes(b"x"), f"ends in '', expected one of {ENDINGS}"),
    ("empty.pt", _bytes(b""), "cannot be read: it is empty"),
    ("empty.safetensors", _bytes(b""), "cannot be read: it is empty"),
    ("truncated.safetensors", _truncated, _reader),
    ("header.safetensors", _bytes(struct.pack("<Q", 2**63) + b"{}"), _reader),
    ("pointer.safetensors", _bytes(b"version https://git-lfs.github.com/spec/v1\n"), _reader),
    ("text.pt", _bytes(b"hello"), _reader),
    ("cut.npz", _bytes(b"PK\x03\x04"), NO_ARCHIVE),
    ("pointer.npz", _bytes(b"version https://git-lfs.github.com/spec/v1\n"), NO_ARCHIVE),
    ("objects.npz", lambda path: np.savez(path, head=np.array([{}], dtype=object)), _reader),
    ("page.bin", _bytes(b"<!doctype html>"), PICKLED),
    ("code.pt", lambda path: torch.save({"head.weight": Evil(path.with_name("executed"))}, path), RESAVE),
    ("list.pt", _pickle([1, 2]), "holds no state_dict of tensors, but a list"),
    (
        "trainer.pt",
        _pickle({"epoch": 3, "net": {}}),
        "holds no state_dict of tensors, but epoch, net; where 'net' is the state_dict, save or pass it alone",
    ),
    ("numbered.pt", _pickle({1: ones(1)}), "holds no state_dict of tensors, but 1"),
]
MISFITS = [
    ({"norm.weight": None, "head.bias": None}, "missing head.bias, norm.weight"),
    ({"fc.weight": ones(1)}, "unexpected fc.weight"),
    ({"head.weight": ones(48, 7)}, "wrong shape head.weight (48, 7) instead of (7, 48)"),
    ({"pos_embed": ones(1, 17, 32)}, "wrong shape pos_embed (1, 17, 32) instead of (1, 17, 48)"),
    ({"head.weight": ones(7, 48, dtype=int32)}, "wrong dtype head.weight torch.int32 instead of torch.float32"),
    (
        {"cls_token": None, "reg_token": ones(1, 4, 48), "norm.bias": ones(47)},
        "missing cls_token; unexpected reg_token; wrong shape norm.bias (47,) instead of (48,)",
    ),
    (dict.fromkeys(_state()) | {"a": ones(1)}, f"missing {EIGHT} and 24 more; unexpected a"),
]


@contextmanager
def _unchanged(model):
    before = _state()
    yield
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name, write, message", FILES, ids=[row[0] for row in FILES])
def test_weight_file(tmp_path, name, write, message):
    path, model = tmp_path / name, _small()
    write(path)

    def words(cause):
        came = f"cannot be read: {message(cause)}" if callable(message) else message.replace("PATH", repr(str(path)))
        return f"vit_fast: weight file {str(path)!r} {came}"

    with _unchanged(model), raises(vit_fast.WeightsError, words):
        checkpoints.load_checkpoint(model, path)
    assert not (tmp_path / "executed").exists()


def test_code_in_a_file_is_code(tmp_path):
    """The counterpart: a plain load executes what the reader refuses."""
    torch.save(Evil(tmp_path / "executed"), tmp_path / "code.pt")
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("changes, message", MISFITS, ids=range(len(MISFITS)))
def test_weights_that_do_not_fit(tmp_path, changes, message):
    model = _small()
    _safetensors(**changes)(tmp_path / "weights.safetensors")
    with _unchanged(model), raises(vit_fast.WeightsError, f"vit_fast: weights do not fit VisionTransformer: {message}"):
        checkpoints.load_checkpoint(model, tmp_path / "weights.safetensors")


def test_position_embedding_of_no_grid(tmp_path):
    path, model = tmp_path / "weights.safetensors", _small()
    _safetensors(pos_embed=ones(1, 12, 48))(path)
    message = f"vit_fast: pos_embed of {str(path)!r} does not fit: table has 12 rows, "
    with (
        _unchanged(model),
        raises(vit_fast.WeightsError, message + "expected 1 prefix rows and a square, or old_grid=(rows, columns)"),
    ):
        checkpoints.load_checkpoint(model, path)


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "state is NoneType, expected a state_dict of tensors"),
        ("weights.pt", "state is str, expected a state_dict of tensors"),
        ({"cls_token": np.ones((1, 1, 48))}, "cls_token of the state is ndarray, expected a torch.Tensor"),
    ],
    ids=["none", "path", "array"],
)
def test_state_dict_type(state, message):
    model = _small()
    with _unchanged(model), raises(TypeError, f"vit_fast: {message}"):
        checkpoints.load_state_dict(model, state)
