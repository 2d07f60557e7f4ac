"""The command line: one file per verb, and beside them one file per subject that a verb needs."""

import importlib
import sys


class CommandError(Exception):
    """A failure that the user can mend: its text is all that is printed."""


def require(module, extra):
    """Imports a module of an optional dependency, or says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = (error.name or module).split(".")[0]
        cause = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails to import ({error})"
        raise CommandError(f"{name} {cause}; pip install 'vit-fast[{extra}]' brings it") from error


def main(arguments=None):
    """Entry point of ``vit-fast`` and of ``python -m vit_fast``."""
    try:
        typer = require("typer", "cli")
        require("rich", "cli")
        from .bench import bench
        from .check import check
        from .convert import convert
        from .info import info
        from .list import list_models
        from .profile import profile

        app = typer.Typer(
            name="vit-fast",
            help="Fast Vision Transformers: benchmark them, check them, see what runs here.",
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            no_args_is_help=True,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        app.command()(bench)
        app.command()(check)
        app.command()(convert)
        app.command()(info)
        app.command("list")(list_models)
        app.command()(profile)
        app(args=arguments, prog_name="vit-fast")
    except CommandError as error:
        print(f"vit-fast: {error}", file=sys.stderr)
        sys.exit(1)
