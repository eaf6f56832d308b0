"""`--report`: what a command reports, also written as an HTML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer

from normconv.report import Report
from normconv.report.html import write_html

__all__ = ["Html", "is_main_process", "page_wanted", "write_page"]

Html = Annotated[
    Path | None,
    typer.Option("--report", metavar="HTML", help="Also write the report as one HTML file."),
]

#: Where the running command writes its report.
_WANTED: ContextVar[Path | None] = ContextVar("_WANTED", default=None)


def is_main_process() -> bool:
    """Say whether this process prints and writes: of several that were started together, the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def page_wanted(path: Path | None) -> Iterator[None]:
    """Let what is reported meanwhile be written to `path`."""
    token = _WANTED.set(path)
    try:
        yield
    finally:
        _WANTED.reset(token)


def write_page(report: Report) -> None:
    """Write a report where `--report` says, if it does.

    Raises:
        UsageError: nothing can be written there.
    """
    path = _WANTED.get()
    if path is not None and is_main_process():
        write_html(report, path)
