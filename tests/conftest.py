"""Set-up of the test suite: which tests run in this process, the interpreter's cures, poisoned memory, honest counts.

Five runs: ``TRITON_INTERPRET=1 pytest -m interp``, ``VIT_FAST_TEST_EXTENSION=1 pytest -m extension``,
``pytest -m aot``, ``pytest -m gpu`` and all others, in parallel. Without VIT_FAST_TEST_EXTENSION=1 no compiled library
is found, neither here nor in processes that tests start: their results are the same on every machine.
A test whose mark does not fit the process is deselected, and the summary says so; it never runs the wrong way.
A skip whose reason is not in ALLOWED_SKIPS fails the run.
"""

import importlib.util
import os
import random
import site
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# First, because it says how many threads numpy may have.
from support import interpreter_cures

# isort: split
import numpy as np
import pytest
import torch
from support import sanitizer

INTERPRETED = interpreter_cures.INTERPRETED
EXTENSION = os.environ.get("VIT_FAST_TEST_EXTENSION") == "1"
if not EXTENSION:
    os.environ["VIT_FAST_EXT_DIR"] = str(Path(__file__).parent / "no-extension")
BORROWED = any(Path(folder, "borrowed.pth").exists() for folder in site.getsitepackages())
NO_GPU = "no CUDA device of capability 8.0 or more"
PEERS = (
    "open_clip",
    "scipy",
    "peft",
    "torchao",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
)  # a GPU machine may lack them
NO_COMPILER = "no C++ compiler and ninja"
NO_NVCC = "no nvcc"
NO_EMULATOR = "no g++ 11 or newer on x86-64"
NO_CUTLASS = "no headers of CUTLASS, or no nvcc"
NOT_BUILT = "the cpu extension is not built"
ALLOWED_SKIPS = (
    NO_GPU,
    NO_COMPILER,
    NO_NVCC,
    NO_EMULATOR,
    NO_CUTLASS,
    NOT_BUILT,
    "Triton is not installed",
    "VIT_FAST_TRITON36 is not set",
    "the GPU has less than 24 GiB of free memory",
    "the GPU has no float8",
    "numpy 2.4 breaks the interpreter of Triton 3.6",
    "transformers before 5.23 makes DINOv2 of other parts",
    "torch's CPU has no float8 products with a scale a row",
    *(f"{name} is not among the borrowed packages" for name in PEERS),
    *(f"{name} is not installed: the extra openvino has it" for name in ("openvino", "nncf")),
)
COUNTS = {
    "aot_compiles": 0,
    "cases": 0,
    "gpu_skipped": 0,
    "extension_skipped": 0,
    "deselected_interp": 0,
    "deselected_aot": 0,
    "deselected_gpu": 0,
    "deselected_extension": 0,
}
PASSED = {"interp": 0, "extension": 0, "aot": 0, "gpu": 0, "plain": 0}
UNLISTED_SKIPS = []


