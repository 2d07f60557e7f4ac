"""benchmarks/carry.py: what travels to a GPU machine without network, and that it fits."""

import json
import subprocess
from pathlib import Path

import pytest
import typer
from support.scripts import loaded
from vit_fast.csrc import cache

PATH = Path(__file__).parents[2] / "benchmarks" / "carry.py"


@pytest.fixture(scope="module")
def carry():
    with loaded(PATH) as module:
        yield module


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A cache with a library cpu, of 3 MiB, and a damaged one for CUDA."""
    monkeypatch.setenv("VIT_FAST_EXT_DIR", str(tmp_path / "ext"))
    for name in ("cpu", "cuda"):
        key = cache.key(name)
        file = tmp_path / "ext" / key / "gcc-13" / cache.file_name(name)
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * 3 * 2**20)
        cache.write_record(file, key, "gcc-13")
    file.write_bytes(b"cut short")


def _run(carry, out, **words):
    options = {"names": "cpu,cuda,cutlass", "wheel": None, "python": "3.12", "limit_mib": 64.0} | words
    with pytest.raises((typer.Exit, typer.BadParameter)) as end:
        carry.main(out=out, **options)
    return getattr(end.value, "exit_code", 2), str(end.value)


def test_what_is_built_travels_and_fits(carry, built, tmp_path, capsys, monkeypatch):
    out = tmp_path / "carry"
    assert _run(carry, out)[0] == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["libraries"]["cpu"] == "carried"
    assert "its checksum is wrong" in manifest["libraries"]["cuda"]
    assert manifest["libraries"]["cutlass"] == "not built for these sources: vit-fast build --cutlass"
    assert 4 < manifest["mib"] < 64 and manifest["commit"] == carry.machine.commit()
    shown = capsys.readouterr().out
    assert "MiB may" in shown and "VIT_FAST_EXT_DIR=$PWD/" in shown
    monkeypatch.setenv("VIT_FAST_EXT_DIR", str(out / "ext"))  # there
    (found,) = cache.entries("cpu", cache.key("cpu"))
    cache.check(found, cache.key("cpu"))
    assert _run(carry, out)[0] == 0  # again, into the folder that it made; out of itself there is nothing
    assert json.loads((out / "manifest.json").read_text())["libraries"]["cpu"].startswith("not built")


def test_what_does_not_fit_is_named(carry, built, tmp_path, capsys):
    assert _run(carry, tmp_path / "carry", limit_mib=4.0)[0] == 1
    shown = capsys.readouterr().out
    assert "4 MiB may" in shown and "3.0 MiB" in shown and "vit_fast_cpu.so" in shown


def test_wheels(carry, built, tmp_path, capsys, monkeypatch):
    asked = []

    def pip(words, **options):
        if words[0] == "git":
            return real(words, **options)
        asked.append(words)
        return subprocess.CompletedProcess(words, 0 if "odd==1" not in words else 1, "", "no matching distribution")

    real = subprocess.run
    monkeypatch.setattr(carry.subprocess, "run", pip)
    assert _run(carry, tmp_path / "a", wheel=["timm==1.0.31"], python="3.11")[0] == 0
    (words,) = asked
    assert words[-1] == "timm==1.0.31" and words[words.index("--python-version") + 1] == "3.11" and "--no-deps" in words
    assert "--no-index" in capsys.readouterr().out
    assert _run(carry, tmp_path / "b", wheel=["odd==1"])[0] == 1
    assert "wheels: no matching distribution" in capsys.readouterr().out


def test_bad_words(carry, tmp_path, monkeypatch):
    assert "got 'gpu', wanted any of cpu, cuda, cutlass" in _run(carry, tmp_path / "carry", names="gpu")[1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    assert "a folder that this script made" in _run(carry, tmp_path / "mine")[1]
    assert (tmp_path / "mine" / "file").exists()
    assert "can be written" in _run(carry, tmp_path / "mine" / "file" / "below")[1]
    monkeypatch.setattr(carry.child, "ROOT", tmp_path)
    assert "is no checkout" in _run(carry, tmp_path / "carry", names="")[1]
