"""Proof that a converted model computes what the original computes: end to end and site by site.

Everything is judged against a float64 run of the original, and held to what rounding explains: four
times the larger of the dtype's eps and the original's own error in that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconv.numerics import noise_bound, relative_l2, unprovable
from normconv.plan import Step
from normconv.proof.recording import (
    OriginalRuns,
    Recording,
    Run,
    in_phase,
    places_in,
    record_original,
    run_model,
)
from normconv.report import Check, SiteRow

__all__ = ["Proof", "prove", "prove_outputs", "prove_recorded"]

_SIGHT = 1e-2
_IN_FLOAT64 = "prove it in float64: convert model.double()"


@dataclass(frozen=True)
class Proof:
    """What a proof gives to a report.

    Args:
        checks: every check, passed or not.
        rows: the plan's rows with each site's error and bound.
        facts: how it was measured.
        notes: what the reader should know of it.
    """

    checks: tuple[Check, ...]
    rows: tuple[SiteRow, ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


def prove(
    original: nn.Module,
    candidate: nn.Module,
    steps: Sequence[Step],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Proof:
    """Compare two models in eval mode on the same inputs; neither is changed.

    Args:
        original: the reference; it is run in float64 as well.
        candidate: of the same dtype.
        steps: the plan's steps: the sites to compare at their own output.
        args: positional inputs in the models' dtype.
        kwargs: keyword inputs.
    """
    return prove_recorded(record_original(original, steps, args, kwargs), candidate)


def prove_recorded(recording: Recording, candidate: nn.Module) -> Proof:
    """Compare a candidate with what was recorded of its original; the candidate is not changed."""
    steps, dtype = recording.steps, recording.dtype
    in_eval = in_phase(steps, "eval")
    outputs, rows = _judged(_runs(recording.in_eval, candidate, in_eval, recording), in_eval, dtype)
    checks = [recording.repeats, *outputs]
    if recording.in_training is not None:
        training = in_phase(steps, "train")
        runs = _runs(recording.in_training, candidate, training, recording, training=True)
        rows |= _judged(runs, training, dtype)[1]
    ordered = tuple(rows.get(step.site, step.row()) for step in steps)
    if steps:
        checks += _site_checks(ordered)
    sight, notes = _sight(recording.in_eval.reference.outputs)
    facts = {
        "dtype": str(dtype).removeprefix("torch."),
        "sight": sight,
        "sites compared": sum(row.error is not None for row in ordered),
    }
    return Proof(tuple(checks), ordered, facts, notes)


def prove_outputs(recording: Recording, outputs: Mapping[str, Tensor]) -> tuple[Check, ...]:
    """Compare outputs that were computed elsewhere, on the same inputs, with the recorded original.

    Args:
        recording: of the original, without sites.
        outputs: by the names of `flat_outputs`.
    """
    original = recording.in_eval
    candidate = Run(dict(outputs), {})
    runs = _Runs(original.reference, list(original.own), original.again, candidate, {})
    return tuple(_judged(runs, (), recording.dtype)[0])


@dataclass
class _Runs(OriginalRuns):
    """What was recorded of the original, and the candidate as it is."""

    candidate: Run
    watched: Mapping[str, bool]
    granted: float = 0.0


def _runs(
    original: OriginalRuns,
    candidate: nn.Module,
    steps: Sequence[Step],
    recording: Recording,
    *,
    training: bool = False,
) -> _Runs:
    places = places_in(candidate, steps)
    try:
        made = run_model(candidate, recording.inputs, places, training)
    except Exception as reason:  # the forward is the user's, and may need what the norm had
        made = Run({}, {}, f"it raises {type(reason).__name__}: {reason}")
    watched = {site: bool(place) for site, place in places.items()}
    own = list(original.own)
    return _Runs(original.reference, own, original.again, made, watched, recording.granted)


def _judged(
    runs: _Runs, steps: Sequence[Step], dtype: torch.dtype
) -> tuple[list[Check], dict[str, SiteRow]]:
    """Compare outputs and sites; on a miss once more with a second look at the original's own error.

    On few numbers the original's rounding error can be small by luck. Its response to a change of the
    input by one ulp is rounding as well, and is asked for only then.
    """
    checks = _output_checks(runs, dtype)
    rows = {step.site: _site_row(step, runs, dtype) for step in steps}
    if all(check.passed for check in checks) and not any(_missed(row) for row in rows.values()):
        return checks, rows
    runs.own.append(runs.again())
    return _output_checks(runs, dtype), {step.site: _site_row(step, runs, dtype) for step in steps}


def _missed(row: SiteRow) -> bool:
    if row.error is None and row.bound is None:
        return False  # not seen on its own
    return row.error is None or row.bound is None or not row.error <= row.bound


def _output_checks(runs: _Runs, dtype: torch.dtype) -> list[Check]:
    expected, got = runs.reference.outputs, runs.candidate.outputs
    if not expected:
        return [
            Check("outputs", False, detail="the model returns no tensor that could be compared")
        ]
    if runs.candidate.failure:
        return [Check("the converted model runs", False, detail=runs.candidate.failure)]
    if list(expected) != list(got):
        detail = f"the original returns {list(expected)}, the converted model {list(got)}"
        return [Check("outputs", False, detail=detail)]
    checks = []
    for name, reference in expected.items():
        own = max(runs.granted, *(_own_error(run.outputs[name], reference) for run in runs.own))
        if got[name].shape != reference.shape:
            shapes = f"{tuple(got[name].shape)} instead of {tuple(reference.shape)}"
            checks.append(Check(name, False, detail=f"shape {shapes}"))
            continue
        if not reference.numel():
            checks.append(Check(name, False, detail="it has no elements to compare"))
            continue
        error = relative_l2(got[name], reference)
        here = _rounded_in(dtype, got[name])
        no_yardstick = unprovable(here, own)
        way_out = _IN_FLOAT64 if no_yardstick else ""
        checks.append(Check.at_most(name, error, noise_bound(here, own), no_yardstick, way_out))
    return checks


def _own_error(output: Tensor, reference: Tensor) -> float:
    """The original's error; infinite where rounding decides on the output's length."""
    return relative_l2(output, reference) if output.shape == reference.shape else float("inf")


def _rounded_in(dtype: torch.dtype, output: Tensor) -> torch.dtype:
    """The dtype an output is rounded in: a float64 model may end in a float32 softmax and cast back."""
    if not output.is_floating_point():
        return dtype
    narrow = output.dtype
    if narrow == torch.float64 and bool((output == output.float().double()).all()):
        narrow = torch.float32
    return max(dtype, narrow, key=lambda d: torch.finfo(d).eps)


def _site_row(step: Step, runs: _Runs, dtype: torch.dtype) -> SiteRow:
    """Compare a site at its own output; the worst of its calls counts."""
    if not runs.watched.get(step.site, True):
        return step.row()
    every = (runs.reference, runs.candidate, *runs.own)
    calls = [run.sites.get(step.site, []) for run in every]
    if step.action in ("wrap", "keep") and not any(calls):
        return step.row()  # its weights are read by another module, which never calls it
    if len({len(outputs) for outputs in calls}) != 1 or not any(o.numel() for o in calls[0]):
        return replace(step.row(), error=float("nan"), bound=float("nan"))
    error = bound = 0.0
    for reference, candidate, *owns in zip(*calls, strict=True):
        if reference.shape != candidate.shape:
            return replace(step.row(), error=float("nan"), bound=float("nan"))
        this = relative_l2(candidate, reference)
        own = max(runs.granted, *(relative_l2(own, reference) for own in owns))
        this_bound = noise_bound(dtype, own)
        if not this * bound <= error * this_bound or not bound:
            error, bound = this, this_bound
    return replace(step.row(), error=error, bound=bound)


def _site_checks(rows: tuple[SiteRow, ...]) -> list[Check]:
    measured = [row for row in rows if row.error is not None and row.bound is not None]
    failed = [row for row in measured if _missed(row)]
    if failed:
        return [_site_failure(row) for row in failed]
    return [Check("every site at its own output", True, detail=f"{len(measured)} sites compared")]


def _site_failure(row: SiteRow) -> Check:
    error, bound = row.error or 0.0, row.bound or 0.0
    detail, way_out = row.action, ""
    if error != error and bound != bound:
        detail += ": it is not called as often as in the original, or with nothing to compare"
    elif bound != bound:
        detail += ": the original itself is too far from its float64 run there"
        way_out = _IN_FLOAT64
    return Check.at_most(f"site {row.site}", error, bound, detail, way_out)


def _sight(outputs: Mapping[str, Tensor]) -> tuple[float | None, tuple[str, ...]]:
    """How much two samples differ at the outputs: does the end-to-end comparison see anything?"""
    sights = [
        relative_l2(tensor[1], tensor[0])
        for tensor in outputs.values()
        if tensor.dim() > 1 and tensor.shape[0] > 1 and tensor.is_floating_point()
    ]
    if not sights:
        return None, ()
    sight = max(sights)
    if sight >= _SIGHT:
        return sight, ()
    note = (
        f"the outputs for two inputs differ by only {sight:.1e}: the end-to-end comparison is nearly "
        "blind here, the comparison site by site carries the proof"
    )
    return sight, (note,)
