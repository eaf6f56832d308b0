"""Data-dependent initialisation: pre-activations are standard on the data, and what is not is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from normconv.calibration.data_init import initialise, initialise_
from normconv.calibration.init_sites import LayerSite
from normconv.calibration.observing import observe
from normconv.errors import CheckFailed, PlanError, UsageError
from normconv.layers import MeanOnlyBatchNorm, WeightNormed, share_parts_
from normconv.numerics import relative_l2
from normconv.plan import history_of
from normconv.surgery import Result
from tests.test_contract import assert_same_state, assert_unchanged, snapshot

ROOT = Path(__file__).parents[2]


def normed(model: nn.Module, **options: Any) -> nn.Module:
    """Weight-norm every Linear and convolution of a model, in place and in float64."""
    for module in list(model.double().modules()):
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            nc.wrap(module, **options)
    return model


CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class Branchy(nn.Module):
    """Residual blocks with two branches each, grouped and transposed convolutions, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.left = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=2) for _ in range(2))
        self.right = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.mix = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, groups=2)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.elu(self.stem(x))
        for left, right, mix in zip(self.left, self.right, self.mix, strict=True):
            y = y + mix(torch.cat([left(F.elu(y)), F.elu(right(y))], 1))
        y = self.up(y, output_size=x.shape[2:])
        return self.head(self.drop(F.elu(y)).mean((2, 3)))


def images(count: int = 24, seed: int = 0) -> Tensor:
    """Pictures neither centred nor of one size."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.tensor([5.0, 0.3, 1.0]).double().view(1, 3, 1, 1)
    return torch.randn(count, 3, 10, 10, generator=rng).double() * size + 2


def outputs(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """All that each weight-normed layer puts out in eval mode, (numbers, C)."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, x: Any, y: Tensor) -> None:
            axis = -1 if isinstance(layer, nn.Linear) else 1
            seen.setdefault(name, []).append(y.detach().double().movedim(axis, -1))

        return look

    named = [(n, m) for n, m in model.named_modules() if isinstance(m, WeightNormed)]
    handles = [m.register_forward_hook(hook(n)) for n, m in named]
    flags = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    for module, flag in flags:
        module.training = flag
    for handle in handles:
        handle.remove()
    return {n: torch.cat([y.flatten(0, -2) for y in each]) for n, each in seen.items()}


def worst(model: nn.Module, batches: list[Tensor]) -> float:
    """The largest |mean| or |deviation − 1| of a channel of a weight-normed layer."""
    errors = [
        torch.cat([y.mean(0).abs(), (y.std(0, correction=0) - 1).abs()])
        for y in outputs(model, batches).values()
    ]
    return float(torch.cat(errors).max())


@pytest.mark.parametrize("scale", ["linear", "exp"])
def test_every_channel_is_standard_on_the_data(scale: str) -> None:
    net, data = normed(Branchy(), scale=scale), [images()]
    before = snapshot(net)
    model, report = initialise(net, data)
    assert worst(net, data) > 0.5
    assert worst(model, data) < 1e-12
    assert report.passed
    assert [check.name for check in report.checks] == [
        "largest |mean| of a channel",
        "largest |deviation − 1| of a channel",
    ]
    assert len(report.facts["layers initialised"]) == 9
    assert report.facts["groups of sites"] == 7  # the branches of a block go together
    assert not report.notes
    assert_unchanged(before, net)
    assert model.training  # its mode is the user's
    y = model(data[0])
    assert y.isfinite().all()


def test_in_float32_it_is_standard_up_to_rounding() -> None:
    net = normed(Branchy()).float()
    model, report = initialise(net, [images()])  # cast to the model's dtype
    assert 1e-12 < worst(model, [images().float()]) < 2e-5
    assert report.checks[0].bound == pytest.approx(2**-11.5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (50, 4)),
        (nn.Linear(4, 6), (5, 10, 4)),
        (nn.Conv1d(4, 6, 3, groups=2), (8, 4, 9)),
        (nn.Conv3d(4, 6, 2, padding=1, padding_mode="circular"), (4, 4, 3, 3, 3)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (8, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 3, 3)),
        (nn.ConvTranspose3d(4, 6, 2), (4, 4, 3, 3, 3)),
        (nn.Conv2d(4, 6, 3), (4, 9, 9)),  # without a batch axis
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(len(value)),
)
def test_every_kind_of_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = normed(layer), torch.randn(shape).double() * 3 + 1
    model = initialise(layer, [(x,)]).model
    y = model(x)
    if not isinstance(layer, nn.Linear):
        y = (y if y.dim() == len(layer.kernel_size) + 2 else y[None]).movedim(1, -1)
    y = y.flatten(0, -2)
    assert y.mean(0).abs().max() < 1e-12
    assert (y.std(0, correction=0) - 1).abs().max() < 1e-12


