"""The benchmark of training: our model against timm's, eager and compiled, and transformers', with the same weights.

As in ``compare`` parity comes first. Every gradient of ours is compared with float64, as a share of the largest of its
parameter, and the loss of each baseline with timm's. Then forward+backward and the whole step of every provider are
timed in the same rounds. A row is one provider at one batch size: ``train_`` stands before the figures of the step,
as in timm, ``train_fwd_bwd_`` before those of forward and backward. FLOP and bytes are those of the operations of our
forward and backward (``backward_operations``), for every provider; the update of the weights has no products.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import vit_fast
from vit_fast import backends, parity

from . import backward_operations, measure, peak_rss, speedup, training_step
from . import contest as contests
from .baselines import compiled_model
from .providers import COMPILE_MODES, PLAIN
from .results import Row, speedup_column
from .rounds import Provider, attempt, outcome, release, time_rounds
from .settings import Settings
from .time_budget import OutOfTime, TimeBudget, deadline

BASELINES = ("eager", "torchvision", "transformers", "compile", "compile-max-autotune")
PREFIXES = {training_step.STEP: "train_", training_step.FORWARD_BACKWARD: "train_fwd_bwd_"}
PARITY_IMAGES = 4


def run(
    settings: Settings,
    budget: TimeBudget,
    tell: Any,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> bool:
    """Measures all batch sizes; returns whether vit_fast failed on any. ``tell`` and ``keep`` are as in ``compare``."""
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    with forced:
        tell(f"{settings.model}: models and pixels", 0.0)
        settings = replace(settings, variants=("plain",))
        contest = contests.prepare(settings, budget.left, tell)
        failed, count = False, len(settings.batch_sizes)
        for index, batch in enumerate(settings.batch_sizes):

            def tell_batch(text, done, index=index, batch=batch):
                tell(f"batch {batch}: {text}", (index + done) / count)

            seconds = budget.left() / (count - index)
            rows = _bench_batch(settings, contest, batch, budget, seconds, tell_batch)
            failed |= any(row["status"].startswith(("failed", "parity")) for row in rows if row["provider"] == PLAIN)
            keep(rows)
            release(settings.device)
    return failed


def _row(contest, name, batch):
    facts = {key.replace("infer_", "train_"): value for key, value in contest.facts.items()}
    return dict(facts, provider=name, train_batch_size=batch, bench="train", optimizer="adamw", status="ok")


def _bench_batch(settings, contest, batch, budget, seconds, tell):
    """The rows of one batch size."""
    pixels = contest.pixels[:batch]
    torch._dynamo.reset()
    modules = {PLAIN: contest.ours[PLAIN], **contest.baselines}
    names = (PLAIN, *settings.baselines)
    rows = {name: _row(contest, name, batch) for name in names}
    rows |= {name: rows[name] | {"status": f"not timed: {why}"} for name, why in contest.absent.items() if name in rows}
    timed: dict[str, dict[str, Provider]] = {}
    end = budget.spent() + seconds
    tell("parity of the gradients", 0.0)
    try:
        expected = _expected(contest.reference, pixels, settings)
    except Exception as error:  # of the device, such as too little memory: the rows tell it
        for row in rows.values():
            row["status"] = outcome(error)
        return list(rows.values())
    tell("operations", 0.0)
    operations = _operations(contest.ours[PLAIN], pixels, settings)
    for row in rows.values():
        row.update(operations)
    for index, name in enumerate(names):
        if rows[name]["status"] != "ok":
            continue
        tell(f"{name}, first calls", (index + 1) / len(names) / 2)
        module = copy.deepcopy(modules[name]).train()
        model = compiled_model(module, name) if name in COMPILE_MODES else module
        calls = training_step.calls(module, model, pixels, settings)
        parts = {part: Provider(name, call, rows[name], ours=name == PLAIN) for part, call in calls.items()}
        left = max((end - budget.spent()) / 2, 1.0) if name in COMPILE_MODES else float("inf")
        first = parts[training_step.STEP]
        begin = partial(_first_calls, parts, module, expected, pixels, settings)
        try:
            with deadline(left):
                attempt(first, begin, settings.device)
        except OutOfTime:
            rows[name]["status"] = f"not timed: not compiled in the {left:.0f} s that were left for it"
            torch._dynamo.reset()
        attempt(first, partial(_memory, first, module, settings), settings.device)
        if settings.peak_rss and rows[name]["status"] == "ok":
            tell(f"{name}, peak memory of its own process", (index + 1) / len(names) / 2)
            rows[name].update(peak_rss.columns(settings, name, batch, pixels, {}))
        if rows[name]["status"] == "ok":
            timed[name] = parts
    providers = [provider for parts in timed.values() for provider in parts.values()]
    if timed:
        time_rounds(providers, settings, max(end - budget.spent(), 0.0), tell)
        _fill_in(timed, batch)
    return list(rows.values())


def _expected(reference, pixels, settings):
    """(timm's gradients of a few images in float64, those in the settings' precision, its loss of the whole batch)."""
    few, module = pixels[:PARITY_IMAGES], copy.deepcopy(reference).train()
    plain = replace(settings, precision="float64", amp_dtype=None)
    golden = training_step.gradients(copy.deepcopy(module).double(), few.double(), plain)
    eager = training_step.gradients(module, few, settings)
    with torch.no_grad():
        return golden, eager, training_step.loss_of(module, pixels, settings).item()


def _operations(module, pixels, settings):
    """Columns: GFLOP of a step, and GFLOP and MiB of each kind of operation in its forward and backward."""
    with training_step.autocast_of(settings):
        calls = backward_operations.training_operations(copy.deepcopy(module).train(), pixels)
    kinds = backward_operations.by_kind(calls)
    columns = {"step_gflop": sum(flop for _, flop, _ in kinds.values()) / 1e9}
    for name, (count, flop, moved) in kinds.items():
        columns |= {f"{name}_calls": count, f"{name}_gflop": flop / 1e9, f"{name}_mib": moved / 2**20}
    return {f"operations_{name}": value for name, value in columns.items()}


def _flat(gradients, golden):
    """Gradients as one row, each parameter's over the largest number of its golden gradient."""
    return torch.cat([(gradients[name] / golden[name].abs().max()).flatten() for name in golden])[None]


