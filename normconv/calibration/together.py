"""Calibration and recovery of what was just converted, with one report of all three."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from normconv.calibration.batches import DataUse, Source
from normconv.calibration.distillation import recover
from normconv.calibration.drift import Progress
from normconv.calibration.kept import Cache
from normconv.calibration.lessons import Lesson
from normconv.calibration.sequential import calibrate
from normconv.errors import CheckFailed
from normconv.plan import Plan
from normconv.report import Report
from normconv.surgery import Result

__all__ = ["calibrate_and_recover"]


def calibrate_and_recover(
    converted: Result,
    plan: Plan,
    data: Source,
    *,
    reference: nn.Module,
    held_out: Source | None = None,
    min_agreement: float | None = None,
    lesson: Lesson | None = None,
    lesson_data: Source | None = None,
    data_use: DataUse = "public",
    cache: Cache = "none",
    progress: Callable[[str], Progress] | None = None,
) -> Result:
    """Calibrate a converted model, and teach it where the lesson has steps.

    What calibration found stands in the facts of the report as ``before`` and ``after``, what the lesson
    did under ``recover``. An agreement that is asked for is that at the end.

    Args:
        converted: the model and its report.
        plan: that it was made by.
        data: for both.
        reference: the original.
        held_out: see `calibrate`.
        min_agreement: see `calibrate`.
        lesson: see `recover`; None, or one without steps, for calibration alone.
        lesson_data: for the lesson instead.
        data_use: see `calibrate`.
        cache: see `calibrate`.
        progress: makes of ``calibrate`` or ``recover`` a function as they take it.

    Raises:
        CheckFailed: the agreement is too low, or the loss became NaN; carries all that was found.
    """
    taught = lesson is not None and lesson.steps > 0
    with _after(converted.report):
        calibrated = calibrate(
            converted.model,
            plan,
            data,
            reference=reference,
            held_out=held_out,
            min_agreement=None if taught else min_agreement,
            cache=cache,
            data_use=data_use,
            progress=progress and progress("calibrate"),
        )
    report = _joined(converted.report, calibrated.report)
    if not taught:
        return Result(calibrated.model, report)
    with _after(report):
        model, last = recover(
            calibrated.model,
            reference,
            data if lesson_data is None else lesson_data,
            lesson=lesson,
            held_out=held_out,
            min_agreement=min_agreement,
            data_use=data_use,
            progress=progress and progress("recover"),
        )
    return Result(model, _joined(report, last))


@contextmanager
def _after(report: Report) -> Iterator[None]:
    """Put what was found before into the report of a check that fails in the block."""
    try:
        yield
    except CheckFailed as error:
        error.report = _joined(report, error.report)
        raise


def _joined(before: Report, after: Report) -> Report:
    if after.verb == "recover":
        facts = {"recover": after.facts}
        return before.extended(checks=after.checks, facts=facts, notes=_new(before, after))
    rows = zip(before.sites, after.sites, strict=True)
    sites = tuple(replace(new, error=old.error, bound=old.bound) for old, new in rows)
    more = before.extended(
        sites=sites, checks=after.checks, facts=after.facts, notes=_new(before, after)
    )
    return replace(more, plan=after.plan)


def _new(before: Report, after: Report) -> tuple[str, ...]:
    return tuple(note for note in after.notes if note not in before.notes)
