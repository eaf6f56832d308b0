"""What the exact targets share: when a norm may be taken out, and into what."""

from __future__ import annotations

from normconv.errors import Problem
from normconv.graph import Site
from normconv.targets.base import Decision

__all__ = ["decide_exact", "refusal"]

_COST = "one multiply-add an element at inference"


def refusal(site: Site) -> Problem | None:
    """Return why no exact target can take the norm, if so."""
    if site.refusal.startswith("it keeps no running statistics"):
        return Problem(site.name, site.refusal, "keep it (exclude), or train statistics first")
    if site.refusal:
        return Problem(site.name, f"{site.norm}: {site.refusal}", "exclude it or use strict=False")
    return None


def decide_exact(site: Site) -> Decision | Problem:
    """Fold the norm into what feeds it where that is exact, else keep its map in its slot."""
    refused = refusal(site)
    if refused is not None:
        return refused
    if site.producers:
        return Decision("fold", f"into {' + '.join(site.producers)}", site.producers)
    return Decision("affine", f"{site.obstacle}; {_COST}")
