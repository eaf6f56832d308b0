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
    problems = []
    for path, module in model.named_modules():
        if (found := _wrapping(module)) is not None:
            what, way_out = found
            problems.append(Problem(path or "the model", what, way_out))
    if problems:
        raise PlanError(problems)


def _wrapping(module: nn.Module) -> tuple[str, str] | None:
    """What is in the way, and the way out."""
    wrapped = f"it is wrapped in {type(module).__name__}"
    if isinstance(module, torch.jit.ScriptModule):
        return wrapped, "TorchScript cannot be edited: convert the Python model it was made from"
    bases = type(module).__mro__
    kinds = {kind.__name__ for kind in bases}
    if any(kind.__module__.startswith("torch.distributed._composable.replicate") for kind in bases):
        return wrapped, "convert before replicate()"
    if kinds & {"DistributedDataParallel", "DataParallel"}:
        return wrapped, "convert model.module, then wrap again"
    if kinds & {"FullyShardedDataParallel", "FSDPModule", "ReplicateModule"}:
        return wrapped, "convert before sharding"
    if "OptimizedModule" in kinds:
        return wrapped, "convert model._orig_mod, then compile again"
    if any(type(p).__name__ == "DTensor" for p in module._parameters.values()):
        return "its parameters are DTensors", "convert before distributing them"
    return None
