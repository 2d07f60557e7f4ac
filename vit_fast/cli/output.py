"""Output of a verb: tables and sentences that fit the terminal, and files, whose failure is reported in one line.

On a terminal, or if the variable COLUMNS is set, lines wrap at that width; in a pipe they do not wrap.
"""

import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

UNBOUNDED = 100_000  # columns


def _console():
    from rich.console import Console

    width = None
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdigit() and int(columns) else UNBOUNDED
    return Console(width=width, markup=False, highlight=False, emoji=False)


def say(text: str = "") -> None:
    """Prints text, wrapped between words."""
    _console().print(text)


def _longest_word(texts):
    from rich.cells import cell_len

    return max(cell_len(word) for text in texts for word in (text.split() or [""]))


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str] = ()) -> None:
    """Prints a table; no number or word is cut.

    The first column names the row. Columns that do not fit beside it go below, in further tables with the same first
    column; a head breaks between words, and so does the first column where the table does not fit.

    Args:
        heads: of the columns.
        rows: lists of strings, one a column.
        text: heads of further text columns, which are left-aligned and wrap where one alone is too wide.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table

    console, gap = _console(), 2
    columns = list(zip(heads, *rows))
    widths = [max([_longest_word([head]), *map(cell_len, cells)]) for head, *cells in columns]
    if sum(widths) + gap * (len(widths) - 1) > console.width:
        widths[0] = _longest_word(columns[0])
    room = max(console.width - widths[0] - gap, 1)
    blocks: list[list[int]] = [[]]
    used = 0
    for index in range(1, len(columns)):
        widths[index] = min(widths[index], max(room, _longest_word([heads[index]])))
        used += widths[index] + gap * bool(blocks[-1])
        if used > room and blocks[-1]:
            blocks.append([])
            used = widths[index]
        blocks[-1].append(index)
    for number, block in enumerate(blocks):
        if number:
            console.print()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
        for index in (0, *block):
            left = index == 0 or heads[index] in text
            table.add_column(
                heads[index], width=widths[index], justify="left" if left else "right", overflow="fold", vertical="top"
            )
        for row in rows:
            table.add_row(*(row[index] for index in (0, *block)))
        console.print(table, crop=False)


def save(kind: str, path: Path | None, write: Callable[[Path], object]) -> bool:
    """Writes a file by ``write(path)`` and says so, or says why not; False if it could not be written."""
    if path is None:
        return True
    try:
        write(path)
    except OSError as error:
        print(f"vit-fast: {path} was not written: {error.strerror or error}", file=sys.stderr)
        return False
    print(f"{kind}: {path}")
    return True
