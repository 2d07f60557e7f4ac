"""Builds the C++/CUDA libraries with ninja: the commands, the lock, the atomic publication in the cache.

Uses the standard library, the headers of the installed torch, a C++ compiler, ninja and, for the libraries of CUDA
kernels, nvcc. The products by CUTLASS are a library of their own: they take minutes to compile, and CUTLASS's headers.
A build writes into a folder of its own inside the cache and renames it when all is done, so that nobody sees half a
library. ``flock`` on a file beside it makes one of several builders build and the others find the result; the lock dies
with its process. The next holder takes over the steps that a builder had finished when it was killed, interrupted or at
its limit, and ninja goes on from there.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import cache

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
# Instruction-set level → its flags. kernels.cpp is compiled once for each level of the machine's architecture.
X86_LEVELS: Mapping[str, tuple[str, ...]] = {
    "generic": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}
OTHER_LEVELS: Mapping[str, tuple[str, ...]] = {"generic": ()}

# CUDA architecture → the first CUDA version whose nvcc knows it. PTX is made for the newest.
CUDA_ARCHITECTURES: Mapping[str, tuple[int, int]] = {
    "75": (10, 0),
    "80": (11, 0),
    "89": (11, 8),
    "90a": (12, 0),
    "100": (12, 8),
}

# Kernel of csrc/cutlass → its file, what it is made of, and its architectures: those that nvcc knows, and PTX of the
# kernels of sm_80, which serve all that comes after. linear.h has the same kernels with what they compute.
_HOPPER, _AMPERE, _TURING = ("90a",), ("80", "90a", "100"), ("75",)
CUTLASS_KERNELS: Mapping[str, tuple[str, Mapping[str, str], tuple[str, ...]]] = {
    **{
        f"{family}_{epilogue}": (
            "linear_sm90.cu",
            {"SCHEDULE": family.capitalize(), "TREE": f"{epilogue.capitalize()}Tree", "TILE": tile},
            _HOPPER,
        )
        for family, epilogue, tile in (
            ("pingpong", "activation", "Square"),
            ("pingpong", "fold", "Square"),
            ("pingpong", "residual", "Square"),
            ("cooperative", "activation", "Wide"),
            ("cooperative", "fold", "Tall"),
            ("cooperative", "residual", "Tall"),
        )
    },
    **{
        f"{family}_{epilogue}_{dtype}": (
            "linear_sm80.cu",
            {"ARCH": arch, "TREE": f"{epilogue.capitalize()}Tree", "ELEMENT": f"cutlass::{element}"},
            architectures,
        )
        for family, arch, dtype, element, architectures in (
            ("multistage", "Sm80", "bf16", "bfloat16_t", _AMPERE),
            ("multistage", "Sm80", "fp16", "half_t", _AMPERE),
            ("turing", "Sm75", "fp16", "half_t", _TURING),
        )
        for epilogue in ("activation", "residual")
    },
}
_OLDEST_CUTLASS, _OLDEST_CUDA_OF_CUTLASS = (4, 2), (12, 0)

_TARGET = f"-DTORCH_TARGET_VERSION=0x{cache.ABI_TARGET[0]:02x}{cache.ABI_TARGET[1]:02x}000000000000"
_CXX = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden")
_MATH = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")

# A build may take an hour, or so many times its estimate where that is more; another builder waits for it as long.
LIMIT_SECONDS, SLOWEST = 60 * 60, 20
MIB = 2**20
_NINJA_LOG = ".ninja_log"  # tab-separated: start, end, time, file, hash of the command
FREE_BYTES = {"cpu": 200 * MIB, "cuda": 1000 * MIB, "cutlass": 1000 * MIB}  # in the cache folder, before a build
JOB_BYTES = {"cpu": 1024 * MIB, "cuda": 2048 * MIB, "cutlass": 4096 * MIB}  # of memory for each compiler at a time
STEP_SECONDS = {"cpu": 10, "cuda": 30, "cutlass": 50}  # rough time of one compile, for the estimate

INSTALL = {
    "compiler": "install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name one in CXX",
    "ninja": "pip install ninja",
    "nvcc": "pip install 'vit-fast[cuda]', or put the CUDA toolkit's nvcc on PATH or its folder into CUDA_HOME",
    "CUTLASS": "pip install --no-deps nvidia-cutlass, or name the folder of its include/ in CUTLASS_PATH",
}


class BuildError(Exception):
    """A library could not be built; the text says why, and what to do."""


class EndedEarlyError(BuildError):
    """The compilers were ended or killed; what they had finished is kept for the next build."""


class Tool(NamedTuple):
    """A program: the words it is called with, and its version as it tells it."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{self.version} ({shlex.join(self.command)})"


