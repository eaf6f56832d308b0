"""Refitting one layer: patches are the layer's, and the fit is the least squares one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normconv.calibration.patches import can_refit, filters_of, patches_of, weight_of
from normconv.calibration.refit import Refit, refit_
from normconv.graph import NormState
from normconv.layers import WeightStandardized, weight_standardize_
from normconv.numerics import relative_l2

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, dilation=2), (5, 4, 9, 9)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 9, 9)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (5, 4, 9, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 9, 9)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 40)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2), (5, 4, 60)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (5, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 1, 2), padding=(1, 0, 1), groups=2), (5, 4, 5, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1), (5, 4, 9, 9)),
    "transposed, groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, 3, 2, output_padding=2, groups=2, dilation=2),
        (5, 4, 20),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, padding=3, dilation=2), (5, 4, 5, 6, 7)),
    "linear": (lambda: nn.Linear(4, 6), (90, 4)),
    "tokens": (lambda: nn.Linear(4, 6), (9, 11, 4)),
}


def outputs_of(layer: nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """(rows, O) from (groups, rows, n)."""
    rows = filters_of(layer, layer.weight)
    return torch.cat([x @ w.T for x, w in zip(patches, rows, strict=True)], 1) + layer.bias


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_filters_are_the_layer(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    wanted = layer(x).movedim(axis, -1).flatten(0, -2)
    patches, chosen = patches_of(layer, x, 10**9)
    assert sorted(chosen.tolist()) == list(range(len(wanted)))
    assert relative_l2(outputs_of(layer, patches), wanted[chosen]) < 1e-6
    assert torch.equal(
        weight_of(layer, filters_of(layer, layer.weight), layer.weight), layer.weight
    )
    few, some = patches_of(layer, x, 7)
    assert relative_l2(outputs_of(layer, few), wanted[some]) < 1e-6
    assert len(some) == 7


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "tokens"])
@pytest.mark.parametrize("standardized", [False, True])
def test_a_layer_finds_back_what_was_put_out(name: str, standardized: bool) -> None:
    """Outputs of another layer of the same kind: with a little ridge the fit is that layer."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, other = make(), make()
    if standardized:
        weight_standardize_(layer)
        weight_standardize_(other)
    one = torch.ones(6)
    state = NormState(one * 0.5, one * 4, None, None, 0.0)
    gathered = Refit(layer, state, batches=4, wanted=True)
    for _ in range(4):
        x = torch.randn((40, *shape[1:]))
        gathered.add(x, other(x).detach() * 2 + 0.5)
    refit_(gathered)
    x = torch.randn(shape)
    assert relative_l2(layer(x), other(x)) < 0.06
    assert isinstance(layer, WeightStandardized) == standardized


def test_what_cannot_be_refitted() -> None:
    assert not can_refit(nn.Conv3d(1024, 2, 3))  # its covariance takes too much
    assert not can_refit(nn.Conv2d(4, 4, 1, groups=4))  # one element a filter
    assert not can_refit(nn.ReLU())
    assert can_refit(weight_standardize_(nn.Conv2d(4, 4, 3)))
