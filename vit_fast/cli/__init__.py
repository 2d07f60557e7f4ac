"""The command line: flags and printing, one file per verb, and what they share: ``options``, ``output``, ``report``."""

import contextlib
import os
import sys
from collections.abc import Sequence

from vit_fast.bench.errors import BenchError, is_out_of_memory, require

from .errors import INTERRUPTED


def _app():
    typer = require("typer", "cli")
    require("rich", "cli")
    from .bench import bench
    from .build import build
    from .check import check
    from .convert import convert
    from .coverage import coverage
    from .doctor import doctor
    from .info import info, show_version
    from .list import list_models
    from .profile import profile
    from .train import train

    app = typer.Typer(
        name="vit-fast",
        help="Fast Vision Transformers: benchmark them, check them, see what runs here.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(show_version)
    app.command()(bench)
    app.command()(build)
    app.command()(check)
    app.command()(convert)
    app.command()(coverage)
    app.command()(doctor)
    app.command()(info)
    app.command("list")(list_models)
    app.command()(profile)
    app.command()(train)
    return app


def _discard_output():
    """Points standard output at the null device; otherwise flushing its buffer would fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor has nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``vit-fast`` and of ``python -m vit_fast``."""
    try:
        try:
            _app()(args=arguments, prog_name="vit-fast")
        finally:
            sys.stdout.flush()
    except BenchError as error:
        print(f"vit-fast: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or ["no more is told"])[0]
        print(f"vit-fast: out of memory, expected smaller sizes: {first}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        _discard_output()
        if not isinstance(error, BrokenPipeError):  # the reader of the pipe, such as head, has closed it
            print(f"vit-fast: {error}", file=sys.stderr)
        sys.exit(1)
