"""A convolutional variational autoencoder of binary digits.

Of the paper are the residual blocks with ELU and Adamax; depth, channels, number of latent variables,
learning rate and number of epochs are ours, also with `--full`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adamax, Optimizer

from normconv.sources.datasets import Labelled, Samples
from normconv.training.recipe import Budget, Recipe, scaled_to_one
from normconv.training.recipes.parts import flat_size, normal_, scaled
from normconv.training.tasks import Bound

__all__ = ["RECIPE", "binary", "gaussian_divergence"]

_LATENT = 32


class Residual(nn.Module):
    """x + conv(ELU(conv(ELU(x)))), both of 3x3 and the same number of channels.

    Args:
        channels: of x.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        out: Tensor = self.conv2(F.elu(self.conv1(F.elu(x))))
        return x + out


class ConvVAE(nn.Module):
    """q(z | x) and p(x | z) of two residual blocks each, z of 32 Gaussian variables.

    Args:
        width: factor of the channels.
        shape: (C, H, W) of an image, H and W divisible by 4.
    """

    def __init__(self, width: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        one, two = scaled(32, width), scaled(64, width)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(shape[0], one, 3, 2, 1), Residual(one), nn.ELU()),
            *(nn.Conv2d(one, two, 3, 2, 1), Residual(two), nn.ELU(), nn.Flatten()),
        )
        small = (two, shape[1] // 4, shape[2] // 4)
        self.posterior = nn.Linear(flat_size(self.encoder, shape), 2 * _LATENT)
        self.decoder = nn.Sequential(
            *(nn.Linear(_LATENT, prod(small)), nn.Unflatten(1, small), Residual(two), nn.ELU()),
            *(nn.ConvTranspose2d(two, one, 4, 2, 1), Residual(one), nn.ELU()),
            nn.ConvTranspose2d(one, shape[0], 4, 2, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to the logits of their reconstruction and the KL of each, (N,)."""
        mean, log_deviation = self.posterior(self.encoder(x)).float().chunk(2, 1)
        z = mean + log_deviation.exp() * torch.randn_like(mean)
        return self.decoder(z), gaussian_divergence(mean, log_deviation)


def gaussian_divergence(mean: Tensor, log_deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation²) ‖ N(0, 1)), summed over axis 1.

    Source: Kingma & Welling 2014, appendix B.

    >>> gaussian_divergence(torch.tensor([[2.0]]), torch.tensor([[0.0]])).item()
    2.0
    """
    per_variable = (mean.square() + (2 * log_deviation).exp() - 1) / 2 - log_deviation
    return per_variable.sum(1)


def binary(data: Labelled) -> Labelled:
    """Draw each pixel once, with a fixed seed, as 1 with the probability of its grey.

    Source: Salakhutdinov & Murray 2008, section 5.
    """
    data = scaled_to_one(data)
    generator = torch.Generator().manual_seed(0)
    train, test = (
        Samples(torch.bernoulli(part.inputs, generator=generator), part.labels)
        for part in (data.train, data.test)
    )
    return Labelled(train, test, data.classes, f"{data.origin}, binary")


def _network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    return normal_(ConvVAE(width, shape))


def _adamax(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return Adamax(parameters, lr=2e-3)


RECIPE = Recipe(
    name="conv-vae",
    reproduces=(
        "The evidence lower bound of a convolutional autoencoder rises faster with weight norm: "
        "Salimans & Kingma 2016, section 5.2, MNIST."
    ),
    network=_network,
    optimizer=_adamax,
    small=Budget(20, 8_000, 0.5, (100,)),
    full=Budget(200, None, 2.0, (100,)),
    normalizations=("plain", "wn", "wn+init"),
    data="mnist",
    prepare=binary,
    task=Bound(),
)
