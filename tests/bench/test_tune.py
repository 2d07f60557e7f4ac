"""benchmarks/tune: candidates, the time budget, ranking and files, as far as they go without a GPU."""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from vit_fast.kernels import configs
from vit_fast.kernels.linear_hopper import LinearHopperConfig

from vit_fast.backends import cuda, cutlass
from vit_fast.backends.cutlass import CutlassConfig

PATH = Path(__file__).parents[2] / "benchmarks" / "tune"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tune():
    """The package benchmarks/tune with its modules."""
    sys.path.insert(0, str(PATH.parent))
    import tune
    import tune.command

    yield tune
    sys.path.remove(str(PATH.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tune"]:
        del sys.modules[name]


def test_the_most_telling_problems_come_first(tune):
    found = tune.problems.problems()
    assert len(found) == len(set(found)) == 5 * 4 * (8 + 3)
    first = [(problem.model, problem.batch) for problem in found]
    assert first[0] == ("base", 256) and first[11] == ("base", 1) and {model for model, _ in first[:44]} == {"base"}
    assert [problem.name for problem in found[:3]] == ["prepared qkv", "prepared proj", "prepared fc1"]
    few = tune.problems.problems(("attention",), ("huge", "small"), (8,))
    assert [str(problem) for problem in few] == ["attention huge-b8", "attention small-b8"]


@pytest.mark.parametrize("arch", (80, 86, 90, 100))
def test_candidates_are_neighbours_of_the_rule_that_fit(tune, arch):
    chip = tune.candidates.Chip.named(arch)
    for problem in tune.problems.problems(batches=(256, 1)):
        found = tune.candidates.plan(problem, chip)
        assert len(found) == len(set(found)) and 4 <= len(found) <= 60, problem
        hopper = [config for config in found if tune.candidates.may_hang(config)]
        own = found[: len(found) - len(hopper)]
        assert {type(config) for config in own} == {type(found[0])}
        assert all(tune.candidates.fits(problem, config, chip) for config in own[1:])
        scaled = problem.name in ("proj", "fc2")  # by gamma, which linear_hopper does not know
        assert bool(hopper) == (arch == 90 and problem.operation == "linear" and not scaled)


def test_the_first_candidate_is_what_the_rule_picks(tune):
    chip = tune.candidates.Chip.named(90)
    for model, vit in tune.problems.VITS.items():
        first = tune.candidates.plan(tune.problems.Problem("attention", "attention", model, 1), chip)[0]
        size = vit.width // vit.heads
        assert first == configs.pick_attention_config(
            vit.tokens, vit.tokens, size, torch.bfloat16, False, 90, lse=False
        )
        first = tune.candidates.plan(tune.problems.Problem("layer_norm", "layer_norm", model, 1), chip)[0]
        assert first == configs.pick_layer_norm_config(vit.width)
    fc1 = tune.problems.Problem("linear", "fc1", "base", 256)
    assert tune.candidates.plan(fc1, tune.candidates.Chip.named(80))[0].tma is False
    assert tune.candidates.plan(fc1, chip)[0].tma is True


def test_what_cannot_fit_is_left_out(tune):
    problem, chip = tune.problems.Problem("linear", "fc1", "base", 256), tune.candidates.Chip.named(90)
    pick = tune.candidates.plan(problem, chip)[0]
    good = replace(pick, block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, split_k=1)
    assert tune.candidates.fits(problem, good, chip)
    assert not tune.candidates.fits(problem, good, tune.candidates.Chip.named(80))
    for change in (dict(num_stages=5), dict(num_warps=4), dict(split_k=2)):
        assert not tune.candidates.fits(problem, replace(good, **change), chip)
    small = replace(pick, block_m=64, block_n=64, block_k=64, split_k=4)
    assert tune.candidates.fits(replace(problem, name="proj", batch=1), small, chip)
    assert not tune.candidates.fits(replace(problem, name="proj", batch=1), replace(small, split_k=8), chip)
    attention = tune.problems.Problem("attention", "attention", "base", 1)
    resident = configs.AttentionConfig(block_m=64, block_n=0, num_warps=4, num_stages=1)
    assert tune.candidates.fits(attention, resident, chip)
    assert not tune.candidates.fits(attention, replace(resident, block_m=128), chip)
    assert not tune.candidates.fits(attention, replace(resident, block_n=256, num_stages=4, num_warps=16), chip)


def test_a_rule_is_put_back(tune):
    shipped = configs.pick_layer_norm_config
    with pytest.raises(KeyError), tune.candidates.rule("layer_norm", lambda rule: rule()):
        assert configs.pick_layer_norm_config(768) == shipped(768) and configs.pick_layer_norm_config is not shipped
        raise KeyError
    assert configs.pick_layer_norm_config is shipped
    before = configs.arch_of, configs.multiprocessors_of
    with tune.candidates.pretending(tune.candidates.Chip.named(90)):
        assert configs.arch_of(CPU) == 90 and configs.multiprocessors_of(CPU) == 132
    assert before == (configs.arch_of, configs.multiprocessors_of)


# ranking and budget, on a made-up operation whose times are in its config


class OutOfResources(Exception):
    pass


PROBLEM = ("layer_norm", "layer_norm", "base", 2)
SHIPPED = configs.LayerNormConfig(rows=4, block=1024, num_warps=4)
FAST, SLOW, LARGE, WRONG = (replace(SHIPPED, num_warps=warps) for warps in (1, 8, 16, 32))
LIBRARIES = {"slow library": SLOW, "library": FAST}
MICROSECONDS = {SHIPPED: 12.0, FAST: 10.0, SLOW: 30.0, WRONG: 1.0}


@pytest.fixture
def made_up(tune, monkeypatch):
    """An operation that is a copy; config LARGE does not launch, WRONG adds 1."""
    running = []

    def work(problem, vit, new):
        x = new(problem.batch, 4)

        def kernel():
            running[:] = [configs.pick_layer_norm_config(vit.width)]
            if running[0] == LARGE:
                raise OutOfResources("out of resource: shared memory, Required: 300000")
            return x + (running[0] == WRONG)

        def broken():
            raise RuntimeError("No available kernel.")

        libraries = {name: functools.partial(running.__setitem__, 0, as_) for name, as_ in LIBRARIES.items()}
        return tune.problems.Work(kernel, lambda x: x.clone(), (x,), 1, libraries | {"broken": broken})

    def timer(call, count, device):
        call()
        return [MICROSECONDS[running[0]] / 1e6] * count

    monkeypatch.setitem(tune.problems.WORKS, "layer_norm", work)
    monkeypatch.setitem(tune.candidates.NEIGHBOURS, "layer_norm", lambda pick: (FAST, SLOW, LARGE, WRONG))
    monkeypatch.setattr(configs, "pick_layer_norm_config", lambda width: SHIPPED)
    return timer


def _tune(tune, timer, end=math.inf):
    make = tune.problems.Maker(CPU, torch.float32, filled=True)
    chip = tune.candidates.Chip.named(90)
    return tune.ranking.tune(tune.problems.Problem(*PROBLEM), chip, make, tune.compilers.Compilers(0, chip), timer, end)


def test_a_row_says_where_the_rule_stands(tune, made_up):
    row = json.loads(json.dumps(_tune(tune, made_up)))
    assert row["problem"] == "layer_norm base-b2" and row["picked"] == asdict(SHIPPED) and row["best"] == asdict(FAST)
    assert row["picked_us"] == pytest.approx(12) and row["best_us"] == pytest.approx(10)
    assert row["rank"] == 2 and row["of"] == 5 and row["loss"] == pytest.approx(0.2)
    assert row["libraries_us"] == {"library": pytest.approx(10), "slow library": pytest.approx(30)}
    assert [entry["config"] for entry in row["ranking"]] == [asdict(FAST), asdict(SHIPPED), asdict(SLOW)]
    why = {json.dumps(entry["config"]): entry["why"] for entry in row["failures"]}
    assert len(why) == 3 and why['"broken"'] == "RuntimeError: No available kernel."
    assert why[json.dumps(asdict(LARGE))] == "OutOfResources: out of resource: shared memory, Required: 300000"
    assert why[json.dumps(asdict(WRONG))].startswith("error 1, allowed ")


def test_a_rule_whose_config_does_not_run_stands_out(tune, made_up, monkeypatch):
    monkeypatch.setattr(configs, "pick_layer_norm_config", lambda width: LARGE)
    row = _tune(tune, made_up)
    assert row["picked_us"] is row["rank"] is row["loss"] is None and row["best"] == asdict(FAST)
    fine = dict(row, problem="fine", loss=0.5, picked_us=15.0, rank=2)
    none = dict(row, problem="none ran", best=None, best_us=None, ranking=[])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(tune.report.table([fine, none, row], "title"))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    assert "does not run" in lines[0] and "does not run" in lines[1] and "fine" in lines[2] and "50.0%" in lines[2]
    assert "num_warps 16→1" in lines[2] and "10.0 (library)" in lines[2]


def test_the_budget_ends_where_it_is_spent(tune, made_up, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tune.ranking.time, "monotonic", lambda: now[0])

    def timer(call, count, device):
        now[0] += 1.0
        return made_up(call, count, device)

    row = _tune(tune, timer, end=1.5)
    assert [entry["why"] for entry in row["failures"]].count("no time left") == 3 and len(row["ranking"]) == 2
    now[0], kept = 0.0, []
    problems = [replace(tune.problems.Problem(*PROBLEM), batch=batch) for batch in (1, 2, 3, 4)]
    make, chip = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90)
    tune.ranking.run(problems, chip, make, tune.compilers.Compilers(0, chip), timer, 10.0, _keep(kept))
    assert kept == [(1, [], [2, 3, 4]), (2, [], [3, 4])]


def _keep(kept):
    def keep(rows, errors, left):
        kept.append((len(rows), [error["why"] for error in errors], [problem.batch for problem in left]))

    return keep


def test_a_problem_that_fails_does_not_end_the_run(tune, made_up, monkeypatch):
    made = tune.problems.WORKS["layer_norm"]

    def work(problem, vit, new):
        if problem.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(problem, vit, new)

    monkeypatch.setitem(tune.problems.WORKS, "layer_norm", work)
    problems = [replace(tune.problems.Problem(*PROBLEM), batch=batch) for batch in (1, 2, 3)]
    make, chip, kept = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90), []
    tune.ranking.run(problems, chip, make, tune.compilers.Compilers(0, chip), made_up, math.inf, _keep(kept))
    words = ["OutOfMemoryError: CUDA out of memory"]
    assert kept == [(1, [], [2, 3]), (1, words, [3]), (2, words, [])]


