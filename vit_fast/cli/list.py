"""``vit-fast list``: the model names of ``create_model``, with their families and sizes."""

import difflib
import fnmatch
from collections import Counter
from typing import Annotated

import typer

from .errors import CommandError
from .output import show_table

_COLUMNS = ("name", "family", "input", "classes", "parameters", "trainable")


def _row(name, num_classes):
    """The columns of a name; nothing is allocated."""
    import torch

    import vit_fast
    from vit_fast.registry import module_of

    with torch.device("meta"):
        try:
            model = vit_fast.create_model(name, num_classes=num_classes)
        except (TypeError, ValueError):
            # A tower or a regression model, which has no argument num_classes.
            model = vit_fast.create_model(name)
    facts = getattr(model, "default_cfg", {})
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return (
        name,
        module_of(name),
        "×".join(str(size) for size in facts["input_size"]) if "input_size" in facts else "-",
        str(facts.get("num_classes", "-")),
        f"{sum(count for count, _ in counts):,}",
        f"{sum(count for count, trainable in counts if trainable):,}",
    )


def _matches(pattern):
    """The names that match a shell pattern, or that contain a text without wildcards."""
    from vit_fast.registry import names

    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return sorted(fnmatch.filter(names(), pattern))


def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Only names that hold this text, or match this pattern: large, '*patch16*'.")
    ] = "*",
    family: Annotated[str | None, typer.Option(help="Only names of this family; --families has them.")] = None,
    families: Annotated[bool, typer.Option("--families", help="The families and how many names each has.")] = False,
    long: Annotated[bool, typer.Option("--long", "-l", help="A table: family, input, parameter counts.")] = False,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Count with so many classes; needs --long.")] = None,
) -> None:
    """Print the names of the models, one a line."""
    if num_classes is not None and not long:
        raise CommandError("--num-classes is given without --long, which counts with it")
    if families and long:
        raise CommandError("--families is given with --long, expected one of the two")
    from vit_fast.registry import module_of

    names, known = _matches(pattern), _matches("*")
    counts = Counter(map(module_of, known))
    if family is not None:
        if family not in counts:
            raise CommandError(f"--family is {family!r}, expected one of {', '.join(sorted(counts))}")
        names = [name for name in names if module_of(name) == family]
    if not names:
        near = ", ".join(difflib.get_close_matches(pattern.strip("*"), known, n=5, cutoff=0.5))
        of = f" of family {family}" if family else ""
        raise CommandError(f"no model{of} matches {pattern!r}{near and '; near: ' + near}")
    if families:
        for name, count in sorted(Counter(map(module_of, names)).items()):
            print(f"{name:<26} {count}")
    elif long:
        show_table(_COLUMNS, [_row(name, num_classes) for name in names], text=("family", "input"))
    else:
        for name in names:
            print(name)
