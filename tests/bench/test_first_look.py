"""The first look at a GPU and the table of models, rehearsed without one: commands start here, a pretended GPU gives
figures and a pretended clock the time, and what fails, hangs or lacks something is said and stops nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from support.scripts import loaded
from vit_fast.kernels import configs, tuned

from vit_fast.bench import machine
from vit_fast.cli.bench import bench
from vit_fast.cli.profile import profile

ROOT = Path(__file__).parents[2]
H200 = {"gpu": "NVIDIA H200", "capability": [9, 0], "memory_gib": 139.8, "time": "2026-01-01T00:00:00"}
H200 |= {"torch": "2.13.0", "triton": "3.7.1"}
PICKED = {"block_m": 128, "block_n": 128, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 3, "tma": True}
PICKED |= {"split_k": 1, "maxnreg": None}


@pytest.fixture(scope="module")
def gpu():
    with loaded(ROOT / "benchmarks" / "gpu.py") as module:
        yield module


@pytest.fixture(scope="module")
def look(gpu):
    return gpu.first_look


def _plans(look):
    return look.plan() + look.models_table()


def test_the_limits_of_the_stages(look):
    names = [one.name for one in look.plan()]
    assert names[:4] == ["ceilings", "fold", "hopper", "ncu"] and names[-1] == "sustained" and len(names) == 17
    assert sum(one.seconds for one in look.models_table()) <= 60 * 5 + 15
    for one in _plans(look):
        words = list(one.command)
        for flag, slack in (("--seconds", 5), ("--time-budget", 8)):
            if flag in words:
                assert float(words[words.index(flag) + 1]) <= one.seconds - slack, one.name
        assert any("{file}" in word for word in words), one.name


@pytest.mark.parametrize("rehearsed", (False, True))
def test_commands_are_words_that_the_programs_know(look, rehearsed):
    for one in _plans(look):
        words = list(look.command(one, Path("FILE.json"), 256, rehearsed))
        assert not any("{" in word for word in words if word != words[1] or words[0] != "-c"), one.name
        assert words[0] in ("-P", "-c") and one.name
        for verb in (bench, profile):
            if verb.__name__ in words:
                app = typer.Typer()
                app.command()(verb)
                command = typer.main.get_command(app)
                context = command.make_context("verb", words[words.index(verb.__name__) + 1 :])
                assert context.params["results_file"] == Path("FILE.json")
                break
        else:
            script = next(word for word in words if word.startswith("benchmarks/"))
            assert (ROOT / script).exists(), one.name


@pytest.mark.parametrize("name", ("fold", "sanitizer"))
def test_stages_start_here(look, tmp_path, name):
    """The others run in ``test_first_look_stages.py`` and in the tests of their programs; ``--rehearse`` starts all."""
    one = next(one for one in look.plan() if one.name == name)
    file = tmp_path / "file.json"
    words = [sys.executable, *look.command(one, file, 256, True)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--dry-run" in words:
        assert "candidates, the rule's first" in done.stdout
    else:
        rows = json.loads(file.read_text()).get("rows", [])
        assert [row for row in rows if row.get("fault")] == []


def test_a_tool_runs_this_very_python_and_writes_its_table_beside_the_result(look, gpu, tmp_path, monkeypatch):
    """ncu is pretended: a script that writes the table it is asked for, and runs what follows."""
    fake = tmp_path / "ncu"
    fake.write_text(
        "#!/usr/bin/env bash\nwhile [ $# -gt 0 ]; do\n  case $1 in\n"
        '    --log-file) printf \'==PROF== x\\n"Metric Name","Metric Unit","Metric Value"\\n'
        '"SM: Pipe Shared Cycles Active","%%","93.5"\\n\' > $2; shift 2;;\n'
        f'    {sys.executable}) break;;\n    *) shift;;\n  esac\ndone\nexec "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    one = next(one for one in look.plan() if one.name == "ncu")
    file = tmp_path / "ncu.json"
    short = ("-c", one.command[1], "-c", f"open({str(file)!r}, 'w').write('{{}}')")
    stage = gpu.Stage("ncu", look.command(replace(one, command=short), file, 256, False), 60)
    assert gpu.run(stage, tmp_path, 60)["verdict"] == "passed"
    found = look._result(file)
    assert found["ncu"] == [
        {"Metric Name": "SM: Pipe Shared Cycles Active", "Metric Unit": "%", "Metric Value": "93.5"}
    ]
    assert look._tile({"ncu": found})["answer"] == "yes"


# The run, on a pretended GPU with a pretended clock.


def _problem(name, picked_us, others=(), libraries=(), model="base", operation="linear", picked=PICKED):
    ranking = [{"us": picked_us, "config": picked}]
    ranking += [{"us": us, "config": picked | change} for change, us in others]
    return {
        "problem": f"{name} {model}-b256", "operation": operation, "name": name, "model": model, "batch": 256,
        "picked": picked, "picked_us": picked_us, "ranking": sorted(ranking, key=lambda one: one["us"]),
        "libraries_us": dict(libraries), "failures": [],
    }  # fmt: skip


def _figures():
    """A result of each stage, as its program writes it."""
    warps, wide = {"num_warps": 8}, {"block_n": 256, "num_warps": 8}
    folded = dict(zip(("qkv", "proj", "fc1", "fc2"), (284.0, 108.0, 430.0, 335.0)))
    fold = [_problem(f"prepared {n}", us, [(warps, 0.9 * us), (wide, us)]) for n, us in folded.items()]
    fold += [_problem(n, 0.93 * us, [(warps, us)], {"F.linear, bias alone": 200.0}.items()) for n, us in folded.items()]
    fold += [_problem("layer_norm", 38.0, operation="layer_norm", picked={"rows": 4})]
    hopper = [_problem(f"prepared {n}", us) for n, us in folded.items()]
    together = {"block_m": 128, "block_n": 256, "cooperative": True}
    for row in hopper:
        row["ranking"].insert(0, {"us": 250.0, "config": {"kernel": "linear_hopper"} | together})
        row["ranking"].insert(0, {"us": 255.0, "config": {"kernel": "linear_hopper", "block_n": 128}})
        row["libraries_us"] = {"F.linear, bias alone": 200.0}
    small = PICKED | {"block_m": 64, "block_n": 64, "num_stages": 4}
    stages = [_problem(f"prepared {n}", 5.0, [({"num_stages": 7}, 4.0)], picked=small) for n in folded]
    form = {"block_n": 0, "num_stages": 1}
    attention = [
        _problem(
            "attention", 90.0, [({"block_n": 64}, 120.0)], {"SDPA cuDNN": 100.0}.items(), "base", "attention", form
        ),
        _problem("attention", 220.0, [({"block_n": 0}, 150.0)], (), "so400m", "attention", form | {"block_n": 64}),
    ]
    items = [{"name": "prepared blocks in a CUDA graph, launched in turn", "us": 300.0}]
    items += [{"name": "prepared blocks in a CUDA graph, launched early", "us": 250.0}]
    items += [{"name": "prepared blocks in a CUDA graph, tiles in one order", "us": 14000.0}]
    items += [{"name": "prepared blocks in a CUDA graph, tiles in alternate order", "us": 13900.0}]
    profile = {
        "operation": "sum",
        "us": 15000.0,
        "predicted_us": 15300.0,
        "predicted_error_percent": 2.0,
        "kernels": "",
    }
    kernels = "nvjet_gemm ×12; triton_poi_fused_gelu_3 ×12; pytorch_flash::flash_fwd_kernel ×12"
    speeds = {"vit_fast": 15000.0, "vit_fast-prepared": 16500.0, "compile": 13000.0}
    return {
        "stacks": {"rows": [
            {"name": name, "width": 768, "picked": "partials", "us": us, "fault": None}
            for name, us in (("partials", 2600.0), ("finalised", 2500.0), ("plain", 2650.0))
        ]},
        "fold": {"rows": fold}, "hopper": {"rows": hopper}, "stages": {"rows": stages},
        "attention": {"rows": attention},
        "graph": {"items": items}, "epilogues": {"rows": [{"name": "fc1: bias", "us": 400.0, "fault": None}]},
        "profile": {"facts": {"step_ms": 15.36, "batch_size": 256, "host_ms": 2.0}, "rows": [profile]},
        "profile 1": {"facts": {"step_ms": 0.5, "batch_size": 1, "host_ms": 2.7}, "rows": []},
        "compiled": {"facts": {}, "rows": [{"operation": "linear", "kernels": kernels}]},
        "models": [{"provider": p, "infer_samples_per_sec": s, "status": "ok"} for p, s in speeds.items()],
        "sanitizer": {"rows": [{"name": "split-K", "fault": None}]}, "replays": {"replays": 1000, "differ": 0},
    }  # fmt: skip


class Pretended:
    """Runs stages as they would end on a GPU: writes their results, and lets a clock of its own go on."""

    def __init__(self, figures, verdicts=None, seconds=20.0):
        self.figures, self.verdicts, self.seconds, self.ran, self.now = figures, verdicts or {}, seconds, [], 0.0

    def __call__(self, stage, folder, left):
        self.ran.append((stage.name, min(stage.seconds, left)))
        self.now += self.seconds
        if stage.name in self.figures:
            file = next(word for word in stage.command if word.endswith(".json"))
            Path(file).write_text(json.dumps(self.figures[stage.name]))
        (folder / f"{stage.name.replace(' ', '-')}.log").write_text(f"log of {stage.name}")
        return {"stage": stage.name, "verdict": self.verdicts.get(stage.name, "passed"), "seconds": self.seconds}


@pytest.fixture
def tools(look, monkeypatch):
    """All tools are there, and the clock is the runner's."""
    monkeypatch.setattr(look.shutil, "which", lambda tool: f"/usr/bin/{tool}")

    def clock(runner):
        monkeypatch.setattr(look.time, "monotonic", lambda: runner.now)
        return runner

    return clock


