"""The baselines of a CPU: other inference engines and frozen torch.compile; weights; peak memory; default variants.

References: the rows that the command line writes for tiny models, held to float64 by the parity rule, and what the
libraries themselves say of their threads and of what they froze.
"""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vit_fast.kernels import folding, reference

import vit_fast
from vit_fast import backends, cli, parity
from vit_fast.bench import baselines, calibration, compare, engines, measure, peak_rss, providers, rounds, weights
from vit_fast.bench.settings import Settings
from vit_fast.cli import bench as flags_of_bench
from vit_fast.cli import report
from vit_fast.precisions import FOLDED, PRECISIONS, Precision
from vit_fast.precisions.base import folding_arguments

TINY = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "depth=2", "--device", "cpu"]
QUICK = ["bench", *TINY, "--num-bench-iter", "3", "--num-warm-iter", "1", "--time-budget", "0"]


def run(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """``bench(*flags)``: (exit status, {provider: row of the first batch size})."""
    monkeypatch.setattr(measure, "matmul_peaks", lambda dtype, device, *product: (0.25, 0.125))
    monkeypatch.setattr(engines, "CALIBRATION_IMAGES", 8)

    def call(*flags):
        path = tmp_path / "rows.json"
        code = run(*QUICK, "-b", "2", "--results-file", path, *flags)
        return code, {row["provider"]: row for row in json.loads(path.read_text())}

    return call


@pytest.fixture
def installed(peer):
    """``installed(name)``: skips where a package is absent that only the extra openvino brings."""

    def find(name):
        if name in ("openvino", "nncf"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed: the extra openvino has it")
        else:
            peer(name)

    return find


ENGINES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "onnxruntime-int8": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_runs_the_same_network(name, installed, bench, capsys):
    assert tuple(sorted(ENGINES)) == tuple(sorted(providers.ENGINES))
    for package in ENGINES[name]:
        installed(package)
    code, rows = bench("--baselines", f"eager,{name}")
    assert code == 0
    ours, eager, engine = rows["vit_fast"], rows["eager"], rows[name]
    assert engine["status"] == "ok" and engine["parity_passed"] and engine["infer_samples_per_sec"] > 0
    title = "OpenVINO 2" if name.startswith("openvino") else "ONNX Runtime 1"
    assert engine["engine"].startswith(title) and f"{torch.get_num_threads()} " in engine["engine_settings"]
    assert engine["first_call_s"] > 0 and engine["peak_memory_mib"] is None and "attention" not in (engine["status"],)
    assert engine["attention"] is None and eager["engine"] is None
    shown = capsys.readouterr().out
    assert f"{name}: {title}" in shown and "rms error" in " ".join(shown.split())
    if name.endswith("int8"):
        assert 1e-3 < engine["parity_relative_error"] < 0.1 and engine["product_dtype"] == "int8"
        assert engine["parity_allowed"] is None and engine["parity_allowed_relative_error"] == engines.INT8_LIMIT
        assert engine["matmul_peak_tflops"] is None
        assert ours["best_baseline"] == "eager"  # products in int8 are no baseline of products in float32
        assert f"What int8 costs, the norm of the errors against float64 over that of the logits: {name}" in shown
    else:
        assert engine["parity_relative_error"] < 1e-5 and engine["product_dtype"] == "float32"
        assert engine["parity_allowed"] > engine["parity_error"]
        assert ours["best_baseline"] in ("eager", name) and ours["speedup_vs_best_baseline"] <= 1.5
    if name == "openvino-int8":
        assert engine["calibration"] == "8 synthetic images with the spectrum of photographs"
        assert "NNCF" in engine["engine"]


def test_an_engine_computes_16_bit_weights_as_near_as_it_can(installed, bench):
    for package in ENGINES["onnxruntime"]:
        installed(package)
    code, rows = bench("--baselines", "eager,onnxruntime", "--precision", "bfloat16", "--variants", "plain")
    eager, engine = rows["eager"], rows["onnxruntime"]
    assert code == 0 and engine["status"] == "ok" and engine["product_dtype"] == "float32"
    assert "it has no bfloat16 here: float32, rounded weights" in engine["engine_settings"]
    assert engine["parity_relative_error"] < 1e-2 * eager["parity_relative_error"]  # float32 arithmetic
    assert rows["vit_fast"]["best_baseline"] in ("eager", "onnxruntime")


@pytest.mark.parametrize(
    ("missing", "name", "extra"),
    [
        ("openvino", "openvino", "openvino"),
        ("onnxruntime", "onnxruntime-int8", "onnxruntime"),
        ("onnxscript", "onnxruntime", "onnxruntime"),
    ],
)
def test_an_absent_engine_names_its_extra(missing, name, extra, peer, bench, monkeypatch, capsys):
    if missing == "onnxscript":
        peer("onnxruntime")
    monkeypatch.setitem(sys.modules, missing, None)
    code, rows = bench("--baselines", f"eager,{name}")
    told = f"not timed: {missing} is not installed; pip install 'vit-fast[{extra}]' brings it"
    assert code == 0 and rows[name]["status"] == told and rows["eager"]["status"] == "ok"
    assert f"{name}: {told}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8"])
