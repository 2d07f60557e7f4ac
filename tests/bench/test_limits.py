"""benchmarks/limits.py: its arithmetic, its guards, its own kernels, and the command on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from support.scripts import loaded
from vit_fast.kernels import configs, folding

from vit_fast.bench import measure
from vit_fast.precisions import FP8

PATH = Path(__file__).parents[2] / "benchmarks" / "limits.py"


@pytest.fixture(scope="module")
def limits():
    with loaded(PATH) as module:
        yield module


@pytest.fixture
def clock(limits, monkeypatch):
    """A call alone takes a millisecond, and all calls back to back four."""
    monkeypatch.setattr(measure, "step_times", lambda call, count, device: [1e-3] * count)
    monkeypatch.setattr(measure, "seconds", lambda call, device: (0.004, call()))
    return limits.Clock(torch.device("cpu"), calls=2, sustained_seconds=0.002)


def test_figures_by_hand(limits, clock):
    row = limits.product(clock, "bias", 5, 8, 16, sustained=True, images=2)
    # 2·10·8·16 FLOP; three calls, the fewest there are, in 4 ms
    assert row["shape"] == "10×8→16" and row["us"] == pytest.approx(1000)
    assert row["tflops"] == pytest.approx(2560 / 1e-3 / 1e12)
    assert row["sustained_us"] == pytest.approx(4000 / 3)
    assert row["sustained_tflops"] == pytest.approx(2560 / (4e-3 / 3) / 1e12)
    assert "sustained_us" not in limits.product(clock, "alone", 5, 8, 16, sustained=False)
    row = limits.attention(clock, "math", 3, 7, 16, images=2)
    assert row["shape"] == "2×3×7×16" and row["tflops"] == pytest.approx(4 * 2 * 3 * 7 * 7 * 16 / 1e-3 / 1e12)
    assert row["tbs"] == pytest.approx(4 * 2 * 3 * 7 * 16 * 2 / 1e-3 / 1e12)
    row = limits.gelu(clock, 5, 8, images=2)
    assert row["shape"] == "10×8" and row["tbs"] == pytest.approx(2 * 10 * 8 * 2 / 1e-3 / 1e12)
    assert limits.layer_norm(clock, 5, 8, images=2)["tbs"] == row["tbs"]
    assert limits.copy(clock, 1000) == {"us": pytest.approx(1000), "tbs": pytest.approx(2000 / 1e-3 / 1e12)}


def test_short_calls_back_to_back_are_graphs(limits, monkeypatch):
    """Half a second of calls of 10 µs are 1,000 graphs of 50 calls each; of calls of 1 ms, 500 calls."""
    graphs = []

    def captured(call, repeat):
        graphs.append(repeat)
        return lambda: [call() for _ in range(repeat)]

    monkeypatch.setattr(limits, "captured", captured)
    monkeypatch.setattr(measure, "seconds", lambda call, device: (3.0, call()))
    clock = limits.Clock(torch.device("cuda", 0), calls=2, sustained_seconds=0.5)
    for one, count in ((10e-6, 50_000), (1e-3, 500)):
        calls = []
        assert clock.back_to_back(lambda calls=calls: calls.append(1), one) == pytest.approx(3.0 / count)
        assert len(calls) == count
    assert graphs == [50]


@pytest.mark.parametrize("form,scales", [("tensor", ((), ())), ("row", ((10, 1), (1, 16)))])
def test_products_in_float8_are_what_their_names_say(limits, clock, request, form, scales):
    """torch._scaled_mm of e4m3 numbers, on a CPU as well; its figures are those of any product."""
    if form == "row":
        request.getfixturevalue("row_scales")
    call = limits.float8_product(clock, f"float8, a scale a {form}", 10, 32, 16)
    x, weight, *its = call.args
    assert call.func is torch._scaled_mm and x.dtype == weight.dtype == torch.float8_e4m3fn
    assert tuple(tuple(scale.shape) for scale in its) == scales and call.keywords["use_fast_accum"]
    out = call()
    wanted = x.double() @ weight.double() * its[0].double() * its[1].double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=2**-7)
    row = limits.product(clock, f"float8, a scale a {form}", 5, 32, 16, sustained=True, images=2)
    assert row["shape"] == "10×32→16" and row["tflops"] == pytest.approx(2 * 10 * 32 * 16 / 1e-3 / 1e12)
    assert row["sustained_us"] == pytest.approx(4000 / 3)


@pytest.mark.parametrize("form", ["alone", "bias", "bias + GELU", "residual"])
def test_products_are_what_their_names_say(limits, clock, monkeypatch, form):
    drawn, results = [], []

    def random(self, *shape, scale=1.0):
        drawn.append((torch.randn(shape) * scale).to(torch.bfloat16))
        return drawn[-1]

    monkeypatch.setattr(limits.Clock, "random", random)
    monkeypatch.setattr(limits.Clock, "figures", lambda self, call, **words: results.append(call()) or {})
    limits.product(clock, form, 6, 16, 8, sustained=False)
    x, weight, bias, *residual = (t.double() for t in drawn)
    wanted = {
        "alone": lambda: x @ weight.T,
        "bias": lambda: x @ weight.T + bias,
        "bias + GELU": lambda: torch.nn.functional.gelu(x @ weight.T + bias, approximate="tanh"),
        "residual": lambda: x @ weight.T + residual[0],
    }[form]()
    torch.testing.assert_close(results[0].double(), wanted, atol=0.05, rtol=0.02)


def test_an_item_that_fails_says_why(limits):
    tried = []

    def broken(images=1):
        tried.append(images)
        raise RuntimeError("No available kernel.\n  Aborting execution.")

    row = limits.measured(limits.Item("attention, flash", "1×2", broken, images=8), on_gpu=False)
    assert tried == [8]  # fewer images would not help
    assert row["note"] == "failed: RuntimeError: No available kernel. Aborting execution." and "us" not in row
    row = limits.measured(limits.Item("launch", "64", broken, needs_cuda=True), on_gpu=False)
    assert row == {"name": "launch", "shape": "64", "note": "needs a CUDA device"}


def test_what_does_not_fit_is_tried_with_half_the_images(limits):
    tried = []

    def work(images):
        tried.append(images)
        if images > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"shape": f"{images}×7", "us": 5.0}

    row = limits.measured(limits.Item("GELU", "256×7", work, images=256), on_gpu=False)
    assert tried == [256, 128, 64, 32]
    assert row == {"name": "GELU", "shape": "32×7", "us": 5.0, "note": "256 images do not fit: measured with 32"}

    def never(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert limits.measured(limits.Item("GELU", "4×7", never, images=4), False)["note"].startswith("failed: OutOfMemory")


def test_items_of_a_gpu(limits, clock):
    """What is asked of a GPU: the shapes that speed claims name, the most telling before time runs out."""
    listed = list(limits.items(clock, True))
    names = [(item.name, item.shape) for item in listed]
    assert len(set(names)) == len(names)
    for layer, shape in (("qkv", "768→2304"), ("proj", "768→768"), ("fc1", "768→3072"), ("fc2", "3072→768")):
        for form in ("alone", "bias", "bias + GELU", "residual"):
            assert (f"ViT-B {layer}, {form}", f"50432×{shape}") in names[:30]
            assert (f"ViT-B {layer}, {form}", f"197×{shape}") in names
        for form in ("tensor", "row"):
            (item,) = (item for item in listed if item.name == f"ViT-B {layer}, float8, a scale a {form}")
            assert item.shape == f"50432×{shape}" and item in listed[:30] and item.needs_cuda
    assert ("ViT-S fc1, alone", "50432×384→1536") in names and ("ViT-L qkv, bias", "50432×1024→3072") in names
    assert ("ViT-H fc2, residual", "65792×5120→1280") in names and ("ViT-H proj, alone", "257×1280→1280") in names
    assert ("square product", "8192×8192→8192") in names and ("copy", "1024 MiB") in names
    for backend in ("flash", "cudnn", "efficient", "math"):
        for shape in ("12×197×64", "12×257×64", "12×577×64", "16×256×72", "16×257×80"):
            assert (f"attention, {backend}", f"256×{shape}") in names


class Event:
    """A clock that goes on by 128 µs a reading."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 0.128
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def test_cost_of_a_launch(limits, clock, events, monkeypatch):
    monkeypatch.setattr(limits, "captured", lambda call, repeat: call)
    for graph in (False, True):
        row = limits.launches(clock, lambda out, x: torch.add(x, 1.0, out=out), graph)
        assert row == {"us": pytest.approx(2.0)}  # 128 µs for 64

    def lazy(out, x):
        out.copy_(x)

    with pytest.raises(AssertionError, match=r"64 dependent steps of \+ 1 do not add 64"):
        limits.launches(clock, lazy, False)


