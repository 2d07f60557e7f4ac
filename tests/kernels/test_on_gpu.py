"""What only a GPU can show of every operation and of its gradients: the same bits in a thousand runs, beside other
streams and from a CUDA graph, tensors of more than 2³¹ elements, and the results of the interpreter.

A result of several tensors, the gradients of one call, is compared tensor by tensor.

Run as a program, in the interpreter, it writes those results: TRITON_INTERPRET=1 python -P test_on_gpu.py FILE.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.gpu import NO_FLOAT8
from vit_fast.kernels import folding

import vit_fast
from vit_fast import ops

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SMALL = dict(batch=2, side=32, patch=8, width=48, heads=3, hidden=96)  # 17 tokens
BASE = dict(batch=8, side=224, patch=16, width=768, heads=12, hidden=3072)
FEW = BASE | dict(batch=1)  # few tiles: sums over K are shared
LARGE = 2**31 + 2**20
FREE_MEMORY = 24 * 2**30
TOO_SMALL = "the GPU has less than 24 GiB of free memory"


def _gradients(function, skipped=()):
    """A function of the tensors and the incoming gradient: the gradients of all tensors but those ``skipped``."""

    def run(*tensors):
        *tensors, grad = tensors
        leaves = [t.detach().requires_grad_(i not in skipped) for i, t in enumerate(tensors)]
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), [leaf for leaf in leaves if leaf.requires_grad], grad)

    return run


def _tensors(dtype, device, batch, side, patch, width, heads, hidden):
    """name → (function, tensors); the numbers do not depend on the device. Gradients: the last tensor is the incoming
    one. Those of pixels are left out: they are cuDNN's, which may sum in any order."""
    generator = torch.Generator().manual_seed(0)
    tokens = (side // patch) ** 2 + 1

    def t(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def linear(rows, columns):
        return t(rows, columns, scale=columns**-0.5), t(rows)

    def norm():
        return 1 + t(width, scale=0.1), t(width)

    x, scale = t(batch, tokens, width), (width // heads) ** -0.5
    mlp = (*linear(hidden, width), *linear(width, hidden))
    images = t(batch, 3, side, side)
    patches = (t(width, 3, patch, patch, scale=0.05), t(width), t(1, tokens - 1, width), t(1, 1, width))
    grad, wide_grad = t(batch, tokens, width), t(batch, tokens, hidden)
    seed, branch = torch.tensor([11], device=device), torch.linspace(0.5, 1.5, batch).to(device, dtype)
    drop = dict(dropout_p=0.1, seed=seed)
    found = {
        "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), (x, *norm())),
        "layer_norm_linear": (
            lambda x, g, h, w, b: ops.layer_norm_linear(x, g, h, 1e-6, w, b, "gelu"),
            (x, *norm(), *linear(hidden, width)),
        ),
        "linear_residual": (ops.linear_residual, (x, *linear(width, width), t(width), t(batch, tokens, width))),
        "layernorm_mlp": (
            lambda x, g, h, w1, b1, w2, b2: ops.layernorm_mlp(x, g, h, 1e-6, w1, b1, w2, b2, "gelu", None),
            (x, *norm(), *mlp),
        ),
        "attention": (lambda qkv: ops.attention(qkv, heads, scale), (t(batch, tokens, 3 * width),)),
        "attention gradient": (
            _gradients(lambda qkv: ops.attention(qkv, heads, scale)),
            (t(batch, tokens, 3 * width), t(batch, tokens, width)),
        ),
        "layer_norm gradient": (_gradients(lambda x, w, b: ops.layer_norm(x, w, b, 1e-6)), (x, *norm(), grad)),
        "layer_norm_linear gradient": (
            _gradients(lambda x, g, h, w, b: ops.layer_norm_linear(x, g, h, 1e-6, w, b, "gelu")),
            (x, *norm(), *linear(hidden, width), wide_grad),
        ),
        "linear_residual gradient": (
            _gradients(
                lambda x, w, b, g, r, s: ops.linear_residual(x, w, b, g, r, row_scale=s, **drop), skipped=(4, 5)
            ),
            (x, *linear(width, width), 1 + t(width, scale=0.1), t(batch, tokens, width), branch, grad),
        ),
        "layernorm_mlp gradient": (
            _gradients(
                lambda x, g, h, w1, b1, w2, b2, s: ops.layernorm_mlp(x, g, h, 1e-6, w1, b1, w2, b2, "gelu", s, **drop)
            ),
            (x, *norm(), *mlp, 1 + t(width, scale=0.1), grad),
        ),
        "patch_embed gradient": (
            _gradients(lambda images, *rest: ops.patch_embed(images, *rest, patch), skipped=(0,)),
            (images, *patches, grad),
        ),
        "attention pooled": (
            lambda q, k, v: ops.attention(q, heads, scale, k=k, v=v),
            (t(batch, 1, width), t(batch, tokens, width), t(batch, tokens, width)),
        ),
        "patch_embed": (lambda images, *rest: ops.patch_embed(images, *rest, patch), (images, *patches)),
    }
    if dtype != torch.float32:
        first = (norm(), linear(3 * width, width), linear(width, width), None)
        second = (norm(), linear(hidden, width), linear(width, hidden), None)
        weights = folding.prepare_block(*first, *second)
        found["prepared_blocks"] = (
            lambda x, *weights: ops.prepared_blocks(x, [*weights, *weights], heads, scale, "gelu", 1e-6, 1e-6),
            (x, *weights),
        )
        quantised = folding.fp8_block(*first, *second, "gelu")
        found["fp8_blocks"] = (
            lambda x, *weights: ops.fp8_blocks(x, [*weights, *weights], heads, scale, "gelu", 1e-6, 1e-6),
            (x, *quantised),
        )
    return found


NAMES = list(_tensors(torch.bfloat16, "cpu", **SMALL))
STACKS = ("prepared_blocks", "fp8_blocks")
# Gradients behind a product of PyTorch's, which may be another kernel for another batch.
BY_CUBLAS = tuple(
    f"{name} gradient" for name in ("layer_norm_linear", "linear_residual", "layernorm_mlp", "patch_embed")
)
CASES = [(name, dtype) for dtype in DTYPES for name in NAMES if name not in STACKS or dtype != "float32"]
each = pytest.mark.parametrize("name,dtype", CASES)
sizes = pytest.mark.parametrize("size", (BASE, FEW), ids=("batch 8", "batch 1"))


def problem(name, dtype, device, size):
    """(function, tensors) that runs the Triton kernels; the function returns a tuple of tensors."""
    if name == "fp8_blocks" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(NO_FLOAT8)
    function, tensors = _tensors(DTYPES[dtype], device, **size)[name]

    def call(*tensors):
        with vit_fast.backend("triton"), torch.no_grad():
            found = function(*tensors)
        return found if isinstance(found, tuple) else (found,)

    return call, tensors


def bits(results):
    """The bits of all results as one row."""
    return torch.cat([t.view({2: torch.int16, 4: torch.int32}[t.element_size()]).flatten() for t in results])


def results(device):
    """(name, dtype) → what the kernels compute of the small problems, on the CPU."""
    found = {}
    for name, dtype in CASES:
        call, tensors = problem(name, dtype, device, SMALL)
        found[name, dtype] = [t.cpu() for t in call(*tensors)]
    return found


def agree(actual, expected, name=""):
    """Sums in another order: a number may be rounded to its neighbour, of which the next product sums many; a gradient
    comes behind several products."""
    steps = {torch.float32: 256}.get(actual.dtype, 6 if "gradient" in name else 2) * torch.finfo(actual.dtype).eps
    allowed = (2**-4 if name == "fp8_blocks" else steps) * expected.abs().max()
    assert actual.shape == expected.shape and actual.isfinite().all()
    assert (actual.double() - expected.double()).abs().max() <= allowed


@pytest.mark.interp
def test_the_interpreters_results_are_those_of_torch():
    for (name, dtype), found in results("cpu").items():
        function, tensors = _tensors(DTYPES[dtype], "cpu", **SMALL)[name]
        with vit_fast.backend("torch"):
            wanted = function(*tensors)
        for actual, expected in zip(found, wanted if isinstance(wanted, tuple) else [wanted], strict=True):
            assert actual.dtype == expected.dtype and expected.std() > 0.05
            agree(actual / 4, expected / 4, name)


def test_the_interpreters_side_is_written(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    written = interpreted(tmp_path)
    assert list(written) == CASES and all(t.isfinite().all() for found in written.values() for t in found)


def interpreted(folder):
    path = folder / "results.pt"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[1]),  # of tests/support
    }
    child = subprocess.run(
        [sys.executable, "-P", __file__, path], env=environment, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return torch.load(path, weights_only=True)


@pytest.mark.gpu
def test_gpu_agrees_with_the_interpreter(tmp_path):
    expected = interpreted(tmp_path)
    for case, found in results("cuda").items():
        for actual, wanted in zip(found, expected[case], strict=True):
            agree(actual, wanted, case[0])


@pytest.mark.gpu
@each
@sizes
def test_gpu_the_same_bits_in_a_thousand_runs(name, dtype, size):
    call, tensors = problem(name, dtype, "cuda", size)
    first = bits(call(*tensors))
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (bits(call(*tensors)) != first).any()
    assert first.any() and not different.item()


@pytest.mark.gpu
@each
@sizes
def test_gpu_streams_do_not_disturb_each_other(name, dtype, size):
    call, tensors = problem(name, dtype, "cuda", size)
    other, others = problem("layernorm_mlp", dtype, "cuda", BASE)
    first, other_first = bits(call(*tensors)), bits(other(*others))
    different = torch.zeros(2, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(100):
        with torch.cuda.stream(streams[0]):
            different[0] += (bits(call(*tensors)) != first).any()
        with torch.cuda.stream(streams[1]):
            different[1] += (bits(other(*others)) != other_first).any()
    torch.cuda.synchronize()
    assert different.tolist() == [0, 0]


@pytest.mark.gpu
@each
@sizes
def test_gpu_graphs_replay_the_same_bits(name, dtype, size):
    call, tensors = problem(name, dtype, "cuda", size)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*tensors)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = call(*tensors)
    for factor in (1.0, -0.5):
        tensors[0].mul_(factor)
        for t in output:
            t.fill_(float("nan"))
        for _ in range(3):
            graph.replay()
        assert torch.equal(bits(output), bits(call(*tensors)))


@pytest.mark.gpu
@pytest.mark.parametrize("name,dtype", [case for case in CASES if case[0] not in (*STACKS, *BY_CUBLAS)])
def test_gpu_the_bits_of_an_image_do_not_depend_on_its_batch_mates(name, dtype):
    """Of the first result: the output, or the gradient of the first tensor."""
    call, tensors = problem(name, dtype, "cuda", BASE | dict(batch=64))
    whole, *_ = call(*tensors)
    for count in (1, 7):
        part = [t[:count] if t.shape[0] == 64 else t for t in tensors]
        assert torch.equal(bits(call(*part)[:1]), bits([whole[:count]]))


def _needs_memory():
    if torch.cuda.mem_get_info()[0] < FREE_MEMORY:
        pytest.skip(TOO_SMALL)


def _same_ends(actual, call, *tensors):
    """The first and the last rows of a large result are those of the first and the last images alone."""
    assert actual.numel() > 2**31 or tensors[0].numel() > 2**31
    for part in (slice(None, 2), slice(-2, None)):
        agree(actual[part], call(*(t[part].clone() for t in tensors)))


@pytest.mark.gpu
def test_gpu_layer_norm_beyond_2_to_the_31():
    _needs_memory()
    x = torch.randn(LARGE // 1024, 1024, dtype=torch.float16, device="cuda")
    with vit_fast.backend("triton"):
        _same_ends(ops.layer_norm(x, None, None), lambda x: ops.layer_norm(x, None, None), x)


@pytest.mark.gpu
def test_gpu_linear_beyond_2_to_the_31():
    _needs_memory()
    x = torch.randn(LARGE // 64, 64, dtype=torch.float16, device="cuda")
    weight = torch.randn(64, 64, dtype=torch.float16, device="cuda") / 8
    with vit_fast.backend("triton"):
        _same_ends(
            ops.linear_residual(x, weight, None, None, x), lambda x: ops.linear_residual(x, weight, None, None, x), x
        )


@pytest.mark.gpu
def test_gpu_attention_beyond_2_to_the_31():
    _needs_memory()
    for tokens in (197, 1025):
        qkv = torch.randn(LARGE // (tokens * 2304) + 1, tokens, 2304, dtype=torch.float16, device="cuda")
        with vit_fast.backend("triton"):
            _same_ends(ops.attention(qkv, 12, 0.125), lambda qkv: ops.attention(qkv, 12, 0.125), qkv)


@pytest.mark.gpu
def test_gpu_patch_embed_beyond_2_to_the_31():
    _needs_memory()
    _, (_, *rest) = _tensors(torch.float16, "cuda", **BASE)["patch_embed"]
    images = torch.randn(LARGE // (3 * 224 * 224) + 1, 3, 224, 224, dtype=torch.float16, device="cuda")
    with vit_fast.backend("triton"):
        _same_ends(ops.patch_embed(images, *rest, 16), lambda images: ops.patch_embed(images, *rest, 16), images)


@pytest.mark.gpu
def test_gpu_gradients_of_rows_beyond_2_to_the_31():
    """Of LayerNorm, a linear layer and an MLP whose pre-activation is as long."""
    _needs_memory()
    weight = torch.randn(64, 64, dtype=torch.float16, device="cuda") / 8
    w1 = torch.randn(256, 64, dtype=torch.float16, device="cuda") / 8
    w2 = torch.randn(64, 256, dtype=torch.float16, device="cuda") / 16
    cases = (
        (1024, lambda x: ops.layer_norm(x, None, None)),
        (64, lambda x: ops.linear_residual(x, weight, None, None, x.detach())),
        (256, lambda x: ops.layernorm_mlp(x, None, None, 1e-6, w1, None, w2, None, "gelu", None)),
    )
    for wide, function in cases:
        width = 1024 if wide == 1024 else 64
        x, grad = torch.randn(2, LARGE // wide, width, dtype=torch.float16, device="cuda")
        run = _gradients(function)
        with vit_fast.backend("triton"):
            (actual,) = run(x, grad)
            assert len(actual) * wide > 2**31
            for part in (slice(None, 2), slice(-2, None)):
                agree(actual[part], run(x[part].clone(), grad[part].clone())[0], "gradient")
        del x, grad, actual


@pytest.mark.gpu
def test_gpu_gradients_of_patch_embed_beyond_2_to_the_31():
    """Sums over images, of which the last two alone have a gradient."""
    _needs_memory()
    function, (_, *rest, _) = _tensors(torch.float16, "cuda", **BASE)["patch_embed gradient"]
    images = torch.randn(LARGE // (197 * 768) + 1, 3, 224, 224, dtype=torch.float16, device="cuda")
    grad = torch.zeros(len(images), 197, 768, dtype=torch.float16, device="cuda")
    grad[-2:] = torch.randn(2, 197, 768, device="cuda")
    assert grad.numel() > 2**31
    with vit_fast.backend("triton"):
        pairs = zip(function(images, *rest, grad), function(images[-2:], *rest, grad[-2:]), strict=True)
        for actual, expected in pairs:
            agree(actual, expected, "gradient")


if __name__ == "__main__":
    from support import interpreter_cures

    interpreter_cures.install()
    torch.save(results("cpu"), sys.argv[1])
