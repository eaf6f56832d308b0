"""The affine map that a normalization with fixed statistics is in eval mode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Affine", "apply_affine", "norm_affine"]


class Affine(NamedTuple):
    """y_c = scale_c · x_c + shift_c over channels c, both (C,) float64."""

    scale: Tensor
    shift: Tensor

    def at(self, channels: Tensor) -> Affine:
        """Return the map of features that are these channels."""
        return Affine(self.scale[channels], self.shift[channels])


def apply_affine(x: Tensor, affine: Affine, axis: int = 1) -> Tensor:
    """Return scale · x + shift, one scale and one shift for each place along an axis.

    >>> two = torch.tensor([2.0, 3.0])
    >>> apply_affine(torch.ones(1, 2), Affine(two, two))
    tensor([[4., 6.]])
    """
    shape = [1] * x.dim()
    shape[axis] = -1
    return x * affine.scale.view(shape) + affine.shift.view(shape)


def norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """Return BatchNorm's eval map as scale and shift.

    y = γ (x − μ) / √(σ² + eps) + β, so scale = γ / √(σ² + eps) and shift = β − μ · scale.

    Args:
        mean: μ, (C,).
        var: σ², (C,), biased or not as it was stored.
        weight: γ, (C,), None for 1.
        bias: β, (C,), None for 0.
        eps: added to the variance, in the variance's unit.

    Returns:
        Both in float64, whatever the inputs' dtypes.

    Source: Ioffe & Szegedy 2015, algorithm 2.

    >>> one = torch.ones(1)
    >>> norm_affine(2 * one, 3 * one, 4 * one, 5 * one, eps=1.0)
    Affine(scale=tensor([2.], dtype=torch.float64), shift=tensor([1.], dtype=torch.float64))
    """
    scale = torch.rsqrt(var.detach().double() + eps)
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    return Affine(scale, shift)
