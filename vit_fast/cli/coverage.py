"""``vit-fast coverage``: what of a model, or of each architecture of a library, runs on the fused operations."""

from typing import Annotated

import typer

from vit_fast.bench.errors import require

from . import options
from .errors import CommandError
from .output import say, show_table

_LIBRARIES = {"timm": "timm", "transformers": "transformers", "open_clip": "dev"}  # library → the extra that brings it
_FORMATS = ("table", "csv", "json", "md")


def _of_model(name):
    """Prints the coverage of one of timm's models."""
    import warnings

    import timm
    import torch

    import vit_fast

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = timm.create_model(name).eval()
    except RuntimeError as error:
        raise CommandError(f"timm has no model {name!r}: {error}") from error
    try:
        vit_fast.optimize(model)
        say(str(vit_fast.coverage(model)))
    except vit_fast.UnsupportedError:  # the text of the coverage has the reasons
        say(str(vit_fast.coverage(model)))
    except ValueError as error:
        raise CommandError(str(error)) from error


def coverage(
    model: Annotated[str | None, typer.Argument(help="timm's name of a model.")] = None,
    library: Annotated[str | None, typer.Option(help=f"All of a library's ViTs: {', '.join(_LIBRARIES)}.")] = None,
    output_format: Annotated[str, typer.Option("--format", help=f"With --library: {', '.join(_FORMATS)}.")] = "table",
) -> None:
    """Print what of a model runs fused after vit_fast.optimize, or the table of a library; nothing is allocated."""
    options.one_of("--format", output_format, _FORMATS)
    if (model is None) == (library is None):
        raise CommandError("expected a model, or --library")
    if library is None:
        if output_format != "table":
            raise options.wrong("--format", output_format, "it together with --library")
        require("timm", "timm")
        _of_model(model)
        return
    options.one_of("--library", library, tuple(_LIBRARIES))
    require(library, _LIBRARIES[library])
    from vit_fast import library_coverage as table

    rows = [table.architecture_row(one) for one in table.LIBRARIES[library]()]
    if output_format == "csv":
        print(table.as_csv(rows), end="")
    elif output_format == "json":
        print(table.as_json(rows), end="")
    elif output_format == "md":
        print(table.as_markdown(library, rows), end="")
    else:
        show_table(table.summary_heads(rows), [[str(cell) for cell in line] for line in table.summary(rows)])
        partly = [(row.architecture, f"{row.share:.1%}", row.reasons) for row in rows if not row.fully_fused]
        if partly:
            say()
            show_table(("architecture", "share", "reasons"), partly, text=("reasons",))
