"""Mean and variance of every channel, gathered batch by batch, in float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Moments", "moments_of"]


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each channel; two of them add up.

    Args:
        count: numbers a channel.
        mean: (C,) float64.
        deviation: Σ (x − mean)², (C,) float64.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @property
    def std(self) -> Tensor:
        """√(Σ (x − mean)² / count), (C,)."""
        return (self.deviation / max(1, self.count)).sqrt()

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        deviation = self.deviation + other.deviation
        deviation = deviation + difference**2 * (self.count * other.count / count)
        return Moments(count, mean, deviation)


def moments_of(x: Tensor) -> Moments:
    """Return the moments of the channels of (N, C, *).

    >>> import torch
    >>> moments = moments_of(torch.tensor([[1.0], [3.0]])) + moments_of(torch.tensor([[5.0]]))
    >>> moments.count, moments.mean.item(), round(moments.std.item(), 3)
    (3, 3.0, 1.633)
    """
    flat = x.detach().double().transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    return Moments(flat.shape[1], mean, (flat - mean[:, None]).pow(2).sum(1))
