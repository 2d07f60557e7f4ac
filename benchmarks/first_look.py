"""The first minutes on a GPU: twelve measurements in at most 8 minutes, then a table of decisions; or the model table.

    make gpu ARGS="--first-look"      the measurements below, into first_look.json, first_look.log and tuned.json
    make gpu ARGS="--models-table"    ViT-B, S, L, H and So400m against torch.compile in 5 minutes: models_table.json
    python -P benchmarks/first_look.py --install FOLDER    tuned.json of that folder → kernels/tuned/<device>.json

--rehearse runs every command without a GPU: on tiny sizes, on meta tensors or as --dry-run. --dry-run prints them.

Each stage is a child process with a limit of its own (``child``), checks before it times, and writes as it goes; its
result stands in the file as soon as it ends, also where it failed, was killed or ran out of time. What a stage needs
and the machine lacks (ncu, compute-sanitizer, capability 9.0, a Triton that runs, memory) is said; the rest goes on.
``decisions`` has the rules; a question whose stages have no figures is "not measured". All results of a run are in one
file, since little comes back from some GPU machines. ``tuned.json`` holds configs that were at least 2 % faster than
those of the rules and kept the error budget; nothing reads it before it is installed.
"""

import csv
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

import child

FIRST_LOOK_MINUTES, TABLE_MINUTES = 8.0, 5.0
GAIN = 0.02  # less is noise
VIT_B = "vit_base_patch16_224"
LAYERS = ("qkv", "proj", "fc1", "fc2")
ENOUGH_GIB, FEWER_IMAGES = 24.0, 64  # below so much memory, so many images instead of 256
Results = dict[str, Any]  # the result of each stage that has one, by name


