"""Plans and recipes as data: round trips, precedence, and what is told when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normconv.errors import UsageError
from normconv.plan import Plan, Recipe, Rule, Step, history_of, record
from normconv.report import Report

FOLD = Step("bn1", "BatchNorm2d", "wn", "fold", 8, producers=("conv1", "conv2"), op="conv2d")
FULL = Step(
    "a.bn",
    "SyncBatchNorm",
    "frozen",
    "frozen",
    4,
    aliases=("b.bn",),
    shape=(2, 4, 3, 3),
    fidelity="exact",
    phase="train",
    reason="its statistics become constants",
    options={"trainable": True},
)
PLAN = Plan((FOLD, FULL), "Net", "0" * 64, "fx", ("wn", "frozen"), notes=("a note",))


def test_plan_round_trips_and_leaves_defaults_out() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    steps = json.loads(PLAN.to_json())["steps"]
    assert set(steps[0]) == {"site", "norm", "target", "action", "channels", "producers", "op"} | (
        {"op"} if FOLD.op else set()
    )
    assert PLAN.counts() == {"fold": 1, "frozen": 1}
    assert PLAN.target == "wn, frozen"
    assert PLAN.converted == PLAN.steps
    assert FOLD.row().producer == "conv1 + conv2"


def test_plan_files(tmp_path: Path) -> None:
    PLAN.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == PLAN
    report = Report("convert", plan=PLAN.to_dict())
    (tmp_path / "report.json").write_text(report.to_json())
    assert Plan.read(tmp_path / "report.json") == PLAN
    for content in (b"\xff\xfe\x00", None):
        path = tmp_path / "other.json"
        if content is not None:
            path.write_bytes(content)
        else:
            path = tmp_path / "missing.json"
        with pytest.raises(UsageError, match="cannot be read"):
            Plan.read(path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(schema="normconv.plan/9"), "not 'normconv.plan/1'"),
        (lambda d: d.pop("schema"), "None"),
        (lambda d: d["steps"][0].update(action="melt"), "no action is called 'melt'"),
        (lambda d: d["steps"][0].update(chanels=3), "unknown fields"),
        (lambda d: d["steps"][0].pop("norm"), "norm"),
        (lambda d: d.update(colour="red"), "unknown fields"),
        (lambda d: d.pop("fingerprint"), "fingerprint"),
    ],
)
def test_a_damaged_plan_is_told_by_name(edit: object, words: str) -> None:
    document = json.loads(PLAN.to_json())
    edit(document)
    with pytest.raises(UsageError) as caught:
        Plan.from_dict(document)
    assert words in str(caught.value)


def test_all_damage_is_told_at_once() -> None:
    document = json.loads(PLAN.to_json())
    document["steps"][0]["action"] = "melt"
    document["steps"][1]["colour"] = "red"
    with pytest.raises(UsageError) as caught:
        Plan.from_dict(document)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null"])
def test_what_is_no_json_object_is_no_plan(text: str) -> None:
    with pytest.raises(UsageError, match="not"):
        Plan.from_json(text)


DAMAGED = [
    pytest.param(lambda d: d.update(steps=[1]), id="a step that is a number"),
    pytest.param(lambda d: d.update(steps=5), id="steps that are a number"),
    pytest.param(lambda d: d["steps"][0].update(channels="many"), id="channels that are text"),
    pytest.param(lambda d: d["steps"][0].update(producers="conv1"), id="producers that are text"),
    pytest.param(lambda d: d["steps"][0].update(phase="noon"), id="a phase that is none"),
]


@pytest.mark.parametrize("edit", DAMAGED)
def test_values_of_the_wrong_kind_are_refused(edit: object) -> None:
    document = json.loads(PLAN.to_json())
    edit(document)
    with pytest.raises(UsageError):
        Plan.from_dict(document)


def test_first_matching_rule_wins() -> None:
    recipe = Recipe((Rule("plain", match="stem.*"), Rule("wn", op="conv2d"), Rule("frozen")))
    assert recipe.rule_for("stem.bn", "conv2d").to == "plain"
    assert recipe.rule_for("layer.bn", "conv2d").to == "wn"
    assert recipe.rule_for("head.bn", "linear").to == "frozen"
    assert recipe.targets == ("plain", "wn", "frozen")
    assert Recipe((Rule("wn", match="a"),)).rule_for("b", "none") is None


def test_include_and_exclude_become_rules() -> None:
    recipe = Recipe.of("wn", include=["a.*", "b"], exclude=["a.1"])
    assert [str(rule) for rule in recipe.rules] == ["a.1 -> keep", "a.* -> wn", "b -> wn"]
    assert recipe.rule_for("a.1", "").to == "keep"
    assert recipe.rule_for("c", "") is None
    assert recipe.targets == ("wn",)
    assert Recipe.of(recipe, exclude=["z"]).rules[1:] == recipe.rules
    assert Recipe.of(Rule("wn")).rules == Recipe.of([Rule("wn")]).rules == (Rule("wn"),)
    assert str(Rule("frozen", op="linear", options={"trainable": True})) == (
        "* op=linear -> frozen trainable=True"
    )


def test_recipes_that_say_nothing_or_too_much() -> None:
    with pytest.raises(UsageError, match="at least one rule"):
        Recipe(())
    with pytest.raises(UsageError, match="options belong into the rules"):
        Recipe.of([Rule("wn")], options={"a": 1})
    with pytest.raises(UsageError, match="include="):
        Recipe.of(Rule("wn"), include=["a"])


def test_a_rule_that_matches_nothing_names_the_nearest_site() -> None:
    sites = [("layer3.0.bn1", "conv2d"), ("layer4.0.bn1", "conv2d"), ("head.bn", "linear")]
    recipe = Recipe((Rule("wn", match="layr4.0.bn1"), Rule("wn", op="conv3d"), Rule("wn")))
    with pytest.raises(UsageError) as caught:
        recipe.check_used(sites)
    first, second = caught.value.problems
    assert "nearest site: 'layer4.0.bn1'" in first.way_out
    assert first.where == "rule 1 (layr4.0.bn1 -> wn)"
    assert second.what == "matches no site"
    Recipe((Rule("wn", match="layer4.*"), Rule("wn"))).check_used(sites)
    with pytest.raises(UsageError, match="no site"):
        Recipe((Rule("wn", match="a"),)).check_used([])


def test_history_is_text_on_any_object() -> None:
    class Anything:
        pass

    model = Anything()
    assert history_of(model) == []
    record(model, {"apply": PLAN.to_dict()})
    record(model, {"fold": {}})
    assert [next(iter(entry)) for entry in history_of(model)] == ["apply", "fold"]
    assert Plan.from_dict(history_of(model)[0]["apply"]) == PLAN
    history_of(model).clear()
    assert len(history_of(model)) == 2
    assert all(isinstance(value, str) for value in vars(model).values())
