"""Weight-standardized layers: weight = gain · s · (v − mean(v)) / d(v)."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from normconv.errors import Problem, UsageError
from normconv.layers.operators import row_layouts
from normconv.layers.reparametrised import (
    Reparametrised,
    a_kind,
    plain_weights,
    reparametrise_,
    unfit_for,
)
from normconv.numerics import (
    Pullback,
    RowLayout,
    mean_shares,
    standard_gain,
    standard_pullback,
    standard_weight,
    true_standard_weight,
)

__all__ = [
    "WeightStandardized",
    "mean_share",
    "unfit_for_weight_standardization",
    "weight_standardize_",
]

Layer = TypeVar("Layer", bound=nn.Module)


@a_kind
class WeightStandardized(Reparametrised):
    """A layer with weight = gain · s · (v − mean(v)) / d(v), over `weight_gain` and `weight_v`.

    Attributes:
        dialect: the name of the denominator d and the scale s in `normconv.numerics.DIALECTS`.

    Source: Qiao et al. 2019, "Weight Standardization", equation 6.
    """

    kind = "ws"
    prefix = "WS"
    what = "weight standardization"
    computed_from = ("weight_gain", "weight_v")
    own_attributes = ("dialect",)
    weight_gain: nn.Parameter
    weight_v: nn.Parameter
    dialect: str

    def computed(self, name: str = "weight") -> Tensor:
        """Return the standardized weight: same shape, dtype and memory format as its v."""
        layout = self.row_layout(name)
        gain, v = self.gain_and_v(name)
        return _standard_weight(gain, v, layout.transposed, layout.groups, self.dialect)

    def true_weight(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and that no row was repaired, (O,) bool."""
        gain, v = self.gain_and_v(name)
        layout = self.row_layout(name)
        repaired = torch.zeros(layout.channels(v), dtype=torch.bool, device=v.device)
        return true_standard_weight(gain.detach(), v.detach(), layout, self.dialect), repaired

    def pullback(self, name: str = "weight") -> Pullback:
        """Return the map from gradients of a weight to those of its gain and v."""
        return standard_pullback(*self.gain_and_v(name), self.row_layout(name), self.dialect)

    def extra_repr(self) -> str:
        """Say what the plain layer says, and the dialect."""
        plain = cast(Any, super()).extra_repr()
        return f"{plain}, dialect={self.dialect}" if plain else f"dialect={self.dialect}"


@fx.wrap
def _standard_weight(
    gain: Tensor, v: Tensor, transposed: bool, groups: int, dialect: str
) -> Tensor:
    """One call in the eyes of any `torch.fx` tracer, with plain values for the layout."""
    return standard_weight(gain, v, RowLayout(transposed, groups), dialect)


def weight_standardize_(layer: Layer, *, dialect: str = "timm") -> Layer:
    """Turn a layer, in place, into its weight-standardized form with weight w − mean(w) row by row.

    v = w as it is and gain = d(w) / s: a layer whose filters have zero mean computes what it did, any
    other loses the mean, which no standardized filter has (`mean_share` says how much that is).
    `weight_gain` and `weight_v` take the place of `weight` in the order of parameters and inherit its
    `requires_grad`. `weight_v` is the very parameter that `weight` was. A layer of several weights gets
    such a pair for each.

    Args:
        layer: of a family that `weight_norm_` takes, with plain weights and at least two elements in a
            row.
        dialect: what divides, and by which eps: ``timm``, ``qiao``, ``bit`` or ``nf``; see
            `normconv.numerics.DIALECTS`.

    Raises:
        UsageError: the layer is of another class, has no plain weight or filters of one element, or
            there is no such dialect.

    >>> layer = weight_standardize_(nn.Conv2d(3, 8, 3))
    >>> isinstance(layer, nn.Conv2d), [name for name, _ in layer.named_parameters()]
    (True, ['weight_gain', 'weight_v', 'bias'])
    """
    plain, layouts = plain_weights(layer, WeightStandardized.what), row_layouts(layer)
    if reason := unfit_for_weight_standardization(layer):
        raise UsageError(Problem(type(layer).__name__, reason, "leave this layer plain"))
    gains = {}
    for name, weight in plain.items():
        gain = standard_gain(weight, layouts[name], dialect).to(weight.dtype)
        gains[name] = gain.reshape(layouts[name].row_shape(weight))
    return reparametrise_(layer, WeightStandardized.kind, gains, {"dialect": dialect})


def unfit_for_weight_standardization(layer: nn.Module) -> str:
    """Say why `weight_standardize_` could not take the layer; empty where it can. Nothing is changed.

    >>> unfit_for_weight_standardization(nn.Conv2d(4, 4, 1, groups=4))
    'its filters have one element each: without its mean a filter is 0'
    """
    layouts = row_layouts(layer)
    weights = [layer._parameters.get(name) for name in layouts]
    if not weights:
        return "it is no Linear or convolution with a plain weight"
    for weight, layout in zip(weights, layouts.values(), strict=True):
        if weight is None:
            return "it is no Linear or convolution with a plain weight"
        n = weight.numel() // max(1, layout.channels(weight))
        if n == 1:
            return "its filters have one element each: without its mean a filter is 0"
        if n == 0:
            return "it has no weight elements"
    return unfit_for(WeightStandardized.kind, layer)


def mean_share(layer: nn.Module) -> Tensor:
    """Return what part of each filter weight standardization takes away: √n |mean(w)| / ‖w‖.

    Args:
        layer: with a plain `weight`, or one that `weight_standardize_` made: its `weight_v` still has
            the mean.

    Returns:
        (O,) float64 in 0 to 1; ‖w − mean(w)‖² = (1 − share²) ‖w‖².

    Raises:
        UsageError: the layer is of another class, or has no such weight.

    >>> layer = nn.Linear(4, 1); _ = nn.init.constant_(layer.weight, 0.5)
    >>> mean_share(layer)
    tensor([1.], dtype=torch.float64)
    """
    if isinstance(layer, WeightStandardized):
        return mean_shares(layer.weight_v, layer.row_layout())
    weights = plain_weights(layer, WeightStandardized.what)
    if "weight" not in weights:
        raise UsageError(Problem(type(layer).__name__, "it has several weights, none named weight"))
    return mean_shares(weights["weight"], row_layouts(layer)["weight"])
