"""From the gradient of a computed weight to those of what it was computed from, sample by sample.

Weight norm and weight standardization are of one form. With u a unit direction of the row and G the
gradient of the loss by the weight's row,

    ∂L/∂gain = α (G · u)        ∂L/∂v = ρ (G − mean(G) − κ (G · u) u)

where weight norm has no mean(G), κ = 1 and u = v/‖v‖, and weight standardization has u the centered row
over its length and κ = what is left of it after eps: both are linear in G, the same map for every sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normconv.numerics.rows import RowLayout, wide_dtype
from normconv.numerics.standardization import dialect_named

__all__ = ["Pullback", "norm_pullback", "standard_pullback"]


class Pullback(NamedTuple):
    """The linear map of one weight.

    Args:
        unit: u, (O, n): unit rows, or zero where a row has no direction.
        gain_factor: α, (O,).
        v_factor: ρ, (O,).
        shrink: κ, (O,).
        centered: whether the mean of G goes.
        layout: where the rows of the weight are.
    """

    unit: Tensor
    gain_factor: Tensor
    v_factor: Tensor
    shrink: Tensor
    centered: bool
    layout: RowLayout

    def along(self, grads: Tensor) -> Tensor:
        """Return ∂L/∂gain, (N, O), of gradients (N, *weight.shape)."""
        along: Tensor = self.gain_factor * torch.linalg.vecdot(self._rows(grads), self.unit)
        return along

    def both_(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂gain, (N, O), and ∂L/∂v in the shape of the gradients, which are written over."""
        rows = self._rows(grads)
        dots = torch.linalg.vecdot(rows, self.unit)
        if self.centered:
            rows.sub_(rows.mean(-1, keepdim=True))
        rows.mul_(self.v_factor.unsqueeze(-1))
        taken = (self.v_factor * self.shrink * dots).unsqueeze(-1)
        rows.addcmul_(taken, self.unit, value=-1)
        return self.gain_factor * dots, self._shaped(rows, grads)

    def squares(self, backprops: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖∂L/∂gain‖² and ‖∂L/∂v‖², (N,) each, of a Linear, and never make ∂L/∂v.

        G = Σ_t b_t a_tᵀ over the T places of a sample, so every product with G is one of b and a, and
        ‖ρ G‖² = Σ_{t,t'} (ρ b_t · ρ b_t') (a_t · a_t'). By Pythagoras the rest is taken off row by row:
        ‖G − p·1/√n − κ q u‖² = ‖G‖² − p² − (2κ − κ²) q² with p = G·1/√n, q = G·u.

        Args:
            backprops: b, (N, T, O).
            activations: a, (N, T, n).

        Source: Li et al. 2022, "Large Language Models Can Be Strong Differentially Private Learners",
        section 4, for ‖G‖.
        """
        dots = (backprops * (activations @ self.unit.T)).sum(1)
        scaled = backprops * self.v_factor
        if backprops.shape[1] == 1:
            whole = scaled.square().sum((1, 2)) * activations.square().sum((1, 2))
        else:
            whole = ((scaled @ scaled.mT) * (activations @ activations.mT)).sum((1, 2))
        off = self.shrink * (2 - self.shrink) * dots.square()
        if self.centered:
            n = activations.shape[-1]
            off = off + (backprops * activations.sum(-1, keepdim=True)).sum(1).square() / n
        rest = whole - (self.v_factor.square() * off).sum(-1)
        return (self.gain_factor * dots).square().sum(-1), rest.clamp(min=0)

    def _rows(self, grads: Tensor) -> Tensor:
        """Lay gradients (N, *weight.shape) out as (N, O, n): a view but for transposed layers."""
        if not self.layout.transposed:
            return grads.flatten(2).to(self._dtype(grads))
        split: Tensor = grads.unflatten(1, (self.layout.groups, -1))
        return split.transpose(2, 3).flatten(3).flatten(1, 2).to(self._dtype(grads))

    def _dtype(self, grads: Tensor) -> torch.dtype:
        return torch.promote_types(grads.dtype, self.unit.dtype)

    def _shaped(self, rows: Tensor, grads: Tensor) -> Tensor:
        if not self.layout.transposed:
            return rows.reshape(grads.shape).to(grads.dtype)
        groups, outs = self.layout.groups, grads.shape[2]
        split: Tensor = rows.reshape(
            grads.shape[0], groups, outs, grads.shape[1] // groups, *grads.shape[3:]
        )
        return split.transpose(2, 3).reshape(grads.shape).to(grads.dtype)


def norm_pullback(g: Tensor, v: Tensor, layout: RowLayout) -> Pullback:
    """Return the map of `normed_weight`: α = 1, ρ = g/‖v‖, κ = 1.

    Args:
        g: one number a row.
        v: (O, I/groups, *K), or (I, O/groups, *K) when transposed; no zero rows.
        layout: where the output channels are.

    Source: Salimans & Kingma 2016, equation 3.

    >>> pullback = norm_pullback(torch.tensor([2.0]), torch.tensor([[3.0, 4.0]]), RowLayout())
    >>> gain, v = pullback.both_(torch.tensor([[[5.0, 0.0]]]))
    >>> gain, v
    (tensor([[3.]]), tensor([[[ 1.2800, -0.9600]]]))
    """
    rows, gain = _wide_rows(g, v, layout)
    norms = torch.linalg.vector_norm(rows, dim=1)
    one = torch.ones_like(norms)
    return Pullback(rows / norms.unsqueeze(1), one, gain / norms, one, False, layout)


def standard_pullback(gain: Tensor, v: Tensor, layout: RowLayout, dialect: str) -> Pullback:
    """Return the map of `standard_weight`: α = s‖c‖/d, ρ = gain·s/d, with c the centered row.

    κ = var/(var + eps), or std/(std + eps) where eps is added to the deviation.

    Args:
        gain: one number a row.
        v: (O, I/groups, *K), or (I, O/groups, *K) when transposed.
        layout: where the output channels are.
        dialect: a name of `DIALECTS`.

    Raises:
        UsageError: there is no such dialect.

    >>> one = torch.ones(1)
    >>> pullback = standard_pullback(one, torch.tensor([[1.0, 3.0]]), RowLayout(), "timm")
    >>> pullback.along(torch.tensor([[[0.0, 1.0]]]))
    tensor([[1.0000]])
    """
    way = dialect_named(dialect)
    rows, factor = _wide_rows(gain, v, layout)
    n = rows.shape[1]
    center = rows - rows.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(center, dim=1)
    denominator, scale = way.denominator(length, n), way.scale(n)
    # A row without direction has c = 0: u is 0 there, not 0/0.
    unit = center / torch.where(length == 0, torch.ones_like(length), length).unsqueeze(1)
    left = (denominator - way.eps) / denominator
    shrink = left if way.unbiased else length.square() / n / denominator.square()
    return Pullback(
        unit, scale * length / denominator, factor * scale / denominator, shrink, True, layout
    )


def _wide_rows(gain: Tensor, v: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(v.dtype)
    whole = v.detach().to(wide)
    if layout.transposed:
        whole = layout.split(whole).movedim(2, 1).flatten(0, 1)
    return whole.flatten(1), gain.detach().to(wide).flatten()
