"""Recovery: nearer to the teacher, the best is kept, and a killed run goes on to the same result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.calibration import Lesson
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


def test_the_best_is_kept(net: nn.Module, student: nn.Module) -> None:
    """A rate so large that later looks are worse."""
    wild = Lesson(steps=40, every=5, lr=0.02, patience=3)
    facts = nc.recover(student, net, DATA, lesson=wild, held_out=HELD_OUT).report.facts
    seen = dict(map(tuple, facts["agreement by step"]))
    assert facts["after"]["agreement"] == pytest.approx(max(seen.values()))
    assert seen[facts["best at step"]] == max(seen.values())
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

    def kill(done: int, total: int) -> None:
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
        progress=lambda done, _: steps.append(done),
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
