"""A run from its settings to its files: what they hold, who can load them, and what a failure leaves."""

import copy
import csv
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.training import ALONE, SIDE, VIT, assert_same, run, settings, stripes

import vit_fast
from vit_fast.training import loop, run_folder
from vit_fast.training.errors import TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("stripes"), 20)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A run that learns."""
    return run(
        settings(data, tmp_path_factory.mktemp("done") / "run", epochs=6, lr=3e-3, model_ema=True, model_ema_decay=0.7)
    )


ARGUMENTS = dict(img_size=SIDE, num_classes=2, **VIT)


def test_it_learns_and_tells_so(done):
    rows = done.progress.rows
    assert [row["epoch"] for row in rows] == [*range(6)] and rows[-1]["eval_top1"] == 100.0
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    with open(done.settings.output / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["eval_loss"]) for row in table] == [row["eval_loss"] for row in rows]
    # Cosine with one epoch of warm-up, four updates an epoch: the rate behind the last update of each epoch.
    assert rows[0]["lr"] == pytest.approx(
        3e-3 / 2 * (1 + torch.pi * 0 + torch.cos(torch.tensor(torch.pi * 4 / 24)).item())
    )
    assert rows[-1]["lr"] == 0.0


def test_the_weights_are_timms(done):
    folder = done.settings.output
    ours = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(folder / "last.safetensors"), **ARGUMENTS)
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(folder / "last.safetensors"), **ARGUMENTS)
    averaged = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=str(folder / "last.pth"), **ARGUMENTS)
    assert_same(dict(ours.state_dict()), dict(done.ema.module.state_dict()))
    assert_same(dict(averaged.state_dict()), dict(done.ema.module.state_dict()))
    assert_same(dict(theirs.state_dict()), dict(ours.state_dict()))
    with safe_open(folder / "best.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["classes"].split("\n") == ["across", "along"]  # in the order of the labels
    best = done.progress.rows[done.progress.best]
    assert facts["epoch"] == str(best["epoch"] + 1) and best["eval_top1"] == max(
        row["eval_top1"] for row in done.progress.rows
    )
    assert not list(folder.glob(".*"))


def test_fine_tuning_begins_with_weights_and_a_new_head(done, data, tmp_path):
    told = []
    three = stripes(tmp_path / "three", 6, ("a", "b", "c"))
    weights = done.settings.output / "last.safetensors"
    one = settings(three, tmp_path / "run", initial_checkpoint=weights)
    made = loop.Run(one, ALONE, told.append)
    assert "the head is new" in told[0] and "has 2 classes, the data set 3" in told[0]
    state, begun = made.plain.state_dict(), done.ema.module.state_dict()
    assert state["head.weight"].shape == (3, 32)
    assert all(torch.equal(state[name], begun[name]) for name in begun if not name.startswith("head."))


def test_a_linear_probe_and_frozen_parameters_stay(data, tmp_path):
    head, norm = {"head.weight", "head.bias"}, {"norm.weight", "norm.bias"}
    cases = ((dict(linear_probe=True), head), (dict(freeze=("blocks.*", "*embed*", "cls*")), head | norm))
    for number, (changes, moves) in enumerate(cases):
        made = loop.Run(settings(data, tmp_path / str(number), epochs=1, warmup_epochs=0, **changes), ALONE, print)
        before = copy.deepcopy(made.plain.state_dict())
        made.fit()
        after = made.plain.state_dict()
        assert {name for name in before if not torch.equal(before[name], after[name])} == moves


def test_lora_trains_adapters_and_saves_them_merged(peer, data, tmp_path):
    peer("peft")
    one = settings(data, tmp_path / "run", lora_rank=2, lr=1e-2)
    made = loop.Run(one, ALONE, print)
    trained = {name for name, parameter in made.plain.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or ".head." in name for name in trained)
    before = {name: tensor.clone() for name, tensor in made.plain.state_dict().items()}
    made.fit()
    after = made.plain.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in trained)
    merged = vit_fast.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(one.output / "last.safetensors"), **ARGUMENTS
    ).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), made.plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_other_models_of_timm_are_trained_as_they_are(data, tmp_path):
    told = []
    one = settings(data, tmp_path / "run", model="test_resnet", img_size=32, model_kwargs={}, epochs=1, warmup_epochs=0)
    made = loop.Run(one, ALONE, told.append)
    made.fit()
    assert any("test_resnet is trained as timm built it" in text for text in told)
    timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(one.output / "last.safetensors"))


def test_accumulated_gradients_are_those_of_the_whole_batch(data, tmp_path):
    states = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        one = settings(
            data, tmp_path / str(size), batch_size=size, grad_accum_steps=steps, epochs=1, warmup_epochs=0, opt="sgd"
        )
        states.append(run(one).plain.state_dict())
    for other in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("when", ("train", "validation", "weights"))
def test_nan_ends_the_run_and_the_last_good_checkpoint_stays(data, tmp_path, monkeypatch, when):
    one = settings(data, tmp_path / "run")
    made = loop.Run(one, ALONE, print)

    def spoil(row):
        files = {path.name: path.read_bytes() for path in one.output.iterdir()}
        kept.update(files)
        if when == "train":
            monkeypatch.setattr(made, "criterion", lambda logits, labels: (logits * float("nan")).sum())
        elif when == "weights":
            update = made._update

            def poisoned(batches):
                found = update(batches)
                with torch.no_grad():
                    made.plain.cls_token.fill_(float("inf")) if made.progress.update == made.updates - 1 else None
                return found

            monkeypatch.setattr(made, "_update", poisoned)
            monkeypatch.setattr(made, "_validate", lambda: (1.0, 50.0, 100.0))
        else:
            monkeypatch.setattr(made, "_validate", lambda: (float("nan"), 50.0, 100.0))

    kept = {}
    told = {
        "train": r"the loss is nan at update 1 of epoch 2 \(step 5\), with the learning rate 0\.\d+; .*last\.pth' is "
        "the last good checkpoint",
        "validation": r"the loss of validation is nan after epoch 2 \(step 8\), with the learning rate",
        "weights": r"cls_token is not finite after step 8, with the learning rate",
    }[when]  # fmt: skip
    with pytest.raises(TrainingError, match=told):
        made.fit(keep=lambda row: spoil(row) if row["epoch"] == 0 else None)
    assert {path.name: path.read_bytes() for path in one.output.iterdir()} == kept and "last.pth" in kept


def test_an_overflow_of_float16_is_left_out(data, tmp_path):
    made = loop.Run(settings(data, tmp_path / "run", amp_dtype="float16", epochs=1, warmup_epochs=0), ALONE, print)
    before = copy.deepcopy(made.plain.state_dict())
    made.stepping.scaler._scaler._init_scale = 2.0**40
    made.fit()
    after = made.plain.state_dict()
    assert torch.equal(before["head.weight"], after["head.weight"])  # every update overflowed
    assert made.stepping.scaler.state_dict()["scale"] == 2.0**36


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), run_folder.written(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with run_folder.written(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_what_was_there(data, tmp_path, monkeypatch):
    one = settings(data, tmp_path / "run", epochs=2)
    made = loop.Run(one, ALONE, print)
    kept = {}

    def fill(row):
        kept.update({path.name: path.read_bytes() for path in one.output.iterdir()})
        monkeypatch.setattr(run_folder.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))

    with pytest.raises(TrainingError, match=r"cannot be written .*No space left.*; the one of before is kept"):
        made.fit(keep=fill)
    assert {path.name: path.read_bytes() for path in one.output.iterdir()} == kept


def torchrun(*words, count=2):
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*command, "-m", "vit_fast", "train", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WORDS = (
    "--model",
    "vit_tiny_patch16_224",
    "--img-size",
    SIDE,
    "--epochs",
    2,
    "--warmup-epochs",
    1,
    "-j",
    0,
    "--scale",
    "0.5,1",
)
WORDS += ("--model-kwargs", " ".join(f"{key}={value}" for key, value in VIT.items()), "--device", "cpu")


@pytest.mark.parametrize("flags", ((), ("--fsdp",)), ids=("ddp", "fsdp2"))
def test_two_processes_are_as_one(data, tmp_path, flags):
    one = settings(data, tmp_path / "one", epochs=2)
    run(one)
    out = torchrun(data, *WORDS, "-b", 4, "--output", tmp_path / "two", *flags)
    assert out.count("epoch 2/2") == 1 and "2 processes" in out
    alone, shared = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=2e-3, atol=2e-4)
    if flags:  # the sharded state is read again; nothing is left to do
        assert "going on after 2 epochs" in torchrun("--resume", tmp_path / "two", "--device", "cpu")
