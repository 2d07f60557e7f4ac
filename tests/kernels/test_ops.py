"""The operations as PyTorch sees them: schemas, fakes, gradients, backends, autocast, errors before any launch.

The formulas themselves are tested per operation (``test_<op>.py``) against float64; here the registered operators are
driven with the backend ``torch`` (unmarked) and through the interpreted kernels (``interp``).
"""

import itertools
import subprocess
import sys

import pytest
import torch
from support import properties
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import vit_fast
from vit_fast import ops
from vit_fast.backends.torch import TORCH

OPS = torch.ops.vit_fast


def _samples(backend, dtype=torch.float32, grad=True):
    """name → arguments of the registered operator, small."""
    generator = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    stats = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    no_norm, none = (None, None, None, "layer"), (0.0, None)
    seed, other = torch.tensor([11]), torch.tensor([-7])
    lengths, sequences = torch.tensor([3, 0]), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    return {
        "layer_norm": (t(2, 5, 8), t(8), t(8), 1e-6, "layer", True, backend),
        "layer_norm_bare": (t(2, 5, 8), None, None, 1e-6, "layer", True, backend),
        "layer_norm_rms": (t(2, 5, 8), t(8), None, 1e-6, "rms", True, backend),
        "layer_norm_linear": (t(2, 5, 8), t(8), t(8), 1e-6, t(12, 8), t(12), None, "layer", True, backend),
        "layer_norm_linear_swiglu": (t(2, 5, 8), t(8), t(8), 1e-6, t(12, 8), None, "swiglu", "layer", True, backend),
        "layer_norm_linear_rms": (t(2, 5, 8), t(8), None, 1e-6, t(12, 8), None, "silu", "rms", True, backend),
        "layer_norm_linear_transposed": (
            t(5, 2, 8).transpose(0, 1),
            t(8),
            t(8),
            1e-6,
            t(12, 8),
            t(12),
            "gelu",
            "layer",
            True,
            backend,
        ),
        "linear_residual": (t(2, 5, 12), t(8, 12), t(8), t(8), t(2, 5, 8), t(2), *no_norm, *none, backend),
        "linear_residual_bare": (t(2, 5, 12), t(8, 12), None, None, t(2, 5, 8), None, *no_norm, *none, backend),
        "linear_residual_inner_norm": (
            *(t(2, 5, 12), t(8, 12), t(8), t(8), t(2, 5, 8), t(2), t(12), t(12), 1e-5, "layer", *none, backend),
        ),
        "layernorm_mlp": (
            t(2, 5, 8),
            t(8),
            t(8),
            1e-6,
            t(16, 8),
            t(16),
            t(8, 16),
            t(8),
            "gelu",
            t(8),
            t(2),
            *no_norm,
            *none,
            *none,
            False,
            True,
            backend,
        ),
        "layernorm_mlp_bare": (
            t(2, 5, 8),
            t(8),
            t(8),
            1e-6,
            t(16, 8),
            None,
            t(8, 8),
            None,
            "swiglu",
            None,
            None,
            *no_norm,
            *none,
            *none,
            False,
            True,
            backend,
        ),
        "layernorm_mlp_inner_norm": (
            *(t(2, 5, 8), t(8), None, 1e-6, t(16, 8), t(16), t(8, 8), t(8), "geglu", t(8), t(2)),
            *(t(8), None, 1e-6, "rms", *none, *none, False, True, backend),
        ),
        "attention": (t(2, 5, 24), None, None, 2, 0.5, *none, True, backend),
        "attention_options": (
            t(2, 5, 24),
            None,
            None,
            t(1, 2, 1, 5),
            None,
            None,
            t(4, 4),
            t(2, 1, 4, 4),
            t(4),
            t(4),
            t(4),
            None,
            lengths,
            None,
            1e-5,
            1e-6,
            "layer",
            "half",
            1,
            2,
            0.5,
            *none,
            True,
            backend,
        ),
        "attention_options_rms": (
            t(2, 6, 8),
            t(2, 6, 8),
            t(2, 6, 8),
            None,
            t(2, 2, 6, 2),
            t(2, 2, 6, 3),
            t(6, 4),
            t(6, 4),
            None,
            None,
            t(4),
            t(4),
            None,
            None,
            None,
            1e-6,
            "rms",
            "interleaved",
            0,
            2,
            0.5,
            *none,
            True,
            backend,
        ),
        "attention_options_packed": (
            t(1, 7, 24),
            *[None] * 12,
            sequences,
            None,
            None,
            "layer",
            "half",
            0,
            2,
            0.5,
            *none,
            True,
            backend,
        ),
        "attention_pooled": (t(2, 1, 8), t(2, 5, 8), t(2, 5, 8), 2, 0.5, *none, True, backend),
        **_dropping_samples(t, seed, other, backend),
        "patch_embed": (t(2, 3, 8, 8), t(8, 3, 4, 4), t(8), t(1, 4, 8), t(1, 2, 8), [4, 4], None, None, backend),
        "patch_embed_overlap": (t(2, 3, 9, 8), t(8, 3, 3, 4), t(8), None, t(2, 1, 8), [2, 1], *stats, backend),
        "patch_embed_uint8": (pixels, t(8, 3, 4, 4), None, None, None, [4, 4], *stats, backend),
    }


