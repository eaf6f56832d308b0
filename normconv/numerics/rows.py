"""The rows of a weight: one per output channel, whatever the layer's layout.

Linear and convolution store (O, I/groups, *K): output channels lead. Transposed convolution stores
(I, O/groups, *K): the output channel is the pair (group, second axis), which no single axis of the
weight spans when groups > 1. Everything here works on the split view (groups, I/groups, O/groups, *K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "RowLayout",
    "all_finite",
    "beside",
    "fill_rows_",
    "in_memory_format_of",
    "leading_rows",
    "row_axes",
    "row_blocks",
    "row_norms",
    "scale_rows",
    "scale_rows_",
    "trailing_rows",
    "weight_of_leading",
    "weight_of_trailing",
    "wide_dtype",
    "wide_row_norms",
]

# Elements of a block: 1 MiB in float64, at most twice that, and once more where a norm must copy it.
_BLOCK = 2**17


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
        weight norm has it, (groups, O/groups, 1, …) for grouped transposed ones: always as many
        dimensions as the weight, which memory formats are made for.

        >>> RowLayout().row_shape(torch.empty(8, 3, 3, 3))
        (8, 1, 1, 1)
        >>> RowLayout(transposed=True, groups=2).row_shape(torch.empty(4, 3, 5))
        (2, 3, 1)
        """
        kernel = (1,) * (weight.dim() - 2)
        if not self.transposed:
            return (weight.shape[0], *(1,) * (weight.dim() - 1))
        return (self.groups, weight.shape[1], *kernel)

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
    return _norms(layout.split(weight) if layout.transposed else weight, layout)


def _norms(rows: Tensor, layout: RowLayout) -> Tensor:
    """Norms of a weight, or of a block of it, in the form that `row_blocks` gives."""
    if not layout.transposed:
        norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
        return norms
    found: Tensor = torch.linalg.vector_norm(rows, dim=[1, *range(3, rows.dim())])
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


