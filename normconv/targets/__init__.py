"""The targets: what a site can become. One explicit tuple lists them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from normconv.errors import Problem, UsageError
from normconv.targets.base import Decision as Decision
from normconv.targets.base import Target as Target
from normconv.targets.base import options_of
from normconv.targets.frozen import Frozen as Frozen
from normconv.targets.group_norm import GroupNorm as GroupNorm
from normconv.targets.group_norm_ws import GroupNormWS as GroupNormWS
from normconv.targets.mean_only import WeightNormMeanOnly as WeightNormMeanOnly
from normconv.targets.plain import Plain as Plain
from normconv.targets.wn import WeightNorm as WeightNorm

__all__ = [
    "TARGETS",
    "Decision",
    "Frozen",
    "GroupNorm",
    "GroupNormWS",
    "Plain",
    "Target",
    "WeightNorm",
    "WeightNormMeanOnly",
    "make_target",
]

TARGETS: tuple[type[Target], ...] = (
    WeightNorm,
    WeightNormMeanOnly,
    Plain,
    Frozen,
    GroupNorm,
    GroupNormWS,
)


def make_target(name: str, options: Mapping[str, Any] | None = None) -> Target:
    """Make a target from its name and options.

    Raises:
        UsageError: no target of that name, or no such option.

    >>> make_target("frozen", {"trainable": True})
    Frozen(trainable=True)
    """
    for kind in TARGETS:
        if kind.name == name:
            return kind(**options_of(kind, options or {}))
    names = [kind.name for kind in TARGETS]
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UsageError(
        Problem(f"target '{name}'", "there is none of that name", f"{hint}use one of {names}")
    )
