"""Plain: the norm is folded away, nothing is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from normconv.errors import Problem
from normconv.graph import Site
from normconv.graph.rewrite import absorb_norm_, affine_norm_
from normconv.plan import Action, Step
from normconv.targets.base import Decision
from normconv.targets.exact import decide_exact

__all__ = ["Plain"]


@dataclass(frozen=True)
class Plain:
    """w ← w · γ / √(σ² + eps), b ← β + (b − μ) γ / √(σ² + eps), in float64, rounded once."""

    name: ClassVar[str] = "plain"
    fidelity: ClassVar[str] = "exact"
    actions: ClassVar[tuple[Action, ...]] = ("fold", "affine")
    promise: ClassVar[str] = "same eval function; plain layers for deployment or norm-free training"

    def decide(self, site: Site) -> Decision | Problem:
        """Fold where exact, else an affine map in the slot."""
        return decide_exact(site)

    def edit(self, root: nn.Module, step: Step) -> None:
        """Absorb the norm into plain layers."""
        names = (step.site, *step.aliases)
        if step.action == "fold":
            absorb_norm_(root, names, step.producers)
        else:
            affine_norm_(root, names)
