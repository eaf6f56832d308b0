"""Writing ONNX files: one file, or a file and its external data; accepted or rejected."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from normconv.deploy.onnx_graph import initializer_bytes
from normconv.deploy.stream import write_streamed
from normconv.errors import Problem, UsageError
from normconv.files import atomic_path, rejected_path
from normconv.report.certificate import certificate_path

__all__ = ["EXTERNAL_DATA_THRESHOLD", "data_path", "draft", "publish", "save"]

#: A protobuf message ends at 2 GiB; the graph itself needs some of it.
EXTERNAL_DATA_THRESHOLD = (2 << 30) - (64 << 20)

_UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
)

_INLINE_BYTES = 1024  # a shape or a scalar stays in the file: tools read them there


def data_path(path: Path) -> Path:
    """Name the external data of a file.

    >>> data_path(Path("out/net.onnx")).as_posix()
    'out/net.onnx.data'
    """
    return path.with_name(path.name + ".data")


def save(model: ir.Model, path: Path) -> None:
    """Write a graph, its weights beside it when they are too large for one file."""
    if initializer_bytes(model) <= EXTERNAL_DATA_THRESHOLD:
        write_streamed(model, path)
        return
    ir.save(model, path, external_data=data_path(path).name, size_threshold_bytes=_INLINE_BYTES)


@contextmanager
def draft(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path of the same name in a folder beside `path` that is removed in the end.

    Raises:
        UsageError: the disk is full, or takes no file there.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
            yield Path(folder) / final.name
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        what = f"it cannot be written: {error.strerror}; nothing was left there"
        way_out = "free space there, or name a file elsewhere"
        raise UsageError(Problem(str(final), what, way_out)) from error


def publish(written: Path, path: Path, *, accepted: bool) -> Path:
    """Move a draft to its place.

    Args:
        written: the draft, with its external data and its certificate beside it.
        path: the requested name.
        accepted: False moves it to `NAME.rejected`; what stands under `path` is not touched.

    Returns:
        Where the file stands now.
    """
    final = path if accepted else rejected_path(path)
    data = data_path(written)
    if data.exists() and not accepted:
        _relocate(written, data_path(final).name)
    with atomic_path(final) as temporary:
        if data.exists():
            os.replace(data, data_path(temporary))
        if certificate_path(written).exists():
            os.replace(certificate_path(written), certificate_path(temporary))
        os.replace(written, temporary)
    return final


def _relocate(path: Path, location: str) -> None:
    """Let a file look for its external data under another name."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
