"""The folder of a run. A file in it is written whole under another name and then renamed: what a failure interrupts
leaves the file of before.

``last.pth``               all that the run needs to go on (``state``)
``last.safetensors``       the weights after the last epoch, averaged ones where the run keeps them, adapters merged
``best.safetensors``       the same after the epoch with the best top-1 accuracy
``args.json``              the settings
``summary.csv``, ``.png``  a row for each epoch; loss, accuracy and learning rate drawn
"""

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from vit_fast.bench.errors import require

from .errors import TrainingError
from .settings import Settings

STATE, LAST, BEST, ARGUMENTS, TABLE, PLOT = (
    "last.pth",
    "last.safetensors",
    "best.safetensors",
    "args.json",
    "summary.csv",
    "summary.png",
)


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def claim(folder: Path, resumed: bool) -> None:
    """Makes the folder of a run; refuses one that cannot be written, or that has another run in it.

    What a process that was killed had half written is deleted.

    resumed: whether the run goes on with the state in that folder.
    """
    # Settings alone are what a run leaves that ended before it saved anything.
    found = [name for name in (STATE, LAST, BEST, TABLE) if (folder / name).exists()]
    if found and not resumed:
        way = f"--resume {folder} goes on with it" if STATE in found else f"it has no state: delete {folder}"
        raise TrainingError(
            f"--output: {str(folder)!r} has a run in it ({', '.join(found)}): {way}, or name another folder"
        )
    try:
        for name in (STATE, LAST, BEST, ARGUMENTS, TABLE, PLOT):
            for path in folder.glob(f".{name}.*.tmp"):
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / ".writable"):
            pass
        (folder / ".writable").unlink()
    except OSError as error:
        raise TrainingError(
            f"--output: {str(folder)!r} cannot be written ({error.strerror or error}), expected a folder that can"
        ) from error


def _save(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    try:
        with written(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise TrainingError(f"{str(path)!r} cannot be written ({error}); the one of before is kept") from error


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state of a run."""
    _save(folder / STATE, lambda file: torch.save(state, file))


def save_weights(path: Path, weights: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
    """Writes a state_dict as safetensors; facts go into its metadata."""
    safetensors = require("safetensors.torch", "train")
    content = safetensors.save(weights, metadata={"format": "pt"} | facts)
    _save(path, lambda file: file.write(content))


def save_settings(folder: Path, settings: Settings) -> None:
    """Writes the settings."""
    text = json.dumps(settings.as_dict(), indent=1, ensure_ascii=False) + "\n"
    _save(folder / ARGUMENTS, lambda file: file.write(text.encode()))


def save_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of the epochs as CSV."""
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    _save(folder / TABLE, lambda file: file.write(text.getvalue().encode()))


def save_plot(folder: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draws loss, accuracy and learning rate by epoch."""
    require("matplotlib", "train")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [row["epoch"] + 1 for row in rows]
    figure, (losses, accuracy, rate) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, names, label in (
        (losses, ("train_loss", "eval_loss"), "loss"),
        (accuracy, ("eval_top1",), "top-1 accuracy, %"),
        (rate, ("lr",), "learning rate"),
    ):
        for name in names:
            axes.plot(epochs, [row[name] for row in rows], label=name, marker="." if len(rows) < 40 else None)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        if len(names) > 1:
            axes.legend()
    figure.suptitle(title, size=10)
    _save(folder / PLOT, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)
