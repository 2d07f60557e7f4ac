"""What nvcc makes of every kernel of csrc/cutlass, for every architecture, against the ledger (cutlass_ledger.json).

    python tests/csrc/cutlass_ledger.py [--all] [--update] [--match TEXT] [--jobs N]

A compile is one kernel for one architecture, up to 50 s and 4 GB: those that changed since the ledger;
--all: every one. --update rewrites the ledger. An entry has registers, spills, bytes of dynamic shared memory, stages
of the loop (sm_90), how many wgmma, mma.sync, cp.async and TMA instructions the PTX has, and what ptxas warns of. Under
other versions of CUDA or CUTLASS than the ledger's the rules are checked and nothing is compared. Exit status 1: drift,
or a broken rule.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cuda_ledger
from vit_fast.csrc import build

PATH = Path(__file__).with_name("cutlass_ledger.json")
SOURCES = Path(__file__).parents[2] / "csrc" / "cutlass"
SHARED_LIMIT = {"75": 65_536, "80": 101_376, "90a": 232_448, "100": 101_376}  # of the smallest chip of each
_FLAGS = ("-std=c++20", "-O3", "-DVF_LEDGER", "-Xptxas", "-v", "-Xptxas", "-warn-spills")
_HEADERS = ("epilogue.h", "functors.h", "linear.h")
_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "cp_async": r"\bcp\.async\.c[ag]",
    "tma": r"\bcp\.async\.bulk\.tensor",
}


def wanted():
    """The (kernel, architecture) that csrc/build.py makes."""
    return [(kernel, arch) for kernel, (*_, archs) in build.CUTLASS_KERNELS.items() for arch in archs]


def load():
    return json.loads(PATH.read_text())["entries"] if PATH.exists() else []


def save(entries):
    entries = sorted(entries, key=lambda entry: (entry["cuda"], entry["cutlass"], *key(entry)))
    PATH.write_text('{"entries": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]}\n")


def key(entry):
    return entry["kernel"], entry["arch"]


def label(entry):
    return f"CUDA {entry['cuda']} CUTLASS {entry['cutlass']} sm_{entry['arch']} {entry['kernel']}"


def digest(kernel):
    """Of a kernel's sources and flags, but for comments and blank space."""
    file = build.CUTLASS_KERNELS[kernel][0]
    parts = [cuda_ledger.code((SOURCES / name).read_text()) for name in (file, *_HEADERS)]
    flags = [*_FLAGS, *build.cutlass_flags(kernel, build.Tool(("",), ""))]
    return hashlib.sha256("\n".join([*parts, *flags]).encode()).hexdigest()[:12]


def entry_of(log, ptx):
    """The figures of a kernel, from what ptxas prints and from the PTX."""
    registers = re.search(r"Used (\d+) registers", log)
    shared = re.search(r"vf_dynamic_shared = (\d+)", ptx)
    stages = re.search(r"WarpSpecializedILi(\d+)E", ptx)
    if registers is None or shared is None:
        raise AssertionError("no registers, or no shared memory")
    return {
        "regs": int(registers[1]),
        "spill": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log))),
        "shared": int(shared[1]),
        "stages": int(stages[1]) if stages else None,
        **{name: len(re.findall(pattern, ptx)) for name, pattern in _INSTRUCTIONS.items()},
        "ptxas": " ".join(sorted(set(re.findall(r"C75\d\d", log)))),
    }


