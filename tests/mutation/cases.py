"""Kill suites: for each file of kernels/ a function of small cases, at least one of which must fail for every mutant.

Most of them are the tests of tests/kernels/test_<operation>.py on small shapes, which run quickly: tails in every
direction, several images, heads, programs and steps, every dtype, option and layout. ``run.py`` calls them in
Triton's interpreter under the memory sanitizer. The cheapest cases, and those that fail first, come first.
"""

import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import test_attention
import test_attention_bwd
import test_attention_options
import test_errors
import test_fp8_blocks
import test_large_offsets
import test_layer_norm
import test_layernorm_mlp
import test_linear
import test_patch_embed
import test_prepared_blocks
import torch
import triton
import triton.language as tl
from stand_ins import Recorder, device_is_made_current, equal
from support import packed_blocks, sanitizer
from support.large_tensors import last_programs_alone, reserved
from support.matmul_precision import matmul_precision
from support.prepared_blocks import block as whole_block
from vit_fast.kernels import activations as activations_module
from vit_fast.kernels import arguments as arguments_module
from vit_fast.kernels import attention as attention_kernels
from vit_fast.kernels import attention_bwd as attention_bwd_kernels
from vit_fast.kernels import configs as configs_module
from vit_fast.kernels import folding, reference
from vit_fast.kernels import fp8_blocks as fp8_blocks_kernels
from vit_fast.kernels import gemm as gemm_kernels
from vit_fast.kernels import launch as launch_kernels
from vit_fast.kernels import layer_norm as layer_norm_kernels
from vit_fast.kernels import layernorm_mlp as layernorm_mlp_kernels
from vit_fast.kernels import linear as linear_kernels
from vit_fast.kernels import patch_embed as patch_embed_kernels
from vit_fast.kernels import prepared_blocks as prepared_blocks_kernels
from vit_fast.kernels.arguments import MAX_ROWS, UnsupportedError
from vit_fast.kernels.block_options import PLAIN
from vit_fast.kernels.configs import LayerNormConfig, LinearConfig, PatchEmbedConfig

import vit_fast

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)


def refuses_too_many_rows(call):
    with pytest.raises(UnsupportedError, match=f"{2**31} rows, expected at most {MAX_ROWS} in one call"):
        call(2**31)


def arguments():
    """Every bad input of tests/kernels/test_errors.py raises its message; valid inputs pass."""
    with vit_fast.backend("torch"):
        for op, changes in _right_arguments():
            getattr(vit_fast.ops, op)(**test_errors.GOOD[op] | changes)
        for op, rows in test_errors.CASES.items():
            for changes, error, message in rows:
                try:
                    getattr(vit_fast.ops, op)(**test_errors.GOOD[op] | changes)
                except Exception as came:
                    assert type(came).__name__ == error.__name__ and str(came) == f"vit_fast.{op}: {message}"
                else:
                    raise AssertionError(f"{op} takes {list(changes)}")
    branch = dict(row_scale=None, norm="layer", inner_norm=None, dropout_p=0.0, seed=None)
    arguments_module.check_layernorm_mlp(**test_errors.GOOD["layernorm_mlp"], **branch)
    _packed_widths()
    _wrong_tables()
    for scale in (2**63 - 1, -(2**63), 1e30):
        arguments_module.check_attention(torch.ones(2, 5, 24), 2, scale)
    _block_options()
    _kept_samples()
    arguments_module.check_rows("linear", 2**31 - 256)
    with pytest.raises(RuntimeError, match=r"vit_fast.linear: 2147483393 rows, expected at most 2147483392"):
        arguments_module.check_rows("linear", 2**31 - 255)


