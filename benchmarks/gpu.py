"""All that only a GPU can show, in one command: its ceilings, correctness on the chip, then the numbers.

    make gpu [ARGS="--out FOLDER --minutes 28 --only tests,models --dry-run"]
    make gpu ARGS=--first-look       the most telling measurements in at most 8 minutes (``first_look``)
    make gpu ARGS=--models-table     the table of models in at most 5 minutes

A stage is a child process with its own log; one that fails, hangs or runs out of time keeps what it had written, and
the next one runs. summary.json holds the machine, the commit, the outcome of every stage, and the rows without figures
with the reason (such as too little memory). targets.json compares the figures in the folder with the targets, which are
for 16-bit products; figures of float8 are listed beside them. With --only, several runs may share a folder. Stages that
need float8 are left out below capability 8.9. The tuner takes the kernels by CUTLASS where `vit-fast build --cutlass`
has built them: no stage does, as it takes minutes and no GPU; summary.json has the libraries that load. Without a CUDA
device of capability 8.0 nothing is measured; where Triton does not run on the device, only its ceilings are:
summary.json says why, and the exit status is 1.
"""

import contextlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vit_fast import extension
from vit_fast.bench import machine

sys.path.insert(0, str(Path(__file__).resolve().parent))

import child
import first_look
from child import Stage, run, triton_error

GROUPS = ("limits", "check", "tests", "sanitizer", "models", "training", "profile", "tune", "operations", "families")
VIT_S, VIT_B, VIT_L = (f"vit_{width}_patch16_224" for width in ("small", "base", "large"))
VIT_H, SO400M = "vit_huge_patch14_224", "vit_so400m_patch14_siglip_224"
ALL = "eager,torchvision,transformers,compile,compile-cudagraphs,compile-max-autotune"
LARGE = "eager,torchvision,transformers,compile,compile-max-autotune"
FEW = "eager,compile"
FLOAT8 = "224-fp8"  # used as a size: 224 pixels, in float8 beside the float8 baseline
MODELS = (  # timm's name, pixels, batch sizes, baselines, seconds at most; the most telling first
    (VIT_B, 224, "256,1,64,8", ALL, 480),
    (VIT_B, 512, "64", FEW, 90),
    (VIT_B, 1024, "16", FEW, 120),
    (VIT_S, 224, "256,1", LARGE, 180),
    (VIT_L, 224, "256,1", LARGE, 240),
    (VIT_H, 224, "256", LARGE, 240),
    (SO400M, 224, "256", LARGE, 240),
    ("vit_base_patch16_384", 384, "64,1", LARGE, 180),
)
# Target speedup over the best baseline at batch size 256.
SPEEDUPS = {VIT_B: 1.3, VIT_S: 1.4, VIT_L: 1.25, VIT_H: 1.3, SO400M: 1.5}


