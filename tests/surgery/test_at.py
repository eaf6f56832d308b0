"""`at=`: one submodule of a model, with the inputs and the rest of the model as they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.errors import CaptureError, CheckFailed, PlanError, UsageError
from normconv.graph import is_norm, reach, survey_within
from normconv.layers import ChannelAffine, Reparametrised
from normconv.plan import Plan, history_of
from normconv.proof import randomise_norms_
from tests.zoo import x


class Block(nn.Module):
    """A conv, its norm, and a residual."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.bn(self.conv(image))) * scale


class Encoder(nn.Module):
    """Two blocks, and an auxiliary head that only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block(4)
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, image: Tensor) -> Tensor:
        y = self.second(self.first(image), scale=0.5)
        return y + self.aux(y).mean() if self.training else y


class Policy(nn.Module):
    """A dict in, random steps, a loss out; its own head has a norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.also = self.encoder
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        return self.encoder(batch["image"]).mean((2, 3))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        state = self.encode(batch)
        for _ in range(2 + int(torch.rand(()) > 0.5)):
            state = state + 0.1 * torch.randn(state.shape).to(state)
        action = self.head(state)
        return {"loss": (action - batch["action"]).square().mean(), "action": action}


BATCH = {"image": x(2, 3, 6, 6), "action": x(2, 4, seed=1)}


def policy(kind: type[nn.Module] = Policy) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    randomise_norms_(model, (BATCH,))
    return model


def test_only_the_submodule_is_converted_and_every_alias_sees_it() -> None:
    model = policy()
    before = copy.deepcopy(model.state_dict())
    result, report = nc.convert(model, "wn", example_inputs=(BATCH,), at="encoder")
    assert type(result) is Policy
    assert result.also is result.encoder
    assert not any(is_norm(module) for module in result.encoder.modules())
    assert is_norm(result.head[1])
    assert report.passed
    assert [row.site for row in report.sites] == [
        "encoder.first.bn",
        "encoder.second.bn",
        "encoder.aux.1",
    ]
    assert [row.producer for row in report.sites] == [
        "encoder.first.conv",
        "encoder.second.conv",
        "encoder.aux.0",
    ]
    assert all(row.error is not None and row.error <= row.bound for row in report.sites)
    assert report.facts["at"] == "encoder"
    assert report.facts["capture"] == "fx"
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


def test_the_whole_model_is_compared_too() -> None:
    report = nc.convert(policy(), "wn", example_inputs=(BATCH,), at="encoder").report
    names = [check.name for check in report.checks]
    assert "encoder: output" in names
    assert "whole model: output.action" in names


def test_a_whole_model_that_does_not_repeat_itself_is_no_yardstick() -> None:
    class Counts(Policy):
        calls: ClassVar[list[int]] = [0]

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
            self.calls[0] += 1
            return {"y": self.encode(batch) + self.calls[0]}

    model = policy(Counts)
    report = nc.convert(model, "wn", example_inputs=(BATCH,), at="encoder").report
    assert report.passed
    assert not any(check.name.startswith("whole model") for check in report.checks)
    assert any("the proof is that of encoder" in note for note in report.notes)


def test_a_wrong_conversion_is_seen_in_the_submodule() -> None:
    model = policy()
    plan = nc.make_plan(model, "wn", example_inputs=(BATCH,), at="encoder")
    result = nc.apply_plan(model, plan)
    with torch.no_grad():
        result.model.encoder.first.conv.weight_g.mul_(1.01)
    with pytest.raises(CheckFailed) as caught:
        nc.api.prove_conversion(model, result, plan, (BATCH,), {})
    failed = [problem.where for problem in caught.value.problems]
    assert "encoder: output" in failed
    assert "whole model: output.action" in failed


def test_plan_is_data_and_fits_a_fresh_and_a_meta_model() -> None:
    model = policy()
    plan = nc.make_plan(model, "wn", example_inputs=(BATCH,), at="encoder")
    assert plan.at == "encoder"
    assert Plan.from_json(plan.to_json()) == plan
    converted = nc.apply_plan(model, plan).model
    with torch.device("meta"):
        fresh = nc.apply_plan(Policy(), plan).model
    fresh.load_state_dict(converted.state_dict(), strict=True, assign=True)
    assert list(fresh.state_dict()) == list(converted.state_dict())
    again, report = nc.convert(model, plan, example_inputs=(BATCH,))
    assert report.passed
    assert list(again.state_dict()) == list(converted.state_dict())


def test_plan_of_another_place_is_refused() -> None:
    plan = nc.make_plan(policy(), "wn", example_inputs=(BATCH,), at="encoder")
    with pytest.raises(PlanError, match="has no such module"):
        nc.apply_plan(Encoder(), plan)
    with pytest.raises(UsageError, match="leave at= out"):
        nc.convert(policy(), plan, example_inputs=(BATCH,), at="head")
    missing = Plan(**{**plan.__dict__, "steps": plan.steps[1:]})
    with pytest.raises(PlanError, match=r"encoder\.first\.bn: no step"):
        nc.apply_plan(policy(), missing)


