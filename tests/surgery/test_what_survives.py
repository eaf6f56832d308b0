"""What a conversion must not lose: dtypes, devices, layouts, flags, hooks, attributes, identities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.layers import ChannelAffine, WeightNormed
from normconv.proof import evaluate, randomise_norms_
from normconv.surgery import apply_plan, apply_plan_, make_plan
from tests.test_contract import NAMES, assert_same_state
from tests.zoo import ResidualNet, x

INPUT = (x(2, 3, 6, 6),)
LAYERS = ("stem.0", "conv1", "conv2", "shortcut.0")


def residual(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = ResidualNet()
    randomise_norms_(model, (x(8, 3, 6, 6),))
    return model


def both(model: nn.Module, target: str, **options: Any) -> list[Any]:
    """The model converted on a copy, and itself, in place."""
    copied = nc.convert(model, target, example_inputs=INPUT, **options).model
    return [copied, nc.convert_(model, target, example_inputs=INPUT, **options).model]


# --- tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", NAMES)
def test_mixed_dtypes_stay_each_where_it_is(target: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).bfloat16()
            self.high = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).double()

        def forward(self, y: Tensor) -> Tensor:
            out: Tensor = self.high(self.low(y.to(self.low[0].weight.dtype)).to(torch.float64))
            return out

    model = Mixed()
    randomise_norms_(model, INPUT)
    plan = make_plan(model, target, example_inputs=INPUT)
    for converted in (apply_plan(model, plan).model, apply_plan_(model, plan).model):
        low = {p.dtype for p in converted.low.state_dict().values()}
        high = {p.dtype for p in converted.high.state_dict().values()}
        assert (low, high) == ({torch.bfloat16}, {torch.float64})


@pytest.mark.parametrize("target", NAMES)
def test_meta_models_are_planned_and_converted(target: str) -> None:
    with torch.device("meta"):
        model = ResidualNet()
    plan = make_plan(model, target, example_inputs=INPUT)
    expected = make_plan(residual(), target, example_inputs=INPUT)
    assert plan.steps == expected.steps
    assert plan.fingerprint == expected.fingerprint
    structure, report = nc.convert(model, target, example_inputs=INPUT)
    assert any("meta device" in note for note in report.notes)
    assert all(tensor.is_meta for tensor in structure.state_dict().values())
    values = nc.convert(residual(), target, example_inputs=INPUT).model
    structure.load_state_dict(values.state_dict(), strict=True, assign=True)
    structure.train(values.training)
    assert torch.equal(evaluate(structure, INPUT)["output"], evaluate(values, INPUT)["output"])
    in_place = apply_plan_(model, plan).model
    assert in_place.state_dict().keys() == values.state_dict().keys()


@pytest.mark.parametrize("target", ["wn", "plain"])
def test_channels_last_stays(target: str) -> None:
    model = residual().to(memory_format=torch.channels_last)
    for converted in both(model, target):
        for name in ("conv1", "conv2"):
            weight = converted.get_submodule(name).weight
            assert weight.is_contiguous(memory_format=torch.channels_last)
            stored = max(converted.get_submodule(name).parameters(), key=Tensor.numel)
            assert stored.stride() == weight.stride()
        y = converted.stem(INPUT[0].contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_attributes_of_parameters_stay() -> None:
    model = residual()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for converted in both(model, "plain"):
        for name in LAYERS:
            assert converted.get_submodule(name).weight._is_hf_initialized
    model = residual()
    model.conv1.weight.tag = "mine"
    for converted in both(model, "wn"):
        assert converted.conv1.weight_v.tag == "mine"


# --- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", NAMES)
def test_flags_hooks_and_attributes_of_modules_stay(target: str) -> None:
    model = residual().train()
    model.bn1.eval()
    model.conv2.eval()
    for module in model.modules():
        module._is_hf_initialized = True
    model.conv2.extra = {"a": [1]}
    model.bn2.scale = 2.0  # what a ChannelAffine calls a parameter of its own
    model.note = "kept"
    calls: list[str] = []
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    flags = {name: module.training for name, module in model.named_modules()}
    for converted in both(model, target):
        assert {n: m.training for n, m in converted.named_modules()} == flags
        assert all(m._is_hf_initialized for m in converted.modules())
        assert converted.conv2.extra == {"a": [1]}
        assert converted.note == "kept"
        calls.clear()
        converted(*INPUT).sum().backward()
        assert calls == ["model", "head", "backward"]


class Shared(nn.Module):
    """A head tied to an embedding, and one block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.inward, self.outward = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.outward.weight = self.inward.weight
        self.also = self.conv

    def forward(self, y: Tensor) -> Tensor:
        y = self.norm(self.conv(y)).mean((2, 3))
        out: Tensor = self.inward(y) + self.outward(2 * y)
        return out


