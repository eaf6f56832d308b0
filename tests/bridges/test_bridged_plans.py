"""A plan carried out on a checkpoint gives the tensors that it gives on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.bridges import convert_state_dict


def factory() -> nn.Sequential:
    """Norms folded backward and forward, grouped and transposed, through a flattening, and left alone."""
    return nn.Sequential(
        nn.BatchNorm2d(3, eps=1e-3),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 3, groups=4),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).eval()


EPS = {"*": 1e-5, "0": 1e-3}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained() -> nn.Sequential:
    net = factory()
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return net


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def plan_for(net: nn.Module, to: str, **options: Any) -> nc.Plan:
    layers: Any = "all" if to == "wn" else "normed"
    return nc.make_plan(net, to, options=options, layers=layers, example_inputs=(X,))


@pytest.mark.parametrize("options", [{}, {"scale": "exp", "c": 2.0}], ids=["g", "e^cs"])
def test_a_checkpoint_with_norms_becomes_that_of_the_converted_model(options: Any) -> None:
    net = trained()
    plan = plan_for(net, "wn", **options)
    actions = [step.action for step in plan.steps]
    assert {"forward", "fold", "affine", "wrap"} == set(actions)
    made, report = convert_state_dict(net.state_dict(), "normconv-wn", plan=plan)
    assert equal(made, nc.apply_plan(net, plan).model.state_dict())
    shell = nc.apply_plan(factory(), plan).model
    shell.load_state_dict(made, strict=True)
    torch.testing.assert_close(shell(X), net(X), rtol=1e-4, atol=1e-4)
    assert "2.running_mean" in report.facts["dropped"]
    rows = {row.site: row.reason for row in report.sites}
    assert rows["1.weight"] == "0 before it, 2 after it"


def test_plain_output_is_that_of_the_plain_target() -> None:
    net = trained()
    plan = plan_for(net, "plain")
    made, _ = convert_state_dict(net.state_dict(), plan=plan)
    assert equal(made, nc.apply_plan(net, plan).model.state_dict())
    shell = nc.fold(nc.apply_plan(factory(), plan).model).model
    shell.load_state_dict(made, strict=True)
    torch.testing.assert_close(shell(X), net(X), rtol=1e-4, atol=1e-4)


def test_a_weight_norm_plan_gives_plain_weights_too() -> None:
    net = trained()
    plan = plan_for(net, "wn")
    made, _ = convert_state_dict(net.state_dict(), plan=plan, eps=EPS)
    shell = nc.fold(nc.apply_plan(factory(), plan).model).model
    shell.load_state_dict(made, strict=True)
    torch.testing.assert_close(shell(X), net(X), rtol=1e-4, atol=1e-4)


def test_frozen_norms_and_layers_of_several_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 6, 3)
            self.norm = nn.BatchNorm1d(6)
            self.rnn = nn.LSTM(6, 4)
            self.gate = nn.GRUCell(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(self.norm(self.conv(x)).permute(2, 0, 1))[0]
            y = y + self.attention(y, y, y)[0]
            out: Tensor = self.gate(y.flatten(0, 1))
            return out

    net, x = Net().eval(), torch.randn(2, 3, 7)
    nn.init.normal_(net.norm.weight)
    for recipe in ("wn", nc.Recipe((nc.Rule("frozen", match="norm"), nc.Rule("wn")))):
        plan = nc.make_plan(net, recipe, layers="all", example_inputs=(x,))
        made, _ = convert_state_dict(net.state_dict(), "normconv-wn", plan=plan, eps=1e-5)
        converted = nc.apply_plan(net, plan).model
        assert equal(made, converted.state_dict())


def test_a_layer_with_two_names_is_folded_under_both() -> None:
    conv = nn.Conv2d(3, 4, 1)
    net = nn.ModuleDict({"a": conv, "b": conv, "norm": nn.BatchNorm2d(4)}).eval()
    nn.init.normal_(net["norm"].weight)  # type: ignore[arg-type]
    step = nc.Step("norm", "BatchNorm2d", "plain", "fold", 4, producers=("a",), op="conv2d")
    plan = nc.Plan((step,), "ModuleDict", "0" * 64, "fx", ("plain",))
    made, _ = convert_state_dict(net.state_dict(), plan=plan, eps=1e-5)
    assert list(made) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert made["a.weight"] is made["b.weight"]
    assert not torch.equal(made["a.weight"], conv.weight)


def test_what_a_plan_needs_is_asked_for() -> None:
    net = trained()
    plan = plan_for(net, "wn")
    old = replace(plan, steps=tuple(replace(step, eps=None) for step in plan.steps))
    with pytest.raises(nc.UsageError, match=r"says the eps of the BatchNorm2d.*--eps 1e-5"):
        convert_state_dict(net.state_dict(), "normconv-wn", plan=old)
    said = convert_state_dict(net.state_dict(), "normconv-wn", plan=old, eps=EPS).state_dict
    assert equal(said, convert_state_dict(net.state_dict(), "normconv-wn", plan=plan).state_dict)
    with pytest.raises(nc.UsageError, match="makes no weight norm"):
        convert_state_dict(net.state_dict(), "normconv-wn", plan=plan_for(net, "plain"), eps=EPS)
    gn = nc.make_plan(net, "gn", example_inputs=(X,))
    with pytest.raises(nc.LoadError, match="target gn is more than its keys"):
        convert_state_dict(net.state_dict(), plan=gn, eps=EPS)


def test_a_checkpoint_of_another_model_is_refused_with_every_key() -> None:
    net = trained()
    plan = plan_for(net, "plain")
    given = dict(net.state_dict())
    given["1.weight"] = given["1.weight"][:7]
    given["2.running_var"] = given["2.running_var"] * torch.nan
    given["10.running_mean"] = given["10.running_mean"][:3]
    del given["7.running_var"]
    given["9.other"] = given.pop("9.weight")
    with pytest.raises(nc.LoadError) as refused:
        convert_state_dict(given, plan=plan, eps=EPS)
    wrong = {"1.weight", "2.running_var", "10.running_mean", "7.running_var", "9.weight"}
    assert {problem.where for problem in refused.value.problems} == wrong
