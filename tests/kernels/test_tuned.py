"""kernels/tuned: launch configs that were found on a GPU, read from a file that may be missing, old or damaged."""

import json
from dataclasses import asdict, astuple, fields

import pytest
import torch
from vit_fast.kernels import configs, tuned

CALL = (50432, 3072, False, torch.bfloat16, torch.bfloat16, False, False)


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """The folder of the tables and a CUDA device, both pretended; ``configs.arch_of`` without its cache."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "_tables", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tuned.importlib.metadata, "version", lambda name: "3.7.1")
    return tmp_path / "h200.json", lambda: configs.arch_of.__wrapped__(torch.device("cuda", 0))


def _content(**changes):
    picked = asdict(configs.pick_linear_config.__wrapped__(*CALL, 90))
    entry = {"out_features": 3072, "picked": picked, "use": {"num_warps": 8}}
    return {"device": "NVIDIA H200", "triton": "3.7.1", "linear": [entry]} | changes


def test_fields_are_those_of_a_config():
    assert {field.name: field.type for field in fields(configs.LinearConfig)} == tuned.FIELDS
    assert {"statistics": configs.STATISTICS} == tuned.STACK_FIELDS
    assert [field.name for field in fields(configs.StackConfig)] == list(tuned.STACK_FIELDS)


def test_without_a_file_the_rules_pick(h200):
    _, arch_of = h200
    before = configs.pick_linear_config.__wrapped__(*CALL, 90)
    assert arch_of() == 90 and configs.pick_linear_config(*CALL, 90) == before
    assert configs.arch_of(torch.device("cpu")) == 80


def test_a_file_replaces_what_it_names(h200):
    file, arch_of = h200
    file.write_text(json.dumps(_content()))
    assert arch_of() == 90
    assert (
        configs.pick_linear_config(*CALL, 90).num_warps
        == configs.pick_linear_config(*CALL[:-1], False, arch=90).num_warps
        == 8
    )
    assert configs.pick_linear_config(50432, 768, *CALL[2:], 90).num_warps == 4  # another width
    assert configs.pick_linear_config(197, 3072, *CALL[2:], 90).num_warps == 4  # the rule picks other tiles
    assert configs.pick_linear_config(*CALL, 100) == configs.pick_linear_config.__wrapped__(*CALL, 100)


def test_a_file_replaces_the_form_of_a_stack(h200):
    file, arch_of = h200
    (picked,) = astuple(configs.pick_stack_config.__wrapped__(50432, 768, 90))
    other = next(form for form in configs.STATISTICS if form != picked)
    entry = {"width": 768, "picked": {"statistics": picked}, "use": {"statistics": other}}
    file.write_text(json.dumps(_content(stack=[entry])))
    assert arch_of() == 90 and configs.pick_linear_config(*CALL, 90).num_warps == 8
    assert configs.pick_stack_config(50432, 768, 90) == configs.StackConfig(other)
    assert configs.pick_stack_config(50432, 1024, 90) == configs.StackConfig(picked)
    assert configs.pick_stack_config(50432, 768, 100).statistics != other


def test_a_file_for_another_triton_changes_nothing(h200):
    file, arch_of = h200
    file.write_text(json.dumps(_content(triton="3.6.0")))
    assert arch_of() == 90 and configs.pick_linear_config(*CALL, 90).num_warps == 4


@pytest.mark.parametrize(
    "text,wanted",
    (
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        (json.dumps({"device": "NVIDIA H200"}), "no entry 'triton'"),
        (json.dumps(_content(device="NVIDIA B200")), "got device 'NVIDIA B200', wanted 'NVIDIA H200'"),
        (json.dumps(_content(linear=[{"out_features": 1, "picked": {}, "use": {}}])), "wanted all of block_m, block_n"),
        (json.dumps(_content()).replace('"use": {"num_warps": 8}', '"use": {"odd": 8}'), "wanted some of block_m"),
        (json.dumps(_content()).replace('"use": {"num_warps": 8}', '"use": {"num_warps": 0}'), "got num_warps 0"),
        (json.dumps(_content()).replace('"use": {"num_warps": 8}', '"use": {"tma": 1}'), "got tma 1, wanted a bool"),
        (
            json.dumps(_content(stack=[{"width": 8, "picked": {"statistics": "odd"}, "use": {}}])),
            "got statistics 'odd', wanted any of partials, finalised, plain",
        ),
        (json.dumps(_content(stack=[{"picked": {}, "use": {}}])), "no entry 'width'"),
    ),
)
def test_a_damaged_file_is_told_by_its_name_and_the_rules_pick(h200, text, wanted, monkeypatch):
    file, arch_of = h200
    file.write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"h200\.json cannot be used: .*; mend it, or delete it to use the ru"
    ) as told:
        assert arch_of() == 90
    assert len(told) == 1 and wanted in str(told[0].message)
    assert configs.pick_linear_config(*CALL, 90) == configs.pick_linear_config.__wrapped__(*CALL, 90)
    monkeypatch.setenv("VIT_FAST_STRICT", "1")
    with pytest.raises(ValueError, match=r"h200\.json cannot be used"):
        arch_of()


def test_a_damaged_file_is_told_once(h200, monkeypatch):
    file, _ = h200
    file.write_text("{")
    device = torch.device("cuda", 0)
    configs.arch_of.cache_clear()
    try:
        with pytest.warns(RuntimeWarning) as told:
            assert [configs.arch_of(device) for _ in range(3)] == [90] * 3
    finally:
        configs.arch_of.cache_clear()
    assert len(told) == 1