def _first_calls(parts, module, expected, pixels, settings):
    """Compares gradients (ours) or the loss with timm's, and fills in the first call and the backends."""
    row = parts[training_step.STEP].row
    golden, eager, loss = expected
    if row["provider"] == PLAIN:
        with backends.recording() as choices:
            found = training_step.gradients(module, pixels[:PARITY_IMAGES], settings)
        if missing := golden.keys() - found.keys():
            row["status"] = f"parity failed: no gradient of {', '.join(sorted(missing)[:3])}"
            return
        used = {name: tensor for name, tensor in golden.items() if tensor.abs().max() > 0}
        verdict = parity.compare(
            *(_flat(gradients, used) for gradients in (found, eager, golden)), settings.compute_dtype
        )
        row.update({name: value for name, value in verdict.columns().items() if "top1" not in name})
        row["vit_fast_backend"] = "+".join(sorted({chosen for _, chosen, _ in choices})) or "torch"
        row["vit_fast_reasons"] = "; ".join(dict.fromkeys(why for *_, reasons in choices for why in reasons))
        if not verdict.passed:
            row["status"] = "parity failed"
            return
    seconds, own = measure.seconds(parts[training_step.FORWARD_BACKWARD].call, settings.device)
    again, _ = measure.seconds(parts[training_step.STEP].call, settings.device)
    row["first_call_s"] = seconds + again
    # Sums in another order: a thousand units of the last place of a loss of some 7.
    tolerance = 1e3 * torch.finfo(settings.compute_dtype).eps if settings.compute_dtype == torch.float32 else 0.05
    if not abs(own.item() - loss) <= tolerance * abs(loss):
        row["status"] = f"parity failed: the loss is {own.item():.6g}, timm's {loss:.6g}"
        if row["provider"] != PLAIN:
            row["status"] = f"not timed: {row['status']}"


