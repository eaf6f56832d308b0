"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from normconv.errors import Problem, UsageError
from normconv.files import atomic_path
from normconv.report.html_backends import backend_sections
from normconv.report.html_bench import bench_sections, fastest
from normconv.report.html_parts import STYLE, definitions, details, number, section, size, table
from normconv.report.report import Check, Report, SiteRow, jsonable, versions
from normconv.report.svg import Bar, Line, bar_chart, line_chart

__all__ = ["check_html_path", "html_page", "write_html"]

_BARS = 24
_OPEN_ROWS = 80  # a longer table is folded up
_NAMED = 3  # names in one line
_LISTED = 8  # of a longer list the rest is folded up
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STAGES = ("before", "after")
_SHOWN_ELSEWHERE = frozenset({"timings", "models", "absent", "machine", "seconds", *_STAGES})


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as a self-contained HTML file, whole or not at all.

    Raises:
        UsageError: the path does not end in ``.html``, or nothing can be written there.
    """
    check_html_path(path)
    page = html_page(report)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def check_html_path(path: str | os.PathLike[str]) -> None:
    """Refuse, before any work is done, what `write_html` could not write.

    Raises:
        UsageError: the path has another ending than ``.html`` or ``.htm``, or is a folder.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise UsageError(Problem(str(path), "a report is written as HTML", "end its name in .html"))
    if Path(path).is_dir():
        raise UsageError(Problem(str(path), "it is a folder", "name a file"))


def html_page(report: Report) -> str:
    """Return a report as an HTML document.

    What a model or file is called is text there, whatever it looks like. It reads in light and in
    dark, and prints.

    >>> page = html_page(Report("convert", "<script>", "wn", checks=(Check("output", True),)))
    >>> "<script" in page, "&lt;script&gt;" in page, "Passed" in page
    (False, True, True)
    """
    title = f"{report.verb} {report.subject}".strip()
    title += f" → {report.target}" if report.target else ""
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>",
            _verdict(report),
            _tiles(report),
            _failures(report),
            _notes(report),
            *bench_sections(report.facts),
            *backend_sections(report.facts),
            section("Distance from the original, by depth", _drift(report)),
            section("Error at each site, by depth", _site_errors(report.sites)),
            section("Error against its bound", _check_bars(report.checks)),
            section("Sites", _sites(report.sites)),
            section("Everything else", _rest(report)),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · normconv</title><style>\n{STYLE}\n</style></head>\n"
        f"<body><main>{body}</main>{_footer()}</body></html>\n"
    )


# --- what is read first -------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    count, failed = len(report.checks), report.failed_checks
    if failed:
        kind, word = "bad-verdict", "Failed."
        names = _few([check.name for check in failed])
        text = f"{len(failed)} of {count} checks failed: {names}."
    elif not count:
        kind, word, text = "neutral", "Done.", "Nothing here was held against a bound."
    else:
        kind, word = "good", "Passed."
        text = "The one check passed." if count == 1 else f"All {count} checks passed."
        kinds = {row.fidelity for row in report.sites if row.fidelity}
        if kinds == {"exact"} and _worst(report) is not None:
            text += " It computes the same as the original, up to rounding."
        elif kinds & {"calibrated", "fresh"}:
            text += " It is near the original, not equal to it: how near is measured below."
    mark = {"good": "✓ ", "bad-verdict": "✗ "}.get(kind, "")
    return f'<p class="verdict {kind}"><strong>{mark}{word}</strong> {escape(text)}</p>'


