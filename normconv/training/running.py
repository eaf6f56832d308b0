"""One network of a comparison, trained epoch by epoch, from a checkpoint where there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.files import atomic_path
from normconv.graph.running import first_line
from normconv.sources.datasets import Labelled
from normconv.training.normalizations import normalized
from normconv.training.recipe import Recipe
from normconv.training.tasks import Epoch, Memory, Scores

__all__ = ["Row", "Run", "Study", "Trainee", "train"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What differs between the networks of a comparison.

    Args:
        normalization: see `NORMALIZATIONS`.
        batch_size: samples a step.
        seed: of initial weights, of the order of samples, and of noise.
    """

    normalization: str
    batch_size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.normalization}, batch {self.batch_size}, seed {self.seed}"

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.normalization}-batch{self.batch_size}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What is the same for all of them.

    Args:
        recipe: network, task and optimizer.
        data: prepared; on the device.
        epochs: of each run.
        width: of the network.
        device: to compute on.
        amp: compute in bfloat16 where autocast finds that safe; weights stay float32.
    """

    recipe: Recipe
    data: Labelled | None
    epochs: int
    width: float
    device: torch.device
    amp: bool = False

    def begin(self, run: Run) -> Trainee:
        """Make a network with its initial weights: of one seed the same under each normalization."""
        recipe, shape = self.recipe, self.recipe.sample_shape(self.data)
        network = self.network(run.seed)
        samples = torch.zeros(2, *shape)
        if self.data is not None:
            count = len(self.data.train.labels)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(run.seed))
            chosen = order[: recipe.init_samples].to(self.data.train.labels.device)
            samples = self.data.train.inputs[chosen].cpu()
        network = normalized(network, run.normalization, samples).to(self.device)
        return Trainee(self, run, network)

    def network(self, seed: int) -> nn.Module:
        """Make the recipe's network with its initial weights, under no other normalization yet."""
        torch.manual_seed(seed)
        classes = 0 if self.data is None else self.data.classes
        return self.recipe.network(self.width, self.recipe.sample_shape(self.data), classes)

    def random_state(self) -> AbstractContextManager[None]:
        """Keep the caller's random numbers as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        return torch.random.fork_rng(devices=devices)


class Trainee:
    """A network on its way through the epochs.

    Args:
        study: what it is part of.
        run: which one it is.
        network: with its initial weights, on the device.
    """

    def __init__(self, study: Study, run: Run, network: nn.Module) -> None:
        self.study, self.run, self.network = study, run, network
        self.optimizer = study.recipe.optimizer(network.parameters())
        self.memory: Memory = {}
        self.rows: list[Row] = []
        self.steps = study.recipe.task.steps(study.data, run.batch_size)

    def learn(self, number: int) -> Iterator[Scores]:
        """Go through an epoch, and give the scores after each step.

        All that is random starts from the seed and the number: a run that was cut off goes on alike.
        """
        study, recipe, device = self.study, self.study.recipe, self.study.device.type
        torch.manual_seed(self.run.seed * 100_003 + number)
        epoch = Epoch(number, self.run.batch_size, self.run.seed)
        self.network.train()
        steps = recipe.task.losses(self.network, study.data, epoch, self.memory)
        done = number * self.steps
        while True:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=study.amp):
                scores = next(steps, None)
            if scores is None:
                return
            if recipe.schedule is not None:
                recipe.schedule(self.optimizer, min(1.0, done / (study.epochs * self.steps)))
            self.optimizer.zero_grad(set_to_none=True)
            scores["loss"].backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
            self.optimizer.step()
            done += 1
            yield scores

    def epoch(self, after_step: Callable[[], None]) -> Row:
        """Go through the next epoch, judge the network, and return what was measured.

        Training measures are means over the steps as they were taken, in training mode.
        """
        study, number = self.study, len(self.rows)
        started = time.perf_counter()
        sums: dict[str, Tensor] = {}
        count = 0
        for scores in self.learn(number):
            for name, value in scores.items():
                wide = value.detach().double()
                sums[name] = sums[name] + wide if name in sums else wide
            count += 1
            after_step()
        measured = {f"train_{name}": value.item() / count for name, value in sums.items()}
        seconds = time.perf_counter() - started
        self.network.eval()
        with torch.no_grad(), torch.autocast(study.device.type, torch.bfloat16, study.amp):
            judged = study.recipe.task.evaluate(self.network, study.data)
        measured |= {f"test_{name}": value for name, value in judged.items()}
        row: Row = {
            "normalization": self.run.normalization,
            "batch_size": self.run.batch_size,
            "seed": self.run.seed,
            "epoch": number + 1,
            "steps": (number + 1) * self.steps,
        }
        row |= {name: v if math.isfinite(v) else None for name, v in measured.items()}
        self.rows.append({**row, "seconds": round(seconds, 3)})
        return self.rows[-1]

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's loss is no number any more."""
        return bool(self.rows) and self.rows[-1].get("train_loss", 0.0) is None

    def write(self, path: Path, settings: dict[str, Any]) -> None:
        """Write all that the rest of the run depends on, whole or not at all."""
        document = {
            "settings": settings,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory,
            "rows": self.rows,
        }
        with atomic_path(path) as temporary:
            torch.save(document, temporary)

    def resume(self, path: Path, settings: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same settings; any other is left aside."""
        try:
            document = torch.load(path, map_location=self.study.device, weights_only=True)
        except Exception:  # torch raises every kind
            return
        if not isinstance(document, dict) or document.get("settings") != settings:
            return
        try:
            self.network.load_state_dict(document["network"])
            self.optimizer.load_state_dict(document["optimizer"])
            self.memory, self.rows = document["memory"], document["rows"]
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as reason:
            what = f"it is no checkpoint of this run ({first_line(reason)})"
            raise UsageError(Problem(str(path), what, "remove it")) from None


def train(
    study: Study,
    run: Run,
    after_step: Callable[[], None],
    *,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Row]:
    """Train one network of a comparison and return a row for each epoch.

    A run whose loss is no number any more ends there: the last row has None in its place.

    Args:
        study: what is the same for all.
        run: which one.
        after_step: called after each step.
        checkpoint: written after each epoch and gone on from, to the same result; removed at the end.
        settings: what a checkpoint must have been made with.
    """
    settings = settings or {}
    with study.random_state():
        trainee = study.begin(run)
        if checkpoint is not None and checkpoint.exists():
            trainee.resume(checkpoint, settings)
        for _ in range(len(trainee.rows) * trainee.steps):
            after_step()
        while len(trainee.rows) < study.epochs and not trainee.diverged:
            trainee.epoch(after_step)
            if checkpoint is not None:
                trainee.write(checkpoint, settings)
    return trainee.rows
