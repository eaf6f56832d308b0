"""Calibration: moments match, nothing else changes, and bad data is told as that."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normconv as nc
from normconv.calibration import Batches, measure_drift, wilson_interval
from normconv.calibration.matching import Match, candidates, match_
from normconv.calibration.order import independent_groups
from normconv.calibration.passes import run_until
from normconv.errors import CheckFailed, UsageError
from normconv.folding import rebuild
from normconv.graph import norm_state
from normconv.layers import WeightStandardized
from normconv.numerics import Moments, moments_of, relative_l2
from normconv.plan import Plan, history_of
from tests.test_contract import assert_same_state, assert_unchanged, snapshot


class Net(nn.Module):
    """Two branches that join, a norm that is called twice, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.left, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.right, self.bn2 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.twice, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn0(self.stem(x)).relu_()
        y = (self.bn1(self.left(y)) + self.bn2(self.right(y))).relu_()
        for _ in range(2):
            y = self.bn3(self.twice(y)).relu_()
        return self.head(y.mean((2, 3)))


def labelled(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Five kinds of pattern whose contrast and brightness differ, as those of real images do."""
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(77))
    labels = torch.randint(5, (count,), generator=rng)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=rng)
    noise = torch.randn(count, 3, 12, 12, generator=rng)
    brightness = torch.randn(count, 1, 1, 1, generator=rng) * 0.3
    return (kinds[labels] * 0.5 + noise) * contrast + brightness, labels


def images(count: int, seed: int = 0) -> Tensor:
    return labelled(count, seed)[0]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Trained for some hundred steps: what is matched then means something."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for seed in range(150):
        x, labels = labelled(64, seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net.eval()


DATA = [images(64, 100 + i) for i in range(4)]
HELD_OUT = [images(64, 200 + i) for i in range(4)]


def converted(net: nn.Module, **options: Any) -> tuple[Plan, nn.Module]:
    plan = nc.make_plan(net, "gn", example_inputs=(DATA[0][:2],), options=options)
    return plan, nc.apply_plan(net, plan).model


def calibrated(net: nn.Module, **options: Any) -> Any:
    plan, model = converted(net, **options)
    return nc.calibrate(model, plan, DATA, reference=net, held_out=HELD_OUT)


@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"channels_per_group": 8}, {"eps": 1e-5}])
def test_it_comes_nearer_to_the_original(net: nn.Module, options: dict[str, Any]) -> None:
    facts = calibrated(net, **options).report.facts
    assert facts["after"]["agreement"] > facts["before"]["agreement"]
    assert facts["measured on"] == "held-out data"
    last = facts["after"]["sites"]["bn3"], facts["before"]["sites"]["bn3"]
    assert last[0]["snr_db"] > last[1]["snr_db"] + 1
    assert last[0]["cosine"] > last[1]["cosine"]
    low, high = facts["after"]["interval"]
    assert low < facts["after"]["agreement"] < high


def test_moments_of_every_channel_match(net: nn.Module) -> None:
    """As far as the shrinkage lets them."""
    model = calibrated(net, groups=2).model
    outputs: dict[str, list[Moments]] = {}
    for which, subject in (("was", net), ("is", model)):
        seen: list[Tensor] = []
        handle = subject.bn0.register_forward_hook(
            lambda m, a, o, seen=seen: seen.append(o.clone())
        )
        with torch.no_grad():
            subject(torch.cat(DATA))
        handle.remove()
        outputs[which] = [moments_of(x) for x in seen]
    was, now = outputs["was"][0], outputs["is"][0]
    plain = converted(net, groups=2)[1]
    raw = moments_of(plain.bn0(plain.stem(torch.cat(DATA))))
    keep = 16 / (16 + 256)
    assert torch.allclose((now.std / was.std).log(), keep * (raw.std / was.std).log(), atol=1e-4)
    assert ((now.mean - was.mean).abs() <= 0.2 * (raw.mean - was.mean).abs() + 0.05).all()


def test_nothing_given_is_changed_and_it_repeats_itself(net: nn.Module) -> None:
    plan, model = converted(net)
    before = snapshot(model), snapshot(net)
    first = nc.calibrate(model, plan, DATA, reference=net, refit=False)
    second = nc.calibrate(model, plan, DATA, reference=net, refit=False)
    assert_unchanged(before[0], model)
    assert_unchanged(before[1], net)
    assert_same_state(first.model, second.model)
    assert first.report.facts["measured on"] == "the calibration data itself"
    changed = [
        name
        for (name, a), b in zip(
            model.state_dict().items(), first.model.state_dict().values(), strict=True
        )
        if not torch.equal(a, b)
    ]
    assert changed == [f"bn{i}.{which}" for i in range(4) for which in ("weight", "bias")]


def test_how_batches_are_cut_does_not_matter(net: nn.Module) -> None:
    plan, model = converted(net, groups=4)
    one = [torch.cat(DATA)]
    whole = nc.calibrate(model, plan, one, reference=net, refit=False).model
    parts = nc.calibrate(model, plan, DATA, reference=net, refit=False).model
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert relative_l2(a, b) <= 1e-5, name


def test_labels_are_left_and_loaders_factories_and_dicts_are_taken(net: nn.Module) -> None:
    plan, model = converted(net)
    wanted = nc.calibrate(model, plan, DATA, reference=net).model
    labelled = TensorDataset(torch.cat(DATA), torch.zeros(256, dtype=torch.long))
    sources: list[Any] = [
        DataLoader(labelled, batch_size=64),
        lambda: iter(DATA),
        [{"x": batch} for batch in DATA],
        [(batch, "label") for batch in DATA],
    ]
    for source in sources:
        assert_same_state(nc.calibrate(model, plan, source, reference=net).model, wanted)


class TwoInputs(Net):
    """With a second input, an optional third, and an exception that it catches."""

    def forward(self, x: Tensor, scale: Tensor, skip: Tensor | None = None) -> Tensor:
        try:
            y = super().forward(x * scale)
        except Exception:
            y = self.head(x.new_zeros(len(x), 16))
        return y if skip is None else y + skip


def test_as_many_inputs_are_taken_as_the_model_needs(net: nn.Module) -> None:
    model = TwoInputs().eval()
    model.load_state_dict(net.state_dict())
    scales = [torch.ones(64, 1, 1, 1) for _ in DATA]
    plan = nc.make_plan(model, "gn", example_inputs=(DATA[0][:2], scales[0][:2]))
    student = nc.apply_plan(model, plan).model
    labels = torch.zeros(64, 5)
    sources: list[Any] = [
        [(x, scale, labels) for x, scale in zip(DATA, scales, strict=True)],
        [{"x": x, "scale": s, "labels": labels} for x, s in zip(DATA, scales, strict=True)],
    ]
    found = [nc.calibrate(student, plan, source, reference=model).model for source in sources]
    assert_same_state(*found)
    alone = nc.make_plan(net, "gn", example_inputs=(DATA[0][:2],))
    wanted = nc.calibrate(nc.apply_plan(net, alone).model, alone, DATA, reference=net).model
    assert_same_state(found[0], wanted)


def test_report_and_history_say_what_was_used(net: nn.Module, tmp_path: Any) -> None:
    plan, model = converted(net)
    result = nc.calibrate(model, plan, DATA, reference=net)
    used = result.report.facts["data"]
    assert used["samples"] == 256
    assert used["batches"] == 4
    assert used["purpose"] == "calibrate"
    assert len(used["sha256"]) == 64
    other = nc.calibrate(model, plan, HELD_OUT, reference=net).report.facts["data"]
    assert other["sha256"] != used["sha256"]
    assert history_of(result.model)[-1]["calibrate"]["data"]["samples"] == 256
    json.dumps(result.report.to_dict())
    again = nc.apply_plan(Net(), Plan.from_dict(result.report.plan)).model
    again.load_state_dict(result.model.state_dict(), strict=True)
    assert relative_l2(again.eval()(DATA[0]), result.model.eval()(DATA[0])) == 0
    nc.save(result.model, tmp_path / "m.safetensors")
    loaded = nc.load(tmp_path / "m.safetensors", model=Net)
    assert relative_l2(loaded.eval()(DATA[0]), result.model.eval()(DATA[0])) == 0


def test_searched_groups_come_back_with_the_history(net: nn.Module) -> None:
    plan, model = converted(net)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
            norm.num_groups = 1
    result = nc.calibrate(model, plan, DATA, reference=net)
    entry = history_of(result.model)[-1]["calibrate"]["groups"]
    assert entry.keys() == {"bn0", "bn1", "bn2", "bn3"}
    history = history_of(result.model)
    history[-1]["calibrate"]["groups"] = {"bn0": 4}
    built = rebuild(Net(), history)
    assert [built.bn0.num_groups, built.bn1.num_groups] == [4, 1]
    measured = result.report.facts["predicted error by number of groups"]
    assert measured.keys() == entry.keys()
    for before, step in zip(plan.steps, result.report.plan["steps"], strict=True):
        assert "search" not in step["options"]
        errors = {int(groups): error for groups, error in measured[step["site"]].items()}
        chosen = step["options"]["groups"]
        assert errors[chosen] == min(errors.values())
        assert all(0 <= error < 2 for error in errors.values())
        assert step["reason"] != before.reason
        assert step["reason"].startswith(f"{chosen} group")
        assert all(f"{error:.2g}" in step["reason"] for error in errors.values())


def test_refitting_brings_it_nearer_still(net: nn.Module) -> None:
    plan, model = converted(net, groups=4)
    told = {
        refit: nc.calibrate(model, plan, DATA, reference=net, held_out=HELD_OUT, refit=refit)
        for refit in (False, True)
    }
    after = {refit: result.report.facts["after"] for refit, result in told.items()}
    assert after[True]["output"] < after[False]["output"]
    again = nc.calibrate(model, plan, DATA, reference=net)
    assert_same_state(again.model, told[True].model)


def test_standardized_weights_lose_their_mean_and_little_else(net: nn.Module) -> None:
    plan = nc.make_plan(net, "gn+ws", example_inputs=(DATA[0][:2],), options={"groups": 1})
    assert [step.action for step in plan.steps] == ["fold", *["standardize"] * 3]
    model = nc.apply_plan(net, plan).model
    result = nc.calibrate(model, plan, DATA, reference=net, held_out=HELD_OUT, refit=False)
    facts = result.report.facts
    assert facts["after"]["agreement"] > facts["before"]["agreement"] + 0.1
    lost = facts["predicted loss by standardization"]
    assert len(lost) == 3
    assert all(0 < told["variance"] < 0.3 for told in lost.values())
    for layer in (result.model.left, result.model.right, result.model.twice):
        assert isinstance(layer, WeightStandardized)
        assert layer.weight.flatten(1).mean(1).abs().max() < 1e-6
        assert relative_l2(layer.weight, layer.weight_v) < 1e-5  # v is what it computes
    plain = nc.fold(result.model).model
    assert type(plain.left) is nn.Conv2d
    assert relative_l2(plain(DATA[0]), result.model(DATA[0])) < 1e-5


def test_few_patches_are_told(net: nn.Module) -> None:
    plan, model = converted(net)
    few = [DATA[0][:2, :, :3, :3]]
    notes = nc.calibrate(model, plan, few, reference=net).report.notes
    assert any("patches for filters of" in note for note in notes)


def test_agreement_can_be_asked_for(net: nn.Module) -> None:
    plan, model = converted(net, eps=1e-5, channels_per_group=1)
    nc.calibrate(model, plan, DATA, reference=net, min_agreement=0.1)
    with pytest.raises(CheckFailed, match="agreement") as caught:
        nc.calibrate(model, plan, DATA, reference=net, min_agreement=1.01)
    assert caught.value.report.facts["after"]["samples"] == 256


def test_what_is_kept_between_passes_changes_nothing(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plan, model = converted(net, groups=4)
    made = {
        cache: nc.calibrate(model, plan, DATA, reference=net, cache=cache)
        for cache in ("none", "memory", "disk")
    }
    assert_same_state(made["memory"].model, made["none"].model)
    assert_same_state(made["disk"].model, made["none"].model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="take one of memory, disk, none"):
        nc.calibrate(model, plan, DATA, reference=net, cache="tape")  # type: ignore[arg-type]


def test_whose_data_it_was_is_told(net: nn.Module) -> None:
    plan, model = converted(net, groups=4)
    public = nc.calibrate(model, plan, DATA, reference=net)
    assert public.report.facts["data"]["use"] == "public"
    private = nc.calibrate(model, plan, DATA, reference=net, data_use="private")
    assert history_of(private.model)[-1]["calibrate"]["data"]["use"] == "private"
    told = [note for note in private.report.notes if "privacy accountant" in note]
    assert len(told) == 1
    assert not any("privacy accountant" in note for note in public.report.notes)
    for use, what in (("none", "calibrate sets them by data"), ("secret", "public, private, none")):
        with pytest.raises(UsageError, match=what):
            nc.calibrate(model, plan, DATA, reference=net, data_use=use)  # type: ignore[arg-type]


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Augments what it gives, by torch's own generator."""

    def __len__(self) -> int:
        return len(DATA[0])

    def __getitem__(self, index: int) -> Tensor:
        return DATA[0][index] + torch.randn(3, 1, 1) * 0.1


def test_augmented_data_is_the_same_in_each_pass(net: nn.Module) -> None:
    plan, model = converted(net, groups=4)
    before = torch.get_rng_state()
    made = [
        nc.calibrate(model, plan, DataLoader(Noisy(), batch_size=16), reference=net, cache=cache)
        for cache in ("memory", "none")
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert_same_state(made[0].model, made[1].model)


def test_an_iterable_that_gives_itself_only_once_is_told(net: nn.Module) -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(DATA)

        def __iter__(self) -> Any:
            return self.batches

    plan, model = converted(net, groups=4)
    with pytest.raises(UsageError, match="second pass is empty"):
        nc.calibrate(model, plan, Once(), reference=net)


def test_a_loader_that_shuffles_gives_the_same_and_leaves_the_generator(net: nn.Module) -> None:
    plan, model = converted(net, groups=4)
    loader = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=16, shuffle=True)
    told = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        told.append(nc.calibrate(model, plan, loader, reference=net))
        assert torch.equal(before, torch.get_rng_state())
    assert_same_state(told[0].model, told[1].model)
    digests = [each.report.facts["data"]["sha256"] for each in told]
    assert digests[0] == digests[1]


# --- bad input ------------------------------------------------------------------------------------


def nan_image() -> Tensor:
    bad = DATA[0].clone()
    bad[3, 1] = float("nan")
    return bad


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "empty"),
        ([DATA[0][:0]], "empty"),
        ([DATA[0], nan_image()], "batch 1: it holds NaN"),
        ([torch.ones(8, 3, 12, 12)], "constant"),
        ([torch.zeros(8, 5, 12, 12) + torch.arange(12)], "does not run"),
        (iter(DATA), "only once"),
        ((batch for batch in DATA), "only once"),
        (DATA[0], "give a list"),
        ("images.zip", "give a list"),
        (3, "no iterable"),
    ],
    ids=(
        "empty",
        "none",
        "nan",
        "constant",
        "shape",
        "iterator",
        "generator",
        "tensor",
        "text",
        "3",
    ),
)
def test_bad_data_is_refused(net: nn.Module, data: Any, said: str) -> None:
    plan, model = converted(net)
    before = snapshot(model)
    with pytest.raises(UsageError, match=said) as caught:
        nc.calibrate(model, plan, data, reference=net)
    assert all(problem.way_out for problem in caught.value.problems)
    assert_unchanged(before, model)


