"""Batches whose inputs are dicts of tensors: checked, cast and counted like tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.calibration import Batches


class TwoCameras(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        left, right = (self.backbone(observation[name]).mean((2, 3)) for name in ("left", "right"))
        return left - right


def observation(samples: int) -> dict[str, Tensor]:
    return {name: torch.randn(samples, 3, 8, 8) for name in ("left", "right")}


@pytest.mark.parametrize("wrap", [lambda o: (o,), lambda o: {"observation": o}])
def test_a_dict_that_is_one_input_calibrates(wrap) -> None:
    net = TwoCameras()
    net(observation(64))
    data = [wrap(observation(16)) for _ in range(2)]
    options = {"at": "backbone", "example_inputs": (observation(4),), "data": data}
    _, report = nc.convert(net.eval(), "gn", **options)
    assert report.facts["data"]["samples"] == 32
    assert report.facts["after"]["output"] < report.facts["before"]["output"]


def test_what_is_inside_is_checked_and_cast() -> None:
    net = TwoCameras().double()
    ((given,), _) = next(iter(Batches.of([(observation(2),)], net)))
    assert {tensor.dtype for tensor in given.values()} == {torch.float64}
    bad = observation(2)
    bad["right"][0, 0, 0, 0] = torch.nan
    with pytest.raises(nc.UsageError, match="NaN"):
        Batches.of([(bad,)], net).checked()
    with pytest.raises(nc.UsageError, match="goes into a tuple"):
        Batches.of([observation(2)], net).checked()
    with pytest.raises(nc.UsageError, match="empty"):
        Batches.of([(observation(0),)], net).checked()
