"""`normconv plan` and `normconv convert`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normconv.cli.common import (
    Input,
    Json,
    Key,
    ModelArg,
    ModelSpec,
    Opened,
    Out,
    RandomWeights,
    Source,
    Trust,
    command,
    emit,
    open_model,
    options_from,
    out_path,
    report_path,
    reporting,
    save_or_reject,
    stage,
)
from normconv.errors import UsageError
from normconv.report import Report

if TYPE_CHECKING:
    from normconv.plan import Plan

__all__ = ["convert", "plan"]

To = Annotated[
    str | None,
    typer.Option("--to", help="The target: wn, plain or frozen.", show_default="wn"),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Only these sites; repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these sites; repeatable.")
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the target; repeatable."),
]
Strict = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Refuse when a norm would have to stay.")
]
DropUnreached = Annotated[
    bool, typer.Option("--drop-unreached", help="Empty the slots of norms that nothing calls.")
]
AllSites = Annotated[bool, typer.Option("--all", help="Print every site, however many.")]


@command
def plan(
    source: Source,
    to: To = None,
    out: Out = None,
    include: Include = None,
    exclude: Exclude = None,
    option: TargetOption = None,
    strict: Strict = True,
    drop_unreached: DropUnreached = False,
    model: ModelSpec = None,
    model_arg: ModelArg = None,
    key: Key = None,
    trust: Trust = None,
    random_weights: RandomWeights = False,
    input_: Input = None,
    all_sites: AllSites = False,
    as_json: Json = False,
) -> None:
    """Decide what would become of every norm; change nothing. With -o the plan is written."""
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
    made = _plan(opened, to, None, include, exclude, option, strict, drop_unreached, as_json)
    if out is not None:
        made.write(out)
    _emit_plan(opened, made, all_sites, as_json)


@command
def convert(
    source: Source,
    to: To = None,
    out: Out = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="Also fold and export to this ONNX file.")
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Carry out a plan: a plan file, or the .json of a conversion."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    option: TargetOption = None,
    strict: Strict = True,
    drop_unreached: DropUnreached = False,
    output: Annotated[
        str, typer.Option("--output", help="module keeps the class; graph gives an fx.GraphModule.")
    ] = "module",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write nothing.")
    ] = False,
    model: ModelSpec = None,
    model_arg: ModelArg = None,
    key: Key = None,
    trust: Trust = None,
    random_weights: RandomWeights = False,
    input_: Input = None,
    all_sites: AllSites = False,
    as_json: Json = False,
) -> None:
    """Rewrite the norms of a model, prove that it computes the same, and write it.

    Writes MODEL.wn.pt and MODEL.wn.json (plan and report) beside the source, or what -o says.
    """
    if output not in ("module", "graph"):
        raise UsageError(f"--output takes module or graph, not {output!r}")
    if plan_file is not None and (to or include or exclude or option):
        raise UsageError(
            "--plan already says what becomes of each site: leave --to and the globs out"
        )
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
    graph = output == "graph"
    if dry_run:
        made = _plan(
            opened, to, plan_file, include, exclude, option, strict, drop_unreached, as_json
        )
        _emit_plan(opened, made, all_sites, as_json)
        return
    report = _convert(
        opened,
        to,
        out,
        onnx,
        plan_file,
        include,
        exclude,
        option,
        strict,
        drop_unreached,
        graph,
        as_json,
    )
    emit(report, as_json=as_json, all_sites=all_sites)


def _convert(
    opened: Opened,
    to: str | None,
    out: Path | None,
    onnx: Path | None,
    plan_file: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    option: list[str] | None,
    strict: bool,
    drop_unreached: bool,
    graph: bool,
    as_json: bool,
) -> Report:
    from normconv.api import convert as convert_model
    from normconv.plan import Plan

    wanted = Plan.read(plan_file) if plan_file is not None else (to or "wn")
    name = wanted.targets[0] if isinstance(wanted, Plan) and wanted.targets else to or "wn"
    path = out_path(opened.source, f".{name}.pt", out)
    with reporting(path, opened.describe), stage("convert and prove", as_json=as_json):
        model, report = convert_model(
            opened.model,
            wanted,
            example_inputs=opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
            include=include or (),
            exclude=exclude or (),
            options=options_from(option),
            strict=strict,
            drop_unreached=drop_unreached,
            output="graph" if graph else "module",
        )
    report = opened.describe(report)
    with stage(f"write {path}", as_json=as_json):
        save_or_reject(model, report, path)
    files = {"model": str(path), "report": str(report_path(path))}
    if onnx is not None:
        with stage(f"export {onnx}", as_json=as_json):
            from normconv.deploy import export_onnx

            exported = export_onnx(
                model, onnx, example_inputs=opened.inputs.args, example_kwargs=opened.inputs.kwargs
            )
        files["onnx"] = str(onnx)
        keep = ("opset", "nodes", "norm_nodes", "file_bytes", "providers")
        facts = {f"onnx {k}": v for k, v in exported.facts.items() if k in keep}
        checks = tuple(replace(c, name=f"onnx {c.name}") for c in exported.checks)
        report = report.extended(checks=checks, facts=facts, notes=exported.notes)
    return report.extended(facts={"written": files})


def _plan(
    opened: Opened,
    to: str | None,
    plan_file: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    option: list[str] | None,
    strict: bool,
    drop_unreached: bool,
    as_json: bool,
) -> Plan:
    from normconv.plan import Plan

    if plan_file is not None:
        return Plan.read(plan_file)
    with stage("plan", as_json=as_json):
        from normconv.surgery import make_plan

        return make_plan(
            opened.model,
            to or "wn",
            example_inputs=opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
            include=include or (),
            exclude=exclude or (),
            options=options_from(option),
            strict=strict,
            drop_unreached=drop_unreached,
        )


def _emit_plan(opened: Opened, made: Plan, all_sites: bool, as_json: bool) -> None:
    report = Report(
        verb="plan",
        subject=made.model,
        target=made.target,
        sites=tuple(step.row() for step in made.steps),
        facts={"capture": made.capture, "actions": made.counts()},
        notes=made.notes,
        plan=made.to_dict(),
    )
    emit(opened.describe(report), as_json=as_json, all_sites=all_sites)
