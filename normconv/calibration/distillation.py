"""Recovery: the converted model is taught by the original, on inputs without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.calibration.batches import Batches, Source
from normconv.calibration.drift import Drift, measure_drift, summary
from normconv.calibration.lessons import Lesson, State, digest_of, resume_, write_state
from normconv.calibration.ranks import of_all_ranks
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.layers import copy_model
from normconv.numerics import evaluating
from normconv.plan import record
from normconv.proof import flat_outputs
from normconv.report import Check, Report
from normconv.surgery import Result

__all__ = ["recover"]

Progress = Callable[[int, int], None]
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


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
    progress: Progress | None = None,
) -> Result:
    """Return a copy of a converted model that was taught to put out what the original does.

    Label-free distillation: KL(teacher ‖ student) of the softened class scores times T², the mean
    squared difference relative to the teacher's variance for any other output. The student runs in eval
    mode with gradients: nothing random, and no statistics of a batch. What is returned is the best by
    agreement with the teacher.

    Args:
        student: what `convert` or `calibrate` made of the teacher; not changed.
        teacher: the original; not changed.
        data: batches that can be gone through again and again; no labels are used.
        steps: batches the student sees; None for those of the lesson, 400.
        held_out: batches to judge by; the first batches of the data without them, and the report says
            so.
        lesson: learning rate, temperature, how often to look, and so on.
        min_agreement: the least share with the same top-1 at the end.
        checkpoint: a file that is written at each look and resumed from, to the same result.
        progress: called with steps done and in all.

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
    lesson = lesson or Lesson()
    if steps is not None:
        lesson = replace(lesson, steps=steps)
    twin = copy_model(student)
    batches = Batches.of(data, teacher)
    used = {**batches.checked(), "purpose": "recover"}
    judged = Batches.of(held_out if held_out is not None else _first(batches), teacher)
    judged.checked()
    _check_outputs(teacher, twin, batches)
    before = measure_drift(teacher, student, (), judged)
    start = State(best=_score(before), seen=[(0, _share(before))])
    start.subject = digest_of(student, teacher) + used["sha256"]
    state = _taught_(twin, teacher, batches, judged, lesson, start, checkpoint, progress)
    after = measure_drift(teacher, twin, (), judged)
    record(twin, {"recover": {"data": used, "lesson": asdict(lesson)}})
    report = _report(twin, before, after, used, state, held_out is not None, min_agreement)
    if not report.passed:
        raise CheckFailed(report, twin)
    return Result(twin, report)


def _first(batches: Batches) -> Callable[[], Iterator[Any]]:
    """The first eight batches, as they come."""

    def make() -> Iterator[Any]:
        source = batches.source() if callable(batches.source) else batches.source
        for _, batch in zip(range(8), source, strict=False):
            yield batch

    return make


def _check_outputs(teacher: nn.Module, student: nn.Module, batches: Batches) -> None:
    if any(p.dtype == torch.float16 for p in student.parameters()):
        what = "its parameters are float16, in which Adam's steps overflow"
        raise UsageError(Problem("student", what, "teach student.float(), with amp=True for speed"))
    args, kwargs = next(iter(batches))
    try:
        with evaluating(teacher), evaluating(student):
            expected = _floats(teacher(*args, **kwargs))
            got = _floats(student(*args, **kwargs))
    except Exception as reason:  # the forward is the user's, and so is the data
        what = f"a model does not run on it ({type(reason).__name__}: {reason})"
        raise UsageError(Problem("data", what, "give batches of the models' inputs")) from None
    shapes = [{name: tuple(t.shape) for name, t in outputs.items()} for outputs in (expected, got)]
    if shapes[0] != shapes[1] or not expected:
        what = f"the teacher puts out {shapes[0]}, the student {shapes[1]}"
        raise UsageError(Problem("teacher", what, "give the model that the student was made of"))


def _floats(outputs: Any) -> dict[str, Tensor]:
    return {n: t for n, t in flat_outputs(outputs).items() if t.is_floating_point()}


