"""Weight-normed layers: weight = g · v / ‖v‖, with g a parameter or e^(c·s)."""

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
    rekind_,
    reparametrise_,
    unfit_for,
)
from normconv.numerics import (
    Pullback,
    RowLayout,
    log_gains,
    norm_pullback,
    normed_weight,
    scale_rows_,
    split_weight_,
    true_weight,
    wide_dtype,
)

__all__ = [
    "LogWeightNormed",
    "WeightNormed",
    "linear_gain_",
    "log_gain_",
    "unfit_for_weight_norm",
    "weight_norm_",
]

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

    def computed(self, name: str = "weight") -> Tensor:
        """Return g · v / ‖v‖: same shape, dtype and memory format as v."""
        layout = self.row_layout(name)
        _, v = self.gain_and_v(name)
        return _normed_weight(self._signed_gain(name), v, layout.transposed, layout.groups)

    def _signed_gain(self, name: str) -> Tensor:
        return self.gain_and_v(name)[0]

    def true_weight(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and which rows have ‖v‖ = 0, (O,) bool."""
        g, v = self.gain_and_v(name)
        return true_weight(g.detach(), v.detach(), self.row_layout(name))

    def pullback(self, name: str = "weight") -> Pullback:
        """Return the map from gradients of a weight to those of its g and v."""
        return norm_pullback(*self.gain_and_v(name), self.row_layout(name))


@a_kind
class LogWeightNormed(WeightNormed):
    """A layer with weight = e^(c·s) · v / ‖v‖ over the parameters `weight_s` and `weight_v`.

    The sign of a gain is in v.

    Attributes:
        gain_rate: c.

    Source: Salimans & Kingma 2016, section 2.
    """

    kind = "wn-log"
    prefix = "LogWN"
    what = "weight norm with log gains"
    computed_from = ("weight_s", "weight_v")
    own_attributes = ("gain_rate",)
    weight_s: nn.Parameter
    gain_rate: float

    def _signed_gain(self, name: str) -> Tensor:
        s, v = self.gain_and_v(name)
        return (s.to(wide_dtype(v.dtype)) * self.gain_rate).exp().to(v.dtype)

    def true_weight(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and which rows have ‖v‖ = 0, (O,) bool."""
        s, v = self.gain_and_v(name)
        return true_weight((s.detach().double() * self.gain_rate).exp(), v, self.row_layout(name))

    def pullback(self, name: str = "weight") -> Pullback:
        """Return the map from gradients of a weight to those of its s and v: ∂g/∂s = c · g."""
        _, v = self.gain_and_v(name)
        g = self._signed_gain(name).detach()
        by_g = norm_pullback(g, v, self.row_layout(name))
        rate = self.gain_rate * g.reshape(-1).to(by_g.gain_factor.dtype)
        return by_g._replace(gain_factor=by_g.gain_factor * rate)

    def multiply_rows_(self, factor: Tensor, name: str = "weight") -> None:
        """Multiply the rows of a weight, (O,) float64: s by the logarithm, v by the sign."""
        s, v = self.gain_and_v(name)
        g = (s.double() * self.gain_rate).exp().reshape(-1) * factor
        logs = log_gains(g, self.gain_rate, v.dtype)
        s.copy_(logs.s.reshape(s.shape))
        scale_rows_(v, logs.sign, self.row_layout(name))

    def extra_repr(self) -> str:
        """Say what the plain layer says, and c where it is not 1."""
        plain: str = cast(Any, super()).extra_repr()
        own = [] if self.gain_rate == 1 else [f"gain_rate={self.gain_rate}"]
        return ", ".join([*([plain] if plain else []), *own])


@fx.wrap
def _normed_weight(g: Tensor, v: Tensor, transposed: bool, groups: int) -> Tensor:
    """One call in the eyes of any `torch.fx` tracer, with plain values for the layout."""
    return normed_weight(g, v, RowLayout(transposed, groups))


def weight_norm_(layer: Layer, factor: Tensor | None = None) -> Layer:
    """Turn a layer, in place, into its weight-normed form with weight factor · w.

    v = w as it is and g = ‖w‖ · factor, so that a factor of 0 keeps the direction. `weight_g` and
    `weight_v` take the place of `weight` in the order of parameters and inherit its `requires_grad`.
    `weight_v` is the very parameter that `weight` was: nothing of the layer's size is copied. A layer of
    several weights gets such a pair for each (`weight_ih_l0_g`, `weight_ih_l0_v`).

    Args:
        layer: Linear, Conv1d-3d, ConvTranspose1d-3d, Embedding, RNN, LSTM, GRU, a cell of those, or
            MultiheadAttention (or a subclass), with plain weights.
        factor: (O,) float64 multiplier of the rows, None for 1; for layers of one weight.

    Raises:
        UsageError: the layer is of another class, or has no plain weight.

    >>> layer = weight_norm_(nn.Linear(3, 2))
    >>> isinstance(layer, nn.Linear), [name for name, _ in layer.named_parameters()]
    (True, ['weight_g', 'weight_v', 'bias'])
    """
    layouts = row_layouts(layer)
    gains = {
        name: split_weight_(weight.detach(), factor, layouts[name]).g
        for name, weight in plain_weights(layer, WeightNormed.what).items()
    }
    return reparametrise_(layer, WeightNormed.kind, gains)


@torch.no_grad()
def log_gain_(layer: nn.Module, c: float = 1.0) -> dict[str, Tensor]:
    """Give a weight-normed layer, in place, the gain g = e^(c·s): s = log|g| / c, and the sign into v.

    A gain of 0 has no logarithm: it becomes eps / √O of the layer's largest, which is within rounding.

    Args:
        layer: from `weight_norm_`.
        c: how fast the gain follows s.

    Returns:
        Which rows had a gain of 0, (O,) bool, by weight; weights without such rows are left out.

    Raises:
        UsageError: all gains of a weight are 0; the layer is as it was.

    Source: Salimans & Kingma 2016, section 2.

    >>> layer = weight_norm_(nn.Linear(2, 1)); _ = nn.init.constant_(layer.weight_g, -2.0)
    >>> log_gain_(layer), type(layer).__name__, layer.weight_s
    ({}, 'LogWNLinear', Parameter containing:
    tensor([[0.6931]], requires_grad=True))
    """
    assert isinstance(layer, WeightNormed)
    logs, gains = {}, {}
    for name in layer.weights:
        g, v = layer.gain_and_v(name)
        if not g.is_meta and g.numel() and not bool(g.any()):
            what = f"all gains of {name} are 0, and none of those is e^(c·s)"
            raise UsageError(Problem(type(layer).__name__, what, "use scale='linear' there"))
        logs[name] = log_gains(g.double().reshape(-1), c, v.dtype)
        gains[name] = logs[name].s.to(g.dtype).reshape(g.shape)
    for name, log in logs.items():
        scale_rows_(layer.gain_and_v(name)[1], log.sign, layer.row_layout(name))
    rekind_(layer, LogWeightNormed.kind, gains, {"gain_rate": float(c)})
    return {
        name: log.floored
        for name, log in logs.items()
        if not log.floored.is_meta and bool(log.floored.any())
    }


@torch.no_grad()
def linear_gain_(layer: nn.Module) -> None:
    """Give a layer of `log_gain_`, in place, its gain g = e^(c·s) as a parameter again.

    >>> layer = weight_norm_(nn.Linear(2, 1)); _ = log_gain_(layer); linear_gain_(layer)
    >>> type(layer).__name__
    'WNLinear'
    """
    assert isinstance(layer, LogWeightNormed)
    gains = {name: layer._signed_gain(name) for name in layer.weights}
    rekind_(layer, WeightNormed.kind, gains, {})
    del layer.__dict__["gain_rate"]


def unfit_for_weight_norm(layer: nn.Module) -> str:
    """Say why `weight_norm_` could not change the layer's class; empty where it can. Nothing is changed.

    >>> unfit_for_weight_norm(nn.Linear(1, 1))
    ''
    """
    return unfit_for(WeightNormed.kind, layer)
