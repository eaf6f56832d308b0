"""Tell from a file's first bytes what it is, and say what to do with what is no model."""

from __future__ import annotations

import difflib
import enum
import zipfile
from pathlib import Path

from normconv.errors import LoadError, Problem, UsageError

__all__ = ["FileKind", "recognise"]


class FileKind(enum.Enum):
    """The files that are read."""

    ZIP = "torch zip"
    LEGACY = "torch before 1.6, or a plain pickle"
    SAFETENSORS = "safetensors"


_HEAD = 4096
_TEXT_STARTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"<!doctype html", "is an HTML page, not a model", "download the file itself"),
    (b"<html", "is an HTML page, not a model", "download the file itself"),
    (b"<?xml", "is an XML document, not a model", "download the file itself"),
)
_STARTS = (
    (b"\x89HDF", "is an HDF5 file (Keras), not a PyTorch model", ""),
    (b"\x1f\x8b", "is gzip-compressed", "decompress it first"),
    (b"\x93NUMPY", "is a NumPy array, not a model", ""),
    (b"BZh", "is bzip2-compressed", "decompress it first"),
    (b"TRTE", "is a TensorRT engine", "pass the PyTorch model it was made from"),
    (b"ftrt", "is a TensorRT engine", "pass the PyTorch model it was made from"),
    (b"GGUF", "is a GGUF file", "pass the PyTorch model it was made from"),
)
_SOURCE = "pass the PyTorch module it was made from"


def recognise(path: Path) -> FileKind:
    """Return what kind of model file stands at `path`.

    Raises:
        UsageError: when there is none, with names that are close.
        LoadError: when it is something else, damaged or empty, saying what.
    """
    where = str(path)
    if not path.exists():
        raise UsageError(Problem(where, "there is no such file", _close_names(path)))
    if path.is_dir():
        raise LoadError(Problem(where, "is a folder, not a model file", _folder_way_out(path)))
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD)
            size = path.stat().st_size
    except OSError as error:
        raise LoadError(Problem(where, f"cannot be read ({error.strerror})")) from None
    if not head:
        raise LoadError(Problem(where, "is empty", "copy or download it again"))
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return FileKind.ZIP
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and len(head) > 8:
        if header + 8 > size:
            raise LoadError(Problem(where, "is truncated", "copy or download it again"))
        return FileKind.SAFETENSORS
    for start, what, way_out in (*_TEXT_STARTS, *_STARTS):
        if head.lstrip().lower().startswith(start) or head.startswith(start):
            raise LoadError(Problem(where, what, way_out))
    if path.suffix.lower() in (".onnx", ".ort"):
        raise LoadError(Problem(where, "is an ONNX model, not a PyTorch module", _SOURCE))
    if path.suffix.lower() == ".safetensors":
        raise LoadError(Problem(where, "is no safetensors file, or damaged"))
    if head[257:262] == b"ustar":
        what = "is a tar archive (torch before 0.1.10, or a folder packed)"
        raise LoadError(Problem(where, what, "unpack it, or save it again with a newer torch"))
    if head.startswith(b"\x80"):
        return FileKind.LEGACY
    if _looks_like_text(head):
        raise LoadError(Problem(where, "is text, not a model", "pass the model file"))
    if _looks_like_onnx(head):
        raise LoadError(Problem(where, "is an ONNX model, not a PyTorch module", _SOURCE))
    raise LoadError(
        Problem(
            where,
            "is no model file that is known here",
            "pass a .pt, .pth, .bin or .safetensors file",
        )
    )


def _check_zip(path: Path) -> None:
    """Refuse TorchScript, exported programs and zips that are no file of torch.save."""
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        what = "is truncated or damaged: its table of contents is missing"
        raise LoadError(Problem(where, what, "copy or download it again")) from None
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        what = "is a TorchScript file (torch.jit.save): it holds compiled code, not a module"
        raise LoadError(Problem(where, what, f"{_SOURCE}, saved with torch.save"))
    if names & {"serialized_exported_program.json", "archive_format", "models/model.json"} or any(
        name.startswith(("models/", "data/aotinductor")) for name in names
    ):
        what = "is an exported program (torch.export.save), a fixed graph and not a module"
        raise LoadError(Problem(where, what, f"{_SOURCE}, saved with torch.save"))
    if "data.pkl" not in names:
        what = "is a zip archive, but not one of torch.save"
        if any(name.endswith(".npy") for name in names):
            what = "is a NumPy archive (.npz), not a model"
        raise LoadError(Problem(where, what, "pass the model file"))


def _close_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else "check the path"


def _folder_way_out(path: Path) -> str:
    if (path / "config.json").is_file():
        return f"a transformers folder is given as transformers:{path}"
    files = sorted(
        p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".safetensors")
    )
    return f"it holds {', '.join(files[:3])}" if files else "pass a file"


def _looks_like_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\r\n\t\f" for character in text)


def _looks_like_onnx(head: bytes) -> bool:
    # A ModelProto begins with field 1 (ir_version, a small varint) and field 2 or 7.
    return head[:1] == b"\x08" and len(head) > 2 and head[1] < 32 and head[2] in (0x12, 0x3A)
