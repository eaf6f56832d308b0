"""Writing what a command made: model, report and certificate, or what was rejected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from normconv.cli.pages import is_main_process
from normconv.errors import CheckFailed
from normconv.files import atomic_path, rejected_path, write_json
from normconv.report import Report

if TYPE_CHECKING:
    from torch import nn

    from normconv.cli.common import Opened

__all__ = ["report_path", "reporting", "save_or_reject"]


def save_or_reject(
    model: nn.Module, report: Report, path: Path, opened: Opened | None = None
) -> Report:
    """Write model and report under their names, or, where a check failed, as ``NAME.rejected``.

    A rejected pair leaves an older good pair untouched. A good one gets a certificate.

    Args:
        model: what was made.
        report: what was found.
        path: the model's file.
        opened: what it was made from.

    Returns:
        The report, with what was written besides.
    """
    from normconv.sources import save

    if not is_main_process():
        return report
    document = report_path(path)
    if report.passed:
        from normconv.deploy.certify import certify_module

        save(model, path)
        write_json(document, report.to_dict())
        made_from = (None, None) if opened is None else (opened.model, opened.source)
        return certify_module(path, report, model, *made_from)
    with atomic_path(rejected_path(path)) as temporary:
        made = temporary.with_name(path.name)
        save(model, made)
        os.replace(made, temporary)
    write_json(rejected_path(document), report.to_dict())
    return report


def report_path(path: Path) -> Path:
    """Name the JSON beside a model file: ``model.wn.pt`` has ``model.wn.json``."""
    return path.with_suffix(".json")


@contextmanager
def reporting(path: Path, describe: Callable[[Report], Report]) -> Iterator[None]:
    """Keep what a failed check rejected, then let the error go on."""
    try:
        yield
    except CheckFailed as error:
        error.report = describe(error.report)
        if error.model is not None:
            save_or_reject(error.model, error.report, path)  # type: ignore[arg-type]
        raise
