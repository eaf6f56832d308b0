"""`normconv audit`."""

from __future__ import annotations

from typing import Annotated

import typer

from normconv.cli.common import SourceOptions, command, emit, stage
from normconv.errors import CheckFailed

__all__ = ["audit"]


@command
def audit(
    source: SourceOptions,
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", metavar="MODE", help="train or eval; repeatable; both without."),
    ] = None,
    batch_axis: Annotated[
        int, typer.Option("--batch-axis", min=0, help="The axis of the inputs with the samples.")
    ] = 0,
    all_sites: Annotated[
        bool, typer.Option("--all", help="Show every finding, however many there are.")
    ] = False,
) -> None:
    """Find every layer through which one sample of a batch sees another."""
    opened = source.open()
    with stage("change one sample, watch the others", as_json=source.as_json):
        from normconv.auditing import MODES
        from normconv.auditing import audit as audit_model

        report = audit_model(
            opened.model,
            opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
            modes=tuple(mode or MODES),
            batch_axis=batch_axis,
        )
    report = opened.describe(report)
    if not report.passed and source.as_json:
        raise CheckFailed(report)
    emit(report, as_json=source.as_json, all_sites=all_sites)
    if not report.passed:  # the report has named every finding: an error would say it all again
        raise typer.Exit(1)
