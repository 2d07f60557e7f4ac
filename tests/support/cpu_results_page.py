"""Writes docs/cpu_results.md from the files of ``vit-fast bench`` in benchmarks/results/cpu/:
``python -P tests/support/cpu_results_page.py``."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PAGE = ROOT / "docs" / "cpu_results.md"
HEAD = """# Speed and errors on a CPU

Written by `tests/support/cpu_results_page.py` from the files of `vit-fast bench` in `benchmarks/results/cpu/`; a row
is one of our forms in one run. Rates are images per second, ratios are medians over the rounds of that run with their
95 % interval, the error is the norm of the errors of the logits against float64 over the norm of the logits. "Busy"
runs began with other programs running (a load above the number of threads): their ratios hold better than their rates.

| run | model | batch | threads | weights | form | images/s | × eager | × best other | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
TARGET = 0.7  # of the error of int8 over that of OpenVINO's
INT8 = f"""
## Errors of int8 beside OpenVINO's

Both in one run: ours without calibration data, OpenVINO's static int8 by NNCF, calibrated on 300 images. The aim is at
most {TARGET} of OpenVINO's error.

| run | commit | model | batch | weights | ours | OpenVINO's | ratio | aim |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def runs() -> dict[str, list[dict[str, Any]]]:
    """Name of a file → its rows of inference that were timed and compared with float64; the newest first."""
    found, needed = {}, {"infer_samples_per_sec", "parity_relative_error"}
    for path in sorted(RESULTS.glob("*.json"), reverse=True):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(rows, list):  # else the file of another benchmark
            found[path.stem] = [row for row in rows if row["status"] == "ok" and needed <= row.keys()]
    return {name: rows for name, rows in found.items() if rows}


def speed_row(run: str, row: dict[str, Any]) -> str:
    """A line of the table of speeds."""
    busy = " (busy)" if row["load_average"] > row["cpu_threads"] else ""
    best = "—"
    if row.get("paired_speedup"):  # there is no other where the run timed ours alone
        low, high = row["paired_speedup_low"], row["paired_speedup_high"]
        interval = "too few rounds" if low is None else f"{low:.2f}–{high:.2f}"
        best = f"{row['paired_speedup']:.2f} ({interval}) {row['best_baseline']}"
    form = row["provider"].removeprefix("vit_fast-").replace("vit_fast", "plain")
    form += f", {row['precision']}" * (form != "int8")
    rate, error = f"{row['infer_samples_per_sec']:.1f}", f"{row['parity_relative_error']:.1e}"
    cells = run + busy, row["model"], row["infer_batch_size"], row["cpu_threads"], row["weights"], form
    return _line(*cells, rate, f"{row['speedup_vs_eager']:.2f}", best, error)


def int8_rows(run: str, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table of int8 errors: for each batch size of a run that timed both."""
    by = {(row["provider"], row["infer_batch_size"]): row for row in rows}
    lines = []
    for (provider, batch), ours in by.items():
        other = by.get(("openvino-int8", batch))
        if provider == "vit_fast-int8" and other:
            errors = [row["parity_relative_error"] for row in (ours, other)]
            ratio = errors[0] / errors[1]
            told = *(f"{100 * error:.1f} %" for error in errors), f"{ratio:.2f}", "met" if ratio <= TARGET else "missed"
            lines.append(_line(run, ours["vit_fast_commit"], ours["model"], batch, ours["weights"], *told))
    return lines


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def page() -> str:
    """The text of the page."""
    speeds = [
        speed_row(run, row) for run, rows in runs().items() for row in rows if row["provider"].startswith("vit_fast")
    ]
    errors = [line for run, rows in runs().items() for line in int8_rows(run, rows)]
    return HEAD + "".join(speeds) + INT8 + "".join(errors)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
