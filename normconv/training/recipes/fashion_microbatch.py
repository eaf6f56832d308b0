"""Norms after ReLU, from a batch of 128 down to one of 2.

The study's BatchNorm averages its statistics with Keras's momentum of 0.99. A reduced run at batch 128
has some 250 steps, of which that average still holds the initial values: here it is torch's own 0.1, also
with `--full`. The study's GroupNorm of 32 groups mixed rows of pixels, and its weight standardization
never ran: `gn` has 16 channels a group, and `gn+ws` standardizes.
"""

from __future__ import annotations

from torch import nn

from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.parts import adam, flat_size, glorot_, scaled

__all__ = ["RECIPE"]


def _block(before: int, after: int) -> list[nn.Module]:
    """Two 3x3 convolutions, ReLU, norm; pooling and dropout."""
    return [
        *(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(after, 1e-3)),
        *(nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(after, 1e-3)),
        *(nn.MaxPool2d(2), nn.Dropout(0.25)),
    ]


def network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two blocks of 32 and 64 channels, a linear layer of 512 units with a norm, a linear layer."""
    one, two, units = (scaled(channels, width) for channels in (32, 64, 512))
    features = nn.Sequential(*_block(shape[0], one), *_block(one, two), nn.Flatten())
    flat = flat_size(features, shape)
    head = (nn.Linear(flat, units), nn.ReLU(), nn.BatchNorm1d(units, 1e-3), nn.Dropout(0.5))
    return glorot_(nn.Sequential(*features, *head, nn.Linear(units, classes)))


RECIPE = Recipe(
    name="fashion-microbatch",
    reproduces=(
        "Batch norm falls behind as the batch shrinks, group norm with weight standardization does not: "
        "a Keras study on Fashion-MNIST after Qiao et al. 2019."
    ),
    network=network,
    optimizer=adam,
    small=Budget(5, 8_000, 0.25, (2, 64, 128)),
    full=Budget(10, 50_000, 1.0, (2, 64, 128), (0, 1, 2)),
    normalizations=("plain", "bn", "gn", "gn+ws", "wn", "wn+mobn"),
    data="fashion-mnist",
)
