"""What the exact targets share: when a norm may be taken out, into what, and how."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from normconv.errors import Problem
from normconv.graph import Site
from normconv.graph.rewrite import absorb_norm_, affine_norm_
from normconv.plan import Action, Step
from normconv.targets.base import Decision

__all__ = ["Absorbing", "refusal"]

_COST = "one multiply-add an element at inference"


def refusal(site: Site) -> Problem | None:
    """Return why no exact target can take the norm, if so."""
    if site.refusal.startswith("it keeps no running statistics"):
        return Problem(site.name, site.refusal, "keep it (exclude), or train statistics first")
    if site.refusal:
        return Problem(site.name, f"{site.norm}: {site.refusal}", "exclude it or use strict=False")
    return None


class Absorbing:
    """A target that takes the norm into the layers that feed it, else keeps its map in its slot."""

    fidelity: ClassVar[str] = "exact"
    actions: ClassVar[tuple[Action, ...]] = ("fold", "affine")
    weight_norm: ClassVar[bool]

    def decide(self, site: Site) -> Decision | Problem:
        """Fold where exact, else an affine map in the slot."""
        if (refused := refusal(site)) is not None:
            return refused
        if site.producers:
            return Decision("fold", f"into {' + '.join(site.producers)}", site.producers)
        return Decision("affine", f"{site.obstacle}; {_COST}")

    def edit(self, root: nn.Module, step: Step) -> None:
        """Absorb the norm, or put its map into its slot."""
        names = (step.site, *step.aliases)
        if step.action == "fold":
            absorb_norm_(root, names, step.producers, weight_norm=self.weight_norm)
        else:
            affine_norm_(root, names)
