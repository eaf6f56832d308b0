"""Writing a safetensors file tensor by tensor: shapes are known first, numbers come one at a time.

`safetensors.torch.save_file` needs all tensors in memory. The file is a length, a JSON header with the
place of each tensor, and the bytes, so a tensor can be put into its place whenever it is ready.

Source: the format's description, github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from normconv.bridges.tensors import DTYPES, Spec

__all__ = ["SafetensorsWriter", "header_of", "unwritable"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def unwritable(specs: Mapping[str, Spec]) -> list[str]:
    """Return the tensors whose dtype the format does not have."""
    return [name for name, spec in specs.items() if spec.dtype not in _NAMES]


def header_of(
    specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the head of a file, and where in the file each tensor begins and how long it is.

    The widest dtypes come first, so that every tensor is aligned.
    """
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in order:
        shape, dtype = specs[name]
        size = prod(shape) * dtype.itemsize
        places[name] = (end, size)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: (len(head) + start, size) for name, (start, size) in places.items()}


class SafetensorsWriter:
    """One file that is being written; `write` in any order, each tensor once.

    Args:
        path: where.
        specs: of every tensor that will come.
        metadata: text for the header.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self._specs = specs
        head, self._places = header_of(specs, metadata)
        self._path = path
        path.write_bytes(head)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place; nothing of it is kept."""
        start, size = self._places.pop(name)
        assert Spec(tuple(tensor.shape), tensor.dtype) == self._specs[name], name
        if size:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            with self._path.open("r+b") as stream:
                stream.seek(start)
                stream.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Make sure that every tensor came."""
        assert not self._places, sorted(self._places)