def test_with_dropout_it_is_training_that_is_standard() -> None:
    """Each dropout on positive features doubles the variance, unless the start knows of it."""
    torch.manual_seed(0)
    drops = (nn.Linear(6, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU())
    net = normed(nn.Sequential(*drops, nn.Dropout(0.5), nn.Linear(64, 5)))
    x = [torch.randn(2000, 6).double() for _ in range(2)]

    def deviation(model: nn.Module) -> float:
        torch.manual_seed(99)  # a draw of its own
        return float(model.train()(x[0]).detach().std(0).mean())

    state = torch.get_rng_state()
    model, report = initialise(net, x, dropout=True, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.passed
    assert report.facts["dropout"] == {"seed": 3}
    assert model[2].training == net[2].training
    assert abs(deviation(model) - 1) < 0.05
    assert deviation(initialise(net, x).model) > 1.3
    assert_same_state(model, initialise(net, x, dropout=True, seed=3).model)
    other = initialise(net, x, dropout=True, seed=4).model
    assert not torch.equal(other[6].weight_g, model[6].weight_g)


def test_two_layers_by_hand() -> None:
    """g = 1 / σ[t] and b = −μ[t] / σ[t] with t = v · x / ‖v‖, layer after layer, in plain numbers."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    net = normed(nn.Sequential(first, nn.ReLU(), second))
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 4.0], [2.0, 2.0]]).double()
    v1 = [[3.0, 4.0], [1.0, -1.0]]
    v2 = [2.0, 1.0]
    with torch.no_grad():
        first.weight_v.copy_(torch.tensor(v1))
        second.weight_v.copy_(torch.tensor([v2]))

    def of(t: list[float]) -> tuple[float, float]:
        mean = sum(t) / len(t)
        deviation = (sum((value - mean) ** 2 for value in t) / len(t)) ** 0.5
        return 1 / deviation, -mean / deviation

    hidden = []
    wanted1 = []
    for row in v1:
        length = (row[0] ** 2 + row[1] ** 2) ** 0.5
        t = [(row[0] * a + row[1] * b) / length for a, b in x.tolist()]
        g, b = of(t)
        wanted1.append((g, b))
        hidden.append([max(0.0, g * value + b) for value in t])
    length = (v2[0] ** 2 + v2[1] ** 2) ** 0.5
    g2, b2 = of([(v2[0] * p + v2[1] * q) / length for p, q in zip(*hidden, strict=True)])

    model = initialise(net, [x]).model
    for (g, b), made_g, made_b in zip(
        wanted1, model[0].weight_g.flatten().tolist(), model[0].bias.tolist(), strict=True
    ):
        assert made_g == pytest.approx(g, rel=1e-14)
        assert made_b == pytest.approx(b, rel=1e-13)
    assert model[2].weight_g.item() == pytest.approx(g2, rel=1e-13)
    assert model[2].bias.item() == pytest.approx(b2, rel=1e-13)
    assert model[0].weight_v.tolist() == v1


def test_what_g_and_b_were_does_not_matter() -> None:
    net, data = normed(Branchy()), [images()]
    wanted = initialise(net, data).model
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(torch.rand_like(parameter) * 100 + 1e-3)
            elif name.endswith("bias"):
                parameter.normal_()
    made = initialise(net, data).model.state_dict()
    for name, value in wanted.state_dict().items():
        assert relative_l2(made[name], value) < 1e-11, name


def test_how_the_data_is_cut_does_not_matter() -> None:
    net, whole = normed(Branchy()), images()
    one = initialise(net, [whole]).model
    parts = initialise(net, lambda: iter(whole.split([1, 9, 14]))).model
    for (name, a), b in zip(one.state_dict().items(), parts.state_dict().values(), strict=True):
        assert relative_l2(a, b) < 1e-11, name
    assert_same_state(one, initialise(net, [whole]).model)


@pytest.mark.parametrize("left_out", ["stem", "left.1", "head"])
def test_a_layer_left_out_is_seen(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LayerSite.set_

    def set_(site: LayerSite, *rest: Any) -> None:
        before = {name: value.clone() for name, value in site.module.state_dict().items()}
        whole(site, *rest)
        if site.name == left_out:
            site.module.load_state_dict(before)

    monkeypatch.setattr(LayerSite, "set_", set_)
    net = normed(Branchy())
    before = snapshot(net)
    with pytest.raises(CheckFailed) as failed:
        initialise_(net, [images()])
    assert f"(at {left_out})" in str(failed.value)
    assert worst(failed.value.model, [images()]) > 1e-2  # type: ignore[arg-type]
    assert_unchanged(before, net)


class Shared(nn.Module):
    """A layer that is called several times: beside itself, or on what it put out."""

    def __init__(self, calls: int, *, chained: bool) -> None:
        super().__init__()
        self.between = nn.Linear(6, 6)
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.calls, self.chained = calls, chained

    def forward(self, x: Tensor) -> Tensor:
        if not self.chained:
            return self.head(sum(torch.relu(self.shared(x * k + k)) for k in range(self.calls)))
        for _ in range(self.calls):
            x = x + self.between(torch.relu(self.shared(x)))
        return self.head(x)


def test_calls_of_one_layer_are_pooled() -> None:
    data = [torch.randn(64, 6).double() + 1]
    model, report = initialise(normed(Shared(3, chained=False)), data)
    assert worst(model, data) < 1e-12
    assert report.facts["sweeps"] == 1
    assert outputs(model, data)["shared"].shape == (3 * 64, 6)


@pytest.mark.parametrize("calls", [2, 4])
def test_calls_that_feed_each_other_settle(calls: int) -> None:
    data = [torch.randn(64, 6).double() + 1]
    model, report = initialise(normed(Shared(calls, chained=True)), data)
    assert worst(model, data) < 1e-5
    assert 1 < report.facts["sweeps"] < 20 * calls


def test_calls_that_cannot_settle_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normconv.calibration.data_init._SWEEPS", 1)
    data = [torch.randn(64, 6).double() + 1]
    with pytest.raises(CheckFailed, match="4 calls of it feed each other"):
        initialise(normed(Shared(4, chained=True)), data)


class Tied(nn.Module):
    """Two layers that share gain and direction but not the bias, and one whose gain an embedding has."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 5)
        self.two.weight, self.out.weight = self.one.weight, self.words.weight
        self.double()
        nc.wrap(self.one)
        share_parts_(self.two, self.one)
        nc.wrap(self.words)
        share_parts_(self.out, self.words)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.two(torch.relu(self.one(self.words(ids)))))


def test_of_tied_layers_the_first_sets_the_gain() -> None:
    ids = torch.randint(5, (40, 3))
    net = Tied()
    model, report = initialise(net, [ids])
    assert model.one.weight_g is model.two.weight_g
    assert torch.equal(model.words.weight_g, net.words.weight_g)
    found = outputs(model, [ids])
    for name in ("one", "two", "out"):
        assert found[name].mean(0).abs().max() < 1e-12
    assert (found["one"].std(0, correction=0) - 1).abs().max() < 1e-12
    notes = " ".join(report.notes)
    assert "two: its gain is that of one" in notes
    assert "out: its gain is that of words" in notes
    assert "neither Linear nor convolution, left as they are: words" in notes


@pytest.mark.parametrize("scale", ["linear", "exp"])
def test_dead_and_closed_channels_keep_what_they_have(scale: str) -> None:
    net = normed(nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    with torch.no_grad():
        net[2].weight_g[1] = 0.0  # a branch that starts as nothing
        for layer in (net[0], net[2]):
            layer.weight_v.mul_(torch.logspace(-3, 3, len(layer.bias)).double().view(-1, 1, 1, 1))
    if scale == "exp":
        net = nc.fold(net).model
        with torch.no_grad():
            net[2].weight[1] += 0.25
        normed(net, scale=scale)
    x = torch.randn(30, 4, 3, 3).double()
    x[:, 2:] = torch.tensor([0.1, 0.7]).double().view(2, 1, 1)  # all that the second group sees
    model, report = initialise(net, [x])
    assert report.facts["channels without variance"] == {"0": [3, 4, 5]}
    kept = [("0", row) for row in (3, 4, 5)] + ([("2", 1)] if scale == "linear" else [])
    for name, row in kept:
        for part in (model[int(name)].parts("weight")[0], "bias"):
            was, now = (getattr(m[int(name)], part)[row] for m in (net, model))
            assert torch.equal(was, now), (name, row, part)
    alive = outputs(model, [x])
    assert (alive["0"][:, :3].std(0, correction=0) - 1).abs().max() < 1e-11
    assert alive["0"][:, :3].mean(0).abs().max() < 1e-11
    if scale == "linear":
        assert report.facts["gains of 0"] == {"2": [1]}
        assert "1 channels with a gain of 0 keep what they have, in 2" in report.notes
    assert "3 channels without variance keep what they have, in 0" in report.notes


def test_without_a_bias_only_the_deviation_is_set() -> None:
    net = normed(nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(50, 3).double() + 4
    model, report = initialise(net, [x])
    y = model[0](x)
    assert model[0].bias is None
    assert (y.std(0, correction=0) - 1).abs().max() < 1e-12
    assert y.mean(0).abs().max() > 0.1
    assert "without a bias, so that the mean stays what it is: 0" in report.notes


class Normed(nn.Module):
    """Layers with a norm of each kind after them, and one before, after an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.gn = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.conv2, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv3, self.mobn = nn.Conv2d(8, 8, 3, bias=False), MeanOnlyBatchNorm(8)
        self.before, self.conv4 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.gn(self.conv1(x)))
        y = torch.relu(self.bn(self.conv2(y)))
        y = torch.relu(self.mobn(self.conv3(y)))
        return self.conv4(self.before(y))


def test_norms_are_standard_too() -> None:
    net, x = normed(Normed()), images()
    with torch.no_grad():
        net.gn.weight[0] = 0.0
        net.gn.weight[1] = -3.0
    model, report = initialise(net, [x])
    seen: dict[str, Tensor] = {}
    for name in ("gn", "bn", "mobn", "before", "conv4"):
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: seen.update({name: y.transpose(0, 1).flatten(1)})
        )
    model.eval()(x)
    for name, y in seen.items():
        rows = slice(1, None) if name == "gn" else slice(None)
        assert y[rows].mean(1).abs().max() < 1e-10, name
        # BatchNorm divides by √(σ² + 1e-5).
        assert (y[rows].std(1, correction=0) - 1).abs().max() < 2e-5, name
    assert model.gn.weight[0] == 0
    assert model.gn.weight[1] < 0
    # Eval mode is what training mode does on all of the data.
    y = model.eval()(x)
    assert relative_l2(model.train()(x), y) < 1e-5
    assert [row.action for row in report.sites] == [
        "g and b", "γ and β", "g and b", "running statistics", "g", "running statistics",
        "running statistics", "g and b",
    ]  # fmt: skip


def test_the_paper_draws_v() -> None:
    net, data = normed(Branchy()), [images()]
    model, report = initialise(net, data, v_std=0.05, seed=3)
    v = torch.cat([m.weight_v.flatten() for m in model.modules() if isinstance(m, WeightNormed)])
    assert v.std().item() == pytest.approx(0.05, rel=0.1)
    assert abs(v.mean().item()) < 0.005
    assert worst(model, data) < 1e-12
    assert_same_state(model, initialise(net, data, v_std=0.05, seed=3).model)
    other = initialise(net, data, v_std=0.05, seed=4).model
    assert not torch.equal(other.stem.weight_v, model.stem.weight_v)
    assert report.facts["v"] == {"std": 0.05, "seed": 3}
    with pytest.raises(UsageError, match="v_std"):
        initialise(net, data, v_std=0.0)
    with pytest.raises(UsageError, match="seed"):
        initialise(net, data, v_std=0.05, seed=0.5)  # type: ignore[arg-type]


class Sequences(nn.Module):
    """A layer before and after an LSTM, and one that eval mode never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True)
        self.head, self.auxiliary, self.plain = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 2)
        self.double()
        for layer in (self.inner, self.lstm, self.head, self.auxiliary):
            nc.wrap(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.head(self.lstm(self.inner(x))[0]))


def test_recurrent_and_other_layers_that_are_left_are_said() -> None:
    net, x = Sequences(), torch.randn(20, 5, 3).double()
    model, report = initialise(net, [x])
    assert report.facts["layers initialised"] == ["inner", "head"]
    assert report.notes == (
        "not called as modules on the first batch, left as they are: auxiliary",
        "recurrent layers have no data-dependent initialisation, left as they are: lstm",
        "without weight norm, left as they are: plain",
    )
    for name in ("lstm.weight_hh_l0_g", "auxiliary.weight_g", "plain.weight"):
        assert torch.equal(model.get_parameter(name), net.get_parameter(name))


class Padded(nn.Conv2d):
    """A forward of its own that is still g · t + b."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Activated(nn.Conv2d):
    """One that is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


@pytest.mark.parametrize("scale", ["linear", "exp"])
def test_a_layer_with_a_forward_of_its_own_is_tried(scale: str) -> None:
    net = normed(
        nn.Sequential(Padded(3, 4, 3), Activated(4, 4, 1), nn.Conv2d(4, 2, 3)), scale=scale
    )
    model, report = initialise(net, [images()])
    assert report.facts["layers initialised"] == ["0", "2"]
    assert report.notes == ("what their own forward gives is not g · t + b, left as they are: 1",)
    assert_same_state(model[1], net[1])
    for name in ("0", "2"):
        y = outputs(model, [images()])[name]
        assert y.mean(0).abs().max() < 1e-12
        assert (y.std(0, correction=0) - 1).abs().max() < 1e-12


def bn_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).double()


