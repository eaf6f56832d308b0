"""A small CIFAR-10 network, plain and with every layer weight-normed."""

from __future__ import annotations

from torch import nn

from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.parts import adam, flat_size, glorot_, scaled

__all__ = ["RECIPE"]


def network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions of 5x5 with max pooling, three linear layers, ReLU between."""
    one, two, three, four = (scaled(channels, width) for channels in (6, 16, 120, 84))
    features = nn.Sequential(
        *(nn.Conv2d(shape[0], one, 5), nn.BatchNorm2d(one), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(one, two, 5), nn.BatchNorm2d(two), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
    )
    flat = flat_size(features, shape)
    return glorot_(
        nn.Sequential(
            *features,
            *(nn.Linear(flat, three), nn.BatchNorm1d(three), nn.ReLU()),
            *(nn.Linear(three, four), nn.BatchNorm1d(four), nn.ReLU()),
            nn.Linear(four, classes),
        )
    )


RECIPE = Recipe(
    name="tfa-tutorial",
    reproduces=(
        "Plain against weight norm with data-dependent initial weights on a LeNet-like CIFAR-10 network: "
        "the WeightNormalization tutorial of TensorFlow Addons."
    ),
    network=network,
    optimizer=adam,
    small=Budget(10, 20_000, 1.0, (32,), (0, 1, 2)),
    full=Budget(10, None, 1.0, (32,), (0, 1, 2)),
    normalizations=("plain", "wn", "wn+init"),
    data="cifar10",
)
