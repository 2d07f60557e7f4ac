"""Builds the kernels of ``csrc/cuda`` with g++ and the emulator (``tests/emulator``), and calls them on CPU tensors.

A build is kept in ``build/emulator`` under the hash of its sources and flags. ``replaced`` builds a mutant: the source
of the kernels with one text in the place of another.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES, EMULATOR = ROOT / "csrc" / "cuda", ROOT / "tests" / "emulator"
CUTLASS = ROOT / "csrc" / "cutlass"
BUILD = ROOT / "build" / "emulator"
NO_EMULATOR = "no g++ 11 or newer on x86-64"
NO_CUTLASS = "no headers of CUTLASS, or no nvcc"
_FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-DVF_EMULATED")
_SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}

_spec = importlib.util.spec_from_file_location("emulator_call", EMULATOR / "call.py")
_call = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_call)


class EmulatorFault(AssertionError):
    """What the emulator found."""


def _compiler() -> str:
    program = shutil.which("g++")
    if program is None or platform.machine() != "x86_64":
        pytest.skip(NO_EMULATOR)
    if int(subprocess.run([program, "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0]) < 11:
        pytest.skip(NO_EMULATOR)
    return program


@dataclass(frozen=True)
class View:
    """A tensor as a kernel sees it. mode: "in", "out" or "inout"."""

    tensor: Tensor
    name: str
    mode: str


def reads(tensor: Tensor | None, name: str) -> View | None:
    return None if tensor is None else View(tensor, name, "in")


def writes(tensor: Tensor | None, name: str) -> View | None:
    return None if tensor is None else View(tensor, name, "out")


def type_of(*tensors: Tensor | None) -> int:
    """The kernels' number of the dtype of the first tensor that is there, float32 without one."""
    return next((TYPES[t.dtype] for t in tensors if t is not None), 0)