def _wrong_tables():
    """Bounds of sequences that do not rise to the tokens, and tables of rotary embedding with an axis too many."""
    check, ones = arguments_module.check_attention, torch.ones
    check(ones(2, 5, 24), 2, 0.5, rope=(ones(5, 4), ones(5, 4)))  # by default there is no prefix
    on_meta = torch.empty(2, dtype=torch.int32, device="meta")
    check(ones(1, 5, 24, device="meta"), 2, 0.5, cu_seqlens=on_meta)  # their values cannot be seen
    for bounds in ([1, 5], [0, 4], [0, 4, 2, 5]):
        with pytest.raises(ValueError, match="cu_seqlens does not rise from 0 to 5"):
            check(ones(1, 5, 24), 2, 0.5, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for shape in ((4,), (1, 1, 1, 5, 4)):
        with pytest.raises(ValueError, match="rope cos has shape"):
            check(ones(2, 5, 24), 2, 0.5, rope=(ones(shape), ones(5, 4)))


def _block_options():
    """The options of prepared blocks are held to x and named with the operation."""
    x, bias = torch.zeros(2, 5, 48), torch.zeros(1, 3, 5, 5)
    check = partial(arguments_module.check_block_options, "prepared_blocks", x, 3)
    check(PLAIN), check(PLAIN._replace(bias=bias))
    with pytest.raises(ValueError, match=r"vit_fast.prepared_blocks: bias has shape \[1, 3, 5, 4\]"):
        check(PLAIN._replace(bias=bias[..., :4]))
    with pytest.raises(ValueError, match=r"vit_fast.prepared_blocks: key_lengths has 3 elements"):
        check(PLAIN._replace(key_lengths=torch.ones(3, dtype=torch.int64)))
    check(PLAIN._replace(q_norm=(torch.ones(16), None, 1e-6)))
    with pytest.raises(ValueError, match=r"vit_fast.prepared_blocks: q_norm weight has 17 elements, expected 16"):
        check(PLAIN._replace(q_norm=(torch.ones(17), None, 1e-6)))


def _kept_samples():
    """keep_samples and dropout take the same but for a number without axes."""
    x, seed = torch.zeros(3, 2), torch.tensor([5])
    for op in ("keep_samples", "dropout"):
        _kept_samples_of(op, getattr(arguments_module, f"check_{op}"), x, seed)
    arguments_module.check_dropout(x[0, 0], 0.5, seed)
    with pytest.raises(ValueError, match=r"vit_fast.keep_samples: x has 0 dimensions"):
        arguments_module.check_keep_samples(x[0, 0], 0.5, seed)


def _kept_samples_of(op, check, x, seed):
    check(x, 0.0, None), check(x, 0.5, seed), check(x[0], 0, seed)
    for wrong, error, text in (
        ((3, 0.5, seed), TypeError, "x is int"), ((x, True, seed), TypeError, "p is bool"),
        ((x, "half", seed), TypeError, "p is str"), ((x, 1.0, seed), ValueError, "p is 1.0"),
        ((x, -0.1, seed), ValueError, "p is -0.1"), ((x, 0.5, seed.int()), ValueError, "seed has dtype torch.int32"),
        ((x, 0.5, torch.tensor([5, 6])), ValueError, r"seed has shape \[2\]"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"vit_fast.{op}: {text}"):
            check(*wrong)


def _packed_widths():
    """Packed weights take tokens of their own width alone."""
    weights = {
        name: pack([whole_block(48, 64, "gelu", FLOAT32)], "gelu")
        for name, pack in (("packed_blocks", packed_blocks.packed), ("int8_blocks", packed_blocks.quantised))
    }
    for name, tensors in weights.items():
        check = getattr(arguments_module, f"check_{name}")
        check(torch.zeros(1, 2, 48), tensors)
        with pytest.raises(ValueError, match=f"vit_fast.{name}: x is on meta, expected cpu"):
            check(torch.zeros(1, 2, 48, device="meta"), tensors)
        with pytest.raises(ValueError, match=f"vit_fast.{name}: x has 2 dimensions"):
            check(torch.zeros(2, 48), tensors)
        for width in (16, 44, 52):
            with pytest.raises(ValueError, match=f"vit_fast.{name}: x has width {width}"):
                check(torch.zeros(1, 2, width), tensors)


def _right_arguments():
    """(operation, differences from test_errors.GOOD): valid arguments at the limits."""
    ones, norm = torch.ones, (torch.ones(4), torch.ones(4), 0.0)
    some = dict(qkv=ones(2, 5, 8), k=ones(2, 3, 8), v=ones(2, 3, 8))
    for op in test_errors.GOOD:
        yield op, {}
    for changes in (
        dict(qkv=ones(1, 1, 3), num_heads=1, scale=1), dict(qkv=ones(2, 5, 6), num_heads=np.int64(2)),
        dict(bias=ones(1, 2, 1, 5)), dict(bias=ones(2, 2, 5, 5)), dict(key_lengths=torch.tensor([5, 3])), some,
        some | dict(bias=ones(2, 2, 5, 3)), dict(q_norm=norm, k_norm=(torch.ones(4), None, 1e-6)),
        dict(qkv=ones(2, 5, 3), k=ones(2, 5, 3), v=ones(2, 5, 3), num_heads=1), dict(scale=np.float32(0.5)),
        dict(qkv=ones(2, 5, 2), k=ones(2, 1, 2), v=ones(2, 1, 2), num_heads=2),
        dict(qkv=ones(2, 5, 1), k=ones(2, 1, 1), v=ones(2, 1, 1), num_heads=1), some | dict(v=ones(2, 3, 4)),
        dict(rope=(ones(5, 4), ones(2, 1, 5, 4)), rope_layout="interleaved", norm="rms"), dict(num_prefix=5),
        dict(rope=(ones(2, 4, 4), ones(2, 2, 4, 4)), num_prefix=1), some | dict(num_prefix=5),
        dict(rel_pos=(ones(2, 2, 5, 5), ones(2, 2, 5, 1))), dict(key_lengths=torch.tensor([0, 9], dtype=torch.int32)),
        dict(qkv=ones(1, 5, 24), cu_seqlens=torch.tensor([0, 0, 5], dtype=torch.int32)),
        dict(qkv=ones(1, 5, 24), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
        dict(qkv=ones(2, 6, 24), rel_pos=(ones(2, 2, 6, 2), ones(2, 2, 6, 3))),
    ):  # fmt: skip
        yield "attention", changes
    yield "layer_norm", dict(x=ones(1, 1), weight=ones(1), bias=ones(1), eps=0.0)
    yield "layer_norm", dict(norm="rms")
    for activation, rows in (("swiglu", 8), ("swiglu", 2), ("gelu", 7), (None, 7)):
        yield "layer_norm_linear", dict(weight=ones(rows, 4), bias=ones(rows), activation=activation)
    yield "linear_residual", dict(x=ones(2, 4), residual=ones(2, 8), row_scale=None)
    yield "layernorm_mlp", dict(x=ones(2, 4))
    for dtype in DTYPES:
        weights = [weight.to(dtype) for weight in test_errors.GOOD["prepared_blocks"]["weights"]]
        yield "prepared_blocks", dict(x=ones(1, 2, 4).to(dtype).transpose(0, 1), weights=weights)
    folded = test_prepared_blocks.prepared([test_prepared_blocks.block(4, 8, "gelu", FLOAT16)])
    yield "prepared_blocks", dict(x=ones(2, 3, 4).half(), weights=folded)
    for dtype in (FLOAT16, BFLOAT16):
        yield "fp8_blocks", dict(x=ones(1, 2, 4).to(dtype).transpose(0, 1))
    oblong = dict(images=ones(2, 3, 8, 12), weight=ones(8, 3, 4, 6))
    for changes in (
        oblong | dict(stride=[2, 6], pos_embed=ones(1, 6, 8)), oblong | dict(stride=(4, 3), pos_embed=ones(1, 6, 8)),
        oblong | dict(images=ones(2, 3, 4, 12), stride=6, pos_embed=ones(1, 2, 8)),
        dict(prefix_tokens=ones(2, 3, 8)), dict(prefix_tokens=None, pos_embed=None), dict(mean=None, std=None),
        dict(images=ones(1, 3, 4, 4), pos_embed=ones(1, 1, 8)), dict(images=ones(1, 3, 4, 8), pos_embed=ones(1, 2, 8)),
    ):  # fmt: skip
        yield "patch_embed", changes


def launch():
    """The helpers of ``launch``, called directly and through the smallest kernels."""
    kernels = launch_kernels
    _row_layouts(kernels)
    _dtypes_and_devices(kernels)
    _pdl(kernels)
    for view in test_layer_norm.LAYOUTS.values():
        x = view(test_layer_norm.problem((3, 8, 48), FLOAT32, mean=2.0)[0])
        expected = layer_norm_kernels.layer_norm(x.contiguous(), None, None, 1e-6)
        assert torch.equal(layer_norm_kernels.layer_norm(x, None, None, 1e-6), expected)
    for width in (64, 16):
        test_layer_norm.test_offsets_beyond_two_to_the_31(layer_norm_kernels, width)


def _pdl(kernels):
    """Options of a launch with PDL, and the kernel's wait, neither of which the interpreter implements."""
    done = []
    with mock.patch.multiple(
        kernels, gdc_launch_dependents=lambda: done.append("let go"), gdc_wait=lambda: done.append("wait")
    ):
        kernels.pdl_wait.fn(False)
        assert not done
        kernels.pdl_wait.fn(True)
    assert done == ["let go", "wait"]
    assert kernels.options(False, 8, num_stages=3) == dict(PDL=False, num_warps=8, num_stages=3)
    assert kernels.options(True, 4) == dict(PDL=True, num_warps=4, launch_pdl=True)


def _row_layouts(kernels):
    x = torch.zeros(4, 5, 6, 8)
    for view, wanted in (
        (x, (False, 0, 0, 8)),
        (x[:1, :1, :1], (False, 0, 0, 8)),
        (x[..., :4], (False, 0, 0, 8)),
        (x[:, 1:], (True, 24, 240, 8)),
        (x[:, :, 2:], (True, 4, 48, 8)),
        (x[:1, :1, :1, ::2], (False, 0, 0, 0)),
        (x.transpose(2, 3), (True, 8, 48, 1)),
    ):
        rows, *layout = kernels.row_layout(view)
        assert rows is view and tuple(layout) == wanted, (layout, wanted)
    assert kernels.row_layout(torch.zeros(2, 4, 5, 6, 8)[:, :, :, 2:])[1:] == (True, 4, 48, 8)
    copy, *layout = kernels.row_layout(x.permute(1, 0, 2, 3))
    assert copy.is_contiguous() and tuple(layout) == (False, 0, 0, 8)
    for view, wanted in (
        (x, 8),
        (x[:, 1:], None),
        (x[0, :, 2:], None),
        (x[:, 0, 0], 240),
        (x[:, 0], None),
        (x[:1, :1, :1], 8),
        (x[0, 0], 8),
    ):
        assert kernels.row_stride(view) == wanted
    assert kernels.row_stride(x[:1, :1, 1, :4]) == 4
    memory = torch.zeros(4096, dtype=FLOAT16)
    memory = memory[-memory.data_ptr() % 64 // 2 :]
    for offset, steps, wanted in (
        (0, (64, 64), 16), (0, (64, 72), 16), (0, (64, 68), 8), (0, (66, 64), 4), (1, (64, 64), 2), (0, (63, 64), 2),
        (8, (64, 64, 64), 16), (0, (64, 64, 66), 4), (0, (), 16),
    ):  # fmt: skip
        assert kernels.vector_bytes(memory[offset:], *steps) == wanted
    assert kernels.vector(None) is None and kernels.vector(memory) is memory
    assert kernels.vector(memory[::2]).is_contiguous()


def _dtypes_and_devices(kernels):
    assert [kernels.stat_dtype(dtype) for dtype in DTYPES] == [FLOAT32] * 3 + [FLOAT64]
    found = [str(kernels.accumulator(*dtypes)) for dtypes in ((FLOAT16, FLOAT32), (FLOAT32, FLOAT64))]
    assert found == ["fp32", "fp64"]
    for word, wanted in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        with matmul_precision(word):
            assert kernels.dot_precision() == wanted
    cpu, meta, double = torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), torch.zeros(2, dtype=FLOAT64)
    assert kernels.device_reasons(double) == []
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert kernels.device_reasons(cpu, None) == ["tensors on cpu, Triton kernels need a CUDA device"]
        assert kernels.device_reasons(cpu, meta)[0].startswith("tensors on cpu, meta,")
        assert len(kernels.device_reasons(None, double, None)) == 2
        fake = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=FLOAT32)
        assert kernels.device_reasons(fake, None) == []
        with mock.patch.object(torch.cuda, "device", lambda device: device):
            assert kernels.device_guard(fake) is fake.device


def layer_norm():
    kernels, module = layer_norm_kernels, test_layer_norm
    block, loop = LayerNormConfig(4, 64, 4), LayerNormConfig(1, 16, 4)
    for config, shape in ((block, (2, 3, 40)), (loop, (1, 3, 20))):
        module.check(kernels, *module.problem(shape, FLOAT32, mean=2.0), eps=0.1, config=config)
        for dtype in DTYPES[1:]:
            module.check(kernels, *module.problem(shape, dtype, mean=2.0), config=config)
        for weight, bias in ((True, False), (False, True)):
            module.check(kernels, *module.problem(shape, FLOAT16, weight, bias), config=config)
        module.check(kernels, *module.problem(shape, FLOAT16, side_dtype=FLOAT32), out_dtype=BFLOAT16, config=config)
        module.check(kernels, *module.problem(shape, FLOAT32, side_dtype=FLOAT64), out_dtype=FLOAT64, config=config)
        module.check(kernels, *module.problem(shape, FLOAT32, mean=2.0), eps=0.1, config=config, norm="rms")
    with np.errstate(divide="raise"):
        module.check(kernels, *module.problem((2, 3, 40), FLOAT32), config=block)
    _layer_norm_launches(kernels)
    for view in module.LAYOUTS.values():
        x = view(module.problem((3, 8, 48), FLOAT32, mean=2.0)[0])
        weight, bias = torch.randn(2, x.shape[-1]).t().contiguous().unbind(1)
        expected = kernels.layer_norm_fwd(x.contiguous(), weight.contiguous(), bias.contiguous(), 1e-6)
        equal(kernels.layer_norm_fwd(x, weight, bias, 1e-6), expected)
    for view in (lambda x: x[:, 1:], lambda x: x.transpose(1, 2)):
        module.check(kernels, view(torch.randn(2, 3, 20)), None, None, config=loop)
    for width, config in ((64, block), (16, loop)):
        module.test_offsets_beyond_two_to_the_31(kernels, width)
        x, weight, bias = module.problem((2, 40), FLOAT32, mean=1e4)
        module.check(kernels, x, weight, bias, config=config)
        module.test_far_means(kernels, 1e6, 1.0, 16 * width if config is block else 128)
        module.test_constant_rows_give_the_bias(kernels, 1e6 + 1 / 3, 16 * width if config is block else 128)
    module.test_a_bad_row_stays_alone(kernels, math.nan)
    module.test_nothing_to_do(kernels, (2, 0, 48))
    _layer_norm_reasons(kernels)
    _row_partials(kernels, module)
    _row_statistics(kernels, module)
    for shape in ((3, 7, 48), (1, 2, 16385)):
        test_fp8_blocks.test_layer_norm_rounds_once(shape, BFLOAT16)
    _layer_norm_pdl(kernels)


def _layer_norm_pdl(kernels):
    """Which kernels are launched with PDL, which the interpreter does not implement."""
    recorder, x, loop = Recorder(), torch.randn(5, 64), LayerNormConfig(1, 32, 8)
    with mock.patch.multiple(
        kernels, _layer_norm_fwd_kernel=recorder, _layer_norm_wide_fwd_kernel=recorder, _row_partials_kernel=recorder
    ):
        for config in (None, loop):
            kernels.layer_norm(x, None, None, 1e-6, None, config)
            kernels.layer_norm(x, None, None, 1e-6, None, config, pdl=True)
            kernels.layer_norm_fwd(x, None, None, 1e-6, None, config)
        kernels.row_partials(x)
        kernels.row_partials(x, pdl=True)
    found = [launch.PDL for launch in recorder.launches]
    assert found == [False, True, False] * 2 + [False, True]
    assert {launch.num_warps for launch in recorder.launches[3:6]} == {8}


def _row_partials(kernels, module):
    for dtype in DTYPES:
        for shape in ((2, 3, 100), (5, 1)):  # the sum of the first rows is beyond float16
            module.test_row_partials(kernels, shape, 1000.0, dtype)
    for layout in ("class token", "axes swapped", "channels first", "three strides"):
        module.test_row_partials_of_any_layout(kernels, layout)
    x = torch.randn(3, 5, 16).half()
    expected = kernels.row_partials(x).values
    memory = reserved(16 * (2**27 + 2**24), dtype=FLOAT16)
    for strides in ((2**30 + 64, 16, 1), (80, 2**29 + 64, 1), (5, 1, 2**27 + 2**24)):
        far = torch.as_strided(memory, x.shape, strides).copy_(x)
        assert torch.equal(kernels.row_partials(far).values, expected)
    assert torch.equal(kernels.row_partials(x[1, 2]).values, expected[..., 7:8])
    with last_programs_alone():
        test_large_offsets.test_row_partials(None)
    with np.errstate(divide="raise"):
        kernels.row_partials(x, LayerNormConfig(4, 64, 4))
    recorder = Recorder()
    with mock.patch.object(kernels, "_row_partials_kernel", recorder):
        for partials, part in (
            (kernels.row_partials(x), 16), (kernels.row_partials(x.double(), LayerNormConfig(2, 64, 8)), 64),
            (kernels.row_partials(x[:0]), 16),
        ):  # fmt: skip
            assert partials.width == part and partials.values.shape[:2] == (2, 1)
    found = [(n.grid, n.BLOCK, n.ROWS, n.num_warps, str(n.ACC)) for n in recorder.launches]
    assert found == [((1,), 16, 256, 4, "fp32"), ((8,), 64, 2, 8, "fp64")]
    launch = device_is_made_current(
        kernels, "_row_partials_kernel", lambda: kernels.row_partials(torch.empty(2, 5, 48, device="cuda"))
    )
    assert launch.args[0].device.type == "cuda"
    wide = torch.zeros(2, 16385, device="meta")
    assert kernels.row_partials_not_supported_reasons(wide) == ["width 16385 is above 16384"]
    assert kernels.row_partials_not_supported_reasons(wide[:, 1:]) == []
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert len(kernels.row_partials_not_supported_reasons(wide)) == 2
        assert len(kernels.row_partials_not_supported_reasons(wide[:, 1:])) == 1


def _row_statistics(kernels, module):
    """Merged partials: far rows, more partials than are merged at a time, a narrower last one, constant rows."""
    for width, part, dtype in ((1040, 16, FLOAT32), (147, 16, FLOAT64), (33, 33, FLOAT32), (600, 64, FLOAT32)):
        for mean, spread in ((0.0, 1.0), (1e5, 0.1)):
            module.test_row_statistics(kernels, width, part, mean, spread, dtype)
    module.test_row_statistics_of_constant_rows(kernels)
    recorder, values = Recorder(), torch.zeros(2, 6, 257)
    with mock.patch.object(kernels, "_row_statistics_kernel", recorder):
        for part, pdl in ((128, False), (20, True)):
            found = kernels.row_statistics(kernels.RowPartials(values, part), 100, 0.5, pdl=pdl).values
            assert found.shape == (2, 257) and found.dtype == FLOAT32
        assert kernels.row_statistics(kernels.RowPartials(values[..., :0], 20), 100, 0.5).values.shape == (2, 0)
    found = [
        (n.grid, n.PARTIAL_WIDTH, n.PARTIALS_PER_STEP, n.PDL, n.ROWS, n.num_warps, str(n.ACC))
        for n in recorder.launches
    ]
    assert found == [((3,), 128, 1, False, 128, 4, "fp32"), ((3,), 20, 8, True, 128, 4, "fp32")]
    for parts, steps in ((1, 1), (2, 2), (3, 4), (31, 32), (33, 32)):
        assert kernels.partials_per_step(parts * 16 - 1, 16) == steps
    launch = device_is_made_current(
        kernels,
        "_row_statistics_kernel",
        lambda: kernels.row_statistics(kernels.RowPartials(torch.empty(2, 1, 5, device="cuda"), 16), 16, 1e-6),
    )
    assert launch.args[0].device.type == "cuda"


def _layer_norm_launches(kernels):
    """Launch options that cannot change the interpreter's result."""
    block, loop = Recorder(), Recorder()
    x, wide = torch.randn(5, 64), torch.randn(64).double()
    with mock.patch.multiple(kernels, _layer_norm_fwd_kernel=block, _layer_norm_wide_fwd_kernel=loop):
        kernels.layer_norm(x, None, None, 1e-6, config=LayerNormConfig(2, 64, 4))
        kernels.layer_norm(x, wide, None, 1e-6, config=LayerNormConfig(1, 32, 4))
        kernels.layer_norm_fwd(x, None, wide, 1e-6)
        kernels.layer_norm(x[:0], None, None, 1e-6)
    found = [(n.grid, n.BLOCK, str(n.ACC), n.args[1] is None) for n in (*block.launches, *loop.launches)]
    assert found == [((3,), 64, "fp32", True), ((1,), 64, "fp64", False), ((5,), 32, "fp64", True)]


def _layer_norm_reasons(kernels):
    wide = torch.zeros(2, kernels.MAX_WIDTH + 1, device="meta")
    assert kernels.MAX_WIDTH == 65536
    assert kernels.not_supported_reasons(wide[:, 1:], None, None, 1e-6) == []
    assert kernels.not_supported_reasons(wide, None, None, 1e-6) == ["width 65537 is above 65536"]


def activations():
    kernels, module = linear_kernels, test_linear
    tiny = LinearConfig(16, 32, 16, 2, 4, 2, False)
    module.test_activation_curves(kernels, "gelu", BFLOAT16)
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "relu"):
        module.test_activation_curves(kernels, activation, FLOAT16)
        for dtype in (FLOAT32, FLOAT64):
            module.check(kernels, *module.problem((1, 7, 40), 48, dtype), activation, config=tiny)
    assert kernels.linear(torch.full((1, 1), -30.0), torch.ones(1, 1), None, "quick_gelu") < 0
    for dtype in DTYPES:
        module.check(kernels, *module.problem((2, 11, 40), 72, dtype), "swiglu", config=tiny)
    _slopes()


@triton.jit
def _slopes_kernel(value_ptr, slope_ptr, z_ptr, N: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    index = tl.arange(0, N)
    value, slope = activations_module.activate_and_derive(tl.load(z_ptr + index), ACTIVATION, EXACT)
    tl.store(value_ptr + index, value)
    tl.store(slope_ptr + index, slope)


def _slopes():
    """Each activation and its derivative, exactly and in fp16 precision; NaN stays NaN."""
    z = torch.cat([torch.linspace(-9, 9, 1023), torch.tensor([float("nan")])])
    wide = z.double()
    for name in (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
        expected = reference.activate(wide, name), reference.activate_bwd(torch.ones_like(wide), wide, name)
        for exact in (True, False):
            found = torch.empty_like(z), torch.empty_like(z)
            _slopes_kernel[(1,)](*found, z, 1024, name, exact)
            for one, other in zip(found, expected):
                allowed = 1e-6 if exact else 5e-5
                assert ((one - other)[:-1].abs() <= allowed * (1 + other[:-1].abs())).all(), (name, exact)
                assert one[-1].isnan() == other[-1].isnan(), (name, exact)


def gemm():
    """The GEMM, through the public functions of ``linear``."""
    kernels, module = linear_kernels, test_linear
    tiny, tma = LinearConfig(16, 32, 16, 2, 4, 2, False), LinearConfig(16, 32, 16, 3, 4, 2, True)
    _fp8_linear(kernels, module)
    _folded_linear(kernels, module, tiny, tma)
    _linear_partials(kernels, module, tiny, tma)
    for dtype in DTYPES:
        for tiles in (tiny, tma):
            module.check(kernels, *module.problem((2, 11, 40), 72, dtype), "swiglu", config=tiles)
            x, weight, bias = module.problem((3, 7, 40), 48, dtype)
            gamma, residual, row_scale = module.branch(x.shape, 48, dtype)
            module.check(kernels, x, weight, bias, config=tiles, gamma=gamma, residual=residual, row_scale=row_scale)
    _linear_launches(kernels, module)
    _split_k(kernels, module)
    weight = torch.empty(16, 1, device="meta")
    refuses_too_many_rows(lambda rows: kernels.linear(torch.empty(rows, 1, device="meta"), weight, None))
    for activation in ("gelu", "relu"):
        for dtype in (FLOAT16, FLOAT32):
            module.check(kernels, *module.problem((1, 7, 40), 48, dtype), activation, config=tiny)
    module.check(kernels, *module.problem((1, 40, 16), 48, FLOAT32), config=tiny)
    module.check(kernels, *module.problem((1, 1, 40), 48, FLOAT32), config=tiny)
    x, weight, bias = module.problem((3, 2, 5, 40), 96, FLOAT32)
    gamma, residual, row_scale = module.branch((3, 2, 48, 8), 5, FLOAT32)
    options = {"gamma": torch.rand(48), "residual": residual.transpose(2, 3)[:, :, 1:], "row_scale": row_scale}
    for vector in (bias, None):
        out = kernels.linear(x[:, :, 1:], weight, vector, "swiglu", config=tiny, **options)
        wanted = module.formula(x[:, :, 1:], weight, vector, "swiglu", **options)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    for layout in ("without the class token", "transposed channels", "expanded rows"):
        module.test_layouts_of_x_and_residual(kernels, layout, tiny)
    for layout in ("transposed", "every other column", "every other row"):
        module.test_layouts_of_the_weight(kernels, layout, "swiglu", tiny)
    module.test_offsets_beyond_two_to_the_31(kernels)
    _far_linear(kernels, tiny)
    for size in (33, 34, 36):
        for stride in (1, 2, 4):
            x, weight, bias = module.problem((2, 3, size * stride), size, FLOAT16)
            module.check(kernels, x[..., :size], weight[:, :size], bias, residual=x[..., -size:], config=tiny)
    for mixed in ((FLOAT32, BFLOAT16, FLOAT32, FLOAT32), (BFLOAT16, FLOAT32, BFLOAT16, FLOAT32)):
        module.test_mixed_dtypes(kernels, *mixed)
    module.test_a_float64_residual(kernels, BFLOAT16)


def linear():
    """The public functions: what each passes to ``gemm``, and the reasons for refusing a call."""
    kernels, module = linear_kernels, test_linear
    tiny, tma = LinearConfig(16, 32, 16, 2, 4, 2, False), LinearConfig(16, 32, 16, 3, 4, 2, True)
    x, weight, bias = module.problem((3, 7, 40), 48, FLOAT16)
    gamma, residual, row_scale = module.branch(x.shape, 48, FLOAT16)
    module.check(kernels, x, weight, bias, config=tiny, gamma=gamma, residual=residual, row_scale=row_scale)
    module.check(kernels, x, weight, bias, "gelu", config=tiny)
    out = kernels.linear_residual(x, weight, bias, gamma, residual, row_scale=row_scale, config=tiny)
    whole = kernels.linear(x, weight, bias, gamma=gamma, residual=residual, row_scale=row_scale, config=tiny)
    assert torch.equal(out, whole)
    drop = dict(dropout_p=0.4, seed=torch.tensor([2**40 + 3]))
    dropped = kernels.linear_residual(x, weight, bias, gamma, residual, row_scale=row_scale, config=tiny, **drop)
    eager = reference.linear_residual(x, weight, bias, gamma, residual, row_scale=row_scale, **drop)
    torch.testing.assert_close(dropped, eager, rtol=1e-2, atol=1e-2)
    _fp8_linear(kernels, module)
    _folded_linear(kernels, module, tiny, tma)
    _linear_partials(kernels, module, tiny, tma)
    _linear_launches(kernels, module)
    _linear_reasons(kernels, module)
    _inner_norm(kernels, module, tiny)
    _split_k(kernels, module)
    module.test_layer_norm_linear(kernels, "gelu", BFLOAT16)


def _inner_norm(kernels, module, tiles):
    """linear_residual behind a norm of its input, and the reasons for refusing one."""
    x, weight, bias = module.problem((3, 7, 40), 48, FLOAT32)
    gamma, residual, _ = module.branch(x.shape, 48, FLOAT32)
    inner = torch.rand(40) + 0.5, torch.rand(40), 1e-5
    for norm in ("layer", "rms"):
        out = kernels.linear_residual(x, weight, bias, gamma, residual, norm=norm, inner_norm=inner, config=tiles)
        eager = reference.linear_residual(x, weight, bias, gamma, residual, norm=norm, inner_norm=inner)
        torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5)
    reasons = kernels.linear_residual_not_supported_reasons
    assert reasons(x, weight, bias, gamma, residual, inner_norm=inner) == []
    wide = torch.zeros(1, 1, 65537)
    arguments = wide, torch.zeros(4, 65537), None, None, torch.zeros(1, 1, 4)
    assert reasons(*arguments, inner_norm=(None, None, 1e-5)) == ["width 65537 is above 65536"]
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert len(reasons(x, weight, bias, gamma, residual, inner_norm=inner)) == 1


def _fp8_linear(kernels, module):
    for activation in (None, "gelu", "swiglu"):
        test_fp8_blocks.test_linear_is_within_the_budget(5, 24, 33, activation, BFLOAT16)
        test_fp8_blocks.test_linear_rounds_once_to_e4m3(activation)
    for splits in (1, 4):
        test_fp8_blocks.test_linear_adds_the_residual_and_splits_its_sums(splits, FLOAT16)
    recorder, picked, cut_by = Recorder(), [], []

    def pick(*args):
        picked.append(args)
        return LinearConfig(32, 32, 16, 8, 4, 2, True)

    def split(config, *args):
        cut_by.append(args)
        return replace(config, split_k=2)

    x, weight, scale, bias, out_scale = test_fp8_blocks.parts_of_linear(33, 48, 64, None)
    room = torch.zeros(9, dtype=torch.int32)
    with (
        mock.patch.object(gemm_kernels, "_linear_fwd_kernel", recorder),
        mock.patch.multiple(
            configs_module, pick_linear_config=pick, split_k_config=split, multiprocessors_of=lambda device: 7
        ),
    ):
        kernels.fp8_linear(x, weight, scale, bias, out_scale=out_scale, out_dtype=BFLOAT16)
        kernels.fp8_linear(x, weight, scale, None, residual=torch.zeros(33, 48), semaphore=room, pdl=True)
        kernels.linear(x.half(), weight.half(), None)
        x, weight, bias, residual = module.stream((2, 5, 48), FLOAT16)
        for pdl in (False, True):
            out, partials = kernels.linear_with_partials(x, weight, bias, residual, pdl=pdl)
            kernels.folded_linear(out, partials, 1e-6, weight, bias, bias, pdl=pdl)
    E4M3 = torch.float8_e4m3fn
    assert [args[3:5] for args in picked[:3]] == [(E4M3, BFLOAT16), (E4M3, FLOAT32), (FLOAT16, FLOAT16)]
    assert cut_by[0] == (33, 48, 64, 7) and len(cut_by) == 3
    assert [launch.SPLIT_K for launch in recorder.launches[:3]] == [1, 2, 1]
    assert [launch.PDL for launch in recorder.launches] == [False, True, *[False] * 3, True, True]
    first, second, plain, *_ = recorder.launches
    assert not first.EXACT and [str(n.ACC) for n in (first, second)] == ["fp32"] * 2
    assert first.args[4].weight_scale_ptr is not None and plain.args[4].weight_scale_ptr is None
    assert second.args[7].semaphore_ptr is room


def cut(x, part):
    """``RowPartials`` of the rows of x, computed in float64 and then rounded."""
    rows = x.double().reshape(-1, x.shape[-1])
    means = torch.stack([piece.mean(1) for piece in rows.split(part, dim=1)])
    squares = torch.stack([piece.var(1, correction=0) * piece.shape[1] for piece in rows.split(part, dim=1)])
    return layer_norm_kernels.RowPartials(torch.stack([means, squares]).float(), part)


def _linear_partials(kernels, module, tiny, tma):
    for dtype in DTYPES:
        for shape, tiles in (((2, 17, 40), tiny), ((1, 3, 65), tma), ((1, 3, 1), tiny)):
            module.test_partials_are_those_of_what_is_stored(kernels, shape, tiles.block_n, dtype, tiles)
    module.test_no_rows_have_no_partials(kernels)
    x, weight, bias, residual = module.stream((3, 17, 40), FLOAT16)
    expected = kernels.linear_with_partials(x, weight, bias, residual, config=tiny)[0]
    out = kernels.linear_with_partials(x, weight, bias, residual, reverse_tiles=True, config=tiny)[0]
    assert torch.equal(out, expected)
    for reverse, tile in ((True, (slice(48, 51), slice(32, 40))), (False, (slice(0, 16), slice(0, 32)))):
        with sanitizer.only_programs(lambda count: range(1)):
            out = kernels.linear_with_partials(x, weight, bias, residual, reverse_tiles=reverse, config=tiny)[0]
        assert torch.equal(out.flatten(0, 1)[tile], expected.flatten(0, 1)[tile])
    x, weight, bias, residual = module.stream((2, 5, 48), FLOAT16)
    recorder = Recorder()
    with mock.patch.object(gemm_kernels, "_linear_fwd_kernel", recorder):
        out, partials = kernels.linear_with_partials(x, weight, bias, residual.double(), config=tma)
        assert (out.dtype, partials.values.dtype, partials.width) == (FLOAT64, FLOAT64, tma.block_n)
        empty = kernels.linear_with_partials(x[:0], weight, bias, residual[:0], config=tma)[1]
        assert empty.values.shape == (2, 1, 0) and (empty.values.dtype, empty.width) == (FLOAT32, 48)
        plain = kernels.linear_residual(x, weight, bias, None, residual, config=tma)
        assert len(recorder.launches) == 2 and plain.shape == out.shape
    first, second = recorder.launches
    assert first.args[6] is partials.values and second.args[6] is None
    with last_programs_alone():
        test_large_offsets.test_linear_partials(None)
    launch = device_is_made_current(
        gemm_kernels,
        "_linear_fwd_kernel",
        lambda: kernels.linear_with_partials(
            *(torch.empty(t.shape, dtype=FLOAT16, device="cuda") for t in (x, weight, bias, residual)),
            config=module.POINTERS_SPLIT_K,
        ),
    )
    assert {t.device.type for t in (launch.args[0], launch.args[6], *launch.args[7])} == {"cuda"}


def _folded_linear(kernels, module, tiny, tma):
    """One partial a row; several, with and without a narrower last one; and more than are merged at a time."""
    x = (torch.randn(1, 17, 100) + 30 * torch.randn(1, 17, 1)).half()
    for activation, width, tiles in ((None, 33, tiny), ("gelu", 33, tma), ("swiglu", 66, tma)):
        weight, bias = module.problem(x.shape, width, FLOAT16)[1:]
        for part in (128, 64, 3) if activation else (100, 3, 1):
            _check_folded(kernels, module, x, cut(x, part), weight, bias.float(), activation, tiles)
    _check_folded(kernels, module, x, cut(x, 16), weight, None, None, tiny)
    for dtype, activation, tiles in ((FLOAT64, "gelu", tma), (BFLOAT16, "swiglu", tiny)):
        module.test_a_folded_layer_norm(kernels, activation, dtype, tiles)
    for eps in (0.5, 1e-6):
        _check_folded(kernels, module, x / 30, cut(x / 30, 16), weight, bias.float(), "swiglu", tiny, eps)
    _far_statistics(kernels, tiny)
    recorder, partials = Recorder(), cut(x, 3)
    with mock.patch.object(gemm_kernels, "_linear_fwd_kernel", recorder):
        for width in (3, 7, 16, 50, 100):
            kernels.folded_linear(x, cut(x, width), 0.25, weight, bias, bias, config=tiny)
        kernels.linear(x, weight, bias, config=tiny)
        finalised = layer_norm_kernels.row_statistics(partials, 100, 0.25)
        kernels.folded_linear(x, finalised, 0.25, weight, bias, bias, config=tiny)
    assert recorder.launches[-1].args[3].statistics_ptr is finalised.values
    found = [(n.PARTIAL_WIDTH, n.PARTIALS_PER_STEP, n.args[3] and n.args[3].eps) for n in recorder.launches]
    assert found == [
        (3, 32, 0.25),
        (7, 16, 0.25),
        (16, 8, 0.25),
        (50, 2, 0.25),
        (100, 1, 0.25),
        (1, 1, None),
        (0, 1, 0.25),
    ]
    assert {launch.BLOCK_M for launch in recorder.launches} == {16}
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        kernels.folded_linear(x, partials, 1e-6, weight, weight.float().sum(1), None, config=tiny)


def _far_statistics(kernels, tiles):
    """Constant rows of a million and more: their mean is exact, so that the normalised row is exactly zero."""
    row = torch.full((17, 300), 1e6) + torch.arange(17)[:, None] / 3
    weight = torch.eye(1, 300)
    for add, wanted in ((0.0, 0.0), (1.0, 1e3)):
        out = kernels.folded_linear(row + add, cut(row, 16), 1e-6, weight, torch.ones(1), None, config=tiles)
        torch.testing.assert_close(out, torch.full_like(out, wanted), rtol=1e-4, atol=0)


def _check_folded(kernels, module, x, partials, weight, bias, activation, tiles, eps=1e-6):
    """Compares in float32, with a tolerance for the digits that cancel when the mean is subtracted."""
    sums = weight.double().sum(1).float()
    weight = weight.float()
    out = kernels.folded_linear(x.float(), partials, eps, weight, sums, bias, activation, config=tiles)
    rest = x.double() - x.double().mean(-1, keepdim=True)
    normal = rest * (rest.square().mean(-1, keepdim=True) + eps) ** -0.5
    wanted = module.formula(normal, weight, bias, activation)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=3e-4)


def _split_k(kernels, module):
    """Split-K: sums are complete and in a fixed order, and counters are in the caller's semaphore."""
    module.test_split_k(kernels, 9, 147, 40, FLOAT16, module.POINTERS_SPLIT_K)
    module.test_split_k(kernels, 1, 16, 33, FLOAT64, module.TMA_SPLIT_K)
    recorder, cut_by = Recorder(), []

    def split(config, *args):
        cut_by.append(args)
        return replace(config, split_k=2)

    x, weight, bias, residual = module.stream((2, 40, 96), FLOAT16)
    room = torch.zeros(9, dtype=torch.int32)
    with (
        mock.patch.object(gemm_kernels, "_linear_fwd_kernel", recorder),
        mock.patch.multiple(configs_module, split_k_config=split, multiprocessors_of=lambda device: 7),
    ):
        kernels.linear_with_partials(x[..., :64], weight[:, :64], bias, residual)
        for tiles in (module.POINTERS_SPLIT_K, module.POINTERS):
            kernels.linear_with_partials(x, weight, bias, residual, semaphore=room, config=tiles)
    assert cut_by == [(80, 96, 64, 7)] and [launch.SPLIT_K for launch in recorder.launches] == [2, 3, 1]
    assert recorder.launches[0].args[7].workspace_ptr.dtype == FLOAT32
    assert recorder.launches[1].args[7].semaphore_ptr is room and recorder.launches[2].args[7] is None
    module.test_split_integers_come_out_exactly(kernels)
    module.test_swiglu_has_no_split_k(kernels)
    with last_programs_alone():
        test_large_offsets.test_partial_sums(None)
    module.test_the_semaphore_is_the_callers(kernels)
    with pytest.MonkeyPatch.context() as patch:
        module.test_the_shipped_rule_splits_partials_alone(kernels, patch)


def _far_linear(kernels, tiles):
    """Offsets beyond 2³¹ that are products of small numbers, on every axis of x, weight and residual."""
    x, weight, residual = (torch.randn(shape).half() for shape in ((3, 5, 16), (16, 16), (3, 5, 16)))
    expected = kernels.linear(x, weight, None, residual=residual, config=tiles)
    memory = reserved(16 * (2**27 + 2**24), dtype=FLOAT16)
    for strides in ((2**30 + 64, 16, 1), (80, 2**29 + 64, 1), (5, 1, 2**27 + 2**24)):
        for arguments in ((far := torch.as_strided(memory, x.shape, strides), residual), (x, far)):
            far.copy_(x if arguments[0] is far else residual)
            out = kernels.linear(arguments[0], weight, None, residual=arguments[1], config=tiles)
            assert torch.equal(out, expected)
    for strides in ((2**27 + 2**24, 1), (1, 2**27 + 2**24)):
        far = torch.as_strided(memory, weight.shape, strides).copy_(weight)
        assert torch.equal(kernels.linear(x, far, None, residual=residual, config=tiles), expected)


def _linear_launches(kernels, module):
    """Launch options that cannot change the interpreter's result."""
    recorder, picked = Recorder(), []

    def pick(*args):
        picked.append(args)
        return LinearConfig(32, 32, 16, 8, 4, 2, True)

    x, weight, bias = module.problem((2, 33, 40), 72, FLOAT32)
    with (
        mock.patch.object(gemm_kernels, "_linear_fwd_kernel", recorder),
        mock.patch.multiple(configs_module, pick_linear_config=pick, arch_of=lambda device: 90),
    ):
        for precision in ("highest", "high"):
            with matmul_precision(precision):
                kernels.linear(x, weight, bias, "swiglu")
                kernels.linear(x.half()[:, 1:], weight.half(), bias, residual=torch.zeros(2, 32, 72))
        kernels.linear_residual(
            x, weight, None, None, torch.zeros(2, 33, 72), config=LinearConfig(32, 32, 8, 8, 4, 2, False)
        )
    assert picked == [
        (66, 36, True, FLOAT32, FLOAT32, False, False, 90), (64, 72, False, FLOAT16, FLOAT32, False, False, 90),
        (66, 36, True, FLOAT32, FLOAT32, True, False, 90), (64, 72, False, FLOAT16, FLOAT32, False, False, 90),
    ]  # fmt: skip
    found = [(n.PRECISION, n.DESCRIPTORS, n.EVEN_K, n.ALIGN_K, n.ALIGN_N, n.EXACT, n.grid) for n in recorder.launches]
    half = ("ieee", False, False, 8, 8, False, (6,))
    assert found == [
        ("ieee", True, True, 16, 4, True, (6,)), half, ("tf32", True, True, 16, 4, True, (6,)), half,
        ("ieee", False, True, 8, 8, True, (9,)),
    ]  # fmt: skip
    assert recorder.launches[0].args[1].block_shape == [32, 16]
    with mock.patch.object(gemm_kernels, "_linear_fwd_kernel", recorder):
        kernels.linear(x[:0], weight, bias)
        assert len(recorder.launches) == 5
        tma = LinearConfig(16, 32, 16, 2, 4, 2, True)
        kernels.linear(x[..., 1:37], weight[:, 1:37], bias, config=tma)
        for function in (kernels.layer_norm_linear, kernels.layer_norm_linear_fwd):
            function(x, None, None, 1e-6, weight, bias, config=tma)
    assert [(n.DESCRIPTORS, n.BLOCK_M) for n in recorder.launches[5:]] == [(False, 16), (True, 16), (True, 16)]
    for dtype, out_dtype, wanted in (
        (FLOAT64, FLOAT64, None), (FLOAT32, FLOAT64, "fp64"), (BFLOAT16, BFLOAT16, "fp32"), (FLOAT16, FLOAT32, None),
    ):  # fmt: skip
        assert str(gemm_kernels._upcast(dtype, out_dtype)) == str(wanted)
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert gemm_kernels._upcast(BFLOAT16, FLOAT64) is None
    x, weight = (torch.zeros(64, 64, dtype=FLOAT16) for _ in range(2))
    for stride_xo, stride_xi, matrix, columns, wanted in (
        (0, 64, weight, 64, (True, False)), (0, 56, weight, 64, (False, False)), (4, 64, weight, 64, (False, True)),
        (0, 64, weight.t(), 64, (False, False)), (0, 64, weight.t(), 63, (False, True)),
        (0, 64, torch.zeros(64, 128, dtype=FLOAT16)[:, ::2], 64, (False, True)),
        (0, 64, weight[:1].expand(64, -1), 64, (False, False)),
        (0, 64, weight.as_strided((32, 64), (32, 1)), 32, (False, False)),
        (0, 64, weight.as_strided((32, 32), (1, 68)), 32, (False, True)),
        (0, 64, weight.as_strided((32, 64), (68, 1)), 32, (False, True)),
    ):  # fmt: skip
        assert gemm_kernels._alignment(x, stride_xo, stride_xi, x.stride(-1), matrix, columns) == wanted
    assert gemm_kernels._alignment(torch.zeros(64, 128, dtype=FLOAT16)[:, ::2], 0, 128, 2, weight, 64) == (False, True)


def _linear_reasons(kernels, module):
    module.test_reasons(kernels)
    x, weight, bias = module.problem((2, 5, 48), 64, FLOAT32)
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        for function, arguments, options in (
            (kernels.linear_residual_not_supported_reasons, [x, weight, bias, bias, x], {"row_scale": bias}),
            (kernels.layer_norm_linear_not_supported_reasons, [x, bias, bias, 1e-6, weight, bias], {}),
        ):
            assert len(function(*arguments, **options)) == 1
            for place in [*range(len(arguments)), *options]:
                keyed = isinstance(place, str)
                value = options[place] if keyed else arguments[place]
                if isinstance(value, torch.Tensor):
                    call = ([*arguments], {**options})
                    call[keyed][place] = value.double()
                    reasons = function(*call[0], **call[1])
                    assert len(reasons) == 2 and "float64" in reasons[1]


def layernorm_mlp():
    kernels, module = layernorm_mlp_kernels, test_layernorm_mlp
    pair = (LinearConfig(16, 32, 16, 2, 4, 2, False), LinearConfig(32, 32, 32, 2, 4, 2, True))
    for arguments in (module.problem((2, 5, 48), 40, FLOAT32), module.problem((2, 5, 48), 40, BFLOAT16, "swiglu")):
        module.check(kernels, arguments, torch.tensor([1.25, 0.5]), config=pair)
        inner = test_layernorm_mlp.inner_norm(40, FLOAT32)
        module.check(kernels, arguments, config=pair, norm="rms", inner=inner)
        module.check(kernels, arguments, config=pair, inner=inner)
    used = []

    def spy_on(name):
        shipped = getattr(kernels, name)

        def spy(*args, config=None, **options):
            used.append((name, config))
            return shipped(*args, config=config, **options)

        return mock.patch.object(kernels, name, spy)

    with spy_on("linear"), spy_on("linear_train"), spy_on("linear_residual"):
        for function in (kernels.layernorm_mlp, kernels.layernorm_mlp_fwd):
            function(*arguments, config=pair)
            function(*arguments)
    inference = [("linear", pair[0]), ("linear_residual", pair[1]), ("linear", None), ("linear_residual", None)]
    assert used == [
        *inference,
        *((name.replace("linear", "linear_train") if name == "linear" else name, config) for name, config in inference),
    ]
    arguments = module.problem((2, 5, 48), 40, FLOAT32)
    drops = dict(dropout_p=0.4, seed=torch.tensor([2**40 + 3]), out_dropout_p=0.3, out_seed=torch.tensor([5]))
    eager, plain = reference.layernorm_mlp(*arguments, **drops), reference.layernorm_mlp_fwd(*arguments)
    torch.testing.assert_close(kernels.layernorm_mlp(*arguments, **drops), eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.layernorm_mlp_fwd(*arguments, **drops)[0], eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.layernorm_mlp_fwd(*arguments)[3], plain[3], rtol=1e-4, atol=1e-4)
    assert kernels.layernorm_mlp_fwd(*arguments, recompute=True)[3].numel() == 0
    module.test_reasons(kernels)
    x, *rest = module.problem((2, 5, 48), 40, FLOAT32)
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert len(kernels.not_supported_reasons(x, *rest)) == 1
        for place in range(1, 10):
            arguments = [x, *rest]
            if isinstance(arguments[place], torch.Tensor):
                arguments[place] = arguments[place].double()
                reasons = kernels.not_supported_reasons(*arguments)
                assert len(reasons) == 2 and "float64" in reasons[1]
        reasons = kernels.not_supported_reasons(x, *rest, row_scale=torch.ones(2, dtype=FLOAT64))
        assert len(reasons) == 2 and "float64" in reasons[1]
        reasons = kernels.not_supported_reasons(x, *rest, inner_norm=(torch.ones(40, dtype=FLOAT64), None, 1e-5))
        assert len(reasons) == 2 and "float64" in reasons[1]


def attention():
    kernels, module = attention_kernels, test_attention
    resident, streaming = module.config(16, 0), module.config(16, 16)
    for tiles in (resident, streaming):
        module.check(kernels, module.random_qkv(2, 35, 2, 40, FLOAT32), 2, -0.2, config=tiles)
    module.test_key_chunks_cover_the_keys(kernels)
    module.test_head_slices_pad_to_the_next_16_only(kernels)
    _attention_launches(kernels, module)
    _attention_in_float8(kernels, module)
    for tiles in (resident, streaming):
        for dtype in (FLOAT16, BFLOAT16, FLOAT64):
            module.check(kernels, module.random_qkv(1, 19, 2, 24, dtype), 2, 0.2, config=tiles)
        q, k, v = module.random_qkv(1, 5, 1, 16, BFLOAT16).chunk(3, dim=2)
        module.check(kernels, q, 1, 0.2, k, v * 2.0**17, config=tiles)
        module.test_infinite_scores_give_what_eager_gives(kernels, tiles)
        _far_attention(kernels, tiles)
        q, k, v = module.random_qkv(2, 19, 2, 24, FLOAT32).chunk(3, dim=2)
        module.check(kernels, q[:, :3], 2, 0.2, k, v, config=tiles)
        module.check(kernels, torch.ones_like(q), 2, -20.0, torch.ones_like(k), v, config=tiles)
        module.check(kernels, q, 2, 0.0, k, v, config=tiles)
    _attention_options(kernels, module)
    qkv = module.random_qkv(2, 19, 2, 16, FLOAT16)
    for tiles in (resident, streaming):
        expected = module.check(kernels, qkv, 2, 0.125, config=tiles)
        equal(module.check(kernels, qkv, 2, 0.125, config=replace(tiles, tma=True)), expected)
        for name, view in module._layouts(qkv):
            if name in ("every other channel, 16-byte rows", "channels first"):
                equal(kernels.attention_fwd(view, 2, 0.125, config=tiles), expected)
        with mock.patch.object(kernels, "_MAX_PROGRAMS", 5):
            equal(kernels.attention_fwd(qkv, 2, 0.125, config=tiles), expected)
    module.check(kernels, module.random_qkv(1, 35, 1, 24, FLOAT32), 1, 0.2, config=resident)
    with mock.patch.object(configs_module, "multiprocessors_of", lambda device: 3):
        module.check(kernels, module.random_qkv(2, 83, 2, 16, FLOAT32), 2, 0.2, config=resident)
    q, k, v = qkv.chunk(3, dim=2)
    for call in (lambda: kernels.attention(qkv, 2, 0.125), lambda: kernels.attention(q, 2, 0.125, k=k, v=v)):
        assert torch.equal(call(), kernels.attention_fwd(qkv, 2, 0.125)[0])
    with pytest.MonkeyPatch.context() as patch:
        module.test_nothing_to_do_launches_nothing(kernels, patch)


def _far_attention(kernels, tiles):
    """Offsets beyond 2³¹ that are products of small numbers, on every axis of q, k, v and out."""
    small = torch.randn(3, 3, 5, 48).half()
    expected = torch.empty(3, 5, 48, dtype=FLOAT16)
    kernels._launch(expected, None, *small, 3, 0.25, "ieee", tiles, False, kernels._NO_OPTIONS)
    memory = reserved(48 * (2**27 + 2**24), dtype=FLOAT16)
    for strides in ((2**30 + 64, 196, 4), (1024, 2**29 + 64, 4), (4, 16, 2**27 + 2**24)):
        far = [torch.as_strided(memory[i:], (3, 5, 48), strides) for i in range(4)]
        for tensor, values in zip(far, small):
            tensor.copy_(values)
        kernels._launch(far[3], None, *far[:3], 3, 0.25, "ieee", tiles, False, kernels._NO_OPTIONS)
        assert torch.equal(far[3], expected)


def _attention_options(kernels, module):
    """Every option against float64, in tiles that leave rows and keys over."""
    tiles = test_attention_options.configs.AttentionConfig(16, 16, 4, 1)
    for size, dtype in ((24, FLOAT32), (16, BFLOAT16)):
        for given in test_attention_options.options(20, 2, size, dtype).values():
            qkv = test_attention_options.tensor(2, 20, 6 * size, dtype=dtype)
            out = kernels.attention_fwd(qkv, 2, -0.2, config=tiles, **given)
            test_attention_options.check(out, qkv, 2, -0.2, **given)
    test_attention_options.test_every_sequence_is_found(kernels, 7)


def _attention_launches(kernels, module):
    """Launch options that cannot change the interpreter's result, and the reasons for refusing a call."""
    resident, streaming = Recorder(), Recorder()
    picked = []

    def pick(*args):
        picked.append(args)
        return module.config(32, 16 if args[1] > 60 else 0, True)

    with (
        mock.patch.multiple(
            kernels, _attention_fwd_resident_kernel=resident, _attention_fwd_streaming_kernel=streaming
        ),
        mock.patch.multiple(
            configs_module, pick_attention_config=pick, arch_of=lambda device: 90, multiprocessors_of=lambda device: 5
        ),
    ):
        for precision in ("highest", "high"):
            with matmul_precision(precision):
                kernels.attention(module.random_qkv(2, 61, 3, 16, BFLOAT16), 3, -0.5)
                kernels.attention_fwd(module.random_qkv(1, 60, 2, 24, FLOAT32), 2, 0.5)
    assert picked == [
        (*shape, tf32, 90, False, False, lse)
        for tf32 in (False, True)
        for *shape, lse in ((61, 61, 16, BFLOAT16, False), (60, 60, 24, FLOAT32, True))
    ]
    for launch, precision in zip(streaming.launches, ("ieee", "tf32"), strict=True):
        assert launch.grid == (12,) and launch.PRECISION == precision and launch.args[1] is None
        assert (launch.NEGATIVE, launch.UPCAST, launch.TMA, launch.LSE) == (True, True, True, False)
        assert [arg.block_shape for arg in (launch.args[0], *launch.args[2:5])] == [[1, 32, 16]] * 2 + [[1, 16, 16]] * 2
    for launch, precision in zip(resident.launches, ("ieee", "tf32"), strict=True):
        assert launch.grid == (4,) and launch.args[9:11] == (2, 1) and launch.PRECISION == precision
        assert (launch.NEGATIVE, launch.UPCAST, launch.TMA, launch.LSE) == (False, False, False, True)
    _attention_shares(kernels, module)
    assert all(isinstance(cut(17), tuple) for cut in (kernels._key_chunks, kernels._head_slices))
    qkv = module.random_qkv(2, 5, 3, 64, FLOAT16)
    fits = lambda x, size=64: kernels._tma_compatible(x, kernels._head_slices(size), size)  # noqa: E731
    assert fits(qkv) and fits(qkv[..., 8:]) and fits(qkv[:, 1:]) and fits(torch.zeros(2, 5, 200, dtype=FLOAT16))
    assert (
        not fits(qkv, 80)
        and not fits(qkv[..., 4:])
        and not fits(qkv[..., ::2])
        and not fits(qkv[..., :-4].contiguous())
    )
    assert (
        not fits(qkv[:1].expand(2, -1, -1))
        and not fits(qkv[:, :1].expand(-1, 5, -1))
        and not fits(qkv.flip(1)[..., 1:])
    )
    module.test_reasons(kernels)
    cpu, half = torch.zeros(2, 5, 256), torch.zeros(2, 5, 771)
    assert (
        kernels.not_supported_reasons(cpu, 1, k=cpu, v=cpu)
        == []
        == kernels.not_supported_reasons(cpu.double(), 1, k=cpu)
    )
    assert kernels.not_supported_reasons(half, 1) == ["head size 257 is above 256"]
    assert kernels.not_supported_reasons(half[..., :768], 1) == []
    wide = half[..., :300]
    assert kernels.not_supported_reasons(wide, 1, k=wide, v=wide) == ["head size 300 is above 256"]
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        reasons = kernels.not_supported_reasons(cpu, 1, k=cpu, v=cpu)
        assert len(reasons) == 1 and "tensors on cpu" in reasons[0]
        assert len(kernels.not_supported_reasons(cpu.double(), 1, k=cpu, v=cpu)) == 2
        cuda = SimpleNamespace(shape=(2, 5, 256), dtype=FLOAT16, device=SimpleNamespace(type="cuda"))
        assert kernels.not_supported_reasons(cuda, 1, k=cuda, v=cuda) == []
    device_is_made_current(
        kernels,
        "_attention_fwd_streaming_kernel",
        lambda: kernels.attention(torch.empty(1, 5, 48, device="cuda"), 1, 1.0),
    )


def attention_bwd():
    """The output and the LSE come from the reference."""
    kernels, module = attention_bwd_kernels, test_attention_bwd
    whole, looped = module.tiles(16, 32), module.tiles(16, 16)

    def forward(qkv, num_heads, scale, *, k, v, config, **options):
        out, lse = reference.attention_fwd(qkv, num_heads, scale, k=k, v=v, **options)
        return out, lse.to(launch_kernels.stat_dtype(qkv.dtype))

    with mock.patch.object(attention_kernels, "attention_fwd", forward):
        for config in (looped, whole):
            module.check(*module.problem(2, 17, 2, 40, FLOAT32), 2, -0.3, config)
            module.test_scores_far_below_zero(kernels, config)
        _attention_bwd_launches(kernels, module)
        _attention_bwd_spills(kernels)
        _attention_bwd_parts(kernels, module)
        _attention_bwd_copies(kernels, module)
        with pytest.MonkeyPatch.context() as patch:
            module.test_nothing_to_do_launches_nothing(kernels, patch)
        module.test_reasons(kernels)
        for config in (looped, whole):
            for dtype in (FLOAT16, BFLOAT16):
                module.check(*module.problem(1, 17, 1, 24, dtype), 1, 0.3, config)
            _attention_bwd_options(kernels, module, config)
            _attention_bwd_needs(kernels, module, config)
        grad, tensors = module.problem(2, 17, 2, 16, FLOAT16)
        expected = module.kernel_gradients(grad, tensors, 2, 0.25, whole)[1]
        shifted = torch.empty(grad.numel() + 1, dtype=FLOAT16)[1:].view(grad.shape).copy_(grad)
        for given in (grad, shifted):
            equal(module.kernel_gradients(given, tensors, 2, 0.25, module.tiles(16, 32, True))[1], expected)
        _attention_bwd_head_options(kernels, module)
        _attention_bwd_of_normalised_heads(kernels)
    _far_attention_bwd(kernels, (whole, looped))


def _attention_bwd_options(kernels, module, config):
    """Lengths of keys, none too, and dropout, also where the batch is cut into launches; heads of v of another size."""
    grad, (q, k, v) = module.problem(3, 5, 2, 40, FLOAT32, 19, 24)
    lengths, drop = torch.tensor([17, 0, 19]), dict(dropout_p=0.25, seed=torch.tensor([2**40 + 3]))
    expected = module.check(grad, (q, k, v), 2, 0.2, config, expected_zeros=0.9, key_lengths=lengths)
    saved = reference.attention_fwd(q, 2, 0.2, k=k, v=v, key_lengths=lengths)
    k, v = k.clone(), v.clone()
    k[0, 17:], v[0, 17:] = math.nan, math.nan
    results = kernels.attention_bwd(grad, q, 2, 0.2, k, v, *saved, config=config, key_lengths=lengths)
    equal(results[:3], expected)
    assert results[3:] == (None,) * 9
    grad, tensors = module.problem(3, 18, 2, 16, FLOAT32, 19)  # two steps of queries
    expected = module.check(grad, tensors, 2, 0.2, config, **drop)
    drop |= dict(key_lengths=torch.tensor([19, 2, 19]))
    expected = module.kernel_gradients(grad, tensors, 2, 0.2, config, **drop)[1]
    blocks = 1 if config.by_keys.block_n > 16 else 2
    for limit in (1, 4 * blocks + 1):
        with mock.patch.object(kernels, "_MAX_PROGRAMS", limit):
            equal(module.kernel_gradients(grad, tensors, 2, 0.2, config, **drop)[1], expected)


def _attention_bwd_needs(kernels, module, config):
    """Each subset of the gradients, and the launches that it takes."""
    loops = config.by_keys.block_n == 16
    for keys in (None, 17):
        grad, (qkv, k, v) = module.problem(1, 17, 1, 16, FLOAT32, keys)
        out, lse = reference.attention_fwd(qkv, 1, 0.3, k=k, v=v)
        every = None
        for q_need, k_need, v_need in itertools.product((True, False), repeat=3):
            if keys is None and (k_need or v_need):
                continue
            launched, needs = [], [q_need, k_need, v_need]
            names = ("_attention_bwd_kernel", "_attention_bwd_dq_kernel")
            counted = {name: module._Counted(getattr(kernels, name), launched) for name in names}
            with mock.patch.multiple(kernels, **counted):
                grads = kernels.attention_bwd(grad, qkv, 1, 0.3, k, v, out, lse, needs=needs, config=config)
            assert len(grads) == 3
            every = every or grads
            for need, one, other in zip(needs, grads, every):
                assert torch.equal(one, other) if need else one is None
            of_keys = q_need if keys is None else k_need or v_need
            assert len(launched) == (of_keys or (q_need and not loops)) + (q_need and loops)


def _attention_bwd_head_options(kernels, module):
    """Norms of heads and rotary embedding against the closed formulas of the reference."""
    w, b, angle = torch.randn(6).double(), torch.randn(6).double(), torch.randn(4, 6).double()
    rope = dict(rope=(angle.cos(), angle.sin()), num_prefix=1)
    every_token = dict(rope=tuple(table[[0, 1, 2, 3, 0]] for table in rope["rope"]))
    norms = dict(q_norm=(w, b, 1e-5), k_norm=(w, None, 1e-6))
    grad, packed = module.problem(2, 5, 2, 6, FLOAT64)
    for tensors in (packed, (*packed[0].chunk(3, 2),)):
        for options in (
            rope | dict(rope_layout="interleaved"), rope | norms | dict(key_lengths=torch.tensor([4, 5])),
            norms | dict(norm="rms"), dict(k_norm=norms["k_norm"]), every_token,
        ):  # fmt: skip
            qkv, k, v = tensors
            out, lse = reference.attention_fwd(qkv, 2, 0.2, k=k, v=v, **options)
            expected = reference.attention_bwd(grad, qkv, 2, 0.2, k, v, out, lse, **options)
            for needs in ([True] * 12, [True] * 3 + [False] * 9, [k is None, *[False] * 5, *[True] * 6]):
                actual = kernels.attention_bwd(
                    grad, qkv, 2, 0.2, k, v, out, lse, needs=needs, config=module.tiles(16, 16), **options
                )
                for need, one, other in zip(needs, actual, expected, strict=True):
                    assert (one is None) == (other is None) or not need
                    if need and one is not None:
                        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    qkv, _, _ = packed
    options = rope | norms
    out, lse = reference.attention_fwd(qkv, 2, 0.2, **options)
    for tables in itertools.product((True, False), repeat=2):
        needs = [True] + [False] * 5 + [*tables] + [True] * 4
        *_, dcos, dsin = kernels.attention_bwd(grad, qkv, 2, 0.2, None, None, out, lse, needs=needs, **options)[:8]
        assert (dcos is not None) == (dsin is not None) == any(tables)


def _attention_bwd_of_normalised_heads(kernels):
    """16-bit heads are normalised in float32, and the kernels give float32 gradients of what they saw."""
    seen, qkv, norm = [], torch.randn(1, 5, 48).half(), (torch.ones(8), None, 1e-5)

    def gradients(*tensors, grads, **options):
        seen.extend(tensor.dtype for tensor in (*tensors[1:4], *grads))
        for grad in grads:
            grad.zero_()

    with mock.patch.object(kernels, "_gradients", gradients):
        kernels.attention_bwd(qkv[..., :16], qkv, 2, 0.2, None, None, qkv[..., :16], torch.empty(1, 2, 5), q_norm=norm)
    assert seen == [FLOAT16] * 3 + [FLOAT32] * 2 + [FLOAT16]


def _attention_bwd_launches(kernels, module):
    """What the launches are told, and which config is asked for."""
    by_keys, by_queries, picked = Recorder(), Recorder(), []

    def pick(*args):
        picked.append(args)
        return module.LOOPED

    patched = dict(_attention_bwd_kernel=by_keys, _attention_bwd_dq_kernel=by_queries)
    with (
        mock.patch.multiple(kernels, **patched),
        mock.patch.multiple(configs_module, pick_attention_bwd_config=pick, arch_of=lambda device: 90),
    ):
        for options in (dict(), dict(dropout_p=0.1, seed=torch.zeros(1)), dict(key_lengths=torch.ones(2))):
            grad, (qkv, k, v) = module.problem(2, 61, 3, 16, BFLOAT16)
            kernels.attention_bwd(grad, qkv, 3, 0.5, k, v, grad, torch.empty(2, 3, 61), **options)
        grad, (q, k, v) = module.problem(2, 5, 3, 16, FLOAT32, 61, 40)
        with matmul_precision("high"):
            kernels.attention_bwd(grad, q, 3, 0.5, k, v, grad, torch.empty(2, 3, 5))
        grad, (qkv, k, v) = module.problem(2, 16, 3, 16, BFLOAT16)  # one program has all keys
        with (
            mock.patch.object(launch_kernels, "INTERPRETED", False),
            mock.patch.object(kernels, "_spills", lambda dtype: dtype == BFLOAT16),
        ):
            kernels.attention_bwd(grad, qkv, 3, 0.5, k, v, grad, torch.empty(2, 3, 16))
    packed = (61, 16, BFLOAT16, 90)
    assert picked == [
        (*packed, False),
        (*packed, True),
        (*packed, True),
        (61, 40, FLOAT32, 90, True),
        (16, *packed[1:], True),
    ]
    for launches, grids in ((by_keys.launches, [24] * 4 + [6]), (by_queries.launches, [12] * 3 + [6])):
        assert [launch.grid for launch in launches] == [(grid,) for grid in grids]
        assert [launch.PRECISION for launch in launches] == (["ieee"] * 3 + ["tf32", "ieee"])[: len(grids)]
        assert [launch.UPCAST for launch in launches] == ([True] * 3 + [False] * 2)[: len(grids)]
    device_is_made_current(
        kernels,
        "_attention_bwd_dq_kernel",
        lambda: kernels._launch(
            [torch.empty(1, 99, 16, device="cuda"), None, None],
            [torch.empty(1, 99, 16, device="cuda")] * 5 + [torch.empty(1, 1, 99, device="cuda")],
            1, 1.0, "ieee", module.LOOPED, None, None,
        ),
    )  # fmt: skip


def _attention_bwd_spills(kernels):
    """Triton before 3.7 spills with tiles of 256 keys, in bfloat16 alone."""
    for version, spills in (("2.9.9", True), ("3.6.1", True), ("3.7.0+git1", False), ("4.0.0", False)):
        with mock.patch.object(kernels.triton, "__version__", version):
            assert [kernels._spills(dtype) for dtype in (BFLOAT16, FLOAT16, FLOAT32)] == [spills, False, False]


def _attention_bwd_parts(kernels, module):
    """How a batch of five is cut into launches of at most so many programs, by keys and by queries."""
    for limit, queries, keys, by_keys_grids, by_queries_grids in (
        (27, 20, 61, (24, 24, 12), (6, 6, 3)),
        (27, 100, 20, (12, 12, 6), (24, 24, 12)),
        (5, 20, 61, (12,) * 5, (3,) * 5),
    ):
        by_keys, by_queries = Recorder(), Recorder()
        grad, (q, k, v) = module.problem(5, queries, 3, 16, FLOAT16, keys)
        patched = dict(_attention_bwd_kernel=by_keys, _attention_bwd_dq_kernel=by_queries, _MAX_PROGRAMS=limit)
        with mock.patch.multiple(kernels, **patched):
            kernels.attention_bwd(
                grad, q, 3, 0.5, k, v, grad, torch.empty(5, 3, queries), config=module.tiles(16, 16, queries=32)
            )
        for launches, grids in ((by_keys.launches, by_keys_grids), (by_queries.launches, by_queries_grids)):
            assert [launch.grid for launch in launches] == [(grid,) for grid in grids]


def _attention_bwd_copies(kernels, module):
    """What is loaded by descriptors is copied where its layout does not allow that, and nothing else is."""
    grad, (qkv, _, _) = module.problem(2, 5, 3, 16, FLOAT16)
    shifted = torch.empty(grad.numel() + 1, dtype=FLOAT16)[1:].view(grad.shape)
    for given in (grad, shifted):
        for tma in (False, True):
            recorder = Recorder()
            with (
                mock.patch.object(kernels, "_attention_bwd_kernel", recorder),
                mock.patch.object(kernels, "_descriptor", lambda x, *_: x),
            ):
                config = module.tiles(16, 32, tma)
                kernels.attention_bwd(given, qkv, 3, 0.5, None, None, grad, torch.empty(2, 3, 5), config=config)
            dout, q = recorder.launches[0].args[3:5]
            assert (dout.data_ptr() != given.data_ptr()) == (tma and given is shifted)
            assert q.data_ptr() == qkv.data_ptr()


def _far_attention_bwd(kernels, configs):
    """Offsets beyond 2³¹ that are products of small numbers, on every axis of every tensor."""
    inputs = list(torch.randn(5, 3, 17, 48).half())
    lse = torch.randn(3, 3, 17)
    memory = reserved(48 * (2**27 + 2**24), dtype=FLOAT16)
    for config in configs:
        expected = [torch.zeros(3, 17, 48, dtype=FLOAT16) for _ in range(3)]
        with sanitizer.only_programs(lambda count: [count - 1]):
            kernels._launch(expected, [*inputs, lse], 3, 0.25, "ieee", config, None, None)
            for strides in ((2**30 + 64, 388, 8), (1024, 2**28 + 64, 8), (8, 24, 2**27 + 2**24)):
                far = [torch.as_strided(memory[i:], (3, 17, 48), strides) for i in range(8)]
                for tensor, values in zip(far, [*inputs, *(torch.zeros_like(inputs[0]),) * 3]):
                    tensor.copy_(values)
                kernels._launch(far[5:], [*far[:5], lse], 3, 0.25, "ieee", config, None, None)
                equal(far[5:], expected)


def _attention_in_float8(kernels, module):
    for tokens, head_size in ((17, 16), (300, 32)):
        test_fp8_blocks.test_attention_rounds_its_mean_of_values(tokens, head_size, BFLOAT16)
    recorder, picked = Recorder(), []

    def pick(*args):
        picked.append(args)
        return module.config(16, 0)

    qkv = module.random_qkv(2, 33, 3, 16, BFLOAT16)
    with (
        mock.patch.object(kernels, "_attention_fwd_resident_kernel", recorder),
        mock.patch.object(configs_module, "pick_attention_config", pick),
        mock.patch.object(kernels, "_MAX_PROGRAMS", 9),
    ):
        for out_dtype in (None, torch.float8_e4m3fn):
            for pdl in (False, True):
                kernels.attention(qkv, 3, 0.5, out_dtype=out_dtype, pdl=pdl)
        kernels.attention_fwd(qkv, 3, 0.5)
    assert [args[6] for args in picked] == [False, False, True, True, False]
    found = [(str(launch.OUT), launch.PDL) for launch in recorder.launches[::2]]
    assert found == [("bf16", False), ("bf16", True), ("fp8e4nv", False), ("fp8e4nv", True), ("bf16", False)]
    assert recorder.launches[1].PDL is False and recorder.launches[3].PDL is True


def _attention_shares(kernels, module):
    """How the work is divided into launches and programs."""
    resident, streaming, tall = Recorder(), Recorder(), module.config(16, 0)
    assert kernels._MAX_PROGRAMS == 2**31 - 1
    with (
        mock.patch.multiple(
            kernels,
            _attention_fwd_resident_kernel=resident,
            _attention_fwd_streaming_kernel=streaming,
        ),
        mock.patch.object(launch_kernels, "INTERPRETED", False),
        mock.patch.object(configs_module, "multiprocessors_of", lambda device: 3),
    ):
        qkv = module.random_qkv(5, 33, 3, 16, BFLOAT16)
        for limit in (24, 5):
            with mock.patch.object(kernels, "_MAX_PROGRAMS", limit):
                kernels.attention_fwd(qkv, 3, 0.0, config=module.config(32, 16))
                kernels.attention(qkv, 3, 0.0)
        assert [launch.grid for launch in streaming.launches] == [(24,), (6,), *[(6,)] * 5]
        assert not any(launch.UPCAST or launch.TMA or launch.args[18] != 2.0**-126 for launch in streaming.launches)
        assert [launch.BLOCK_M for launch in resident.launches] == [64] * 6
        # Seven blocks of two heads on three multiprocessors of two programs each: 3 + 3 + 1 blocks.
        kernels.attention_fwd(module.random_qkv(1, 100, 2, 16, FLOAT16), 2, 0.5, config=tall)
        assert resident.launches[-1].grid == (6,) and resident.launches[-1].args[9:11] == (3, 3)
        q, k, v = module.random_qkv(2, 33, 3, 16, BFLOAT16).chunk(3, dim=2)
        kernels.attention_fwd(
            q, 3, 0.5, k=k.transpose(1, 2).contiguous().transpose(1, 2), v=v, config=module.config(32, 16, True)
        )
        assert streaming.launches[-1].TMA is False


def patch_embed():
    kernels, module = patch_embed_kernels, test_patch_embed
    tiny = PatchEmbedConfig(16, 32, 32, 4, 2)
    for shape in ("patch4", "overlap", "gaps", "wide patch"):
        module.check(module.problem(FLOAT32, **module.SHAPES[shape]), config=tiny)
    for dtype in DTYPES:
        arguments = module.problem(dtype, size=(12, 20), patch=(4, 4), dim=33, prefix=9, per_image=True)
        module.check(arguments, config=tiny)
        arguments = module.problem(dtype, size=(8, 12), patch=(4, 4), dim=40, pixels=torch.uint8)
        module.check(arguments, mean=module.MEAN, std=module.STD, config=tiny)
    _patch_embed_launches(kernels, module)
    pixel = torch.empty(16, 1, 1, 1, device="meta")
    options = (pixel, None, None, None, (1, 1))
    refuses_too_many_rows(lambda rows: kernels.patch_embed(torch.empty(rows // 4, 1, 2, 2, device="meta"), *options))
    module.check(
        module.problem(FLOAT16, size=(8, 12), patch=(4, 4), bias=False, pos=False, prefix=None, pixels=FLOAT32)
    )
    module.check(module.problem(BFLOAT16, size=(8, 12), patch=(4, 4), side_dtype=FLOAT32))
    images, weight, bias, pos, prefix, stride = module.problem(
        FLOAT32, size=(12, 20), patch=(3, 4), stride=(3, 2), prefix=3
    )
    views = (
        lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(3, 3)[..., ::3], lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :3],
    )  # fmt: skip
    for view in views:
        arguments = (view(weight), bias.repeat_interleave(2)[::2], pos.transpose(1, 2).contiguous().transpose(1, 2))
        prefix_view = prefix.transpose(1, 2).contiguous().transpose(1, 2)
        module.check((view(images), *arguments, prefix_view, stride), config=tiny)
    module.check((images[:, :1].expand(-1, 3, -1, -1), weight, bias, pos, prefix, stride), config=tiny)
    module.test_views_of_images_give_the_same_bits("every second", torch.uint8)
    module.check(module.problem(FLOAT32, channels=1, size=(8, 8), patch=(4, 4)), config=tiny)
    for mean, std in ((None, (0.5, 1.0, 1.0)), ((0.5, 0.0, 0.0), None), (None, None)):
        module.check(module.problem(FLOAT16, size=(8, 12), patch=(4, 4), pixels=torch.uint8), mean=mean, std=std)
    images, *rest = module.problem(FLOAT16, size=(8, 12), patch=(4, 4), batch=3)
    module.check((images.to(memory_format=torch.channels_last), *rest), mean=[*module.MEAN], std=[*module.STD])
    module.check((images, *rest), mean=(0.5, 0.0, 0.0))
    module.check(module.problem(FLOAT32, channels=1, size=(6, 22), patch=(3, 11)), config=tiny)
    module.check(module.problem(FLOAT32, batch=1, size=(4, 4), patch=(4, 4), dim=1, prefix=None))
    module.test_not_finite_pixels_stay_in_their_patch(math.nan)
    module.test_large_fp16_values_do_not_overflow_on_the_way()
    module.test_empty_batch(torch.uint8)
    _far_images(kernels)


def _far_images(kernels):
    """Offsets beyond 2³¹ that are products of small numbers, on every axis of the images and of the prefix."""
    step = 2**30 + 64
    images, weight, prefix = (torch.randn(shape).half() for shape in ((3, 3, 8, 8), (16, 3, 4, 4), (3, 3, 16)))
    expected = kernels.patch_embed(images, weight, None, None, prefix, (4, 4))
    memory = reserved(8 * step, dtype=FLOAT16)
    for strides in ((step, 64, 8, 1), (64, step, 8, 1), (192, 64, step, 1), (192, 64, 1, step)):
        far = torch.as_strided(memory, images.shape, strides).copy_(images)
        assert torch.equal(kernels.patch_embed(far, weight, None, None, prefix, (4, 4)), expected)
    for strides in ((step, 16, 1), (16, step, 1), (48, 1, step // 4)):
        far = torch.as_strided(memory, prefix.shape, strides).copy_(prefix)
        assert torch.equal(kernels.patch_embed(images, weight, None, None, far, (4, 4)), expected)


def _patch_embed_launches(kernels, module):
    """Launch options that cannot change the interpreter's result, and the reasons for refusing a call."""
    recorder, picked = Recorder(), []

    def pick(*args):
        picked.append(args)
        return PatchEmbedConfig(16, 32, 16, 4, 2)

    arguments = module.problem(FLOAT32, size=(12, 20), patch=(4, 4), dim=72, prefix=9)
    with (
        mock.patch.object(kernels, "_patch_embed_fwd_kernel", recorder),
        mock.patch.object(configs_module, "pick_patch_embed_config", pick),
    ):
        for precision in ("highest", "high"):
            with matmul_precision(precision):
                kernels.patch_embed(*arguments)
        half = tuple(None if t is None else t.bfloat16() if isinstance(t, torch.Tensor) else t for t in arguments)
        kernels.patch_embed(half[0].to(memory_format=torch.channels_last), half[1], None, None, None, (4, 4))
        kernels.patch_embed(half[0][:, :1], half[1][:, :1], None, None, None, (4, 4))
        kernels.patch_embed(*half, mean=(0.0,) * 3, std=(1.0,) * 3)
        kernels.patch_embed(half[0][:0], *half[1:])
    assert picked == [(30, 72, FLOAT32, "ieee"), (30, 72, FLOAT32, "tf32"), *[(30, 72, BFLOAT16, "ieee")] * 3]
    found = [(n.PRECISION, n.UPCAST, n.CHANNELS_INNER, n.grid) for n in recorder.launches]
    assert found == [
        ("ieee", False, False, (12,)), ("tf32", False, False, (12,)), ("ieee", True, True, (6,)),
        ("ieee", True, False, (6,)), ("ieee", True, False, (12,)),
    ]  # fmt: skip
    assert recorder.launches[-1].args[6] is None
    images, *rest = half
    with (
        mock.patch.object(kernels, "_patch_embed_fwd_kernel", recorder),
        mock.patch.object(launch_kernels, "INTERPRETED", False),
    ):
        for _ in range(2):
            kernels.patch_embed(
                images.to(torch.uint8), *rest, mean=[0.5] * 3, config=PatchEmbedConfig(16, 32, 16, 4, 2)
            )
        kernels.patch_embed(images, *arguments[1:])
    assert recorder.launches[-2].args[6] is recorder.launches[-3].args[6]
    found = [(n.BLOCK_M, n.UPCAST, n.args[1].dtype) for n in recorder.launches[-2:]]
    assert found == [(16, False, torch.uint8), (64, False, FLOAT32)]
    weight = torch.randn(8, 64)[:, :60].unflatten(1, (3, 4, 5))
    assert kernels._flat_weight(weight, False).data_ptr() == weight.data_ptr()
    last = weight.to(memory_format=torch.channels_last)
    assert kernels._flat_weight(last, True).data_ptr() == last.data_ptr()
    strided = kernels._flat_weight(torch.randn(8, 120)[:, ::2].unflatten(1, (3, 4, 5)), False)
    assert strided.shape == (8, 60) and strided.stride() == (60, 1)
    images, weight, *rest = arguments
    assert kernels.not_supported_reasons(images.double(), weight.double(), *rest) == []
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        reasons = kernels.not_supported_reasons(images, weight, *rest)
        assert len(reasons) == 1 and "tensors on cpu" in reasons[0]
        assert len(kernels.not_supported_reasons(images, weight.double(), *rest)) == 2
        cuda = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=FLOAT32)
        assert kernels.not_supported_reasons(cuda, cuda, *rest) == []
    launch = device_is_made_current(
        kernels,
        "_patch_embed_fwd_kernel",
        lambda: kernels.patch_embed(
            *(torch.empty(t.shape, device="cuda") for t in arguments[:5]), (4, 4), std=(0.7,) * 3
        ),
    )
    assert launch.args[6].device.type == "cuda"


def configs():
    module, picked = configs_module, []
    assert [module.cdiv(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [module.power_of_two(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]
    for arch in (80, 86, 90, 100, 120):
        test_attention.test_every_shape_has_a_config_whose_keys_fit(attention_kernels, arch)
        test_linear.test_every_shape_has_a_config_that_fits(arch)
        for dtype, tf32, many in itertools.product(DTYPES, (False, True), (1, 197, 600, 10**6)):
            for head_size in (16, 64, 80, 96, 128, 160, 256):
                tiles = module.pick_attention_config(many, many, head_size, dtype, tf32, arch)
                assert not tiles.tma or arch in (90, 100)
                picked += [tiles.block_m, tiles.block_n or 16, tiles.num_warps]
                for_fp8 = module.pick_attention_config(many, many, head_size, dtype, tf32, arch, True)
                large = tiles == module.AttentionConfig(128, 64, 8, 2, True)
                assert for_fp8 == (module.AttentionConfig(64, 64, 4, 2, True) if large else tiles)
            for swiglu, unaligned in itertools.product((False, True), (False, True)):
                for out_dtype in (FLOAT16, FLOAT32):
                    tiles = module.pick_linear_config(many, 768, swiglu, dtype, out_dtype, tf32, unaligned, arch)
                    picked += [tiles.block_m, tiles.block_n, tiles.block_k, tiles.num_warps]
            tiles = module.pick_patch_embed_config(many, 768, dtype, "tf32" if tf32 else "ieee")
            picked += [tiles.block_m, tiles.block_n, tiles.block_k, tiles.num_warps]
            assert tiles.block_k == module.pick_patch_embed_config(1, 768, dtype, "tf32" if tf32 else "ieee").block_k
            stage = (tiles.block_m + tiles.block_n) * tiles.block_k * dtype.itemsize * tiles.num_stages
            assert dtype == FLOAT64 or stage <= 99 * 1024
    test_fp8_blocks.test_tiles_of_float8()
    for arch, rows, early in ((89, 1, False), (90, 8192, True), (90, 8193, False), (100, 1, True)):
        assert module.use_pdl(rows, arch) is early
    assert not module.alternate_tile_order(8192) and module.alternate_tile_order(8193)
    test_layer_norm.test_every_width_has_a_config()
    for sizes in test_linear.FEW_TILES:
        test_linear.test_few_tiles_split_their_sums(*sizes)
    assert all(size & (size - 1) == 0 for size in picked)
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    properties = SimpleNamespace(multi_processor_count=132, name="a GPU without a file of configs")
    with mock.patch.multiple(
        torch.cuda, get_device_capability=lambda device: (9, 1), get_device_properties=lambda device: properties
    ):
        assert (module.arch_of(cuda), module.arch_of(cpu)) == (91, 80)
        assert (module.multiprocessors_of(cuda), module.multiprocessors_of(cpu)) == (132, 1)
    assert module.AttentionConfig(16, 16, 4, 2).tma is False
    assert module.LinearConfig(16, 16, 16, 1, 4, 2, False).split_k == 1


def _stack_launches(kernels, name, functions, arguments, launches):
    """Every kernel of a stack of two blocks is launched with PDL, or none; each split-K has a semaphore of its own."""
    asked, early, rooms = [], [], []

    def spy_on(shipped):
        def spy(*args, pdl, **options):
            early.append(pdl)
            rooms.extend(room.clone() for key, room in options.items() if key == "semaphore")
            places.extend(room.data_ptr() for key, room in options.items() if key == "semaphore")
            return shipped(*args, **options)

        return spy

    def use_pdl(rows, arch):
        asked.append((rows, arch))
        return len(asked) == 2

    for _ in range(2):
        places = []
        with (
            mock.patch.multiple(kernels, **{word: spy_on(getattr(kernels, word)) for word in functions}),
            mock.patch.object(attention_kernels, "attention", spy_on(attention_kernels.attention)),
            mock.patch.object(layer_norm_kernels, "layer_norm", spy_on(layer_norm_kernels.layer_norm)),
            mock.patch.object(layer_norm_kernels, "row_partials", spy_on(layer_norm_kernels.row_partials)),
            mock.patch.object(layer_norm_kernels, "row_statistics", spy_on(layer_norm_kernels.row_statistics)),
            mock.patch.multiple(configs_module, use_pdl=use_pdl, arch_of=lambda device: 80),
        ):
            getattr(kernels, name)(*arguments)
        assert len(set(places)) == 4
    batch, tokens, _ = arguments[0].shape
    assert asked == [(batch * tokens, 80)] * 2
    assert early == [False] * launches + [True] * launches
    for room in rooms:
        assert room.dtype == torch.int32 and room.shape == (256,) and not room.any()


def fp8_blocks():
    """Every tensor of a block and every argument affects the result."""
    kernels, module = fp8_blocks_kernels, test_fp8_blocks
    for case in (((2, 17, 48), 96, "gelu", "tail"), ((3, 5, 32), 80, "swiglu", "swapped")):
        module.test_kernels_err_as_the_formula_does(*case, BFLOAT16)
    module.test_kernels_with_inner_norms_err_as_eager("layer", BFLOAT16)
    torch.manual_seed(0)
    x, activation = torch.randn(2, 5, 32).half(), "relu"
    weights = module.quantised([module.block(32, 40, activation) for _ in range(2)], activation)
    words = (2, 0.3, activation, 0.5, 2.0)
    out, golden = kernels.fp8_blocks(x, weights, *words), module.unrounded(x, weights, *words)
    formula = reference.fp8_blocks(x, weights, *words)
    module.assert_errs_as(out, formula, golden)
    options = PLAIN._replace(bias=torch.randn(1, 2, 5, 5).half())  # options with tensors have no launch plan
    biased = kernels.fp8_blocks(x, weights, *words, options)
    torch.testing.assert_close(biased, reference.fp8_blocks(x, weights, *words, options), rtol=0.1, atol=0.1)
    assert torch.equal(kernels.fp8_blocks(x, [], *words), x)
    with pytest.MonkeyPatch.context() as patch:
        module.test_seven_launches_a_block(patch)
    _stack_launches(kernels, "fp8_blocks", ("fp8_linear",), (x, weights, *words), 14)
    given, shipped = [], linear_kernels.fp8_linear
    with mock.patch.object(
        kernels, "fp8_linear", lambda *args, **options: given.append(len(args)) or shipped(*args, **options)
    ):
        kernels.fp8_blocks(x, weights, *words)
    assert given == [4, 4, 5, 4] * 2
    with pytest.MonkeyPatch.context() as patch:
        module.test_capability_is_a_reason(patch)
    wide, block = torch.zeros(1, 2, 65537, device="meta"), folding.first_block(folding.Float8Block, weights)
    narrow, large = (block._replace(qkv_weight=torch.zeros(3 * width, width)) for width in (16, 514))
    assert kernels.not_supported_reasons(wide.half(), narrow, 1) == ["width 65537 is above 65536"]
    assert kernels.not_supported_reasons(x, large, 1) == ["head size 514 is above 256"]
    assert kernels.not_supported_reasons(x, weights, 2) == []
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert len(kernels.not_supported_reasons(x, weights, 2)) == 1


def prepared_blocks():
    """Every tensor of a block and every argument affects the result; partials pass from launch to launch."""
    kernels, module = prepared_blocks_kernels, test_prepared_blocks
    for shape, hidden, activation, layout in (
        ((2, 5, 32), 40, "gelu", "tail"), ((1, 3, 48), 40, "swiglu", "swapped"),
    ):  # fmt: skip
        module.test_kernels_are_within_the_budget_of_eager(shape, hidden, activation, layout, FLOAT64)
    module.test_kernels_are_within_the_budget_of_eager((2, 9, 48), 40, "gelu", "contiguous", BFLOAT16)
    x, weights = torch.randn(2, 5, 32).double(), module.prepared([module.block(32, 40, "relu") for _ in range(2)])
    words = (2, 0.3, "relu", 0.5, 2.0)
    golden = reference.prepared_blocks(x, weights, *words)
    torch.testing.assert_close(kernels.prepared_blocks(x, weights, *words), golden, rtol=1e-11, atol=1e-11)
    assert torch.equal(kernels.prepared_blocks(x, [], *words), x)
    for name in module.OPTIONS:
        x, *_, tensors, chosen = module.with_options(name, 32, 40, FLOAT64)
        golden = reference.prepared_blocks(x, tensors, 2, 0.3, "gelu", 0.5, 2.0, chosen)
        actual = kernels.prepared_blocks(x, tensors, 2, 0.3, "gelu", 0.5, 2.0, chosen)
        torch.testing.assert_close(
            actual, golden, rtol=1e-6 if chosen.rope else 1e-11, atol=1e-6 if chosen.rope else 1e-11
        )
    x = torch.randn(2, 5, 32).double()
    for dtype in (BFLOAT16, FLOAT64):
        with pytest.MonkeyPatch.context() as patch:
            module.test_every_form_of_the_statistics_is_within_the_budget_of_eager(patch, dtype)
    for form, kernel in (("finalised", "_row_statistics_kernel"), ("plain", "_layer_norm_fwd_kernel")):
        with pytest.MonkeyPatch.context() as patch:
            module.test_seven_launches_a_block_in_the_other_forms(patch, form, kernel)
        names = ("linear_with_partials", "folded_linear") if form == "finalised" else ("linear",)
        asked = mock.Mock(return_value=configs_module.StackConfig(form))
        with mock.patch.object(configs_module, "pick_stack_config", asked):
            _stack_launches(kernels, "prepared_blocks", names, (x, weights, *words), 14 + (form == "finalised"))
        assert {call.args for call in asked.call_args_list} == {(10, 32, 80)}
    with pytest.MonkeyPatch.context() as patch:
        module.test_five_launches_a_block_and_one_in_front(patch)
    _stack_launches(kernels, "prepared_blocks", ("linear_with_partials", "folded_linear"), (x, weights, *words), 11)
    asked = []

    def spy(*arguments, reverse_tiles, **options):
        asked.append(reverse_tiles)
        return linear_kernels.linear_with_partials(*arguments, **options)

    for chosen in (False, True):
        with (
            mock.patch.object(kernels, "linear_with_partials", spy),
            mock.patch.object(
                configs_module, "alternate_tile_order", lambda rows, chosen=chosen: chosen and rows == 10
            ),
        ):
            kernels.prepared_blocks(x, weights, *words)
    assert asked == [False] * 4 + [True] * 4
    wide = torch.zeros(2, 3, 16385, device="meta")
    block = folding.first_block(folding.FoldedBlock, weights)
    narrow = block._replace(qkv_weight=torch.zeros(48, 514, dtype=FLOAT16))
    large = block._replace(qkv_weight=torch.zeros(3 * 514, 514))
    assert kernels.not_supported_reasons(wide, narrow, 1) == ["width 16385 is above 16384"]
    assert kernels.not_supported_reasons(x, large, 1) == ["head size 514 is above 256"]
    assert kernels.not_supported_reasons(x, weights, 2) == []
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        both = kernels.not_supported_reasons(x.half(), weights, 2)
        assert len(both) == len(set(both)) == 2 and kernels.not_supported_reasons(x, weights, 2) == both