class Step(NamedTuple):
    """One command of a build: the file that it makes, the files that it is made of, and what it is called."""

    output: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]
    title: str


class Result(NamedTuple):
    """A library that stands ready: its file, whether it was found rather than built, and the seconds that it took."""

    library: Path
    found: bool
    seconds: float


def levels() -> Mapping[str, tuple[str, ...]]:
    """The instruction-set levels of this machine's architecture, each with its flags."""
    return X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else OTHER_LEVELS


# Tools


def _version(command: tuple[str, ...], pattern: str) -> str | None:
    """What a program says of its version; None where it cannot be run."""
    ask, silent = [*command, "--version"], subprocess.DEVNULL
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60, stdin=silent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    told = re.search(pattern, done.stdout, re.MULTILINE)
    return told[0].strip() if done.returncode == 0 and told else None


def compiler() -> Tool | None:
    """The C++ compiler: that of ``CXX``, else g++, c++ or clang++; None without one that runs."""
    named = os.environ.get("CXX")
    for words in [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]:
        path = shutil.which(words[0])
        command = (path, *words[1:]) if path else ()
        if command and (version := _version(command, r"^.+$")):
            return Tool(command, version)
    return None


def ninja() -> Tool | None:
    """ninja: the wheel's, else that on PATH; None without one that runs."""
    paths = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.distribution("ninja").files or ()
        paths = [
            os.path.realpath(file.locate()) for file in files if file.name == "ninja" and file.parent.name == "bin"
        ]
    for path in [*paths, shutil.which("ninja")]:
        if path and (version := _version((path,), r"^\d+(\.\d+)*")):
            return Tool((path,), version)
    return None


def nvcc() -> Tool | None:
    """nvcc: that of ``CUDA_HOME``, else of the wheels of CUDA 13 and later, else that on PATH; None without one."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    spec = importlib.util.find_spec("nvidia")
    for site in (spec.submodule_search_locations or ()) if spec else ():
        homes += sorted(Path(site).glob("cu[0-9]*"), reverse=True)
    for path in [*(str(home / "bin" / "nvcc") for home in homes), shutil.which("nvcc")]:
        if path and (version := _version((path,), r"release .*$")):
            return Tool((path,), version.split()[-1].removeprefix("V"))
    return None


def cutlass() -> Tool | None:
    """The headers of CUTLASS (the folder is the command): of ``CUTLASS_PATH``, else of the wheel nvidia-cutlass."""
    folders = [Path(named) for named in (os.environ.get("CUTLASS_PATH"),) if named]
    spec = importlib.util.find_spec("cutlass_library")
    folders += [Path(site) / "source" for site in (spec.submodule_search_locations or ()) if site] if spec else []
    for include in (folder / "include" for folder in folders):
        with contextlib.suppress(OSError, TypeError):
            text = (include / "cutlass" / "version.h").read_text()
            numbers = [re.search(rf"define CUTLASS_{part} +(\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH")]  # type: ignore[index]
            return Tool((str(include),), ".".join(numbers))
    return None


def _need(kind: str, found: Tool | None) -> Tool:
    if found is None:
        looked = {
            "compiler": f"no C++ compiler: {os.environ['CXX']!r} of CXX does not run"
            if os.environ.get("CXX")
            else "no C++ compiler: none of g++, c++, clang++ runs",
            "ninja": "no ninja",
            "nvcc": "no nvcc",
            "CUTLASS": "no headers of CUTLASS",
        }
        raise BuildError(f"{looked[kind]}; {INSTALL[kind]}")
    return found


def _torch() -> Path:
    """The folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed here; with pip, add --no-build-isolation")
    root = Path(spec.origin).parent
    try:
        text = (root / "include" / "torch" / "headeronly" / "version.h").read_text()
        version = tuple(int(re.search(rf"define TORCH_VERSION_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR"))  # type: ignore[index]
    except (OSError, TypeError):
        raise BuildError(f"torch has no headers of a known version in {root / 'include'}; reinstall torch") from None
    if version < cache.ABI_TARGET:
        raise BuildError(f"torch {version[0]}.{version[1]} is too old, wanted 2.11 or newer")
    return root


# The commands of a build


def _includes(torch: Path) -> tuple[str, ...]:
    return (f"-I{torch / 'include'}",)


def _cpu_steps(sources: Path, torch: Path, cxx: Tool) -> list[Step]:
    """kernels.cpp once for each level, every other file once, and the link."""
    levels_here = levels()
    defines = [_TARGET] + (["-DVF_LEVELS_X86=1"] if levels_here is X86_LEVELS else [])
    # __FILE__, which stands in PyTorch's messages, shall not name folders of the machine that built the library.
    names = [f"-ffile-prefix-map={sources}=csrc", f"-ffile-prefix-map={torch / 'include'}=include"]
    steps = []
    for path in sorted((sources / "cpu").glob("*.cpp")):
        if path.name == "kernels.cpp":
            for level, flags in levels_here.items():
                output = f"kernels_{level}.o"
                command = [*cxx.command, *_CXX, *_MATH, *names, *flags, f"-DVF_LEVEL={level}"]
                command += ["-c", str(path), "-o", output]
                steps.append(Step(output, (str(path),), tuple(command), f"{path.name} for {level}"))
        else:
            output = f"{path.stem}.o"
            command = [*cxx.command, *_CXX, *names, *defines, *_includes(torch), "-c", str(path), "-o", output]
            steps.append(Step(output, (str(path),), tuple(command), path.name))
    objects = tuple(step.output for step in steps)
    library = cache.file_name("cpu")
    # Without a DT_NEEDED of libtorch_cpu the library does not load; no run path, as Python has libtorch_cpu loaded.
    link = [*cxx.command, "-shared", "-o", library, *objects, f"-L{torch / 'lib'}", "-Wl,--no-as-needed"]
    link += ["-ltorch_cpu", "-Wl,-z,defs"]
    return [*steps, Step(library, objects, tuple(link), f"link {library}")]


def _version_of(tool: str) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.split(".")[:2])


