"""Small diagrams as SVG text: lines by depth, bars. Colours are classes, which the page sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "bar_chart", "line_chart"]

_WIDTH = 760.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 12.0, 10.0, 26.0
_PLOT_HEIGHT = 210.0
_BAR, _GAP = 18.0, 8.0
_LABEL, _VALUE = 230.0, 190.0  # what the texts beside the bars take
_CHARACTER = 6.3  # pixels, about
_MARKED = 60  # so many points are told apart
_TICKS = 6


@dataclass(frozen=True)
class Line:
    """One line of a diagram.

    Args:
        label: its name.
        values: one for each place; None leaves a gap, what is not finite is marked at the edge.
        limit: draw it as a limit: dashed, without marks.
    """

    label: str
    values: Sequence[float | None]
    limit: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar of a diagram.

    Args:
        label: what it stands for.
        value: its length.
        text: written beside it.
        mark: a tick on the same scale: a limit, a percentile.
        group: bars of one group have one colour.
        failed: draw it as a failure.
    """

    label: str
    value: float
    text: str
    mark: float | None = None
    group: int = 0
    failed: bool = False


def line_chart(
    lines: Sequence[Line], places: Sequence[str], *, title: str, unit: str, log: bool = False
) -> str:
    """Draw lines over places in their order.

    Args:
        lines: at most five besides limits.
        places: their names, shown where a pointer rests.
        title: what is drawn, for who does not see it.
        unit: of the values.
        log: on a logarithmic scale; values of 0 and below stand at its lower edge.

    >>> drawn = line_chart([Line("a", [1.0, 3.0])], ["<b>", "c"], title="t", unit="dB")
    >>> "<polyline" in drawn, "&lt;b&gt;" in drawn, "<b>" in drawn
    (True, True, False)
    """
    scale = _Scale.over([v for line in lines for v in line.values if v is not None], log)
    height = _TOP + _PLOT_HEIGHT + _BOTTOM
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(places) - 1)
    parts = [_frame(scale, unit)]
    colour = 0
    for line in lines:
        kind = "limit" if line.limit else f"c{colour}"
        colour += not line.limit
        parts.append(_line(line, places, scale, step, kind))
    for index in sorted({0, len(places) // 2, len(places) - 1} if places else ()):
        x = _LEFT + step * index
        anchor = "start" if index == 0 else "end" if index == len(places) - 1 else "middle"
        parts.append(_text(x, height - 8, _shortened(places[index], 30), anchor))
    return _svg(height, title, "".join(parts))


def bar_chart(bars: Sequence[Bar], *, title: str, log: bool = False, marked: str = "") -> str:
    """Draw horizontal bars, one below the other.

    Args:
        bars: a value that is not finite has its text and no bar.
        title: what is drawn, for who does not see it.
        log: on a logarithmic scale.
        marked: what a bar's mark means, for who does not see it.

    >>> drawn = bar_chart([Bar("a", 2.0, "2 ms"), Bar("b", float("nan"), "no number")], title="t")
    >>> drawn.count('class="bar'), "no number" in drawn
    (1, True)
    """
    values = [v for bar in bars for v in (bar.value, bar.mark) if v is not None]
    scale = _Scale.over(values, log, from_zero=True)
    room = _WIDTH - _LABEL - _VALUE
    parts = []
    for index, bar in enumerate(bars):
        top = _GAP + index * (_BAR + _GAP)
        label = _shortened(bar.label, int(_LABEL / _CHARACTER))
        hint = f"{bar.label}: {bar.text}"
        parts.append(f"<g><title>{escape(hint)}</title>")
        parts.append(_text(_LABEL - 8, top + 13, label, "end"))
        end = 0.0
        if math.isfinite(bar.value):
            end = max(1.5, room * scale.share(bar.value))
            kind = "bad" if bar.failed else f"c{bar.group % 5}"
            parts.append(
                f'<rect class="bar {kind}" x="{_LABEL:.1f}" y="{top:.1f}" width="{end:.1f}" '
                f'height="{_BAR:.1f}" rx="2"/>'
            )
        if bar.mark is not None and math.isfinite(bar.mark):
            at = room * scale.share(bar.mark)
            x = _LABEL + at
            parts.append(f'<path class="mark" d="M{x:.1f} {top - 3:.1f}V{top + _BAR + 3:.1f}"/>')
            end = max(end, at)
        parts.append(_text(_LABEL + end + 8, top + 13, bar.text, "start", "value"))
        parts.append("</g>")
    told = f"{title}; the tick is {marked}" if marked else title
    return _svg(_GAP + len(bars) * (_BAR + _GAP), told, "".join(parts))


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool, *, from_zero: bool = False) -> _Scale:
        """Make a scale that holds every value that is finite, the least of them off its lower edge."""
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
        if log:
            bottom = math.floor(math.log10(low) - 0.5 * from_zero)
            return cls(bottom, max(bottom + 1.0, math.ceil(math.log10(high))), True)
        if from_zero:
            low = min(0.0, low)
        spread = (high - low) or abs(high) or 1.0
        return cls(low if from_zero else low - 0.05 * spread, high + 0.05 * spread, False)

    def share(self, value: float) -> float:
        """Where on the scale, 0 to 1."""
        place = (math.log10(value) if value > 0 else self.low) if self.log else value
        return min(1.0, max(0.0, (place - self.low) / (self.high - self.low)))

    def ticks(self) -> list[tuple[float, str]]:
        """Shares and labels of round numbers."""
        if self.log:
            every = max(1, math.ceil((self.high - self.low) / _TICKS))
            powers = range(int(self.low), int(self.high) + 1, every)
            return [(self.share(10.0**power), f"1e{power:+d}") for power in powers]
        step = _round_step((self.high - self.low) / (_TICKS - 1))
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [(self.share(n * step), f"{n * step:.10g}") for n in range(first, last + 1)]


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _frame(scale: _Scale, unit: str) -> str:
    parts = []
    for share, label in scale.ticks():
        y = _TOP + _PLOT_HEIGHT * (1 - share)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, label, "end"))
    middle = _TOP + _PLOT_HEIGHT / 2
    turned = f'transform="rotate(-90 12 {middle})"'
    parts.append(f'<text x="12" y="{middle}" text-anchor="middle" {turned}>{escape(unit)}</text>')
    return "".join(parts)


def _line(line: Line, places: Sequence[str], scale: _Scale, step: float, kind: str) -> str:
    runs: list[list[str]] = [[]]
    marks = []
    for index, value in enumerate(line.values):
        if value is None or math.isnan(value):
            runs.append([])
            share = 0.0
        else:
            share = 1.0 if value == math.inf else 0.0 if value == -math.inf else scale.share(value)
        x, y = _LEFT + step * index, _TOP + _PLOT_HEIGHT * (1 - share)
        if value is None:
            continue
        if math.isfinite(value):
            runs[-1].append(f"{x:.1f},{y:.1f}")
        if not line.limit and (len(places) <= _MARKED or not math.isfinite(value)):
            hint = escape(f"{places[index]}: {value:.3g} ({line.label})")
            shape = "dot" if math.isfinite(value) else "edge"
            marks.append(
                f'<circle class="{shape} {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
                f"<title>{hint}</title></circle>"
            )
    drawn = [
        f'<polyline class="line {kind}" points="{" ".join(run)}"/>' for run in runs if len(run) > 1
    ]
    return "".join((*drawn, *marks))


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    styled = f' class="{kind}"' if kind else ""
    return f'<text{styled} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _svg(height: float, title: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{inside}</svg>'
    )
