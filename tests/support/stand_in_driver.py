"""A process in which CPU tensors take the path of a GPU of capability 9.0: compilations and launches are only counted.

Triton's own code runs up to its compiler and from there on to its launcher (``benchmarks/host_time.py``). It replaces
parts of Triton for the whole process, so tests run in a process of their own: ``in_child``.
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
COMPILED, LAUNCHED = [], []  # names of kernels
FAILS = set()  # names of kernels that do not compile


class Nothing:
    """What a kernel is compiled to."""

    function, packed_metadata = 0, ()

    def __init__(self, name):
        self.name = name

    def launch_metadata(self, grid, stream, *args):
        return None

    @property
    def run(self):
        return lambda *launch: LAUNCHED.append((self, launch))

    def __getitem__(self, grid):
        return lambda *args, stream=None: LAUNCHED.append((self, (*grid, stream, *args)))


def pretend():
    """From here on, in this process."""
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    import host_time
    import torch
    from triton import compiler

    def compile_(source, target=None, options=None, _env_vars=None):
        name = source.fn.fn.__name__
        COMPILED.append(name)
        if name in FAILS:
            raise RuntimeError(f"ptxas died of {name}")
        return Nothing(name)

    torch.set_num_threads(1)
    host_time.pretend()
    compiler.compile = compile_


def in_child(path, function):
    """Runs a function of a test file in a process of its own, and fails with its output where it fails."""
    code = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(path.parent)!r}]; import {path.stem} as t; t.{function}()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
