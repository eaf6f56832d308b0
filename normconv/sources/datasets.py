"""Labelled images to train on: digits, idx files, CIFAR-10, folders and archives of classes."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normconv.errors import LoadError, MissingDependency, NormconvError, Problem, UsageError
from normconv.sources.labelled_images import IMAGES, ClassImage, class_images, image_decoder
from normconv.sources.specs import is_spec, named_object

__all__ = ["KINDS", "Labelled", "Samples", "digits", "open_labelled"]

KINDS = ("digits", "mnist", "fashion-mnist", "cifar10", "images")
_SEED = 0


class Samples(NamedTuple):
    """Inputs (N, ...) and their labels (N,) int64."""

    inputs: Tensor
    labels: Tensor

    def part(self, chosen: Tensor | slice) -> Samples:
        """Return those of some positions."""
        return Samples(self.inputs[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Labelled:
    """A labelled data set.

    Args:
        train: to learn from.
        test: to judge by.
        classes: how many there are.
        origin: where it comes from, for the report.
    """

    train: Samples
    test: Samples
    classes: int
    origin: str

    def limited(self, limit: int | None) -> Labelled:
        """Return at most so many training samples, and half as many to test on; they are mixed."""
        if limit is None:
            return self
        train, test = self.train, self.test
        return Labelled(
            train.part(_some(len(train.labels), limit)),
            test.part(_some(len(test.labels), math.ceil(limit / 2))),
            self.classes,
            self.origin,
        )

    def digest(self) -> str:
        """Return the SHA-256 of all samples and labels."""
        found = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()


def open_labelled(
    spec: str | Path,
    *,
    limit: int | None = None,
    test_share: float | None = None,
    download: bool = False,
) -> Labelled:
    """Open a labelled data set.

    Images are uint8 (N, C, H, W), digits float32 from 0 to 1.

    Args:
        spec: ``digits``; ``mnist:FOLDER`` or ``fashion-mnist:FOLDER`` with idx files, gzipped or not;
            ``cifar10:FOLDER`` with the Python batches, or with zips of ``train/CLASS/NAME.jpg``;
            ``images:PATH``, or a path alone, for a folder or zip of images in class folders, with
            ``train`` and ``test`` above them or not; ``pkg.mod:factory``, which returns training inputs
            and labels, test inputs and labels.
        limit: at most so many training samples and half as many to test on, drawn with a fixed seed;
            only these are decoded.
        test_share: of a data set in one part, what share is kept to test on.
        download: let torchvision fetch MNIST, Fashion-MNIST or CIFAR-10 into the folder.

    Raises:
        UsageError: no such place or kind, or one part only and no share to test on.
        LoadError: files that are damaged, do not fit one another, or hold no samples.
        MissingDependency: of an optional package.

    >>> data = open_labelled("digits", limit=100)
    >>> data.train.inputs.shape, len(data.test.labels), data.classes
    (torch.Size([100, 1, 8, 8]), 50, 10)
    """
    if test_share is not None and not 0 < test_share < 1:
        raise UsageError(Problem("test_share", f"{test_share} is no share between 0 and 1"))
    kind, where = _kind_of(str(spec))
    if download and kind not in _FETCHED:
        what = f"{kind} is none of {', '.join(_FETCHED)}"
        raise UsageError(Problem("--download", what, "say e.g. --data cifar10:data"))
    if kind in ("digits", "factory"):
        _refuse_share(str(spec), test_share)
        return (_digits() if kind == "digits" else _made(where)).limited(limit)
    folder = Path(where).expanduser()
    if download:
        _download(kind, folder)
    if not folder.exists():
        way_out = f"name one that exists, or take --download with one of {', '.join(_FETCHED)}"
        raise UsageError(Problem("data", f"there is no {folder}", way_out))
    if kind in ("mnist", "fashion-mnist"):
        return _idx(kind, folder, test_share).limited(limit)
    if kind == "cifar10" and (folder / "cifar-10-batches-py").is_dir():
        _refuse_share(str(folder), test_share)
        return _cifar10_batches(folder).limited(limit)
    return _images(kind, folder, limit, test_share)


def _kind_of(spec: str) -> tuple[str, str]:
    """The kind of data and the place of it."""
    kind, colon, where = spec.partition(":")
    if spec == "digits" or (colon and kind in KINDS):
        return kind, where
    path = Path(spec)
    if not path.exists() and is_spec(spec):
        return "factory", spec
    if path.is_dir() and (path / "cifar-10-batches-py").is_dir():
        return "cifar10", spec
    if path.is_dir() and any(_idx_files(path)):
        return "mnist", spec
    return "images", spec


def digits() -> Samples:
    """Return the 1,797 digits that scikit-learn brings: (N, 1, 8, 8) float32 from 0 to 1.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingDependency.needs("scikit-learn", "demo") from None
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return Samples(images, torch.from_numpy(bunch.target).long())


