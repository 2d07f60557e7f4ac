"""``vit-fast list``: the names that ``create_model`` knows."""

from fnmatch import fnmatch
from typing import Annotated

import typer


def list_models(
    pattern: Annotated[str, typer.Argument(help="Only names that match, for example '*large*'.")] = "*",
):
    """Print the names of the models, one a line."""
    import vit_fast

    for name in vit_fast.list_models():
        if fnmatch(name, pattern):
            print(name)
