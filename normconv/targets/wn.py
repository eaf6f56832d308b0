"""Weight norm: the norm goes into a signed gain g, the layer computes with g · v / ‖v‖."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.layers import (
    LogWeightNormed,
    WeightNormed,
    check_scale,
    linear_gain_,
    log_gain_,
    share_parts_,
    weight_norm_,
)
from normconv.plan import Action, Step
from normconv.targets.exact import Absorbing

__all__ = ["WeightNorm"]

_LISTED = 8  # rows in one note


@dataclass(frozen=True)
class WeightNorm(Absorbing):
    """w = g · v / ‖v‖ with v = w and g = ‖w‖ · γ / √(σ² + eps), bias = β + (b − μ) γ / √(σ² + eps).

    A layer without a norm gets g = ‖w‖.

    Args:
        scale: ``linear``, or ``exp`` for g = e^(c·s): the sign of g goes into v, and g = 0 becomes a
            number within rounding, which the report names.
        c: how fast such a gain follows s.
        embeddings: of layers without a norm take embeddings too, one row a token.

    Source: Salimans & Kingma 2016, equation 2; section 2 for e^s.
    """

    scale: str = "linear"
    c: float = 1.0
    embeddings: bool = False

    name: ClassVar[str] = "wn"
    actions: ClassVar[tuple[Action, ...]] = (*Absorbing.actions, "wrap")
    promise: ClassVar[str] = "same eval function; trains through g and v; folds to plain weights"
    weight_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if reason := check_scale(self.scale, self.c):
            raise UsageError(Problem(f"target {self.name}", reason))

    def edit(self, root: nn.Module, step: Step) -> tuple[str, ...]:
        """Absorb the norm, put its map into its slot, or reparametrise the layer."""
        if step.action != "wrap":
            names = (*step.producers, *step.consumers)
            for layer in map(root.get_submodule, names):
                if isinstance(layer, LogWeightNormed):  # a norm on its other side was here before
                    linear_gain_(layer)
            super().edit(root, step)
            return tuple(self._scaled(root, names))
        layer = root.get_submodule(step.site)
        if step.producers:
            share_parts_(layer, root.get_submodule(step.producers[0]))
            return ()
        weight_norm_(layer)
        return tuple(self._scaled(root, (step.site,)))

    def _scaled(self, root: nn.Module, names: tuple[str, ...]) -> Iterator[str]:
        """Give weight-normed layers the gain that is asked for; say where it was 0."""
        for name in names if self.scale == "exp" else ():
            layer = root.get_submodule(name)
            if isinstance(layer, WeightNormed):
                for weight, floored in log_gain_(layer, self.c).items():
                    yield _floored(f"{name}.{weight}", floored)


def _floored(weight: str, rows: Tensor) -> str:
    which = rows.nonzero().flatten().tolist()
    more = f" and {len(which) - _LISTED} more" if len(which) > _LISTED else ""
    listed = ", ".join(map(str, which[:_LISTED])) + more
    return f"{weight}: a gain of 0 is no e^(c·s), it became one within rounding in rows {listed}"
