"""``vit-fast profile``: formulas and figures counted by hand, attribution on traces written by hand, and the command.

The traces have the shape that torch.profiler gives them on a GPU: operators, launches inside them, kernels that carry
the number of their launch. Models of the command have two blocks and 32 pixels a side.
"""

import contextlib
import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.gpu import NO_FLOAT8

import vit_fast
from vit_fast import cli
from vit_fast.backends import select
from vit_fast.backends.torch import TORCH
from vit_fast.bench import attribution, machine, measure, operations
from vit_fast.bench import profile as profiling
from vit_fast.bench.attribution import STEP, attribute, family
from vit_fast.bench.errors import BenchError
from vit_fast.bench.operations import Call, Operation, forward_operations, moved_bytes, tensor_sizes
from vit_fast.cli import options
from vit_fast.precisions import FP8, PRECISIONS

TINY = ["profile", "--model", "vit_tiny_patch16_224", "--img-size", "32", "--device", "cpu"]
M = 256 * 197  # rows of ViT-B/16 at batch 256

# name: (FLOP, elements moved) of one call, ViT-B/16 at 224 pixels and batch 256 by vit_fast's operators. Elements are
# input + weight + vectors + output, and the residual where one is added.
VIT_FAST_B16 = {
    ("patch_embed", "patch_embed.proj"): (59_190_018_048, 38_535_168 + 589_824 + 768 + 196 * 768 + 768 + M * 768),
    ("layer_norm", "blocks.*.norm1"): (0, M * 768 + 2 * 768 + M * 768),
    ("linear", "blocks.*.attn.qkv"): (178_476_023_808, M * 768 + 768 * 2304 + 2304 + M * 2304),
    ("attention", "blocks.*"): (30_520_639_488, M * 2304 + M * 768),
    ("linear", "blocks.*.attn.proj"): (59_492_007_936, M * 768 + 768 * 768 + 768 + M * 768 + M * 768),
    ("layer_norm", "blocks.*.norm2"): (0, M * 768 + 2 * 768 + M * 768),
    ("linear", "blocks.*.mlp.fc1"): (237_968_031_744, M * 768 + 768 * 3072 + 3072 + M * 3072),
    ("linear", "blocks.*.mlp.fc2"): (237_968_031_744, M * 3072 + 3072 * 768 + 768 + M * 768 + M * 768),
    ("layer_norm", "norm"): (0, M * 768 + 2 * 768 + M * 768),
    ("linear", "head"): (393_216_000, 256 * 768 + 768 * 1000 + 1000 + 256 * 1000),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What is timed here is small, and other threads are for other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


def b16(monkeypatch, batch=256, backend="triton"):
    """The calls of ViT-B/16 in bfloat16 by vit_fast's operators, which run on fake tensors here."""
    monkeypatch.setattr(select, "choose", lambda *call, **options: backend)
    with torch.device("meta"):
        model = vit_fast.create_model("vit_base_patch16_224")
    model = model.to_empty(device="cpu").to(torch.bfloat16).eval().requires_grad_(False)
    return forward_operations(model, torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16))


def test_operations_of_vit_b16_by_hand(monkeypatch):
    calls = b16(monkeypatch)
    by_key = {}
    for call in calls:
        for operation in call.operations:
            by_key.setdefault((operation.name, operation.module), []).append(operation)
    for key, (flop, elements) in VIT_FAST_B16.items():
        times = 12 if "blocks" in key[1] else 1
        assert [(o.flop, o.bytes) for o in by_key[key]] == [(flop, 2 * elements)] * times, key
    # 35.13 GFLOP an image, and beside these operations only the prefix token's position
    assert sum(o.flop for found in by_key.values() for o in found) / 256 == pytest.approx(35.13e9, rel=1e-3)
    assert set(by_key) - set(VIT_FAST_B16) == {("add", "pos_embed")}
    qkv = next(call for call in calls if call.operator == "vit_fast::layer_norm_linear_fwd")
    assert qkv.sizes == ((256, 197, 768), (768,), (768,), (2304, 768), (2304,))
    assert [o.name for o in qkv.operations] == ["layer_norm", "linear"]


def test_every_operator_is_known():
    """One that is not has no row."""
    assert {f"vit_fast::{name}_fwd" for name in TORCH.backward} <= set(operations._VIT_FAST)
    narrow = {precision.operation for precision in PRECISIONS.values() if precision.products}
    assert {f"vit_fast::{name}" for name in narrow} <= set(operations._VIT_FAST)


def fp8(monkeypatch, depth, batch=256):
    """The calls of ViT-B/16 in float8, of so many blocks; its kernels run on fake tensors here."""
    monkeypatch.setattr(select, "choose", lambda *call, **options: "triton")
    model = vit_fast.create_model("vit_base_patch16_224", depth=depth).to(torch.bfloat16).eval().requires_grad_(False)
    vit_fast.prepare(model, precision="fp8")
    return forward_operations(model, torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16))


# name: (FLOP, bytes, in float8), of one block at batch 256: what passes as e4m3 is a byte an element, what is bfloat16
# two; the scales and biases of the products are float32, a row each.
FP8_B16 = [
    (("layer_norm", "blocks.*"), (0, M * 768 * 2 + 768 * 4 + M * 768, False)),
    (("linear", "blocks.*.attn.qkv"), (178_476_023_808, M * 768 + 2304 * (768 + 8) + M * 2304 * 2, True)),
    (("attention", "blocks.*"), (30_520_639_488, M * 2304 * 2 + M * 768, False)),
    (("linear", "blocks.*.attn.proj"), (59_492_007_936, M * 768 + 768 * (768 + 8) + 2 * M * 768 * 2, True)),
    (("layer_norm", "blocks.*"), (0, M * 768 * 2 + 768 * 4 + M * 768, False)),
    (("linear", "blocks.*.mlp.fc1"), (237_968_031_744, M * 768 + 3072 * (768 + 8 + 4) + M * 3072, True)),
    (("linear", "blocks.*.mlp.fc2"), (237_968_031_744, M * 3072 + 768 * (3072 + 8) + 2 * M * 768 * 2, True)),
]