def test_an_engine_out_of_parity_is_not_timed(name, installed, bench, monkeypatch):
    for package in ENGINES[name]:
        installed(package)
    shipped = engines.OnnxRuntime.__call__
    monkeypatch.setattr(engines.OnnxRuntime, "__call__", lambda self, pixels: shipped(self, pixels).roll(1, dims=1))
    code, rows = bench("--baselines", f"eager,{name}")
    assert code == 0 and rows[name]["status"] == "not timed: parity failed"
    assert rows[name]["parity_relative_error"] > engines.INT8_LIMIT and rows[name]["infer_samples_per_sec"] is None


def test_a_converter_that_fails_is_a_row(bench, monkeypatch):
    monkeypatch.setattr(engines, "build", lambda *rest: 1 / 0)
    code, rows = bench("--baselines", "eager,openvino")
    assert code == 0 and rows["eager"]["status"] == "ok"
    assert rows["openvino"]["status"] == "not timed: openvino cannot build it: ZeroDivisionError: division by zero"


def test_an_engine_that_takes_too_long_to_make_is_a_row(bench, monkeypatch):
    def build(*rest):
        raise compare.OutOfTime

    monkeypatch.setattr(engines, "build", build)
    code, rows = bench("--baselines", "openvino", "--time-budget", "100")
    assert code == 0 and rows["openvino"]["status"].startswith("not timed: not made in the ")


def test_int8_is_judged_by_the_norm_of_its_errors():
    golden = torch.linspace(-1, 1.5, 40, dtype=torch.float64).reshape(4, 10)
    for factor, passes in ((0.999, True), (1.001, False), (math.nan, False)):
        logits = golden * (1 + factor * engines.INT8_LIMIT)
        verdict = engines.judge(parity.compare(logits, golden, golden, torch.float32))
        assert verdict.passed is passes


def _plain_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7)).eval()


def _no_calibration():
    raise AssertionError("only static quantisation is calibrated")