def known(names: Iterable[str], nvcc_version: str) -> tuple[str, ...]:
    """Those of some architectures that an nvcc of this version knows."""
    version = _version_of(nvcc_version)
    return tuple(name for name in names if version >= CUDA_ARCHITECTURES[name])


def architectures(nvcc_version: str) -> tuple[str, ...]:
    """The architectures of ``CUDA_ARCHITECTURES`` that an nvcc of this version knows."""
    return known(CUDA_ARCHITECTURES, nvcc_version)


def _nvcc(torch: Path, cxx: Tool, cuda: Tool) -> list[str]:
    """The words of every compile by nvcc but architectures, source and output."""
    options = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", _TARGET]
    return [*cuda.command, "-ccbin", cxx.command[0], *options, *_includes(torch)]


def _gencode(names: Sequence[str], ptx: bool) -> list[str]:
    """The options that compile for architectures, and to PTX for what comes after the last."""
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return codes + [f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"] * ptx


def _cuda_link(name: str, torch: Path, cxx: Tool, cuda: Tool, objects: tuple[str, ...]) -> list[Step]:
    """The link of a library of CUDA kernels; a stub of libtorch_cuda where torch has none."""
    library, needed, steps = cache.file_name(name), objects, []
    folders = [f"-L{torch / 'lib'}"]
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        stub = "stub/libtorch_cuda.so"
        command = [*cxx.command, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", stub]
        steps.append(Step(stub, (), tuple(command), "stub of libtorch_cuda.so"))
        folders.append("-Lstub")
        needed = (*objects, stub)
    home = Path(cuda.command[0]).resolve().parents[1]
    folders += [f"-L{path}" for path in (home / "lib", home / "lib64") if path.is_dir()]  # of libcudart_static.a
    link = [*cuda.command, "-ccbin", cxx.command[0], "-shared", "-cudart", "static", "-o", library, *objects, *folders]
    link += ["-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
    return [*steps, Step(library, needed, tuple(link), f"link {library}")]


def _cuda_steps(sources: Path, torch: Path, cxx: Tool, cuda: Tool) -> list[Step]:
    """Every .cu file once for all architectures, and the link."""
    common, codes = _nvcc(torch, cxx, cuda), _gencode(architectures(cuda.version), ptx=True)
    steps = []
    for path in sorted((sources / "cuda").glob("*.cu")):
        output = f"{path.stem}.o"
        steps.append(Step(output, (str(path),), (*common, *codes, "-c", str(path), "-o", output), path.name))
    return steps + _cuda_link("cuda", torch, cxx, cuda, tuple(step.output for step in steps))


def cutlass_flags(kernel: str, headers: Tool) -> list[str]:
    """The options that make a kernel of ``CUTLASS_KERNELS`` out of its file.

    Without NDEBUG an assert is a function call in the loop, for which ptxas serialises wgmma (warning C7510).
    """
    defines = {"KERNEL": kernel, **CUTLASS_KERNELS[kernel][1]}
    options = ["--expt-relaxed-constexpr", "-DNDEBUG", "-diag-suppress=177", "-isystem", headers.command[0]]
    return [*options, *(f"-DVF_{name}={value}" for name, value in defines.items())]


def _cutlass_steps(sources: Path, torch: Path, cxx: Tool, cuda: Tool, headers: Tool) -> list[Step]:
    """Every kernel of ``CUTLASS_KERNELS``, the operators, and the link."""
    common, folder = _nvcc(torch, cxx, cuda), sources / "cutlass"
    steps = []
    for kernel, (file, _, wanted) in CUTLASS_KERNELS.items():
        names = known(wanted, cuda.version)
        command = [*common, *cutlass_flags(kernel, headers), *_gencode(names, ptx=wanted == _AMPERE)]
        output, path = f"{kernel}.o", str(folder / file)
        steps.append(Step(output, (path,), (*command, "-c", path, "-o", output), f"{file}: {kernel}"))
    path = str(folder / "operators.cu")
    command = [*common, *_gencode(("75",), ptx=False), "-c", path, "-o", "operators.o"]  # host code alone
    steps.append(Step("operators.o", (path,), tuple(command), "operators.cu"))
    return steps + _cuda_link("cutlass", torch, cxx, cuda, tuple(step.output for step in steps))


def _ninja_path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _ninja_file(steps: list[Step]) -> str:
    """The text of build.ninja."""
    lines = ["ninja_required_version = 1.5", "rule run", "  command = $run", "  description = $title"]
    for step in steps:
        inputs = " ".join(map(_ninja_path, step.inputs))
        command = shlex.join(step.command).replace("$", "$$")
        lines += ["", f"build {_ninja_path(step.output)}: run {inputs}"]
        lines += [f"  run = {command}", f"  title = {step.title.replace('$', '$$')}"]
    return "\n".join(lines) + "\n"


def _free_memory() -> int:
    """The bytes of memory that processes may still take, of the machine and of the control group."""
    free = [2**63]
    with contextlib.suppress(OSError, TypeError):
        told = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free.append(int(told[1]) * 1024)  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free)


def jobs(name: str) -> int:
    """How many compilers run at a time: capped by cores, by free memory and by ``MAX_JOBS``."""
    caps = [len(os.sched_getaffinity(0)), _free_memory() // JOB_BYTES[name]]
    text = os.environ.get("MAX_JOBS", "")
    if text.isdecimal():
        caps.append(int(text))
    elif text:
        raise BuildError(f"MAX_JOBS is {text!r}, wanted a number of compilers to run at a time")
    return max(1, min(caps))


# The build


class Plan(NamedTuple):
    """What a build would do, found without building: see ``plan``."""

    name: str
    key: str
    toolchain: str  # compilers and architectures, in words
    library: Path  # where the library will be
    steps: tuple[Step, ...]
    ninja: Tool
    jobs: int

    @property
    def estimate(self) -> float:
        """Seconds, roughly."""
        return STEP_SECONDS[self.name] * -(-len(self.steps) // self.jobs)

    @property
    def limit(self) -> float:
        """Seconds after which the compilers are ended."""
        return max(LIMIT_SECONDS, SLOWEST * self.estimate)


def plan(name: str, sources: Path = cache.SOURCES) -> Plan:
    """How a library will be built here.

    Args:
        name: "cpu", "cuda" or "cutlass".
        sources: the folder csrc.

    Raises:
        BuildError: a tool is missing or too old, torch is too old, or there is nothing to compile.
    """
    if name not in cache.NAMES:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(cache.NAMES)}")
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the extension is built on Linux alone, this is {sys.platform}")
    suffix = ".cpp" if name == "cpu" else ".cu"
    if not any(path.suffix == suffix for path in cache.source_files(name, sources)):
        raise BuildError(f"there is nothing to compile in {sources / name}")
    cxx, runner = _need("compiler", compiler()), _need("ninja", ninja())
    if name == "cuda":
        cuda = _need("nvcc", nvcc())
        steps = _cuda_steps(sources, _torch(), cxx, cuda)
        toolchain = f"nvcc {cuda}, {cxx}, sm_{' sm_'.join(architectures(cuda.version))}"
    elif name == "cutlass":
        cuda, headers = _need("nvcc", nvcc()), _need("CUTLASS", cutlass())
        for tool, version, oldest in (
            ("nvcc", cuda.version, _OLDEST_CUDA_OF_CUTLASS),
            ("CUTLASS", headers.version, _OLDEST_CUTLASS),
        ):
            if _version_of(version) < oldest:
                raise BuildError(
                    f"{tool} {version} is too old, wanted {oldest[0]}.{oldest[1]} or newer; {INSTALL[tool]}"
                )
        steps = _cutlass_steps(sources, _torch(), cxx, cuda, headers)
        toolchain = f"nvcc {cuda}, {cxx}, CUTLASS {headers}"
    else:
        steps, toolchain = _cpu_steps(sources, _torch(), cxx), str(cxx)
    try:
        folder = cache.folder()
    except RuntimeError as error:
        raise BuildError(f"no cache folder ({error}); set VIT_FAST_EXT_DIR") from None
    key = cache.key(name, sources)
    entry = folder / key / hashlib.sha256(toolchain.encode()).hexdigest()[:12]
    return Plan(name, key, toolchain, entry / cache.file_name(name), tuple(steps), runner, jobs(name))


def build(
    name: str, *, force: bool = False, sources: Path = cache.SOURCES, tell: Callable[[str], None] = print
) -> Result:
    """Builds a library into the cache, or finds it there.

    Args:
        name: "cpu", "cuda" or "cutlass".
        force: build although it is there.
        sources: the folder csrc.
        tell: is given a line of progress at a time.

    Raises:
        BuildError: it cannot be built.
    """
    return run(plan(name, sources), force=force, tell=tell)


def run(plan: Plan, *, force: bool = False, tell: Callable[[str], None] = print) -> Result:
    """Does what a plan says; arguments and errors as of ``build``."""
    start = time.monotonic()
    folder = plan.library.parents[2]
    if not force and stands(plan):
        return _found(plan, start)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / f"{plan.key}.lock", plan.limit, tell) as waited:
            leftovers = list(folder.glob(f"{plan.key}.tmp-*"))  # of builders that ended early
            if (waited or not force) and stands(plan):
                _remove(leftovers)
                return _found(plan, start)
            free = shutil.disk_usage(folder).free
            if free < FREE_BYTES[plan.name]:
                raise BuildError(
                    f"{free // MIB} MiB are free in {folder}, wanted {FREE_BYTES[plan.name] // MIB}; "
                    "make room, or name another folder in VIT_FAST_EXT_DIR"
                )
            prefix = f"{plan.key}.tmp-{plan.library.parent.name}-"  # of this toolchain alone
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            done = [] if force else _take_over([path for path in leftovers if path.name.startswith(prefix)], work)
            _remove(leftovers)
            if done:
                tell(f"going on where an earlier build ended: {len(done)} of {len(plan.steps)} steps are done")
            try:
                _compile(plan, work, tell)
                _publish(plan, work)
            except (EndedEarlyError, KeyboardInterrupt):
                raise  # the next build takes over what is done
            except BaseException:
                _remove([work])
                raise
            _remove([work])
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}); "
            "make it writable, or name another one in VIT_FAST_EXT_DIR"
        ) from error
    return Result(plan.library, False, time.monotonic() - start)