def row_blocks(
    weight: Tensor, layout: RowLayout, elements: int | None = None
) -> Iterator[tuple[Tensor, slice]]:
    """Views of whole rows, a bounded number of elements each, and which rows they are.

    Rows lead a block as they lead the weight; a block of a transposed weight is one of its split
    view. No block of several has a single row: torch would sum that in another order.
    """
    if weight.numel() == 0:
        return
    rows = layout.channels(weight)
    at_once = max(2, (elements or _BLOCK) * rows // weight.numel())
    if not layout.transposed:
        for first, end in _spans(rows, at_once):
            yield weight[first:end], slice(first, end)
        return
    split = layout.split(weight)
    groups, each = split.shape[0], split.shape[2]
    if at_once >= each:
        for first, end in _spans(groups, at_once // each):
            yield split[first:end], slice(first * each, end * each)
        return
    for group in range(groups):
        for first, end in _spans(each, at_once):
            block = split[group : group + 1, :, first:end]
            yield block, slice(group * each + first, group * each + end)


def _spans(total: int, at_once: int) -> list[tuple[int, int]]:
    """Even spans of at least `at_once`, and of less than twice as many; one span if there are fewer."""
    number = max(1, total // at_once)
    return [(i * total // number, (i + 1) * total // number) for i in range(number)]


def beside(row_values: Tensor, block: Tensor, layout: RowLayout) -> Tensor:
    """Shape the values of a block's rows, (rows,), to broadcast over it."""
    kernel = (1,) * (block.dim() - (3 if layout.transposed else 1))
    if layout.transposed:
        return row_values.reshape(block.shape[0], 1, block.shape[2], *kernel)
    return row_values.reshape(block.shape[0], *kernel)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: at least float32. `torch.promote_types` would stay in exports.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_axes(block: Tensor, layout: RowLayout) -> list[int]:
    """Return the axes that lie inside a row, in the form that `row_blocks` gives."""
    return [1, *range(3, block.dim())] if layout.transposed else list(range(1, block.dim()))


def in_memory_format_of(like: Tensor, weight: Tensor) -> Tensor:
    """Return the weight channels-last where `like` is: fused kernels return contiguous weights."""
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            like.dim() == rank
            and not like.is_contiguous()
            and like.is_contiguous(memory_format=memory_format)
        ):
            return weight.contiguous(memory_format=memory_format)
    return weight


def leading_rows(weight: Tensor) -> Tensor:
    """Lay a weight whose rows lie along axis 0 out as (O, n), for fused kernels that want it so.

    A view of contiguous and of channels-last memory, since the order within a row means nothing to its
    norm, mean and variance; else a copy. `weight_of_leading` is the way back.

    >>> last = torch.empty(8, 3, 5, 5).to(memory_format=torch.channels_last)
    >>> leading_rows(last).shape, leading_rows(last).data_ptr() == last.data_ptr()
    (torch.Size([8, 75]), True)
    """
    inner = _channels_inside(weight)
    return weight.flatten(1) if inner is None else inner.flatten(1)


def weight_of_leading(rows: Tensor, like: Tensor) -> Tensor:
    """View the rows (O, n) of `leading_rows(like)` as a weight of the shape and memory of `like`."""
    inner = _channels_inside(like)
    return rows.view(like.shape) if inner is None else rows.view(inner.shape).movedim(-1, 1)


def _channels_inside(weight: Tensor) -> Tensor | None:
    """The weight as (O, *K, I) where it lies in memory like that and not as it is; else None."""
    if weight.dim() < 3 or weight.is_contiguous():
        return None
    inner = weight.movedim(1, -1)
    return inner if inner.is_contiguous() else None


def trailing_rows(weight: Tensor, layout: RowLayout) -> Tensor:
    """Lay a transposed convolution's weight out as (n, O): a view where it is channels-last, ungrouped.

    >>> trailing_rows(torch.empty(4, 3, 5), RowLayout(transposed=True, groups=2)).shape
    torch.Size([10, 6])
    """
    inner = layout.split(weight).movedim(2, -1).movedim(0, -2)  # (I/groups, *K, groups, O/groups)
    rows: Tensor = inner.flatten(-2).flatten(0, -2)
    return rows


def weight_of_trailing(rows: Tensor, like: Tensor, layout: RowLayout) -> Tensor:
    """Bring the rows (n, O) of `trailing_rows(like)` to the shape and memory format of `like`."""
    inputs, outputs, *kernel = like.shape
    inner = rows.view(inputs // layout.groups, *kernel, layout.groups, outputs)
    weight = inner.movedim(-2, 0).movedim(-1, 2).flatten(0, 1)
    return (
        weight
        if weight.stride() == like.stride()
        else in_memory_format_of(like, weight.contiguous())
    )


def wide_row_norms(weight: Tensor, layout: RowLayout) -> Tensor:
    """Return the float64 norm of each row, (O,), with a bounded scratch whatever the weight's size.

    Bit for bit `row_norms(weight.double(), layout)`.

    >>> wide_row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), RowLayout())
    tensor([5., 0.], dtype=torch.float64)
    """
    norms = weight.new_zeros(layout.channels(weight), dtype=torch.float64)
    for block, rows in row_blocks(weight.detach(), layout):
        norms[rows] = _norms(block.double(), layout)
    return norms


@torch.no_grad()
def scale_rows_(weight: Tensor, factor: Tensor, layout: RowLayout) -> Tensor:
    """Multiply each row by its factor in place: in float64, rounded once, with a bounded scratch.

    Bit for bit `weight.copy_(scale_rows(weight.double(), factor, layout))`.

    Args:
        weight: (O, I/groups, *K), or (I, O/groups, *K) when transposed.
        factor: (O,) float64.
        layout: where the output channels are.

    >>> scale_rows_(torch.ones(2, 1), torch.tensor([2.0, -1.0]).double(), RowLayout()).flatten()
    tensor([ 2., -1.])
    """
    for block, rows in row_blocks(weight, layout):
        wide = block.double()  # a float64 block is itself
        wide.mul_(beside(factor[rows], block, layout))
        if wide is not block:
            block.copy_(wide)
    return weight


@torch.no_grad()
def fill_rows_(weight: Tensor, which: Tensor, value: float, layout: RowLayout) -> Tensor:
    """Set all elements of some rows, in place.

    Args:
        weight: (O, I/groups, *K), or (I, O/groups, *K) when transposed.
        which: (O,) bool.
        value: what they become.
        layout: where the output channels are.

    >>> fill_rows_(torch.ones(2, 2), torch.tensor([True, False]), 0.5, RowLayout())
    tensor([[0.5000, 0.5000],
            [1.0000, 1.0000]])
    """
    for block, rows in row_blocks(weight, layout):
        block.masked_fill_(beside(which[rows], block, layout), value)
    return weight


def all_finite(tensor: Tensor) -> bool:
    """Say whether no element is NaN or infinite, without a second tensor of that size.

    >>> all_finite(torch.ones(2)), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
