"""Lazy models: shapes come from the example inputs, the argument stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.surgery import lazy_modules, materialise_, materialised
from tests.test_contract import NAMES, assert_unchanged, snapshot
from tests.zoo import x

INPUT = (x(2, 3, 6, 6),)


def lazy_net() -> nn.Sequential:
    return nn.Sequential(
        nn.LazyConv2d(4, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.LazyConvTranspose2d(3, 2),
        nn.LazyBatchNorm2d(),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.LazyBatchNorm1d(),
    )


class LazyAux(nn.Module):
    """Its second branch is called in training mode only, and it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()
        self.aux, self.aux_norm = nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Any] = []

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1)
        y = self.norm(self.conv(y))
        return self.aux_norm(self.aux(y)) if self.training else y


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("build", [lazy_net, LazyAux])
def test_lazy_models_convert_and_stay_lazy(build: Any, target: str) -> None:
    model = build().train()
    before, state = snapshot(model), torch.random.get_rng_state()
    converted, report = nc.convert(model, target, example_inputs=INPUT)
    assert_unchanged(before, model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert report.passed
    assert any("lazy modules got their shapes" in note for note in report.notes)
    assert lazy_modules(converted) == {}
    assert all(module.training for module in converted.modules())
    assert all(len(site.reason) > 0 for site in report.sites)
    again = nc.convert(model, target, example_inputs=INPUT).model
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), converted.parameters(), strict=True)
    )


def test_a_plan_of_a_lazy_model_fits_it_once_it_was_called() -> None:
    model = lazy_net()
    plan = nc.make_plan(model, "wn", example_inputs=INPUT)
    assert len(lazy_modules(model)) == 6
    with pytest.raises(nc.PlanError, match=r"LazyConv2d is lazy.*call the model once") as caught:
        nc.apply_plan(model, plan)
    assert [problem.where for problem in caught.value.problems] == ["0", "1", "6", "7", "9", "10"]
    model.eval()(*INPUT)
    converted = nc.apply_plan(model, plan).model
    torch.testing.assert_close(converted(*INPUT), model(*INPUT))


def test_in_place_materialises_in_place() -> None:
    model = lazy_net()
    model[3].eval()
    flags = [module.training for module in model.modules()]
    result = nc.convert_(model, "wn", example_inputs=INPUT)
    assert result.model is model
    assert result.report.passed
    assert lazy_modules(model) == {}
    assert [module.training for module in model.modules()] == flags
    expected = nc.convert(lazy_net(), "wn", example_inputs=INPUT).model
    assert model.state_dict().keys() == expected.state_dict().keys()


def test_refused_in_place_stays_lazy() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(track_running_stats=False))
    before = snapshot(model)
    with pytest.raises(nc.PlanError, match="running statistics"):
        nc.convert_(model, "wn", example_inputs=INPUT)
    assert_unchanged(before, model)


def test_a_forward_that_fails_is_told() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(5, 4, 1), nn.LazyBatchNorm2d())
    before = snapshot(model)
    with pytest.raises(nc.PlanError, match="2: the forward that gives lazy modules their shapes"):
        nc.make_plan(model, "wn", example_inputs=INPUT)
    assert_unchanged(before, model)


def test_what_no_forward_reaches_is_told() -> None:
    model = LazyAux()
    model.never = nn.LazyLinear(2)
    with pytest.raises(nc.PlanError, match="never: it is lazy and no forward"):
        nc.make_plan(model, "wn", example_inputs=INPUT)


def test_nothing_else_of_the_model_moves() -> None:
    model = LazyAux().eval()
    materialise_(model, INPUT, {})
    assert model.calls.item() == 0
    assert model.seen == []
    assert not model.training
    assert model.norm.num_batches_tracked.item() == 0
    assert type(model.norm) is nn.BatchNorm2d
    assert materialised(model, INPUT, {}) is model
    twin = materialised(LazyAux(), INPUT, {})
    assert all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True)
    )


def test_a_copy_shares_what_has_a_shape() -> None:
    model = lazy_net()
    twin = materialised(model, INPUT, {})
    assert twin[3].weight is model[3].weight
    assert len(lazy_modules(model)) == 6
    converted = nc.convert(model, "plain", example_inputs=INPUT).model
    assert converted[3].weight is not model[3].weight
