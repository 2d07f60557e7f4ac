"""What nvcc makes of every CUDA kernel, for every architecture, against the committed ledger (cuda_ledger.json).

    python tests/csrc/cuda_ledger.py [--all] [--update] [--match TEXT] [--jobs N]

A compile is one file of csrc/cuda for one architecture, with all its kernels: files that changed since the ledger, and
a sample of the others; --all: everything. --update rewrites the ledger. An entry is a kernel: registers, spills, static
shared memory, and how many mma.sync, ldmatrix and cp.async its PTX has. Under another version of CUDA than the ledger's
the rules are checked and nothing is compared. Dynamic shared memory is chosen by the host code within the limit of the
device, which test_cuda_emulated.py runs. Exit status 1: drift, or a broken rule.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vit_fast.csrc import build

PATH = Path(__file__).with_name("cuda_ledger.json")
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = tuple(build.CUDA_ARCHITECTURES)
STATIC_SHARED_LIMIT = 48 * 1024
TENSOR_CORES = ("attention", "patch_embed")  # files whose kernels multiply on tensor cores, those of float32 apart
_FLOAT32 = re.compile(r"float32_fwd_kernel<|kernel<float\b")
SAMPLE = (("attention", "80"), ("patch_embed", "75"), ("epilogue", "90a"))
_FLAGS = ("-std=c++20", "-O3", "-DVF_KERNELS_ONLY", "-Xptxas", "-v", "-Xptxas", "-warn-spills")


@dataclass
class Result:
    cuda: str
    recorded: bool = False  # whether the ledger has entries of this version of CUDA
    compiled: list = field(default_factory=list)
    entries: list = field(default_factory=list)  # the ledger of this version as it should be
    failures: list = field(default_factory=list)
    drift: list = field(default_factory=list)


def load():
    return json.loads(PATH.read_text())["entries"] if PATH.exists() else []


def save(entries):
    entries = sorted(entries, key=lambda entry: (entry["cuda"], *key(entry)))
    PATH.write_text('{"entries": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]}\n")


def key(entry):
    return entry["file"], entry["arch"], entry["kernel"]


def label(entry):
    return f"CUDA {entry['cuda']} sm_{entry['arch']} {entry['kernel']}"


def code(source):
    """A source without comments and blank space, none of which changes what is compiled."""
    lines = (re.sub(r"//.*", "", line) for line in source.splitlines())
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def digest(stem, sources=SOURCES):
    """Of a file, of the headers, and of the flags. operators.h is not compiled here."""
    parts = [(sources / f"{stem}.cu").read_text().split("#ifndef VF_KERNELS_ONLY")[0]]
    parts += [path.read_text() for path in sorted(sources.glob("*.h")) if path.name != "operators.h"]
    return hashlib.sha256("\n".join([*map(code, parts), *_FLAGS]).encode()).hexdigest()[:12]


def short(name):
    """A kernel's name as it is written: attention_fwd_kernel<bf16, 64>."""
    name = re.sub(r"\(.*?\)(?=\d)|^void |\(vf::\w+\)$|vf::", "", name)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("unsigned char", "uint8")


def entries_of(log, ptx):
    """(mangled name, figures) of each kernel, from what ptxas prints and from the PTX."""
    bodies = dict(re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", ptx, re.DOTALL))
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL
    ):
        registers = re.search(r"Used (\d+) registers", text)
        if registers is None or name not in bodies:
            raise AssertionError(f"no registers or no PTX of {name}")
        shared, body = re.search(r"(\d+)(?:\+\d+)? bytes smem", text), bodies[name]
        yield (
            name,
            {
                "regs": int(registers[1]),
                "spill": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text))),
                "shared": int(shared[1]) if shared else 0,
                "mma": len(re.findall(r"\bmma\.sync", body)),
                "ldmatrix": len(re.findall(r"\bldmatrix\.sync", body)),
                "cp_async": len(re.findall(r"\bcp\.async\.c[ag]", body)),
            },
        )


