"""The device code of ``csrc/cuda`` on a CPU: numbers within the error budget of float64, no fault of memory or order.

``tests/emulator`` runs each CUDA thread as a fibre; its head comment has what it finds and what it cannot show. The
cases are random ones like those of the Triton kernels, and shapes at the edges of tiles. Mutants of the sources, one or
more for each kind of fault, show that the emulator sees it.
"""

from dataclasses import dataclass
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import large_tensors, properties
from support.attention import AttentionCase, formula
from support.budget import assert_within_budget
from support.cuda_emulator import EmulatorFault, View, build, reads, type_of, writes
from support.layer_norm import LayerNormCase
from support.layer_norm import formula as layer_norm_formula
from support.linear import exact_activation, wide
from support.patch_embed import PatchEmbedCase
from support.patch_embed import golden as patch_embed_golden
from vit_fast.kernels import reference
from vit_fast.kernels.activation_names import ACTIVATIONS, GATED

EXAMPLES = 400 if properties.FULL else 40


def explore(cases, count, examples=EXAMPLES):
    @hypothesis.seed(properties.SEED)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def run(case):
        count("cases", 1)
        try:
            case.check()
        except Exception as error:
            error.add_note(repr(case))
            raise

    run()


def run_layer_norm(
    x, weight, bias, eps, out_dtype=None, library=None, statistics=True, output=True, norm="layer", **options
):
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype) if output else None
    rows = x.numel() // x.shape[-1]
    mean, rstd = (torch.empty(rows) if statistics else None for _ in range(2))
    (library or build("layer_norm")).call(
        "emulated_layer_norm",
        writes(y, "y"), writes(mean, "mean"), writes(rstd, "rstd"),
        reads(x, "x"), reads(weight, "weight"), reads(bias, "bias"),
        x.dim(), tuple(x.shape), x.stride(), type_of(x), type_of(weight, bias), type_of(y, x), eps, int(norm == "rms"),
        **options,
    )  # fmt: skip
    return y, mean, rstd


class EmulatedLayerNorm(LayerNormCase):
    def kernel(self, x, weight, bias, eps=None):
        eps = self.eps if eps is None else eps
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            x = x.contiguous()
        out_dtype = properties.DTYPES[self.out_dtype]
        return run_layer_norm(x, weight, bias, eps, out_dtype, norm=self.norm, schedule=self.seed % 3)

    def eager(self, *inputs):
        return super().eager(*inputs)[:3]

    def golden(self, *inputs):
        return super().golden(*inputs)[:3]

    def order(self, x, weight, bias):
        _, _, rstd = self.golden(x, weight, bias)
        change = 2.0**-22 * x.double().abs().mean(-1).flatten()
        slope = 1.0 if weight is None else weight.double().abs().max().item()
        return [order.max().item() for order in (change * rstd * slope, change, 2.0**-22 * rstd)]

    def check(self):
        inputs = self.inputs(self.seed)
        results = self.kernel(*inputs)
        self.within_budget(inputs, results)
        x, *sides = inputs
        image = self.seed % self.batch
        alone = self.kernel(x[image], *sides)
        self.same_bits([alone[0]], [results[0][image]])
        self.within_budget(inputs, self.kernel(properties.laid_out(x, self.layout), *sides))


@st.composite
def layer_norm_cases(draw):
    dtype = draw(st.sampled_from(("bfloat16", "float16", "float32")))
    width = draw(st.one_of(st.integers(1, 300), st.sampled_from((48, 384, 768, 1024, 1152, 2048, 2056, 3072))))
    out_dtype = draw(st.sampled_from(("float32", "float16", "bfloat16"))) if dtype == "float32" else dtype
    return EmulatedLayerNorm(
        dtype=dtype,
        side_dtype=draw(st.sampled_from((out_dtype, "float32"))),
        out_dtype=out_dtype,
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 5)),
        width=width,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 1e-5, 1e-12))),
        norm=draw(st.sampled_from(("layer", "rms"))),
        mean=draw(st.sampled_from((0.0, 0.0, -3.0, 100.0) if dtype == "float16" else (0.0, 0.0, -3.0, 1e4, 1e6))),
        rows=1,
        block=0,
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        relation="",
        seed=draw(properties.seeds),
    )


def test_layer_norm(count):
    explore(layer_norm_cases(), count)


