"""Tables, lists and the style of the HTML report. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["STYLE", "definitions", "details", "number", "section", "size", "table", "told"]

STYLE = """
:root { color-scheme: light dark;
  --text: #1a1f27; --dim: #57606c; --ground: #ffffff; --card: #f5f7f9; --rule: #d5dae0;
  --good: #116b3d; --good-ground: #e3f4ea; --bad: #a81d26; --bad-ground: #fbe7e7;
  --note: #7a4d00; --note-ground: #fff4dc;
  --c0: #0072b2; --c1: #c05000; --c2: #00795a; --c3: #a8487f; --c4: #8a6d00; }
@media (prefers-color-scheme: dark) { :root {
  --text: #e6e9ed; --dim: #a3acb7; --ground: #14181d; --card: #1d232a; --rule: #38414b;
  --good: #6fd39b; --good-ground: #16301f; --bad: #ff8f8f; --bad-ground: #3b1a1c;
  --note: #f2c46d; --note-ground: #33280f;
  --c0: #56b4e9; --c1: #ff9248; --c2: #35c9a0; --c3: #e597c2; --c4: #e0c04a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 62rem; color: var(--text);
  background: var(--ground); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .75rem; overflow-wrap: anywhere; line-height: 1.25; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.verdict { max-width: none; border-left: 5px solid; border-radius: 4px; padding: .6rem .9rem;
  font-size: 1.05rem; }
.verdict strong { font-size: 1.15rem; }
.good { color: var(--good); background: var(--good-ground); }
.bad-verdict { color: var(--bad); background: var(--bad-ground); }
.neutral { color: var(--text); background: var(--card); border-color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin: .9rem 0 0; }
.tiles > div { background: var(--card); border-radius: 6px; padding: .7rem .9rem; }
.tiles dt { color: var(--dim); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.tiles .more { display: block; color: var(--dim); font-size: .85rem; font-weight: 400; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .4rem 0; }
.facts dt { color: var(--dim); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
th, td { text-align: left; padding: .28rem .7rem .28rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; }
th:last-child, td:last-child { white-space: normal; min-width: 6rem; padding-right: 0; }
thead th { border-bottom-width: 2px; white-space: nowrap; }
tbody th { font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.failed th, tr.failed td { color: var(--bad); }
ul.notes { padding: .5rem .9rem .5rem 1.9rem; margin: .4rem 0; color: var(--note);
  background: var(--note-ground); border-radius: 4px; }
ul.failures { padding-left: 1.2rem; } ul.failures li { margin: .4rem 0; }
details { margin: .6rem 0; border-top: 1px solid var(--rule); padding-top: .5rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); padding: .7rem; border-radius: 4px; font-size: .8rem; }
figure { margin: .6rem 0; } figcaption { color: var(--dim); font-size: .88rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--text); font-size: 12px; } svg text.value { fill: var(--dim); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; } svg .mark { stroke: var(--text); stroke-width: 2; }
svg .line.limit { stroke: var(--dim); stroke-dasharray: 5 4; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .bar.bad { fill: var(--bad); } .edge { stroke: var(--bad); stroke-width: 2; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .line.c4 { stroke: var(--c4); }
.keys { color: var(--dim); font-size: .88rem; }
.keys > span { white-space: nowrap; margin-right: 1.2em; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
.key.c0 { background: var(--c0); } .key.c1 { background: var(--c1); } .key.c2 { background: var(--c2); }
.key.c3 { background: var(--c3); } .key.c4 { background: var(--c4); }
.key.limit { background: none; border-top: 2px dashed var(--dim); height: 0; width: 1.4em;
  vertical-align: .25em; }
footer { margin-top: 2.5rem; color: var(--dim); font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  tr, figure, .tiles > div { break-inside: avoid; } .scroll { overflow: visible; }
  th, td { white-space: normal; overflow-wrap: anywhere; }
  .verdict, .tiles > div, .bar, .key, .notes { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; } }
""".strip()

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def number(value: float | None, form: str = ".1e") -> str:
    """Write a number; nothing for None.

    >>> number(1.42e-6), number(None), number(float("nan"))
    ('1.4e-06', '', 'not a number')
    """
    if value is None:
        return ""
    value = float(value)
    return "not a number" if math.isnan(value) else format(value, form)


def size(count: int | None) -> str:
    """Write a size in bytes.

    >>> size(46750379), size(512), size(None)
    ('44.6 MiB', '512 bytes', '–')
    """
    if count is None:
        return "–"
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} bytes"


def told(value: Any) -> str:
    """Write a fact as one line.

    >>> told({"a": 1, "b": [2, 3]}), told([2, 3, 8]), told(0.123456)
    ('a 1, b 2, 3', '2, 3, 8', '0.123')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {told(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(told(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    numbers: Sequence[int] = (),
    failed: Sequence[int] = (),
) -> str:
    """Make a table whose first column heads its rows.

    Args:
        columns: their heads.
        rows: texts, one for each column.
        caption: above it.
        numbers: the columns that are set to the right.
        failed: the rows that are set as failures.

    >>> "&lt;script&gt;" in table(["site"], [["<script>"]])
    True
    """
    bad = set(failed)

    def cell(tag: str, index: int, text: str, scope: str = "") -> str:
        kind = ' class="n"' if index in numbers else ""
        return f"<{tag}{kind}{scope}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, name, ' scope="col"') for i, name in enumerate(columns))
    lines = []
    for place, row in enumerate(rows):
        cells = [
            cell("td", i, text) if i else cell("th", i, text, ' scope="row"')
            for i, text in enumerate(row)
        ]
        kind = ' class="failed"' if place in bad else ""
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(lines)
    return (
        f'<div class="scroll"><table>{above}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def definitions(facts: Mapping[str, Any]) -> str:
    """Make a list of names and what they stand for."""
    lines = (f"<dt>{escape(n)}</dt><dd>{escape(told(v))}</dd>" for n, v in facts.items())
    return f'<dl class="facts">{"".join(lines)}</dl>'


def details(summary: str, inside: str) -> str:
    """Make a part that opens when it is asked for; `inside` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def section(title: str, inside: str) -> str:
    """Make a section; `inside` is HTML. Nothing for nothing."""
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""
