"""`normconv plan` and `normconv convert`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normconv.cli.calibrate import DataOptions, progress_of
from normconv.cli.common import (
    MODEL,
    At,
    Opened,
    Out,
    SourceOptions,
    check_outputs,
    command,
    emit,
    options_from,
    out_path,
    report_path,
    reporting,
    save_or_reject,
    stage,
)
from normconv.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from normconv.plan import Plan
    from normconv.report import Report

__all__ = ["convert", "on_data", "plan"]


@dataclass(frozen=True)
class RecipeOptions:
    """The options that say what becomes of which site.

    Args:
        to: the target.
        include: globs of sites to convert.
        exclude: globs of sites to keep.
        option: the target's options, NAME=VALUE each.
        strict: refuse when a norm would have to stay.
        drop_unreached: empty the slots of norms that nothing calls.
        at: the submodule whose norms are spoken of.
        layers: which layers are reparametrised.
        insert_after: globs of layers that get a norm after them.
    """

    to: Annotated[
        str | None,
        typer.Option("--to", help="The target: wn, plain, frozen or gn.", show_default="wn"),
    ] = None
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Only these sites; repeatable."),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="GLOB", help="Not these sites; repeatable."),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="An option of the target; repeatable."),
    ] = None
    strict: Annotated[
        bool,
        typer.Option("--strict/--no-strict", help="Refuse when a norm would have to stay."),
    ] = True
    drop_unreached: Annotated[
        bool, typer.Option("--drop-unreached", help="Empty the slots of norms that nothing calls.")
    ] = False
    at: At = ""
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="wn: reparametrise the normed layers, or all."),
    ] = None
    insert_after: Annotated[
        list[str] | None,
        typer.Option("--insert-after", metavar="GLOB", help="gn: new norms there; repeatable."),
    ] = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The same as `make_plan` and `convert` take it."""
        return {
            "include": self.include or (),
            "exclude": self.exclude or (),
            "options": options_from(self.option),
            "strict": self.strict,
            "drop_unreached": self.drop_unreached,
            "at": self.at,
            "layers": self.layers,
            "insert_after": self.insert_after or (),
        }


AllSites = Annotated[bool, typer.Option("--all", help="Print every site, however many.")]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Carry out a plan: a plan file, or the .json of a conversion."),
]


@command
def plan(
    source: SourceOptions,
    recipe: RecipeOptions,
    out: Out = None,
    all_sites: AllSites = False,
) -> None:
    """Decide what would become of every norm; change nothing. With -o the plan is written."""
    check_outputs(source.source, ("--out", out, (".json",)))
    opened = source.open()
    made = _plan(opened, recipe, None, source.as_json)
    if out is not None:
        made.write(out)
    report = opened.describe(made.report("plan"))
    emit(report, as_json=source.as_json, all_sites=all_sites)


