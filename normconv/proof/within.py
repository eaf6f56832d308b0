"""Proof of a conversion inside one submodule: there on its real inputs, and of the whole where that sees.

The whole model may draw random numbers or do other things that no two runs share; it is then no
yardstick, a note says so, and the proof is that of the submodule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconv.graph import reach, relative_names
from normconv.graph.running import first_line
from normconv.numerics import relative_l2, unprovable
from normconv.plan import Step
from normconv.proof.conversion import Proof, prove_recorded
from normconv.proof.recording import Recording, coarsest_dtype, record_original, run_model
from normconv.report import Check, SiteRow

__all__ = ["RecordingWithin", "prove_recorded_within", "record_original_within"]


@dataclass(frozen=True)
class RecordingWithin:
    """What a proof needs of the original.

    Args:
        at: the submodule.
        steps: the plan's steps, by names of the whole model.
        inner: of the submodule, on the inputs it got in the whole model.
        whole: of the whole model; None where that is no yardstick.
        notes: why it is none.
        coarse: where the whole model repeats itself, but not in float64: its outputs and how far they
            move when its inputs move by one ulp.
        whole_inputs: positional and keyword inputs of the whole model.
    """

    at: str
    steps: tuple[Step, ...]
    inner: Recording
    whole: Recording | None
    notes: tuple[str, ...]
    coarse: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)
    whole_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


def record_original_within(
    original: nn.Module,
    at: str,
    steps: Sequence[Step],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    for_good: bool = False,
) -> RecordingWithin:
    """Run an original as `prove_recorded_within` needs it; nothing is changed.

    Args:
        original: the whole model.
        at: the submodule's name; empty for the whole model alone.
        steps: the plan's steps.
        args: positional inputs of the whole model.
        kwargs: keyword inputs of the whole model.
        for_good: the original will be gone when the candidate is judged.

    Raises:
        CaptureError: the model does not run or does not call the submodule.
    """
    if not at:
        only = record_original(original, steps, args, kwargs, for_good=for_good)
        return RecordingWithin(at, tuple(steps), only, None, ())
    reached = reach(original, at, args, kwargs)
    inside = relative_names(original, at)
    relative = [replace(step, site=inside[step.site], **_layers(step, inside)) for step in steps]
    inner = record_original(
        original.get_submodule(at), relative, reached.args, reached.kwargs, for_good=for_good
    )
    if reached.training:
        note = f"eval mode never calls {at}: nothing was compared at the outputs of the whole model"
        return RecordingWithin(at, tuple(steps), inner, None, (note,))
    whole, why, coarse = _whole(original, args, kwargs, for_good)
    notes = (f"the proof is that of {at}: {why}",) if why else ()
    inputs = (args, dict(kwargs or {}))
    return RecordingWithin(at, tuple(steps), inner, whole, notes, coarse, inputs)


def _layers(step: Step, inside: Mapping[str, str]) -> dict[str, Any]:
    return {
        "producers": tuple(inside.get(name, name) for name in step.producers),
        "consumers": tuple(inside.get(name, name) for name in step.consumers),
    }


def _whole(
    original: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, for_good: bool
) -> tuple[Recording | None, str, dict[str, tuple[Tensor, float]]]:
    """Record the whole model, or say why it is no yardstick, with what can be compared all the same."""
    try:
        recording = record_original(original, (), args, kwargs, for_good=for_good)
    except Exception as reason:  # the forward is the user's, and need not run in float64
        return None, f"the whole model does not run in float64 ({first_line(reason)})", {}
    runs = recording.in_eval
    reference, own = runs.reference.outputs, runs.own[0].outputs
    if not recording.repeats.passed:
        return None, f"the whole model does not repeat itself ({recording.repeats.detail})", {}
    if not own:
        return None, "the whole model returns no tensor", {}
    if list(reference) == list(own) and not any(
        unprovable(recording.dtype, _distance(own[name], reference[name])) for name in own
    ):
        return recording, "", {}
    moved = runs.again().outputs
    coarse = {n: (t, _distance(moved[n], t)) for n, t in own.items() if n in moved and t.numel()}
    what = "computes something else in float64 (random numbers differ from dtype to dtype)"
    return None, f"the whole model {what}; its outputs are compared coarsely", coarse


def _distance(a: Tensor, b: Tensor) -> float:
    return relative_l2(a, b) if a.shape == b.shape else float("inf")


def prove_recorded_within(recording: RecordingWithin, candidate: nn.Module) -> Proof:
    """Compare a candidate with what was recorded; the candidate is not changed."""
    inner = prove_recorded(recording.inner, candidate.get_submodule(recording.at))
    if not recording.at:
        return inner
    rows = tuple(_row(step, row) for step, row in zip(recording.steps, inner.rows, strict=True))
    checks = tuple(replace(check, name=f"{recording.at}: {check.name}") for check in inner.checks)
    whole: tuple[Check, ...] = ()
    if recording.whole is not None:
        whole = prove_recorded(recording.whole, candidate).checks
    elif recording.coarse:
        whole = _coarse_checks(recording, candidate)
    checks += tuple(replace(check, name=f"whole model: {check.name}") for check in whole)
    return Proof(checks, rows, inner.facts, recording.notes + inner.notes)


def _coarse_checks(recording: RecordingWithin, candidate: nn.Module) -> tuple[Check, ...]:
    """Hold the whole to half the digits of its dtype: another function differs by more."""
    dtype = coarsest_dtype(candidate)
    try:
        got = run_model(candidate, recording.whole_inputs, {}, False).outputs
    except Exception as reason:  # the forward is the user's, and may need what the norm had
        return (Check("the converted model runs", False, detail=first_line(reason)),)
    checks = []
    for name, (expected, response) in recording.coarse.items():
        error = _distance(got[name], expected) if name in got else float("nan")
        bound = max(torch.finfo(dtype).eps ** 0.5, 4 * response)
        checks.append(Check.at_most(name, error, bound, "with the same seed, to half the digits"))
    return tuple(checks)


def _row(step: Step, measured: SiteRow) -> SiteRow:
    return replace(step.row(), error=measured.error, bound=measured.bound)
