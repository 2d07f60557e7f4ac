"""The ledger of the CUTLASS kernels: it keeps its rules, is of the sources as they are, and can fail.

The compiles take minutes and gigabytes: ``make aot`` makes them (``cutlass_ledger.py``), these tests none.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cutlass_ledger as ledger
from vit_fast.csrc import build

HOPPER = {
    "cuda": "0",
    "cutlass": "0",
    "kernel": "pingpong_fold",
    "arch": "90a",
    "source": "s",
    "regs": 168,
    "spill": 0,
    "shared": 200_000,
    "stages": 6,
    "wgmma": 16,
    "mma": 0,
    "cp_async": 0,
    "tma": 10,
    "ptxas": "",
}
AMPERE = {
    **HOPPER, "kernel": "multistage_residual_bf16", "arch": "80", "shared": 65_536, "stages": None, "wgmma": 0,
    "mma": 64, "cp_async": 8, "tma": 0,
}  # fmt: skip


def test_the_ledger_has_every_kernel_as_its_source_is():
    entries = ledger.load()
    assert {ledger.key(entry) for entry in entries} == set(ledger.wanted())
    for entry in entries:
        assert not ledger.violations(entry), ledger.label(entry)
    assert not ledger.changed(entries), "with nvcc and CUTLASS, run: python tests/csrc/cutlass_ledger.py --update"


@pytest.mark.parametrize(
    "entry,change,words",
    (
        (HOPPER, {"spill": 8}, "spills 8"),
        (HOPPER, {"shared": 232_449}, "232449 bytes of shared memory, limit 232448"),
        (AMPERE, {"shared": 101_377}, "limit 101376"),
        (AMPERE, {"arch": "75", "shared": 65_537}, "limit 65536"),
        (HOPPER, {"wgmma": 0, "mma": 8}, "no tensor-core"),
        (AMPERE, {"mma": 0}, "no tensor-core"),
        (HOPPER, {"tma": 2}, "2 TMA instructions"),
        (HOPPER, {"stages": 3}, "3 stages"),
        (AMPERE, {"cp_async": 0}, "cp.async"),
        (HOPPER, {"ptxas": "C7510"}, "C7510"),
        (HOPPER, {"error": "boom"}, "does not compile: boom"),
    ),
)
def test_rules_can_fail(entry, change, words):
    assert ledger.violations(entry) == []
    assert any(words in text for text in ledger.violations({**entry, **change}))


def test_turing_has_no_cp_async():
    assert ledger.violations({**AMPERE, "arch": "75", "shared": 32_768, "cp_async": 0}) == []


def test_drift_shows():
    entries, drift, failures = ledger.compare([HOPPER], [HOPPER, AMPERE])
    assert (entries, drift, failures) == ([HOPPER, AMPERE], [], [])
    assert ledger.compare([HOPPER], [AMPERE])[1] == ["+ CUDA 0 CUTLASS 0 sm_90a pingpong_fold"]
    assert "regs 168 → 169" in ledger.compare([{**HOPPER, "regs": 169}], [HOPPER])[1][0]
    other = {**HOPPER, "cuda": "1", "regs": 169}
    assert ledger.compare([other], [HOPPER]) == ([other], [], [])
    gone = {**HOPPER, "kernel": "gone"}
    assert ledger.compare([], [HOPPER, gone])[:2] == ([HOPPER], ["- CUDA 0 CUTLASS 0 sm_90a gone"])
    assert "spills 8" in ledger.compare([{**HOPPER, "spill": 8}], [HOPPER])[2][0]
    assert ledger.compare([{**HOPPER, "error": "boom"}], [HOPPER])[0] == [HOPPER]


def test_code_and_flags_are_the_source(monkeypatch, tmp_path):
    before = {kernel: ledger.digest(kernel) for kernel in build.CUTLASS_KERNELS}
    assert len(set(before.values())) == len(before)
    for path in ledger.SOURCES.glob("*"):
        (tmp_path / path.name).write_text(path.read_text() + "\n// more\n")
    monkeypatch.setattr(ledger, "SOURCES", tmp_path)
    assert before == {kernel: ledger.digest(kernel) for kernel in before}
    (tmp_path / "epilogue.h").write_text("int x;")
    assert all(before[kernel] != ledger.digest(kernel) for kernel in before)


def test_what_ptxas_prints_is_read():
    log = "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\nUsed 168 registers\n(C7510) Potential"
    ptx = ".visible .global .align 4 .u32 vf_dynamic_shared = 1234;\n.entry KernelTmaWarpSpecializedILi6E\n"
    ptx += "wgmma.mma_async.sync x;\nmma.sync.y;\ncp.async.cg.z;\ncp.async.bulk.tensor.2d;\ncp.async.bulk.tensor.3d;"
    figures = {"regs": 168, "spill": 16, "shared": 1234, "stages": 6, "wgmma": 1, "mma": 1, "cp_async": 1, "tma": 2}
    assert ledger.entry_of(log, ptx) == {**figures, "ptxas": "C7510"}
    with pytest.raises(AssertionError, match="no registers"):
        ledger.entry_of("", ptx)