def _answers(content):
    return {line["question"]: line["answer"] for line in content["decisions"]}


def test_a_whole_run(look, tools, tmp_path, capsys):
    runner = tools(Pretended(_figures()))
    assert look.first_look(tmp_path, 8.0, dict(H200), runner=runner) == 0
    assert [name for name, _ in runner.ran] == [one.name for one in look.plan()]
    content = json.loads((tmp_path / "first_look.json").read_text())
    assert content["gpu"] == "NVIDIA H200" and content["batch"] == 256 and len(content["stages"]) == 17
    assert _answers(content) == {
        "is anything wrong on this chip?": "nothing seen",
        "fold LayerNorm into the products?": "finalised",
        "which GEMM for qkv?": "linear_hopper 128 × 256; cuBLASLt or CUTLASS epilogues to be tried",
        "which GEMM for proj?": "num_warps=8; cuBLASLt or CUTLASS epilogues to be tried",
        "which GEMM for fc1?": "linear_hopper 128 × 256; cuBLASLt or CUTLASS epilogues to be tried",
        "which GEMM for fc2?": "linear_hopper 128 × 256; cuBLASLt or CUTLASS epilogues to be tried",
        "leave tiles of 128 × 128?": "not measured",
        "which attention for 197 tokens of 64?": "resident",
        "which attention for 256 tokens of 72?": "resident",
        "PDL?": "on",
        "order of tiles?": "alternate",
        "4 or 7 stages at batch 1?": "7",
        "does torch.compile fuse GELU, and which SDPA does it run?": (
            "GELU is a kernel of its own; pytorch_flash::flash_fwd_kernel"
        ),
        "ours against torch.compile, whole model?": "vit_fast-prepared 1.27 ×",
        "from which batch is an ungraphed prepared model not host-bound?": "45",
        "how right is `vit-fast profile --predict`?": "+2.0 %",
    }
    shown = capsys.readouterr().out
    assert "Decisions" in shown and "rehearsed" not in shown
    look.print_decisions(content["decisions"], rehearsed=True)
    assert "Decisions, rehearsed: no figure is of a GPU" in capsys.readouterr().out
    assert (tmp_path / "first_look.log").read_text().count("== ") == 17
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_look.json", "first_look.log", "tuned.json"]


