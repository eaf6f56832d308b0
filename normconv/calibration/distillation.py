"""Recovery: the converted model is taught by the original, on inputs without labels."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconv.calibration.batches import Batches, DataUse, Source, check_use, notes_of
from normconv.calibration.drift import Drift, Progress, measure_drift, summary
from normconv.calibration.lessons import Lesson, State, digest_of, is_there, resume_, write_state
from normconv.calibration.ranks import of_all_ranks
from normconv.calibration.teaching import floats_of, teach_
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.layers import copy_model
from normconv.numerics import evaluating
from normconv.plan import Plan, Step, history_of, record
from normconv.report import Check, Report
from normconv.surgery import Result

__all__ = ["recover"]

_JUDGES = 8  # batches to judge by


def recover(
    student: nn.Module,
    teacher: nn.Module,
    data: Source,
    *,
    steps: int | None = None,
    held_out: Source | None = None,
    lesson: Lesson | None = None,
    min_agreement: float | None = None,
    checkpoint: str | Path | None = None,
    data_use: DataUse = "public",
    progress: Progress | None = None,
) -> Result:
    """Return a copy of a converted model that was taught to put out what the original does.

    Label-free distillation: KL(teacher ‖ student) of the softened class scores times T², the mean
    squared difference relative to the teacher's variance for any other output. The student runs in eval
    mode with gradients: nothing random, and no statistics of a batch. What is returned is the best by
    divergence from the teacher's scores on batches that it does not learn from (by distance, where the
    outputs are no scores).

    Args:
        student: what `convert` or `calibrate` made of the teacher; not changed.
        teacher: the original; not changed.
        data: batches that can be gone through again and again; no labels are used.
        steps: batches the student sees; None for those of the lesson, 400.
        held_out: batches to judge by; without them the last tenth of the data, at most 8 batches, is held
            out, and of less than ten batches the first are taken. The report says which.
        lesson: learning rate, temperature, how often to look, and so on.
        min_agreement: the least share with the same top-1 at the end.
        checkpoint: a file that is written at each look and resumed from, to the same result.
        data_use: ``private`` says so in the report, with what it means; ``none`` refuses.
        progress: called with steps done and in all, and with agreement and drift as last measured.

    Raises:
        UsageError: the data is empty, constant, holds NaN, or both models differ in what they put out;
            or the checkpoint is of another student.
        CheckFailed: the loss became NaN, or the agreement is below `min_agreement`.

    Source: Hinton, Vinyals & Dean 2015, section 2.

    >>> import normconv as nc
    >>> net, images = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.randn(32, 4)
    >>> student = nc.convert(net.eval(), "gn", example_inputs=(images,)).model
    >>> model, report = nc.recover(student, net, [images], steps=3)
    >>> report.facts["steps"]
    3
    """
    check_use(data_use, "recover")
    lesson = lesson or Lesson()
    if steps is not None:
        lesson = replace(lesson, steps=steps)
    twin = copy_model(student)
    batches = Batches.of(data, teacher)
    used = {**batches.checked(), "purpose": "recover", "use": data_use}
    measured_on = "held-out data"
    if held_out is None:
        data, held_out, measured_on = _parted(data, used["batches"])
        batches = Batches.of(data, teacher)
    judged = Batches.of(held_out, teacher)
    both = used["sha256"] + judged.checked()["sha256"]
    _check_outputs(teacher, twin, batches)
    steps_of = _converted(student, teacher)
    before = measure_drift(teacher, student, steps_of, judged, scores=lesson.scores)
    start = State(
        best=_score(before),
        seen=[(0, _share(before))],
        scores=[(0, _score(before))],
        told=_told(before),
    )
    start.subject = digest_of(student, teacher) + "".join(of_all_ranks(both))
    sites = [step.site for step in steps_of]
    state = _Taught(twin, teacher, batches, judged, lesson).taught_(
        start, sites, checkpoint, progress
    )
    after = measure_drift(teacher, twin, steps_of, judged, scores=lesson.scores)
    record(twin, {"recover": {"data": used, "lesson": asdict(lesson)}})
    report = _report(twin, before, after, used, state, measured_on, min_agreement)
    report = report.extended(notes=notes_of(data_use))
    if not report.passed:
        raise CheckFailed(report, twin)
    return Result(twin, report)


def _parted(data: Source, batches: int) -> tuple[Source, Source, str]:
    """Data to learn from and data to judge by, and a word on the latter.

    What the student was calibrated on often comes first, and on that it looks better than it is.
    """
    held_out = min(_JUDGES, batches // 10)
    if not held_out:
        return data, _some_of(data, 0, _JUDGES), "the first batches of the data itself"
    if isinstance(data, (list, tuple)):
        return data[:-held_out], data[-held_out:], f"the last {held_out} batches, held out"
    left = batches - held_out
    what = f"the last {held_out} batches, held out as far as the data comes in one order"
    return _some_of(data, 0, left), _some_of(data, left, batches), what


def _some_of(data: Source, start: int, end: int) -> Callable[[], Iterator[Any]]:
    # One order for each pass, whatever its seed: what is held out stays so.
    every = Batches(data)
    return lambda: itertools.islice(every.items(), start, end)


def _check_outputs(teacher: nn.Module, student: nn.Module, batches: Batches) -> None:
    if any(p.dtype == torch.float16 for p in student.parameters()):
        what = "its parameters are float16, in which Adam's steps overflow"
        raise UsageError(Problem("student", what, "teach student.float(), with amp=True for speed"))
    args, kwargs = next(iter(batches))
    try:
        with evaluating(teacher), evaluating(student):
            expected = floats_of(teacher(*args, **kwargs))
            got = floats_of(student(*args, **kwargs))
    except Exception as reason:  # the forward is the user's, and so is the data
        what = f"a model does not run on it ({type(reason).__name__}: {reason})"
        raise UsageError(Problem("data", what, "give batches of the models' inputs")) from None
    shapes = [{name: tuple(t.shape) for name, t in outputs.items()} for outputs in (expected, got)]
    if shapes[0] != shapes[1] or not expected:
        what = f"the teacher puts out {shapes[0]}, the student {shapes[1]}"
        raise UsageError(Problem("teacher", what, "give the model that the student was made of"))


def _converted(student: nn.Module, teacher: nn.Module) -> list[Step]:
    """The sites of the student's own plan that eval mode calls and both models still have."""
    plans = [entry["apply"] for entry in history_of(student) if "apply" in entry]
    steps = [step for plan in plans for step in Plan.from_dict(plan).converted]
    both = set(dict(student.named_modules())) & set(dict(teacher.named_modules()))
    return [step for step in steps if step.phase == "eval" and step.site in both]