def test_a_lost_device_ends_the_run(tune, made_up, monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune.timing.measure, "synchronize", lost)
    make, chip, kept = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90), []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.ranking.run(
            [tune.problems.Problem(*PROBLEM)] * 2,
            chip,
            make,
            tune.compilers.Compilers(0, chip),
            made_up,
            math.inf,
            _keep(kept),
        )
    assert kept == [(0, ["RuntimeError: an illegal memory access was encountered"], [2])]


def test_the_device_pauses_before_each_step(tune, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0

    class Flusher:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(tune.timing.measure, "_cache_flusher", lambda device: Flusher())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("pause"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    times = tune.timing.kernel_seconds(lambda: log.append("call"), 2, torch.device("cuda", 0))
    assert times == [0.002, 0.002] and log == 2 * ["flush", "pause", "event", "call", "event"] + ["wait"]


def test_candidates_that_the_compilers_do_not_finish_are_not_launched(tune, made_up):
    class Never(tune.compilers.Compilers):
        def __init__(self):
            pass

        def result(self, problem, config, seconds):
            return tune.compilers.NOT_COMPILED if config == FAST else "CompilationError: of a compiler without a GPU"

    make, chip = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90)
    row = tune.ranking.tune(tune.problems.Problem(*PROBLEM), chip, make, Never(), made_up, math.inf)
    assert {"config": asdict(FAST), "why": "not compiled in time"} in row["failures"]
    assert row["best"] == asdict(SHIPPED) and len(row["ranking"]) == 2


def test_one_shape_is_compiled_once(tune, monkeypatch):
    submitted = []

    class Pool:
        def apply_async(self, function, arguments):
            submitted.append(arguments[:2])
            return self

        def get(self, seconds):
            assert seconds <= 7.0
            raise tune.compilers.multiprocessing.TimeoutError

    compilers = tune.compilers.Compilers(0, tune.candidates.Chip.named(90))
    compilers.pool = Pool()
    one, other = (tune.problems.Problem("layer_norm", "layer_norm", "base", batch) for batch in (1, 256))
    compilers.submit(one, [SHIPPED, FAST])
    compilers.submit(other, [SHIPPED, SLOW])
    compilers.submit(replace(other, model="large"), [SHIPPED])
    assert [config for _, config in submitted] == [SHIPPED, FAST, SLOW, SHIPPED]
    assert compilers.result(other, FAST, 7.0) == tune.compilers.NOT_COMPILED
    assert compilers.result(other, LARGE, 7.0) is None


def test_a_few_images_stand_for_the_batch(tune):
    x, weight = torch.arange(20), torch.arange(3)
    (few, same, none), images = tune.timing.few_images((x, weight, None), 1)
    assert few.tolist() == images == [0, 1, 2, 3, 16, 17, 18, 19] and same is weight and none is None
    assert tune.timing.few_images((x[:3],), 1)[1] == [0, 1, 2]


def test_files_are_whole(tune, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "tune.json"
    tune.command.child.save(path, {"rows": [1]})
    assert [file.name for file in path.parent.iterdir()] == ["tune.json"]

    def write_half(self, text):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space left"):
        tune.command.child.save(path, {"rows": [2]})
    assert json.loads(path.read_text()) == {"rows": [1]}


# kernels that may hang: a process of their own

HOPPER = tuple(replace(LinearHopperConfig(), group_m=group_m) for group_m in (8, 4, 16))


def _answers(connection, device, dtype):
    """Stands in for the process: what a config does is in its group_m."""
    connection.send("ready")
    while True:
        _, config, steps = connection.recv()
        if config.group_m == 16:
            time.sleep(60)
        if config.group_m == 2:
            os._exit(1)
        connection.send((None, "RuntimeError: lost") if config.group_m == 1 else (config.group_m + steps, None))


@pytest.fixture
def guarded(tune, monkeypatch):
    context = multiprocessing.get_context("fork")  # a spawned process would not find this module
    monkeypatch.setattr(tune.guarded.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(tune.guarded, "RUN_SECONDS", 1.0)
    with tune.guarded.Guarded(CPU, torch.float32, _answers) as guarded:
        yield guarded
    assert guarded.process is None


def test_a_hang_ends_its_process_alone(tune, guarded):
    problem = tune.problems.Problem("linear", "fc1", "base", 1)
    config, process = HOPPER[0], None
    for group_m, expected in ((8, (9, None)), (4, (5, None))):
        assert guarded.time(problem, replace(config, group_m=group_m), 1, 100) == expected
        assert process in (None, guarded.process)
        process = guarded.process
    assert guarded.time(problem, replace(config, group_m=1), 1, 100) == (None, "RuntimeError: lost")
    assert not process.is_alive() and guarded.time(problem, config, 2, 100) == (10, None)  # by a new one
    said = guarded.time(problem, replace(config, group_m=2), 1, 100)
    assert said[0] is None and said[1].startswith("the process of its own ended: EOFError")
    assert guarded.time(problem, replace(config, group_m=16), 1, 0.5) == (None, tune.timing.NO_TIME)
    assert guarded.time(problem, config, 1, 100) == (9, None)
    process = guarded.process
    assert guarded.time(problem, replace(config, group_m=16), 1, 100) == (None, "did not end in 1.0 s")
    assert not process.is_alive()
    why = f"not run: {replace(config, group_m=16)} of fc1 base-b1 did not end"
    assert guarded.time(problem, config, 1, 100) == (None, why) and guarded.process is None


def test_a_hang_of_one_kernel_leaves_the_other(tune, guarded):
    problem = tune.problems.Problem("linear", "fc1", "base", 1)
    hung, other = replace(HOPPER[0], group_m=16), CutlassConfig("pingpong")
    assert guarded.time(problem, hung, 1, 100) == (None, "did not end in 1.0 s")
    assert set(guarded.hung) == {"linear_hopper"} and guarded.time(problem, HOPPER[0], 1, 100)[0] is None
    assert guarded.time(problem, other, 1, 100)[1].startswith(
        "the process of its own ended"
    )  # by what stands in for it
    assert guarded.process is None and guarded.time(problem, HOPPER[1], 1, 100)[1].startswith("not run: ")


# the kernels by CUTLASS, which run nowhere here: their candidates, and the calls that would run them


@pytest.fixture
def cutlass_built(monkeypatch):
    """``cutlass_built(missing)``: the library is there, or why it is not."""

    def make(*missing):
        monkeypatch.setattr(cutlass, "load", lambda: missing)
        monkeypatch.setattr(cuda.CUDA, "load", lambda: missing)

    return make


@pytest.mark.parametrize("arch,families", ((80, {"multistage"}), (90, set(cutlass.FAMILIES)), (100, {"multistage"})))
def test_candidates_by_cutlass(tune, cutlass_built, arch, families):
    chip = tune.candidates.Chip.named(arch)
    for name in (*tune.problems.LINEARS, *tune.problems.PREPARED):
        problem = tune.problems.Problem("linear", name, "base", 1)
        cutlass_built("not built")
        without = tune.candidates.plan(problem, chip)
        cutlass_built()
        more = tune.candidates.plan(problem, chip)
        assert more[: len(without)] == without
        found = more[len(without) :]
        folded = name in ("prepared qkv", "prepared fc1")
        assert {config.family for config in found} == families - ({"multistage"} if folded else set())
        assert all(tune.candidates.may_hang(config) for config in found) and len(set(found)) == len(found)
        assert sum(config.family == "pingpong" for config in found) == (4 if arch == 90 else 0)
    other = tune.problems.Problem("attention", "attention", "base", 1)
    assert not any(map(tune.candidates.own_kernel, tune.candidates.plan(other, chip)))


@pytest.mark.parametrize(
    "name", ("qkv", "proj", "fc1", "fc2", *(f"prepared {n}" for n in ("qkv", "proj", "fc1", "fc2")))
)
def test_a_call_by_cutlass_computes_the_problem(tune, cutlass_built, monkeypatch, name):
    """With the formula in the place of the kernel: what it is given is the problem."""
    monkeypatch.setitem(tune.problems.VITS, "tiny", tune.problems.Vit(5, 64, 2, 128, 8, 1))

    def run(x, weight, bias, config, activation=None, gamma=None, residual=None, norm=None):
        assert config == CutlassConfig("pingpong", 2)
        z = x @ weight.t()
        if norm is not None:
            mean, rstd, sums = (t.view(*x.shape[:-1], 1) if t.numel() == x.numel() // x.shape[-1] else t for t in norm)
            z = rstd * (z - mean * sums)
        z = torch.nn.functional.gelu(z + bias) if activation else z + bias
        return z if residual is None else residual + z * (1 if gamma is None else gamma)

    def statistics(x, eps):
        rows = x.flatten(0, -2)
        return rows.mean(1), (rows.var(1, correction=0) + eps).rsqrt()

    monkeypatch.setattr(cutlass, "_run", run)
    monkeypatch.setattr(cuda, "row_statistics", statistics)
    cutlass_built()
    torch.manual_seed(0)
    make, problem = (
        tune.problems.Maker(CPU, torch.float32, filled=True),
        tune.problems.Problem("linear", name, "tiny", 2),
    )
    work = tune.problems.WORKS["linear"](problem, tune.problems.VITS["tiny"], make)
    with tune.candidates.calling(problem, work, CutlassConfig("pingpong", 2)) as call:
        torch.testing.assert_close(call(), work.eager(*work.tensors), atol=1e-4, rtol=1e-4)
        cutlass_built("it is not built")
        with pytest.raises(RuntimeError, match="it is not built"):
            call()


def test_kernels_by_cutlass_are_ranked_with_the_others(tune, made_up, guarded, monkeypatch):
    one = CutlassConfig("pingpong")
    monkeypatch.setattr(tune.candidates, "hopper_candidates", lambda work, chip: [])
    monkeypatch.setattr(tune.candidates, "cutlass_candidates", lambda problem, work, chip: [one])
    monkeypatch.setattr(tune.guarded.Guarded, "time", lambda self, problem, config, steps, seconds: (7.0, None))
    make, chip = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90)
    compilers, problem = tune.compilers.Compilers(0, chip), tune.problems.Problem(*PROBLEM)
    row = tune.ranking.tune(problem, chip, make, compilers, made_up, time.monotonic() + 100, guarded)
    assert row["best"] == {"kernel": "cutlass", "family": "pingpong", "swizzle": 1} and row["best_us"] == 7
    assert tune.report.difference(row) == "kernel=cutlass family=pingpong swizzle=1"
    row = tune.ranking.tune(problem, chip, make, compilers, made_up, time.monotonic() + 100, None)
    assert "kernel" not in row["best"]


def test_nothing_compiles_what_cutlass_has_compiled(tune, monkeypatch):
    submitted = []
    compilers = tune.compilers.Compilers(0, tune.candidates.Chip.named(90))
    compilers.pool = type(
        "Pool", (), {"apply_async": lambda self, function, arguments: submitted.append(arguments[1])}
    )()
    problem = tune.problems.Problem("linear", "fc1", "base", 1)
    compilers.submit(problem, [CutlassConfig("pingpong"), HOPPER[0]])
    assert submitted == [HOPPER[0]] and compilers.result(problem, CutlassConfig("pingpong"), 1.0) is None


def test_a_process_that_does_not_start_is_told(tune, guarded, monkeypatch):
    monkeypatch.setattr(tune.guarded, "START_SECONDS", 0.5)
    guarded.serve = lambda connection, device, dtype: time.sleep(60)
    said = guarded.time(tune.problems.Problem("linear", "fc1", "base", 1), HOPPER[0], 1, 100)
    assert said == (None, "the process of its own does not start") and guarded.process is None


def test_a_hang_does_not_end_the_tuning(tune, made_up, guarded, monkeypatch):
    monkeypatch.setattr(tune.candidates, "hopper_candidates", lambda work, chip: list(HOPPER))
    make, chip = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90)
    problem = tune.problems.Problem(*PROBLEM)
    row = tune.ranking.tune(
        problem, chip, make, tune.compilers.Compilers(0, chip), made_up, time.monotonic() + 100, guarded
    )
    ranking = [entry["config"] for entry in json.loads(json.dumps(row))["ranking"]]
    assert [config.get("kernel") for config in ranking[:2]] == [None, None] and row["best_us"] == pytest.approx(10)
    why = {json.dumps(entry["config"]): entry["why"] for entry in row["failures"]}
    assert why[json.dumps({"kernel": "linear_hopper"} | asdict(HOPPER[2]))] == "did not end in 1.0 s"
    assert row["rank"] == 2 and row["of"] == 8 and guarded.hung
    monkeypatch.setattr(tune.candidates, "hopper_candidates", lambda work, chip: list(HOPPER[:2]))
    with tune.guarded.Guarded(CPU, torch.float32, _answers) as another:
        monkeypatch.setattr(tune.ranking, "STEPS", 1)
        monkeypatch.setattr(tune.ranking, "FINAL_STEPS", 2)
        row = tune.ranking.tune(
            problem, chip, make, tune.compilers.Compilers(0, chip), made_up, time.monotonic() + 100, another
        )
    assert row["best"] == {"kernel": "linear_hopper"} | asdict(HOPPER[1]) and row["best_us"] == 6
    said = "kernel=linear_hopper block_m=128 block_n=128 group_m=4 num_stages=4 cooperative=False"
    assert tune.report.difference(row) == said and row["rank"] == 4
    assert row["of"] == 7


def test_the_process_of_its_own_runs_the_kernel(tune):
    """Here as far as to where there is no GPU."""
    code = (
        f"import sys, torch; sys.path.insert(0, {str(PATH.parent)!r}); import tune.guarded\n"
        "from vit_fast.kernels.linear_hopper import LinearHopperConfig\n"
        "with tune.guarded.Guarded(torch.device('cpu'), torch.bfloat16) as guarded:\n"
        "    problem = tune.problems.Problem('linear', 'prepared fc1', 'small', 1)\n"
        "    print(guarded.time(problem, LinearHopperConfig(), 1, 100))"
    )
    hidden = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, env=hidden | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.startswith("(None, 'RuntimeError: 0 active drivers"), done.stdout + done.stderr


# the program


def _run(*words, **environment):
    hidden = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", PATH, *map(str, words)]
    hidden |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **environment}
    return subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=300)


