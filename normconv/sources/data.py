"""Unlabelled inputs from files: images in a folder or zip, arrays, tensors, or a factory of batches."""

from __future__ import annotations

import importlib
import io
import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normconv.errors import LoadError, MissingDependency, Problem, UsageError
from normconv.sources.labelled_images import IMAGES
from normconv.sources.recognise import recognise
from normconv.sources.safe_load import safe_load
from normconv.sources.specs import is_spec, named_object
from normconv.sources.trust import Trust

__all__ = ["IMAGENET", "Transform", "open_data"]

#: Mean and deviation of each channel, of values from 0 to 1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SEED = 0
_KEPT = 2**30  # bytes


@dataclass(frozen=True)
class Transform:
    """How an image becomes an input: RGB, scaled and cropped to a square, (x / 255 − mean) / std.

    Args:
        mean: of each channel, of values from 0 to 1.
        std: of each channel.
        size: of the square in pixels; None leaves images as they are.
        resize: what the shorter side is scaled to before the crop; None for the size of the square.
        origin: where the numbers come from.
    """

    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    size: int | None = None
    origin: str = "mean and deviation of ImageNet"
    resize: int | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        size: int | None = None,
    ) -> Transform:
        """Take the numbers given, else those of the model's timm or torchvision config, else ImageNet's.

        >>> Transform.of(nn.Identity(), mean=[0.5], std=[0.5]).origin
        'mean and deviation as given'
        """
        config = (
            getattr(model, "pretrained_cfg", None) or getattr(model, "image_preset", None) or {}
        )
        own = tuple(config.get("mean", ())), tuple(config.get("std", ()))
        side = size or config.get("size") or (config.get("input_size") or (None,))[-1]
        resize = None if size else config.get("resize")
        if mean or std:
            if len(mean) != len(std) or not all(value > 0 for value in std):
                what = f"{len(mean)} means and {len(std)} deviations"
                raise UsageError(
                    Problem("--mean, --std", what, "give one of each a channel, std > 0")
                )
            return cls(tuple(mean), tuple(std), side, _GIVEN, resize)
        if all(own):
            return cls(*own, side, "mean and deviation of the model's own config", resize)
        return cls(size=side)

    def __call__(self, image: Any) -> Tensor:
        """Make a (C, H, W) float32 tensor of a PIL image."""
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        if self.size is not None and image.size != (self.size, self.size):
            shorter = max(self.size, self.resize or self.size)
            scale = shorter / min(image.size)
            image = image.resize([max(shorter, round(side * scale)) for side in image.size])
            left, top = ((side - self.size) // 2 for side in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        return self.normalised(pixels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Take mean and deviation out of (…, C, H, W) with values from 0 to 1."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


_GIVEN = "mean and deviation as given"


@dataclass(frozen=True)
class _Images:
    """Batches of images that are read anew each time."""

    path: Path
    names: tuple[str, ...]
    transform: Transform
    batch: int

    def __iter__(self) -> Iterator[Tensor]:
        read = _reader(self.path)
        for start in range(0, len(self.names), self.batch):
            made = [self._image(read, name) for name in self.names[start : start + self.batch]]
            if len({image.shape for image in made}) > 1:
                what = "its images differ in size"
                raise LoadError(Problem(str(self.path), what, "say what to crop to: --size 224"))
            yield torch.stack(made)

    def kept(self) -> Any:
        """The batches decoded, where they are small; else as they are."""
        batches = iter(self)
        first = list(itertools.islice(batches, 1))
        size = sum(batch.numel() * batch.element_size() for batch in first)
        if size * (len(self.names) / self.batch) > _KEPT:
            return self
        return [*first, *batches]

    def _image(self, read: Callable[[str], bytes], name: str) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            return self.transform(Image.open(io.BytesIO(read(name))))
        except (UnidentifiedImageError, OSError) as reason:
            raise LoadError(Problem(f"{self.path}: {name}", f"no image ({reason})")) from None


def open_data(
    spec: str | Path,
    *,
    transform: Transform | None = None,
    batch: int = 64,
    limit: int | None = 256,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """Open unlabelled data as batches that can be gone through again and again.

    Args:
        spec: a folder or zip of images; ``.npz`` (its first array; uint8 of (N, H, W, C) are images),
            ``.pt`` or ``.safetensors`` with tensors; or ``pkg.mod:factory``, called for each pass.
        transform: of images.
        batch: samples a batch.
        limit: at most so many samples, drawn evenly with a fixed seed; None for all.
        share: (rank, processes): of these every so manieth, a part of the whole for each process.

    Images that take less than a GiB are decoded once, others in each pass anew.

    Raises:
        UsageError: there is no such file, or its kind is unknown.
        LoadError: it holds nothing that could be an input.
    """
    transform = transform or Transform()
    path = Path(spec)
    if not path.exists():
        if is_spec(str(spec)):
            return _part(named_object(str(spec)), *share)
        raise UsageError(
            Problem("data", f"there is no file {spec}", "name a folder, a file or a factory")
        )
    if path.is_dir() or path.suffix.lower() == ".zip":
        names = _image_names(path)
        if not names:
            kinds = ", ".join(IMAGES)
            raise LoadError(Problem(str(path), "there are no images in it", f"known are {kinds}"))
        return _Images(path, tuple(_some(names, limit, share)), transform, batch).kept()
    tensors = _tensors(path, transform)
    length = min(len(tensor) for tensor in tensors.values())
    chosen = torch.tensor(_some(range(length), limit, share))
    parts = {name: tensor[chosen].split(batch) for name, tensor in tensors.items()}
    if len(parts) == 1:
        return list(next(iter(parts.values())))
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _some(items: Sequence[Any], limit: int | None, share: tuple[int, int]) -> list[Any]:
    """All, or as many as are asked for, or a part of them: the same each time, in a mixed order."""
    order = np.random.default_rng(_SEED).permutation(len(items))[:limit]
    rank, processes = share
    return [items[index] for index in order[rank::processes]]


def _part(factory: Callable[[], Iterable[Any]], rank: int, processes: int) -> Any:
    """A factory of every so manieth batch."""
    if processes == 1:
        return factory
    return lambda: itertools.islice(factory(), rank, None, processes)


def _image_names(path: Path) -> list[str]:
    if path.is_dir():
        found = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    else:
        with zipfile.ZipFile(path) as archive:
            found = archive.namelist()
    return sorted(name for name in found if Path(name).suffix.lower() in IMAGES)


def _reader(path: Path) -> Callable[[str], bytes]:
    try:
        importlib.import_module("PIL")
    except ImportError:
        raise MissingDependency.needs("Pillow", "images") from None
    if path.is_dir():
        return lambda name: (path / name).read_bytes()
    return zipfile.ZipFile(path).read


def _tensors(path: Path, transform: Transform) -> dict[str, Tensor]:
    ending = path.suffix.lower()
    document: Any
    if ending in (".npz", ".npy"):
        with np.load(path, allow_pickle=False) if ending == ".npz" else _Single(path) as arrays:
            document = torch.from_numpy(arrays[next(iter(arrays))])
    elif ending == ".safetensors":
        from safetensors.torch import load_file

        document = load_file(path)
    elif ending in (".pt", ".pth"):
        document = safe_load(path, recognise(path), Trust())
    else:
        what = f"{path.name} is of no known kind"
        raise UsageError(Problem("data", what, "give .zip, .npz, .pt, .safetensors or a folder"))
    if isinstance(document, list) and _are_batches_of_one_input(document):
        document = torch.cat(document)
    if isinstance(document, (tuple, list)) and document:
        document = document[0]  # what follows are labels
    if isinstance(document, Tensor):
        document = {"": document}
    if not isinstance(document, dict) or not document:
        raise LoadError(Problem(str(path), f"holds a {type(document).__name__}, no tensors"))
    wrong = [str(name) for name, value in document.items() if not _is_batch(value)]
    if wrong:
        raise LoadError(
            Problem(str(path), f"no batch of samples at {', '.join(wrong) or 'its top'}")
        )
    return {name: _as_input(value, transform) for name, value in document.items()}


class _Single(dict[str, Any]):
    """One array as an archive of one."""

    def __init__(self, path: Path) -> None:
        super().__init__({"": np.load(path, allow_pickle=False)})

    def __enter__(self) -> _Single:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _are_batches_of_one_input(items: list[Any]) -> bool:
    return all(map(_is_batch, items)) and len({item.shape[1:] for item in items}) == 1


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0


def _as_input(value: Tensor, transform: Transform) -> Tensor:
    """Images as bytes become inputs; everything else is one already."""
    if value.dtype != torch.uint8 or value.dim() != 4:
        return value
    if value.shape[-1] in (1, 3):
        value = value.permute(0, 3, 1, 2)
    if value.shape[1] != len(transform.mean):
        what = f"images of {value.shape[1]} channels, means and deviations of {len(transform.mean)}"
        raise UsageError(Problem("data", what, "give one of each a channel (--mean, --std)"))
    return transform.normalised(value.float() / 255)