def _dropping_samples(t, seed, other, backend):
    """Calls that drop, which the reference alone runs of every backend, and one that computes z again."""
    if backend != "torch":
        return {}
    no_norm, none, drop = (None, None, None, "layer"), (0.0, None), (0.4, seed)
    mlp = t(2, 5, 8), t(8), t(8), 1e-6, t(16, 8), t(16), t(8, 16), t(8), "gelu", t(8), t(2)
    return {
        "linear_residual_dropout": (
            *(t(2, 5, 12), t(8, 12), t(8), t(8), t(2, 5, 8), t(2), t(12), None, 1e-5, "layer", *drop, backend),
        ),
        "layernorm_mlp_dropout": (*mlp, *no_norm, *drop, 0.3, other, False, True, backend),
        "layernorm_mlp_recompute": (*mlp, t(16), None, 1e-6, "layer", *drop, *none, True, True, backend),
        "attention_dropout": (t(2, 5, 24), None, None, 2, 0.5, *drop, True, backend),
        "attention_options_dropout": (
            *(t(2, 5, 24), None, None, t(1, 2, 1, 5), *[None] * 10, None, None, "layer", "half", 0, 2, 0.5),
            *(*drop, True, backend),
        ),
    }


NAMES = list(_samples("torch"))
INTERPRETED = list(_samples("triton"))


def both_backends(names, interpreted=INTERPRETED):
    """Pairs (name, backend) for parametrize: each name with the reference, and through the interpreted kernels."""
    through_kernels = [pytest.param(name, "triton", marks=pytest.mark.interp) for name in names if name in interpreted]
    return [(name, "torch") for name in names] + through_kernels


# operator → how many of its leading tensor arguments are differentiable; longest names first
DIFFERENTIABLE = {
    "attention_options": 12,
    "layer_norm_linear": 5,
    "layernorm_mlp": 11,
    "linear_residual": 7,
    "layer_norm": 3,
    "attention": 3,
    "patch_embed": 5,
}


def test_every_operation_is_tried():
    operators = {*TORCH.backward, "attention_options"}
    assert operators == set(DIFFERENTIABLE) == {_stem(name) for name in NAMES} == set(_calls())


def _stem(name):
    return next(stem for stem in DIFFERENTIABLE if name.startswith(stem))


def _operator(name, direction="fwd"):
    return getattr(OPS, f"{_stem(name)}_{direction}").default


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    opcheck(_operator(name), _samples("torch")[name])


@pytest.mark.interp
@pytest.mark.parametrize("name", INTERPRETED)
def test_opcheck_interpreted(name):
    opcheck(_operator(name), _samples("triton")[name])


@pytest.mark.extension
@pytest.mark.usefixtures("cpu_extension")
@pytest.mark.parametrize("name", [name for name in INTERPRETED if not name.startswith("attention_options")])
def test_opcheck_on_a_cpu(name):
    opcheck(_operator(name), _samples("cpu")[name])


FLAGS = {
    "attention": "with_lse",
    "attention_options": "with_lse",
    "layer_norm": "with_stats",
    "layer_norm_linear": "with_stats",
    "layernorm_mlp": "with_stats",
}
WITH_STATISTICS = [name for name in NAMES if _stem(name) in FLAGS]


