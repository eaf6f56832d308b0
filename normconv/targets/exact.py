"""What the exact targets share: when a norm may be taken out, into what, and how."""

from __future__ import annotations

from math import prod
from typing import ClassVar

from torch import nn

from normconv.errors import Problem
from normconv.graph import Site
from normconv.graph.rewrite import absorb_norm_, affine_norm_
from normconv.plan import Action, Step
from normconv.targets.base import Decision

__all__ = ["NO_STATISTICS", "Absorbing", "affine_cost", "refusal"]

NO_STATISTICS = "it keeps no running statistics"  # how such a refusal begins


def affine_cost(site: Site) -> str:
    """Say what an affine map in the slot costs at inference."""
    if site.shape is None:
        return "a multiply-add an element at inference"
    each = prod(site.shape[1:])
    return f"{each:,} multiply-adds a sample at inference"


_TRAIN_FIRST = (
    "take a gn target for it, keep it (exclude), or train statistics first: make it with "
    "track_running_stats=True and run a few batches in training mode"
)


def refusal(site: Site) -> Problem | None:
    """Return why no exact target can take the norm, if so."""
    if site.refusal.startswith(NO_STATISTICS):
        return Problem(site.name, site.refusal, _TRAIN_FIRST)
    if site.refusal:
        return Problem(site.name, f"{site.norm}: {site.refusal}", "exclude it or use strict=False")
    return None


class Absorbing:
    """Takes the norm into the layers before it, else into those after it, else keeps its map."""

    fidelity: ClassVar[str] = "exact"
    couples: ClassVar[bool] = False
    actions: ClassVar[tuple[Action, ...]] = ("fold", "forward", "affine")
    weight_norm: ClassVar[bool]

    def decide(self, site: Site) -> Decision | Problem:
        """Fold where exact, backward before forward, else an affine map in the slot."""
        if (refused := refusal(site)) is not None:
            return refused
        if site.producers:
            why = f"into {' + '.join(site.producers)}"
            return Decision("fold", why, site.producers, spans=site.spans)
        if site.consumers:
            why = f"forward into {' + '.join(site.consumers)}: {site.obstacle}"
            return Decision("forward", why, consumers=site.consumers, spans=site.spans)
        return Decision("affine", f"{site.obstacle}; {affine_cost(site)}")

    def edit(self, root: nn.Module, step: Step) -> tuple[str, ...] | None:
        """Absorb the norm, or put its map into its slot."""
        names = (step.site, *step.aliases)
        if step.action in ("fold", "forward"):
            absorb_norm_(
                root,
                names,
                step.producers,
                consumers=step.consumers,
                spans=step.spans,
                weight_norm=self.weight_norm,
            )
        else:
            affine_norm_(root, names)
        return None