@dataclass(frozen=True)
class Look:
    """One stage.

    Attributes:
        command: after the interpreter; ``{file}`` stands for the file of its result, ``{batch}`` for the images.
        seconds: at most.
        rehearsal: words put behind the command where it is rehearsed without a GPU.
        tool: a program that must be there; ``arch``: the capability that it needs, 10·major + minor.
        triton: whether it needs a Triton that runs.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    rehearsal: tuple[str, ...] = ()
    tool: str | None = None
    arch: int | None = None
    triton: bool = True


def plan() -> list[Look]:
    """The stages of the first look, the most telling first."""
    limits = ("-P", "benchmarks/limits.py", "--json", "{file}")
    on_cpu = ("--device", "cpu", "--seconds", "1")
    stages = ("-P", "benchmarks/first_look_stages.py")
    tune = ("-P", "benchmarks/tune", "--out", "{file}", "--batches")
    linears = ("--only", "linear", "--models", "base")
    model = ("--model", VIT_B, "--precision", "bfloat16", "--results-file", "{file}")
    tiny = ("--img-size", "32", "--model-kwargs", "depth=1", "--batch-size", "1", "--device", "cpu")
    profile = ("-P", "-m", "vit_fast", "profile", *model)
    bench = ("-P", "-m", "vit_fast", "bench", *model)
    ncu = child.under(
        "ncu", "--target-processes", "all", "--kernel-name", "regex:_linear_fwd_kernel",
        "--clock-control", "none", "--csv", "--page", "details", "--print-details", "all",
         "--section", "SpeedOfLight", "--section", "Occupancy",
        "--section", "MemoryWorkloadAnalysis", "--section", "ComputeWorkloadAnalysis", "--log-file", "{file}.csv",
    )  # fmt: skip
    memcheck = child.under("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    meta = ("--device", "meta")
    few = ("--candidates", "few")
    dry = ("--dry-run",)
    products = "copy|^LayerNorm|^ViT-[BS] (qkv|proj|fc1|fc2), alone"
    together = ("--batch-size", "{batch}")
    norms = ("--only", "linear,layer_norm", "--models", "base")
    both = ("--only", "attention", "--models", "base,so400m")
    ours = ("--variants", "plain,prepared", "--baselines", "compile", "--time-budget", "55")
    prepared = ("--provider", "prepared", "--num-iter")
    return [
        Look("ceilings", (*limits, "--only", products, "--seconds", "22"), 30, on_cpu, triton=False),
        Look("fold", (*tune, "{batch}", *norms, *few, "--seconds", "42"), 55, dry),
        Look("hopper", (*tune, "{batch}", *linears, "--candidates", "hopper", "--seconds", "35"), 45, dry, arch=90),
        Look("ncu", ("-c", ncu, *stages, "once", "--json", "{file}", "--batch", "{batch}"), 45, meta, tool="ncu"),
        Look("stacks", (*stages, "stacks", "--json", "{file}", "--batch", "{batch}"), 25, meta),
        Look("epilogues", (*stages, "epilogues", "--json", "{file}", "--batch", "{batch}"), 30, meta),
        Look("compiled", (*profile, *together, "--provider", "compile", "--num-iter", "5"), 75, tiny),
        Look("models", (*bench, *together, *ours), 65, tiny),
        Look("attention", (*tune, "{batch}", *both, *few, "--seconds", "30"), 40, dry),
        Look("graph", (*limits, "--only", "^prepared blocks|^dependent launch", "--seconds", "20"), 30, on_cpu),
        Look("stages", (*tune, "1", *linears, *few, "--seconds", "28"), 35, dry),
        Look("host", (*limits, "--only", "^host cost", "--seconds", "10"), 20, on_cpu),
        Look("profile 1", (*profile, "--batch-size", "1", *prepared, "10"), 30, tiny),
        Look("profile", (*profile, *together, *prepared, "5"), 30, tiny),
        Look("sanitizer", ("-c", memcheck, *stages, "tiny", "--json", "{file}"), 50, meta, tool="compute-sanitizer"),
        Look("replays", (*stages, "replays", "--json", "{file}"), 30, meta),
        Look("sustained", (*stages, "sustained", "--json", "{file}"), 20, meta, triton=False),
    ]


def models_table() -> list[Look]:
    """The stages of the model table: B/16 with all that it is compared with, then the others."""
    found = []
    tiny = ("--model-kwargs", "depth=1", "--batch-size", "1", "--device", "cpu")
    for name, batches, baselines, seconds in (
        (VIT_B, "{batch},1", "compile,compile-cudagraphs,compile-max-autotune", 120),
        ("vit_small_patch16_224", "{batch}", "compile,compile-max-autotune", 55),
        ("vit_large_patch16_224", "{batch}", "compile", 45),
        ("vit_so400m_patch14_siglip_224", "{batch}", "compile", 45),
        ("vit_huge_patch14_224", "{batch}", "compile", 45),
    ):
        size = "28" if "patch14" in name else "32"
        words = ("--model", name, "--precision", "bfloat16", "--results-file", "{file}", "--batch-size", batches)
        words = (*words, "--variants", "prepared,graphed", "--baselines", baselines, "--time-budget", str(seconds - 12))
        rehearsal = ("--img-size", size, *tiny)
        found.append(Look(f"table {name}", ("-P", "-m", "vit_fast", "bench", *words), seconds, rehearsal))
    return found


def command(look: Look, file: Path, batch: int, rehearsed: bool) -> tuple[str, ...]:
    """The words of a stage, after the interpreter."""
    words = [word.replace("{file}", str(file)).replace("{batch}", str(batch)) for word in look.command]
    if not rehearsed:
        return tuple(words)
    if look.tool:
        words = words[2:]  # without the tool
    if "bench" in words:  # what compiles takes minutes on a CPU
        words[words.index("--baselines") + 1] = "eager"
        words[words.index("--variants") + 1] = "plain"
    if "prepared" in words:
        words[words.index("prepared")] = "vit_fast"
    if "compile" in words:
        words[words.index("compile")] = "eager"
    return (*words, *look.rehearsal)


def why_not(look: Look, known: dict[str, Any], rehearsed: bool) -> str | None:
    """Why a stage cannot run on this machine; None where it can."""
    if rehearsed:
        return None
    major, minor = known.get("capability", (9, 0))
    if look.arch is not None and look.arch != 10 * major + minor:
        return f"needs capability {look.arch // 10}.{look.arch % 10}, the GPU has {major}.{minor}"
    if look.triton and "triton_error" in known:
        return "Triton does not run on this GPU"
    if look.tool and shutil.which(look.tool) is None:
        return f"{look.tool} is not installed"
    return None


def _result(file):
    """What a stage wrote; None where it wrote nothing that can be read. Tables of ncu come as lists of rows."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = None
    table = file.with_name(file.name + ".csv")
    if table.exists():
        lines = [line for line in table.read_text(errors="replace").splitlines() if line.startswith('"')]
        found = {"result": found, "ncu": list(csv.DictReader(lines))}
    return found


