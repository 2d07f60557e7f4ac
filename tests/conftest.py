"""Set-up of the test suite: which tests run in this process, the interpreter's cures, poisoned memory, honest counts.

Three processes: ``TRITON_INTERPRET=1 pytest -m interp``, ``pytest -m aot`` and ``pytest -m "not interp and not aot"``.
A test whose mark does not fit the process is deselected, and the summary says so; it never runs the wrong way.
A skip whose reason is not in ALLOWED_SKIPS fails the run.
"""

import importlib.util
import os
import random
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # The interpreter calls numpy on small blocks: threads only cost time. Read when numpy is first imported.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import sanitizer  # noqa: E402

NO_GPU = "no CUDA device of capability 8.0 or more"
ALLOWED_SKIPS = (
    NO_GPU,
    "Triton is not installed",
    "VIT_FAST_TRITON36 is not set",
    "the GPU has less than 24 GiB of free memory",
    "the GPU has no float8",
)
COUNTS = {
    "aot_compiles": 0,
    "cases": 0,
    "gpu_skipped": 0,
    "deselected_interp": 0,
    "deselected_aot": 0,
    "deselected_gpu": 0,
}
PASSED = {"interp": 0, "aot": 0, "gpu": 0, "plain": 0}
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


def _cure_interpreter():
    """bf16 and e4m3 as the hardware has them: casts round to nearest even, casts to any other type keep the value.

    The interpreter holds bf16 as raw uint16 bits; as shipped it truncates fp32 → bf16 and passes the bits on as an
    integer in all other casts. It holds e4m3 as uint8 bits, loses the carry of a rounded mantissa and knows no NaN of
    it; on a GPU the cast saturates.
    """
    from triton.runtime import interpreter

    tl, handle, builder = interpreter.tl, interpreter.TensorHandle, interpreter.InterpreterBuilder
    shipped_convert, shipped_cast = interpreter._convert_float, builder.cast_impl

    def to_bits(values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), ((bits >> 16) | 0x0040).astype(np.uint16), rounded)

    def to_float32(bits):
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    e4m3_values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    def to_e4m3(values):
        values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def convert_float(data, source, target, rounding_mode):
        if target == tl.float8e4nv and source in (tl.float16, tl.float32):
            return to_e4m3(data)
        if source == tl.float8e4nv and target in (tl.float16, tl.float32):
            target_type = interpreter._get_np_dtype(target)
            return e4m3_values[data].astype(target_type).view(f"uint{target.primitive_bitwidth}")
        toward_zero = rounding_mode is not None and rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if target == tl.bfloat16 and not toward_zero and source in (tl.float16, tl.float32, tl.float64):
            with np.errstate(over="ignore"):
                return to_bits(data.astype(np.float32))
        if source == tl.bfloat16 and target in (tl.float16, tl.float32, tl.float64):
            target_type = interpreter._get_np_dtype(target)
            with np.errstate(over="ignore"):
                return to_float32(data).astype(target_type).view(f"uint{target.primitive_bitwidth}")
        return shipped_convert(data, source, target, rounding_mode)

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            with np.errstate(over="ignore", invalid="ignore"):
                return shipped_cast(self, handle(to_float32(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            with np.errstate(over="ignore"):
                return handle(to_bits(src.data.astype(np.float32)), target)
        return shipped_cast(self, src, dst_type)

    interpreter._convert_float = convert_float
    builder.cast_impl = cast


def _versions():
    import triton

    number = tuple(int(part) for part in np.__version__.split(".")[:2])
    return number, tuple(int(part) for part in triton.__version__.split(".")[:2])


def has_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def pytest_configure(config):
    # Eager fp32 convolutions set the budget of fp32 kernels: they must be fp32.
    torch.backends.cudnn.allow_tf32 = False
    if INTERPRETED:
        numpy_version, triton_version = _versions()
        if numpy_version >= (2, 4) and triton_version <= (3, 6):
            raise pytest.UsageError(
                f"numpy {np.__version__} breaks Triton 3.6's interpreter (every loop fails): pip install 'numpy<2.4'"
            )
        torch.set_num_threads(1)
        _cure_interpreter()
        sanitizer.install()


def _kind(item):
    return next((mark for mark in ("interp", "aot", "gpu") if item.get_closest_marker(mark)), "plain")


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        kind = _kind(item)
        wrong_process = (kind == "interp" and not INTERPRETED) or (kind in ("aot", "gpu") and INTERPRETED)
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
    if INTERPRETED:
        line(f"  interp tests: {PASSED['interp']} passed, {COUNTS['cases']} random cases in them")
        line(f"  memory sanitizer: {sanitizer.COUNTS['launches']} launches, {sanitizer.COUNTS['accesses']} accesses")
    else:
        line(f"  aot tests: {PASSED['aot']} passed, {COUNTS['aot_compiles']} kernels compiled ahead of time")
        line(f"  gpu tests: {PASSED['gpu']} passed, {COUNTS['gpu_skipped']} skipped ({NO_GPU})")
    wanted = {"interp": "TRITON_INTERPRET=1", "aot": "no TRITON_INTERPRET", "gpu": "no TRITON_INTERPRET"}
    for kind, need in wanted.items():
        if COUNTS[f"deselected_{kind}"]:
            line(f"  not run here: {COUNTS[f'deselected_{kind}']} {kind} tests (they want {need})")
    if UNLISTED_SKIPS:
        line("FAILED: skips whose reason is not in ALLOWED_SKIPS of tests/conftest.py:", red=True)
        for entry in UNLISTED_SKIPS:
            line(f"  {entry}", red=True)


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