def test_files_of_weights_rebuild(tmp_path: Path) -> None:
    result = nc.convert(policy(), "wn", example_inputs=(BATCH,), at="encoder").model
    nc.save(result, tmp_path / "policy.safetensors")
    again = nc.load(tmp_path / "policy.safetensors", model=Policy)
    assert again.also is again.encoder
    assert isinstance(again.encoder.first.conv, Reparametrised)
    folded = nc.fold(again).model
    assert len(history_of(folded)) == 2
    expected, got = result.eval().encode(BATCH), folded.eval().encode(BATCH)
    torch.testing.assert_close(got, expected)


def test_in_place() -> None:
    model = policy()
    expected = copy.deepcopy(model).eval().encode(BATCH)
    result, report = nc.convert_(model, "plain", example_inputs=(BATCH,), at="encoder")
    assert result is model
    assert report.passed
    torch.testing.assert_close(model.eval().encode(BATCH), expected)


def test_recipes_speak_of_names_of_the_whole_model() -> None:
    plan = nc.make_plan(
        policy(), "wn", example_inputs=(BATCH,), at="encoder", exclude=["encoder.aux.*"]
    )
    assert [step.action for step in plan.steps] == ["fold", "fold", "keep"]


def test_an_alias_and_a_part_can_be_named() -> None:
    assert [s.site for s in nc.make_plan(policy(), example_inputs=(BATCH,), at="also").steps] == [
        "encoder.first.bn",
        "encoder.second.bn",
        "encoder.aux.1",
    ]
    plan = nc.make_plan(policy(), example_inputs=(BATCH,), at="encoder.second")
    assert [step.site for step in plan.steps] == ["encoder.second.bn"]
    assert plan.steps[0].aliases == ("also.second.bn",)


def test_a_norm_itself_can_be_named() -> None:
    model = policy()
    result, report = nc.convert(model, "wn", example_inputs=(BATCH,), at="encoder.first.bn")
    assert isinstance(result.encoder.first.bn, ChannelAffine)
    assert result.also.first.bn is result.encoder.first.bn
    assert report.passed
    assert [row.site for row in report.sites] == ["encoder.first.bn"]


# --- the rest of the model ------------------------------------------------------------------------


class CallsInside(Policy):
    """The whole model calls a layer of the encoder by itself as well."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        return super().encode(batch) + self.encoder.first.conv(batch["image"]).mean((2, 3))


class CallsNorm(Policy):
    """And the norm."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        y = self.encoder.first.bn(torch.ones_like(batch["image"][:, :1]).expand(-1, 4, -1, -1))
        return super().encode(batch) + y.mean((2, 3))


class HoldsInside(Policy):
    """A layer of the encoder has a name outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = self.encoder.first.conv


class TiesInside(Policy):
    """A layer outside shares its weight with one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 4, 3)
        self.twin.weight = self.encoder.first.conv.weight

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        return super().encode(batch) + self.twin(batch["image"]).mean((2, 3))


class ReadsInside(Policy):
    """The whole model reads a weight inside."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        return super().encode(batch) + self.encoder.first.conv.weight.mean()


class Listens(Block):
    """It leaves what the conv put out where others find it."""

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        self.feature = self.conv(image)
        return torch.relu(self.bn(self.feature)) * scale


class UsesFeature(Policy):
    """The whole model takes it there."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.first = Listens()

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        y = super().encode(batch)
        return y + self.encoder.first.feature.mean((2, 3))


class SecondPath(Block):
    """With another argument the conv's output goes out as well."""

    def forward(self, image: Tensor, scale: float = 1.0, raw: bool = False) -> Tensor:
        y = self.conv(image)
        return self.bn(y) + y if raw else self.bn(y) * scale


