"""Weight norm: the norm goes into a signed gain g, the layer computes with g · v / ‖v‖."""

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

__all__ = ["WeightNorm"]


@dataclass(frozen=True)
class WeightNorm:
    """w = g · v / ‖v‖ with v = w and g = ‖w‖ · γ / √(σ² + eps), bias = β + (b − μ) γ / √(σ² + eps).

    Source: Salimans & Kingma 2016, equation 2.
    """

    name: ClassVar[str] = "wn"
    fidelity: ClassVar[str] = "exact"
    actions: ClassVar[tuple[Action, ...]] = ("fold", "affine")
    promise: ClassVar[str] = "same eval function; trains through g and v; folds to plain weights"

    def decide(self, site: Site) -> Decision | Problem:
        """Fold where exact, else an affine map in the slot."""
        return decide_exact(site)

    def edit(self, root: nn.Module, step: Step) -> None:
        """Absorb the norm into weight-normed layers."""
        names = (step.site, *step.aliases)
        if step.action == "fold":
            absorb_norm_(root, names, step.producers, weight_norm=True)
        else:
            affine_norm_(root, names)
