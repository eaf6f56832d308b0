"""Standardized weights of checkpoints: the dialects, with another eps and with NFNets' γ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normconv.bridges.gains import GainRows
from normconv.numerics import Dialect, true_standard_weight

__all__ = ["StandardizedBy", "standardized_weight"]


@dataclass(frozen=True)
class StandardizedBy:
    """A weight that is standardized whenever it is used.

    Args:
        gain: its key; empty for a gain of 1.
        v: the key of v.
        rows: which elements are standardized together.
        way: what divides.
        gamma: a constant factor of the gain.
    """

    gain: str
    v: str
    rows: GainRows
    way: Dialect
    gamma: float = 1.0


@torch.no_grad()
def standardized_weight(gain: Tensor | None, v: Tensor, by: StandardizedBy) -> Tensor:
    """Return γ · gain · s · (v − mean(v)) / d(v) in float64, rounded once to v's dtype.

    Source: Qiao et al. 2019, equation 6; Brock et al. 2021, equation 2 for γ.

    >>> by = StandardizedBy("", "weight", GainRows((1, 1), 0), Dialect(1e-10))
    >>> standardized_weight(None, torch.tensor([[1.0, 3.0]]), by)
    tensor([[-1.,  1.]])
    """
    view, layout = by.rows.rows(v)
    factor = torch.full((layout.channels(view),), by.gamma, dtype=torch.float64)
    if gain is not None:
        factor = factor * gain.double().reshape(-1)
    weight = true_standard_weight(factor, view, layout, by.way)
    return by.rows.back(weight, tuple(v.shape))
