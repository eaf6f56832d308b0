"""Weight norm on nets without norms: which layers, what stays tied, what is proved, what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normconv as nc
from normconv.errors import PlanError, UsageError
from normconv.layers import LogWeightNormed, Reparametrised, WeightNormed, layout_of
from normconv.numerics import relative_l2
from tests.test_contract import original_of
from tests.zoo import ZOO

TOKENS = torch.tensor([[1, 4, 2, 0], [3, 3, 5, 1]])


class LanguageModel(nn.Module):
    """Embedding, LSTM, self-attention, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 8, padding_idx=0)
        self.rnn = nn.LSTM(8, 4, bidirectional=True, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.emb(tokens))
        return self.head(self.block(hidden))


class Branches(nn.Module):
    """One layer under two names, one that only training calls, control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.first(x))
        if float(y.detach().sum()) > 1e9:
            y = -y
        return y + self.extra(x) if self.training else y


def made(kind: type[nn.Module], **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**more).eval()


def actions(plan: nc.Plan) -> dict[str, str]:
    return {step.site: step.action for step in plan.steps}


def test_all_layers_of_a_net_without_norms_and_their_proof() -> None:
    net = made(LanguageModel)
    model, report = nc.convert(net, "wn", example_inputs=(TOKENS,), options={"embeddings": True})
    assert report.passed
    measured = {row.site: row.error for row in report.sites if row.error is not None}
    assert {"emb", "rnn", "block.self_attn", "head"} <= set(measured)
    assert all(error <= 1e-6 for error in measured.values())
    assert any("layers='all'" in note for note in report.notes)
    assert isinstance(model.rnn, WeightNormed)
    assert isinstance(model.rnn, nn.LSTM)
    assert isinstance(model.block.self_attn.out_proj, WeightNormed)
    plain = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    assert plain == []
    assert not any(isinstance(m, Reparametrised) for m in net.modules())
    folded = nc.fold(model).model
    assert [type(m) for m in folded.modules()] == [type(m) for m in net.modules()]
    assert relative_l2(folded(TOKENS), net(TOKENS)) <= 1e-6


def test_a_broken_layer_fails_the_proof() -> None:
    net = made(LanguageModel)
    plan = nc.make_plan(net, "wn", example_inputs=(TOKENS,))
    result = nc.apply_plan(net, plan)
    from normconv.api import prove_conversion

    with torch.no_grad():
        result.model.rnn.weight_hh_l0_g[2] *= 1.001
    with pytest.raises(nc.CheckFailed) as caught:
        prove_conversion(net, result, plan, (TOKENS,), {})
    assert "site rnn" in {check.name for check in caught.value.report.failed_checks}


@pytest.mark.parametrize("options", [{"embeddings": True}, {"embeddings": True, "scale": "exp"}])
def test_a_tied_weight_stays_tied(options: dict[str, Any]) -> None:
    net = made(LanguageModel)
    with torch.no_grad():
        net.emb.weight[0] = 0  # a padding row
    model = nc.convert(net, "wn", example_inputs=(TOKENS,), options=options).model
    assert model.head.weight_v is model.emb.weight_v
    gain = "weight_s" if "scale" in options else "weight_g"
    assert getattr(model.head, gain) is getattr(model.emb, gain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS[:1]).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.head.weight, model.emb.weight)
    folded = nc.fold(model).model
    assert folded.head.weight is folded.emb.weight


def test_a_head_tied_to_an_embedding_that_stays_plain_stays_plain() -> None:
    plan = nc.make_plan(made(LanguageModel), "wn", example_inputs=(TOKENS,))
    assert actions(plan)["emb"] == actions(plan)["head"] == "keep"
    reason = next(step.reason for step in plan.steps if step.site == "head")
    assert "also emb's" in reason
    model = nc.apply_plan(made(LanguageModel), plan).model
    assert model.head.weight is model.emb.weight
    with pytest.raises(PlanError, match="head: its weight is also emb's"):
        nc.make_plan(made(LanguageModel), "wn", example_inputs=(TOKENS,), include=["head"])


def test_globs_choose_layers_and_name_embeddings() -> None:
    net = made(LanguageModel)
    plan = nc.make_plan(net, "wn", example_inputs=(TOKENS,), include=["emb", "head", "rnn"])
    assert {n for n, a in actions(plan).items() if a == "wrap"} == {"emb", "head", "rnn"}
    plan = nc.make_plan(net, "wn", example_inputs=(TOKENS,), exclude=["block.*"])
    assert {n for n, a in actions(plan).items() if a == "wrap"} == {"rnn"}
    recipe = nc.Recipe((nc.Rule("wn", op="lstm"), nc.Rule("keep")))
    plan = nc.make_plan(net, recipe, example_inputs=(TOKENS,))
    assert [n for n, a in actions(plan).items() if a == "wrap"] == ["rnn"]
    with pytest.raises(UsageError, match="nearest site: 'rnn'"):
        nc.make_plan(net, "wn", example_inputs=(TOKENS,), exclude=["rn"])


def test_a_plan_is_data_and_gives_the_structure_to_fresh_models() -> None:
    net = made(LanguageModel)
    options = {"embeddings": True, "scale": "exp", "c": 2.0}
    plan = nc.make_plan(net, "wn", example_inputs=(TOKENS,), options=options)
    text = plan.to_json()
    assert nc.Plan.from_json(text) == plan
    assert json.loads(text)["steps"][-1]["producers"] == ["emb"]
    model = nc.convert(net, plan, example_inputs=(TOKENS,)).model
    torch.manual_seed(7)
    fresh = nc.apply_plan(LanguageModel().eval(), plan).model
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    with torch.device("meta"):
        skeleton = LanguageModel()
    skeleton = nc.apply_plan(skeleton, nc.Plan.from_json(text)).model
    assert list(skeleton.state_dict()) == list(model.state_dict())
    assert skeleton.head.weight_v is skeleton.emb.weight_v


def test_a_file_of_weights_brings_the_structure_back(tmp_path: Path) -> None:
    net = made(LanguageModel)
    model = nc.convert(net, "wn", example_inputs=(TOKENS,), options={"embeddings": True}).model
    nc.save(model, tmp_path / "m.safetensors")
    back = nc.load(tmp_path / "m.safetensors", model=LanguageModel)
    assert torch.equal(back.eval()(TOKENS), model(TOKENS))
    assert back.head.weight_v is back.emb.weight_v
    folded = nc.fold(model).model
    nc.save(folded, tmp_path / "f.safetensors")
    again = nc.load(tmp_path / "f.safetensors", model=LanguageModel)
    assert torch.equal(again.eval()(TOKENS), folded(TOKENS))


def test_shared_modules_control_flow_and_layers_that_only_training_calls() -> None:
    net, x = made(Branches), torch.randn(2, 3)
    model, report = nc.convert(net, "wn", example_inputs=(x,))
    assert model.first is model.again
    assert {row.site: row.error is None for row in report.sites} == {"first": False, "extra": True}
    net.train()
    assert relative_l2(model.train()(x), net(x)) <= 1e-6


def test_in_place_keeps_parameters_and_refuses_before_the_first_write() -> None:
    net = made(LanguageModel)
    v, expected = net.rnn.weight_ih_l0, net(TOKENS)
    result = nc.convert_(net, "wn", example_inputs=(TOKENS,), options={"embeddings": True})
    assert result.model is net
    assert net.rnn.weight_ih_l0_v is v
    assert relative_l2(net(TOKENS), expected) <= 1e-6
    broken = made(LanguageModel)
    with torch.no_grad():
        broken.rnn.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(PlanError, match="weight_hh_l0 holds NaN"):
        nc.convert_(broken, "wn", example_inputs=(TOKENS,))
    assert type(broken.block.linear1) is nn.Linear


def test_layers_beside_norms() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    assert actions(nc.make_plan(net, "wn", example_inputs=(x,))) == {"1": "fold"}
    model, report = nc.convert(net, "wn", example_inputs=(x,), layers="all")
    assert [(row.site, row.action) for row in report.sites] == [
        ("1", "wn: fold"),
        ("3", "wn: wrap"),
    ]
    assert [isinstance(m, WeightNormed) for m in model] == [True, False, False, True]
    with pytest.raises(PlanError, match="no BatchNorm"):
        nc.make_plan(net[2:], "wn", example_inputs=(torch.randn(2, 4, 6, 6),), layers="normed")
    plan = nc.make_plan(net, "wn", example_inputs=(x,), layers="all")
    first = replace(plan.steps[1], site="0", norm="Conv2d", channels=4)
    with pytest.raises(PlanError, match="two steps of the plan speak of it"):
        nc.apply_plan(net, replace(plan, steps=(plan.steps[0], first)))


@pytest.mark.parametrize("scale", ["linear", "exp"])
@pytest.mark.parametrize(
    "name", ["residual_net", "zero_rows", "half", "bfloat16", "conv_transpose2d_grouped"]
)
def test_all_layers_of_zoo_models(name: str, scale: str) -> None:
    """Norms with γ <= 0 among them, in narrow dtypes and in grouped transposed layers."""
    case, net = ZOO[name], original_of(name)
    args, kwargs = case.inputs()
    options = {"scale": scale}
    model, report = nc.convert(
        net, "wn", example_inputs=args, example_kwargs=kwargs, options=options, layers="all"
    )
    wanted = LogWeightNormed if scale == "exp" else WeightNormed
    assert all(isinstance(m, wanted) for m in model.modules() if layout_of(m) is not None)
    assert report.passed
    assert not any(isinstance(m, Reparametrised) for m in nc.fold(model).model.modules())


def test_inside_one_submodule_and_as_a_graph() -> None:
    net, x = (
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2))).eval(),
        torch.randn(2, 3),
    )
    model = nc.convert(net, "wn", example_inputs=(x,), at="1").model
    assert [isinstance(m, WeightNormed) for m in (model[0], model[1][0])] == [False, True]
    graph = nc.convert(net, "wn", example_inputs=(x,), output="graph").model
    assert isinstance(graph, torch.fx.GraphModule)
    assert sum(isinstance(m, WeightNormed) for m in graph.modules()) == 2
    alone = nc.convert(nn.Linear(3, 2), "wn", example_inputs=(x,)).model
    assert isinstance(alone, WeightNormed)


def test_gains_of_zero_are_listed_and_layers_of_zeros_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
    x = torch.randn(8, 3)
    model, report = nc.convert(net, "wn", example_inputs=(x,), options={"scale": "exp"})
    assert isinstance(model[0], LogWeightNormed)
    assert [note for note in report.notes if "in rows 1" in note and "0.weight" in note]
    with torch.no_grad():
        net[2].weight.zero_()
    with pytest.raises(PlanError, match=r"2: its weight is 0.*scale='linear'"):
        nc.convert(net, "wn", example_inputs=(x,), options={"scale": "exp"})
    nc.convert(net, "wn", example_inputs=(x,))


def test_norms_fold_into_exponential_gains() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 6, 6)
    net(x)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([-1.5, 0.0, 0.3, 2.0]))
    model, report = nc.convert(net.eval(), "wn", example_inputs=(x,), options={"scale": "exp"})
    assert type(model[0]).__name__ == "LogWNConv2d"
    assert any("in rows 1" in note for note in report.notes)
    nn.init.zeros_(net[1].weight)
    with pytest.raises(PlanError, match="0: all gains that 1 gives it are 0"):
        nc.convert(net, "wn", example_inputs=(x,), options={"scale": "exp"})


def test_two_norms_around_one_layer_share_its_exponential_gain() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(16, 3)
    net(x)
    with torch.no_grad():
        net[3].weight.copy_(torch.tensor([-1.5, 0.0, 0.3, 2.0]))
    options = {"scale": "exp", "c": 2.0}
    model, report = nc.convert(net.eval(), "wn", example_inputs=(x,), options=options)
    assert [row.action for row in report.sites] == ["wn: forward", "wn: fold"]
    assert isinstance(model[2], LogWeightNormed)
    assert [note for note in report.notes if "2.weight" in note and "in rows 1" in note]


def test_wrapped_recurrent_layers_are_captured_whole() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out, self.bn = nn.GRU(3, 4), nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.out(self.rnn(x)[0][-1]))

    net = made(Last)
    plain = nc.make_plan(net, "wn", example_inputs=(torch.randn(2, 3, 3),))
    nc.wrap(net.rnn)
    plan = nc.make_plan(net, "wn", example_inputs=(torch.randn(2, 3, 3),))
    assert (plan.capture, plan.steps) == (plain.capture, plain.steps)
    assert plan.capture == "fx"


class Own(nn.Module):
    """A matrix in a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.last = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x @ self.matrix)


