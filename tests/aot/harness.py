"""Compiles, without a GPU, exactly the kernels that the launch functions of vit_fast.kernels would compile on one.

A stand-in for Triton's driver reports the target, ``configs.arch_of`` reports the architecture, and Triton's compile
step is replaced by one that records the request and launches nothing. So the Python launch functions run unchanged,
on CPU tensors of real shapes (``cases.py``), and what they select (kernel, constexprs, specialisation on divisibility,
tiles) is what gets compiled. Each compile runs in a fork of its own, so that one that aborts or hangs fails alone.

Run by ``ledger.py`` in a child process for each Triton version, with the interpreter off:

    python harness.py REQUEST.json ANSWER.json
"""

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass, field

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
TENSOR_MEMORY_LIMIT = 512  # columns, sm_100
COMPILE_SECONDS = 180


@dataclass
class Request:
    """One compile that a launch asked for."""

    arch: int
    dtype: str
    case: str
    function: object
    signature: dict
    constexprs: dict
    attrs: dict
    options: object
    description: dict = field(default_factory=dict)


class CompileOnlyDriver:
    """Stands in for the CUDA driver: names the target, has no device. The device index is the architecture."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device=None):
        return 0


def _set_arch(arch):
    import triton
    from vit_fast.kernels import configs

    triton.runtime.driver.set_active(CompileOnlyDriver(arch))

    def arch_of(device):
        return arch

    configs.arch_of = arch_of
    configs.multiprocessors_of = lambda device: 132
    for name, module in list(sys.modules.items()):
        if name.startswith("vit_fast.kernels.") and hasattr(module, "arch_of"):
            module.arch_of = arch_of


def _code(source):
    """A source without comments, docstrings and formatting, none of which changes what is compiled."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _device_source(function):
    """The code of a kernel and of everything of ours that it calls or reads, be it through a module (``launch.f``)."""
    import triton

    seen, parts, stack = set(), [], [function]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        parts.append(_code(current.src))
        names, own = current.fn.__code__.co_names, current.fn.__globals__
        modules = (value for name in names if isinstance(value := own.get(name), types.ModuleType))
        spaces = [own, *(vars(module) for module in modules if module.__name__.startswith("vit_fast."))]
        for name, value in ((name, space.get(name)) for space in spaces for name in names):
            if isinstance(value, triton.JITFunction) and not value.fn.__module__.startswith("triton."):
                stack.append(value)
            elif isinstance(value, (int, float, str, bool, triton.language.constexpr)):
                parts.append(f"{name} = {value!r}")
    return "\n".join(sorted(parts))


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(value):
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(getattr(value, "value", value))


def _describe(request):
    import triton

    function, options = request.function, request.options
    constants = {function.params[path[0]].name: value for path, value in request.constexprs.items() if len(path) == 1}
    nested = {path: value for path, value in request.constexprs.items() if len(path) > 1}
    declared = {param.name for param in function.params if param.is_constexpr}
    chosen = " ".join(f"{name}={_text(value)}" for name, value in constants.items() if name in declared)
    launch = f"num_warps={options.num_warps} num_stages={options.num_stages}"
    if options.maxnreg is not None:
        launch += f" maxnreg={options.maxnreg}"
    if options.launch_pdl:
        launch += " launch_pdl"
    attrs = sorted(f"{path}:{value}" for path, value in request.attrs.items() if value)
    identity = f"{request.signature} {constants} {sorted(nested.items())} {attrs} {launch} {options.num_ctas}"
    return {
        "triton": triton.__version__,
        "arch": request.arch,
        "kernel": function.fn.__name__,
        "dtype": request.dtype,
        "id": _digest(identity),
        "case": request.case,
        "config": f"{chosen} {launch}",
        "source": _digest(_device_source(function) + identity),
    }


def _what_went_wrong():
    error, place = sys.exc_info()[1], traceback.extract_tb(sys.exc_info()[2])[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})"


