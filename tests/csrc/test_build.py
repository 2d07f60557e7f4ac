"""The builder of csrc/: what it makes, and what it does when something is missing, fails, is full or is killed.

Most tests build a library of one small source, in a cache of their own. Processes that build at the same time, or are
killed, are children with a time limit; they import ``csrc.build`` alone, without torch.
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from vit_fast.csrc import build, cache

from vit_fast import cli

ROOT = Path(__file__).parents[2]
ANSWER = 'extern "C" int answer() { return 42; }\n'
BUILD_IN_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from csrc import build
print("found" if build.build("cpu", sources=Path(sys.argv[2])).found else "built")
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("VIT_FAST_EXT_DIR", str(folder))
    for name in ("CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH", "CUTLASS_PATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def sources(tmp_path):
    """A folder csrc with one small source."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "answer.cpp").write_text(ANSWER)
    return folder


@pytest.fixture
def wrapper(tmp_path, monkeypatch):
    """``wrapper("sleep 1")`` makes the compiler a script that runs these words before each compilation, and counts."""

    def make(words):
        script, log = tmp_path / "cxx", tmp_path / "log"
        compiler = shlex.join(build.compiler().command)
        compile_ = f'case "$*" in *--version) ;; *) echo x >> {log}; {words} ;; esac; exec {compiler} "$@"\n'
        script.write_text("#!/bin/sh\n" + compile_)
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def leftovers(folder):
    return list(folder.glob("*.tmp-*"))