def test_layer_norm_without_statistics_and_rows():
    x, weight = torch.randn(3, 5, 64), torch.randn(64)
    y, mean, rstd = run_layer_norm(x, weight, None, 1e-6, statistics=False)
    assert mean is None and rstd is None
    assert torch.equal(y, run_layer_norm(x, weight, None, 1e-6)[0])
    assert torch.equal(run_layer_norm(x[:, 1:], weight, None, 1e-6)[0], y[:, 1:])
    assert run_layer_norm(x[:0], weight, None, 1e-6)[0].shape == (0, 5, 64)


@pytest.mark.parametrize("dtype,width", ((torch.float32, 64), (torch.bfloat16, 60), (torch.half, 3000)))
def test_layer_norm_statistics_alone(dtype, width):
    x = torch.randn(5, width).to(dtype)
    y, *statistics = run_layer_norm(x, None, None, 1e-6, output=False)
    assert y is None
    for found, wanted in zip(statistics, run_layer_norm(x, None, None, 1e-6)[1:], strict=True):
        assert torch.equal(found, wanted)


def run_attention(q, num_heads, scale, k=None, v=None, library=None, with_lse=True, **options):
    if k is None:
        q, k, v = q.chunk(3, 2)
    batch, queries, size = q.shape
    out = torch.empty(batch, queries, size, dtype=q.dtype)
    lse = torch.empty(batch, num_heads, queries) if with_lse else None
    strides = [stride for t in (q, k, v) for stride in t.stride()[:2]]
    (library or build("attention")).call(
        "emulated_attention", writes(out, "out"), writes(lse, "lse"), reads(q, "q"), reads(k, "k"), reads(v, "v"),
        batch, num_heads, queries, k.shape[1], size // num_heads, strides, type_of(q), scale, **options,
    )  # fmt: skip
    return out, lse


def in_pieces(t):
    """t where the kernel takes it: heads contiguous, images and rows in pieces of 16 bytes; else a copy."""
    aligned = t is None or (
        t.stride(2) == 1 and not any(n * t.itemsize % 16 for n in t.stride()[:2]) and t.data_ptr() % 16 == 0
    )
    return t if aligned else t.clone(memory_format=torch.contiguous_format)  # contiguous() may return t itself


@dataclass(frozen=True)
class EmulatedAttention(AttentionCase):
    shared_limit: int = 232448  # enough for K and V, for two stages of 64 keys, of 32; of float32 what sm_75 has

    def kernel(self, q, k, v, with_lse=True, schedule=0):
        return run_attention(
            *(in_pieces(q), self.num_heads, self.scale, in_pieces(k), in_pieces(v)),
            with_lse=with_lse, schedule=schedule, shared_limit=self.shared_limit,
        )  # fmt: skip

    def check(self):
        inputs = self.inputs(self.seed)
        results = self.kernel(*inputs)
        self.within_budget(inputs, results)
        self.same_bits(self.kernel(*inputs, schedule=self.seed), results)
        views = properties.each(lambda t: properties.laid_out(t, self.layout), *inputs)
        self.same_bits(self.kernel(*views, with_lse=False)[:1], results[:1])
        image = slice(self.seed % self.batch, self.seed % self.batch + 1)
        self.same_bits(self.kernel(*properties.each(lambda t: t[image], *inputs)), [t[image] for t in results])


@st.composite
def attention_cases(draw):
    packed = draw(st.booleans())
    keys = draw(st.one_of(st.integers(1, 40), st.sampled_from((17, 63, 64, 65, 80, 128, 130, 197))))
    head_size = draw(st.sampled_from(range(16, 136, 8)))
    dtype = draw(st.sampled_from(("bfloat16", "float16", "float32")))
    limits = (232448, 512 * (head_size + 16), 256 * (head_size + 16)) if dtype != "float32" else (65536,)
    return EmulatedAttention(
        dtype=dtype,
        batch=draw(st.integers(1, 2)),
        queries=keys if packed else draw(st.integers(1, 70)),
        keys=keys,
        num_heads=draw(st.integers(1, 3)) if keys <= 65 else 1,
        head_size=head_size,
        packed=packed,
        block_m=0,
        block_n=0,
        tma=False,
        scale=draw(st.sampled_from((0.125, 0.25, 0.1, 1.0, -0.3))),
        values=draw(properties.values_to_the_limit),
        layout=draw(properties.layouts),
        relation="",
        seed=draw(properties.seeds),
        shared_limit=draw(st.sampled_from(limits)),
    )


def test_attention(count):
    explore(attention_cases(), count)


