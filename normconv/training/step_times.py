"""How long a step takes under each normalization, measured side by side."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch

from normconv.numerics import quartiles, ratios_by_turn, take_turns
from normconv.training.running import Run, Study, Trainee

__all__ = ["step_times"]

_STEPS = 3  # a turn
_TURNS = 3  # at least


def step_times(
    study: Study, normalizations: Sequence[str], batch_size: int, *, seconds: float
) -> list[dict[str, Any]]:
    """Measure the time of a training step of each normalization, and its ratio to the plain network's.

    The networks take turns of three steps, so that whatever else the machine does falls on all of them:
    the ratios of one turn are comparable, and their median is given.

    Args:
        study: recipe, data and device.
        normalizations: which.
        batch_size: samples a step.
        seconds: after so long no more turns are begun; three are taken at least.

    Returns:
        For each its median milliseconds and ratio, with their quartiles.
    """
    names = list(dict.fromkeys(("plain", *normalizations)))
    with study.random_state():
        walks = [_walk(study.begin(Run(name, batch_size, 0))) for name in names]
        works = [functools.partial(_turn, walk, study.device) for walk in walks]
        for work in works:
            work()  # memory is taken and kernels are chosen
        times = take_turns(works, seconds=seconds, least=_TURNS)
    found = []
    for index, name in enumerate(names):
        if name in normalizations:
            low, step, high = _rounded([1e3 * turn / _STEPS for (turn,) in times[index]])
            least, ratio, most = _rounded(ratios_by_turn(times[index], times[0]))
            found.append(
                {
                    "normalization": name,
                    "batch_size": batch_size,
                    "step_ms": step,
                    "step_ms_quartiles": [low, high],
                    "ratio_to_plain": ratio,
                    "ratio_quartiles": [least, most],
                    "turns": len(times[index]),
                }
            )
    return found


def _walk(trainee: Trainee) -> Iterator[Any]:
    """Steps without an end."""
    for number in count():
        yield from trainee.learn(number)


def _turn(walk: Iterator[Any], device: torch.device) -> None:
    """Take some steps, and wait until the device has done them."""
    for _ in islice(walk, _STEPS):
        pass
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in quartiles(values)]
