"""A cached weight is computed once and differentiated once, and every gradient is what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconv.errors import UsageError
from normconv.layers import (
    WeightNormed,
    log_gain_,
    share_parts_,
    weight_norm_,
    weight_standardize_,
)
from normconv.training import cached_weights


class Several(nn.Module):
    """Each kind of weight; the recurrent layer and one Linear are called twice, two share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm_(nn.ConvTranspose1d(2, 4, 3, groups=2))
        self.ws = weight_standardize_(nn.Conv1d(4, 6, 3))
        self.lstm = weight_norm_(nn.LSTM(6, 3))
        self.twice = weight_norm_(nn.Linear(3, 3))
        log_gain_(self.twice, 0.5)
        self.shared = nn.Linear(3, 3, bias=False)
        other = nn.Linear(3, 3)
        other.weight = self.shared.weight
        weight_norm_(self.shared)
        share_parts_(other, self.shared)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        y = self.ws(self.conv(x)).movedim(2, 0)
        y = self.lstm(y)[0] + self.lstm(y.flip(0))[0]
        return self.other(self.shared(self.twice(self.twice(y))))


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters()}


def backward(net: nn.Module, parts: int = 4) -> None:
    rng = torch.Generator().manual_seed(0)
    for part in torch.randn(8, 2, 6, generator=rng).double().chunk(parts):
        net(part).square().sum().backward()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original: Callable[..., Tensor] = WeightNormed.computed

    def computed(self: Any, name: str = "weight") -> Tensor:
        calls.append(name)
        return original(self, name)

    monkeypatch.setattr(WeightNormed, "computed", computed)
    return calls


def test_gradients_are_the_same_and_each_weight_is_computed_once(counted: list[str]) -> None:
    net = Several().double()
    twin = copy.deepcopy(net)
    backward(twin)
    assert len(counted) > 5 * 4
    counted.clear()
    with cached_weights(net):
        backward(net)
        assert net.conv.weight_v.grad is None
    # conv, two of the LSTM, the Linear called twice, and one for two layers that share it
    assert len(counted) == 5
    ours, theirs = gradients(net), gradients(twin)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-10, atol=1e-12)
    assert all("computed" not in layer.__dict__ for layer in net.modules())


def test_gradients_add_to_those_that_are_there() -> None:
    net = Several().double()
    twin = copy.deepcopy(net)
    for _ in range(2):
        backward(twin)
        with cached_weights(net):
            backward(net)
    for name, grad in gradients(twin).items():
        torch.testing.assert_close(gradients(net)[name], grad, rtol=1e-10, atol=1e-12)


def test_a_whole_loop_with_flush() -> None:
    net = Several().double()
    twin = copy.deepcopy(net)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (net, twin))
    with cached_weights(net) as cache:
        for _ in range(5):
            for model, optimizer in ((net, ours), (twin, theirs)):
                optimizer.zero_grad()
                backward(model)
                if model is net:
                    cache.flush()
                optimizer.step()
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_weights_that_changed_are_computed_anew() -> None:
    layer = weight_norm_(nn.Linear(2, 1, bias=False))
    with cached_weights(layer), torch.no_grad():
        before = layer.weight.clone()
        layer.weight_g.mul_(2)
        assert torch.equal(layer.weight, 2 * before)


def test_a_step_before_the_gradient_came_is_an_error() -> None:
    net = nn.Sequential(weight_norm_(nn.Linear(2, 1)))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    net(torch.ones(1, 2)).sum().backward()
    with cached_weights(net) as cache:
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with pytest.raises(UsageError, match=r"0\.weight: its parameters were written"):
            cache.flush()
    assert "computed" not in net[0].__dict__


def test_the_outermost_block_pulls_back() -> None:
    net = nn.Sequential(weight_norm_(nn.Linear(2, 2)), weight_norm_(nn.Linear(2, 1)))
    twin = copy.deepcopy(net)
    twin(torch.ones(1, 2)).sum().backward()
    with cached_weights(net[1]):
        with cached_weights(net):
            net(torch.ones(1, 2)).sum().backward()
        assert net[0].weight_g.grad is not None
        assert net[1].weight_g.grad is None
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_an_exception_leaves_what_it_would_have_left() -> None:
    layer = weight_norm_(nn.Linear(2, 1))

    def fail() -> None:
        with cached_weights(layer):
            layer(torch.ones(1, 2)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layer.weight_v.grad is not None
    assert "computed" not in layer.__dict__


def test_frozen_parameters_and_modes_without_gradient() -> None:
    layer = weight_norm_(nn.Linear(2, 1))
    layer.requires_grad_(False)
    with cached_weights(layer):
        x = torch.ones(1, 2, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
    assert layer.weight_v.grad is None
    layer.requires_grad_(True)
    with cached_weights(layer):
        with torch.inference_mode():
            layer(torch.ones(1, 2))
        with torch.no_grad():
            layer(torch.ones(1, 2))
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight_v.grad is not None


def test_a_layer_in_use_is_not_copied() -> None:
    layer = weight_norm_(nn.Linear(2, 1))
    with cached_weights(layer), pytest.raises(UsageError, match="tied to the block"):
        copy.deepcopy(layer)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
