"""The command line from its flags to its files, on tiny models on the CPU.

References: numbers counted by hand (FLOPs, quantiles, pixels), and timm for the logits. The parity rule is tried from
both sides of its limit. Models have two blocks and 32 pixels a side: what is tested is the harness, not its figures.
"""

import csv
import json
import subprocess
import sys
import time

import pytest
import torch

import vit_fast
from vit_fast import cli
from vit_fast.cli import compare, measure, parity, photographs, report

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
        monkeypatch.setattr(compare.measure, "matmul_peak", lambda dtype, device: 0.25)


@pytest.fixture
def json_file(tmp_path):
    return tmp_path / "rows" / "bench.json"


def test_bench_measures_every_provider_and_batch_size(json_file, tmp_path, capsys):
    plot = tmp_path / "bench.png"
    code = run(*QUICK, "-b", "1,3", "--rivals", "eager", "--results-file", json_file, "--plot", plot)
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
        assert row["num_bench_iter"] == 3 and row["peak_memory_mib"] > 4 * row["param_count"] * 1e6 / 2**20
        assert row["torch"] == torch.__version__ and row["timm"] and row["date"].startswith("20")
    ours, eager = rows[2:]
    ratio = ours["infer_samples_per_sec"] / eager["infer_samples_per_sec"]
    assert ours["speedup_vs_eager"] == pytest.approx(ratio) and eager["speedup_vs_eager"] == 1
    assert ours["vit_fast_backend"] == "torch" and "torch attention ×2" in ours["vit_fast_operations"]
    assert plot.stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "vit_fast ran on its backend torch" in shown and "say nothing about a GPU" in shown
    assert "Parity with timm eager holds" in shown and str(json_file) in shown


def test_csv_has_timms_columns_first(tmp_path):
    path = tmp_path / "bench.txt"
    assert run(*QUICK, "-b", "2", "--rivals", "none", "--results-file", path, "--results-format", "csv") == 0
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        (row,) = reader
    assert reader.fieldnames[:8] == list(report.COLUMNS[:8])
    assert float(row["infer_samples_per_sec"]) > 0 and row["provider"] == "vit_fast" and row["status"] == "ok"


@pytest.mark.parametrize("flags", [["--precision", "bfloat16"], ["--amp", "--channels-last"]], ids=["bf16", "amp"])
def test_low_precision_keeps_parity(flags, json_file):
    assert run(*QUICK, "-b", "2", "--rivals", "eager", *flags, "--results-file", json_file) == 0
    row = json.loads(json_file.read_text())[0]
    assert row["parity_passed"] and 1e-4 < row["parity_eager_error"] < 1


def test_compiled_rival_is_timed_and_its_compilation_apart(json_file):
    words = ["--model-kwargs", "depth=1", "-b", "1", "--rivals", "compile", "--time-budget", "0"]
    assert run(*QUICK, *words, "--results-file", json_file) == 0
    row = json.loads(json_file.read_text())[1]
    assert row["provider"] == "compile" and row["status"] == "ok"
    assert row["first_call_s"] > 3 * row["infer_step_time"] / 1000 and row["parity_passed"]


