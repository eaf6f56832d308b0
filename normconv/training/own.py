"""A recipe of the user's own network and data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from normconv.errors import NormconvError, Problem, UsageError
from normconv.graph import norm_names
from normconv.graph.running import first_line
from normconv.sources import open_source
from normconv.surgery.lazy import lazy_problems
from normconv.training.recipe import Budget, Recipe, Shape

__all__ = ["recipe_of_model"]

_NORMED = ("plain", "bn", "wn", "wn+mobn", "gn", "gn+ws")
_NORMLESS = ("plain", "wn", "wn+init")


def recipe_of_model(
    model: str | Callable[[], nn.Module],
    data: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    lr: float = 1e-3,
) -> Recipe:
    """Make a recipe of a classifier: Adam, images scaled to 0 to 1.

    Args:
        model: a spec as `nc.load` takes it, such as ``pkg.mod:factory`` or ``timm:resnet18``; or a
            factory. It is called anew for each seed.
        data: see `open_labelled`.
        model_args: arguments of a spec.
        lr: learning rate of Adam.

    Raises:
        UsageError: the learning rate is no positive number; the model cannot be made, is trained, or is
            the same whatever the seed; or the spec names nothing.

    >>> make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> recipe_of_model(make, "digits").normalizations  # no norm in whose place others could stand
    ('plain', 'wn', 'wn+init')
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise UsageError(Problem("--lr", f"{lr!r} is no positive number", "1e-3 is the default"))
    name = model if isinstance(model, str) else getattr(model, "__qualname__", "model")

    def make() -> nn.Module:
        return _made(model, name, model_args)

    def network(width: float, shape: Shape, classes: int) -> nn.Module:
        if width != 1:
            what = f"{name} has one width"
            raise UsageError(Problem("--width", what, "say it by --model-arg, or not at all"))
        return make().train()

    normed = bool(norm_names(_check_chance(make, name)))

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=lr)

    return Recipe(
        name=name,
        reproduces="A network and data of your own.",
        network=network,
        optimizer=optimizer,
        small=Budget(5, 10_000, 1.0, (32,)),
        full=Budget(20, None, 1.0, (32,), (0, 1, 2)),
        normalizations=_NORMED if normed else _NORMLESS,
        data=data,
        options={"lr": lr, "model arguments": dict(model_args or {})},
    )


def _made(
    model: str | Callable[[], nn.Module], name: str, model_args: Mapping[str, Any] | None
) -> nn.Module:
    """Make the network anew.

    Raises:
        UsageError: that does not go, or what comes of it is no untrained module.
    """
    made: Any
    try:
        if isinstance(model, str):
            made = open_source(model, model_args=model_args, random_weights=True).model
        else:
            made = copy.deepcopy(model())
    except NormconvError:
        raise
    except Exception as reason:  # the factory is the user's
        what = f"it cannot be made ({first_line(reason)})"
        raise UsageError(
            Problem(name, what, "a factory that takes no arguments is needed")
        ) from None
    if not isinstance(made, nn.Module):
        what = f"it makes a {type(made).__name__}, no torch.nn.Module"
        raise UsageError(Problem(name, what, "name a factory of a network"))
    if problems := lazy_problems(made):
        raise UsageError(problems)
    network: nn.Module = made
    norms = (network.get_submodule(norm) for norm in norm_names(network))
    counts = (getattr(norm, "num_batches_tracked", None) for norm in norms)
    if any(count is not None and int(count) for count in counts):
        what = "its norms have seen batches: it is trained already"
        raise UsageError(Problem(name, what, "name a factory of a fresh network"))
    return network


def _check_chance(make: Callable[[], nn.Module], name: str) -> nn.Module:
    """Return one of two networks that differ only in the seed; refuse those that do not differ."""
    with torch.random.fork_rng(devices=[]):
        states = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            made = make()
            states.append(made.state_dict())
    first, second = states
    if first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first if isinstance(first[key], Tensor)
    ):
        what = "two seeds give the same initial numbers: it is trained, or seeds chance itself"
        way_out = "name a factory that draws its weights from torch's own chance"
        raise UsageError(Problem(name, what, way_out))
    return made
