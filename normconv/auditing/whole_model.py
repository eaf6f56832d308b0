"""`audit`: does any sample of a batch see another, in training and eval mode, and through which layer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normconv.auditing.batches import Batch, batch_of
from normconv.auditing.mode import first_run, observe
from normconv.auditing.recording import Record
from normconv.auditing.telling import report_of
from normconv.auditing.twin import Twin, refuse_unfit, shaped, twin_of
from normconv.errors import CaptureError, Problem, UsageError
from normconv.graph.running import Innermost, first_line
from normconv.graph.tracing import shapes_of
from normconv.report import Report
from normconv.surgery import checked_inputs

__all__ = ["MODES", "audit"]

MODES = ("train", "eval")

_FirstRuns = dict[str, tuple[Record, dict[str, Tensor]]]


def audit(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor | None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    modes: Sequence[str] = MODES,
    batch_axis: int = 0,
) -> Report:
    """Find every layer through which one sample of a batch can see another.

    A copy of the model is run in float64 where it can be, once as it is and once with one sample
    changed. At every module the part of the other samples is compared, and put back where it changed,
    so that each module is judged by itself: blamed is the innermost one whose inputs agreed. Found is
    also what a run writes into parameters and buffers from the samples it saw. Norms over the batch
    that no run reaches are listed by their class.

    Args:
        model: any module; nothing of it is changed, training flags included.
        example_inputs: positional inputs. Of a single sample a batch of three is made.
        example_kwargs: keyword inputs.
        modes: ``train``, ``eval`` or both.
        batch_axis: the axis of the inputs that holds the samples. Inputs of another size along it are
            left alone.

    Returns:
        A report with a row and a failed check for each finding: the module, its class, the modes, the
        relative change of another sample, and the target that mends it. It has passed when samples
        are independent in every mode asked for; what could not be judged fails it too.

    Raises:
        UsageError: unknown mode, inputs with NaN, without an axis of samples or nothing to change.
        CaptureError: the model does not run on the inputs, naming the module that raised; it has no
            values (meta device); it comes in a wrapper (DataParallel, compiled, TorchScript).

    >>> import normconv as nc
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    >>> report = nc.audit(net, (torch.randn(8, 4),))
    >>> report.passed, [(row.site, row.action) for row in report.sites]
    (False, [('1', 'couples'), ('1', 'keeps statistics')])
    >>> nc.audit(net, (torch.randn(8, 4),), modes=("eval",)).passed
    True
    """
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    wanted = _checked_modes(modes)
    batch = batch_of(args, kwargs, batch_axis)
    refuse_unfit(model)
    source = shaped(model, batch)
    twin, batch, firsts = _first_runs(source, batch, wanted)
    seen = {
        mode: observe(twin, batch, mode == "train", record, written)
        for mode, (record, written) in firsts.items()
    }
    return report_of(model, source, twin, batch, seen)


def _checked_modes(modes: Sequence[str]) -> tuple[str, ...]:
    given = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in given if mode not in MODES]
    if unknown or not given:
        what = f"there is no mode {unknown[0]!r}" if unknown else "none is asked for"
        raise UsageError(Problem("modes", what, f"use some of {list(MODES)}"))
    return tuple(mode for mode in MODES if mode in given)


def _first_runs(
    source: nn.Module, batch: Batch, modes: tuple[str, ...]
) -> tuple[Twin, Batch, _FirstRuns]:
    """Run every mode once, in float64 if the model can, else in its own dtype.

    Raises:
        CaptureError: it can be run in neither.
    """
    try:
        twin, wide = twin_of(source, torch.float64), batch.cast(torch.float64)
        return twin, wide, {mode: first_run(twin, wide, mode == "train") for mode in modes}
    except CaptureError:
        raise
    except Exception:  # torch's dtype mismatches have no class of their own, nor have the user's
        twin = twin_of(source, None)
    firsts: _FirstRuns = {}
    for mode in modes:
        with Innermost(twin.model) as innermost:
            try:
                firsts[mode] = first_run(twin, batch, mode == "train")
            except Exception as reason:  # the forward is the user's
                where = innermost.describe() or type(source).__name__
                what = f"in {mode} mode: {first_line(reason)}"
                raise CaptureError(Problem(where, what, _fitting(batch, mode, modes))) from reason
    return twin, batch, firsts


def _fitting(batch: Batch, mode: str, modes: tuple[str, ...]) -> str:
    shapes = shapes_of((batch.args, batch.kwargs))
    if batch.enlarged:
        text = f"give a batch of several samples: of the one given {shapes} was made"
    else:
        text = f"check that the example inputs ({shapes}) fit the model"
    others = [other for other in modes if other != mode]
    return f"{text}, or audit the other mode alone (modes={tuple(others)})" if others else text
