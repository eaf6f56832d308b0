"""The picture of learning curves: it shows the rows, with a band over the seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normconv.errors import MissingDependency, UsageError
from normconv.report.curves_plot import curves_figure, plot_curves


def document(batch_sizes: tuple[int, ...] = (8,), factor: float = 1.0) -> dict[str, Any]:
    """Two normalizations, two seeds, three epochs."""
    rows = [
        {
            "normalization": name,
            "batch_size": batch_size,
            "seed": seed,
            "epoch": epoch,
            "train_loss": factor**epoch * (index + 3.0 - epoch / 2 + seed / 4),
            "test_loss": index + 4.0 - epoch + seed / 2,
            "test_accuracy": 0.25 * epoch - 0.125 * seed,
        }
        for batch_size in batch_sizes
        for index, name in enumerate(("plain", "wn"))
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    ]
    times = [
        {"normalization": "wn", "batch_size": size, "ratio_to_plain": 1.1 + size / 100}
        for size in batch_sizes
    ]
    facts = {"data": "digits: 10 to train, 5 to test"}
    return {
        "recipe": "mine",
        "headline": "test_accuracy",
        "facts": facts,
        "rows": rows,
        "step_times": times,
    }


def lines(axes: Any, style: str) -> list[list[float]]:
    return [
        [float(y) for y in line.get_ydata()]
        for line in axes.get_lines()
        if line.get_linestyle() == style
    ]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_are_means_over_the_seeds() -> None:
    figure = curves_figure(document())
    loss, accuracy = figure.axes
    assert lines(loss, "-") == [[3.25, 2.25, 1.25], [4.25, 3.25, 2.25]]
    assert lines(loss, "--") == [[2.625, 2.125, 1.625], [3.625, 3.125, 2.625]]
    assert lines(accuracy, "-") == [[0.1875, 0.4375, 0.6875]] * 2
    assert lines(accuracy, "--") == []
    bands = [band.get_paths()[0].vertices for band in loss.collections]
    assert [(band[:, 1].min(), band[:, 1].max()) for band in bands] == [(1.0, 3.5), (2.0, 4.5)]
    assert len({line.get_color() for line in loss.get_lines()}) == 2


def test_the_heading_names_lines_and_what_a_step_costs() -> None:
    figure = curves_figure(document())
    assert texts(figure) == ["plain", "wn (step time ×1.18)"]
    title = figure.legends[0].get_title().get_text()
    assert title.splitlines() == [
        "mine on digits: 10 to train, 5 to test",
        "solid: test, dashed: training; band: 2 seeds, lowest to highest",
    ]
    several = curves_figure(document((2, 8)))
    assert texts(several) == ["plain", "wn (step time ×1.12 to 1.18)"]


def test_the_heading_stays_inside_the_picture() -> None:
    """However many lines there are, and of which lengths."""
    names = ["plain+init", "bn", "wn+init", "wn+mobn+init", "ln"]
    given = document()
    rows = [{**row, "normalization": name} for row in given["rows"][:6] for name in names]
    times = [{"normalization": name, "batch_size": 8, "ratio_to_plain": 1.0} for name in names]
    facts = {
        "data": "cifar10 in data, 50000 + 10000 images, whitened: 10000 to train, 5000 to test"
    }
    for changed in ({}, {"headline": "test_loss"}, {"recipe": "a-rather-long-name" * 3}):
        figure = curves_figure(
            {**given, "rows": rows, "step_times": times, "facts": facts, **changed}
        )
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1, changed


def test_a_normalization_looks_the_same_in_every_picture() -> None:
    def looks(*names: str) -> list[tuple[str, str]]:
        rows = [{**document()["rows"][0], "normalization": name} for name in names]
        handles = curves_figure({**document(), "rows": rows}).legends[0].legend_handles
        return [(line.get_color(), line.get_marker()) for line in handles]

    plain, wn, bn = looks("plain", "wn", "bn")
    assert looks("bn", "plain+init", "wn+init") == [bn, plain, wn]
    several = looks("wn+init", "wn", "bn", "ln", "mine", "gn", "gn+ws")
    assert several[1:3] == [wn, bn]
    assert len(set(several)) == 7
    assert len(looks(*(f"other {number}" for number in range(9)))) == 9


def test_the_legend_shows_the_solid_line_where_only_training_has_a_loss() -> None:
    rows = [{k: v for k, v in r.items() if k != "test_loss"} for r in document()["rows"]]
    figure = curves_figure({**document(), "rows": rows})
    assert {line.get_linestyle() for line in figure.legends[0].legend_handles} == {"-"}


def test_accuracy_is_in_percent() -> None:
    axes = curves_figure(document()).axes[1]
    assert axes.yaxis.get_major_formatter()(0.965, 0) == "96.5 %"


def test_several_batch_sizes_end_in_one_diagram() -> None:
    figure = curves_figure(document((8, 2)))
    titles = ["loss, batch 2", "loss, batch 8", "loss at the end"]
    assert [axes.get_title() for axes in figure.axes[:3]] == titles
    ends = figure.axes[5]
    assert ends.get_xscale() == "log"
    assert [label.get_text() for label in ends.get_xticklabels()] == ["2", "8"]
    assert lines(ends, "-") == [[0.6875, 0.6875]] * 2
    assert ends.get_ylim() != figure.axes[4].get_ylim() == figure.axes[3].get_ylim()
    assert len(curves_figure(document()).axes) == 2


def test_a_loss_that_falls_by_decades_is_logarithmic() -> None:
    assert curves_figure(document()).axes[0].get_yscale() == "linear"
    assert curves_figure(document(factor=0.1)).axes[0].get_yscale() == "log"


def test_a_run_that_ended_early_is_a_shorter_line() -> None:
    given = document()
    gone = [r for r in given["rows"] if not (r["normalization"] == "wn" and r["epoch"] == 3)]
    for row in gone:
        if row["normalization"] == "wn" and row["epoch"] == 2:
            row["train_loss"] = row["test_loss"] = None
    figure = curves_figure({**given, "rows": gone})
    assert lines(figure.axes[0], "-") == [[3.25, 2.25, 1.25], [4.25]]


def test_a_measure_without_accuracy_is_drawn_once() -> None:
    rows = [{k: v for k, v in r.items() if k != "test_accuracy"} for r in document()["rows"]]
    figure = curves_figure({"recipe": "vae", "headline": "test_loss", "rows": rows})
    assert [axes.get_title() for axes in figure.axes] == ["loss, batch 8"]


def test_a_png_is_written_whole(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "new" / "curves.png"
    plot_curves(document((2, 8, 32)), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["curves.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(0, 0, 0), (0, 0x72, 0xB2)} <= seen


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no epoch is measured there"):
        plot_curves({"recipe": "x", "headline": "test_loss", "rows": []}, tmp_path / "a.png")
    with pytest.raises(UsageError, match="written as PNG"):
        plot_curves(document(), tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"normconv\[plot\]"):
        curves_figure(document())


def test_no_display_and_no_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from normconv.report.curves_plot import plot_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "row = {'normalization': 'wn', 'batch_size': 8, 'seed': 0, 'epoch': 1, 'test_loss': 2.0}\n"
        "plot_curves({'recipe': 'x', 'headline': 'test_loss', 'rows': [row]}, 'curves.png')\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {"MPLBACKEND": "TkAgg", "PYTHONPATH": root, "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
