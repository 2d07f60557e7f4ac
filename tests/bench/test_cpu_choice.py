"""The script that measures where the CPU library is the faster (``benchmarks/cpu_choice.py``), on tiny sizes."""

import json
from pathlib import Path

import pytest
import torch
from support.scripts import loaded

from vit_fast.backends import cpu_choice
from vit_fast.backends.cpu import CPU

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_choice.py"


def test_chosen_from_the_rows_beyond_which_it_is_never_slower():
    with loaded(SCRIPT) as script:

        def rows(*ratios):
            return [script.Row("attention", "float32", 16 * 2**i, ratio, 1.0) for i, ratio in enumerate(ratios)]

        assert script.chosen_from(rows(0.9, 1.1, 1.2)) == 32
        assert script.chosen_from(rows(1.1, 0.9, 1.2)) == 64
        assert script.chosen_from(rows(1.1, 1.1, 0.9)) is None


@pytest.fixture
def library(cpu_extension):
    """The CPU library; afterwards its level and the number of threads are what they were."""
    level, threads = CPU.version(), torch.get_num_threads()
    yield
    CPU.use_level(level)
    torch.set_num_threads(threads)


@pytest.mark.extension
@pytest.mark.usefixtures("library")
def test_every_operation_and_dtype_is_measured(tmp_path, capsys):
    file = tmp_path / "rows.json"
    with loaded(SCRIPT) as script:
        script.main(json_file=file, level="generic", rows=[8, 16], width=64, turns=1, seconds=0.0)
    facts = json.loads(file.read_text())
    assert facts["level"] == "generic" and facts["width"] == 64
    found = {(row["operation"], row["dtype"], row["rows"]) for row in facts["rows"]}
    assert found == {(op, dtype, n) for op in cpu_choice.NATIVE_FLOAT32 for dtype in script.DTYPES for n in (8, 16)}
    assert all(row["torch_ms"] > 0 and row["cpu_ms"] > 0 for row in facts["rows"])
    printed = capsys.readouterr().out
    assert "level generic" in printed and printed.count("never") >= len(found) // 2


@pytest.mark.extension
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "change,words", (({"level": "mmx"}, "'mmx', expected one of generic"), ({"rows": [0]}, "expected 1 or more"))
)
def test_bad_arguments_are_named(change, words):
    with loaded(SCRIPT) as script, pytest.raises(Exception, match=words):
        script.main(**(dict(json_file=None, level="", rows=[8], width=64, turns=1, seconds=0.0) | change))