def child(sources):
    return subprocess.Popen(
        [sys.executable, "-P", "-c", BUILD_IN_CHILD, str(ROOT), str(sources)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def has_ended(pid):
    """Whether a process is gone, or waits to be reaped, for which not every container has a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# What is built


@pytest.mark.usefixtures("compiler")
def test_a_library_is_built_once(sources, cache_folder):
    lines = []
    first = build.build("cpu", sources=sources, tell=lines.append)
    assert not first.found and lines[-1].startswith("[2/2] link") and first.seconds > 0
    assert first.library.parent.parent == cache_folder / cache.key("cpu", sources) and not leftovers(cache_folder)
    assert cache.check(first.library, cache.key("cpu", sources)).toolchain == str(build.compiler())
    os.utime(first.library, (0, 0))
    again = build.build("cpu", sources=sources)
    assert again.found and again.library == first.library and again.library.stat().st_mtime > 0
    assert not build.build("cpu", sources=sources, force=True).found and not leftovers(cache_folder)


@pytest.mark.usefixtures("compiler")
def test_names_with_every_sort_of_letter(tmp_path, monkeypatch):
    folder = tmp_path / "a $b: 'c' \"d\" é#%"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "an answer $1.cpp").write_text(ANSWER)
    monkeypatch.setenv("VIT_FAST_EXT_DIR", str(folder / "cache"))
    assert build.build("cpu", sources=folder).library.exists()


def test_the_key_follows_the_sources(sources, monkeypatch):
    first = cache.key("cpu", sources)
    assert first.startswith(f"cpu-torch2.11-linux-{platform.machine()}-") and cache.key("cpu", sources) == first
    monkeypatch.setattr(sys.modules["torch"], "__version__", "9.9.9")
    assert cache.key("cpu", sources) == first
    (sources / "shared.h").write_text("#define A 1\n")
    second = cache.key("cpu", sources)
    (sources / "cpu" / "answer.cpp").write_text(ANSWER.replace("42", "43"))
    third = cache.key("cpu", sources)
    (sources / "cpu" / "notes.txt").write_text("no source")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert len({first, second, third, cache.key("cpu", sources), cache.key("cuda", sources)}) == 5
    monkeypatch.undo()
    assert cache.key("cpu", sources) == third


def test_the_toolchain_has_a_folder_of_its_own(sources, monkeypatch):
    plans = []
    for version in ("12.2.0", "13.1.0"):
        monkeypatch.setattr(build, "compiler", lambda version=version: build.Tool(("g++",), version))
        monkeypatch.setattr(build, "ninja", lambda: build.Tool(("ninja",), "1.13"))
        plans.append(build.plan("cpu", sources))
    assert plans[0].key == plans[1].key and plans[0].library != plans[1].library


def test_kernels_are_compiled_for_each_level(sources, monkeypatch):
    (sources / "cpu" / "kernels.cpp").write_text("")
    monkeypatch.setattr(build, "compiler", lambda: build.Tool(("g++",), "12"))
    monkeypatch.setattr(build, "ninja", lambda: build.Tool(("ninja",), "1.13"))
    flags = {}
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        steps = {step.output: step.command for step in build.plan("cpu", sources).steps}
        flags[machine] = [set(steps[output]) for output in steps if output.startswith("kernels_")]
        assert ("-DVF_LEVELS_X86=1" in steps["answer.o"]) == (machine == "x86_64")
        assert not any(word.startswith(("-march", "-mavx")) for word in steps["answer.o"])
    generic, avx2, avx512, vnni, bf16 = flags["x86_64"]
    assert not any(word.startswith("-m") for word in generic) and "-DVF_LEVEL=generic" in generic
    assert {"-mavx2", "-mfma", "-mf16c"} <= avx2 and "-mavx512f" not in avx2
    assert {"-mavx512f", "-mprefer-vector-width=512"} <= avx512 & vnni & bf16 and "-mavx512vnni" in vnni - avx512
    assert "-mavx512bf16" in bf16 - vnni and "-DVF_LEVEL=avx512_bf16" in bf16
    assert len(flags["aarch64"]) == 1 and not any(word.startswith("-m") for word in flags["aarch64"][0])


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"VIT_FAST_EXT_DIR": "/a"}, "/a"),
        ({"VIT_FAST_EXT_DIR": "~/a", "HOME": "/h"}, "/h/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/vit_fast/ext"),
        ({"XDG_CACHE_HOME": "not/absolute", "HOME": "/h"}, "/h/.cache/vit_fast/ext"),
        ({"VIT_FAST_EXT_DIR": "", "HOME": "/h"}, "/h/.cache/vit_fast/ext"),
    ],
)
def test_the_cache_folder(variables, wanted, monkeypatch):
    for name in ("VIT_FAST_EXT_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.folder() == Path(wanted)


def test_jobs_are_capped(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(build, "_free_memory", lambda: 8 * 1024 * build.MIB)
    assert build.jobs("cpu") == 8 and build.jobs("cuda") == 4
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs("cpu") == 3
    monkeypatch.setattr(build, "_free_memory", lambda: 0)
    assert build.jobs("cpu") == 1
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(build.BuildError, match="MAX_JOBS is 'many', wanted a number"):
        build.jobs("cpu")


@pytest.mark.usefixtures("compiler", "nvcc")
def test_the_cuda_library(sources, monkeypatch):
    """A kernel for two architectures and PTX, linked where torch has no libtorch_cuda too."""
    (sources / "cuda").mkdir()
    source = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
    (sources / "cuda" / "twice.cu").write_text(source + 'extern "C" void run(float* x) { twice<<<1, 1>>>(x); }\n')
    monkeypatch.setattr(build, "CUDA_ARCHITECTURES", {"75": (10, 0), "80": (11, 0), "999": (99, 0)})
    plan = build.plan("cuda", sources)
    assert "sm_75 sm_80" in plan.toolchain and "999" not in plan.toolchain
    library = build.run(plan).library.read_bytes()
    assert b"libtorch_cuda.so" in library and b"libcudart.so" not in library and b"-arch sm_80" in library


@pytest.fixture
def cutlass(tmp_path, monkeypatch):
    """``cutlass("4.2", "13.0.88")``: headers of CUTLASS and an nvcc of these versions, and an empty source."""

    def make(version, cuda):
        folder = tmp_path / "headers" / "include" / "cutlass"
        folder.mkdir(parents=True, exist_ok=True)
        major, minor = version.split(".")
        text = f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR  {minor}\n#define CUTLASS_PATCH 1\n"
        (folder / "version.h").write_text(text)
        monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "headers"))
        monkeypatch.setattr(build, "nvcc", lambda: build.Tool(("nvcc",), cuda))
        monkeypatch.setattr(build, "compiler", lambda: build.Tool(("g++",), "12"))
        monkeypatch.setattr(build, "ninja", lambda: build.Tool(("ninja",), "1.13"))
        (tmp_path / "csrc" / "cutlass").mkdir(exist_ok=True)
        (tmp_path / "csrc" / "cutlass" / "operators.cu").write_text("")

    return make


@pytest.mark.parametrize("cuda,newest", (("13.0.88", "100"), ("12.4.1", "90a")))
def test_the_cutlass_library(sources, cutlass, cuda, newest):
    """A compile for each kernel and its architectures, the operators, and the link of all."""
    cutlass("4.2", cuda)
    plan = build.plan("cutlass", sources)
    assert plan.library.name == "vit_fast_cutlass.so" and "CUTLASS 4.2.1" in plan.toolchain
    steps = {step.output: step for step in plan.steps}
    objects = [f"{kernel}.o" for kernel in build.CUTLASS_KERNELS] + ["operators.o"]
    link = steps["vit_fast_cutlass.so"]
    assert [*steps][: len(objects)] == objects and [word for word in link.command if word.endswith(".o")] == objects
    for kernel, (file, _, _) in build.CUTLASS_KERNELS.items():
        command = steps[f"{kernel}.o"].command
        assert command[command.index("-c") + 1] == str(sources / "cutlass" / file)
        assert {f"-DVF_KERNEL={kernel}", "-DNDEBUG", "-isystem"} < set(command)
        assert not any("," in word for word in command if word.startswith("-DVF_"))  # nvcc splits there
    codes = {name: [word for word in steps[f"{name}.o"].command if "gencode" in word] for name in build.CUTLASS_KERNELS}
    assert codes["pingpong_fold"] == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert codes["turing_residual_fp16"] == ["-gencode=arch=compute_75,code=sm_75"]
    assert codes["multistage_residual_bf16"][0] == "-gencode=arch=compute_80,code=sm_80"
    assert codes["multistage_residual_bf16"][-1] == f"-gencode=arch=compute_{newest},code=compute_{newest}"


def test_what_the_cutlass_library_needs(sources, cutlass, monkeypatch, tmp_path):
    for version, cuda, words in (
        ("4.1", "13.0.88", "CUTLASS 4.1.1 is too old, wanted 4.2 or newer; pip install --no-deps nvidia-cutlass"),
        ("4.2", "11.8.89", r"nvcc 11.8.89 is too old, wanted 12.0 or newer; pip install 'vit-fast\[cuda\]'"),
    ):
        cutlass(version, cuda)
        with pytest.raises(build.BuildError, match=words):
            build.plan("cutlass", sources)
    cutlass("4.2", "13.0.88")
    assert build.cutlass() == build.Tool((str(tmp_path / "headers" / "include"),), "4.2.1")
    (tmp_path / "headers" / "include" / "cutlass" / "version.h").write_text("no version")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.cutlass() is None
    with pytest.raises(build.BuildError, match=r"^no headers of CUTLASS; pip install --no-deps nvidia-cutlass"):
        build.plan("cutlass", sources)


def test_headers_of_the_wheel(tmp_path, monkeypatch):
    folder = tmp_path / "cutlass_library" / "source" / "include" / "cutlass"
    folder.mkdir(parents=True)
    (folder / "version.h").write_text("#define CUTLASS_MAJOR 5\n#define CUTLASS_MINOR 0\n#define CUTLASS_PATCH 3\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "cutlass_library")])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec if name == "cutlass_library" else None)
    assert build.cutlass() == build.Tool((str(folder.parent),), "5.0.3")


def test_the_key_of_cutlass_follows_the_headers_of_cuda(sources, cutlass):
    cutlass("4.2", "13.0.88")
    (sources / "cuda").mkdir()
    first = cache.key("cutlass", sources)
    (sources / "cuda" / "rows.h").write_text("int x;")
    second = cache.key("cutlass", sources)
    (sources / "cuda" / "kernel.cu").write_text("int x;")
    assert first != second == cache.key("cutlass", sources)


@pytest.mark.usefixtures("compiler")
def test_wheels(sources, tmp_path, monkeypatch):
    """Pure Python without a compiler, even after a build with the library, which has the tag of the platform."""
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "_lib", "*.egg-info")
    for name in ("vit_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, project)
    for path in (project / "csrc" / "cpu").iterdir():
        path.unlink()
    (project / "csrc" / "cpu" / "answer.cpp").write_text(ANSWER)
    contents = {}
    for kind, variables in {
        "with": {"VIT_FAST_BUILD_EXT": "1"},
        "pure": {"VIT_FAST_BUILD_EXT": "0", "CXX": "/no/compiler"},
    }.items():
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        target = tmp_path / kind
        words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target), "."]
        subprocess.run([sys.executable, "-P", *words], cwd=project, check=True, timeout=120)
        (wheel,) = target.iterdir()
        contents[kind] = set(zipfile.ZipFile(wheel).namelist())
        assert wheel.name.endswith("-py3-none-any.whl") == (kind == "pure")
        assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl") == (kind == "with")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / f"{kind}_content")
    library = {"vit_fast/_lib/vit_fast_cpu.so", "vit_fast/_lib/vit_fast_cpu.json"}
    assert library <= contents["with"] and not any("_lib" in name for name in contents["pure"])
    wanted = {"vit_fast/csrc/build.py", "vit_fast/csrc/cpu/answer.cpp", "vit_fast/kernels/attention.py"}
    assert wanted <= contents["with"] & contents["pure"]
    installed = tmp_path / "with_content" / "vit_fast"
    assert cache.check(installed / "_lib" / "vit_fast_cpu.so", cache.key("cpu", installed / "csrc"))


# What goes wrong


def test_no_compiler(sources, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/no/such/compiler -m64")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: '/no/such/compiler -m64' of CXX does not run; "):
        build.build("cpu", sources=sources)
    with pytest.raises(SystemExit) as end:
        cli.main(["build"])
    told = capsys.readouterr().err
    assert end.value.code == 1 and told.startswith("vit-fast: the cpu extension was not built: no C++ compiler")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(sources))
    with pytest.raises(build.BuildError, match=r"none of g\+\+, c\+\+, clang\+\+ runs; install"):
        build.build("cpu", sources=sources)


@pytest.mark.parametrize("tool", ["ninja", "nvcc"])
def test_no_ninja_and_no_nvcc(tool, sources, monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: build.Tool(("g++",), "12"))
    monkeypatch.setattr(build.importlib.metadata, "distribution", raise_(build.importlib.metadata.PackageNotFoundError))
    find_spec = build.importlib.util.find_spec
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == "nvidia" else find_spec(name))
    monkeypatch.setenv("PATH", str(sources))
    name = {"ninja": "cpu", "nvcc": "cuda"}[tool]
    if tool == "nvcc":
        monkeypatch.setattr(build, "ninja", lambda: build.Tool(("ninja",), "1.13"))
        (sources / "cuda").mkdir()
        (sources / "cuda" / "kernel.cu").write_text("")
    with pytest.raises(build.BuildError, match=f"^no {tool}; pip install"):
        build.build(name, sources=sources)


def raise_(error):
    def function(*arguments, **options):
        raise error

    return function


def test_what_cannot_be_planned(sources, monkeypatch):
    with pytest.raises(ValueError, match="name is 'tpu', expected one of cpu, cuda, cutlass"):
        build.plan("tpu", sources)
    with pytest.raises(build.BuildError, match="nothing to compile"):
        build.plan("cuda", sources)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(build.BuildError, match="on Linux alone, this is darwin"):
        build.plan("cpu", sources)


@pytest.mark.usefixtures("compiler")
def test_old_torch(sources, tmp_path, monkeypatch):
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    find = build.importlib.util.find_spec
    there = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: there if name == "torch" else find(name))
    with pytest.raises(build.BuildError, match=r"torch 2.10 is too old, wanted 2.11"):
        build.plan("cpu", sources)
    header.unlink()
    with pytest.raises(build.BuildError, match="no headers of a known version"):
        build.plan("cpu", sources)


@pytest.mark.usefixtures("compiler")
def test_compile_error(sources, cache_folder):
    broken = "".join(f"#warning line {number}\n" for number in range(40)) + "int f() { return no_such_name; }\n"
    (sources / "cpu" / "answer.cpp").write_text(broken)
    with pytest.raises(build.BuildError) as error:
        build.build("cpu", sources=sources)
    first, *rest = str(error.value).splitlines()
    assert first.startswith("the compiler failed (") and len(rest) == 15
    assert "no_such_name" in str(error.value) and "-ffile-prefix-map" not in str(error.value)
    assert not leftovers(cache_folder) and not cache.entries("cpu", cache.key("cpu", sources))
    (sources / "cpu" / "answer.cpp").write_text("int nowhere(); int f() { return nowhere(); }\n")
    with pytest.raises(build.BuildError, match="undefined reference"):
        build.build("cpu", sources=sources)


@pytest.mark.usefixtures("compiler")
def test_full_disk(sources, cache_folder, monkeypatch, wrapper):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * build.MIB))
        with pytest.raises(build.BuildError, match=r"30 MiB are free in .*, wanted 200; make room, or name another"):
            build.build("cpu", sources=sources)
    wrapper("echo 'fatal error: error writing to answer.o: No space left on device' >&2; exit 1")
    with pytest.raises(build.BuildError, match=r"the disk of .* is full; make room"):
        build.build("cpu", sources=sources)
    assert not leftovers(cache_folder)


@pytest.mark.usefixtures("compiler")
def test_killed_compiler(sources, wrapper):
    wrapper("echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1")
    with pytest.raises(build.BuildError, match="for want of memory: try MAX_JOBS=1"):
        build.build("cpu", sources=sources)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_unwritable_cache(kind, sources, tmp_path, monkeypatch):
    folder = tmp_path / "place"
    if kind == "file":
        folder.write_text("a file stands where the folder should")
    else:
        # Root writes everywhere, so the refusal is planted.
        monkeypatch.setattr(build.tempfile, "mkdtemp", raise_(OSError(30, "Read-only file system")))
    monkeypatch.setenv("VIT_FAST_EXT_DIR", str(folder))
    with pytest.raises(build.BuildError, match=r"cannot be used \(.*\); make it writable, or name another one in VIT"):
        build.build("cpu", sources=sources)


@pytest.mark.usefixtures("compiler")
def test_a_read_only_cache_is_read(sources, monkeypatch):
    library = build.build("cpu", sources=sources).library
    monkeypatch.setattr(build, "_locked", raise_(OSError(30, "Read-only file system")))
    monkeypatch.setattr(Path, "touch", raise_(OSError(30, "Read-only file system")))
    assert build.build("cpu", sources=sources)[:2] == (library, True)
    with pytest.raises(build.BuildError, match="Read-only file system"):
        build.build("cpu", sources=sources, force=True)


@pytest.mark.usefixtures("compiler")
def test_a_lock_file_without_a_holder_stops_nobody(sources, cache_folder):
    cache_folder.mkdir()
    (cache_folder / f"{cache.key('cpu', sources)}.lock").write_text("999999\n")
    lines = []
    assert not build.build("cpu", sources=sources, tell=lines.append).found
    assert not [line for line in lines if line.startswith("waiting")]


@pytest.mark.usefixtures("compiler")
def test_waiting_ends(sources, cache_folder, monkeypatch):
    monkeypatch.setattr(build.Plan, "limit", 0.3)
    cache_folder.mkdir()
    lines = []
    with (cache_folder / f"{cache.key('cpu', sources)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("1234\n")
        file.flush()
        with pytest.raises(build.BuildError, match=r"process 1234 has been building for .* end it if it hangs"):
            build.build("cpu", sources=sources, tell=lines.append)
    assert lines == ["waiting for process 1234, which is building the same library"]


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_hangs_is_ended(sources, monkeypatch, wrapper, tmp_path):
    wrapper(f"echo $$ > {tmp_path / 'pid'}; exec sleep 20")
    monkeypatch.setattr(build.Plan, "limit", 1)
    start = time.monotonic()
    with pytest.raises(build.BuildError, match=r"took more than 1 s and were ended; .* is kept: build again to go on"):
        build.build("cpu", sources=sources)
    assert time.monotonic() - start < 15
    wait_for(lambda: has_ended(int((tmp_path / "pid").read_text())))


def test_the_limit_follows_the_steps(sources, cutlass, monkeypatch):
    cutlass("4.2", "13.0.88")
    plans = []
    for number in ("1", "4"):
        monkeypatch.setenv("MAX_JOBS", number)
        monkeypatch.setattr(build, "_free_memory", lambda: 2**40)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
        plans.append(build.plan("cutlass", sources))
    one, four = plans
    assert one.limit == len(one.steps) * build.STEP_SECONDS["cutlass"] * build.SLOWEST > 3 * four.limit > 3 * 3600
    assert build.plan("cpu", sources).limit == 3600


@pytest.mark.usefixtures("compiler")
def test_four_at_once(sources, cache_folder, wrapper):
    log = wrapper("sleep 1")
    children = [child(sources) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in children]
    ends = sorted(output.split()[-1] for output in outputs)
    assert ends == ["built", "found", "found", "found"], outputs
    assert sum("waiting for process" in output for output in outputs) == 3
    assert log.read_text().split() == ["x"] * 2  # one compilation, one link
    assert not leftovers(cache_folder)


@pytest.mark.usefixtures("compiler")
def test_a_killed_builder_is_cleaned_up_after(sources, cache_folder, wrapper, monkeypatch, tmp_path):
    wrapper(f"echo $$ > {tmp_path / 'pid'}; exec sleep 20")
    process = child(sources)
    wait_for((tmp_path / "pid").exists)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # the orphan
    assert len(leftovers(cache_folder)) == 1
    monkeypatch.delenv("CXX")
    assert not build.build("cpu", sources=sources).found
    assert not leftovers(cache_folder)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("how", ["killed", "limit", "memory", "interrupted", "error"])
def test_what_was_compiled_before_a_build_ended_is_kept(how, sources, cache_folder, wrapper, monkeypatch, tmp_path):
    """Three sources one after another; the build ends while the second compiles, and the next one compiles two."""
    for name in ("b", "c"):
        (sources / "cpu" / f"{name}.cpp").write_text(f"int {name}() {{ return 1; }}\n")
    monkeypatch.setenv("MAX_JOBS", "1")
    ill, pid = tmp_path / "ill", tmp_path / "pid"
    ill.touch()
    stop = {"memory": "echo 'Killed signal' >&2; exit 1", "error": "echo 'no good' >&2; exit 1"}
    hang = f"echo $$ > {pid}; exec sleep 20"
    log = wrapper(f'case "$*" in *-o\\ b.o) echo half > b.o; [ ! -e {ill} ] || {{ {stop.get(how, hang)}; }} ;; esac')
    lines = []
    if how == "killed":
        process = child(sources)
        wait_for(pid.exists)
        process.kill()
        process.communicate(timeout=30)
        os.kill(int(pid.read_text()), signal.SIGKILL)
    else:
        if how == "limit":
            monkeypatch.setattr(build.Plan, "limit", 2)
        tell = raise_(KeyboardInterrupt) if how == "interrupted" else lines.append
        with pytest.raises(KeyboardInterrupt if how == "interrupted" else build.BuildError):
            build.build("cpu", sources=sources, tell=tell)
        monkeypatch.setattr(build.Plan, "limit", 60)
    assert len(leftovers(cache_folder)) == (how != "error")
    kept = [*cache_folder.glob("*.tmp-*/answer.o")]
    assert len(kept) == (how != "error")
    log.write_text("")
    ill.unlink()
    assert not build.build("cpu", sources=sources, tell=lines.append).found and not leftovers(cache_folder)
    going_on = [line for line in lines if line.startswith("going on")]
    assert going_on == ["going on where an earlier build ended: 1 of 4 steps are done"] * (how != "error")
    assert log.read_text().split() == ["x"] * (4 if how == "error" else 3)  # with the link


@pytest.mark.usefixtures("compiler")
def test_what_is_not_taken_over(sources, cache_folder):
    """Of another toolchain, without a log, with a log of files that are gone; none with ``force``."""
    plan = build.plan("cpu", sources)
    entry = "0\t1\t2\tanswer.o\tabc\n"
    folders = {
        "another": ("0" * 12, {"answer.o": "object", ".ninja_log": f"# ninja log v6\n{entry}"}),
        "no log": (plan.library.parent.name, {"answer.o": "half an object"}),
        "cut short": (plan.library.parent.name, {"answer.o": "half an object", ".ninja_log": "0\t1"}),
        "gone": (plan.library.parent.name, {".ninja_log": entry}),
    }
    for number, (toolchain, files) in enumerate(folders.values()):
        folder = cache_folder / f"{plan.key}.tmp-{toolchain}-{number}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    lines = []
    library = build.build("cpu", sources=sources, tell=lines.append).library
    assert not leftovers(cache_folder) and not [line for line in lines if line.startswith("going on")]
    folder = cache_folder / f"{plan.key}.tmp-{plan.library.parent.name}-9"
    folder.mkdir()
    (folder / "answer.o").write_text("object")
    (folder / ".ninja_log").write_text(entry)
    assert not build.build("cpu", sources=sources, force=True, tell=lines.append).found and library.exists()
    assert not leftovers(cache_folder) and not [line for line in lines if line.startswith("going on")]


@pytest.mark.usefixtures("compiler")
def test_a_damaged_library_is_built_anew(sources):
    library = build.build("cpu", sources=sources).library
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert not build.build("cpu", sources=sources).found
    assert library.read_bytes() == whole
    library.with_suffix(".json").write_text(json.dumps({"sha256": "0"}))
    assert not build.build("cpu", sources=sources).found
