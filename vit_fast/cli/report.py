"""What ``vit-fast bench`` prints: its progress, the table of a batch size, the sentences below it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from vit_fast.bench import speedup
from vit_fast.bench.results import speedup_column
from vit_fast.bench.settings import Settings

from .output import say, show_table


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """Yields ``tell(text, fraction)``: a bar on standard error if that is a terminal.

    ``tell.warn(text)`` prints a line there; in ``with tell.paused():`` the bar is gone and standard output is free.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=1.0)

        def update(text, fraction):
            bar.update(task, description=text, completed=fraction)

        def warn(text):
            bar.console.print(f"vit-fast: warning: {text}", markup=False, highlight=False, soft_wrap=True)

        @contextlib.contextmanager
        def paused():
            if sys.stderr.isatty():
                bar.stop()
            yield
            if sys.stderr.isatty():
                bar.start()

        tell: Any = update
        tell.warn, tell.paused = warn, paused
        yield tell


_SHOWN = 12  # kinds of operations in a table


def _number(row, key, form):
    value = row.get(key)
    return "" if value is None else format(value, form)


def print_batch(rows: list[dict[str, Any]], settings: Settings) -> None:
    """Prints the rows of one batch size as a table, and below it those without figures."""
    baselines = dict.fromkeys(row["provider"] for row in rows if not row["provider"].startswith("vit_fast"))
    timed = [row for row in rows if row["status"] == "ok"]
    say(f"{rows[0]['model']}, batch {rows[0]['infer_batch_size']}")
    say()
    if timed:
        figures = [
            ("images/s", [_number(row, "infer_samples_per_sec", ".4g") for row in timed]),
            (
                "p20 … p80",
                [f"{row['infer_samples_per_sec_p20']:.4g} … {row['infer_samples_per_sec_p80']:.4g}" for row in timed],
            ),
            ("ms/step", [_number(row, "infer_step_time", ".4g") for row in timed]),
            *(
                [("latency ms", [_number(row, "latency_ms", ".4g") for row in timed])]
                * (settings.device.type == "cuda")
            ),
            *(
                (f"× {name.removeprefix('compile-')}", [_number(row, speedup_column(name), ".2f") for row in timed])
                for name in baselines
            ),
            ("first call s", [_number(row, "first_call_s", ".2f") for row in timed]),
            ("peak MiB", [_number(row, "peak_memory_mib", ".0f") for row in timed]),
            ("TFLOP/s", [_number(row, "achieved_tflops", ".3g") for row in timed]),
            ("% of peak", [_number(row, "percent_of_peak", ".1f") for row in timed]),
            ("peak RSS MiB", [_number(row, "peak_rss_mib", ".0f") for row in timed]),
            ("max error", [_number(row, "parity_error", ".1e") for row in timed]),
            ("rms error", [_number(row, "parity_relative_error", ".1e") for row in timed]),
        ]
        products = [row["product_dtype"] for row in timed]
        if len(set(products)) > 1:
            figures.append(("products", products))
        figures = [(head, cells) for head, cells in figures if any(cells)]
        heads = ["provider", *(head for head, _ in figures)]
        show_table(heads, list(zip([row["provider"] for row in timed], *(cells for _, cells in figures))))
        say()
    for row in rows:
        if row["status"] != "ok":
            say(f"{row['provider']}: {row['status']}")
    if len(timed) < len(rows):
        say()


def _narrow(row):
    """The dtype of a row's products where it has 8 bits ("float8" or "int8"), else ""."""
    return next((name for name in ("float8", "int8") if row["product_dtype"].startswith(name)), "")


def _verdicts(rows):
    """Sentences: the fastest of our variants against the best baseline, at each batch size, and the same for those with
    products of 8 bits."""
    for batch, narrow in dict.fromkeys((row["infer_batch_size"], _narrow(row)) for row in rows):
        here = [row for row in rows if row["infer_batch_size"] == batch]
        ours = [row for row in here if row.get("best_baseline") and _narrow(row) == narrow]
        if ours:
            part = f", {ours[0]['part']}" if "part" in ours[0] else ""
            yield f"Batch {batch}{part}: {_verdict(max(ours, key=lambda row: row['speedup_vs_best_baseline']))}."


