"""What is asked of a conversion, checked before any file is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from normconv.bridges.conventions import AUTO, CONVENTIONS, WEIGHT_NORMED, dialect_of
from normconv.errors import Problem, UsageError
from normconv.plan import Plan

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """From which convention to which, and what the keys do not tell.

    Args:
        from_: a convention, or ``auto``.
        to: a convention; none that standardizes.
        like: the shapes and metadata of a checkpoint in the target form.
        plan: of the model that the checkpoint is for, whose norms are folded.
        layers: globs of layers or weights, each with the axis its gains lie along.
        eps: of norms, and of standardized weights, by globs; the last that matches counts.
        log: gains become e^(c·s).
        c: of gains e^(c·s), in the file and in the result.
        gamma: the constant factor of NFNets' standardized weights.
    """

    from_: str = AUTO
    to: str = "plain"
    like: tuple[Mapping[str, tuple[int, ...]], Mapping[str, str]] | None = None
    plan: Plan | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    log: bool = False
    c: float | None = None
    gamma: float | None = None

    def check(self) -> None:
        """Refuse what makes no sense whatever the checkpoint holds.

        Raises:
            UsageError: lists all of it.
        """
        problems = list(_unknown(self.from_, self.to))
        ways = [self.like is not None, self.plan is not None, bool(self.layers)]
        if sum(ways) > 1:
            problems.append(Problem("like, plan, layers", "more than one is given", "give one"))
        into_wn = self.to in WEIGHT_NORMED
        if not into_wn and self.like is not None:
            problems.append(Problem("like", f"{self.to} needs no keys of another checkpoint"))
        if self.plan is not None and self.to not in ("plain", "normconv-wn"):
            what = f"its layers are normconv's, and {self.to} names others"
            problems.append(Problem("plan", what, "use to='normconv-wn' or 'plain'"))
        if self.from_ == self.to and self.plan is None:
            problems.append(Problem("to", f"both are {self.to}"))
        if self.log and self.to != "normconv-wn":
            problems.append(Problem("scale='exp'", f"{self.to} has no gains e^(c·s)"))
        problems += [
            Problem(name, f"{value} is no number other than 0")
            for name, value in (("c", self.c), ("gamma", self.gamma))
            if value is not None and not (isfinite(value) and value)
        ]
        if self.gamma is not None and self.from_ not in (AUTO, "ws-nf"):
            problems.append(Problem("gamma", f"{self.from_} has none"))
        problems += [
            Problem("eps", f"{eps} for {glob!r} is no positive number")
            for glob, eps in self.eps.items()
            if not (isfinite(eps) and eps >= 0)
        ]
        if problems:
            raise UsageError(problems)

    def eps_of(self, name: str) -> float | None:
        """Return the eps that was given for a norm or weight."""
        given = [eps for glob, eps in self.eps.items() if fnmatchcase(name, glob)]
        return given[-1] if given else None

    def options(self) -> dict[str, Any]:
        """Return what was asked for, for the report."""
        given = {"eps": dict(self.eps), "c": self.c, "gamma": self.gamma}
        return {name: value for name, value in given.items() if value not in (None, {})}


def _unknown(from_: str, to: str) -> list[Problem]:
    problems = []
    for where, name, known in (("from", from_, (AUTO, *CONVENTIONS)), ("to", to, CONVENTIONS)):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
            problems.append(Problem(where, f"there is no convention {name!r}", way_out))
    if dialect_of(to):
        what = "weights cannot be put into a standardized form that computes the same"
        problems.append(Problem("to", what, "normconv convert --to gn+ws makes such a model"))
    return problems