def _remove(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def _take_over(leftovers: list[Path], work: Path) -> list[str]:
    """Moves what earlier builds finished into a new folder, with ninja's log of it; returns the names of the files.

    A file that stands in the log is whole, and no orphaned compiler writes to it. Of several folders the one with most.
    """
    finished: dict[Path, list[str]] = {}
    for leftover in leftovers:
        with contextlib.suppress(OSError):  # no log: nothing is finished
            lines = [line.split("\t") for line in (leftover / _NINJA_LOG).read_text().splitlines()]
            logged = {line[3] for line in lines if len(line) == 5}  # no head line, no half of one
            finished[leftover] = sorted(name for name in logged if (leftover / name).is_file())
    if not any(finished.values()):
        return []
    leftover, names = max(finished.items(), key=lambda item: len(item[1]))
    for name in names:
        (work / name).parent.mkdir(exist_ok=True)
        (leftover / name).rename(work / name)
    (leftover / _NINJA_LOG).rename(work / _NINJA_LOG)
    return names


def _found(plan: Plan, start: float) -> Result:
    with contextlib.suppress(OSError):  # a read-only cache will do
        plan.library.touch()  # the loader takes the newest of several toolchains
    return Result(plan.library, True, time.monotonic() - start)


def stands(plan: Plan) -> bool:
    """Whether the library is in its place, whole."""
    with contextlib.suppress(cache.DamagedError):
        cache.check(plan.library, plan.key)
        return True
    return False


@contextlib.contextmanager
def _locked(path: Path, seconds: float, tell: Callable[[str], None]) -> Iterator[bool]:
    """Holds a lock that dies with the process, waiting so long for it; gives whether another process had it first."""
    import fcntl  # not on Windows, where this file can be imported all the same

    waited, start = False, time.monotonic()
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if not waited:
                    tell(f"waiting for process {holder}, which is building the same library")
                    waited = True
                if time.monotonic() - start > seconds:
                    raise BuildError(
                        f"process {holder} has been building for {seconds:.0f} s ({path}); "
                        "end it if it hangs, then build again"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield waited


def _compile(plan: Plan, work: Path, tell: Callable[[str], None]) -> None:
    """Runs ninja in a folder."""
    (work / "build.ninja").write_text(_ninja_file(list(plan.steps)))
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C", "TMPDIR": str(work)}
    command = [*plan.ninja.command, "-j", str(plan.jobs)]
    lines: list[str] = []
    late = threading.Event()
    with subprocess.Popen(
        command, cwd=work, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip

        def stop() -> None:
            late.set()
            process.terminate()  # ninja ends its compilers

        watch = threading.Timer(plan.limit, stop)
        watch.start()
        try:
            assert process.stdout is not None
            for line in map(str.rstrip, process.stdout):
                if re.match(r"\[\d+/\d+\] ", line) and not lines:
                    tell(line)
                elif line:
                    lines.append(line)
        except BaseException:
            process.terminate()
            raise
        finally:
            watch.cancel()
    if late.is_set():
        raise EndedEarlyError(
            f"the compilers took more than {plan.limit:.0f} s and were ended; what they had finished is kept: "
            "build again to go on"
        )
    if process.returncode:
        raise _failure(plan, work, lines)


def _failure(plan: Plan, work: Path, lines: list[str]) -> BuildError:
    """What went wrong, from the output of ninja: the last lines of the compilers."""
    commands = {shlex.join(step.command) for step in plan.steps}
    told = [line for line in lines if line not in commands and not line.startswith("ninja: build stopped")]
    told = [line for line in told if not re.match(r"\[\d+/\d+\] ", line)]
    why, kind = f"the compiler failed ({plan.toolchain})", BuildError
    if shutil.disk_usage(work).free < MIB or any("No space left on device" in line for line in told):
        why = f"the disk of {work.parent} is full; make room, or name another folder in VIT_FAST_EXT_DIR"
    elif any("Killed" in line for line in told):
        why += "; a compiler was killed, perhaps for want of memory: try MAX_JOBS=1, which goes on where this one ended"
        kind = EndedEarlyError
    return kind("\n".join([why + ":", *(f"  {line}" for line in told[-15:])]))


def _publish(plan: Plan, work: Path) -> None:
    """Moves a finished library, with its record, to its place in one step."""
    ready = work / "entry"
    ready.mkdir()
    library = ready / plan.library.name
    (work / plan.library.name).rename(library)
    cache.write_record(library, plan.key, plan.toolchain)
    for path in ready.iterdir():  # on the disk before they can be found
        with path.open("rb") as file:
            os.fsync(file.fileno())
    entry = plan.library.parent
    entry.parent.mkdir(exist_ok=True)
    if entry.exists():  # built anew, or damaged
        entry.rename(work / "replaced")
    ready.rename(entry)
