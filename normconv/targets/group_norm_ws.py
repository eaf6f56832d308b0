"""GroupNorm on top of weight-standardized layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from normconv.errors import Problem, UsageError
from normconv.graph import Site
from normconv.layers import weight_standardize_
from normconv.numerics import DIALECTS
from normconv.plan import Action, Step
from normconv.targets.base import Decision
from normconv.targets.group_norm import GroupNorm

__all__ = ["GroupNormWS"]


@dataclass(frozen=True)
class GroupNormWS(GroupNorm):
    """`gn`, and w = gain · (v − mean(v)) / std(v) in the layers before the norms.

    Without data each filter loses its mean; `calibrate` takes the nearest filter without one, as the
    inputs of a Conv1d or Conv2d see it (other layers are listed). Stems, depthwise and linear layers keep
    their plain weights.

    Args:
        dialect: which standardization: ``timm``, ``qiao``, ``bit`` or ``nf``.

    Source: Qiao et al. 2019, equations 5 to 7; the projection: docs/adr/0005.
    """

    dialect: str = "timm"

    name: ClassVar[str] = "gn+ws"
    actions: ClassVar[tuple[Action, ...]] = ("standardize", "fold", "affine", "fresh")
    promise: ClassVar[str] = "as gn, with standardized weights; needs `calibrate` when pretrained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dialect not in DIALECTS:
            what = f"dialect={self.dialect!r} is none of {', '.join(DIALECTS)}"
            raise UsageError(Problem(f"target {self.name}", what))

    def decide(self, site: Site) -> Decision | Problem:
        """Standardize the layers that μ and σ are folded into, but for those that should stay plain."""
        decided = super().decide(site)
        if isinstance(decided, Problem):
            return decided
        options: dict[str, Any] = {**(decided.options or {}), "dialect": self.dialect}
        if decided.action != "fold":
            return replace(decided, options=options)
        if site.plain_filters:
            why = f"{decided.reason}; plain weights in {site.plain_filters}"
            return replace(decided, reason=why, options=options)
        why = f"{decided.reason}; standardized ({self.dialect})"
        return replace(decided, action="standardize", reason=why, options=options)

    def edit(self, root: nn.Module, step: Step) -> None:
        """Put the GroupNorm into the slot and standardize what is before it."""
        super().edit(root, step)
        if step.action == "standardize":
            for name in step.producers:
                weight_standardize_(root.get_submodule(name), dialect=self.dialect)
