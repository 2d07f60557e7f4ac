"""Mutation test: does a kill suite notice every small fault in a file of kernels/?

    python tests/mutation/run.py [FILE ...] [--changed] [--jobs 2] [--match TEXT] [--listed] [--list]
                                 [--sample N --seed S]

A fork of this process for each mutant (``mutate.py``) puts the mutant in the place of the module and runs the kill
suites of its file (``cases*.py``) in Triton's interpreter. An exception, a crash or a run past the time limit kills;
first the files as they are must pass. A survivor must stand in ``survivors.toml`` with the reason why no result can
depend on it, and an entry there must still survive: anything else fails the run. The table goes to out/mutation.json.
"""

import argparse
import gc
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import warnings
from collections import Counter
from importlib import import_module, reload
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

# First, because it sets the number of numpy's threads.
from support import interpreter_cures  # noqa: E402

# isort: split
import mutate  # noqa: E402
import torch  # noqa: E402
from support import sanitizer  # noqa: E402

# Files of kernels/; the function of that name in cases*.py is the kill suite. Files further down import those above.
SUITES = (
    "arguments", "tuned", "configs", "launch", "layer_norm", "activations", "dropout", "gemm", "gemm_train", "linear",
    "layernorm_mlp", "attention", "attention_bwd", "patch_embed", "column_sums", "layer_norm_bwd", "patch_embed_bwd",
    "linear_bwd", "layernorm_mlp_bwd", "interception", "launch_plan", "warming", "prepared_blocks", "fp8_blocks",
    "prepared_linear",
)  # fmt: skip
SLOW = ("attention_bwd",)  # up to ten seconds a mutant: a sample of all files leaves them out
MEMORY_LIMIT = 80 << 30  # bytes of address space: some suites reserve 60 GB and touch a few pages of them


def module_of(name):
    return import_module(f"vit_fast.kernels.{name}")


def install(name, source):
    """Replaces a module by the source, and reloads every module that imports names from it."""
    module = module_of(name)
    lines = source.splitlines(keepends=True)
    sys.modules["linecache"].cache[module.__file__] = (len(source), None, lines, module.__file__)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    for other in SUITES[SUITES.index(name) + 1 :]:
        if re.search(rf"^from \.{name} import", Path(module_of(other).__file__).read_text(), re.MULTILINE):
            reload(module_of(other))


def run_suite(name, source=None):
    """Runs a kill suite, in a child process, with poisoned memory and the sanitizer, as in the interpreted tests."""
    warnings.simplefilter("ignore")
    if source is not None:
        install(name, source)
    file = next(file for file in sorted(HERE.glob("cases*.py")) if f"\ndef {name}():\n" in file.read_text())
    cases = import_module(file.stem)  # here, because it imports functions from kernels/
    with sanitizer.poisoned_memory():
        torch.manual_seed(0)
        getattr(cases, name)()


def start(name, cpu_seconds, source=None):
    """Starts a child; returns (process id, pipe with the reason of its end). The limit is on CPU time, so that other
    load on the machine cannot kill a mutant; that on real time, for one that waits forever, is far above."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    status = 0
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        signal.alarm(60 * cpu_seconds)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        run_suite(name, source)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        place = next((f"{f.name}:{f.lineno}" for f in last if Path(f.filename).name.startswith("cases")), "")
        os.write(write, f"{place} {type(error).__name__}: {error}"[:400].encode())
        status = 1
    os._exit(status)


def finish(pid, read):
    """None while the child runs, then (verdict, why)."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        return None
    why = os.read(read, 400).decode(errors="replace")
    os.close(read)
    if os.WIFSIGNALED(status):
        number = signal.Signals(os.WTERMSIG(status))
        return "timed out" if number in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM) else "killed", number.name
    return "killed" if os.WEXITSTATUS(status) else "survived", why


def first_seconds(name):
    """CPU seconds of the kill suite on the unchanged file, in this process, so that forks need not repeat the one-time
    set-up of torch and Triton."""
    before = time.process_time()
    run_suite(name)
    seconds = time.process_time() - before
    for module in [module for module in sys.modules if module.startswith(("cases", "test_", "stand_ins"))]:
        del sys.modules[module]
    gc.collect()
    gc.freeze()  # keeps the collector from writing to pages that the forks share
    return seconds


def run_mutants(name, mutants, jobs):
    """Yields (mutant, verdict, why, seconds). The file as it is (None) is the first child, and must pass."""
    limit = math.ceil(3 * first_seconds(name)) + 1
    waiting, running = [*reversed(mutants), None], []
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running.append((mutant, time.monotonic(), start(name, limit, mutant and mutant.source)))
        for entry in list(running):
            mutant, began, child = entry
            if (ended := finish(*child)) is None:
                continue
            running.remove(entry)
            if mutant is not None:
                yield mutant, *ended, time.monotonic() - began
            elif ended[0] != "survived":
                for _, _, (pid, _) in running:
                    os.kill(pid, signal.SIGKILL)
                sys.exit(f"kernels/{name}.py as it is fails its kill suite: {ended}")
        time.sleep(0.002)


