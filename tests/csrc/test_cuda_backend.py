"""The backend ``cuda`` from ``vit_fast.ops`` down to the device code, on CPU tensors.

The torch operators of ``csrc/cuda`` are built for the CPU, and the emulator runs their kernels. What differs on a GPU:
device guard, stream and launch.
"""

import copy
import inspect
import re

import pytest
import torch
from support import cuda_emulator
from support.attention import formula as attention_formula
from support.budget import assert_within_budget
from support.layer_norm import formula as layer_norm_formula
from support.linear import formula as linear_formula
from support.linear import wide
from support.patch_embed import golden as patch_embed_golden
from support.prepared_linear import formula as prepared_formula
from support.prepared_linear import problem
from vit_fast.kernels import reference
from vit_fast.kernels.activation_names import ACTIVATIONS
from vit_fast.kernels.block_options import BlockOptions
from vit_fast.kernels.folding import FoldedBlock

import vit_fast
from vit_fast import ops
from vit_fast.backends import cuda, select
from vit_fast.backends.torch import TORCH

HALF = (torch.bfloat16, torch.float16)
FLOAT = (torch.float32, *HALF)


@pytest.fixture(scope="module")
def operators():
    path = cuda_emulator.build_operators()
    cuda.define_operators()
    torch.ops.load_library(str(path))


@pytest.fixture
def backend(operators, monkeypatch):
    """The backend, for CPU tensors and forced."""
    emulated = cuda.Cuda()
    emulated.fill_tables()
    monkeypatch.setattr(cuda.Cuda, "unavailable", lambda self, device: ())
    monkeypatch.setattr(select, "BACKENDS", select.BACKENDS | {"cuda": emulated})
    with vit_fast.backend("cuda"):
        yield emulated


def test_every_operator_has_its_kernel(operators):
    for schema in cuda._SCHEMAS:
        name = schema.split("(")[0]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vit_fast_cuda::{name}", "CPU"), name


@pytest.mark.parametrize(
    "x_dtype,dtype", [(torch.float32,) * 2, *((d, d) for d in HALF), *((torch.float32, d) for d in HALF)]
)
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_layer_norm_and_linear(backend, x_dtype, dtype, norm):
    x, weight, bias = torch.randn(2, 5, 64).to(x_dtype), torch.randn(64).to(x_dtype), torch.randn(64).to(x_dtype)
    for view in (x, x[:, 1:], x.transpose(0, 1), torch.randn(2, 5, 128).to(x_dtype)[..., ::2]):
        arguments = (view, weight, bias, 1e-6)
        results = [f(*arguments, norm=norm) for f in (backend.forward["layer_norm"], reference.layer_norm_fwd)]
        for actual, eager, truth in zip(*results, layer_norm_formula(*arguments, norm=norm), strict=True):
            if truth.any():
                assert_within_budget(actual, eager, truth, order=1e-6)
            else:
                assert norm == "rms" and not actual.any()
    w, b = torch.randn(48, 64).to(dtype) / 8, torch.randn(48).to(dtype)
    for activation in (None, *ACTIVATIONS):
        arguments = (x, weight, bias, 1e-6, w, b, activation)
        out, eager = (f(*arguments, norm=norm) for f in (ops.layer_norm_linear, reference.layer_norm_linear))
        golden = linear_formula(layer_norm_formula(x, weight, bias, 1e-6, norm)[0], w, b, activation)
        assert_within_budget(out, eager, golden, expected_zeros=0.7, kind="model", order=1e-5)
    gamma, scale = torch.randn(64).to(dtype), torch.tensor([2.0, 0.0])
    proj = torch.randn(64, 64).to(dtype) / 8
    residual = torch.randn(2, 6, 64).to(x_dtype)[:, 1:]
    arguments = (x.to(dtype), proj, torch.randn(64).to(dtype), gamma, residual)
    out = ops.linear_residual(*arguments, row_scale=scale)
    assert out.dtype == x_dtype and out.is_contiguous()
    golden = linear_formula(*arguments[:3], gamma=gamma, residual=residual, row_scale=scale)
    assert_within_budget(out, reference.linear_residual(*arguments, row_scale=scale), golden, order=1e-5)
    assert torch.equal(out[1], residual[1])


