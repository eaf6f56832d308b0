"""Several processes with data of their own: what is gathered on each is put together on all."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["of_all_ranks"]

T = TypeVar("T")


def of_all_ranks(value: T) -> list[T]:
    """Return the value of every rank, in their order; of this one alone without `torch.distributed`.

    Tensors come back on the device they were on here, so that all ranks compute the same from them.

    >>> of_all_ranks(3)
    [3]
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    device = next((t.device for t in pytree.tree_leaves(value) if isinstance(t, Tensor)), None)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _moved(value, torch.device("cpu")))
    return [each if device is None else _moved(each, device) for each in found]


def _moved(value: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, value)