def converted(net: nn.Module, to: str = "wn") -> nn.Module:
    return nc.convert(net.eval(), to, example_inputs=(images(2),)).model


def test_a_model_converted_from_an_untrained_one_is_taken() -> None:
    model = converted(bn_net())
    initialise(model, [images()])
    with pytest.raises(UsageError, match="no weight-normed"):
        initialise(converted(bn_net(), "plain"), [images()])


def test_a_trained_model_is_refused_unless_it_starts_anew() -> None:
    net = bn_net()
    net(images())
    model = converted(net)
    before = snapshot(model)
    with pytest.raises(UsageError, match="converted from a model with trained") as refused:
        initialise(model, [images()])
    assert "fresh=True" in str(refused.value)
    assert_unchanged(before, model)
    assert worst(initialise(model, [images()], fresh=True).model, [images()]) < 1e-12

    kept = normed(bn_net())
    kept.train()(images())
    with pytest.raises(UsageError, match="1: its running statistics are trained"):
        initialise(kept, [images()])
    first = initialise(kept, [images()], fresh=True).model
    assert worst(first, [images()]) < 1e-12


def test_calibrated_models_are_trained_ones() -> None:
    net = bn_net()
    net.insert(3, nn.GroupNorm(1, 8))
    model = normed(net[3:].double())
    calibrated = nc.plan.record  # the history is all there is to see it by
    calibrated(model, {"calibrate": {"groups": {}}})
    with pytest.raises(UsageError, match="its history has a calibrate"):
        initialise(model, [torch.randn(4, 8, 5, 5).double()])