def _taught_(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    judged: Batches,
    lesson: Lesson,
    state: State,
    checkpoint: str | Path | None,
    progress: Progress | None,
) -> State:
    """Teach the student in place; leave it at its best."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(Problem("student", "no parameter of it is trained", "set requires_grad"))
    optimizer = torch.optim.Adam(parameters, lr=lesson.lr)
    best = {name: t.clone() for name, t in student.state_dict().items()}
    if checkpoint is not None and Path(checkpoint).exists():
        state, best = resume_(Path(checkpoint), student, optimizer, lesson, state.subject)
    flags = {name: module.training for name, module in student.named_modules()}
    for step, (args, kwargs) in _endless(batches, lesson.seed, state.step):
        if step >= lesson.steps or state.waited >= lesson.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] = lesson.lr * lesson.rate(step)
        loss = _loss(student.eval(), teacher, args, kwargs, lesson)
        if not all(of_all_ranks(bool(loss.isfinite()))):
            state.best_step = -1
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients_(parameters)
        optimizer.step()
        state.step = step + 1
        if progress is not None:
            progress(state.step, lesson.steps)
        if state.step % lesson.every == 0 or state.step == lesson.steps:
            best = _look(student, teacher, judged, state, best)
            if checkpoint is not None:
                write_state(Path(checkpoint), student, optimizer, state, best, lesson)
    student.load_state_dict(best)
    for name, module in student.named_modules():
        module.training = flags[name]
    student.zero_grad(set_to_none=True)
    return state


def _average_gradients_(parameters: list[nn.Parameter]) -> None:
    """Under `torch.distributed` all processes teach one student."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _loss(
    student: nn.Module,
    teacher: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    lesson: Lesson,
) -> Tensor:
    with evaluating(teacher):
        wanted = _floats(teacher(*args, **kwargs))
    device = next(student.parameters()).device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=lesson.amp):
        got = _floats(student(*args, **kwargs))
    losses = [
        _distance(got[name].float(), t.float(), lesson.temperature, lesson.scores)
        for name, t in wanted.items()
    ]
    return torch.stack(losses).sum()


def _distance(got: Tensor, wanted: Tensor, temperature: float, scores: bool) -> Tensor:
    if scores and wanted.dim() == 2 and wanted.shape[1] > 1:
        target = F.log_softmax(wanted / temperature, 1)
        ours = F.log_softmax(got / temperature, 1)
        return F.kl_div(ours, target, log_target=True, reduction="batchmean") * temperature**2
    return F.mse_loss(got, wanted) / wanted.square().mean().clamp_min(1e-12)


def _endless(batches: Batches, seed: int, start: int) -> Iterator[tuple[int, _Inputs]]:
    """Batches by step, in an order that depends on the seed alone; a list is shuffled, epoch by epoch."""
    step, epoch = 0, 0
    while True:
        source = batches.source
        epoch_batches = replace(batches, seed=seed + epoch)
        if isinstance(source, (list, tuple)):
            rng = torch.Generator().manual_seed(seed + epoch)
            order = torch.randperm(len(source), generator=rng).tolist()
            epoch_batches = replace(batches, source=[source[index] for index in order])
        for inputs in epoch_batches:
            if step >= start:
                yield step, inputs
            step += 1
        epoch += 1


def _look(
    student: nn.Module,
    teacher: nn.Module,
    judged: Batches,
    state: State,
    best: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Measure the student; return its weights if they are the best so far, else those that are."""
    drift = measure_drift(teacher, student, (), judged)
    score = _score(drift)
    state.seen.append((state.step, _share(drift)))
    if score > state.best:
        state.best, state.best_step, state.waited = score, state.step, 0
        return {name: t.detach().clone() for name, t in student.state_dict().items()}
    state.waited += 1
    return best


def _score(drift: Drift) -> float:
    """The agreement; of two with the same, or where there is none, nearer outputs."""
    share = _share(drift)
    if not math.isfinite(drift.output):
        return -math.inf
    return share - min(drift.output, 1e3) * 1e-6 if math.isfinite(share) else -drift.output


def _share(drift: Drift) -> float:
    agreement = drift.agreement
    return math.nan if agreement is None else agreement.same / agreement.samples


def _report(
    student: nn.Module,
    before: Drift,
    after: Drift,
    used: Mapping[str, Any],
    state: State,
    held_out: bool,
    min_agreement: float | None,
) -> Report:
    facts: dict[str, Any] = {
        "data": dict(used),
        "steps": state.step,
        "best at step": state.best_step,
        "measured on": "held-out data" if held_out else "the first batches of the data itself",
        **summary(before, after),
        "before": before.document(),
        "after": after.document(),
        "agreement by step": [[step, share] for step, share in state.seen if share == share],
    }
    checks = [Check("the loss stayed finite", state.best_step >= 0, way_out="a smaller lr")]
    checks += after.agreed(min_agreement, "more steps")
    return Report(verb="recover", subject=type(student).__name__, facts=facts, checks=tuple(checks))
