"""Timing several works side by side, so that ratios between them are fair on a busy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

__all__ = ["Turns", "quartiles", "ratios_by_turn", "take_turns"]

#: Seconds by work, turn and call.
Turns: TypeAlias = list[list[list[float]]]


def take_turns(
    works: Sequence[Callable[[], object]],
    *,
    seconds: float,
    least: int = 3,
    calls: int = 1,
    unmeasured: int = 0,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Turns:
    """Call each work in turn, so that whatever else the machine does falls on all of them.

    The order is turned round after each round: none is always first, or always behind the same one.

    Args:
        works: each waits for its device before it returns.
        seconds: after so long no more rounds are begun.
        least: rounds that are taken at least.
        calls: measured calls of a turn.
        unmeasured: calls before them. With the pause they keep off it what another runtime's threads,
            which go on spinning for a while, and its data in the caches do.
        pause: seconds before each turn.
        clock: in seconds.
        sleep: waits so many seconds.

    Returns:
        The seconds of each call, by work and turn.

    >>> order = []
    >>> works = [lambda: order.append("a"), lambda: order.append("b")]
    >>> times = take_turns(works, seconds=0.0, least=2)
    >>> order, [len(turns) for turns in times]
    (['a', 'b', 'b', 'a'], [2, 2])
    """
    times: Turns = [[] for _ in works]
    places = list(range(len(works)))
    end = clock() + seconds
    taken = 0
    while taken < least or clock() < end:
        for place in places:
            if pause:
                sleep(pause)
            for _ in range(unmeasured):
                works[place]()
            times[place].append([_timed(works[place], clock) for _ in range(calls)])
        places.reverse()
        taken += 1
    return times


def ratios_by_turn(
    mine: Sequence[Sequence[float]], first: Sequence[Sequence[float]]
) -> list[float]:
    """Return, turn by turn, the median call of one work over that of another.

    >>> ratios_by_turn([[2.0, 2.0, 9.0], [4.0]], [[1.0, 1.0, 1.0], [8.0]])
    [2.0, 0.5]
    """
    pairs = zip(mine, first, strict=True)
    return [statistics.median(a) / statistics.median(b) for a, b in pairs]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile; of one value, itself.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started
