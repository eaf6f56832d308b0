"""Weight norm with mean-only batch norm over the zoo: exact in eval, the batch mean in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normconv.folding import fold
from normconv.graph import is_norm
from normconv.layers import MeanOnlyBatchNorm
from normconv.plan import Plan
from normconv.proof import prove
from normconv.surgery import apply_plan, make_plan
from tests.test_contract import (
    assert_same_state,
    assert_unchanged,
    converted,
    original_of,
    plan_of,
    snapshot,
)
from tests.zoo import ZOO

TARGET = "wn+mobn"
CONVERTS = [name for name, case in ZOO.items() if case.converts]


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if not case.converts])
def test_refused_for_the_same_reason(name: str) -> None:
    case, model = ZOO[name], original_of(name)
    before = snapshot(model)
    with pytest.raises(Exception, match=r"\S") as caught:
        apply_plan(model, plan_of(model, case, TARGET))
    assert case.refused in str(caught.value)
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", CONVERTS)
def test_eval_is_exact_and_structure_comes_back(name: str) -> None:
    done = converted(name, TARGET)
    args, kwargs = done.case.inputs()
    proof = prove(done.original, done.model, done.plan.steps, args, kwargs)
    assert [check for check in proof.checks if not check.passed] == []
    assert not any(
        is_norm(module) for module in done.model.modules() if not done.plan.counts().get("keep")
    )
    case = ZOO[name]
    if case.graph or any(
        isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in case.build().modules()
    ):
        return
    fresh = apply_plan(case.build(seed=1), Plan.from_json(done.plan.to_json())).model
    fresh.load_state_dict(done.model.state_dict(), strict=True)
    assert_same_state(fresh, done.model)


def test_training_subtracts_the_mean_of_the_batch_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).double()
    with torch.no_grad():
        model[1].weight.uniform_(-2, 2)
        model[1].bias.normal_()
    images = torch.randn(8, 3, 6, 6).double()
    for _ in range(50):
        model(images)
    result = apply_plan(model, make_plan(model, TARGET, example_inputs=(images,))).model
    norm = result[1]
    assert isinstance(norm, MeanOnlyBatchNorm)
    scaled = result[0](images)
    result.train()
    got = result(images)
    wanted = scaled - scaled.mean((0, 2, 3), keepdim=True) + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(got, wanted)
    got.sum().backward()
    # The mean is taken out: the bias of the layer before has no gradient left.
    assert result[0].bias.grad.abs().max() < 1e-9
    assert result[0].weight_v.grad.isfinite().all()


def test_folding_leaves_a_plain_layer() -> None:
    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        torch.randn(8, 3, 6, 6),
    )
    model(images)
    result = apply_plan(model.eval(), make_plan(model, TARGET, example_inputs=(images,))).model
    folded = fold(result, example_inputs=(images,)).model
    assert [type(module) for module in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert torch.allclose(folded(images), model(images), atol=1e-5)


def test_what_was_seen_counts_and_frozen_norms_stay_frozen() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=None)),
        torch.randn(8, 3, 6, 6),
    )
    for _ in range(9):
        model(images)
    plan = make_plan(model, TARGET, example_inputs=(images,))
    norm = apply_plan(model, plan).model[1]
    assert int(norm.num_batches_tracked) == 9
    frozen = nn.Sequential(
        nn.Conv2d(3, 5, 3), FrozenBatchNorm2d(5), nn.ReLU(), FrozenBatchNorm2d(5)
    )
    plan = make_plan(frozen, TARGET, example_inputs=(images,))
    result = apply_plan(frozen, plan).model.train()
    assert not any(isinstance(module, MeanOnlyBatchNorm) for module in result)
    assert torch.allclose(result(images), frozen(images), atol=1e-5)