def test_cost_of_a_call_on_the_host(limits):
    clock = limits.Clock(torch.device("cpu"), calls=2, sustained_seconds=0.01)
    calls = []

    def call():
        calls.append(1)
        time.sleep(2e-4)

    row = limits.host_cost(clock, lambda: call)
    assert 200 <= row["us"] < 50_000 and len(calls) == 1 + 5 * 200


@pytest.mark.parametrize("programs,rounds", [(3, 2), (5, 9)])
def test_sums_of_tiles_by_hand(limits, programs, rounds):
    """Four tiles that hold one number each; program p takes tiles p, p + 1, … round and round."""
    numbers = [1, -7, 500, 40]
    words = torch.cat([torch.full((128, 32), number, dtype=torch.int32) for number in numbers])
    wanted = [sum(numbers[(p + turn) % 4] * 4096 for turn in range(rounds)) for p in range(programs)]
    assert limits.expected_tile_sums(words, programs, rounds).tolist() == wanted


@pytest.mark.interp
def test_kernel_that_loads_tiles(limits):
    words = torch.randint(-1000, 1000, (3 * 128, 32), dtype=torch.int32)
    found = limits.load_tiles(words, 4, 5)
    assert found.tolist() == limits.expected_tile_sums(words, 4, 5).tolist()


