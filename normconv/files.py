"""Writing files so that a reader sees the old file or the whole new one, and hashing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normconv.errors import Problem, UsageError

__all__ = ["atomic_folder", "atomic_path", "rejected_path", "sha256_of", "write_json"]

_BLOCK = 1 << 20


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path of the same name to write to, and move what stands there to `path`.

    The temporary folder is made beside `path`, so the move is a rename. Companions written next to
    the temporary file (external data of an ONNX file) move with it, before it: whoever sees the new
    file sees its companions. On an exception everything temporary is removed and `path` is untouched.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    final = Path(path)
    if final.is_dir():
        raise UsageError(Problem(str(final), "it is a folder", "name a file in it"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise UsageError(Problem(str(final), f"nothing can be written there: {error}")) from None
    try:
        temporary = folder / final.name
        yield temporary
        written = sorted(folder.iterdir(), key=lambda entry: entry == temporary)
        for entry in written:
            os.replace(entry, final.parent / entry.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder of the same name to fill, and move it to `path`, whole, at the end.

    It is made beside `path`, so the move is a rename. On an exception it is removed and `path` is
    untouched.

    Raises:
        UsageError: something stands at `path` that is no empty folder, or nothing can be written there.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a"
    >>> with atomic_folder(target) as temporary:
    ...     _ = (temporary / "b.txt").write_text("whole")
    >>> [entry.name for entry in target.iterdir()]
    ['b.txt']
    """
    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        what = "holds files already" if final.is_dir() else "is a file"
        raise UsageError(Problem(str(final), what, "name a new or an empty folder"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        around = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise UsageError(Problem(str(final), f"nothing can be written there: {error}")) from None
    try:
        # Made in the private one, the folder has the permissions that the umask gives.
        temporary = around / final.name
        temporary.mkdir()
        yield temporary
        if final.exists():
            final.rmdir()
        os.replace(temporary, final)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def rejected_path(path: str | os.PathLike[str]) -> Path:
    """Name the file that a failed check leaves instead of `path`.

    >>> rejected_path("out/model.onnx").as_posix()
    'out/model.onnx.rejected'
    """
    path = Path(path)
    return path.with_name(path.name + ".rejected")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write a JSON document atomically, indented, with a closing newline."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
