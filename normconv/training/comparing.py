"""The runs of a comparison: which there are, whose they are, and which are finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normconv.calibration import Share, join_processes
from normconv.errors import NormconvError, Problem, UsageError
from normconv.files import write_json
from normconv.graph.running import first_line
from normconv.report import versions
from normconv.sources.datasets import Labelled, Samples, open_labelled
from normconv.training.comparison import Comparison
from normconv.training.normalizations import check_normalizations
from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes import recipe_of
from normconv.training.running import Row, Run, Study, train
from normconv.training.step_times import step_times

__all__ = ["Progress", "compare"]

Progress = Callable[[str, int, int], None]

_TOO_FEW = "more than 1 "  # value or spatial element per channel: what torch's norms say of a batch


def compare(
    recipe: str | Recipe = "digits",
    *,
    normalizations: Sequence[str] | None = None,
    budget: Budget | None = None,
    data: str | Labelled | None = None,
    folder: str | Path | None = None,
    share: Share | None = None,
    amp: bool = False,
    timing: float = 10.0,
    progress: Progress | None = None,
) -> Comparison:
    """Train one network under several normalizations and batch sizes, and return the learning curves.

    For one seed all start from the same weights and see the same samples in the same order; for one batch
    size they take the same number of steps.

    Args:
        recipe: the name of a built-in one, or one of your own.
        normalizations: see `NORMALIZATIONS`; None for those of the recipe.
        budget: None for the recipe's small one.
        data: see `open_labelled`; None for the recipe's.
        folder: each run is written there when it ends, and a checkpoint after each epoch: a second call
            goes on to the same result. None keeps nothing.
        share: of several processes each takes every so manieth run, and the one that finishes last has
            all; None asks the launcher, and takes an accelerator where there is one.
        amp: autocast to bfloat16.
        timing: how many seconds the time of a step is measured for at each batch size; 0 for not at all.
        progress: called after each step with the run, and the steps done and in all.

    Raises:
        UsageError: an unknown name, a normalization or data that the network does not take, or a folder
            with runs of other settings; before anything is trained.

    >>> found = compare("digits", normalizations=["plain", "wn"], timing=0,
    ...     budget=Budget(epochs=1, limit=64, width=0.25, batch_sizes=(32,)))
    >>> [(row["normalization"], row["epoch"]) for row in found.rows]
    [('plain', 1), ('wn', 1)]
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipe_of(recipe)
    budget = budget or recipe.small
    recipe = replace(recipe, task=recipe.task.limited(budget.limit))
    names = recipe.normalizations if normalizations is None else normalizations
    check_normalizations(names)
    names = tuple(names)
    share = share or join_processes()
    opened = _opened(recipe, data, budget)
    study = Study(recipe, _on(share.device, opened), budget.epochs, budget.width, share.device, amp)
    _check_batch_sizes(study, budget)
    settings = _settings(study, budget, _checked_network(study, budget.seeds[0]))
    store = _Store(None if folder is None else Path(folder), settings)
    runs = [
        Run(name, batch_size, seed)
        for seed in budget.seeds
        for batch_size in budget.batch_sizes
        for name in names
    ]
    _check_made(study, [run for run in runs if store.rows(run) is None])
    _train_missing(study, runs[share.rank :: share.processes], store, progress)
    found = {run: store.rows(run) for run in runs}
    missing = tuple(str(run) for run, rows in found.items() if rows is None)
    times: list[Row] = []
    if timing > 0 and not missing:
        for batch_size in budget.batch_sizes:
            times += step_times(study, names, batch_size, seconds=timing)
    return Comparison(
        recipe=recipe.name,
        headline=f"test_{recipe.task.headline}",
        higher_is_better=recipe.task.higher_is_better,
        facts={"reproduces": recipe.reproduces, **settings, **_facts(opened, share)},
        rows=tuple(row for rows in found.values() for row in rows or ()),
        step_times=tuple(times),
        missing=missing,
    )


def _train_missing(
    study: Study, runs: Sequence[Run], store: _Store, progress: Progress | None
) -> None:
    """Train what is not finished yet, and keep each run when it ends."""
    steps = [study.epochs * study.recipe.task.steps(study.data, run.batch_size) for run in runs]
    for index, run in enumerate(runs):
        if store.rows(run) is not None:
            continue
        done = sum(steps[:index])

        def after_step(run: Run = run) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(str(run), done, sum(steps))

        checkpoint = store.path(run, ".pt")
        try:
            rows = train(study, run, after_step, checkpoint=checkpoint, settings=store.settings)
        except ValueError as reason:
            if _TOO_FEW not in str(reason):
                raise
            way_out = "leave this normalization or batch size out; what is finished stays"
            raise UsageError(Problem(str(run), str(reason), way_out)) from None
        store.keep(run, rows)