@command
def convert(
    source: SourceOptions,
    recipe: RecipeOptions,
    data_options: DataOptions,
    out: Out = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="Also fold and export to this ONNX file.")
    ] = None,
    plan_file: PlanFile = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib", metavar="DATA", help="Unlabelled inputs to calibrate a gn target on."
        ),
    ] = None,
    recover: Annotated[
        int,
        typer.Option(
            "--recover",
            min=0,
            metavar="STEPS",
            help="Then teach it by the original, on more of it.",
        ),
    ] = 0,
    output: Annotated[
        str, typer.Option("--output", help="module keeps the class; graph gives an fx.GraphModule.")
    ] = "module",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write nothing.")
    ] = False,
    all_sites: AllSites = False,
) -> None:
    """Rewrite the norms of a model, prove that it computes the same, and write it.

    Writes MODEL.wn.pt and MODEL.wn.json (plan and report) beside the source, or what -o says.
    """
    if output not in ("module", "graph"):
        raise UsageError(f"--output takes module or graph, not {output!r}")
    said = (recipe.to, *(value for value in recipe.keywords.values() if value is not True))
    if plan_file is not None and any(said):
        raise UsageError(
            "--plan already says what becomes of each site: leave --to, --at and the globs out"
        )
    wanted = _read_plan(plan_file) or recipe.to or "wn"
    name = wanted if isinstance(wanted, str) else "-".join(wanted.targets) or "kept"
    path = out_path(source.source, f".{name}.pt", out)
    check_outputs(
        (source.source, calib, data_options.held_out),
        ("--out", path, MODEL),
        ("the report", report_path(path), (".json",)),
        ("--onnx", onnx, (".onnx",)),
    )
    opened = source.open()
    if dry_run:
        made = _plan(opened, recipe, plan_file, source.as_json)
        report = opened.describe(made.report("plan"))
        emit(report, as_json=source.as_json, all_sites=all_sites)
        return
    with (
        reporting(path, opened.describe),
        stage("convert and prove", as_json=source.as_json or calib is not None),
        on_data(data_options, calib, recover, opened, source.as_json) as (placed, data),
    ):
        from normconv.api import convert as convert_model

        model, report = convert_model(
            placed.model,
            wanted,
            example_inputs=placed.inputs.args,
            example_kwargs=placed.inputs.kwargs,
            output="graph" if output == "graph" else "module",
            **data,
            **recipe.keywords,
        )
    report = opened.describe(report)
    with stage(f"write {path}", as_json=source.as_json):
        report = save_or_reject(model.cpu(), report, path, opened)
    files = {"model": str(path), "report": str(report_path(path)), **data_options.draw(report)}
    if onnx is not None:
        with stage(f"export {onnx}", as_json=source.as_json):
            report = _exported(opened, model, onnx, path, report)
        files["onnx"] = str(onnx)
    emit(report.extended(facts={"written": files}), as_json=source.as_json, all_sites=all_sites)


@contextmanager
def on_data(
    options: DataOptions, calib: str | None, steps: int, opened: Opened, as_json: bool
) -> Iterator[tuple[Opened, dict[str, Any]]]:
    """Open the data there is; give the model where it is computed, and what `convert` takes of this."""
    if calib is None:
        if steps or options.held_out or options.plot:
            raise UsageError("--recover, --held-out and --plot go with --calib DATA")
        yield opened, {"min_agreement": options.min_agreement}
        return
    share = options.join()
    opened = opened.to(share.device)
    with ExitStack() as bars:

        def progress(text: str) -> Any:
            bars.close()  # one bar after the other
            return bars.enter_context(progress_of(text, as_json=as_json))

        lesson = None
        if steps:
            lesson = options.open(calib, opened.model, share, at_least=steps * options.batch)
        yield (
            opened,
            {
                "data": options.open(calib, opened.model, share),
                "held_out": options.open(options.held_out, opened.model, share),
                "min_agreement": options.min_agreement,
                "recover": steps,
                "recover_data": lesson,
                "data_use": options.data_use,
                "cache": options.cache,
                "progress": progress,
            },
        )


def _exported(opened: Opened, model: nn.Module, path: Path, origin: Path, report: Report) -> Report:
    """Export a converted model, saved as `origin`, and put what was found into its report."""
    from normconv.deploy import export_onnx

    exported = export_onnx(
        model,
        path,
        example_inputs=opened.inputs.args,
        example_kwargs=opened.inputs.kwargs,
        origin=origin,
    )
    keep = ("opset", "nodes", "norm_nodes", "bytes")
    facts = {f"onnx {name}": exported.facts[name] for name in keep if name in exported.facts}
    checks = tuple(replace(check, name=f"onnx {check.name}") for check in exported.checks)
    return report.extended(checks=checks, facts=facts, notes=exported.notes)


def _read_plan(path: Path | None) -> Plan | None:
    from normconv.plan import Plan

    return None if path is None else Plan.read(path)


def _plan(opened: Opened, recipe: RecipeOptions, path: Path | None, as_json: bool) -> Plan:
    if (read := _read_plan(path)) is not None:
        return read
    with stage("plan", as_json=as_json):
        from normconv.surgery import make_plan

        return make_plan(
            opened.model,
            recipe.to or "wn",
            example_inputs=opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
            **recipe.keywords,
        )
