"""The files that a benchmark writes: rows as CSV or JSON, and a plot of them. Needs no torch."""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import WrongValueError
from .providers import SCALED_MM

Row = dict[str, Any]

# The first columns of a file, timm's names before ours; further columns of a row follow in the order of the row.
COLUMNS = (
    "model",
    "provider",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "infer_img_size",
    "infer_gmacs",
    "param_count",
    "status",
    "product_dtype",
    "infer_samples_per_sec_p20",
    "infer_samples_per_sec_p80",
    "latency_ms",
    "speedup_vs_best_baseline",
    "best_baseline",
    "first_call_s",
    "cold_cache",
    "peak_memory_mib",
    "parity_relative_error",
    "achieved_tflops",
    "percent_of_peak",
)


# Of these a row of training has others.
_INFERENCE_ONLY = (
    "latency_ms",
    "speedup_vs_best_baseline",
    "best_baseline",
    "cold_cache",
    "achieved_tflops",
    "percent_of_peak",
)


def speedup_column(baseline: str) -> str:
    """The column of a provider's speedup over a baseline."""
    return f"speedup_vs_{baseline.replace('-', '_')}"


def check_writable(path: Path) -> None:
    """Raises WrongValueError unless ``path`` can be opened for writing; removes a file that the check creates."""
    if path.is_dir():
        raise WrongValueError(str(path), "the name of a file, not of a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        with open(path, "ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise WrongValueError(str(path), f"a file that can be written ({error.strerror or error})") from error


def _finite(value):
    """The value with None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path, file_format, content, rows):
    """``content`` as JSON, or ``rows``, which have the same keys, as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        if file_format == "json":
            json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def write_rows(rows: list[Row], path: Path, file_format: str) -> None:
    """The rows of a comparison as a JSON list or as CSV, one row a provider and batch size."""
    first: tuple[str, ...] = COLUMNS
    if rows and rows[0].get("bench") == "train":
        first = tuple(name.replace("infer_", "train_") for name in COLUMNS if name not in _INFERENCE_ONLY)
    names = dict.fromkeys([*first, *(key for row in rows for key in row)])
    rows = [{name: row.get(name) for name in names} for row in rows]
    _write(path, file_format, [{name: _finite(value) for name, value in row.items()} for row in rows], rows)


def write_profile(facts: Row, rows: list[Row], path: Path) -> None:
    """The rows of a profile, by the ending of the name: JSON {facts, rows}, or CSV with the facts in each row."""
    _write(path, path.suffix.removeprefix("."), {"facts": facts, "rows": rows}, [row | facts for row in rows])


def draw(rows: list[Row], path: Path) -> None:
    """Images per second by batch size and provider, with bars from p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["status"] == "ok"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if not rows:
        axes.text(0.5, 0.5, "no row was timed", ha="center")
        figure.savefig(path, dpi=150)
        return
    batches = sorted({row["infer_batch_size"] for row in rows})
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        own = [row for row in rows if row["provider"] == provider]
        places = [batches.index(row["infer_batch_size"]) + (index - (len(providers) - 1) / 2) * width for row in own]
        median = [row["infer_samples_per_sec"] for row in own]
        below = [row["infer_samples_per_sec"] - row["infer_samples_per_sec_p20"] for row in own]
        above = [row["infer_samples_per_sec_p80"] - row["infer_samples_per_sec"] for row in own]
        label = f"timm {provider}" if provider.startswith(("eager", "compile", SCALED_MM)) else provider
        bars = axes.bar(places, median, width, yerr=[below, above], capsize=2, label=label)
        axes.bar_label(bars, [f"{value:.3g}" for value in median], fontsize=7, padding=2)
    speeds = [row["infer_samples_per_sec"] for row in rows]
    if max(speeds) > 20 * min(speeds):
        axes.set_yscale("log")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch size")
    axes.set_ylabel("images / s (median; bars p20 to p80)")
    row = rows[0]
    dtype = f"autocast {row['amp_dtype']}" if row["amp_dtype"] else row["precision"]
    axes.set_title(f"{row['model']}, {dtype}, {row['device_name']}, torch {row['torch']}, {row['date'][:10]}", size=10)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
