"""An affine map of the input, multiplied into the columns of a weight: W (s ∘ x + t) = (W · s) x + W t.

For Linear and direct convolutions, (O, I/groups, *K), whose row o reads the inputs of its own group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["response_to_shift", "scale_columns_"]

_BLOCK = 2**19  # elements in float64 at a time


def _rows(weight: Tensor, values: Tensor, groups: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, with what each row's columns are multiplied by, (rows, I/groups, 1, …)."""
    out = weight.shape[0]
    table = values.double().view(groups, -1)
    group_of = torch.arange(out, device=values.device) // max(1, out // groups)
    step = max(1, _BLOCK * out // max(1, weight.numel()))
    for first in range(0, out, step):
        rows = slice(first, min(out, first + step))
        yield rows, table[group_of[rows]].view(-1, weight.shape[1], *(1,) * (weight.dim() - 2))


@torch.no_grad()
def scale_columns_(weight: Tensor, factor: Tensor, groups: int = 1) -> Tensor:
    """Multiply each column by its input's factor, in place: in float64, rounded once.

    Args:
        weight: (O, I/groups, *K).
        factor: (I,).
        groups: of the convolution.

    >>> scale_columns_(torch.ones(1, 2), torch.tensor([2.0, -1.0]))
    tensor([[ 2., -1.]])
    """
    for rows, factors in _rows(weight, factor, groups):
        weight[rows] = (weight[rows].double() * factors).to(weight.dtype)
    return weight


@torch.no_grad()
def response_to_shift(weight: Tensor, shift: Tensor, groups: int = 1) -> Tensor:
    """Return what a constant input puts out, W t, (O,) float64.

    Args:
        weight: (O, I/groups, *K).
        shift: (I,).
        groups: of the convolution.

    >>> response_to_shift(torch.ones(1, 2), torch.tensor([2.0, -1.0]))
    tensor([1.], dtype=torch.float64)
    """
    out = shift.new_zeros(weight.shape[0], dtype=torch.float64)
    for rows, shifts in _rows(weight, shift, groups):
        out[rows] = (weight[rows].double() * shifts).flatten(1).sum(1)
    return out
