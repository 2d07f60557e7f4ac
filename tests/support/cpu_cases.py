"""The random cases of the other suites on the backend ``cpu``, at an instruction-set level.

What holds for Triton's kernels up to rounding holds here bit for bit: no result depends on the rows, images or threads
beside it.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest import mock

import torch
from support import linear, properties
from support.attention import AttentionCase
from support.attention_bwd import AttentionBwdCase
from support.layer_norm import LayerNormCase
from support.layer_norm import formula as normalised
from support.layernorm_mlp import LayerNormMlpCase
from support.linear import LinearCase
from support.packed_blocks import Int8BlocksCase, PackedBlocksCase
from support.patch_embed import PatchEmbedCase
from vit_fast.kernels import reference
from vit_fast.kernels.activation_names import GATED

from vit_fast.backends.cpu import CPU

THREADS = (1, 2, 3)
LEVELS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
# Of a result's largest value: float32 sums in any order; one rounding and the attention's exponentials in 16 bits.
EPSILON = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
reference_attention = reference.attention


@contextlib.contextmanager
def at_level(name):
    """Runs the kernels of a level, or of the highest that the processor has; yields which."""
    before, here = CPU.version(), CPU.levels()
    CPU.use_level(name if name in here else here[-1])
    try:
        yield CPU.version()
    finally:
        CPU.use_level(before)


def with_threads(number, function):
    """The results of a call with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class OnCpu(properties.Case):
    """A mixin, in front of a case: its calls run at the level that the field ``level`` names."""

    command: ClassVar[str] = (
        "VIT_FAST_TEST_EXTENSION=1 python -P -m pytest -m extension tests/csrc/test_cpu_properties.py -k kept"
    )

    def check(self):
        with at_level(self.level):
            super().check()

    def same_but_for_order(self, inputs, actual, expected):
        self.same_bits(actual, expected)

    def relation_program_order(self, inputs, results):
        """Threads take other tasks in every call."""
        self.relation_threads(inputs, results)

    def relation_threads(self, inputs, results):
        for number in THREADS:
            self.same_bits(with_threads(number, lambda: self.kernel(*inputs)), results)

    def relation_repeated(self, inputs, results):
        self.same_bits(self.kernel(*inputs), results)


@dataclass(frozen=True)
class CpuAttentionCase(OnCpu, AttentionCase):
    level: str = "generic"

    def kernel(self, q, k, v, block_m=None, with_lse=True):
        if not with_lse:
            return CPU.inference["attention"](q, self.num_heads, self.scale, k=k, v=v), None
        return CPU.forward["attention"](q, self.num_heads, self.scale, k=k, v=v)

    def order(self, *inputs):
        """256 products with v are summed one after the other; where all are equal, the roundings add up."""
        out, lse = super().order(*inputs)
        equal = self.values == "equal rows" and self.dtype == "float32"
        return out + (2.0**-18 * self.separate(inputs)[2].abs().max().item() if equal else 0.0), lse

    relation_rows_per_program = None

    def relation_queries_permuted(self, inputs, results):
        q, k, v = self.separate(inputs)
        order = properties.permutation(q.shape[1], self.seed)
        self.same_bits(self.kernel(q[:, order], k, v), (results[0][:, order], results[1][:, :, order]))


@dataclass(frozen=True)
class CpuAttentionBwdCase(OnCpu, AttentionBwdCase):
    """Gradients of attention, with dropout too; no lengths of keys, and v has q's head size."""

    level: str = "generic"

    def kernel(self, grad, q, k, v, lengths):
        drop = self.options(lengths)
        out, lse = CPU.forward["attention"](q, self.num_heads, self.scale, k=k, v=v, **drop)
        grads = CPU.backward["attention"](grad, q, self.num_heads, self.scale, k, v, out, lse, **drop)
        return list(grads[: 1 if k is None else 3])

    relation_key_blocks = relation_all_keys = relation_what_lies_behind_the_keys = relation_zero_channels = None


