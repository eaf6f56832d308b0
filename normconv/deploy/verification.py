"""Verifying that one model computes what another does, whichever form each of them has."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normconv.deploy.floors import Floors
from normconv.deploy.forms import Forms, chosen_backends, is_finding, open_file
from normconv.deploy.judging import Judge
from normconv.deploy.runners import FileRunner, Model, Runner, open_runner, tf32_set
from normconv.deploy.truth import Truth
from normconv.errors import NormconvError, Problem, UsageError
from normconv.report import Check, Report

__all__ = ["batches_of", "verify"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def verify(
    reference: Model,
    candidate: Model,
    inputs: Any,
    *,
    provider: str | None = None,
    backends: Sequence[str] | None = None,
    tf32: bool = False,
    other_sizes: bool = False,
    max_error: float | None = None,
    min_agreement: float | None = None,
) -> Report:
    """Check that `candidate` computes what `reference` computes, up to rounding.

    Each output is held against a float64 run of the reference with the noise-floor criterion:
    ‖y − y₆₄‖₂ / ‖y₆₄‖₂ ≤ 4 · max(eps, own), own being the reference's error in its own dtype on
    torch; where a candidate misses that, also on the candidate's backend, in its dtype and with the
    same TF32 setting, up to ten times as much. Of an output that misses its bound the report says which
    module is the first to leave its own.

    A module is copied and cast for the float64 run, a ``.pt2`` file read again and cast. Where that
    cannot be had (an ``.onnx`` reference, a dtype written into the model), the reference's own run
    is the truth, and its response to a change of every input by one rounding step stands for
    own.

    A file in float16 or bfloat16 is judged on a device that computes in that dtype. ONNX Runtime on the
    CPU does not: there its structure is checked, and its weights as they are stored, run in float64, are
    held to what rounding the reference's own weights does, ‖y − y₆₄‖₂ / ‖y₆₄‖₂ ≤ 4 · max(eps, rounded).

    Args:
        reference: a module, or the path of an ``.onnx`` or ``.pt2`` file.
        candidate: likewise.
        inputs: a tensor, a tuple of tensors, ``(tuple, dict)`` of positional and keyword inputs, a
            dict of keyword inputs, or a list of such batches.
        provider: where the candidate has to run, ``"cpu"`` or ``"cuda"``; None takes the best there
            is for a file, and what it is on for a module.
        backends: judge on each of these instead: ``eager``, ``compile``, ``pt2``, ``ort-cpu``,
            ``ort-cuda``, ``ort-tensorrt``, or ``all`` for those that work here. A module is folded and
            exported to the forms that a backend takes. The reference's error there is measured and
            reported in any case.
        tf32: let float32 be computed in TF32 on CUDA, by both; a proof leaves it off.
        other_sizes: also run one sample and three, and a shorter prime size along every other axis
            that a file leaves free; sizes that the reference does not take are noted.
        max_error: the largest rel-L2 error that passes, instead of the noise floor (for conversions
            that promise no equality).
        min_agreement: the smallest share of rows with the same first class, instead of none that
            differ beyond rounding.

    Returns:
        The report. A candidate that is wrong in any way is a failed check, not an exception.
        ``facts["outputs"]`` has a row for each output, ``facts["backends"]``, where backends were
        asked for, the same for each of them, ``facts["absent"]`` the reason for each that is missing.

    Raises:
        UsageError: no such file, no batch, an unknown provider or backend.
        Refused: the reference cannot be run.
        MissingDependency: a file has to be run and there is no ONNX Runtime.
    """
    batches = batches_of(inputs)
    if backends is not None and provider is not None:
        what = "both a provider and backends are given"
        raise UsageError(Problem("backends", what, "name the backend: ort-cuda"))
    with tf32_set(tf32):
        truth = Truth(open_runner(reference, "cpu"))
        report = Report("verify", subject=f"{_name(candidate)} against {truth.subject}")
        with closing(Floors(truth.runner, tf32)) as floors:
            judge = Judge(truth, floors, batches, max_error, min_agreement, other_sizes)
            if backends is None:
                report = _on_one(report, judge, candidate, provider, tf32)
            else:
                report = _on_each(report, judge, candidate, backends, tf32)
        if not judge.asked:
            return report
        moves, notes = truth.sight(*batches[0])
    return report.extended(facts={"sight": moves} if moves else {}, notes=notes)


def _on_one(
    report: Report, judge: Judge, candidate: Model, provider: str | None, tf32: bool
) -> Report:
    """Judge a candidate where it is, or a file on one provider."""
    is_file = not isinstance(candidate, nn.Module) and Path(candidate).suffix == ".onnx"
    try:
        if is_file and Path(str(candidate)).is_file():
            runner: Runner = open_file(Path(str(candidate)), provider, tf32)
        else:
            runner = open_runner(candidate, provider)
    except NormconvError as error:
        if not is_finding(error):
            raise
        return report.extended(checks=(Check("candidate", False, detail=str(error)),))
    report = report.extended(checks=_provider_checks(runner, provider))
    report = report.extended(checks=(judge.repeats(),))
    if not report.passed:
        return report
    backend = f"ort-{runner.provider}" if isinstance(runner, FileRunner) else "eager"
    verdict = judge.on(runner, backend)
    common = {"reference": judge.truth.kind, "provider": runner.provider, "batches": judge.count}
    return report.extended(
        checks=verdict.checks, facts={**common, **verdict.facts}, notes=verdict.notes
    )


def _on_each(
    report: Report, judge: Judge, candidate: Model, backends: Sequence[str], tf32: bool
) -> Report:
    """Judge a candidate on several backends."""
    if not isinstance(candidate, nn.Module) and not Path(candidate).is_file():
        raise UsageError(Problem(str(candidate), "there is no such file"))
    chosen = chosen_backends(backends, candidate)
    checks = [Check(name, False, detail=reason) for name, reason in chosen.refused.items()]
    if not chosen.backends and not checks:
        checks.append(Check("backends", False, detail="none that works here takes the candidate"))
    report = report.extended(checks=(*checks, judge.repeats()))
    if not judge.repeated:
        return report
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        forms = Forms(candidate, Path(folder), *judge.batches[0])
        for name in chosen.backends:
            try:
                runner = forms.on(name, tf32)
            except NormconvError as error:
                if not is_finding(error):
                    raise
                report = report.extended(checks=(Check(name, False, detail=str(error)),))
                continue
            verdict = judge.on(runner, name, label=f"{name} ", measure_floor=True)
            rows[name] = {"provider": runner.provider, **verdict.facts}
            report = report.extended(checks=verdict.checks, notes=verdict.notes)
    facts = {
        "reference": judge.truth.kind,
        "batches": judge.count,
        "TF32": "allowed" if tf32 else "off",
        "backends": rows,
        "absent": chosen.absent,
    }
    return report.extended(facts=facts)


def batches_of(inputs: Any) -> list[Batch]:
    """Return the batches that `inputs` stands for.

    >>> import torch
    >>> x = torch.zeros(1)
    >>> [len(batches_of(given)) for given in (x, (x, x), ((x,), {"y": x}), [x, x])]
    [1, 1, 1, 2]
    """
    if isinstance(inputs, list) or (
        isinstance(inputs, Iterable) and not isinstance(inputs, (tuple, Mapping, Tensor))
    ):
        batches = [batch for item in inputs for batch in batches_of(item)]
    elif isinstance(inputs, Mapping):
        batches = [((), dict(inputs))]
    elif not isinstance(inputs, tuple):
        batches = [((inputs,), {})]
    elif len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        batches = [(inputs[0], dict(inputs[1]))]
    else:
        batches = [(inputs, {})]
    if not batches:
        raise UsageError(Problem("inputs", "there is no batch"))
    return batches


def _provider_checks(runner: Runner, provider: str | None) -> tuple[Check, ...]:
    if provider is None:
        return ()
    detail = f"the candidate ran on {runner.provider}, asked for was {provider}"
    return (Check("provider", runner.provider == provider, detail=detail),)


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
