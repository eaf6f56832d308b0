"""Recovery: nearer to the teacher, the best is kept, and a killed run goes on to the same result."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normconv as nc
from normconv.calibration import Batches, Lesson
from normconv.calibration.distillation import _parted
from normconv.errors import CheckFailed, UsageError
from normconv.plan import history_of
from tests.calibration.test_calibrate import DATA, HELD_OUT, Net, net
from tests.test_contract import assert_same_state, assert_unchanged, snapshot

__all__ = ["net"]  # the trained network


def _plan(net: nn.Module) -> nc.Plan:
    return nc.make_plan(net, "gn", example_inputs=(DATA[0][:2],), options={"groups": 4})


@pytest.fixture(scope="module")
def student(net: nn.Module) -> nn.Module:
    return nc.apply_plan(net, _plan(net)).model


SHORT = Lesson(steps=40, every=10, lr=3e-3)


def test_it_comes_nearer_and_nothing_given_changes(net: nn.Module, student: nn.Module) -> None:
    before = snapshot(student), snapshot(net)
    result = nc.recover(student, net, DATA, lesson=SHORT, held_out=HELD_OUT)
    assert_unchanged(before[0], student)
    assert_unchanged(before[1], net)
    facts = result.report.facts
    assert facts["after"]["agreement"] > facts["before"]["agreement"] + 0.05
    assert facts["after"]["output"] < facts["before"]["output"]
    assert facts["steps"] == 40
    assert [step for step, _ in facts["agreement by step"]] == [0, 10, 20, 30, 40]
    assert facts["data"]["purpose"] == "recover"
    assert history_of(result.model)[-1]["recover"]["lesson"]["steps"] == 40
    assert all(p.grad is None for p in result.model.parameters())
    assert {n: m.training for n, m in result.model.named_modules()} == {
        n: m.training for n, m in student.named_modules()
    }


def test_it_stops_where_nothing_improves(net: nn.Module) -> None:
    """Its own teacher is the best student there is: it waits out its patience, not all steps."""
    lesson = Lesson(steps=40, every=3, patience=2)
    result = nc.recover(net, net, DATA, lesson=lesson, held_out=HELD_OUT)
    facts = result.report.facts
    assert [step for step, _ in facts["agreement by step"]] == [0, 3, 6]
    assert facts["steps"] == 6
    assert facts["after"]["agreement"] == 1


def test_the_best_is_kept(net: nn.Module, student: nn.Module) -> None:
    """A rate so large that later looks are worse."""
    wild = Lesson(steps=40, every=5, lr=0.02, patience=3)
    facts = nc.recover(student, net, DATA, lesson=wild, held_out=HELD_OUT).report.facts
    seen = dict(map(tuple, facts["divergence by step"]))
    assert facts["after"]["divergence"] == pytest.approx(min(seen.values()))
    assert seen[facts["best at step"]] == min(seen.values())
    assert max(seen.values()) > min(seen.values())
    assert facts["steps"] <= facts["best at step"] + 15  # three looks without a better one


def test_nothing_worse_than_what_was_given_is_returned(net: nn.Module, student: nn.Module) -> None:
    ruin = Lesson(steps=6, every=3, lr=3.0)
    result = nc.recover(student, net, DATA, lesson=ruin, held_out=HELD_OUT)
    assert_same_state(result.model, student)
    assert result.report.facts["best at step"] == 0
    itself = nc.recover(net, net, DATA, steps=2)
    assert itself.report.facts["after"]["output"] < 1e-6


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_result(
    net: nn.Module, student: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / "lesson.pt"

    def kill(done: int, total: int, told: str) -> None:
        if done == 27:
            raise Killed

    whole = nc.recover(student, net, DATA, lesson=SHORT)
    with pytest.raises(Killed):
        nc.recover(student, net, DATA, lesson=SHORT, checkpoint=file, progress=kill)
    steps: list[int] = []
    resumed = nc.recover(
        student,
        net,
        DATA,
        lesson=SHORT,
        checkpoint=file,
        progress=lambda done, *_: steps.append(done),
    )
    assert steps[0] == 21
    assert_same_state(whole.model, resumed.model)
    assert whole.report.facts["agreement by step"] == resumed.report.facts["agreement by step"]
    other = nc.calibrate(student, _plan(net), DATA, reference=net).model
    with pytest.raises(UsageError, match="another student"):
        nc.recover(other, net, DATA, lesson=SHORT, checkpoint=file)
    with pytest.raises(UsageError, match="another lesson"):
        nc.recover(student, net, DATA, lesson=Lesson(steps=41), checkpoint=file)
    file.write_bytes(b"broken")
    with pytest.raises(UsageError, match="cannot be resumed"):
        nc.recover(student, net, DATA, lesson=SHORT, checkpoint=file)


def test_it_rebuilds_from_its_file(net: nn.Module, student: nn.Module, tmp_path: Path) -> None:
    model = nc.recover(student, net, DATA, steps=2).model
    nc.save(model, tmp_path / "m.safetensors")
    assert_same_state(nc.load(tmp_path / "m.safetensors", model=Net), model)


class Boxes(nn.Module):
    """A regression with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.bn(self.conv(x)).relu()
        return {"map": y, "score": self.head(y.mean((2, 3)))}


