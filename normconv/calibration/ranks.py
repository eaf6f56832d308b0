"""Several processes with data of their own: what is gathered on each is put together on all."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from normconv.errors import MissingDependency, Problem, UsageError

__all__ = ["Share", "join_processes", "of_all_ranks", "rank"]

T = TypeVar("T")


class Share(NamedTuple):
    """Which part of the work a process does.

    Args:
        rank: its number.
        processes: how many there are.
        device: what it computes on.
    """

    rank: int
    processes: int
    device: torch.device


def join_processes(device: str = "auto") -> Share:
    """Join the processes that `accelerate launch` or `torchrun` started; stay alone where none did.

    Args:
        device: of a process that is alone; ``auto`` is an accelerator where there is one. Of several
            processes Accelerate gives each its own.

    Raises:
        MissingDependency: there are several processes and Accelerate is not installed.
        UsageError: there is no such device.

    >>> join_processes("cpu")
    Share(rank=0, processes=1, device=device(type='cpu'))
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Share(0, 1, _device(device))
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingDependency.needs("Accelerate", "accelerate") from None
    state = PartialState(cpu=device == "cpu")
    return Share(state.process_index, state.num_processes, state.device)


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except Exception as reason:  # torch raises every kind
        what = str(reason).splitlines()[0]
        raise UsageError(Problem("device", what, "take auto or cpu")) from None
    if torch.device(name).type == "meta":
        raise UsageError(Problem("device", "meta has no values", "take auto or cpu"))
    return torch.device(name)


def rank() -> int:
    """Return the number of this process; 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
