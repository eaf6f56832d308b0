"""`normconv verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normconv.cli.common import (
    Opened,
    Provider,
    ReferenceOptions,
    SourceOptions,
    command,
    emit,
    stage,
)
from normconv.cli.recheck import Certificate, GoldenFile, Runtime, verify_certified
from normconv.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["verify"]


@command
def verify(
    source: ReferenceOptions,
    candidate: Annotated[
        str, typer.Argument(help="A model as above, an .onnx or a .pt2 file.", show_default=False)
    ] = "",
    provider: Provider = None,
    min_agreement: Annotated[
        float | None,
        typer.Option("--min-agreement", help="The least share of equal top-1 answers, 0 to 1."),
    ] = None,
    certificate: Certificate = None,
    golden: GoldenFile = None,
    runtime: Runtime = None,
) -> None:
    """Compare two models on the same inputs: what the second computes against the first.

    Either may be a model, an .onnx or a .pt2 file. A file as the reference needs --input. With
    --certificate there is no model: a certified file is checked again, without torch.
    """
    if certificate is not None or golden is not None or runtime is not None:
        verify_certified(certificate, golden, runtime, source.source, as_json=source.as_json)
        return
    if not source.source or not candidate:
        raise UsageError("name two models to compare, or --certificate NAME.certificate.json")
    opened = _reference(source)
    with stage(f"compare with {candidate}", as_json=source.as_json):
        from normconv.deploy import verify as verify_models

        report = verify_models(
            Path(source.source) if _is_program(source.source) else opened.model,
            _candidate(candidate, source),
            (opened.inputs.args, opened.inputs.kwargs),
            provider=provider,
            min_agreement=min_agreement,
        )
    report = opened.describe(report)
    if not report.passed:
        raise CheckFailed(report)
    emit(report, as_json=source.as_json)


def _is_program(path: str) -> bool:
    return Path(path).suffix.lower() in (".onnx", ".pt2")


def _reference(source: SourceOptions) -> Opened:
    """Open the reference; one that is no module stands in the report by its file."""
    if not _is_program(source.source):
        return source.open()
    if source.input_ is None:
        raise UsageError(f"{source.source} needs example inputs: pass --input 2x3x224x224")
    from torch import nn

    from normconv.sources import Loaded, example_inputs

    nothing = nn.Identity()
    inputs = example_inputs(nothing, source.input_, source=source.source)
    return Opened(Loaded(nothing, {"source": source.source}, ()), inputs, source.source)


def _candidate(candidate: str, source: SourceOptions) -> nn.Module | Path:
    if _is_program(candidate):
        return Path(candidate)
    from normconv.sources import load

    checkpoint = source.checkpoint if Path(candidate).suffix.lower() == ".safetensors" else {}
    return load(candidate, trust=tuple(source.trust or ()), **checkpoint)
