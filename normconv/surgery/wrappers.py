"""Models that come inside a wrapper are sent back with the word that unwraps them."""

from __future__ import annotations

import torch
from torch import nn

from normconv.errors import PlanError, Problem

__all__ = ["refuse_wrapped"]


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse models that are or hold a wrapper with its own view of the parameters.

    Raises:
        PlanError: names each wrapper and how to get at the model.

    >>> refuse_wrapped(nn.DataParallel(nn.Linear(1, 1)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    normconv.errors.PlanError: the model: it is wrapped in DataParallel; convert model.module, ...
    """
    problems = [
        Problem(path or "the model", f"it is wrapped in {type(module).__name__}", way_out)
        for path, module in model.named_modules()
        if (way_out := _way_out(module))
    ]
    if problems:
        raise PlanError(problems)


def _way_out(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript cannot be edited: convert the Python model it was made from"
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"DistributedDataParallel", "DataParallel"}:
        return "convert model.module, then wrap again"
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "convert before sharding"
    if "OptimizedModule" in kinds:
        return "convert model._orig_mod, then compile again"
    return ""