@dataclass
class Library:
    path: Path
    sanitized: bool
    counts: list[int]  # launches, blocks, meetings of warps, block barriers, ldmatrix phases, bank conflicts in them

    def call(
        self, function: str, *arguments: Any, schedule: int = 0, shared_limit: int = 232448, last_blocks: int = 0
    ) -> None:
        """Runs a function. Raises EmulatorFault for what the emulator or a sanitizer finds."""
        storages: dict[int, Tensor] = {}
        words = []
        for value in arguments:
            if isinstance(value, View):
                t = value.tensor
                storages.setdefault(t.untyped_storage().data_ptr(), t)
                value = {
                    "buffer": list(storages).index(t.untyped_storage().data_ptr()),
                    "offset": t.storage_offset() * t.element_size(),
                    "name": value.name, "element": t.element_size(),
                    "sizes": list(t.shape), "strides": list(t.stride()), "mode": value.mode,
                }  # fmt: skip
            words.append(list(value) if isinstance(value, (tuple, torch.Size)) else value)
        request = {
            "function": function, "arguments": words, "schedule": schedule, "shared_limit": shared_limit,
            "last_blocks": last_blocks,
        }  # fmt: skip
        run = self._in_a_child if self.sanitized else self._here
        answer = run(request, storages)
        self.counts = answer["counts"]
        if answer["error"]:
            raise EmulatorFault(answer["error"])
        assert answer["returned"] == 1, "no kernel for these arguments"

    def _here(self, request: dict[str, Any], storages: dict[int, Tensor]) -> dict[str, Any]:
        return _call.call(str(self.path), request, list(storages))

    def _in_a_child(self, request: dict[str, Any], storages: dict[int, Tensor]) -> dict[str, Any]:
        folder = self.path.with_suffix(f".{os.getpid()}")
        folder.mkdir()
        try:
            flat = [
                t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in storages.values()
            ]
            files = [folder / str(i) for i in range(len(flat))]
            for name, t in zip(files, flat):
                name.write_bytes(bytes(t.untyped_storage()))
            path = folder / "request.json"
            path.write_text(json.dumps(request | {"files": list(map(str, files)), "library": str(self.path)}))
            runtime = subprocess.run([_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
            environment = os.environ | {
                "LD_PRELOAD": runtime.stdout.strip(),
                "PYTHONMALLOC": "malloc",
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            }
            command = [sys.executable, "-I", str(EMULATOR / "call.py"), str(path)]
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            if child.returncode:
                lines = [line for line in child.stderr.splitlines() if "ERROR" in line or "error" in line]
                raise EmulatorFault("; ".join(lines[:3]) or child.stderr[-500:])
            for name, t in zip(files, flat):
                t.copy_(torch.frombuffer(bytearray(name.read_bytes()), dtype=t.dtype))
            return json.loads(Path(f"{path}.answer").read_text())
        finally:
            shutil.rmtree(folder)


def _make(target: Path, command: list[str]) -> Path:
    """The target, made by a command that writes to its last word; one process makes it, others wait."""
    if not target.exists():
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                partial = target.with_suffix(".partial")
                made = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
                assert made.returncode == 0, made.stderr[-3000:]
                partial.rename(target)
    return target


def build(
    stem: str,
    replaced: tuple[tuple[str, str], ...] = (),
    flags: tuple[str, ...] = (),
    sanitized: bool = False,
) -> Library:
    """The library of ``csrc/cuda/<stem>.cu``. ``replaced``: (old, new) texts of a mutant, each of which must occur."""
    compiler = _compiler()
    optimised = _SANITIZERS if sanitized else ("-O0",) if replaced else ("-O2",)
    flags = (*_FLAGS, *optimised, *flags)
    headers = sorted([*SOURCES.glob("*.h"), *EMULATOR.glob("*.h"), *EMULATOR.glob("*.cpp")])
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for path in headers:
        digest.update(path.read_bytes())
    model = digest.hexdigest()[:16]
    source = (SOURCES / f"{stem}.cu").read_text()
    for old, new in replaced:
        assert old in source, f"{stem}.cu has no {old!r}"
        source = source.replace(old, new)
    digest.update(source.encode())
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [compiler, *flags, "-DVF_KERNELS_ONLY", f"-I{EMULATOR}", f"-I{SOURCES}"]
    emulator = _make(BUILD / f"{model}.o", [*command, "-c", str(EMULATOR / "emulator.cpp")])
    name = digest.hexdigest()[:16]
    folder = BUILD / name
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.cu").write_text(source)
    entry = ["-x", "c++", str(EMULATOR / f"{stem}.cpp"), "-x", "none", str(emulator)]
    path = _make(BUILD / f"{stem}-{name}.so", [command[0], f"-I{folder}", *command[1:], "-shared", *entry])
    return Library(path, sanitized, [])


def build_operators() -> Path:
    """The library of the torch operators, for ``torch.ops.load_library``: CPU tensors, run by the emulator."""
    compiler, root = _compiler(), Path(torch.__file__).parent
    command = [compiler, *_FLAGS, "-O1", f"-I{EMULATOR}", f"-I{SOURCES}", f"-isystem{root / 'include'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-shared"]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in sorted([*SOURCES.glob("*"), *EMULATOR.glob("*.h"), *EMULATOR.glob("*.cpp")]):
        digest.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    files = [str(EMULATOR / name) for name in ("operators.cpp", "emulator.cpp")]
    link = [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    return _make(BUILD / f"operators-{digest.hexdigest()[:16]}.so", [*command, *files, *link])


def build_cutlass() -> Path:
    """The library of the operator of ``csrc/cutlass`` for CPU tensors, with loops in the place of CUTLASS's kernels."""
    compiler, root = _compiler(), Path(torch.__file__).parent
    command = [compiler, *_FLAGS, "-O2", f"-I{EMULATOR}", f"-I{CUTLASS}", f"-I{SOURCES}", f"-isystem{root / 'include'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-shared"]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in sorted([*CUTLASS.glob("*"), *SOURCES.glob("*.h"), *EMULATOR.glob("*.h"), *EMULATOR.glob("*.cpp")]):
        digest.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    files = [str(EMULATOR / name) for name in ("cutlass.cpp", "emulator.cpp")]
    link = [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    return _make(BUILD / f"cutlass-{digest.hexdigest()[:16]}.so", [*command, *files, *link])


def build_epilogue(replaced: tuple[str, str] = ("", "")) -> Path:
    """The library of ``csrc/cutlass/epilogue.h`` alone. ``replaced``: (old, new) text of a mutant, which must occur."""
    source = (CUTLASS / "epilogue.h").read_text()
    assert replaced[0] in source, f"epilogue.h has no {replaced[0]!r}"
    if replaced[0]:
        source = source.replace(*replaced)
    command = [_compiler(), *_FLAGS, "-O1", "-shared"]
    digest = hashlib.sha256(" ".join([*command, source]).encode() + (EMULATOR / "cutlass_epilogue.cpp").read_bytes())
    folder = BUILD / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "epilogue.h").write_text(source)
    return _make(folder / "epilogue.so", [*command, f"-I{folder}", str(EMULATOR / "cutlass_epilogue.cpp")])


def build_visitors(name: str, element: str = "bfloat16_t", replaced: tuple[str, str] = ("", "")) -> Path:
    """The library of the visitor trees of a file of csrc/cutlass, compiled by g++ with CUTLASS's headers and CUDA's.

    Args:
        name: "sm80" or "sm90".
        element: CUTLASS's name of the dtype, "bfloat16_t" or, of sm80, "half_t".
        replaced: (old, new) text of a mutant, which must occur.
    """
    from vit_fast.csrc import build

    compiler, cuda, headers = _compiler(), build.nvcc(), build.cutlass()
    if cuda is None or headers is None:
        pytest.skip(NO_CUTLASS)
    told = subprocess.run([*cuda.command, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    includes = re.findall(r'(?:-I|"-isystem" ")([^"]+)"', "".join(re.findall(r"INCLUDES=.*", told)))
    source = (CUTLASS / f"linear_{name}.cu").read_text()
    begin, end = source.index("namespace vf {"), re.search(r"^template <.*> struct Product", source, re.MULTILINE)
    source = source[begin : end.start()] + "}  // namespace\n}  // namespace vf\n"
    assert replaced[0] in source, f"linear_{name}.cu has no {replaced[0]!r}"
    if replaced[0]:
        source = source.replace(*replaced)
    host, entry = EMULATOR / "cutlass_host", EMULATOR / f"cutlass_visitors_{name}.cpp"
    # -fpermissive: templates that nothing instantiates call functions of CUDA that g++ does not know.
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-w",
        "-fpermissive",
        "-fPIC",
        "-shared",
        f"-DVF_ELEMENT=cutlass::{element}",
    ]
    command += [f"-I{host}", "-include", str(host / "prelude.h"), "-isystem", headers.command[0]]
    command += [word for folder in includes for word in ("-isystem", folder)] + [f"-I{CUTLASS}"]
    digest = hashlib.sha256(" ".join([*command, headers.version, source]).encode())
    for path in sorted([entry, *host.rglob("*.h"), *CUTLASS.glob("*.h")]):
        digest.update(path.read_bytes())
    folder = BUILD / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "visitors.h").write_text(source)
    return _make(folder / "visitors.so", [*command, f"-I{folder}", str(entry)])
