"""An affine map of the input, multiplied into the columns of a weight: W (s ∘ x + t) = (W · s) x + W t.

For Linear and direct convolutions, (O, I/groups, *K), whose row o reads the inputs of its own group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from normconv.numerics.rows import RowLayout, row_blocks

__all__ = ["response_to_shift", "scale_columns_"]


def _products(
    weight: Tensor, values: Tensor, groups: int
) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """Blocks of rows, which rows they are, and their columns times the inputs' values, in float64."""
    out = weight.shape[0]
    table = values.double().view(groups, -1)
    group_of = torch.arange(out, device=values.device) // max(1, out // groups)
    for block, rows in row_blocks(weight, RowLayout()):
        factors = table[group_of[rows]].view(-1, weight.shape[1], *(1,) * (weight.dim() - 2))
        yield block, rows, block.double() * factors


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
    for block, _, product in _products(weight, factor, groups):
        block.copy_(product)
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
    for _, rows, product in _products(weight, shift, groups):
        out[rows] = product.flatten(1).sum(1)
    return out
