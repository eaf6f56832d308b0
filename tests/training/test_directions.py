"""Directions grow under gradient descent, and can be kept short without moving a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.errors import UsageError
from normconv.training import (
    bound_directions_,
    direction_growth,
    direction_norms,
    keep_directions_bounded,
)

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True, eps=0.0),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, eps=0.0),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr=lr, eps=0.0),
    "radam": lambda p, lr: torch.optim.RAdam(p, lr=lr, eps=0.0),
    "adamax": lambda p, lr: torch.optim.Adamax(p, lr=lr, eps=0.0),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.9, centered=True, eps=0.0),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, eps=0.0),
    "adadelta": lambda p, lr: torch.optim.Adadelta(p, lr=lr, eps=0.0),
}


def net_and_input() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 4, 3, groups=2), nn.Linear(6, 5)
    ).double()
    for layer in (net[0], net[2]):
        nc.wrap(layer)
    nc.wrap(net[3], scale="exp")
    return net, torch.randn(2, 3, 6).double()


def step(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (net(x) - 1).square().sum().backward()
    optimizer.step()


def weights(net: nn.Sequential) -> list[Tensor]:
    return [net[at].weight.detach().clone() for at in (0, 2, 3)]


def test_directions_grow_with_every_step_of_gradient_descent() -> None:
    net, x = net_and_input()
    start, before = direction_norms(net), dict.fromkeys(("0.weight", "2.weight", "3.weight"), 1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(3):
        step(net, x, optimizer)
        now = direction_growth(net, start)
        assert now.keys() == before.keys()
        assert all(now[name] > before[name] for name in now)
        before = now


def test_shortening_moves_no_weight_and_no_gradient() -> None:
    net, x = net_and_input()
    (net(x) - 1).square().sum().backward()
    before, grads = weights(net), [p.grad.clone() for p in net.parameters()]
    limit = min(float(norms.min()) for norms in direction_norms(net).values()) / 3
    rows = sum(norms.numel() for norms in direction_norms(net).values())
    assert bound_directions_(net, limit) == rows
    assert all(bool((n <= limit).all()) for n in direction_norms(net).values())
    assert all(bool((n > limit / 2).all()) for n in direction_norms(net).values())
    assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))
    kept = [p.grad.clone() for p in net.parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))
    net.zero_grad()
    (net(x) - 1).square().sum().backward()
    assert all(torch.equal(p.grad, k) for p, k in zip(net.parameters(), kept, strict=True))
    assert bound_directions_(net, limit) == 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_what_it_would_be_had_v_been_short_all_along(kind: str) -> None:
    long, x = net_and_input()
    short, _ = net_and_input()
    limit = 0.3
    bound_directions_(short, limit)
    states = []
    for net in (long, short):
        optimizer = OPTIMIZERS[kind](net.parameters(), 0.0)
        for _ in range(3):
            step(net, x, optimizer)
        if net is long:
            assert bound_directions_(net, limit, optimizer=optimizer) > 0
        states.append([optimizer.state[p] for p in net.parameters()])
    compared = 0
    for ours, theirs in zip(*states, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, Tensor) and value.dim() and key != "acc_delta":
                assert torch.equal(value, theirs[key]), key
                compared += 1
    assert compared >= 8


def test_relative_steps_of_adadelta_follow() -> None:
    """Its `acc_delta` are squares of steps of v: they shrink with v."""
    net, x = net_and_input()
    optimizer = OPTIMIZERS["adadelta"](net.parameters(), 0.0)
    step(net, x, optimizer)
    state = optimizer.state[net[0].weight_v]
    state["acc_delta"].fill_(1.0)
    v = net[0].weight_v.detach().clone()
    bound_directions_(net, 0.3, optimizer=optimizer)
    assert torch.equal(state["acc_delta"], (net[0].weight_v / v).square())


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_hook_keeps_the_bound_until_it_is_removed(kind: str) -> None:
    net, x = net_and_input()
    optimizer = OPTIMIZERS[kind](net.parameters(), 0.05)
    handle = keep_directions_bounded(net, optimizer, 0.5)
    for _ in range(4):
        step(net, x, optimizer)
        assert all(bool((n <= 0.5).all()) for n in direction_norms(net).values())
    handle.remove()
    for _ in range(4):
        step(net, x, optimizer)
    assert any(bool((n > 0.5).any()) for n in direction_norms(net).values())


def test_shared_and_several_weights_are_counted_once() -> None:
    net = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    net["head"].weight = net["emb"].weight
    nc.wrap(net["emb"])
    net["lstm"] = nc.wrap(nn.LSTM(4, 3))
    assert list(direction_norms(net)) == ["emb.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert bound_directions_(net, 1e-3) == 5 + 12 + 12


class Remembering(torch.optim.SGD):
    """An optimizer that keeps one tensor more."""

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = p.detach().clone()
        return done


def test_what_is_refused_changes_nothing() -> None:
    net, x = net_and_input()
    before = direction_norms(net)
    for wrong in (0.0, float("nan"), True):
        with pytest.raises(UsageError, match="no positive number"):
            bound_directions_(net, wrong)
    with pytest.raises(UsageError, match="Rprop"):
        keep_directions_bounded(net, torch.optim.Rprop(net.parameters()), 0.1)
    optimizer = Remembering(net.parameters(), lr=0.0)
    step(net, x, optimizer)
    with pytest.raises(UsageError, match=r"keeps 'seen' of 0\.weight's v"):
        bound_directions_(net, 0.1, optimizer=optimizer)
    after = direction_norms(net)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert bound_directions_(net, 0.1, optimizer=optimizer, powers={"seen": 1}) > 0
    assert torch.equal(optimizer.state[net[0].weight_v]["seen"], net[0].weight_v)
    with pytest.raises(UsageError, match="other weight-normed weights"):
        direction_growth(net[:1], before)