def test_a_broken_candidate_is_seen(net: nn.Module) -> None:
    plan, model = converted(net)
    for poison in (float("nan"), float("inf")):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.head.weight[0, 0] = poison
        with pytest.raises(CheckFailed, match="finite"):
            nc.calibrate(broken, plan, DATA, reference=net)
    zero = copy.deepcopy(net)
    with torch.no_grad():
        zero.head.weight.zero_()
        zero.head.bias.zero_()
    assert measure_drift(zero, net, (), Batches.of(DATA, net)).output == float("inf")


def test_empty_batches_are_left_out(net: nn.Module) -> None:
    plan, model = converted(net)
    wanted = nc.calibrate(model, plan, DATA, reference=net).model
    data = [DATA[0], DATA[0][:0], *DATA[1:]]
    assert_same_state(nc.calibrate(model, plan, data, reference=net).model, wanted)


def test_what_is_asked_for_is_checked_or_refused(net: nn.Module) -> None:
    plan, model = converted(net)
    with pytest.raises(UsageError, match="empty"):
        nc.calibrate(model, plan, DATA, reference=net, held_out=[])
    with pytest.raises(UsageError, match="no data"):
        nc.convert(net, "gn", example_inputs=(DATA[0][:2],), min_agreement=0.9)
    with pytest.raises(UsageError, match="is exact"):
        nc.convert(net, "wn", example_inputs=(DATA[0][:2],), data=DATA)
    with pytest.raises(UsageError, match=r"it has images; the model takes x"):
        nc.calibrate(model, plan, [{"images": DATA[0]}], reference=net)
    body = nn.Sequential(net.stem, net.bn0)
    small = nc.make_plan(body, "gn", example_inputs=(DATA[0][:2],))
    with pytest.raises(CheckFailed, match="class scores"):
        nc.calibrate(
            nc.apply_plan(body, small).model, small, DATA, reference=body, min_agreement=0.5
        )