@dataclass(frozen=True)
class CpuLayerNormCase(OnCpu, LayerNormCase):
    level: str = "generic"

    def kernel(self, x, weight, bias, eps=None):
        return CPU.forward["layer_norm"](x, weight, bias, self.eps if eps is None else eps, norm=self.norm)

    def eager(self, x, weight, bias):
        return reference.layer_norm_fwd(x, weight, bias, self.eps, norm=self.norm)

    def golden(self, x, weight, bias):
        return normalised(x, weight, bias, self.eps, self.norm)

    def order(self, x, weight, bias):
        change = 2.0**-22 * x.double().abs().mean(-1).flatten()
        _, _, rstd = self.golden(x, weight, bias)
        slope = 1.0 if weight is None else weight.double().abs().max().item()
        orders = change * rstd * slope, change, rstd * (2.0**-22 + (change * rstd).square() / 2)
        return [order.max().item() for order in orders]

    relation_rows_per_program = None

    def relation_powers_of_two(self, inputs, results):
        x, *sides = inputs
        y, mean, rstd = results
        if self.values != "subnormal" and (x * 4).isfinite().all():
            self.same_bits(self.kernel(x * 4, *sides, eps=self.eps * 16), (y, mean * 4, rstd / 4))

    def relation_without_statistics(self, inputs, results):
        self.same_bits([CPU.inference["layer_norm"](*inputs, self.eps, norm=self.norm)], results[:1])


@dataclass(frozen=True)
class CpuLinearResidualCase(OnCpu, LinearCase):
    level: str = "generic"

    def kernel(self, x, weight, bias, gamma, residual, row_scale):
        return [CPU.forward["linear_residual"](x, weight, bias, gamma, residual, row_scale=row_scale)]

    def golden(self, x, weight, bias, *rest):
        """x is not rounded to the dtype of the weight where the processor need not."""
        return [linear.formula(x, weight, bias, None, **self.options(*rest))]

    relation_descriptors = relation_split_k = relation_partials = None


@dataclass(frozen=True)
class CpuLayerNormLinearCase(OnCpu, LinearCase):
    """A LayerNorm in front; the fields gamma and row_scale say whether it has a weight and a bias."""

    level: str = "generic"
    norm: str = "layer"
    EPS: ClassVar[float] = 1e-6

    def inputs(self, seed, draw=properties.filled):
        plain = replace(self, gamma=False, row_scale=False, residual_dtype="")
        x, weight, bias, *_ = LinearCase.inputs(plain, seed, draw)
        side = draw((2, self.in_features), "normal", properties.generator_of(seed + 7)).to(x.dtype)
        return x, weight, bias, side[0] if self.gamma else None, side[1] if self.row_scale else None

    def kernel(self, x, weight, bias, ln_weight, ln_bias):
        return CPU.forward["layer_norm_linear"](
            x, ln_weight, ln_bias, self.EPS, weight, bias, self.activation, norm=self.norm
        )

    def eager(self, x, weight, bias, ln_weight, ln_bias):
        return reference.layer_norm_linear_fwd(
            x, ln_weight, ln_bias, self.EPS, weight, bias, self.activation, norm=self.norm
        )

    def golden(self, x, weight, bias, ln_weight, ln_bias):
        y, mean, rstd = normalised(x, ln_weight, ln_bias, self.EPS, self.norm)
        return linear.formula(y, weight, bias, self.activation), mean, rstd

    def order(self, x, weight, bias, ln_weight, ln_bias):
        y, _, rstd = normalised(x, ln_weight, ln_bias, self.EPS, self.norm)
        change = 2.0**-22 * x.double().abs().mean(-1).flatten()
        slope = 1.0 if ln_weight is None else ln_weight.double().abs().max().item()
        (of_product,) = LinearCase.order(self, y, weight, bias, None, None, None)
        size = weight.double().abs().sum(1).max().item()
        gain = (y.abs().max() * size + 5).item() if self.activation in GATED else 1.13
        moved = (change * rstd).max().item() * slope * size * gain
        return of_product + moved, change.max().item(), (2.0**-22 * rstd).max().item()

    relation_descriptors = relation_split_k = relation_partials = relation_integers = relation_powers_of_two = None

    def relation_layout_of_rows(self, inputs, results):
        x, *rest = inputs
        self.same_bits(self.kernel(properties.laid_out(x, self.layout), *rest), results)

    def relation_layout_of_weights(self, inputs, results):
        x, *rest = inputs
        self.same_bits(self.kernel(x, *properties.all_laid_out(self.layout, *rest)), results)

    def image_wise(self, results):
        out, *statistics = results
        return out, *(s.unflatten(0, (self.batch, -1)) for s in statistics)

    def relation_one_image_alone(self, inputs, results):
        x, *rest = inputs
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        out, *statistics = self.kernel(x[image], *rest)
        actual = out, *(s[None] for s in statistics)
        self.same_bits(actual, [t[image] for t in self.image_wise(results)])

    def relation_images_permuted(self, inputs, results):
        x, *rest = inputs
        order = properties.permutation(self.batch, self.seed)
        actual = self.image_wise(self.kernel(x[order], *rest))
        self.same_bits(actual, [t[order] for t in self.image_wise(results)])

    def relation_without_statistics(self, inputs, results):
        x, weight, bias, *sides = inputs
        out = CPU.inference["layer_norm_linear"](x, *sides, self.EPS, weight, bias, self.activation, norm=self.norm)
        self.same_bits([out], results[:1])


