"""Frozen: every norm becomes the constant affine map it is in eval mode, layers stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from normconv.errors import Problem
from normconv.graph import Site
from normconv.graph.rewrite import affine_norm_
from normconv.plan import Action, Step
from normconv.targets.base import Decision
from normconv.targets.exact import refusal

__all__ = ["Frozen"]


@dataclass(frozen=True)
class Frozen:
    """y = scale · x + shift with scale = γ / √(σ² + eps), shift = β − μ · scale.

    Args:
        trainable: hold scale and shift as Parameters instead of buffers.
    """

    trainable: bool = False

    name: ClassVar[str] = "frozen"
    fidelity: ClassVar[str] = "exact"
    couples: ClassVar[bool] = False
    actions: ClassVar[tuple[Action, ...]] = ("frozen",)
    promise: ClassVar[str] = "same eval function, now in train mode too; weights untouched"

    def decide(self, site: Site) -> Decision | Problem:
        """Take every norm that has statistics."""
        return refusal(site) or Decision("frozen", "its statistics become constants")

    def edit(self, root: nn.Module, step: Step) -> None:
        """Put the map into the norm's slot."""
        affine_norm_(root, (step.site, *step.aliases), trainable=self.trainable)
