"""Tables between markers on a page of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["RESULTS", "fill"]

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def fill(page: Path, tables: Mapping[str, Callable[[], list[str]]]) -> None:
    """Put each table between ``<!-- name -->`` and ``<!-- end -->``."""
    text = page.read_text()
    for name, rows in tables.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{page.name} has no marker for {name}")
        text = before + start + "\n".join(rows()) + end + rest.partition(end)[2]
    page.write_text(text)
