"""An optimizer follows its model through a conversion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.layers import weight_norm_, weight_standardize_
from normconv.training import rebind, rebind_


def net_and_inputs() -> tuple[Any, Tensor]:
    net = nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()
    )
    net.append(nn.Linear(5, 2))
    return net, torch.randn(16, 3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def built(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in net.named_parameters() if not n.endswith("bias")]
    groups = [{"params": rest, "weight_decay": 1e-2}, {"params": biases, "lr": 0.05}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=1e-2)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_untouched_parameters_keep_state_and_group(kind: str) -> None:
    net, x = net_and_inputs()
    optimizer = built(kind, net)
    step(net, optimizer, x)
    before = copy.deepcopy(optimizer.state_dict())
    result = nc.convert(net, "wn", example_inputs=(x,))
    new, report = rebind(optimizer, result, net)
    assert report.facts == {
        "kept": ["3.weight", "3.bias", "5.weight", "5.bias"],
        "fresh": ["0.weight_g", "0.weight_v", "0.bias"],
        "mapped": [],
        "gone": ["0.weight", "1.weight", "1.bias"],
        "left out": [],
    }
    model: Any = result.model
    assert type(new) is type(optimizer)
    weights, biases = new.param_groups
    assert [id(p) for p in weights["params"]] == [
        id(model[at].get_parameter(name))
        for at, name in ((0, "weight_g"), (0, "weight_v"), (3, "weight"), (5, "weight"))
    ]
    assert [id(p) for p in biases["params"]] == [id(model[at].bias) for at in (0, 3, 5)]
    assert weights["weight_decay"] == 1e-2
    assert biases["lr"] == 0.05
    for at in (3, 5):
        for name, value in optimizer.state[net[at].weight].items():
            assert torch.equal(new.state[model[at].weight][name], value)
    assert model[0].weight_v not in new.state
    model.train()
    step(model, new, x)
    after = optimizer.state_dict()
    for key, values in before["state"].items():  # the old optimizer is as it was
        assert all(torch.equal(after["state"][key][n], v) for n, v in values.items())
    assert optimizer.param_groups[0]["params"][0] is net[0].weight


def test_momentum_goes_through_the_chain_rule() -> None:
    """The momentum of plain gradient sums is a gradient itself: it must be that of the new model."""
    net, x = net_and_inputs()
    net.eval()
    nn.init.normal_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    nn.init.normal_(net[1].weight)
    net = net.double()
    x = x.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    step(net, optimizer, x)  # lr 0: the buffers are the gradients at these very weights
    result = nc.convert(net, "wn", example_inputs=(x,), layers="all")
    new, report = rebind(optimizer, result, net, state="map")
    result.model(x).square().mean().backward()
    names = {n for at in (0, 3, 5) for n in (f"{at}.weight_g", f"{at}.weight_v")} | {"0.bias"}
    assert set(report.facts["mapped"]) == names
    for name, parameter in result.model.named_parameters():
        if name in names:
            assert parameter.grad is not None
            carried = new.state[parameter]["momentum_buffer"]
            assert torch.allclose(carried, parameter.grad, rtol=1e-9, atol=1e-12), name
    plain = nc.convert(net, "plain", example_inputs=(x,)).model
    new, report = rebind(optimizer, plain, net, state="map")
    plain(x).square().mean().backward()
    weight = plain.get_parameter("0.weight")
    assert report.facts["mapped"] == ["0.weight", "0.bias"]
    assert weight.grad is not None
    assert torch.allclose(new.state[weight]["momentum_buffer"], weight.grad, rtol=1e-9)


@pytest.mark.parametrize(
    ("to", "carried"),
    [
        ("frozen", []),  # its scale and shift are not trained
        ("plain", ["1.scale", "1.shift", "3.weight", "3.bias"]),
        ("wn", ["1.scale", "1.shift", "3.weight_g", "3.weight_v", "3.bias"]),
        ("gn", ["3.weight"]),  # its γ and β are there still, of another norm
    ],
)
def test_what_took_a_norm_s_place_goes_on_with_its_momentum(to: str, carried: list[str]) -> None:
    net = nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    )
    for norm in (net[1], net[4]):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    net, x = net.double().eval(), torch.randn(3, 4, 5, 5).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    step(net, optimizer, x)  # lr 0: the buffers are the gradients at these very weights
    model = nc.convert(net, to, example_inputs=(x,), strict=False).model.eval()
    new, report = rebind(optimizer, model, net, state="map")
    assert report.facts["mapped"] == carried
    model(x).square().mean().backward()
    for name in carried if to != "gn" else ():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        assert torch.allclose(
            new.state[parameter]["momentum_buffer"], parameter.grad, rtol=1e-9, atol=1e-12
        ), name


@pytest.mark.parametrize("make", [weight_norm_, weight_standardize_])
def test_momentum_of_transposed_and_recurrent_weights(make: Any) -> None:
    for layer, x in (
        (nn.ConvTranspose1d(4, 6, 3, groups=2).double(), torch.randn(2, 4, 5).double()),
        (nn.LSTM(3, 4).double(), torch.randn(5, 1, 3).double()),
    ):
        if make is weight_standardize_:
            if isinstance(layer, nn.LSTM):
                continue
            layer = nc.fold(make(layer)).model  # weights without a mean
        twin = make(copy.deepcopy(layer))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
        for module in (layer, twin):
            out = module(x)
            (out[0] if isinstance(out, tuple) else out).pow(3).sum().backward()
        optimizer.step()
        new, report = rebind(optimizer, twin, layer, state="map")
        assert report.facts["mapped"]
        for name in report.facts["mapped"]:
            parameter = twin.get_parameter(name)
            carried = new.state[parameter]["momentum_buffer"]
            assert torch.allclose(carried, parameter.grad, rtol=1e-6, atol=1e-8), name


def test_adam_restarts_and_says_so() -> None:
    net, x = net_and_inputs()
    optimizer = built("adam", net)
    step(net, optimizer, x)
    result = nc.convert(net.eval(), "wn", example_inputs=(x,))
    new, report = rebind(optimizer, result, net, state="map")
    assert report.facts["mapped"] == []
    assert "second moments of 3 parameters restart" in report.notes[0]
    assert result.model.get_parameter("0.weight_g") not in new.state


def test_in_place_parameters_are_known_by_identity_and_schedules_go_on() -> None:
    net, x = net_and_inputs()
    optimizer = built("sgd", net)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(net, optimizer, x)
    buffer = optimizer.state[net[3].weight]["momentum_buffer"]
    result = nc.convert_(net.eval(), "wn", example_inputs=(x,))
    report = rebind_(optimizer, result)
    assert report.facts["fresh"] == ["0.weight_g", "0.weight_v", "0.bias"]
    assert report.facts["kept"] == ["3.weight", "3.bias", "5.weight", "5.bias"]
    assert optimizer.state[net[3].weight]["momentum_buffer"] is buffer
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    step(net.train(), optimizer, x)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.025]


def test_fold_refactor_and_affines() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = torch.randn(4, 3, 5, 5)
    optimizer = built("sgd", net)
    step(net, optimizer, x)
    result = nc.convert(net.eval(), "wn", example_inputs=(x,))
    new, report = rebind(optimizer, result, net)
    assert report.facts["fresh"] == ["1.scale", "1.shift"]
    assert new.param_groups[1]["params"][0] is result.model.get_parameter("1.shift")
    back = nc.refactor(result.model, to="bn")
    _, report = rebind(new, back, result.model)
    assert report.facts["fresh"] == ["1.weight", "1.bias"]
    assert report.facts["kept"] == ["3.weight", "3.bias"]
    wn, x = weight_norm_(nn.Linear(3, 2)), torch.randn(4, 3)
    optimizer = built("sgd", wn)
    _, report = rebind(optimizer, nc.fold(wn), wn)
    assert (report.facts["kept"], report.facts["fresh"]) == (["bias"], ["weight"])


def test_what_was_not_trained_is_left_out() -> None:
    net, x = net_and_inputs()
    optimizer = torch.optim.SGD(net[5].parameters(), lr=0.1)
    result = nc.convert(net.eval(), "wn", example_inputs=(x,))
    new, report = rebind(optimizer, result, net)
    assert report.facts["left out"] == ["0.weight_g", "0.weight_v", "0.bias"]
    assert len(new.param_groups[0]["params"]) == 2


def test_an_optimizer_of_another_model_is_refused() -> None:
    net, x = net_and_inputs()
    result = nc.convert(net.eval(), "wn", example_inputs=(x,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(nc.UsageError, match="7 of its 7 parameters"):
        rebind(optimizer, result, copy.deepcopy(net))
    with pytest.raises(nc.UsageError, match="'fresh' or 'map'"):
        rebind(optimizer, result, net, state="keep")  # type: ignore[arg-type]


def test_a_norm_in_front_of_a_layer_leaves_no_chain_rule() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, bias=False))
    x = torch.randn(8, 3, 2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer, x)
    result = nc.convert(net.eval(), "wn", example_inputs=(x,))
    assert "forward" in result.report.sites[0].action
    new, report = rebind(optimizer, result, net, state="map")
    assert not report.facts["mapped"]
    assert not new.state
    assert "momentum of" in report.notes[0]


def test_the_weight_that_a_forward_computed_is_another() -> None:
    class Centered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(
                x, self.weight - self.weight.mean(1, keepdim=True), self.bias
            )

    net, x = nn.Sequential(Centered(3, 2)), torch.randn(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer, x)
    _, report = rebind(optimizer, nc.fold(net), net)
    assert (report.facts["fresh"], report.facts["kept"]) == (["0.weight"], ["0.bias"])


def test_another_norm_in_the_slot_starts_anew() -> None:
    net, x = net_and_inputs()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer, x)
    _, report = rebind(optimizer, nc.convert(net, "gn", example_inputs=(x,)), net)
    assert {"1.weight", "1.bias"} <= set(report.facts["fresh"])


def test_a_norm_that_is_back_is_trained_with_its_layer() -> None:
    net, x = net_and_inputs()
    normed = nc.convert(net.eval(), "wn", example_inputs=(x,)).model
    optimizer = torch.optim.SGD(normed.named_parameters(), lr=0.1)
    back = nc.refactor(normed, to="bn", example_inputs=(x,))
    new, _ = rebind(optimizer, back, normed)
    held = {id(p) for group in new.param_groups for p in group["params"]}
    assert held == {id(p) for p in back.model.parameters()}
    (group,) = new.param_groups
    names = {id(p): name for name, p in back.model.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
