"""Mean and variance of every channel, gathered batch by batch, in float64."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Moments", "moments_of"]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each channel; two of them add up.

    Args:
        number: how many numbers a channel.
        mean: (C,) float64.
        deviation: Σ (x − mean)², (C,) float64.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.
    """

    number: int
    mean: Tensor
    deviation: Tensor

    @property
    def std(self) -> Tensor:
        """√(Σ (x − mean)² / number), (C,)."""
        return (self.deviation / max(1, self.number)).sqrt()

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        count = self.number + other.number
        if not self.number or not other.number:
            return other if not self.number else self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.number / count)
        deviation = self.deviation + other.deviation
        deviation = deviation + difference**2 * (self.number * other.number / count)
        return Moments(count, mean, deviation)


def moments_of(x: Tensor) -> Moments:
    """Return the moments of the channels of (N, C, *).

    >>> import torch
    >>> moments = moments_of(torch.tensor([[1.0], [3.0]])) + moments_of(torch.tensor([[5.0]]))
    >>> moments.number, moments.mean.item(), round(moments.std.item(), 3)
    (3, 3.0, 1.633)
    """
    flat = x.detach().double().transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    return Moments(flat.shape[1], mean, (flat - mean[:, None]).pow(2).sum(1))