def test_attention_with_half_steps(count):
    """fp16 as sm_75 has it, by m16n8k8: the same sums."""
    qkv = torch.randn(1, 50, 3 * 2 * 72).half()
    older = run_attention(qkv, 2, 0.125, library=build("attention", flags=("-DVF_EMULATED_ARCH=750",)))
    for one, other in zip(older, run_attention(qkv, 2, 0.125), strict=True):
        assert torch.equal(one, other)


def test_attention_has_no_bank_conflicts():
    library = build("attention")
    run_attention(torch.randn(1, 197, 3 * 64).bfloat16(), 1, 0.125, library=library)
    phases, conflicts = library.counts[4:]
    assert phases > 1000 and conflicts == 0


def run_patch_embed(images, weight, bias, pos, prefix, stride, mean=None, std=None, library=None, **options):
    dim, channels, patch_height, patch_width = weight.shape
    grid = [(n - p) // s + 1 for n, p, s in zip(images.shape[2:], weight.shape[2:], stride)]
    num_prefix = 0 if prefix is None else prefix.shape[1]
    out = torch.empty(images.shape[0], num_prefix + grid[0] * grid[1], dim, dtype=weight.dtype)
    inner = channels > 1 and images.stride(1) == 1 and images.stride(3) == channels
    flat = (weight.permute(0, 2, 3, 1) if inner else weight).reshape(dim, -1).contiguous()
    unit, pixels = 255.0 if images.dtype == torch.uint8 else 1.0, None
    if mean or unit != 1.0:
        shift, scale = mean or [0.0] * channels, std or [1.0] * channels
        pixels = torch.tensor([[m * unit for m in shift], [1 / (s * unit) for s in scale]])
    prefix = prefix if num_prefix else None
    sizes = [images.shape[0], channels, patch_height, patch_width, *stride, grid[0] * grid[1], grid[1], num_prefix, dim]
    strides = [*images.stride(), flat.stride(0), *(bias.stride() if bias is not None else (0,))]
    strides += pos.stride()[1:] if pos is not None else (0, 0)
    strides += (0, 0, 0) if prefix is None else [prefix.stride(0) * (prefix.shape[0] > 1), *prefix.stride()[1:]]
    (library or build("patch_embed")).call(
        "emulated_patch_embed", writes(out, "out"), reads(images, "images"), reads(flat, "weight"), reads(bias, "bias"),
        reads(pos, "pos_embed"), reads(prefix, "prefix"), reads(pixels, "pixels"), sizes, strides, int(inner),
        type_of(weight), type_of(images), type_of(pos) == 0, type_of(prefix) == 0, **options,
    )  # fmt: skip
    return out


class EmulatedPatchEmbed(PatchEmbedCase):
    def kernel(self, *inputs, schedule=0):
        return [run_patch_embed(*inputs, *self.options(), schedule=schedule)]

    def check(self):
        inputs = self.inputs(self.seed)
        results = self.kernel(*inputs)
        self.within_budget(inputs, results)
        self.same_bits(self.kernel(*inputs, schedule=self.seed), results)
        images, weight, *rest = inputs
        self.same_but_for_order(inputs, self.kernel(properties.laid_out(images, self.layout), weight, *rest), results)
        self.same_bits(self.kernel(images, weight, *properties.all_laid_out(self.layout, *rest)), results)
        self.relation_prefix_as_it_stands(inputs, results)
        self.relation_integers(inputs, results)


@st.composite
def patch_embed_cases(draw):
    dtype = draw(st.sampled_from(("bfloat16", "float16", "float32")))
    patch = draw(st.tuples(st.integers(1, 16), st.integers(1, 16)))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
    stride = draw(st.sampled_from((patch, tuple(max(1, p - 1) for p in patch), tuple(p + 2 for p in patch), (1, 3))))
    extra = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return EmulatedPatchEmbed(
        dtype=dtype,
        pixels=draw(st.sampled_from((dtype, dtype, "uint8", "float32"))),
        side_dtype=draw(st.sampled_from((dtype, "float32"))),
        batch=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 4)),
        size=tuple(p + (g - 1) * s + e for p, g, s, e in zip(patch, grid, stride, extra, strict=True)),
        patch=patch,
        stride=stride,
        dim=draw(st.integers(1, 130)),
        prefix=draw(st.integers(-1, 4)),
        per_image=draw(st.booleans()),
        bias=draw(st.booleans()),
        pos=draw(st.booleans()),
        normalised=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        block_m=0,
        block_n=0,
        block_k=0,
        layout=draw(properties.layouts),
        relation="",
        seed=draw(properties.seeds),
    )


