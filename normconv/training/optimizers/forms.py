"""The two ways in which an optimizer looks at a plain weight: as (g, v), or as (gain, v).

A row of the weight is w = gain · a · u with a unit direction u. For weight norm u = v/‖v‖ and a = 1; for
weight standardization u = c/‖c‖ with c = v − mean(v), and a = s ‖c‖/d(‖c‖). The row numbers `gain`,
ℓ = ‖v‖ or ‖c‖, and `mean` say all that w does not: v = ℓ u + mean with u = ± w/‖w‖, the sign that of the
gain. So v can be made from w, in its place, and w from v:

    lift     w, ∂L/∂w = G   ->   v, ∂L/∂gain = a (G·u), ∂L/∂v = ρ (G − mean(G) − κ (G·u) u)
    lower    v, gain        ->   w, ℓ = ‖v − mean(v)‖, mean(v)

where weight norm has no means, ρ = gain/ℓ and κ = 1, and weight standardization ρ = gain · s/d and κ =
what is left of the variance after eps. Between the two any rule may step (gain, v).

The mean of v is in no weight, and its gradient is 0: the steps of SGD change it by nothing but weight
decay, and it changes no other number. Adam divides element by element: there the mean moves, and with
weight decay in the gradient it counts.

A gain of 0, or one so small that w would lose bits of its direction, is kept as it is, while w gets the
length `_floor`, about 1e-31 in float32: no sum in the forward pass sees it, and the direction stays.

Source: Salimans & Kingma 2016, equation 3; Qiao et al. 2019, equation 6.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normconv.numerics import Dialect, dialect_named

__all__ = ["Form", "Rows", "first_rows_", "form_named", "lift_", "lower_", "row_mean"]


class Rows(NamedTuple):
    """The row numbers of a weight, shaped to broadcast over it.

    Args:
        gain: g of weight norm, signed.
        length: ‖v‖, or ‖v − mean(v)‖.
        mean: mean(v); weight norm has none.
    """

    gain: Tensor
    length: Tensor
    mean: Tensor | None


class Factors(NamedTuple):
    """What a form makes of the length of a row: a, s/d, and κ."""

    amplitude: Tensor
    slope: Tensor
    shrink: Tensor


class Form(NamedTuple):
    """How a weight is computed from what the optimizer steps.

    Args:
        dialect: of weight standardization; None is weight norm.
    """

    dialect: Dialect | None = None

    @property
    def centered(self) -> bool:
        """Whether the mean of v is in no weight."""
        return self.dialect is not None

    def factors(self, length: Tensor, n: int) -> Factors:
        """Return a, s/d and κ for rows of n elements."""
        if self.dialect is None:
            one = torch.ones_like(length)
            return Factors(one, one / torch.where(length == 0, one, length), one)
        denominator = self.dialect.denominator(length, n)
        if self.dialect.unbiased:
            shrink = (denominator - self.dialect.eps) / denominator
        else:
            shrink = length.square() / n / denominator.square()
        slope = self.dialect.scale(n) / denominator
        return Factors(slope * length, slope, shrink)


def form_named(name: str, dialect: str) -> Form:
    """Return the form of a parameter group, ``wn`` or ``ws``."""
    return Form(dialect_named(dialect) if name == "ws" else None)


def row_mean(w: Tensor, axes: list[int]) -> Tensor:
    """Return the means of the rows, shaped to broadcast.

    >>> row_mean(torch.tensor([[1.0, 3.0]]), [1])
    tensor([[2.]])
    """
    return w.mean(axes, keepdim=True)


def _norm(w: Tensor, axes: list[int]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(w, dim=axes, keepdim=True)
    return norms


def _size(w: Tensor, axes: list[int]) -> int:
    n = 1
    for axis in axes:
        n = n * w.shape[axis]
    return n


def _floor(dtype: torch.dtype, n: int) -> float:
    """The length under which a row of n elements would lose bits of its direction."""
    info = torch.finfo(dtype)
    return float(info.tiny / info.eps) * math.sqrt(n)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: a row without direction stays without."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / torch.where(x == 0, torch.ones_like(x), x))


def _signed_length(rows: Rows, amplitude: Tensor, n: int) -> Tensor:
    """± ‖w‖ as it is stored: the gain times a, but not below the floor."""
    true = rows.gain * amplitude
    size = true.abs().clamp(min=_floor(true.dtype, n))
    return torch.where(rows.gain < 0, -size, size)


def first_rows_(w: Tensor, rows: Rows, form: Form, axes: list[int]) -> None:
    """Set row numbers as wrapping the layer would: v = w as it is, and the gain that keeps w.

    A row of zeros has no direction: weight norm gives it v = 1/√n and g = 0. The mean of a row is taken
    from w and added to what `rows.mean` holds.

    Args:
        w: the weight, written where it has to be.
        rows: written.
        form: how w is computed.
        axes: the axes inside a row.
    """
    n = _size(w, axes)
    if rows.mean is not None:
        mean = row_mean(w, axes)
        rows.mean.add_(mean)
        w.sub_(mean)
    length = _norm(w, axes)
    zero = length == 0
    if not form.centered:
        one = torch.ones_like(length)
        rows.gain.copy_(length)
        length = torch.where(zero, one, length)
        w.add_(torch.where(zero, one * (_floor(w.dtype, n) / math.sqrt(n)), one * 0))
    else:
        rows.gain.copy_(1 / form.factors(length, n).slope)
    rows.length.copy_(length)


def lift_(
    w: Tensor, grad: Tensor, rows: Rows, form: Form, axes: list[int]
) -> tuple[Tensor, Tensor]:
    """Turn a weight, in place, into its v, and return ∂L/∂gain and ∂L/∂v.

    Args:
        w: rows of a weight.
        grad: ∂L/∂w, read only.
        rows: their numbers, read only.
        form: how w is computed.
        axes: the axes inside a row.

    >>> w, rows = torch.tensor([[8.0, 0.0]]), Rows(torch.tensor([[8.0]]), torch.tensor([[4.0]]), None)
    >>> lift_(w, torch.tensor([[1.0, 2.0]]), rows, Form(), [1])
    (tensor([[1.]]), tensor([[0., 4.]]))
    >>> w
    tensor([[4., 0.]])
    """
    n = _size(w, axes)
    amplitude, slope, shrink = form.factors(rows.length, n)
    w.mul_(1 / _signed_length(rows, amplitude, n))
    if form.centered:
        w.sub_(row_mean(w, axes))
    # Up to rounding w is u now. The rest is taken off, so that it does not add up over the steps.
    inverse = _inverse(_norm(w, axes))
    along = (w * grad).sum(axes, keepdim=True) * inverse
    steep = rows.gain * slope
    grad_v = grad * steep
    grad_v.addcmul_(w, -steep * shrink * along * inverse)
    if form.centered:
        grad_v.sub_(steep * row_mean(grad, axes))
    w.mul_(rows.length * inverse)
    if rows.mean is not None:
        w.add_(rows.mean)
    return amplitude * along, grad_v


def lower_(v: Tensor, rows: Rows, form: Form, axes: list[int]) -> None:
    """Turn v, in place, into the weight, and set the length and the mean of its rows.

    Args:
        v: rows of what a weight is computed from.
        rows: their numbers; the gain is read.
        form: how the weight is computed.
        axes: the axes inside a row.

    >>> v, rows = torch.tensor([[4.0, 0.0]]), Rows(torch.tensor([[8.0]]), torch.zeros(1, 1), None)
    >>> lower_(v, rows, Form(), [1])
    >>> v, rows.length
    (tensor([[8., 0.]]), tensor([[4.]]))
    """
    n = _size(v, axes)
    if rows.mean is not None:
        rows.mean.copy_(row_mean(v, axes))
        v.sub_(rows.mean)
    rows.length.copy_(_norm(v, axes))
    amplitude = form.factors(rows.length, n).amplitude
    v.mul_(_signed_length(rows, amplitude, n) * _inverse(rows.length))