def test_operations_in_float8_by_hand(monkeypatch):
    calls = fp8(monkeypatch, 2)
    (call,) = (call for call in calls if call.operator == "vit_fast::fp8_blocks")
    found = [((o.name, o.module), (o.flop, o.bytes, o.narrow)) for o in call.operations]
    assert found == FP8_B16 * 2
    assert call.sizes[0] == (256, 197, 768) and len(call.sizes) == 1 + 2 * 14
    others = [operation for other in calls if other is not call for operation in other.operations]
    assert {o.name for o in others} == {"patch_embed", "add", "layer_norm", "linear"}
    assert not any(o.narrow for o in others)
    product, bound = call.operations[1], call.operations[2]
    assert (
        product.roofline_seconds(1e12, 1e15, 2e12) == product.flop / 2e12
        and bound.roofline_seconds(1e12, 1e15, 2e12) == bound.flop / 1e12
    )
    assert product.roofline_seconds(1e12, 1e9, 2e12) == product.bytes / 1e9
    assert product.roofline_seconds(1e12, 1e15) == product.flop / 1e12  # no rate of float8 is known: it is emulated


def test_kernels_in_float8_find_their_operations(monkeypatch):
    """Of more tensors than torch.profiler writes sizes of; the zeros that one launch needs are nobody's."""
    calls, steps = fp8(monkeypatch, 3, batch=8), 2
    norm, linear = "_layer_norm_fwd_kernel", "_linear_fwd_kernel"
    attention = "_attention_fwd_resident_kernel"
    block = [(norm, 3), (linear, 30), (attention, 20), (linear, 12), (norm, 4), (linear, 40), (linear, 41)]
    trace = Trace()
    for _ in range(steps):
        with trace.step():
            for call in calls:
                if call.operator == "vit_fast::fp8_blocks":
                    zeros = ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<int>>", 1)
                    trace.operator(call.operator, [[8, 197, 768], [], []], zeros, *block * 3)
                else:
                    trace.operator(call.operator, call.sizes, *KERNELS[call.operator])
    found = attribute(trace.events, calls, steps, True, 500e12, 4e12, 900e12)
    rows = found_rows(found)
    for key, count, microseconds in (
        (("layer_norm", "blocks.*"), 6, 3 * (3 + 4)),
        (("linear", "blocks.*.attn.qkv"), 3, 3 * 30),
        (("attention", "blocks.*"), 3, 3 * 20),
        (("linear", "blocks.*.attn.proj"), 3, 3 * 12),
        (("linear", "blocks.*.mlp.fc1"), 3, 3 * 40),
        (("linear", "blocks.*.mlp.fc2"), 3, 3 * 41),
        (("layer_norm", "norm"), 1, 9),
    ):
        assert rows[key].calls == pytest.approx(count), key
        assert rows[key].seconds == pytest.approx(1e-6 * microseconds), key
    fc1 = rows["linear", "blocks.*.mlp.fc1"]
    assert fc1.roofline == pytest.approx(3 * 2 * 8 * 197 * 768 * 3072 / 900e12)
    assert fc1.kernels == {linear: pytest.approx(3)}
    fill = next(row for row in found.rows if "FillFunctor" in row.operation)
    assert fill.roofline is None and fill.seconds == pytest.approx(1e-6) and fill.module == "vit_fast::fp8_blocks"


