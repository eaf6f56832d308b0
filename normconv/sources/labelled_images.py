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
    part: str

    @classmethod
    def of(cls, archive: Path | None, inside: str, name: str) -> ClassImage:
        """``test`` where a folder above the class, inside the data, says so, else ``train``."""
        above = Path(inside).parts[:-2]
        part = "test" if any(each.lower() in _TEST for each in above) else "train"
        return cls(archive, name, Path(inside).parent.name, part)


def class_images(path: Path) -> list[ClassImage]:
    """List the images of a zip, of a folder, and of the zips in a folder.

    Raises:
        LoadError: a zip is damaged.
    """
    archives = [path] if path.is_file() else sorted(path.glob("*.zip"))
    found: list[tuple[Path | None, str, str]] = []
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as opened:
                names = sorted(opened.namelist())
        except zipfile.BadZipFile as reason:
            raise LoadError(Problem(str(archive), f"it is no zip ({reason})")) from None
        found += [(archive, name, name) for name in names]
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))
        found += [(None, name, str(path / name)) for name in names]
    entries = [ClassImage.of(*each) for each in found if _is_image(Path(each[1]))]
    return [entry for entry in entries if entry.label]


def _is_image(inside: Path) -> bool:
    """Say so of names inside the data; macOS puts notes on files beside them, under like names."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in inside.parts)
    return inside.suffix.lower() in IMAGES and not hidden


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
