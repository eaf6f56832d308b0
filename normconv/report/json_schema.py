"""Holding a JSON document against a JSON schema, as far as this project's own schemas go.

The machine that reads a certificate has no schema library. The keywords below are all that are known; a
schema with another one is refused, so that nothing in it is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["violations"]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = frozenset(
    {"type", "const", "enum", "minimum", "pattern", "items", "required", "properties", "$ref"}
    | {"additionalProperties", "$schema", "$id", "$defs", "title", "description"}
)


def violations(
    value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, place: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield where a document departs from a schema, and how.

    Args:
        value: the document, or a part of it.
        schema: what it has to be.
        root: the whole schema, in which ``$ref`` is looked up.
        place: where the part stands.

    >>> list(violations({"n": "x"}, {"properties": {"n": {"type": "integer"}}}))
    [('n', 'is a str, not integer')]

    Source: JSON Schema, draft 2020-12 (a part of it).
    """
    root = schema if root is None else root
    if unknown := set(schema) - _KNOWN:
        raise ValueError(f"keywords that are not checked: {sorted(unknown)}")
    if "$ref" in schema:
        target: Any = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        yield from violations(value, target, root, place)
    if "type" in schema and not _is_one_of(value, schema["type"]):
        names = schema["type"] if isinstance(schema["type"], str) else " or ".join(schema["type"])
        yield place, f"is a {type(value).__name__}, not {names}"
        return
    if "const" in schema and value != schema["const"]:
        yield place, f"is {value!r}, not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield place, f"is {value!r}, not one of {schema['enum']}"
    if isinstance(value, (int, float)) and value < schema.get("minimum", value):
        yield place, f"is {value}, below {schema['minimum']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield place, f"is {value[:80]!r}, not of the form {schema['pattern']}"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from violations(item, schema["items"], root, f"{place}[{index}]")
    if isinstance(value, dict):
        yield from _object(value, schema, root, place)


def _object(
    value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], place: str
) -> Iterator[tuple[str, str]]:
    for name in schema.get("required", ()):
        if name not in value:
            yield place, f"has no {name!r}"
    known = schema.get("properties", {})
    more = schema.get("additionalProperties", True)
    for name, item in value.items():
        here = f"{place}.{name}" if place else name
        if name in known:
            yield from violations(item, known[name], root, here)
        elif more is False:
            yield here, "is not known here"
        elif isinstance(more, Mapping):
            yield from violations(item, more, root, here)


def _is_one_of(value: Any, wanted: str | list[str]) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, _TYPES[name]) for name in names)