def test_in_place_it_is_the_model_itself() -> None:
    net, data = normed(Branchy()), [images()]
    wanted = initialise(net, data).model
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(images()).square().mean().backward()
    held = dict(net.named_parameters())
    model, report = initialise_(net, data)
    assert isinstance(report.facts["data"], dict)
    assert model is net
    assert_same_state(net, wanted)
    assert all(held[name] is p for name, p in net.named_parameters())
    assert net.stem.weight_g.grad is None
    assert history_of(net)[-1]["init"]["data"] == report.facts["data"]
    net(images()).square().mean().backward()
    optimizer.step()
    assert worst(net, data) > 1e-6


def test_report_history_and_files_say_what_was_used(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return bn_net().eval()

    made = nc.convert(factory(), "wn", example_inputs=(images(2),)).model
    model, report = initialise(made, [images()], data_use="private")
    used = report.facts["data"]
    assert used["samples"] == 24
    assert used["purpose"] == "init"
    assert used["use"] == "private"
    assert len(used["sha256"]) == 64
    assert any("no privacy accountant" in note for note in report.notes)
    json.dumps(report.to_dict())
    assert history_of(model)[-1]["init"]["data"] == used
    nc.save(model, tmp_path / "m.safetensors")
    loaded = nc.load(tmp_path / "m.safetensors", model=factory)
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))
    assert relative_l2(nc.fold(model).model(images()), model(images())) < 1e-12


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "it is empty"),
        ([torch.full((4, 3, 10, 10), float("nan"))], "NaN"),
        ([torch.zeros(4, 3, 10, 10)], "every number in it is 0"),
        (iter([images()]), "only once"),
        ([torch.randn(4, 5, 10, 10)], "batch 0: the model does not run on it"),
        ([images(4), torch.randn(4, 5, 10, 10)], "batch 1: the model does not run on it"),
        ([images(1)], "head: the data has a single number a channel there"),
    ],
    ids=["empty", "nan", "constant", "iterator", "shape", "second", "one"],
)
def test_bad_data_is_told_and_nothing_is_changed(data: Any, says: str) -> None:
    net = normed(Branchy())
    before = snapshot(net)
    with pytest.raises(UsageError, match=says):
        initialise_(net, data)
    assert_unchanged(before, net)


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.log(self.one(x)))  # of something negative


