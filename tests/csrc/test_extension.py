"""The loader of the compiled libraries: what it loads, and that no damaged library crashes or warns more than once.

What gets as far as ``dlopen`` is tried in a child, which would show a crash.
"""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from vit_fast.csrc import build, cache

from vit_fast import cli, extension

NOT_BUILT = ("the cpu extension is not built: run `vit-fast build`",)
LOAD = """
import json, sys, warnings
from pathlib import Path
from vit_fast import extension
extension.SHIPPED = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [extension.load("cpu") for _ in range(2)]
print(json.dumps([results, [str(warning.message) for warning in caught]]))
"""


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Nothing is loaded, shipped or built."""
    monkeypatch.setenv("VIT_FAST_EXT_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "SHIPPED", tmp_path / "_lib")
    monkeypatch.setattr(extension, "_states", {})
    return tmp_path


@pytest.fixture(scope="module")
def tiny(compiler, tmp_path_factory):
    """The file of a small library that loads, compiled by the builder."""
    sources = tmp_path_factory.mktemp("csrc")
    (sources / "cpu").mkdir()
    (sources / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT_FAST_EXT_DIR", str(tmp_path_factory.mktemp("cache")))
        return build.build("cpu", sources=sources).library


def place(content, folder, key=None):
    """Puts a library with a right record into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / cache.file_name("cpu")
    library.write_bytes(content)
    cache.write_record(library, key or cache.key("cpu"), "test")
    return library


def entry(folder, toolchain="g++"):
    return folder / "cache" / cache.key("cpu") / toolchain


def load():
    """The reasons of two calls, which are the same, and the warnings of both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reasons = extension.load("cpu")
        assert extension.load("cpu") is reasons
    return reasons, [str(warning.message) for warning in caught]


def load_in_child(folder):
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    (first, second), told = json.loads(done.stdout)
    assert first == second
    return tuple(first), told


def assert_one_warning(reasons, told, cause):
    (reason,) = reasons
    (warning,) = told
    assert reason.startswith("the cpu extension is there and cannot be loaded: ") and cause in reason
    assert reason in warning and "the next backend is used. Run `vit-fast build --force`" in warning
    assert extension.library("cpu") is None


def test_an_absent_library_is_no_warning(monkeypatch):
    assert load() == (NOT_BUILT, [])
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        assert extension.load("cuda") == (f"torch {torch.__version__} is built without CUDA",)
    extension._states.clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("cuda", "cutlass"):
        assert extension.load(name) == (f"the {name} extension is not built: run `vit-fast build --{name}`",)
    assert extension.library("cpu") is None
    with pytest.raises(ValueError, match="name is 'tpu', expected one of cpu, cuda"):
        extension.load("tpu")


def test_the_shipped_library_comes_first_then_the_newest(places, tiny):
    content = tiny.read_bytes()
    first, second = place(content, entry(places, "a")), place(content, entry(places, "b"))
    os.utime(second, (1000, 1000))
    assert load() == ((), []) and extension.library("cpu") == first
    extension._states.clear()
    os.utime(first, (500, 500))
    assert load() == ((), []) and extension.library("cpu") == second
    extension._states.clear()
    shipped = place(content, places / "_lib")
    assert load() == ((), []) and extension.library("cpu") == shipped
    extension._states.clear()
    shipped.unlink()  # it is mapped into this process, which a change of its bytes would crash
    shipped.write_bytes(content[:100])  # a whole one serves in its place
    assert load() == ((), []) and extension.library("cpu") == second


def flipped(content):
    half = len(content) // 2
    return content[:half] + bytes(byte ^ 255 for byte in content[half : half + 64]) + content[half + 64 :]


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"garbage" * 100],
    ids=["flipped bytes", "cut short", "empty", "garbage"],
)
def test_damage_is_found_before_dlopen(damage, places, tiny, monkeypatch):
    library = place(tiny.read_bytes(), entry(places))
    library.write_bytes(damage(tiny.read_bytes()))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("dlopen"))
    assert_one_warning(*load(), "its checksum is wrong: the file was cut short or changed")


@pytest.mark.parametrize("record", [None, "", "{", "[]", '{"sha256": "0"}', "\x00\xff"])
def test_no_library_without_its_record(record, places, tiny, monkeypatch):
    library = place(tiny.read_bytes(), places / "_lib")
    library.with_suffix(".json").unlink()
    if record is not None:
        library.with_suffix(".json").write_text(record, encoding="latin-1")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("dlopen"))
    assert_one_warning(*load(), "its checksum is missing" if record is None else "its checksum cannot be read")


def test_a_library_of_other_sources_or_of_another_machine(places, tiny, monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("dlopen"))
    right = cache.key("cpu")
    for wrong in (right[:-16] + "0" * 16, right.replace(platform.machine(), "s390x"), right.replace("2.11", "2.99")):
        extension._states.clear()
        place(tiny.read_bytes(), places / "_lib", wrong)
        assert_one_warning(*load(), f"it was built for {wrong}, wanted {right}")
    shutil.rmtree(places / "_lib")
    extension._states.clear()
    place(tiny.read_bytes(), places / "cache" / wrong / "g++", wrong)  # not looked at
    assert load() == (NOT_BUILT, [])


def test_a_folder_that_cannot_be_read(places, tiny, monkeypatch):
    library = place(tiny.read_bytes(), places / "_lib")
    library.unlink()
    library.mkdir()
    assert_one_warning(*load(), "it cannot be read")
    monkeypatch.setattr(cache, "folder", lambda: Path("/dev/null/no"))
    library.rmdir()
    extension._states.clear()
    assert load() == (NOT_BUILT, [])


def foreign_elf(content):
    """The header says another architecture: AArch64 in place of x86-64, or the reverse."""
    other = 62 if struct.unpack_from("<H", content, 18)[0] == 183 else 183
    return content[:18] + struct.pack("<H", other) + content[20:]


@pytest.mark.parametrize("kind", ["good", "garbage", "empty", "another architecture", "undefined symbol"])
def test_dlopen_in_a_child(kind, places, tiny, tmp_path):
    content = tiny.read_bytes()
    if kind == "undefined symbol":
        (tmp_path / "a.cpp").write_text('extern "C" int nowhere(); extern "C" int f() { return nowhere(); }\n')
        command = [*build.compiler().command, "-shared", "-fPIC", "-o", "a.so", "a.cpp"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
        content = (tmp_path / "a.so").read_bytes()
    damaged = {"garbage": b"garbage" * 100, "empty": b"", "another architecture": foreign_elf(content)}
    content = damaged.get(kind, content)
    place(content, places / "_lib")
    reasons, told = load_in_child(places / "_lib")
    if kind == "good":
        assert (reasons, told) == ((), [])
    else:
        causes = {"garbage": "invalid ELF header", "empty": "file too short", "undefined symbol": "nowhere"}
        cause = causes.get(kind, "cannot open shared object file")
        assert_one_warning(reasons, told, cause)


def test_old_torch_and_other_systems(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert load() == (("the cpu extension needs torch 2.11 or newer, this is 2.10.1+cpu",), [])
    extension._states.clear()
    monkeypatch.setattr(sys, "platform", "win32")
    assert load() == (("the cpu extension exists for Linux alone, this is win32",), [])


def test_threads_load_and_warn_once(places, tiny, monkeypatch):
    place(tiny.read_bytes(), places / "_lib").write_bytes(b"")
    attempts, attempt = [], extension._attempt

    def slow(name):
        attempts.append(name)
        time.sleep(0.2)  # meanwhile the others are waiting
        return attempt(name)

    monkeypatch.setattr(extension, "_attempt", slow)
    threads = [threading.Thread(target=extension.load, args=("cpu",)) for _ in range(8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(attempts) == len(caught) == 1


def test_a_warning_that_is_an_error_comes_once(places, tiny):
    place(tiny.read_bytes(), places / "_lib").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="checksum"):
            extension.load("cpu")
        assert extension.load("cpu")


def test_import_looks_for_no_library(places):
    watch = """