@pytest.mark.parametrize("threads", [1, 2])
def test_engines_take_the_threads_of_torch_and_any_layout(threads, installed, tmp_path):
    for package in ENGINES["onnxruntime"]:
        installed(package)
    names = ["onnxruntime", *["openvino"] * (importlib.util.find_spec("openvino") is not None)]
    pixels, model, before = torch.randn(4, 3, 8, 8), _plain_model(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in names:
            engine, facts = engines.build(name, model, pixels, tmp_path, _no_calibration)
            for images in (pixels, pixels.to(memory_format=torch.channels_last), pixels[:1]):
                torch.testing.assert_close(engine(images), model(images), rtol=1e-4, atol=1e-5)
            again = engines.load(name, str(engine.path), engine.precision)
            assert torch.equal(again(pixels), engine(pixels)) and f"{threads} " in facts["engine_settings"]
            if name == "openvino":
                assert {c.get_property("INFERENCE_NUM_THREADS") for c in engine.compiled.values()} == {threads}
            else:
                assert {s.get_session_options().intra_op_num_threads for s in engine.sessions.values()} == {threads}
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_export_leaves_no_file(installed, tmp_path, monkeypatch):
    for package in ENGINES["onnxruntime"]:
        installed(package)

    def export(model, arguments, path, **words):
        path.write_bytes(b"half of a model")
        raise compare.OutOfTime

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(compare.OutOfTime):
        engines.build("onnxruntime", _plain_model(), torch.randn(1, 3, 8, 8), tmp_path, _no_calibration)
    assert list(tmp_path.iterdir()) == []


def test_calibration_images_are_the_users_or_synthetic(tmp_path):
    from PIL import Image

    config = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = SimpleNamespace(pretrained_cfg=config, patch_embed=SimpleNamespace(img_size=(32, 48)))
    settings = Settings("m", (1,), torch.device("cpu"))
    images, source = calibration.load(settings, model, 5)
    assert images.shape == (5, 3, 32, 48) and "5 synthetic" in source
    assert torch.equal(images, calibration.load(settings, model, 5)[0])
    assert images.min() >= -2 and images.max() <= 2 and 0.2 < images.std() < 2
    neighbours = (images[..., 1:] - images[..., :-1]).std() / images.std()
    assert neighbours < 0.9  # of white noise it is 1.4
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    images, source = calibration.load(Settings("m", (1,), torch.device("cpu"), images=tmp_path), model, 5)
    assert images.shape == (5, 3, 32, 48) and str(tmp_path) in source and (images[:, 0] == 2).all()


def test_freezing_makes_constants_of_the_weights(monkeypatch):
    """``freeze`` tells which inputs of a graph are left: the pixels alone. With the option of torch.compile all are."""
    import torch._inductor.freezing as freezing

    shipped, left = freezing.freeze, []

    def freeze(*arguments):
        graph, indices = shipped(*arguments)
        left.append(len(indices))
        return graph, indices

    monkeypatch.setattr(freezing, "freeze", freeze)
    model, pixels = _plain_model(), torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    with torch.inference_mode():
        baselines.compiled_model(model, "compile")(pixels)
        assert left == []
        compiled = baselines.compiled_model(model, "compile-freezing")  # not the graph of the first
        torch.testing.assert_close(compiled(pixels), model(pixels))
        assert left == [1] and not torch._inductor.config.freezing
        compiled(pixels)
        baselines.compiled_model(model, "compile")(pixels)
        assert left == [1]


def test_kinds_of_weights():
    import timm

    def made(kind):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
        weights.fill(model, kind)
        return model

    untouched, moved, structured = (made(kind).state_dict() for kind in ("initial", "random", "structured"))
    torch.manual_seed(0)
    fresh = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).state_dict()
    assert all(torch.equal(untouched[name], fresh[name]) for name in fresh)
    assert all(not torch.equal(moved[name], fresh[name]) for name in fresh)
    again = made("structured").state_dict()
    assert all(torch.equal(structured[name], again[name]) for name in fresh)
    scales = [structured[f"{name}.weight"] for name in ("blocks.0.norm1", "blocks.0.norm2", "norm")]
    assert all(0.4 < each.log().std() < 0.8 for each in scales)
    _, second, third = torch.stack(scales).prod(0).sort(descending=True).values[:3]
    assert second > 3 * third  # of 192 channels the same two are outliers in all three
    matrix, before = structured["blocks.0.mlp.fc1.weight"], fresh["blocks.0.mlp.fc1.weight"]
    norms = matrix.norm(dim=0).sort(descending=True).values
    slope = (norms[99] / norms[0]).log() / math.log(100)
    assert -0.6 < slope < -0.4 and 0.8 < matrix.norm() / before.norm() < 1.25