def plan(archs):
    """Every distinct compile that the cases ask for, by (arch, kernel, id), and the cases that went wrong."""
    import cases
    import triton

    requests, problems, current = {}, [], {}

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        request = Request(
            current["arch"], current["dtype"], current["case"], self, signature, constexprs, attrs, options
        )
        request.description = _describe(request)
        current["launches"] += 1
        requests.setdefault((request.arch, request.description["kernel"], request.description["id"]), request)

    triton.JITFunction._do_compile = note
    for arch in archs:
        _set_arch(arch)
        for operation in cases.OPERATIONS:
            try:
                listed = list(operation())
            except Exception:
                problems.append(f"{operation.__name__}: {_what_went_wrong()}")
                continue
            for case in listed:
                if arch not in case.archs:
                    continue
                current.update(arch=arch, dtype=case.dtype, case=case.name, launches=0)
                try:
                    case.call()
                    if current["launches"] == 0:
                        raise AssertionError("launched no kernel")
                except Exception:
                    problems.append(f"{case.name} {case.dtype} sm_{arch}: {_what_went_wrong()}")
    return requests, problems


def _wanted_units(ttir):
    """The units that the dots of a module need: "tensor" (fp16, bf16, fp8, tf32), "ieee" (fp32), both, or neither."""
    units = set()
    for line in ttir.splitlines():
        if re.search(r"\b(tt\.dot(_scaled)?|ttng\.warp_group_dot)\b", line):
            types = line.rsplit(" : ", 1)[-1]
            low = "tf32" in line or re.search(r"(tensor|memdesc)<[0-9x]*x(f16|bf16|f8\w*)[,>]", types)
            units.add("tensor" if low else "ieee")
    return "+".join(sorted(units))