def test_candidates_can_be_installed_and_are_used(look, tools, tmp_path, monkeypatch):
    look.first_look(tmp_path, 8.0, dict(H200), runner=tools(Pretended(_figures())))
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert found["device"] == "NVIDIA H200" and found["triton"] == "3.7.1"
    # 8 warps: 10 % faster prepared, 7 % slower plain; at batch 1 seven stages.
    uses = {(entry["out_features"], entry["picked"]["block_m"]): entry["use"] for entry in found["linear"]}
    assert uses[2304, 64] == uses[768, 64] == uses[3072, 64] == {"num_stages": 7}
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "kernels")
    done = look.install(tmp_path)
    assert done == tmp_path / "kernels" / "h200.json" and json.loads(done.read_text()) == found
    assert found["stack"] == [{"width": 768, "picked": {"statistics": "partials"}, "use": {"statistics": "finalised"}}]
    table = tuned.read(done, "NVIDIA H200", "3.7.1")
    monkeypatch.setitem(tuned._tables, 90, table)
    few = configs.pick_linear_config(197, 768, False, torch.bfloat16, torch.bfloat16, False, False, 90)
    assert configs.pick_stack_config(50432, 768, 90) == configs.StackConfig("finalised")
    assert few == configs.LinearConfig(64, 64, 64, 8, 4, 7, True)
    (tmp_path / "tuned.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be installed"):
        look.install(tmp_path)


