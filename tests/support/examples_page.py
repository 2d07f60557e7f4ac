"""Runs the programs of examples/, and writes docs/examples.md with what they print:
``python -P tests/support/examples_page.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "examples.md"
EXAMPLES = ("classify", "zero_shot", "embed_open_clip", "finetune_lora", "dense_features")
HEAD = """# Examples

Programs of `examples/` and what they print, with random weights on a CPU; written by `tests/support/examples_page.py`.
The last digits, and differences by rounding, are another machine's own.
"""
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def output(name: str) -> str:
    """What a program prints when it runs without arguments and without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-P", ROOT / "examples" / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=500, env=environment)
    if done.returncode:
        raise RuntimeError(f"examples/{name}.py failed: {done.stderr[-3000:]}")
    return done.stdout


def section(name: str, printed: str) -> str:
    """The section of a program in the page."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    return f"\n## {source.split(':', 1)[0].strip(chr(34))}\n`python examples/{name}.py`\n```text\n{printed}```\n"


def stable(text: str) -> str:
    """A text without its numbers, which differ from machine to machine."""
    return _NUMBER.sub("#", text)


if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(section(name, output(name)) for name in EXAMPLES), encoding="utf-8")
