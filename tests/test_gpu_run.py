"""benchmarks/gpu.py: the one command of a GPU, as far as it runs without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import vit_fast
from vit_fast.cli.bench import bench

PATH = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
GROUPS = "tests,sanitizer,operations,models,families"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def test_a_machine_without_a_gpu_is_told_and_recorded(tmp_path):
    words = [sys.executable, "-P", PATH, "--out", tmp_path]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not measured: torch finds no CUDA device" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"] == [] and summary["torch"] == torch.__version__ and "missing" in summary


def test_an_old_gpu_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(gpu.machine, "gpu_state", lambda device: {"driver": "580.1"})
    properties = type("Properties", (), {"total_memory": 15 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    known = gpu.facts()
    assert known["missing"] == "the GPU has capability 7.5, wanted 8.0 or more"
    assert known["memory_gib"] == 15.0 and known["driver"] == "580.1"


@pytest.mark.parametrize(
    "code,seconds,verdict",
    (
        ("print('done')", 60, "passed"),
        ("import sys; print('half'); sys.exit(3)", 60, "failed (3)"),
        ("print('half', flush=True); import time; time.sleep(600)", 3, "out of time"),
    ),
)
def test_a_stage_keeps_what_it_had(gpu, tmp_path, code, seconds, verdict):
    result = gpu.run(gpu.Stage("a stage", ("-c", code), 60), tmp_path, seconds)
    assert result["verdict"] == verdict and result["seconds"] < 30
    assert (tmp_path / "a-stage.log").read_text().strip() in ("done", "half")


def test_commands_are_words_that_the_programs_know(gpu, tmp_path):
    plan = gpu.stages(tmp_path, GROUPS)
    assert len({stage.name for stage in plan}) == len(plan)
    app = typer.Typer()
    app.command()(bench)
    command = typer.main.get_command(app)
    for stage in plan:
        if "bench" in stage.command:
            command.make_context("bench", list(stage.command[stage.command.index("bench") + 1 :]))
    assert {model for model, _, _ in gpu.MODELS} <= set(vit_fast.list_models())
    assert [stage.name for stage in gpu.stages(tmp_path, "families,tests")] == ["tests", "families"]
    with pytest.raises(typer.BadParameter, match="'model', wanted any of tests"):
        gpu.stages(tmp_path, "model")


def test_a_tool_runs_this_very_python(gpu):
    words = ("-c", gpu._under("env", "WORD=1"), "-c", "import os; print(os.environ['WORD'])")
    assert subprocess.check_output([sys.executable, *words], text=True, timeout=60) == "1\n"
