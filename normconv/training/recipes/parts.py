"""What several recipes are made of."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

__all__ = ["GaussianNoise", "adam", "flat_size", "glorot_", "normal_", "scaled"]


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times a factor, one at least.

    >>> scaled(96, 0.25), scaled(6, 0.1)
    (24, 1)
    """
    return max(1, round(channels * width))


def flat_size(features: nn.Module, shape: tuple[int, ...]) -> int:
    """Return how many numbers come out of a network for one sample."""
    with torch.no_grad():
        out: Tensor = features.eval()(torch.zeros(1, *shape))
    features.train()
    return prod(out.shape[1:])


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Adam with learning rate 1e-3, and Keras' eps."""
    return Adam(parameters, lr=1e-3, eps=1e-7)


def glorot_(network: nn.Module) -> nn.Module:
    """Draw weights as Keras does, in place: uniform, of variance 2 / (inputs + outputs); bias 0.

    Source: Glorot & Bengio 2010, equation 16.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network


def normal_(network: nn.Module, deviation: float = 0.05) -> nn.Module:
    """Draw weights from N(0, deviation²), in place; bias 0.

    Source: Salimans & Kingma 2016, section 3.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0, deviation)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network


class GaussianNoise(nn.Module):
    """x + N(0, deviation²) in training, x in eval mode.

    Args:
        deviation: of the noise.
    """

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        """Add noise of the shape of x."""
        return x + self.deviation * torch.randn_like(x) if self.training else x

    def extra_repr(self) -> str:
        """Say the deviation."""
        return f"{self.deviation}"
