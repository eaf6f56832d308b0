"""Refitting the layers before the norms: to their new inputs, and to weights without a mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.calibration.ranks import of_all_ranks
from normconv.graph import NormState
from normconv.layers import WeightStandardized, layout_of
from normconv.numerics import apply_affine, fit_filters, standard_gain

__all__ = ["Refit", "can_refit", "refit_"]

_ROWS = 32  # patches for each element of a filter
_MOST_ROWS = 2**15
_LARGEST = 8192  # elements of a filter: its covariance then takes 512 MiB
_POOR = 4  # patches for each element below which the covariance is a guess


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
    patches: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, before: Tensor | None) -> None:
        """Take in one batch.

        Args:
            x: the layer's input.
            before: the input of the original's norm, where the layer's output stands.
        """
        patches = _patches(self.layer, x)
        rows = min(_MOST_ROWS, _ROWS * patches.shape[2]) // max(1, self.batches) + 1
        # Not every k-th: those of a few columns of the image are not like the others.
        rng = torch.Generator().manual_seed(0)
        chosen = torch.randperm(patches.shape[1], generator=rng)[:rows].to(x.device)
        self.patches.append(patches[:, chosen])
        if self.wanted and before is not None:
            target = apply_affine(before.double(), self.state.standardizing)
            self.outputs.append(target.movedim(1, -1).flatten(0, -2)[chosen].float())

    def put_together(self) -> None:
        """Add what other processes gathered of the layer, on all of them."""
        parts = of_all_ranks((self.patches, self.outputs))
        self.patches = [patch for patches, _ in parts for patch in patches]
        self.outputs = [output for _, outputs in parts for output in outputs]


def can_refit(layer: nn.Module) -> bool:
    """Say whether the layer's patches can be read off: Linear, Conv1d and Conv2d.

    >>> can_refit(nn.Conv2d(4, 4, 3)), can_refit(nn.ConvTranspose2d(4, 4, 3))
    (True, False)
    """
    weight = layer._parameters.get("weight", layer._parameters.get("weight_v"))
    if weight is None or not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return False
    # A forward of the user's may see other patches: one that pads by itself, or scales.
    forward = "forward" not in vars(layer) and type(layer).forward in _KNOWN
    return forward and 1 < weight[0].numel() <= _LARGEST


_KNOWN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs of each output number, (groups, rows, n); rows in the order (N, *positions)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    columns = F.unfold(x, kernel, dilation, 0, stride)
    split: Tensor = columns.unflatten(1, (layer.groups, -1))
    return split.permute(1, 0, 3, 2).flatten(1, 2)


@torch.no_grad()
def refit_(refit: Refit) -> tuple[float, str]:
    """Write the fitted filters into the layer; return the share of variance lost, and a warning.

    The bias takes what the patches' mean asks for. A standardized layer gets v and the gain with which
    its weight is the fitted one.
    """
    layer: Any = refit.layer
    groups, standardized = len(refit.patches[0]), isinstance(layer, WeightStandardized)
    # Without outputs the filter that is wanted is the one before it lost its mean, which v still is.
    weight: Tensor = layer.weight_v if standardized else layer.weight
    start: Tensor = layer.weight if refit.outputs else weight
    rows = start.detach().flatten(1).unflatten(0, (groups, -1))
    biases = layer.bias.detach().unflatten(0, (groups, -1))
    fits = []
    for group in range(groups):
        x = torch.cat([part[group] for part in refit.patches])
        size = rows.shape[1]
        y = None
        if refit.outputs:
            y = torch.cat(refit.outputs)[:, group * size : (group + 1) * size]
        fits.append(fit_filters(x, rows[group], biases[group], y, zero_mean=standardized))
    fitted = torch.cat([fit.weight for fit in fits]).reshape(weight.shape)
    weight.copy_(fitted)
    layer.bias.copy_(torch.cat([fit.bias for fit in fits]))
    if standardized:
        layout = layout_of(layer)
        assert layout is not None
        gain = standard_gain(weight, layout, layer.dialect)
        layer.weight_gain.copy_(gain.reshape(layer.weight_gain.shape))
    lost = float(torch.cat([fit.lost for fit in fits]).mean())
    count, n = sum(part.shape[1] for part in refit.patches), rows.shape[2]
    poor = (
        f"{count} patches for filters of {n} elements: give more data" if count < _POOR * n else ""
    )
    return lost, poor