@pytest.mark.parametrize("target", NAMES)
def test_sharing_stays(target: str) -> None:
    model = Shared()
    randomise_norms_(model, INPUT)
    for converted in both(model, target):
        assert converted.outward.weight is converted.inward.weight
        assert converted.also is converted.conv


# --- what is done with the result -------------------------------------------------------------------


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(x(2, 3, 6, 6, seed=step)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("target", NAMES)
def test_trained_results_load_into_a_fresh_conversion(target: str) -> None:
    model = residual().train()
    plan = make_plan(model, target, example_inputs=INPUT)
    converted = trained(apply_plan(model, plan).model)
    fresh = apply_plan(ResidualNet(), nc.Plan.from_json(plan.to_json())).model
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert_same_state(fresh, converted)
    assert torch.equal(evaluate(fresh, INPUT)["output"], evaluate(converted, INPUT)["output"])
    started = apply_plan(residual(), plan).model
    moved = [
        k for k, v in converted.state_dict().items() if not torch.equal(v, started.state_dict()[k])
    ]
    assert moved


@pytest.mark.parametrize("target", NAMES)
def test_results_move_between_dtypes_and_devices(target: str) -> None:
    converted = nc.convert(residual(), target, example_inputs=INPUT).model.eval()
    wide = copy.deepcopy(converted).double()
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(wide(INPUT[0].double()).float(), converted(*INPUT))
    meta = copy.deepcopy(converted).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    assert meta(INPUT[0].to("meta")).shape == converted(*INPUT).shape
    back = meta.to_empty(device="cpu")
    back.load_state_dict(converted.state_dict())
    assert torch.equal(back(*INPUT), converted(*INPUT))
    half = copy.deepcopy(converted).bfloat16()
    assert half(INPUT[0].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("target", NAMES)
def test_moving_averages_follow(target: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    converted = nc.convert(residual(), target, example_inputs=INPUT).model
    average = AveragedModel(converted, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(converted)
    before = {k: v.clone() for k, v in average.module.state_dict().items()}
    trained(converted)
    average.update_parameters(converted)
    for name, parameter in average.module.named_parameters():
        now = dict(converted.named_parameters())[name]
        torch.testing.assert_close(parameter, (before[name] + now) / 2)


@pytest.mark.parametrize("target", NAMES)
def test_a_model_in_the_middle_of_training_takes_its_present_statistics(target: str) -> None:
    model = trained(residual())
    model.bn1.momentum = None
    trained(model, 1)
    expected = evaluate(model, INPUT)["output"]
    for converted in both(model, target):
        torch.testing.assert_close(evaluate(converted, INPUT)["output"], expected)
        assert converted.training


def test_gradients_of_v_and_g_flow_after_a_conversion_in_place() -> None:
    model = nc.convert_(residual().train(), "wn", example_inputs=INPUT).model
    model(*INPUT).sum().backward()
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, WeightNormed)
        assert layer.weight_g.grad is not None
        assert layer.weight_v.grad is not None
    frozen = nc.convert_(residual(), "frozen", example_inputs=INPUT).model
    assert isinstance(frozen.bn1, ChannelAffine)
