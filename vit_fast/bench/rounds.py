"""Timing in rounds: each provider once a round, in random order, so that a drifting clock affects all of them alike.

``speedup`` has the statistics. ``fill_in`` turns the times into the figures of the rows.
"""

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import machine, measure, speedup
from .contest import Contest
from .errors import is_out_of_memory
from .providers import PRECISION_OF, narrow_dtype
from .results import speedup_column
from .settings import Settings
from .time_budget import MIN_ROUNDS


@dataclass
class Provider:
    """One provider at one batch size.

    Attributes:
        call: runs its model on the pixels; ``context`` makes the context of that call.
        row: its row of the result, whose ``status`` is "ok" or says why there are no figures.
        ours: whether it is one of our variants, not a baseline.
        rounds: the step times of each round, in seconds; ``latencies``: times of single calls.
        warm_seconds: of the second call.
        logits: what it computed.
        operators: the operators that it ran, from ``recorders``; None where unknown (compiled, in a CUDA graph, or in
            kernels of our own).
    """

    name: str
    call: Callable[[], Any]
    row: dict[str, Any]
    ours: bool = False
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    rounds: list[list[float]] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    warm_seconds: float = 0.0
    logits: torch.Tensor | None = None
    operators: list[Any] | None = None

    @property
    def products(self) -> str | None:
        """What its matrix products multiply, in words; None where it is the dtype of the weights."""
        return PRECISION_OF[self.name].products if self.name in PRECISION_OF else None

    def comparable(self, baseline: "Provider") -> bool:
        """Whether a baseline's matrix products multiply the dtype of the weights or what this provider's multiply."""
        return narrow_dtype(baseline.name) in (None, narrow_dtype(self.name))

    @property
    def steps(self) -> list[float]:
        """The step times of all rounds."""
        return [step for steps in self.rounds for step in steps]

    def same_as(self, other: "Provider") -> bool:
        """Whether both run the same operators and give the same bits."""
        if not self.operators or self.operators != other.operators or self.logits is None or other.logits is None:
            return False
        return torch.equal(self.logits, other.logits)


def release(device: torch.device) -> None:
    """Frees cached memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def outcome(error: BaseException) -> str:
    """The status of a row whose provider raised an exception."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def attempt(provider: Provider, work: Callable[[], None], device: torch.device) -> None:
    """Does the work if the provider's status is still "ok"; an exception becomes its status."""
    if provider.row["status"] != "ok":
        return
    try:
        with provider.context():
            work()
    except Exception as error:  # whatever a baseline or its compiler raises: its row tells it, the others go on
        provider.row["status"] = outcome(error)
    if provider.row["status"] != "ok":  # only here are the exception and the tensors in its frames freed
        release(device)


def _warm_up(provider, calls, seconds, device):
    end = time.perf_counter() + seconds
    for _ in range(calls):
        if time.perf_counter() > end:
            break
        provider.call()
        if seconds < float("inf"):
            measure.synchronize(device)
    measure.synchronize(device)


def time_rounds(
    providers: list[Provider], settings: Settings, seconds: float, tell: Callable[[str, float], None]
) -> bool:
    """Times the providers in rounds: the requested number, or as many as fit into the time, but at least 3.

    Returns:
        Whether Ctrl-C came after these 3; an earlier one is raised.
    """
    device, wanted = settings.device, settings.bench_iterations
    end = time.perf_counter() + seconds
    for provider in providers:
        warm = seconds / 5 / len(providers)
        attempt(provider, partial(_warm_up, provider, settings.warm_iterations, warm, device), device)
    on_gpu = device.type == "cuda"
    rounds = min(wanted, 10) if on_gpu else wanted
    order, draw = list(providers), random.Random(0)
    try:
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() > end:
                break
            tell(f"round {turn + 1} of {rounds}", 0.5 + turn / rounds / 2)
            calls = (turn + 1) * wanted // rounds - turn * wanted // rounds
            draw.shuffle(order)  # so that each follows every other provider at times
            for provider in order:

                def work(provider=provider, calls=calls):
                    steps = measure.step_times(provider.call, calls, device)
                    latencies = [measure.seconds(provider.call, device)[0] for _ in range(calls)] if on_gpu else steps
                    provider.rounds.append(steps)
                    provider.latencies += latencies

                attempt(provider, work, device)
    except KeyboardInterrupt:
        if turn < MIN_ROUNDS:
            raise
        return True
    return False


def fill_in(providers: Iterable[Provider], settings: Settings, contest: Contest, batch: int) -> None:
    """Fills in the figures of the timed rows: speed, and speedup over each baseline and over the best one."""
    state = machine.gpu_state(settings.device)
    timed = [provider for provider in providers if provider.row["status"] == "ok"]
    drift = speedup.drift([provider.rounds for provider in timed])
    for provider in timed:
        row = provider.row
        row.update(measure.summary(provider.steps, batch), **state)
        row["latency_ms"] = 1000 * statistics.median(provider.latencies)
        row["num_bench_iter"], row["drift"] = len(provider.steps), drift
        row["achieved_tflops"] = row["infer_samples_per_sec"] * contest.flops / 1e12
        peak = row["matmul_peak_tflops"]
        row["percent_of_peak"] = peak and 100 * row["achieved_tflops"] / peak
    baselines = [provider for provider in timed if not provider.ours]
    for baseline in baselines:
        for provider in timed:
            ratio = provider.row["infer_samples_per_sec"] / baseline.row["infer_samples_per_sec"]
            provider.row[speedup_column(baseline.name)] = ratio
    ours = [provider for provider in timed if provider.ours]
    for provider in ours:
        comparable = [baseline for baseline in baselines if provider.comparable(baseline)]
        if comparable:
            best = max(comparable, key=lambda baseline: baseline.row["infer_samples_per_sec"])
            ratio = provider.row["infer_samples_per_sec"] / best.row["infer_samples_per_sec"]
            provider.row.update(best_baseline=best.name, speedup_vs_best_baseline=ratio)
            found = speedup.speedup(provider.rounds, best.rounds, len(ours))
            provider.row.update(
                paired_speedup=found.ratio,
                paired_speedup_low=found.low,
                paired_speedup_high=found.high,
                compared_rounds=found.rounds,
                same_as_best_baseline=provider.same_as(best),
            )
