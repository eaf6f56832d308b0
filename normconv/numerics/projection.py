"""Filters refitted to the inputs they see: least squares, and the nearest filter without a mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Fit", "Second", "fit_filters", "second_of"]


class Second(NamedTuple):
    """Means and sums of centred products of patches x and outputs y; two of them add up.

    Args:
        number: how many patches.
        x: their mean, (n,) float64.
        xx: Σ (x − mean)(x − mean)ᵀ, (n, n).
        y: the mean of the outputs, (O,); None without outputs.
        xy: Σ (x − mean)(y − mean)ᵀ, (n, O).

    Source: Chan, Golub & LeVeque 1983, equation 2.1, for products.
    """

    number: int
    x: Tensor
    xx: Tensor
    y: Tensor | None = None
    xy: Tensor | None = None

    def __add__(self, other: Second) -> Second:  # type: ignore[override]
        if not self.number or not other.number:
            return other if not self.number else self
        number = self.number + other.number
        part, far = other.number / number, other.x - self.x
        weight = self.number * part
        xx = self.xx + other.xx + weight * torch.outer(far, far)
        if self.y is None or self.xy is None or other.y is None or other.xy is None:
            return Second(number, self.x + part * far, xx)
        off = other.y - self.y
        xy = self.xy + other.xy + weight * torch.outer(far, off)
        return Second(number, self.x + part * far, xx, self.y + part * off, xy)


def second_of(x: Tensor, y: Tensor | None = None) -> Second:
    """Return the sums of patches (rows, n) and outputs (rows, O), in float64.

    >>> sums = second_of(torch.tensor([[1.0], [3.0]])) + second_of(torch.tensor([[5.0]]))
    >>> sums.number, sums.x.item(), sums.xx.item()
    (3, 3.0, 8.0)
    """
    x = x.detach().double()
    mean = x.mean(0)
    centred = x - mean
    if y is None:
        return Second(len(x), mean, centred.T @ centred)
    y = y.detach().double()
    return Second(len(x), mean, centred.T @ centred, y.mean(0), centred.T @ (y - y.mean(0)))


class Fit(NamedTuple):
    """Refitted filters.

    Args:
        weight: (O, n) float64.
        bias: (O,) float64.
        lost: what the lost mean costs each filter, as a share of its output's variance, (O,); 0 where
            it was free to keep it.
    """

    weight: Tensor
    bias: Tensor
    lost: Tensor


def fit_filters(
    seen: Second,
    weight: Tensor,
    bias: Tensor,
    *,
    zero_mean: bool = False,
    ridge: float = 1e-2,
) -> Fit:
    """Return the filters that come nearest to y on the patches x, and not far from what they were.

    With C the covariance of the patches and λ = ridge · tr(C) / n,
    w ← w + (C + λ)⁻¹ cov(x, y − w·x), and with `zero_mean` after that
    w ← w − (1ᵀw / 1ᵀp) p, p = (C + λ)⁻¹ 1,
    which among all filters without a mean is the one whose output is nearest. It costs
    (1ᵀw)² / 1ᵀp of variance; taking the mean off each element would cost (1ᵀw)² 1ᵀC1 / n², never less.

    Args:
        seen: sums of patches x and wanted outputs y, or without y for those of the weight itself.
        weight: (O, n).
        bias: (O,).
        zero_mean: whether each filter must sum to 0.
        ridge: how far to trust few patches; 0 takes them as they are.

    Source: ridge regression toward a prior; the projection is the Lagrangian of min E|wx − w'x − b|²
        under 1ᵀw' = 0.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    >>> weight, bias = torch.tensor([[2.0, 1.0]]), torch.zeros(1)
    >>> fit = fit_filters(second_of(x), weight, bias, zero_mean=True, ridge=0.0)
    >>> fit.weight.tolist(), fit.bias.tolist()
    ([[0.5, -0.5]], [1.5])
    """
    weight, bias = weight.double(), bias.double()
    n = len(seen.x)
    covariance = seen.xx / seen.number
    scale = covariance.diagonal().mean()
    # A layer whose inputs are constant has no covariance, and any filter is as good as any other.
    level = torch.clamp(ridge * scale, min=1e-12 * float(scale) + 1e-300)
    system = covariance + level * torch.eye(n, dtype=weight.dtype, device=weight.device)
    right = torch.ones(n, 1, dtype=weight.dtype, device=weight.device)
    fitted, at_mean = weight, weight @ seen.x + bias
    if seen.xy is not None and seen.y is not None:
        missing = seen.xy / seen.number - covariance @ weight.T
        solved = _solve(system, torch.cat([right, missing], 1))
        fitted, at_mean = weight + solved[:, 1:].T, seen.y
    else:
        solved = _solve(system, right)
    lost = torch.zeros_like(bias)
    if zero_mean:
        p = solved[:, 0]
        variance = ((fitted @ covariance) * fitted).sum(1).clamp_min(1e-300)
        sums = fitted.sum(1)
        lost = (sums**2 / p.sum() / variance).clamp(0, 1)
        fitted = fitted - torch.outer(sums / p.sum(), p)
    return Fit(fitted, at_mean - fitted @ seen.x, lost)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        solution: Tensor = torch.linalg.lstsq(system, right).solution
        return solution
    return torch.cholesky_solve(right, factor)