def test_other_outputs_are_matched_too() -> None:
    torch.manual_seed(0)
    teacher = Boxes()
    for batch in DATA:
        teacher(batch)
    student = nc.convert(teacher.eval(), "gn", example_inputs=(DATA[0][:2],)).model
    facts = nc.recover(student, teacher, DATA, lesson=SHORT).report.facts
    assert facts["after"]["output"] < facts["before"]["output"]
    assert facts["after"]["output"] < 0.5


def test_features_bring_the_inside_nearer(net: nn.Module, student: nn.Module) -> None:
    """The same steps with and without: where outputs alone are compared the inside may go anywhere."""
    found = {}
    for weight in (0.0, 3.0):
        lesson = replace(SHORT, features=weight, every=40)
        facts = nc.recover(student, net, DATA, lesson=lesson, held_out=HELD_OUT).report.facts
        assert set(facts["after"]["sites"]) == {"bn0", "bn1", "bn2", "bn3"}
        found[weight] = [site["snr_db"] for site in facts["after"]["sites"].values()]
        start = [site["snr_db"] for site in facts["before"]["sites"].values()]
    assert all(with_ > without for with_, without in zip(found[3.0], found[0.0], strict=True))
    assert sum(found[3.0]) > sum(start)


def test_in_bfloat16_it_still_learns(net: nn.Module, student: nn.Module) -> None:
    taught = nc.recover(student, net, DATA, lesson=replace(SHORT, amp=True), held_out=HELD_OUT)
    facts = taught.report.facts
    assert facts["after"]["agreement"] > facts["before"]["agreement"] + 0.05
    assert {p.dtype for p in taught.model.parameters()} == {torch.float32}


def test_data_that_may_not_be_used_is_refused(net: nn.Module, student: nn.Module) -> None:
    with pytest.raises(UsageError, match="recover sets them by data"):
        nc.recover(student, net, DATA, steps=2, data_use="none")
    told = nc.recover(student, net, DATA, steps=2, data_use="private")
    assert sum("privacy accountant" in note for note in told.report.notes) == 1
    assert history_of(told.model)[-1]["recover"]["data"]["use"] == "private"


def test_convert_calibrates_and_recovers_in_one(net: nn.Module) -> None:
    """The same as the three one after the other; one report of all."""
    plan = _plan(net)
    shown: list[str] = []
    said: list[str] = []

    def progress(text: str) -> Any:
        shown.append(text)
        return lambda done, total, told: said.append(told)

    whole = nc.convert(
        net,
        plan,
        example_inputs=(DATA[0][:2],),
        data=DATA,
        held_out=HELD_OUT,
        recover=SHORT,
        recover_data=DATA[:4],
        min_agreement=0.5,
        progress=progress,
    )
    assert shown == ["calibrate", "recover"]
    assert said[0] == ""
    assert said[-1].startswith("same top-1 0.")
    assert "outputs differ by" in said[-1]
    converted = nc.apply_plan(net, plan).model
    calibrated = nc.calibrate(converted, plan, DATA, reference=net, held_out=HELD_OUT)
    taught = nc.recover(calibrated.model, net, DATA[:4], lesson=SHORT, held_out=HELD_OUT)
    assert_same_state(whole.model, taught.model)
    facts = whole.report.facts
    assert facts["after"] == calibrated.report.facts["after"]
    assert facts["recover"]["after"] == taught.report.facts["after"]
    assert [check.name for check in whole.report.checks][-1] == "agreement"
    with pytest.raises(CheckFailed) as caught:
        nc.convert(
            net, plan, example_inputs=(DATA[0],), data=DATA, recover=SHORT, min_agreement=1.01
        )
    assert "recover" in caught.value.report.facts
    for keywords in ({"recover": 3}, {"recover_data": DATA}):
        with pytest.raises(UsageError, match="there is no data"):
            nc.convert(net, plan, example_inputs=(DATA[0],), **keywords)
    with pytest.raises(UsageError, match="no data may touch"):
        nc.convert(net, plan, example_inputs=(DATA[0],), data=DATA, data_use="none")
    alone = nc.convert(net, plan, example_inputs=(DATA[0],), data_use="none")
    assert alone.report.facts["data"] == "none"


