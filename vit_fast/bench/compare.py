"""The benchmark of a model: our variants against the baselines, on the same weights, pixels and dtype, in one run.

Parity comes first: a provider whose logits are out of the error budget is not timed, and if it is one of ours, the run
counts as failed. Then the providers are timed in rounds (``rounds``). A row is one provider at one batch size; its
``status`` is "ok" or says why the row has no figures. ``product_dtype`` is what its matrix products multiply. A
baseline with products in float8 is compared with our float8 variants only; for our other variants the best baseline is
the fastest of the 16- and 32-bit ones.
"""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vit_fast
from vit_fast import backends, parity

from . import calibration, engines, measure, peak_rss, scaled_mm, time_budget
from . import contest as contests
from .baselines import best_attention, compiled_model
from .contest import caller, graphed, provider_names
from .errors import BenchError
from .providers import COMPILE_MODES, ENGINES, GRAPHED, INT8_ENGINES, OUR_GRAPHS, PLAIN, PRECISION_OF
from .recorders import AttentionOps, Operators
from .rounds import Provider, attempt, fill_in, outcome, release, time_rounds
from .settings import Settings
from .time_budget import LEAST_COMPILE, MIN_ROUNDS, OutOfTime, TimeBudget, deadline


class _Interrupted(Exception):
    """Ctrl-C after enough rounds of a batch size, whose rows are filled in."""

    def __init__(self, failed):
        super().__init__()
        self.failed = failed


