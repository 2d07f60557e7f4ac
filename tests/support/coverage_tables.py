"""Writes docs/coverage/<library>.csv for the libraries that are named, and docs/coverage.md from all such files.

    python -P tests/support/coverage_tables.py [timm ...]

After an update of a library, or when more of it runs fused; some minutes for timm.
"""

import sys
from pathlib import Path

from vit_fast import library_coverage as table

DOCS = Path(__file__).parents[2] / "docs"


def committed():
    """{library: rows} of the files in docs/coverage."""
    files = sorted((DOCS / "coverage").glob("*.csv"))
    return {file.stem: table.from_csv(file.read_text(encoding="utf-8")) for file in files}


def main(libraries):
    for library in libraries:
        rows = [table.architecture_row(one) for one in table.LIBRARIES[library]()]
        (DOCS / f"coverage/{library}.csv").write_text(table.as_csv(rows), encoding="utf-8")
    (DOCS / "coverage.md").write_text(table.page(committed()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