@pytest.mark.parametrize("name, backend", both_backends(WITH_STATISTICS))
def test_without_statistics(name, backend):
    """Inference asks for none and gets the same bits; a backward that wants them is told."""
    operator = _operator(name)
    *arguments, _, _ = _samples(backend, grad=False)[name]
    if name.startswith("layernorm_mlp"):
        arguments[-1] = False  # recompute, of calls that keep statistics
    out, *statistics = operator(*arguments, False, backend)
    assert statistics and all(t.numel() == 0 and t.dtype == torch.float32 for t in statistics)
    with_statistics, *kept = operator(*arguments, True, backend)
    assert all(t.numel() > 0 for t in kept)
    if backend == "triton":
        assert torch.equal(out, with_statistics)
    torch.testing.assert_close(out, with_statistics)
    opcheck(operator, (*arguments, False, backend), test_utils=("test_schema", "test_faketensor"))
    leaf = arguments[0].requires_grad_()
    with pytest.raises(
        RuntimeError, match=f"vit_fast.{_stem(name).removesuffix('_options')}: {FLAGS[_stem(name)]} is False"
    ):
        operator(leaf, *arguments[1:], False, backend)[0].sum().backward()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interp)])
def test_statistics_are_stored_where_a_backward_may_follow(backend, monkeypatch):
    """A parameter that wants a gradient is enough; under no_grad and inference_mode none does."""
    asked = []

    def spy_on(shipped):
        def forward(*arguments):
            *inputs, wanted, _ = arguments
            asked.append(wanted)
            return shipped(*inputs, wanted, backend)

        return forward

    for name in FLAGS:
        monkeypatch.setattr(OPS, f"{name}_fwd", spy_on(getattr(OPS, f"{name}_fwd")))
    monkeypatch.setattr(ops.select, "choose", lambda *_, **__: "no reference")  # which is called without an operator
    x, qkv = torch.randn(2, 5, 16), torch.randn(2, 5, 48)
    weight, w1, w2 = torch.randn(16), torch.randn(32, 16), torch.randn(16, 32)
    bias = torch.randn(1, 1, 5, 5)

    def calls():
        ops.attention(qkv, 2, 0.3)
        ops.attention(qkv, 2, 0.3, bias=bias, q_norm=(weight[:8], None, 1e-6))
        ops.layer_norm(x, weight, None, 1e-6)
        ops.layer_norm_linear(x, weight, None, 1e-6, w1, None)
        ops.layernorm_mlp(x, weight, None, 1e-6, w1, None, w2, None, "gelu", None)
        told, asked[:] = list(asked), []
        return told

    assert calls() == [False] * 5
    qkv.requires_grad_()
    weight.requires_grad_()
    assert calls() == [True] * 5
    with torch.no_grad():
        assert calls() == [False] * 5
    with torch.inference_mode():
        assert calls() == [False] * 5
    qkv.requires_grad_(False)
    weight.requires_grad_(False)
    w1.requires_grad_()
    bias.requires_grad_()
    assert calls() == [False, True, False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_backward_operator(name):
    """The backward operator alone passes opcheck, for every subset of gradients up to four inputs."""
    arguments = _samples("torch", grad=False)[name]
    outputs = _operator(name)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    saved = outputs if name.startswith("attention") else outputs[1:]
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) or a is None]
    if _stem(name) == "linear_residual":
        places.remove(4)  # the residual, whose gradient is the incoming one
    needs = [isinstance(arguments[i], torch.Tensor) for i in places[: DIFFERENTIABLE[_stem(name)]]]
    if name == "patch_embed_uint8":
        needs[0] = False
    opcheck(_operator(name, "bwd"), (torch.randn_like(outputs[0]), *arguments[:-1], *saved, needs, "torch"))


