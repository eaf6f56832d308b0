"""What will happen to each site, as pure data: printable, JSON, diffable, editable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from normconv.errors import Problem, UsageError
from normconv.files import write_json
from normconv.report import Report, SiteRow, jsonable

__all__ = ["Action", "Plan", "Step"]

SCHEMA = "normconv.plan/1"

Action = Literal[
    "fold", "forward", "affine", "frozen", "standardize", "fresh", "wrap", "insert", "keep", "drop"
]
"""fold: into the producers. standardize: so, and their weights are standardized. forward: into the
consumers. affine: a trainable `ChannelAffine` in the norm's slot. frozen: one that is not trained.
fresh: there are no statistics to take over. wrap: a layer without a norm is reparametrised as it is.
insert: a norm is put after a layer that had none. keep: the norm or layer stays. drop: the norm is never
called and its slot is emptied. What another norm takes the place of is folded, or made an affine map,
without γ and β, which that norm gets."""


@dataclass(frozen=True)
class Step:
    """One decision.

    Args:
        site: the norm's qualified name (the first, where it has several); that of the layer where it is
            about a layer without a norm.
        norm: the norm's class name, or the layer's.
        target: the target's name, or ``keep``.
        action: what is done, see `Action`.
        channels: C, the length of the norm's statistics, or the number of rows of the layer's weights.
        producers: qualified names of the layers before it that the norm is folded into; with ``wrap`` the
            layer that it shares its gain and v with.
        consumers: those of the layers after it, where it is folded forward.
        spans: for each of those layers, which channel each of its features is (`normconv.plan.Span`);
            empty for one to one.
        op: the producers' kind, e.g. ``conv2d``; ``none`` without a foldable producer.
        aliases: the norm's other names in the model.
        shape: the traced shape of the norm's input, batch included; None where no trace told it.
        fidelity: ``exact``, ``calibrated`` or ``fresh``; empty for ``keep``.
        phase: the mode in which the norm is called, ``eval`` or ``train``; ``none`` if in neither.
        reason: why this action.
        options: the target's options.
        eps: of the norm, which no checkpoint tells.
    """

    site: str
    norm: str
    target: str
    action: Action
    channels: int
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    spans: tuple[str, ...] = ()
    op: str = "none"
    aliases: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    fidelity: str = ""
    phase: Literal["eval", "train", "none"] = "eval"
    reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    eps: float | None = None

    def row(self) -> SiteRow:
        """Return the step as a row of a report, with nothing measured yet."""
        return SiteRow(
            site=self.site,
            norm=self.norm,
            producer=" + ".join(self.producers or self.consumers),
            action=self.action if self.action == "keep" else f"{self.target}: {self.action}",
            fidelity=self.fidelity,
            reason=self.reason,
        )


@dataclass(frozen=True)
class Plan:
    """A list of decisions for one architecture.

    Args:
        steps: one per site, in call order.
        model: the model's class name.
        fingerprint: hash over names, classes and shapes of the model; never over weights.
        capture: which capture told the dataflow (``fx``, ``export`` or ``hooks``).
        targets: the targets asked for.
        notes: what the reader should know.
        at: the submodule whose norms the steps speak of, by their names in the whole model; empty for
            the whole model.

    >>> step = Step("bn1", "BatchNorm2d", "wn", "fold", 8, producers=("conv1",), op="conv2d")
    >>> plan = Plan((step,), "Net", "0" * 64, "fx", ("wn",))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    steps: tuple[Step, ...]
    model: str
    fingerprint: str
    capture: str
    targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    at: str = ""

    @property
    def target(self) -> str:
        """The targets' names, joined for display."""
        return ", ".join(self.targets)

    @property
    def converted(self) -> tuple[Step, ...]:
        """The steps that change something."""
        return tuple(step for step in self.steps if step.action != "keep")

    def report(self, verb: str) -> Report:
        """Return the plan as a report in which nothing is measured yet."""
        return Report(
            verb=verb,
            subject=self.model,
            target=self.target,
            sites=tuple(step.row() for step in self.steps),
            facts={
                **({"at": self.at} if self.at else {}),
                "capture": self.capture,
                "actions": self.counts(),
            },
            notes=self.notes,
            plan=self.to_dict(),
        )

    def counts(self) -> dict[str, int]:
        """Return how many sites each action has."""
        found: dict[str, int] = {}
        for step in self.steps:
            found[step.action] = found.get(step.action, 0) + 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        steps = [_without_defaults(step) for step in self.steps]
        document = {"schema": SCHEMA, **asdict(replace(self, steps=())), "steps": steps}
        result = jsonable(document)
        assert isinstance(result, dict)
        return result

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Plan:
        """Read a plan back, or the plan inside a report that carries one.

        Raises:
            UsageError: it is no plan, of another schema, or has fields or actions no plan has.
        """
        if "steps" not in document and isinstance(document.get("plan"), Mapping):
            document = document["plan"]
        schema = document.get("schema")
        if schema != SCHEMA:
            raise UsageError(
                Problem(
                    "plan",
                    f"its schema is {schema!r}, not {SCHEMA!r}",
                    "make it with `normconv plan`",
                )
            )
        problems: list[Problem] = []
        entries = document.get("steps", [])
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
            raise UsageError(Problem("plan", "its steps are not a list of objects"))
        steps = [
            _read(Step, "step " + str(entry.get("site", number)), entry, problems)
            for number, entry in enumerate(entries)
        ]
        own = {name: value for name, value in document.items() if name not in ("schema", "steps")}
        plan = _read(cls, "plan", {**own, "steps": ()}, problems)
        problems += [
            Problem(
                f"step {step.site}",
                f"no action is called {step.action!r}",
                f"use one of {get_args(Action)}",
            )
            for step in steps
            if step is not None and step.action not in get_args(Action)
        ]
        if problems or plan is None:
            raise UsageError(problems)
        made: Plan = replace(plan, steps=tuple(step for step in steps if step is not None))
        return made

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back from JSON text.

        Raises:
            UsageError: as `from_dict`, and for text that is not JSON.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(Problem("plan", f"not JSON: {error}")) from None
        if not isinstance(document, dict):
            raise UsageError(Problem("plan", "not a JSON object"))
        return cls.from_dict(document)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file, or a report file that carries a plan.

        Raises:
            UsageError: no such file, or as `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(Problem(str(path), f"cannot be read: {error}")) from None
        return cls.from_json(text)


def _without_defaults(step: Step) -> dict[str, Any]:
    """Leave out what is at its default: the file is for people to read and edit."""
    values = asdict(step)
    defaults = {entry.name: entry.default for entry in fields(step)} | {"options": {}}
    return {name: value for name, value in values.items() if value != defaults[name]}


# What stands in each field: a type, a tuple of one type, or one of some words.
_SHAPES: dict[str, Any] = {
    **dict.fromkeys(("site", "norm", "target", "action", "op", "fidelity", "reason", "model"), str),
    **dict.fromkeys(("fingerprint", "capture", "at"), str),
    **dict.fromkeys(("producers", "consumers", "spans", "aliases", "targets", "notes"), (str,)),
    "steps": (object,),
    "channels": int,
    "eps": float,
    "shape": (int,),
    "options": dict,
    "phase": ("eval", "train", "none"),
}


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, type):
        return isinstance(value, shape)
    if len(shape) == 1:
        return value is None or (
            isinstance(value, tuple) and all(isinstance(item, shape[0]) for item in value)
        )
    return value in shape


def _read(kind: Any, where: str, entry: Mapping[str, Any], problems: list[Problem]) -> Any:
    known = {entry_field.name for entry_field in fields(kind)}
    unknown = sorted(set(entry) - known)
    if unknown:
        problems.append(Problem(where, f"unknown fields {unknown}", f"known are {sorted(known)}"))
        return None
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    wrong = [
        f"{name} is {value!r}" for name, value in values.items() if not _fits(value, _SHAPES[name])
    ]
    if wrong:
        problems.append(Problem(where, "; ".join(wrong), "see docs/plans.md"))
        return None
    try:
        return kind(**values)
    except TypeError as error:
        problems.append(Problem(where, str(error).partition("() ")[2] or str(error)))
        return None
