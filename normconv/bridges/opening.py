"""Opening checkpoints of every kind: each dict of tensors in them, to be read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normconv.bridges.tensors import INDEX, InMemory, Tensors, open_shards
from normconv.errors import LoadError, Problem, UsageError
from normconv.sources.checkpoints import candidates, choose, modules_in
from normconv.sources.recognise import FileKind, recognise
from normconv.sources.safe_load import safe_load
from normconv.sources.trust import Trust

__all__ = ["Opened", "opened", "shapes_of"]


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
        path: ``.safetensors``, an index of such files, or a file of `torch.save`, which is mapped.
        key: only the weights under this dotted key.
        trust: what a file of `torch.save` may name beyond the list.

    Raises:
        UsageError: there is no such file or key.
        LoadError: it is damaged, a shard is missing, or it holds no weights or a whole model.
    """
    where, indexed = str(path), path.name.endswith(INDEX) and path.is_file()
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
