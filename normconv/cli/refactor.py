"""`normconv refactor`."""

from __future__ import annotations

from enum import StrEnum
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
    reporting,
    save_or_reject,
    stage,
)

__all__ = ["refactor"]


class Form(StrEnum):
    """What a model can be refactored to."""

    WN = "wn"
    WS = "ws"
    BN = "bn"


@command
def refactor(
    source: SourceOptions,
    to: Annotated[
        Form,
        typer.Option("--to", help="wn, ws: plain weights into gain and v; bn: the original class."),
    ],
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers", metavar="GLOB", help="Which layers, or all; else those of the history."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="SPEC", help="The original, for a model without a history."),
    ] = None,
    out: Out = None,
) -> None:
    """Split plain weights again, or go back to the original class; prove it, and write the model."""
    path = out_path(source.source, f".{to.value}.pt", out)
    check_outputs(
        (source.source, like), ("--out", path, MODEL), ("the report", report_path(path), (".json",))
    )
    opened = source.open()
    with stage("refactor and prove", as_json=source.as_json), reporting(path, opened.describe):
        from normconv.api import refactor as refactor_model

        model, report = refactor_model(
            opened.model,
            to=to.value,
            like=like,
            layers=layers,
            example_inputs=opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
        )
    report = opened.describe(report)
    report = save_or_reject(model, report, path, opened)
    files = {"model": str(path), "report": str(report_path(path))}
    emit(report.extended(facts={"written": files}), as_json=source.as_json)