def _tail(log, characters=2000):
    try:
        return log.read_text(errors="replace")[-characters:]
    except OSError:
        return ""


Runner = Callable[[child.Stage, Path, float], dict[str, Any]]


def run_plan(
    title: str,
    looks: list[Look],
    out: Path,
    minutes: float,
    known: dict[str, Any],
    conclude: Callable[[dict[str, Any]], dict[str, Any]],
    rehearsed: bool = False,
    runner: Runner = child.run,
) -> dict[str, Any]:
    """Runs stages into ``out``/``title``.json and .log, after each stage anew; returns what the file holds."""
    slowness = 4 if rehearsed else 1  # of a machine without a GPU
    end = time.monotonic() + 60 * minutes * slowness
    batch = 256 if known.get("memory_gib", ENOUGH_GIB) >= ENOUGH_GIB else FEWER_IMAGES
    content: dict[str, Any] = known | {"rehearsed": rehearsed, "batch": batch, "stages": []}
    if batch != 256:
        print(f"{known['memory_gib']} GiB of memory: {batch} images instead of 256", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        parts = Path(folder)
        for look in looks:
            slug, left = look.name.replace(" ", "-"), end - time.monotonic()
            result: dict[str, Any] = {"stage": look.name, "seconds": 0.0}
            if reason := why_not(look, known, rehearsed):
                result["verdict"] = f"not run: {reason}"
            elif left < 5:
                result["verdict"] = "no time left"
            else:
                file = parts / f"{slug}.json"
                stage = child.Stage(look.name, command(look, file, batch, rehearsed), look.seconds * slowness)
                try:
                    result = runner(stage, parts, left)
                except OSError as error:
                    result["verdict"] = f"not run: {error}"
                result["result"] = _result(file)
                if result["verdict"] != "passed":
                    result["log"] = _tail(parts / f"{slug}.log")
            content["stages"].append(result)
            print(f"{look.name}: {result['verdict']}, {result['seconds']:.0f} s", flush=True)
            try:
                content |= conclude(content)
                child.save(out / f"{title}.json", content)
                with open(out / f"{title}.log", "a") as log:
                    log.write(f"== {look.name}: {result['verdict']}\n{_tail(parts / f'{slug}.log', 20000)}\n")
            except OSError as error:  # a full disk; what follows may fit again
                print(f"{out / title}.json was not written: {error}", flush=True)
    return content


# Decisions.


def results_of(content: dict[str, Any]) -> Results:
    """The results of the stages that have one, by name."""
    return {stage["stage"]: stage["result"] for stage in content["stages"] if stage.get("result")}


def _rows(results, *names):
    for name in names:
        yield from (results.get(name) or {}).get("rows", ())


def _us(results, stage, name):
    """Microseconds of the rule's config of a problem, by name; None where it was not timed."""
    return next((row["picked_us"] for row in _rows(results, stage) if row["name"] == name), None)


def _item(results, stage, pattern, key="us"):
    """A figure of an item of benchmarks/limits.py."""
    items = (results.get(stage) or {}).get("items", ())
    return next((row[key] for row in items if re.search(pattern, row["name"]) and key in row), None)


def _decision(question, answer, because, rule):
    return {"question": question, "answer": answer or "not measured", "because": because, "rule": rule}


def _fold(results):
    """By whole blocks where they were timed in all forms, else by the products alone."""
    forms = {row["name"]: row["us"] for row in _rows(results, "stacks")}
    if len(forms) == 3 and None not in forms.values():
        best = min(forms, key=lambda form: forms[form])
        because = "two blocks: " + ", ".join(f"{form} {us:.0f} µs" for form, us in forms.items())
        return _decision("fold LayerNorm into the products?", best, because, "the fastest form of a stack")
    rule = f"fold where four prepared products take {GAIN:.0%} less than four plain ones and two LayerNorms"
    prepared = [_us(results, "fold", f"prepared {layer}") for layer in LAYERS]
    plain = [_us(results, "fold", layer) for layer in LAYERS]
    norm = _us(results, "fold", "layer_norm") or _item(results, "ceilings", "^LayerNorm")
    if None in (*prepared, *plain, norm):
        return _decision("fold LayerNorm into the products?", None, "", rule)
    folded, apart = sum(prepared), sum(plain) + 2 * norm
    answer = "yes" if folded <= apart * (1 - GAIN) else "no"
    because = f"a layer's products {folded:.0f} µs prepared, {sum(plain):.0f} + 2 × {norm:.0f} µs plain"
    return _decision("fold LayerNorm into the products?", answer, because, rule)


def _gemms(results) -> Iterator[dict[str, Any]]:
    rule = "the fastest that does the whole epilogue; linear_hopper below 95 % of cuBLAS: cuBLASLt or CUTLASS epilogues"
    for layer in LAYERS:
        question, times, library = f"which GEMM for {layer}?", {}, None
        for row in _rows(results, "fold", "hopper"):
            if row["name"] != f"prepared {layer}":
                continue
            times["the rule's config"] = row["picked_us"]
            for one in row["ranking"]:
                kernel = one["config"].get("kernel")
                name = kernel or " ".join(f"{word}={one['config'][word]}" for word in _changed(row, one["config"]))
                if one["config"].get("cooperative"):
                    name += f" {one['config']['block_m']} × {one['config']['block_n']}"
                times[name or "the rule's config"] = min(one["us"], times.get(name) or one["us"])
            for name, us in row["libraries_us"].items():
                if name == "F.linear, bias alone":
                    library = us
                else:
                    times[name] = us
        times = {name: us for name, us in times.items() if us}
        if not times:
            yield _decision(question, None, "", rule)
            continue
        best = min(times, key=lambda name: times[name])
        because = ", ".join(f"{name} {us:.0f} µs" for name, us in sorted(times.items(), key=lambda pair: pair[1])[:4])
        because += f"; cuBLAS with bias alone {library:.0f} µs" if library else ""
        hopper = min((us for name, us in times.items() if name.startswith("linear_hopper")), default=None)
        slow = library and hopper and hopper > library / 0.95
        yield _decision(question, best + ("; cuBLASLt or CUTLASS epilogues to be tried" if slow else ""), because, rule)


def _changed(row, config):
    return [word for word, value in row["picked"].items() if config.get(word) != value]


def _tile(results):
    rule = "leave 128 × 128 where shared memory is busy more than 90 % of the time"
    shares = []
    for row in (results.get("ncu") or {}).get("ncu", ()):
        if "shared" in row.get("Metric Name", "").lower() and row.get("Metric Unit") == "%":
            try:
                shares.append((float(row["Metric Value"].replace(",", "")), row["Metric Name"]))
            except ValueError:
                continue
    if not shares:
        return _decision("leave tiles of 128 × 128?", None, "", rule)
    share, name = max(shares)
    return _decision("leave tiles of 128 × 128?", "yes" if share > 90 else "no", f"{name}: {share:.0f} %", rule)


def _attention(results) -> Iterator[dict[str, Any]]:
    for model, shape in (("base", "197 tokens of 64"), ("so400m", "256 tokens of 72")):
        question, rule = f"which attention for {shape}?", "the fastest"
        times: dict[str, float] = {}
        for row in _rows(results, "attention"):
            if row["model"] == model:
                for one in row["ranking"]:
                    form = "resident" if one["config"]["block_n"] == 0 else "streaming"
                    times[form] = min(one["us"], times.get(form, one["us"]))
                times |= row["libraries_us"]
        if not times:
            yield _decision(question, None, "", rule)
            continue
        ordered = sorted(times, key=lambda name: times[name])
        yield _decision(question, ordered[0], ", ".join(f"{name} {times[name]:.0f} µs" for name in ordered), rule)


def _either(results, question, on, off, share, names, what):
    """On or off, two items of replayed stacks: what is faster by a share, "on" where neither is; ``names`` of both."""
    rule = f"the faster in a replayed stack of {what} by {share:.1%}, else {names[0]}"
    first, second = (_item(results, "graph", f"^prepared blocks.*{words}$") for words in (on, off))
    if not (first and second):
        return _decision(question, None, "", rule)
    faster = names[0] if first < (1 - share) * second else names[1] if first > (1 + share) * second else None
    because = f"12 blocks of ViT-B, {what}: {first:.1f} µs {names[0]}, {second:.1f} {names[1]}"
    return _decision(question, faster or f"no difference: {names[0]}", because, rule)


def _pdl(results):
    return _either(results, "PDL?", "early", "in turn", 0.01, ("on", "off"), "one image")


def _tile_order(results):
    on, off = "tiles in alternate order", "tiles in one order"
    return _either(results, "order of tiles?", on, off, 0.005, ("alternate", "one order"), "many images")


def _stages(results):
    rule = f"7 where the four products of one image take {GAIN:.0%} less than with the rule's"
    four, seven = 0.0, 0.0
    for layer in LAYERS:
        row = next((row for row in _rows(results, "stages") if row["name"] == f"prepared {layer}"), None)
        timed = row and [one["us"] for one in row["ranking"] if one["config"].get("num_stages") == 7]
        if not timed or not row["picked_us"]:
            return _decision("4 or 7 stages at batch 1?", None, "", rule)
        four, seven = four + row["picked_us"], seven + min(timed)
    answer = "7" if seven <= four * (1 - GAIN) else "4"
    return _decision("4 or 7 stages at batch 1?", answer, f"{four:.1f} µs with 4, {seven:.1f} with 7", rule)


def _compiled(results):
    question, rule = "does torch.compile fuse GELU, and which SDPA does it run?", "names of its kernels"
    kernels = {kernel for row in _rows(results, "compiled") for kernel in row["kernels"].split("; ") if kernel}
    kernels |= {row["operation"] for row in _rows(results, "compiled")}
    alone = [name for name in kernels if re.search(r"triton_poi.*(gelu|erf)", name)]
    sdpa = sorted({name.split(" ×")[0][:60] for name in kernels if re.search(r"flash|fmha|sdpa", name)})
    if not any(re.search(r"triton_|gemm|nvjet|cutlass", name) for name in kernels):
        return _decision(question, None, "", rule)
    answer = "GELU is a kernel of its own" if alone else "GELU is fused into a product"
    return _decision(question, f"{answer}; {', '.join(sdpa) or 'no SDPA kernel seen'}", ", ".join(alone)[:200], rule)


def _models(results):
    question, rule = "ours against torch.compile, whole model?", "images/s of one run"
    rows = [row for row in results.get("models") or () if row["status"] == "ok"]
    speeds = {row["provider"]: row["infer_samples_per_sec"] for row in rows}
    ours = {name: speed for name, speed in speeds.items() if name.startswith("vit_fast")}
    if not ours or "compile" not in speeds:
        return _decision(question, None, "", rule)
    best = max(ours, key=lambda name: ours[name])
    because = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    return _decision(question, f"{best} {ours[best] / speeds['compile']:.2f} ×", because, rule)


def _crossover(results):
    question, rule = "from which batch is an ungraphed prepared model not host-bound?", "host time / time of an image"
    one, many = ((results.get(name) or {}).get("facts") for name in ("profile 1", "profile"))
    if not (one and many):
        return _decision(question, None, "", rule)
    each = many["step_ms"] / many["batch_size"]
    because = f"host {one['host_ms']:.2f} ms a step, the GPU {1e3 * each:.0f} µs an image"
    return _decision(question, f"{one['host_ms'] / each:.0f}", because, rule)


def _grade(results):
    question, rule = "how right is `vit-fast profile --predict`?", "predicted against measured, sum of the kernels"
    row = next((row for row in _rows(results, "profile") if row["operation"] == "sum"), None)
    error = row and row.get("predicted_error_percent")
    if error is None:
        return _decision(question, None, "", rule)
    return _decision(
        question, f"{error:+.1f} %", f"{row['predicted_us']:.0f} µs predicted, {row['us']:.0f} measured", rule
    )


def _correct(content, results):
    question, rule = "is anything wrong on this chip?", "every check within the error budget, replays equal bit by bit"
    faults = [
        f"{row['name']}: {row['fault']}"
        for row in _rows(results, "epilogues", "stacks", "sanitizer")
        if row.get("fault")
    ]
    for row in _rows(results, "fold", "hopper", "attention", "stages"):
        faults += [f"{row['problem']}: {failure['why']}" for failure in row["failures"] if "allowed" in failure["why"]]
    faults += [f"{results['replays']['differ']} replays differ"] if (results.get("replays") or {}).get("differ") else []
    faults += [f"{s['stage']}: {s['verdict']}" for s in content["stages"] if s["verdict"].startswith(("failed", "out"))]
    checked = any(name in results for name in ("fold", "epilogues", "sanitizer", "replays"))
    answer = ("yes" if faults else "nothing seen") if checked or faults else None
    return _decision(question, answer, "; ".join(faults)[:600], rule)


def decisions(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of decisions: question, answer, the figures behind it, the rule."""
    results = results_of(content)
    return [
        _correct(content, results), _fold(results), *_gemms(results), _tile(results), *_attention(results),
        _pdl(results), _tile_order(results), _stages(results), _compiled(results), _models(results),
        _crossover(results), _grade(results),
    ]  # fmt: skip


def tuned(content: dict[str, Any]) -> dict[str, Any] | None:
    """What kernels/tuned/ may hold (``vit_fast.kernels.tuned``): configs faster than the rule's by ``GAIN`` over all
    problems that share the rule's config and the width; None where there is none, or the device is not known."""
    if "gpu" not in content or "triton" not in content:
        return None
    shared: dict[str, list[dict[str, Any]]] = {}
    widths = {"qkv": 2304, "proj": 768, "fc1": 3072, "fc2": 768}
    for row in _rows(results_of(content), "fold", "stages"):
        if row["operation"] == "linear" and row["picked_us"]:
            key = json.dumps([widths[row["name"].removeprefix("prepared ")], row["picked"]])
            shared.setdefault(key, []).append(row)
    entries = []
    for key, rows in shared.items():
        width, picked = json.loads(key)
        own = [
            {json.dumps(one["config"]): one["us"] for one in row["ranking"] if "kernel" not in one["config"]}
            for row in rows
        ]
        common = set.intersection(*(set(times) for times in own))
        best = min(common, key=lambda config: sum(times[config] for times in own), default=None)
        before = sum(row["picked_us"] for row in rows)
        if best is not None and sum(times[best] for times in own) <= before * (1 - GAIN):
            use = {word: value for word, value in json.loads(best).items() if value != picked[word]}
            entries.append({"out_features": width, "picked": picked, "use": use})
    stack = []
    forms = {row["name"]: row for row in _rows(results_of(content), "stacks") if row["us"]}
    picked = next(iter(forms.values()))["picked"] if forms else None
    if picked in forms:
        best = min(forms, key=lambda form: forms[form]["us"])
        if forms[best]["us"] <= forms[picked]["us"] * (1 - GAIN):
            width = forms[best]["width"]
            stack.append({"width": width, "picked": {"statistics": picked}, "use": {"statistics": best}})
    if not (entries or stack):
        return None
    found = {"device": content["gpu"], "triton": content["triton"], "linear": entries}
    return found | {"stack": stack} if stack else found


REHEARSED = ", rehearsed: no figure is of a GPU"


def print_decisions(lines: list[dict[str, Any]], rehearsed: bool = False) -> None:
    """The table of decisions."""
    table = Table("question", "answer", "because", "rule", title="Decisions" + REHEARSED * rehearsed)
    for line in lines:
        table.add_row(line["question"], line["answer"], line["because"], line["rule"])
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def install(folder: Path) -> Path:
    """Puts the tuned.json of a folder where ``kernels/configs.py`` reads it; returns the new file.

    Raises:
        ValueError: no such file, or one that could not be used.
    """
    from vit_fast.kernels import tuned as reader

    source = folder / "tuned.json"
    try:
        content = json.loads(source.read_text())
        device, version = content["device"], content["triton"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} cannot be installed: {error}") from error
    reader.read(source, device, version)
    target = reader.file_of(device)
    target.parent.mkdir(exist_ok=True)
    child.save(target, content)
    return target


def first_look(
    out: Path, minutes: float, known: dict[str, Any], rehearsed: bool = False, runner: Runner = child.run
) -> int:
    """Runs the first look; returns the exit status."""

    def conclude(content):
        found = tuned(content)
        if found:
            child.save(out / "tuned.json", found)
        return {"decisions": decisions(content)}

    content = run_plan("first_look", plan(), out, minutes, known, conclude, rehearsed, runner)
    print_decisions(content["decisions"], rehearsed)
    return _status(content)


def table_of_models(
    out: Path, minutes: float, known: dict[str, Any], rehearsed: bool = False, runner: Runner = child.run
) -> int:
    """Runs the model table; returns the exit status."""
    content = run_plan("models_table", models_table(), out, minutes, known, lambda content: {}, rehearsed, runner)
    table = Table("model", "batch", "provider", "images/s", "× best baseline", "status")
    table.title = "Models" + REHEARSED * rehearsed
    for row in (row for rows in results_of(content).values() for row in rows):
        speed, gain = row["infer_samples_per_sec"], row.get("speedup_vs_best_baseline")
        cells = ("" if speed is None else f"{speed:.0f}", "" if gain is None else f"{gain:.2f}", row["status"])
        table.add_row(row["model"], str(row["infer_batch_size"]), row["provider"], *cells)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
    return _status(content)


def _status(content):
    return int(any(stage["verdict"] != "passed" for stage in content["stages"]))


def dry_run(looks: list[Look], out: Path) -> None:
    """Prints the commands."""
    for look in looks:
        print(f"{look.name}: python {' '.join(command(look, out / 'FILE', 256, False))}")


def main(
    install_from: Annotated[Path, typer.Option("--install", help="Folder with a tuned.json of a first look.")],
) -> None:
    """Install the configs that a first look found; see the head of benchmarks/first_look.py."""
    try:
        print(f"installed: {install(install_from)}")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--install") from error


if __name__ == "__main__":
    typer.run(main)