def test_patch_embed(count):
    explore(patch_embed_cases(), count, EXAMPLES // 2)


def run_activation(z, activation, in_place=False, library=None, **options):
    out = z if in_place else torch.empty(*z.shape[:-1], z.shape[-1] // (2 if activation in GATED else 1), dtype=z.dtype)
    views = (View(z, "z", "inout"), z.data_ptr()) if in_place else (writes(out, "out"), reads(z, "z"))
    number = 1 + ACTIVATIONS.index(activation)
    (library or build("epilogue")).call(
        "emulated_activation", *views, out.numel(), out.shape[-1], number, type_of(z), **options
    )
    return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation, dtype):
    for shape in ((3, 5, 64), (2, 37, 34), (700, 8)):
        z = (torch.randn(shape) * 3).to(dtype)
        out = run_activation(z, activation)
        eager = reference.activate(z, activation)
        order = 2.0**-22 * z.abs().max().item() ** (2 if activation in GATED else 1)
        zeros = 0.7 if activation == "relu" else 0.1
        if activation == "relu":
            assert torch.equal(out, eager)
        else:
            assert_within_budget(out, eager, exact_activation(wide(z), activation), expected_zeros=zeros, order=order)
        if activation not in GATED:
            assert torch.equal(run_activation(z.clone(), activation, in_place=True), out)
    assert run_activation(torch.full((1, 16), float("nan"), dtype=dtype), activation).isnan().all()


def run_residual(x, residual, gamma, row_scale, library=None, **options):
    out = torch.empty(residual.shape, dtype=residual.dtype)
    images = 1 if row_scale is None else row_scale.numel()
    (library or build("epilogue")).call(
        "emulated_residual", writes(out, "out"), reads(x, "x"), reads(residual, "residual"), reads(gamma, "gamma"),
        reads(row_scale, "row_scale"), residual.dim(), tuple(residual.shape), residual.stride(),
        max(1, x.numel() // x.shape[-1] // images), type_of(x), type_of(residual), type_of(gamma) == 0,
        type_of(row_scale) == 0, **options,
    )  # fmt: skip
    return out


@st.composite
def residual_cases(draw):
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
    return ResidualCase(
        dtype=dtype,
        residual_dtype=draw(st.sampled_from((dtype, torch.float32))),
        side_dtype=draw(st.sampled_from((dtype, torch.float32))),
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.sampled_from((1, 7, 8, 24, 64, 100, 768)))),
        gamma=draw(st.booleans()),
        row_scale=draw(st.booleans()),
        layout=draw(st.sampled_from(("contiguous", "padded rows", "tail of a longer axis", "axes swapped"))),
        seed=draw(properties.seeds),
    )


@dataclass(frozen=True)
class ResidualCase:
    dtype: torch.dtype
    residual_dtype: torch.dtype
    side_dtype: torch.dtype
    shape: tuple
    gamma: bool
    row_scale: bool
    layout: str
    seed: int

    def check(self):
        torch.manual_seed(self.seed)
        x, residual = torch.randn(self.shape).to(self.dtype), torch.randn(self.shape).to(self.residual_dtype)
        gamma = torch.randn(self.shape[-1]).to(self.side_dtype) if self.gamma else None
        row_scale = (torch.rand(self.shape[0]) * 2).to(self.side_dtype) if self.row_scale else None
        out = run_residual(x, residual, gamma, row_scale)
        golden = wide(x) * (1 if gamma is None else wide(gamma))
        golden = wide(residual) + golden * (1 if row_scale is None else wide(row_scale)[:, None, None])
        error = torch.finfo(out.dtype).eps * golden.abs().max() + 2.0**-22 * 16
        assert (out - golden).abs().max() <= error / (1 if out.dtype == torch.float32 else 2) + 2.0**-22 * 16
        view = properties.laid_out(residual, self.layout)
        assert torch.equal(run_residual(x, view, gamma, row_scale, schedule=self.seed), out)


def test_residual(count):
    explore(residual_cases(), count)


def far_apart(*shape, step, dtype=torch.bfloat16):
    """Random values whose first axis has a stride beyond 2^31 elements."""
    count = step * (shape[0] - 1) + torch.Size(shape[1:]).numel()
    view = large_tensors.reserved(count, dtype=dtype).as_strided(shape, (step, *torch.empty(shape[1:]).stride()))
    return view.copy_(torch.randn(shape))