def test_a_machine_without_a_gpu_is_told(tmp_path):
    done = _run("--out", tmp_path / "tune.json")
    assert done.returncode == 1 and "not measured: torch finds no CUDA device" in done.stdout
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["rows"] == [] and found["torch"] == torch.__version__ and "missing" in found


def test_a_dry_run_lists_what_would_run():
    done = _run("--dry-run", "--only", "attention,layer_norm", "--models", "base", "--batches", "1,256")
    lines = done.stdout.splitlines()
    heads = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert done.returncode == 0 and heads == [
        "attention base-b1", "layer_norm base-b1", "attention base-b256", "layer_norm base-b256",
    ]  # fmt: skip
    assert lines[1].strip() == str(configs.pick_attention_config(197, 197, 64, torch.bfloat16, False, 90))


def test_the_program_from_the_plan_to_the_table(tune, made_up, monkeypatch, tmp_path, capsys):
    """With a made-up device: all that main does but the device."""
    make, chip = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(90)
    monkeypatch.setattr(tune.command.machine, "gpu_facts", lambda: {"gpu": "Made up"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.candidates.Chip, "of", lambda device: chip)
    monkeypatch.setattr(tune.command, "Maker", lambda device, dtype, filled: make)
    monkeypatch.setattr(tune.command, "kernel_seconds", made_up)
    words = dict(only="layer_norm", models="base", batches="2,1", jobs=0, arch=90, dry_run=False, compile_=False)
    with pytest.raises(tune.command.typer.Exit) as ended:
        tune.command.main(tmp_path / "tune.json", 100.0, **words)
    found, printed = json.loads((tmp_path / "tune.json").read_text()), capsys.readouterr().out
    assert ended.value.exit_code == 0 and found["gpu"] == "Made up" and found["not_reached"] == found["errors"] == []
    assert [row["problem"] for row in found["rows"]] == ["layer_norm base-b2", "layer_norm base-b1"]
    assert "layer_norm base-b2: rule 12.0 µs, best of 3 10.0 µs: num_warps 4→1" in printed
    assert "Made up, bfloat16, 2 of 2 problems" in printed and "20.0%" in printed
    monkeypatch.setattr(tune.command, "run", lambda *arguments: (_ for _ in ()).throw(RuntimeError("lost")))
    with pytest.raises(tune.command.typer.Exit) as ended:
        tune.command.main(tmp_path / "tune.json", 100.0, **words)
    found = json.loads((tmp_path / "tune.json").read_text())
    assert ended.value.exit_code == 1 and found["lost"] == "RuntimeError: lost" and len(found["not_reached"]) == 2


@pytest.mark.parametrize(
    "words,text",
    (
        (("--only", "linear,mlp"), "got 'mlp', wanted any of linear, attention, patch_embed, layer_norm"),
        (("--models", "giant"), "got 'giant', wanted any of base, large, small, huge, so400m"),
        (("--batches", "1,0"), "got '0', wanted positive ints"),
        (("--seconds", "0"), "Invalid value for '--seconds'"),
    ),
)
def test_words_that_are_not_known_are_named(tune, words, text):
    from typer.testing import CliRunner

    app = tune.command.typer.Typer()
    app.command()(tune.command.main)
    done = CliRunner().invoke(app, [*words, "--dry-run"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2 and text in " ".join(done.output.replace("│", " ").split())


@pytest.mark.aot
def test_processes_without_a_gpu_compile_the_candidates(tmp_path, count):
    words = ("--models", "small", "--only", "layer_norm", "--batches", "1,64", "--jobs", "1", "--seconds", "200")
    cache = tmp_path / "cache"
    done = _run("--compile-only", *words, "--out", tmp_path / "tune.json", TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "tune.json").read_text())
    kernels = list(cache.rglob("*.cubin"))
    count("aot_compiles", len(kernels))
    assert found["refused"] == [] and found["compiled"] == 2 * len(kernels) >= 8


# real kernels, interpreted


@pytest.mark.interp
@pytest.mark.parametrize(
    "operation,name",
    (
        *(("linear", name) for name in ("prepared qkv", "prepared proj", "prepared fc1", "fc1", "fc2")),
        ("attention", "attention"), ("patch_embed", "patch_embed"), ("layer_norm", "layer_norm"),
    ),
)  # fmt: skip
def test_interpreted_kernels_are_tuned(tune, monkeypatch, operation, name):
    monkeypatch.setitem(tune.problems.VITS, "tiny", tune.problems.Vit(5, 64, 2, 128, 8, 1))
    monkeypatch.setattr(tune.problems, "SIDE", 16)
    neighbours = tune.candidates.NEIGHBOURS[operation]
    monkeypatch.setitem(
        tune.candidates.NEIGHBOURS, operation, lambda pick: [c for c in neighbours(pick) if c != pick][:1]
    )
    make, chip = tune.problems.Maker(CPU, torch.float32, filled=True), tune.candidates.Chip.named(80)

    def timer(call, count, device):
        return tune.timing.measure.step_times(call, 1, device)

    problem = tune.problems.Problem(operation, name, "tiny", 2)
    with torch.inference_mode():
        row = tune.ranking.tune(problem, chip, make, tune.compilers.Compilers(0, chip), timer, time.monotonic() + 300)
    assert [entry for entry in row["failures"] if "SDPA" not in str(entry["config"])] == []
    assert row["rank"] in (1, 2) and len(row["ranking"]) == 2 and row["libraries_us"]
