"""Filters refitted to the inputs they see: least squares, and the nearest filter without a mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Fit", "fit_filters"]


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
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
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
        x: patches, (rows, n).
        weight: (O, n).
        bias: (O,).
        y: wanted outputs, (rows, O); None for those of the weight itself.
        zero_mean: whether each filter must sum to 0.
        ridge: how far to trust few patches; 0 takes them as they are.

    Source: ridge regression toward a prior; the projection is the Lagrangian of min E|wx − w'x − b|²
        under 1ᵀw' = 0.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    >>> fit = fit_filters(x, torch.tensor([[2.0, 1.0]]), torch.zeros(1), zero_mean=True, ridge=0.0)
    >>> fit.weight.tolist(), fit.bias.tolist()
    ([[0.5, -0.5]], [1.5])
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    n = x.shape[1]
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    scale = covariance.diagonal().mean()
    # A layer whose inputs are constant has no covariance, and any filter is as good as any other.
    level = torch.clamp(ridge * scale, min=1e-12 * float(scale) + 1e-300)
    system = covariance + level * torch.eye(n, dtype=x.dtype, device=x.device)
    right = torch.ones(n, 1, dtype=x.dtype, device=x.device)
    if y is not None:
        missing = y.double() - (x @ weight.T + bias)
        right = torch.cat([right, centred.T @ (missing - missing.mean(0)) / len(x)], 1)
    solved = _solve(system, right)
    fitted = weight if y is None else weight + solved[:, 1:].T
    lost = torch.zeros_like(bias)
    if zero_mean:
        p = solved[:, 0]
        variance = ((fitted @ covariance) * fitted).sum(1).clamp_min(1e-300)
        sums = fitted.sum(1)
        lost = (sums**2 / p.sum() / variance).clamp(0, 1)
        fitted = fitted - torch.outer(sums / p.sum(), p)
    at_mean = weight @ mean + bias if y is None else y.double().mean(0)
    return Fit(fitted, at_mean - fitted @ mean, lost)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        solution: Tensor = torch.linalg.lstsq(system, right).solution
        return solution
    return torch.cholesky_solve(right, factor)
