"""Weights that are spread over processes (`DTensor`): a process steps the rows that it holds.

`fully_shard` cuts a parameter along its first axis, where the rows of most weights lie: each row is whole
in one process, and so is all that its step needs. No process has to ask another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normconv.numerics import RowLayout

__all__ = ["local", "local_grad", "placed_as_rows", "why_cut"]


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory; a plain tensor is its own.

    >>> import torch
    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if hasattr(tensor, "placements") else tensor
    return part


def local_grad(weight: Tensor) -> Tensor:
    """Return the gradient of what this process holds of a weight."""
    grad: Any = weight.grad
    placements = getattr(weight, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(placements=placements)
    return local(grad).detach()


def placed_as_rows(values: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """Make of one number for each row that this process holds, (O,), a tensor placed as the rows are."""
    if not hasattr(weight, "placements"):
        return values
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = weight
    placements = [Shard(0) if p.is_shard() else p for p in sharded.placements]
    shape = torch.Size((layout.channels(weight),))
    placed: Tensor = DTensor.from_local(
        values, sharded.device_mesh, placements, shape=shape, stride=(1,)
    )
    return placed


def why_cut(weight: Tensor, layout: RowLayout) -> str:
    """Say how the rows of a weight are cut in pieces; empty where each is whole in one process."""
    axis = int(layout.transposed)
    for placement in getattr(weight, "placements", ()):
        if placement.is_replicate() or (placement.is_shard(axis) and layout.groups == 1):
            continue
        if layout.transposed and layout.groups > 1:
            return "it is sharded, and a row of a grouped transposed convolution is on no one axis"
        if layout.transposed and placement.is_shard(0):
            return (
                "it is sharded along axis 0, which cuts its rows: give fully_shard a "
                "shard_placement_fn that returns Shard(1) for it, or"
            )
        return f"it is placed as {placement}, which cuts its rows"
    return ""
