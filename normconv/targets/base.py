"""What a target is: it may refuse a site, it decides what becomes of it, and it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from torch import nn

from normconv.errors import Problem, UsageError
from normconv.graph import Site
from normconv.plan import Action, Step

__all__ = ["Decision", "Target", "options_of"]


@dataclass(frozen=True)
class Decision:
    """What a target wants at a site.

    Args:
        action: see `normconv.plan.Action`.
        reason: one sentence.
        producers: the layers before it that absorb the norm; only with ``fold``.
        consumers: the layers after it that absorb it; only with ``forward``.
        spans: which channel each feature of those layers is; empty for one to one.
        options: the target's options as they were resolved for the site; None for those given.
        fidelity: where it is not the target's own.
    """

    action: Action
    reason: str
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    spans: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    fidelity: str = ""


class Target(Protocol):
    """One target. Its fields are its options, validated when it is made.

    `actions` are those its `edit` can do, for plans that were edited by hand. `couples` says whether
    samples of a batch go on seeing each other in training mode.
    """

    name: ClassVar[str]
    fidelity: ClassVar[str]
    couples: ClassVar[bool]
    actions: ClassVar[tuple[Action, ...]]
    promise: ClassVar[str]

    def decide(self, site: Site) -> Decision | Problem:
        """Say what becomes of the site, or refuse it with a reason and a way out."""
        ...

    def edit(self, root: nn.Module, step: Step) -> tuple[str, ...] | None:
        """Do it, in place, on a copy of the model; return what a reader of the report should know."""
        ...


def options_of(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a target's options by name.

    Raises:
        UsageError: an option the target does not have.
    """
    known = [entry.name for entry in fields(kind)]
    unknown = [name for name in options if name not in known]
    if unknown:
        way_out = f"it has {known}" if known else "it has none"
        raise UsageError(Problem(f"target {kind.name}", f"no option {unknown}", way_out))
    wrong = [
        f"{name}={options[name]!r}"
        for name, kinds in ((entry.name, _KINDS[str(entry.type)]) for entry in fields(kind))
        if name in options and not isinstance(options[name], kinds)
    ]
    if wrong:
        raise UsageError(Problem(f"target {kind.name}", f"{', '.join(wrong)} is of the wrong type"))
    return dict(options)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "int": int,
    "float": (float, int),
    "str": str,
    "int | str": (int, str),
    "float | str": (float, int, str),
}
