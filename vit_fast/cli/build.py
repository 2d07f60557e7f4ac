"""``vit-fast build``: compiles the C++/CUDA extension into the cache, and shows that it loads."""

from typing import Annotated

import typer

from .errors import CommandError
from .output import say


def build(
    cuda: Annotated[bool, typer.Option("--cuda", help="Build the library for CUDA tensors too; needs nvcc.")] = False,
    cutlass: Annotated[
        bool, typer.Option("--cutlass", help="Build it, and the matrix products by CUTLASS, which take minutes.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build although it is there.")] = False,
) -> None:
    """Compile the C++/CUDA extension for this machine, once; later processes load it."""
    for name in ("cpu", *("cuda",) * (cuda or cutlass), *("cutlass",) * cutlass):
        _build(name, force)


def _build(name, force):
    from vit_fast import extension
    from vit_fast.csrc import build as builder

    try:
        plan = builder.plan(name)
        say(f"{name} extension, into {plan.library.parent}")
        if force or not builder.stands(plan):
            say(f"  by {plan.toolchain}, ninja {plan.ninja}")
            say(f"  {len(plan.steps)} steps, {plan.jobs} at a time, about {plan.estimate:.0f} s")
        library, found, seconds = builder.run(plan, force=force, tell=lambda line: say(f"  {line}"))
    except builder.BuildError as error:
        raise CommandError(f"the {name} extension was not built: {error}") from error
    size = f"{library.stat().st_size / 1024:.0f} KiB"
    say(f"  {'already there' if found else 'built'}: {library.name}, {size}, {seconds:.1f} s")
    if name != "cpu" and not _has_cuda():
        say("  this torch is built without CUDA and cannot load it")
    elif reasons := extension.load(name):
        raise CommandError("; ".join(reasons))
    elif extension.library(name) == library:
        say("  it loads")
    else:
        say(f"  {extension.library(name)}, which the package brings, is loaded before it")


def _has_cuda():
    import torch

    return torch.version.cuda is not None