class TakesBoth(Policy):
    """The second call of the block takes another path than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.first = SecondPath()

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        y = super().encode(batch)
        return y + self.encoder.first(batch["image"], raw=True).mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (CallsInside, "encoder.first.conv is also called outside of encoder"),
        (CallsNorm, "encoder.first.bn is also called outside of encoder"),
        (HoldsInside, "encoder.first.conv is also shortcut, outside of encoder"),
        (TiesInside, "shares parameters with twin"),
        (ReadsInside, "read outside its own forward"),
        (UsesFeature, "also used by what"),
    ],
)
def test_what_the_rest_of_the_model_uses_is_not_changed(kind: type[nn.Module], words: str) -> None:
    model = policy(kind)
    found, _ = survey_within(model, "encoder", (BATCH,))
    site = next(site for site in found.sites if site.name == "encoder.first.bn")
    assert not site.producers
    assert words in site.obstacle
    result, report = nc.convert(model, "wn", example_inputs=(BATCH,), at="encoder")
    assert isinstance(result.encoder.first.bn, ChannelAffine)
    assert isinstance(result.encoder.second.conv, Reparametrised)
    assert report.passed


def test_every_call_of_the_submodule_counts() -> None:
    model = policy(TakesBoth)
    found, reached = survey_within(model, "encoder.first", (BATCH,))
    assert len(reached.visits) == 2
    assert not found.sites[0].producers
    assert "also used by" in found.sites[0].obstacle
    assert nc.convert(model, "wn", example_inputs=(BATCH,), at="encoder.first").report.passed


def test_several_calls_of_different_shapes_are_folded_and_told() -> None:
    class Cameras(Policy):
        def encode(self, batch: dict[str, Tensor]) -> Tensor:
            small = self.encoder(batch["image"][:, :, ::2, ::2])
            return super().encode(batch) + small.mean((2, 3))

    model = policy(Cameras)
    plan = nc.make_plan(model, "wn", example_inputs=(BATCH,), at="encoder")
    assert plan.counts() == {"fold": 3}
    assert any("called 2 times; its inputs are those of the first call" in n for n in plan.notes)
    assert any("(2, 3, 3, 3); (2, 3, 6, 6)" in note for note in plan.notes)


def test_what_only_training_reaches_is_met_there() -> None:
    class Teaches(Policy):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
            return super().forward(batch) if self.training else {"y": batch["image"] + 1}

    torch.manual_seed(0)
    model = Teaches()
    before = copy.deepcopy(model.state_dict())
    assert reach(model, "encoder", (BATCH,)).training
    result, report = nc.convert(model, "wn", example_inputs=(BATCH,), at="encoder")
    assert report.passed
    assert any("only training mode calls encoder" in note for note in report.notes)
    assert any("eval mode never calls encoder" in note for note in report.notes)
    assert isinstance(result.encoder.first.conv, Reparametrised)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        ("encodr", UsageError, "nearest: 'encoder'"),
        ("head.0", PlanError, "head.0: it has no BatchNorm"),
        ("unused", CaptureError, "the model calls it neither in eval nor in training mode"),
        ("listed", CaptureError, "such as listed.0"),
    ],
)
def test_refusals_name_the_place_and_the_way_out(at: str, error: type, words: str) -> None:
    class More(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.listed = Block(), nn.ModuleList([Block()])

        def encode(self, batch: dict[str, Tensor]) -> Tensor:
            return super().encode(batch) + self.listed[0](batch["image"]).mean((2, 3))

    with pytest.raises(error) as caught:
        nc.make_plan(More(), example_inputs=(BATCH,), at=at, layers="normed")
    assert words in str(caught.value)


def test_a_model_that_does_not_run_names_the_module() -> None:
    with pytest.raises(CaptureError) as caught:
        nc.make_plan(Policy(), example_inputs=({**BATCH, "image": x(2, 5, 6, 6)},), at="encoder")
    assert {problem.where for problem in caught.value.problems} == {"encoder.first.conv (Conv2d)"}


def test_graph_output_goes_with_the_whole_model_only() -> None:
    with pytest.raises(UsageError, match="output"):
        nc.convert(policy(), example_inputs=(BATCH,), at="encoder", output="graph")


# --- command line ---------------------------------------------------------------------------------


class Net(nn.Module):
    """A net whose forward branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        y = self.backbone(image).mean((2, 3))
        return self.head(y) if float(y.detach().sum()) < 1e9 else y


def test_command_line(tmp_path: Path) -> None:
    spec = ["tests.surgery.test_at:Net", "--input", "2x3x8x8", "--at", "backbone", "--json"]
    run = CliRunner()
    plan_file = tmp_path / "plan.json"
    shown = json.loads(run.invoke(app, ["inspect", *spec]).stdout)
    assert [site["name"] for site in shown["sites"]] == ["backbone.1"]
    assert shown["facts"]["at"] == "backbone"
    assert run.invoke(app, ["plan", *spec, "-o", str(plan_file)]).exit_code == 0
    assert Plan.read(plan_file).at == "backbone"
    out = tmp_path / "net.wn.pt"
    made = run.invoke(app, ["convert", *spec, "-o", str(out)])
    assert made.exit_code == 0, made.stdout
    assert json.loads(made.stdout)["facts"]["at"] == "backbone"
    by_plan = ["convert", *spec[:3], "--json", "-o", str(out), "--plan", str(plan_file)]
    assert run.invoke(app, by_plan).exit_code == 0
    assert run.invoke(app, ["convert", *spec, "--plan", str(plan_file)]).exit_code == 2
    assert run.invoke(app, ["inspect", *spec[:4], "backbon", "--json"]).exit_code == 2