def test_matrices_of_unknown_classes_are_named() -> None:
    plan = nc.make_plan(made(Own), "wn", example_inputs=(torch.randn(2, 3),))
    assert any("1 Own stay plain" in note for note in plan.notes)


def test_refusals() -> None:
    x = torch.randn(2, 3)
    computed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    with pytest.raises(PlanError, match=r"0: torch computes its weight .*fold it first"):
        nc.make_plan(computed, "wn", example_inputs=(x,))
    plan = nc.make_plan(computed, "wn", example_inputs=(x,), strict=False)
    assert actions(plan) == {"0": "keep", "1": "wrap"}
    net = nn.Sequential(nn.Linear(3, 2))
    for target in ("plain", "gn", "wn+mobn"):
        with pytest.raises(PlanError, match="no BatchNorm"):
            nc.make_plan(net, target, example_inputs=(x,))
        with pytest.raises(UsageError, match="does nothing to a layer"):
            nc.make_plan(net, target, example_inputs=(x,), layers="all")
    with pytest.raises(UsageError, match="'normed' or 'all'"):
        nc.make_plan(net, "wn", example_inputs=(x,), layers="some")
    with pytest.raises(PlanError, match="none of its 1 layers is taken"):
        nc.make_plan(net, "wn", example_inputs=(x,), exclude=["0"])
    with pytest.raises(PlanError, match="no BatchNorm"):
        nc.make_plan(nn.Sequential(nn.ReLU()), "wn", example_inputs=(x,))
    done = nc.convert(net, "wn", example_inputs=(x,)).model
    with pytest.raises(PlanError, match="converted already"):
        nc.make_plan(done, "wn", example_inputs=(x,))
    with pytest.raises(PlanError, match="weight norm already"):
        nc.make_plan(done, "wn", example_inputs=(x,), layers="all")


def test_a_plan_that_ties_what_the_model_does_not_is_refused() -> None:
    net = made(LanguageModel)
    plan = nc.make_plan(net, "wn", example_inputs=(TOKENS,), options={"embeddings": True})
    loose = copy.deepcopy(net)
    loose.head.weight = nn.Parameter(loose.head.weight.detach().clone())
    with pytest.raises(PlanError, match="the plan shares its weight with"):
        nc.apply_plan(loose, plan)
    untied = replace(plan, steps=tuple(replace(step, producers=()) for step in plan.steps))
    with pytest.raises(PlanError, match="it shares its weight with"):
        nc.apply_plan(net, untied)
    narrow = tuple(replace(s, channels=s.channels + 1) for s in plan.steps)
    with pytest.raises(PlanError, match="the plan expects"):
        nc.apply_plan(net, replace(plan, steps=narrow))
