"""`normconv inspect`: what norms a model has, what feeds each, and what could take it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from normconv.cli.common import (
    At,
    SourceOptions,
    command,
    stage,
)
from normconv.cli.pages import write_page
from normconv.report import Report, SiteRow, jsonable
from normconv.report.terminal import table

if TYPE_CHECKING:
    from normconv.graph.sites import Site

__all__ = ["inspect"]


@command
def inspect(
    source: SourceOptions,
    at: At = "",
) -> None:
    """Show every norm of a model, what feeds it, and whether that can absorb it."""
    opened = source.open()
    with stage("capture", as_json=source.as_json):
        from normconv.graph import survey, survey_within

        inputs, notes = (opened.inputs.args, opened.inputs.kwargs), opened.loaded.notes
        if at:
            found, reached = survey_within(opened.model, at, *inputs)
            notes += reached.notes
        else:
            found = survey(opened.model, *inputs)
    facts = {
        **opened.loaded.facts,
        "example inputs": opened.inputs.origin,
        **({"at": at} if at else {}),
        "capture": found.method,
        "parameters": sum(p.numel() for p in opened.model.parameters()),
    }
    failures = tuple(f"capture by {k}: {v}" for k, v in found.failures.items())
    rows = tuple(
        SiteRow(site.name, site.norm, " + ".join(site.producers), "", "", _fed_by(site))
        for site in found.sites
    )
    write_page(Report("inspect", source.source, "", rows, (), facts, (*notes, *failures)))
    if source.as_json:
        sites = [site.__dict__ for site in found.sites]
        document = {"facts": facts, "failures": found.failures, "sites": sites, "notes": notes}
        typer.echo(json.dumps(jsonable(document), indent=2))
        return
    console = Console()
    for name, value in facts.items():
        console.print(f"[dim]{name}:[/] {value}", highlight=False)
    made = table(["norm", "class", "channels", "input", "called in", "fed by"])
    for site in found.sites:
        shape = "x".join(map(str, site.shape or ()))
        made.add_row(
            site.name or "(the model)",
            site.norm,
            str(site.channels),
            shape,
            site.phase,
            _fed_by(site),
        )
    console.print(made)
    foldable = sum(bool(site.producers) for site in found.sites)
    forward = sum(bool(site.consumers) for site in found.sites)
    more = f", {forward} into what they feed" if forward else ""
    console.print(f"{len(found.sites)} norms, {foldable} can be folded into what feeds them{more}")
    for note in (*notes, *failures):
        console.print(f"[yellow]note:[/] {note}", highlight=False)


def _fed_by(site: Site) -> str:
    fed = " + ".join(site.producers) or site.refusal or site.obstacle or "nothing calls it"
    return f"{fed} -> {' + '.join(site.consumers)}" if site.consumers else fed
