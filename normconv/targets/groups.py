"""How many groups a GroupNorm gets, and why."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

__all__ = ["Groups", "choose_groups"]

_FEWEST = (
    16  # numbers in a group: with fewer its statistics say more about chance than about the sample
)
_FROM_SCRATCH = 16  # channels a group


@dataclass(frozen=True)
class Groups:
    """A choice: the number of groups, and one clause that says why."""

    number: int
    reason: str


def choose_groups(
    channels: int,
    shape: tuple[int, ...] | None,
    *,
    groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: bool = True,
) -> Groups | str:
    """Choose the number of groups of a GroupNorm, or say why there can be none.

    With neither number given: one group where the statistics are trained, since the more channels a
    group averages over the nearer its statistics are to the trained ones; 16 channels a group in a
    network that starts from scratch. A number that does not divide C gives way to the next smaller one
    that does. A group never holds fewer than 16 numbers of a sample while fewer groups would hold more.

    Args:
        channels: C.
        shape: traced shape of the norm's input, (N, C, *); None where no trace told it.
        groups: wanted number of groups.
        channels_per_group: wanted size of a group.
        pretrained: whether the norm's statistics are trained.

    >>> choose_groups(64, (2, 64, 8, 8)).number
    1
    >>> choose_groups(64, (2, 64, 8, 8), channels_per_group=16)
    Groups(number=4, reason='4 groups of 16 channels')
    >>> choose_groups(64, (2, 64), groups=64)
    Groups(number=4, reason='4 groups instead of 64: a sample has only 1 number a channel')
    """
    if groups is not None:
        wanted, why = min(groups, channels), ""
    elif channels_per_group is not None:
        wanted, why = channels // min(channels_per_group, channels), ""
    elif pretrained:
        wanted, why = 1, ": it stays nearest to trained statistics"
    else:
        wanted, why = max(1, channels // _FROM_SCRATCH), ": its statistics are not trained"
    number = next(n for n in range(wanted, 0, -1) if channels % n == 0)
    reason = f"{_count(number)} of {channels // number} channels{why}"
    asked = groups if groups is not None else wanted
    if number != asked:
        reason = (
            f"{_count(number)} instead of {asked}: {channels} channels are not divisible by that"
        )
    each = prod(shape[2:]) if shape is not None else _FEWEST
    if each * channels < 2:
        return "a sample has a single number there: a group of it has no variance"
    dividing = [n for n in range(number, 0, -1) if channels % n == 0]
    sound = next((n for n in dividing if channels // n * each >= _FEWEST), 1)
    if sound != number:
        numbers = f"{each} number{'s' * (each != 1)} a channel"
        reason = f"{_count(sound)} instead of {number}: a sample has only {numbers}"
    return Groups(sound, reason)


def _count(groups: int) -> str:
    return f"{groups} group{'s' * (groups != 1)}"
