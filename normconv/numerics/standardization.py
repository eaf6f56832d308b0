"""Weight standardization, w = gain · s · (v − mean(v)) / d(v) row by row, as pure tensor maths.

What the denominator d and the scale s are differs between the codes that networks were trained with, by
enough to break parity: each way is a *dialect*, n the number of elements of a row.

    qiao  d = std + 1e-5, std with n − 1       s = 1        Qiao et al. 2019, reference code
    timm  d = √(var + 1e-6), var with n        s = 1        timm's StdConv2d
    bit   d = √(var + 1e-10), var with n       s = 1        Kolesnikov et al. 2020, reference code
    nf    d = √(var + 1e-6), var with n        s = 1/√n     Brock et al. 2021, timm's ScaledStdConv2d

timm loads the weights of BiT with 1e-8 in place of 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normconv.errors import Problem, UsageError
from normconv.numerics.rows import (
    RowLayout,
    beside,
    in_memory_format_of,
    leading_rows,
    row_axes,
    row_blocks,
    weight_of_leading,
    wide_dtype,
)

__all__ = [
    "DIALECTS",
    "Dialect",
    "dialect_named",
    "mean_shares",
    "row_size",
    "standard_gain",
    "standard_weight",
    "true_standard_weight",
]


class Dialect(NamedTuple):
    """One way to standardize.

    Args:
        eps: added under the root to the variance; with `unbiased`, to the standard deviation.
        unbiased: the standard deviation is taken with n − 1, and eps added to it.
        by_fan_in: s = 1/√n instead of 1.
    """

    eps: float
    unbiased: bool = False
    by_fan_in: bool = False

    def denominator(self, length: Tensor, n: int) -> Tensor:
        """Return d from the length of the row without its mean, ‖v − mean(v)‖; finite slope at 0."""
        if self.unbiased:
            return length / math.sqrt(max(1, n - 1)) + self.eps
        return torch.sqrt(length.square() / n + self.eps)

    def scale(self, n: int) -> float:
        """Return s."""
        return float(n**-0.5) if self.by_fan_in else 1.0


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "qiao": Dialect(1e-5, unbiased=True),
        "timm": Dialect(1e-6),
        "bit": Dialect(1e-10),
        "nf": Dialect(1e-6, by_fan_in=True),
    }
)


def dialect_named(name: str) -> Dialect:
    """Return a dialect by its name.

    Raises:
        UsageError: there is none of that name.

    >>> dialect_named("timm").eps
    1e-06
    """
    found = DIALECTS.get(name)
    if found is None:
        known = ", ".join(DIALECTS)
        raise UsageError(
            Problem(f"dialect={name!r}", "is no weight standardization", f"use {known}")
        )
    return found


def row_size(weight: Tensor, layout: RowLayout) -> int:
    """Return n, the number of elements of a row.

    >>> row_size(torch.empty(8, 3, 5, 5), RowLayout())
    75
    """
    return weight.numel() // max(1, layout.channels(weight))


def standard_weight(gain: Tensor, v: Tensor, layout: RowLayout, dialect: str = "timm") -> Tensor:
    """Return w = gain · s · (v − mean(v)) / d(v) row by row, differentiable in gain and v.

    On a CPU the fused kernel of group normalization does it, each row a group: it is vectorised along
    the row, which that of batch normalization is not. Elsewhere, and for transposed layers, whose rows
    are channels as they lie, the one of batch normalization does, in fewer launches. Half and bfloat16
    rows are computed in float32. A constant row gives 0 (up to the rounding of its mean) and a row of one
    element gives 0, with finite gradients.

    Args:
        gain: one number a row, any row shape of the layout.
        v: (O, I/groups, *K), or (I, O/groups, *K) when transposed.
        layout: where the output channels are.
        dialect: a name of `DIALECTS`.

    Returns:
        The weight in v's shape, dtype and memory format.

    Raises:
        UsageError: there is no such dialect.

    Source: Qiao et al. 2019, "Weight Standardization", equation 6.

    >>> standard_weight(torch.ones(1, 1), torch.tensor([[1.0, 3.0]]), RowLayout(), "timm")
    tensor([[-1.0000,  1.0000]])
    """
    way, n = dialect_named(dialect), row_size(v, layout)
    if not v.numel():
        return v * gain.sum().to(v.dtype)  # no rows, or nothing in them
    wide = wide_dtype(v.dtype)
    factor = gain.reshape(-1).to(wide)
    if way.by_fan_in:
        factor = factor * way.scale(n)
    if not layout.transposed and v.device.type == "cpu" and not way.unbiased and n > 1:
        rows = leading_rows(v).to(wide).unsqueeze(0)
        weight = torch.group_norm(rows, rows.shape[1], factor, None, way.eps)
        return weight_of_leading(weight.to(v.dtype), v)
    rows = _as_channels(v, layout).to(wide)
    if way.unbiased or n == 1:  # the fused kernels refuse rows of one element
        weight = _by_length(rows, factor, way, n)
    else:
        weight = F.batch_norm(rows, None, None, factor, None, True, 0.0, way.eps)
    return in_memory_format_of(v, _from_channels(weight, v, layout).to(v.dtype))


def _as_channels(v: Tensor, layout: RowLayout) -> Tensor:
    """Lay the rows along axis 1, as batch normalization has its channels: (1, O, n) or (I/g, O, *K)."""
    if not layout.transposed:
        return v.reshape(1, v.shape[0], -1)
    if layout.groups == 1:
        return v
    return layout.split(v).transpose(0, 1).flatten(1, 2)


def _from_channels(rows: Tensor, v: Tensor, layout: RowLayout) -> Tensor:
    if not layout.transposed or layout.groups == 1:
        return rows.reshape(v.shape)
    split: Tensor = rows.unflatten(1, (layout.groups, v.shape[1]))
    return split.transpose(0, 1).reshape(v.shape)


def _by_length(rows: Tensor, factor: Tensor, way: Dialect, n: int) -> Tensor:
    axes = [0, *range(2, rows.dim())]
    center = rows - rows.mean(axes, keepdim=True)
    # Torch's own standard deviation has slope NaN where it is 0; its norm has slope 0 there.
    length = torch.linalg.vector_norm(center, dim=axes, keepdim=True)
    return center * (factor.reshape(length.shape) / way.denominator(length, n))


def standard_gain(weight: Tensor, layout: RowLayout, dialect: str = "timm") -> Tensor:
    """Return the gain with which v = w is standardized to w − mean(w): d(w) / s.

    Args:
        weight: the plain weight in the layout's shape.
        layout: where the output channels are.
        dialect: a name of `DIALECTS`.

    Returns:
        (O,) float64, never 0.

    >>> standard_gain(torch.tensor([[1.0, 3.0]]), RowLayout(), "bit")
    tensor([1.0000], dtype=torch.float64)
    """
    way, n = dialect_named(dialect), row_size(weight, layout)
    gain = weight.new_zeros(layout.channels(weight), dtype=torch.float64)
    for block, rows in row_blocks(weight.detach(), layout):
        _, length = _centered(block, layout)
        gain[rows] = way.denominator(length, n).flatten() / way.scale(n)
    return gain


def mean_shares(weight: Tensor, layout: RowLayout) -> Tensor:
    """Return what part of each row is its mean, √n |mean(w)| / ‖w‖: what standardization takes away.

    Args:
        weight: the plain weight in the layout's shape.
        layout: where the output channels are.

    Returns:
        (O,) float64 in 0 to 1; 0 for a row of zeros.

    >>> mean_shares(torch.tensor([[1.0, -1.0], [2.0, 2.0], [0.0, 0.0]]), RowLayout())
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    n = row_size(weight, layout)
    shares = weight.new_zeros(layout.channels(weight), dtype=torch.float64)
    for block, rows in row_blocks(weight.detach(), layout):
        axes, wide = row_axes(block, layout), block.double()
        # Both lengths in units of the largest element, whose square may not fit in float64.
        largest = wide.abs().amax(axes, keepdim=True)
        wide = wide / torch.where(largest == 0, torch.ones_like(largest), largest)
        squares = wide.square().sum(axes).flatten()
        length = torch.where(squares == 0, torch.ones_like(squares), squares).sqrt()
        shares[rows] = (n**0.5 * wide.mean(axes).flatten().abs() / length).clamp(max=1)
    return shares


def _centered(block: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """The block without the means of its rows, float64, and the lengths of those, kept as axes."""
    axes, wide = row_axes(block, layout), block.double()
    center = wide - wide.mean(axes, keepdim=True)
    return center, torch.linalg.vector_norm(center, dim=axes, keepdim=True)


@torch.no_grad()
def true_standard_weight(
    gain: Tensor, v: Tensor, layout: RowLayout, dialect: str | Dialect = "timm"
) -> Tensor:
    """Return the float64 value of `standard_weight` rounded once to v's dtype; any dialect will do.

    >>> true_standard_weight(torch.ones(1), torch.tensor([[1.0, 3.0]]), RowLayout())
    tensor([[-1.0000,  1.0000]])
    """
    way = dialect_named(dialect) if isinstance(dialect, str) else dialect
    n = row_size(v, layout)
    factor = gain.detach().double().reshape(-1) * way.scale(max(1, n))
    weight = v.detach().clone()  # preserve_format: strides follow v
    for block, rows in row_blocks(weight, layout):
        center, length = _centered(block, layout)
        block.copy_(center * (beside(factor[rows], block, layout) / way.denominator(length, n)))
    return weight
