"""What the original's norms get on each batch: from a pass each time, or kept on disk from the first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normconv.calibration.batches import Batches
from normconv.calibration.passes import Partial
from normconv.errors import Problem, UsageError

__all__ = ["Cache", "Read", "Reader", "original_inputs"]

Cache = Literal["none", "disk"]
Read = Callable[[int, tuple[Any, ...], dict[str, Any]], dict[str, list[Tensor]]]
Reader = Callable[[Sequence[str]], Read]


@contextmanager
def original_inputs(
    original: nn.Module, sites: Sequence[str], data: Batches, cache: Cache
) -> Iterator[Reader]:
    """Give a function that for some sites gives one of (number of the batch, inputs) to theirs.

    With ``disk`` the original is run once over all the data and its norms' inputs are kept in a
    temporary folder until the end; else it is run as far as those sites for each of them.

    Raises:
        UsageError: an unknown cache, or the disk has no room.
    """
    if cache == "none":
        yield lambda some: _passes(original, some)
    elif cache == "disk":
        with tempfile.TemporaryDirectory(prefix="normconv-") as folder:
            _keep(original, sites, data, Path(folder))
            yield lambda some: _files(Path(folder), sites, some)
    else:
        raise UsageError(Problem("cache", f"{cache!r} is unknown", "take none or disk"))


def _passes(original: nn.Module, sites: Sequence[str]) -> Read:
    partial = Partial(original, {site: site for site in sites})
    return lambda batch, args, kwargs: partial.inputs(args, kwargs)


def _files(folder: Path, every: Sequence[str], sites: Sequence[str]) -> Read:
    place_of = {site: place for place, site in enumerate(every)}

    def read(batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
        return {site: torch.load(folder / f"{batch}-{place_of[site]}.pt") for site in sites}

    return read


def _keep(original: nn.Module, sites: Sequence[str], data: Batches, folder: Path) -> None:
    read = _passes(original, sites)
    for batch, (args, kwargs) in enumerate(data):
        found = read(batch, args, kwargs)
        size = sum(t.numel() * t.element_size() for each in found.values() for t in each)
        if size > (free := shutil.disk_usage(folder).free):
            what = (
                f"a batch takes {size >> 20} MiB, and after {batch} batches {folder.parent} has "
                f"{free >> 20} MiB left"
            )
            raise UsageError(Problem("cache", what, "set TMPDIR, give less data, or leave it out"))
        for place, site in enumerate(sites):
            torch.save(found[site], folder / f"{batch}-{place}.pt")
