"""vit_fast.doctor(): what it tries, that it finds what is wrong, and that its report can be shown to others."""

import json
import socket
import warnings
from pathlib import Path

import pytest
import torch

import vit_fast
from vit_fast import cli
from vit_fast.backends import select
from vit_fast.backends.base import Backend
from vit_fast.backends.torch import TORCH
from vit_fast.diagnosis import _public

OPERATIONS = ("layer_norm", "layer_norm_linear", "linear_residual", "layernorm_mlp", "attention", "patch_embed")


class Copy(Backend):
    """The reference under another name; ``spoil`` changes the outputs of ``operation``."""

    name = "copy"

    def __init__(self, operation=None, spoil=None, table="forward"):
        super().__init__()
        self.forward, self.inference, self.backward = dict(TORCH.forward), dict(TORCH.inference), dict(TORCH.backward)
        for name in {"forward": ("forward", "inference"), "backward": ("backward",)}[table] if operation else ():
            run = getattr(self, name).get(operation)
            if run is not None:
                getattr(self, name)[operation] = lambda *a, run=run, **k: self.spoilt(run(*a, **k), spoil)

    def spoilt(self, out, spoil):
        return (spoil(out[0]), *out[1:]) if isinstance(out, tuple) else spoil(out)


def diagnose(monkeypatch, backend):
    monkeypatch.setattr(select, "BACKENDS", {backend.name: backend, "torch": TORCH})
    report = vit_fast.doctor("cpu")
    failed = [finding for finding in report.findings if finding.passed is False]
    assert report.passed == (not failed)
    return report, failed


def test_a_sound_backend(monkeypatch):
    state = torch.get_rng_state()
    report, failed = diagnose(monkeypatch, Copy())
    assert failed == [] and report.seconds < 120 and torch.equal(torch.get_rng_state(), state)
    subjects = [finding.subject for finding in report.findings if finding.passed]
    for operation in OPERATIONS:
        for dtype in ("float32", "bfloat16", "float16"):
            assert sum(s.startswith(f"copy {operation} {dtype} ") for s in subjects) == 4, (operation, dtype)
    assert sum(s.startswith("bad argument: ") for s in subjects) == 7
    assert {"model plain float32", "model prepared bfloat16", "model prepared int8 float32"} <= set(subjects)
    text = str(report)
    assert text.startswith(f"vit_fast.doctor: all {len(subjects)} checks passed in ")
    assert report.facts["torch"] == torch.__version__ and str(vit_fast.status("cpu")) in text


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_numbers_are_found(operation, monkeypatch):
    _, failed = diagnose(monkeypatch, Copy(operation, lambda out: out * 1.05))
    shown = [finding for finding in failed if finding.subject.startswith(f"copy {operation} ")]
    assert {finding.subject.split()[2] for finding in shown} == {"float32", "bfloat16", "float16"}
    assert all("allowed" in finding.text for finding in shown)
    assert {f.subject.split()[1] for f in failed if f.subject.startswith("copy")} <= {operation}
    assert any(finding.subject.startswith("model plain") for finding in failed)


def test_wrong_gradients_nan_and_other_bits_are_found(monkeypatch):
    _, failed = diagnose(monkeypatch, Copy("attention", lambda out: out * 1.05, table="backward"))
    assert failed and all(f.subject.startswith("copy attention ") and f.subject.endswith(" gradient") for f in failed)
    _, failed = diagnose(monkeypatch, Copy("layer_norm", lambda out: out * torch.nan))
    assert {"copy layer_norm float32 [2, 7, 40]", "model plain float32"} <= {finding.subject for finding in failed}
    count = iter(range(10**6))
    _, failed = diagnose(monkeypatch, Copy("patch_embed", lambda out: out + next(count) % 2 * 1e-7 * out))
    assert any(f.text.endswith("a second call gave other bits") for f in failed if "patch_embed float32" in f.subject)


def test_a_backend_that_fails_is_reported_and_left_as_it_was(monkeypatch):
    def boom(out):
        raise OSError(28, f"No space left on device: {Path.home()}/x on {socket.gethostname()}")

    backend = Copy("attention", boom)
    report, failed = diagnose(monkeypatch, backend)
    (line, *_) = [f.text for f in failed if f.subject.startswith("copy attention float32")]
    assert "was forced and failed: OSError" in line and "~/x" in line
    assert str(Path.home()) + "/" not in str(report) and "No space left" in json.dumps(report.as_dict())
    # The models run it in the chain, where it is quarantined with its warning, which the report has.
    assert [f.text.split(":")[0] for f in failed if f.subject == "warning"] == ["vit_fast.attention"]
    assert "copy failed in this process, attention: OSError" in report.status
    _, failed = diagnose(monkeypatch, backend)
    assert any(f.subject == "backend copy" and "attention failed earlier" in f.text for f in failed)


def test_names_of_users_and_machines_are_left_out(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/data/alice"))
    monkeypatch.setattr(socket, "gethostname", lambda: "alices-laptop")
    assert _public("/data/alice/.cache/a.so on alices-laptop") == "~/.cache/a.so on <host>"
    assert _public("/home/bob/a, /Users/carol/b, /usr/bin/g++") == "~/a, ~/b, /usr/bin/g++"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert _public("/usr/bin/g++ on localhost") == "/usr/bin/g++ on localhost"


@pytest.mark.parametrize("device,error", [(3, TypeError), ("nope", ValueError), ("cuda:99", ValueError)])
def test_bad_devices(device, error):
    with pytest.raises(error, match=r"^vit_fast\.\w+: device is "):
        vit_fast.doctor(device)


def test_the_verb(monkeypatch, tmp_path, capsys):
    for backend, status in ((Copy(), 0), (Copy("layer_norm", lambda out: out * 2), 1)):
        monkeypatch.setattr(select, "BACKENDS", {"copy": backend, "torch": TORCH})
        with pytest.raises(SystemExit) as end:
            cli.main(["doctor", "--device", "cpu", "--json", str(tmp_path / "report.json")])
        assert (end.value.code or 0) == status
        told = capsys.readouterr().out
        assert told.startswith("vit_fast.doctor: ") and ("FAILED" in told) == bool(status)
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["passed"] == (not status) and written["facts"]["torch"] == torch.__version__
        assert written["findings"][0].keys() == {"subject", "passed", "text"}
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--device", "cpu", "--json", str(tmp_path)])
    told = capsys.readouterr()
    assert end.value.code == 2 and "--json" in told.err and "the name of a file" in told.err
    assert not told.out  # nothing is tried for a report that cannot be kept


@pytest.mark.extension
def test_the_extension_is_sound():
    if vit_fast.status("cpu").reasons["cpu"]:
        pytest.skip("the cpu extension is not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = vit_fast.doctor("cpu")
    assert report.passed, str(report)
    subjects = [finding.subject for finding in report.findings if finding.passed]
    for operation in OPERATIONS:
        assert sum(s.startswith(f"cpu {operation} ") for s in subjects) >= 6
    assert any("cpu int8_blocks" in finding.text for finding in report.findings)
