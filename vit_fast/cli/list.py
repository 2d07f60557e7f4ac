"""``vit-fast list``: the names that ``create_model`` knows, their families, their sizes."""

from collections import Counter
from fnmatch import fnmatch
from typing import Annotated

import typer

from . import CommandError

_COLUMNS = ("name", "family", "input", "classes", "parameters", "trainable")


def _family(name):
    """The file that builds a name: "vit" for the library's own class, else the family of vit_fast.systems."""
    from vit_fast.registry import PRESETS

    return PRESETS[name].build.__module__.rsplit(".", 1)[-1]


def _row(name, num_classes):
    """The columns of a name; nothing is allocated."""
    import torch

    import vit_fast

    with torch.device("meta"):
        try:
            model = vit_fast.create_model(name, num_classes=num_classes)
        except (TypeError, ValueError):
            # A tower or a regression model, which has no such word.
            model = vit_fast.create_model(name)
    facts = getattr(model, "default_cfg", {})
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return (
        name,
        _family(name),
        "×".join(str(size) for size in facts["input_size"]) if "input_size" in facts else "-",
        str(facts.get("num_classes", "-")),
        f"{sum(count for count, _ in counts):,}",
        f"{sum(count for count, trainable in counts if trainable):,}",
    )


def _print_table(rows):
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in ("classes", "parameters", "trainable") else cell.ljust(width)
            for cell, width, column in zip(row, widths, _COLUMNS, strict=True)
        ]
        print("  ".join(cells).rstrip())


def list_models(
    pattern: Annotated[str, typer.Argument(help="Only names that match, for example '*large*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only names of this family; --families has them.")] = None,
    families: Annotated[bool, typer.Option("--families", help="The families and how many names each has.")] = False,
    long: Annotated[bool, typer.Option("--long", "-l", help="A table: family, input, parameter counts.")] = False,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Count with so many classes; needs --long.")] = None,
):
    """Print the names of the models, one a line."""
    import vit_fast

    names = [name for name in vit_fast.list_models() if fnmatch(name, pattern)]
    counts = Counter(map(_family, vit_fast.list_models()))
    if family is not None:
        if family not in counts:
            raise CommandError(f"--family is {family!r}, expected one of {', '.join(sorted(counts))}")
        names = [name for name in names if _family(name) == family]
    if families:
        for name, count in sorted(Counter(map(_family, names)).items()):
            print(f"{name:<12} {count}")
    elif long:
        _print_table([_COLUMNS, *(_row(name, num_classes) for name in names)])
    else:
        for name in names:
            print(name)
