"""vit_fast/bench/ is a library of its own: what imports it, and what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import imports

FILES = sorted((Path(__file__).parents[2] / "vit_fast" / "bench").glob("*.py"))


def imported(path):
    return [name for name, _ in imports(path, "vit_fast.bench")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_of_the_command_line_is_imported(path):
    for name in imported(path):
        assert not name.startswith(("vit_fast.cli", "typer", "rich")), name


def test_such_an_import_would_be_seen(tmp_path):
    source = tmp_path / "source.py"
    source.write_text("def f():\n    from ..cli import options\n    from vit_fast import cli\n    import typer\n")
    assert imported(source) == ["vit_fast.cli.options", "vit_fast.cli", "typer"]


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