def _of_tensors(name, arguments):
    """The floating-point tensors among an operator's arguments, and its output as a function of them."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def run(*values):
        taken = dict(zip(places, values, strict=True))
        out = _operator(name)(*(taken.get(i, a) for i, a in enumerate(arguments)))
        return out[0] if isinstance(out, tuple) else out

    return [arguments[i] for i in places], run


@pytest.mark.parametrize("name, backend", both_backends([name for name in NAMES if name != "patch_embed_uint8"]))
def test_gradcheck(name, backend):
    """float64; with triton the outputs and statistics of the forward kernels feed the backward formulas."""
    arguments = _samples(backend, torch.float64)[name]
    tensors, run = _of_tensors(name, arguments)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=backend == "triton")


@pytest.mark.parametrize("name", ["layernorm_mlp", "attention_pooled", "linear_residual"])
def test_gradients_of_every_subset(name):
    arguments = _samples("torch", torch.float64)[name]
    positions = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]

    def gradients(wanted):
        values = [a.detach().requires_grad_(i in wanted) if i in positions else a for i, a in enumerate(arguments)]
        _operator(name)(*values)[0 if name != "linear_residual" else ...].sum().backward()
        return {i: values[i].grad for i in wanted}

    full = gradients(positions)
    for size in (1, 2):
        for wanted in itertools.combinations(positions, size):
            for i, grad in gradients(wanted).items():
                torch.testing.assert_close(grad, full[i], rtol=0, atol=0)


LAYOUTS = {
    "contiguous": lambda g: g,
    "expanded": lambda g: g.flatten()[0].expand(g.shape),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of cat": lambda g: torch.cat([g, g], dim=-1)[..., : g.shape[-1]],
    "every second": lambda g: torch.stack([g, g], dim=-1).flatten(-2)[..., ::2],
    "offset": lambda g: torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_layouts(name, layout):
    """Incoming gradients of any strides give the gradients of their contiguous copy."""
    results = []
    for contiguous in (True, False):
        arguments = _samples("torch", torch.float64)[name]
        out = _operator(name)(*arguments)
        out = out[0] if isinstance(out, tuple) else out
        grad = LAYOUTS[layout](torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1)))
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        results.append(torch.autograd.grad(out, tensors, grad.contiguous() if contiguous else grad))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


INPUT_LAYOUTS = {
    "every second": LAYOUTS["every second"],
    "reversed axes": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
}


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_input_layouts(name, layout):
    """Inputs of any strides give the output and the gradients of their contiguous copies."""
    results = []
    for lay_out in (torch.Tensor.contiguous, INPUT_LAYOUTS[layout]):
        arguments = [
            lay_out(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) and a.dim() else a
            for a in _samples("torch", torch.float64)[name]
        ]
        out = _operator(name)(*arguments)
        out = out[0] if isinstance(out, tuple) else out
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, backend",
    both_backends(
        [name for name in NAMES if name != "patch_embed_uint8"],
        INTERPRETED if properties.FULL else [name for name in INTERPRETED if name in DIFFERENTIABLE],
    ),
)
def test_second_derivatives(name, backend):
    """Of the reference's formulas, on what the forward kernels save: one sample of each operator, at depth full all."""
    arguments = _samples(backend, torch.float64)[name]
    tensors, run = _of_tensors(name, arguments)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True, atol=1e-4)


def test_third_derivatives():
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 8, dtype=torch.float64)

    def call(x):
        return ops.linear_residual(x, weight, None, None, torch.zeros(3, 5, dtype=torch.float64)).pow(3)

    def third(call):
        value = call(x)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        return value

    with vit_fast.backend("torch"):
        wanted = third(call)
    torch.testing.assert_close(third(call), wanted)


def _calls():
    """name → call of the public function on [B] images or sequences, with its parameters."""
    g = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(*shape, generator=g)

    ln, w1, w2 = (t(16), t(16)), (t(32, 16), t(32)), (t(16, 32), t(16))
    conv, pos, cls = (t(16, 3, 4, 4), t(16)), t(1, 4, 16), t(1, 1, 16)
    proj, gamma, rope, scores = t(16, 16), t(16), (t(5, 8), t(5, 8)), t(1, 2, 1, 5)
    return {
        "layer_norm": (lambda x: ops.layer_norm(x, *ln, 1e-6), (5, 16)),
        "layer_norm_linear": (lambda x: ops.layer_norm_linear(x, *ln, 1e-6, *w1, "gelu"), (5, 16)),
        "linear_residual": (lambda x: ops.linear_residual(x, proj, None, gamma, x), (5, 16)),
        "layernorm_mlp": (lambda x: ops.layernorm_mlp(x, *ln, 1e-6, *w1, *w2, "gelu", None), (5, 16)),
        "attention": (lambda x: ops.attention(torch.cat([x, x, x], -1), 2, 0.3), (5, 16)),
        "attention_options": (
            lambda x: ops.attention(torch.cat([x, x, x], -1), 2, 0.3, rope=rope, bias=scores),
            (5, 16),
        ),
        "patch_embed": (lambda x: ops.patch_embed(x, *conv, pos, cls, 4), (3, 8, 8)),
    }


@pytest.mark.parametrize("name", _calls())
def test_zero_batch(name):
    call, shape = _calls()[name]
    out = call(torch.zeros(0, *shape, requires_grad=True))
    assert out.shape[0] == 0
    out.sum().backward()