def _before_load(cubin):
    """How many instructions of the machine code stand before the first load of a tile into shared memory."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    return next(i for i, line in enumerate(lines) if re.search(r"\b(UTMALDG|LDGSTS)\b", line))


def _compile(request):
    import triton

    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    function, target = request.function, triton.runtime.driver.active.get_current_target()
    function.create_binder()
    source = function.ASTSource(function, request.signature, request.constexprs, request.attrs)
    with contextlib.redirect_stdout(log):
        kernel = function.compile(source, target=target, options=request.options.__dict__)
    log, ptx = log.getvalue(), kernel.asm["ptx"]
    if "registers" not in log:
        raise AssertionError(f"ptxas reports no registers: {log[-300:]!r}")

    def number(pattern):
        return sum(int(found) for found in re.findall(pattern, log))

    found = {}
    if request.function.is_gluon():  # warp-specialised: loads by TMA, setmaxnreg redistributes registers
        found["tma_loads"] = len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global", ptx))
        found["setmaxnreg"] = sorted({int(number) for number in re.findall(r"setmaxnreg\.\S+\s+(\d+)", ptx)})
        if "griddepcontrol.wait" in ptx:  # PDL: in the machine code, the producer asks for tiles of W before it waits
            partitions = re.split(r"\bUSETMAXREG", kernel.asm["sass"])
            found["early_loads"] = sum(
                part.split("ACQBULK")[0].count("UTMALDG") for part in partitions if "ACQBULK" in part
            )
    if "atom." in ptx:  # split-K semaphore: a barrier must separate every thread's stores from the one atomic
        before = [line for line in ptx[: ptx.index("atom.")].splitlines() if "st.global" in line or "bar.sync" in line]
        found["handover"] = "acq_rel" in ptx and bool(before) and "bar.sync" in before[-1]
    if "griddepcontrol.wait" in ptx:  # PDL: nothing may be read or written before the wait
        found["waits"] = not re.search(r"\b(ld|st|atom|red)\.global|\bcp\.async", ptx.split("griddepcontrol.wait")[0])
    if (
        request.signature.get("norm", "constexpr") != "constexpr"
    ):  # a folded LayerNorm: row statistics may be read first
        found["before_load"] = _before_load(kernel.asm["cubin"])
    if re.search(r"tt\.dot.*xf8E4M3FN", kernel.asm.get("ttir", "")):
        found["fp8"] = "e4m3.e4m3" in ptx or "kind::f8f6f4" in ptx
    instructions = {"wgmma": r"\bwgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma"}
    return {
        "regs": max(int(found) for found in re.findall(r"Used (\d+) registers", log)),
        "spill": number(r"(\d+) bytes stack frame") + number(r"(\d+) bytes spill"),
        "shared": kernel.metadata.shared,
        "mma": "+".join(name for name, pattern in instructions.items() if re.search(pattern, ptx)),
        "dots": _wanted_units(kernel.asm["ttgir" if request.function.is_gluon() else "ttir"]),
        "serialised": "serialized" in log,
        "ptxas": " ".join(sorted(set(re.findall(r"C75\d\d", log)))),
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        **found,
    }


def _compile_in_fork(request, folder, index):
    """(process id, path of the answer) of a fork that compiles one request."""
    path = os.path.join(folder, f"{index}.json")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid, path
    status = 1
    try:
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, f"cache{index}")
        _set_arch(request.arch)
        try:
            answer = _compile(request)
        except BaseException as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            answer = {"error": " ".join(f"{type(cause).__name__}: {cause}".split())[-400:]}
        with open(path, "w") as file:
            json.dump(answer, file)
        status = 0
    finally:
        os._exit(status)


def compile_all(requests, jobs):
    """Descriptions with their resources, or with ``error``."""
    waiting, running, done = list(enumerate(requests)), {}, []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, request = waiting.pop(0)
                pid, path = _compile_in_fork(request, folder, index)
                running[pid] = (request, path, time.monotonic())
            for pid, (request, path, begin) in list(running.items()):
                if time.monotonic() - begin > COMPILE_SECONDS:
                    os.kill(pid, signal.SIGKILL)
                finished, status = os.waitpid(pid, os.WNOHANG)
                if not finished:
                    continue
                del running[pid]
                answer = {"error": f"the compiler died or was stopped, wait status {status}"}
                if os.path.exists(path):
                    with open(path) as file:
                        answer = json.load(file)
                done.append({**request.description, **answer})
            time.sleep(0.02)
    return done


def violations(entry, allowed_spills):
    """The rules for shipped kernels that a compiled entry breaks."""
    if "error" in entry:
        return [f"does not compile: {entry['error']}"]
    found = []
    if entry["spill"] > allowed_spills.get((entry["kernel"], entry["dtype"]), (0, ""))[0]:
        found.append(f"spills {entry['spill']} bytes")
    if entry["shared"] > SHARED_LIMIT[entry["arch"]]:
        found.append(f"needs {entry['shared']} bytes of shared memory, limit {SHARED_LIMIT[entry['arch']]}")
    if entry["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"needs {entry['tensor_memory']} columns of tensor memory, limit {TENSOR_MEMORY_LIMIT}")
    if "tensor" in entry["dots"] and not entry["mma"]:
        found.append("has no tensor-core instruction")
    if entry["dots"] == "ieee" and entry["mma"]:
        found.append(f"multiplies fp32 as TF32 ({entry['mma']}) though IEEE is asked for")
    if not entry.get("handover", True):
        found.append("counts in the split-K semaphore before all threads have stored")
    if not entry.get("waits", True):
        found.append("touches memory before the PDL wait")
    if not entry.get("fp8", True):
        found.append("multiplies float8 as something wider")
    if entry.get("tma_loads") == 0:
        found.append("loads nothing by TMA")
    if entry.get("setmaxnreg") == []:
        found.append("leaves the registers of its partitions as they are")
    if entry.get("early_loads") == 0:
        found.append("asks for no tile of the weight before the PDL wait")
    if entry["serialised"]:
        found.append(f"ptxas serialises wgmma ({entry['ptxas']})")
    return found


def select(requests, known, everything, sample):
    """The requests to compile: all, or those that the ledger lacks with this source, and a sample of the rest.

    For a Triton version that the ledger lacks entirely, a sample four times as large.
    """
    if everything:
        return list(requests.values())
    if not known:
        return sorted(requests.values(), key=lambda request: _digest(request.description["source"]))[: 4 * sample]
    changed, same = [], []
    for request in requests.values():
        description = request.description
        source = known.get(f"{description['arch']} {description['kernel']} {description['id']}")
        (same if source == description["source"] else changed).append(request)
    same.sort(key=lambda request: _digest(request.description["source"] + request.description["id"]))
    return changed + same[:sample]


def main(request_path, answer_path):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    import torch
    import triton

    torch.set_num_threads(1)  # no thread pool before a fork
    with open(request_path) as file:
        wanted = json.load(file)
    known = {
        f"{entry['arch']} {entry['kernel']} {entry['id']}": entry["source"]
        for entry in wanted["ledger"]
        if entry["triton"] == triton.__version__
    }
    requests, problems = plan(wanted["archs"])
    chosen = select(requests, known, wanted["everything"], wanted["sample"])
    if wanted["match"]:
        chosen = [r for r in chosen if wanted["match"] in f"{r.description['kernel']} {r.case} {r.dtype} sm_{r.arch}"]
        problems = [problem for problem in problems if wanted["match"] in problem]
    answer = {
        "triton": triton.__version__,
        "problems": problems,
        "planned": [request.description for request in requests.values()],
        "compiled": compile_all(chosen, wanted["jobs"]),
    }
    with open(answer_path, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
