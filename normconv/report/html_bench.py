"""The part of the HTML report that shows timings: bars, ratios, sizes, what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from normconv.report.html_parts import definitions, number, section, size, table
from normconv.report.svg import Bar, bar_chart

__all__ = ["bench_sections", "fastest"]

Row = Mapping[str, Any]


def fastest(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield for each batch size a title, the model with the least median, and how it compares."""
    rows: Sequence[Row] = facts.get("timings", ())
    for batch in dict.fromkeys(row["batch_size"] for row in rows):
        best = min(
            (row for row in rows if row["batch_size"] == batch), key=lambda row: row["latency_ms"]
        )
        name = f"{best['model']} on {best['backend']}"
        more = f"{best['latency_ms']:.3g} ms a call, {best['throughput']:.4g} samples/s"
        yield f"Fastest at batch {batch}", name, more


def bench_sections(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections that show what `bench` measured; nothing for another report.

    >>> list(bench_sections({}))
    []
    """
    rows: Sequence[Row] = facts.get("timings", ())
    if not rows:
        return
    drawn = "".join(_bars(rows, batch) for batch in dict.fromkeys(r["batch_size"] for r in rows))
    yield section("Latency", drawn)
    yield section("Timings", _timings(rows))
    models: Mapping[str, Row] = facts.get("models", {})
    yield section("Models", _models(models))
    absent: Sequence[Row] = facts.get("absent", ())
    missing = [(row["what"], row["reason"]) for row in absent]
    yield section("Not measured", table(["What", "Why"], missing) if missing else "")
    yield section("Machine", definitions(facts.get("machine", {})))


def _bars(rows: Sequence[Row], batch: int) -> str:
    here = [row for row in rows if row["batch_size"] == batch]
    names = list(dict.fromkeys(row["model"] for row in rows))
    bars = [
        Bar(
            f"{row['model']} on {row['backend']}",
            row["latency_ms"],
            f"{row['latency_ms']:.3g} ms (×{row['ratio']:.2f})",
            mark=row["p95_ms"],
            group=names.index(row["model"]),
        )
        for row in here
    ]
    title = f"Median milliseconds of a call at batch {batch}"
    drawing = bar_chart(bars, title=title, marked="the 95th percentile")
    told = f"{title}; the tick is the 95th percentile. In brackets the ratio to {_firsts(here)}."
    return f"<figure>{drawing}<figcaption>{escape(told)}</figcaption></figure>"


def _firsts(rows: Sequence[Row]) -> str:
    return " or ".join(dict.fromkeys(row["ratio_to"] for row in rows))


def _timings(rows: Sequence[Row]) -> str:
    columns = [
        "Model",
        "Backend",
        "Batch",
        "Median ms",
        "p95 ms",
        "Samples/s",
        "Ratio",
        "Quartiles",
        "Load ms",
        "Peak memory",
        "Nodes",
    ]
    lines = []
    for row in rows:
        low, high = row["ratio_quartiles"]
        nodes = row.get("nodes_by_provider") or {}
        memory = row["peak_bytes"] if row["device_bytes"] is None else row["device_bytes"]
        lines.append(
            (
                row["model"],
                row["backend"],
                str(row["batch_size"]),
                f"{row['latency_ms']:.3g}",
                f"{row['p95_ms']:.3g}",
                f"{row['throughput']:.4g}",
                f"{row['ratio']:.3f}",
                f"{low:.3f}–{high:.3f}",
                number(row["load_ms"], ".0f"),
                size(memory),
                ", ".join(f"{count} {provider}" for provider, count in nodes.items()),
            )
        )
    turns = {row["turns"] for row in rows}
    told = (
        f"Models took turns, {min(turns)} or more at each batch size; a ratio is the median over the "
        "turns. Memory is what loading and one call take beyond what was held before."
    )
    return table(columns, lines, caption=told, numbers=range(2, 10))


def _models(models: Mapping[str, Row]) -> str:
    def count(value: Any) -> str:
        return "–" if value is None else str(value)

    lines = [
        (
            name,
            about["form"],
            size(about["bytes"]),
            count(about["nodes"]),
            count(about["norm_nodes"]),
            count(about["weight_arithmetic"]),
        )
        for name, about in models.items()
    ]
    columns = ["Model", "What it is", "Size", "Nodes", "Norms", "Weight arithmetic"]
    return table(columns, lines, numbers=range(2, 6)) if lines else ""
