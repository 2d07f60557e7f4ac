"""Starts ``python -P benchmarks/tune``; the head of ``__init__`` says what it does."""

import sys
from pathlib import Path

import typer

if __name__ == "__main__":
    # Python puts this folder first on the path; its files are imported as the package ``tune``, from the parent.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tune.command import main

    typer.run(main)
