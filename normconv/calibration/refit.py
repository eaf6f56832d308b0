"""Refitting the layers before the norms: to their new inputs, and to weights without a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normconv.calibration.patches import filters_of, patches_of, weight_of
from normconv.calibration.ranks import of_all_ranks
from normconv.graph import NormState
from normconv.layers import WeightStandardized, layout_of
from normconv.numerics import Second, apply_affine, fit_filters, second_of, standard_gain

__all__ = ["Fitted", "Refit", "refit_"]

_ROWS = 32  # patches for each element of a filter
_MOST_ROWS = 2**15
_POOR = 4  # patches for each element below which the covariance is a guess


class Fitted(NamedTuple):
    """What a refit says of its layer.

    Args:
        lost: the share of the output's variance that goes with the mean of the filters.
        patches: how many were seen.
        poor: a warning where they were few; empty where they were not.
    """

    lost: float
    patches: int
    poor: str

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio that the loss predicts at the layer's output: −10 log10 of it."""
        return -10 * math.log10(self.lost) if self.lost > 0 else math.inf


@dataclass
class Refit:
    """What is gathered of one layer: patches of its input, and what the original had after it.

    Args:
        layer: of the converted model, with a plain or a standardized weight.
        state: of the original's norm; its standardized input is what the layer should put out.
        batches: how many batches there will be.
        wanted: whether the outputs are fitted too, or only the mean taken out.
    """

    layer: nn.Module
    state: NormState
    batches: int
    wanted: bool
    seen: list[Second] = field(default_factory=list)

    def add(self, x: Tensor, before: Tensor | None) -> None:
        """Take in one batch.

        Args:
            x: the layer's input.
            before: the input of the original's norm, where the layer's output stands.
        """
        n = filters_of(self.layer, _v_of(self.layer)).shape[2]
        rows = min(_MOST_ROWS, _ROWS * n) // max(1, self.batches) + 1
        patches, chosen = patches_of(self.layer, x, rows)
        outputs: list[Tensor | None] = [None] * len(patches)
        if self.wanted and before is not None:
            there = before.movedim(1, -1).flatten(0, -2)[chosen].double()
            target = apply_affine(there, self.state.standardizing)
            outputs = list(target.chunk(len(patches), 1))
        found = [second_of(*pair) for pair in zip(patches, outputs, strict=True)]
        self.seen = _added(self.seen, found)

    def put_together(self) -> None:
        """Add what other processes gathered of the layer, on all of them."""
        parts, self.seen = of_all_ranks(self.seen), []
        for part in parts:
            self.seen = _added(self.seen, part)


def _added(one: list[Second], other: list[Second]) -> list[Second]:
    if not one or not other:
        return one or other
    return [mine + theirs for mine, theirs in zip(one, other, strict=True)]


def _v_of(layer: nn.Module) -> Tensor:
    v: Any = layer.weight_v if isinstance(layer, WeightStandardized) else layer.weight
    assert isinstance(v, Tensor)
    return v


@torch.no_grad()
def refit_(refit: Refit) -> Fitted:
    """Write the fitted filters into the layer, in place; say what the lost mean costs.

    The bias takes what the patches' mean asks for. A standardized layer gets v and the gain with which
    its weight is the fitted one.
    """
    layer: Any = refit.layer
    standardized, weight = isinstance(layer, WeightStandardized), _v_of(layer)
    # Without outputs the filter that is wanted is the one before it lost its mean, which v still is.
    outputs = refit.seen[0].xy is not None
    rows = filters_of(layer, (layer.weight if outputs else weight).detach())
    biases = layer.bias.detach().unflatten(0, (len(rows), -1))
    fits = [
        fit_filters(seen, filters, bias, zero_mean=standardized)
        for seen, filters, bias in zip(refit.seen, rows, biases, strict=True)
    ]
    weight.copy_(weight_of(layer, torch.stack([fit.weight for fit in fits]), weight))
    layer.bias.copy_(torch.cat([fit.bias for fit in fits]))
    if standardized:
        layout = layout_of(layer)
        assert layout is not None
        gain = standard_gain(weight, layout, layer.dialect)
        layer.weight_gain.copy_(gain.reshape(layer.weight_gain.shape))
    count, n = refit.seen[0].number, rows.shape[2]
    what = f"{count} patches for filters of {n} elements: give more data"
    lost = float(torch.cat([fit.lost for fit in fits]).mean())
    return Fitted(lost, count, what if count < _POOR * n else "")
