"""`normconv initialise`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from normconv.cli.calibrate import BatchOptions, Data, progress_of
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
)

__all__ = ["initialise"]


@command
def initialise(
    source: SourceOptions,
    batch_options: BatchOptions,
    data: Data,
    out: Out = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Also a model that looks trained: it starts anew.")
    ] = False,
    v_std: Annotated[
        float | None,
        typer.Option("--v-std", min=0, help="First draw v from N(0, V_STD²); 0.05 in the paper."),
    ] = None,
    dropout: Annotated[
        bool, typer.Option("--dropout", help="With dropout and other noise as in training.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of these draws.")] = 0,
) -> None:
    """Start a weight-normed model with pre-activations of mean 0 and deviation 1, on unlabelled data.

    Writes MODEL.initialised.pt and .json, or what -o says.
    """
    path = out_path(source.source, ".initialised.pt", out)
    check_outputs(
        source.source, ("--out", path, MODEL), ("the report", report_path(path), (".json",))
    )
    share = batch_options.join()
    opened = source.open()
    opened.model.to(share.device)
    batches = batch_options.open(data, opened.model, share)
    with (
        reporting(path, opened.describe),
        progress_of("initialise", as_json=source.as_json) as progress,
    ):
        from normconv.calibration import initialise as initialise_model

        model, report = initialise_model(
            opened.model,
            batches,
            fresh=fresh,
            v_std=v_std,
            dropout=dropout,
            seed=seed,
            data_use=cast(Any, batch_options.data_use),
            progress=progress,
        )
    report = opened.describe(report)
    report = save_or_reject(model.cpu(), report, path, opened)
    files = {"model": str(path), "report": str(report_path(path))}
    emit(report.extended(facts={"written": files}), as_json=source.as_json)