def test_a_graph_is_proved_with_the_trained_statistics(net: nn.Module) -> None:
    for target in ("gn", "gn+ws"):
        result = nc.convert(net, target, example_inputs=(DATA[0][:8],), output="graph", data=DATA)
        assert result.report.passed
        assert isinstance(result.model, torch.fx.GraphModule)


class Same(nn.Conv2d):
    """Pads by itself, as some libraries' convolutions do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


def test_layers_with_a_forward_of_their_own_are_not_refitted() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Same(3, 8, 3, stride=2), nn.BatchNorm2d(8))
    for batch in DATA:
        net(batch)
    plan = nc.make_plan(net.eval(), "gn", example_inputs=(DATA[0][:2],))
    model = nc.apply_plan(net, plan).model
    one, two = (
        nc.calibrate(model, plan, DATA, reference=net, refit=r).model for r in (True, False)
    )
    assert_same_state(one, two)


def test_models_that_do_not_belong_together_are_refused(net: nn.Module) -> None:
    plan, model = converted(net)
    with pytest.raises(
        UsageError, match=r"bn0: the plan says BatchNorm2d, the reference has Group"
    ):
        nc.calibrate(model, plan, DATA, reference=model)
    with pytest.raises(UsageError, match="no norm to calibrate"):
        nc.calibrate(net, plan, DATA, reference=net)
    wn = nc.make_plan(net, "wn", example_inputs=(DATA[0][:2],))
    with pytest.raises(UsageError, match="no norm to calibrate"):
        nc.calibrate(nc.apply_plan(net, wn).model, wn, DATA, reference=net)


# --- parts ----------------------------------------------------------------------------------------


def test_partial_passes_stop_early_and_leave_no_hook(net: nn.Module) -> None:
    reached: list[str] = []
    handle = net.head.register_forward_hook(lambda *_: reached.append("head"))
    seen: list[str] = []
    run_until(net, (DATA[0],), {}, {"bn1": 1}, lambda name, _: seen.append(name))
    assert (seen, reached) == (["bn1"], [])
    counted = run_until(net, (DATA[0],), {}, {"bn3": 0}, lambda name, _: seen.append(name))
    assert counted == {"bn3": 2}
    assert reached == ["head"]
    handle.remove()
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_sites_of_two_branches_go_together(net: nn.Module) -> None:
    groups = independent_groups(net, ["bn0", "bn1", "bn2", "bn3"], (DATA[0],), {})
    assert groups == [["bn0"], ["bn1", "bn2"], ["bn3"]]


def test_groups_are_chosen_by_error() -> None:
    """Activations whose halves have contrasts of their own: two groups are right."""
    torch.manual_seed(0)
    norm, old = nn.GroupNorm(1, 8, eps=1e-5), nn.BatchNorm2d(8).eval()
    clean = torch.randn(256, 8, 6, 6)
    loud = torch.cat([0.2 + 3 * torch.rand(256, 1, 1, 1), 0.2 + 3 * torch.rand(256, 1, 1, 1)], 1)
    state = norm_state(old)
    assert not isinstance(state, str)
    match = Match(norm, state, (1, 2))
    match.add(clean, clean * loud.repeat_interleave(4, 1))
    assert match.error(2) < 0.1 * match.error(1)
    chosen, errors = match_(match)
    error = errors[chosen]
    assert chosen == norm.num_groups == 2
    assert error == match.error(2)
    assert candidates(norm, search=False) == (2,)


def test_dead_channels_stay_as_they_are() -> None:
    norm, old = nn.GroupNorm(1, 4), nn.BatchNorm2d(4).eval()
    values = torch.randn(64, 4, 3, 3)
    values[:, 2] = 0
    state = norm_state(old)
    assert not isinstance(state, str)
    match = Match(norm, state, (1,))
    match.add(values, values)
    match_(match)
    assert norm.weight.isfinite().all()
    assert norm.weight[2] == 1


def test_moments_add_up() -> None:
    x = torch.randn(40, 3, 5) * 7 + 1000
    parts = moments_of(x[:7]) + moments_of(x[7:8]) + moments_of(x[8:])
    whole = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(parts.mean, whole.mean(1), rtol=1e-12)
    assert torch.allclose(parts.std, whole.std(1, correction=0), rtol=1e-10)


def test_drift_of_a_model_to_itself_is_nothing(net: nn.Module) -> None:
    plan = nc.make_plan(net, "gn", example_inputs=(DATA[0][:2],))
    drift = measure_drift(net, net, plan.steps, Batches.of(DATA, net))
    assert drift.output < 1e-7
    assert drift.agreement is not None
    assert drift.agreement.same == 256
    assert all(site.snr_db > 100 and site.cosine > 1 - 1e-9 for site in drift.sites.values())


def test_wilson_interval_holds_the_share_at_the_ends() -> None:
    assert wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)
    assert wilson_interval(0, 0) == (0.0, 1.0)