import sys
seen = []
sys.addaudithook(lambda event, words: seen.append(str(words[:1])) if event in ("open", "os.listdir", "os.scandir",
                 "ctypes.dlopen") and ("vit_fast_cpu" in str(words[:1]) or "_lib" in str(words[:1])[-7:]) else None)
import vit_fast
from vit_fast import extension
assert extension._states == {} and "vit_fast.csrc" not in sys.modules, sys.modules
print([name for name in seen if "vit_fast" in name])
"""
    done = subprocess.run([sys.executable, "-P", "-c", watch], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_info_tells_of_the_extension(places, tiny, capsys):
    place(tiny.read_bytes(), entry(places)).write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        cli.main(["info"])
    told = capsys.readouterr()
    assert not end.value.code and told.err == ""
    assert "cpu extension    the cpu extension is there and cannot be loaded: " in told.out
    assert "cuda extension " in told.out and "instruction sets generic" in told.out
    assert str(build.compiler()) in told.out and str(build.ninja()) in told.out


@pytest.mark.usefixtures("tiny")
def test_build_verb(capsys, monkeypatch, tmp_path):
    """On a tiny library in the place of the real one."""
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setenv("MAX_JOBS", "1")
    plan, key = build.plan, cache.key
    monkeypatch.setattr(build, "plan", lambda name: plan(name, sources))
    monkeypatch.setattr(cache, "key", lambda name, folder=sources: key(name, folder))
    told = []
    for words in (["build"], ["build"], ["build", "--force"]):
        extension._states.clear()
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert not end.value.code
        told.append(capsys.readouterr().out)
    assert str(tmp_path / "cache") in told[0] and str(build.compiler()) in told[0] and "about 20 s" in told[0]
    assert "[2/2] link" in told[0] and "built: vit_fast_cpu.so" in told[0] and "it loads" in told[0]
    assert "already there" in told[1] and "steps" not in told[1] and "[2/2] link" in told[2]
    (sources / "cpu" / "answer.cpp").write_text("no C++\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["build"])
    assert end.value.code == 1 and "the compiler failed" in capsys.readouterr().err