def _verdict(row):
    name, baseline, rounds = row["provider"], f"the best baseline ({row['best_baseline']})", row["compared_rounds"]
    ratio, low, high = (row[f"paired_speedup{end}"] for end in ("", "_low", "_high"))
    if low is None:
        measured = f"{rounds} rounds are too few for a verdict (measured {ratio:.2f}×)"
        told = f"{name} against {baseline}: {measured}"
    else:
        measured = f"{ratio:.2f}×, confidence interval {low:.2f} to {high:.2f} of {rounds} rounds"
        if low > 1:
            told = f"{name} is faster than {baseline}: {measured}"
        elif high < 1:
            told = f"{name} is slower than {baseline}: {measured}"
        else:
            told = f"{name} is neither faster nor slower than {baseline}, as far as can be told: {measured}"
    if row["same_as_best_baseline"]:
        told = (
            f"{name} is equal to {baseline}: the same operators, the same bits. What is left is host time and noise: "
        )
        told += measured
    return told


def _disturbances(rows):
    """Warnings about the figures: other programs ran, the clock drifted, step times scatter."""
    load, cores = rows[0].get("load_average"), rows[0].get("cpu_threads")
    if load is not None and load > 0.25 * cores:
        yield (
            f"Other programs were running when this began (load average {load:.1f} at {cores} threads): repeat it on "
            "an idle machine."
        )
    for batch in dict.fromkeys(row["infer_batch_size"] for row in rows):
        here = [row for row in rows if row["infer_batch_size"] == batch and row["status"] == "ok"]
        drift = next((row["drift"] for row in here if row.get("drift")), 1.0)
        if max(drift, 1 / drift) > speedup.NOTICED_DRIFT:
            yield (
                f"Batch {batch}: the last rounds took {drift:.2f} times as long as the first. Verdicts compare within "
                "a round, images/s do not."
            )
        spread = max((row["infer_samples_per_sec_p80"] / row["infer_samples_per_sec_p20"] for row in here), default=1.0)
        if spread > speedup.NOTICED_SPREAD:
            yield f"Batch {batch}: step times scatter, by a factor of up to {spread:.2f} between p20 and p80."


def _parity(rows, eager):
    """Sentences: whether our variants keep the error budget (products of 8 bits have their own), and what such products
    cost in accuracy."""
    rows = [row for row in rows if "parity_passed" in row]
    for narrow in ("", "float8", "int8"):
        ours = [row for row in rows if row["provider"].startswith("vit_fast") and _narrow(row) == narrow]
        if not ours:
            continue
        reference, its = (
            (f"the plain PyTorch form of the same {narrow} model", "that form's") if narrow else (eager, "eager's")
        )
        worst = max(ours, key=lambda row: row["parity_error"] / max(row["parity_allowed"], 1e-300))
        yield (
            f"Parity with {reference} {'holds' if all(row['parity_passed'] for row in ours) else 'FAILS'}: "
            f"error {worst['parity_error']:.2e}, allowed {worst['parity_allowed']:.2e}, {its} own "
            f"{worst['parity_reference_error']:.2e}; against eager max-abs {worst['parity_max_abs']:.2e}, "
            f"cosine {worst['parity_cosine']:.7f}, top-1 agreement {worst['parity_top1']:.1%}."
        )
    for narrow in ("float8", "int8"):
        costs = {}
        for row in rows:
            if _narrow(row) == narrow:
                worst = costs.get(row["provider"], row)
                costs[row["provider"]] = max(row, worst, key=lambda row: row["parity_relative_error"])
        told = [
            f"{name} {row['parity_relative_error']:.2%}, cosine {row['parity_cosine_float64']:.5f}, "
            f"top-1 agreement {row['parity_top1_float64']:.1%}"
            for name, row in costs.items()
        ]
        if told:
            own = max(row["parity_eager_relative_error"] for row in costs.values())
            told = "; ".join([*told, f"eager in the dtype of the weights {own:.2%}"])
            yield f"What {narrow} costs, the norm of the errors against float64 over that of the logits: {told}."


def _engines(rows):
    """A sentence on the baselines of other engines: versions, settings, calibration."""
    told = {
        row["provider"]: f"{row['provider']}: {row['engine']}, {row['engine_settings']}"
        + (f", calibrated on {row['calibration']}" if row.get("calibration") else "")
        for row in rows
        if row.get("engine")
    }
    if told:
        yield f"Other engines: {'. '.join(told.values())}."


