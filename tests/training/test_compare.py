"""One network under several normalizations: same start, same samples, same result after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconv.calibration import Share
from normconv.errors import UsageError
from normconv.layers import MeanOnlyBatchNorm, Reparametrised, kind_of
from normconv.sources.datasets import Labelled, Samples
from normconv.training import Budget, Comparison, Recipe, compare, recipe_of, recipe_of_model
from normconv.training.normalizations import NORMALIZATIONS, check_normalizations, normalized
from normconv.training.recipes.fashion_microbatch import network as after_relu
from normconv.training.running import Run, Study
from normconv.training.step_times import step_times
from normconv.training.tasks import Classification, Scores

CPU = torch.device("cpu")
TINY = Budget(2, None, 0.25, (8,))


def blobs(count: int = 64) -> Labelled:
    """Vectors around the centre of their class."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 6, generator=rng)

    def some(number: int) -> Samples:
        labels = torch.randint(3, (number,), generator=rng)
        return Samples(centres[labels] + 0.3 * torch.randn(number, 6, generator=rng), labels)

    return Labelled(some(count), some(32), 3, "blobs")


def net(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    hidden = (nn.Linear(shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(*hidden, nn.Linear(8, classes))


@dataclass(frozen=True)
class Watched(Classification):
    """Remembers the labels of each step."""

    seen: list[list[int]] = field(default_factory=list)

    def scores(self, network: nn.Module, samples: Samples) -> Scores:
        if network.training:
            self.seen.append(samples.labels.tolist())
        return super().scores(network, samples)


RECIPE = Recipe(
    name="tiny",
    reproduces="nothing",
    network=net,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    small=TINY,
    full=TINY,
    normalizations=("plain", "bn", "wn"),
)


def measured(found: Comparison) -> list[dict[str, Any]]:
    """All but what the clock says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found.rows]


def started(recipe: Recipe, name: str, data: Labelled, seed: int = 0) -> nn.Module:
    return Study(recipe, data, 1, 0.25, CPU).begin(Run(name, 8, seed)).network.eval()


def test_all_start_from_the_same_weights() -> None:
    data = blobs()
    plain = started(RECIPE, "plain", data)
    weights = [p for p in plain.parameters() if p.dim() == 2]
    out = plain(data.test.inputs)
    for name in ("bn", "wn", "wn+mobn"):
        torch.testing.assert_close(
            started(RECIPE, name, data)(data.test.inputs), out, atol=1e-4, rtol=1e-4
        )
    for name in ("bn", "gn", "gn+ws", "ln"):
        linear = started(RECIPE, name, data)[4]
        assert torch.equal(linear.weight, weights[1]), name  # no norm is behind it
    assert not torch.equal(started(RECIPE, "plain", data, seed=1)[4].weight, weights[1])


def test_all_see_the_same_samples_in_the_same_order() -> None:
    tasks = {}
    for name in ("plain", "bn", "wn"):
        tasks[name] = Watched()
        compare(
            replace(RECIPE, task=tasks[name]),
            normalizations=[name],
            data=blobs(),
            timing=0,
        )
    assert tasks["plain"].seen == tasks["bn"].seen == tasks["wn"].seen
    first, second = tasks["plain"].seen[:8], tasks["plain"].seen[8:]
    assert len(first) == len(second) == 8
    assert first != second, "each epoch has an order of its own"


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_normalization_of_norms_after_relu(name: str) -> None:
    """Nothing before such a norm can absorb it; all layers with weights are taken all the same."""
    network = after_relu(0.125, (1, 8, 8), 10)
    x = torch.randn(16, 1, 8, 8)
    made = normalized(network, name, x)
    assert made(x).shape == (16, 10)
    layers = [m for m in made.modules() if kind_of(m) != "none"]
    assert len(layers) == 6
    if name.startswith("wn"):
        assert all(isinstance(layer, Reparametrised) for layer in layers)
    norms = [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == (5 if name == "bn" else 0)
    expected = 5 if name == "wn+mobn" else 0
    assert sum(isinstance(m, MeanOnlyBatchNorm) for m in made.modules()) == expected
    groups = [m.num_groups for m in made.modules() if isinstance(m, nn.GroupNorm)]
    assert len(groups) == (5 if name in ("gn", "gn+ws", "ln") else 0)
    assert name != "ln" or set(groups) == {1}


def test_initial_weights_from_data() -> None:
    """Plain weights computed from gains that data set give the same function, and are plain."""
    data, network = blobs(400), net(1, (6,), 3)
    plain = normalized(network, "plain+init", data.train.inputs).eval()
    wn = normalized(network, "wn+init", data.train.inputs).eval()
    torch.testing.assert_close(plain(data.test.inputs), wn(data.test.inputs))
    assert not any(isinstance(m, Reparametrised) for m in plain.modules())
    hidden = wn[0](data.train.inputs)
    assert hidden.mean(0).abs().max() < 1e-4
    assert (hidden.std(0) - 1).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain", "brn"], "'brn' is unknown; known are plain, bn"),
        (["gn+init"], "gn has no data-dependent initial weights"),
        (["wn", "wn"], "name each once"),
        ("wn", "is a text, no list of names"),
        ([], "none"),
    ],
)
def test_names_that_say_nothing_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_normalizations(names)


def test_a_network_without_norms_has_no_place_for_others() -> None:
    network = nn.Sequential(nn.Linear(3, 3))
    for name in ("bn", "gn", "wn+mobn"):
        with pytest.raises(UsageError, match="has no BatchNorm"):
            normalized(network, name, torch.randn(4, 3))


class Killed(BaseException):
    pass


def killed_at(step: int) -> Callable[[str, int, int], None]:
    def progress(run: str, done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


def interrupted(recipe: Recipe, folder: Path, steps: tuple[int, ...], **more: Any) -> Comparison:
    for step in steps:
        with pytest.raises(Killed):
            compare(recipe, folder=folder, progress=killed_at(step), timing=0, **more)
    return compare(recipe, folder=folder, timing=0, **more)


def test_a_second_call_goes_on_to_the_same_result(tmp_path: Path) -> None:
    """Killed within the second epoch of the first run, and within the first of the last."""
    budget = Budget(3, None, 0.25, (8, 16), (0, 1))
    whole = compare(RECIPE, budget=budget, data=blobs(), timing=0)
    assert len(whole.rows) == 3 * 3 * 2 * 2
    found = interrupted(RECIPE, tmp_path, (12, 200), budget=budget, data=blobs())
    assert measured(found) == measured(whole)
    kept = sorted(path.suffix for path in (tmp_path / "runs").iterdir())
    assert kept == [".json"] * 12, "no checkpoint stays"
    asked = []
    again = compare(
        RECIPE,
        budget=budget,
        data=blobs(),
        folder=tmp_path,
        timing=0,
        progress=lambda *told: asked.append(told),
    )
    assert not asked
    assert again.rows == found.rows


def test_replay_is_resumed_too(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    recipe = recipe_of("q-network")
    recipe = replace(recipe, task=replace(recipe.task, warm_up=50, episodes=1))
    budget, names = Budget(2, 60, 0.125, (8,)), ["wn"]
    whole = compare(recipe, budget=budget, normalizations=names, timing=0)
    found = interrupted(recipe, tmp_path, (90,), budget=budget, normalizations=names)
    assert measured(found) == measured(whole)


def test_a_damaged_checkpoint_starts_the_run_anew(tmp_path: Path) -> None:
    whole = compare(RECIPE, data=blobs(), timing=0)
    with pytest.raises(Killed):
        compare(RECIPE, data=blobs(), folder=tmp_path, progress=killed_at(12), timing=0)
    (checkpoint,) = (tmp_path / "runs").glob("*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert measured(compare(RECIPE, data=blobs(), folder=tmp_path, timing=0)) == measured(whole)


def test_runs_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    compare(RECIPE, data=blobs(), folder=tmp_path, timing=0)
    with pytest.raises(UsageError, match="it is a run with epochs=2; take another folder"):
        compare(RECIPE, budget=replace(TINY, epochs=3), data=blobs(), folder=tmp_path, timing=0)
    with pytest.raises(UsageError, match="data sha256"):
        compare(RECIPE, data=blobs(80), folder=tmp_path, timing=0)
    more = compare(RECIPE, normalizations=["gn"], data=blobs(), folder=tmp_path, timing=0)
    assert {row["normalization"] for row in more.rows} == {"gn"}


def test_processes_share_the_runs(tmp_path: Path) -> None:
    alone = compare(RECIPE, data=blobs(), timing=0)
    first = compare(RECIPE, data=blobs(), folder=tmp_path, share=Share(0, 2, CPU), timing=0)
    assert first.missing == ("bn, batch 8, seed 0",)
    second = compare(RECIPE, data=blobs(), folder=tmp_path, share=Share(1, 2, CPU), timing=0)
    assert second.missing == ()
    assert measured(second) == measured(alone)


def test_a_run_that_diverges_ends_and_is_told(tmp_path: Path) -> None:
    wild = replace(RECIPE, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    budget = replace(TINY, epochs=4)
    found = compare(
        wild, normalizations=["plain"], budget=budget, data=blobs(), timing=0, folder=tmp_path
    )
    assert len(found.rows) == 1
    assert found.rows[0]["train_loss"] is None
    (summary,) = found.summary()
    assert (summary["diverged"], summary["seeds"], summary["test_accuracy"]) == (1, 1, None)
    json.loads(json.dumps(found.document(), allow_nan=False))


def test_the_summary_is_over_the_last_rows() -> None:
    rows = tuple(
        {
            "normalization": "wn",
            "batch_size": 8,
            "seed": seed,
            "epoch": epoch,
            "train_loss": loss,
            "test_accuracy": accuracy,
        }
        for seed, epoch, loss, accuracy in (
            (0, 1, 3.0, 0.1),
            (0, 2, 1.0, 0.5),
            (1, 1, 3.0, 0.2),
            (1, 2, 2.0, 0.75),
            (2, 1, None, 0.1),
        )
    )
    (made,) = Comparison("x", "test_accuracy", True, {}, rows).summary()
    assert (made["train_loss"], made["test_accuracy"]) == (1.5, 0.625)
    assert made["test_accuracy_std"] == pytest.approx(0.25 / 2**0.5)
    assert (made["seeds"], made["diverged"]) == (3, 1)


def test_step_times_are_ratios_to_the_plain_network() -> None:
    study = Study(RECIPE, blobs(), 1, 1.0, CPU)
    before = torch.get_rng_state()
    found = step_times(study, ["wn", "bn"], 8, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [time["normalization"] for time in found] == ["wn", "bn"]
    for time in found:
        assert time["turns"] == 3
        low, high = time["ratio_quartiles"]
        assert 0 < low <= time["ratio_to_plain"] <= high
    (plain,) = step_times(study, ["plain"], 8, seconds=0.0)
    assert plain["ratio_to_plain"] == 1.0


def test_bfloat16_is_computed_in_where_it_is_asked_for() -> None:
    seen: list[torch.dtype] = []

    class Looked(Classification):
        def scores(self, network: nn.Module, samples: Samples) -> Scores:
            seen.append(network(samples.inputs).dtype)
            return super().scores(network, samples)

    before = torch.get_rng_state()
    found = compare(
        replace(RECIPE, task=Looked()),
        normalizations=["wn"],
        data=blobs(),
        amp=True,
        timing=0,
    )
    assert torch.equal(torch.get_rng_state(), before), "the caller's numbers are the caller's"
    assert set(seen) == {torch.bfloat16}
    assert found.rows[-1]["train_loss"] < found.rows[0]["train_loss"]
    assert found.facts["amp"] is True


def test_too_few_samples_are_told() -> None:
    with pytest.raises(UsageError, match="fewer than 128 training samples"):
        compare(RECIPE, budget=replace(TINY, batch_sizes=(8, 128)), data=blobs(), timing=0)


def test_a_batch_that_is_too_small_for_a_norm_is_told(tmp_path: Path) -> None:
    budget = replace(TINY, batch_sizes=(1,))
    with pytest.raises(UsageError, match="bn, batch 1, seed 0: Expected more than 1 value"):
        compare(RECIPE, budget=budget, data=blobs(), folder=tmp_path, timing=0)
    names = ["plain", "wn", "ln"]
    found = compare(
        RECIPE, normalizations=names, budget=budget, data=blobs(), folder=tmp_path, timing=0
    )
    assert len(found.summary()) == 3


def test_a_network_of_ones_own() -> None:
    def factory() -> nn.Module:
        return net(1, (6,), 3)

    recipe = recipe_of_model(factory, "digits", lr=1e-2)
    found = compare(
        recipe,
        normalizations=["bn", "wn"],
        budget=Budget(2, None, 1.0, (8,)),
        data=blobs(),
        timing=0,
    )
    assert found.facts["lr"] == 1e-2
    for name in ("bn", "wn"):
        first, last = (row["train_loss"] for row in found.rows if row["normalization"] == name)
        assert last < first
    with pytest.raises(UsageError, match="does not take inputs of shape"):
        compare(recipe_of_model(factory, "digits"), budget=Budget(1, 64, 1.0, (8,)), timing=0)
    with pytest.raises(UsageError, match="has one width"):
        compare(recipe, data=blobs(), budget=TINY, timing=0)


def test_a_network_that_does_not_fit_the_classes_is_told() -> None:
    def narrow() -> nn.Module:
        return net(1, (6,), 2)

    with pytest.raises(UsageError, match=r"puts out \(2, 2\) for 2 inputs of 3 classes"):
        compare(recipe_of_model(narrow, ""), data=blobs(), timing=0)

    def trained() -> nn.Module:
        network = net(1, (6,), 3)
        network(blobs().train.inputs)
        return network

    with pytest.raises(UsageError, match="trained already"):
        recipe_of_model(trained, "")


def test_a_network_of_ones_own_without_norms() -> None:
    """By default under what needs none; and what one cannot do is told before any is trained."""
    recipe = recipe_of_model(lambda: nn.Linear(6, 3), "")
    assert recipe.normalizations == ("plain", "wn", "wn+init")
    budget, steps = Budget(1, None, 1.0, (16,)), []
    with pytest.raises(UsageError, match="no BatchNorm in whose place gn could stand"):
        compare(
            recipe,
            normalizations=["plain", "gn"],
            budget=budget,
            data=blobs(),
            timing=0,
            progress=lambda *told: steps.append(told),
        )
    assert not steps


def seeded() -> nn.Module:
    torch.manual_seed(0)
    return net(1, (6,), 3)


def broken() -> nn.Module:
    raise RuntimeError("no such size")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (seeded, "two seeds give the same initial numbers"),
        (broken, r"cannot be made \(RuntimeError: no such size\)"),
        (lambda: 3, "makes a int, no torch.nn.Module"),
        (lambda: nn.LazyLinear(3), "lazy"),
    ],
)
def test_factories_that_make_no_fresh_network_are_told(factory: Any, message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=message):
        recipe_of_model(factory, "digits")
    if factory is not seeded:
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_learning_rate_is_a_positive_number(lr: Any) -> None:
    with pytest.raises(UsageError, match="no positive number"):
        recipe_of_model(lambda: nn.Linear(6, 3), "", lr=lr)


def test_samples_that_are_numbers_of_tokens_are_tried_as_they_are() -> None:
    tokens = Samples(torch.arange(24).reshape(8, 3) % 5, torch.arange(8) % 2)
    recipe = recipe_of_model(
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)), ""
    )
    found = compare(
        recipe,
        normalizations=["plain", "wn"],
        budget=Budget(1, None, 1.0, (4,)),
        data=Labelled(tokens, tokens, 2, "tokens"),
        timing=0,
    )
    assert len(found.rows) == 2


def test_images_that_are_too_small_for_a_recipe_are_told() -> None:
    budget = Budget(1, 64, 0.25, (16,))
    with pytest.raises(
        UsageError, match=r"tfa-tutorial: it does not take inputs of shape \(1, 8, 8\)"
    ):
        compare("tfa-tutorial", data="digits", budget=budget, timing=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-3)},
        {"clip": 1.0},
        {"network": lambda width, shape, classes: nn.Linear(shape[0], classes)},
    ],
)
def test_runs_of_a_changed_recipe_are_not_taken_for_its_own(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    compare(RECIPE, normalizations=["plain"], data=blobs(), folder=tmp_path, timing=0)
    other = replace(RECIPE, **changed)
    with pytest.raises(UsageError, match=r"it is a run with (optimizer|clip|network)"):
        compare(other, normalizations=["plain"], data=blobs(), folder=tmp_path, timing=0)


@pytest.mark.parametrize(
    "content", ["[]", '{"settings": 1, "rows": []}', '{"settings": {}, "rows": [{}]}', "\xff"]
)
def test_a_file_that_is_no_run_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "plain-batch8-seed0.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"it holds no finished run .*; remove it"):
        compare(RECIPE, normalizations=["plain"], data=blobs(), folder=tmp_path, timing=0)


def test_a_checkpoint_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        compare(RECIPE, data=blobs(), folder=tmp_path, progress=killed_at(12), timing=0)
    (checkpoint,) = (tmp_path / "runs").glob("*.pt")
    document = torch.load(checkpoint, weights_only=True)
    torch.save({**document, "network": {}}, checkpoint)
    with pytest.raises(UsageError, match=r"it is no checkpoint of this run .*; remove it"):
        compare(RECIPE, data=blobs(), folder=tmp_path, timing=0)


def test_a_failure_of_the_task_is_no_word_on_batch_sizes() -> None:
    class Failing(Classification):
        def scores(self, network: nn.Module, samples: Samples) -> Scores:
            if network.training:
                raise ValueError("of the user's own")
            return super().scores(network, samples)

    with pytest.raises(ValueError, match="of the user's own"):
        compare(replace(RECIPE, task=Failing()), data=blobs(), timing=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"limit": 0}, {"width": float("nan")}, {"width": "1"},
        {"batch_sizes": (0,)}, {"batch_sizes": 8}, {"seeds": ()}, {"seeds": (0, 0)},
        {"seeds": (-1,)},
    ],
)  # fmt: skip
def test_budgets_that_say_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(TINY, **wrong)


def test_what_is_evaluated_is_the_mean_over_all_samples() -> None:
    data = blobs(64)
    many = Samples(data.train.inputs.repeat(20, 1)[:1100], data.train.labels.repeat(20)[:1100])
    network = net(1, (6,), 3).eval()
    with torch.no_grad():
        got = Classification().evaluate(network, Labelled(data.train, many, 3, ""))
        logits: Tensor = network(many.inputs)
    wanted = nn.functional.cross_entropy(logits.double(), many.labels).item()
    assert got["loss"] == pytest.approx(wanted, rel=1e-6)
    right = (logits.argmax(1) == many.labels).double().mean().item()
    assert got["accuracy"] == pytest.approx(right, abs=1e-6)
