"""A time limit for a benchmark: which parts fit into it, and deadlines that end compilations that take too long.

The plan is made before parity, from the time of one call of the eager model: batch sizes and providers that do not fit
are left out, and a warning names them. How long a compilation takes is not known ahead, so it gets a deadline.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import vit_fast

from . import measure
from .contest import Contest, caller, provider_names
from .providers import COMPILE_MODES
from .settings import Settings

MIN_ROUNDS = 3
# The least cost of a batch size in calls of the eager model. Parity: float64 and eager's own logits; each provider: its
# first calls, the call that measures memory, and the rounds.
PARITY_CALLS, PROVIDER_CALLS = 5, 4 + MIN_ROUNDS
LEAST_COMPILE = 5.0  # seconds below which no compilation is tried


class TimeBudget:
    """Seconds for the whole command from ``start`` on; a limit of 0 means no limit.

    Attributes:
        compiled: the longest that compiling each provider has taken in this run.
    """

    def __init__(self, limit: float, start: float) -> None:
        self.limit, self.start = limit, start
        self.compiled: dict[str, float] = {}

    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left(self) -> float:
        """Seconds until the limit; infinity without one."""
        return self.limit - self.spent() if self.limit else float("inf")

    def compile_seconds(self, name: str) -> float:
        """Expected time to compile this provider: its own longest in this run, else the longest of any provider."""
        return self.compiled.get(name, max(self.compiled.values(), default=0.0))

    def add_compilation(self, name: str, seconds: float) -> None:
        """Records what compiling a provider has taken."""
        self.compiled[name] = max(self.compiled.get(name, 0.0), seconds)


class OutOfTime(BaseException):
    """A deadline has passed. A BaseException, so that no compiler catches it as a failure of its own."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises ``OutOfTime`` in its block after so many seconds; works only in the main thread and on Unix."""
    main = threading.current_thread() is threading.main_thread()
    if seconds == float("inf") or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Plan:
    """What fits into a time budget: {batch size: the least seconds that it takes}, and the providers to time."""

    batches: dict[int, float]
    providers: tuple[str, ...]


def _making_seconds(settings):
    """Estimated seconds to make the models, from the time of drawing a few random numbers: each parameter is drawn
    three times."""
    with torch.device("meta"):
        model = vit_fast.create_model(settings.model, **settings.constructor_kwargs())
    parameters = sum(p.numel() for p in model.parameters())
    sample = torch.empty(1 << 18)
    draws = (measure.seconds(lambda: torch.nn.init.trunc_normal_(sample), torch.device("cpu"))[0] for _ in range(3))
    return 3 * min(draws) * parameters / sample.numel()


def warn_of_short_time(settings: Settings, budget: TimeBudget, tell: Any) -> None:
    """Warns where making the models alone takes most of the time that is left."""
    if not budget.limit or settings.family:
        return
    making = _making_seconds(settings)
    if making > 0.5 * budget.left():
        tell.warn(
            f"of the time budget of {budget.limit:.3g} s, imports have taken {budget.spent():.0f} s, and making the "
            f"models takes some {making:.0f} s; one of ours beside one baseline at one batch size is never left out"
        )


def plan(settings: Settings, contest: Contest, budget: TimeBudget, tell: Any) -> Plan:
    """The plan for the time left, from the time of an eager call with one image; a warning names what does not fit."""
    ours, baselines = provider_names(settings, contest)
    if not budget.limit:
        return Plan(dict.fromkeys(settings.batch_sizes, 0.0), (*ours, *baselines))
    call = caller(contest.reference, contest.pixels[:1], settings)
    step = min(measure.seconds(call, settings.device)[0] for _ in range(2))

    def least(batch, providers):
        return step * batch * (PARITY_CALLS + PROVIDER_CALLS * len(providers))

    # Compiled providers are decided on later, from the compile times seen so far.
    providers = tuple(name for name in (*ours, *baselines) if name not in COMPILE_MODES and name not in contest.absent)
    first, *others = settings.batch_sizes
    left_out = []
    if least(first, providers) > budget.left():
        dropped = providers
        providers = tuple(name for side in (ours, baselines) for name in [n for n in side if n in dropped][:1])
        left_out += [name for name in dropped if name not in providers]
    batches, total = {first: least(first, providers)}, least(first, providers)
    for batch in others:
        if total + least(batch, providers) <= budget.left():
            batches[batch] = least(batch, providers)
            total += batches[batch]
        else:
            left_out.append(f"batch {batch}")
    compiled = tuple(name for name in baselines if name in COMPILE_MODES and name not in providers)
    if budget.left() - total < LEAST_COMPILE:
        left_out, compiled = [*compiled, *left_out], ()
    if contest.facts["matmul_peak_tflops"] is None:
        left_out.append("the peak of a matrix product")
    if left_out:
        tell.warn(
            f"the time budget of {budget.limit:.3g} s leaves out {', '.join(left_out)}; what remains takes about "
            f"{total:.0f} s more"
        )
    return Plan(batches, providers + compiled)
