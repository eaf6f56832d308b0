"""What the user wants: ordered rules from sites to targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from normconv.errors import Problem, UsageError

__all__ = ["KEEP", "Recipe", "Rule"]

KEEP = "keep"


@dataclass(frozen=True)
class Rule:
    """Which sites get which target.

    Args:
        to: a target name, or ``"keep"`` to leave the sites alone.
        match: a glob over qualified names; ``layer1.*`` also matches everything deeper.
        op: the producer's kind (``conv2d``, ``conv_transpose1d``, ``linear``), ``none`` for sites
            without a foldable producer, empty for all.
        options: the target's options by name.

    >>> Rule("wn", match="layer?.*.bn1").matches("layer3.0.bn1", "conv2d")
    True
    >>> Rule("wn", op="linear").matches("head.bn", "conv2d")
    False
    """

    to: str
    match: str = "*"
    op: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, site: str, op: str) -> bool:
        """Say whether the rule speaks of this site."""
        return fnmatchcase(site, self.match) and self.op in ("", op)

    def __str__(self) -> str:
        op = f" op={self.op}" if self.op else ""
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.match}{op} -> {self.to}{options}"


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first that matches a site decides, a site without a rule is kept.

    >>> recipe = Recipe.of("wn", exclude=["stem.*"])
    >>> [str(rule) for rule in recipe.rules]
    ['stem.* -> keep', '* -> wn']
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise UsageError("a recipe needs at least one rule")

    @classmethod
    def of(
        cls,
        to: str | Rule | Recipe | Sequence[Rule],
        *,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """Make a recipe of a target name, with globs of sites to take and to leave.

        Args:
            to: a target name, a rule, several rules, or a recipe.
            include: only these sites (default: all).
            exclude: not these, even when included.
            options: the target's options; only with a target name.

        Raises:
            UsageError: options together with rules that carry their own.
        """
        include = (include,) if isinstance(include, str) else tuple(include)
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        if not isinstance(to, (str, Rule, Recipe, Sequence)):
            raise UsageError(f"a target is a name, rules or a Recipe, not {to!r}")
        if isinstance(to, str):
            wanted = tuple(Rule(to, match=glob, options=dict(options or {})) for glob in include)
            rules = wanted or (Rule(to, options=dict(options or {})),)
        else:
            if options:
                raise UsageError("options belong into the rules when `to` is a recipe")
            if include:
                raise UsageError("include= goes with a target name; a recipe has its own globs")
            rules = (
                to.rules
                if isinstance(to, Recipe)
                else ((to,) if isinstance(to, Rule) else tuple(to))
            )
        return cls(tuple(Rule(KEEP, match=glob) for glob in exclude) + rules)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets it names, in order, without repeats and without ``keep``."""
        return tuple(dict.fromkeys(rule.to for rule in self.rules if rule.to != KEEP))

    def rule_for(self, site: str, op: str) -> Rule | None:
        """Return the first rule that matches the site, if any."""
        return next((rule for rule in self.rules if rule.matches(site, op)), None)

    def check_used(self, sites: Sequence[tuple[str, str]]) -> None:
        """Refuse rules that speak of no site: a glob with a typo must not pass in silence.

        Args:
            sites: (qualified name, producer kind) of every site of the model.

        Raises:
            UsageError: names each such rule and the site nearest to its glob.
        """
        problems = []
        for number, rule in enumerate(self.rules, start=1):
            if rule.match == "*" and not rule.op:
                continue  # the catch-all may be left with nothing to do
            if any(rule.matches(site, op) for site, op in sites):
                continue
            names = [site for site, _ in sites]
            near = get_close_matches(rule.match.strip("*?."), names, n=1, cutoff=0.0)
            way_out = f"nearest site: '{near[0]}'" if near else "the model has no site"
            problems.append(Problem(f"rule {number} ({rule})", "matches no site", way_out))
        if problems:
            raise UsageError(problems)