def test_a_long_list_of_tensors_has_no_sizes(tmp_path):
    """torch.profiler writes those of 30 tensors and none of 31, and so do we."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    class Joined(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x] * self.count)

    for count in (30, 31):
        model = Joined()
        model.count = count
        (call,) = forward_operations(model, torch.empty(2, 3))
        with profiler(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            model(torch.empty(2, 3))
        recorded.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        (event,) = (event for event in events if event["name"] == "aten::cat")
        assert call.sizes == tensor_sizes(event["args"]["Input Dims"]) == ((2, 3),) * (count if count == 30 else 0)


def test_operations_of_plain_pytorch_by_hand():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_base_patch16_224", depth=1, init_values=0.1).eval().requires_grad_(False)
    calls = forward_operations(model, torch.empty(2, 3, 224, 224))
    found = {(o.name, o.module): o for call in calls for o in call.operations}
    rows = 2 * 197
    wanted = {
        ("convolution", "patch_embed.proj"): (2 * 2 * 196 * 768 * 768, 2 * 3 * 224**2 + 768**2 + 768 + 2 * 196 * 768),
        ("cat", "cls_token"): (0, 768 + 2 * 196 * 768 + rows * 768),
        ("add", "pos_embed"): (0, rows * 768 + 197 * 768 + rows * 768),
        ("layer_norm", "blocks.*.norm1"): (0, 2 * rows * 768 + 2 * 768),
        ("linear", "blocks.*.attn.qkv"): (2 * rows * 768 * 2304, rows * (768 + 2304) + 768 * 2304 + 2304),
        ("attention", "blocks.*.attn"): (4 * 2 * 12 * 197**2 * 64, 4 * rows * 768),
        ("linear", "blocks.*.attn.proj"): (2 * rows * 768 * 768, 2 * rows * 768 + 768 * 768 + 768),
        ("mul", "blocks.*.ls1"): (0, 2 * rows * 768 + 768),
        ("add", "blocks.*"): (0, 3 * rows * 768),
        ("gelu", "blocks.*.mlp.act"): (0, 2 * rows * 3072),
        ("linear", "head"): (2 * 2 * 768 * 1000, 2 * 768 + 768 * 1000 + 1000 + 2 * 1000),
    }
    for key, (flop, elements) in wanted.items():
        assert (found[key].flop, found[key].bytes) == (flop, 4 * elements), key
    with torch.inference_mode():  # a caller's mode does not change what is seen
        assert forward_operations(model, torch.empty(2, 3, 224, 224)) == calls


@pytest.mark.parametrize(
    "activation,first_rows,hidden", [("gelu", 512, 512), ("swiglu", 512, 256)], ids=["gelu", "swiglu"]
)
def test_operations_with_every_argument(monkeypatch, activation, first_rows, hidden):
    """What ViT-B/16 has none of: LayerScale, drop path, mixed dtypes, gated activations, keys of another length."""
    monkeypatch.setattr(select, "choose", lambda *call, **options: "triton")
    half = {"dtype": torch.bfloat16}

    class Branches(torch.nn.Module):
        def forward(self, x):
            norm, gamma, scale = torch.empty(2, 64), torch.empty(64, **half), torch.empty(2)
            w1, w2 = torch.empty(first_rows, 64, **half), torch.empty(64, hidden, **half)
            x = vit_fast.ops.layernorm_mlp(x, *norm, 1e-6, w1, None, w2, None, activation, gamma, row_scale=scale)
            return vit_fast.ops.attention(x, 4, 0.25, k=torch.empty(2, 9, 64), v=torch.empty(2, 9, 64))

    calls = forward_operations(Branches(), torch.empty(2, 5, 64))
    norm, fc1, fc2, attention = (operation for call in calls for operation in call.operations)
    normal = 10 * 64 * 2
    assert norm == Operation("layer_norm", "", 0, 10 * 64 * 4 + 2 * 64 * 4 + normal)
    assert fc1 == Operation("linear", "", 2 * 10 * 64 * first_rows, normal + 64 * first_rows * 2 + 10 * hidden * 2)
    moved = 10 * hidden * 2 + hidden * 64 * 2 + 64 * 2 + 2 * 4 + 2 * 10 * 64 * 4
    assert fc2 == Operation("linear", "", 2 * 10 * 64 * hidden, moved)
    assert attention == Operation("attention", "", 4 * 2 * 5 * 9 * 64, 4 * 64 * (10 + 2 * 18 + 10))


def test_bytes_and_sizes():
    x = torch.empty(1, 5).expand(3, 5)
    assert moved_bytes(x) == 5 * 4 and moved_bytes(x, x, None) == 5 * 4
    assert moved_bytes(x, torch.empty(3, 5, dtype=torch.int8)) == 20 + 15 and moved_bytes(torch.empty(0, 5)) == 0
    assert tensor_sizes([[[2, 1], [2, 4]], [], [7]]) == ((2, 1), (2, 4), (7,))
    bound = Operation("linear", "", 2_000, 300)
    assert bound.roofline_seconds(1_000, 100) == 3 and bound.roofline_seconds(100, 1_000) == 20


class Trace:
    """Writes the trace of a GPU: the host issues operators one behind the other, the device runs what they launch."""

    def __init__(self):
        self.events, self.host, self.device, self.number = [], 0.0, 100.0, 0

    def event(self, category, name, start, duration, **facts):
        place = (
            {"pid": 1, "tid": 1} if category in ("cpu_op", "user_annotation", "cuda_driver") else {"pid": 0, "tid": 7}
        )
        event = {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": facts}
        self.events.append(event | place)

    @contextlib.contextmanager
    def around(self, name, sizes=(), category="cpu_op"):
        start, number = self.host, self.number = self.host, self.number + 1
        self.host += 1
        yield number
        self.host += 1
        self.event(category, name, start, self.host - start, **{"External id": number, "Input Dims": sizes})

    def step(self):
        return self.around(STEP, category="user_annotation")

    def kernel(self, name, duration, gap=0.0, grid=(8, 1, 1), outside=None, **facts):
        """A kernel ``gap`` after the last; ``outside`` names the operator where the launch itself left no event."""
        self.number += 1
        self.device += gap
        if outside is None:
            self.event("cuda_driver", "cuLaunchKernelEx", self.host, 0.5, correlation=self.number)
            facts["correlation"] = self.number
        else:
            facts["External id"] = outside
        self.host += 1
        self.event(facts.pop("category", "kernel"), name, self.device, duration, grid=list(grid), **facts)
        self.device += duration

    def operator(self, name, sizes, *kernels):
        with self.around(name, sizes):
            for kernel, duration in kernels:
                self.kernel(kernel, duration)


def found_rows(found):
    return {(row.operation, row.module): row for row in found.rows}


KERNELS = {  # of vit_fast's operators, in the order of their launch, with microseconds
    "vit_fast::patch_embed_fwd": [("_patch_embed_fwd_kernel", 50)],
    "vit_fast::layer_norm_linear_fwd": [("_layer_norm_fwd_kernel", 10), ("_linear_fwd_kernel", 30)],
    "vit_fast::attention_fwd": [("_attention_fwd_resident_kernel", 20)],
    "vit_fast::linear_residual_fwd": [("_linear_fwd_kernel", 12)],
    "vit_fast::layernorm_mlp_fwd": [
        ("_layer_norm_fwd_kernel", 11),
        ("_linear_fwd_kernel", 40),
        ("_linear_fwd_kernel", 41),
    ],
    "vit_fast::layer_norm_fwd": [("_layer_norm_fwd_kernel", 9)],
    "aten::addmm": [("nvjet_tst_64x8_64x16_1x4_h_bz_bias_TNT", 5), ("void splitKreduce_kernel<32>", 1)],
    "aten::add": [("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", 2)],
}
MICROSECONDS = {  # of one call in the table
    ("patch_embed", "patch_embed.proj"): 50,
    ("layer_norm", "blocks.*.norm1"): 10,
    ("linear", "blocks.*.attn.qkv"): 30,
    ("attention", "blocks.*"): 20,
    ("linear", "blocks.*.attn.proj"): 12,
    ("layer_norm", "blocks.*.norm2"): 11,
    ("linear", "blocks.*.mlp.fc1"): 40,
    ("linear", "blocks.*.mlp.fc2"): 41,
    ("layer_norm", "norm"): 9,
    ("linear", "head"): 6,
    ("add", "pos_embed"): 2,
}


def trace_of(calls, steps, kernels=KERNELS):
    trace = Trace()
    for _ in range(steps):
        with trace.step():
            for call in calls:
                trace.operator(call.operator, [list(size) for size in call.sizes], *kernels[call.operator])
    return trace


def test_every_kernel_of_vit_b16_finds_its_operation(monkeypatch):
    calls = b16(monkeypatch)
    found = attribute(trace_of(calls, 3).events[::-1], calls, 3, True, 500e12, 4e12)  # a trace has no order
    rows = found_rows(found)
    assert set(rows) == set(MICROSECONDS)
    for key, microseconds in MICROSECONDS.items():
        calls_a_step = 12 if "blocks" in key[1] else 1
        assert rows[key].calls == pytest.approx(calls_a_step), key
        assert rows[key].seconds == pytest.approx(1e-6 * microseconds * calls_a_step), key
    flop, elements = VIT_FAST_B16["linear", "blocks.*.mlp.fc2"]
    fc2 = rows["linear", "blocks.*.mlp.fc2"]
    assert (fc2.flop, fc2.bytes) == (pytest.approx(12 * flop), pytest.approx(12 * 2 * elements))
    assert fc2.roofline == pytest.approx(12 * flop / 500e12)  # 0.48 ms a call of FLOP, 0.12 of bytes
    norm = rows["layer_norm", "norm"]
    assert norm.roofline == pytest.approx(2 * VIT_FAST_B16["layer_norm", "norm"][1] / 4e12)
    assert fc2.kernels == {"_linear_fwd_kernel": pytest.approx(12)}
    assert [row.operation for row in found.rows][1:4] == ["patch_embed", "layer_norm", "linear"]  # the model's order
    assert found.gaps == pytest.approx(0, abs=1e-12) and found.overlap == pytest.approx(0, abs=1e-12)
    assert found.span == pytest.approx(sum(row.seconds for row in found.rows))


def test_equal_calls_are_told_apart_by_their_order():
    """Eager LayerNorms have one name and one size; which is which only their order tells."""
    sizes = ((4, 8), (8,), (8,))
    names = ("norm1", "norm2", "norm")
    calls = [Call("aten::native_layer_norm", sizes, (Operation("layer_norm", name, 0, 8),)) for name in names]
    trace = Trace()
    for _ in range(2):
        with trace.step():
            for microseconds in (1, 2, 4):
                trace.operator("aten::native_layer_norm", sizes, ("vectorized_layer_norm_kernel", microseconds))
    rows = found_rows(attribute(trace.events, calls, 2, True, 1, 1))
    assert [rows["layer_norm", name].seconds for name in names] == pytest.approx([1e-6, 2e-6, 4e-6])


def test_equal_calls_that_do_not_all_happen_are_not_guessed_at():
    sizes = ((4, 8), (8,), (8,))
    calls = [Call("aten::native_layer_norm", sizes, (Operation("layer_norm", name, 0, 8),)) for name in ("a", "b")]
    trace = Trace()
    with trace.step():
        trace.operator("aten::native_layer_norm", sizes, ("vectorized_layer_norm_kernel", 3))
    (row,) = attribute(trace.events, calls, 1, True, 1, 1).rows
    assert (row.operation, row.module, row.calls, row.bytes) == ("layer_norm", "a or b", 1, 8)


def test_kernels_inside_operators_and_graphs_that_nobody_knows(monkeypatch):
    """A prepared model, one operator for all kernels: known families in their order, other kernels as they are."""
    calls = b16(monkeypatch)
    block = [
        ("_linear_fwd_kernel", 30),
        ("_attention_fwd_resident_kernel", 20),
        ("_linear_fwd_kernel", 12),
        ("_linear_fwd_kernel", 40),
        ("_linear_fwd_kernel", 41),
    ]
    trace = Trace()
    for _ in range(2):
        with trace.step():
            for call in calls:
                if call.operator.startswith("vit_fast") and call.operator not in ("vit_fast::layer_norm_fwd",):
                    continue
                if call.operator == "vit_fast::layer_norm_fwd":
                    stack = [("_row_partials_kernel", 7), *block * 12]
                    trace.operator("vit_fast::prepared_blocks", [[256, 197, 768]], *stack)
                trace.operator(call.operator, call.sizes, *KERNELS[call.operator])
    rows = found_rows(attribute(trace.events, calls, 2, True, 500e12, 4e12))
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for name, microseconds in zip(names, (30, 12, 40, 41), strict=True):
        row = rows["linear", f"blocks.*.{name}"]
        assert row.seconds == pytest.approx(12e-6 * microseconds) and row.flop == pytest.approx(
            12 * VIT_FAST_B16["linear", f"blocks.*.{name}"][0]
        )
    assert rows["attention", "blocks.*"].calls == pytest.approx(12)
    assert rows["layer_norm", "norm"].calls == pytest.approx(1)
    partials = rows["_row_partials_kernel [8×1×1]", "vit_fast::prepared_blocks"]
    assert partials.seconds == pytest.approx(7e-6) and partials.roofline is None
    assert ("layer_norm", "blocks.*.norm1") not in rows

    # One linear kernel more than there are operations: nothing is guessed, kernels of one grid share a row.
    with trace.step():
        trace.operator("vit_fast::prepared_blocks", [[256, 197, 768]], ("_linear_fwd_kernel", 3))
    rows = found_rows(attribute(trace.events, calls, 2, True, 500e12, 4e12))
    assert rows["_linear_fwd_kernel [8×1×1]", "vit_fast::prepared_blocks"].calls == pytest.approx(48.5)
    assert ("linear", "blocks.*.attn.qkv") not in rows


def test_compiled_calls_and_generated_kernels():
    """Inductor calls addmm with its output behind the inputs, and its own kernels belong to no operation."""
    calls = [Call("aten::addmm", ((6,), (4, 8), (8, 6)), (Operation("linear", "fc1", 384, 64),))]
    generated = "triton_poi_fused_addmm_gelu_native_layer_norm_3"
    trace = Trace()
    with trace.step(), trace.around("## Call CompiledFxGraph f3zq ##", category="user_annotation"):
        trace.operator("aten::addmm", [[6], [4, 8], [8, 6], [], [], [4, 6]], ("nvjet_tst_128x256", 5))
        trace.operator(generated, [[4, 6]], (generated, 2))
        trace.kernel("Memset (Device)", 1, category="gpu_memset")
    rows = found_rows(attribute(trace.events, calls, 1, True, 1, 1))
    assert rows["linear", "fc1"].seconds == pytest.approx(5e-6)
    assert rows[f"{generated} [8×1×1]", ""].seconds == pytest.approx(2e-6)
    assert rows["Memset (Device) [8×1×1]", "CompiledFxGraph"].calls == 1


def test_gaps_and_overlaps_and_lost_launches():
    trace = Trace()
    with trace.step():
        with trace.around("aten::mul", [[3]]) as number:
            trace.kernel("first", 10, outside=number)  # only the external id tells who launched it
        trace.kernel("second", 10, gap=5)
        trace.kernel("beside it", 4, gap=-6)  # ends 2 earlier
        trace.kernel("inside and out", 10, gap=-2)  # 4 beside, 6 beyond
    trace.event("kernel", "nobody's", 900.0, 1.0)
    found = attribute(trace.events, [Call("aten::mul", ((3,),), (Operation("mul", "", 0, 8),))], 1, True, 1, 1)
    rows = found_rows(found)
    assert rows["mul", ""].seconds == pytest.approx(10e-6)
    assert rows["nobody's", ""].calls == 1 and rows["second [8×1×1]", ""].calls == 1
    total, busy = 10 + 10 + 4 + 10 + 1, 10 + 10 + 6 + 1
    assert found.span == pytest.approx(801e-6)  # 100 … 901
    assert found.gaps == pytest.approx((801 - busy) * 1e-6) and found.overlap == pytest.approx((total - busy) * 1e-6)


def test_host_work_counts_itself_once():
    """On a CPU a known call takes all that it calls, any other operator its own time, and Python the rest."""
    trace = Trace()
    with trace.step():
        with trace.around("aten::linear", [[4, 8], [6, 8]]):
            with trace.around("aten::addmm", [[6], [4, 8], [8, 6]]), trace.around("aten::expand", [[6]]):
                pass
    calls = [Call("aten::addmm", ((6,), (4, 8), (8, 6)), (Operation("linear", "fc1", 384, 64),))]
    found = attribute(trace.events, calls, 1, False, 1, 1)
    rows = found_rows(found)
    assert rows["linear", "fc1"].seconds == pytest.approx(4e-6)  # of it 2 in expand
    assert rows["aten::linear", ""].seconds == pytest.approx(2e-6)
    assert len(rows) == 2 and found.gaps == pytest.approx(2e-6) and found.span == pytest.approx(8e-6)


@pytest.mark.parametrize(
    "kernel,kind",
    (
        ("_linear_fwd_kernel", "linear"),
        ("_linear_hopper_fwd_kernel", "linear"),
        ("_layer_norm_fwd_kernel", "layer_norm"),
        ("_layer_norm_wide_fwd_kernel", "layer_norm"),
        ("_attention_fwd_streaming_kernel", "attention"),
        ("_patch_embed_fwd_kernel", "patch_embed"),
        ("_row_partials_kernel", None),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNT", "linear"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4", "linear"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "patch_embed"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "layer_norm"),
        ("triton_tem_fused_addmm_gelu_native_layer_norm_7", "linear"),
        ("triton_per_fused_add_native_layer_norm_2", None),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", None),
        ("void at::native::elementwise_kernel<128, 4, convert>", None),
        ("Memcpy DtoD (Device -> Device)", None),
    ),
)
def test_families_of_kernels(kernel, kind):
    assert family(kernel) == kind


@pytest.fixture
def quick(monkeypatch):
    """The ceilings take a second of every run on a CPU, and have a test of their own."""
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype, device, *product: 0.25)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 2e10)


def test_profile_of_vit_fast_on_a_cpu(quick, tmp_path, capsys):
    file, trace = tmp_path / "new" / "rows.json", tmp_path / "trace.json"
    words = ["-b", "2", "--num-iter", "3", "--model-kwargs", "depth=2", "--results-file", file, "--trace", trace]
    assert run(*TINY, *words) == 0
    told = json.loads(file.read_text())
    facts, rows = told["facts"], told["rows"]
    assert facts["model"] == "vit_tiny_patch16_224" and facts["provider"] == "vit_fast" and facts["batch_size"] == 2
    assert facts["img_size"] == "32×32"
    assert facts["precision"] == "float32" and facts["device"] == "cpu" and facts["vit_fast_backend"] == "torch"
    assert 0 < facts["step_ms"] < 1000 and 0 < facts["host_ms"] < 1000
    assert facts["images_per_second"] == pytest.approx(2 / facts["step_ms"] * 1e3)
    by_key = {(row["operation"], row["module"]): row for row in rows}
    flop = {
        ("convolution", "patch_embed.proj"): 2 * 2 * 4 * 192 * 768,
        ("linear", "blocks.*.attn.qkv"): 2 * 2 * 10 * 192 * 576,
        ("attention", "blocks.*"): 2 * 4 * 2 * 3 * 5 * 5 * 64,
        ("linear", "blocks.*.attn.proj"): 2 * 2 * 10 * 192 * 192,
        ("linear", "blocks.*.mlp.fc1"): 2 * 2 * 10 * 192 * 768,
        ("linear", "blocks.*.mlp.fc2"): 2 * 2 * 10 * 192 * 768,
        ("linear", "head"): 2 * 2 * 192 * 1000,
    }
    for key, count in flop.items():
        row = by_key[key]
        assert row["gflop"] == pytest.approx(count / 1e9) and row["calls"] == (2 if "*" in key[1] else 1), key
        assert row["us"] == pytest.approx(row["calls"] * row["us_per_call"]) and row["us"] > 0
        assert row["roofline_us"] == pytest.approx(max(row["gflop"] / 250, row["mb"] / 20e3) * 1e6)
        assert row["percent_of_roofline"] == pytest.approx(100 * row["roofline_us"] / row["us"])
    total, gaps, step = rows[-3:]
    assert (total["operation"], gaps["operation"]) == ("sum", "outside of operators")
    assert total["gflop"] == pytest.approx(sum(flop.values()) / 1e9)
    assert total["us"] == pytest.approx(sum(row["us"] for row in rows[:-3]))
    assert total["us"] + gaps["us"] == pytest.approx(step["us"])
    assert step["percent_of_step"] == pytest.approx(100)
    assert total["roofline_us"] == pytest.approx(sum(row["roofline_us"] or 0 for row in rows[:-3]))
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {STEP, "aten::addmm"} <= names
    shown = capsys.readouterr().out
    for text in (
        "blocks.*.attn.qkv",
        "say nothing about a GPU",
        "backend torch",
        "Roofline bound: the greater",
        str(file),
    ):
        assert text in shown, text


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_profile_of_eager_into_csv(quick, tmp_path, precision):
    file = tmp_path / "rows.csv"
    words = ["--provider", "eager", "--precision", precision, "-b", "1", "--num-iter", "2", "--model-kwargs", "depth=1"]
    assert run(*TINY, *words, "--results-file", file) == 0
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["provider"] for row in rows} == {"eager"} and {row["precision"] for row in rows} == {precision}
    gelu = next(row for row in rows if row["operation"] == "gelu")
    bytes_of = {"float32": 4, "bfloat16": 2}[precision]
    assert gelu["module"] == "blocks.*.mlp.act" and float(gelu["mb"]) * 1e6 == pytest.approx(2 * 5 * 768 * bytes_of)
    assert [row["operation"] for row in rows[-3:]] == ["sum", "outside of operators", "step under the profiler"]


def test_profile_of_a_compiled_model(quick, tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["--provider", "compile", "-b", "1", "--num-iter", "2", "--model-kwargs", "depth=1"]
    assert run(*TINY, *words, "--results-file", file) == 0
    rows = {(row["operation"], row["module"]): row for row in json.loads(file.read_text())["rows"]}
    assert rows["linear", "blocks.*.attn.qkv"]["calls"] == 1 and ("gelu", "blocks.*.mlp.act") not in rows
    assert rows["CompiledFxGraph", ""]["us"] > 0
    assert "which has no events of its own on a CPU" in capsys.readouterr().out


def test_profile_of_a_prepared_model(quick, tmp_path, capsys):
    words = ["--provider", "prepared", "-b", "1", "--num-iter", "2", "--model-kwargs", "depth=1"]
    file = tmp_path / "rows.json"
    assert run(*TINY, *words, "--precision", "bfloat16", "--results-file", file) == 0
    rows = {(row["operation"], row["module"]): row for row in json.loads(file.read_text())["rows"]}
    assert rows["linear", "blocks.*.mlp.fc2"]["calls"] == 1
    capsys.readouterr()
    assert run(*TINY, *words, "--precision", "float32") == 2
    assert "--provider: got 'prepared'" in capsys.readouterr().err


def test_profile_of_a_model_in_float8(quick, tmp_path, capsys):
    """On a CPU its emulation: the same products under the same names, of float32 numbers."""
    words = ["--provider", "fp8", "-b", "1", "--num-iter", "2", "--model-kwargs", "depth=1"]
    file = tmp_path / "rows.json"
    assert run(*TINY, *words, "--precision", "bfloat16", "--results-file", file) == 0
    told = json.loads(file.read_text())
    rows = {(row["operation"], row["module"]): row for row in told["rows"]}
    for name, size in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 4)):
        row = rows["linear", f"blocks.*.{name}"]
        assert row["calls"] == 1 and row["gflop"] == pytest.approx(2 * 5 * 192 * size * 192 / 1e9)
    assert rows["mul", "blocks.*.mlp.fc1"]["calls"] == 2 and rows["mul", "blocks.*.mlp.fc2"]["calls"] == 1
    assert rows["layer_norm", "blocks.*"]["calls"] == 2 and told["facts"]["matmul_peak_narrow_tflops"] is None
    shown = capsys.readouterr().out
    assert "by fp8" in shown and "This device has no products in float8" in shown
    assert run(*TINY, *words, "--precision", "float32") == 2
    assert "--provider: got 'fp8'" in capsys.readouterr().err


def test_ceiling_of_copies():
    """1 GB/s is less, and 10 TB/s more, than any memory of a machine that runs this."""
    assert 1e9 < measure.copy_bandwidth(torch.device("cpu"), 32 << 20) < 1e13


@pytest.fixture
def gpu(monkeypatch):
    """The command as on a GPU, which is not there: its clock, its profiler and its names are written by hand."""
    trace = SimpleNamespace(events=[])
    make = profiling._model_and_pixels

    def on_the_cpu(settings):
        return make(replace(settings, device=torch.device("cpu")))

    monkeypatch.setattr(options, "target_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(profiling, "_model_and_pixels", on_the_cpu)
    monkeypatch.setattr(profiling, "_trace", lambda call, settings: ("", trace.events))
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 4e12)
    peaks = {torch.float32: 50.0, torch.bfloat16: 700.0, torch.float8_e4m3fn: 1300.0}
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype, device, *product: peaks[dtype])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measure, "step_times", lambda call, count, device: [0.002] * count)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    monkeypatch.setattr(machine, "name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(machine, "gpu_state", lambda device: {"clock_sm_mhz": "1980"})
    status = vit_fast.status(torch.device("cpu"))
    monkeypatch.setattr(vit_fast, "status", lambda device: status)
    kinds = {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA}
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: kinds)
    return trace


GPU_WORDS = ["profile", "-m", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "depth=2", "-b", "2"]


def test_table_of_a_gpu(gpu, tmp_path, capsys):
    model = vit_fast.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval().bfloat16().requires_grad_(False)
    calls = forward_operations(model, torch.empty(2, 3, 32, 32, dtype=torch.bfloat16))
    kernels = {
        call.operator: [(f"void {call.operator.removeprefix('aten::')}_kernel<{'T, ' * 40}>", 3)] for call in calls
    }
    trace = trace_of(calls, 4, kernels)
    for _ in range(4):  # 10 µs of a copy that nobody asked for, and the device idle before it; a kernel of 1 µs
        trace.kernel("Memcpy HtoD", 10, gap=5, category="gpu_memcpy", grid=())
        trace.kernel("odd_kernel", 1)
    gpu.events = trace.events
    file = tmp_path / "rows.json"
    assert run(*GPU_WORDS, "--num-iter", "4", "--results-file", file) == 0
    told = json.loads(file.read_text())
    facts, rows = told["facts"], told["rows"]
    assert facts["clock_sm_mhz"] == "1980" and facts["precision"] == "bfloat16" and facts["step_ms"] == 2
    assert facts["images_per_second"] == 1000 and facts["matmul_peak_tflops"] == 700
    count = len(calls)
    total, gaps, step = rows[-3:]
    assert total["us"] == pytest.approx(3 * count + 11) and gaps["us"] == pytest.approx(5)
    assert gaps["operation"] == "gaps (GPU idle)" and step["us"] == pytest.approx(3 * count + 16)
    copies = next(row for row in rows if row["operation"] == "Memcpy HtoD")
    assert copies["us"] == pytest.approx(10) and copies["roofline_us"] is None and copies["module"] == ""
    qkv = next(row for row in rows if row["module"] == "blocks.*.attn.qkv")
    assert qkv["us_per_call"] == pytest.approx(3) and qkv["kernels"].endswith("×2")
    shown = capsys.readouterr().out
    assert (
        "NVIDIA H200" in shown
        and "CPU numbers" not in shown
        and "odd_kernel [8×1×1]" in shown
        and "700 TFLOP/s" in shown
    )


def test_a_gpu_that_has_a_model_grades_it(gpu, tmp_path, capsys, monkeypatch):
    """The predicted time stands beside the measured one, and by how much it is wrong."""
    model = vit_fast.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval().bfloat16().requires_grad_(False)
    calls = forward_operations(model, torch.empty(2, 3, 32, 32, dtype=torch.bfloat16))
    kernels = {call.operator: [(f"void {call.operator.removeprefix('aten::')}_kernel", 3)] for call in calls}
    gpu.events = trace_of(calls, 4, kernels).events
    file = tmp_path / "rows.json"
    words = [*GPU_WORDS, "--num-iter", "4", "--results-file", file]
    assert run(*words) == 0
    told = json.loads(file.read_text())
    rows = {(row["operation"], row["module"]): row for row in told["rows"]}
    assert told["facts"]["predicted"] == "beside the measured"
    for key in (("linear", "blocks.*.attn.qkv"), ("attention", "blocks.*"), ("linear", "head"), ("sum", "")):
        row = rows[key]
        assert row["predicted_us"] > 0
        assert row["predicted_error_percent"] == pytest.approx(100 * (row["predicted_us"] / row["us"] - 1)), key
    step = next(row for row in told["rows"] if row["operation"] == profiling.STEP)
    assert step["predicted_us"] > rows["sum", ""]["predicted_us"]
    shown = capsys.readouterr().out
    assert "predicted" in shown and "error" in shown and "what the model of this GPU says" in shown

    def unpredictable(settings):
        raise BenchError("odd shapes")

    monkeypatch.setattr(profiling.predict, "run", unpredictable)  # the profile goes on without
    assert run(*words) == 0
    told = json.loads(file.read_text())
    assert told["facts"]["predicted"] == "not predicted: odd shapes" in capsys.readouterr().out
    assert {row["predicted_us"] for row in told["rows"]} == {None}
    monkeypatch.setattr(machine, "name", lambda device: "NVIDIA H100 PCIe")  # no model of this one
    assert run(*words) == 0 and json.loads(file.read_text())["facts"]["predicted"] is None
    assert "predicted" not in capsys.readouterr().out


def test_float8_on_a_gpu_has_its_own_ceiling(gpu, tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.json"
    gpu.events = trace_of([Call("aten::odd", ((2,),), ())], 4, {"aten::odd": [("odd_kernel", 1)]}).events
    words = ["--provider", "fp8", "--num-iter", "4", "--results-file", file]
    assert run(*GPU_WORDS, *words) == 0
    facts = json.loads(file.read_text())["facts"]
    assert (facts["matmul_peak_tflops"], facts["matmul_peak_narrow_tflops"]) == (700, 1300)
    assert "FLOP of products in float8 at 1300 TFLOP/s" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert run(*GPU_WORDS, *words) == 2
    assert "float8 needs capability 8.9" in capsys.readouterr().err
    assert run(*GPU_WORDS, "--num-iter", "4") == 0
    assert "float8" not in capsys.readouterr().out


def test_a_gpu_whose_kernels_nobody_recorded(gpu, capsys):
    gpu.events = [e for e in trace_of([], 2).events]
    assert run(*GPU_WORDS) == 1
    assert "torch.profiler recorded no GPU kernel" in capsys.readouterr().err


def test_a_gpu_without_a_profiler(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CPU})
    assert run(*GPU_WORDS) == 1
    assert "knows no CUDA activity" in capsys.readouterr().err


def test_out_of_memory_is_told(gpu, monkeypatch, capsys):
    def full(call, count, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(measure, "step_times", full)
    assert run(*GPU_WORDS) == 1
    assert "out of memory at --batch-size 2: CUDA out of memory" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["vit_fast", "prepared", "fp8", "eager"])
def test_profile_on_a_gpu(provider, tmp_path):
    if provider == "fp8" and FP8.why_emulated(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(NO_FLOAT8)
    file = tmp_path / "rows.json"
    words = ["-m", "vit_tiny_patch16_224", "--model-kwargs", "depth=2", "-b", "8", "--provider", provider]
    assert run("profile", *words, "--device", "cuda", "--num-iter", "5", "--results-file", file) == 0
    told = json.loads(file.read_text())
    rows = {(row["operation"], row["module"]): row for row in told["rows"]}
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        row = rows["linear", f"blocks.*.{name}"]
        assert row["calls"] == 2 and row["us"] > 0 and row["kernels"]
    attention = next(row for (operation, _), row in rows.items() if operation == "attention")
    assert attention["calls"] == 2 and attention["percent_of_roofline"] > 0
    total, gaps, _ = told["rows"][-3:]
    assert gaps["us"] >= 0 and total["us"] > 0.9 * sum(row["us"] for row in rows.values() if row["roofline_us"]) / 2


@pytest.mark.parametrize(
    "words,named,wanted",
    (
        (["--provider", "timm"], "--provider", "got 'timm', wanted vit_fast, prepared, fp8, int8, eager, compile or"),
        (["--batch-size", "0"], "--batch-size", "got 0, wanted a whole number of 1 or more"),
        (["--num-iter", "0"], "--num-iter", "a whole number of 1 or more"),
        (["--img-size", "-3"], "--img-size", "a whole number of 1 or more"),
        (["--precision", "half"], "--precision", "float32, bfloat16 or float16"),
        (["--backend", "gpu"], "--backend", "auto, triton, cuda, cpu or torch"),
        (
            ["--backend", "torch", "--provider", "eager"],
            "--backend",
            "it with --provider vit_fast, prepared, fp8, int8",
        ),
        (["--results-file", "rows.txt"], "--results-file", "a name that ends in .csv or .json"),
        (["--trace", "trace.txt"], "--trace", "a name that ends in .json"),
        (["--device", "tpu"], "--device", "cpu, cuda or cuda:N"),
        (["--model-kwargs", "depth"], "--model-kwargs", "key=value"),
        (["--device", "cpu", "--backend", "cuda"], "--backend", "the cuda extension does not run on device type"),
        (["--device", "cpu", "--trace", "/proc/x.json"], "--trace", "a file that can be written"),
    ),
)
def test_bad_words_are_named_with_what_is_wanted(words, named, wanted, capsys):
    assert run("profile", *words) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert named in message and wanted in message


@pytest.mark.parametrize(
    "words,text",
    (
        (["--model", "vit_enormous"], "vit_fast cannot make the model 'vit_enormous'"),
        (["--model", "vit_enormous", "--provider", "eager"], "timm cannot make the model 'vit_enormous'"),
        (["--img-size", "7"], "cannot make the model"),
    ),
)
def test_models_that_cannot_be_made(words, text, capsys):
    assert run("profile", "--device", "cpu", *words) == 1
    assert text in capsys.readouterr().err


def test_a_model_without_a_size_is_told(monkeypatch, capsys):
    monkeypatch.setattr(vit_fast, "create_model", lambda name, **words: torch.nn.Linear(3, 3))
    assert run("profile", "--device", "cpu") == 1
    assert "does not tell the size of its input" in capsys.readouterr().err


def test_attribution_takes_a_trace_without_arguments():
    """Events of other tools in the same trace, without the facts that ours have."""
    bare = [{"ph": "X", "cat": "cpu_op", "name": "odd", "pid": 1, "tid": 1, "ts": 0.0, "dur": 2.0}]
    bare += [{"ph": "X", "cat": "kernel", "name": "lonely", "pid": 0, "tid": 7, "ts": 1.0, "dur": 2.0}]
    bare += [{"ph": "i", "cat": "kernel", "name": "instant", "ts": 1.0}, {"ph": "M", "name": "process_name"}]
    (row,) = attribution.attribute(bare, [], 1, True, 1, 1).rows
    assert row.operation == "lonely" and row.seconds == pytest.approx(2e-6)