def stages(out: Path, only: str) -> list[Stage]:
    """The stages of the chosen groups, in order."""
    pytest = ("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    checked = "test_gpu_bits or test_gpu_layouts_and_mixed_dtypes or test_gpu_integers_come_out_exactly"
    memcheck = ("-c", child.under("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"))
    bench = ("-P", "-m", "vit_fast", "bench", "--precision", "bfloat16")
    models = []
    for model, size, batches, baselines, seconds in MODELS:
        words = ("--model", model, "--img-size", str(size), "--batch-size", batches, "--baselines", baselines)
        file = ("--time-budget", str(seconds - 40), "--results-file", str(_rows_file(out, model, size)))
        models.append(Stage(f"models {model} {size}", (*bench, *words, *file), seconds, cold=True))
    words = (
        "--model",
        VIT_B,
        "--batch-size",
        "256,64",
        "--variants",
        "prepared,fp8",
        "--baselines",
        "compile,scaled-mm",
    )
    file = ("--time-budget", "260", "--results-file", str(_rows_file(out, VIT_B, FLOAT8)))
    models.insert(1, Stage(f"models {VIT_B} {FLOAT8}", (*bench, *words, *file), 300, cold=True, float8=True))
    words = (
        "--bench",
        "train",
        "--model",
        VIT_B,
        "--batch-size",
        "256,64",
        "--baselines",
        "eager,transformers,compile",
    )
    file = ("--time-budget", "260", "--results-file", f"{out}/training.json")
    training = [Stage(f"training {VIT_B}", (*bench, *words, *file), 300, cold=True)]
    backward = [f"benchmarks/{path.name}" for path in sorted(Path(__file__).parent.glob("bench_*_bwd.py"))]
    file = (f"--benchmark-json={out}/training-operations.json",)
    training.append(Stage("training operations", (*pytest, *backward, *file), 240))
    profiles = []
    for provider, batch in (("prepared", 256), ("prepared", 1), ("vit_fast", 256), ("fp8", 256)):
        words = ("--model", VIT_B, "--provider", provider, "--batch-size", str(batch), "--precision", "bfloat16")
        command = ("-P", "-m", "vit_fast", "profile", *words)
        file = ("--results-file", f"{out}/profile-{provider}-{batch}.json")
        profiles.append(Stage(f"profile {provider} {batch}", (*command, *file), 90, float8=provider == "fp8"))
    families = (*bench, "--family", "all", "--time-budget", "260", "--results-file", f"{out}/families.json")
    checks = []
    for variant in ("plain", "prepared", "graphed", "fp8"):
        command = ("-P", "-m", "vit_fast", "check", "--model", VIT_B, "--variant", variant, "--precision", "bfloat16")
        file = ("--results-file", f"{out}/check-{variant}.json")
        checks.append(Stage(f"check {variant}", (*command, *file), 60, float8=variant == "fp8"))
    file = (f"--benchmark-json={out}/operations.json",)
    groups = {
        "limits": [Stage("limits", ("-P", "benchmarks/limits.py", "--json", f"{out}/limits.json"), 120)],
        "check": checks,
        "tests": [Stage("tests", (*pytest, "tests", "-m", "gpu", "-n", "4", f"--junitxml={out}/tests.xml"), 360)],
        "sanitizer": [Stage("sanitizer", (*memcheck, *pytest, "tests", "-m", "gpu", "-k", checked), 150)],
        "models": models,
        "training": training,
        "profile": profiles,
        "tune": [Stage("tune", ("-P", "benchmarks/tune", "--out", f"{out}/tune.json"), 300)],
        "operations": [Stage("operations", (*pytest, "benchmarks", "-k", "not bwd", *file), 300)],
        "families": [Stage("families", families, 300)],
    }
    wanted = only.split(",")
    if unknown := [word for word in wanted if word not in groups]:
        raise typer.BadParameter(f"got {unknown[0]!r}, wanted any of {', '.join(groups)}", param_hint="--only")
    return [stage for word in groups if word in wanted for stage in groups[word]]


def _stages_before(out, plan):
    """The outcomes, from an earlier run into the same folder, of the stages that this run does not run."""
    try:
        stages = json.loads((out / "summary.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return []
    return [stage for stage in stages if stage["stage"] not in {planned.name for planned in plan}]


def _rows_file(out, model, size):
    return Path(out) / f"{model}-{size}.json"


def _rows(out, model, size):
    """The rows that were measured on a GPU; none where the file is missing or was cut off."""
    try:
        rows = json.loads(_rows_file(out, model, size).read_text())
    except (OSError, ValueError):
        return []
    return [row for row in rows if row["device"].startswith("cuda")]


def without_figures(out: Path) -> list[str]:
    """The rows that were not timed, as text."""
    return [
        f"{row['model']} {row['infer_img_size']} batch {row['infer_batch_size']} {row['provider']}: {row['status']}"
        for model, size, *_ in [*MODELS, (VIT_B, FLOAT8)]
        for row in _rows(out, model, size)
        if row["status"] != "ok"
    ]


def _timed(rows, batch, float8=False):
    """Our timed rows at a batch size: those with float8 products, or the others."""
    return [
        row
        for row in rows
        if row["provider"].startswith("vit_fast")
        and row["infer_batch_size"] == batch
        and row["status"] == "ok"
        and row["product_dtype"].startswith("float8") == float8
    ]


def _ours(rows, batch, float8=False):
    """Our fastest row at a batch size, or None."""
    return max(_timed(rows, batch, float8), key=lambda row: row["infer_samples_per_sec"], default=None)


def _target(text, wanted, measured, note, at_most=False):
    """One entry of targets.json; ``gap`` is the distance to the target, 0 where it is met."""
    line = {"target": text, "wanted": wanted, "at_most": at_most, "measured": measured, "gap": None, "note": note}
    if measured is None:
        return line | {"verdict": "not measured"}
    if wanted is None:
        return line | {"verdict": "no target"}
    line["gap"] = max(0.0, measured - wanted if at_most else wanted - measured)
    return line | {"verdict": "missed" if line["gap"] else "met"}


def _speedup(rows, model, wanted, float8=False):
    text, row = f"{model}, batch 256: speed against the best baseline", _ours(rows, 256, float8)
    if float8:
        text += ", products in float8"
    if row is None or row.get("best_baseline") is None:
        return _target(text, wanted, None, "")
    note = f"{row['provider']} {row['infer_samples_per_sec']:.0f} images/s, best baseline {row['best_baseline']}"
    if float8:
        error, eager = row["parity_relative_error"], row["parity_eager_relative_error"]
        note += f", error {error:.2%} of the logits, eager's {eager:.2%}"
    here = [other for other in rows if other["infer_batch_size"] == 256 and other["status"] != "ok"]
    missing = [f"{other['provider']} ({other['status']})" for other in here]
    note += f"; without {', '.join(missing)}" if missing else ""
    return _target(text, wanted, row["speedup_vs_best_baseline"], note)


def _latency(rows, wanted):
    text = f"{VIT_B}, batch 1: latency of torch.compile with CUDA graphs over ours"
    ours = _timed(rows, 1)
    graphs = [row for row in rows if row["provider"] == "compile-cudagraphs" and row["infer_batch_size"] == 1]
    graphs = [row for row in graphs if row["status"] == "ok"]
    if not ours or not graphs:
        return _target(text, wanted, None, "")
    best = min(ours, key=lambda row: row["latency_ms"])
    note = f"{best['provider']} {best['latency_ms']:.3f} ms, compile-cudagraphs {graphs[0]['latency_ms']:.3f} ms"
    return _target(text, wanted, graphs[0]["latency_ms"] / best["latency_ms"], note)


def _first_call(rows, wanted):
    cold = {row["provider"]: row["first_call_s"] for row in reversed(rows) if row.get("cold_cache")}
    theirs = f"torch.compile {cold['compile']:.1f} s" if "compile" in cold else "torch.compile not measured"
    return _target(f"{VIT_B}: first call in seconds, caches empty", wanted, cold.get("vit_fast"), theirs, at_most=True)


def _cost(small, large, size, wanted):
    """Target: by how many percent the growth of an image's cost between two sizes departs from that of its FLOPs; each
    size at its largest batch."""
    text, pair = f"{VIT_B}: cost of an image from 224 to {size} pixels against its FLOPs, departure in %", []
    for rows in (small, large):
        timed = [_ours(rows, batch) for batch in {row["infer_batch_size"] for row in rows}]
        pair.append(max(filter(None, timed), key=lambda row: row["infer_batch_size"], default=None))
    if None in pair:
        return _target(text, wanted, None, "", at_most=True)
    cost = pair[0]["infer_samples_per_sec"] / pair[1]["infer_samples_per_sec"]
    flops = pair[1]["infer_gmacs"] / pair[0]["infer_gmacs"]
    note = f"cost × {cost:.2f}, FLOPs × {flops:.2f}; {' and '.join(row['provider'] for row in pair)}"
    return _target(text, wanted, 100 * abs(cost / flops - 1), note, at_most=True)


def targets(out: Path) -> list[dict[str, Any]]:
    """The targets compared with the figures in the files of a folder."""
    base = _rows(out, VIT_B, 224)
    best = _ours(base, 256)
    lines = [_speedup(_rows(out, model, 224), model, wanted) for model, wanted in SPEEDUPS.items()]
    share = _target(
        f"{VIT_B}, batch 256: % of a matrix product's FLOP/s",
        75.0,
        best and best["percent_of_peak"],
        best["provider"] if best else "",
    )
    costs = [_cost(base, _rows(out, VIT_B, size), size, 15.0) for size in (512, 1024)]
    recorded = [_rows(out, model, FLOAT8 if model == VIT_B else 224) for model in SPEEDUPS]
    float8 = [_speedup(rows, model, None, float8=True) for model, rows in zip(SPEEDUPS, recorded, strict=True)]
    return [lines[0], share, *lines[1:], _latency(base, 1.9), _first_call(base, 5.0), *costs, *float8]


def _print_targets(lines):
    table = Table("target", "wanted", "measured", "gap", "verdict", "note", title="Targets")
    for line in lines:
        figures = ("" if line[name] is None else f"{line[name]:.3g}" for name in ("measured", "gap"))
        wanted = "" if line["wanted"] is None else f"{'≤' if line['at_most'] else '≥'} {line['wanted']:g}"
        table.add_row(line["target"], wanted, *figures, line["verdict"], line["note"])
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def _check_writable(out):
    if reason := child.why_not_writable(out):
        raise typer.BadParameter(
            f"got {str(out)!r}, wanted a folder that can be written ({reason})", param_hint="--out"
        )


def _look(out, minutes, known, models_table, dry_run, rehearse):
    """The exit status of --first-look or --models-table."""
    looks = first_look.models_table() if models_table else first_look.plan()
    if dry_run:
        first_look.dry_run(looks, out)
        return 0
    _check_writable(out)
    title = "models_table" if models_table else "first_look"
    if "missing" in known and not rehearse:
        child.save(out / f"{title}.json", known | {"stages": []})
        print(f"not measured: {known['missing']}; {out / title}.json says so")
        return 1
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        known["triton"] = importlib.metadata.version("triton")
    if not rehearse and (error := triton_error(60)):
        known["triton_error"] = error
        print(f"Triton does not run on this GPU: {error}")
    if models_table:
        default, work = first_look.TABLE_MINUTES, first_look.table_of_models
    else:
        default, work = first_look.FIRST_LOOK_MINUTES, first_look.first_look
    status = work(out, default if minutes is None else minutes, known, rehearse, run)
    print(f"{out / title}.json")
    return status


def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: benchmarks/results/GPU/DATE]")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Time for all stages. [default: 60; first look 8, models table 5]")
    ] = None,
    only: Annotated[str, typer.Option(help="Groups of stages.")] = ",".join(GROUPS),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, run nothing.")] = False,
    first_look_: Annotated[bool, typer.Option("--first-look", help="Twelve measurements and decisions.")] = False,
    models_table: Annotated[bool, typer.Option("--models-table", help="The table of models alone.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Start the commands of --first-look or --models-table without a GPU.")
    ] = False,
) -> None:
    """Test and measure on this GPU; see the head of benchmarks/gpu.py."""
    if first_look_ and models_table:
        raise typer.BadParameter("got both, wanted one", param_hint="--first-look, --models-table")
    if rehearse and not (first_look_ or models_table):
        raise typer.BadParameter("got it alone, wanted it with --first-look or --models-table", param_hint="--rehearse")
    known = machine.gpu_facts()
    folder = child.ROOT / "out" / "gpu"  # not under results/, as nothing is measured
    if "missing" not in known:
        slug = known["gpu"].lower().removeprefix("nvidia ").replace(" ", "-")
        folder = child.ROOT / "benchmarks" / "results" / slug / known["time"][:16].replace(":", "")
    out = (out or folder).resolve()
    if first_look_ or models_table:
        raise typer.Exit(_look(out, minutes, known, models_table, dry_run, rehearse))
    minutes = 60.0 if minutes is None else minutes
    plan = stages(out, only)
    if dry_run:
        for stage in plan:
            print(f"{stage.name}: python {' '.join(stage.command)}")
        return
    if known.get("capability", [9, 0]) < [8, 9]:
        plan = [stage for stage in plan if not stage.float8]
    _check_writable(out)
    if "missing" not in known and (error := triton_error()):
        known["triton_error"] = error
        plan = [stage for stage in plan if stage.name == "limits"]
    libraries = {name: extension.load(name) for name in ("cuda", "cutlass")}
    known["libraries"] = {name: "; ".join(reasons) or "loaded" for name, reasons in libraries.items()}
    summary = known | {"stages": _stages_before(out, plan)}
    results = []

    def save():
        summary["without_figures"] = without_figures(out)
        try:
            child.save(out / "summary.json", summary)
            child.save(out / "targets.json", targets(out))
        except OSError as error:  # a full disk; what follows may fit again
            print(f"{out / 'summary.json'} was not written: {error}", flush=True)

    save()
    if "missing" in known:
        print(f"not measured: {known['missing']}; {out / 'summary.json'} says so")
        raise typer.Exit(1)
    if "triton_error" in known:
        print(f"Triton does not run on this GPU, so nothing but its limits is measured: {known['triton_error']}")
    end = time.monotonic() + 60 * minutes
    for stage in plan:
        left = end - time.monotonic()
        result: dict[str, Any] = {"stage": stage.name, "verdict": "no time left", "seconds": 0.0}
        if left > 5:
            try:
                result = run(stage, out, left)
            except OSError as error:
                result["verdict"] = f"not run: {error}"
        results.append(result)
        summary["stages"].append(result)
        save()
        print(f"{result['stage']}: {result['verdict']}, {result['seconds']:.0f} s", flush=True)
    table = Table("stage", "verdict", "seconds", title=f"{known['gpu']}, results in {out}")
    for result in summary["stages"]:
        table.add_row(result["stage"], result["verdict"], f"{result['seconds']:.0f}")
    Console().print(table)
    _print_targets(targets(out))
    for line in summary["without_figures"]:
        print(f"no figures: {line}")
    bad = [result for result in results if result["verdict"] != "passed"]
    raise typer.Exit(int(bool(bad) or "triton_error" in known))


if __name__ == "__main__":
    typer.run(main)
