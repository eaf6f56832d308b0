"""How long a step takes under each normalization, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch

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
        for walk in walks:
            _turn(walk, study.device)  # memory is taken and kernels are chosen
        turns: list[list[float]] = []
        end = time.perf_counter() + seconds
        while len(turns) < _TURNS or time.perf_counter() < end:
            turns.append([_turn(walk, study.device) for walk in walks])
    found = []
    for index, name in enumerate(names):
        if name in normalizations:
            times = _quartiles([turn[index] * 1e3 for turn in turns])
            ratios = _quartiles([turn[index] / turn[0] for turn in turns])
            found.append(
                {
                    "normalization": name,
                    "batch_size": batch_size,
                    "step_ms": times[1],
                    "step_ms_quartiles": [times[0], times[2]],
                    "ratio_to_plain": ratios[1],
                    "ratio_quartiles": [ratios[0], ratios[2]],
                    "turns": len(turns),
                }
            )
    return found


def _walk(trainee: Trainee) -> Iterator[Any]:
    """Steps without an end."""
    for number in count():
        yield from trainee.learn(number)


def _turn(walk: Iterator[Any], device: torch.device) -> float:
    """Take some steps; return the seconds of one."""
    _wait_for(device)
    started = time.perf_counter()
    for _ in islice(walk, _STEPS):
        pass
    _wait_for(device)
    return (time.perf_counter() - started) / _STEPS


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _quartiles(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]
