"""benchmarks/first_look_stages.py: rehearsed on meta tensors at full size, and its checks run on small interpreted
kernels."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.scripts import loaded

PATH = Path(__file__).parents[2] / "benchmarks" / "first_look_stages.py"


@pytest.fixture(scope="module")
def stages():
    with loaded(PATH) as module:
        yield module


def _run(stages, name, bench):
    kept = {}
    return stages.MEASUREMENTS[name](bench, kept.update), kept


@pytest.mark.parametrize("name", ("stacks", "epilogues", "once", "tiny", "replays", "sustained"))
def test_rehearsed_without_a_gpu(stages, name):
    passed, kept = _run(stages, name, stages.Bench(torch.device("meta"), 256))
    rows = kept.get("rows", [])
    assert passed and [row for row in rows if row.get("fault")] == []
    if name == "epilogues":
        assert {row["us"] for row in rows} == {1.0} and len(rows) == 7
    if name == "stacks":
        assert [(row["name"], row["us"], row["picked"]) for row in rows] == [
            (form, 1.0, "partials") for form in ("partials", "finalised", "plain")
        ]
    if name == "once":
        assert [row["name"] for row in rows] == ["fc1: as prepared", "proj: as prepared"]
    if name == "tiny":
        assert [row["name"] for row in rows] == [
            "split-K",
            "split-K launched by PDL",
            "linear_hopper",
            "linear_hopper launched by PDL",
            "cooperative linear_hopper launched by PDL",
        ]


def test_an_error_is_recorded_and_the_next_form_is_tried(stages, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such instruction")

    from vit_fast.kernels import linear

    monkeypatch.setattr(linear, "folded_linear", broken)
    passed, kept = _run(stages, "epilogues", stages.Bench(torch.device("meta"), 4))
    faults = {row["name"]: row["fault"] for row in kept["rows"]}
    assert not passed and faults["fc1: as prepared"] == "RuntimeError: no such instruction"
    assert faults["fc1: bias"] is None and faults["proj: as prepared"] is None


def test_a_wrong_result_is_not_timed(stages):
    bench = stages.Bench(torch.device("cpu"), 1)
    torch.manual_seed(0)
    x, weight = bench.random(2, 9, 64), bench.random(32, 64, scale=0.125)

    def product(x):
        return F.linear(x, weight.to(x.dtype))

    right = product(x)
    assert bench.fault(right, product, x) is None
    assert "allowed" in bench.fault(right + 0.5, product, x)


@pytest.mark.interp
@pytest.mark.parametrize("name", ("stacks", "epilogues", "tiny"))
def test_checks_on_small_interpreted_kernels(stages, monkeypatch, name):
    for size, value in (("TOKENS", 5), ("WIDTH", 64), ("HIDDEN", 128)):
        monkeypatch.setattr(stages, size, value)
    monkeypatch.setitem(stages.partials_of.__globals__, "PARTIAL_WIDTH", 32)
    monkeypatch.setattr(stages.Bench, "us", lambda bench, call: 2.0)
    torch.manual_seed(0)
    passed, kept = _run(stages, name, stages.Bench(torch.device("cpu"), 3))
    assert passed, kept
    assert len(kept["rows"]) == {"stacks": 3, "epilogues": 7, "tiny": 1}[name]
    if name == "epilogues":  # a fault of the kernel is found
        from vit_fast.kernels import linear

        right = linear.folded_linear
        monkeypatch.setattr(linear, "folded_linear", functools.partial(_doubled, right))
        passed, kept = _run(stages, name, stages.Bench(torch.device("cpu"), 3))
        found = {row["name"] for row in kept["rows"] if row["fault"]}
        assert not passed and found == {"fc1: bias, LayerNorm folded in", "fc1: as prepared"}
        assert all(row["us"] is None for row in kept["rows"] if row["fault"])


def _doubled(right, *arguments, **options):
    return 2 * right(*arguments, **options)