@dataclass
class _Taught:
    """A student, changed in place, and what it is taught by and judged by."""

    student: nn.Module
    teacher: nn.Module
    batches: Batches
    judged: Batches
    lesson: Lesson

    def taught_(
        self,
        state: State,
        sites: list[str],
        checkpoint: str | Path | None,
        progress: Progress | None,
    ) -> State:
        """Teach it, or go on; leave it at its best."""
        student, lesson = self.student, self.lesson
        parameters = [p for p in student.parameters() if p.requires_grad]
        if not parameters:
            what = "no parameter of it is trained"
            raise UsageError(Problem("student", what, "set requires_grad"))
        optimizer = torch.optim.Adam(parameters, lr=lesson.lr)
        best = copy.deepcopy(student.state_dict())
        if checkpoint is not None and is_there(checkpoint):
            state, best = resume_(Path(checkpoint), student, optimizer, lesson, state.subject)
        flags = {name: module.training for name, module in student.named_modules()}

        def after_step(look: bool) -> None:
            nonlocal best
            if progress is not None:
                progress(state.step, lesson.steps, state.told)
            if look:
                best = self._look(state, best)
            if look and checkpoint is not None:
                write_state(Path(checkpoint), student, optimizer, state, best, lesson)

        teach_(student, self.teacher, self.batches, lesson, state, optimizer, sites, after_step)
        student.load_state_dict(best)
        for name, module in student.named_modules():
            module.training = flags[name]
        student.zero_grad(set_to_none=True)
        return state

    def _look(self, state: State, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure the student; return its weights if they are the best so far, else those that are."""
        scores = self.lesson.scores
        drift = measure_drift(self.teacher, self.student, (), self.judged, scores=scores)
        score = _score(drift)
        state.seen.append((state.step, _share(drift)))
        state.scores.append((state.step, score))
        state.told = _told(drift)
        if score > state.best:
            state.best, state.best_step, state.waited = score, state.step, 0
            return copy.deepcopy(self.student.state_dict())
        state.waited += 1
        return best


def _score(drift: Drift) -> float:
    """How near the scores are as distributions, or the outputs where there are none; more is nearer.

    Not the agreement: on some hundred samples chance moves it by more than a lesson does.
    """
    off = drift.output if drift.divergence is None else drift.divergence
    return -off if math.isfinite(off) and math.isfinite(drift.output) else -math.inf


def _told(drift: Drift) -> str:
    share = _share(drift)
    agreed = f"same top-1 {share:.4f}, " if math.isfinite(share) else ""
    return f"{agreed}outputs differ by {drift.output:.3g}"


def _share(drift: Drift) -> float:
    agreement = drift.agreement
    return math.nan if agreement is None else agreement.same / agreement.samples


def _report(
    student: nn.Module,
    before: Drift,
    after: Drift,
    used: Mapping[str, Any],
    state: State,
    measured_on: str,
    min_agreement: float | None,
) -> Report:
    facts: dict[str, Any] = {
        "data": dict(used),
        "steps": state.step,
        "best at step": state.best_step,
        "measured on": measured_on,
        **summary(before, after),
        "before": before.document(),
        "after": after.document(),
        "agreement by step": [[step, share] for step, share in state.seen if share == share],
        "divergence by step" if after.divergence is not None else "distance by step": [
            [step, -score] for step, score in state.scores
        ],
    }
    checks = [Check("the loss stayed finite", state.best_step >= 0, way_out="a smaller lr")]
    checks += after.agreed(min_agreement, "more steps")
    return Report(verb="recover", subject=type(student).__name__, facts=facts, checks=tuple(checks))
