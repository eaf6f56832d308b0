"""Every error that normconv raises on purpose.

    NormconvError
    ├── UsageError             the call is wrong: unknown target, bad option, no such file     exit 2
    ├── Refused                the input is understood and not taken                           exit 3
    │   ├── LoadError          the file is not a model, is damaged, or may not be trusted
    │   ├── CaptureError       no graph of the model could be made
    │   ├── PlanError          some site cannot be converted, or the plan does not fit
    │   └── MissingDependency  an optional package is not installed; names the extra
    └── CheckFailed            the work was done and a check of it failed                      exit 1

A problem names the place, what is wrong and the way out. Problems are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from normconv.report import Report

__all__ = [
    "CaptureError",
    "CheckFailed",
    "LoadError",
    "MissingDependency",
    "NormconvError",
    "PlanError",
    "Problem",
    "Refused",
    "UsageError",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        where: the module, file or option it is about.
        what: what is wrong there, with the shapes or values that show it.
        way_out: what the user can do; empty when there is nothing.

    >>> str(Problem("layer3.bn2", "180 channels do not split into 32 groups", "use groups=30"))
    'layer3.bn2: 180 channels do not split into 32 groups; use groups=30'
    """

    where: str
    what: str
    way_out: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}; {self.way_out}" if self.way_out else f"{place}{self.what}"


class NormconvError(Exception):
    """The root of the tree.

    Args:
        problems: one `Problem`, a plain message, or several problems.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, problems: str | Problem | Sequence[Problem]) -> None:
        if isinstance(problems, str):
            problems = (Problem("", problems),)
        elif isinstance(problems, Problem):
            problems = (problems,)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [str(problem) for problem in self.problems]
        if len(lines) == 1:
            return lines[0]
        return "\n".join([f"{len(lines)} problems", *(f"  - {line}" for line in lines)])

    def __reduce__(self) -> tuple[type[NormconvError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class UsageError(NormconvError):
    """The call is wrong: unknown target, bad option, a rule that matches nothing, no such file."""

    exit_code = 2


class Refused(NormconvError):
    """The input is understood and not taken."""


class LoadError(Refused):
    """The file is not a model, is damaged, or names code that may not be trusted."""


class CaptureError(Refused):
    """No graph of the model could be made."""


class PlanError(Refused):
    """Some site cannot be converted, or a plan does not fit the model it is applied to."""


class MissingDependency(Refused):
    """An optional package is not installed.

    >>> str(MissingDependency.needs("ONNX Runtime", "gpu", "cpu"))
    "ONNX Runtime is not installed; pip install 'normconv[gpu]' or 'normconv[cpu]'"
    """

    @classmethod
    def needs(cls, package: str, *extras: str) -> MissingDependency:
        """Say which extra brings `package`."""
        ways = " or ".join(f"'normconv[{extra}]'" for extra in extras)
        return cls(Problem("", f"{package} is not installed", f"pip install {ways}"))


class CheckFailed(NormconvError):
    """The work was done and a check of it failed.

    Attributes:
        report: the report with the failed checks.
        model: what was made and rejected, where there is a model; for a closer look, not for use.
    """

    exit_code = 1

    def __init__(self, report: Report, model: object | None = None) -> None:
        self.report = report
        self.model = model
        failed = [
            Problem(check.name, check.describe(), check.way_out) for check in report.failed_checks
        ]
        super().__init__(failed or [Problem("", "a check failed")])

    def __reduce__(self) -> tuple[type[CheckFailed], tuple[Report, object | None]]:  # type: ignore[override]
        return type(self), (self.report, self.model)
