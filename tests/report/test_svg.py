"""Diagrams as SVG: they parse, hold what they were given, and say it in words."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from normconv.report.svg import Bar, Line, bar_chart, line_chart

HOSTILE = '<script>alert("1")</script>&'


def parts(drawn: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(drawn).iter(tag))


def lengths(drawn: str) -> list[float]:
    return [float(bar.attrib["width"]) for bar in parts(drawn, "rect")]


def test_a_name_is_text_whatever_it_looks_like() -> None:
    lines = line_chart([Line(HOSTILE, [1.0, 2.0])], [HOSTILE, "b"], title=HOSTILE, unit=HOSTILE)
    bars = bar_chart([Bar(HOSTILE, 1.0, HOSTILE)], title=HOSTILE, marked=HOSTILE)
    for drawn in (lines, bars):
        assert not parts(drawn, "script")
        assert ElementTree.fromstring(drawn).attrib["aria-label"].startswith(HOSTILE)


def test_a_diagram_is_told_in_words() -> None:
    drawn = bar_chart([Bar("a", 1.0, "1 ms", mark=2.0)], title="Latency", marked="the p95")
    root = ElementTree.fromstring(drawn)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "Latency; the tick is the p95"
    assert parts(drawn, "title")[1].text == "a: 1 ms"


def test_bars_are_as_long_as_their_values() -> None:
    short, long = lengths(bar_chart([Bar("a", 2.0, ""), Bar("b", 6.0, "")], title="t"))
    assert long == pytest.approx(3 * short, rel=1e-2)
    one, two, three = lengths(
        bar_chart([Bar(str(v), v, "") for v in (1e-6, 1e-5, 1e-4)], title="t", log=True)
    )
    assert three - two == pytest.approx(two - one, abs=0.2)
    assert one > 5


def test_what_is_no_number_has_its_words_and_no_bar() -> None:
    drawn = bar_chart([Bar("a", math.nan, "not a number"), Bar("b", 1.0, "1")], title="t", log=True)
    assert len(lengths(drawn)) == 1
    assert "not a number" in drawn
    assert "nan" not in drawn


def test_bars_may_all_be_zero_or_none() -> None:
    assert lengths(bar_chart([Bar("a", 0.0, "0")], title="t", log=True)) == [1.5]
    assert lengths(bar_chart([Bar("a", 0.0, "0")], title="t")) == [1.5]
    assert lengths(bar_chart([], title="t")) == []


def test_a_missing_place_is_a_gap_and_infinity_stands_at_the_edge() -> None:
    values = [1.0, 2.0, None, 3.0, 4.0, math.inf, math.nan]
    places = [f"bn{i}" for i in range(len(values))]
    drawn = line_chart([Line("after", values)], places, title="t", unit="dB")
    assert len(parts(drawn, "polyline")) == 2
    kinds = [circle.attrib["class"].split()[0] for circle in parts(drawn, "circle")]
    assert kinds == ["dot"] * 4 + ["edge"] * 2
    heights = [float(circle.attrib["cy"]) for circle in parts(drawn, "circle")]
    assert heights[4] < min(heights[:4])
    assert heights[5] > max(heights[:4])


def test_a_higher_value_stands_higher_and_a_limit_is_dashed() -> None:
    lines = [Line("error", [1e-7, 1e-6]), Line("bound", [1e-6, 1e-5], limit=True)]
    drawn = line_chart(lines, ["a", "b"], title="t", unit="u", log=True)
    error, bound = parts(drawn, "polyline")
    first, second = (float(point.split(",")[1]) for point in error.attrib["points"].split())
    assert second < first
    assert bound.attrib["class"] == "line limit"
    assert len(parts(drawn, "circle")) == 2


def test_many_points_are_not_marked_one_by_one() -> None:
    values = [float(i) for i in range(200)]
    drawn = line_chart([Line("a", values)], [str(i) for i in range(200)], title="t", unit="u")
    assert not parts(drawn, "circle")
    assert len(parts(drawn, "polyline")[0].attrib["points"].split()) == 200


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 4.0], [1e-12, 1e9]])
def test_the_scale_has_round_numbers_on_it(values: list[float]) -> None:
    drawn = line_chart([Line("a", list(values))], ["x"] * len(values), title="t", unit="u")
    labels = [t.text for t in parts(drawn, "text") if t.attrib["text-anchor"] == "end"]
    assert 2 <= len(labels) <= 9
    for label in labels[: len(labels) - 1]:
        digits = f"{abs(float(label or 'nan')):e}".split("e")[0].rstrip("0").rstrip(".")
        assert len(digits) <= 4
