"""Golden data: inputs, what the original answers in float64, and how far an answer may be. No torch."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normconv.errors import LoadError, Problem, UsageError

__all__ = ["Golden", "read_golden", "write_golden"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Golden:
    """One batch that a file has to answer.

    Args:
        inputs: by the file's input names.
        outputs: float64 outputs of the original, by the file's output names.
        bounds: the largest rel-L2 error of each output that rounding explains.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    bounds: Mapping[str, float]


def write_golden(path: str | os.PathLike[str], golden: Golden) -> None:
    """Write golden data as an ``.npz`` file; the same data give the same bytes.

    Its arrays are called ``input/NAME``, ``output/NAME`` and ``bound/NAME``.
    """
    arrays = {
        **{f"input/{name}": np.asarray(value) for name, value in golden.inputs.items()},
        **{f"output/{name}": np.asarray(value) for name, value in golden.outputs.items()},
        **{f"bound/{name}": np.float64(value) for name, value in golden.bounds.items()},
    }
    # numpy dates every member of the archive 1980.
    with Path(path).open("wb") as stream:
        save: Any = np.savez  # typed as if it took no names
        save(stream, allow_pickle=False, **arrays)


def read_golden(path: str | os.PathLike[str]) -> Golden:
    """Read golden data back; nothing in the file is run.

    Raises:
        UsageError: there is no such file.
        LoadError: it is no archive of golden data.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "g.npz"
    >>> write_golden(path, Golden({"x": np.ones(2)}, {"y": np.ones(3)}, {"y": 1e-6}))
    >>> dict(read_golden(path).bounds)
    {'y': 1e-06}
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(Problem(str(path), "there is no such file"))
    parts: dict[str, dict[str, Array]] = {"input": {}, "output": {}, "bound": {}}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                kind, _, name = key.partition("/")
                parts[kind][name] = archive[key]
        bounds = {name: float(value) for name, value in parts["bound"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        what = f"these are no golden data ({type(error).__name__}: {error})"
        way_out = "name the .npz that export --golden wrote"
        raise LoadError(Problem(str(path), what, way_out)) from None
    if not parts["output"] or set(bounds) != set(parts["output"]):
        what = f"{len(parts['output'])} outputs and {len(bounds)} bounds"
        raise LoadError(Problem(str(path), what))
    return Golden(parts["input"], parts["output"], bounds)
