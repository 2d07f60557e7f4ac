"""The results as a table, and as dicts for a file."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from .candidates import own_kernel


def one_line(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def config_dict(config: Any) -> dict[str, Any]:
    """A config as a dict for JSON."""
    kernel = own_kernel(config)
    return ({"kernel": kernel} if kernel else {}) | asdict(config)


def difference(row: dict[str, Any]) -> str:
    """The fields in which the best config differs from the one that the rule picks."""
    if row["best"] is None:
        return "none ran"
    if "kernel" in row["best"]:
        return " ".join(f"{word}={value}" for word, value in row["best"].items())
    changed = [f"{word} {old}→{row['best'][word]}" for word, old in row["picked"].items() if row["best"][word] != old]
    return ", ".join(changed) or "the rule's"


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table, sorted by possible gain; rows where the rule's own config does not run come first."""
    result = Table("problem", "rule µs", "best µs", "loss", "rank", "best library µs", "best config", title=title)
    for row in sorted(rows, key=lambda row: float("inf") if row["loss"] is None else row["loss"], reverse=True):
        name = min(row["libraries_us"], key=row["libraries_us"].get, default=None)
        result.add_row(
            row["problem"],
            "does not run" if row["picked_us"] is None else f"{row['picked_us']:.1f}",
            "" if row["best_us"] is None else f"{row['best_us']:.1f}",
            "" if row["loss"] is None else f"{row['loss']:.1%}",
            f"{row['rank'] or '-'}/{row['of']}",
            "" if name is None else f"{row['libraries_us'][name]:.1f} ({name})",
            difference(row),
        )
    return result