def test_models_that_cannot_be_initialised_are_told_why() -> None:
    x = torch.randn(8, 3).double()
    with pytest.raises(UsageError, match="two: what it puts out on the data holds NaN"):
        initialise(normed(Exploding()), [x])
    with pytest.raises(UsageError, match="no weight-normed Linear or convolution"):
        initialise(nn.Linear(3, 3).double(), [x])
    with pytest.raises(UsageError, match="meta device"):
        initialise(nc.wrap(nn.Linear(3, 3, device="meta")), [x])
    with pytest.raises(UsageError, match="data_use"):
        initialise(normed(nn.Linear(3, 3)), [x], data_use="none")
    with pytest.raises(UsageError, match="lazy"):
        initialise(nn.Sequential(nc.wrap(nn.Linear(3, 3)), nn.LazyLinear(2)), [x])
    with pytest.raises(PlanError, match="DataParallel"):
        initialise(nn.DataParallel(nc.wrap(nn.Linear(3, 3))), [x])


def test_a_pass_ends_with_the_last_call_that_is_looked_at() -> None:
    net, calls = normed(Branchy()), []
    net.head.register_forward_pre_hook(lambda *_: calls.append("head"))
    seen: list[tuple[int, ...]] = []
    looks = {"left.0": lambda x, y: seen.append(tuple(y.shape))}
    assert observe(net, (images(2),), {}, looks, 1) == ["left.0"]
    assert seen == [(2, 8, 5, 5)]
    assert not calls
    observe(net, (images(2),), {}, looks)
    assert calls == ["head"]


