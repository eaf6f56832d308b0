"""Plans are made without touching the model and applied as a whole or not at all."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import normconv as nc
from normconv.errors import PlanError, Refused, UsageError
from normconv.layers import ChannelAffine, WeightNormed
from normconv.plan import Plan, Recipe, Rule, history_of
from normconv.surgery import Result, apply_plan, fingerprint, make_plan
from tests.zoo import ZOO, ResidualNet, x

INPUT = (x(2, 3, 6, 6),)


def plan_for(model: nn.Module, to: object = "wn", **options: object) -> Plan:
    return make_plan(model, to, example_inputs=INPUT, **options)


def test_a_recipe_mixes_targets() -> None:
    recipe = Recipe(
        (
            Rule("keep", match="shortcut.*"),
            Rule("frozen", match="stem.*", options={"trainable": True}),
            Rule("plain", match="bn1"),
            Rule("wn"),
        )
    )
    model = ResidualNet()
    plan = plan_for(model, recipe)
    assert {step.site: (step.target, step.action) for step in plan.steps} == {
        "stem.1": ("frozen", "frozen"),
        "bn1": ("plain", "fold"),
        "bn2": ("wn", "fold"),
        "shortcut.1": ("keep", "keep"),
    }
    assert plan.targets == ("frozen", "plain", "wn")
    result = apply_plan(model, plan)
    assert isinstance(result, Result)
    assert isinstance(result.model.stem[1], ChannelAffine)
    assert isinstance(result.model.stem[1].scale, nn.Parameter)
    assert type(result.model.conv1) is nn.Conv2d
    assert isinstance(result.model.conv2, WeightNormed)
    assert isinstance(result.model.shortcut[1], nn.BatchNorm2d)
    assert result.report.facts["actions"] == {"frozen": 1, "fold": 2, "keep": 1}
    assert Plan.from_dict(result.report.plan) == plan
    (entry,) = history_of(result.model)
    assert entry["apply"] == plan.to_dict()
    assert list(entry["was"]["norms"]) == [step.site for step in plan.converted]
    assert history_of(model) == []


def test_op_rules_and_include() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 2, 1),
    )
    net.append(nn.BatchNorm2d(2))
    actions = {
        step.site: step.action for step in plan_for(net, Rule("wn", op="conv_transpose2d")).steps
    }
    assert actions == {"1": "keep", "3": "keep", "5": "fold"}
    actions = {step.site: step.action for step in plan_for(net, Rule("wn", op="none")).steps}
    assert actions == {"1": "keep", "3": "affine", "5": "keep"}
    actions = {step.site: step.action for step in plan_for(net, "plain", include=["1"]).steps}
    assert actions == {"1": "fold", "3": "keep", "5": "keep"}


def test_mistakes_are_told_before_any_work() -> None:
    model = ResidualNet()
    with pytest.raises(UsageError, match="did you mean 'frozen'"):
        plan_for(model, "frozn")
    with pytest.raises(UsageError, match="no option"):
        plan_for(model, "wn", options={"eps": 1})
    with pytest.raises(UsageError, match=r"nearest site: 'stem\.1'"):
        plan_for(model, "wn", exclude=["stm.1"])
    with pytest.raises(PlanError, match="no BatchNorm"):
        plan_for(nn.Sequential(nn.Conv2d(3, 4, 1)), "plain")


def test_all_refusals_come_at_once() -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    with pytest.raises(PlanError) as caught:
        plan_for(net)
    assert [problem.where for problem in caught.value.problems] == ["0", "2"]
    plan = plan_for(net, exclude=["0", "2"])
    assert plan.counts() == {"keep": 2, "affine": 1}


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        (lambda: nn.DataParallel(ResidualNet()), "model.module"),
        (lambda: nn.Sequential(nn.DataParallel(ResidualNet())), "0: it is wrapped in DataParallel"),
        (lambda: torch.compile(ResidualNet(), backend="eager"), "_orig_mod"),
    ],
)
def test_wrappers_are_sent_back(wrapped: object, words: str) -> None:
    model = wrapped()
    with pytest.raises(Refused, match="wrapped") as caught:
        plan_for(model)
    assert words in str(caught.value)
    with pytest.raises(Refused, match="wrapped"):
        apply_plan(model, plan_for(ResidualNet()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_sent_back() -> None:
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), INPUT)
    with pytest.raises(Refused, match="TorchScript"):
        plan_for(scripted)


def test_fingerprint_is_of_structure() -> None:
    one, two = ResidualNet(), ResidualNet()
    assert fingerprint(one) == fingerprint(two) == fingerprint(copy.deepcopy(one).half().eval())
    with torch.device("meta"):
        assert fingerprint(ResidualNet()) == fingerprint(one)
    two.head = nn.Linear(12, 6)
    assert fingerprint(one) != fingerprint(two)
    three = ResidualNet()
    three.also = three.head
    assert fingerprint(one) != fingerprint(three)
    lazy = nn.LazyLinear(3)
    assert fingerprint(lazy) == fingerprint(nn.LazyLinear(3))


def test_an_edited_plan_is_checked_whole_before_anything() -> None:
    model = ResidualNet()
    plan = plan_for(model)
    steps = list(plan.steps)
    steps[1] = replace(steps[1], producers=())
    steps[2] = replace(steps[2], producers=("nowhere",))
    steps[3] = replace(steps[3], norm="GroupNorm")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError) as caught:
        apply_plan(model, replace(plan, steps=tuple(steps)))
    text = str(caught.value)
    assert "folds it into no layer" in text
    assert "nowhere" in text
    assert "expects a GroupNorm" in text
    assert len(caught.value.problems) == 3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_edited_plan_does_what_it_says() -> None:
    model = ResidualNet()
    plan = plan_for(model)
    edited = tuple(
        replace(step, action="affine", producers=()) if step.site == "bn1" else step
        for step in plan.steps
    )
    converted = apply_plan(model, replace(plan, steps=edited)).model
    assert isinstance(converted.bn1, ChannelAffine)
    assert type(converted.conv1) is nn.Conv2d


EDITS = [
    pytest.param({"producers": ("head",)}, id="a layer with other channels"),
    pytest.param({"producers": ("relu",)}, id="a layer that holds nothing"),
    pytest.param({"target": "zz"}, id="a target that is none"),
    pytest.param({"options": {"groups": 2}}, id="an option that is none"),
    pytest.param({"target": "gn", "options": {"groups": 5}}, id="groups that do not divide"),
    pytest.param({"target": "frozen"}, id="an action that the target does not do"),
]


@pytest.mark.parametrize("edit", EDITS)
def test_edits_that_cannot_be_done_raise_normconv_errors(edit: dict) -> None:
    model = ResidualNet()
    plan = plan_for(model)
    steps = tuple(replace(s, **edit) if s.site == "bn1" else s for s in plan.steps)
    with pytest.raises((PlanError, UsageError)):
        apply_plan(model, replace(plan, steps=steps))


def test_slots_keep_hooks_flags_and_attributes() -> None:
    model = ResidualNet()
    model.bn1.tag = "mine"
    model.bn1.eval()
    calls: list[str] = []
    model.bn1.register_forward_pre_hook(lambda *_: calls.append("pre"))
    converted = apply_plan(model, plan_for(model)).model
    assert isinstance(converted.bn1, ChannelAffine)  # a hook would see other values
    assert converted.bn1.tag == "mine"
    assert not converted.bn1.training
    assert not hasattr(converted.bn1, "momentum")
    converted.eval()(*INPUT)
    assert calls[-1] == "pre"


def test_parameters_keep_their_device_dtype_and_flags() -> None:
    model = ResidualNet().double()
    model.conv1.weight.requires_grad_(False)
    converted = apply_plan(model, make_plan(model, "wn", example_inputs=(INPUT[0].double(),))).model
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    assert not converted.conv1.weight_v.requires_grad
    assert converted.conv1.bias.requires_grad


def test_two_conversions_one_after_the_other() -> None:
    model = ResidualNet()
    first = apply_plan(model, plan_for(model, "wn", include=["bn1"])).model
    second = apply_plan(first, plan_for(first, "wn")).model
    assert len(history_of(second)) == 2
    assert sum(isinstance(m, WeightNormed) for m in second.modules()) == 4
    with pytest.raises(PlanError, match=r"converted already \(wn, 3 sites\)"):
        plan_for(second)


def test_notes_speak_of_untrained_norms_and_failed_captures() -> None:
    assert any(
        "4 of 4 norms still have initial statistics" in n for n in plan_for(ResidualNet()).notes
    )
    plan = make_plan(ZOO["control_flow"].build(), example_inputs=ZOO["control_flow"].args)
    assert any("capture by fx failed" in note for note in plan.notes)
    assert plan.capture == "export"
    plan = make_plan(ZOO["auxiliary_head"].build(), example_inputs=ZOO["auxiliary_head"].args)
    assert any("only training mode calls aux.1" in note for note in plan.notes)


def test_a_model_that_is_itself_a_norm_becomes_its_map() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.normal_()
    norm.tag = "kept"
    images = torch.randn(2, 3, 4, 4)
    result, report = nc.convert(norm, "wn", example_inputs=(images,))
    assert report.passed
    assert isinstance(result, ChannelAffine)
    assert result.tag == "kept"
    assert history_of(result)
    fresh = nc.apply_plan(nn.BatchNorm2d(3), Plan.from_dict(report.plan)).model
    fresh.load_state_dict(result.state_dict(), strict=True)
    with pytest.raises(PlanError, match="wrap it"):
        nc.convert_(norm, "wn", example_inputs=(images,))
    assert isinstance(norm, nn.BatchNorm2d)
    wrapped = nn.Sequential(norm)
    assert nc.convert_(wrapped, "wn", example_inputs=(images,)).report.passed
