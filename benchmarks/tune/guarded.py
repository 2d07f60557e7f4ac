"""Kernels that may hang are checked and timed in a separate process, which is ended when an answer is late."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from .candidates import own_kernel
from .problems import VITS, WORKS, Maker, Problem
from .report import one_line
from .timing import NO_TIME, Reference, check_and_time, kernel_seconds

START_SECONDS, RUN_SECONDS = 60, 20  # until the process is ready, until it answers


def _serve(connection, device, dtype):
    """Runs in that process: answers (problem, config, steps) with (µs, why not) until the pipe is closed."""
    make, known = Maker(device, dtype, filled=True), None
    make(1)
    connection.send("ready")
    while True:
        try:
            problem, config, steps = connection.recv()
        except EOFError:
            return
        try:
            with torch.inference_mode():
                if known is None or known[0] != problem:
                    torch.manual_seed(0)
                    work = WORKS[problem.operation](problem, VITS[problem.model], make)
                    known = problem, work, Reference.of(work)
                answer = check_and_time(*known, config, steps, device, dtype, kernel_seconds)
        except Exception as error:  # sent to the parent, which records it
            answer = None, one_line(error)
        connection.send(answer)


class Guarded:
    """A process that checks and times kernels that may hang; after a config has hung, none of its kernel is run."""

    def __init__(self, device: torch.device, dtype: torch.dtype, serve: Callable[..., None] = _serve) -> None:
        self.arguments, self.serve, self.process = (device, dtype), serve, None
        self.hung: dict[str | None, str] = {}  # kernel → what hung

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None

    def _ask(self, question, seconds):
        """The answer; None where there is none in time."""
        if question is not None:
            self.connection.send(question)
        return self.connection.recv() if self.connection.poll(max(0.0, seconds)) else None

    def time(self, problem: Problem, config: Any, steps: int, seconds: float) -> tuple[float | None, str | None]:
        """(median µs of a step, None), or (None, why there is no time)."""
        if hung := self.hung.get(own_kernel(config)):
            return None, hung
        try:
            if self.process is None:
                spawn = multiprocessing.get_context("spawn")  # not fork: this process may hold a GPU
                self.connection, theirs = spawn.Pipe()
                self.process = spawn.Process(target=self.serve, args=(theirs, *self.arguments), daemon=True)
                self.process.start()
                theirs.close()
                if self._ask(None, min(seconds, START_SECONDS)) is None:
                    self.close()
                    return None, NO_TIME if seconds < START_SECONDS else "the process of its own does not start"
            answer = self._ask((problem, config, steps), min(seconds, RUN_SECONDS))
        except (EOFError, OSError) as error:
            answer = None, f"the process of its own ended: {one_line(error)}"
        if answer is None:
            self.close()
            if seconds < RUN_SECONDS:
                return None, NO_TIME
            self.hung[own_kernel(config)] = f"not run: {config} of {problem} did not end"
            return None, f"did not end in {RUN_SECONDS} s"
        if answer[0] is None:
            self.close()  # its device may be lost
        return answer
