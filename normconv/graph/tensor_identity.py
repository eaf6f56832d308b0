"""Which call made the values of a tensor, while a model really runs.

Tensors are followed by their memory, never by Python's `id`, which is given out again after a tensor is
freed: a weak reference keeps the address of a storage reserved and none of its memory. A tensor is a
view (offset, sizes, strides) into a storage. Writing through one view makes every other view of that
storage stale: what is read through a stale one comes from the call that wrote last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Key", "Memory", "Place", "View", "key_of", "view_of"]

Key = tuple[str, int]
"""A storage, or a tensor that has none (sparse layouts)."""
Place = tuple[int, tuple[int, ...]] | int
"""The call that made a tensor: its index, for a part of a nested output with the path into it."""
View = tuple[Any, ...]
"""Where in its memory a tensor lies."""


def key_of(tensor: Tensor) -> Key:
    """Name the memory a tensor lies in.

    >>> import torch
    >>> x = torch.zeros(4)
    >>> key_of(x) == key_of(x[1:]), key_of(x) == key_of(x.clone())
    (True, False)
    """
    try:
        return "storage", tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return "tensor", id(tensor)


def view_of(tensor: Tensor) -> View:
    """Say where in its memory a tensor lies: offset, strides, shape and how the numbers are read."""
    try:
        where = (tensor.storage_offset(), tuple(tensor.stride()))
    except (NotImplementedError, RuntimeError):
        where = (0, ())
    return (*where, tuple(tensor.shape), tensor.dtype, tensor.is_conj(), tensor.is_neg())


class Memory:
    """Keeps, for each storage, the call that wrote it last and the calls that made views of it."""

    def __init__(self) -> None:
        self._kept: dict[Key, StorageWeakRef | Tensor] = {}
        self._writer: dict[Key, int] = {}
        self._views: dict[Key, dict[View, Place]] = {}

    def knows(self, key: Key) -> bool:
        """Say whether some call is known to have written the memory."""
        return key in self._writer

    def hold(self, tensor: Tensor) -> Key:
        """Reserve the name of the tensor's memory for as long as this object lives."""
        key = key_of(tensor)
        if key not in self._kept:
            whole = key[0] == "tensor"
            self._kept[key] = tensor if whole else StorageWeakRef(tensor.untyped_storage())
        return key

    def write(self, key: Key, index: int) -> None:
        """Note that a call wrote the memory: views of it that were taken before are stale."""
        self._writer[key] = index
        self._views[key] = {}

    def put(self, tensor: Tensor, place: Place) -> None:
        """Note which call made this very tensor, of memory that is known."""
        self._views[key_of(tensor)][view_of(tensor)] = place

    def maker(self, tensor: Tensor) -> Place | None:
        """Return what made this very tensor; None where it is stale or was never seen."""
        return self._views.get(key_of(tensor), {}).get(view_of(tensor))

    def writer(self, key: Key) -> int:
        """Return the call that wrote the memory last."""
        return self._writer[key]

    def alive(self) -> Iterator[Key]:
        """Yield the memory that somebody outside still holds."""
        for key, kept in self._kept.items():
            if key in self._writer and isinstance(kept, StorageWeakRef) and not kept.expired():
                yield key
