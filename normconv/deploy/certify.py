"""Writing certificates: what is known of a model file when it is written, sealed and put beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconv.deploy.compare import Reference, compare, paired
from normconv.deploy.fingerprints import (
    file_record,
    initializers_of,
    onnx_files,
    onnx_structure,
)
from normconv.deploy.golden import Golden, write_golden
from normconv.deploy.module_record import (
    class_name,
    module_structure,
    state_records,
    weights_record,
)
from normconv.deploy.parity import backend_errors
from normconv.deploy.provenance import Origin, data_in, data_of, errors_of, known_before
from normconv.deploy.runners import OnnxRunner
from normconv.errors import Problem, UsageError
from normconv.files import atomic_path
from normconv.plan.history import history_of
from normconv.proof.outputs import evaluate
from normconv.report import Check, Report, versions
from normconv.report.certificate import (
    certificate_path,
    write_certificate,
)

__all__ = ["certified", "certify_module", "check_golden_path"]

Record = dict[str, Any]


def check_golden_path(golden: str | os.PathLike[str] | None, path: Path) -> None:
    """Refuse a place for golden data before any work.

    Raises:
        UsageError: it does not end in ``.npz``, or is a folder.
    """
    if golden is None:
        return
    where = Path(golden)
    if where.suffix.lower() != ".npz" or where.is_dir():
        raise UsageError(Problem("golden", f"{where} is no name of an .npz file", "use g.npz"))
    if where.resolve() == path.resolve():
        raise UsageError(Problem("golden", f"{where} is the model's own name"))


@contextmanager
def certified(
    report: Report,
    written: Path,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    providers: Sequence[str | None] = (None,),
    golden: str | os.PathLike[str] | None = None,
    origin: Origin | None = None,
) -> Iterator[Report]:
    """Write the certificate of an ONNX draft beside it, and golden data where they are wanted.

    What fails inside leaves neither. A report with a failed check gets no certificate.

    Args:
        report: what was found of the draft.
        written: the draft.
        model: the original, before folding.
        args: example inputs.
        kwargs: example keyword inputs.
        providers: what to run golden data on.
        golden: the ``.npz`` file to write.
        origin: where the model comes from.

    Yields:
        The report, with the checks of the golden data and what was written.
    """
    with ExitStack() as stack:
        made = None
        if golden is not None and report.passed:
            made, checks = _golden(written, model, args, kwargs, providers)
            report = report.extended(checks=checks)
        if not report.passed:
            yield report
            return
        record = None
        if golden is not None and made is not None:
            place = stack.enter_context(atomic_path(golden))
            write_golden(place, made)
            record = {"file": file_record(place), "bounds": made.bounds}
        artefact = {
            "form": "onnx",
            "files": [file_record(file) for file in onnx_files(written)],
            "tensors": initializers_of(written),
        }
        structure = onnx_structure(written)
        yield _write(written, report, artefact, structure, model, model, origin, record)


def certify_module(
    path: Path,
    report: Report,
    model: nn.Module,
    original: nn.Module | None,
    origin: Origin | None = None,
) -> Report:
    """Write the certificate of a model file, which torch reads, beside it.

    Args:
        path: the file, written already.
        report: what was found.
        model: the model in the file.
        original: what it was made from.
        origin: where that comes from.

    Returns:
        The report, with what was written.
    """
    artefact = {"form": "module", "files": [file_record(path)], "tensors": state_records(model)}
    structure = module_structure(model)
    return _write(path, report, artefact, structure, model, original, origin, None)


# --- the sections --------------------------------------------------------------------------------


def _write(
    path: Path,
    report: Report,
    artefact: Record,
    structure: Record,
    model: nn.Module,
    original: nn.Module | None,
    origin: Origin | None,
    golden: Record | None,
) -> Report:
    before = known_before(origin)
    history = history_of(model)
    plans = [entry["apply"] for entry in history if "apply" in entry]
    own = report.plan if report.plan is not None else before.plan
    sites = [{"verb": report.verb, **asdict(row)} for row in report.sites]
    sections = {
        "artefact": artefact,
        "source": {
            **before.source,
            "class": class_name(original),
            "weights": weights_record(original),
        },
        "origin": before.chain,
        "plan": plans or before.plans or ([own] if own is not None else []),
        "data": data_in(history) or before.data or data_of(report),
        "sites": before.sites + sites,
        "errors": before.errors + [{"verb": report.verb, **row} for row in errors_of(report)],
        "checks": [asdict(check) for check in report.checks],
        "structure": structure,
        "golden": golden,
        "versions": versions(),
    }
    target = certificate_path(path)
    document = write_certificate(target, sections)
    facts: Record = {"certificate": {"file": target.name, "seal": document["seals"]["sha256"]}}
    if golden is not None:
        facts["golden"] = golden["file"]["name"]
    return report.extended(facts=facts, notes=(before.note,) if before.note else ())


# --- golden data ---------------------------------------------------------------------------------


def _golden(
    written: Path,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    providers: Sequence[str | None],
) -> tuple[Golden, tuple[Check, ...]]:
    """Run the original in float64 and the file, and give what the file has to meet from now on."""
    exact = evaluate(model, args, kwargs, dtype=torch.float64)
    reference = Reference(exact, evaluate(model, args, kwargs))
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    bounds: dict[str, float] = {}
    checks: list[Check] = []
    for provider in providers:
        runner = OnnxRunner(written, provider)
        feeds = runner.feeds(args, kwargs)
        given = runner.run(args, kwargs)
        result = compare(given, reference, label=f"{runner.provider} golden ")
        if result.missed:
            forgiven = backend_errors(model, args, kwargs, exact, reference.native, runner.provider)
            result = compare(
                given, reference, label=f"{runner.provider} golden ", backend_errors=forgiven
            )
        checks += result.checks
        inputs = {name: _array(value) for name, value in feeds.items()}
        for name, value in paired(given, exact)[0].items():
            if name in result.facts:
                own = next(own for own, other in given.items() if other is value)
                outputs[own] = _array(exact[name])
                bounds[own] = max(bounds.get(own, 0.0), result.facts[name]["bound"])
    return Golden(inputs, outputs, bounds), tuple(checks)


def _array(value: Tensor) -> Any:
    """Return a tensor as an array; bfloat16, which numpy lacks, as float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