def compile_file(stem, arch, tools, source=None):
    """The entries of a file for an architecture; one with "error" where it does not compile."""
    cuda, cxx = tools
    common = {"cuda": cuda.version, "file": stem, "arch": arch}
    with tempfile.TemporaryDirectory() as folder:
        path = SOURCES / f"{stem}.cu"
        if source is not None:
            path = Path(folder, f"{stem}.cu")
            path.write_text(source)
        command = [*cuda.command, "-ccbin", cxx.command[0], *_FLAGS, f"-I{SOURCES}", f"-arch=sm_{arch}"]
        command += ["-cubin", "--keep", "--keep-dir", folder, str(path), "-o", str(Path(folder, "out.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode:
            return [{**common, "kernel": stem, "source": "", "error": " ".join(log.split())[-400:]}]
        found = dict(entries_of(log, Path(folder, f"{stem}.ptx").read_text()))
    names = subprocess.run(["c++filt", *found], capture_output=True, text=True, check=True).stdout.splitlines()
    warned, source = " ".join(sorted(set(re.findall(r"C75\d\d", log)))), digest(stem)
    return [
        {**common, "kernel": short(name), "source": source, **figures, "ptxas": warned}
        for name, figures in zip(names, found.values(), strict=True)
    ]


def violations(entry):
    """The rules that a kernel breaks."""
    if "error" in entry:
        return [f"does not compile: {entry['error']}"]
    found = []
    if entry["spill"]:
        found.append(f"spills {entry['spill']} bytes")
    if entry["shared"] > STATIC_SHARED_LIMIT:
        found.append(f"has {entry['shared']} bytes of static shared memory, limit {STATIC_SHARED_LIMIT}")
    without = entry["arch"] == "75" and "bf16" in entry["kernel"]  # no bf16 product there: the backend says so
    wanted = entry["file"] in TENSOR_CORES and not _FLOAT32.search(entry["kernel"])
    if wanted and not without and not entry["mma"]:
        found.append("has no tensor-core instruction")
    if entry["file"] == "attention" and entry["arch"] != "75" and not entry["cp_async"]:
        found.append("copies nothing by cp.async")
    if entry["ptxas"]:
        found.append(f"ptxas warns: {entry['ptxas']}")
    return found


def compare(compiled, ledger, cuda, wanted):
    """``wanted``: the (file, arch) that the sources have."""
    result = Result(cuda, compiled=compiled)
    known = {key(entry): entry for entry in ledger if entry["cuda"] == cuda}
    result.recorded = bool(known)
    fresh = {key(entry): entry for entry in compiled}
    files = {(entry["file"], entry["arch"]) for entry in compiled}
    for at, entry in fresh.items():
        result.failures += [f"{label(entry)}: {text}" for text in violations(entry)]
        if "error" in entry:
            continue
        result.entries.append(entry)
        old = known.get(at)
        if old is None:
            result.drift.append(f"+ {label(entry)}")
        elif old != entry:
            changes = [f"{name} {old.get(name)} → {entry[name]}" for name in entry if old.get(name) != entry[name]]
            result.drift.append(f"~ {label(entry)}: {', '.join(changes)}")
    for at, entry in known.items():
        if at in fresh:
            continue
        if at[:2] in files or at[:2] not in wanted:
            result.drift.append(f"- {label(entry)}")
        else:
            result.entries.append(entry)
            result.failures += [f"{label(entry)}: {text}" for text in violations(entry)]
    return result


def select(wanted, ledger, cuda, everything, sample=SAMPLE):
    """The (file, arch) to compile: all, or those that the ledger lacks with this source, and a sample."""
    if everything:
        return list(wanted)
    known = {(entry["file"], entry["arch"]): entry["source"] for entry in ledger if entry["cuda"] == cuda}
    if not known:
        return [pair for pair in wanted if pair in sample]
    return [pair for pair in wanted if known.get(pair) != wanted[pair] or pair in sample]


def run(everything=False, match="", jobs=1):
    cuda, cxx = build.nvcc(), build.compiler()
    archs = build.architectures(cuda.version)
    wanted = {(path.stem, arch): digest(path.stem) for path in sorted(SOURCES.glob("*.cu")) for arch in archs}
    ledger = load()
    chosen = [pair for pair in select(wanted, ledger, cuda.version, everything) if match in f"{pair[0]} sm_{pair[1]}"]
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(lambda pair: compile_file(*pair, (cuda, cxx)), chosen))
    return compare([entry for entries in compiled for entry in entries], ledger, cuda.version, wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--match", default="")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if build.nvcc() is None or build.compiler() is None:
        print("not compiled: no nvcc, or no C++ compiler")
        return 0
    result = run(options.all, options.match, options.jobs)
    for entry in result.compiled:
        names = ("regs", "spill", "shared", "mma", "ldmatrix", "cp_async")
        print(f"{label(entry)}: {entry.get('error') or ' '.join(f'{name}={entry[name]}' for name in names)}")
    for line in result.drift:
        print(f"drift: {line}")
    for line in result.failures:
        print(f"FAILED: {line}")
    print(
        f"CUDA {result.cuda}: {len(result.compiled)} kernels compiled, {len(result.drift)} differences, "
        f"{len(result.failures)} failures"
    )
    if options.update:
        save([entry for entry in load() if entry["cuda"] != result.cuda] + result.entries)
    return int(bool(result.failures) or (bool(result.drift) and result.recorded and not options.update))


if __name__ == "__main__":
    sys.exit(main())
