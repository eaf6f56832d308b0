"""A picture of how fast models are, side by side; needs the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normconv.errors import MissingDependency, Problem, UsageError
from normconv.files import atomic_path
from normconv.report.drift_plot import check_plot_path
from normconv.report.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bench_figure", "plot_bench"]

# Okabe & Ito 2008: told apart under every colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_bench(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw the timings of `bench` and write them as PNG.

    Args:
        report: of `bench`.
        path: ends in ``.png``; written whole or not at all.

    Raises:
        UsageError: nothing was timed there; the path has another ending.
        MissingDependency: matplotlib is not installed.
    """
    check_plot_path(path)
    figure = bench_figure(report)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def bench_figure(report: Report) -> Figure:
    """Draw what `plot_bench` writes: a diagram per batch size, a bar per model and backend.

    A bar is the median latency, its whisker reaches to the 95th percentile, and beside it stands the
    ratio with its quartiles.

    Raises:
        UsageError: nothing was timed there.
        MissingDependency: matplotlib is not installed.
    """
    rows: Sequence[Mapping[str, Any]] = report.facts.get("timings", ())
    if not rows:
        what = "it has no timings"
        raise UsageError(Problem(f"the report of {report.verb}", what, "`normconv bench` measures"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency.needs("matplotlib", "plot") from None
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    most = max(sum(row["batch_size"] == size for row in rows) for size in sizes)
    # Not through pyplot: that would keep the figure, and ask for a display.
    height = min(24.0, 0.8 + len(sizes) * (0.7 + 0.36 * most))
    figure = Figure(figsize=(8.5, height), dpi=150, layout="constrained")
    grid = figure.subplots(len(sizes), 1, squeeze=False)
    for axes, size in zip(grid[:, 0], sizes, strict=True):
        _draw(axes, [row for row in rows if row["batch_size"] == size], models)
        axes.set_title(f"batch {size}", fontsize=10, loc="left")
    machine = report.facts.get("machine", {})
    where = machine.get("accelerator", machine.get("processor", ""))
    threads = f", threads: {machine['threads']}" if "threads" in machine else ""
    grid[-1, 0].set_xlabel(
        f"median ms of a call, to the 95th percentile; × {rows[0]['ratio_to']}\n{where}{threads}",
        fontsize=8,
        parse_math=False,
    )
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    places = range(len(rows))
    values = [row["latency_ms"] for row in rows]
    above = [max(0.0, row["p95_ms"] - row["latency_ms"]) for row in rows]
    colours = [_COLOURS[models.index(row["model"]) % len(_COLOURS)] for row in rows]
    axes.barh(places, values, xerr=([0.0] * len(rows), above), color=colours, capsize=3)
    names = [f"{row['model']} on {row['backend']}" for row in rows]
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    for place, row, value, more in zip(places, rows, values, above, strict=True):
        low, high = row["ratio_quartiles"]
        told = f"  {value:.3g} ms, ×{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        axes.text(value + more, place, told, va="center", fontsize=7)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    reach = max(value + more for value, more in zip(values, above, strict=True))
    axes.set_xlim(0.0, 1.4 * reach)  # room for what is written beside the bars
