"""Weight norm: the norm goes into a signed gain g, the layer computes with g · v / ‖v‖."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from normconv.targets.exact import Absorbing

__all__ = ["WeightNorm"]


@dataclass(frozen=True)
class WeightNorm(Absorbing):
    """w = g · v / ‖v‖ with v = w and g = ‖w‖ · γ / √(σ² + eps), bias = β + (b − μ) γ / √(σ² + eps).

    Source: Salimans & Kingma 2016, equation 2.
    """

    name: ClassVar[str] = "wn"
    promise: ClassVar[str] = "same eval function; trains through g and v; folds to plain weights"
    weight_norm: ClassVar[bool] = True
