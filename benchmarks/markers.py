"""Pages of results: tables between markers, and pages that are a table and its command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "fill", "page_of"]

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def fill(page: Path, tables: Mapping[str, Callable[[], list[str]]]) -> None:
    """Put each table between ``<!-- name -->`` and ``<!-- end -->``."""
    text = page.read_text()
    for name, rows in tables.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{page.name} has no marker for {name}")
        text = before + start + "\n".join(rows()) + "\n" + end + rest.partition(end)[2]
    page.write_text(text)


def page_of(
    title: str, text: Sequence[str], command: str, machine: Mapping[str, Any], rows: Sequence[str]
) -> str:
    """Return a page with what was measured, the command, the machine, and the rows of a table."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory GiB']} GiB"
    lines = [f"# {title}", "", *text, "", "```", command, "```", "", f"{where}; {versions}.", ""]
    return "\n".join([*lines, *rows, ""])
