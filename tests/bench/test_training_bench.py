"""``vit-fast bench --bench train``: rows with figures of both parts, and gradients held to float64."""

import csv
import json

import pytest
import torch

from vit_fast import cli
from vit_fast.bench import measure, peak_rss, training, training_step
from vit_fast.cli import bench as flags

WORDS = [
    "bench",
    "--bench",
    "train",
    "--model",
    "vit_tiny_patch16_224",
    "--img-size",
    "32",
    "--model-kwargs",
    "depth=2",
]
WORDS += ["--device", "cpu", "--num-bench-iter", "6", "--num-warm-iter", "1", "-b", "2"]


def run(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture(autouse=True)
def no_peak_measurement(monkeypatch):
    monkeypatch.setattr(measure, "matmul_peaks", lambda dtype, device, *product: (0.25, 0.125))


def test_rows_have_both_parts_and_a_verdict(tmp_path, monkeypatch, capsys):
    asked = []

    def columns(settings, name, batch, pixels, others):
        asked.append((settings.bench, name))
        return {"peak_rss_mib": 4321.0, "peak_rss_method": peak_rss.METHOD}

    monkeypatch.setattr(peak_rss, "columns", columns)
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    words = ("--baselines", "eager,torchvision", "--results-file", path, "--plot", plot, "--peak-rss")
    assert run(*WORDS, *words) == 0
    rows = json.loads(path.read_text())
    assert [row["provider"] for row in rows] == ["vit_fast", "eager", "torchvision"]
    assert asked == [("train", row["provider"]) for row in rows]
    for row in rows:
        assert row["status"] == "ok" and row["bench"] == "train" and row["train_batch_size"] == 2
        assert not [name for name in row if name.startswith("infer_")]
        for prefix in training.PREFIXES.values():
            assert row[f"{prefix}samples_per_sec"] == pytest.approx(2000 / row[f"{prefix}step_time"])
            assert row[f"{prefix}speedup_vs_eager"] > 0
            flop = row["operations_step_gflop"] * 1e9
            assert row[f"{prefix}achieved_tflops"] == pytest.approx(flop / row[f"{prefix}step_time"] * 1e-9)
            assert row[f"{prefix}percent_of_peak"] == pytest.approx(400 * row[f"{prefix}achieved_tflops"])
        kinds = {name: values for name, *values in training.operations_of(row)}
        assert sum(gflop for _, gflop, _ in kinds.values()) == pytest.approx(row["operations_step_gflop"])
        # Each product once forward and twice backward; no gradient of the pixels, and attention's scores once more.
        images = 2 * 2 * row["train_gmacs"]
        assert 2.7 * images < row["operations_step_gflop"] < 3.1 * images and kinds["linear"][2] > 0
        # Weights, their gradients, and two moments of AdamW.
        assert row["peak_memory_mib"] > 3 * 4 * row["param_count"] * 1e6 / 2**20 and row["peak_rss_mib"] == 4321.0
    ours = rows[0]
    assert (
        ours["parity_passed"] and ours["parity_error"] <= ours["parity_allowed"] and ours["vit_fast_backend"] == "torch"
    )
    for prefix in training.PREFIXES.values():
        assert ours[f"{prefix}compared_rounds"] == 6 and ours[f"{prefix}best_baseline"] in ("eager", "torchvision")
        low, middle, high = (ours[f"{prefix}paired_speedup_vs_eager{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= middle <= high
    shown = capsys.readouterr().out
    assert "Operations of forward and backward" in shown and "TFLOP/s" in shown
    assert "Batch 2, step: vit_fast is" in shown and "Batch 2, forward+backward: vit_fast is" in shown
    assert "gradients, each as a share of the largest of its parameter" in shown and plot.stat().st_size > 5000


def test_csv_has_timms_names_first(tmp_path):
    path = tmp_path / "rows.csv"
    assert run(*WORDS, "--baselines", "none", "--results-file", path) == 0
    with path.open(newline="") as file:
        names = csv.DictReader(file).fieldnames
    assert names[:5] == ["model", "provider", "train_samples_per_sec", "train_step_time", "train_batch_size"]


def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch):
    own = training_step.gradients

    def scaled(module, pixels, settings):
        found = own(module, pixels, settings)
        if type(module).__module__.startswith("vit_fast"):
            found["blocks.1.mlp.fc1.weight"] = found["blocks.1.mlp.fc1.weight"] * 1.001
        return found

    monkeypatch.setattr(training_step, "gradients", scaled)
    path = tmp_path / "rows.json"
    assert run(*WORDS, "--baselines", "eager", "--results-file", path) == 1
    assert [row["status"] for row in json.loads(path.read_text())] == ["parity failed", "ok"]


def test_a_call_is_a_step_of_adamw():
    from vit_fast.bench.settings import Settings

    settings = Settings("", (2,), torch.device("cpu"))
    module = torch.nn.Linear(4, 3)
    pixels, before = torch.randn(2, 4), [p.detach().clone() for p in module.parameters()]
    calls = training_step.calls(module, module, pixels, settings)
    loss = calls[training_step.FORWARD_BACKWARD]()
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(module.parameters(), before))
    expected = torch.nn.functional.cross_entropy(module(pixels), training_step.labels_for(module(pixels)))
    assert torch.equal(loss, expected.detach()) and torch.equal(calls[training_step.STEP](), loss)
    for parameter, old in zip(module.parameters(), before):
        # The first step of Adam moves every number by the learning rate, against its gradient; the decay is below it.
        assert ((parameter - old).abs() <= 1.1 * training_step.LEARNING_RATE + 1e-7).all() and not torch.equal(
            parameter, old
        )


@pytest.mark.parametrize(
    "words,told",
    (
        (("--bench", "both"), "wanted inference or train"),
        (("--variants", "plain"), "wanted it without --bench train"),
        (("--baselines", "openvino"), "eager, torchvision, transformers, compile or compile-max-autotune"),
    ),
)
def test_what_has_no_training_is_refused(words, told, capsys):
    assert run(*WORDS, *words) == 2
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert training.BASELINES == flags.TRAIN_BASELINES


def test_a_family_is_refused(capsys):
    assert run("bench", "--bench", "train", "--family", "clip") == 2
    assert "wanted it without --bench train" in " ".join(capsys.readouterr().err.replace("│", " ").split())
