"""`normconv doctor`: what works on this machine, and how to get what does not."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from normconv.cli.common import Json, command, stage
from normconv.report import Report
from normconv.report.terminal import table

__all__ = ["doctor", "show"]

_MARKS = {"works": ("✓", "green"), "absent": ("–", "dim"), "broken": ("✗", "bold red")}


@command
def doctor(as_json: Json = False) -> None:
    """Try every runtime and provider with a tiny model; exit 1 if the main job cannot run here."""
    with stage("try each runtime", as_json=as_json):
        from normconv.cli.diagnosis import diagnose

        report = diagnose()
    if as_json:
        typer.echo(report.to_json())
    else:
        show(Console(), report)
    if not report.passed:
        raise typer.Exit(1)


def show(console: Console, report: Report) -> None:
    """Print a line for each runtime and each extra, and the verdict."""
    console.rule("[bold]doctor")
    console.print(f"[dim]system:[/] {report.facts['system']}", highlight=False)
    for name in ("runtimes", "extras"):
        rows: list[dict[str, Any]] = report.facts[name]
        if rows:
            console.print(_table(name, rows))
    for note in report.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    if report.passed:
        console.print("[bold green]the main job runs here[/]: convert, export, compare")
    else:
        names = ", ".join(check.name for check in report.failed_checks)
        console.print(Text(f"the main job does not run here: {names}", "bold red"))


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    made = table(["", title, "version", "what was seen"])
    for row in rows:
        mark, style = _MARKS[row["state"]]
        seen = Text(row["detail"] or row["state"])
        if row["way_out"] and row["state"] != "works":
            seen.append(f"\n→ {row['way_out']}", "bold")
        name = Text(row["part"], "" if row["state"] != "absent" else "dim")
        made.add_row(Text(mark, style), name, row["version"], seen)
    return made
