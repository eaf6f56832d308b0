"""Finding what an ONNX file tells about the machine that made it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

__all__ = ["leaked_paths"]

_ROOTS = "home|Users|root|tmp|usr|opt|var|mnt|private|Volumes"
_LEAKS = (
    re.compile(r'File "[^"]*", line \d+'),
    re.compile(rf"(?<![\w.\-])/(?:{_ROOTS})/[\w.+\-]+"),
    re.compile(r"(?<![A-Za-z])[A-Za-z]:[\\/]{1,2}\w+"),
    re.compile(r"[\w.+\-]*[\\/][\w.+\-]+\.py\b"),
    re.compile(r"(?:site|dist)-packages"),
)
_SHOWN = 120  # characters of a leak that are shown


def leaked_paths(source: onnx.ModelProto | str | os.PathLike[str]) -> list[str]:
    """List the strings of a file that hold a stack trace or a path of the machine that made it.

    Every string field is read: names, documentation, metadata, attributes. Tensor data is not.

    Args:
        source: a path or a `ModelProto`.
    """
    model = (
        source
        if isinstance(source, onnx.ModelProto)
        else onnx.load(source, load_external_data=False)
    )
    return sorted({f"{place}: {text[:_SHOWN]}" for place, text in _strings(model) if _leaks(text)})


def _leaks(text: str) -> bool:
    return any(prefix in text for prefix in _own_folders()) or any(p.search(text) for p in _LEAKS)


def _own_folders() -> set[str]:
    folders = {
        str(Path.home()),
        str(Path.cwd()),
        sys.prefix,
        sys.base_prefix,
        tempfile.gettempdir(),
    }
    # A root such as "/" would be found everywhere.
    return {folder for folder in folders if len(Path(folder).parts) > 2}


_TENSOR_DATA = frozenset({"raw_data"})


def _strings(message: Any, place: str = "model") -> Iterator[tuple[str, str]]:
    """Walk every text of a protobuf message, with the place it stands at."""
    for field, value in message.ListFields():
        here = f"{place}.{field.name}"
        single = isinstance(value, (str, bytes)) or hasattr(value, "ListFields")
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES) and field.name not in _TENSOR_DATA:
            for item in (value,) if single else value:
                yield here, item if isinstance(item, str) else item.decode(errors="replace")
        elif field.type == field.TYPE_MESSAGE:
            for item in (value,) if single else value:
                yield from _strings(item, here)
