"""The candidates of a problem, timed and ranked, and where the config of the shipped rule stands among them."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from vit_fast.bench import measure

from . import guarded as guarding
from .candidates import Chip, calling, candidates, may_hang, own_candidates, picked
from .compilers import NOT_COMPILED, Compilers
from .guarded import Guarded
from .problems import VITS, WORKS, Maker, Problem
from .report import config_dict, difference, one_line
from .timing import NO_TIME, Reference, Timer, check_and_time, median_us

STEPS, FINAL_STEPS = 15, 40


def _time_candidates(problem, work, configs, compilers, timer, end, device, dtype, guarded):
    """({config: µs}, [(config, why not)])."""
    reference = Reference.of(work)
    times, failures = {}, []
    for config in configs:
        left = end - time.monotonic()
        said = NO_TIME if left <= 0 else compilers.result(problem, config, left)
        if said in (NO_TIME, NOT_COMPILED):
            failures.append((config, said))
            continue  # other errors of the compiler recur on the device and are recorded there
        try:
            if may_hang(config):
                took, why = guarded.time(problem, config, STEPS, end - time.monotonic())
            else:
                took, why = check_and_time(problem, work, reference, config, STEPS, device, dtype, timer)
        except Exception as error:  # a config that fails is recorded, and the next is tried
            failures.append((config, one_line(error)))
            measure.synchronize(device)  # raises where the device is lost
            continue
        if took is None:
            failures.append((config, why))
        else:
            times[config] = took
    return times, failures


def tune(
    problem: Problem,
    chip: Chip,
    make: Maker,
    compilers: Compilers,
    timer: Timer,
    end: float,
    guarded: Guarded | None = None,
    kind: str = "all",
) -> dict[str, Any]:
    """The row of a problem: times of its candidates and of the libraries, and the rank of the rule's config."""
    torch.manual_seed(0)
    device, dtype = make.device, make.dtype
    work = WORKS[problem.operation](problem, VITS[problem.model], make)
    pick = picked(problem.operation, work.kernel)
    configs_ = candidates(problem, pick, chip, kind)
    if guarded:
        configs_ += own_candidates(problem, work, chip, kind)
    times, failures = _time_candidates(problem, work, configs_, compilers, timer, end, device, dtype, guarded)
    ranking = sorted(times, key=times.get)
    for config in ranking[:3] if pick not in times else dict.fromkeys([*ranking[:3], pick]):
        if may_hang(config):
            times[config], why = guarded.time(problem, config, FINAL_STEPS, guarding.RUN_SECONDS)
            if why is not None:
                del times[config]
                failures.append((config, why))
        else:
            with calling(problem, work, config) as call:
                times[config] = median_us(call, FINAL_STEPS, device, timer)
    ranking = sorted(times, key=times.get)
    libraries = {}
    for name, call in work.libraries.items():
        try:
            call()
            libraries[name] = median_us(call, FINAL_STEPS, device, timer)
        except Exception as error:  # likewise a library that cannot run the problem
            failures.append((name, one_line(error)))
    best, own = times[ranking[0]] if ranking else None, times.get(pick)
    return asdict(problem) | {
        "problem": str(problem),
        "picked": asdict(pick),
        "picked_us": own,
        "rank": ranking.index(pick) + 1 if own else None,
        "of": len(configs_),
        "best": config_dict(ranking[0]) if ranking else None,
        "best_us": best,
        "loss": own / best - 1 if own else None,
        "libraries_us": libraries,
        "ranking": [{"us": times[config], "config": config_dict(config)} for config in ranking],
        "failures": [{"config": c if isinstance(c, str) else config_dict(c), "why": why} for c, why in failures],
    }


def run(
    wanted: list[Problem],
    chip: Chip,
    make: Maker,
    compilers: Compilers,
    timer: Timer,
    end: float,
    keep: Callable[[list[Any], list[Any], list[Problem]], None],
    guarded: Guarded | None = None,
    kind: str = "all",
) -> None:
    """Tunes problem by problem while there is time; ``keep(rows, errors, problems not reached)`` after each."""
    rows, errors = [], []
    for done, problem in enumerate(wanted):
        if time.monotonic() >= end:
            break
        try:
            with torch.inference_mode():
                row = tune(problem, chip, make, compilers, timer, end, guarded, kind)
        except Exception as error:  # likewise a whole problem
            errors.append({"problem": str(problem), "why": one_line(error)})
            print(f"{problem}: {errors[-1]['why']}", flush=True)
            keep(rows, errors, wanted[done + 1 :])
            measure.synchronize(make.device)  # raises where the device is lost
            continue
        rows.append(row)
        keep(rows, errors, wanted[done + 1 :])
        own, best = (f"{row[us]:.1f}" if row[us] else "-" for us in ("picked_us", "best_us"))
        print(f"{problem}: rule {own} µs, best of {len(row['ranking'])} {best} µs: {difference(row)}", flush=True)
