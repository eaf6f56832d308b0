"""A picture of learning curves under several normalizations; needs the extra `plot`."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from normconv.errors import MissingDependency, Problem, UsageError
from normconv.files import atomic_path
from normconv.report.drift_plot import check_plot_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves_figure", "plot_curves"]

Row = Mapping[str, Any]


class _Look(NamedTuple):
    """How one normalization is drawn everywhere."""

    colour: str
    marker: str


# Okabe & Ito 2008: told apart under every colour blindness; the markers tell them apart in grey.
_LOOKS = {
    "plain": _Look("#000000", "o"),
    "bn": _Look("#D55E00", "s"),
    "wn": _Look("#0072B2", "D"),
    "wn+mobn": _Look("#009E73", "P"),
    "gn": _Look("#CC79A7", "*"),
    "gn+ws": _Look("#E69F00", "^"),
    "ln": _Look("#56B4E9", "v"),
}
_DECADES = 20.0  # a loss that spans such a factor is drawn on a logarithmic axis
_CHARACTER = 0.078  # inches that a character of a legend takes
_LINE = 0.75  # inches of a line in a legend, with the space around it


def plot_curves(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw learning curves with a band over the seeds, and write them as PNG.

    Args:
        comparison: what `normconv.training.Comparison.document` gives, or its JSON read back.
        path: ends in ``.png``; written whole or not at all.

    Raises:
        UsageError: there is nothing to draw; the path has another ending.
        MissingDependency: matplotlib is not installed.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "curves.png"
    >>> row = {"normalization": "wn", "batch_size": 8, "seed": 0, "epoch": 1, "test_loss": 2.0}
    >>> plot_curves({"recipe": "mine", "headline": "test_loss", "rows": [row]}, path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    check_plot_path(path)
    figure = curves_figure(comparison)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def curves_figure(comparison: Mapping[str, Any]) -> Figure:
    """Draw what `plot_curves` writes: a row of diagrams per measure, a column per batch size.

    A line is the mean over the seeds, its band reaches from the lowest to the highest; test is drawn
    solid, training dashed. Where there are several batch sizes the last column shows what each ends on,
    on an axis of its own; of a single one the measures stand side by side.

    Args:
        comparison: as for `plot_curves`.

    Raises:
        UsageError: there is nothing to draw.
        MissingDependency: matplotlib is not installed.
    """
    rows: Sequence[Row] = comparison.get("rows", ())
    measures = _measures(rows, comparison.get("headline", ""))
    if not measures:
        what = "no epoch is measured there"
        raise UsageError(Problem("comparison", what, "`normconv compare` measures some"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency.needs("matplotlib", "plot") from None
    batch_sizes = sorted({row["batch_size"] for row in rows})
    looks = _looks([row["normalization"] for row in rows])
    several = len(batch_sizes) > 1
    columns = len(batch_sizes) + 1 if several else len(measures)
    lines = len(measures) if several else 1
    # Not through pyplot: that would keep the figure, and ask for a display.
    size = (max(7.5, min(18.0, (4.2 if several else 5.5) * columns)), 1.2 + 3.4 * lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for index, measure in enumerate(measures):
        line_of_axes = list(grid[index] if several else grid[:, index])
        for batch_size, axes in zip(batch_sizes, line_of_axes, strict=False):
            here = [row for row in rows if row["batch_size"] == batch_size]
            for name, look in looks.items():
                mine = [row for row in here if row["normalization"] == name]
                _draw_curves(axes, mine, measure, look)
            _frame(axes, measure, f"{measure}, batch {batch_size}", "epoch")
            if axes is not line_of_axes[0]:
                axes.sharey(line_of_axes[0])
                axes.tick_params(labelleft=False)
        if several:
            _draw_ends(line_of_axes[-1], rows, looks, batch_sizes, measure)
        _scale(line_of_axes, rows, measure)
    _explain(figure, comparison, looks)
    return figure


def _looks(normalizations: Sequence[str]) -> dict[str, _Look]:
    """Give each normalization its own look; others that of their kind, or one that is free."""
    names = list(dict.fromkeys(normalizations))
    found = {name: _LOOKS[name] for name in names if name in _LOOKS}
    for name in (name for name in names if name not in found):
        order = (_LOOKS.get(name.removesuffix("+init")), *reversed(_LOOKS.values()))
        free = [look for look in order if look and look not in found.values()]
        found[name] = free[0] if free else list(_LOOKS.values())[len(found) % len(_LOOKS)]
    return {name: found[name] for name in names}


def _measures(rows: Sequence[Row], headline: str) -> list[str]:
    """Loss first, then the headline; each is measured in training, in testing, or in both."""
    have = {name for row in rows for name, value in row.items() if value is not None}
    wanted = dict.fromkeys(("loss", headline.removeprefix("test_")))
    return [name for name in wanted if {f"train_{name}", f"test_{name}"} & have]


def _draw_curves(axes: Axes, rows: Sequence[Row], measure: str, look: _Look) -> None:
    """Draw the training and test curve of one normalization."""
    for part, style, width, alpha in (("train", "--", 0.9, 0.7), ("test", "-", 1.8, 1.0)):
        epochs = sorted({row["epoch"] for row in rows})
        values = [_at(rows, epoch, f"{part}_{measure}") for epoch in epochs]
        known = [(epoch, seeds) for epoch, seeds in zip(epochs, values, strict=True) if seeds]
        if not known:
            continue
        places = [epoch for epoch, _ in known]
        axes.plot(
            places,
            [statistics.fmean(seeds) for _, seeds in known],
            marker=look.marker if part == "test" else "",
            markersize=4,
            markevery=max(1, len(places) // 10),
            color=look.colour,
            linestyle=style,
            linewidth=width,
            alpha=alpha,
        )
        if part == "test" and any(len(seeds) > 1 for _, seeds in known):
            low, high = zip(*((min(seeds), max(seeds)) for _, seeds in known), strict=True)
            axes.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _draw_ends(
    axes: Axes,
    rows: Sequence[Row],
    looks: Mapping[str, _Look],
    batch_sizes: Sequence[int],
    measure: str,
) -> None:
    """Draw what the runs of each batch size end on, with a bar from the lowest seed to the highest."""
    for name, look in looks.items():
        places, means, below, above = [], [], [], []
        for batch_size in batch_sizes:
            mine = [r for r in rows if r["normalization"] == name and r["batch_size"] == batch_size]
            last = max((row["epoch"] for row in mine), default=0)
            seeds = _at(mine, last, f"test_{measure}") or _at(mine, last, f"train_{measure}")
            if seeds:
                mean = statistics.fmean(seeds)
                places.append(batch_size)
                means.append(mean)
                below.append(mean - min(seeds))
                above.append(max(seeds) - mean)
        axes.errorbar(
            places,
            means,
            (below, above),
            color=look.colour,
            marker=look.marker,
            markersize=5,
            capsize=3,
        )
    _frame(axes, measure, f"{measure} at the end", "batch size")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
    axes.minorticks_off()


def _at(rows: Sequence[Row], epoch: int, name: str) -> list[float]:
    """The values of all seeds at an epoch."""
    found = [row.get(name) for row in rows if row["epoch"] == epoch]
    return [float(value) for value in found if value is not None]


def _frame(axes: Axes, measure: str, title: str, below: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if below == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if measure == "accuracy":
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")


def _scale(line_of_axes: Sequence[Axes], rows: Sequence[Row], measure: str) -> None:
    """Draw a loss that falls by decades on a logarithmic axis."""
    values = [row.get(f"{part}_{measure}") for row in rows for part in ("train", "test")]
    known = [float(value) for value in values if value is not None]
    if measure == "loss" and min(known) > 0 and max(known) > _DECADES * min(known):
        for axes in line_of_axes:
            axes.set_yscale("log")


def _explain(figure: Figure, comparison: Mapping[str, Any], looks: Mapping[str, _Look]) -> None:
    """Name the lines, with the cost of a step, and say what was compared."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=c, marker=m, linewidth=1.8, markersize=5) for c, m in looks.values()
    ]
    labels = [_label(name, comparison.get("step_times", ())) for name in looks]
    facts = comparison.get("facts", {})
    seeds = len({row["seed"] for row in comparison["rows"]})
    band = f"; band: {seeds} seeds, lowest to highest" if seeds > 1 else ""
    data = f" on {facts['data']}" if "data" in facts else ""
    width = figure.get_figwidth()
    fitting = int(width / (_LINE + _CHARACTER * max(map(len, labels))))
    columns = max(1, min(fitting, len(labels)))
    legend = figure.legend(lines, labels, loc="outside upper left", ncols=columns)
    title = textwrap.fill(f"{comparison['recipe']}{data}", int(width / _CHARACTER))
    legend.set_title(f"{title}\nsolid: test, dashed: training{band}")
    legend.set_alignment("left")
    legend.set_frame_on(False)


def _label(name: str, step_times: Sequence[Row]) -> str:
    ratios = [t["ratio_to_plain"] for t in step_times if t["normalization"] == name]
    if not ratios:
        return name
    low, high = min(ratios), max(ratios)
    shown = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    return f"{name} (step time ×{shown})"
