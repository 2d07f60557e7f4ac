"""``vit-fast train`` from its flags to its files, and every bad input: told in one line, before anything is written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import SIDE, VIT, stripes

import vit_fast
from vit_fast import cli
from vit_fast.training import loop

WORDS = [
    "--model",
    "vit_tiny_patch16_224",
    "--img-size",
    SIDE,
    "--model-kwargs",
    " ".join(f"{k}={v}" for k, v in VIT.items()),
]
WORDS += ["-b", 8, "--epochs", 2, "--warmup-epochs", 1, "-j", 0, "--device", "cpu"]


def run(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("stripes"), 20)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run("train", data, *WORDS, "--output", folder) == 0
    return folder


def test_a_run_leaves_its_files_and_says_what_it_did(data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", data, *WORDS, "--output", folder, "--amp", "--lr", "2e-3") == 0
    out = capsys.readouterr().out
    assert "2 classes, 32 images to train on, 8 to validate on; 4 updates an epoch, cpu." in out
    assert "epoch 1/2: loss" in out and "epoch 2/2: loss" in out and f"Weights, table and plot: {folder}" in out
    names = {"args.json", "best.safetensors", "last.pth", "last.safetensors", "summary.csv", "summary.png"}
    assert {path.name for path in folder.iterdir()} == names
    settings = json.loads((folder / "args.json").read_text())
    assert settings["lr"] == 2e-3 and settings["amp_dtype"] == "bfloat16" and settings["model_kwargs"] == VIT
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    model = vit_fast.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, num_classes=2, checkpoint_path=str(folder / "best.safetensors"), **VIT
    )
    assert torch.equal(model.head.weight, load_file(folder / "best.safetensors")["head.weight"])


def test_a_run_goes_on_with_its_own_flags(data, tmp_path, monkeypatch, capsys):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = [data, *WORDS, "--lr", "3e-3", "--mixup", "0.2", "--model-ema", "--drop", "0.1"]
    assert run("train", *flags, "--output", whole) == 0
    epochs = loop.Run._train

    def stop(self, tell):
        if self.progress.epoch == 1:
            raise KeyboardInterrupt
        epochs(self, tell)

    monkeypatch.setattr(loop.Run, "_train", stop)
    assert run("train", *flags, "--output", half) == 130
    assert f"--resume {half} goes on" in capsys.readouterr().out
    monkeypatch.undo()
    assert run("train", "--resume", half, "-j", 1) == 0
    assert "going on after 1 epochs" in capsys.readouterr().out
    one, other = (load_file(folder / "last.safetensors") for folder in (whole, half))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "flags,told",
    (
        (["--drop", "1"], "--drop: got 1.0, wanted 0 or more and less than 1"),
        (["--drop", "-0.1"], "--drop: got -0.1"),
        (["--drop-path", "nan"], "--drop-path: got nan"),
        (["--opt", "adamx"], "--opt is 'adamx', expected one of timm's"),
        (["--sched", "cosin"], "--sched is 'cosin', expected one of cosine, tanh"),
        (["--model", "vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["--model-kwargs", "deep=3"], "deep"),
        (["--num-classes", "1"], "--num-classes is 1, expected 2 or more"),
        (["--in-chans", "2"], "--in-chans is 2, expected 1 (grey) or 3 (RGB)"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--batch-size", "33"], "--batch-size is 33, expected 32 or less"),
        (["--batch-size", "7", "--mixup", "1"], "--batch-size is 7, expected an even number"),
        (["--lr", "0"], "--lr: got 0.0, wanted a number above 0"),
        (["--lr", "nan"], "--lr: got nan"),
        (["--warmup-epochs", "2"], "--warmup-epochs is 2, expected fewer than the 2 of --epochs"),
        (["--smoothing", "1"], "--smoothing: got 1.0"),
        (["--val-share", "1"], "--val-share: got 1.0"),
        (["--scale", "1,0.5"], "--scale: got '1,0.5', wanted two numbers, the smaller first"),
        (["--clip-mode", "max"], "--clip-mode: got 'max'"),
        (["--amp-dtype", "bf16"], "--amp-dtype: got 'bfloat16', wanted it together with --amp"),
        (["--opt", "adahessian"], "--opt is 'adahessian', expected one that needs no second derivatives"),
        (["--opt-betas", "0.9"], "--opt-betas is '0.9', expected 2 numbers for --opt adamw"),
        (["--opt", "sgd", "--opt-betas", "0.9,0.9"], "expected none: --opt sgd has no betas"),
        (["--opt", "sgd", "--opt-eps", "1e-8"], "expected none: --opt sgd has no epsilon"),
        (["--aa", "rand-m9-nothing1"], "--aa is 'rand-m9-nothing1', expected a policy of timm"),
        (["--aa", "none"], "--aa is 'none', expected a policy of timm"),
        (["--seed", "4294967296"], "--seed: got 4294967296, wanted less than 2147483648"),
        (["--split-seed", "18446744073709551616"], "--split-seed: got 18446744073709551616"),
        (["--fsdp"], "--fsdp is given in a single process, expected several: torchrun starts them"),
        (["--fsdp", "--model-ema"], "--model-ema is given with --fsdp"),
        (["--freeze", "nothing*"], "--freeze is 'nothing*', expected a pattern of the names of parameters"),
        (["--seed", "9" * 30], f"--seed: got {'9' * 30}, wanted a whole number of 64 bits"),
        (["--model-kwargs", f"img_size={SIDE}"], "wanted img_size by --img-size alone"),
        (["--model-kwargs", "num_classes=3"], "wanted num_classes by --num-classes alone"),
        (["--drop", "0.1", "--model-kwargs", "drop_rate=0.2"], "wanted drop_rate by --drop alone"),
        (["--model-kwargs", "warn=1"], "warn"),
        (["--linear-probe", "--lora-rank", "2"], "--linear-probe: got True, wanted it without --lora-rank"),
        (["--freeze", "*"], "expected to leave a parameter to train"),
        (["--lora-rank", "2", "--lora-targets", "none"], "--lora-targets is 'none'"),
        (["--initial-checkpoint", "nowhere.safetensors"], "--initial-checkpoint: got 'nowhere.safetensors'"),
        (["--dataset", "cifar"], "--dataset: got 'cifar', wanted folder or digits"),
        (["--dataset", "digits"], "wanted it with --dataset folder alone"),
        (["--backend", "triton"], "--backend: got 'triton'"),
        (["--resume", "nowhere"], "--resume: 'nowhere' does not exist"),
    ),
)
def test_bad_flags_are_told_and_nothing_is_written(data, tmp_path, monkeypatch, peer, capsys, flags, told):
    if "--lora-rank" in flags:
        peer("peft")
    monkeypatch.chdir(tmp_path)
    assert run("train", data, *WORDS, "--output", tmp_path / "run", *flags) in (1, 2)
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_data_is_told(capsys, tmp_path):
    assert run("train", *WORDS) == 2 and "DATA_DIR: got None, wanted a folder" in capsys.readouterr().err
    assert run("train", tmp_path / "nowhere", *WORDS) == 2


def test_the_folder_of_another_run_is_kept(data, done, capsys):
    before = files(done)
    assert run("train", data, *WORDS, "--output", done) == 1
    error = capsys.readouterr().err
    assert f"--resume {done} goes on with it" in error and "has a run in it" in error
    assert run("train", "--resume", done, "--lr", "0.5") == 1
    assert "--lr is 0.5, expected 0.001 as in" in capsys.readouterr().err
    assert run("train", "--resume", done, "--model", "vit_small_patch16_224") == 1
    assert "--model is 'vit_small_patch16_224', expected 'vit_tiny_patch16_224'" in capsys.readouterr().err
    assert run("train", "--resume", done, "--output", done.parent / "other") == 2
    assert files(done) == before and not (done.parent / "other").exists()


def test_a_run_stopped_before_it_saved_anything_begins_again(data, tmp_path, monkeypatch, capsys):
    def stop(self, tell):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    monkeypatch.setattr(loop.Run, "_train", stop)
    assert run("train", data, *WORDS, "--output", folder) == 130
    assert "No state was saved yet; the same command begins again." in capsys.readouterr().out
    monkeypatch.undo()
    assert (folder / "args.json").exists()  # and no more, as after a kill
    assert run("train", data, *WORDS, "--output", folder) == 0
    (folder / "last.pth").unlink()
    assert run("train", data, *WORDS, "--output", folder) == 1
    assert f"it has no state: delete {folder}, or name another folder" in " ".join(capsys.readouterr().err.split())


def test_a_run_goes_on_without_the_weights_it_began_with_and_deletes_half_files(data, done, tmp_path):
    weights, folder = tmp_path / "weights.safetensors", tmp_path / "run"
    shutil.copy(done / "last.safetensors", weights)
    assert run("train", data, *WORDS, "--output", folder, "--initial-checkpoint", weights) == 0
    weights.unlink()
    half, other = folder / ".last.pth.123.tmp", folder / ".notes.tmp"
    half.write_bytes(b"half"), other.write_bytes(b"")
    assert run("train", "--resume", folder) == 0
    assert not half.exists() and other.exists()


def test_a_folder_that_cannot_be_written_is_told(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("train", data, *WORDS, "--output", tmp_path / "file" / "run") == 1
    assert "--output: " in capsys.readouterr().err
    if os.geteuid():  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert run("train", data, *WORDS, "--output", tmp_path / "locked") == 1
        assert "cannot be written (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ("cut", "foreign", "another"))
def test_bad_weights_to_begin_with_are_told(data, done, tmp_path, capsys, kind):
    path, good = tmp_path / "weights.safetensors", done / "last.safetensors"
    if kind == "cut":
        path.write_bytes(good.read_bytes()[:-100])
    elif kind == "foreign":
        path.write_bytes(b"nothing" * 100)
    else:
        state = load_file(good)
        save_file({name.replace("blocks.1", "blocks.7"): tensor for name, tensor in state.items()}, path)
    assert run("train", data, *WORDS, "--output", tmp_path / "run", "--initial-checkpoint", path) == 1
    error = capsys.readouterr().err
    assert "--initial-checkpoint: " in error and (
        "blocks.7" in error if kind == "another" else "cannot be read" in error
    )
    assert not (tmp_path / "run").exists()


def test_nan_is_told_and_the_last_good_checkpoint_kept(data, tmp_path, monkeypatch, capsys):
    epochs, kept = loop.Run._train, {}

    def spoil(self, tell):
        if self.progress.epoch == 1:
            kept.update(files(self.settings.output))
            self.criterion = lambda logits, labels: logits.sum() * float("nan")
        epochs(self, tell)

    monkeypatch.setattr(loop.Run, "_train", spoil)
    folder = tmp_path / "run"
    assert run("train", data, *WORDS, "--output", folder) == 1
    error = capsys.readouterr().err
    assert "the loss is nan at update 1 of epoch 2 (step 5), with the learning rate" in error
    assert "is the last good checkpoint" in error
    assert {name: content for name, content in files(folder).items() if name != "summary.png"} == kept