@pytest.mark.parametrize("dtype", FLOAT)
def test_attention(backend, dtype):
    qkv = torch.randn(2, 33, 3 * 2 * 24).to(dtype)
    out, lse = backend.forward["attention"](qkv, 2, 0.2)
    eager, golden = reference.attention_fwd(qkv, 2, 0.2), attention_formula(qkv, 2, 0.2)
    assert_within_budget(out, eager[0], golden[0])
    assert_within_budget(lse, eager[1], golden[1], order=1e-5)
    assert torch.equal(ops.attention(qkv, 2, 0.2), out)
    pooled = torch.randn(1, 1, 48).to(dtype).expand(2, 1, 48)
    _, k, v = qkv.chunk(3, 2)
    with_k = ops.attention(pooled, 2, 0.2, k=k, v=v)
    golden = attention_formula(pooled, 2, 0.2, k, v)[0]
    assert_within_budget(with_k, reference.attention(pooled, 2, 0.2, k=k, v=v), golden)
    size = dtype.itemsize
    bytes_ = bytearray(size * (qkv.numel() + 9))
    unaligned = torch.frombuffer(bytes_, dtype=dtype, offset=size)[: qkv.numel()].view_as(qkv)
    assert torch.equal(ops.attention(unaligned.copy_(qkv), 2, 0.2), out)
    assert ops.attention(qkv[:0], 2, 0.2).shape == (0, 33, 48)


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("pixels", ("same", torch.uint8, torch.float32))
def test_patch_embed(backend, dtype, pixels):
    images = torch.rand(2, 3, 12, 16) * 255
    images = images.to(dtype if pixels == "same" else pixels)
    weight, bias = (torch.randn(20, 3, 4, 4) / 7).to(dtype), torch.randn(20).to(dtype)
    pos, prefix = torch.randn(1, 12, 20).to(dtype), torch.randn(1, 2, 20)
    norm = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)) if pixels == torch.uint8 else (None, None)
    for memory in (torch.contiguous_format, torch.channels_last):
        arguments = (images.contiguous(memory_format=memory), weight, bias, pos, prefix, (4, 4), *norm)
        out = ops.patch_embed(*arguments[:6], mean=norm[0], std=norm[1])
        assert_within_budget(out, reference.patch_embed(*arguments), patch_embed_golden(*arguments))
    assert ops.patch_embed(images[:0], weight, bias, pos, prefix, (4, 4)).shape == (0, 14, 20)


NORMS = dict(norm="rms", out_eps=1e-6, hidden_eps=1e-6, hidden_features=30)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("norms", ({}, NORMS), ids=("plain", "norms inside the branches"))
def test_prepared_blocks(backend, dtype, norms):
    def tensor(*shape):
        return torch.randn(shape).to(dtype) * shape[-1] ** -0.5

    def block(width=32, hidden=32):
        first, fc1 = tensor(3 * width, width), tensor(hidden, width)
        zeros = torch.zeros
        return FoldedBlock(
            first, first.float().sum(1), zeros(3 * width), tensor(width, width), zeros(width),
            fc1, fc1.float().sum(1), zeros(hidden), tensor(width, hidden), zeros(width),
        )  # fmt: skip

    def options(change):
        if not norms:
            return ()
        q_norm = tuple(None if t is None else change(t) for t in (weight, None))
        return (BlockOptions(**norms, q_norm=(*q_norm, 1e-6), k_norm=(None, None, 1e-6)),)

    weight, weights = torch.rand(16).to(dtype) + 0.5, [t for _ in range(2) for t in block()]
    x, rest = torch.randn(2, 7, 32).to(dtype), (2, 0.25, "gelu", 1e-6, 1e-6)
    arguments = (x, weights, *rest, *options(lambda t: t))
    golden = reference.prepared_blocks(wide(x), [wide(t) for t in weights], *rest, *options(wide))
    eager = reference.prepared_blocks(*arguments)
    out = backend.forward["prepared_blocks"](*arguments)
    assert_within_budget(out, eager, golden, kind="model", order=1e-5)
    assert backend.reasons("prepared_blocks", x, weights, 2, *arguments[7:]) == []


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("options", (dict(activation="gelu", norm="rms"), dict(activation="swiglu"), dict(ends=True)))
def test_prepared_linear(backend, dtype, options):
    arguments = problem((2, 7, 32), 48, dtype, False, **options)
    out, eager = backend.forward["prepared_linear"](*arguments), reference.packed_linear(*arguments)
    assert_within_budget(out, eager, prepared_formula(*arguments), order=1e-5)
    assert backend.reasons("prepared_linear", *arguments) == []
    assert backend.reasons("prepared_linear", arguments[0].double(), *arguments[1:])


def test_stacks_with_options_of_attention_are_left_to_the_next_backend(backend):
    x = torch.randn(1, 4, 32)
    told = backend.reasons("prepared_blocks", x, [], 2, BlockOptions(bias=torch.randn(2, 4, 4)))
    assert told == ["attention has no bias here"]


def test_a_model_with_gradients(backend):
    """Forward on the kernels, backward by the reference's formulas with the kernels' statistics."""
    model = vit_fast.VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)
    model = model.bfloat16()
    images = torch.randn(2, 3, 16, 16).bfloat16()

    def run(network, pixels):
        out = network(pixels)
        out.float().square().sum().backward()
        return [out, *(p.grad for p in network.parameters() if p.grad is not None)]

    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    actual = run(model, images)
    with vit_fast.backend("torch"):
        expected, golden = run(eager, images), run(exact, images.double())
    errors, allowed = ([(a - g).norm() / g.norm() for a, g in zip(found, golden)] for found in (actual, expected))
    assert len(actual) > 20 and sum(errors) <= 1.25 * sum(allowed), (sum(errors), sum(allowed))


