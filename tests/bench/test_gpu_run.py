"""benchmarks/gpu.py: the one command of a GPU, as far as it runs without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from support.scripts import loaded

import vit_fast
from vit_fast.bench.providers import BASELINES, GPU_BASELINES, PROFILED, VARIANTS
from vit_fast.cli.bench import bench
from vit_fast.cli.check import check
from vit_fast.cli.profile import profile

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
GROUPS = "limits,check,tests,sanitizer,models,training,profile,tune,operations,families"


@pytest.fixture(scope="module")
def gpu():
    with loaded(PATH) as module:
        yield module


def test_a_machine_without_a_gpu_is_told_and_recorded(tmp_path):
    words = [sys.executable, "-P", PATH, "--out", tmp_path]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not measured: torch finds no CUDA device" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["libraries"]) == {"cuda", "cutlass"} and "loaded" not in summary["libraries"].values()
    assert summary["stages"] == [] and summary["torch"] == torch.__version__ and "missing" in summary
    targets = json.loads((tmp_path / "targets.json").read_text())
    assert len(targets) == 15 and {line["verdict"] for line in targets} == {"not measured"}


def test_an_old_gpu_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(gpu.machine, "gpu_state", lambda device: {"driver": "580.1"})
    properties = type("Properties", (), {"total_memory": 15 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    known = gpu.machine.gpu_facts()
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


def test_cold_stages_have_caches_of_their_own_and_no_stage_interprets(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "of-the-user")
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_INTERPRET")
    words = ("-c", f"import json, os; print(json.dumps([os.environ.get(name) for name in {names!r}]))")
    found = {}
    for cold in (False, True):
        gpu.run(gpu.Stage(f"cold {cold}", words, 60, cold), tmp_path, 60)
        found[cold] = json.loads((tmp_path / f"cold-{cold}.log").read_text())
    assert found[False] == ["of-the-user", os.environ.get("TORCHINDUCTOR_CACHE_DIR"), None]
    *caches, interpret = found[True]
    assert interpret is None and "of-the-user" not in caches and len(set(caches)) == 2
    assert not any(Path(cache).parent.exists() for cache in caches)
    assert {stage.cold for stage in gpu.stages(tmp_path, "models")} == {True}


def test_commands_are_words_that_the_programs_know(gpu, tmp_path):
    plan = gpu.stages(tmp_path, GROUPS)
    assert len({stage.name for stage in plan}) == len(plan) and ",".join(gpu.GROUPS) == GROUPS
    for verb in (bench, check, profile):
        app = typer.Typer()
        app.command()(verb)
        command = typer.main.get_command(app)
        own = [stage for stage in plan if verb.__name__ in stage.command]
        assert own
        for stage in own:
            context = command.make_context("verb", list(stage.command[stage.command.index(verb.__name__) + 1 :]))
            for flag, known in (
                ("baselines", BASELINES),
                ("variants", tuple(VARIANTS)),
                ("variant", tuple(VARIANTS)),
                ("provider", PROFILED),
            ):
                assert set((context.params.get(flag) or known[0]).split(",")) <= set(known), stage
    assert [*gpu.ALL.split(","), "scaled-mm"] == list(GPU_BASELINES) and set(
        gpu.LARGE.split(",") + gpu.FEW.split(",")
    ) < set(BASELINES)
    assert {model for model, *_ in gpu.MODELS} <= set(vit_fast.list_models())
    assert set(gpu.SPEEDUPS) <= {model for model, size, *_ in gpu.MODELS if size == 224}
    for stage in plan:
        if "--time-budget" in stage.command:
            budget = float(stage.command[stage.command.index("--time-budget") + 1])
            assert 0 < budget <= stage.seconds - 40
    order = [stage.name.split()[0] for stage in plan]
    assert list(dict.fromkeys(order)) == GROUPS.split(",")
    assert [stage.name for stage in gpu.stages(tmp_path, "families,tests")] == ["tests", "families"]
    with pytest.raises(typer.BadParameter, match="'model', wanted any of limits, check, tests"):
        gpu.stages(tmp_path, "model")


def test_what_triton_says_where_it_cannot_run(gpu, monkeypatch):
    assert (gpu.triton_error(120) is None) == torch.cuda.is_available()
    monkeypatch.setattr(
        gpu.child, "PROBE", "import sys; print('ptxas fatal: no such chip', file=sys.stderr); sys.exit(1)"
    )
    assert gpu.triton_error() == "ptxas fatal: no such chip"
    monkeypatch.setattr(gpu.child, "PROBE", "import os; os.abort()")
    assert gpu.triton_error() == "exit status -6 without a word"
    monkeypatch.setattr(gpu.child, "PROBE", "import time; time.sleep(60)")
    assert gpu.triton_error(0.5) == "a small kernel did not end within 0.5 s"
    monkeypatch.setattr(gpu.child, "PROBE", "import os; assert 'TRITON_INTERPRET' not in os.environ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.triton_error() is None


@pytest.fixture
def machine(gpu, monkeypatch):
    """A GPU that is pretended; stages run as empty commands. The names of what ran, and what Triton says there."""
    ran, says = [], {"error": None, "verdict": "passed"}
    known = {"gpu": "NVIDIA H200", "time": "2026-01-01T00:00:00", "torch": "2.11"}
    monkeypatch.setattr(gpu.machine, "gpu_facts", lambda: dict(known))
    monkeypatch.setattr(gpu, "triton_error", lambda *seconds: says["error"])

    def run(stage, out, seconds):
        ran.append(stage.name)
        return {"stage": stage.name, "verdict": says["verdict"], "seconds": 1.0}

    monkeypatch.setattr(gpu, "run", run)
    return ran, says


def test_a_gpu_on_which_triton_does_not_run_gives_its_limits_alone(gpu, machine, tmp_path, capsys):
    ran, says = machine
    says["error"] = "ptxas fatal: no such chip"
    with pytest.raises(typer.Exit) as end:
        gpu.main(tmp_path, 60.0, GROUPS)
    assert end.value.exit_code == 1 and ran == ["limits"]
    assert json.loads((tmp_path / "summary.json").read_text())["triton_error"] == says["error"]
    assert "ptxas fatal: no such chip" in capsys.readouterr().out


def test_a_full_disk_is_said_and_the_rest_goes_on(gpu, machine, tmp_path, capsys, monkeypatch):
    ran, _ = machine
    full = OSError(28, "No space left on device")

    def run(stage, out, seconds):
        ran.append(stage.name)
        if stage.name == "tests":
            raise full  # its log cannot be made
        return {"stage": stage.name, "verdict": "passed", "seconds": 1.0}

    save, saved = gpu.child.save, []

    def once(path, content):
        saved.append(path)
        if len(saved) == 3:
            raise full
        save(path, content)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.child, "save", once)
    with pytest.raises(typer.Exit) as end:
        gpu.main(tmp_path, 60.0, "limits,tests,tune")
    assert end.value.exit_code == 1 and ran == ["limits", "tests", "tune"]
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["verdict"] for stage in stages] == ["passed", f"not run: {full}", "passed"]
    assert "summary.json was not written: [Errno 28] No space left" in capsys.readouterr().out


@pytest.mark.parametrize("capability,float8", (([8, 0], False), ([8, 9], True), ([10, 0], True)))
def test_what_needs_float8_is_left_out_where_there_is_none(gpu, machine, tmp_path, monkeypatch, capability, float8):
    ran, _ = machine
    known = gpu.machine.gpu_facts() | {"capability": capability}
    monkeypatch.setattr(gpu.machine, "gpu_facts", lambda: dict(known))
    with pytest.raises(typer.Exit):
        gpu.main(tmp_path, 60.0, "models,profile,check")
    names = {f"models {gpu.VIT_B} {gpu.FLOAT8}", "profile fp8 256", "check fp8"}
    assert names & set(ran) == (names if float8 else set()) and ran[0] == "check plain" and len(ran) > 13


def test_the_commit_of_a_copy_is_what_one_says(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.machine, "__file__", str(tmp_path / "vit_fast" / "bench" / "machine.py"))
    monkeypatch.delenv("VIT_FAST_COMMIT", raising=False)
    assert gpu.machine.commit() is None
    monkeypatch.setenv("VIT_FAST_COMMIT", "0123456789ab")
    assert gpu.machine.commit() == "0123456789ab"


def test_runs_into_one_folder_add_up(gpu, machine, tmp_path, capsys):
    _, says = machine
    for only, verdict, status in (("limits,tests", "failed (1)", 1), ("tests,tune", "passed", 0)):
        says["verdict"] = verdict
        with pytest.raises(typer.Exit) as end:
            gpu.main(tmp_path, 60.0, only)
        assert end.value.exit_code == status
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    found = [(stage["stage"], stage["verdict"]) for stage in stages]
    assert found == [("limits", "failed (1)"), ("tests", "passed"), ("tune", "passed")]
    assert "not measured" in capsys.readouterr().out


def _row(provider, batch, speed, size=224, **facts):
    row = {"provider": provider, "infer_batch_size": batch, "infer_samples_per_sec": speed, "status": "ok"}
    row |= {"model": "m", "infer_img_size": size, "infer_gmacs": size**2 / 1000, "device": "cuda:0"}
    row |= {"latency_ms": 1000 * batch / speed, "percent_of_peak": speed / 100}
    row["product_dtype"] = "float8_e4m3" if "fp8" in provider or provider == "scaled-mm" else "bfloat16"
    return row | facts


def _write(gpu, out, model, size, *rows):
    gpu._rows_file(out, model, size).write_text(json.dumps(rows))


def test_targets_are_held_against_the_files(gpu, tmp_path, capsys):
    untimed = {"infer_samples_per_sec": None, "latency_ms": None, "percent_of_peak": None}
    fast = {"best_baseline": "scaled-mm", "parity_relative_error": 0.0512, "parity_eager_relative_error": 0.0061}
    in_float8 = _row("vit_fast-fp8", 256, 9000.0, speedup_vs_best_baseline=1.1, **fast)
    base = [
        in_float8 | {"speedup_vs_best_baseline": 2.25},
        _row("vit_fast-fp8-graphed", 1, 4000.0, latency_ms=0.25, **fast),
        _row("vit_fast", 256, 5000.0, best_baseline="compile", speedup_vs_best_baseline=1.25, cold_cache=True)
        | {"first_call_s": 4.0},
        _row("vit_fast-prepared", 256, 6000.0, best_baseline="compile", speedup_vs_best_baseline=1.5),
        _row("compile", 256, 4000.0, first_call_s=40.0, cold_cache=True),
        _row("compile-max-autotune", 256, 1.0, status="not timed: no time left to compile it", **untimed),
        _row("vit_fast", 1, 500.0, first_call_s=9.0, cold_cache=False),
        _row("vit_fast-graphed", 1, 2000.0, latency_ms=0.5),
        _row("compile-cudagraphs", 1, 1500.0, latency_ms=0.9),
        _row("eager", 8, 1.0, status="out of memory", **untimed),
    ]
    _write(gpu, tmp_path, gpu.VIT_B, 224, *base)
    _write(gpu, tmp_path, gpu.VIT_B, gpu.FLOAT8, in_float8, _row("scaled-mm", 64, 1.0, status="no time", **untimed))
    _write(
        gpu,
        tmp_path,
        gpu.VIT_B,
        512,
        *(_row(f"vit_fast-{w}", 64, s, 512) for w, s in (("prepared", 1e3), ("fp8", 2e3))),
    )
    _write(gpu, tmp_path, gpu.VIT_B, 1024, _row("vit_fast-prepared", 16, 240.0, 1024), _row("eager", 16, 1.0, 1024))
    ours = _row("vit_fast", 256, 900.0, best_baseline="compile", speedup_vs_best_baseline=1.3)
    _write(gpu, tmp_path, gpu.VIT_S, 224, ours)
    _write(gpu, tmp_path, gpu.VIT_H, 224, ours | {"device": "cpu"})
    gpu._rows_file(tmp_path, gpu.VIT_L, 224).write_text('[{"provider": "vit_fa')  # killed while it wrote
    _write(gpu, tmp_path, gpu.SO400M, 224, ours | {"best_baseline": None, "speedup_vs_best_baseline": None})
    lines = gpu.targets(tmp_path)
    found = [(line["verdict"], line["wanted"], line["measured"], line["gap"]) for line in lines]
    nothing = ("not measured", None, None)
    speed, share, small, large, huge, so400m, latency, first, to_512, to_1024, *float8 = found
    assert speed == ("met", 1.3, 1.5, 0.0) and share == ("missed", 75.0, 60.0, 15.0)
    assert small == ("missed", 1.4, 1.3, pytest.approx(0.1))
    assert [(line[0], *line[2:]) for line in (large, huge, so400m)] == [nothing] * 3
    assert float8 == [("no target", None, 1.1, None), *[("not measured", None, None, None)] * 4]
    assert lines[10]["target"] == f"{gpu.VIT_B}, batch 256: speed against the best baseline, products in float8"
    assert lines[10]["note"] == (
        "vit_fast-fp8 9000 images/s, best baseline scaled-mm, error 5.12% of the logits, eager's 0.61%"
    )
    assert latency == ("missed", 1.9, pytest.approx(1.8), pytest.approx(0.1)) and first == ("met", 5.0, 4.0, 0.0)
    departure = 100 * ((6000 / 1000) / (512 / 224) ** 2 - 1)
    assert to_512 == ("met", 15.0, pytest.approx(departure), 0.0)
    departure = 100 * ((6000 / 240) / (1024 / 224) ** 2 - 1)
    assert to_1024 == ("missed", 15.0, pytest.approx(departure), pytest.approx(departure - 15))
    assert lines[0]["note"] == (
        "vit_fast-prepared 6000 images/s, best baseline compile; "
        "without compile-max-autotune (not timed: no time left to compile it)"
    )
    assert lines[7]["note"] == "torch.compile 40.0 s"
    assert gpu.without_figures(tmp_path) == [
        "m 224 batch 256 compile-max-autotune: not timed: no time left to compile it",
        "m 224 batch 8 eager: out of memory",
        "m 224 batch 64 scaled-mm: no time",
    ]
    gpu._print_targets(lines)
    shown = capsys.readouterr().out
    assert "≥ 75" in shown and "≤ 5" in shown and "missed" in shown and "not measured" in shown
    assert "no target" in shown


def test_a_tool_runs_this_very_python(gpu):
    words = ("-c", gpu.child.under("env", "WORD=1"), "-c", "import os; print(os.environ['WORD'])")
    assert subprocess.check_output([sys.executable, *words], text=True, timeout=60) == "1\n"
