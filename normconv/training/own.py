"""A recipe of the user's own network and data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from normconv.errors import Problem, UsageError
from normconv.graph import norm_names
from normconv.sources import open_source
from normconv.training.recipe import Budget, Recipe, Shape

__all__ = ["recipe_of_model"]


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
        UsageError: the model's numbers do not come from chance, so that seeds would not differ.
    """
    name = model if isinstance(model, str) else getattr(model, "__qualname__", "model")

    def network(width: float, shape: Shape, classes: int) -> nn.Module:
        if width != 1:
            what = f"{name} has one width"
            raise UsageError(Problem("--width", what, "say it by --model-arg, or not at all"))
        if isinstance(model, str):
            made = open_source(model, model_args=model_args, random_weights=True).model
        else:
            made = copy.deepcopy(model())
        _check_classifier(made, name, shape, classes)
        return made.train()

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=lr)

    return Recipe(
        name=name,
        reproduces="A network and data of your own.",
        network=network,
        optimizer=optimizer,
        small=Budget(5, 10_000, 1.0, (32,)),
        full=Budget(20, None, 1.0, (32,), (0, 1, 2)),
        normalizations=("plain", "bn", "wn", "wn+mobn", "gn", "gn+ws"),
        data=data,
        options={"lr": lr, "model arguments": dict(model_args or {})},
    )


def _check_classifier(network: nn.Module, name: str, shape: Shape, classes: int) -> None:
    """Refuse a network that does not take the data, or does not tell its classes apart."""
    counts = (
        getattr(network.get_submodule(n), "num_batches_tracked", None) for n in norm_names(network)
    )
    if any(count is not None and int(count) for count in counts):
        what = "its norms have seen batches: it is trained already"
        raise UsageError(Problem(name, what, "name a factory of a fresh network"))
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            logits = copy.deepcopy(network).eval()(torch.zeros(2, *shape))
    except Exception as error:  # the network is the user's
        what = f"it does not take inputs of shape {shape}: {str(error).splitlines()[0]}"
        raise UsageError(Problem(name, what, "give data or a network of another shape")) from None
    finally:
        torch.set_rng_state(state)
    if getattr(logits, "dim", lambda: 0)() != 2 or logits.shape[1] < classes:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        what = f"it puts out {got} for 2 inputs of {classes} classes"
        raise UsageError(Problem(name, what, f"logits of shape (2, {classes}) are needed"))