def _digits() -> Labelled:
    train, test = _split(digits(), 0.25)
    return Labelled(train, test, 10, "scikit-learn's digits, 3/4 to train, 1/4 to test")


def _made(spec: str) -> Labelled:
    factory = named_object(spec)
    try:
        made = factory()
    except NormconvError:
        raise
    except Exception as reason:  # it is the user's
        what = f"it raises {type(reason).__name__} ({reason})"
        raise LoadError(Problem(spec, what, "a function without arguments is needed")) from None
    four = "(train inputs, train labels, test inputs, test labels)"
    if not isinstance(made, (tuple, list)) or len(made) != 4:
        raise LoadError(Problem(spec, f"it returns no {four}"))
    try:
        tensors = [torch.as_tensor(value) for value in made]
    except (TypeError, ValueError, RuntimeError) as reason:
        raise LoadError(Problem(spec, f"of its {four} some is no tensor ({reason})")) from None
    if wrong := _unfit(tensors):
        raise LoadError(Problem(spec, wrong))
    tensors = [each.float() if each.dtype == torch.float64 else each for each in tensors]
    train, test = (Samples(x, y.long()) for x, y in (tensors[:2], tensors[2:]))
    return Labelled(train, test, int(torch.cat((train.labels, test.labels)).max()) + 1, spec)


def _unfit(tensors: list[Tensor]) -> str:
    """Say what is wrong with inputs and labels to train and to test on; empty where nothing is."""
    for inputs, labels in (tensors[:2], tensors[2:]):
        shapes = f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)}"
        if not inputs.dim() or labels.dim() != 1 or len(inputs) != len(labels) or not len(labels):
            return f"{shapes} do not belong together"
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            return f"its labels are {labels.dtype}, not whole numbers from 0"
        if int(labels.min()) < 0:
            return f"its labels go down to {int(labels.min())}, not to 0"
        if not bool(torch.isfinite(inputs).all()):
            return "its inputs hold NaN or infinity"
    train, test = tensors[0], tensors[2]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        kinds = [f"{tuple(each.shape[1:])} {each.dtype}" for each in (train, test)]
        return f"a sample to train on is {kinds[0]}, one to test on {kinds[1]}"
    return ""


_FETCHED = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def _torchvision(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingDependency.needs("torchvision", "zoo") from None
    return getattr(datasets, name)


def _download(kind: str, folder: Path) -> None:
    try:
        _torchvision(_FETCHED[kind])(str(folder), download=True)
    except (OSError, RuntimeError) as reason:
        raise LoadError(Problem(f"{kind}:{folder}", f"the download failed ({reason})")) from None


def _cifar10_batches(folder: Path) -> Labelled:
    made = _torchvision("CIFAR10")
    parts = []
    for train in (True, False):
        try:
            part = made(str(folder), train=train)
        except RuntimeError as reason:
            raise LoadError(
                Problem(str(folder), str(reason), "fetch it again: --download")
            ) from None
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Samples(images, torch.tensor(part.targets)))
    return Labelled(parts[0], parts[1], 10, f"CIFAR-10 in {folder.name}")


def _idx_files(folder: Path) -> Iterator[Path]:
    """Image files, also where torchvision puts them."""
    for place in (folder, folder / "MNIST" / "raw", folder / "FashionMNIST" / "raw"):
        for path in sorted(place.glob("*images*idx3-ubyte*")) if place.is_dir() else ():
            if path.suffix == ".gz" or not path.with_name(path.name + ".gz").exists():
                yield path


