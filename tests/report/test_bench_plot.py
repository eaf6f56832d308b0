"""The picture of timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normconv.errors import UsageError
from normconv.report import Report
from normconv.report.bench_plot import bench_figure, plot_bench


def row(model: str, batch: int, latency: float) -> dict[str, Any]:
    return {
        "model": model,
        "backend": "ort-cpu",
        "batch_size": batch,
        "latency_ms": latency,
        "p95_ms": 1.5 * latency,
        "ratio": 2.0,
        "ratio_quartiles": [1.9, 2.1],
        "ratio_to": "$bn$ on ort-cpu",
    }


def report(*rows: dict[str, Any]) -> Report:
    return Report(
        "bench", facts={"timings": rows, "machine": {"processor": "abacus", "threads": 1}}
    )


def test_a_diagram_for_each_batch_size_and_a_bar_for_each_row() -> None:
    figure = bench_figure(report(row("$bn$", 1, 2.0), row("wn", 1, 4.0), row("wn", 8, 30.0)))
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["batch 1", "batch 8"]
    assert [bar.get_width() for bar in first.patches] == [2.0, 4.0]
    assert [bar.get_width() for bar in second.patches] == [30.0]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["$bn$ on ort-cpu", "wn on ort-cpu"]
    assert first.patches[1].get_facecolor() == second.patches[0].get_facecolor()
    assert "abacus, threads: 1" in second.get_xlabel()


def test_a_png_is_written(tmp_path: Path) -> None:
    plot_bench(report(row("bn", 1, 2.0)), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no timings"):
        bench_figure(Report("verify"))
    with pytest.raises(UsageError, match="written as PNG"):
        plot_bench(report(row("bn", 1, 2.0)), tmp_path / "bench.svg")