def listed(name):
    """Survivors that are listed: mutant, or function and ``: *`` → the reason why it may survive."""
    entries = tomllib.loads((HERE / "survivors.toml").read_text()).get(name, [])
    return {mutant: entry["reason"] for entry in entries for mutant in entry["mutants"]}


def changed_files():
    base = "HEAD"
    for branch in ("origin/main", "main"):
        found = subprocess.run(["git", "merge-base", "HEAD", branch], cwd=ROOT, capture_output=True, text=True)
        if found.returncode == 0:
            base = found.stdout.strip()
            break
    names = subprocess.run(["git", "diff", "--name-only", base], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        print("no checkout here, which would tell what changed")
    return [name for name in SUITES if f"kernels/{name}.py" in names.stdout.split()]


def is_new_survivor(result, accepted):
    """Whether a mutant survived that is not listed; prints it, since a file of many mutants takes an hour."""
    mutant = result["mutant"]
    new = result["verdict"] == "survived" and not {mutant, mutant.split(":")[0] + ": *"} & accepted.keys()
    if new:
        print(f"  SURVIVED and not listed: {mutant}", flush=True)
    return new


def stale_entries(results, accepted, known, complete):
    """Prints the listed survivors that are killed or no longer made; returns their number."""
    faults = 0
    survivors = {result["mutant"] for result in results if result["verdict"] == "survived"}
    ran = {result["mutant"] for result in results}
    for entry in accepted:
        wild = entry.endswith(": *")
        alive = any(mutant.startswith(entry[:-1]) for mutant in survivors) if wild else entry in survivors
        if not wild and entry not in known:
            print(f"  LISTED but no longer made: {entry}")
            faults += 1
        elif not alive and (complete if wild else entry in ran):
            print(f"  LISTED but killed: {entry}")
            faults += 1
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files of kernels/, all by default")
    parser.add_argument("--changed", action="store_true", help="only files that differ from main or the last commit")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--match", default="", help="only mutants whose name holds this text")
    parser.add_argument("--listed", action="store_true", help="only mutants that survivors.toml lists by name")
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    parser.add_argument("--sample", type=int, help="only so many mutants of each file, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    every_file = [name for name in SUITES if args.sample is None or name not in SLOW]
    names = [Path(file).stem for file in args.files] or every_file
    if unknown := [name for name in names if name not in SUITES]:
        parser.error(f"no kill suite for {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if args.changed:
        changed = changed_files()
        names = [name for name in names if name in changed]
        if not names:
            print("no changed file to mutate")
            return 0

    torch.set_num_threads(1)
    for name in SUITES:
        module_of(name)
    interpreter_cures.install()
    sanitizer.install()
    table, faults, began = {}, 0, time.monotonic()
    for name in names:
        every = mutate.mutants((ROOT / "kernels" / f"{name}.py").read_text())
        accepted = listed(name)
        chosen = [mutant for mutant in every if args.match in mutant.name]
        if args.listed:
            chosen = [mutant for mutant in chosen if mutant.name in accepted]
        if args.sample is not None and args.sample < len(chosen):
            chosen = random.Random(args.seed).sample(chosen, args.sample)
        if args.list:
            print(*(f"kernels/{name}.py {mutant.name}" for mutant in chosen), sep="\n")
            continue
        file_began, results = time.monotonic(), []
        for mutant, verdict, why, seconds in run_mutants(name, chosen, args.jobs):
            results.append({"mutant": mutant.name, "verdict": verdict, "why": why, "seconds": round(seconds, 2)})
            faults += is_new_survivor(results[-1], accepted)
        counts = Counter(result["verdict"] for result in results)
        seconds = time.monotonic() - file_began
        print(
            f"kernels/{name}.py: {len(results)} mutants,",
            ", ".join(f"{n} {v}" for v, n in sorted(counts.items())),
            f"in {seconds:.0f} s",
        )
        faults += stale_entries(results, accepted, {mutant.name for mutant in every}, len(chosen) == len(every))
        table[name] = {"counts": counts, "seconds": round(seconds, 1), "mutants": results}
    if not args.list:
        total = Counter()
        for entry in table.values():
            total += entry["counts"]
        print("total:", ", ".join(f"{n} {v}" for v, n in sorted(total.items())), f"in {time.monotonic() - began:.0f} s")
        (ROOT / "out").mkdir(exist_ok=True)
        (ROOT / "out/mutation.json").write_text(json.dumps(table, indent=1, ensure_ascii=False))
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
