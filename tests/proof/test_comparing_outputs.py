"""Outputs by name, recorded sites, and what a proof says."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from normconv.proof import (
    blind_sites,
    cast_inputs,
    coarsest_dtype,
    evaluate,
    flat_outputs,
    prove,
    randomise_norms_,
    record_outputs,
)
from normconv.surgery import apply_plan, make_plan
from tests.zoo import ResidualNet, x


class Pair(NamedTuple):
    a: Tensor
    b: object


@dataclasses.dataclass
class Box:
    logits: Tensor
    nothing: None = None


def test_every_kind_of_output_has_stable_names() -> None:
    one = torch.zeros(1)
    assert list(flat_outputs(one)) == ["output"]
    assert list(flat_outputs((one, [one, {"k": one}]))) == [
        "output.0",
        "output.1.0",
        "output.1.1.k",
    ]
    assert list(flat_outputs(Pair(one, Box(one)))) == ["output.a", "output.b.logits"]
    assert list(flat_outputs(OrderedDict(z=one, a=one))) == ["output.z", "output.a"]
    assert flat_outputs("text") == flat_outputs(None) == flat_outputs(3) == {}


def test_inputs_are_cast_deep_and_integers_stay() -> None:
    mask = torch.ones(1, dtype=torch.bool)
    cast = cast_inputs((torch.zeros(1), [Pair(torch.zeros(1), mask)], {"a": 3}), torch.float64)
    assert cast[0].dtype == torch.float64
    assert isinstance(cast[1][0], Pair)
    assert cast[1][0].a.dtype == torch.float64
    assert cast[1][0].b is mask
    assert cast[2] == {"a": 3}


def test_evaluate_restores_and_can_widen() -> None:
    model = ResidualNet().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    args = (x(2, 3, 6, 6),)
    wide = evaluate(model, args, dtype=torch.float64)["output"]
    assert wide.dtype == torch.float64
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(evaluate(model, args)["output"].double(), wide, rtol=1e-4, atol=1e-5)


def test_coarsest_dtype() -> None:
    assert (
        coarsest_dtype(nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))) == torch.bfloat16
    )
    assert coarsest_dtype(nn.ReLU()) == torch.float32
    assert coarsest_dtype(nn.Linear(1, 1).half()) == torch.float16


def test_recorded_outputs_are_small_copies_of_every_call() -> None:
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), relu, nn.Flatten(), nn.Linear(162, 3))
    with record_outputs(net, ["0", "3", "missing"]) as seen:
        for _ in range(2):
            net(torch.randn(6, 1, 9, 9))
    assert set(seen) == {"0", "3"}
    assert [tuple(t.shape) for t in seen["0"]] == [(4, 2, 16)] * 2
    assert seen["3"][0].shape == (4, 3, 1)
    assert bool((seen["0"][0] < 0).any()), "the in-place layer after it has changed the record"
    assert len(net[0]._forward_hooks) == 0


def test_hooks_are_taken_off_after_an_exception() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), record_outputs(net, ["0"]):
        net(torch.zeros(1, 3))
    assert len(net[0]._forward_hooks) == 0


def test_randomised_statistics_have_the_promised_spread() -> None:
    norm = nn.BatchNorm2d(2000)
    net = nn.Sequential(nn.Conv2d(3, 2000, 1), norm)
    randomise_norms_(net, (x(4, 3, 5, 5),))
    gamma = norm.weight.detach()
    alive = gamma[gamma != 0].abs()
    assert 0.5 <= alive.min() <= alive.max() <= 1.5
    assert 0.10 < (gamma < 0).float().mean() < 0.20
    assert 0.005 < (gamma == 0).float().mean() < 0.04
    assert abs(norm.bias.std().item() - 0.2) < 0.02
    y = net[0](x(4, 3, 5, 5)).detach()
    ratio = norm.running_var / y.var((0, 2, 3), correction=0)
    assert 0.69 <= ratio.min() <= ratio.max() <= 1.31
    moved = (norm.running_mean - y.mean((0, 2, 3))) / y.std((0, 2, 3))
    assert abs(moved.std().item() - 0.1) < 0.02


def test_randomising_repeats_and_reaches_training_only_norms() -> None:
    from tests.zoo import AuxHead

    first, second = AuxHead(), AuxHead()
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        randomise_norms_(net, (x(4, 3, 6, 6),), seed=3)
        assert net.training
        assert int(net.bn.num_batches_tracked) == 0
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert bool((first.aux[1].running_mean != 0).all())


def test_blind_sites_restores_what_it_moves() -> None:
    net = ResidualNet()
    randomise_norms_(net, (x(2, 3, 6, 6),))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert blind_sites(net, ("stem.1", "bn2"), (x(2, 3, 6, 6),)) == ()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_proof_says_what_it_compared() -> None:
    net, args = ResidualNet(), (x(2, 3, 6, 6),)
    randomise_norms_(net, args)
    plan = make_plan(net, "wn", example_inputs=args)
    proof = prove(net, apply_plan(net, plan).model, plan.steps, args)
    assert [check.name for check in proof.checks] == [
        "the original repeats itself",
        "output",
        "every site at its own output",
    ]
    assert all(check.passed for check in proof.checks)
    assert proof.facts["sites compared"] == 4
    assert proof.facts["dtype"] == "float32"
    assert proof.facts["sight"] > 1e-2
    assert [row.site for row in proof.rows] == ["stem.1", "bn1", "bn2", "shortcut.1"]
    assert all(row.error <= row.bound for row in proof.rows)


def test_a_model_without_tensors_in_its_output_proves_nothing() -> None:
    class Silent(nn.Sequential):
        def forward(self, x: Tensor) -> str:
            super().forward(x)
            return "done"

    net = Silent(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    proof = prove(net, net, (), (x(2, 3, 4, 4),))
    assert "no tensor that could be compared" in str(
        [c.detail for c in proof.checks if not c.passed]
    )


@pytest.mark.parametrize("poisoned", ["original", "candidate", "both"])
def test_nan_in_either_fails(poisoned: str) -> None:
    net, args = ResidualNet(), (x(2, 3, 6, 6),)
    plan = make_plan(net, "plain", example_inputs=args)
    other = apply_plan(net, plan).model
    with torch.no_grad():
        if poisoned in ("original", "both"):
            net.head.bias[0] = float("nan")
        if poisoned in ("candidate", "both"):
            other.head.bias[0] = float("nan")
    assert any(not check.passed for check in prove(net, other, plan.steps, args).checks)


def test_a_wrong_shape_and_a_missing_site_fail() -> None:
    net, args = ResidualNet(), (x(2, 3, 6, 6),)
    plan = make_plan(net, "plain", example_inputs=args)
    other = apply_plan(net, plan).model
    other.head = nn.Linear(12, 4)
    assert any(
        "shape" in c.detail for c in prove(net, other, plan.steps, args).checks if not c.passed
    )
    gone = apply_plan(net, plan).model
    gone.stem = nn.Sequential(gone.stem[0], nn.Identity(), nn.ReLU())
    gone.stem[1].forward = lambda value: value + 1
    failed = [c.name for c in prove(net, gone, plan.steps, args).checks if not c.passed]
    assert "site stem.1" in failed


class _EndsInFloat32(nn.Module):
    def __init__(self, back: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.back = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), back

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).flatten(1).softmax(1, dtype=torch.float32)
        return y.to(x.dtype) if self.back else y


@pytest.mark.parametrize("back", [False, True])
def test_an_output_is_judged_in_the_dtype_it_is_rounded_in(back: bool) -> None:
    model, x = _EndsInFloat32(back).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    randomise_norms_(model, (x,))
    plan = make_plan(model, "wn", example_inputs=(x,))
    result = apply_plan(model, plan).model
    (check,) = [c for c in prove(model, result, plan.steps, (x,)).checks if c.name == "output"]
    assert check.passed
    assert check.bound == 4 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        result.conv.weight_g.mul_(1 + 1e-3)
    assert not all(c.passed for c in prove(model, result, plan.steps, (x,)).checks)


class LosesDigits(nn.Module):
    """In float32 a large number swallows what the norm gets; the output does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + 1e7 - 1e7) * 1e-6 + x.mean()


def test_a_site_that_float32_cannot_judge_is_told_as_that() -> None:
    model, images = LosesDigits().eval(), x(4, 3, 5, 5)
    plan = make_plan(model, "wn", example_inputs=(images,))
    result = apply_plan(model, plan).model
    proof = prove(model, result, plan.steps, (images,))
    failed = [check for check in proof.checks if not check.passed]
    assert [check.name for check in failed] == ["site bn"]
    assert "the original itself is too far" in failed[0].detail
    assert "float64" in failed[0].way_out
    wide = apply_plan(model.double(), plan).model
    assert all(c.passed for c in prove(model, wide, plan.steps, (images.double(),)).checks)