def reserved_empty(*shape, dtype=torch.float32):
    """``torch.empty`` that takes memory only for the pages that are touched."""
    return large_tensors.reserved(*(shape if isinstance(shape[0], int) else shape[0]), dtype=dtype)


FAR = 2**31 + 2**20


def test_inputs_beyond_32_bits():
    x = far_apart(2, 3, 64, step=FAR)
    assert torch.equal(run_layer_norm(x, None, None, 1e-6)[0], run_layer_norm(x.clone(), None, None, 1e-6)[0])
    qkv = far_apart(2, 20, 3 * 32, step=FAR)
    for one, other in zip(run_attention(qkv, 2, 0.25), run_attention(qkv.clone(), 2, 0.25), strict=True):
        assert torch.equal(one, other)
    rows = far_apart(20, 32, step=2**28)[None]
    near = rows.clone()
    assert torch.equal(run_attention(rows, 1, 0.25, rows, rows)[0], run_attention(near, 1, 0.25, near, near)[0])
    images, weight = far_apart(2, 3, 8, 8, step=FAR), torch.randn(8, 3, 4, 4).bfloat16()
    outs = (run_patch_embed(pixels, weight, None, None, None, (4, 4)) for pixels in (images, images.clone()))
    assert torch.equal(*outs)
    planes = far_apart(3, 8, 8, step=FAR)[None]
    outs = (run_patch_embed(pixels, weight, None, None, None, (4, 4)) for pixels in (planes, planes.clone()))
    assert torch.equal(*outs)
    x = torch.randn(2, 3, 64).bfloat16()
    residual = far_apart(2, 3, 64, step=FAR)
    assert torch.equal(run_residual(x, residual, None, None), run_residual(x, residual.clone(), None, None))


