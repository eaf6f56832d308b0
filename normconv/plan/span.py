"""Which channels of a norm the features of a layer are, where that is not one to one."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Span"]

_TEXT = re.compile(r"(?:(\d+)\*)?(\d+):(\d+)(?:\*(\d+))?")


@dataclass(frozen=True)
class Span:
    """Feature j of a layer is channel start + (j // inner) mod (stop - start) of the norm.

    In text ``0:64`` is channel by channel, ``64:128`` one branch of a concatenation, ``0:512*49``
    each channel 49 times in a row (a flattened map), ``49*0:512`` the whole range 49 times
    (a flattened map with channels last).

    Args:
        start: the first channel.
        stop: one after the last.
        inner: how many features in a row are one channel.
        outer: how often the range repeats.

    >>> Span.read("0:2*3").channels
    (0, 0, 0, 1, 1, 1)
    >>> Span.read("2*4:6").channels, str(Span(4, 6, outer=2))
    ((4, 5, 4, 5), '2*4:6')
    """

    start: int
    stop: int
    inner: int = 1
    outer: int = 1

    def __str__(self) -> str:
        """Write it as text."""
        outer = f"{self.outer}*" if self.outer != 1 else ""
        inner = f"*{self.inner}" if self.inner != 1 else ""
        return f"{outer}{self.start}:{self.stop}{inner}"

    @classmethod
    def read(cls, text: str) -> Span:
        """Read it back.

        Raises:
            ValueError: the text is no span.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no span such as '0:64', '0:512*49' or '49*0:512'")
        outer, start, stop, inner = (int(group) if group else 1 for group in match.groups())
        span = cls(start, stop, inner, outer)
        if stop <= start or not inner or not outer:
            raise ValueError(f"{text!r} is an empty span")
        return span

    @classmethod
    def of(cls, channels: tuple[int, ...]) -> Span | None:
        """Find the span of a list of channels, one a feature; None where it has no such order.

        >>> str(Span.of((3, 3, 4, 4)))
        '3:5*2'
        >>> Span.of((0, 2, 1)) is None
        True
        """
        start, stop = min(channels), max(channels) + 1
        inner = next((j for j, c in enumerate(channels) if c != start), len(channels))
        if not inner:
            return None
        outer, rest = divmod(len(channels), inner * (stop - start))
        span = cls(start, stop, inner, outer)
        return span if not rest and outer and span.channels == channels else None

    @property
    def features(self) -> int:
        """How many features it speaks of."""
        return self.outer * (self.stop - self.start) * self.inner

    @property
    def channels(self) -> tuple[int, ...]:
        """The channel of each feature."""
        once = tuple(c for c in range(self.start, self.stop) for _ in range(self.inner))
        return once * self.outer