@pytest.mark.gpu
def test_bench_on_a_gpu(json_file):
    words = ["--device", "cuda", "-b", "1,8", "--rivals", "eager,compile-max-autotune", "--num-bench-iter", "12"]
    code = run("bench", "-m", "vit_tiny_patch16_224", "--model-kwargs", "depth=2", *words, "--results-file", json_file)
    rows = json.loads(json_file.read_text())
    assert code == 0 and [row["status"] for row in rows] == ["ok"] * 6
    for row in rows:
        assert row["precision"] == "bfloat16" and row["num_bench_iter"] == 12
        assert 0 < row["percent_of_peak"] < 100 and row["peak_memory_mib"] > 1
        assert 0 < row["infer_step_time"] and 0 < row["latency_ms"]
    assert rows[0]["vit_fast_backend"] == "triton"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_json_stays_json_where_a_figure_is_not_finite(bad, tmp_path):
    path = tmp_path / "rows.json"
    report.write_rows([{"model": "m", "parity_error": bad}], path, "json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)[0]["parity_error"] is None


def test_one_channel(json_file):
    words = ["--model-kwargs", "in_chans=1", "-b", "2", "--rivals", "none", "--results-file", json_file]
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


def test_family_peers_have_the_familys_numbers():
    from vit_fast.cli import families
    from vit_fast.cli.bench import FAMILIES

    assert set(families.FAMILIES) == set(FAMILIES)
    with torch.no_grad():
        for name, peer in (("deit", "timm"), ("clip", "open_clip")):
            model, rivals = families.contestants(name, compare._perturb)
            x = torch.randn(1, 3, 224, 224)
            torch.testing.assert_close(model(x), rivals[peer](x), rtol=1e-4, atol=1e-4)


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
    assert run(*QUICK, "-b", "2", "--rivals", "eager", "--results-file", json_file) == 1
    ours, eager = json.loads(json_file.read_text())
    assert ours["status"] == "parity failed" and ours["parity_error"] > ours["parity_allowed"]
    assert eager["status"] == "not timed: vit_fast: parity failed"
    assert ours["infer_samples_per_sec"] is None and eager["infer_samples_per_sec"] is None
    assert "Parity with timm eager FAILS" in capsys.readouterr().out


def test_forced_backend_that_cannot_run_fails(capsys):
    assert run(*QUICK, "-b", "1", "--rivals", "none", "--backend", "cuda") == 1
    assert "failed: UnsupportedError" in capsys.readouterr().out


def test_out_of_memory_is_a_row_and_the_rest_goes_on(json_file, monkeypatch):
    shipped = measure.step_times

    def step_times(call, count, device):
        if call().shape[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return shipped(call, count, device)

    monkeypatch.setattr(measure, "step_times", step_times)
    assert run(*QUICK, "-b", "2,1", "--rivals", "eager", "--results-file", json_file) == 0
    assert [row["status"] for row in json.loads(json_file.read_text())] == ["out of memory"] * 2 + ["ok"] * 2


def test_a_used_up_time_budget_skips_compilation_and_takes_three_rounds(json_file, capsys):
    words = ["-b", "1", "--rivals", "eager,compile", "--time-budget", "0.001", "--num-bench-iter", "50"]
    assert run("bench", *TINY, *words, "--results-file", json_file) == 0
    ours, eager, compiled = json.loads(json_file.read_text())
    assert ours["num_bench_iter"] == eager["num_bench_iter"] == compare.MIN_ROUNDS
    assert compiled["status"] == "not timed: no time left to compile it"
    assert "Timed calls: 3 of 50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named", "wanted"),
    [
        (["--precision", "int8"], "--precision", "float32, bfloat16 or float16"),
        (["--rivals", "eager,tensorrt"], "--rivals", "eager, compile or compile-max-autotune"),
        (["--family", "vgg"], "--family", "clip, deit, hybrid, scratch, lanl, t2t or all"),
        (["--backend", "metal"], "--backend", "auto, triton, cuda, cpu or torch"),
        (["--batch-size", "8,0"], "--batch-size", "whole number of 1 or more"),
        (["--batch-size", "many"], "--batch-size", "whole number of 1 or more"),
        (["--img-size", "-3"], "--img-size", "whole number of 1 or more"),
        (["--num-bench-iter", "0"], "--num-bench-iter", "whole number of 1 or more"),
        (["--time-budget", "-1"], "--time-budget", "0 or more"),
        (["--device", "tpu"], "--device", "cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device", "cpu, cuda or cuda:N"),
        (["--amp-dtype", "bfloat16"], "--amp-dtype", "together with --amp"),
        (["--amp", "--precision", "float16"], "--amp", "float32"),
        (["--model-kwargs", "depth"], "--model-kwargs", "key=value"),
        (["--results-file", "rows.xlsx"], "--results-file", ".csv or .json"),
        (["--results-format", "json"], "--results-format", "--results-file"),
        (["--images", "nowhere"], "--images", "a folder of photographs"),
        (["--plot", "bars.doc"], "--plot", ".png, .svg or .pdf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags_are_named_with_what_is_wanted(flags, named, wanted, capsys):
    assert run("bench", *flags) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert named in message and wanted in message


@pytest.mark.parametrize(
    ("words", "named"),
    [(["-m", "vit_colossal"], "vit_colossal"), (["-m", "resnet18"], "resnet18")],
    ids=["unknown", "not a ViT"],
)
def test_failures_are_one_line_without_a_traceback(words, named, capsys):
    assert run("bench", *words, "--device", "cpu") == 1
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
    assert run(*QUICK, "-b", "3", "--rivals", "none", "--images", folder, "--results-file", json_file) == 0
    warning = capsys.readouterr().err
    assert "skipped" in warning and "broken.jpg" in warning and ".hidden" not in warning
    assert json.loads(json_file.read_text())[0]["images"] == f"3 photographs of {folder}"


def test_photographs_come_in_the_order_of_their_names(folder):
    loaded = photographs.load(folder, 3, 32, 32, (0.0,) * 3, (1.0,) * 3)
    assert loaded.pixels.mean((2, 3)).argmax(1).tolist() == [1, 0, 2]
    assert len(loaded.skipped) == 1


def test_a_folder_without_photographs_is_an_error(tmp_path):
    with pytest.raises(cli.CommandError, match=r"--images.*empty"):
        photographs.load(tmp_path, 1, 32, 32, (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(cli.CommandError, match=r"none of its 1 files.*notes\.txt"):
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


def test_matmul_peak_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.undo()
    steps = {1024: [0.5, 0.25], 2048: [1.0, 4.0]}
    sizes = []
    monkeypatch.setattr(measure, "seconds", lambda call, device: (sizes.append(call().shape[0]) or 1e-3, None))
    monkeypatch.setattr(measure, "step_times", lambda call, count, device: steps[call().shape[0]])
    assert measure.matmul_peak(torch.float32, torch.device("cpu")) == pytest.approx(2 * 2048**3 / 1.0 / 1e12)
    assert sizes == [1024, 1024, 2048, 2048]


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
