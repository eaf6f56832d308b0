"""A first look, on data that is always there."""

from __future__ import annotations

from torch import nn

from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.parts import adam, glorot_, scaled

__all__ = ["RECIPE"]


def network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three convolutions with norms before their ReLU, the mean over pixels, a linear layer."""
    one, two = scaled(32, width), scaled(64, width)
    return glorot_(
        nn.Sequential(
            *(nn.Conv2d(shape[0], one, 3, padding=1), nn.BatchNorm2d(one), nn.ReLU()),
            *(nn.Conv2d(one, two, 3, 2, padding=1), nn.BatchNorm2d(two), nn.ReLU()),
            *(nn.Conv2d(two, two, 3, padding=1), nn.BatchNorm2d(two), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(two, classes)),
        )
    )


RECIPE = Recipe(
    name="digits",
    reproduces="Nothing published: a first look in a minute, on scikit-learn's 8x8 digits.",
    network=network,
    optimizer=adam,
    small=Budget(6, None, 0.5, (4, 32), (0, 1)),
    full=Budget(30, None, 1.0, (2, 8, 32, 128), (0, 1, 2, 3, 4)),
    normalizations=("plain", "bn", "wn", "wn+mobn", "gn", "gn+ws"),
    data="digits",
)
