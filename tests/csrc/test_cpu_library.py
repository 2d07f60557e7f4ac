"""The library for CPU tensors as a file: what it takes from PyTorch is its stable ABI, and nothing more.

A name of PyTorch's C++ ABI changes from one version to the next; the C functions of the shim stay.
"""

import re
import subprocess

import pytest

from vit_fast import extension

pytestmark = [pytest.mark.extension, pytest.mark.usefixtures("cpu_extension", "compiler")]

RUNTIME = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+|__gmon_start__|__cxa_finalize")
SHIM = re.compile(r"(aoti_)?torch_\w+")


def test_only_the_stable_abi_is_needed():
    words = ["nm", "--dynamic", "--undefined-only", str(extension.library("cpu"))]
    told = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
    needed = [line.split()[-1] for line in told.splitlines()]
    of_torch = [name for name in needed if not RUNTIME.fullmatch(name)]
    assert "torch_parallel_for" in of_torch and [name for name in of_torch if not SHIM.fullmatch(name)] == []