def test_time_runs_out(look, tools, tmp_path):
    runner = tools(Pretended(_figures(), seconds=60.0))
    assert look.first_look(tmp_path, 3.0, dict(H200), runner=runner) == 1
    assert [name for name, _ in runner.ran] == ["ceilings", "fold", "hopper"] and runner.ran[-1][1] <= 60
    content = json.loads((tmp_path / "first_look.json").read_text())
    verdicts = [stage["verdict"] for stage in content["stages"]]
    assert verdicts == ["passed"] * 3 + ["no time left"] * 14
    assert _answers(content)["PDL?"] == _answers(content)["order of tiles?"] == "not measured"
    assert _answers(content)["fold LayerNorm into the products?"] == "no"


def test_what_fails_is_said_and_the_rest_goes_on(look, tools, tmp_path):
    figures = _figures() | {"replays": {"replays": 500, "differ": 3}}
    figures["fold"]["rows"][0]["failures"] = [{"config": {}, "why": "error 3, allowed 1"}]
    del figures["graph"]
    runner = tools(Pretended(figures, {"hopper": "out of time", "graph": "failed (-9)", "replays": "failed (1)"}))
    assert look.first_look(tmp_path, 8.0, dict(H200), runner=runner) == 1
    assert len(runner.ran) == 17
    content = json.loads((tmp_path / "first_look.json").read_text())
    first = content["decisions"][0]
    assert first["answer"] == "yes"
    for text in ("prepared qkv base-b256: error 3", "3 replays differ", "hopper: out of time", "graph: failed (-9)"):
        assert text in first["because"]
    killed = next(stage for stage in content["stages"] if stage["stage"] == "graph")
    assert killed["log"] == "log of graph" and killed["result"] is None


@pytest.mark.parametrize(
    "facts,left_out",
    (
        ({"capability": [8, 0]}, {"hopper": "needs capability 9.0, the GPU has 8.0"}),
        ({"memory_gib": 15.0}, {}),
        (
            {"triton_error": "ptxas fatal"},
            {one: "Triton does not run on this GPU" for one in ("fold", "hopper", "epilogues", "profile")},
        ),
    ),
)
def test_what_a_machine_lacks(look, tools, tmp_path, capsys, facts, left_out):
    runner = tools(Pretended({}))
    look.first_look(tmp_path, 8.0, H200 | facts, runner=runner)
    stages = json.loads((tmp_path / "first_look.json").read_text())["stages"]
    verdicts = {stage["stage"]: stage["verdict"] for stage in stages}
    assert {name: verdicts[name] for name in left_out} == {name: f"not run: {why}" for name, why in left_out.items()}
    assert verdicts["ceilings"] == verdicts["sustained"] == "passed"
    assert not {name for name, _ in runner.ran} & set(left_out)
    if "memory_gib" in facts:
        assert "15.0 GiB of memory: 64 images instead of 256" in capsys.readouterr().out


def test_tools_that_are_missing(look, tools, tmp_path, monkeypatch):
    runner = tools(Pretended({}))
    monkeypatch.setattr(look.shutil, "which", lambda tool: None)
    look.first_look(tmp_path, 8.0, dict(H200), runner=runner)
    stages = json.loads((tmp_path / "first_look.json").read_text())["stages"]
    verdicts = {stage["stage"]: stage["verdict"] for stage in stages}
    assert verdicts["ncu"] == "not run: ncu is not installed"
    assert verdicts["sanitizer"] == "not run: compute-sanitizer is not installed" and len(runner.ran) == 15


def test_a_stage_that_is_killed_in_the_middle(look, gpu, tmp_path):
    """A real child, that has written half of its result, and is killed by another."""
    words = (
        "import json, os, signal; json.dump({'rows': []}, open(r'{file}', 'w')); os.kill(os.getpid(), signal.SIGKILL)"
    )
    looks = [
        look.Look("killed", ("-c", words), 60),
        look.Look("hangs", ("-c", "print('half', flush=True); import time; time.sleep(600)"), 2),
        look.Look("next", ("-c", "open(r'{file}', 'w').write('[1]')"), 60),
    ]
    content = look.run_plan("odd", looks, tmp_path, 2.0, dict(H200), lambda content: {}, runner=gpu.run)
    found = [(stage["verdict"], stage["result"]) for stage in content["stages"]]
    assert found == [("failed (-9)", {"rows": []}), ("out of time", None), ("passed", [1])]
    assert content["stages"][1]["log"].strip() == "half"
    assert json.loads((tmp_path / "odd.json").read_text())["stages"] == content["stages"]


