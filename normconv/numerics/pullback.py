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


# Elements of the scratch: 4 MiB in float32, or one sample's weight.
_BLOCK = 2**20


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

    def both_(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂gain, (N, O), and ∂L/∂v in the shape of the gradients, which are written over.

        Args:
            grads: G, (N, *weight.shape), or rows (N, O, n) of a layer that is not transposed.
        """
        rows = self._rows(grads)
        dots = self._dots(rows)
        if self.centered:
            rows.sub_(rows.mean(-1, keepdim=True))
        rows.mul_(self.v_factor.unsqueeze(-1))
        taken = (self.v_factor * self.shrink * dots).unsqueeze(-1)
        rows.addcmul_(taken, self.unit, value=-1)
        return self.gain_factor * dots, self._shaped(rows, grads)

    def of_places(self, backprops: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂gain, (N, O), and ∂L/∂v, (N, O, n), of a Linear or convolution.

        In each group G = Σ_t b_t a_tᵀ over the T places of a sample. The mean goes from a or from G,
        whichever is smaller.

        Args:
            backprops: b, (N, groups, o, T) with O = groups · o.
            activations: a, (N, groups, n, T): at each place the inputs that the rows are multiplied with.
        """
        if self.centered and backprops.shape[3] < backprops.shape[2]:
            return self._on_centered().of_places(backprops, _center(activations))
        few = self._less_by_places(backprops, activations)
        if self.centered or not few or backprops.dtype != self.unit.dtype:
            return self.both_((backprops @ activations.mT).flatten(1, 2))
        # What is the same for all of a row goes in before G is made: G is then gone through once.
        dots = self._dots_by_places(backprops, activations)
        factor = self.v_factor.view(backprops.shape[1], -1, 1)
        rows = ((backprops * factor) @ activations.mT).flatten(1, 2)
        taken = (self.v_factor * self.shrink * dots).unsqueeze(-1)
        return self.gain_factor * dots, rows.addcmul_(taken, self.unit, value=-1)

    def squares(self, backprops: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖∂L/∂gain‖² and ‖∂L/∂v‖², (N,) each, of what `of_places` takes.

        Where T (o + n) < o n, ∂L/∂v is not made: every product with G is one of b and a, and
        ‖ρ G‖² = Σ_{t,t'} (ρ b_t · ρ b_t') (a_t · a_t'). By Pythagoras the rest is taken off row by row:
        ‖G − κ q u‖² = ‖G‖² − (2κ − κ²) q² with q = G·u. On more places G itself takes less work.

        Source: Bu et al. 2022, "Scalable and Efficient Training of Large Convolutional Neural Networks
        with Differential Privacy", section 3, for ‖G‖.
        """
        if not self._less_by_places(backprops, activations):
            along, across = self.of_places(backprops, activations)
            # Row by row: one float32 sum over a whole weight is off by 1e-4.
            return along.square().sum(-1), across.square().sum(-1).sum(-1)
        if self.centered:
            return self._on_centered().squares(backprops, _center(activations))
        groups = backprops.shape[1]
        dots = self._dots_by_places(backprops, activations).unflatten(1, (groups, -1))
        factor = self.v_factor.view(groups, -1)
        scaled = backprops * factor.unsqueeze(-1)
        whole = ((scaled.mT @ scaled) * (activations.mT @ activations)).sum((1, 2, 3))
        shrink = self.shrink.view(groups, -1)
        off = factor.square() * shrink * (2 - shrink) * dots.square()
        rest = (whole - off.sum((1, 2))).clamp(min=0)
        return (self.gain_factor * dots.flatten(1)).square().sum(-1), rest

    def _less_by_places(self, backprops: Tensor, activations: Tensor) -> bool:
        (rows, places), n = backprops.shape[2:], activations.shape[2]
        return bool(places * (rows + n) < rows * n)

    def _dots_by_places(self, backprops: Tensor, activations: Tensor) -> Tensor:
        """Return G · u, (N, O), as Σ_t b_t (a_t · u): one product for all samples."""
        groups, places = backprops.shape[1], backprops.shape[3]
        unit = self.unit.unflatten(0, (groups, -1))
        along_unit = unit @ activations.permute(1, 2, 0, 3).flatten(2)
        by_place = along_unit.unflatten(2, (-1, places)).permute(2, 0, 1, 3)
        dots: Tensor = by_place.mul(backprops).sum(-1).flatten(1)
        return dots

    def _on_centered(self) -> Pullback:
        """The map where a − mean(a) makes G − mean(G): u is centered, so that G·u stays."""
        return self._replace(centered=False)

    def _dots(self, rows: Tensor) -> Tensor:
        """Return G · u, (N, O), with a bounded scratch: asking for memory costs more than the sums."""
        at_once = max(1, _BLOCK // max(1, self.unit.numel()))
        scratch = torch.empty_like(rows[:at_once])
        products = rows.new_empty(rows.shape[:2])
        for block, out in zip(rows.split(at_once), products.split(at_once), strict=True):
            torch.sum(torch.mul(block, self.unit, out=scratch[: len(block)]), -1, out=out)
        return products

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


def _center(activations: Tensor) -> Tensor:
    return activations - activations.mean(2, keepdim=True)


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
    >>> pullback.both_(torch.tensor([[[0.0, 1.0]]]))[0]
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
