"""A recurrent autoencoder that draws an image step by step: DRAW without attention.

Of the paper are 64 glimpses, batches of 128, Adam, and weight norm on all weights of the LSTMs, which
start without data. Units, latent variables, learning rate, β1 = 0.5, the bound of the gradient and the
number of epochs are ours, also with `--full`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.conv_vae import binary, gaussian_divergence
from normconv.training.recipes.parts import scaled
from normconv.training.tasks import Bound

__all__ = ["RECIPE", "Draw"]


class Draw(nn.Module):
    """c ← c + W h_dec over T steps, with z of each step drawn from what the encoder makes of x − σ(c).

    Args:
        pixels: of an image.
        units: of both LSTMs.
        latent: variables a step.
        glimpses: T.

    Source: Gregor et al. 2015, equations 3 to 8, with the reading and writing of section 3.1.
    """

    def __init__(self, pixels: int, units: int, latent: int, glimpses: int) -> None:
        super().__init__()
        self.glimpses = glimpses
        self.encoder = nn.LSTMCell(2 * pixels + units, units)
        self.posterior = nn.Linear(units, 2 * latent)
        self.decoder = nn.LSTMCell(latent, units)
        self.write = nn.Linear(units, pixels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (N, ...) to the logits of their reconstruction and the KL of each, (N,)."""
        flat = x.flatten(1)
        none = flat.new_zeros(len(flat), self.decoder.hidden_size)
        canvas, divergence = torch.zeros_like(flat), flat.new_zeros(len(flat))
        encoder = decoder = (none, none)
        for _ in range(self.glimpses):
            error = flat - canvas.sigmoid()
            encoder = self.encoder(torch.cat((flat, error, decoder[0]), 1), encoder)
            mean, log_deviation = self.posterior(encoder[0]).float().chunk(2, 1)
            divergence = divergence + gaussian_divergence(mean, log_deviation)
            z = mean + log_deviation.exp() * torch.randn_like(mean)
            decoder = self.decoder(z, decoder)
            canvas = canvas + self.write(decoder[0])
        return canvas.view_as(x), divergence


def _network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    glimpses = max(4, round(64 * min(1.0, width)))
    return Draw(prod(shape), scaled(256, width), scaled(100, width), glimpses)


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=1e-3, betas=(0.5, 0.999))


RECIPE = Recipe(
    name="recurrent",
    reproduces=(
        "The evidence lower bound of DRAW rises faster with weight norm on all weights of its LSTMs, "
        "without data-dependent initial weights: Salimans & Kingma 2016, section 5.3 (here without "
        "attention), MNIST."
    ),
    network=_network,
    optimizer=_adam,
    clip=10.0,
    small=Budget(20, 8_000, 0.25, (128,)),
    full=Budget(100, None, 1.0, (128,)),
    normalizations=("plain", "wn"),
    data="mnist",
    prepare=binary,
    task=Bound(),
)
