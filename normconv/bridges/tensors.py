"""Named tensors that are read one at a time: a dict, a safetensors file, a file in shards."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normconv.errors import LoadError, Problem
from normconv.sources.saving import SHARED
from normconv.sources.tensor_file import json_of

__all__ = [
    "DTYPES",
    "INDEX",
    "Files",
    "InMemory",
    "Spec",
    "Tensors",
    "disagreements",
    "index_of",
    "missing_shard",
    "open_shards",
]

INDEX = ".safetensors.index.json"

#: The names of dtypes in a safetensors header.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Spec(NamedTuple):
    """What is known of a tensor before its numbers are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Tensors(ABC):
    """Tensors by name.

    Args:
        where: the file, for messages.
        specs: of all of them.
        metadata: the text of the file's header.
        shared: names that the file leaves out, with the name of the very same tensor.
        others: what is no tensor (`_extra_state`).
    """

    def __init__(
        self,
        where: str,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str] = MappingProxyType({}),
        shared: Mapping[str, str] = MappingProxyType({}),
        others: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.where = where
        self.specs = specs
        self.metadata = metadata
        self.shared = shared
        self.others = others

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor."""

    @abstractmethod
    def identity(self, name: str) -> Hashable:
        """Return what is equal for two names of one tensor."""

    def home(self, name: str) -> str:
        """Return the file name of the shard that holds it; empty where there are no shards."""
        return ""


class InMemory(Tensors):
    """A state dict as it is."""

    def __init__(self, state_dict: Mapping[str, Any], where: str = "") -> None:
        self._tensors = {k: v for k, v in state_dict.items() if isinstance(v, Tensor)}
        specs = {k: Spec(tuple(v.shape), v.dtype) for k, v in self._tensors.items()}
        others = {k: v for k, v in state_dict.items() if k not in self._tensors}
        super().__init__(where, specs, others=others)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[name].detach()

    def identity(self, name: str) -> Hashable:
        """Return where its numbers lie."""
        value = self._tensors[name]
        if value.is_meta or not value.numel():
            return name
        return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


class Files(Tensors):
    """Safetensors files, opened together, read tensor by tensor.

    Attributes:
        shards: their names, in the index's order.
    """

    def __init__(self, where: str, handles: Mapping[str, Any], homes: Mapping[str, str]) -> None:
        self._handles, self._homes = handles, homes
        self.shards = tuple(handles)
        metadata = {k: v for h in handles.values() for k, v in (h.metadata() or {}).items()}
        shared = _shared(metadata, homes, where)
        slices = {name: handles[home].get_slice(name) for name, home in homes.items()}
        strange = {n: s.get_dtype() for n, s in slices.items() if s.get_dtype() not in DTYPES}
        if strange:
            raise LoadError([Problem(n, f"its dtype {d} is not known") for n, d in strange.items()])
        own = {n: Spec(tuple(s.get_shape()), DTYPES[s.get_dtype()]) for n, s in slices.items()}
        specs = own | {name: own[owner] for name, owner in shared.items()}
        super().__init__(where, specs, metadata, shared)

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file."""
        own = self.shared.get(name, name)
        tensor: Tensor = self._handles[self._homes[own]].get_tensor(own)
        return tensor

    def identity(self, name: str) -> Hashable:
        """Return the name under which it lies in the file."""
        return self.shared.get(name, name)

    def home(self, name: str) -> str:
        """Return the file name of the shard that holds it."""
        return self._homes[self.identity(name)]  # type: ignore[index]


def _shared(metadata: Mapping[str, str], own: Mapping[str, str], where: str) -> dict[str, str]:
    """Names left out because another tensor is the same: as normconv notes them, or safetensors."""
    noted = json_of(metadata, SHARED, where, dict) or metadata
    return {name: owner for name, owner in noted.items() if owner in own and name not in own}


@contextmanager
def open_shards(path: Path) -> Iterator[Files]:
    """Open a safetensors file, or all that an index names.

    Raises:
        LoadError: a file is missing or damaged, or index and files do not agree; names the keys.
    """
    from safetensors import SafetensorError, safe_open

    indexed = index_of(path) if path.name.endswith(INDEX) else None
    files = [path.name] if indexed is None else list(dict.fromkeys(indexed.values()))
    problems: list[Problem] = []
    handles: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in files:
            file = path.parent / name
            if indexed is not None and not file.is_file():
                problems.append(missing_shard(name, indexed))
                continue
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                handles[name] = stack.enter_context(handle)
            except (SafetensorError, OSError, ValueError) as error:
                what = f"is no safetensors file, or damaged ({error})"
                problems.append(Problem(str(file), what, "copy or download it again"))
        held = {name: set(handle.keys()) for name, handle in handles.items()}
        homes = {key: name for name, keys in held.items() for key in keys}
        if indexed is not None:
            problems += disagreements(indexed, held)
        if problems:
            raise LoadError(problems)
        yield Files(str(path), handles, dict(sorted(homes.items())) if indexed is None else indexed)


def index_of(path: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names.

    Raises:
        LoadError: it is no such index, or names what is not a file beside it.
    """
    where = str(path)
    try:
        indexed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(indexed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"is no index of shards ({type(error).__name__}: {error})"
        raise LoadError(Problem(where, what)) from None
    strange = [k for k, v in items.items() if not isinstance(v, str) or Path(v).name != v]
    if strange or not items:
        what = "it names no file beside the index" if strange else "it names no tensor"
        raise LoadError(Problem(_first_of(strange) or where, what))
    return items


def missing_shard(name: str, indexed: Mapping[str, str]) -> Problem:
    """Say that a shard is not there, naming keys that it should hold."""
    keys = [key for key, home in indexed.items() if home == name]
    return Problem(_first_of(keys), f"the shard {name} is missing", "copy it here too")


def disagreements(indexed: Mapping[str, str], held: Mapping[str, set[str]]) -> Iterator[Problem]:
    """Yield the keys that an index and its shards do not have alike."""
    for key, name in indexed.items():
        if name in held and key not in held[name]:
            yield Problem(key, f"the index has it in {name}, which does not hold it")
    for name, keys in held.items():
        for key in sorted(keys):
            if key not in indexed:
                yield Problem(key, f"{name} holds it and the index does not name it")


def _first_of(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