@pytest.mark.interp
@pytest.mark.parametrize("name", _calls())
def test_zero_batch_interpreted(name):
    call, shape = _calls()[name]
    with vit_fast.backend("triton"):
        assert call(torch.zeros(0, *shape)).shape[0] == 0


@pytest.mark.parametrize("name", _calls())
def test_nan_stays_in_its_image(name):
    call, shape = _calls()[name]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    clean = call(x)
    x = x.clone()
    x[1].flatten()[3] = torch.nan
    dirty = call(x)
    assert dirty[1].isnan().any()
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]], rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("normed", (False, True))
def test_attention_of_windows_that_overlap(normed):
    """Tokens that are windows of one signal: each begins one number after the one before."""
    windows = torch.randn(40, generator=torch.Generator().manual_seed(2)).unfold(0, 24, 1)[None]
    norm = (torch.ones(8), None, 1e-6)
    results = []
    for view in (windows, windows.contiguous()):
        qkv = view.requires_grad_()
        with vit_fast.backend("torch"):
            out = ops.attention(qkv, 1, 0.3, **(dict(q_norm=norm, k_norm=norm) if normed else {}))
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_flops_are_counted():
    x, w1, w2 = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
    with FlopCounterMode(display=False) as reference:
        ops.layernorm_mlp(x, None, None, 1e-6, w1, None, w2, None, "gelu", None)
        ops.patch_embed(torch.randn(2, 3, 8, 8), torch.randn(8, 3, 4, 4), None, None, None, 4)
    with FlopCounterMode(display=False) as registered:
        OPS.layernorm_mlp_fwd(
            *(x, None, None, 1e-6, w1, None, w2, None, "gelu", None, None, None, None, None, "layer"),
            *(0.0, None, 0.0, None, False, False, "torch"),
        )
        images, weight = torch.randn(2, 3, 8, 8), torch.randn(8, 3, 4, 4)
        OPS.patch_embed_fwd(images, weight, None, None, None, [4, 4], None, None, "torch")
    assert registered.get_total_flops() == reference.get_total_flops() > 0
    with FlopCounterMode(display=False) as attention:
        OPS.attention_fwd(torch.randn(2, 5, 24), None, None, 2, 0.5, 0.0, None, False, "torch")
    assert attention.get_total_flops() == 2 * (2 * 2 * 5 * 5 * 8)
    with FlopCounterMode(display=False) as options:
        x, none = torch.randn(1, 12, 8), [None] * 10
        words = (None, None, "layer", "half", 0, 2, 0.5, 0.0, None, False, "torch")
        OPS.attention_options_fwd(x, x, torch.randn(1, 12, 16), *none, torch.tensor([0, 4, 8, 12]).int(), *words)
    assert options.get_total_flops() == 3 * (4 * 4 * (2 * 8 + 2 * 16))


def test_dropout_from_a_seed_is_reproducible_and_unbiased():
    x, weight = torch.zeros(64, 64, 8), torch.zeros(32, 8)
    bias = torch.ones(32)
    seed = torch.tensor(1234567890123)
    residual = torch.zeros(64, 64, 32)
    out = ops.linear_residual(x, weight, bias, None, residual, dropout_p=0.25, seed=seed)
    again = ops.linear_residual(x, weight, bias, None, residual, dropout_p=0.25, seed=seed)
    other = ops.linear_residual(x, weight, bias, None, residual, dropout_p=0.25, seed=seed + 1)
    assert torch.equal(out, again) and not torch.equal(out, other)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(out.mean().item() - 1) < 5 * (1 / 3 / out.numel()) ** 0.5


@pytest.mark.interp
def test_dropout_numbers_are_those_of_triton():
    """The reference's Philox is ``tl.rand``: a mask drawn by a kernel can be drawn again by a backward in PyTorch."""
    import triton
    import triton.language as tl
    from vit_fast.kernels import reference

    @triton.jit
    def kernel(out_ptr, seed, N: tl.constexpr):
        index = tl.arange(0, N)
        tl.store(out_ptr + index, tl.rand(seed, index.to(tl.int64)))

    out = torch.zeros(256)
    kernel[(1,)](out, 987654321987, 256)
    mask = reference.dropout_mask(torch.tensor(987654321987), (256,), 0.4, torch.device("cpu"))
    assert torch.equal(mask > 0, out > 0.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_eagers(dtype):
    x = torch.randn(2, 5, 16)
    calls = _calls()
    with torch.autocast("cpu", dtype):
        for name in ("layer_norm", "layer_norm_linear", "layernorm_mlp", "attention"):
            call, _ = calls[name]
            out = call(x)
            assert out.dtype == (torch.float32 if name in ("layer_norm", "layernorm_mlp") else dtype), name
        block = torch.nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True)
        eager = x + block.linear2(torch.nn.functional.gelu(block.linear1(block.norm2(x))))
        ours = ops.layernorm_mlp(
            x, block.norm2.weight, block.norm2.bias, block.norm2.eps, block.linear1.weight, block.linear1.bias,
            block.linear2.weight, block.linear2.bias, "gelu", None,
        )  # fmt: skip
    assert ours.dtype == eager.dtype
    torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.interp