def _memory(provider, module, settings):
    kept = 3 * measure.weight_bytes(module)  # the weights and the two moments of AdamW, which outlive a step
    peak, method = measure.peak_memory(provider.call, kept, settings.device)
    provider.row["peak_memory_mib"] = None if peak is None else peak / 2**20
    provider.row["peak_memory_method"] = f"weights and moments of AdamW and {method.removeprefix('weights + ')}"


def _fill_in(timed, batch):
    """Figures of the timed rows: speed, speedup over each baseline and over the best one, for both parts."""
    for part, prefix in PREFIXES.items():
        group = {name: parts[part] for name, parts in timed.items() if parts[part].row["status"] == "ok"}
        drift = speedup.drift([provider.rounds for provider in group.values()])
        for provider in group.values():
            figures = measure.summary(provider.steps, batch)
            provider.row.update({key.replace("infer_", prefix): value for key, value in figures.items()})
            provider.row[f"{prefix}drift"] = drift
            provider.row["num_bench_iter"] = len(provider.steps)
            achieved = provider.row["operations_step_gflop"] / provider.row[f"{prefix}step_time"]
            peak = provider.row["matmul_peak_tflops"]
            provider.row[f"{prefix}achieved_tflops"] = achieved
            provider.row[f"{prefix}percent_of_peak"] = peak and 100 * achieved / peak
        speed = f"{prefix}samples_per_sec"
        baselines = [provider for name, provider in group.items() if name != PLAIN]
        for provider in group.values():
            for baseline in baselines:
                ratio = provider.row[speed] / baseline.row[speed]
                provider.row[f"{prefix}{speedup_column(baseline.name)}"] = ratio
        ours = group.get(PLAIN)
        if ours is None or not baselines:
            continue
        best = max(baselines, key=lambda baseline: baseline.row[speed])
        found = speedup.speedup(ours.rounds, best.rounds)
        figures = dict(best_baseline=best.name, speedup_vs_best_baseline=ours.row[speed] / best.row[speed])
        figures |= dict(paired_speedup=found.ratio, paired_speedup_low=found.low, paired_speedup_high=found.high)
        figures |= dict(compared_rounds=found.rounds)
        for baseline in baselines:  # the target is against eager, whichever is the best
            pair = speedup.speedup(ours.rounds, baseline.rounds)
            column = f"paired_{speedup_column(baseline.name)}"
            figures |= {column: pair.ratio, f"{column}_low": pair.low, f"{column}_high": pair.high}
        ours.row.update({f"{prefix}{key}": value for key, value in figures.items()})


def operations_of(row: Row) -> list[tuple[str, int, float, float]]:
    """(kind, calls, GFLOP, MiB) of the operations of a row's forward and backward, the most FLOP first."""
    names = [key.removeprefix("operations_").removesuffix("_calls") for key in row if key.endswith("_calls")]
    return [(name, *(row[f"operations_{name}_{of}"] for of in ("calls", "gflop", "mib"))) for name in names]


def part_of(row: Row, part: str) -> Row:
    """The row as one of inference with the figures of a part, so that it is printed and drawn as those are."""
    prefix = PREFIXES[part]
    found = {key: value for key, value in row.items() if not key.startswith(("train_", "parity_"))} | {"part": part}
    for name in ("batch_size", "img_size", "gmacs"):
        found[f"infer_{name}"] = row[f"train_{name}"]
    for key, value in row.items():
        if key.startswith(prefix) and (
            prefix != "train_" or not key.startswith(PREFIXES[training_step.FORWARD_BACKWARD])
        ):
            name = key.removeprefix(prefix)
            found[f"infer_{name}" if name.startswith(("samples_per_sec", "step_time")) else name] = value
    return found | {"same_as_best_baseline": False}
