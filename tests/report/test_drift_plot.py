"""The picture of drift by depth: it shows the report's numbers, and what is not finite is marked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normconv.errors import MissingDependency, UsageError
from normconv.report import Report, plot_drift
from normconv.report.drift_plot import check_plot_path, drift_figure

Document = dict[str, Any]


def document(values: dict[str, float], agreement: float | None = None) -> Document:
    """What `Drift.document` gives."""
    sites = {
        name: {"snr_db": v, "cosine": 1 - 2.0**-i} for i, (name, v) in enumerate(values.items())
    }
    found: Document = {"output": 0.25, "sites": sites}
    if agreement is not None:
        found |= {"agreement": agreement, "interval": [0.81, 0.96], "samples": 80}
    return found


BEFORE = document({"bn1": 12.5, "layer1.bn": 9.0, "layer2.bn": -3.0}, 0.875)
AFTER = document({"bn1": 31.0, "layer1.bn": 24.0, "layer2.bn": 18.0}, 0.9125)
REPORT = Report(
    "calibrate",
    subject="ResNet",
    target="gn",
    facts={"measured on": "held-out data", "before": BEFORE, "after": AFTER},
)


def curves(figure: Any, axes: int) -> list[list[float]]:
    """The lines of one diagram, without what is only marked at its edge."""
    lines = [line for line in figure.axes[axes].get_lines() if line.get_linestyle() == "-"]
    assert all(list(line.get_xdata()) == list(range(len(line.get_ydata()))) for line in lines)
    return [[float(value) for value in line.get_ydata()] for line in lines]


def marked(figure: Any, axes: int) -> dict[str, list[int]]:
    """Places that are marked at the edge, by marker."""
    lines = [line for line in figure.axes[axes].get_lines() if line.get_linestyle() == "None"]
    return {line.get_marker(): list(line.get_xdata()) for line in lines}


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_are_the_numbers_of_the_report() -> None:
    figure = drift_figure(REPORT)
    for axes, name in enumerate(("snr_db", "cosine")):
        expected = [[site[name] for site in stage["sites"].values()] for stage in (BEFORE, AFTER)]
        assert curves(figure, axes) == expected
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == list(BEFORE["sites"])
    colours = {line.get_color() for line in figure.axes[0].get_lines()}
    assert len(colours) == 2
    below = {line.get_color() for line in figure.axes[1].get_lines()}
    assert below == colours


def test_the_heading_says_what_was_done_and_how_much_agrees() -> None:
    figure = drift_figure(REPORT)
    title = figure.legends[0].get_title().get_text()
    assert title == "calibrate ResNet to gn: drift from the original by depth, on held-out data"
    interval = "(95 % interval 0.8100 to 0.9600, 80 samples)"
    assert legend(figure) == [
        f"before: outputs differ by 0.25, same top-1 0.8750 {interval}",
        f"after: outputs differ by 0.25, same top-1 0.9125 {interval}",
    ]
    plain = drift_figure({"converted": document({"a": 1.0})})
    assert legend(plain) == ["converted: outputs differ by 0.25"]


def test_what_is_not_finite_is_marked_at_the_edge() -> None:
    stage = document({"a": math.inf, "b": 3.0, "c": math.nan, "d": -math.inf})
    stage["sites"]["c"]["cosine"] = math.nan
    figure = drift_figure({"converted": stage})
    ((first, *rest),) = curves(figure, 0)
    assert math.isnan(first)
    assert rest[0] == 3.0
    assert all(math.isnan(value) for value in rest[1:])
    assert marked(figure, 0) == {"^": [0], "x": [2], "v": [3]}
    assert marked(figure, 1) == {"x": [2]}
    assert legend(figure)[1:] == [
        "∞: the same as the original",
        "−∞: the original is 0",
        "not a number",
    ]
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    assert low < 0 < 20 < high < 30


def test_a_report_read_from_json_draws_the_same() -> None:
    stage = document({"a": math.inf, "b": 3.0, "c": math.nan})
    report = Report("calibrate", facts={"before": stage, "after": stage})
    facts = json.loads(report.to_json())["facts"]
    one, other = drift_figure(report), drift_figure({n: facts[n] for n in ("before", "after")})
    assert marked(one, 0) == marked(other, 0) == {"^": [0], "x": [2]}
    assert str(curves(one, 0)) == str(curves(other, 0))


def test_stages_may_know_different_sites() -> None:
    stages = {
        "converted": document({"a": 1.0, "b": 2.0}),
        "calibrated": document({"b": 4.0, "c": 5.0}),
        "recovered": {"output": 0.125, "sites": {}},
    }
    figure = drift_figure(stages)
    names = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert names == ["a", "b", "c"]
    assert str(curves(figure, 0)) == str(
        [[1.0, 2.0, math.nan], [math.nan, 4.0, 5.0], [math.nan] * 3]
    )
    assert marked(figure, 0) == {}  # not measured is not NaN
    assert legend(figure)[2] == "recovered: outputs differ by 0.125"


def test_names_are_written_where_there_is_room(tmp_path: Path) -> None:
    long = "backbone." * 20 + "bn$1$"
    (label,) = drift_figure({"x": document({long: 1.0})}).axes[1].get_xticklabels()
    assert label.get_text() == "…" + long[-31:]
    assert not label.get_parse_math()
    many = drift_figure({"x": document({f"s{i}": 20 - i / 200 for i in range(3000)})})
    assert all(not label.get_text().startswith("s") for label in many.axes[1].get_xticklabels())
    assert "(3000)" in many.axes[1].get_xlabel()
    assert len(curves(many, 0)[0]) == 3000
    assert many.get_figwidth() <= 16


def test_a_png_is_written_whole(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "new" / "drift.png"
    plot_drift(REPORT, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["drift.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= seen


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (Report("verify"), "the report of verify: it measures no drift; `calibrate`"),
        (Report("recover", facts={"before": {"output": 0.1, "sites": {}}}), "no site is"),
        ({}, "drift: it measures no drift"),
        ({"converted": {"output": 0.1}}, "no site is"),
    ],
)
def test_without_drift_nothing_is_written(
    drift: Report | dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        plot_drift(drift, tmp_path / "drift.png")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="written as PNG"):
        check_plot_path(tmp_path / "drift.jpg")
    check_plot_path(tmp_path / "DRIFT.PNG")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for use in (lambda: plot_drift(REPORT, tmp_path / "drift.png"), lambda: drift_figure(REPORT)):
        with pytest.raises(MissingDependency, match=r"normconv\[plot\]"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_drawing_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fails(self: Figure, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    path = tmp_path / "drift.png"
    path.write_text("old")
    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plot_drift(REPORT, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["drift.png"]


def test_no_display_and_no_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from normconv.report import plot_drift\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_drift({'a': {'sites': {'bn': {'snr_db': 1.0, 'cosine': 0.5}}}}, 'drift.png')\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {"MPLBACKEND": "TkAgg", "PYTHONPATH": root, "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "drift.png").stat().st_size > 10_000