@pytest.mark.interp
def test_kernel_that_adds_one(limits):
    x = torch.randn(1500)
    out = torch.empty_like(x)
    limits.add_one(out, x, pdl=False)
    assert torch.equal(out, x + 1)


@pytest.mark.aot
def test_kernels_compile_for_hopper(limits, monkeypatch):
    """Tiles come by TMA, several under way; the launch of a dependent step begins early only where it is asked to."""
    import triton

    monkeypatch.syspath_prepend(str(PATH.parents[1] / "tests" / "aot"))
    import harness

    requests = []

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        requests.append(harness.Request(90, "", "", self, signature, constexprs, attrs, options))

    monkeypatch.setattr(triton.JITFunction, "_do_compile", note)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(harness.CompileOnlyDriver(90))
    try:
        limits.load_tiles(torch.empty(1 << 17, 32, dtype=torch.int32), 528, 256)
        for pdl in (False, True):
            limits.add_one(torch.empty(4096), torch.empty(4096), pdl)
        target = triton.runtime.driver.active.get_current_target()
        kernels = []
        for request in requests:
            function = request.function
            function.create_binder()
            source = function.ASTSource(function, request.signature, request.constexprs, request.attrs)
            kernels.append(function.compile(source, target=target, options=request.options.__dict__))
    finally:
        triton.runtime.driver._active = before
    assert [request.options.launch_pdl for request in requests] == [False, False, True]
    tiles, plain, early = kernels
    assert tiles.asm["ptx"].count("cp.async.bulk.tensor") == 4  # three ahead of the loop, one in it
    assert 3 * 16384 <= tiles.metadata.shared <= 227 * 1024 // 4  # four programs a multiprocessor
    assert "griddepcontrol" not in plain.asm["ptx"] and early.asm["ptx"].count("griddepcontrol") == 2


