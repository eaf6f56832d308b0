"""Columns of a weight against the layer itself in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normconv.layers import absorb_input_affine_
from normconv.numerics import Affine, relative_l2, response_to_shift, rows, scale_columns_

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), (3, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, bias=False), (3, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (3, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (3, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, dilation=2), (3, 6, 4, 4, 4)),
    "reflect": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("block", [2**17, 16])
def test_a_map_of_the_input_is_absorbed(
    name: str, weight_norm: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_BLOCK", block)
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    layer = factory().double()
    x = torch.randn(shape, dtype=torch.float64)
    affine = Affine(torch.randn(6).double(), torch.randn(6).double())
    view = (1, -1) + (1,) * (x.dim() - 2)
    with torch.no_grad():
        expected = layer(x * affine.scale.view(view) + affine.shift.view(view))
        absorb_input_affine_(layer, affine, weight_norm=weight_norm)
        assert relative_l2(layer(x), expected) <= 1e-14


def test_columns_are_rounded_once() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    factor = torch.rand(6).double() + 0.5
    expected = (weight.double() * factor).bfloat16()
    assert torch.equal(scale_columns_(weight.clone(), factor), expected)


def test_a_response_is_in_float64() -> None:
    weight = torch.tensor([[1e8, 1.0]])
    assert response_to_shift(weight, torch.tensor([1.0, 1.0])).tolist() == [1e8 + 1]


def test_a_bias_that_is_made_follows_the_shift() -> None:
    one = Affine(torch.ones(2).double(), torch.ones(2).double())
    layer = nn.Linear(2, 1, bias=False)
    absorb_input_affine_(layer, one, bias_trainable=False)
    assert not layer.bias.requires_grad
    frozen = nn.Linear(2, 1).requires_grad_(False)
    absorb_input_affine_(frozen, one, bias_trainable=True)
    assert frozen.bias.requires_grad