def test_what_judges_is_held_out(net: nn.Module, student: nn.Module) -> None:
    """The last tenth is not learned from; a factory of the same batches is parted in the same way."""
    parts = [part for batch in DATA for part in batch.split(len(batch) // 4)] * 2
    parts = parts[:21]
    lesson = replace(SHORT, steps=10, every=5)
    given = nc.recover(student, net, parts[:19], lesson=lesson, held_out=parts[19:])
    held = nc.recover(student, net, parts, lesson=lesson)
    assert_same_state(given.model, held.model)
    assert held.report.facts["measured on"] == "the last 2 batches, held out"
    assert held.report.facts["after"] == given.report.facts["after"]
    factory = nc.recover(student, net, lambda: iter(parts), lesson=lesson)
    listed = nc.recover(student, net, lambda: iter(parts[:19]), lesson=lesson, held_out=parts[19:])
    assert_same_state(factory.model, listed.model)
    few = nc.recover(student, net, parts[:9], lesson=lesson).report.facts
    assert few["measured on"] == "the first batches of the data itself"


def test_what_judges_is_held_out_of_a_loader_that_shuffles() -> None:
    numbers = torch.arange(1.0, 81).view(80, 1)
    loader = DataLoader(TensorDataset(numbers), batch_size=4, shuffle=True)
    learn, judge, _ = _parted(loader, 20)
    judges = {x.item() for (batch,) in judge() for x in batch}  # type: ignore[operator]
    assert len(judges) == 8
    for seed in range(3):
        learned = {x.item() for args, _ in Batches(learn, seed=seed) for x in args[0]}
        assert len(learned) == 72
        assert not learned & judges


def test_a_lesson_that_is_none_is_told() -> None:
    for keywords in (
        {"lr": -1.0},
        {"lr": float("nan")},
        {"every": 0},
        {"patience": 0},
        {"steps": -3},
    ):
        with pytest.raises(UsageError, match="lesson: " + next(iter(keywords))):
            Lesson(**keywords)  # type: ignore[arg-type]


class Extra(nn.Module):
    """Keeps more than tensors in its state."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_extra_state_goes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Extra())
    net(DATA[0])
    student = nc.convert(net.eval(), "gn", example_inputs=(DATA[0],)).model
    lesson = Lesson(steps=2, scores=False)
    file = tmp_path / "lesson.pt"
    taught = nc.recover(student, net, DATA, lesson=lesson, checkpoint=file)
    again = nc.recover(student, net, DATA, lesson=lesson, checkpoint=file)
    assert torch.equal(taught.model[0].weight, again.model[0].weight)
    with pytest.raises(UsageError, match="another student, teacher or data"):
        nc.recover(student, net, DATA, lesson=lesson, checkpoint=file, held_out=DATA[:1])


def test_numbers_that_are_no_scores_are_judged_by_their_distance(net: nn.Module) -> None:
    student = nc.apply_plan(net, _plan(net)).model
    taught = nc.recover(student, net, DATA, lesson=replace(SHORT, scores=False))
    assert "agreement" not in taught.report.facts["after"]
    assert taught.report.facts["after"]["output"] < taught.report.facts["before"]["output"]


def test_bad_input_is_told(net: nn.Module, student: nn.Module) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    frozen = nc.apply_plan(net, nc.make_plan(net, "gn", example_inputs=(DATA[0],))).model
    frozen.requires_grad_(False)
    cases: list[tuple[Any, ...]] = [
        (student, other, DATA, "the teacher puts out"),
        (student, net, [], "empty"),
        (student, net, iter(DATA), "only once"),
        (student, net, [DATA[0] * float("nan")], "NaN"),
        (frozen, net, DATA, "no parameter"),
        (student, net, [DATA[0][:, :, :2, :2] * 0 + 1, DATA[0][:, :1]], "does not run"),
        (copy.deepcopy(student).half(), net, DATA, "float16"),
    ]
    for model, teacher, data, said in cases:
        with pytest.raises(UsageError, match=said):
            nc.recover(model, teacher, data, steps=2)
    with pytest.raises(CheckFailed, match="agreement"):
        nc.recover(student, net, DATA, steps=2, min_agreement=1.01)
    with pytest.raises(CheckFailed, match="finite"):
        nc.recover(student, net, DATA, lesson=Lesson(steps=60, lr=1e30))