def compile_kernel(kernel, arch, tools, flags=()):
    """The entry of a kernel for an architecture; one with "error" where it does not compile."""
    cuda, cxx, headers = tools
    common = {"cuda": cuda.version, "cutlass": headers.version, "kernel": kernel, "arch": arch}
    with tempfile.TemporaryDirectory() as folder:
        path = SOURCES / build.CUTLASS_KERNELS[kernel][0]
        command = [*cuda.command, "-ccbin", cxx.command[0], *_FLAGS, *build.cutlass_flags(kernel, headers), *flags]
        command += [f"-arch=sm_{arch}", "-cubin", "--keep", "--keep-dir", folder, str(path)]
        done = subprocess.run([*command, "-o", str(Path(folder, "out.cubin"))], capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode:
            return {**common, "source": "", "error": " ".join(log.split())[-400:]}
        return {**common, "source": digest(kernel), **entry_of(log, Path(folder, f"{path.stem}.ptx").read_text())}


def violations(entry):
    """The rules that a kernel breaks."""
    if "error" in entry:
        return [f"does not compile: {entry['error']}"]
    found, hopper = [], entry["kernel"].startswith(("pingpong", "cooperative"))
    if entry["spill"]:
        found.append(f"spills {entry['spill']} bytes")
    if entry["shared"] > SHARED_LIMIT[entry["arch"]]:
        found.append(f"has {entry['shared']} bytes of shared memory, limit {SHARED_LIMIT[entry['arch']]}")
    if not entry["wgmma" if hopper else "mma"]:
        found.append("has no tensor-core instruction")
    if hopper and (entry["tma"] < 3 or entry["stages"] < 4):
        found.append(f"has {entry['tma']} TMA instructions and {entry['stages']} stages, wanted 3 and 4")
    if not hopper and entry["arch"] != "75" and not entry["cp_async"]:
        found.append("copies nothing by cp.async")
    if entry["ptxas"]:
        found.append(f"ptxas warns: {entry['ptxas']}")
    return found


def compare(compiled, ledger):
    """(the ledger as it should be, differences, broken rules)."""
    entries, drift, failures = {key(entry): entry for entry in ledger}, [], []
    recorded = {(entry["cuda"], entry["cutlass"]) for entry in ledger}
    for entry in compiled:
        failures += [f"{label(entry)}: {text}" for text in violations(entry)]
        if "error" in entry:
            continue
        old = entries.get(key(entry))
        if not recorded or (entry["cuda"], entry["cutlass"]) in recorded:
            if old is None:
                drift.append(f"+ {label(entry)}")
            elif old != entry:
                changes = [f"{name} {old.get(name)} → {entry[name]}" for name in entry if old.get(name) != entry[name]]
                drift.append(f"~ {label(entry)}: {', '.join(changes)}")
        entries[key(entry)] = entry
    known = set(wanted())
    drift += [f"- {label(entry)}" for at, entry in entries.items() if at not in known]
    return [entry for at, entry in entries.items() if at in known], drift, failures


def changed(ledger):
    """The (kernel, architecture) that the ledger lacks with their source."""
    sources = {key(entry): entry["source"] for entry in ledger}
    return [pair for pair in wanted() if sources.get(pair) != digest(pair[0])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--match", default="")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    tools = build.nvcc(), build.compiler(), build.cutlass()
    if None in tools:
        print("CUTLASS: not compiled: no nvcc, no C++ compiler or no headers of CUTLASS")
        return 0
    ledger, compiled = load(), []
    pairs = [
        pair for pair in (wanted() if options.all else changed(ledger)) if options.match in f"{pair[0]} sm_{pair[1]}"
    ]
    with ThreadPoolExecutor(min(options.jobs, build.jobs("cutlass"))) as pool:
        for entry in pool.map(lambda pair: compile_kernel(*pair, tools), pairs):
            compiled.append(entry)
            figures = [f"{name}={value}" for name, value in list(entry.items())[5:] if value not in (None, "")]
            print(f"{label(entry)}: {entry.get('error') or ' '.join(figures)}", flush=True)
    entries, drift, failures = compare(compiled, ledger)
    for line in drift:
        print(f"drift: {line}")
    for line in failures:
        print(f"FAILED: {line}")
    print(f"CUTLASS: {len(compiled)} kernels compiled, {len(drift)} differences, {len(failures)} failures")
    if options.update:
        save(entries)
    return int(bool(failures) or (bool(drift) and not options.update))


if __name__ == "__main__":
    sys.exit(main())
