"""Reports and plans as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from normconv.report.report import Report, SiteRow

if TYPE_CHECKING:
    from normconv.errors import NormconvError

__all__ = ["print_error", "print_report", "print_sites", "table"]

_ROWS = 40
_STYLE = {"exact": "green", "calibrated": "yellow", "fresh": "red"}
_INTERNAL = frozenset({"seconds", "actions"})


def print_report(console: Console, report: Report, *, all_sites: bool = False) -> None:
    """Print a report: what was used, the sites, the checks, the notes, the verdict."""
    subject = " ".join(part for part in (report.verb, report.subject) if part)
    console.rule(
        f"[bold]{escape(subject)}" + (f" → {escape(report.target)}" if report.target else "")
    )
    for name, value in report.facts.items():
        if name not in _INTERNAL and value not in (None, {}, [], "") and not _is_deep(value):
            console.print(f"[dim]{escape(name)}:[/] {escape(_short(value))}", highlight=False)
    if report.sites:
        print_sites(console, report.sites, all_sites=all_sites)
    _print_checks(console, report)
    for note in report.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)


def _print_checks(console: Console, report: Report) -> None:
    for check in report.checks:
        mark = "[green]✓[/]" if check.passed else "[bold red]✗[/]"
        console.print(f"{mark} {escape(check.name)}: {escape(check.describe())}", highlight=False)
        if not check.passed and check.way_out:
            console.print(f"  → {escape(check.way_out)}", highlight=False)
    if report.checks:
        failed = len(report.failed_checks)
        verdict = (
            f"[bold red]{failed} of {len(report.checks)} checks failed"
            if failed
            else "[bold green]proved"
        )
        console.print(f"{verdict}[/] ({len(report.checks)} checks)", highlight=False)


def print_sites(console: Console, sites: Sequence[SiteRow], *, all_sites: bool = False) -> None:
    """Print a row per site; the middle of a long list is left out unless `all_sites`."""
    shown, left_out = list(sites), 0
    if len(shown) > _ROWS and not all_sites:
        left_out = len(shown) - _ROWS
        shown = shown[: _ROWS // 2] + shown[-_ROWS // 2 :]
    measured = any(row.error is not None for row in sites)
    mixed = len({row.fidelity for row in sites if row.fidelity}) > 1
    columns = ["site", "norm", "action"]
    columns += ["fidelity"] * mixed + ["error", "bound"] * measured + ["why"]
    made = table(columns)
    for index, row in enumerate(shown):
        if left_out and index == _ROWS // 2:
            made.add_row(f"… {left_out} more")
        cells = [
            Text(row.site or "(the model)"),
            Text(row.norm),
            Text(row.action, _STYLE.get(row.fidelity, "dim")),
        ]
        cells += [Text(row.fidelity)] * mixed
        if measured:
            passed = row.error is None or row.bound is None or row.error <= row.bound
            style = "" if passed else "bold red"
            cells += [Text(_number(row.error), style), Text(_number(row.bound))]
        made.add_row(*cells, Text(row.reason))
    console.print(made)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def table(columns: Sequence[str], *, title: str = "") -> Table:
    """Make an empty table in the house's style; the last column takes the rest of the line."""
    made = Table(title=title or None, box=None, header_style="bold", pad_edge=False)
    for column in columns[:-1]:
        made.add_column(column, no_wrap=True, overflow="ellipsis")
    made.add_column(columns[-1], ratio=1, overflow="fold")
    return made


def print_error(console: Console, error: NormconvError) -> None:
    """Print what is wrong, where, and the way out of each problem."""
    kind = {1: "check failed", 2: "usage"}.get(error.exit_code, "refused")
    for problem in error.problems:
        place = f"{problem.where}: " if problem.where else ""
        console.print(f"[bold red]{kind}:[/] {escape(place + problem.what)}", highlight=False)
        if problem.way_out:
            console.print(f"  → {escape(problem.way_out)}", highlight=False)


def _is_deep(value: Any) -> bool:
    """Whether it is for the JSON rather than for a reader."""
    return isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values())


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return (
            "×".join(map(str, value))
            if all(isinstance(v, int) for v in value)
            else ", ".join(map(str, value))
        )
    return f"{value:.3g}" if isinstance(value, float) else str(value)
