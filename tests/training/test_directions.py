"""Directions grow under gradient descent, and can be kept short without moving a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.errors import UsageError
from normconv.numerics import scale_rows, wide_row_norms
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
                off = (
                    1e-14 if kind == "sgd" else 0.0
                )  # its component along v, 0 up to rounding, goes
                torch.testing.assert_close(value, theirs[key], rtol=off, atol=off, msg=key)
                compared += 1
    assert compared >= 8


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_does_not_run_away(nesterov: bool) -> None:
    """Long steps make v little else than −lr · m: with m multiplied by 1/α it doubled each step."""
    torch.manual_seed(1)
    net = nn.Sequential(nc.wrap(nn.Linear(5, 8)), nn.Tanh(), nc.wrap(nn.Linear(8, 2))).double()
    x, y = torch.randn(32, 5).double(), torch.randn(32, 2).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    keep_directions_bounded(net, optimizer, 1.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        for layer in (net[0], net[2]):
            assert optimizer.state[layer.weight_v]["momentum_buffer"].norm() < 100
    assert loss < y.square().mean() + 1


def test_momentum_keeps_all_but_its_component_along_v() -> None:
    """In rows that are shortened; by 1/α exactly, also of the rows of a transposed convolution."""
    net, _ = net_and_input()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    before, buffers = {}, {}
    for at in (0, 2, 3):
        v = net[at].weight_v
        buffers[at] = optimizer.state[v]["momentum_buffer"] = torch.randn_like(v)
        before[at] = (v.detach().clone(), buffers[at].clone())
    limit = float(torch.cat(list(direction_norms(net).values())).median())
    shortened = bound_directions_(net, limit, optimizer=optimizer)
    lost = 0
    for at, (v, m) in before.items():
        layout = net[at].row_layout("weight")
        alphas = wide_row_norms(net[at].weight_v, layout) / wide_row_norms(v, layout)
        for row in range(len(alphas)):
            one = torch.zeros_like(alphas)
            one[row] = 1
            inside = scale_rows(torch.ones_like(v), one, layout) > 0
            was, now, along = m[inside], buffers[at][inside], v[inside]
            if alphas[row] == 1:
                assert torch.equal(now, was)
                continue
            lost += 1
            wanted = (was - (was @ along) / (along @ along) * along) / alphas[row]
            torch.testing.assert_close(now, wanted)
            assert abs(now @ along) < 1e-12 * now.norm() * along.norm()
    assert 0 < lost == shortened < 4 + 4 + 5


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
    with pytest.raises(UsageError, match="holds no v of the model"):
        keep_directions_bounded(net, torch.optim.SGD([nn.Parameter(torch.ones(1))]), 0.1)
    with pytest.raises(UsageError, match="no weight-normed layers"):
        keep_directions_bounded(nn.Linear(2, 2), torch.optim.SGD(net.parameters()), 0.1)
    for model, bound, held in ((net, "1", None), (3, 1.0, None), (net, 1.0, "sgd")):
        with pytest.raises(UsageError, match="is no"):
            bound_directions_(model, bound, optimizer=held)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="other weight-normed weights"):
        direction_growth(net[:1], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_v_without_a_length_is_told_before_any_is_shortened(value: float) -> None:
    net, _ = net_and_input()
    with torch.no_grad():
        net[3].weight_v[0, 0] = value
    before = net[0].weight_v.detach().clone()
    with pytest.raises(UsageError, match=r"3\.weight: its v holds NaN or infinity; lower"):
        bound_directions_(net, 1e-3)
    assert torch.equal(net[0].weight_v, before)
