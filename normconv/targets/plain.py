"""Plain: the norm is folded away, nothing is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from normconv.targets.exact import Absorbing

__all__ = ["Plain"]


@dataclass(frozen=True)
class Plain(Absorbing):
    """w ← w · γ / √(σ² + eps), b ← β + (b − μ) γ / √(σ² + eps), in float64, rounded once."""

    name: ClassVar[str] = "plain"
    promise: ClassVar[str] = "same eval function; plain layers for deployment or norm-free training"
    weight_norm: ClassVar[bool] = False
