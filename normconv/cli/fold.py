"""`normconv fold`."""

from __future__ import annotations

from typing import Annotated

import typer

from normconv.cli.common import (
    MODEL,
    Out,
    SourceOptions,
    check_outputs,
    command,
    emit,
    out_path,
    report_path,
    save_or_reject,
    stage,
)
from normconv.errors import CheckFailed

__all__ = ["fold"]


@command
def fold(
    source: SourceOptions,
    out: Out = None,
    affine: Annotated[
        bool,
        typer.Option("--affine", help="Also fold channel affines into neighbours where exact."),
    ] = False,
) -> None:
    """Replace every weight norm by the plain weight it computes, prove it, and write the model."""
    path = out_path(source.source, ".folded.pt", out)
    check_outputs(
        source.source, ("--out", path, MODEL), ("the report", report_path(path), (".json",))
    )
    opened = source.open()
    args, kwargs = opened.inputs.args, opened.inputs.kwargs
    with stage("fold and prove", as_json=source.as_json):
        from normconv.folding import fold as fold_model
        from normconv.proof import prove

        inputs = {"example_inputs": args, "example_kwargs": kwargs} if affine else {}
        folded, report = fold_model(opened.model, **inputs)  # type: ignore[arg-type]
        proof = prove(opened.model, folded, (), args, kwargs)
    report = report.extended(checks=proof.checks, facts=proof.facts, notes=proof.notes)
    report = opened.describe(report)
    save_or_reject(folded, report, path)
    if not report.passed:
        raise CheckFailed(report)
    files = {"model": str(path), "report": str(report_path(path))}
    emit(report.extended(facts={"written": files}), as_json=source.as_json)