def test_status_and_explain_tell_that_there_is_no_backward(backend):
    told = vit_fast.status("cpu").without_backward
    assert told["cuda"] == tuple(TORCH.backward) and "torch" not in told
    assert f"backward of {', '.join(TORCH.backward)}: torch (cuda has none)" in str(vit_fast.status("cpu"))
    model = vit_fast.VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=5)
    told = str(vit_fast.explain(model, torch.randn(1, 3, 16, 16)))
    assert re.search(r"^backward of .*attention.*: torch \(cuda has none\)$", told, re.MULTILINE)
    with torch.no_grad():
        assert "backward" not in str(vit_fast.explain(model.eval(), torch.randn(1, 3, 16, 16)))


def test_compiled_in_one_graph(backend):
    model = vit_fast.VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=5)
    model = model.bfloat16().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        images = torch.randn(batch, 3, 16, 16).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(images), model(images))


def test_tables_hold_operations_with_the_references_arguments(backend):
    for table in ("forward", "inference"):
        ours, wanted = getattr(backend, table), getattr(TORCH, table)
        assert ours and set(ours) <= set(wanted)
        for name, function in ours.items():
            own, other = (
                {n: p for n, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}  # options
                for f in (function, wanted[name])
            )
            assert set(own) <= set(other) or name == "prepared_blocks", name
            assert [n for n in other if n in own] == list(own), name
    assert set(backend.not_supported) == set(backend.forward)


NOT_SUPPORTED = {
    "double": (
        lambda: ops.attention(torch.randn(1, 4, 96).double(), 2, 1.0),
        "qkv has dtype float64, .* takes float32 or float16 or bfloat16",
    ),
    "strides of float32": (
        lambda: ops.attention(torch.randn(1, 4, 98)[..., :96], 2, 1.0),
        "rows and images at multiples of 4 elements",
    ),
    "head of 12": (lambda: ops.attention(torch.randn(1, 4, 72).half(), 2, 1.0), "head size 12 is not a multiple of 8"),
    "head of 136": (lambda: ops.attention(torch.randn(1, 4, 408).half(), 1, 1.0), "head size 136 is not"),
    "strides": (
        lambda: ops.attention(torch.randn(1, 4, 49).half()[..., 1:], 1, 1.0),
        "qkv has strides .*, the kernel takes contiguous heads",
    ),
    "float64": (lambda: ops.layer_norm(torch.randn(2, 8).double(), None, None, 1e-6), "x has dtype float64"),
    "weight": (
        lambda: ops.patch_embed(
            torch.randn(1, 3, 8, 8).double(), torch.randn(4, 3, 4, 4).double(), None, None, None, 4
        ),
        "weight has dtype float64",
    ),
    "pixels": (
        lambda: ops.patch_embed(
            torch.randn(1, 3, 8, 8).half(), torch.randn(4, 3, 4, 4).bfloat16(), None, None, None, 4
        ),
        "images has dtype float16, .* takes uint8 or float32 or bfloat16",
    ),
    "residual": (
        lambda: ops.linear_residual(torch.randn(2, 8), torch.randn(8, 8), None, None, torch.randn(2, 8).half()),
        "residual has dtype float16",
    ),
}


@pytest.mark.parametrize("call,words", NOT_SUPPORTED.values(), ids=NOT_SUPPORTED)
def test_not_supported(backend, call, words):
    with pytest.raises(vit_fast.UnsupportedError, match=f"backend 'cuda' was forced and cannot run: .*{words}"):
        call()


def test_unavailable(monkeypatch):
    emulated = cuda.Cuda()
    emulated.fill_tables()
    assert emulated.unavailable(torch.device("cpu")) == ("the cuda extension does not run on device type cpu",)
    for capability, works in (((7, 0), False), ((7, 5), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (emulated.unavailable(torch.device("cuda", 0)) == ()) == works
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    fake = torch.empty(0, dtype=torch.bfloat16, device="meta")
    assert cuda._product_reasons(fake) == []


def test_a_fault_in_a_kernel_is_an_exception(operators):
    """The operators' own checks: what backends/cuda.py lets through by mistake ends in an error, not in a crash."""
    run = torch.ops.vit_fast_cuda
    q = torch.randn(1, 4, 49).half()[..., 1:]
    with pytest.raises(RuntimeError, match="vit_fast_cuda::attention: layout"):
        run.attention(torch.empty(1, 4, 48).half(), None, q, q, q, 1, 1.0)
    with pytest.raises(RuntimeError, match="the last axis is not contiguous"):
        run.layer_norm(torch.empty(2, 4), None, None, torch.randn(4, 2).t(), None, None, 1e-6, False)
    with pytest.raises(RuntimeError, match="dtypes"):
        run.layer_norm(torch.empty(2, 4).half(), None, None, torch.randn(2, 4).bfloat16(), None, None, 1e-6, False)
