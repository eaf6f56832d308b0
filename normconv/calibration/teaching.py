"""The steps of a lesson: what the student puts out comes nearer to what the teacher does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.calibration.batches import Batches
from normconv.calibration.lessons import Lesson, State
from normconv.calibration.ranks import of_all_ranks
from normconv.numerics import evaluating
from normconv.proof import flat_outputs

__all__ = ["floats_of", "teach_"]

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def teach_(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    lesson: Lesson,
    state: State,
    optimizer: torch.optim.Optimizer,
    sites: Sequence[str],
    after_step: Callable[[bool], None],
) -> None:
    """Teach the student in place, from where the state is to the end of the lesson.

    Args:
        student: in eval mode, with gradients: nothing random, and no statistics of a batch.
        teacher: not changed.
        batches: gone through again and again.
        lesson: how.
        state: steps done, and looks without a better result; `best_step` becomes −1 where the loss is not
            finite any more.
        optimizer: of the student's parameters.
        sites: modules of both whose outputs are compared, where the lesson asks for that.
        after_step: called after each, with whether it is time to look how good the student is.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step, inputs in _endless(batches, lesson.seed, state.step):
        if step >= lesson.steps or state.waited >= lesson.patience:
            return
        for group in optimizer.param_groups:
            group["lr"] = lesson.lr * lesson.rate(step)
        loss = _loss(student.eval(), teacher, inputs, lesson, sites if lesson.features else ())
        if not all(of_all_ranks(bool(loss.isfinite()))):
            state.best_step = -1
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients_(parameters)
        optimizer.step()
        state.step = step + 1
        after_step(state.step % lesson.every == 0 or state.step == lesson.steps)


def _average_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """Under `torch.distributed` all processes teach one student."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _loss(
    student: nn.Module, teacher: nn.Module, inputs: _Inputs, lesson: Lesson, sites: Sequence[str]
) -> Tensor:
    args, kwargs = inputs
    with evaluating(teacher), _outputs_at(teacher, sites) as theirs:
        wanted = floats_of(teacher(*args, **kwargs))
    device = next(student.parameters()).device.type
    with (
        torch.autocast(device, dtype=torch.bfloat16, enabled=lesson.amp),
        _outputs_at(student, sites) as ours,
    ):
        got = floats_of(student(*args, **kwargs))
    losses = [
        _distance(got[name].float(), t.float(), lesson.temperature, lesson.scores)
        for name, t in wanted.items()
    ]
    within = [_relative(o, t) for o, t in zip(ours, theirs, strict=True)]
    total = torch.stack(losses).sum()
    return total + lesson.features * torch.stack(within).mean() if within else total


def floats_of(outputs: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors that a model puts out, by name."""
    return {n: t for n, t in flat_outputs(outputs).items() if t.is_floating_point()}


@contextmanager
def _outputs_at(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Gather what modules put out while the block runs, call after call, with gradients."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        # The layer after may work in place on what is kept here.
        if isinstance(output, Tensor):
            seen.append(output.clone())

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _distance(got: Tensor, wanted: Tensor, temperature: float, scores: bool) -> Tensor:
    if scores and wanted.dim() == 2 and wanted.shape[1] > 1:
        target = F.log_softmax(wanted / temperature, 1)
        ours = F.log_softmax(got / temperature, 1)
        return F.kl_div(ours, target, log_target=True, reduction="batchmean") * temperature**2
    return _relative(got, wanted)


def _relative(got: Tensor, wanted: Tensor) -> Tensor:
    got, wanted = got.float(), wanted.float()
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
