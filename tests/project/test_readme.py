"""The README's lines of Python run as they are printed, and its commands exist."""

import re
from pathlib import Path

import pytest
import timm

import vit_fast

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


ON_A_CPU = README.index("## On a CPU"), README.index("## Train")  # needs the C++ library


def run(text):
    """What the Python blocks of a text compute."""
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        scope = {}
        exec(compile(block, "README.md", "exec"), scope)
        yield scope["logits"].shape if "logits" in scope else scope["certificate"].passed


def test_python_runs_as_printed(capsys):
    start, end = ON_A_CPU
    assert [*run(README[:start] + README[end:])] == [(2, 1000), (2, 1000), (2, 1000), True]
    out = capsys.readouterr().out
    assert out.count("layernorm_mlp") == 2 and "parity holds" in out


@pytest.mark.extension
def test_python_for_a_cpu_runs_as_printed(cpu_extension):
    assert [*run(README[slice(*ON_A_CPU)])] == [(1, 1000)]


def test_commands_and_counts_are_true():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    names = vit_fast.list_models()
    shared = set(names) & set(timm.list_models())
    assert f"{len(names)} names" in README and f"{len(shared)} of them timm's" in README
    assert f"other {len(names) - len(shared)} names" in README
