"""A recipe: everything about a comparison but the normalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normconv.errors import Problem, UsageError
from normconv.sources.datasets import Labelled
from normconv.training.tasks import Classification, Task

__all__ = ["Budget", "Recipe", "scaled_to_one"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """How much is trained.

    Args:
        epochs: passes over the training samples.
        limit: at most so many of those; None for all.
        width: factor of the number of channels or units.
        batch_sizes: samples a step.
        seeds: of initial weights and order.
    """

    epochs: int
    limit: int | None
    width: float
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse what nothing could be trained with.

        Raises:
            UsageError: lists all values that say nothing.
        """
        problems = []
        for name in ("epochs", "limit"):
            if not _whole(given := getattr(self, name), 1) and (name, given) != ("limit", None):
                problems.append(Problem(name, f"{given!r} is no whole number from 1"))
        width: Any = self.width
        if not isinstance(width, (int, float)) or not 0 < width < math.inf:
            problems.append(Problem("width", f"{width!r} is no positive number"))
        for name, least in (("batch_sizes", 1), ("seeds", 0)):
            given = getattr(self, name)
            whole = isinstance(given, (tuple, list)) and all(_whole(each, least) for each in given)
            if not whole or not given or len(set(given)) < len(given):
                what = f"{given!r} are no different whole numbers from {least}"
                problems.append(Problem(name, what, f"{name}=({least},) is a single one"))
        if problems:
            raise UsageError(problems)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def scaled_to_one(data: Labelled) -> Labelled:
    """Make float32 from 0 to 1 of bytes; floats stay as they are."""
    parts = [
        part._replace(inputs=part.inputs.float() / 255)
        if part.inputs.dtype == torch.uint8
        else part
        for part in (data.train, data.test)
    ]
    return Labelled(parts[0], parts[1], data.classes, data.origin)


@dataclass(frozen=True)
class Recipe:
    """A network, its data, its optimizer, and how much of it is trained.

    Args:
        name: of the command.
        reproduces: one sentence, and the source.
        network: (width, shape of a sample, classes) to a network with its initial weights, with a
            BatchNorm wherever another normalization could stand.
        optimizer: from parameters; an iterable that is used once.
        small: the default, minutes on two cores.
        full: the published set-up.
        normalizations: those compared by default.
        data: what it is trained on, see `open_labelled`; empty where nothing is loaded.
        prepare: from raw data to inputs.
        whole: `prepare` looks at all of the training data: the limit is applied after it.
        task: loss and evaluation.
        schedule: called before each step with the optimizer and the share of the training done.
        clip: largest norm of the gradient; None for no limit.
        init_samples: how many samples set data-dependent initial weights.
        options: what it was made with, where that was a choice.
    """

    name: str
    reproduces: str
    network: Callable[[float, Shape, int], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    small: Budget
    full: Budget
    normalizations: tuple[str, ...]
    data: str = ""
    prepare: Callable[[Labelled], Labelled] = scaled_to_one
    whole: bool = False
    task: Task = field(default_factory=Classification)
    schedule: Callable[[Optimizer, float], None] | None = None
    clip: float | None = None
    init_samples: int = 500
    options: Mapping[str, Any] = field(default_factory=dict)

    def sample_shape(self, data: Labelled | None) -> Shape:
        """Return the shape of one input, () where the task makes its own."""
        return () if data is None else tuple(data.train.inputs.shape[1:])
