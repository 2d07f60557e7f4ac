"""``vit-fast convert``: converts a checkpoint to another program's keys and reports on every key."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vit_fast.bench.errors import reason, require

from . import options
from .errors import CommandError
from .output import say


def _grid(option, text):
    """ "16x8" or "14" as (rows, columns)."""
    if text is None:
        return None
    sizes = text.lower().replace("×", "x").split("x")
    if len(sizes) > 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise CommandError(f"{option} is {text!r}, expected rows and columns such as 16x8, or one number for a square")
    return int(sizes[0]), int(sizes[-1])


def convert(
    source: Annotated[Path, typer.Argument(help="A .safetensors, .npz, .pth, .pt, .bin, .tar or .ckpt file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    to: Annotated[str, typer.Option(help="Keys to write: timm, canonical or jeonsworld.")] = "timm",
    family: Annotated[
        str | None, typer.Option("--from", help="Family of the file; recognised by its keys if not given.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Resize the position table to this grid, e.g. 16x8 or 24.")] = None,
    old_grid: Annotated[str | None, typer.Option(help="The file's own grid where it is not a square.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="R1 to R5, how the table is resized; the family's own if not given.")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the patches where a file holds their weights as a matrix.")
    ] = None,
    in_chans: Annotated[int | None, typer.Option(min=1, help="Adapt the first convolution to so many.")] = None,
    drop_head: Annotated[bool, typer.Option("--drop-head", help="Leave the classifier out.")] = False,
    torchscript: Annotated[
        bool, typer.Option("--torchscript", help="Read OpenAI's archives, by running TorchScript: only trusted files.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the target.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the last line of the report.")] = False,
) -> None:
    """Convert a checkpoint to safetensors in other keys; prints what became of every key."""
    from vit_fast.checkpoints import convert_file, registry

    for option, given, known in (("--to", to, registry.targets()), ("--from: family", family, registry.names())):
        if given is not None and given not in known:
            raise CommandError(f"{option} is {given!r}, expected one of {', '.join(known)}")
    if not source.is_file():
        raise CommandError(f"{source} {'is a folder' if source.is_dir() else 'does not exist'}, expected a checkpoint")
    if target.suffix != ".safetensors":
        raise CommandError(f"target is {str(target)!r}, expected a file name ending in .safetensors")
    if target.exists() and source.samefile(target):
        raise CommandError(f"{target} is the source itself, expected another file")
    if target.exists() and not force:
        raise CommandError(f"{target} exists; --force overwrites it")
    kwargs: dict[str, Any] = dict(
        family=family, policy=policy, in_chans=in_chans, drop_head=drop_head, torchscript=torchscript,
        patch_size=patch_size, grid=_grid("--grid", grid), old_grid=_grid("--old-grid", old_grid),
    )  # fmt: skip
    options.output_file("TARGET", target)
    safetensors = require("safetensors", "timm")
    try:
        report = convert_file(source, target, to, **kwargs)
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise CommandError(reason(error)) from error
    text = str(report)
    say(text.rsplit("\n", 1)[-1] if quiet else text)