def _sentences(rows, settings, seconds):
    row = rows[0]
    kind = "GPU" if settings.device.type == "cuda" else "CPU"
    dtype = f"autocast to {settings.amp_dtype}" if settings.amp_dtype else settings.precision
    yield (
        f"{row['model']}, {row['infer_img_size']} pixels a side, {dtype}, {row['weights']} weights, "
        f"{row['infer_gmacs']:.2f} GMAC an image, {row['param_count']:.2f} M parameters; pixels: {row['images']}."
    )
    threads = "" if kind == "GPU" else f", {row['cpu_threads']} threads"
    used = {row["vit_fast_backend"] for row in rows if row.get("vit_fast_backend")}
    reasons = dict.fromkeys(row["vit_fast_reasons"] for row in rows if row.get("vit_fast_reasons"))
    ran = f"vit_fast ran on its backend {', '.join(sorted(used))}" if used else "vit_fast did not run"
    yield (
        f"Ran on {settings.device}, the {kind} {row['device_name']}{threads}; {ran}"
        f"{' (' + '; '.join(reasons) + ')' if reasons else ''}."
    )
    if kind == "CPU":
        yield "These are CPU numbers: they say nothing about a GPU, where the Triton kernels run instead."
    peaks = {row["product_dtype"]: row for row in rows if row["matmul_peak_tflops"]}
    told = "; ".join(
        f"in {name} {row['matmul_peak_tflops']:.3g} TFLOP/s, {row['matmul_peak_sustained_tflops']:.3g} sustained"
        for name, row in peaks.items()
    )
    yield f"Peak of a matrix product in this run: {told or 'not measured'}."
    yield (
        "First call includes compilation. Max error is against float64; rms error is the norm of all errors over that "
        "of the logits."
    )
    yield from _engines(rows)
    yield from _verdicts(rows)
    yield from _disturbances(rows)
    ways = {}
    for row in rows:
        if row.get("attention"):
            way = f"{row['attention']} ({row['attention_operators']})"
            ways.setdefault(way, {})[row["provider"]] = None
    if ways:
        told = "; ".join(f"{', '.join(names)}: {way}" for way, names in ways.items())
        yield f"Attention of the baselines (on a GPU, the fastest that each can use): {told}."
    yield from _parity(rows, "plain PyTorch" if settings.family else "timm eager")
    methods = dict.fromkeys(row["peak_memory_method"] for row in rows if row.get("peak_memory_method"))
    if methods:
        yield f"Peak memory: {'; '.join(methods)}."
    methods = dict.fromkeys(row["peak_rss_method"] for row in rows if row.get("peak_rss_method"))
    if methods:
        yield f"Peak RSS: {'; '.join(methods)}."
    done = sorted({row["num_bench_iter"] for row in rows if row.get("num_bench_iter")})
    if done and done[0] < settings.bench_iterations:
        yield (
            f"Timed calls: {', '.join(map(str, done))} of {settings.bench_iterations}, to keep to the time budget of "
            f"{seconds:.0f} s (--time-budget 0 lifts it)."
        )


def print_training_batch(rows: list[dict[str, Any]], settings: Settings) -> None:
    """``print_batch`` of each part of a step of training, and what its operations compute and move."""
    from vit_fast.bench.training import PREFIXES, operations_of, part_of

    for part in PREFIXES:
        say(f"{part}:")
        print_batch([part_of(row, part) for row in rows], settings)
    if operations := operations_of(rows[0]):
        say("Operations of forward and backward, bytes read and written once:")
        say()
        cells = [(name, str(count), f"{gflop:.4g}", f"{mib:.4g}") for name, count, gflop, mib in operations[:_SHOWN]]
        show_table(["operation", "calls", "GFLOP", "MiB"], cells)
        if rest := operations[_SHOWN:]:
            say(f"and {len(rest)} kinds more, {sum(mib for *_, mib in rest):.4g} MiB")
        say()


def print_training_report(rows: list[dict[str, Any]], settings: Settings, seconds: float) -> None:
    """``print_report`` of training: the verdict is on the step and on forward+backward alone."""
    from vit_fast.bench.training import part_of
    from vit_fast.bench.training_step import FORWARD_BACKWARD, STEP

    print_report([part_of(row, STEP) for row in rows], settings, seconds)
    for sentence in _verdicts([part_of(row, FORWARD_BACKWARD) for row in rows]):
        say(sentence)
    for row in rows:
        if "parity_passed" in row:
            say(
                f"Batch {row['train_batch_size']}: gradients, each as a share of the largest of its parameter, are off "
                f"float64 by {row['parity_error']:.2e} at most, allowed {row['parity_allowed']:.2e}, timm eager's own "
                f"{row['parity_eager_error']:.2e}; cosine with eager's {row['parity_cosine']:.7f}."
            )


def print_report(rows: list[dict[str, Any]], settings: Settings, seconds: float) -> None:
    """Prints the sentences that are needed to interpret the rows."""
    for sentence in _sentences(rows, settings, seconds):
        say(sentence)
