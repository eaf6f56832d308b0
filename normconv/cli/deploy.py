"""`normconv export` and `normconv verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    out_path,
    stage,
)
from normconv.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export", "verify"]

Provider = Annotated[
    str | None, typer.Option("--provider", help="cpu or cuda; the best there is by default.")
]


@command
def export(
    source: Source,
    out: Out = None,
    opset: Annotated[int | None, typer.Option("--opset", help="18 to 20.")] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch/--static", help="Leave the batch axis free.")
    ] = True,
    provider: Provider = None,
    model: ModelSpec = None,
    model_arg: ModelArg = None,
    key: Key = None,
    trust: Trust = None,
    random_weights: RandomWeights = False,
    input_: Input = None,
    as_json: Json = False,
) -> None:
    """Fold a model, export it to ONNX, and compare the file with the model in ONNX Runtime."""
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
    path = out_path(source, ".onnx", out)
    with stage(f"fold, export and check {path}", as_json=as_json):
        from normconv.deploy import export_onnx

        report = export_onnx(
            opened.model,
            path,
            example_inputs=opened.inputs.args,
            example_kwargs=opened.inputs.kwargs,
            dynamic_batch=dynamic_batch,
            opset=opset,
            providers=None if provider is None else (provider,),
        )
    emit(opened.describe(report).extended(facts={"written": str(path)}), as_json=as_json)


@command
def verify(
    reference: Source,
    candidate: Annotated[
        str, typer.Argument(help="A model as above, an .onnx or a .pt2 file.", show_default=False)
    ],
    provider: Provider = None,
    min_agreement: Annotated[
        float | None,
        typer.Option("--min-agreement", help="The least share of equal top-1 answers, 0 to 1."),
    ] = None,
    model: ModelSpec = None,
    model_arg: ModelArg = None,
    key: Key = None,
    trust: Trust = None,
    random_weights: RandomWeights = False,
    input_: Input = None,
    as_json: Json = False,
) -> None:
    """Compare two models on the same inputs: what the second computes against the first.

    Either may be a model, an .onnx or a .pt2 file. A file as the reference needs --input.
    """
    opened = _reference(
        reference,
        model=model,
        model_arg=model_arg,
        key=key,
        trust=trust,
        random_weights=random_weights,
        input_=input_,
        as_json=as_json,
    )
    with stage(f"compare with {candidate}", as_json=as_json):
        from normconv.deploy import verify as verify_models

        report = verify_models(
            Path(reference) if _is_program(reference) else opened.model,
            _candidate(candidate, model, model_arg, key, trust),
            (opened.inputs.args, opened.inputs.kwargs),
            provider=provider,
            min_agreement=min_agreement,
        )
    report = opened.describe(report)
    if not report.passed:
        raise CheckFailed(report)
    emit(report, as_json=as_json)


def _is_program(path: str) -> bool:
    return Path(path).suffix.lower() in (".onnx", ".pt2")


def _reference(reference: str, **options: Any) -> Opened:
    """Open the reference; one that is no module stands in the report by its file."""
    if not _is_program(reference):
        return open_model(reference, **options)
    if options["input_"] is None:
        raise UsageError(f"{reference} does not say its inputs here: pass --input 2x3x224x224")
    from torch import nn

    from normconv.sources import Loaded, example_inputs

    nothing = nn.Identity()
    inputs = example_inputs(nothing, options["input_"], source=reference)
    return Opened(Loaded(nothing, {"source": reference}, ()), inputs, reference)


def _candidate(
    candidate: str,
    model: str | None,
    model_arg: list[str] | None,
    key: str | None,
    trust: list[str] | None,
) -> nn.Module | Path:
    if _is_program(candidate):
        return Path(candidate)
    from normconv.sources import load, parse_model_args

    checkpoint: dict[str, Any] = {}
    if Path(candidate).suffix.lower() == ".safetensors":
        checkpoint = {"model": model, "model_args": parse_model_args(model_arg or []), "key": key}
    return load(candidate, trust=tuple(trust or ()), **checkpoint)
