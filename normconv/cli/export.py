"""`normconv export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconv.cli.common import (
    At,
    Out,
    Provider,
    SourceOptions,
    check_outputs,
    command,
    emit,
    out_path,
    stage,
)

__all__ = ["export"]


@command
def export(
    source: SourceOptions,
    out: Out = None,
    opset: Annotated[int | None, typer.Option("--opset", help="18 to 20; ort-cuda to 21.")] = None,
    runtime: Annotated[
        str,
        typer.Option("--runtime", help="What it is for: generic, ort-cpu, ort-cuda or tensorrt."),
    ] = "generic",
    at: At = "",
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="NAME", help="This method, not forward; --input is then its input."
        ),
    ] = "",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="fp32, fp16 or bf16; norms, inputs, outputs stay fp32."),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch/--static", help="Leave the batch axis free.")
    ] = True,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            "--dynamic",
            metavar="AXIS=NAME",
            help="More free axes and their names: 0=batch,2=frames, or x:2=frames; repeatable.",
        ),
    ] = None,
    provider: Provider = None,
    golden: Annotated[
        Path | None,
        typer.Option("--golden", help="Also write inputs, float64 outputs and bounds: an .npz."),
    ] = None,
) -> None:
    """Fold a model, export it to ONNX, and compare the file with the model in ONNX Runtime."""
    path = out_path(source.source, ".onnx", out)
    check_outputs(source.source, ("--out", path, (".onnx",)), ("--golden", golden, (".npz",)))
    opened = source.open()
    with stage(f"fold, export and check {path}", as_json=source.as_json):
        from normconv.deploy import export_onnx
        from normconv.deploy.axes import parse_axes

        report = export_onnx(
            opened.model,
            path,
            example_inputs=opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
            dynamic_batch=dynamic_batch,
            dynamic=parse_axes(dynamic or ()),
            opset=opset,
            runtime=runtime,
            at=at,
            method=method,
            dtype=dtype,
            providers=None if provider is None else (provider,),
            golden=golden,
            origin=source.source,
        )
    emit(opened.describe(report).extended(facts={"written": str(path)}), as_json=source.as_json)
