"""Every kernel that a launch would select compiles for sm_80, sm_90 and sm_100 within its recorded resources.

The head of ``ledger.py`` describes the method: kernels that changed since the committed ledger, and a sample of the
others, are compiled. The other tests show that the rules and the comparison can fail.
"""

import copy
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cases
import harness
import ledger

ENTRY = {
    "triton": "0",
    "arch": 90,
    "kernel": "_k",
    "dtype": "bfloat16",
    "id": "i",
    "case": "c",
    "config": "num_warps=4",
    "source": "s",
    "regs": 100,
    "spill": 0,
    "shared": 1000,
    "mma": "wgmma",
    "dots": "tensor",
    "serialised": False,
    "ptxas": "",
    "tensor_memory": 0,
}


@pytest.mark.aot
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ("installed", "3.6.0"))
def test_kernels_compile_within_their_resources(version, count):
    side_folder = None
    if version == "3.6.0":
        side_folder = os.environ.get("VIT_FAST_TRITON36")
        if not side_folder:
            pytest.skip("VIT_FAST_TRITON36 is not set")
    result = ledger.run(side_folder)
    count("aot_compiles", len(result.compiled))
    if version == "3.6.0":
        assert result.triton == "3.6.0"
    assert not result.failures, "\n".join(result.failures)
    if result.recorded:
        assert not result.drift, "\n".join([*result.drift, "run: python tests/aot/ledger.py --update"])
    assert len(result.compiled) >= 3


@pytest.mark.aot
def test_ledger_keeps_the_rules():
    """The rules hold for every entry of the ledger, also for those that this run does not compile."""
    assert {dtype for _, dtype in cases.ALLOWED_SPILLS} <= {"float32"}
    assert len(ledger.load()) > 100
    for entry in ledger.load():
        assert not harness.violations(entry, cases.ALLOWED_SPILLS), ledger.label(entry)


@pytest.mark.parametrize(
    "change,words",
    (
        ({"spill": 8}, "spills 8"),
        ({"handover": False}, "counts in the split-K semaphore before all threads have stored"),
        ({"shared": 232_449}, "shared memory"),
        ({"arch": 80, "shared": 166_913}, "shared memory"),
        ({"mma": ""}, "no tensor-core"),
        ({"dots": "ieee", "mma": "tcgen05"}, "TF32"),
        ({"serialised": True, "ptxas": "C7515"}, "serialises wgmma"),
        ({"waits": False}, "touches memory before the PDL wait"),
        ({"fp8": False}, "multiplies float8 as something wider"),
        ({"tma_loads": 0}, "loads nothing by TMA"),
        ({"early_loads": 0}, "asks for no tile of the weight before the PDL wait"),
        ({"setmaxnreg": []}, "leaves the registers of its partitions as they are"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"error": "boom"}, "does not compile: boom"),
    ),
)
def test_rules_can_fail(change, words):
    assert harness.violations(ENTRY, {}) == []
    assert any(words in text for text in harness.violations({**ENTRY, **change}, {}))


@pytest.mark.parametrize(
    "line,units",
    (
        ("%9 = tt.dot %7, %8, %6 : tensor<16x16xbf16, #a> * tensor<16x16xbf16, #b> -> tensor<16x16xf32, #c>", "tensor"),
        ("%9 = tt.dot %7, %8, %6 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>", "ieee"),
        ("%9 = ttng.warp_group_dot %7, %8, %6 : !ttg.memdesc<8x8xf16, #s> * !ttg.memdesc<8x8xf16> -> tensor<8x8xf32>",
         "tensor"),
        ("%9 = ttng.warp_group_dot_wait %7 : tensor<128x128xf32, #mma>", ""),
    ),
)  # fmt: skip
def test_what_dots_ask_for_is_read(line, units):
    assert harness._wanted_units(line) == units


def test_spills_pass_only_where_they_are_listed():
    spilling = {**ENTRY, "dtype": "float32", "spill": 8}
    assert harness.violations(spilling, {}) != []
    assert harness.violations(spilling, {("_k", "float32"): (8, "reason")}) == []
    assert harness.violations(spilling, {("_k", "float32"): (7, "reason")}) != []
    assert harness.violations({**spilling, "dtype": "bfloat16"}, {("_k", "float32"): (8, "reason")}) != []


def _answer(*entries, planned=None):
    return {"triton": "0", "problems": [], "planned": list(planned or entries), "compiled": list(entries)}


def test_drift_shows():
    same = ledger.compare(_answer(ENTRY), [ENTRY])
    assert same.drift == [] and same.compiled == [ENTRY] and same.entries == [ENTRY] and same.recorded
    assert not ledger.compare(_answer(ENTRY), []).recorded
    assert "+ " in ledger.compare(_answer(ENTRY), []).drift[0]
    assert "regs 100 → 101" in ledger.compare(_answer({**ENTRY, "regs": 101}), [ENTRY]).drift[0]
    gone = ledger.compare(_answer(ENTRY), [ENTRY, {**ENTRY, "id": "j"}]).drift
    assert len(gone) == 1 and gone[0].startswith("- ")
    assert ledger.compare({**_answer(ENTRY), "problems": ["x"]}, [ENTRY]).failures == ["x"]
    spilling = {**ENTRY, "spill": 8}
    assert "spills 8" in ledger.compare(_answer(planned=[ENTRY]), [spilling]).failures[0]


def test_changed_source_is_compiled_again():
    class Request:
        def __init__(self, **change):
            self.description = {**copy.deepcopy(ENTRY), **change}

    requests = {name: Request(id=name, source=source) for name, source in (("a", "1"), ("b", "2"), ("c", "3"))}
    known = {"90 _k a": "1", "90 _k b": "changed"}
    chosen = [request.description["id"] for request in harness.select(requests, known, False, 0)]
    assert chosen == ["b", "c"]
    assert len(harness.select(requests, known, False, 1)) == 3
    assert len(harness.select(requests, known, True, 0)) == 3
    assert len(harness.select(requests, {}, False, 0)) == 0 and len(harness.select(requests, {}, False, 1)) == 3


def test_only_code_counts_as_source():
    told = harness._code('def f(x):\n    """Says."""\n    return x  # why\n')
    assert told == harness._code("def f( x ):\n  return x")
    assert harness._code("def f(x):\n    return x") != harness._code("def f(x):\n    return x + 1")


def test_source_holds_what_is_called_through_a_module():
    pytest.importorskip("triton")
    from vit_fast.kernels import gemm

    source = harness._device_source(gemm._linear_fwd_kernel)
    assert "def _linear_fwd_kernel(" in source and "def row_offset(" in source and "def activate(" in source


@pytest.mark.parametrize("fault,words", (("abort", "died"), ("raise", "ValueError: outer cause"), ("hang", "stopped")))
def test_a_compile_that_dies_is_its_own_failure(monkeypatch, fault, words):
    class Request:
        arch, description = 90, ENTRY

    def compile_badly(request):
        if fault == "abort":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(60)
        raise RuntimeError("inner") from ValueError("outer cause")

    monkeypatch.setattr(harness, "_set_arch", lambda arch: None)
    monkeypatch.setattr(harness, "_compile", compile_badly)
    monkeypatch.setattr(harness, "COMPILE_SECONDS", 1)
    (entry,) = harness.compile_all([Request()], jobs=1)
    assert words in entry["error"]
    assert harness.violations(entry, {})[0].startswith("does not compile")
