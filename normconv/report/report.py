"""What a verb found, did and proved: one shape of report for all of them."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

__all__ = ["Check", "Report", "SiteRow", "jsonable", "versions"]

SCHEMA = "normconv.report/1"


@dataclass(frozen=True)
class Check:
    """One check: what was measured and what it was held against.

    Args:
        name: what was compared, e.g. ``"float32 output 0"``.
        passed: the verdict.
        measured: the measured number, where there is one (unit as the name says).
        bound: the largest number that passes.
        detail: one sentence for a reader.
        way_out: what to do when it failed.
    """

    name: str
    passed: bool
    measured: float | None = None
    bound: float | None = None
    detail: str = ""
    way_out: str = ""

    @classmethod
    def at_most(
        cls, name: str, measured: float, bound: float, detail: str = "", way_out: str = ""
    ) -> Check:
        """Hold `measured` against `bound`; NaN never passes.

        >>> Check.at_most("error", float("nan"), 1.0).passed
        False
        """
        return cls(name, bool(measured <= bound), float(measured), float(bound), detail, way_out)

    def describe(self) -> str:
        """Say in one line what was measured."""
        if self.measured is None or self.bound is None:
            return self.detail or ("passed" if self.passed else "failed")
        relation = "<=" if self.passed else "is not <="
        text = f"{self.measured:.3g} {relation} {self.bound:.3g}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True)
class SiteRow:
    """What became of one site.

    Args:
        site: the norm's qualified name in the model.
        norm: its class.
        producer: the qualified names of the layers that feed it, joined by ``" + "``; may be empty.
        action: what was done there, in the plan's words.
        fidelity: ``exact``, ``calibrated`` or ``fresh``; empty for a site that was kept.
        reason: why it was done so.
        error: rel-L2 error at the site's own output, where it was measured.
        bound: the largest error that passes.
    """

    site: str
    norm: str
    producer: str
    action: str
    fidelity: str
    reason: str
    error: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of one verb.

    Args:
        verb: which verb, e.g. ``"convert"``.
        subject: the model or file it worked on.
        target: the target's name, where there is one.
        sites: a row per site.
        checks: every check that ran.
        facts: what was used and counted (inputs, capture, providers, node counts).
        notes: sentences the user should read.
        plan: the plan as plain data, where there is one.
    """

    verb: str
    subject: str = ""
    target: str = ""
    sites: tuple[SiteRow, ...] = ()
    checks: tuple[Check, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    plan: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return not self.failed_checks

    @property
    def failed_checks(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def extended(
        self,
        *,
        sites: tuple[SiteRow, ...] | None = None,
        checks: tuple[Check, ...] = (),
        facts: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Report:
        """Return a report with more checks, facts and notes; `sites` replaces the rows."""
        return replace(
            self,
            sites=self.sites if sites is None else sites,
            checks=self.checks + checks,
            facts={**self.facts, **(facts or {})},
            notes=self.notes + notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` takes; a number that is not finite becomes its name."""
        document = {"schema": SCHEMA, "passed": self.passed, **asdict(self), "versions": versions()}
        result = jsonable(document)
        assert isinstance(result, dict)
        return result

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def jsonable(value: Any) -> Any:
    """Turn nested data into what JSON can hold.

    >>> jsonable({"a": (1, float("nan")), 2: {"x"}})
    {'a': [1, 'nan'], '2': ['x']}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [jsonable(item) for item in sorted(value, key=str)]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


_REPORTED = (
    "normconv",
    "torch",
    "onnx",
    "onnxscript",
    "numpy",
    "timm",
    "torchvision",
    "transformers",
)
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter here, those installed."""
    found = {"python": platform.python_version()}
    for name in _REPORTED + _RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