SCRIPT = """
import sys, torch, torch.distributed as dist
from normconv.calibration.data_init import initialise
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
net, data = torch.load(f"{folder}/given.pt", weights_only=False)
model = initialise(net, data[rank::2], v_std=0.05).model
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    parts = [
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ELU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
    ]
    net = normed(
        nn.Sequential(*parts, nn.ELU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 81, 5))
    )
    data = [images(5, 1), images(9, 2), images(7, 3)]
    torch.save((net, data), tmp_path / "given.pt")
    (tmp_path / "rank.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, tmp_path / "rank.py", str(rank), tmp_path], env=env)
        for rank in range(2)
    ]
    assert [process.wait(timeout=180) for process in running] == [0, 0]
    wanted: Result = initialise(net, data, v_std=0.05)
    alone = initialise(net, data[::2], v_std=0.05).model  # it matters that both take part
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in wanted.model.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert relative_l2(first[name], value) <= 1e-6, name
    assert relative_l2(alone[7].weight_g, wanted.model[7].weight_g) > 1e-3


def test_a_large_bias_costs_a_sweep_more() -> None:
    """g · t beside b of 1e5 has few digits in float32; the second sweep finds t without b."""
    torch.manual_seed(0)
    layer = nc.wrap(nn.Linear(4, 3))
    nn.init.constant_(layer.bias, 1e5)
    x = torch.randn(99, 4)
    model, report = initialise(layer, [x])
    assert report.passed
    assert report.facts["sweeps"] > 1
    assert worst(model, [x]) < 1e-5
    nn.init.constant_(layer.bias, 0.0)
    assert initialise(layer, [x]).report.facts["sweeps"] == 1


def test_a_model_of_recurrent_layers_has_no_such_start() -> None:
    with pytest.raises(UsageError, match="recurrent, attention and embedding layers have no data"):
        initialise(nn.Sequential(nc.wrap(nn.LSTM(3, 4))), [torch.randn(5, 2, 3)])


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="no whole number of 64 bits"):
        initialise(nc.wrap(nn.Linear(2, 2)), [torch.randn(9, 2)], v_std=0.05, seed=2**70)
