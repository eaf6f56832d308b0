"""Calibration and recovery of what was just converted, with one report of all three."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from normconv.calibration.batches import DataUse, Source, check_use
from normconv.calibration.data_init import initialise
from normconv.calibration.distillation import recover
from normconv.calibration.drift import Progress
from normconv.calibration.lessons import Lesson
from normconv.calibration.replay import Cache
from normconv.calibration.sequential import calibrate
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.plan import Plan
from normconv.report import Report
from normconv.surgery import Result

__all__ = ["calibrate_and_recover", "check_asked", "check_calibrable", "initialise_converted"]


def check_asked(
    data: Source | None, init: str, measures: Sequence[object], data_use: DataUse
) -> None:
    """Refuse to calibrate, teach, measure or initialise without data, or what does not go together.

    Args:
        data: what was given.
        init: ``data`` for initialisation, empty for calibration.
        measures: options that only calibration and recovery have; None for those not given.
        data_use: see `calibrate`.

    Raises:
        UsageError: says what is missing.
    """
    asked = any(each is not None for each in measures)
    if data is None and asked:
        what = "there is no data: nothing would be calibrated, taught or measured"
        where = "held_out, min_agreement, recover"
        raise UsageError(Problem(where, what, "give data= (--calib)"))
    if init not in ("", "data") or (init and (data is None or asked)):
        what = (
            f"{init!r}: it is 'data', and goes with data but no held_out, min_agreement or recover"
        )
        raise UsageError(Problem("init", what, "leave it out, or give init='data', data=batches"))
    if data is not None:
        check_use(data_use, "initialise" if init else "calibrate")


def check_calibrable(plan: Plan) -> None:
    """Refuse data for a plan that leaves nothing to calibrate.

    Raises:
        UsageError: the plan is exact, or puts norms in where there were none.
    """
    if any(step.action == "insert" for step in plan.converted):
        what = "a norm that was not there has nothing to be calibrated to"
        raise UsageError(Problem("data", what, "leave it out; nc.recover teaches the result"))
    if all(step.fidelity == "exact" for step in plan.converted):
        what = f"{plan.target} is exact: there is nothing to calibrate"
        raise UsageError(Problem("data", what, "leave it out"))


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
    cache: Cache = "memory",
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


def initialise_converted(
    converted: Result,
    data: Source,
    *,
    data_use: DataUse = "public",
    progress: Callable[[str], Progress] | None = None,
) -> Result:
    """Initialise a converted model by data; what that found stands under ``initialise`` in the facts.

    Raises:
        UsageError: what was converted was trained; see `initialise`.
        CheckFailed: some channel is not standard; carries all that was found.
    """
    with _after(converted.report):
        model, report = initialise(
            converted.model, data, data_use=data_use, progress=progress and progress("initialise")
        )
    return Result(model, _joined(converted.report, report))


@contextmanager
def _after(report: Report) -> Iterator[None]:
    """Put what was found before into the report of a check that fails in the block."""
    try:
        yield
    except CheckFailed as error:
        error.report = _joined(report, error.report)
        raise


def _joined(before: Report, after: Report) -> Report:
    if after.verb in ("recover", "initialise"):
        facts = {after.verb: after.facts}
        return before.extended(checks=after.checks, facts=facts, notes=_new(before, after))
    rows = zip(before.sites, after.sites, strict=True)
    sites = tuple(replace(new, error=old.error, bound=old.bound) for old, new in rows)
    more = before.extended(
        sites=sites, checks=after.checks, facts=after.facts, notes=_new(before, after)
    )
    return replace(more, plan=after.plan)


def _new(before: Report, after: Report) -> tuple[str, ...]:
    return tuple(note for note in after.notes if note not in before.notes)
