"""`normconv fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

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
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.files import rejected_path, write_json

__all__ = ["fold"]

_TRANSFORMERS = "transformers:"
_LAYOUTS = ("plain", "library")


@command
def fold(
    source: SourceOptions,
    out: Out = None,
    affine: Annotated[
        bool,
        typer.Option("--affine", help="Also fold channel affines into neighbours where exact."),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse a reparametrisation that is not known; exit 3."),
    ] = False,
    standalone: Annotated[
        bool | None,
        typer.Option(
            "--standalone/--no-standalone",
            help="Leave no class of normconv in the file; without either: where that can be.",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="plain|library",
            help="Of a transformers folder: plain weights, or g and v where the class has them.",
        ),
    ] = "plain",
) -> None:
    """Replace every computed weight by the plain weight it is, prove it, and write the model.

    A folder (SOURCE is transformers:DIR) is written as a folder, loaded again in a fresh process and
    compared before it gets its name.
    """
    if source.source.startswith(_TRANSFORMERS) and (out is None or out.suffix not in MODEL):
        _fold_folder(source, out, affine=affine, strict=strict, layout=layout)
        return
    if layout != "plain":
        raise UsageError(Problem("--layout", "goes with transformers:DIR and a folder as --out"))
    path = out_path(source.source, ".folded.pt", out)
    check_outputs(
        source.source, ("--out", path, MODEL), ("the report", report_path(path), (".json",))
    )
    opened = source.open()
    args, kwargs = opened.inputs.args, opened.inputs.kwargs
    with stage("fold and prove", as_json=source.as_json):
        from normconv.deploy.folded_folder import refuse_left
        from normconv.folding import fold as fold_model
        from normconv.proof import prove

        inputs: dict[str, Any] = (
            {"example_inputs": args, "example_kwargs": kwargs} if affine else {}
        )
        needs: tuple[str, ...] = ()
        try:
            folded, report = fold_model(opened.model, standalone=standalone is not False, **inputs)
        except UsageError as error:
            if standalone is not None:
                raise
            folded, report = fold_model(opened.model, **inputs)
            needs = tuple(f"the file loads only with normconv: {each}" for each in error.problems)
        if strict:
            refuse_left(report)
        proof = prove(opened.model, folded, (), args, kwargs)
    report = report.extended(checks=proof.checks, facts=proof.facts, notes=(*needs, *proof.notes))
    report = opened.describe(report)
    report = save_or_reject(folded, report, path, opened)
    if not report.passed:
        raise CheckFailed(report)
    files = {"model": str(path), "report": str(report_path(path))}
    emit(report.extended(facts={"written": files}), as_json=source.as_json)


def _fold_folder(
    source: SourceOptions, out: Path | None, *, affine: bool, strict: bool, layout: str
) -> None:
    folder = Path(source.source.removeprefix(_TRANSFORMERS))
    out = out or Path(f"{folder.resolve().name}.folded")
    if layout not in _LAYOUTS:
        raise UsageError(Problem("--layout", f"{layout!r} is neither of {', '.join(_LAYOUTS)}"))
    if affine or source.model_arg:
        option = "--affine" if affine else "--model-arg"
        what = "makes another model than the folder's config.json"
        raise UsageError(Problem(option, what, "write a file: -o NAME.pt"))
    from normconv.deploy.folded_folder import check_folder_out, fold_folder

    check_folder_out(folder, out)
    opened = source.open()
    args, kwargs = opened.inputs.args, opened.inputs.kwargs
    with stage("fold, write, load again and prove", as_json=source.as_json):
        try:
            report = fold_folder(
                opened.model,
                folder,
                out,
                args,
                kwargs,
                layout=cast(Any, layout),
                strict=strict,
            )
        except CheckFailed as error:
            error.report = opened.describe(error.report)
            write_json(rejected_path(out.with_name(f"{out.name}.json")), error.report.to_dict())
            raise
    emit(opened.describe(report), as_json=source.as_json)
