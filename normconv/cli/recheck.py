"""`normconv verify --certificate`: what runs on a serving machine, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconv.cli.common import emit, stage
from normconv.errors import CheckFailed, UsageError

__all__ = ["RUNTIMES", "Certificate", "GoldenFile", "Runtime", "verify_certified"]

Certificate = Annotated[
    Path | None,
    typer.Option(
        "--certificate", metavar="JSON", help="Check a certified file again, without torch."
    ),
]
GoldenFile = Annotated[
    Path | None,
    typer.Option("--golden", metavar="NPZ", help="Its golden data, where they lie elsewhere."),
]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", help="What runs a certified file: ort-cpu, ort-cuda, ort-tensorrt."),
]

#: The runtimes that run a certified file, and the provider each stands for.
RUNTIMES = {"ort-cpu": "cpu", "ort-cuda": "cuda", "ort-tensorrt": "tensorrt"}


def verify_certified(
    certificate: Path | None,
    golden: Path | None,
    runtime: str | None,
    source: str,
    *,
    as_json: bool,
) -> None:
    """Check a certificate again and print what was found.

    Raises:
        CheckFailed: something is not as certified.
        UsageError: an unknown runtime, or a model beside the certificate.
    """
    if certificate is None:
        raise UsageError("--golden and --runtime go with --certificate NAME.certificate.json")
    if source:
        raise UsageError(f"--certificate names its own files: leave {source} out")
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"--runtime {runtime}: a certified file runs on {', '.join(RUNTIMES)}")
    with stage(f"check {certificate}", as_json=as_json):
        from normconv.recheck import verify_certificate

        provider = None if runtime is None else RUNTIMES[runtime]
        report = verify_certificate(certificate, golden=golden, provider=provider)
    if not report.passed:
        raise CheckFailed(report)
    emit(report, as_json=as_json)
