"""Labelled data: every kind of file is read right, and what is wrong with it is told."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normconv.errors import LoadError, NormconvError, UsageError
from normconv.sources.datasets import Labelled, open_labelled


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def numbered(count: int, first: int = 0) -> np.ndarray[Any, Any]:
    """Images of one number each."""
    values = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None], (count, 4, 5)).copy()


def write_idx(folder: Path, part: str, count: int, *, prefix: str = "", packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = (np.arange(count) % 3).astype(np.uint8)
    for kind, array in (("images-idx3", numbered(count)), ("labels-idx1", labels)):
        raw = idx(array)
        name = f"{prefix}{part}-{kind}-ubyte" + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(raw) if packed else raw)


def pairs(data: Labelled) -> list[list[tuple[int, int]]]:
    """The first pixel of each image, with its label."""
    return [
        list(zip(part.inputs[:, 0, 0, 0].tolist(), part.labels.tolist(), strict=True))
        for part in (data.train, data.test)
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_idx_files(packed: bool, place: str, tmp_path: Path) -> None:
    write_idx(tmp_path / place, "train", 9, packed=packed)
    write_idx(tmp_path / place, "t10k", 6, packed=packed)
    for spec in (f"mnist:{tmp_path}", str(tmp_path)):
        data = open_labelled(spec)
        assert data.train.inputs.shape == (9, 1, 4, 5)
        assert data.train.inputs.dtype == torch.uint8
        assert data.classes == 3
        assert pairs(data) == [[(i, i % 3) for i in range(n)] for n in (9, 6)]


def test_the_other_data_set_beside_it_is_not_taken(tmp_path: Path) -> None:
    for number, name in enumerate(("MNIST", "FashionMNIST")):
        for part in ("train", "t10k"):
            write_idx(tmp_path / name / "raw", part, 5 + number, packed=False)
    assert len(open_labelled(f"mnist:{tmp_path}").train.labels) == 5
    assert len(open_labelled(f"fashion-mnist:{tmp_path}").train.labels) == 6


def test_one_part_is_split_where_that_is_asked_for(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 20, prefix="mnist-", packed=True)
    with pytest.raises(UsageError, match=r"one part only, .*--test-share"):
        open_labelled(f"mnist:{tmp_path}")
    data = open_labelled(f"mnist:{tmp_path}", test_share=0.25)
    train, test = pairs(data)
    assert (len(train), len(test)) == (15, 5)
    assert sorted(train + test) == [(i, i % 3) for i in range(20)]
    assert pairs(open_labelled(f"mnist:{tmp_path}", test_share=0.25)) == [train, test]
    with pytest.raises(UsageError, match="no share between 0 and 1"):
        open_labelled(f"mnist:{tmp_path}", test_share=1.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "no whole idx file"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "type 13"),
        (lambda raw: b"", "no whole idx file"),
    ],
)
def test_damaged_idx_files_are_told(damage: Any, message: str, tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 9, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LoadError, match=message):
        open_labelled(f"mnist:{tmp_path}", test_share=0.2)


def test_labels_that_do_not_fit_are_told(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 9, packed=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(8, np.uint8)))
    with pytest.raises(LoadError, match="9 images and 8 labels"):
        open_labelled(f"mnist:{tmp_path}", test_share=0.2)
    labels.unlink()
    with pytest.raises(LoadError, match="there is no train-labels-idx1-ubyte beside it"):
        open_labelled(f"mnist:{tmp_path}", test_share=0.2)


def picture(value: int, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(stream, "PNG")
    return stream.getvalue()


def archive(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as opened:
        for name, raw in entries.items():
            opened.writestr(name, raw)


def test_zips_with_train_and_test_folders(tmp_path: Path) -> None:
    """Several zips are one data set, as CIFAR-10 comes in."""
    for number in (1, 2):
        entries = {f"train/{c}/{number}.png": picture(10 * number + i) for i, c in enumerate("ba")}
        archive(tmp_path / f"train-{number}.zip", {**entries, "train/": b"", "README.md": b"?"})
    archive(tmp_path / "test.zip", {"test/a/0.png": picture(99)})
    data = open_labelled(f"cifar10:{tmp_path}")
    assert data.train.inputs.shape == (4, 3, 4, 6)
    train, test = pairs(data)
    assert sorted(train) == [(10, 1), (11, 0), (20, 1), (21, 0)]
    assert test == [(99, 0)]
    assert data.train.inputs[0, :, 0, 0].tolist()[1:] == [0, 255]
    assert data.classes == 2


def test_class_folders_are_split(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            raw = picture(number + 100 * (name == "dog"), "L")
            (tmp_path / name / f"{number}.png").write_bytes(raw)
    data = open_labelled(tmp_path, test_share=0.25)
    train, test = pairs(data)
    assert (len(train), len(test)) == (6, 2)
    assert data.train.inputs.shape == (6, 1, 4, 6), "grey stays grey"
    assert all(label == (value >= 100) for value, label in train + test)
    limited = open_labelled(tmp_path, test_share=0.25, limit=3)
    assert (len(limited.train.labels), len(limited.test.labels)) == (3, 2)
    (tmp_path / "cat" / "0.png").write_bytes(picture(1, "L", (7, 7)))
    with pytest.raises(LoadError, match="differ in size; scale them first"):
        open_labelled(tmp_path, test_share=0.25)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(LoadError, match="no image"):
        open_labelled(tmp_path, test_share=0.25)


def test_cifar10_batches_are_read_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(LoadError, match="not found or corrupted"):
        open_labelled(f"cifar10:{tmp_path}")
    asked = []

    class Fake:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            asked.append((root, train, download))
            self.data = np.full((3 if train else 2, 32, 32, 3), (1, 2, 3), np.uint8)
            self.targets = [0, 1, 9][: len(self.data)]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    data = open_labelled(f"cifar10:{tmp_path}", download=True)
    assert asked[0] == (str(tmp_path), True, True)
    assert data.train.inputs.shape == (3, 3, 32, 32)
    assert data.test.inputs[0, :, 0, 0].tolist() == [1, 2, 3]
    assert data.train.labels.tolist() == [0, 1, 9]


def test_a_factory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "def made():\n"
        "    x = torch.rand(5, 2)\n"
        "    return x, torch.arange(5) % 2, torch.rand(3, 2), torch.tensor([0, 1, 2])\n"
        "def crooked():\n"
        "    return torch.rand(5, 2), torch.zeros(4), torch.rand(3, 2), torch.zeros(3)\n"
        "def other():\n"
        "    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    data = open_labelled("own_data:made", limit=4)
    assert data.classes == 3
    assert (len(data.train.labels), len(data.test.labels)) == (4, 2)
    with pytest.raises(
        LoadError, match=r"inputs \(5, 2\) and labels \(4,\) do not belong together"
    ):
        open_labelled("own_data:crooked")
    with pytest.raises(LoadError, match="returns no"):
        open_labelled("own_data:other")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("1 / 0", r"raises ZeroDivisionError \(division by zero\)"),
        ("(x, y, x[:, :1], y)", r"to train on is \(2,\) torch.float32, one to test on \(1,\)"),
        ("(x, y - 1, x, y)", "labels go down to -1"),
        ("(x, y + 0.5, x, y)", "labels are torch.float32, not whole numbers"),
        ("(x, y, x / 0, y)", "inputs hold NaN or infinity"),
        ("(['a'], [0], x, y)", "some is no tensor"),
        ("(x, y, x[:0], y[:0])", "do not belong together"),
        ("(torch.tensor(1.), y, x, y)", "do not belong together"),
    ],
)
def test_factories_of_unsound_data(
    made: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["import torch", "def make():", "    x, y = torch.ones(4, 2), torch.arange(4) % 2"]
    name = f"unsound_{abs(hash(made))}"
    (tmp_path / f"{name}.py").write_text("\n".join([*lines, f"    return {made}"]) + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=message):
        open_labelled(f"{name}:make")


def test_what_lies_above_the_data_says_nothing_of_its_parts(tmp_path: Path) -> None:
    root = tmp_path / "test" / "pictures"
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            path = root / part / "cat" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number, "L", (4, 4)))
    data = open_labelled(root)
    assert (len(data.train.labels), len(data.test.labels)) == (3, 2)
    with pytest.raises(UsageError, match="has a part of its own to test on; leave it out"):
        open_labelled(root, test_share=0.5)


def test_notes_beside_files_are_no_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"cat/{number}.png", picture(number, "L", (4, 4)))
            archive.writestr(f"__MACOSX/cat/._{number}.png", b"\0\5\26\7")
            archive.writestr(f".thumbs/{number}.png", b"none")
    data = open_labelled(tmp_path / "made.zip", test_share=0.5)
    assert (len(data.train.labels), len(data.test.labels), data.classes) == (2, 2, 1)


def test_a_single_image_has_no_part_to_test_on(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(picture(0, "L", (4, 4)))
    with pytest.raises(LoadError, match="1 sample cannot be cut into one part to train"):
        open_labelled(tmp_path, test_share=0.5)


def test_digits_are_the_same_each_time() -> None:
    data = open_labelled("digits", limit=50)
    assert data.digest() == open_labelled("digits", limit=50).digest()
    assert data.digest() != open_labelled("digits", limit=51).digest()
    assert (len(data.train.labels), len(data.test.labels)) == (50, 25)
    whole = open_labelled("digits")
    assert len(whole.train.labels) + len(whole.test.labels) == 1797
    assert 0 <= whole.train.inputs.min() < whole.train.inputs.max() <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist:nowhere", "there is no nowhere; name one that exists"),
        ("nowhere.zip", "there is no nowhere.zip"),
        ("cifar10:.", "no images in class folders"),
        ("mnist:.", "there is no .*images-idx3-ubyte file"),
    ],
)
def test_places_without_data_are_told(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NormconvError, match=message):
        open_labelled(spec)


def test_only_known_data_sets_are_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images is none of mnist, fashion-mnist, cifar10"):
        open_labelled(f"images:{tmp_path}", download=True)
