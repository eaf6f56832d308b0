"""Reading `.safetensors`: the tensors, and the JSON that normconv keeps beside them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from normconv.errors import LoadError, Problem

__all__ = ["json_of", "read_safetensors"]


def read_safetensors(
    path: Path, names: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, or those of `names` that are there, and the metadata.

    Raises:
        LoadError: when it is no such file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            wanted = [n for n in file.keys() if names is None or n in names]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in wanted}, metadata
    except (SafetensorError, OSError, ValueError) as error:
        what = f"is no safetensors file, or damaged ({error})"
        raise LoadError(Problem(str(path), what, "copy or download it again")) from None


def json_of(metadata: Mapping[str, str], name: str, where: str, kind: type) -> Any:
    """Return the JSON value of `kind` under `name` in the metadata; an empty one where there is none.

    Raises:
        LoadError: when it is no JSON, or of another kind.
    """
    if name not in metadata:
        return kind()
    try:
        value = json.loads(metadata[name])
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise LoadError(Problem(where, f"its metadata {name} is damaged", "save it again"))
    return value
