"""What is known of the model that a certified file is made from, and of how that came about."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normconv.errors import NormconvError
from normconv.files import sha256_of
from normconv.report import Report
from normconv.report.certificate import broken_seals, certificate_path, read_certificate

__all__ = ["Before", "Origin", "data_in", "data_of", "errors_of", "known_before"]

Record = dict[str, Any]

#: Where a model comes from: the file or spec it was loaded from, or the report of what made it.
Origin = str | os.PathLike[str] | Report

_DATA = "data"


@dataclass
class Before:
    """What is known of the source."""

    source: Record
    chain: list[Record]
    plans: list[Any]
    data: list[Any]
    sites: list[Any]
    errors: list[Any]
    plan: Any = None
    note: str = ""


def known_before(origin: Origin | None) -> Before:
    """Return what a source, and the certificate beside it where it holds, tell of themselves."""
    if isinstance(origin, Report):
        found = _nothing(None)
        found.sites = [{"verb": origin.verb, **asdict(row)} for row in origin.sites]
        found.errors = [{"verb": origin.verb, **row} for row in errors_of(origin)]
        found.plan, found.data = origin.plan, data_of(origin)
        return found
    return _nothing(None) if origin is None else _of_file(os.fspath(origin))


def _of_file(given: str) -> Before:
    path = Path(given)
    if not path.is_file():
        # A spec; of a folder only the name is told: no certificate holds a path of this machine.
        return _nothing(path.resolve().name if path.exists() else given)
    found = _nothing(path.name)
    found.source["sha256"] = sha256_of(path)
    beside = certificate_path(path)
    if not beside.is_file():
        return found
    try:
        document = read_certificate(beside)
    except NormconvError as error:
        found.note = f"the certificate beside the source was not taken over: {error}"
        return found
    file = document["artefact"]["files"][0]
    broken = broken_seals(document)
    if broken or file["sha256"] != found.source["sha256"]:
        reason = str(broken[0]) if broken else f"it speaks of another {path.name}"
        found.note = f"the certificate beside the source was not taken over: {reason}"
        return found
    own = {
        "artefact": file,
        "certificate": document["seals"]["sha256"],
        "source": document["source"],
    }
    found.chain = [own, *document["origin"]]
    found.plans, found.data = document["plan"], document["data"]
    found.sites, found.errors = document["sites"], document["errors"]
    return found


def _nothing(given: str | None) -> Before:
    return Before({"given": given, "sha256": None}, [], [], [], [], [])


def data_in(history: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return what data each step used, by the model's own history."""
    return [
        dict(entry[_DATA])
        for step in history
        for entry in step.values()
        if isinstance(entry, Mapping) and isinstance(entry.get(_DATA), Mapping)
    ]


def data_of(report: Report) -> list[Record]:
    """Return what data a report says were used."""
    used = report.facts.get(_DATA)
    return [{"purpose": report.verb, "use": "public", **used}] if isinstance(used, Mapping) else []


def errors_of(report: Report) -> list[Record]:
    """Return every error end to end: those of runs on a backend, else those that the checks measured."""
    rows = []
    for name, fact in report.facts.items():
        outputs = fact.get("outputs") if isinstance(fact, Mapping) else None
        if name.endswith(" run") and isinstance(outputs, Mapping):
            backend = f"ort-{name.removesuffix(' run')}"
            rows += [{"backend": backend, "what": what, **row} for what, row in outputs.items()]
    if rows:
        return rows
    dtype = report.facts.get("dtype")
    return [
        {"backend": "torch", "what": c.name, "dtype": dtype, "error": c.measured, "bound": c.bound}
        for c in report.checks
        if c.measured is not None
    ]