def run(
    settings: Settings,
    budget: TimeBudget,
    tell: Any,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> bool:
    """Measures all batch sizes; returns whether vit_fast failed on any of them.

    After Ctrl-C the rows of a batch size that has enough rounds are kept too, then KeyboardInterrupt is raised.

    Args:
        tell: called with a text and the fraction done, as the work proceeds; ``tell.warn`` prints a line.
        keep: called with the rows of each batch size as soon as they are there.
    """
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    with forced, tempfile.TemporaryDirectory(prefix="vit-fast-bench-", ignore_cleanup_errors=True) as folder:
        time_budget.warn_of_short_time(settings, budget, tell)
        tell(f"{settings.model}: models and pixels", 0.0)
        contest = contests.prepare(settings, budget.left, tell)
        _make_engines(settings, contest, Path(folder), budget, tell)
        plan = time_budget.plan(settings, contest, budget, tell)
        failed, count = False, len(settings.batch_sizes)
        for index, batch in enumerate(settings.batch_sizes):

            def tell_batch(text, done, index=index, batch=batch):
                tell(f"batch {batch}: {text}", (index + done) / count)

            providers = _providers(settings, contest, batch, plan)
            interrupted = False
            if batch in plan.batches:
                later = {size: plan.batches[size] for size in settings.batch_sizes[index + 1 :] if size in plan.batches}
                try:
                    failed |= _bench_batch(settings, contest, batch, providers, budget, later, tell_batch)
                except _Interrupted as stop:
                    interrupted, failed = True, failed or stop.failed
            keep([provider.row for provider in providers])
            if interrupted:
                raise KeyboardInterrupt
            release(settings.device)
    return failed


def _make_engines(settings, contest, folder, budget, tell):
    """Adds the baselines of other inference engines to the contest; each may take half of the time that is left."""

    def calibrate():
        return calibration.load(settings, contest.reference, engines.CALIBRATION_IMAGES)

    for name in settings.baselines:
        if name not in ENGINES or settings.family:
            continue
        tell(f"{settings.model}: making {name}", 0.0)
        seconds_left = budget.left() / 2
        try:
            with deadline(seconds_left):
                engine, columns = engines.build(name, contest.reference, contest.pixels, folder, calibrate)
            contest.baselines[name], contest.own_facts[name] = engine, columns
        except OutOfTime:
            contest.absent[name] = f"not made in the {seconds_left:.0f} s that were left for it (--time-budget 0)"
        except BenchError as error:
            contest.absent[name] = str(error)
        except Exception as error:  # whatever a converter raises: the row tells it, the others go on
            contest.absent[name] = f"{name} cannot build it: {outcome(error).removeprefix('failed: ')}"


def _providers(settings, contest, batch, plan):
    """Our variants, then the baselines; a provider without a module or without time gets a row that says so."""
    our_names, baseline_names = provider_names(settings, contest)
    pixels, providers = contest.pixels[:batch], []
    for name in (*our_names, *baseline_names):
        model = contest.ours.get(name, contest.baselines.get(name))
        if name in OUR_GRAPHS and model is not None:
            model = graphed(model, batch)
        if name in COMPILE_MODES:
            model = compiled_model(model, name)
        row = dict(contest.facts, provider=name, infer_batch_size=batch, status="ok")
        row |= contest.own_facts.get(name, {})
        if name in contest.absent:
            row["status"] = f"not timed: {contest.absent[name]}"
        elif batch not in plan.batches or name not in plan.providers:
            row["status"] = f"not timed: no time left{' to compile it' if name in COMPILE_MODES else ''}"
        providers.append(Provider(name, caller(model, pixels, settings), row, ours=name in our_names))
    return providers


def _bench_batch(settings, contest, batch, providers, budget, later, tell):
    """Fills in the rows of one batch size; returns whether vit_fast failed on it.

    later: {batch size: the least seconds that it takes} of the batch sizes that follow.
    """
    pixels = contest.pixels[:batch]
    # torch.compile silently stops compiling a function after a number of shapes, so it is reset for each batch size.
    torch._dynamo.reset()
    ours = [provider for provider in providers if provider.ours]
    baselines = [provider for provider in providers if not provider.ours and provider.row["status"] == "ok"]

    tell("parity", 0.0)
    try:
        golden = parity.golden_logits(contest.reference, pixels)
        eager = caller(contest.reference, pixels, settings)().clone()
    except Exception as error:  # the reference fails on this device: out of memory, say; the rows tell it
        for provider in ours:
            provider.row["status"] = outcome(error)
    for provider in ours:
        attempt(provider, lambda p=provider: _judge(p, golden, eager, contest, pixels, settings), settings.device)
    well = [provider for provider in ours if provider.row["status"] == "ok"]
    if not well:
        first = ours[0].row["status"]
        why = "no variant of vit_fast to compare with" if first.startswith("not timed") else f"{ours[0].name}: {first}"
        for baseline in baselines:
            baseline.row["status"] = f"not timed: {why}"
        return any(provider.row["status"] != "out of memory" for provider in ours)

    timing = (MIN_ROUNDS + 1) * len(well + baselines) * well[0].warm_seconds
    compiled = [baseline.name for baseline in baselines if baseline.name in COMPILE_MODES]
    attention = {}
    for index, baseline in enumerate(baselines):
        tell(f"{baseline.name}, first call", (index + 1) / (len(baselines) + 1) / 2)
        module = contest.baselines[baseline.name]
        if baseline.name in ENGINES:
            attention[id(module)] = {}, None, contextlib.nullcontext  # not torch's operators
        if id(module) not in attention:
            attention[id(module)] = _attention(module, pixels, settings)
        columns, operators, baseline.context = attention[id(module)]
        baseline.row.update(columns)
        if baseline.name in COMPILE_MODES:
            # An earlier mode takes precedence at all batch sizes over a later one at any: time is reserved for it.
            before = compiled[: compiled.index(baseline.name)]
            kept_back = sum(least + sum(map(budget.compile_seconds, before)) for least in later.values())
            seconds_left = budget.left() - timing - kept_back
        else:
            baseline.operators, seconds_left = operators, float("inf")
        _first_call(baseline, golden, eager, contest, pixels, settings, budget, seconds_left)
    weights = measure.weight_bytes(contest.reference)
    if settings.peak_rss:
        for provider in providers:
            if provider.row["status"] == "ok":
                tell(f"{provider.name}, peak memory of its own process", 0.5)
                provider.row.update(peak_rss.columns(settings, provider.name, batch, pixels, contest.baselines))
    for provider in providers:
        attempt(provider, lambda provider=provider: _memory(provider, weights, settings.device), settings.device)
    kept_back = sum(map(budget.compile_seconds, compiled[:1])) * len(later)
    seconds = max(budget.left() - kept_back, 0.0) / (1 + len(later))
    interrupted = time_rounds(providers, settings, seconds, tell)
    fill_in(providers, settings, contest, batch)
    failed = any(provider.row["status"].startswith(("failed", "parity failed")) for provider in ours)
    if interrupted:
        raise _Interrupted(failed)
    return failed


def _plain_logits(provider, contest, pixels, settings):
    """Logits of the plain PyTorch form of a model whose precision has an error budget of its own, else None."""
    if _budget(provider) is None:
        return None
    if not provider.ours:
        return caller(scaled_mm.plain(contest.baselines[provider.name]), pixels, settings)().clone()
    with vit_fast.backend("torch"):
        return caller(contest.ours[provider.name], pixels, settings)().clone()


def _budget(provider):
    precision = PRECISION_OF.get(provider.name)
    return precision and precision.budget


def _judge(ours, golden, eager, contest, pixels, settings):
    """Fills in the parity of one of ours, its first call and which backends ran."""
    cold = measure.is_cold(contest.kernel_cache, "*.cubin")
    try:
        with backends.recording() as choices:
            first, logits = measure.seconds(ours.call, settings.device)
    except vit_fast.UnsupportedError as error:
        if ours.name == PLAIN:
            raise
        ours.row["status"] = f"not timed: {error}"
        return
    counted = Counter(f"{chosen} {op}" for op, chosen, _ in choices)
    reasons = dict.fromkeys(reason for _, chosen, why in choices if chosen == "torch" for reason in why)
    used = sorted({chosen for _, chosen, _ in choices})
    logits = ours.logits = logits.clone()
    ours.warm_seconds, _ = measure.seconds(ours.call, settings.device)
    if used == ["torch"] and ours.name not in OUR_GRAPHS:
        with Operators() as operators:
            caller(contest.ours[ours.name], pixels, settings, torch.no_grad)()
        ours.operators = operators.calls
    plain = _plain_logits(ours, contest, pixels, settings)
    verdict = parity.compare(logits, eager, golden, settings.compute_dtype, plain, _budget(ours))
    ours.row.update(
        verdict.columns(),
        first_call_s=first,
        cold_cache=cold if "triton" in used else None,
        vit_fast_backend="+".join(used),
        vit_fast_operations=", ".join(f"{name} ×{count}" for name, count in counted.items()),
        vit_fast_reasons="; ".join(reasons),
    )
    if not verdict.passed:
        ours.row["status"] = "parity failed"
    elif _budget(ours) and all(op != PRECISION_OF[ours.name].operation for op, *_ in choices):
        ours.row["status"] = f"failed: no block ran in {ours.products or PRECISION_OF[ours.name].name}"


def _attention(module, pixels, settings):
    """The fastest attention kernel of a module: (columns of its row, its operators, function that makes a context)."""
    way, context = best_attention(module, caller(module, pixels, settings), settings.device)
    ops, operators = AttentionOps(), Operators()
    with contextlib.suppress(Exception), context(), ops, operators:  # the first call of the provider reports a failure
        caller(module, pixels, settings, torch.no_grad)()
    return {"attention": way, "attention_operators": ", ".join(sorted(ops.names))}, operators.calls, context


def _first_call(baseline, golden, eager, contest, pixels, settings, budget, seconds_left):
    """Compiles the baseline, unless the time left is too short for that, and compares its logits."""
    compiled = baseline.name in COMPILE_MODES
    if compiled and seconds_left < max(budget.compile_seconds(baseline.name), LEAST_COMPILE):
        baseline.row["status"] = "not timed: no time left to compile it"
        return

    def work():
        cold = measure.is_cold(measure.compile_cache()) if compiled else None
        seconds, logits = measure.seconds(baseline.call, settings.device)
        if compiled:
            budget.add_compilation(baseline.name, seconds)
        if compiled or baseline.name in ENGINES:
            baseline.row.update(first_call_s=seconds, cold_cache=cold)
        baseline.logits = logits = logits.clone()
        plain = _plain_logits(baseline, contest, pixels, settings)
        verdict = parity.compare(logits, eager, golden, settings.compute_dtype, plain, _budget(baseline))
        if baseline.name in INT8_ENGINES:
            verdict = engines.judge(verdict)
        baseline.row.update(verdict.columns())
        if not verdict.passed:
            baseline.row["status"] = "not timed: parity failed"

    try:
        with deadline(seconds_left):
            attempt(baseline, work, settings.device)
    except OutOfTime:
        budget.add_compilation(baseline.name, seconds_left)
        baseline.row["status"] = f"not timed: not compiled in the {seconds_left:.0f} s that were left for it"
        torch._dynamo.reset()


def _memory(provider, weights, device):
    if device.type == "cuda" and provider.name in GRAPHED:
        peak, method = None, "not measured: a CUDA graph keeps its memory between calls"
    elif provider.name in ENGINES:
        peak, method = None, "not measured of other engines, which hold the weights in forms of their own (--peak-rss)"
    else:
        peak, method = measure.peak_memory(provider.call, weights, device)
    provider.row["peak_memory_mib"] = None if peak is None else peak / 2**20
    provider.row["peak_memory_method"] = method