@pytest.mark.parametrize("images", (1, 2))
@pytest.mark.parametrize("rule,arguments", (("use_pdl", (197, 90)), ("alternate_tile_order", (197,))))
@pytest.mark.parametrize("on", (False, True))
def test_a_stack_is_launched_as_asked_and_must_compute_the_same(
    limits, clock, on, rule, arguments, images, monkeypatch
):
    shipped, asked, wrong = getattr(configs, rule), [], 0.0
    monkeypatch.setattr(limits, "DEPTH", 2)

    def blocks(x, weights, heads, *words):
        assert len(folding.unflatten(folding.FoldedBlock, weights)) == limits.DEPTH
        assert x.shape == (images, 197, 768) and heads == 12
        asked.append(getattr(configs, rule)(*arguments))
        return x + wrong * asked[-1]

    monkeypatch.setattr(limits.vit_fast.ops, "prepared_blocks", blocks)
    monkeypatch.setattr(limits, "captured", lambda call, repeat: lambda: call())
    assert limits.stack(clock, "ViT-B", rule, on, images=images)["us"] > 0
    assert asked[:2] == [False, on] and getattr(configs, rule) is shipped
    wrong = 1.0
    if on:
        with pytest.raises(AssertionError, match=f"kernels compute something else with {rule}"):
            limits.stack(clock, "ViT-B", rule, on, images=images)
        assert getattr(configs, rule) is shipped


def test_the_command_on_a_cpu(tmp_path):
    file = tmp_path / "new" / "limits.json"
    words = [sys.executable, "-P", PATH, "--json", file, "--seconds", "10", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "These are CPU numbers" in done.stdout and str(file) in done.stdout
    found = json.loads(file.read_text())
    assert found["machine"]["device"] == "cpu" and found["machine"]["torch"] == torch.__version__
    rows = found["items"]
    copy, square = rows[:2]
    assert copy["name"] == "copy" and 1e-4 < copy["tbs"] < 10
    assert square["tflops"] == pytest.approx(2 * 512**3 / square["us"] / 1e6) and square["sustained_us"] > 0
    for row in rows:
        assert row.get("us", 0) > 0 or row["note"]
    notes = {row["name"]: row.get("note") for row in rows}
    assert notes["dependent launch in a CUDA graph"] in ("needs a CUDA device", "not measured: no time left")
    assert not any("failed" in (note or "") for note in notes.values())


@pytest.mark.parametrize(
    "words,wanted",
    (
        ([], "Missing option '--json'"),
        (["--json", "x.json", "--seconds", "0"], "Invalid value for '--seconds'"),
        (["--json", "x.json", "--device", "tpu"], "got 'tpu', wanted cpu, cuda or cuda:N"),
    ),
)
def test_bad_words(limits, words, wanted, capsys):
    app = typer.Typer()
    app.command()(limits.main)
    with pytest.raises(SystemExit) as end:
        app(words)
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert end.value.code == 2 and wanted in message


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    file = tmp_path / "limits.json"
    words = [sys.executable, "-P", PATH, "--json", file, "--seconds", "60"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["items"]
    float8 = not FP8.why_emulated(torch.device("cuda", torch.cuda.current_device()))
    for row in rows:
        if "float8" in row["name"]:
            assert ("us" in row) == float8, row
        elif row["name"].startswith(
            ("copy", "ViT-B", "GELU", "LayerNorm", "dependent launch", "host cost", "prepared")
        ):
            assert "us" in row, row
    square = next(row for row in rows if row["name"] == "square product")
    assert square["sustained_tflops"] < 1.1 * square["tflops"]
