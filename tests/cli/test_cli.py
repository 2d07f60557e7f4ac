"""The command line from its flags to its files, on tiny models on the CPU.

References: numbers counted by hand (FLOPs, quantiles, pixels), and timm for the logits. The parity rule is tried from
both sides of its limit. Models have two blocks and 32 pixels a side: what is tested is the harness, not its figures.
"""

import builtins
import contextlib
import csv
import json
import math
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vit_fast
from vit_fast import cli, library_coverage, parity
from vit_fast.bench import (
    baselines,
    compare,
    errors,
    measure,
    photographs,
    providers,
    recorders,
    results,
    rounds,
    scaled_mm,
    time_budget,
)
from vit_fast.bench.settings import Settings
from vit_fast.block import PREPARED
from vit_fast.cli import bench as flags_of_bench
from vit_fast.cli import report
from vit_fast.precisions import FP8

OUR_PREPARED, OUR_GRAPH = (providers.VARIANTS[name].provider for name in ("prepared", "graphed"))
TINY = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "depth=2", "--device", "cpu"]
QUICK = ["bench", *TINY, "--num-bench-iter", "3", "--num-warm-iter", "1"]


def run(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture(autouse=True)
def no_peak_measurement(request, monkeypatch):
    """It takes a second of every run on a CPU, and has a test of its own."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(measure, "matmul_peaks", lambda dtype, device, *product: (0.25, 0.125))


@pytest.fixture
def json_file(tmp_path):
    return tmp_path / "rows" / "bench.json"


def test_bench_measures_every_provider_and_batch_size(json_file, tmp_path, capsys):
    plot = tmp_path / "bench.png"
    code = run(*QUICK, "-b", "1,3", "--baselines", "eager", "--results-file", json_file, "--plot", plot)
    assert code == 0
    rows = json.loads(json_file.read_text())
    assert [(row["provider"], row["infer_batch_size"]) for row in rows] == [
        ("vit_fast", 1),
        ("eager", 1),
        ("vit_fast", 3),
        ("eager", 3),
    ]
    for row in rows:
        assert row["status"] == "ok" and row["parity_passed"] is True
        assert row["model"] == "vit_tiny_patch16_224" and row["infer_img_size"] == 32
        low, median, high = (row[f"infer_samples_per_sec{end}"] for end in ("_p20", "", "_p80"))
        assert 0 < low <= median <= high
        assert median == pytest.approx(1000 * row["infer_batch_size"] / row["infer_step_time"])
        assert row["achieved_tflops"] == pytest.approx(2e-3 * row["infer_gmacs"] * median)
        assert row["percent_of_peak"] == pytest.approx(100 * row["achieved_tflops"] / row["matmul_peak_tflops"])
        assert row["matmul_peak_tflops"] == 0.25 and row["matmul_peak_sustained_tflops"] == 0.125
        assert row["num_bench_iter"] == 3 and row["peak_memory_mib"] > 4 * row["param_count"] * 1e6 / 2**20
        assert row["torch"] == torch.__version__ and row["timm"] and row["date"].startswith("20")
    ours, eager = rows[2:]
    ratio = ours["infer_samples_per_sec"] / eager["infer_samples_per_sec"]
    assert ours["speedup_vs_eager"] == pytest.approx(ratio) and eager["speedup_vs_eager"] == 1
    assert ours["best_baseline"] == "eager" and ours["speedup_vs_best_baseline"] == ours["speedup_vs_eager"]
    assert eager["best_baseline"] is None and eager["speedup_vs_best_baseline"] is None
    assert ours["cold_cache"] is None and eager["attention"] == "torch's choice"
    assert eager["attention_operators"] == "scaled_dot_product_flash_attention_for_cpu"
    assert ours["vit_fast_backend"] == "torch" and "torch attention ×2" in ours["vit_fast_operations"]
    assert plot.stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "vit_fast ran on its backend torch" in shown and "say nothing about a GPU" in shown
    assert "Parity with timm eager holds" in shown and str(json_file) in shown


def test_csv_has_timms_columns_first(tmp_path):
    path = tmp_path / "bench.txt"
    assert run(*QUICK, "-b", "2", "--baselines", "none", "--results-file", path, "--results-format", "csv") == 0
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        (row,) = reader
    assert reader.fieldnames[:8] == list(results.COLUMNS[:8])
    assert float(row["infer_samples_per_sec"]) > 0 and row["provider"] == "vit_fast" and row["status"] == "ok"


@pytest.mark.parametrize("flags", [["--precision", "bfloat16"], ["--amp", "--channels-last"]], ids=["bf16", "amp"])
def test_low_precision_keeps_parity(flags, json_file):
    assert run(*QUICK, "-b", "2", "--baselines", "eager", *flags, "--results-file", json_file) == 0
    row = json.loads(json_file.read_text())[0]
    assert row["parity_passed"] and 1e-4 < row["parity_eager_error"] < 1


def test_compiled_baseline_is_timed_and_its_compilation_apart(json_file):
    words = ["--model-kwargs", "depth=1", "-b", "1", "--baselines", "compile", "--time-budget", "0"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    row = json.loads(json_file.read_text())[1]
    assert row["provider"] == "compile" and row["status"] == "ok"
    assert row["first_call_s"] > 3 * row["infer_step_time"] / 1000 and row["parity_passed"]


NARROW = {"img_size": 32, "depth": 2, "num_classes": 7}


@pytest.mark.parametrize(
    ("name", "words", "libraries"),
    [
        ("vit_small_patch16_224", {}, ("torchvision", "transformers")),
        ("vit_tiny_patch16_224", {}, ("torchvision", "transformers")),
        ("vit_small_patch16_224", {"num_classes": 0}, ("torchvision", "transformers")),
        ("vit_tiny_patch16_224", {"img_size": (32, 48), "in_chans": 2, "act_layer": "gelu_tanh"}, ("transformers",)),
        ("vit_so400m_patch14_siglip_224", {"img_size": 28, "num_classes": 0}, ("transformers",)),
        ("vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh", "num_heads": 6}, ("transformers",)),
    ],
)
def test_other_libraries_build_the_same_network(name, words, libraries):
    """On float64 weights that differ from those of a fresh model, the logits agree to rounding."""
    import timm

    words = NARROW | words
    if "siglip" in name:
        words["num_classes"] = 0  # the library has no head behind the pooling
    model = timm.create_model(name, **words).double().eval()
    parity.perturb(model)
    modules, absent = baselines.build(libraries, model, torch.device("cpu"))
    assert absent == {} and tuple(modules) == libraries
    height, width = model.patch_embed.img_size
    pixels = torch.randn(2, words.get("in_chans", 3), height, width, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(pixels)
        for module in modules.values():
            assert not module.training
            torch.testing.assert_close(module.double()(pixels), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words", "library", "reason"),
    [
        ("vit_small_patch14_dinov2", {}, "torchvision", r"no such model \(no place for blocks.0.ls1.gamma\)"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "transformers", r"\(no place for blocks.0.attn.k_norm.bias\)"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "transformers", r"\(no place for reg_token\)"),
        ("vit_tiny_patch16_224", {"pre_norm": True, "norm_layer": "layernorm"}, "torchvision", "no place for norm_pre"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "torchvision", r"fits encoder.pos_embedding \[1, 5, 192\]"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "torchvision", "nothing of timm's fits .*in_proj_bias"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "transformers", r"\(pooling 'avg'\)"),
        ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}, "torchvision", r"\(activation GELUTanh\)"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "transformers", r"\(activation ReLU\)"),
        ("vit_tiny_patch16_224", {"in_chans": 1}, "torchvision", "square and have three channels"),
        ("vit_tiny_patch16_224", {"img_size": (32, 48)}, "torchvision", "square and have three channels"),
        ("vit_base_patch16_siglip_224", {}, "torchvision", r"\(pooling 'map'\)"),
        ("vit_tiny_patch16_224", {"img_size": 40}, "torchvision", "torchvision cannot build it: AssertionError: Input"),
    ],
)
def test_a_network_that_a_library_has_not_is_told(name, words, library, reason):
    import timm

    model = timm.create_model(name, **NARROW | ({"img_size": 28} if "patch14" in name else {}) | words).eval()
    modules, absent = baselines.build(("eager", library), model, torch.device("cpu"))
    assert modules == {"eager": model}
    assert re.search(reason, absent[library])


def test_a_torchvision_of_another_torch_is_told_in_a_line(monkeypatch, capsys):
    def import_module(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(errors.importlib, "import_module", import_module)
    with pytest.raises(errors.BenchError) as raised:
        errors.require("timm", "bench")
    assert str(raised.value) == (
        "timm fails to import (operator torchvision::nms does not exist); install torch and torchvision in one step"
    )
    shipped = builtins.__import__

    def without_timm(name, *rest):
        return import_module(name) if name == "timm" else shipped(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ImportError, match=r"pretrained=True needs timm, which fails to import .* in one step"):
        vit_fast.create_model("vit_tiny_patch16_224", pretrained=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("gone", name="transformers"), "transformers is not installed"),
        (ImportError("broken"), "transformers fails to import: broken"),
    ],
)
def test_an_absent_library_is_a_row(error, told, json_file, monkeypatch, capsys):
    shipped = baselines.importlib.import_module

    def import_module(name, *package, **words):
        if name == "transformers":
            raise error
        return shipped(name, *package, **words)

    monkeypatch.setattr(baselines.importlib, "import_module", import_module)
    assert run(*QUICK, "-b", "1", "--baselines", "transformers,eager", "--results-file", json_file) == 0
    ours, theirs, eager = json.loads(json_file.read_text())
    assert theirs["status"] == f"not timed: {told}" and theirs["infer_samples_per_sec"] is None
    assert ours["status"] == eager["status"] == "ok" and ours["best_baseline"] == "eager"
    assert f"not timed: {told}" in capsys.readouterr().out


def test_libraries_are_timed_with_parity_and_told_with_their_attention(json_file, capsys):
    words = ["-m", "vit_small_patch16_224", "-b", "2", "--baselines", "torchvision,transformers"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    ours, *libraries = json.loads(json_file.read_text())
    assert [row["provider"] for row in libraries] == ["torchvision", "transformers"]
    for row in libraries:
        assert row["status"] == "ok" and row["parity_passed"] and row["infer_samples_per_sec"] > 0
    assert libraries[1]["attention_operators"] == "scaled_dot_product_flash_attention_for_cpu"
    assert {row["attention"] for row in libraries} == {"torch's choice"}
    assert libraries[0]["attention_operators"] == "native_multi_head_attention"
    fastest = max(libraries, key=lambda row: row["infer_samples_per_sec"])
    ratio = ours["infer_samples_per_sec"] / fastest["infer_samples_per_sec"]
    assert ours["best_baseline"] == fastest["provider"] and ours["speedup_vs_best_baseline"] == pytest.approx(ratio)
    shown = capsys.readouterr().out
    assert re.search(rf"Batch 2: vit_fast .*the best baseline \({fastest['provider']}\)", shown)
    assert "Attention of the baselines" in shown and "transformers: torch's choice (scaled_dot" in shown


def test_a_baseline_out_of_parity_is_told_and_not_timed(json_file, monkeypatch):
    def altered(model):
        module = baselines.torchvision_model(model)
        with torch.no_grad():
            module.encoder.layers[1].self_attention.in_proj_weight[0, 0] += 0.5
        return module

    monkeypatch.setitem(baselines.LIBRARIES, "torchvision", altered)
    assert run(*QUICK, "-b", "1", "--baselines", "torchvision", "--results-file", json_file) == 0
    ours, theirs = json.loads(json_file.read_text())
    assert theirs["status"] == "not timed: parity failed" and theirs["parity_error"] > theirs["parity_allowed"]
    assert theirs["infer_samples_per_sec"] is None and ours["best_baseline"] is None and ours["status"] == "ok"


def _timed_attention(monkeypatch, times, fails=()):
    """``best_attention`` of a module on a pretended GPU, where each way takes the given time or fails."""
    backend = []
    names = {None: "torch's choice", baselines.SDPBackend.FLASH_ATTENTION: "flash"}
    names |= {baselines.SDPBackend.CUDNN_ATTENTION: "cudnn", baselines.SDPBackend.EFFICIENT_ATTENTION: "efficient"}

    @contextlib.contextmanager
    def attention(which, fast_path):
        backend.append(names[which] + ("" if fast_path else ", no fast path"))
        yield
        backend.pop()

    def call():
        if backend and backend[-1] in fails:
            raise RuntimeError("No available kernel")

    monkeypatch.setattr(baselines, "_attention", attention)
    monkeypatch.setattr(measure, "step_times", lambda call, count, device: [times[backend[-1]]] * count)
    module = torch.nn.MultiheadAttention(8, 2) if any("fast path" in name for name in times) else torch.nn.Linear(1, 1)
    return baselines.best_attention(module, call, torch.device("cuda"))[0]


def test_the_fastest_attention_is_chosen_and_torchs_own_where_little_is_gained(monkeypatch):
    times = {"torch's choice": 1.0, "flash": 0.9, "cudnn": 0.8, "efficient": 2.0}
    assert _timed_attention(monkeypatch, times) == "cudnn"
    assert _timed_attention(monkeypatch, times, fails=("cudnn",)) == "flash"
    assert _timed_attention(monkeypatch, times | {"flash": 0.99, "cudnn": 0.985}) == "torch's choice"
    assert _timed_attention(monkeypatch, times, fails=("torch's choice", "flash", "cudnn")) == "efficient"
    assert _timed_attention(monkeypatch, times, fails=times) == "torch's choice"
    ways = times | {f"{name}, no fast path": time for name, time in times.items()}
    assert _timed_attention(monkeypatch, ways | {"cudnn": 3.0}) == "cudnn, no fast path"


def test_an_attention_context_sets_the_switches_and_puts_them_back():
    q = torch.randn(1, 2, 4, 8)
    with baselines._attention(baselines.SDPBackend.MATH, False), recorders.AttentionOps() as ops, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() and {name.endswith("softmax") for name in ops.names} == {True}
    with baselines._attention(None, True), recorders.AttentionOps() as ops, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert ops.names == {"scaled_dot_product_flash_attention_for_cpu"}


@pytest.fixture
def variants(monkeypatch):
    """Stand-ins of vit_fast.prepare and vit_fast.graphed on a CPU that counts as a GPU; {provider: its module}."""
    made = {}

    def prepare(model, precision):
        assert precision is None
        name = OUR_GRAPH if OUR_PREPARED in made else OUR_PREPARED
        made[name] = model
        return model

    class Graphed(torch.nn.Module):
        def __init__(self, model, batch_sizes):
            super().__init__()
            self.model, self.batch_sizes = model, batch_sizes
            made.setdefault("graphs", []).append(self)

        def forward(self, pixels):
            assert self.batch_sizes == [len(pixels)]
            return self.model(pixels)

    monkeypatch.setattr(vit_fast, "prepare", prepare, raising=False)
    monkeypatch.setattr(vit_fast, "graphed", lambda model, batch_sizes: Graphed(model, batch_sizes), raising=False)
    monkeypatch.setattr(flags_of_bench, "CUDA_GRAPHS", ())
    return made


ALL_VARIANTS = ["--variants", "graphed,plain,prepared"]


def test_variants_are_rows_of_their_own_copies(variants, json_file):
    assert run(*QUICK, "-b", "1,2", *ALL_VARIANTS, "--baselines", "eager", "--results-file", json_file) == 0
    rows = json.loads(json_file.read_text())
    names = ["vit_fast", "vit_fast-prepared", "vit_fast-graphed", "eager"]
    assert [(row["provider"], row["infer_batch_size"]) for row in rows] == [(n, b) for b in (1, 2) for n in names]
    for row in rows:
        assert row["status"] == "ok" and row["parity_passed"] and row["speedup_vs_eager"] > 0
        assert (row["best_baseline"] == "eager") == row["provider"].startswith("vit_fast")
    assert not any(key.startswith("speedup_vs_vit_fast") for key in rows[0])
    assert [graph.batch_sizes for graph in variants["graphs"]] == [[1], [2]]
    assert all(graph.model is variants[OUR_GRAPH] for graph in variants["graphs"])
    assert variants[OUR_GRAPH] is not variants[OUR_PREPARED]


@pytest.mark.parametrize("stage", ["prepare", "graphed"])
def test_a_variant_out_of_parity_is_not_timed_and_the_run_fails(stage, variants, json_file, monkeypatch):
    shipped = getattr(vit_fast, stage)

    def altered(model, **words):
        with torch.no_grad():
            model.blocks[1].attn.qkv.weight[0, 0] += 0.5
        return shipped(model, **words)

    monkeypatch.setattr(vit_fast, stage, altered)
    assert run(*QUICK, "-b", "1", *ALL_VARIANTS, "--baselines", "eager", "--results-file", json_file) == 1
    plain, prepared, graphed, eager = json.loads(json_file.read_text())
    assert graphed["status"] == "parity failed" and graphed["infer_samples_per_sec"] is None
    assert prepared["status"] == ("parity failed" if stage == "prepare" else "ok")
    assert plain["status"] == eager["status"] == "ok" and plain["parity_passed"]


@pytest.mark.parametrize("stage", ["prepare", "graphed"])
def test_what_a_variant_does_not_support_is_told(stage, variants, json_file, monkeypatch):
    def refuse(model, **words):
        raise vit_fast.UnsupportedError(f"vit_fast.{stage}: no such thing")

    monkeypatch.setattr(vit_fast, stage, refuse)
    assert run(*QUICK, "-b", "1", *ALL_VARIANTS, "--baselines", "eager", "--results-file", json_file) == 0
    plain, prepared, graphed, eager = (row["status"] for row in json.loads(json_file.read_text()))
    assert graphed == f"not timed: vit_fast.{stage}: no such thing"
    assert prepared == (graphed if stage == "prepare" else "ok") and plain == eager == "ok"
    words = ["-b", "1", "--precision", "bfloat16", "--variants", "graphed", "--baselines", "eager"]
    assert run(*QUICK, *words, "--results-file", json_file) == 1
    graphed, eager = (row["status"] for row in json.loads(json_file.read_text()))
    assert graphed.startswith("not timed") and eager == "not timed: no variant of vit_fast to compare with"


def test_prepared_16_bit_weights_run(json_file):
    words = ["-b", "1", "--variants", "plain,prepared", "--baselines", "eager", "--precision", "bfloat16"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    plain, prepared, _ = json.loads(json_file.read_text())
    assert plain["status"] == prepared["status"] == "ok" and prepared["parity_passed"]
    assert prepared["vit_fast_operations"] != plain["vit_fast_operations"]


FLOAT8 = ["-b", "2", "--precision", "bfloat16", "--variants", "plain,prepared,fp8", "--baselines", "eager,scaled-mm"]


def test_float8_rows_tell_their_products_and_what_they_cost(json_file, capsys):
    assert run(*QUICK, *FLOAT8, "--results-file", json_file) == 0
    plain, prepared, float8, eager, scaled = json.loads(json_file.read_text())
    assert {row["product_dtype"] for row in (plain, prepared, eager)} == {"bfloat16"}
    assert float8["provider"] == "vit_fast-fp8" and float8["product_dtype"] == scaled["product_dtype"] == "float8_e4m3"
    assert float8["status"] == "ok" and "fp8_blocks" in float8["vit_fast_operations"] and float8["parity_passed"]
    assert scaled["status"] == "not timed: float8 products need a GPU of capability 8.9"
    # On this backend the plain form is the model itself; eager's error is eager's in all rows.
    assert float8["parity_reference_error"] == float8["parity_error"] > 3 * float8["parity_eager_error"]
    assert 0.01 < float8["parity_relative_error"] == float8["parity_reference_relative_error"] < 0.1
    assert 0.99 < float8["parity_cosine_float64"] < eager["parity_cosine_float64"] < 1
    for row in (plain, prepared, eager):
        assert row["parity_reference_error"] == row["parity_eager_error"] == eager["parity_error"]
        assert float8["parity_eager_relative_error"] == row["parity_eager_relative_error"] < 0.01
        assert row["percent_of_peak"] > 0
    assert float8["matmul_peak_tflops"] is None and float8["percent_of_peak"] is None
    shown = capsys.readouterr().out
    for text in (
        "Parity with timm eager holds",
        "Parity with the plain PyTorch form of the same float8 model holds",
        f"What float8 costs, the norm of the errors against float64 over that of the logits: vit_fast-fp8 "
        f"{float8['parity_relative_error']:.2%}",
        "Peak of a matrix product in this run: in bfloat16 0.25 TFLOP/s, 0.125 sustained.",
    ):
        assert text in shown, text


def test_float8_in_a_graph(json_file, monkeypatch):
    """The graph is of the model in float8, on a CPU that counts as a GPU."""
    captured = []
    monkeypatch.setattr(flags_of_bench, "CUDA_GRAPHS", ())
    monkeypatch.setattr(vit_fast, "graphed", lambda model, batch_sizes: captured.append(batch_sizes) or model)
    words = ["-b", "2", "--precision", "bfloat16", "--variants", "fp8-graphed,fp8", "--baselines", "none"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    float8, graph = json.loads(json_file.read_text())
    assert graph["provider"] == "vit_fast-fp8-graphed" and graph["status"] == float8["status"] == "ok"
    assert captured == [[2]] and "fp8_blocks" in graph["vit_fast_operations"]
    assert graph["product_dtype"] == "float8_e4m3" and graph["parity_error"] == float8["parity_error"]


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--precision", "float32"], "the weights are float32")],
    ids=["float32"],
)
def test_float8_that_is_not_supported_is_told(words, told, json_file):
    flags = [*FLOAT8, "--variants", "plain,fp8", *words]
    assert run(*QUICK, *flags, "--results-file", json_file) == 0
    plain, float8, *_ = json.loads(json_file.read_text())
    assert plain["status"] == "ok" and told in float8["status"] and float8["product_dtype"] == "float8_e4m3"


@pytest.mark.parametrize("fault", ["quantised weights", "kernel", "not in float8"])
def test_float8_out_of_parity_is_not_timed_and_the_run_fails(fault, json_file, monkeypatch):
    """A fault of the quantised weights is one of their plain form too; a fault of a kernel is not."""
    shipped, run_plainly = vit_fast.prepare, FP8.reference

    def prepare(model, precision=None):
        if precision == "fp8" and fault == "not in float8":
            return shipped(model)
        prepared = shipped(model, precision=precision)
        if precision == "fp8" and fault == "quantised weights":
            prepared.blocks.__dict__[PREPARED].records[0].qkv_scale.mul_(2)
        return prepared

    def fp8_blocks(*arguments):
        out = run_plainly(*arguments)
        return out if vit_fast.backends.requested() == "torch" else out + 0.3 * torch.randn_like(out)

    monkeypatch.setattr(vit_fast, "prepare", prepare)
    if fault == "kernel":
        monkeypatch.setattr(FP8, "reference", fp8_blocks)
    assert run(*QUICK, *FLOAT8, "--results-file", json_file) == 1
    plain, prepared, float8, eager, _ = json.loads(json_file.read_text())
    told = {"not in float8": "failed: no block ran in float8"}.get(fault, "parity failed")
    assert float8["status"] == told and float8["infer_samples_per_sec"] is None
    if fault == "kernel":
        assert float8["parity_relative_error"] > 1.5 * float8["parity_reference_relative_error"] < 0.15
    assert plain["status"] == prepared["status"] == eager["status"] == "ok"


def test_float8_baseline_is_timed_where_there_is_float8_and_held_to_its_plain_form(json_file, monkeypatch, row_scales):
    """Pretended on a CPU, where torch._scaled_mm runs too; without torch.compile, which other baselines try."""
    assert providers.COMPILE_MODES["scaled-mm"] == "max-autotune"
    monkeypatch.delitem(providers.COMPILE_MODES, "scaled-mm")
    monkeypatch.setattr(FP8, "why_emulated", lambda device: None)
    for form in (scaled_mm._scaled_product, lambda *parts: 1.25 * scaled_mm._plain_product(*parts)):
        monkeypatch.setattr(scaled_mm, "_scaled_product", form)
        assert run(*QUICK, *FLOAT8, "--results-file", json_file) == 0
        plain, prepared, float8, _, scaled = json.loads(json_file.read_text())
        assert float8["status"] == "ok" and float8["matmul_peak_tflops"] == 0.25 and float8["percent_of_peak"] > 0
        assert plain["best_baseline"] == prepared["best_baseline"] == "eager"
        if "lambda" in form.__name__:
            assert scaled["status"] == "not timed: parity failed" and scaled["infer_samples_per_sec"] is None
            assert scaled["parity_relative_error"] > 1.5 * scaled["parity_reference_relative_error"] < 0.15
        else:
            assert scaled["status"] == "ok" and scaled["parity_passed"] and float8["speedup_vs_scaled_mm"] > 0
            assert scaled["parity_relative_error"] == pytest.approx(scaled["parity_reference_relative_error"], rel=0.2)
            assert 0.01 < scaled["parity_relative_error"] < 0.1


def test_float8_baseline_is_of_16_bit_weights(monkeypatch):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    modules, absent = baselines.build(["scaled-mm"], model, torch.device("cpu"))
    assert not modules and "capability 8.9" in absent["scaled-mm"]
    monkeypatch.setattr(FP8, "why_emulated", lambda device: None)
    modules, absent = baselines.build(["scaled-mm"], model, torch.device("cpu"))
    assert not modules and "float32" in absent["scaled-mm"]
    modules, _ = baselines.build(["scaled-mm"], model.bfloat16(), torch.device("cpu"))
    assert modules["scaled-mm"].blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    modules, absent = baselines.build(["scaled-mm"], torch.nn.Linear(16, 16).bfloat16(), torch.device("cpu"))
    assert absent["scaled-mm"] == "scaled-mm cannot build it: ValueError: the model has no block linears to quantise"


def test_capabilities_with_float8(monkeypatch):
    device = torch.device("cuda", 1)
    for capability, missing in (((8, 6), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert bool(FP8.why_emulated(device)) is missing
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert FP8.why_emulated(device) == "float8 products need capability 8.9, cuda:1 has 8.0"
    assert "a GPU of capability 8.9" in FP8.why_emulated(torch.device("cpu"))


def test_the_best_baseline_multiplies_in_no_lower_precision():
    """scaled-mm is the fastest baseline by far: of ours only what is in float8 is compared with it."""
    seconds = {"vit_fast": 4, "vit_fast-fp8": 2, "vit_fast-fp8-graphed": 8, "eager": 6, "compile": 5, "scaled-mm": 1}
    rows = {}
    for name, step in seconds.items():
        row = {"status": "ok", "matmul_peak_tflops": 200.0 if providers.PRECISION_OF.get(name) is FP8 else 100.0}
        ours = name.startswith("vit_fast")
        rows[name] = rounds.Provider(name, None, row, ours=ours, rounds=[[step]] * 3, latencies=[step] * 3)
    contest = SimpleNamespace(flops=1e12)
    rounds.fill_in(rows.values(), SimpleNamespace(device=torch.device("cpu")), contest, 5)
    best = {name: (p.row.get("best_baseline"), p.row.get("speedup_vs_best_baseline")) for name, p in rows.items()}
    assert best["vit_fast"] == ("compile", 1.25)
    assert best["vit_fast-fp8"] == ("scaled-mm", 0.5) and best["vit_fast-fp8-graphed"] == ("scaled-mm", 0.125)
    assert {best[name] for name in ("eager", "compile", "scaled-mm")} == {(None, None)}
    assert rows["vit_fast"].row["percent_of_peak"] == 1.25 and rows["vit_fast-fp8"].row["percent_of_peak"] == 1.25
    only = [rows["vit_fast"], rows["scaled-mm"]]
    for provider in only:
        provider.row = {"status": "ok", "matmul_peak_tflops": None}
    rounds.fill_in(only, SimpleNamespace(device=torch.device("cpu")), contest, 5)
    assert "best_baseline" not in only[0].row and only[0].row["percent_of_peak"] is None


def test_a_slow_first_call_takes_no_time_from_the_baselines(json_file, monkeypatch):
    """The first call of ours compiles its kernels (pretended: 3000 s), later ones do not: the compiled are timed."""
    shipped = measure.seconds

    def seconds(call, device):
        found = shipped(call, device)
        return (3000.0, found[1]) if vit_fast.backends.select._recorder.get() is not None else found

    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(compare.torch, "compile", lambda model, **words: model)
    words = ["-b", "1", "--baselines", "compile", "--time-budget", "1000"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    ours, compiled = json.loads(json_file.read_text())
    assert ours["first_call_s"] == 3000 and compiled["status"] == "ok"


ON_A_GPU = tuple(name for name in providers.VARIANTS if name != "int8")


@pytest.mark.parametrize(
    ("device", "flags", "ours", "theirs"),
    [
        ("cpu", [], ("plain",), ("eager", "compile-freezing", "compile-max-autotune")),
        (
            "cpu",
            ["--precision", "bfloat16"],
            ("plain", "prepared"),
            ("eager", "compile-freezing", "compile-max-autotune"),
        ),
        ("cuda", [], ON_A_GPU, providers.GPU_BASELINES),
        ("cuda", ["--precision", "float16"], ON_A_GPU, providers.GPU_BASELINES),
        ("cuda", ["--precision", "float32"], ("plain",), providers.GPU_BASELINES[:-1]),
        ("cuda", ["--amp"], ("plain",), providers.GPU_BASELINES[:-1]),
        ("cuda", ["--variants", "prepared"], ("prepared",), providers.GPU_BASELINES[:-1]),
        ("cuda", ["--variants", "fp8,plain"], ("plain", "fp8"), providers.GPU_BASELINES),
        ("cuda", ["--baselines", "eager"], ON_A_GPU, ("eager",)),
        ("cuda of capability 8.0", [], ("plain", "prepared", "graphed"), providers.GPU_BASELINES[:-1]),
    ],
)
def test_defaults_of_a_device(device, flags, ours, theirs, monkeypatch):
    asked = []
    device, _, old = device.partition(" of ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if old else (9, 0))
    monkeypatch.setattr(flags_of_bench.options, "target_device", lambda text: torch.device(device))
    monkeypatch.setattr(compare, "run", lambda settings, *rest: asked.append(settings) or False)
    monkeypatch.setattr(report, "print_report", lambda *rest: None)
    assert run("bench", *flags) == 0
    assert (asked[0].variants, asked[0].baselines) == (ours, theirs)


def _row(provider, speed, batch=4, low=None, high=None, rounds=12, baseline="compile", same=False):
    row = {"provider": provider, "infer_batch_size": batch}
    row["product_dtype"] = "float8_e4m3" if provider.endswith(("fp8", "scaled-mm")) else "bfloat16"
    if provider.startswith("vit_fast"):
        row |= {
            "best_baseline": baseline,
            "speedup_vs_best_baseline": speed,
            "paired_speedup": speed,
            "compared_rounds": rounds,
        }
        row |= {"paired_speedup_low": low, "paired_speedup_high": high, "same_as_best_baseline": same}
    return row


def test_the_verdict_is_of_the_fastest_of_ours_and_honest():
    rows = [_row("vit_fast", 1.25, 4, 1.2, 1.3), _row("vit_fast-prepared", 1.5, 4, 1.48, 1.52), _row("compile", 1.0)]
    rows += [_row("vit_fast", 0.8, 8, 0.75, 0.9), _row("compile", 1.0, 8)]
    rows += [_row("vit_fast", 1.3, 16, 0.99, 1.7), _row("compile", 1.0, 16)]
    rows += [_row("vit_fast", 2.11, 24, rounds=3), _row("compile", 1.0, 24)]
    rows += [{"provider": "vit_fast", "infer_batch_size": 32, "product_dtype": "bfloat16", "best_baseline": None}]
    rows += [_row("vit_fast", 1.2, 64, 0.8, 1.4, same=True, baseline="eager")]
    rows += [_row("vit_fast-fp8", 1.9, 64, 1.8, 2.0, baseline="scaled-mm")]
    best, interval = "the best baseline", "confidence interval"
    assert list(report._verdicts(rows)) == [
        f"Batch 4: vit_fast-prepared is faster than {best} (compile): 1.50×, {interval} 1.48 to 1.52 of 12 rounds.",
        f"Batch 8: vit_fast is slower than the best baseline (compile): 0.80×, {interval} 0.75 to 0.90 of 12 rounds.",
        "Batch 16: vit_fast is neither faster nor slower than the best baseline (compile), as far as can be told: "
        f"1.30×, {interval} 0.99 to 1.70 of 12 rounds.",
        "Batch 24: vit_fast against the best baseline (compile): 3 rounds are too few for a verdict (measured 2.11×).",
        "Batch 64: vit_fast is equal to the best baseline (eager): the same operators, the same bits. What is left is "
        f"host time and noise: 1.20×, {interval} 0.80 to 1.40 of 12 rounds.",
        f"Batch 64: vit_fast-fp8 is faster than {best} (scaled-mm): 1.90×, {interval} 1.80 to 2.00 of 12 rounds.",
    ]


def test_what_disturbed_the_figures_is_told():
    row = {"infer_batch_size": 4, "status": "ok", "infer_samples_per_sec_p20": 1.0, "infer_samples_per_sec_p80": 1.1}
    row |= {"load_average": 0.1, "cpu_threads": 2, "drift": 1.05}
    assert list(report._disturbances([row])) == []
    (load,) = report._disturbances([row | {"load_average": 10.4}])
    (drift,) = report._disturbances([row | {"drift": 0.5}])
    (spread,) = report._disturbances([row | {"infer_samples_per_sec_p80": 3.0}])
    assert "load average 10.4 at 2 threads" in load and "0.50 times as long" in drift and "up to 3.00" in spread


def test_equal_code_is_known_by_its_operators_and_bits(json_file, capsys):
    """On this backend ours runs what eager runs, and something else where its activation differs."""
    assert run(*QUICK, "-b", "2", "--baselines", "eager", "--results-file", json_file) == 0
    ours, eager = json.loads(json_file.read_text())
    assert ours["same_as_best_baseline"] is True and "same_as_best_baseline" not in {k for k, v in eager.items() if v}
    assert "Batch 2: vit_fast is equal to the best baseline (eager)" in capsys.readouterr().out
    tiny = SimpleNamespace(operators=[("aten::addmm", [(1, 2)])], logits=torch.zeros(1))
    for other in ({"operators": None}, {"operators": [("aten::addmm", [(1, 3)])]}, {"logits": torch.ones(1)}):
        provider = rounds.Provider("vit_fast", None, {}, **(vars(tiny) | other))
        assert not provider.same_as(tiny)
    assert rounds.Provider("vit_fast", None, {}, **vars(tiny)).same_as(tiny)


FULL_ROW = {
    "status": "ok", "infer_samples_per_sec": 12345.678, "infer_samples_per_sec_p20": 12001.5, "infer_step_time": 3.2415,
    "infer_samples_per_sec_p80": 12500.5, "latency_ms": 4.1234, "first_call_s": 124.219, "peak_memory_mib": 12345.6,
    "achieved_tflops": 123.4, "percent_of_peak": 77.71, "parity_error": 6.6e-07, "model": "vit_base_patch16_224",
    "infer_batch_size": 4, "product_dtype": "bfloat16",
}  # fmt: skip


def _printed(text, columns):
    """The cells of a printed table that must stand in one piece."""
    assert all(len(line) <= columns for line in text.splitlines()) and "…" not in text.replace(" … ", "")
    return text.split()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_is_whole_at_every_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ["vit_fast-fp8-graphed", "compile-max-autotune", "eager", "scaled-mm"]
    rows = [
        dict(FULL_ROW, provider=name, speedup_vs_compile_max_autotune=1.234, speedup_vs_eager=9.87) for name in names
    ]
    rows[3]["status"] = "not timed: no time left to compile it"
    report.print_batch(rows, SimpleNamespace(device=torch.device("cuda")))
    text = capsys.readouterr().out
    words = _printed(text, columns)
    for cell in ("1.235e+04", "1.2e+04", "1.25e+04", "3.241", "4.123", "124.22", "12346", "123", "77.7", "6.6e-07"):
        assert words.count(cell) == 3, cell
    assert words.count("1.23") == words.count("9.87") == 3 and words.count("scaled-mm:") == 1
    # Each of the tables names its rows; a wider terminal needs fewer.
    tables = words.count("provider")
    assert words.count(names[0]) == words.count(names[1]) == tables <= {60: 5, 80: 3, 120: 2}[columns]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("verb", [["list", "--long", "deit"], ["info"]], ids=["list", "info"])
def test_other_tables_fit_too(verb, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(*verb) == 0
    words = _printed(capsys.readouterr().out, columns)
    assert {"deit_base_patch16_224", "86,567,656"} <= set(words) or {"layernorm_mlp", torch.__version__} <= set(words)


def test_cold_caches_are_told(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert measure.kernel_cache() == tmp_path / ".triton" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert measure.compile_cache() == tmp_path / "inductor"
    cache = measure.kernel_cache()
    assert cache == tmp_path / "cache" and measure.is_cold(cache)
    (cache / "key").mkdir(parents=True)
    (cache / "key" / "cuda_utils.so").touch()  # the driver's stub, which is no kernel
    assert measure.is_cold(cache, "*.cubin") and not measure.is_cold(cache)
    (cache / "key" / "kernel.cubin").touch()
    assert not measure.is_cold(cache, "*.cubin")


def test_cold_first_calls_are_told_in_the_rows(json_file, tmp_path, monkeypatch):
    """Of the kernels where they ran (pretended here), of torch.compile where it compiled: warm on the second run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    class Recording:
        def __enter__(self):
            return [("attention", "triton", ())]

        def __exit__(self, *exception):
            (tmp_path / "triton").mkdir(exist_ok=True)
            (tmp_path / "triton" / "kernel.cubin").touch()

    monkeypatch.setattr(compare.backends, "recording", Recording)
    words = ["--model-kwargs", "depth=1", "-b", "1,2", "--baselines", "eager,compile", "--time-budget", "0"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    rows = json.loads(json_file.read_text())
    assert [row["cold_cache"] for row in rows] == [True, None, True, False, None, False]


def test_rows_are_kept_after_each_batch_size(json_file, monkeypatch):
    kept, shipped = [], results.write_rows

    def write_rows(rows, *rest):
        kept.append([row["infer_batch_size"] for row in rows])
        shipped(rows, *rest)

    monkeypatch.setattr(results, "write_rows", write_rows)
    assert run(*QUICK, "-b", "2,1", "--baselines", "none", "--results-file", json_file) == 0
    assert kept == [[2], [2, 1], [2, 1]]


def test_memory_of_cuda_graphs_is_not_claimed():
    for name in (*providers.OUR_GRAPHS, "compile-cudagraphs", "compile-max-autotune", "scaled-mm"):
        provider = rounds.Provider(name, pytest.fail, {})
        compare._memory(provider, 1000, torch.device("cuda"))
        assert provider.row["peak_memory_mib"] is None and "not measured" in provider.row["peak_memory_method"]


@pytest.mark.gpu
def test_bench_on_a_gpu(json_file):
    words = ["--device", "cuda", "-b", "8", "--num-bench-iter", "12", "--results-file", json_file]
    code = run("bench", "-m", "vit_tiny_patch16_224", "--model-kwargs", "depth=2", *words)
    rows = json.loads(json_file.read_text())
    float8 = not FP8.why_emulated(torch.device("cuda", torch.cuda.current_device()))
    names = [variant.provider for variant in providers.VARIANTS.values()][: 5 if float8 else 3]
    ours, theirs = rows[: len(names)], rows[len(names) :]
    assert [row["provider"] for row in ours] == names
    assert [row["provider"] for row in theirs] == list(providers.GPU_BASELINES[: None if float8 else -1])
    assert code == 0 and {row["status"] for row in (*ours, theirs[0])} == {"ok"}
    assert {row["status"] for row in theirs} <= {"ok", "not timed: parity failed"}
    for row in rows:
        if row["status"] == "ok":
            assert row["precision"] == "bfloat16" and row["num_bench_iter"] == 12
            assert 0 < row["percent_of_peak"] < 100 and (row["peak_memory_mib"] or 2) > 1
            assert 0 < row["infer_step_time"] and 0 < row["latency_ms"]
    assert all(row["vit_fast_backend"] == "triton" and row["best_baseline"] for row in ours)
    assert theirs[0]["attention_operators"].startswith("scaled_dot_product")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_json_stays_json_where_a_figure_is_not_finite(bad, tmp_path):
    path = tmp_path / "rows.json"
    results.write_rows([{"model": "m", "parity_error": bad}], path, "json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)[0]["parity_error"] is None


def test_one_channel(json_file):
    words = ["--model-kwargs", "in_chans=1", "-b", "2", "--baselines", "none", "--results-file", json_file]
    assert run(*QUICK, *words) == 0
    assert json.loads(json_file.read_text())[0]["status"] == "ok"


@pytest.mark.parametrize("words", [("scratch", "1,2"), ("lanl", "1")])
def test_family_against_plain_pytorch(words, json_file):
    """A family's main preset; one image and one output are a comparison too."""
    name, sizes = words
    flags = ["bench", "--family", name, "-b", sizes, "--device", "cpu", "--num-bench-iter", "3"]
    assert run(*flags, "--results-file", json_file) == 0
    rows = json.loads(json_file.read_text())
    assert [row["provider"] for row in rows] == ["vit_fast", "torch"] * len(sizes.split(","))
    assert all(row["status"] == "ok" and row["parity_passed"] and row["model"] == name for row in rows)


@pytest.mark.parametrize("name,library", [("deit", "timm"), ("clip", "open_clip")])
def test_family_peers_have_the_familys_numbers(name, library, peer):
    from vit_fast.bench import families
    from vit_fast.cli.bench import FAMILIES

    assert set(families.FAMILIES) == set(FAMILIES)
    peer(library)
    with torch.no_grad():
        model, baselines = families.contestants(name, parity.perturb)
        x = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(model(x), baselines[library](x), rtol=1e-4, atol=1e-4)


def test_different_weights_stop_the_row(json_file, monkeypatch, capsys):
    shipped = vit_fast.create_model

    def altered(*args, **kwargs):
        model = shipped(*args, **kwargs)
        load = model.load_state_dict

        def load_and_alter(state, strict):
            load(state, strict=strict)
            with torch.no_grad():
                model.blocks[1].attn.qkv.weight[0, 0] += 0.5

        model.load_state_dict = load_and_alter
        return model

    monkeypatch.setattr(vit_fast, "create_model", altered)
    assert run(*QUICK, "-b", "2", "--baselines", "eager", "--results-file", json_file) == 1
    ours, eager = json.loads(json_file.read_text())
    assert ours["status"] == "parity failed" and ours["parity_error"] > ours["parity_allowed"]
    assert eager["status"] == "not timed: vit_fast: parity failed"
    assert ours["infer_samples_per_sec"] is None and eager["infer_samples_per_sec"] is None
    assert "Parity with timm eager FAILS" in capsys.readouterr().out


def test_a_backend_of_the_environment_that_cannot_run_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(vit_fast.backends.select, "_ENVIRONMENT", "cuda")
    assert run(*QUICK) == 2
    assert "Invalid value for VIT_FAST_BACKEND" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_is_a_row_and_the_rest_goes_on(json_file, monkeypatch):
    shipped = measure.step_times

    def step_times(call, count, device):
        if call().shape[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return shipped(call, count, device)

    monkeypatch.setattr(measure, "step_times", step_times)
    assert run(*QUICK, "-b", "2,1", "--baselines", "eager", "--results-file", json_file) == 0
    assert [row["status"] for row in json.loads(json_file.read_text())] == ["out of memory"] * 2 + ["ok"] * 2


def test_a_used_up_time_budget_skips_compilation_and_takes_three_rounds(json_file, capsys):
    words = ["-b", "1", "--baselines", "eager,compile", "--time-budget", "0.001", "--num-bench-iter", "50"]
    assert run("bench", *TINY, *words, "--results-file", json_file) == 0
    ours, eager, compiled = json.loads(json_file.read_text())
    assert ours["num_bench_iter"] == eager["num_bench_iter"] == time_budget.MIN_ROUNDS
    assert compiled["status"] == "not timed: no time left to compile it"
    assert "Timed calls: 3 of 50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named", "wanted"),
    [
        (["--precision", "int8"], "--precision", "float32, bfloat16 or float16"),
        (
            ["--baselines", "eager,tensorrt"],
            "--baselines",
            "compile, compile-freezing, compile-cudagraphs, compile-max-autotune or scaled-mm",
        ),
        (["--baselines", "compile-cudagraphs", "--device", "cpu"], "--baselines", "a CUDA device"),
        (["--variants", "graphed", "--device", "cpu"], "--variants", "a CUDA device"),
        (["--variants", "fp8-graphed", "--device", "cpu"], "--variants", "a CUDA device"),
        (["--variants", "plain,quick"], "--variants", "plain, prepared, graphed, fp8, fp8-graphed or int8"),
        (["--variants", "none"], "--variants", "plain, prepared, graphed, fp8, fp8-graphed or int8"),
        (["--variants", "prepared", "--family", "deit"], "--variants", "without --family"),
        (["--family", "vgg"], "--family", "clip, deit, hybrid, scratch, lanl, t2t or all"),
        (["--backend", "metal"], "--backend", "auto, triton, cuda, cpu or torch"),
        (["--batch-size", "8,0"], "--batch-size", "whole number of 1 or more"),
        (["--batch-size", "many"], "--batch-size", "whole number of 1 or more"),
        (["--img-size", "-3"], "--img-size", "whole number of 1 or more"),
        (["--num-bench-iter", "0"], "--num-bench-iter", "whole number of 1 or more"),
        (["--time-budget", "-1"], "--time-budget", "0 or more"),
        (["--time-budget", "nan"], "--time-budget", "0 or more"),
        (["--device", "tpu"], "--device", "cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device", "cpu, cuda or cuda:N"),
        (["--amp-dtype", "bfloat16"], "--amp-dtype", "together with --amp"),
        (["--amp", "--precision", "float16"], "--amp", "float32"),
        (["--model-kwargs", "depth"], "--model-kwargs", "key=value"),
        (["--results-file", "rows.xlsx"], "--results-file", ".csv or .json"),
        (["--results-format", "json"], "--results-format", "--results-file"),
        (["--images", "nowhere"], "--images", "a folder of photographs"),
        (["--plot", "bars.doc"], "--plot", ".png, .svg or .pdf"),
        (["--backend", "cuda", "--device", "cpu"], "--backend", "the cuda extension does not run on device type"),
        (["--backend", "triton", "--device", "cpu"], "--backend", "TRITON_INTERPRET=1"),
        (["--results-file", "/proc/x.json"], "--results-file", "a file that can be written"),
        (["--plot", "/proc/x.png"], "--plot", "a file that can be written"),
        (["--plot", "x.png", "--results-file", "x.png", "--results-format", "csv"], "--plot", "another file than"),
        (["--precision", "amp", "--amp-dtype", "bf16"], "--amp-dtype", "without --precision amp"),
        (["--variants", "prepared,fp8", "--precision", "fp32"], "--variants", "plain among them"),
        (["--weights", "trained"], "--weights", "random, initial or structured"),
        (["--weights", "structured", "--pretrained"], "--weights", "without --pretrained"),
        (["--weights", "structured", "--family", "deit"], "--weights", "without --family"),
        (["--peak-rss", "--family", "deit"], "--peak-rss", "without --family"),
        (["--model", "vit_tiny_patch16_224", "--family", "deit"], "--model", "got 'vit_tiny_patch16_224'"),
        (["--model-kwargs", "depth=1", "--family", "deit"], "--model-kwargs", "without --family"),
        (["--img-size", "32", "--model-kwargs", "img_size=64"], "--model-kwargs", "img_size by --img-size alone"),
        (["--model-kwargs", "pretrained=True"], "--model-kwargs", "pretrained by --pretrained alone"),
        (["--img-size", "9" * 20], "--img-size", "64 bits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags_are_named_with_what_is_wanted(flags, named, wanted, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run", pytest.fail)
    assert run("bench", *flags) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert named in message and wanted in message


@pytest.mark.parametrize("verb", ["bench", "check", "profile"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-m", "vit_colossal"], "vit_colossal"),
        (["-m", "resnet18"], "resnet18"),
        (["-m", "test_vit", "--model-kwargs", "name=other"], "name"),
        (["-m", "test_vit", "--batch-size", "9" * 15], "out of memory"),
    ],
    ids=["unknown", "not a ViT", "argument of the function", "batch size"],
)
def test_failures_are_one_line_without_a_traceback(verb, words, named, capsys):
    assert run(verb, *words, "--device", "cpu") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vit-fast: ") and named in lines[-1] and "Traceback" not in "".join(lines)


@pytest.mark.parametrize("module", ["typer", "timm", "matplotlib"])
def test_missing_package_names_its_extra(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(*QUICK, "--plot", tmp_path / "bars.png") == 1
    assert f"{module} is not installed; pip install 'vit-fast[" in capsys.readouterr().err


def _save(path, size=(90, 60), colour=None, **words):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.radial_gradient("L").convert("RGB").resize(size) if colour is None else Image.new("RGB", size, colour)
    image.save(path, **words)


@pytest.fixture
def folder(tmp_path):
    _save(tmp_path / "b.png", colour=(255, 0, 0))
    _save(tmp_path / "a" / "deep" / "c.jpg", colour=(0, 255, 0))
    _save(tmp_path / "d.webp", colour=(0, 0, 255))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photograph")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    return tmp_path


def test_own_photographs_are_used_and_broken_files_named(folder, json_file, capsys):
    assert run(*QUICK, "-b", "3", "--baselines", "none", "--images", folder, "--results-file", json_file) == 0
    warning = capsys.readouterr().err
    assert "skipped" in warning and "broken.jpg" in warning and ".hidden" not in warning
    assert json.loads(json_file.read_text())[0]["images"] == f"3 photographs of {folder}"


def test_photographs_come_in_the_order_of_their_names(folder):
    loaded = photographs.load(folder, 3, 32, 32, (0.0,) * 3, (1.0,) * 3)
    assert loaded.pixels.mean((2, 3)).argmax(1).tolist() == [1, 0, 2]
    assert len(loaded.skipped) == 1


def test_a_folder_without_photographs_is_an_error(tmp_path):
    with pytest.raises(errors.BenchError, match=r"--images.*empty"):
        photographs.load(tmp_path, 1, 32, 32, (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(errors.BenchError, match=r"none of its 1 files.*notes\.txt"):
        photographs.load(tmp_path, 1, 32, 32, (0.5,) * 3, (0.5,) * 3)


def test_sample_photograph_gives_different_items_the_same_every_time():
    first, second = (photographs.load(None, 6, 48, 32, (0.5,) * 3, (0.5,) * 3).pixels for _ in range(2))
    assert first.shape == (6, 3, 48, 32) and first.dtype == torch.float32 and torch.equal(first, second)
    assert all((first[i] - first[j]).abs().mean() > 0.01 for i in range(6) for j in range(i))
    assert first.min() >= -1 and first.max() <= 1 and first.std() > 0.2


def test_pixels_are_normalised_per_channel_and_not_distorted(tmp_path):
    _save(tmp_path / "grey.png", colour=(51, 102, 204))
    pixels = photographs.load(tmp_path, 1, 16, 16, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)).pixels
    wanted = torch.tensor([(51 / 255 - 0.1) / 0.5, (102 / 255 - 0.2) / 0.25, (204 / 255 - 0.3) / 2.0])
    torch.testing.assert_close(pixels[0, :, 8, 8], wanted)
    (tmp_path / "grey.png").unlink()
    _save(tmp_path / "circle.png", size=(256, 256))
    square = photographs.load(tmp_path, 1, 64, 64, (0.0,) * 3, (1.0,) * 3).pixels[0, 0]
    wide = photographs.load(tmp_path, 1, 32, 64, (0.0,) * 3, (1.0,) * 3).pixels[0, 0]
    torch.testing.assert_close(wide, square[16:48], atol=0.05, rtol=0)


def test_camera_orientation_is_applied(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (64, 64), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "turned.jpg", exif=exif)
    pixels = photographs.load(tmp_path, 1, 16, 16, (0.0,) * 3, (1.0,) * 3).pixels
    assert pixels[0, :, 2].mean() < 0.1 and pixels[0, :, 13].mean() > 0.9


@pytest.mark.parametrize(
    ("dtype", "factor", "units"), [(torch.float32, 2, 4), (torch.bfloat16, 1.25, 0.5)], ids=["fp32", "bf16"]
)
def test_parity_rule_from_both_sides(dtype, factor, units):
    golden = torch.linspace(-1, 1.5, 40, dtype=torch.float64).reshape(4, 10)
    eager = golden.clone()
    eager[1, 3] += 0.125
    allowed = factor * 0.125 + units * torch.finfo(dtype).eps
    for error, passes in ((0.999 * allowed, True), (1.001 * allowed, False), (float("nan"), False)):
        logits = golden.clone()
        logits[2, 5] += error
        verdict = parity.compare(logits, eager, golden, dtype)
        assert verdict.passed is passes
    assert verdict.allowed == pytest.approx(allowed)


@pytest.mark.parametrize(("dtype", "roundoffs"), [(torch.bfloat16, 16), (torch.float16, 128)], ids=["bf16", "fp16"])
def test_parity_rule_of_float8_from_both_sides(dtype, roundoffs):
    """A golden of norm 1: the limits are 2 × the plain form's largest error, 1.25 × its norm, and eager's norm."""
    golden = torch.full((4, 25), 0.1, dtype=torch.float64)

    def verdict(largest, norm, plain_norm=0.03, eager_norm=1.0):
        def off(norm, largest=0.0):
            error = torch.zeros_like(golden)
            error[1, 2] = largest
            error[2:] = math.sqrt((norm**2 - largest**2) / 50)
            return golden + error

        plain = off(plain_norm, 0.02)
        return parity.compare(off(norm, largest), off(eager_norm), golden, dtype, plain, parity.FLOAT8_BUDGET)

    allowed = 2 * 0.02 + 0.5 * torch.finfo(dtype).eps * 0.0625
    for largest, passes in ((0.999 * allowed, True), (1.001 * allowed, False)):
        found = verdict(largest, 0.06, plain_norm=0.05)
        assert found.passed is passes and found.allowed == pytest.approx(allowed)
    assert verdict(0.02, 0.0374).passed and not verdict(0.02, 0.0376).passed
    edge = 0.03 / roundoffs
    assert (
        verdict(0.02, 0.03, eager_norm=1.001 * edge).passed and not verdict(0.02, 0.03, eager_norm=0.999 * edge).passed
    )
    found = verdict(0.02, 0.03, eager_norm=0.25)
    assert found.relative_error == pytest.approx(0.03) and found.reference_relative_error == pytest.approx(0.03)
    assert found.eager_relative_error == pytest.approx(0.25) and found.reference_error == pytest.approx(0.02)
    assert not verdict(0.02, 0.03, plain_norm=float("nan")).passed


def test_parity_that_proves_nothing_fails():
    flat = torch.zeros(2, 5)
    assert not parity.compare(flat, flat, flat.double(), torch.float32).passed


def test_parity_tells_top1_and_cosine():
    golden = torch.eye(4, dtype=torch.float64)
    logits = golden.clone()
    logits[0] = golden[1]
    verdict = parity.compare(logits, golden, golden, torch.float32)
    assert verdict.top1 == verdict.top1_float64 == 0.75 and verdict.cosine == 0 and verdict.max_abs == 1


def test_summary_has_median_and_percentiles():
    summary = measure.summary([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], batch=6)
    assert summary["infer_step_time"] == pytest.approx(350)
    assert summary["infer_samples_per_sec"] == pytest.approx(6 / 0.35)
    assert summary["infer_samples_per_sec_p20"] == pytest.approx(6 / 0.5)
    assert summary["infer_samples_per_sec_p80"] == pytest.approx(6 / 0.2)


def test_step_times_are_of_the_call():
    times = measure.step_times(lambda: time.sleep(0.02), 3, torch.device("cpu"))
    assert len(times) == 3 and all(0.02 <= t < 5 for t in times)


def test_peak_memory_sees_what_a_call_frees_again():
    def call():
        torch.ones(64 << 20, dtype=torch.uint8)

    peak, method = measure.peak_memory(call, 1000, torch.device("cpu"))
    if sys.platform.startswith("linux"):
        assert 60 << 20 < peak < 100 << 20 and "VmHWM" in method
    else:
        assert peak is None and method.startswith("not measured")


@pytest.mark.parametrize(("lasting", "peak"), [(12.0, 2 * 2048**3 / 1e12), (4.0, 5 * 2048**3 / 1e12)])
def test_matmul_peak_is_the_fastest_product_or_the_sustained_rate(lasting, peak, monkeypatch):
    """Ten products of the faster size last 12 s, or 4 s, where the fastest single one took 1 s."""
    monkeypatch.undo()
    steps = {1024: [0.5, 0.25], 2048: [1.0, 4.0]}
    products = []

    def product(a, b):
        assert a.std() > 0.9 and not torch.equal(a, b)
        products.append(len(a))
        return a

    def seconds(call, device):
        return (1e-3 if call() is not None else lasting), None

    monkeypatch.setattr(measure.F, "linear", product)
    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(measure, "step_times", lambda call, count, device: steps[len(call())])
    found = measure.matmul_peaks(torch.float32, torch.device("cpu"), sustained=10.0)
    assert found == pytest.approx((peak, 20 * 2048**3 / lasting / 1e12))
    assert products == [1024] * 3 + [2048] * 13
    assert measure.matmul_peak(torch.float32, torch.device("cpu")) > 0


def test_matmul_peak_of_float8_is_of_products_in_float8():
    """Two e4m3 matrices, one transposed, scales of 1: what torch takes on a GPU, and here as well."""
    a, b = (torch.randn(64, 64).to(torch.float8_e4m3fn) for _ in range(2))
    product = FP8.product(a, b)
    assert product.func is torch._scaled_mm
    out = product()
    assert out.dtype == torch.bfloat16 and out.shape == (64, 64)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=2**-7, atol=2**-7)
    with FakeTensorMode():
        large = torch.randn(8192, 8192, device=torch.device("cuda", 0)).to(torch.float8_e4m3fn)
        out = FP8.product(large, large)()
    assert out.shape == (8192, 8192) and out.device.type == "cuda"


def test_flops_count_attention_and_every_product():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    tokens, width = 5, 192
    block = tokens * width * 12 * width + 2 * tokens * tokens * width
    macs = 4 * width * 3 * 16 * 16 + 2 * block + width * 1000
    assert measure.flops_per_image(model, torch.zeros(1, 3, 32, 32)) == 2 * macs


def test_list_prints_names_and_takes_a_pattern(capsys):
    assert run("list", "vit_base_patch16_*") == 0
    names = capsys.readouterr().out.split()
    assert "vit_base_patch16_224" in names and all(name.startswith("vit_base_patch16_") for name in names)


def test_info_and_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vit_fast", "info"], capture_output=True, text=True, timeout=120, check=True
    )
    assert torch.__version__ in done.stdout and "layernorm_mlp" in done.stdout and done.stderr == ""


def test_coverage_of_a_model_and_of_a_library(capsys, monkeypatch):
    assert run("coverage", "test_vit") == 0
    out = capsys.readouterr().out
    assert out == "VisionTransformer: 100.0% of the FLOPs of blocks and patch embedding run fused, 6 of 6 blocks\n"
    assert run("coverage", "mixer_s32_224") == 0
    assert "timm.models.mlp_mixer.MixerBlock is not a class that vit_fast fuses" in capsys.readouterr().out
    few = [one for one in library_coverage.LIBRARIES["timm"]() if one.name in ("test_vit", "vit_base_r26_s32_224")]
    monkeypatch.setitem(library_coverage.LIBRARIES, "timm", lambda: iter(few))
    printed = {}
    for form in ("table", "csv", "json", "md"):
        assert run("coverage", "--library", "timm", "--format", form) == 0
        printed[form] = capsys.readouterr().out
    rows = library_coverage.from_csv(printed["csv"])
    *_, everything = library_coverage.summary(rows)
    assert printed["table"].splitlines()[-1].split() == [str(cell) for cell in everything]
    assert [row.architecture for row in rows] == ["test_vit", "vit_base_r26_s32_224"]
    assert rows[0].share == 1.0 and rows[0].fully_fused and 0.5 < rows[1].share < 1.0
    assert json.loads(printed["json"])[1]["share"] == rows[1].share
    assert printed["md"] == library_coverage.as_markdown("timm", rows)


@pytest.mark.parametrize(
    ("words", "told"),
    (
        ((), "expected a model, or --library"),
        (("test_vit", "--library", "timm"), "expected a model, or --library"),
        (("--library", "torch"), "--library"),
        (("--library", "timm", "--format", "xml"), "--format"),
        (("no_such_model",), "timm has no model 'no_such_model'"),
        (("resnet18",), "ResNet without transformer blocks"),
    ),
)
def test_coverage_of_what_is_not_there(words, told, capsys):
    assert run("coverage", *words) in (1, 2)
    assert told in capsys.readouterr().err


def test_list_takes_a_text_and_tells_what_is_near(capsys):
    assert run("list", "dino") == 0
    names = capsys.readouterr().out.split()
    assert names == vit_fast.list_models("*dino*") and len(names) > 3
    assert run("list", "vit_bse_patch16_224") == 1
    assert "no model matches 'vit_bse_patch16_224'; near: vit_base_patch16_224" in capsys.readouterr().err
    assert run("list", "--num-classes", "3") == 1 and "--long" in capsys.readouterr().err
    assert run("list", "--families", "--long") == 1 and "one of the two" in capsys.readouterr().err


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vit-fast {vit_fast.__version__}\n"


@pytest.mark.parametrize(
    ("flags", "precision", "amp_dtype"),
    [
        (["--precision", "bf16"], "bfloat16", None),
        (["--precision", "fp16"], "float16", None),
        (["--precision", "fp32"], "float32", None),
        (["--precision", "amp"], "float32", "float16"),
        (["--precision", "amp_bfloat16"], "float32", "bfloat16"),
        (["--amp", "--amp-dtype", "bf16"], "float32", "bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_words_for_precisions(flags, precision, amp_dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "run", lambda settings, *rest: asked.append(settings) or False)
    assert run(*QUICK, *flags) == 0
    assert (asked[0].precision, asked[0].amp_dtype) == (precision, amp_dtype)


def test_an_unknown_model_is_told_with_its_neighbours_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", pytest.fail)
    for verb in ("bench", "check", "profile"):
        assert run(verb, "-m", "vit_bse_patch16_224", "--device", "cpu") == 1
        message = capsys.readouterr().err
        assert message.startswith("vit-fast: ") and "near: vit_base_patch16_224" in message
        assert "vit_fast.create_model" not in message and message.count("\n") == 1
    assert run("profile", "-m", "vit_bse_patch16_224", "--provider", "eager", "--device", "cpu") == 1
    assert "timm cannot make the model 'vit_bse_patch16_224': unknown model; near: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--variant", "graphed"], "CUDA graphs need one"),
        (["--variant", "prepared"], "float32 is for a CPU with its C++ library"),
        (["--backend", "triton"], "TRITON_INTERPRET=1"),
        (["--results-file", "/proc/x.json"], "a file that can be written"),
        (["--images", "/nowhere"], "is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_check_refuses_at_once(words, named, monkeypatch, capsys):
    monkeypatch.setattr(vit_fast, "check", pytest.fail)
    assert run("check", *TINY, *words) in (1, 2)
    assert named in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere.pth", "out.safetensors"], "nowhere.pth does not exist"),
        ([__file__, "out.pth"], "expected a file name ending in .safetensors"),
        ([__file__, "/proc/x.safetensors"], "a file that can be written"),
        (
            [__file__, "out.safetensors", "--to", "keras"],
            "--to is 'keras', expected one of timm, canonical, jeonsworld",
        ),
        ([__file__, "out.safetensors", "--from", "keras"], "--from"),
    ],
)
def test_convert_refuses_before_it_reads(words, named, monkeypatch, capsys):
    import vit_fast.checkpoints

    monkeypatch.setattr(vit_fast.checkpoints, "convert_file", pytest.fail)
    assert run("convert", *words) in (1, 2)
    assert named in " ".join(capsys.readouterr().err.split())


def test_an_output_is_left_as_it_is_until_there_is_something_to_write(tmp_path, monkeypatch):
    old, new = tmp_path / "old.csv", tmp_path / "new.png"
    old.write_text("rows of yesterday")
    monkeypatch.setattr(compare, "run", lambda *rest: False)
    assert run(*QUICK, "--results-file", old, "--plot", new) == 0
    assert old.read_text() == "rows of yesterday" and not new.exists()


def _two_batches(settings, budget, tell, keep):
    for batch in (1, 2):
        row = dict(FULL_ROW, provider="vit_fast", infer_batch_size=batch, infer_img_size=32, weights="random")
        row |= dict(infer_gmacs=1.0, param_count=1.0, images="none", device_name="a CPU", cpu_threads=2)
        keep([row | dict(matmul_peak_tflops=None)])
        if batch == 1 and settings.model_kwargs.get("depth") == 3:
            raise KeyboardInterrupt
    return False


def test_rows_are_printed_though_their_file_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", _two_batches)
    assert run(*QUICK, "--results-file", "/dev/full", "--results-format", "csv") == 1
    shown = capsys.readouterr()
    assert shown.out.count("1.235e+04") == 2
    assert shown.err == "vit-fast: /dev/full was not written: No space left on device\n"


def test_ctrl_c_keeps_what_is_finished(json_file, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", _two_batches)
    assert run(*QUICK, "--model-kwargs", "depth=3", "--results-file", json_file) == 130
    assert [row["infer_batch_size"] for row in json.loads(json_file.read_text())] == [1]
    shown = capsys.readouterr().out
    assert "1.235e+04" in shown and "Interrupted" in shown and str(json_file) in shown


@pytest.mark.parametrize(("call", "rounds"), [(3, None), (12, 5)], ids=["too early", "after enough rounds"])
def test_ctrl_c_in_the_rounds(call, rounds, json_file, monkeypatch):
    calls = []

    def step_times(function, count, device):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return [1.0] * count

    monkeypatch.setattr(measure, "step_times", step_times)
    words = ["-b", "1,2", "--baselines", "eager", "--num-bench-iter", "20", "--time-budget", "0"]
    assert run(*QUICK, *words, "--results-file", json_file) == 130
    if rounds is None:
        assert not json_file.exists()
    else:
        rows = json.loads(json_file.read_text())
        assert [row["infer_batch_size"] for row in rows] == [1, 1] and {row["num_bench_iter"] for row in rows} <= {5, 6}


SCRIPT = """
import sys, time
from vit_fast import cli
from vit_fast.bench import compare
sys.path.insert(0, {folder!r})
from test_cli import _two_batches, QUICK

def run(settings, budget, tell, keep):
    _two_batches(settings, budget, tell, keep)
    while True:
        time.sleep(0.01)

compare.run = run
cli.main([*QUICK, "--results-file", {file!r}])
"""


def test_rows_stream_into_a_pipe_and_sigint_ends_with_the_report(json_file):
    import os
    import signal

    script = SCRIPT.format(folder=os.path.dirname(__file__), file=str(json_file))
    process = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun = []
    while sum(b"1.235e+04" in line for line in begun) < 2:  # the process goes on until the signal: they came before
        begun.append(process.stdout.readline())
        assert begun[-1], process.stderr.read()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and b"Interrupted" in rest and errors == b""
    assert len(json.loads(json_file.read_text())) == 2


def test_a_full_or_closed_output_is_no_traceback():
    with open("/dev/full", "wb") as full:
        words = [sys.executable, "-P", "-m", "vit_fast", "list"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == "vit-fast: [Errno 28] No space left on device\n"
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(100) == 1


@pytest.fixture
def clock(monkeypatch):
    """Time passes where the test says so."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now.time)
    return now


@pytest.mark.parametrize(
    ("limit", "batches", "providers", "left_out"),
    [
        (0, [1, 4], 4, ""),
        (1000, [1, 4], 4, ""),
        (96, [1, 4], 2, "leaves out compile, compile-max-autotune; what remains takes about 95 s more"),
        (50, [1], 4, "leaves out batch 4; what remains takes about 19 s more"),
        (4, [1], 2, "leaves out compile, compile-max-autotune, batch 4; what remains takes about 19 s more"),
    ],
)
def test_what_a_time_budget_leaves_out_is_told_beforehand(limit, batches, providers, left_out, clock, monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda call, device: (1.0, None))
    monkeypatch.setattr(time_budget, "caller", lambda *rest: None)
    warned, baseline_names = [], ("eager", "compile", "compile-max-autotune")
    settings = Settings("m", (1, 4), torch.device("cpu"), baselines=baseline_names)
    contest = SimpleNamespace(reference=None, pixels=[0], absent={}, facts={"matmul_peak_tflops": 1.0}, baselines={})
    tell = SimpleNamespace(warn=warned.append)
    plan = time_budget.plan(settings, contest, time_budget.TimeBudget(limit, 0.0), tell)
    assert list(plan.batches) == batches and len(plan.providers) == providers
    assert ("".join(warned).partition("s ")[2] == left_out) if left_out else warned == []


@pytest.mark.parametrize(
    ("limit", "took", "statuses"),
    [
        (110, 40.0, ["ok", "no time", "ok", "no time"]),
        (150, 40.0, ["ok", "ok", "ok", "no time"]),  # compile at both sizes before max-autotune at any
        (400, 40.0, ["ok"] * 4),
        (70, 40.0, ["ok", "no time", "no time", "no time"]),
        (20, 40.0, ["late", "no time", "no time", "no time"]),
    ],
)
def test_compile_comes_at_every_batch_size_before_max_autotune(limit, took, statuses, clock, monkeypatch):
    """Parity and rounds take no time here, each compilation the same."""

    @contextlib.contextmanager
    def deadline(seconds):
        clock.time += min(took, seconds)
        if seconds < took:
            raise time_budget.OutOfTime
        yield

    monkeypatch.setattr(compare, "deadline", deadline)
    monkeypatch.setattr(compare, "time_rounds", lambda *rest: False)
    monkeypatch.setattr(compare, "fill_in", lambda *rest: None)
    monkeypatch.setattr(compare, "_memory", lambda *rest: None)
    monkeypatch.setattr(compare, "_attention", lambda *rest: ({}, [], contextlib.nullcontext))
    monkeypatch.setattr(compare, "_judge", lambda *rest: None)
    monkeypatch.setattr(compare, "caller", lambda *rest: lambda: torch.zeros(1))
    monkeypatch.setattr(parity, "golden_logits", lambda *rest: None)
    verdict = SimpleNamespace(passed=True, columns=dict)
    monkeypatch.setattr(parity, "compare", lambda *rest: verdict)
    monkeypatch.setattr(measure, "seconds", lambda call, device: (took, torch.zeros(1)))
    settings = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32, peak_rss=False)
    names = ("compile", "compile-max-autotune")
    contest = SimpleNamespace(reference=torch.nn.Linear(1, 1), pixels=torch.zeros(4, 1), baselines=dict.fromkeys(names))
    budget, told = time_budget.TimeBudget(limit, 0.0), []
    for batch, later in ((1, {4: 0.0}), (4, {})):
        ours = rounds.Provider("vit_fast", None, {"status": "ok"}, ours=True)
        baselines_ = [rounds.Provider(name, lambda: None, {"status": "ok"}) for name in names]
        compare._bench_batch(settings, contest, batch, [ours, *baselines_], budget, later, lambda *rest: None)
        told += [baseline.row["status"] for baseline in baselines_]
    short = {"not timed: no time left to compile it": "no time"}
    short["not timed: not compiled in the 20 s that were left for it"] = "late"
    assert [short.get(status, status) for status in told] == statuses
    assert clock.time <= limit


def test_a_deadline_interrupts():
    with pytest.raises(time_budget.OutOfTime), time_budget.deadline(0.01):
        time.sleep(60)
    with time_budget.deadline(float("inf")):
        pass