def _define_torchvision_schemas():
    """torchvision's wheel cannot load its compiled operators on a CPU torch and then fails at import: name them."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    for path in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
        except OSError:
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _define_torchvision_schemas()


def has_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def pytest_configure(config):
    # Eager fp32 convolutions set the budget of fp32 kernels: they must be fp32.
    torch.backends.cudnn.allow_tf32 = False
    if INTERPRETED:
        torch.set_num_threads(1)
        interpreter_cures.install()
        sanitizer.install()


def _kind(item):
    return next((mark for mark in ("interp", "extension", "aot", "gpu") if item.get_closest_marker(mark)), "plain")


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        kind = _kind(item)
        wrong_process = (kind == "interp") != INTERPRETED if kind != "plain" else False
        wrong_process |= kind == "extension" and not EXTENSION
        if wrong_process:
            COUNTS[f"deselected_{kind}"] += 1
            dropped.append(item)
            continue
        if kind == "gpu" and not has_gpu():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        item.user_properties.append(("kind", kind))
        kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _skip_reason(report):
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _note_skip(report):
    reason = _skip_reason(report)
    if reason == NO_GPU:
        COUNTS["gpu_skipped"] += 1
    elif reason in (NO_COMPILER, NO_NVCC, NO_EMULATOR, NO_CUTLASS, NOT_BUILT):
        COUNTS["extension_skipped"] += 1
    elif reason not in ALLOWED_SKIPS:
        UNLISTED_SKIPS.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        _note_skip(report)
    elif report.when == "call" and report.passed:
        PASSED[dict(report.user_properties).get("kind", "plain")] += 1


def pytest_collectreport(report):
    if report.skipped:
        _note_skip(report)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = COUNTS | sanitizer.COUNTS
    elif UNLISTED_SKIPS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for name, count in getattr(node, "workeroutput", {}).get("counts", {}).items():
        if name in sanitizer.COUNTS:
            sanitizer.COUNTS[name] += count
        elif name in ("aot_compiles", "cases"):
            COUNTS[name] += count
        elif name.startswith("deselected"):
            COUNTS[name] = max(COUNTS[name], count)


def pytest_terminal_summary(terminalreporter):
    line = terminalreporter.write_line
    line("checks executed:")
    line(f"  plain tests: {PASSED['plain']} passed")
    if COUNTS["extension_skipped"]:
        reasons = f"{NO_COMPILER}, {NO_EMULATOR}, {NO_NVCC}, {NO_CUTLASS}, or {NOT_BUILT}"
        line(f"  extension: {COUNTS['extension_skipped']} tests skipped ({reasons})")
    if EXTENSION:
        line(f"  extension tests: {PASSED['extension']} passed, {COUNTS['cases']} random cases in them")
    if INTERPRETED:
        line(f"  interp tests: {PASSED['interp']} passed, {COUNTS['cases']} random cases in them")
        line(f"  memory sanitizer: {sanitizer.COUNTS['launches']} launches, {sanitizer.COUNTS['accesses']} accesses")
    else:
        line(f"  aot tests: {PASSED['aot']} passed, {COUNTS['aot_compiles']} kernels compiled ahead of time")
        line(f"  gpu tests: {PASSED['gpu']} passed, {COUNTS['gpu_skipped']} skipped ({NO_GPU})")
    wanted = {"interp": "TRITON_INTERPRET=1", "aot": "no TRITON_INTERPRET", "gpu": "no TRITON_INTERPRET"}
    wanted["extension"] = "VIT_FAST_TEST_EXTENSION=1 and no TRITON_INTERPRET"
    for kind, need in wanted.items():
        if COUNTS[f"deselected_{kind}"]:
            line(f"  not run here: {COUNTS[f'deselected_{kind}']} {kind} tests (they want {need})")
    if UNLISTED_SKIPS:
        line("FAILED: skips whose reason is not in ALLOWED_SKIPS of tests/conftest.py:", red=True)
        for entry in UNLISTED_SKIPS:
            line(f"  {entry}", red=True)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """What the command line prints has the width of no terminal, wherever the tests run."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def peer():
    """``peer("scipy.ndimage")`` is another library's module, an oracle; packages borrowed offline may lack it."""

    def find(name):
        library = name.split(".")[0]
        if BORROWED and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not among the borrowed packages")
        return importlib.import_module(name)

    return find


@pytest.fixture
def row_scales():
    """For tests that multiply float8 with a scale a row by torch itself, on the CPU."""
    one, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(one, one.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        if torch.__version__ >= "2.13":
            raise
        pytest.skip("torch's CPU has no float8 products with a scale a row")


@pytest.fixture(scope="session")
def compiler():
    """For tests that compile C++."""
    from vit_fast.csrc import build

    if build.compiler() is None or build.ninja() is None:
        pytest.skip(NO_COMPILER)


@pytest.fixture(scope="session")
def nvcc():
    """For tests that compile CUDA."""
    from vit_fast.csrc import build

    if build.nvcc() is None:
        pytest.skip(NO_NVCC)


@pytest.fixture(scope="session")
def cpu_extension():
    """For tests that run the library for CPU tensors: skips where none was built, fails where one does not load."""
    from vit_fast import extension

    reasons = extension.load("cpu")
    if reasons and NOT_BUILT in reasons[0]:
        pytest.skip(NOT_BUILT)
    assert not reasons, reasons


@pytest.fixture
def count():
    """``count(name, number)`` adds to what the summary prints: "aot_compiles" or "cases"."""

    def add(name, number):
        COUNTS[name] += number

    return add


@pytest.fixture(autouse=True)
def poison_empty(request):
    """In interp tests fresh memory is poison, so that unwritten output shows."""
    if request.node.get_closest_marker("interp") is None:
        yield
        return
    with sanitizer.poisoned_memory():
        yield
