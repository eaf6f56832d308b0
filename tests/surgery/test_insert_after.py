"""`insert_after`: norms for a net that has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.errors import PlanError, UsageError
from normconv.layers import Normed
from normconv.numerics import relative_l2

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Convolutions without norms, one of them called twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1)
        self.same = self.mid
        self.up = nn.ConvTranspose2d(32, 8, 2, groups=2)
        self.head = nn.Linear(8, 24)
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.mid(self.stem(x).relu()).relu()).relu()
        return self.last(self.head(self.up(x).mean((2, 3))).relu())


def net_of(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def test_norms_stand_where_the_globs_say() -> None:
    net = net_of()
    globs = ["stem", "mid", "up", "head"]
    model, report = nc.convert(net, "gn", example_inputs=(X,), insert_after=globs)
    assert {row.site: (row.action, row.fidelity) for row in report.sites} == dict.fromkeys(
        globs, ("gn: insert", "fresh")
    )
    assert any("nothing is exact after" in note for note in report.notes)
    assert isinstance(model.stem, Normed)
    assert model.same is model.mid
    assert model.stem.norm.num_groups == 2  # of 16 channels
    assert isinstance(model.last, nn.Linear)
    assert type(net.stem) is nn.Conv2d
    assert [n for n in model.state_dict() if n.startswith("head.")] == [
        "head.layer.weight", "head.layer.bias", "head.norm.weight", "head.norm.bias"
    ]  # fmt: skip

    def normed(x: Tensor, groups: int) -> Tensor:
        return nn.functional.group_norm(x, groups)

    y = normed(net.stem(X), 2).relu()
    for _ in range(2):
        y = normed(net.mid(y), 2).relu()
    y = normed(net.head(normed(net.up(y), 1).mean((2, 3))), 1).relu()
    assert relative_l2(model(X), net.last(y)) <= 1e-6


def test_groups_and_eps_are_those_of_gn() -> None:
    options = {"groups": 4, "eps": 0.1}
    model = nc.convert(
        net_of(), "gn", example_inputs=(X,), options=options, insert_after="stem"
    ).model
    assert (model.stem.norm.num_groups, model.stem.norm.eps) == (4, 0.1)
    options = {"channels_per_group": 8}
    model = nc.convert(
        net_of(), "gn", example_inputs=(X,), options=options, insert_after=["*"]
    ).model
    assert {n: m.num_groups for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)} == {
        "stem.norm": 4, "mid.norm": 4, "up.norm": 1, "head.norm": 1, "last.norm": 1
    }  # fmt: skip


def test_the_result_trains_on_one_sample_and_folds_with_its_norms() -> None:
    model = nc.convert(net_of(), "gn", example_inputs=(X,), insert_after=["stem", "head"]).model
    model.train()
    model(X[:1]).square().sum().backward()
    assert model.stem.norm.weight.grad.abs().sum() > 0
    folded = nc.fold(model.eval()).model
    assert isinstance(folded.stem.norm, nn.GroupNorm)
    assert torch.equal(folded(X), model(X))


def test_the_plan_gives_the_structure_back(tmp_path: Path) -> None:
    net = net_of()
    plan = nc.make_plan(
        net, "gn", example_inputs=(X,), insert_after=["*"], exclude=["last"], options={"groups": 2}
    )
    assert [step.site for step in plan.steps] == ["stem", "mid", "up", "head"]
    assert nc.Plan.from_json(plan.to_json()) == plan
    model = nc.convert(net, plan, example_inputs=(X,)).model
    nc.save(model, tmp_path / "m.safetensors")
    back = nc.load(tmp_path / "m.safetensors", model=Net)
    assert torch.equal(back.eval()(X), model(X))
    with torch.device("meta"):
        skeleton = Net()
    assert list(nc.apply_plan(skeleton, plan).model.state_dict()) == list(model.state_dict())
    wrong = tuple(replace(step, channels=7) for step in plan.steps)
    with pytest.raises(PlanError, match="the plan expects 7 rows"):
        nc.apply_plan(net, replace(plan, steps=wrong))


def test_beside_norms_inside_a_submodule_and_as_a_graph() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 8, 3)))
    net.eval()
    report = nc.convert(net, "gn", example_inputs=(X,), insert_after=["2.0"]).report
    assert [row.action for row in report.sites] == ["gn: fold", "gn: insert"]
    with pytest.raises(PlanError, match="0: a norm follows it already"):
        nc.make_plan(net, "gn", example_inputs=(X,), insert_after=["0"])
    inner = nc.convert(net, "gn", example_inputs=(X,), at="2", insert_after=["2.*"]).model
    assert isinstance(inner[1], nn.BatchNorm2d)
    assert isinstance(inner[2][0], Normed)
    graph = nc.convert(net_of(), "gn", example_inputs=(X,), insert_after="stem", output="graph")
    assert isinstance(graph.model.stem, Normed)
    alone = nc.convert(nn.Linear(3, 16), "gn", example_inputs=(X[..., 0, 0],), insert_after="*")
    assert isinstance(alone.model, Normed)


class ReadsItsLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.lstm, self.attention = nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b.weight.sum()
        y = self.b(y)
        y, _ = self.lstm(y[None])
        return self.attention(y, y, y)[0]


@pytest.mark.parametrize(
    ("glob", "reason"),
    [
        ("b", "b: its tensors are read outside"),
        ("unused", "unused: eval mode does not call it"),
        ("lstm", "lstm: a LSTM does not put out channels"),
        ("attention.out_proj", "MultiheadAttention reads its weight"),
    ],
)
def test_places_where_no_norm_may_stand(glob: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        nc.make_plan(
            ReadsItsLayer(), "gn", example_inputs=(torch.randn(2, 4),), insert_after=["a", glob]
        )


def test_channels_on_the_last_axis_are_refused() -> None:
    with pytest.raises(PlanError, match=r"puts out \(2, 5, 4\)"):
        nc.make_plan(
            nn.Sequential(nn.Linear(3, 4)),
            "gn",
            example_inputs=(torch.randn(2, 5, 3),),
            insert_after=["0"],
        )


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("gn", {"insert_after": "stm"}, "nearest layer: 'stem'"),
        ("wn", {"insert_after": "stem"}, "makes no norm where there was none"),
        ("gn+ws", {"insert_after": "stem"}, "makes no norm where there was none"),
        ("gn", {"insert_after": "stem", "data": [X]}, "nothing to be calibrated to"),
    ],
)
def test_wrong_uses(to: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        nc.convert(net_of(), to, example_inputs=(X,), **options)


def test_in_place() -> None:
    net = net_of()
    weight = net.stem.weight
    nc.convert_(net, "gn", example_inputs=(X,), insert_after="stem")
    assert net.stem.layer.weight is weight
