"""What a file's metadata say of its conversions, and what they must say afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from normconv import __version__
from normconv.plan import Plan
from normconv.sources.saving import HISTORY, SHARED, VERSION
from normconv.sources.tensor_file import json_of

__all__ = ["history_in", "metadata_after", "option_of"]

_FOLDED: dict[str, Any] = {"fold": {"absorbed": []}}


def history_in(metadata: Mapping[str, str], where: str = "") -> list[dict[str, Any]]:
    """Return the entries, oldest first.

    Raises:
        LoadError: the metadata are damaged.
    """
    entries: list[dict[str, Any]] = json_of(metadata, HISTORY, where, list)
    return entries


def option_of(metadata: Mapping[str, str], layer: str, option: str, default: Any) -> Any:
    """Return an option of the step that made a layer what it is; None where no step speaks of it."""
    for step in _steps(history_in(metadata)):
        layers = (*step.get("producers", ()), *step.get("consumers", ()), step.get("site"))
        if layer in layers and step.get("action") in ("fold", "forward", "wrap", "standardize"):
            return step.get("options", {}).get(option, default)
    return None


def _steps(history: list[dict[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for entry in reversed(history):
        yield from reversed(entry.get("apply", {}).get("steps", ()))


def metadata_after(
    metadata: Mapping[str, str],
    *,
    from_: str,
    to: str,
    plan: Plan | None,
    like: Mapping[str, str] | None,
) -> dict[str, str]:
    """Return the metadata of the result: the file's own, and a history that leads to its keys.

    Other conventions than normconv's own and plain have no such history.
    """
    kept = {k: v for k, v in metadata.items() if k not in (HISTORY, SHARED)}
    kept[VERSION] = __version__
    before = history_in(metadata)
    after: list[dict[str, Any]] | None = None
    if plan is not None:
        after = [*before, {"apply": plan.to_dict()}, *([_FOLDED] if to == "plain" else [])]
    elif to == "plain" and before and (from_ == "normconv-wn" or from_.startswith("ws")):
        after = [*before, _FOLDED]
    elif to == "normconv-wn":
        after = history_in(like or {}) or (before if from_ == to else None)
    if after:
        kept[HISTORY] = json.dumps(after)
    return kept
