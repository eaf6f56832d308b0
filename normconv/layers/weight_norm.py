"""Weight-normed layers: weight = g · v / ‖v‖."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, fx, nn

from normconv.layers.reparametrised import (
    Reparametrised,
    a_kind,
    plain_weight,
    reparametrise_,
    unfit_for,
)
from normconv.numerics import (
    Pullback,
    RowLayout,
    norm_pullback,
    normed_weight,
    split_weight_,
    true_weight,
)

__all__ = ["WeightNormed", "unfit_for_weight_norm", "weight_norm_"]

Layer = TypeVar("Layer", bound=nn.Module)


@a_kind
class WeightNormed(Reparametrised):
    """A layer with weight = g · v / ‖v‖ over the parameters `weight_g` (signed) and `weight_v`.

    Source: Salimans & Kingma 2016, equation 2.
    """

    kind = "wn"
    prefix = "WN"
    what = "weight norm"
    computed_from = ("weight_g", "weight_v")
    weight_g: nn.Parameter
    weight_v: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """The computed weight: same shape, dtype and memory format as `weight_v`."""
        layout = self._layout
        return _normed_weight(self.weight_g, self.weight_v, layout.transposed, layout.groups)

    def true_weight(self) -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and which rows have ‖v‖ = 0, (O,) bool."""
        return true_weight(self.weight_g.detach(), self.weight_v.detach(), self._layout)

    def pullback(self) -> Pullback:
        """Return the map from gradients of the weight to those of `weight_g` and `weight_v`."""
        return norm_pullback(self.weight_g, self.weight_v, self._layout)


@fx.wrap
def _normed_weight(g: Tensor, v: Tensor, transposed: bool, groups: int) -> Tensor:
    """One call in the eyes of any `torch.fx` tracer, with plain values for the layout."""
    return normed_weight(g, v, RowLayout(transposed, groups))


def weight_norm_(layer: Layer, factor: Tensor | None = None) -> Layer:
    """Turn a layer, in place, into its weight-normed form with weight factor · w.

    v = w as it is and g = ‖w‖ · factor, so that a factor of 0 keeps the direction. `weight_g` and
    `weight_v` take the place of `weight` in the order of parameters and inherit its `requires_grad`.
    `weight_v` is the very parameter that `weight` was: nothing of the layer's size is copied.

    Args:
        layer: Linear, Conv1d-3d or ConvTranspose1d-3d (or a subclass) with a plain weight.
        factor: (O,) float64 multiplier of the rows, None for 1.

    Raises:
        UsageError: the layer is of another class, or has no plain weight.

    >>> layer = weight_norm_(nn.Linear(3, 2))
    >>> isinstance(layer, nn.Linear), [name for name, _ in layer.named_parameters()]
    (True, ['weight_g', 'weight_v', 'bias'])
    """
    weight, layout = plain_weight(layer, WeightNormed.what)
    g, _ = split_weight_(weight.detach(), factor, layout)
    return reparametrise_(layer, "wn", g)


def unfit_for_weight_norm(layer: nn.Module) -> str:
    """Say why `weight_norm_` could not change the layer's class; empty where it can. Nothing is changed.

    >>> unfit_for_weight_norm(nn.Linear(1, 1))
    ''
    """
    return unfit_for("wn", layer)
