"""Which architectures have norms and how large they are, from the meta device; cached in a file."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.zoo_models import build, family_of, names
from benchmarks.zoo_pool import Limits, Tell, run_all
from normconv.files import atomic_path
from normconv.graph import is_norm

__all__ = ["LISTING", "Entry", "listing", "representatives"]

LISTING = Path(__file__).resolve().parents[1] / "docs" / "results" / "zoo-listing.json"
_CHUNKS = 40


class Entry(NamedTuple):
    """One architecture with norms; -1 where it could not be made on the meta device."""

    name: str
    family: str
    parameters: int
    norms: int


def listing(library: str, workers: int = 1, path: Path = LISTING) -> list[Entry]:
    """Return the architectures of a library that have norms, smallest first."""
    document = json.loads(path.read_text()) if path.exists() else {}
    known = document.get(library, {})
    if known.get("version") != version(library):
        rows = _look(library, workers)
        found = sorted((row for row in rows if row[3]), key=lambda row: (row[2], row[0]))
        known = {
            "version": version(library),
            "without norms": len(rows) - len(found),
            "with": found,
        }
        document[library] = known
        with atomic_path(path) as temporary:
            temporary.write_text(_text(document))
    return [Entry(*row) for row in known["with"]]


def representatives(entries: list[Entry]) -> list[Entry]:
    """Return the smallest architecture of each family, smallest first."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.family, entry)
    return list(first.values())


def _look(library: str, workers: int) -> list[list[Any]]:
    every = names(library)
    size = max(1, len(every) // _CHUNKS)
    chunks = [every[i : i + size] for i in range(0, len(every), size)]

    def work(chunk: list[str], tell: Tell) -> None:
        tell({"rows": [[name, family_of(library, name), *_size(library, name)] for name in chunk]})

    rows: list[list[Any]] = []
    for outcome in run_all(chunks, work, Limits(600, 8 * 2**30), workers):
        unseen = [[name, family_of(library, name), -1, -1] for name in outcome.job]
        rows += outcome.told.get("rows", unseen)
    return rows


def _size(library: str, name: str) -> tuple[int, int]:
    try:
        with torch.device("meta"):
            model = build(library, name)
    except Exception:  # it cannot be made without values
        try:
            model = build(library, name)
        except Exception:  # it is recorded as not built when it is measured
            return -1, -1
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(is_norm(module) for module in model.modules()),
    )


def _text(document: dict[str, Any]) -> str:
    """Return JSON with a line an architecture."""
    parts = []
    for library, known in document.items():
        rows = ",\n".join("   " + json.dumps(row) for row in known["with"])
        head = {key: value for key, value in known.items() if key != "with"}
        inner = json.dumps(head)[1:-1]
        parts.append(f' "{library}": {{{inner}, "with": [\n{rows}\n ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
