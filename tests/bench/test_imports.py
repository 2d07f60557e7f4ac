"""vit_fast/bench/ is a library of its own: what imports it, and what it imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve()
while not (PACKAGE / "vit_fast" / "bench").is_dir():
    PACKAGE = PACKAGE.parent
FILES = sorted((PACKAGE / "vit_fast" / "bench").glob("*.py"))


def imported(source):
    """The modules that a source of vit_fast/bench/ imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = {0: "", 1: "vit_fast.bench", 2: "vit_fast"}[node.level]
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_of_the_command_line_is_imported(path):
    for name in imported(path.read_text(encoding="utf-8")):
        assert not name.startswith(("vit_fast.cli", "typer", "rich")), name


def test_such_an_import_would_be_seen():
    source = "def f():\n    from ..cli import options\n    from vit_fast import cli\n    import typer\n"
    assert list(imported(source)) == ["vit_fast.cli.options", "vit_fast.cli", "typer"]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import vit_fast", "('vit_fast.bench', 'vit_fast.cli', 'timm', 'matplotlib', 'typer')"),
        ("import vit_fast.bench.compare", "('vit_fast.cli', 'typer', 'matplotlib')"),
        ("from vit_fast import cli; cli._app()", "('vit_fast.bench.compare', 'timm', 'matplotlib', 'torch._dynamo')"),
    ],
    ids=["library", "bench", "command line"],
)
def test_what_an_import_leaves_out(code, absent):
    check = f"{code}; import sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True, timeout=200)
    assert done.stdout == "[]\n", done.stdout + done.stderr
