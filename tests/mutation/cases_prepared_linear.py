"""Kill suite of one linear layer on a prepared weight: the rounding of tokens, and what the layers pass to the GEMM."""

from unittest import mock

import numpy as np
import test_large_offsets
import test_prepared_linear
import torch
from stand_ins import Recorder, device_is_made_current
from support.large_tensors import last_programs_alone, reserved
from support.prepared_linear import formula, kernel_of, problem
from vit_fast.kernels import configs as configs_module
from vit_fast.kernels import launch as launch_kernels
from vit_fast.kernels import layer_norm as layer_norm_kernels
from vit_fast.kernels import prepared_linear as kernels
from vit_fast.kernels import reference
from vit_fast.kernels.configs import LayerNormConfig
from vit_fast.kernels.prepared_layer import PreparedLayer

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


def prepared_linear():
    _tokens()
    _layers()
    _launches()
    _reasons()


def _tokens():
    module = test_prepared_linear
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        for norm in (None, "layer", "rms"):
            module.test_interpreted_tokens_have_steps_of_their_own(dtype, norm)
    module.test_a_token_that_is_not_finite_becomes_nan()
    _parameters_of_the_norm()
    _small_and_large_rows()
    _programs_and_layouts()


def _parameters_of_the_norm():
    """Each changes the tokens, alone and together; eps counts."""
    x, weight, bias = torch.randn(3, 40) * 0.2, torch.randn(40), torch.randn(40)
    for sides in ((weight, None), (None, bias), (weight, bias), (None, None)):
        for norm in ("layer", "rms"):
            golden = test_prepared_linear.normalised(x, *sides, 0.1, norm)[0]
            tokens, statistics = kernels.quantise_tokens(x, *sides, 0.1, norm)
            test_prepared_linear.assert_rounded_by_steps(tokens, statistics.values[1][:, None], golden)
    assert torch.equal(
        kernels.quantise_tokens(x, weight, bias, 0.1)[0].float(),
        kernels.quantise_tokens(x, weight, bias, 0.1, "layer")[0].float(),
    )
    tokens, statistics = kernels.quantise_tokens(x, weight, bias, 0.0)
    golden = test_prepared_linear.normalised(x, weight, bias, 0.0, "layer")[0]
    test_prepared_linear.assert_rounded_by_steps(tokens, statistics.values[1][:, None], golden)
    spread = torch.randn(40, 2).unbind(1)[0]
    tokens, _ = kernels.quantise_tokens(x, spread, spread, 0.1)
    again, _ = kernels.quantise_tokens(x, spread.contiguous(), spread.contiguous(), 0.1)
    assert torch.equal(tokens.float(), again.float())


def _small_and_large_rows():
    """Where a row is too small to be scaled its step is 1; negative values count by their size."""
    x = torch.zeros(4, 20)
    x[0, 3], x[1, 3], x[2, 3], x[3] = 1e-30, 1.1e-30, -2.0, -1.0
    x[2, 5] = 1.0
    tokens, statistics = kernels.quantise_tokens(x)
    wanted, step = reference.quantise_tokens(x)
    assert torch.equal(tokens.float(), wanted.float()) and torch.equal(statistics.values[1], step[:, 0])
    assert statistics.values[1, 0] == 1 and statistics.values[1, 1] < 1e-30


def _programs_and_layouts():
    """Rows shared by programs, the ends of rows and of tokens, strides of any kind, and offsets beyond int32."""
    for shape, config in (((5, 20), LayerNormConfig(2, 32, 4)), ((2, 3, 20), LayerNormConfig(4, 32, 4))):
        x = torch.randn(shape)
        with np.errstate(divide="raise"):
            tokens, statistics = kernels.quantise_tokens(x, config=config)
        wanted, step = reference.quantise_tokens(x)
        assert tokens.shape == x.shape and tokens.is_contiguous() and tokens.dtype == torch.float8_e4m3fn
        assert torch.equal(tokens.float(), wanted.float())
        assert torch.equal(statistics.values, torch.stack([torch.zeros(step.numel()), step.flatten()]))
    x = torch.randn(3, 5, 16).half()
    expected = kernels.quantise_tokens(x, eps=1e-6)
    memory = reserved(16 * (2**27 + 2**24), dtype=FLOAT16)
    for strides in ((2**30 + 64, 16, 1), (80, 2**29 + 64, 1), (5, 1, 2**27 + 2**24)):
        far = torch.as_strided(memory, x.shape, strides).copy_(x)
        tokens, statistics = kernels.quantise_tokens(far, eps=1e-6)
        assert torch.equal(tokens.float(), expected[0].float())
        assert torch.equal(statistics.values, expected[1].values)
    for empty in (x[:0], x[:, :0]):
        tokens, statistics = kernels.quantise_tokens(empty)
        assert tokens.shape == empty.shape and statistics.values.shape == (2, 0)
    with last_programs_alone():
        test_large_offsets.test_quantised_tokens(None)


