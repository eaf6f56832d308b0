"""Images in class folders, in folders or zips: which there are, and decoding them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normconv.errors import LoadError, MissingDependency, Problem

__all__ = ["IMAGES", "ClassImage", "class_images", "image_decoder"]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
_TEST = ("test", "val", "valid", "validation")


class ClassImage(NamedTuple):
    """An image, in a file of its own or in an archive; its folder is its class."""

    archive: Path | None
    name: str
    label: str

    @property
    def part(self) -> str:
        """``test`` where a folder above the class says so, else ``train``."""
        above = Path(self.name).parts[:-2]
        return "test" if any(name.lower() in _TEST for name in above) else "train"


def class_images(path: Path) -> list[ClassImage]:
    """List the images of a zip, of a folder, and of the zips in a folder.

    Raises:
        LoadError: a zip is damaged.
    """
    archives = [path] if path.is_file() else sorted(path.glob("*.zip"))
    found = []
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as opened:
                names = sorted(opened.namelist())
        except zipfile.BadZipFile as reason:
            raise LoadError(Problem(str(archive), f"it is no zip ({reason})")) from None
        found += [ClassImage(archive, name, Path(name).parent.name) for name in names]
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))
        found += [ClassImage(None, str(path / name), Path(name).parent.name) for name in names]
    known = [entry for entry in found if Path(entry.name).suffix.lower() in IMAGES]
    return [entry for entry in known if entry.label]


@contextmanager
def image_decoder() -> Iterator[Callable[[ClassImage], Tensor]]:
    """Give a function that decodes an image to uint8 (C, H, W)."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependency.needs("Pillow", "images") from None
    opened: dict[Path, zipfile.ZipFile] = {}

    def read(entry: ClassImage) -> Tensor:
        try:
            if entry.archive is None:
                raw = Path(entry.name).read_bytes()
            else:
                if entry.archive not in opened:
                    opened[entry.archive] = zipfile.ZipFile(entry.archive)
                raw = opened[entry.archive].read(entry.name)
            image = Image.open(io.BytesIO(raw))
            pixels = np.array(image.convert("L" if image.mode == "L" else "RGB"))
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile) as reason:
            raise LoadError(Problem(entry.name, f"no image ({reason})")) from None
        made = torch.from_numpy(pixels)
        return made.unsqueeze(0) if made.dim() == 2 else made.permute(2, 0, 1).contiguous()

    try:
        yield read
    finally:
        for archive in opened.values():
            archive.close()
