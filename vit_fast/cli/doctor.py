"""``vit-fast doctor``: does the library compute on this machine what it promises? A report for a bug tracker."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .output import save


def doctor(
    device: options.Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here too.")] = None,
) -> None:
    """Try every operation, backend and precision on this machine against float64; exit status 1 if one errs."""
    import vit_fast

    options.output_files({"--json": json_file})
    report = vit_fast.doctor(options.target_device(device))
    print(report)
    written = save("report", json_file, lambda path: path.write_text(json.dumps(report.as_dict(), indent=1) + "\n"))
    if not (report.passed and written):
        raise typer.Exit(1)
