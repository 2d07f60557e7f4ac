"""The programs of examples/ run offline as they stand, and docs/examples.md shows what they print."""

import subprocess
import sys

import pytest
from support.examples_page import EXAMPLES, HEAD, PAGE, ROOT, output, section, stable

NEEDS = {"zero_shot": "transformers", "embed_open_clip": "open_clip", "finetune_lora": "peft"}


def test_every_program_is_in_the_page():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(HEAD) and page.count("\n## ") == len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_prints_what_the_page_shows(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    printed = output(name)
    assert "random weights" in printed and "without vit_fast" in printed and "False" not in printed
    assert stable(section(name, printed)) in stable(PAGE.read_text(encoding="utf-8"))


def test_a_checkpoint_without_an_image_is_refused():
    pytest.importorskip("transformers")
    command = [sys.executable, "-P", ROOT / "examples" / "zero_shot.py", "--model", "google/siglip-base-patch16-224"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.endswith("error: --model needs --image\n")
