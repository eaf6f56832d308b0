"""The part of the HTML report that shows `verify` on several backends: error, bound and noise floor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from normconv.report.html_parts import number, section, table
from normconv.report.svg import Bar, bar_chart

__all__ = ["backend_sections"]

Row = Mapping[str, Any]


def backend_sections(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections that show errors by backend; nothing for another report.

    >>> list(backend_sections({}))
    []
    """
    backends: Mapping[str, Row] = facts.get("backends", {})
    worst = {name: _worst(about.get("outputs", {})) for name, about in backends.items()}
    rows = {name: found for name, found in worst.items() if found is not None}
    if not rows:
        return
    yield section("Error by backend", _bars(rows) + _table(rows, backends, facts))
    absent: Mapping[str, str] = facts.get("absent", {})
    made = table(["Backend", "Why"], list(absent.items())) if absent else ""
    yield section("Not judged", made)


def _worst(outputs: Mapping[str, Row]) -> tuple[str, Row] | None:
    """The output that comes nearest to its bound, or passes it furthest; NaN is further than all."""

    def nearness(item: tuple[str, Row]) -> float:
        error, bound = float(item[1]["error"]), float(item[1]["bound"])
        if math.isnan(error) or math.isnan(bound):
            return math.inf
        return error / bound if bound else math.copysign(math.inf, error) if error else 0.0

    return max(outputs.items(), key=nearness, default=None)


def _bars(rows: Mapping[str, tuple[str, Row]]) -> str:
    bars = [
        Bar(
            name,
            float(row["error"]),
            f"{number(float(row['error']))} of {number(float(row['bound']))}",
            mark=float(row["bound"]),
            group=place,
            failed=not float(row["error"]) <= float(row["bound"]),
        )
        for place, (name, (_, row)) in enumerate(rows.items())
    ]
    title = "Relative error (rel-L2) of the output that comes nearest to its bound, by backend"
    drawing = bar_chart(bars, title=title, log=True, marked="the bound")
    return f"<figure>{drawing}<figcaption>{escape(title)}; the tick is the bound.</figcaption></figure>"


def _table(
    rows: Mapping[str, tuple[str, Row]], backends: Mapping[str, Row], facts: Mapping[str, Any]
) -> str:
    lines = []
    for name, (output, row) in rows.items():
        nodes = backends[name].get("nodes_by_provider") or {}
        agreement = row.get("top1")
        lines.append(
            (
                name,
                output,
                str(row["dtype"]),
                number(float(row["error"])),
                number(float(row["bound"])),
                number(float(row["floor"])) if "floor" in row else "–",
                "–" if agreement is None else f"{agreement:.1%} of {row['top1_rows']}",
                ", ".join(f"{count} {provider}" for provider, count in nodes.items()),
            )
        )
    columns = [
        "Backend",
        "Output",
        "Dtype",
        "Error",
        "Bound",
        "Unconverted model there",
        "Same top-1",
        "Nodes",
    ]
    failed = [place for place, line in enumerate(rows.values()) if not _within(line[1])]
    told = f"Errors are against a float64 run. TF32 is {facts.get('TF32', 'off')}."
    return table(columns, lines, caption=told, numbers=range(3, 7), failed=failed)


def _within(row: Row) -> bool:
    return float(row["error"]) <= float(row["bound"])
