"""Processes without a GPU that compile candidates ahead of their timing, into Triton's cache."""

import multiprocessing
import os
from collections.abc import Iterable
from typing import Any

import torch

from .candidates import Chip, calling, own_kernel, pretending
from .problems import PLANNED, VITS, WORKS, Problem
from .report import one_line

COMPILE_SECONDS = 60
NOT_COMPILED = "not compiled in time"


class _Target:
    """Stands in for Triton's driver: names the target and has no device."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def become_compiler(chip: Chip) -> None:
    """Makes every launch of this process a compile for ``chip``, into Triton's cache; nothing runs."""
    import triton

    def compile_only(self, key, signature, device, constexprs, options, attrs, warmup):
        source = self.ASTSource(self, signature, constexprs, attrs)
        self.compile(source, target=triton.runtime.driver.active.get_current_target(), options=options.__dict__)

    os.nice(5)
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Target(chip.arch))
    triton.JITFunction._do_compile = compile_only


def compile_ahead(problem: Problem, config: Any, chip: Chip) -> str | None:
    """Compiles a candidate; returns None, or the error."""
    try:
        with pretending(chip):
            work = WORKS[problem.operation](problem, VITS[problem.model], PLANNED)
            with calling(problem, work, config) as call:
                call()
    except Exception as error:  # what Triton and ptxas raise for a config that cannot be compiled
        return one_line(error)
    return None


class Compilers:
    """Processes that compile candidates in the order in which they are timed; none where ``jobs`` is 0.

    Compiled code does not depend on the batch size, so each (shape, config) is compiled once.
    """

    def __init__(self, jobs: int, chip: Chip) -> None:
        self.chip = chip
        self.results: dict[Any, Any] = {}
        spawn = multiprocessing.get_context("spawn")  # not fork: this process may hold a GPU
        self.pool = spawn.Pool(jobs, become_compiler, (chip,)) if jobs else None

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()

    def _key(self, problem, config):
        return problem.operation, problem.name, problem.model, config

    def submit(self, problem: Problem, configs: Iterable[Any]) -> None:
        """Queues candidates."""
        for config in configs:
            key = self._key(problem, config)
            if self.pool is not None and key not in self.results and own_kernel(config) != "cutlass":  # compiled it is
                self.results[key] = self.pool.apply_async(compile_ahead, (problem, config, self.chip))

    def result(self, problem: Problem, config: Any, seconds: float) -> str | None:
        """Waits for a candidate and returns the result of ``compile_ahead``."""
        result = self.results.get(self._key(problem, config))
        if result is None:
            return None
        try:
            return result.get(max(0.0, min(seconds, COMPILE_SECONDS)))
        except multiprocessing.TimeoutError:
            return NOT_COMPILED