def _idx(kind: str, folder: Path, test_share: float | None) -> Labelled:
    parts: dict[str, Samples] = {}
    wanted = {"mnist": "FashionMNIST", "fashion-mnist": "MNIST"}[kind]  # not the other one's
    for path in _idx_files(folder):
        if wanted in path.relative_to(folder).parts:
            continue
        part = "train" if "train" in path.name else "t10k"
        if part in parts:
            what = f"there are several files of its {part} part"
            raise UsageError(Problem(str(folder), what, "give each data set a folder of its own"))
        labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        if not labels.exists():
            raise LoadError(Problem(str(path), f"there is no {labels.name} beside it"))
        images = torch.from_numpy(_read_idx(path)).unsqueeze(1)
        parts[part] = Samples(images, torch.from_numpy(_read_idx(labels)).long())
        if len(parts[part].labels) != len(images):
            what = f"{len(images)} images and {len(parts[part].labels)} labels"
            raise LoadError(Problem(str(path), what))
    if not parts:
        what = "there is no *-images-idx3-ubyte file in it, gzipped or not"
        raise LoadError(Problem(str(folder), what, "fetch it: --download"))
    return _labelled(parts, kind, folder, test_share)


def _read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read bytes with their shape in front, see http://yann.lecun.com/exdb/mnist."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        zero, code, dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        if zero or code != 8 or len(raw) != 4 + 4 * dims + math.prod(shape):
            raise ValueError(f"type {code}, shape {shape}, {len(raw)} bytes")
    except (OSError, EOFError, ValueError, struct.error) as reason:
        raise LoadError(
            Problem(str(path), f"it is no whole idx file of bytes ({reason})")
        ) from None
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def _images(kind: str, path: Path, limit: int | None, test_share: float | None) -> Labelled:
    entries = class_images(path)
    if not entries:
        what = "there are no images in class folders in it, in folders or zips"
        raise LoadError(Problem(str(path), what, f"known are {', '.join(IMAGES)}"))
    parts: dict[str, list[ClassImage]] = {}
    for entry in entries:
        parts.setdefault(entry.part, []).append(entry)
    if len(parts) == 1:
        only = next(iter(parts.values()))
        train, test = _cut(len(only), _share(path, test_share))
        parts = {"train": [only[i] for i in train], "test": [only[i] for i in test]}
    else:
        _refuse_share(str(path), test_share)
    numbers = {name: i for i, name in enumerate(sorted({entry.label for entry in entries}))}
    samples = {}
    with image_decoder() as read:
        for part, found in parts.items():
            most = limit if part == "train" or limit is None else math.ceil(limit / 2)
            chosen = [found[i] for i in _some(len(found), most)]
            images = [read(entry) for entry in chosen]
            if len({image.shape for image in images}) > 1:
                raise LoadError(Problem(str(path), "its images differ in size", "scale them first"))
            labels = torch.tensor([numbers[entry.label] for entry in chosen])
            samples[part] = Samples(torch.stack(images), labels)
    origin = f"{kind} in {path.name}, {len(parts['train'])} + {len(parts['test'])} images"
    return Labelled(samples["train"], samples["test"], len(numbers), origin)


def _labelled(
    parts: dict[str, Samples], kind: str, path: Path, test_share: float | None
) -> Labelled:
    if len(parts) == 1:
        ((name, only),) = parts.items()
        train, test = _split(only, _share(path, test_share))
        origin = f"{kind} in {path.name}, its {name} file split in two"
    else:
        _refuse_share(str(path), test_share)
        train, test, origin = parts["train"], parts["t10k"], f"{kind} in {path.name}"
    classes = int(torch.cat((train.labels, test.labels)).max()) + 1
    return Labelled(train, test, classes, origin)


def _refuse_share(where: str, test_share: float | None) -> None:
    if test_share is not None:
        what = "it has a part of its own to test on"
        raise UsageError(Problem("--test-share", f"{where}: {what}", "leave it out"))


def _share(path: Path, test_share: float | None) -> float:
    if test_share is None:
        what = "it has one part only, and nothing to test on"
        raise UsageError(Problem(str(path), what, "keep a share of it: --test-share 0.2"))
    return test_share


def _split(samples: Samples, test_share: float) -> tuple[Samples, Samples]:
    train, test = _cut(len(samples.labels), test_share)
    return samples.part(train), samples.part(test)


def _cut(count: int, test_share: float) -> tuple[Tensor, Tensor]:
    """Positions to train and to test on, mixed with a fixed seed."""
    if count < 2:
        what = f"{count} sample cannot be cut into one part to train and one to test on"
        raise LoadError(Problem("data", what, "give more"))
    order = _some(count, None)
    kept = min(max(1, round(count * test_share)), count - 1)
    return order[: count - kept], order[count - kept :]


def _some(count: int, limit: int | None) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    return order[:limit]