def test_the_run_itself_is_killed(look, tmp_path):
    """What was done until then is in the file."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import first_look as look; from pathlib import Path\n"
        "looks = [look.Look('first', ('-c', \"open(r'{file}', 'w').write('[1]')\"), 60),"
        " look.Look('second', ('-c', 'import time; time.sleep(600)'), 600)]\n"
        f"look.run_plan('odd', looks, Path({str(tmp_path)!r}), 9.0, {{}}, lambda content: {{}})"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=ROOT, start_new_session=True)
    file, end = tmp_path / "odd.json", time.monotonic() + 120
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert json.loads(file.read_text())["stages"][0]["result"] == [1]


# The command.


def _pretend(gpu, monkeypatch, error=None, **facts):
    monkeypatch.setattr(machine, "gpu_facts", lambda: H200 | facts)
    monkeypatch.setattr(gpu, "triton_error", lambda *seconds: error)
    runner = Pretended(_figures())
    monkeypatch.setattr(gpu, "run", runner)
    return runner


def _main(gpu, out, **words):
    with pytest.raises((typer.Exit, typer.BadParameter)) as end:
        gpu.main(out, None, ",".join(gpu.GROUPS), **words)
    return getattr(end.value, "exit_code", 2), str(end.value)


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(gpu, monkeypatch, tmp_path):
    runner = _pretend(gpu, monkeypatch)
    blocked = tmp_path / "file"
    blocked.write_text("")
    for words in ({"first_look_": True}, {"models_table": True}, {}):
        status, text = _main(gpu, blocked / "results", **words)
        assert status == 2 and "wanted a folder that can be written" in text and runner.ran == []


def test_a_driver_that_triton_rejects(gpu, monkeypatch, tmp_path, capsys):
    runner = _pretend(gpu, monkeypatch, error="ptxas fatal: no such chip")
    monkeypatch.setattr(gpu.first_look.shutil, "which", lambda tool: tool)
    assert _main(gpu, tmp_path, first_look_=True)[0] == 1
    assert [name for name, _ in runner.ran] == ["ceilings", "sustained"]
    assert json.loads((tmp_path / "first_look.json").read_text())["triton_error"] == "ptxas fatal: no such chip"
    assert "Triton does not run on this GPU: ptxas fatal" in capsys.readouterr().out


def test_a_gpu_that_is_too_old(gpu, monkeypatch, tmp_path, capsys):
    runner = _pretend(gpu, monkeypatch, missing="the GPU has capability 7.5, wanted 8.0 or more")
    assert _main(gpu, tmp_path, first_look_=True)[0] == 1 and runner.ran == []
    assert "capability 7.5" in json.loads((tmp_path / "first_look.json").read_text())["missing"]
    assert "not measured: the GPU has capability 7.5" in capsys.readouterr().out


def test_the_table_of_models(gpu, look, monkeypatch, tmp_path, capsys):
    runner = _pretend(gpu, monkeypatch)
    row = {"model": look.VIT_B, "infer_batch_size": 256, "provider": "vit_fast-prepared", "status": "ok"}
    row |= {"infer_samples_per_sec": 16500.0, "speedup_vs_best_baseline": 1.27}
    late = row | {
        "provider": "compile",
        "infer_samples_per_sec": None,
        "status": "not timed",
        "speedup_vs_best_baseline": None,
    }
    runner.figures = {f"table {look.VIT_B}": [row, late]}
    assert _main(gpu, tmp_path, models_table=True)[0] == 0
    assert len(runner.ran) == 5
    shown = capsys.readouterr().out
    assert "16500" in shown and "1.27" in shown and "not timed" in shown
    assert json.loads((tmp_path / "models_table.json").read_text())["stages"][0]["result"] == [row, late]


def test_words_that_do_not_go_together(gpu, monkeypatch, tmp_path, capsys):
    runner = _pretend(gpu, monkeypatch)
    assert "wanted one" in _main(gpu, tmp_path, first_look_=True, models_table=True)[1]
    assert "wanted it with --first-look" in _main(gpu, tmp_path, rehearse=True)[1]
    assert _main(gpu, tmp_path, first_look_=True, dry_run=True)[0] == 0 and runner.ran == []
    assert "ceilings: python -P benchmarks/limits.py" in capsys.readouterr().out
