"""`normconv fold`."""

from __future__ import annotations

from typing import Annotated

import typer

from normconv.cli.common import (
    Input,
    Json,
    Key,
    ModelArg,
    ModelSpec,
    Out,
    RandomWeights,
    Source,
    Trust,
    command,
    emit,
    open_model,
    out_path,
    report_path,
    save_or_reject,
    stage,
)
from normconv.errors import CheckFailed

__all__ = ["fold"]


@command
def fold(
    source: Source,
    out: Out = None,
    affine: Annotated[
        bool,
        typer.Option("--affine", help="Also fold channel affines into neighbours where exact."),
    ] = False,
    model: ModelSpec = None,
    model_arg: ModelArg = None,
    key: Key = None,
    trust: Trust = None,
    random_weights: RandomWeights = False,
    input_: Input = None,
    as_json: Json = False,
) -> None:
    """Replace every weight norm by the plain weight it computes, prove it, and write the model."""
    opened = open_model(
        source,
        model=model,
        model_arg=model_arg,
        key=key,
        trust=trust,
        random_weights=random_weights,
        input_=input_,
        as_json=as_json,
    )
    path = out_path(source, ".folded.pt", out)
    args, kwargs = opened.inputs.args, opened.inputs.kwargs
    with stage("fold and prove", as_json=as_json):
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
    emit(report.extended(facts={"written": files}), as_json=as_json)
