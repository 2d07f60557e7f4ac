"""Writes docs/coverage/<library>.csv for the libraries that are named, and of all such files docs/coverage.md and the
table of the README.

    python -P tests/support/coverage_tables.py [timm transformers open_clip]

After an update of a library, or when more of it runs fused; some minutes for timm.
"""

import re
import sys
from pathlib import Path

from vit_fast import library_coverage as table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_IN_README = re.compile(r"(<!-- made by tests/support/coverage_tables.py -->\n)(?:\|.*\n)*")


def committed():
    """{library: rows} of the files in docs/coverage."""
    files = {library: DOCS / f"coverage/{library}.csv" for library in table.LIBRARIES}
    return {library: table.from_csv(file.read_text(encoding="utf-8")) for library, file in files.items()}


def main(libraries):
    for library in libraries:
        rows = [table.architecture_row(one) for one in table.LIBRARIES[library]()]
        (DOCS / f"coverage/{library}.csv").write_text(table.as_csv(rows), encoding="utf-8")
    tables, readme = committed(), ROOT / "README.md"
    (DOCS / "coverage.md").write_text(table.page(tables), encoding="utf-8")
    text = _IN_README.sub(lambda found: f"{found[1]}{table.readme_table(tables)}\n", readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
