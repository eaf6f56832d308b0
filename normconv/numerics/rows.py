"""The rows of a weight: one per output channel, whatever the layer's layout.

Linear and convolution store (O, I/groups, *K): output channels lead. Transposed convolution stores
(I, O/groups, *K): the output channel is the pair (group, second axis), which no single axis of the
weight spans when groups > 1. Everything here works on the split view (groups, I/groups, O/groups, *K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowLayout", "row_norms", "scale_rows"]


@dataclass(frozen=True)
class RowLayout:
    """Where the output channels of a weight are.

    Args:
        transposed: True for transposed convolutions.
        groups: the layer's groups; only matters when transposed.
    """

    transposed: bool = False
    groups: int = 1

    def channels(self, weight: Tensor) -> int:
        """Return the number of output channels, O.

        >>> RowLayout(transposed=True, groups=2).channels(torch.empty(4, 3, 5))
        6
        """
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]

    def split(self, weight: Tensor) -> Tensor:
        """View a transposed convolution's weight as (groups, I/groups, O/groups, *K)."""
        split: Tensor = weight.unflatten(0, (self.groups, weight.shape[0] // self.groups))
        return split

    def row_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape in which one number a row is stored beside the weight.

        (O, 1, …) for convolutions and Linear, (1, O, 1, …) for transposed ones as torch's own
        weight norm has it, (groups, 1, O/groups, 1, …) for grouped transposed ones.

        >>> RowLayout().row_shape(torch.empty(8, 3, 3, 3))
        (8, 1, 1, 1)
        >>> RowLayout(transposed=True, groups=2).row_shape(torch.empty(4, 3, 5))
        (2, 1, 3, 1)
        """
        kernel = (1,) * (weight.dim() - 2)
        if not self.transposed:
            return (weight.shape[0], *(1,) * (weight.dim() - 1))
        if self.groups == 1:
            return (1, weight.shape[1], *kernel)
        return (self.groups, 1, weight.shape[1], *kernel)

    def broadcast(self, row_values: Tensor, weight: Tensor) -> Tensor:
        """Shape (O,) or stored row values to multiply `split(weight)` or the weight itself."""
        kernel = (1,) * (weight.dim() - 2)
        if not self.transposed:
            return row_values.reshape(weight.shape[0], *(1,) * (weight.dim() - 1))
        return row_values.reshape(self.groups, 1, weight.shape[1], *kernel)


def row_norms(weight: Tensor, layout: RowLayout) -> Tensor:
    """Return the L2 norm of each row, ‖w_o‖, as (O,), in the weight's dtype.

    >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), RowLayout())
    tensor([5., 0.])
    """
    if not layout.transposed:
        norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return norms
    split = layout.split(weight)
    axes = [1, *range(3, split.dim())]
    found: Tensor = torch.linalg.vector_norm(split, dim=axes)
    return found.flatten()


def scale_rows(weight: Tensor, factor: Tensor, layout: RowLayout) -> Tensor:
    """Multiply each row by its factor: w_o · factor_o.

    Args:
        weight: (O, I/groups, *K), or (I, O/groups, *K) when transposed.
        factor: (O,), or any row shape of the layout.
        layout: where the output channels are.

    >>> scale_rows(torch.ones(2, 2), torch.tensor([2.0, -1.0]), RowLayout())
    tensor([[ 2.,  2.],
            [-1., -1.]])
    """
    if not layout.transposed:
        return weight * layout.broadcast(factor, weight)
    split = layout.split(weight)
    scaled: Tensor = (split * layout.broadcast(factor, weight)).flatten(0, 1)
    return scaled
