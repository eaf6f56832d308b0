"""GroupNorms become constants in the weights: what stays, how near it is, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import normconv as nc
from normconv.errors import CheckFailed, PlanError, UsageError


class Block(nn.Module):
    """A residual net with a norm after a sum, which no layer before it can absorb."""

    def __init__(self, norm=lambda c: nn.GroupNorm(2, c)) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.after = norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.norm1(self.stem(x)).relu()
        y = self.after(y + self.norm2(self.conv(y))).relu()
        return self.head(y.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Block()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name or "after" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + 1)
    return net.eval()


def images(count: int = 3, batch: int = 32, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 12, 12, generator=generator) for _ in range(count)]


def off(model, net, x):
    with torch.no_grad():
        return float((model(x) - net(x)).norm() / net(x).norm())


def test_no_norm_is_left_and_it_is_near(net):
    data, (other,) = images(), images(1, seed=7)
    before = copy.deepcopy(net.state_dict())
    model, report = nc.freeze_norms(net, data, held_out=[other])
    assert type(model) is Block
    assert not any(isinstance(m, (nn.GroupNorm, nn.BatchNorm2d)) for m in model.modules())
    assert [row.fidelity for row in report.sites] == ["calibrated"] * 3
    assert (report.verb, report.facts["fidelity"]) == ("fold", "calibrated")
    assert (report.facts["norms left"], report.facts["channel affines left"]) == (0, 1)
    assert report.passed
    assert report.facts["data"]["samples"] == 96
    assert report.facts["measured on"] == "held-out data"
    assert set(report.facts["after"]["sites"]) == {"norm1", "norm2", "after"}
    # What is reported is what it is, and one after the other is nearer than each alone.
    here = off(model, net, other)
    assert report.facts["after"]["output"] == pytest.approx(here, rel=1e-3)
    assert here < report.facts["before"]["output"] < 0.5
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    again, _ = nc.freeze_norms(net, data)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert not any(
        type(m).__module__.startswith("normconv.layers.constant") for m in model.modules()
    )
    pickle.loads(pickle.dumps(model))


def test_constants_alone_match_mean_and_deviation(net):
    """Of the first norm, whose input is the teacher's own."""
    data = images()
    model, _ = nc.freeze_norms(net, data, refit=False)
    x = torch.cat(data)
    with torch.no_grad():
        wanted, got = net.norm1(net.stem(x)), model.norm1(model.stem(x))
    torch.testing.assert_close(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.std((0, 2, 3)), wanted.std((0, 2, 3)), atol=0, rtol=1e-4)


def test_standardized_layers_are_folded_first(net):
    data = images()
    bn = Block(nn.BatchNorm2d)
    for x in data:
        bn.train()(x)
    converted = nc.convert(bn.eval(), "gn+ws", example_inputs=(data[0],), data=data).model
    model, report = nc.freeze_norms(converted, data)
    assert type(model.conv) is nn.Conv2d
    assert off(model, converted, data[0]) == pytest.approx(report.facts["after"]["output"], rel=0.2)


def test_it_is_rebuilt_from_a_file(net, tmp_path):
    model, _ = nc.freeze_norms(net, images())
    nc.save(model, tmp_path / "m.safetensors")
    built = nc.load(tmp_path / "m.safetensors", model=Block)
    x = images(1)[0]
    assert torch.equal(built.eval()(x), model(x))


def test_a_lesson_after_it(net):
    model, report = nc.freeze_norms(net, images(), recover=4)
    assert report.facts["recover"]["steps"] == 4
    assert set(report.facts["recover"]["after, on the same data"]["sites"]) == {
        "norm1",
        "norm2",
        "after",
    }
    assert report.facts["data"]["purpose"] == "freeze"
    assert type(model.norm1) is nn.Identity


def test_an_activation_in_the_slot_stays():
    timm_layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), timm_layers.GroupNormAct(8, num_groups=2), nn.Conv2d(8, 4, 1)
    ).eval()
    x = images(1)[0]
    model, report = nc.freeze_norms(net, [x])
    assert [row.site for row in report.sites] == ["1"]
    with torch.no_grad():
        assert float(model[:2](x).min()) == 0


def test_an_agreement_that_is_missed_fails_with_the_model(net):
    data = images()
    with torch.no_grad():  # scores that hang by a hair
        net.head.bias -= net(data[0]).mean(0)
    with pytest.raises(CheckFailed) as failed:
        nc.freeze_norms(net, data, min_agreement=1.0)
    assert failed.value.model is not None
    assert [check.name for check in failed.value.report.failed_checks] == ["agreement"]


class Scaled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_refused(net):
    with pytest.raises(UsageError, match="has no GroupNorm"):
        nc.freeze_norms(nn.Sequential(nn.Linear(2, 2)), [torch.randn(4, 2)])
    with pytest.raises(PlanError, match=r"1: its forward differs from its base class's"):
        nc.freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(2, 4)), images())
    with pytest.raises(UsageError, match="give data="):
        nc.freeze_norms(net)
    with pytest.raises(UsageError, match="data_use"):
        nc.freeze_norms(net, images(), data_use="none")
    with pytest.raises(UsageError, match="NaN"):
        nc.freeze_norms(net, [torch.full((4, 3, 12, 12), float("nan"))])
