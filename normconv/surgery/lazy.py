"""Lazy layers get their shapes from one forward of the example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normconv.errors import PlanError, Problem
from normconv.graph import train_branches_
from normconv.layers import copy_model
from normconv.numerics import state_kept
from normconv.surgery.wrappers import refuse_wrapped

__all__ = ["lazy_modules", "lazy_note", "lazy_problems", "materialise_", "materialised"]

Model = TypeVar("Model", bound=nn.Module)

_SEED = 0


def lazy_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose parameters wait for a first forward, by name.

    >>> list(lazy_modules(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))))
    ['0']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if any(is_lazy(t) for s in (module._parameters, module._buffers) for t in s.values())
    }


def lazy_problems(model: nn.Module) -> list[Problem]:
    """Return a problem for each lazy module: what has no shapes fits no plan."""
    way_out = "call the model once with such inputs, or let nc.convert(model, ...) do so on a copy"
    return [
        Problem(name, f"{type(module).__name__} is lazy and has no parameters yet", way_out)
        for name, module in lazy_modules(model).items()
    ]


def lazy_note(number: int) -> str:
    """Say what was done with lazy modules."""
    return (
        f"{number} lazy modules got their shapes from the example inputs, and random weights (seed "
        f"{_SEED}): what was converted is an untrained model"
    )


def materialised(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Model:
    """Return the model with shapes in place of lazy parameters; the model itself where none is lazy.

    The argument stays lazy. The copy shares every tensor that has a shape already.

    Raises:
        PlanError: as `materialise_`.
    """
    if not lazy_modules(model):
        return model
    refuse_wrapped(model)
    twin = copy_model(model, share_tensors=True)
    materialise_(twin, args, kwargs)
    return twin


def materialise_(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Give lazy modules their shapes by one forward in eval mode, in place.

    The random state is fixed, and nothing else of the model changes. What eval mode does not call is
    looked for in a second forward in training mode.

    Raises:
        PlanError: the forward fails, or does not reach every lazy module.
    """
    waiting = list(lazy_modules(model).values())
    flags = [(module, module.training) for module in waiting]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with ExitStack() as stack:
        stack.callback(_set_flags, flags)
        stack.enter_context(state_kept(model, but=waiting))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(_SEED)
        for set_mode in (nn.Module.eval, train_branches_):
            set_mode(model)
            if lazy_modules(model):
                _forward(model, args, kwargs)
    if problems := lazy_problems(model):
        what = "it is lazy and no forward of the example inputs reaches it"
        raise PlanError([Problem(p.where, what, "give inputs that do") for p in problems])


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        model(*args, **kwargs)
    except Exception as reason:  # the forward is the user's
        first = next(iter(lazy_modules(model)), "")
        why = f"{type(reason).__name__}: {reason}"
        what = f"the forward that gives lazy modules their shapes raises {why}"
        way_out = "check that the example inputs fit the model"
        raise PlanError(Problem(first or type(model).__name__, what, way_out)) from reason
