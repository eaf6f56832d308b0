"""GroupNorm over every zoo model: refused with a way out, or all but the samples' statistics exact."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconv.errors import Refused
from normconv.graph import is_norm
from normconv.plan import Plan
from normconv.proof import evaluate, prove_converted, record_original_within
from normconv.surgery import Result, apply_plan, make_plan
from normconv.targets import TARGETS
from tests.test_contract import (
    assert_same_state,
    assert_unchanged,
    converted,
    original_of,
    plan_of,
    snapshot,
)
from tests.zoo import ZOO

SAMPLED = tuple(kind.name for kind in TARGETS if kind.fidelity == "calibrated")
# What the exact targets refuse for want of statistics only.
FRESH = [name for name, case in ZOO.items() if "running statistics" in case.refused]
# A group of a single number has no variance.
TOO_SMALL: tuple[str, ...] = ()


def each(names: list[str]) -> Any:
    found = [
        pytest.param(name, target, id=f"{name}-{target}") for name in names for target in SAMPLED
    ]
    return pytest.mark.parametrize(("name", "target"), found)


CONVERTS = [name for name, case in ZOO.items() if case.converts and name not in TOO_SMALL]
REFUSED = [name for name, case in ZOO.items() if not case.converts and name not in FRESH]


@functools.cache
def proof_of(name: str, target: str) -> tuple[Plan, Result, Any]:
    done = converted(name, target)
    args, kwargs = done.case.inputs()
    recording = record_original_within(done.original, "", done.plan.steps, args, kwargs)
    return done.plan, done.result, prove_converted(recording, done.model)


@each(REFUSED)
def test_refused_for_the_same_reason(name: str, target: str) -> None:
    case, model = ZOO[name], original_of(name)
    before = snapshot(model)
    with pytest.raises(Refused) as caught:
        apply_plan(model, plan_of(model, case, target))
    assert case.refused in str(caught.value)
    assert_unchanged(before, model)


@each([*CONVERTS, *FRESH])
def test_no_norm_with_running_statistics_is_left(name: str, target: str) -> None:
    plan, result, proof = proof_of(name, target)
    kept = {name for step in plan.steps if step.action == "keep" for name in (step.site,)}
    assert {n for n, m in result.model.named_modules() if is_norm(m)} == kept
    assert [check for check in proof.checks if not check.passed] == []
    normal = [m for m in result.model.modules() if isinstance(m, nn.GroupNorm)]
    assert normal or not any(step.action in ("fold", "affine", "fresh") for step in plan.steps)


@each(CONVERTS)
def test_with_the_trained_statistics_it_is_the_original(name: str, target: str) -> None:
    _, _, proof = proof_of(name, target)
    assert any(check.name.startswith("with the trained statistics: ") for check in proof.checks)
    assert all(row.error is not None or "drop" in row.action for row in proof.rows)


@each([*CONVERTS, *FRESH])
def test_structure_comes_back_from_the_plan(name: str, target: str) -> None:
    plan, result, _ = proof_of(name, target)
    case = ZOO[name]
    if case.graph or any(
        isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in case.build().modules()
    ):
        pytest.skip("its structure needs a trace or an input first")
    fresh = apply_plan(case.build(seed=1), Plan.from_json(plan.to_json())).model
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert_same_state(fresh, result.model)
    before, after = snapshot(result.model), copy.deepcopy(result.model)
    assert_unchanged(before, result.model)
    assert_same_state(after, result.model)


@each(CONVERTS)
def test_one_norm_with_other_statistics_is_seen(name: str, target: str) -> None:
    plan, result, _ = proof_of(name, target)
    broken = copy.deepcopy(result.model)
    norm = next((m for m in broken.modules() if isinstance(m, nn.GroupNorm)), None)
    if norm is None:
        pytest.skip("it has no norm left")
    with torch.no_grad():
        norm.bias += 0.05
    done = converted(name, target)
    args, kwargs = done.case.inputs()
    recording = record_original_within(done.original, "", plan.steps, args, kwargs)
    assert any(not check.passed for check in prove_converted(recording, broken).checks)


class Uncoupled(nn.Module):
    """Two convolutions with norms of all shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.linear, self.bn1d = nn.Linear(8, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        return self.bn1d(self.linear(y.mean((2, 3))))


@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"channels_per_group": 1}, {"eps": 1e-5}])
def test_samples_do_not_see_each_other_in_training(options: dict[str, Any]) -> None:
    model, images = Uncoupled(), torch.randn(6, 3, 7, 7)
    model(images)
    plan = make_plan(model, "gn", example_inputs=(images,), options=options)
    result = apply_plan(model, plan).model.train()
    other = images.clone()
    other[3:] = torch.randn(3, 3, 7, 7)
    first, second = result(images), result(other)
    assert torch.allclose(first[:3], second[:3], atol=1e-6)
    assert not torch.allclose(first[3:], second[3:], atol=1e-2)
    assert evaluate(result, (images,))["output"].isfinite().all()
    assert not torch.equal(model.train()(images)[:3], model(other)[:3])
