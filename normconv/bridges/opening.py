"""Opening checkpoints of every kind: each dict of tensors in them, to be read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normconv.bridges.tensors import (
    INDEX,
    InMemory,
    Tensors,
    disagreements,
    index_of,
    missing_shard,
    open_shards,
)
from normconv.errors import LoadError, Problem, UsageError
from normconv.sources.checkpoints import candidates, choose, modules_in
from normconv.sources.recognise import FileKind, recognise
from normconv.sources.safe_load import safe_load
from normconv.sources.trust import Trust

__all__ = ["Opened", "opened", "shapes_of"]


_PICKLED_INDEX = ".bin.index.json"


@dataclass(frozen=True)
class Opened:
    """A checkpoint.

    Args:
        sections: the dicts of tensors in it, by their dotted keys; the key is empty for the whole.
        document: what `torch.save` wrote; None for safetensors, and with a key.
        shards: the file names of shards, in order; empty for one file.
    """

    sections: Mapping[str, Tensors]
    document: Any = None
    shards: tuple[str, ...] = ()


@contextmanager
def opened(path: Path, *, key: str | None = None, trust: Sequence[str] = ()) -> Iterator[Opened]:
    """Open a checkpoint; what it holds can be read inside the block.

    Args:
        path: ``.safetensors``, a file of `torch.save`, which is mapped, or an index of either.
        key: only the weights under this dotted key.
        trust: what a file of `torch.save` may name beyond the list.

    Raises:
        UsageError: there is no such file or key.
        LoadError: it is damaged, a shard is missing, or it holds no weights or a whole model.
    """
    where, indexed = str(path), path.name.endswith(INDEX) and path.is_file()
    if path.name.endswith(_PICKLED_INDEX) and path.is_file():
        if key is not None:
            raise UsageError(Problem("--key", f"{path.name} names tensors, which do not nest"))
        yield Opened({"": _merged(path, Trust.parse(trust))})
        return
    kind = FileKind.SAFETENSORS if indexed else recognise(path)
    if kind is FileKind.SAFETENSORS:
        if key is not None:
            raise UsageError(Problem("--key", f"{path.name} is safetensors, which does not nest"))
        with open_shards(path) as tensors:
            yield Opened({"": tensors}, shards=tensors.shards if indexed else ())
        return
    document = safe_load(path, kind, Trust.parse(trust), mmap=True)
    if modules_in(document):
        what = "holds a whole model, not a state dict"
        raise LoadError(Problem(where, what, "normconv fold or convert takes it"))
    if key is not None:
        found = choose(document, nn.Identity(), key, where)[0]  # a key needs no model
        yield Opened({"": InMemory(found.tensors, where)})
        return
    sections: dict[str, Tensors] = {
        one.key: InMemory(one.tensors, where) for one in candidates(document)
    }
    if not sections:
        raise LoadError(Problem(where, "holds no state dict", "pass a file with one"))
    yield Opened(sections, document)


def _merged(path: Path, trust: Trust) -> InMemory:
    """Map the files of `torch.save` that an index names, as one state dict."""
    indexed = index_of(path)
    problems: list[Problem] = []
    held: dict[str, Mapping[str, Any]] = {}
    for name in dict.fromkeys(indexed.values()):
        file = path.parent / name
        if not file.is_file():
            problems.append(missing_shard(name, indexed))
            continue
        document = safe_load(file, recognise(file), trust, mmap=True)
        found = [one.tensors for one in candidates(document) if not one.key]
        if found:
            held[name] = found[0]
        else:
            problems.append(Problem(str(file), "holds no state dict"))
    problems += disagreements(indexed, {name: set(tensors) for name, tensors in held.items()})
    if problems:
        raise LoadError(problems)
    return InMemory({key: held[name][key] for key, name in indexed.items()}, str(path))


def shapes_of(
    like: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes and the metadata of a checkpoint in memory or in a file.

    Raises:
        UsageError: there is no such file, or it holds several state dicts.
    """
    if isinstance(like, Mapping):
        return {name: spec.shape for name, spec in InMemory(like).specs.items()}, {}
    with opened(Path(like)) as found:
        if len(found.sections) > 1:
            names = ", ".join(found.sections)
            raise UsageError(Problem(str(like), f"holds several state dicts: {names}"))
        (tensors,) = found.sections.values()
        return {name: spec.shape for name, spec in tensors.specs.items()}, dict(tensors.metadata)