def _opened(recipe: Recipe, data: str | Labelled | None, budget: Budget) -> Labelled | None:
    """The data of a recipe, prepared and cut to the budget."""
    if data is None:
        if not recipe.data:
            return None
        data = recipe.data
    limit = None if recipe.whole else budget.limit
    opened = data.limited(limit) if isinstance(data, Labelled) else open_labelled(data, limit=limit)
    return recipe.prepare(opened).limited(budget.limit if recipe.whole else None)


def _on(device: torch.device, data: Labelled | None) -> Labelled | None:
    if data is None:
        return None
    train, test = (Samples(x.to(device), y.to(device)) for x, y in (data.train, data.test))
    return Labelled(train, test, data.classes, data.origin)


def _settings(study: Study, budget: Budget, network: nn.Module) -> dict[str, Any]:
    """What every run of one folder has in common."""
    recipe, data = study.recipe, study.data
    optimizer = recipe.optimizer(network.parameters())
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    return {
        "recipe": recipe.name,
        **recipe.options,
        "epochs": budget.epochs,
        "limit": budget.limit,
        "width": budget.width,
        "amp": study.amp,
        "clip": recipe.clip,
        "optimizer": " + ".join(dict.fromkeys(_words(optimizer))),
        "network sha256": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "data sha256": None if data is None else data.digest(),
    }


def _words(optimizer: Optimizer) -> Iterator[str]:
    """Each group of an optimizer in words; options that are off are not named."""
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        words = [f"{k}={v}" for k, v in sorted(options.items()) if v is not None and v is not False]
        yield f"{type(optimizer).__name__}({', '.join(words)})"


def _checked_network(study: Study, seed: int) -> nn.Module:
    """Make the recipe's network, and try it on samples of the data.

    Raises:
        UsageError: it cannot be made for such data, or does not take it.
    """
    shape = study.recipe.sample_shape(study.data)
    try:
        with study.random_state(), torch.no_grad():
            network = study.network(seed).to(study.device).eval()
            study.recipe.task.check(network, study.data)
    except NormconvError:
        raise
    except Exception as reason:  # the network is the user's, or the data is too small for it
        what = f"it does not take inputs of shape {shape}: {first_line(reason)}"
        way_out = "give data or a network of another shape"
        raise UsageError(Problem(study.recipe.name, what, way_out)) from None
    return network


def _check_made(study: Study, runs: Sequence[Run]) -> None:
    """Make one network of each normalization: what one cannot do is told before any is trained."""
    firsts = {run.normalization: run for run in reversed(runs)}
    with study.random_state():
        for run in firsts.values():
            study.begin(run)


def _facts(data: Labelled | None, share: Share) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": str(share.device), "threads": torch.get_num_threads()}
    if data is not None:
        counts = f"{len(data.train.labels)} to train, {len(data.test.labels)} to test"
        facts["data"] = f"{data.origin}: {counts}"
    return {**facts, "versions": versions()}


def _check_batch_sizes(study: Study, budget: Budget) -> None:
    for batch_size in budget.batch_sizes:
        if study.recipe.task.steps(study.data, batch_size) < 1:
            what = f"there are fewer than {batch_size} training samples"
            raise UsageError(Problem("batch sizes", what, "take smaller ones, or a larger limit"))


class _Store:
    """Finished runs, in memory or in a folder that other processes see.

    Args:
        folder: where; None for memory.
        settings: what all runs in it have in common.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.kept: dict[Run, list[Row]] = {}

    def path(self, run: Run, ending: str) -> Path | None:
        return None if self.folder is None else self.folder / "runs" / f"{run.name}{ending}"

    def rows(self, run: Run) -> list[Row] | None:
        """The rows of a run that is finished, else None."""
        path = self.path(run, ".json")
        if path is None or not path.exists():
            return self.kept.get(run)
        try:
            document = json.loads(path.read_text("utf-8"))
            settings, rows = dict(document["settings"]), [dict(row) for row in document["rows"]]
            if any(Run(r["normalization"], r["batch_size"], r["seed"]) != run for r in rows):
                raise ValueError("rows of another run")
            if not rows:
                raise ValueError("no rows")
        except (OSError, ValueError, KeyError, TypeError) as reason:
            what = f"it holds no finished run ({reason})"
            raise UsageError(Problem(str(path), what, "remove it")) from None
        differing = [name for name in self.settings if self.settings[name] != settings.get(name)]
        if differing:
            was = ", ".join(f"{name}={settings.get(name)!r}" for name in differing)
            way_out = "take another folder, or remove it"
            raise UsageError(Problem(str(path), f"it is a run with {was}", way_out))
        return rows

    def keep(self, run: Run, rows: list[Row]) -> None:
        """Write a finished run, and take its checkpoint away."""
        path, checkpoint = self.path(run, ".json"), self.path(run, ".pt")
        if path is None or checkpoint is None:
            self.kept[run] = rows
            return
        write_json(path, {"settings": self.settings, "rows": rows})
        checkpoint.unlink(missing_ok=True)