@dataclass(frozen=True)
class CpuLayerNormMlpCase(OnCpu, LayerNormMlpCase):
    level: str = "generic"

    def kernel(self, *inputs):
        """Without the pre-activation, which has no elements then."""
        return CPU.forward["layernorm_mlp"](*inputs[:10], **self.options(*inputs[10:]), recompute=True)[:3]

    def eager(self, *inputs):
        return super().eager(*inputs)[:3]

    def golden(self, *inputs):
        return super().golden(*inputs)[:3]

    def order(self, *inputs):
        return super().order(*inputs)[:3]

    def relation_with_the_pre_activation(self, inputs, results):
        """PyTorch applies the activation then, to values in the dtype of the weights."""
        *actual, z = CPU.forward["layernorm_mlp"](*inputs[:10], **self.options(*inputs[10:]))
        self.within_budget(inputs, actual)
        self.same_bits(actual[1:], results[1:])
        expected = super().eager(*inputs)[3]
        allowed = 2 * torch.finfo(z.dtype).eps * expected.abs().max() + super().order(*inputs)[3]
        assert z.dtype == expected.dtype and (z - expected).abs().max() <= allowed

    def relation_without_statistics(self, inputs, results):
        out = CPU.inference["layernorm_mlp"](*inputs[:10], **self.options(*inputs[10:]))
        self.same_bits([out], results[:1])


@dataclass(frozen=True)
class CpuPatchEmbedCase(OnCpu, PatchEmbedCase):
    level: str = "generic"

    def kernel(self, *inputs):
        return [CPU.forward["patch_embed"](*inputs, *self.options())]


@dataclass(frozen=True)
class CpuPackedBlocksCase(OnCpu, PackedBlocksCase):
    level: str = "generic"

    def kernel(self, x, *weights):
        return [CPU.forward["packed_blocks"](x, weights, *self.arguments)]

    def relation_a_broken_image_stays_alone(self, inputs, results):
        broken_image_stays_alone(self, inputs, results)


@dataclass(frozen=True)
class CpuInt8BlocksCase(OnCpu, Int8BlocksCase):
    level: str = "generic"

    def kernel(self, x, *weights):
        return [CPU.forward["int8_blocks"](x, weights, *self.arguments)]

    def eager(self, x, *weights):
        """A processor that multiplies bfloat16 does so in the attention between int8 products."""
        plain = reference.attention
        if self.level == "avx512_bf16":
            plain = lambda qkv, *rest: reference_attention(qkv.bfloat16(), *rest).to(qkv.dtype)  # noqa: E731
        with mock.patch.object(reference, "attention", plain):
            return super().eager(x, *weights)

    def relation_a_broken_image_stays_alone(self, inputs, results):
        broken_image_stays_alone(self, inputs, results)


def broken_image_stays_alone(case, inputs, results):
    """NaN or infinity in one token makes NaN of its image and leaves every bit of the others."""
    x, *weights = inputs
    broken = case.seed % case.batch
    x = x.clone()
    x[broken, 0, 0] = (float("nan"), float("inf"), -float("inf"))[case.seed % 3]
    out = case.kernel(x, *weights)[0]
    others = torch.arange(case.batch) != broken
    case.same_bits([out[others]], [results[0][others]])
    assert not out[broken, 0].isfinite().any(), f"relation '{case.relation}'"