def test_outputs_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(torch, "empty", reserved_empty)
    width, rows = 1024, 2**21 + 8
    x = large_tensors.reserved(rows, width, dtype=torch.float16)
    x[-4:] = torch.randn(4, width)
    y, mean, rstd = run_layer_norm(x, None, None, 1e-6, last_blocks=1)
    for one, other in zip(
        (y[-4:], mean[-4:], rstd[-4:]), run_layer_norm(x[-4:].clone(), None, None, 1e-6), strict=True
    ):
        assert torch.equal(one, other) and other.any()
    out = run_residual(x, x, None, None, last_blocks=2)
    assert torch.equal(out[-2:], x[-2:] + x[-2:])
    out = run_activation(x, "relu", last_blocks=2)
    assert torch.equal(out[-2:], x[-2:].relu())
    out = run_activation(x, "swiglu", last_blocks=2)
    assert torch.equal(out[-2:], run_activation(x[-2:].clone(), "swiglu"))
    qkv = large_tensors.reserved(2**21 // 16 + 2, 16, 3 * 1024, dtype=torch.bfloat16)
    qkv[-1] = torch.randn(16, 3 * 1024)
    out, lse = run_attention(qkv, 16, 0.1, last_blocks=16)
    alone = run_attention(qkv[-1:].clone(), 16, 0.1)
    assert torch.equal(out[-1:], alone[0]) and torch.equal(lse[-1:], alone[1]) and out[-1].any()
    images = large_tensors.reserved(2**15 + 1, 1, 16, 64, dtype=torch.bfloat16)
    images[-1] = torch.randn(1, 16, 64)
    weight = torch.randn(1024, 1, 2, 8).bfloat16()
    out = run_patch_embed(images, weight, None, None, None, (2, 8), last_blocks=16)
    assert (
        torch.equal(out[-1:], run_patch_embed(images[-1:].clone(), weight, None, None, None, (2, 8))) and out[-1].any()
    )


# Mutants: stem, old text, new text, what runs it, the words that tell the fault.
MUTANTS = {
    "no barrier before shared memory is read": (
        "layer_norm",
        "    __syncthreads();\n    float sum",
        "    float sum",
        "wide",
        "data race|never written",
    ),
    "no second barrier": (
        "layer_norm",
        "    __syncthreads();\n    return sum",
        "    return sum",
        "wide",
        "data race",
    ),
    "no barrier before a stage is filled again": (
        "attention",
        "                __syncthreads();  // all",
        "                // all",
        "streaming",
        "data race|in flight|cp_async_wait",
    ),
    "no barrier between stages of the implicit GEMM": (
        "patch_embed",
        "        __syncthreads();  // this stage",
        "        // this stage",
        "patches",
        "data race|never written",
    ),
    "a barrier that some threads do not reach": (
        "layer_norm",
        "    if (p.mean && threadIdx.x == 0)",
        "    if (threadIdx.x < 40) __syncthreads();\n    if (p.mean && threadIdx.x == 0)",
        "wide",
        "divergent barrier",
    ),
    "a barrier that a warp without queries does not reach": (
        "attention",
        "if (p.resident && first_query",
        "if (first_query",
        "streaming",
        "divergent barrier|without cp_async_wait",
    ),
    "a shuffle in a part of a warp": (
        "layer_norm",
        "p.rms ? 0.0f : warp_sum(sum) / p.width",
        "(lane < 31 ? warp_sum(sum) : 0) / p.width",
        "rows",
        "divergent",
    ),
    "no wait for cp.async": (
        "attention",
        "                cp_async_wait<0>();\n",
        "",
        "streaming",
        "before cp_async_wait",
    ),
    "a wait for too few groups of cp.async": (
        "attention",
        "                cp_async_wait<0>();\n",
        "                cp_async_wait<1>();\n",
        "streaming",
        "before cp_async_wait",
    ),
    "shared memory beyond its end": (
        "layer_norm",
        "shared_store(shared + threadIdx.x / 32, x)",
        "shared_store(shared + threadIdx.x / 32 + 1, x)",
        "wide",
        "shared memory at byte 32, it has 32",
    ),
    "too little shared memory": (
        "attention",
        "whole = 2 * row * (",
        "whole = 2 * row * (-1 + ",
        "resident",
        "shared memory at byte",
    ),
    "zeros that are not written": (
        "attention",
        "const int padded_keys = ceil_div(p.num_keys, 16) * 16",
        "const int padded_keys = p.num_keys",
        "resident",
        "shared memory at byte|never written",
    ),
    "a row too many": (
        "layer_norm",
        "if (row >= p.rows) return",
        "if (row > p.rows) return",
        "rows",
        "outside of all views|beyond",
    ),
    "a column too many": (
        "layer_norm",
        "column < p.width; column +=",
        "column <= p.width; column +=",
        "wide",
        "outside of all views|beyond",
    ),
    "a key too many": (
        "attention",
        "first + row < count &&",
        "first + row <= count &&",
        "resident",
        "outside of all views",
    ),
    "a query too many": (
        "attention",
        "if (row >= p.num_queries) continue",
        "if (row > p.num_queries) continue",
        "resident",
        "outside of all views|another thread wrote",
    ),
    "a pixel too many": (
        "patch_embed",
        "if (k < depth && first_row",
        "if (k <= depth && first_row",
        "patches",
        "images|outside",
    ),
    "a pixel of a patch too many": (
        "patch_embed",
        "first_row + row < p.rows)",
        "first_row + row <= p.rows)",
        "patches",
        "images|outside",
    ),
    "an element that is not written": (
        "layer_norm",
        "if (column < p.width) write_normal",
        "if (column + VEC < p.width) write_normal",
        "rows",
        "not written",
    ),
    "two threads that write one element": (
        "layer_norm",
        "if (p.mean && lane == 0)",
        "if (p.mean && lane < 2)",
        "rows",
        "another thread wrote to mean",
    ),
    "a write to an input": (
        "epilogue",
        "static_cast<R*>(p.out) + i, residual",
        "(R*)p.residual + i, residual",
        "residual",
        "writes to the input residual",
    ),
    "a load of 16 bytes that is not aligned": (
        "epilogue",
        "rows_aligned(p.residual, p.residual_rows, sizeof(R))",
        "true",
        "residual",
        "misaligned|beyond",
    ),
    "32 bits for the row of an input": (
        "layer_norm",
        "static_cast<const X*>(p.x) + p.x_rows.offset(row)",
        "static_cast<const X*>(p.x) + static_cast<int>(p.x_rows.offset(row))",
        "far rows",
        "outside of all views",
    ),
    "32 bits for the row of an output": (
        "layer_norm",
        "static_cast<Y*>(p.y) + row * p.width",
        "static_cast<Y*>(p.y) + static_cast<int>(row * p.width)",
        "far output",
        "outside of all views",
    ),
    "32 bits for a key": (
        "attention",
        "x + (first + row) * stride + column",
        "x + static_cast<int>((first + row) * stride) + column",
        "far keys",
        "outside of all views",
    ),
    "32 bits for a patch": (
        "patch_embed",
        "image * p.image_stride + y",
        "static_cast<int>(image * p.image_stride) + y",
        "far images",
        "outside of all views",
    ),
    "a wrong fragment": (
        "attention",
        "mma<T>(s[j], query[d], b[0], b[1])",
        "mma<T>(s[j], query[d], b[1], b[0])",
        "resident",
        "max|rms",
    ),
    "no rescaling": ("attention", "acc[c][i] *= alpha[i / 2]", "acc[c][i] *= 1.0f", "streaming", "max|rms"),
    "no padding of rows": ("attention", "constexpr int PAD = 8", "constexpr int PAD = 0", "resident", "bank conflicts"),
    "float32, no barrier before the next keys": (
        "attention",
        "        __syncthreads();  // V and",
        "        // V and",
        "float32 heads",
        "data race|in flight|before cp_async_wait",
    ),
    "float32, no wait for the values": (
        "attention",
        "        cp_async_wait<0>();\n        __syncthreads();  // V and",
        "        __syncthreads();  // V and",
        "float32 heads",
        "before cp_async_wait",
    ),
    "float32, too little shared memory": (
        "attention",
        "(P + FLOAT_QUERIES * WEIGHTS)",
        "(P + FLOAT_QUERIES * WEIGHTS - 8)",
        "float32 heads",
        "shared memory at byte",
    ),
    "float32, a key too many": (
        "attention",
        "first + j * 8 + eighth >= p.num_keys",
        "first + j * 8 + eighth > p.num_keys",
        "float32 heads",
        "max|rms",
    ),
    "float32, no rescaling": (
        "attention",
        "fmaf(acc[i][j][n], alpha[i], step",
        "fmaf(acc[i][j][n], 1.0f, step",
        "float32 heads",
        "max|rms",
    ),
    "float32, a step that is not added": (
        "patch_embed",
        "acc[i][j] += step[i][j]",
        "acc[i][j] = step[i][j]",
        "float32 patches",
        "max|rms",
    ),
    "the mean of an RMSNorm": (
        "layer_norm",
        "p.rms ? 0.0f : sum / p.width",
        "sum / p.width",
        "RMSNorm",
        "max|rms",
    ),
    "a first pass that an RMSNorm does not skip": (
        "layer_norm",
        "    if (!p.rms) {",
        "    if (true) {",
        "RMSNorm",
        "max|rms",
    ),
    "the value of another row": (
        "epilogue",
        "z += i / p.width * p.width",
        "z += 0 * p.width",
        "gated",
        "max|rms",
    ),
}


def run_wide(library):
    run_layer_norm(torch.randn(2, 3000), torch.randn(3000), None, 1e-6, library=library)


def run_rows(library):
    run_layer_norm(torch.randn(3, 64), torch.randn(64), None, 1e-6, library=library)


def run_resident(library, limit=232448):
    q, k, v = (torch.randn(1, n, 2 * 24).bfloat16() for n in (75, 150, 150))
    out, lse = run_attention(q, 2, 0.3, k, v, library=library, shared_limit=limit)
    eager, golden = reference.attention_fwd(q, 2, 0.3, k=k, v=v), formula(q, 2, 0.3, k, v)
    assert_within_budget(out, eager[0], golden[0])
    assert_within_budget(lse, eager[1], golden[1], order=1e-5)
    if library.counts[5]:
        raise EmulatorFault(f"{library.counts[5]} bank conflicts")


def run_streaming(library):
    run_resident(library, 4 * 64 * (32 + 8) * 2)
    run_resident(library, 4 * 32 * (32 + 8) * 2)


def run_patches(library):
    images, weight = torch.randn(3, 3, 20, 20).bfloat16(), torch.randn(70, 3, 5, 5).bfloat16()
    run_patch_embed(images, weight, None, None, None, (5, 5), library=library)


def run_float32_heads(library):
    q, k, v = (torch.randn(1, n, 2 * 24) for n in (70, 75, 75))
    out, lse = run_attention(q, 2, 0.3, k, v, library=library, shared_limit=65536)
    eager, golden = reference.attention_fwd(q, 2, 0.3, k=k, v=v), formula(q, 2, 0.3, k, v)
    assert_within_budget(out, eager[0], golden[0])
    assert_within_budget(lse, eager[1], golden[1], order=1e-5)


def run_float32_patches(library):
    arguments = (torch.randn(2, 3, 20, 20), torch.randn(70, 3, 5, 5), None, None, None, (5, 5))
    out = run_patch_embed(*arguments, library=library, shared_limit=65536)
    assert_within_budget(out, reference.patch_embed(*arguments), patch_embed_golden(*arguments))


def run_rms_norm(library):
    for shape in ((3, 64), (2, 3000)):
        x, weight = torch.randn(shape) + 2, torch.randn(shape[1])
        y, mean, rstd = run_layer_norm(x, weight, None, 1e-6, None, library, norm="rms")
        eager, exact = (f(x, weight, None, 1e-6, norm="rms") for f in (reference.layer_norm_fwd, layer_norm_formula))
        assert_within_budget(y, eager[0], exact[0], order=2.0**-22 * exact[0].abs().max().item())
        assert_within_budget(rstd, eager[2], exact[2], order=2.0**-22)
        assert not mean.any()


def run_gated(library):
    z = torch.randn(5, 48)
    for activation in GATED:
        out = run_activation(z, activation, library=library)
        assert_within_budget(out, reference.activate(z, activation), exact_activation(wide(z), activation), order=1e-5)


def run_residual_rows(library):
    run_residual(torch.randn(3, 8), torch.randn(3, 9)[:, :8], None, None, library=library)


def run_far_rows(library):
    run_layer_norm(far_apart(2, 3, 64, step=FAR), None, None, 1e-6, library=library)


def run_far_output(library):
    x = large_tensors.reserved(2**25 + 8, 64, dtype=torch.float16)
    with mock.patch.object(torch, "empty", reserved_empty):
        run_layer_norm(x, None, None, 1e-6, library=library, last_blocks=1)


def run_far_keys(library):
    rows = far_apart(20, 32, step=2**28)[None]
    run_attention(rows, 1, 0.25, rows, rows, library=library)


def run_far_images(library):
    images = far_apart(2, 3, 8, 8, step=FAR)
    run_patch_embed(images, torch.randn(8, 3, 4, 4).bfloat16(), None, None, None, (4, 4), library=library)


RUNS = {
    "far rows": run_far_rows,
    "far output": run_far_output,
    "far keys": run_far_keys,
    "far images": run_far_images,
    "wide": run_wide,
    "rows": run_rows,
    "resident": run_resident,
    "streaming": run_streaming,
    "patches": run_patches,
    "float32 heads": run_float32_heads,
    "float32 patches": run_float32_patches,
    "RMSNorm": run_rms_norm,
    "gated": run_gated,
    "residual": run_residual_rows,
}
ALSO = {"no padding of rows": (("ROW = WIDTH + PIECE;", "ROW = WIDTH;"),)}  # changed with it
SMALLER = {"attention": ("-DVF_HEAD_WIDTHS(f)=f(32)",)}  # what mutants and sanitizers compile


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(name):
    stem, old, new, run, words = MUTANTS[name]
    with pytest.raises(AssertionError, match=words):
        RUNS[run](build(stem, ((old, new), *ALSO.get(name, ())), SMALLER.get(stem, ())))


@pytest.mark.parametrize("run", RUNS)
def test_no_fault_without_one(run):
    (stem,) = {stem for stem, _, _, name, _ in MUTANTS.values() if name == run}
    RUNS[run](build(stem))


@pytest.mark.parametrize("stem", ("layer_norm", "attention", "patch_embed", "epilogue"))
def test_sanitizers(stem):
    """Under ASan and UBSan, which see what does not go through the emulator's words: arrays of a thread, arithmetic."""
    library = build(stem, (), SMALLER.get(stem, ()), sanitized=True)
    for run in {run for name, _, _, run, _ in MUTANTS.values() if name == stem and not run.startswith("far")}:
        RUNS[run](library)


def test_sanitizers_find_an_index():
    bad = (("values[j][i];\n        }", "values[j + PIECES][i];\n        }"),)
    with pytest.raises(EmulatorFault, match=r"index|overflow"):
        run_rows(build("layer_norm", bad, sanitized=True))


def test_launch_beyond_the_limit_of_shared_memory():
    with pytest.raises(EmulatorFault, match=r"asks for \d+ bytes of shared memory, limit 1000"):
        run_attention(torch.randn(1, 40, 3 * 32).half(), 1, 1.0, shared_limit=1000)