@pytest.mark.parametrize("kind", ["initial", "structured"])
def test_weights_of_a_kind_are_timed_and_told(kind, bench):
    code, rows = bench("--baselines", "eager", "--weights", kind)
    assert code == 0 and {row["weights"] for row in rows.values()} == {kind}
    assert all(row["parity_passed"] and row["parity_relative_error"] < 1e-5 for row in rows.values())


def test_peak_rss_is_of_the_providers_own_process():
    """The memory that this process once held is no part of it: ru_maxrss would begin there and hide the growth."""
    settings = Settings("vit_base_patch16_224", (1,), torch.device("cpu"), model_kwargs={"depth": 6})
    before = peak_rss._peak()
    torch.ones(1 << 28).sum()
    assert peak_rss._peak() > before
    found = peak_rss.columns(settings, "vit_fast", 1, torch.zeros(1, 3, 224, 224), {})
    assert found["peak_rss_method"] == peak_rss.METHOD
    assert 160 < found["peak_rss_mib"] < 600  # the weights have 166 MiB


def test_peak_rss_that_fails_says_why():
    settings = Settings("vit_tiny_patch16_224", (1,), torch.device("cpu"), model_kwargs={"depth": -1.5})
    found = peak_rss.columns(settings, "eager", 1, torch.zeros(1, 3, 224, 224), {})
    assert found["peak_rss_mib"] is None and found["peak_rss_method"].startswith("not measured: ")
    assert "Error" in found["peak_rss_method"]


def test_peak_rss_is_a_column_when_asked_for(bench, monkeypatch, capsys):
    asked = []

    def columns(settings, name, batch, pixels, others):
        asked.append((name, batch, tuple(pixels.shape)))
        return {"peak_rss_mib": 4321.0, "peak_rss_method": peak_rss.METHOD}

    monkeypatch.setattr(peak_rss, "columns", columns)
    code, rows = bench("--baselines", "eager", "--peak-rss")
    assert code == 0 and asked == [("vit_fast", 2, (2, 3, 32, 32)), ("eager", 2, (2, 3, 32, 32))]
    assert {row["peak_rss_mib"] for row in rows.values()} == {4321.0}
    shown = capsys.readouterr().out
    assert "4321" in shown and f"Peak RSS: {peak_rss.METHOD}." in shown
    code, rows = bench("--baselines", "eager")
    assert len(asked) == 2 and "peak_rss_mib" not in rows["eager"]


class Int8(Precision):
    """A precision of float32 weights whose products count as int8: its weights keep four bits of their mantissa."""

    name = "toy-int8"
    operation = "toy_int8_blocks"
    record = folding.FoldedBlock
    weight_dtypes = (torch.float32, torch.bfloat16)
    products = "integers"
    budget = parity.Budget(largest=2.0, norm=1.25, roundoff=2.0**-4)
    variant, graphed_variant = "toy-int8", "toy-int8-graphed"
    reference = staticmethod(reference.prepared_blocks)

    def check(self, x, weights):
        pass

    def fold(self, params):
        block = folding.prepare_block(*folding_arguments(params))
        return block._make((t.to(folding.E4M3).to(t.dtype) if t.dim() == 2 else t) for t in block)

    def product_dtype(self, weight_dtype):
        return torch.int8

    def why_emulated(self, device):
        return None if device.type == "cpu" else "a toy"


@pytest.fixture
def toy(monkeypatch):
    """The toy as a further precision, and float32 among the dtypes of ``prepared``, as on a CPU with its extension."""
    precision = Int8()
    monkeypatch.setitem(PRECISIONS, precision.name, precision)
    for name, graphed in ((precision.variant, False), (precision.graphed_variant, True)):
        variant = providers.Variant(f"vit_fast-{name}", precision, graphed)
        monkeypatch.setitem(providers.VARIANTS, name, variant)
        monkeypatch.setitem(providers.PRECISION_OF, variant.provider, precision)
    monkeypatch.setattr(FOLDED, "weight_dtypes", (torch.float32, torch.float16, torch.bfloat16), raising=False)
    monkeypatch.setattr(type(FOLDED), "check", lambda self, x, weights: None)


