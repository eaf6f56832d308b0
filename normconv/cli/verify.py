"""`normconv verify`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from normconv.cli.devices import Device, checked_device
from normconv.cli.recheck import Certificate, GoldenFile, Runtime, verify_certified
from normconv.errors import CheckFailed, Problem, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["verify"]

_BATCHES = 4  # of `--data`
_BATCH = 8  # samples

Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="eager, compile, pt2, ort-cpu, ort-cuda, ort-tensorrt, all; repeatable.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=f"Real inputs, {_BATCHES} batches of {_BATCH}: images (folder, .zip), .npz, .pt, "
        ".safetensors, pkg.mod:factory.",
    ),
]


@command
def verify(
    source: ReferenceOptions,
    candidate: Annotated[
        str, typer.Argument(help="A model as above, an .onnx or a .pt2 file.", show_default=False)
    ] = "",
    provider: Provider = None,
    backend: Backends = None,
    data: Data = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Judge with TF32 on, on CUDA.")] = False,
    device: Device = "cpu",
    min_agreement: Annotated[
        float | None,
        typer.Option("--min-agreement", help="The least share of equal top-1 answers, 0 to 1."),
    ] = None,
    certificate: Certificate = None,
    golden: GoldenFile = None,
    runtime: Runtime = None,
) -> None:
    """Compare two models on the same inputs: what the second computes against the first.

    Either may be a model, an .onnx or a .pt2 file. A file as the reference needs --input. Axes that the
    second leaves free are run at other sizes too. With --certificate there is no model: a certified file
    is checked again, without torch.
    """
    if certificate is not None or golden is not None or runtime is not None:
        verify_certified(certificate, golden, runtime, source.source, as_json=source.as_json)
        return
    if not source.source or not candidate:
        raise UsageError("name two models to compare, or --certificate NAME.certificate.json")
    opened = _reference(source)
    batches, origin = _batches(opened, source, data)
    with stage(f"compare with {candidate}", as_json=source.as_json):
        from normconv.deploy import verify as verify_models

        report = verify_models(
            Path(source.source) if _is_program(source.source) else opened.model,
            _candidate(candidate, source, device),
            batches,
            provider=provider,
            backends=backend or None,
            tf32=tf32,
            other_sizes=True,
            min_agreement=min_agreement,
        )
    report = opened.describe(report)
    if origin:
        report = report.extended(facts={"example inputs": origin})
    if not report.passed:
        raise CheckFailed(report)
    emit(report, as_json=source.as_json)


def _batches(opened: Opened, source: SourceOptions, data: str | None) -> tuple[Any, str]:
    """Return real inputs and where they come from, or the example's."""
    if data is None:
        return (opened.inputs.args, opened.inputs.kwargs), ""
    with stage(f"read {data}", as_json=source.as_json):
        from normconv.sources import Transform, open_data

        transform = Transform.of(opened.model)
        found = open_data(data, transform=transform, batch=_BATCH, limit=_BATCHES * _BATCH)
        passes = found() if callable(found) else found
        batches = list(itertools.islice(iter(passes), _BATCHES))
    if not batches:
        raise UsageError(Problem("--data", f"{data} holds no batch"))
    return batches, f"{len(batches)} batches of {data}"


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


def _candidate(candidate: str, source: SourceOptions, device: str) -> nn.Module | Path:
    if _is_program(candidate):
        return Path(candidate)
    from normconv.sources import load

    checkpoint = source.checkpoint if Path(candidate).suffix.lower() == ".safetensors" else {}
    model = load(candidate, trust=tuple(source.trust or ()), **checkpoint)
    return model.to(checked_device(device))