def _tiles(report: Report) -> str:
    tiles = "".join(
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}<span class="more">{escape(more)}</span>'
        "</dd></div>"
        for name, value, more in _summary(report)
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _summary(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield what a reader asks first: a name, the answer, a word more."""
    facts = report.facts
    was = str(facts.get("class", "")).rpartition(".")[2]
    if was:
        yield "What it was", was, str(facts.get("source", ""))
    done = Counter(row.action for row in report.sites if row.action)
    if report.target and done:
        actions = ", ".join(f"{count} × {action}" for action, count in done.most_common())
        yield "What it became", f"{report.target}", actions
    yield from fastest(facts)
    norms = _norm_counts(report)
    if norms is not None:
        yield norms
    worst = _worst(report)
    if worst is not None:
        name, error, bound = worst
        share = f"{error / bound:.0%} of" if error <= bound else "more than"
        yield "Worst error", number(error), f"{share} the {number(bound)} allowed: {name}"
    yield from _distance(report)
    bytes_ = facts.get("bytes", facts.get("onnx bytes"))
    if isinstance(bytes_, int):
        nodes = facts.get("nodes", facts.get("onnx nodes"))
        yield "ONNX file", size(bytes_), "" if nodes is None else f"{nodes} nodes"


def _distance(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield how far the outputs are off on data, and how often they name the same class."""
    stages = list(_stages(report).values())
    if not stages:
        return
    first, last = stages[0], stages[-1]
    for name, title, form in (
        ("output", "Outputs differ by", ".3g"),
        ("agreement", "Same top-1", ".1%"),
    ):
        if last.get(name) is not None:
            before = first.get(name) if len(stages) > 1 else None
            more = "" if before is None else f"{number(before, form)} before"
            yield title, number(last[name], form), more


def _stages(report: Report) -> dict[str, Mapping[str, Any]]:
    """What was measured against the original on data, stage by stage."""
    stages = {name: report.facts.get(name) for name in _STAGES}
    taught = report.facts.get("recover")
    if isinstance(taught, Mapping):
        stages["recovered"] = taught.get("after")
    return {name: stage for name, stage in stages.items() if isinstance(stage, Mapping)}


def _norm_counts(report: Report) -> tuple[str, str, str] | None:
    """Norms before and after; one that became exact looks at no data any more."""
    facts = report.facts
    in_file = facts.get("norm_nodes", facts.get("onnx norm_nodes"))
    if not report.target or not report.sites:
        return None if in_file is None else ("Norm nodes in the file", str(in_file), "")
    left = [row for row in report.sites if row.fidelity != "exact"]
    kept = [row.site or "(the model)" for row in left if not row.fidelity]
    words = [] if in_file is None else [f"{in_file} in the ONNX file"]
    if len(left) > len(kept):
        words.append(f"{len(left) - len(kept)} look at each sample")
    if kept:
        words.append(f"kept: {_few(kept)}")
    return "Norms before → after", f"{len(report.sites)} → {len(left)}", "; ".join(words)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _worst(report: Report) -> tuple[str, float, float] | None:
    """The error that comes nearest to its bound, or passes it furthest; NaN is further than all."""
    found = [(c.name, c.measured, c.bound) for c in report.checks]
    found += [(row.site, row.error, row.bound) for row in report.sites]
    held = [(name, m, b) for name, m, b in found if m is not None and b is not None and b > 0]

    def nearness(item: tuple[str, float, float]) -> float:
        return math.inf if math.isnan(item[1]) else item[1] / item[2]

    return max(held, key=nearness, default=None)


def _failures(report: Report) -> str:
    lines = []
    for check in report.failed_checks:
        way_out = f"<br>→ {escape(check.way_out)}" if check.way_out else ""
        text = f"<strong>{escape(check.name)}</strong>: {escape(check.describe())}{way_out}"
        lines.append(f"<li>{text}</li>")
    return section("What failed", _list("failures", lines))


def _notes(report: Report) -> str:
    return section("To know", _list("notes", [f"<li>{escape(n)}</li>" for n in report.notes]))


def _list(kind: str, items: list[str]) -> str:
    def made(some: list[str]) -> str:
        return f'<ul class="{kind}">{"".join(some)}</ul>' if some else ""

    rest = items[_LISTED:]
    return made(items[:_LISTED]) + (details(f"{len(rest)} more", made(rest)) if rest else "")


# --- diagrams -----------------------------------------------------------------------------------


def _drift(report: Report) -> str:
    """Draw the signal-to-noise ratio of each site before and after, where data was run through."""
    measured: dict[str, Mapping[str, Any]] = {
        name: stage["sites"] for name, stage in _stages(report).items() if stage.get("sites")
    }
    places = list(dict.fromkeys(site for sites in measured.values() for site in sites))
    if not places:
        return ""
    lines = [
        Line(name, [_float(sites, site, "snr_db") for site in places])
        for name, sites in measured.items()
    ]
    title = "Signal-to-noise ratio of each site's output to the original's, in decibels"
    told = "; higher is nearer. Sites stand in the order in which the model calls them."
    return _figure(line_chart(lines, places, title=title, unit="SNR, dB"), title + told, lines)


def _float(sites: Mapping[str, Mapping[str, Any]], site: str, name: str) -> float | None:
    """A report read from JSON spells out what is not finite."""
    return float(sites[site][name]) if site in sites else None


def _site_errors(rows: tuple[SiteRow, ...]) -> str:
    measured = [row for row in rows if row.error is not None]
    if len(measured) < 2:
        return ""
    lines = [
        Line("error", [row.error for row in measured]),
        Line("bound", [row.bound for row in measured], limit=True),
    ]
    title = "Relative error (rel-L2) of each site's output against a float64 run, and its bound"
    told = ". Sites stand in the order of the report."
    places = [row.site or "(the model)" for row in measured]
    drawn = line_chart(lines, places, title=title, unit="rel-L2 error", log=True)
    return _figure(drawn, title + told, lines)


def _check_bars(checks: tuple[Check, ...]) -> str:
    """Draw each end-to-end error as a bar, and its bound as a tick; failures come first."""
    held = [c for c in checks if c.measured is not None and c.bound]
    held.sort(key=lambda check: check.passed)
    bars = [
        Bar(
            check.name,
            float(check.measured or 0.0),
            f"{number(check.measured)} of {number(check.bound)}",
            mark=check.bound,
            failed=not check.passed,
        )
        for check in held[:_BARS]
    ]
    if not bars:
        return ""
    title = "What was measured, on a logarithmic scale"
    more = f" The first {_BARS} of {len(held)}; all are below." if len(held) > _BARS else ""
    drawn = bar_chart(bars, title=title, log=True, marked="the bound")
    return _figure(drawn, f"{title}. The tick is the bound.{more}", [])


def _figure(drawing: str, caption: str, lines: list[Line]) -> str:
    colours = iter(range(len(lines)))
    keys = "".join(
        f'<span><span class="key {"limit" if line.limit else f"c{next(colours)}"}"></span>'
        f"{escape(line.label)}</span>"
        for line in lines
    )
    legend = f'<p class="keys">{keys}</p>' if keys else ""
    return f"<figure>{legend}{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


# --- tables -------------------------------------------------------------------------------------


def _sites(rows: tuple[SiteRow, ...]) -> str:
    if not rows:
        return ""
    columns = ["Site", "Class", "Fed by", "Action", "Fidelity", "Error", "Bound", "Why"]
    lines = [
        (
            row.site or "(the model)",
            row.norm,
            row.producer,
            row.action,
            row.fidelity,
            number(row.error),
            number(row.bound),
            row.reason,
        )
        for row in rows
    ]
    wanted = [0, *(i for i in range(1, len(columns)) if any(line[i] for line in lines))]
    numbers = [place for place, i in enumerate(wanted) if i in (5, 6)]
    missed = [
        place
        for place, row in enumerate(rows)
        if row.error is not None and row.bound is not None and not row.error <= row.bound
    ]
    made = table(
        [columns[i] for i in wanted],
        [[line[i] for i in wanted] for line in lines],
        numbers=numbers,
        failed=missed,
    )
    return details(f"All {len(rows)}", made) if len(rows) > _OPEN_ROWS else made


def _rest(report: Report) -> str:
    parts = []
    plain = {
        name: value
        for name, value in report.facts.items()
        if name not in _SHOWN_ELSEWHERE and value not in (None, {}, [], "")
    }
    shallow = {name: value for name, value in plain.items() if not _is_deep(value)}
    deep = {name: value for name, value in plain.items() if _is_deep(value)}
    if shallow:
        parts.append(definitions(shallow))
    if report.checks:
        lines = [
            (check.name, "passed" if check.passed else "failed", check.describe())
            for check in report.checks
        ]
        failed = [place for place, check in enumerate(report.checks) if not check.passed]
        made = table(["Check", "Verdict", "What was found"], lines, failed=failed)
        parts.append(details(f"All {len(lines)} checks", made))
    for name, value in deep.items():
        parts.append(details(name, _as_json(value)))
    if report.plan is not None:
        parts.append(details("The plan", _as_json(report.plan)))
    parts.append(details("Versions", definitions(versions())))
    return "".join(parts)


def _is_deep(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values())


def _as_json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(jsonable(value), indent=1, ensure_ascii=False))}</pre>"


def _footer() -> str:
    made = versions().get("normconv", "")
    return f"<footer>Written by normconv {escape(made)}; the same as data: --json.</footer>"
