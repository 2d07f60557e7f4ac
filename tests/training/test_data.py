"""The data of a run: class folders, the split, batches that depend on seed, epoch and image alone; bad files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import ALONE, settings, stripes

from vit_fast.training import datasets, loading
from vit_fast.training.errors import TrainingError
from vit_fast.training.parallel import Processes


@pytest.fixture
def data(tmp_path):
    return stripes(tmp_path / "data", 10, ("c10", "c2", "c1"))


def load(folder, **changes):
    return datasets.load(settings(folder, folder / "run", **changes), 3, print)


def test_classes_are_sorted_as_timm_sorts_them_and_each_is_split(data):
    found = load(data)
    assert found.classes == ("c1", "c2", "c10")
    parts = [[(path.parent.name, path.name) for path in part.paths] for part in (found.train, found.val)]
    assert len(parts[0]) == 24 and len(parts[1]) == 6 and not set(parts[0]) & set(parts[1])
    assert [found.val.labels.count(label) for label in range(3)] == [2, 2, 2]
    assert all(found.classes[label] == name for label, (name, _) in zip(found.train.labels, parts[0]))
    again, other = (load(data, split_seed=seed).val.paths for seed in (0, 1))
    assert again == found.val.paths != other


def test_two_folders_are_taken_as_they_are(data, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(data, both / "train")
    stripes(both / "val", 3, ("c10", "c1"))
    found = load(both)
    assert found.classes == ("c1", "c2", "c10") and found.val.labels == [0] * 3 + [2] * 3
    assert len(found.train.labels) == 30


@pytest.mark.parametrize(
    "change,told",
    (
        (lambda data: (data / "empty").mkdir(), "class folder .*/empty' holds no images"),
        (lambda data: (data / "c1" / "bad.png").write_bytes(b""), r"image .*/c1/bad\.png' cannot be read"),
        (lambda data: (data / "c1" / "bad.png").symlink_to("nowhere"), r"image .*/c1/bad\.png' cannot be read"),
        (lambda data: _write(data / "c1" / "int.tiff", "I"), r"c1/int\.tiff' cannot be read: its pixels have 32 bits"),
        (
            lambda data: [shutil.rmtree(data / name) for name in ("c1", "c10")],
            "has 'c2' as its only class, expected two",
        ),
        (lambda data: (data / os.fsdecode(b"caf\xe9")).mkdir(), r"caf.udce9', expected a name of one line in UTF-8"),
        (lambda data: (data / "c1" / "bad.png").write_bytes(b"no image"), r"image .*/c1/bad\.png' cannot be read"),
        (lambda data: _cut(data / "c2" / "3.png"), r"image .*/c2/3\.png' cannot be read"),
        (lambda data: [shutil.rmtree(path) for path in data.iterdir()], "holds no class folders"),
        (lambda data: shutil.move(data / "c1", data / "train"), "lacks 'val', expected both or neither"),
        (lambda data: [path.unlink() for path in list((data / "c2").iterdir())[1:]], "a class has a single image"),
    ),
)
def test_bad_folders_are_named(data, change, told):
    change(data)
    with pytest.raises(TrainingError, match=told):
        load(data)


def test_every_kind_of_image_is_read(data):
    """Endings that torchvision knows, 8 and 16 bits, links to files and folders, odd names; the rest is told."""
    from PIL import Image

    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey, folder = Image.fromarray(pixels), data / "c1" / "Grün 猫" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.webp", "b.BMP", "c.tiff"):
        grey.save(folder / name, **({"lossless": True} if name == "a.webp" else {}))
    Image.fromarray(pixels.astype(np.uint16) * 256 + 7).save(folder / "wide.png")
    for mode in ("RGBA", "LA", "P"):
        grey.convert(mode).save(folder / f"{mode}.png")
    (folder / "image.heic").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"")
    (data / "c2" / "link.png").symlink_to(folder / "b.BMP")
    (data / "c2" / "folder").symlink_to(folder, target_is_directory=True)
    (data / "c1" / "loop").symlink_to(data / "c1", target_is_directory=True)
    told = []
    found = datasets.load(settings(data, data / "run"), 3, told.append)
    both = [
        (path, found.classes[label])
        for part in (found.train, found.val)
        for path, label in zip(part.paths, part.labels)
    ]
    assert len(both) == 30 + 2 * 7 + 1 and sum(name == "c1" for _, name in both) == 17
    for part in (found.train, found.val):
        for index, path in enumerate(part.paths):
            if not path.stem.isdigit():
                assert np.array_equal(np.asarray(part.image(index)), np.repeat(pixels[..., None], 3, 2)), path
    assert told == ["--data-dir: 2 files are no images by their names and are left out (.heic)"]


def _write(path, mode):
    from PIL import Image

    Image.new(mode, (8, 8)).save(path)


def _cut(path):
    path.write_bytes(path.read_bytes()[:200])


def test_a_class_of_the_validation_alone_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "both" / "train")
    stripes(tmp_path / "both" / "val", 2, ("c1", "c3"))
    with pytest.raises(TrainingError, match=r"val/c3' is a class that the folder to train on does not have"):
        load(tmp_path / "both")


def test_labels_have_to_fit_the_model(data):
    with pytest.raises(TrainingError, match="--num-classes is 2, expected 3 or more: the class 'c10' has the label 2"):
        load(data, num_classes=2)
    with pytest.raises(TrainingError, match=r"--in-chans is 5, expected 1 \(grey\) or 3 \(RGB\)"):
        datasets.load(settings(data, data / "run"), 5, print)


def test_a_file_that_breaks_later_is_named_from_a_worker_too(data):
    found = load(data)
    config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    train, _ = loading.transforms(settings(data, data), config)
    path = found.train.paths[5]
    _cut(path)
    for workers in (0, 2):
        batches = loading.TrainingBatches(found.train, train, settings(data, data, workers=workers), ALONE)
        with pytest.raises(TrainingError) as error:
            list(batches.epoch(0, 0))
        assert str(error.value).startswith(f"image {str(path)!r} cannot be read: ")
        assert "Traceback" not in str(error.value)


class Numbers:
    """Images whose one pixel is their index."""

    labels = range(23)

    def image(self, index):
        return index


def drawn(index):
    """What a transform makes of an image: its index, and a number of each generator."""
    import random

    return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def batches(epoch, skip=0, processes=ALONE, workers=0, seed=3):
    one = settings(Path("data"), Path("run"), batch_size=4, seed=seed, workers=workers)
    found = loading.TrainingBatches(Numbers(), drawn, one, processes)
    return found.count, [images for images, _ in found.epoch(epoch, skip)]


def test_batches_depend_on_seed_epoch_and_image_alone():
    count, first = batches(0)
    assert count == len(first) == 5
    seen = torch.cat(first)[:, 0].tolist()
    assert len(set(seen)) == 20 and seen != sorted(seen)
    before = torch.get_rng_state()
    _, rest = batches(0, skip=2, workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first[2:], rest, strict=True))
    assert torch.cat(batches(1)[1])[:, 0].tolist() != seen != torch.cat(batches(0, seed=4)[1])[:, 0].tolist()
    # An image is drawn anew in each epoch.
    other = {int(row[0]): row for row in torch.cat(batches(1)[1])}
    assert all(not torch.equal(row, other[int(row[0])]) for row in torch.cat(first) if int(row[0]) in other)


def test_processes_share_the_batch_of_one():
    one = settings(Path("data"), Path("run"), batch_size=8)
    alone = loading.TrainingBatches(Numbers(), drawn, one, ALONE).epoch(0, 0)
    shares = [batches(0, processes=Processes(ALONE.device, rank, 2), seed=one.seed)[1] for rank in (0, 1)]
    for (whole, _), *parts in zip(alone, *shares):
        rows = sorted(tuple(row.tolist()) for row in whole)
        assert rows == sorted(tuple(row.tolist()) for part in parts for row in part)


def test_every_image_is_validated_once():
    one = settings(Path("data"), Path("run"), batch_size=4)
    shares = [loading.ValidationBatches(Numbers(), drawn, one, Processes(ALONE.device, rank, 3)) for rank in range(3)]
    batches = [[labels.tolist() for _, labels in share] for share in shares]
    assert sorted(label for share in batches for labels in share for label in labels) == list(range(23))


@pytest.mark.parametrize("count", (2, 5))
def test_processes_validate_the_same_number_of_batches(count, tmp_path):
    """FSDP2 gathers weights in every forward pass; a process without one more batch would be waited for."""

    class Few(Numbers):
        labels = range(9)

    one = settings(tmp_path, tmp_path, batch_size=4 // (count - 1))
    shares = [
        loading.ValidationBatches(Few(), drawn, one, Processes(ALONE.device, rank, count)) for rank in range(count)
    ]
    batches = [[labels.tolist() for _, labels in share] for share in shares]
    assert {len(share) for share in batches} == {2}
    labels = [label for share in batches for labels in share for label in labels]
    assert sorted(label for label in labels if label != loading.NOT_COUNTED) == list(range(9))
    assert labels.count(loading.NOT_COUNTED) == 1


def test_names_have_one_order():
    names = ["b", "A", "a", "2²", "10", "01", "1", "x10y", "x9y"]
    ordered = [path.name for path in sorted(map(Path, names), key=datasets._natural)]
    assert ordered == ["01", "1", "2²", "10", "A", "a", "b", "x9y", "x10y"]
    assert [path.name for path in sorted(map(Path, names[::-1]), key=datasets._natural)] == ordered


def test_digits_are_whole_and_grey(peer, tmp_path):
    peer("sklearn")
    found = datasets.load(settings(None, tmp_path, dataset="digits"), 1, print)
    assert len(found.train.labels) + len(found.val.labels) == 1797 and found.classes == tuple("0123456789")
    image = np.asarray(found.train.image(0))
    assert image.shape == (8, 8) and image.max() == round(15 * 255 / 16)
