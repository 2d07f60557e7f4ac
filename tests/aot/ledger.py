"""The resource ledger: registers, spills, shared memory and tensor-core instructions of every compiled kernel.

    python tests/aot/ledger.py              compile what changed and a sample, compare with ledger.json
    python tests/aot/ledger.py --all        compile everything, compare
    python tests/aot/ledger.py --update     compile what changed, rewrite ledger.json (--all --update: everything)

Options: --match TEXT (kernel, case, dtype, sm_NN), --jobs N, --archs 80,90,100. Two Triton versions are covered: the
installed one, and one in the folder that VIT_FAST_TRITON36 names (pip install --no-deps --target FOLDER triton==3.6.0).
Exit status 1: drift, a broken rule, or a case that does not run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cases
import harness

PATH = Path(__file__).with_name("ledger.json")


@dataclass
class Result:
    triton: str
    planned: int = 0
    recorded: bool = False  # whether the ledger has entries of this Triton version
    compiled: list = field(default_factory=list)
    entries: list = field(default_factory=list)  # the ledger of this Triton version as it should be
    failures: list = field(default_factory=list)  # rules broken, cases that do not run
    drift: list = field(default_factory=list)  # differences from the committed ledger


def load():
    return json.loads(PATH.read_text())["entries"] if PATH.exists() else []


def save(entries):
    entries = sorted(entries, key=lambda entry: (entry["triton"], entry["kernel"], entry["arch"], entry["id"]))
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    PATH.write_text('{"entries": [\n' + lines + "\n]}\n")


def label(entry):
    kernel = f"{entry['kernel']} {entry['dtype']}"
    return f"triton {entry['triton']} sm_{entry['arch']} {kernel} [{entry['case']}: {entry['config']}]"


def _key(entry):
    return entry["arch"], entry["kernel"], entry["id"]


def run(side_folder=None, everything=False, sample=3, match="", jobs=None, archs=harness.ARCHS):
    """Compile in a child process, under the Triton of ``side_folder`` if there is one, and compare with the ledger."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if side_folder:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [side_folder, environment.get("PYTHONPATH")]))
    ledger = load()
    request = {
        "ledger": ledger,
        "everything": everything,
        "sample": sample,
        "match": match,
        "jobs": jobs or os.cpu_count() or 1,
        "archs": list(archs),
    }
    with tempfile.TemporaryDirectory() as folder:
        request_path, answer_path = Path(folder, "request.json"), Path(folder, "answer.json")
        request_path.write_text(json.dumps(request))
        command = [sys.executable, harness.__file__, str(request_path), str(answer_path)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not answer_path.exists():
            tail = " | ".join((child.stdout + child.stderr).strip().splitlines()[-5:])
            return Result("?", failures=[f"the harness died, exit status {child.returncode}: {tail}"])
        answer = json.loads(answer_path.read_text())
    return compare(answer, ledger, archs, partial=bool(match))


def _violations(entry):
    return [f"{label(entry)}: {text}" for text in harness.violations(entry, cases.ALLOWED_SPILLS)]


def compare(answer, ledger, archs=harness.ARCHS, partial=False):
    """``partial``: only some of the changed kernels were compiled, so no entry counts as missing or stale."""
    result = Result(
        answer["triton"],
        planned=len(answer["planned"]),
        compiled=answer["compiled"],
        failures=list(answer["problems"]),
    )
    known = {_key(e): e for e in ledger if e["triton"] == answer["triton"]}
    result.recorded = bool(known)
    compiled = {_key(e): e for e in answer["compiled"]}
    planned = {_key(e) for e in answer["planned"]}
    for entry in answer["planned"]:
        key = _key(entry)
        if key not in compiled:
            if key in known:
                result.entries.append(known[key])
                result.failures += _violations(known[key])
            continue
        fresh = compiled[key]
        result.failures += _violations(fresh)
        if "error" in fresh:
            continue
        result.entries.append(fresh)
        old = known.get(key)
        if old is None:
            result.drift.append(f"+ {label(fresh)}")
        elif old != fresh:
            changes = [f"{name} {old.get(name)} → {fresh[name]}" for name in fresh if old.get(name) != fresh[name]]
            result.drift.append(f"~ {label(fresh)}: {', '.join(changes)}")
    for key, entry in known.items():
        if key not in planned:
            if partial or entry["arch"] not in archs:
                result.entries.append(entry)
            else:
                result.drift.append(f"- {label(entry)}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--match", default="")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--archs", default=",".join(str(arch) for arch in harness.ARCHS))
    options = parser.parse_args()
    archs = [int(arch) for arch in options.archs.split(",")]
    side_folder = os.environ.get("VIT_FAST_TRITON36")
    bad = False
    for folder in [None, side_folder] if side_folder else [None]:
        result = run(folder, options.all, match=options.match, jobs=options.jobs, archs=archs)
        if options.update and not result.recorded and not options.all and not options.match:
            result = run(folder, True, jobs=options.jobs, archs=archs)
        for entry in sorted(result.compiled, key=lambda e: (e["kernel"], e["arch"], e["dtype"])):
            figures = " ".join(f"{name}={entry.get(name)}" for name in ("regs", "spill", "shared", "mma", "ptxas"))
            print(f"{label(entry)}: {entry.get('error') or figures}")
        for line in result.drift:
            print(f"drift: {line}")
        for line in result.failures:
            print(f"FAILED: {line}")
        print(
            f"triton {result.triton}: {result.planned} kernels planned, {len(result.compiled)} compiled, "
            f"{len(result.drift)} differences, {len(result.failures)} failures"
        )
        if options.update:
            save([entry for entry in load() if entry["triton"] != result.triton] + result.entries)
        bad |= bool(result.failures) or (bool(result.drift) and result.recorded and not options.update)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
