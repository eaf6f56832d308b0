"""Which elements of a weight share one gain, told by shapes alone; the maths on them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from normconv.errors import LoadError, Problem
from normconv.numerics import RowLayout, log_gains, scale_rows_, split_weight, true_weight

__all__ = ["GainRows", "log_split", "plain_weight", "split"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GainRows:
    """The slices of a weight that have one gain each.

    Args:
        shape: of the gains.
        axis: the weight's axis along which they lie; None for one gain of the whole weight.
        groups: of a grouped transposed convolution, whose rows lie along two axes; else 0.
    """

    shape: Shape
    axis: int | None
    groups: int = 0

    @classmethod
    def between(cls, gain: Shape, v: Shape) -> GainRows | None:
        """Tell the slices from the shapes of gain and v; None where they do not fit.

        >>> GainRows.between((1, 6, 1), (4, 6, 3))
        GainRows(shape=(1, 6, 1), axis=1, groups=0)
        >>> GainRows.between((2, 3, 1), (4, 3, 5))
        GainRows(shape=(2, 3, 1), axis=None, groups=2)
        >>> GainRows.between((3, 1), (2, 3)) is None
        True
        """
        if prod(gain) == 1 and (len(gain) < 2 or (len(gain) == len(v) and 1 in v)):
            return cls(gain, None)
        if len(gain) != len(v):
            return None
        long = [axis for axis, size in enumerate(gain) if size != 1]
        if len(long) == 1 and gain[long[0]] == v[long[0]]:
            return cls(gain, long[0])
        grouped = len(v) > 2 and long in ([0], [0, 1]) and gain[1] == v[1]
        if grouped and gain[0] and v[0] % gain[0] == 0:
            return cls(gain, None, groups=gain[0])
        return None

    @classmethod
    def along(cls, dim: int, v: Shape) -> GainRows | None:
        """Give one gain to each slice along an axis; None where there is no such axis.

        Args:
            dim: as `torch.nn.utils.weight_norm` has it; -1 for one gain of the whole weight.
            v: the weight's shape.
        """
        if dim == -1:
            return cls((), None)
        if not 0 <= dim < len(v):
            return None
        return cls(tuple(n if axis == dim else 1 for axis, n in enumerate(v)), dim)

    @classmethod
    def of(cls, layout: RowLayout, v: Shape) -> GainRows:
        """Give one gain to each output channel of a layer, as normconv's layers have it."""
        shape = layout.row_shape(torch.empty(v, device="meta"))
        if layout.transposed and layout.groups > 1:
            return cls(shape, None, groups=layout.groups)
        return cls(shape, 1 if layout.transposed else 0)

    def is_of_layer(self, v: Shape) -> bool:
        """Say whether some layer of normconv has its gains so: one an output channel."""
        if len(v) < 2:
            return False
        one = self.axis is None and len(self.shape) == len(v) and 1 in v[:2]
        return bool(self.groups) or self.axis in (0, 1) or one

    def rows(self, weight: Tensor) -> tuple[Tensor, RowLayout]:
        """View a weight so that the slices are rows."""
        if self.groups:
            return weight, RowLayout(transposed=True, groups=self.groups)
        if self.axis is None:
            return weight.reshape(1, -1), RowLayout()
        if self.axis == 1:
            return weight, RowLayout(transposed=True)
        if weight.dim() == 1:  # each number is a slice
            return weight.reshape(-1, 1), RowLayout()
        return weight.movedim(self.axis, 0), RowLayout()

    def back(self, rows: Tensor, shape: Shape) -> Tensor:
        """Undo `rows`."""
        if self.groups or self.axis == 1:
            return rows
        if self.axis is None or len(shape) == 1:
            return rows.reshape(shape)
        return rows.movedim(0, self.axis)


def plain_weight(gain: Tensor, v: Tensor, rows: GainRows) -> tuple[Tensor, Tensor]:
    """Return g · v / ‖v‖ in float64, rounded once to v's dtype, and which rows had no direction.

    >>> plain_weight(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), GainRows((1, 1), 0))[0]
    tensor([[6., 8.]])
    """
    view, layout = rows.rows(v)
    weight, zero = true_weight(gain, view, layout)
    return rows.back(weight, tuple(v.shape)), zero


def split(weight: Tensor, rows: GainRows) -> tuple[Tensor, Tensor]:
    """Return g = ‖w‖ and v = w; a row of zeros gets v = 1/√n and g = 0.

    >>> g, v = split(torch.tensor([[3.0, 4.0]]), GainRows((1, 1), 0))
    >>> g.item(), v.tolist()
    (5.0, [[3.0, 4.0]])
    """
    view, layout = rows.rows(weight)
    g, v = split_weight(view, None, layout)
    return g.reshape(rows.shape), rows.back(v, tuple(weight.shape))


def log_split(
    gain: Tensor, v: Tensor, rows: GainRows, c: float, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s = log|g| / c, v with the sign of g, and which rows had g = 0.

    Raises:
        LoadError: all gains are 0, which no e^(c·s) is.
    """
    if gain.numel() and not bool(gain.any()):
        what = "all its gains are 0, and none of those is e^(c·s)"
        raise LoadError(Problem(where, what, "leave out --scale exp"))
    logs = log_gains(gain.double().reshape(-1), c, v.dtype)
    view, layout = rows.rows(v.clone())
    signed = rows.back(scale_rows_(view, logs.sign, layout), tuple(v.shape))
    return logs.s.to(gain.dtype).reshape(rows.shape), signed, logs.floored