def _layers():
    """Every tensor of a layer and every argument affects the result."""
    for fp8 in (False, True):
        torch.manual_seed(0)
        for dtype in (FLOAT32, BFLOAT16):
            for activation, norm, ends, bias in (
                ("gelu", "layer", False, True), ("swiglu", "rms", False, False), (None, None, True, True),
                (None, "layer", True, False),
            ):  # fmt: skip
                x, layer, residual = problem((2, 9, 64), 48, dtype, fp8, activation, norm, ends, bias)
                layer = layer if layer.eps is None else layer._replace(eps=0.3)
                out, golden = kernel_of(fp8)(x, layer, residual), formula(x, layer, residual)
                error = ((out - golden).norm() / golden.norm()).item()
                assert out.dtype == dtype and error < (0.05 if fp8 else 1e-6 if dtype == FLOAT32 else 0.01)
                if residual is not None:  # in another dtype than x
                    other = kernel_of(fp8)(x, layer, residual.double())
                    assert other.dtype == dtype and torch.equal(other, out)
        test_prepared_linear.test_no_tokens((0, 5, 48), fp8)
        test_prepared_linear.test_no_tokens((2, 0, 48), fp8)


def _launches():
    """What the interpreter's results cannot tell: PDL by rows and architecture, the grid, the device."""
    recorder, x = Recorder(), torch.randn(2, 5, 64)
    with mock.patch.object(kernels, "_quantise_tokens_fwd_kernel", recorder):
        kernels.quantise_tokens(x, config=LayerNormConfig(4, 64, 8))
        kernels.quantise_tokens(x, pdl=True)
        kernels.quantise_tokens(x.double())
        kernels.quantise_tokens(x[:0])
    first, second, third = recorder.launches
    assert first.grid == (3,) and (first.ROWS, first.BLOCK, first.num_warps) == (4, 64, 8)
    assert [launch.PDL for launch in recorder.launches] == [False, True, False]
    assert [launch.NORM for launch in recorder.launches] == [None] * 3
    assert (str(first.ACC), str(third.ACC)) == ("fp32", "fp64")
    picked = configs_module.pick_layer_norm_config(64)
    assert (second.ROWS, second.BLOCK, second.num_warps) == (picked.rows, picked.block, picked.num_warps)
    device_is_made_current(
        kernels, "_quantise_tokens_fwd_kernel", lambda: kernels.quantise_tokens(torch.empty(2, 16, device="cuda"))
    )
    for fp8 in (False, True):
        _pdl_of_layers(fp8)


def _pdl_of_layers(fp8):
    """Both launches of a layer take PDL, which depends on the rows and the architecture."""
    asked, given = [], []
    shipped, rounds, normalises = kernels.gemm, kernels.quantise_tokens, layer_norm_kernels.layer_norm

    def use_pdl(*of):
        asked.append(of)
        return False

    def seen(function):
        def call(*inputs, **options):
            given.append(options.get("pdl", inputs[5] if function is rounds else None))
            return function(*inputs, **options)

        return call

    x, layer, residual = problem((2, 9, 64), 48, FLOAT32, fp8, norm="layer")
    with (
        mock.patch.object(configs_module, "use_pdl", use_pdl),
        mock.patch.object(configs_module, "arch_of", lambda device: 90),
        mock.patch.object(kernels, "gemm", seen(shipped)),
        mock.patch.object(kernels, "quantise_tokens", seen(rounds)),
        mock.patch.object(layer_norm_kernels, "layer_norm", seen(normalises)),
    ):
        kernel_of(fp8)(x, layer, residual)
        kernel_of(fp8)(x[:0], layer, residual)
        for shape in ((0, 0), (4, 1)):
            assert kernels._pdl(torch.empty(shape)) is False
    assert asked[:2] == [(18, 90), (0, 90)] and asked[-2:] == [(0, 90), (4, 90)]
    assert given == [False] * len(given) and len(given) == 4


def _reasons():
    assert kernels.MAX_WIDTH == 16384
    test_prepared_linear.test_wide_tokens_are_left_to_others()
    both = kernels.prepared_linear_not_supported_reasons, kernels.fp8_linear_not_supported_reasons
    x, layer = torch.empty(1, 16384), PreparedLayer([torch.empty(8, 16384)], None, 8, eps=1e-6)
    assert [reasons(x, layer) for reasons in both] == [[], []]
    edge = torch.empty(1, 65536, device="meta")
    assert kernels.prepared_linear_not_supported_reasons(edge, layer) == []
    with mock.patch.object(launch_kernels, "INTERPRETED", False):
        assert [len(reasons(x, layer)) for reasons in both] == [1, 1]
    for field in ("ln_weight", "ln_bias", "gamma", "bias", "residual", "weight"):
        _reasons_name_every_tensor(both, x, layer, field)
    cuda = mock.Mock(spec=torch.Tensor, shape=x.shape, device=torch.device("cuda", 0))
    with mock.patch.object(launch_kernels, "device_reasons", lambda *tensors: []):
        for arch, told in ((89, []), (90, []), (80, ["float8 needs capability 8.9, the device has 8.0"])):
            with mock.patch.object(configs_module, "arch_of", lambda device, arch=arch: arch):
                assert kernels.fp8_linear_not_supported_reasons(cuda, layer) == told
                assert kernels.fp8_linear_not_supported_reasons(x, layer) == []


def _reasons_name_every_tensor(both, x, layer, field):
    """A tensor on another device is seen wherever it stands."""
    seen, other = [], torch.empty(3)
    residual = other if field == "residual" else None
    layer = layer if residual is other else layer._replace(**{field: [other] if field == "weight" else other})
    with mock.patch.object(launch_kernels, "device_reasons", lambda *tensors: seen.append(tensors) or ["told"]):
        for reasons in both:
            assert reasons(x, layer, residual) == ["told"]
    assert all(any(tensor is other for tensor in tensors) and tensors[0] is x for tensors in seen)
