"""Unlabelled inputs from files: the same numbers every time, bad files told by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from normconv.errors import LoadError, UsageError
from normconv.sources import Transform, open_data, open_source

Image = pytest.importorskip("PIL.Image")


def write_images(folder: Path, count: int = 6, size: tuple[int, int] = (12, 10)) -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")


def test_folder_and_zip_give_the_same_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "images").rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "images"))
    folder = open_data(tmp_path / "images", batch=4)
    packed = open_data(tmp_path / "images.zip", batch=4)
    assert [tuple(batch.shape) for batch in folder] == [(4, 3, 10, 12), (2, 3, 10, 12)]
    assert all(torch.equal(a, b) for a, b in zip(folder, packed, strict=True))
    streamed = open_data(tmp_path / "images", batch=4, limit=None)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(folder, streamed, strict=True))
    assert sum(len(batch) for batch in open_data(tmp_path / "images", limit=5)) == 5


def test_images_are_cropped_and_normalised(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    transform = Transform(mean=(0.5,) * 3, std=(0.25,) * 3, size=8)
    (batch,) = open_data(tmp_path, transform=transform)
    assert batch.shape == (1, 3, 8, 8)
    assert batch.min() >= -2
    assert batch.max() <= 2
    grey = Transform(mean=(0.5,), std=(0.5,))
    assert open_data(tmp_path, transform=grey)[0].shape == (1, 1, 10, 12)


def test_the_models_own_config_is_used() -> None:
    model = torch.nn.Identity()
    assert "ImageNet" in Transform.of(model).origin
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "input_size": (3, 64, 64)}
    assert Transform.of(model).mean == (0.1, 0.2, 0.3)
    assert Transform.of(model).size == 64
    assert Transform.of(model, mean=[0.5] * 3, std=[1] * 3, size=32).size == 32
    with pytest.raises(UsageError, match="3 means and 0 deviations"):
        Transform.of(model, mean=[0.5] * 3)


def test_a_torchvision_models_images_are_those_of_its_weights() -> None:
    """A ramp, in which each pixel says where it was: as torchvision's own transform."""
    models = pytest.importorskip("torchvision").models
    name = "efficientnet_b1"
    model = open_source(f"torchvision:{name}", random_weights=True).model
    transform = Transform.of(model)
    assert (transform.size, transform.resize) == (240, 255)
    across, down = np.meshgrid(np.linspace(0, 255, 400), np.linspace(0, 255, 300))
    image = Image.fromarray(np.stack([across, down, across], -1).astype(np.uint8))
    wanted = models.get_model_weights(name).DEFAULT.transforms()(image)
    assert (transform(image) - wanted).abs().max() < 0.05
    cropped = Transform.of(model, size=240)
    assert cropped.resize is None
    assert (cropped(image) - wanted).abs().max() > 0.1
    given = Transform.of(model, mean=[0.5] * 3, std=[0.5] * 3)
    assert (given.mean, given.size, given.resize) == ((0.5,) * 3, 240, 255)


def test_arrays_and_tensors(tmp_path: Path) -> None:
    floats = torch.randn(10, 3, 4, 4)
    np.savez(tmp_path / "a.npz", floats.numpy())
    np.save(tmp_path / "a.npy", floats.numpy())
    torch.save(floats, tmp_path / "a.pt")
    torch.save((floats, torch.zeros(10)), tmp_path / "labelled.pt")
    save_file({"x": floats}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.npy", "a.pt", "labelled.pt", "a.safetensors"):
        batches = open_data(tmp_path / name, batch=4)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        together = torch.cat(list(batches))
        assert torch.equal(together.sum(), torch.cat(list(open_data(tmp_path / "a.pt"))).sum())
        assert {tuple(row.flatten().tolist()) for row in together} == {
            tuple(row.flatten().tolist()) for row in floats
        }
    torch.save({"ids": torch.arange(6), "mask": torch.ones(6)}, tmp_path / "named.pt")
    named = open_data(tmp_path / "named.pt", batch=4)
    assert [sorted(batch) for batch in named] == [["ids", "mask"], ["ids", "mask"]]
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", images=pixels)
    (batch,) = open_data(tmp_path / "bytes.npz")
    assert batch.shape == (5, 3, 8, 8)
    assert batch.dtype == torch.float32


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_batches.py").write_text(
        "import torch\ndef make():\n    yield torch.ones(2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    source = open_data("my_batches:make")
    assert [len(list(source())) for _ in range(2)] == [1, 1]
    with pytest.raises(UsageError, match="no module"):
        open_data("no_such_batches:make")


def test_bad_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image at all")
    write_images(tmp_path / "mixed", 1)
    write_images(tmp_path / "mixed" / "other", 1, (7, 7))
    torch.save({"x": torch.tensor(3.0)}, tmp_path / "scalar.pt")
    torch.save("text", tmp_path / "text.pt")
    (tmp_path / "x.csv").write_text("1,2")
    for name, said in {
        "empty": "no images",
        "broken": "no image",
        "mixed": "--size",
        "scalar.pt": "no batch of samples",
        "text.pt": "no tensors",
        "x.csv": "no known kind",
        "missing.zip": "no file",
    }.items():
        with pytest.raises((LoadError, UsageError), match=said):
            list(open_data(tmp_path / name))
