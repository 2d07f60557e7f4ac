"""nvcc compiles every CUDA kernel for every architecture within the resources that the committed ledger records.

The head comment of ``cuda_ledger.py`` has the method: files that changed since the ledger, and a sample of the others,
are compiled; ``make aot`` compiles all. The other tests show that the rules and the comparison can fail.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_ledger as ledger
from vit_fast.csrc import build

ENTRY = {
    "cuda": "0",
    "file": "attention",
    "arch": "90a",
    "kernel": "attention_fwd_kernel<bf16, 64>",
    "source": "s",
    "regs": 100,
    "spill": 0,
    "shared": 0,
    "mma": 8,
    "ldmatrix": 4,
    "cp_async": 2,
    "ptxas": "",
}


@pytest.mark.aot
@pytest.mark.timeout(1800)
def test_kernels_compile_within_their_resources(nvcc, count):
    result = ledger.run()
    count("aot_compiles", len(result.compiled))
    assert not result.failures, "\n".join(result.failures)
    if result.recorded:
        assert not result.drift, "\n".join([*result.drift, "run: python tests/csrc/cuda_ledger.py --update"])
    assert len(result.compiled) >= 50


@pytest.mark.aot
def test_spills_and_errors_are_seen(nvcc):
    """A kernel that keeps more than it has registers for, and one that does not compile."""
    tools = build.nvcc(), build.compiler()
    array = "__global__ void __launch_bounds__(1024, 2) kernel(float* x, int n) {\n    float v[96];\n"
    loops = "    for (int i = 0; i < 96; i++) v[i] = x[i * n];\n    __syncthreads();\n"
    loops += "    for (int i = 0; i < 96; i++) x[i] = v[95 - i] * v[i];\n}\n"
    (entry,) = ledger.compile_file("layer_norm", "80", tools, array + loops)
    assert entry["kernel"].startswith("kernel") and any("spills" in text for text in ledger.violations(entry))
    (entry,) = ledger.compile_file("layer_norm", "80", tools, "__global__ void kernel() { nothing(); }")
    assert "does not compile" in ledger.violations(entry)[0] and "nothing" in entry["error"]


def test_ledger_keeps_the_rules():
    """The rules hold for every entry, compiled here or not, and every file has every architecture."""
    entries = ledger.load()
    for entry in entries:
        assert not ledger.violations(entry), ledger.label(entry)
    stems = {path.stem for path in ledger.SOURCES.glob("*.cu")}
    found = {(entry["file"], entry["arch"]) for entry in entries}
    assert found == {(stem, arch) for stem in stems for arch in ledger.ARCHS}
    kernels = {(entry["file"], entry["kernel"]) for entry in entries}
    assert len(entries) == len(kernels) * len(ledger.ARCHS)
    assert set(ledger.TENSOR_CORES) < stems and {pair[0] for pair in ledger.SAMPLE} < stems


@pytest.mark.parametrize(
    "change,words",
    (
        ({"spill": 8}, "spills 8"),
        ({"shared": 49_153}, "static shared memory"),
        ({"mma": 0}, "no tensor-core"),
        ({"cp_async": 0}, "cp.async"),
        ({"ptxas": "C7510"}, "C7510"),
        ({"error": "boom"}, "does not compile: boom"),
    ),
)
def test_rules_can_fail(change, words):
    assert ledger.violations(ENTRY) == []
    assert any(words in text for text in ledger.violations({**ENTRY, **change}))


def test_bf16_has_no_products_on_sm_75_alone():
    older = {**ENTRY, "arch": "75", "mma": 0, "cp_async": 0}
    assert ledger.violations(older) == []
    assert ledger.violations({**older, "kernel": "attention_fwd_kernel<fp16, 64>"}) != []
    assert ledger.violations({**ENTRY, "file": "layer_norm", "mma": 0, "cp_async": 0}) == []


def test_drift_shows():
    wanted = {("attention", "90a"): "s", ("attention", "80"): "s"}
    other = {**ENTRY, "arch": "80"}
    same = ledger.compare([ENTRY], [ENTRY, other], "0", wanted)
    assert same.drift == [] and same.entries == [ENTRY, other] and same.recorded
    assert "+ " in ledger.compare([ENTRY], [other], "0", wanted).drift[0]
    assert not ledger.compare([ENTRY], [ENTRY], "1", wanted).recorded
    assert "regs 100 → 101" in ledger.compare([{**ENTRY, "regs": 101}], [ENTRY], "0", wanted).drift[0]
    gone = {**ENTRY, "kernel": "gone"}
    assert ledger.compare([ENTRY], [ENTRY, gone], "0", wanted).drift[0].startswith("- ")
    assert ledger.compare([], [{**ENTRY, "file": "gone"}], "0", wanted).drift[0].startswith("- ")
    assert "spills 8" in ledger.compare([], [{**ENTRY, "spill": 8}], "0", wanted).failures[0]
    assert "boom" in ledger.compare([{**ENTRY, "error": "boom"}], [ENTRY], "0", wanted).failures[0]


def test_changed_source_is_compiled_again():
    wanted = {("a", "80"): "1", ("b", "80"): "2", ("c", "80"): "3"}
    entries = [
        {**ENTRY, "file": "a", "arch": "80", "source": "1"},
        {**ENTRY, "file": "b", "arch": "80", "source": "old"},
    ]
    assert ledger.select(wanted, entries, "0", False, ()) == [("b", "80"), ("c", "80")]
    assert ledger.select(wanted, entries, "0", False, (("a", "80"),)) == list(wanted)
    assert ledger.select(wanted, entries, "1", False, (("a", "80"),)) == [("a", "80")]
    assert ledger.select(wanted, entries, "0", True) == list(wanted)


def test_only_code_counts_as_source(tmp_path):
    assert ledger.code("int  a;  // why\n\n\n// more\n  int b;") == ledger.code("int a;\nint b;")
    for path in ledger.SOURCES.glob("*"):
        (tmp_path / path.name).write_text(path.read_text())
    before = ledger.digest("attention", tmp_path)
    assert before == ledger.digest("attention")
    (tmp_path / "operators.h").write_text("")
    assert before == ledger.digest("attention", tmp_path)
    (tmp_path / "device.h").write_text("int x;")
    assert before != ledger.digest("attention", tmp_path)


def test_what_ptxas_prints_is_read():
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_80'\nptxas info    : Function properties for f\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 30 registers, used 1 barriers, 32 bytes smem, 380 bytes cmem[0]\n"
    )
    ptx = ".visible .entry f(\n\t.param .u64 a\n)\n.maxntid 128\n{\n"
    ptx += "\tmma.sync.x;\n\tldmatrix.sync.y;\n\tcp.async.cg.z;\n\n}\n"
    figures = {"regs": 30, "spill": 16, "shared": 32, "mma": 1, "ldmatrix": 1, "cp_async": 1}
    assert list(ledger.entries_of(log, ptx)) == [("f", figures)]
    with pytest.raises(AssertionError, match="no registers"):
        list(ledger.entries_of(log.replace("registers", ""), ptx))
