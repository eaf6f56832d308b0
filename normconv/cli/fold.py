"""`normconv fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from normconv.cli.calibrate import DataOptions
from normconv.cli.common import (
    MODEL,
    Opened,
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
from normconv.cli.convert import on_data
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.files import rejected_path, write_json

__all__ = ["fold"]

_TRANSFORMERS = "transformers:"
_LAYOUTS = ("plain", "library")


@command
def fold(
    source: SourceOptions,
    data_options: DataOptions,
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
    freeze_norms: Annotated[
        bool,
        typer.Option("--freeze-norms", help="GroupNorms become constants in the weights; --calib."),
    ] = False,
    calib: Annotated[
        str | None,
        typer.Option("--calib", metavar="DATA", help="Unlabelled inputs to set constants on."),
    ] = None,
    recover: Annotated[
        int,
        typer.Option(
            "--recover", min=0, metavar="STEPS", help="Then teach the result by the model itself."
        ),
    ] = 0,
) -> None:
    """Replace every computed weight by the plain weight it is, prove it, and write the model.

    A folder (SOURCE is transformers:DIR) is written as a folder, loaded again in a fresh process and
    compared before it gets its name. With --freeze-norms the result is near the model, not equal: norms
    that look at each sample become constants that data set.
    """
    if calib is not None and not freeze_norms:
        raise UsageError(Problem("--calib", "goes with --freeze-norms: folding needs no data"))
    to_folder = source.source.startswith(_TRANSFORMERS) and (out is None or out.suffix not in MODEL)
    if to_folder and freeze_norms:
        what = "makes another model than the folder's config.json"
        raise UsageError(Problem("--freeze-norms", what, "write a file: -o NAME.pt"))
    if to_folder:
        _fold_folder(source, out, affine=affine, strict=strict, layout=layout)
        return
    if layout != "plain":
        raise UsageError(Problem("--layout", "goes with transformers:DIR and a folder as --out"))
    path = out_path(source.source, ".folded.pt", out)
    check_outputs(
        (source.source, calib, data_options.held_out),
        ("--out", path, MODEL),
        ("the report", report_path(path), (".json",)),
    )
    opened = source.open()
    if freeze_norms:
        _freeze(source, data_options, opened, path, calib, recover)
        return
    if recover or data_options.held_out or data_options.plot:
        raise UsageError("--recover, --held-out and --plot go with --freeze-norms --calib DATA")
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


def _freeze(
    source: SourceOptions,
    options: DataOptions,
    opened: Opened,
    path: Path,
    calib: str | None,
    recover: int,
) -> None:
    if calib is None:
        what = "constants in place of a sample's statistics are set on data"
        raise UsageError(Problem("--freeze-norms", what, "add --calib DATA: a few hundred inputs"))
    with (
        reporting(path, opened.describe),
        on_data(options, calib, recover, opened, source.as_json) as (placed, data),
    ):
        from normconv.api import freeze_norms

        model, report = freeze_norms(
            placed.model,
            example_inputs=placed.inputs.args,
            example_kwargs=placed.inputs.kwargs,
            **data,
        )
    report = opened.describe(report)
    report = save_or_reject(model.cpu(), report, path, opened)
    files = {"model": str(path), "report": str(report_path(path)), **options.draw(report)}
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
