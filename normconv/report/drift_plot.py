"""A picture of how far a converted model is from its original, by depth; needs the extra `plot`."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconv.errors import MissingDependency, Problem, UsageError
from normconv.files import atomic_path
from normconv.report.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["check_plot_path", "drift_figure", "plot_drift"]

# Okabe & Ito 2008: told apart under every colour blindness; the markers tell them apart in grey.
_STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "D"), ("#CC79A7", "P"), ("#E69F00", "*"))
_MARKS = {
    math.inf: ("^", 0.97, "∞: the same as the original"),
    -math.inf: ("v", 0.03, "−∞: the original is 0"),
    math.nan: ("x", 0.03, "not a number"),
}
_NAMED = 60  # so many names can be read below one another
_MEASURED = "`calibrate`, `recover`, and `convert` with data (--calib) compare sites"


def plot_drift(
    drift: Report | Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]
) -> None:
    """Draw each site's signal-to-noise ratio and cosine to the original, and write it as PNG.

    Args:
        drift: a report with facts ``before`` and ``after``; or labels of stages and what
            `Drift.document` gives of each, in the order in which they are drawn.
        path: ends in ``.png``; written whole or not at all.

    Raises:
        UsageError: no site was compared there; the path has another ending.
        MissingDependency: matplotlib is not installed.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "drift.png"
    >>> site = {"snr_db": 31.0, "cosine": 0.9996}
    >>> plot_drift({"converted": {"output": 0.02, "sites": {"bn1": site}}}, path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    check_plot_path(path)
    figure = drift_figure(drift)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Refuse, before any work is done, what `plot_drift` could not write.

    Raises:
        UsageError: the path has another ending than ``.png``.
        MissingDependency: matplotlib is not installed.
    """
    if Path(path).suffix.lower() != ".png":
        raise UsageError(Problem(str(path), "a plot is written as PNG", "end its name in .png"))
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency.needs("matplotlib", "plot")


def drift_figure(drift: Report | Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw what `plot_drift` writes: SNR in dB above, cosine below, a line per stage.

    Sites stand in the order in which the model calls them. What is not finite is marked at the edge.

    Args:
        drift: as for `plot_drift`.

    Raises:
        UsageError: no site was compared there.
        MissingDependency: matplotlib is not installed.
    """
    if isinstance(drift, Report):
        where, stages, title = f"the report of {drift.verb}", _stages(drift), _title(drift)
    else:
        where, stages, title = "drift", drift, "Drift from the original by depth"
    sites = list(dict.fromkeys(site for stage in stages.values() for site in _measured(stage)))
    if not sites:
        what = "outputs are compared there, no site is" if stages else "it measures no drift"
        raise UsageError(Problem(where, what, _MEASURED))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency.needs("matplotlib", "plot") from None
    width = min(16.0, 8 + len(sites) / 10)
    # Not through pyplot: that would keep the figure, and ask for a display.
    figure = Figure(figsize=(width, 7), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    lines: list[Line2D] = []
    marks: dict[str, Line2D] = {}
    for index, (label, stage) in enumerate(stages.items()):
        style = _STYLES[index % len(_STYLES)]
        lines.append(_draw(above, _values(stage, sites, "snr_db"), style, marks))
        lines[-1].set_label(_described(label, stage))
        _draw(below, _values(stage, sites, "cosine"), style, marks).set_label(label)
    _scale(above, below)
    _name_sites(below, sites)
    legend = figure.legend(handles=[*lines, *marks.values()], loc="outside upper left")
    legend.set_title(title)
    legend.set_alignment("left")
    legend.set_frame_on(False)
    return figure


def _stages(report: Report) -> Mapping[str, Mapping[str, Any]]:
    stages = {name: report.facts[name] for name in ("before", "after") if name in report.facts}
    taught = report.facts.get("recover", {})  # after a calibration, in one report with it
    return {**stages, "recovered": taught["after"]} if "after" in taught else stages


def _title(report: Report) -> str:
    done = " ".join(part for part in (report.verb, report.subject) if part)
    to = f" to {report.target}" if report.target else ""
    data = f", on {report.facts['measured on']}" if "measured on" in report.facts else ""
    return f"{done}{to}: drift from the original by depth{data}"


def _described(label: str, stage: Mapping[str, Any]) -> str:
    """A stage with what it does to the outputs."""
    parts = [label]
    if "output" in stage:
        parts.append(f"outputs differ by {float(stage['output']):.3g}")
    if "agreement" in stage:
        low, high = (float(bound) for bound in stage["interval"])
        share = f"same top-1 {float(stage['agreement']):.4f} (95 % interval {low:.4f} to {high:.4f}"
        samples = f", {stage['samples']} samples" if "samples" in stage else ""
        parts.append(f"{share}{samples})")
    return f"{parts[0]}: {', '.join(parts[1:])}" if parts[1:] else label


def _values(stage: Mapping[str, Any], sites: Sequence[str], name: str) -> list[float | None]:
    """By site; None where this stage has none. A report read from JSON spells out inf and nan."""
    measured = _measured(stage)
    return [float(measured[site][name]) if site in measured else None for site in sites]


def _measured(stage: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    sites: Mapping[str, Mapping[str, Any]] = stage.get("sites", {})
    return sites


def _draw(
    axes: Axes,
    values: Sequence[float | None],
    style: tuple[str, str],
    marks: dict[str, Line2D],
) -> Line2D:
    """Draw finite values as a line; mark others at the edge, and keep a key of each mark."""
    from matplotlib.lines import Line2D

    colour, marker = style
    size, width = (5, 1.2) if len(values) <= _NAMED else (2, 0.6)
    finite = [math.nan if v is None or not math.isfinite(v) else v for v in values]
    (line,) = axes.plot(finite, color=colour, marker=marker, markersize=size, linewidth=width)
    for special, (mark, height, meaning) in _MARKS.items():
        places = [index for index, v in enumerate(values) if v is not None and _is(v, special)]
        if places:
            look: dict[str, Any] = {"marker": mark, "linestyle": "", "markersize": size + 2}
            edge = axes.get_xaxis_transform()
            axes.plot(places, [height] * len(places), color=colour, transform=edge, **look)
            marks[meaning] = Line2D([], [], color="black", label=meaning, **look)
    return line


def _is(value: float, special: float) -> bool:
    return value == special or (math.isnan(value) and math.isnan(special))


def _scale(above: Axes, below: Axes) -> None:
    above.set_ylabel("SNR (dB)")
    below.set_ylabel("cosine")
    for axes, shown in ((above, (0.0, 20.0)), (below, (0.99, 1.0))):
        axes.update_datalim([(0, shown[0]), (0, shown[1])], updatex=False)
        axes.autoscale_view()
        axes.grid(color="0.9")
        axes.set_axisbelow(True)


def _name_sites(axes: Axes, sites: Sequence[str]) -> None:
    """Name the sites where there is room for it, else count them."""
    if len(sites) <= _NAMED:
        names = [site if len(site) <= 32 else f"…{site[-31:]}" for site in sites]
        axes.set_xticks(range(len(sites)), names, rotation=90, fontsize=7, parse_math=False)
        return
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"site, in the order of the forward pass ({len(sites)})")