@pytest.mark.parametrize(
    ("flags", "reasons", "wanted"),
    [
        ([], (), ("plain", "prepared", "int8", "toy-int8")),
        ([], ("it is not built",), ("plain",)),
        (["--precision", "bf16"], (), ("plain", "prepared", "int8", "toy-int8")),
        (["--precision", "bf16"], ("it is not built",), ("plain", "prepared")),
        (["--precision", "fp16"], (), ("plain", "prepared", "int8")),
        (["--amp"], (), ("plain",)),
        (["--variants", "prepared,toy-int8"], ("it is not built",), ("prepared", "toy-int8")),
    ],
)
def test_default_variants_are_what_the_objects_allow(flags, reasons, wanted, toy, monkeypatch):
    asked = []
    unavailable = backends.unavailable
    monkeypatch.setattr(
        backends, "unavailable", lambda name, device: reasons if name == "cpu" else unavailable(name, device)
    )
    monkeypatch.setattr(compare, "run", lambda settings, *rest: asked.append(settings) or False)
    monkeypatch.setattr(report, "print_report", lambda *rest: None)
    assert run("bench", "--device", "cpu", *flags) == 0
    assert asked[0].variants == wanted and asked[0].baselines == flags_of_bench.DEFAULT_BASELINES["cpu"]


def test_variants_of_float32_weights_run(toy, bench, capsys):
    code, rows = bench("--baselines", "eager", "--variants", "prepared,toy-int8")
    ours = rows["vit_fast-prepared"], rows["vit_fast-toy-int8"]
    assert code == 0 and [row["status"] for row in ours] == ["ok", "ok"]
    assert [row["product_dtype"] for row in ours] == ["float32", "int8"]
    assert ours[1]["parity_relative_error"] > 100 * ours[0]["parity_relative_error"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "What int8 costs" in shown and "vit_fast-toy-int8 against the best baseline (eager)" in shown
    assert "Parity with the plain PyTorch form of the same int8 model holds" in shown


def test_int8_is_compared_with_int8(toy):
    steps = {"vit_fast": 4, "vit_fast-toy-int8": 2, "eager": 6, "openvino": 5, "openvino-int8": 1}
    found = {}
    for name, step in steps.items():
        row = {"status": "ok", "matmul_peak_tflops": None}
        ours = name.startswith("vit_fast")
        found[name] = rounds.Provider(name, None, row, ours=ours, rounds=[[step]] * 3, latencies=[step] * 3)
    rounds.fill_in(found.values(), SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(flops=1e12), 5)
    assert found["vit_fast"].row["best_baseline"] == "openvino"
    assert found["vit_fast-toy-int8"].row["best_baseline"] == "openvino-int8"


@pytest.mark.parametrize(
    "flags", [["--baselines", "openvino"], ["--baselines", "eager,compile-freezing"], ["--peak-rss"]]
)
def test_what_is_of_a_cpu_is_refused_on_a_gpu(flags, monkeypatch, capsys):
    monkeypatch.setattr(flags_of_bench.options, "target_device", lambda text: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compare, "run", pytest.fail)
    assert run("bench", *flags) == 2
    assert "it on a CPU only" in " ".join(capsys.readouterr().err.split())


def test_every_package_of_an_extra_is_declared():
    """Errors name an extra, and pyproject.toml has the packages of it that the engines import."""
    import tomllib
    from pathlib import Path

    text = Path(vit_fast.__file__).parents[1].joinpath("pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert {"openvino", "nncf"} <= set(extras["openvino"])
    assert {"onnxruntime", "onnx", "onnxscript"} <= set(extras["onnxruntime"])
