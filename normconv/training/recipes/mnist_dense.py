"""Two linear layers on MNIST: does it matter that weight norm starts from data?

Of the study are the 128 units, SGD with 0.1 and batches of 128; the number of epochs is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import nn
from torch.optim import SGD, Optimizer

from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.parts import glorot_, scaled

__all__ = ["RECIPE"]


def network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Pixels to 128 units to classes, with a norm on the first layer's pre-activation."""
    units = scaled(128, width)
    first = nn.Linear(prod(shape), units)
    rest = (nn.BatchNorm1d(units), nn.ReLU(), nn.Linear(units, classes))
    return glorot_(nn.Sequential(nn.Flatten(), first, *rest))


def _sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.1)


RECIPE = Recipe(
    name="mnist-dense",
    reproduces=(
        "Weight norm without and with data-dependent initial weights against batch norm, layer norm and "
        "nothing, on a fully connected MNIST network: a study after Salimans & Kingma 2016, section 3."
    ),
    network=network,
    optimizer=_sgd,
    small=Budget(20, 8_000, 1.0, (128,), (0, 1, 2)),
    full=Budget(20, None, 1.0, (128,), (0, 1, 2)),
    normalizations=("plain", "wn", "wn+init", "bn", "ln"),
    data="mnist",
)
