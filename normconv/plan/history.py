"""What normconv has done to a model, kept on the model so that a file of weights can be rebuilt.

The history is a list of plain entries, oldest first: ``{"apply": plan, "was": norms}`` or
``{"fold": {}}``. It is stored as JSON text in one attribute: text survives deepcopy, pickle and the safe
loader alike.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["ATTRIBUTE", "forget", "history_of", "record"]

ATTRIBUTE = "_normconv_history"


def history_of(model: object) -> list[dict[str, Any]]:
    """Return the entries of a model, oldest first; empty for a model never touched.

    >>> class Model: pass
    >>> model = Model(); record(model, {"fold": {}}); history_of(model)
    [{'fold': {}}]
    """
    text = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if text is None:
        text = _graph_meta(model).get(ATTRIBUTE, "[]")
    entries = json.loads(text)
    return list(entries)


def record(model: object, entry: dict[str, Any]) -> None:
    """Append an entry to a model's history, in place."""
    text = json.dumps([*history_of(model), entry])
    meta = _graph_meta(model)
    if meta is not _NO_META:
        # A GraphModule's deepcopy keeps `meta` and forgets attributes; its pickle does the reverse.
        meta[ATTRIBUTE] = text
    model.__dict__[ATTRIBUTE] = text


def forget(model: object) -> None:
    """Drop a model's history, in place: it is of its original structure again."""
    _graph_meta(model).pop(ATTRIBUTE, None)
    model.__dict__.pop(ATTRIBUTE, None)


_NO_META: dict[str, Any] = {}


def _graph_meta(model: object) -> dict[str, Any]:
    is_graph_module = any(kind.__name__ == "GraphModule" for kind in type(model).__mro__)
    meta = getattr(model, "meta", None)
    return meta if is_graph_module and isinstance(meta, dict) else _NO_META
