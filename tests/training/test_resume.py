"""A run that was stopped goes on bit for bit: weights, averages, optimiser, schedule, loss scale, generators, order.

The reference is the same run without a stop.
"""

import pytest
import torch
from safetensors.torch import load_file
from support.training import ALONE, assert_same, run, settings, stripes

from vit_fast.training import loop
from vit_fast.training.errors import TrainingError

# What draws random numbers, keeps a state or counts.
EVERYTHING = dict(
    drop=0.1, drop_path=0.1, mixup=0.4, cutmix=0.5, model_ema=True, model_ema_decay=0.9, clip_grad=1.0,
    aa="rand-m5-mstd0.5", reprob=0.3, grad_accum_steps=2, batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("stripes"), 20)


def state(folder):
    """The state of a run without what may differ: how fast it was, and where it is."""
    found = torch.load(folder / "last.pth", weights_only=True)
    for row in found["progress"]["rows"]:
        del row["train_samples_per_sec"]
    del found["settings"]["output"], found["settings"]["recovery_interval"], found["settings"]["workers"]
    return found


def stopped(one, count):
    """The run, stopped as by Ctrl-C when it tells of its progress for the count-th time."""
    told = 0

    def tell(text, done):
        nonlocal told
        told += 1
        if told == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(one, tell=tell)


@pytest.mark.parametrize(
    "stop,changes",
    (
        (2, EVERYTHING),  # in the first epoch
        (3, EVERYTHING),  # where it ends
        (5, EVERYTHING),  # where the second ends
        (4, {}),  # in the second
        (3, dict(amp_dtype="float16", opt="lamb")),
        (3, dict(amp_dtype="bfloat16", lora_rank=2)),
    ),
)
def test_a_stopped_run_goes_on_bit_for_bit(data, tmp_path, peer, stop, changes):
    if "lora_rank" in changes:
        peer("peft")
    whole = settings(data, tmp_path / "whole", **changes)
    run(whole)
    half = settings(data, tmp_path / "half", recovery_interval=2, **changes)
    stopped(half, stop)
    before = state(half.output)["progress"]
    # It tells of its progress in the middle and at the end of each epoch, before it saves.
    assert (before["epoch"], before["update"]) == divmod(2 * (stop - 1), 4)
    run(half, resume=half.output)
    assert_same(state(whole.output), state(half.output))
    for name in ("last.safetensors", "best.safetensors"):
        one, other = (load_file(folder / name) for folder in (whole.output, half.output))
        assert_same(dict(sorted(one.items())), dict(sorted(other.items())))


def test_the_number_of_workers_changes_nothing(data, tmp_path):
    one, other = (settings(data, tmp_path / str(workers), workers=workers, epochs=2) for workers in (0, 2))
    run(one), run(other)
    assert_same(state(one.output), state(other.output))


def test_another_seed_trains_other_weights(data, tmp_path):
    one, other = (settings(data, tmp_path / str(seed), seed=seed, epochs=2) for seed in (0, 1))
    run(one), run(other)
    with pytest.raises(AssertionError):
        assert_same(state(one.output)["state_dict"], state(other.output)["state_dict"])


def test_going_on_leaves_out_what_is_not_the_same_run(data, tmp_path):
    one = settings(data, tmp_path / "run", epochs=2)
    run(one)
    path = one.output / "last.pth"
    before = path.read_bytes()
    for changes, told in (
        (dict(lr=3e-3), "--lr is 0.003, expected 0.001 as in"),
        (dict(model="vit_small_patch16_224"), "--model is 'vit_small_patch16_224', expected 'vit_tiny_patch16_224'"),
        (dict(epochs=9), "--epochs is 9, expected 2"),
    ):
        with pytest.raises(TrainingError, match=told):
            run(settings(data, one.output, **dict(epochs=2) | changes), resume=one.output)
    saved = torch.load(path, weights_only=True)
    for changed, told in (
        (saved | {"version": 99}, "has version 99 of a state, expected 2"),
        (saved | {"format": "another"}, "holds no state of a run; --initial-checkpoint takes files of weights"),
        (saved | {"state_dict": {"head.weight": torch.zeros(2, 2)}}, "the state is of another model"),
        (saved | {"random": saved["random"] * 2}, "is of 2 processes, expected as many as now: 1"),
        ({k: v for k, v in saved.items() if k not in ("random", "torch")}, r"is damaged: it lacks random, torch"),
        ({"format": saved["format"]}, "has version None of a state, expected 2"),
        (saved | {"classes": ["along", "across"]}, "the classes are across, along, expected along, across as in"),
        (saved | {"images": [31, 9]}, "it has 32 images to train on and 8 to validate on, expected 31 and 9 as in"),
    ):
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(TrainingError, match=told):
            loop.Run(one, ALONE, lambda text: None, tmp_path / "changed.pth")
    for share in (0.0, 0.3, 0.9, 0.999):
        (tmp_path / "cut.pth").write_bytes(before[: int(share * len(before))])
        with pytest.raises(TrainingError, match=r"cut\.pth' cannot be read, it is cut off or damaged"):
            loop.Run(one, ALONE, lambda text: None, tmp_path / "cut.pth")
    with pytest.raises(TrainingError, match=r"does not exist, expected the folder of a run or its last\.pth"):
        loop.Run(one, ALONE, lambda text: None, tmp_path / "nothing")
    assert path.read_bytes() == before
