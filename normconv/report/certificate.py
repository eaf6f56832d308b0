"""The certificate: what was proved of a file, sealed so that an edit is seen and named.

A certificate is one JSON document of sections. Its seals are digests of what the sections say: one of
each value, one of each section, one of all. They find damage, careless edits and mixed-up files. They are
no signature: who edits a number can compute new seals. The last digest, kept or signed elsewhere,
is what holds against that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from normconv.errors import LoadError, Problem, UsageError
from normconv.files import write_json
from normconv.report.json_schema import violations
from normconv.report.report import jsonable

__all__ = [
    "SCHEMA",
    "broken_seals",
    "certificate_path",
    "certificate_schema",
    "read_certificate",
    "sealed",
    "write_certificate",
]

SCHEMA = "normconv.certificate/1"

_SEALS = "seals"
_DIGITS = 8  # hexadecimal, of each value; a section's whole digest stands behind them
_SHOWN = 3  # edited values that are named
_NAMES = ("site", "name", "what", "output")  # what tells an entry of a list from the others


def certificate_path(path: str | os.PathLike[str]) -> Path:
    """Name the certificate beside a file.

    >>> certificate_path("out/net.onnx").as_posix()
    'out/net.onnx.certificate.json'
    """
    path = Path(path)
    return path.with_name(f"{path.name}.certificate.json")


def certificate_schema() -> dict[str, Any]:
    """Return the published JSON schema of certificates."""
    text = resources.files("normconv.report").joinpath("certificate.schema.json").read_text("utf-8")
    schema = json.loads(text)
    assert isinstance(schema, dict)
    return schema


# --- seals ---------------------------------------------------------------------------------------


def sealed(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections as a certificate with its seals.

    >>> document = sealed({"errors": [{"output": "y", "error": 1e-7}]})
    >>> broken_seals(document)
    []
    >>> document["errors"][0]["error"] = 1e-9
    >>> print(broken_seals(document)[0])
    errors[0].error (y): it says 1e-09, which is not what was certified
    """
    document = jsonable({"schema": SCHEMA, **sections})
    assert isinstance(document, dict)
    return {**document, _SEALS: _seals(document)}


def broken_seals(document: Mapping[str, Any]) -> list[Problem]:
    """List the values and sections that are not what was sealed; empty when all are."""
    sections = {name: value for name, value in document.items() if name != _SEALS}
    said, found = document[_SEALS], _seals(sections)
    problems: list[Problem] = []
    for name in sorted({*said["sections"], *found["sections"]}):
        before, now = said["sections"].get(name), found["sections"].get(name)
        if now is None:
            problems.append(Problem(name, "this section was taken out"))
        elif before is None:
            problems.append(Problem(name, "this section was put in"))
        elif before != now:
            problems += _edited(name, sections[name], before)
    if not problems and {**said, "sections": {}} != {**found, "sections": {}}:
        problems.append(Problem(_SEALS, "the digest over all sections was edited"))
    return problems


def _seals(document: Mapping[str, Any]) -> dict[str, Any]:
    sections = {
        name: {
            "sha256": _digest(_canonical(value)),
            "values": "".join(_value_seal(place, leaf) for place, leaf, _ in _leaves(value)),
        }
        for name, value in document.items()
    }
    return {"algorithm": "sha256", "sections": sections, "sha256": _digest(_canonical(sections))}


def _edited(name: str, section: Any, before: Mapping[str, str]) -> list[Problem]:
    """Name the values of a section whose seals are broken."""
    values = before["values"]
    seals = [values[start : start + _DIGITS] for start in range(0, len(values), _DIGITS)]
    leaves = list(_leaves(section))
    if len(leaves) != len(seals):
        what = f"it has {len(leaves)} values, and {len(seals)} were certified"
        known = set(seals)
        new = [place for place, leaf, _ in leaves if _value_seal(place, leaf) not in known]
        shown = f": not among those {_listed([f'{name}{place}' for place in new])}" if new else ""
        return [Problem(name, what + shown)]
    edited = [
        Problem(f"{name}{place}{label}", f"it says {leaf!r}, which is not what was certified")
        for (place, leaf, label), seal in zip(leaves, seals, strict=True)
        if _value_seal(place, leaf) != seal
    ]
    if not edited:
        return [Problem(name, "the seals of this section were edited")]
    more = len(edited) - _SHOWN
    rest = [Problem(name, f"{more} more of its values are not what was certified")]
    return edited[:_SHOWN] + (rest if more > 0 else [])


def _leaves(value: Any, place: str = "", label: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield every value that holds no other, in the canonical order, with its place."""
    if isinstance(value, Mapping) and value:
        named = next((str(value[key]) for key in _NAMES if isinstance(value.get(key), str)), "")
        for key in sorted(value):
            own = f" ({named})" if named else label
            yield from _leaves(value[key], f"{place}.{key}", own)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]", label)
    else:
        yield place, value, label


def _value_seal(place: str, leaf: Any) -> str:
    return _digest(f"{place}={_canonical(leaf)}")[:_DIGITS]


def _canonical(value: Any) -> str:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# --- files ---------------------------------------------------------------------------------------


def write_certificate(path: str | os.PathLike[str], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Seal sections and write them, whole or not at all; return the certificate.

    Raises:
        ValueError: the certificate is not what its own schema says.
    """
    document = sealed(sections)
    if wrong := list(violations(document, certificate_schema())):
        raise ValueError(f"no certificate: {wrong[:_SHOWN]}")
    write_json(path, document)
    return document


def read_certificate(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a certificate. That its seals hold is not checked here: see `broken_seals`.

    Raises:
        UsageError: there is no such file.
        LoadError: it is no certificate, or one of a schema that this version does not know.
    """
    where = str(path)
    if not Path(path).is_file():
        raise UsageError(Problem(where, "there is no such file"))
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(Problem(where, f"this is no certificate: {error}")) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        what = f"this is no certificate: its schema is {schema!r}, not {SCHEMA!r}"
        raise LoadError(Problem(where, what, "name the NAME.certificate.json that export wrote"))
    wrong = [
        Problem(f"{where}: {at}", what) for at, what in violations(document, certificate_schema())
    ]
    if wrong:
        raise LoadError(wrong[: 2 * _SHOWN])
    assert isinstance(document, dict)
    return document


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