def test_autocast_through_kernels():
    x, weight = torch.randn(2, 5, 16), torch.randn(48, 16)
    with torch.autocast("cpu", torch.bfloat16), vit_fast.backend("triton"):
        qkv = ops.layer_norm_linear(x, None, None, 1e-6, weight, None)
        assert qkv.dtype == torch.bfloat16
        out = ops.linear_residual(ops.attention(qkv, 2, 0.3), torch.randn(16, 16), None, None, x)
        assert out.dtype == torch.float32
        assert ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(8, 3, 4, 4), None, None, None, 4).dtype == x.dtype


def test_forced_backend_never_falls_back():
    x = torch.randn(2, 5, 16)
    for name, why in (("cuda", "does not run on device type cpu"), ("cpu", "not built")):
        with vit_fast.backend(name), pytest.raises(vit_fast.UnsupportedError, match=f"layer_norm.*{name}.*{why}"):
            ops.layer_norm(x, None, None)
    with vit_fast.backend("triton"), pytest.raises(vit_fast.UnsupportedError, match="TRITON_INTERPRET"):
        ops.layer_norm(x, None, None)
    with pytest.raises(ValueError, match="'nope', expected one of auto, triton"), vit_fast.backend("nope"):
        pass
    assert torch.isfinite(ops.layer_norm(x, None, None)).all()


@pytest.mark.interp
def test_forced_triton_names_what_it_cannot():
    qkv = torch.randn(2, 5, 771)
    with (
        vit_fast.backend("triton"),
        pytest.raises(vit_fast.UnsupportedError, match=r"attention.*head size 257 is above 256"),
    ):
        ops.attention(qkv, 1, 0.5)
    assert ops.attention(qkv, 1, 0.5).shape == (2, 5, 257)


def _run(code, **environment):
    import os

    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VIT_FAST", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )


def test_environment_words():
    code = "import torch, vit_fast; vit_fast.ops.layer_norm(torch.ones(2, 4), None, None)"
    result = _run(code, VIT_FAST_BACKEND="fastest")
    assert result.returncode and "VIT_FAST_BACKEND: backend is 'fastest', expected one of auto" in result.stderr
    result = _run(code, VIT_FAST_BACKEND="triton")
    assert result.returncode and "backend 'triton' was forced and cannot run" in result.stderr
    assert _run(code, VIT_FAST_BACKEND="torch").returncode == 0
    strict = "import torch, vit_fast; vit_fast.ops.attention(torch.ones(1, 2, 771), 1, 1.0)"
    result = _run(strict, VIT_FAST_STRICT="1", TRITON_INTERPRET="1")
    assert result.returncode and "VIT_FAST_STRICT=1" in result.stderr and "head size 257" in result.stderr


def test_import_is_silent_and_needs_no_triton():
    code = """
import sys, warnings, logging
warnings.simplefilter("error")
import torch, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "timm", "torchvision", "transformers", "numpy", "PIL", "rich", "typer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in [m for m in sys.modules if m.split(".")[0] == "triton"]:
    del sys.modules[name]
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
sys.meta_path.insert(0, Blocked())
before = set(sys.modules)
start = time.perf_counter()
import vit_fast
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized()
assert not logging.getLogger("vit_fast").handlers
assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("triton", "timm")}
model = vit_fast.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
assert "triton is not installed" in str(vit_fast.status())
"""
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.mark.interp
def test_threads_share_the_interpreter():
    """Eight threads start cold at once: each gets the bits of a lone call."""
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(8, 4, 16)
    expected = [ops.layer_norm(row, None, None) for row in x]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda row: ops.layer_norm(row, None, None), x))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
